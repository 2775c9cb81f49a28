"""GGUF: one file with weights, tokenizer and chat template, for llama.cpp and Ollama."""
