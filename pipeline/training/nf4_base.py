"""NF4 with double quantization: how QLoRA training holds a base model (Dettmers et al., 2023)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline.models.safe_loading import open_model
from pipeline.system import hardware

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share a scale of their own


def load_base(folder: Path, in_nf4: bool, divided: bool = False) -> PreTrainedModel:
    """The base model as training holds it: linear layers in NF4 (or all in bf16), on the GPU where there is one.

    Args:
        divided: it will be divided among processes (FSDP, DeepSpeed), which can only be done with
            floating-point tensors: the same 4-bit codes are then held as bf16, four to a number.
    """
    from transformers import BitsAndBytesConfig
    from transformers.integrations import is_deepspeed_zero3_enabled

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=hardware.compute_dtype("cuda" if torch.cuda.is_available() else "cpu"),
        bnb_4bit_quant_storage=torch.bfloat16 if divided else torch.uint8,
    )
    whole_on_gpu = torch.cuda.is_available() and not is_deepspeed_zero3_enabled()  # which divides it while it loads
    model = open_model(
        folder,
        dtype=torch.bfloat16,
        quantization_config=config if in_nf4 else None,
        device_map={"": torch.cuda.current_device()} if whole_on_gpu else None,
    )
    if in_nf4 and model.device.type == "cpu":
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.clone()  # or the whole file stays mapped for what is left of it
    for module in model.modules():
        # On CPUs with AVX512-BF16 bitsandbytes repacks weights in place at the first evaluation:
        # its scales lose precision, widths that 64 does not divide fail, and what comes after
        # trains on other numbers. The ordinary path has none of this.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


class HeldInNf4:
    """A weight (N, K) as NF4 training held it, from which rows come back in bf16.

    Scales of blocks of 64 are quantized in their turn, about the mean of them all, so every
    row has to be seen before any comes back. What is held meanwhile is half a byte a weight.
    """

    def __init__(self, pieces: Iterable[torch.Tensor], shape: tuple[int, int]):
        """`pieces` are the weight's rows in order, each a multiple of `rows_together` but the last."""
        from bitsandbytes.functional import dequantize_blockwise, quantize_4bit, quantize_blockwise

        self.shape = shape
        self._codes = torch.empty(-(-shape[0] * shape[1] // 2), dtype=torch.uint8)
        scales, position = [], 0
        for piece in pieces:
            codes, state = quantize_4bit(piece.to(torch.bfloat16), blocksize=BLOCK, quant_type="nf4")
            self._codes[position : position + codes.numel()] = codes.view(-1)
            position += codes.numel()
            scales.append(state.absmax)
        scale = torch.cat(scales)
        offset = scale.mean()
        quantized, state = quantize_blockwise(scale - offset, blocksize=SCALE_BLOCK)
        self._scale = dequantize_blockwise(quantized, state) + offset

    def rows(self, first: int, stop: int) -> torch.Tensor:
        """Rows `first`, which `rows_together` divides, to `stop`, as training computed with them."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        width = self.shape[1]
        start, end = first * width, stop * width
        codes, scale = self._codes[start // 2 : -(-end // 2)], self._scale[start // BLOCK : -(-end // BLOCK)]
        shape = torch.Size((stop - first, width))
        state = QuantState(absmax=scale, shape=shape, dtype=torch.bfloat16, blocksize=BLOCK, quant_type="nf4")
        return dequantize_4bit(codes.unsqueeze(1), state)


def rows_together(rows: int, width: int) -> int:
    """Pieces of a weight are multiples of so many rows: any, where blocks of NF4 end with the rows, else all of them.

    Where a block goes on in the next row, what bitsandbytes' CPU kernel makes of it depends on the whole shape.
    """
    return rows if width % BLOCK else 1
