"""bitsandbytes: int8, NF4 and FP4 as transformers saves and loads them."""
