"""What bitsandbytes stores a weight as, tensor by tensor, and so how many bytes it takes. Imports no torch.

It has no `table_bytes`: embeddings and output heads stay as they are.
"""

from __future__ import annotations

import json

from pipeline.config.quantize import VariantSpec
from pipeline.quantization.formats.torchao import sizes as torchao
from pipeline.quantization.formats.torchao.sizes import Parts, parts_bytes, plain_bytes

__all__ = ["layer_bytes", "misfit", "plain_bytes"]

INT8 = "llm_int8"  # transformers' name of the method
NF4 = "nf4"  # bitsandbytes' names of the numbers with four bits
FP4 = "fp4"
BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share a scale of their own, if they are quantized too
NUMBER_BYTES = 24  # as many as the text of a number can take


def parts(shape: tuple[int, ...], kind: str) -> Parts:
    """Return the stored tensors of a weight (N, K): the end of each name after that of the module.

    Args:
        kind: of its numbers. The scales of NF4 are quantized too ("double quantization").
    """
    rows, width = shape
    if kind == INT8:
        return {
            ".weight": torchao.parts(shape, 8, width)["qdata"],
            ".SCB": ("float32", (rows,)),
            ".weight_format": ("uint8", ()),
        }
    blocks = -(-rows * width // BLOCK)
    found: Parts = {
        ".weight": ("uint8", (rows * width // 2, 1)),
        ".weight.absmax": ("uint8" if kind == NF4 else "float32", (blocks,)),
        ".weight.quant_map": ("float32", (16,)),
        f".weight.quant_state.bitsandbytes__{kind}": ("uint8", (len(state(shape, kind)),)),
    }
    if kind == NF4:
        found[".weight.nested_absmax"] = ("float32", (-(-blocks // SCALE_BLOCK),))
        found[".weight.nested_quant_map"] = ("float32", (256,))
    return found


def state(shape: tuple[int, ...], kind: str, offset: float = 0.0) -> bytes:
    """Return the description of a weight (N, K) in four bits, which bitsandbytes stores as JSON in a tensor.

    Spaces at its end make the length independent of `offset`, so that files can be planned.

    Args:
        offset: the mean of the scales, if they are quantized too.
    """
    about: dict[str, object] = {"quant_type": kind, "blocksize": BLOCK, "dtype": "bfloat16", "shape": shape}
    if kind == NF4:
        about |= {"nested_blocksize": SCALE_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    text = json.dumps(about)
    return (text + " " * (NUMBER_BYTES - len(json.dumps(offset))) * (kind == NF4)).encode()


def is_state_of(text: bytes, shape: tuple[int, ...], kind: str) -> bool:
    """Return True if a stored description is one of a weight (N, K) with these numbers; its dtype may differ."""
    try:
        found, expected = json.loads(text), json.loads(state(shape, kind))
    except ValueError:
        return False
    keys = expected.keys() - {"dtype", "nested_dtype", "nested_offset"}
    return isinstance(found, dict) and all(found.get(key) == expected[key] for key in keys)


def layer_bytes(spec: VariantSpec, shape: tuple[int, ...]) -> int:
    """Return the bytes of a layer's weight (N, K)."""
    return parts_bytes(parts(shape, spec.variant.values))


def misfit(spec: VariantSpec, shape: tuple[int, ...]) -> str | None:
    """Return the reason why a weight (N, K) cannot be stored: blocks would cross rows, which some CPUs cannot run."""
    if spec.variant.values == INT8 or shape[1] % BLOCK == 0:
        return None
    return f"blocks of {BLOCK} do not divide a width of {shape[1]}"
