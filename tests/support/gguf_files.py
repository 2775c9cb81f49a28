"""Models that llama.cpp can compute, and the logits that are expected of it."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from pipeline.config.catalog import VARIANTS
from pipeline.config.schema import VariantSpec
from pipeline.models.matrices import quantizable_weights, table_weights
from pipeline.quantization.formats.gguf.format import FORMAT as GGUF
from pipeline.quantization.roundings import rounding
from tests.support.models import MIXTURES, weight_in

TYPES = [name for name, variant in VARIANTS.items() if variant.format == "gguf" and not variant.quantizer]
# What of each architecture llama.cpp can compute: SmolLM3's fourth layers are without rotary embeddings.
MODELS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 4},
    "gemma3_text": {},
    **dict.fromkeys(MIXTURES, {}),
}
IDS = [7, 200, 31, 64, 5, 5, 90, 12, 250, 33, 2, 149] * 3  # more than Gemma's sliding window
# llama.cpp rounds what goes into a product as well: to float16, to bfloat16, or to 8 bits in groups.
OFF = {"gguf-f16": 0.003, "gguf-bf16": 0.015}
OFF_QUANTIZED = 0.05


def expected_logits(folder, variant=None, ids=IDS, **options):
    """Logits of transformers in float32, of the numbers that the variant's codes mean if one is named."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    spec = VariantSpec(name=variant, **options).resolved() if variant else None
    if spec and spec.rounding:
        for name in quantizable_weights(folder):
            weight = weight_in(model, name)
            grid = GGUF.grid(spec, weight.shape[1])
            weight.copy_(rounding(spec.rounding).round(weight, grid).dequantize())
        for name in table_weights(folder) if spec.embeddings == "int8" else ():
            weight = model.get_parameter(name)
            weight.data = rounding("rtn").round(weight.data, GGUF.TABLE).dequantize()
    return model(torch.tensor([ids])).logits[0]
