"""This machine: its hardware, files, libraries and secrets."""
