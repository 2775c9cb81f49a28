"""AWQ: the format of AutoAWQ, which vLLM, SGLang and TGI read."""
