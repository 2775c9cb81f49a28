"""Measure models on text, and decide what a variant may lose."""
