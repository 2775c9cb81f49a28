"""compressed-tensors: the folders of integer and float8 codes that servers run."""
