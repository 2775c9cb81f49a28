"""How large a variant becomes, from the shapes of the model's weights."""

from __future__ import annotations

import fnmatch

from pipeline.config.catalog import GROUP_SIZES, VARIANTS
from pipeline.config.schema import VariantSpec
from pipeline.planning.model import Sizes

# Bits that GGUF's types take for a weight, scales included. Those of mixtures are of the whole model.
GGUF_BITS = {
    "f16": 16, "bf16": 16, "q8_0": 8.5, "q4_0": 4.5, "q4_1": 5, "q5_0": 5.5, "q5_1": 6,
    "q4_k_m": 4.85, "q5_k_m": 5.7, "q6_k": 6.57,
}  # fmt: skip
# K-quants have blocks of 256; llama.cpp gives a matrix of another width the next larger of the older types.
K_BLOCK = 256
INSTEAD_BITS = {"q4_k_m": 5.5, "q5_k_m": 6, "q6_k": 8.5}
TABLE_BITS = 8.5  # of GGUF's Q8_0
TILE_ROWS, TILE_COLUMNS = 8, 1024  # that int4 in tiles fills up to


def stored_bytes(sizes: Sizes, spec: VariantSpec, merged: bool) -> int:
    """Size of a variant's weights, in bytes.

    Args:
        merged: it is made of a merged model, which is in bf16, and not of the base as it is stored.
    """
    gguf = VARIANTS[spec.name].format == "gguf"
    count = 0.0
    for name, tensor in sizes.tensors.items():
        if name in sizes.linear and not _is_named(spec.keep, name):
            if gguf:
                count += _gguf_bits(spec, tensor.shape[1]) / 8 * tensor.numel
            else:
                count += _int8(tensor.shape, None) if _is_named(spec.int8, name) else _torchao(spec, tensor.shape)
        elif name in sizes.tables and VARIANTS[spec.name].quantizer:  # which gives them its best type
            count += _gguf_bits(VariantSpec(name="gguf-q6_k"), tensor.shape[1]) / 8 * tensor.numel
        elif name in sizes.tables and spec.embeddings == "int8":
            count += TABLE_BITS / 8 * tensor.numel if gguf else _int8(tensor.shape, None)
        elif gguf and len(tensor.shape) == 1:
            count += 4 * tensor.numel
        elif gguf and not _rounds(spec):
            count += 2 * tensor.numel
        else:
            count += (2 if merged else tensor.item_bytes) * tensor.numel
    return int(count)


def _torchao(spec: VariantSpec, shape: tuple[int, ...]) -> float:
    if spec.name != "int4":
        return _int8(shape, spec.group_size)
    rows, width = shape
    group = _group(spec.group_size, width)
    if spec.packing == "tile_packed":
        rows, width = -(-rows // TILE_ROWS) * TILE_ROWS, -(-width // TILE_COLUMNS) * TILE_COLUMNS
    return rows * width / 2 + 4 * rows * width / group  # codes of half a byte, scale and zero in bf16


def _int8(shape: tuple[int, ...], group_size: int | None) -> float:
    rows, width = shape
    groups = width // _group(group_size, width) if group_size else 1
    return rows * width + 5 * rows * groups  # a float32 scale and a byte of zeros


def _group(asked: int | None, width: int) -> int:
    """The largest group size up to the one asked for that divides a width."""
    return next((g for g in sorted(GROUP_SIZES, reverse=True) if g <= (asked or 0) and width % g == 0), width)


def _gguf_bits(spec: VariantSpec, width: int) -> float:
    kind = spec.name.removeprefix("gguf-")
    if width % K_BLOCK and kind in INSTEAD_BITS:
        return INSTEAD_BITS[kind]
    return GGUF_BITS[kind]


def _rounds(spec: VariantSpec) -> bool:
    return VARIANTS[spec.name].bits < 16


def _is_named(patterns: list[str], name: str) -> bool:
    return any(fnmatch.fnmatchcase(name.removesuffix(".weight"), pattern) for pattern in patterns)
