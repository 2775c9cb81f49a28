"""Load a model or a variant from its files and run it fast on this machine."""
