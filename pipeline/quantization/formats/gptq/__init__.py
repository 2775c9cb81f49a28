"""GPTQ: the format of AutoGPTQ and gptqmodel, which vLLM, SGLang, TGI and ExLlama read."""
