"""NF4 with double quantization, in which QLoRA training holds a base model (Dettmers et al., 2023)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline.models.safe_loading import open_model
from pipeline.quantization.formats import settle
from pipeline.system import hardware

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share a scale of their own


def load_base(
    folder: Path,
    in_nf4: bool,
    sharded: bool = False,
    attention: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> PreTrainedModel:
    """Load the base model for training: linear layers in NF4, or all layers in `dtype`; on the GPU if there is one.

    Args:
        folder: the base model.
        in_nf4: hold linear layers in NF4.
        sharded: True if FSDP or DeepSpeed will shard the model. They can only shard floating-point tensors, so four
            4-bit codes are then held in one bf16 number.
        attention: the kernel of attention, as transformers names it; None for its choice.
        dtype: the type of all weights that are not in NF4.
    """
    from transformers import BitsAndBytesConfig
    from transformers.integrations import is_deepspeed_zero3_enabled

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=hardware.compute_dtype("cuda" if torch.cuda.is_available() else "cpu"),
        bnb_4bit_quant_storage=torch.bfloat16 if sharded else torch.uint8,
    )
    whole_on_gpu = torch.cuda.is_available() and not is_deepspeed_zero3_enabled()  # which shards it while it loads
    model = open_model(
        folder,
        dtype=dtype,
        quantization_config=config if in_nf4 else None,
        device_map={"": torch.cuda.current_device()} if whole_on_gpu else None,
        **({"attn_implementation": attention} if attention else {}),
    )
    if (in_nf4 or dtype == torch.float32) and model.device.type == "cpu":
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.clone()  # else the whole file stays mapped, and must not change
    settle(model)  # else later steps would train on other numbers
    return model


class Nf4Weight:
    """A weight (N, K) in NF4, as training held it, with rows that can be read in bf16.

    The scales of blocks of 64 are quantized too, relative to their mean, so every row is read first. Meanwhile a
    weight takes half a byte.

    Args:
        pieces: the rows in order; the number of rows of each but the last is a multiple of `row_multiple`.
        shape: (N, K).
    """

    def __init__(self, pieces: Iterable[torch.Tensor], shape: tuple[int, int]):
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
        """Return the rows from `first`, a multiple of `row_multiple`, up to `stop`, (stop - first, K) in bf16."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        width = self.shape[1]
        start, end = first * width, stop * width
        codes, scale = self._codes[start // 2 : -(-end // 2)], self._scale[start // BLOCK : -(-end // BLOCK)]
        shape = torch.Size((stop - first, width))
        state = QuantState(absmax=scale, shape=shape, dtype=torch.bfloat16, blocksize=BLOCK, quant_type="nf4")
        return dequantize_4bit(codes.unsqueeze(1), state)


def row_multiple(rows: int, width: int) -> int:
    """Return the number of rows that must be quantized together: 1 if no block crosses rows, else all rows.

    If a block crosses rows, the result of bitsandbytes' CPU kernel depends on the whole shape.
    """
    return rows if width % BLOCK else 1
