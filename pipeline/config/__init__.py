"""The typed configuration, the catalogue of names, and the YAML loader."""
