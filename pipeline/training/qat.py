"""Quantization-aware training (QAT): each forward pass computes with the weights that a variant will store.

The weight of a layer is round(W + scale * B @ A): merged with its adapter, rounded to bf16, and rounded to the grid of
the variant by the code that writes the variant. So the variant stores exactly the weights that were trained. The usual
round(W) x + B A x trains another model, because an adapter is merged before the weights are rounded.

Gradients pass the rounding unchanged (the straight-through estimator, Bengio et al., 2013). For a merged weight they
are those of an ordinary LoRA layer. A weight is computed again in the backward pass, so one is in memory at a time.

https://arxiv.org/abs/1308.3432
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from pipeline.config.catalog import NEAREST
from pipeline.config.quantize import VariantSpec
from pipeline.config.schema import Config, TrainingRun
from pipeline.errors import ModelError, UserError
from pipeline.models.checkpoint.row_blocks import TILE_ELEMENTS
from pipeline.models.experts import is_expert
from pipeline.models.lora_adapter import with_product
from pipeline.models.matrices import quantizable_weights
from pipeline.quantization.formats import format_of
from pipeline.quantization.grid import Grid
from pipeline.quantization.layers import layer_grids
from pipeline.quantization.roundings import rounding
from pipeline.training.distributed import sharding
from pipeline.training.fused_layers import fuse_layer, is_plain_adapter

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import Linear as AdaptedLinear
    from transformers import PreTrainedModel

MERGE_DTYPE = torch.float64
_ELEMENTS_ON_GPU = 1 << 22  # weights that are computed at a time: 32 MB of float64


def trained_for(config: TrainingRun) -> VariantSpec | None:
    """Return the variant whose quantization the training includes; None for a training without."""
    return config.quantize.spec(config.train.qat) if config.train.qat else None


def merge_dtype(config: Config) -> torch.dtype:
    """Return the type in which an adapter is merged: float64 if training merged it too, on any device.

    Sums in float64 round to the same bf16 in any order of their terms, so devices and block sizes do not matter.
    """
    return MERGE_DTYPE if config.train.qat else torch.float32


def check_model(spec: VariantSpec, folder: Path) -> None:
    """Raise unless the weights of a base model can be quantized in training as a variant stores them.

    Raises:
        ModelError: if it is a mixture of experts.
        QuantizationError: if a layer fits no grid of the variant.
        UserError: if the model is sharded among processes.
    """
    if kind := sharding():
        raise UserError(f"train.qat {spec.name}: cannot round the shards of {kind}. Try: DDP, or without --accelerate")
    linear = quantizable_weights(folder)
    layer_grids(spec, linear)
    if expert := next(filter(is_expert, linear), None):
        raise ModelError(f"train.qat {spec.name}: cannot quantize experts in training ({expert}). Try: no qat")


def quantize_in_training(model: PeftModel, spec: VariantSpec, folder: Path, dtype: torch.dtype) -> None:
    """Make a model with LoRA adapters train, and be measured, with its weights as a variant stores them.

    Layers that the variant keeps in bf16 compute with their merged weight in bf16. An embedding that the variant
    quantizes is replaced by its quantized values once, since it is not trained.

    Args:
        model: the model with one plain LoRA adapter, on any device, not sharded.
        spec: the variant.
        folder: the base model.
        dtype: the compute type.

    Raises:
        ModelError: if the model lacks a layer of the variant.
        UserError: if the adapter is more than products of two factors.
    """
    form, (grids, _) = format_of(spec), layer_grids(spec, quantizable_weights(folder))
    base, unseen, adapted = cast("PreTrainedModel", model.get_base_model()), set(grids), set()
    for name, layer in base.named_modules():
        weight = f"{name}.weight"
        is_adapted = is_plain_adapter(layer)
        if not is_adapted and not (weight in grids and isinstance(layer, torch.nn.Linear)):
            continue
        _, grid = grids.get(weight, (None, None))
        inner = cast(torch.nn.Linear, layer.get_base_layer()) if is_adapted else layer
        fuse_layer(layer, dtype)
        fuse_layer(inner, dtype)
        inner.shipped = ShippedWeight(grid, form.to_round, dtype, layer if is_adapted else None)
        adapted |= set(map(id, (*layer.lora_A.parameters(), *layer.lora_B.parameters()))) if is_adapted else set()
        unseen.discard(weight)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in adapted:
            raise UserError(
                f"train.qat {spec.name}: quantizes plain LoRA layers only, and this adapter also trains {name}. "
                "Try: other train.lora.options"
            )
    if unseen:
        raise ModelError(f"{folder}: has no linear layer {min(unseen)} that could be quantized in training")
    if spec.quantizes_embeddings:
        _quantize_tables(base, form.to_round, form.TABLE)


@dataclass(frozen=True, eq=False)
class ShippedWeight:
    """The weight of a linear layer as a variant stores it, computed from that of the base model.

    Attributes:
        grid: the grid of the layer; None if the variant keeps it in bf16.
        to_round: converts rows to the type in which the variant rounds them.
        dtype: the compute type.
        adapter: the layer with its LoRA factors, of which the active ones count; None if the layer has no adapter.
    """

    grid: Grid | None
    to_round: Callable[[torch.Tensor], torch.Tensor]
    dtype: torch.dtype
    adapter: AdaptedLinear | None

    @torch.no_grad()
    def __call__(self, base: torch.Tensor) -> torch.Tensor:
        """Return the weight (N, K), in the compute type, for that of the base (N, K) in any floating type."""
        result = torch.empty(base.shape, dtype=self.dtype, device=base.device)
        elements = TILE_ELEMENTS if base.device.type == "cpu" else _ELEMENTS_ON_GPU
        step = max(1, elements // base.shape[1])
        with torch.autocast(base.device.type, enabled=False):
            for first in range(0, len(base), step):
                rows = self._merged(base[first : first + step], first)
                result[first : first + step] = rows if self.grid is None else self._rounded(rows, self.grid)
        return result

    def _merged(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        if self.adapter is None or self.adapter.disable_adapters:
            return rows.to(torch.bfloat16)
        name = self.adapter.active_adapters[0]
        a, b = (cast(torch.Tensor, part[name].weight) for part in (self.adapter.lora_A, self.adapter.lora_B))
        part, scale = b[first : first + len(rows)], self.adapter.scaling[name]
        return with_product(rows, a, part, scale, MERGE_DTYPE).to(torch.bfloat16)

    def _rounded(self, rows: torch.Tensor, grid: Grid) -> torch.Tensor:
        return rounding(NEAREST).round(self.to_round(rows), grid).dequantize(self.dtype)


@torch.no_grad()
def _quantize_tables(model: PreTrainedModel, to_round: Callable, grid: Grid) -> None:
    """Replace the embedding and the output head by what a variant stores in eight bits."""
    for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:  # may be the same one
        table = cast(torch.nn.Parameter, table)
        blocks = table.to(torch.bfloat16).split(max(1, TILE_ELEMENTS // table.shape[1]))
        stored = (rounding(NEAREST).round(to_round(rows), grid).dequantize(torch.bfloat16) for rows in blocks)
        table.data = torch.cat(list(stored)).to(table.dtype)
