"""GGUF, checked against llama.cpp and the official package."""
