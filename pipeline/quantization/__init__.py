"""Weights -> codes on a grid -> files. Rounding and storage are separate choices."""
