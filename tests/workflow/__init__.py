"""Whole runs, as a user would make them."""
