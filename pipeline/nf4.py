"""NF4 with double quantization: how QLoRA training holds a base model (Dettmers et al., 2023)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_base(folder: Path, in_nf4: bool) -> PreTrainedModel:
    """The base model as training holds it: linear layers in NF4 (or all in bf16), on the GPU where there is one."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        quantization_config=config if in_nf4 else None,
        device_map={"": torch.cuda.current_device()} if torch.cuda.is_available() else None,
    )
    for module in model.modules():
        # On CPUs with AVX512-BF16 bitsandbytes repacks weights in place at the first evaluation:
        # its scales lose precision, widths that 64 does not divide fail, and what comes after
        # trains on other numbers. The ordinary path has none of this.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def as_nf4(weight: torch.Tensor) -> torch.Tensor:
    """The weight (N, K) as NF4 training saw it: quantized and back, in bf16."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight.to(torch.bfloat16), quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(codes, state)
