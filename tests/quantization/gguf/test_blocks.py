"""Packed GGUF rows: the official package reads the chosen numbers, bit for bit."""

import numpy as np
import pytest
import torch

from pipeline.config.catalog import VARIANTS
from pipeline.config.schema import VariantSpec
from pipeline.errors import QuantizationError
from pipeline.quantization.formats.gguf.blocks import pack, plain
from pipeline.quantization.formats.gguf.format import FORMAT as GGUF
from pipeline.quantization.formats.gguf.sizes import row_bytes
from pipeline.quantization.grid import GroupQuantized
from pipeline.quantization.roundings import rounding

official = pytest.importorskip("gguf")
QUANTIZED = [(name, how) for name, variant in VARIANTS.items() if variant.format == "gguf" for how in variant.data_free]


WIDTH = 512


def weights(dtype=torch.bfloat16):
    torch.manual_seed(0)
    weight = torch.randn(48, WIDTH) * 0.05
    weight[3, :32], weight[4, 32:64], weight[5, 7] = 0, 0.25, 9.0  # nothing, all the same, an outlier
    weight[6, 256:], weight[7], weight[8] = 0, weight[7] * 1e-6, weight[8] ** 2 + 0.1  # a super-block; below float16
    return weight.to(dtype)


def kind_of(variant):
    return official.GGMLQuantizationType[VariantSpec(name=variant).variant.file_type]


@pytest.mark.parametrize("variant, how", QUANTIZED)
def test_packed_rows_dequantize_to_the_chosen_values(variant, how):
    spec = VariantSpec(name=variant, rounding=how).resolved()
    grid = GGUF.grid(spec, WIDTH)
    block = rounding(how).round(weights(), grid)
    packed = pack(block)
    assert packed.dtype == torch.uint8 and packed.shape == (48, row_bytes(kind_of(variant).name, WIDTH))
    assert len(packed.flatten()) == 48 * official.quants.quant_shape_to_byte_shape((WIDTH,), kind_of(variant))[0]
    found = torch.from_numpy(official.quants.dequantize(packed.numpy(), kind_of(variant)))
    assert torch.equal(found, block.dequantize())


@pytest.mark.parametrize("variant, how", [(v, how) for v, how in QUANTIZED if how != "rtn" and "_k" not in v])
def test_the_chosen_numbers_are_as_close_as_those_of_the_official_package(variant, how):  # which writes no K-quants
    grid, weight = GGUF.grid(VariantSpec(name=variant, rounding=how).resolved(), WIDTH), weights(torch.float32)
    theirs = official.quants.quantize(weight.numpy(), kind_of(variant))
    error = (torch.from_numpy(official.quants.dequantize(theirs, kind_of(variant))) - weight).square().mean()
    assert (rounding(how).round(weight, grid).dequantize() - weight).square().mean() < 1.1 * error


@pytest.mark.parametrize("scale, zero", [(lambda s: s * 1.01, 0.0), (torch.neg, 0.0), (torch.clone, 0.001)])
def test_scales_that_a_super_block_cannot_store_are_refused(scale, zero):
    grid = GGUF.grid(VariantSpec(name="gguf-q4_k").resolved(), WIDTH)
    made = rounding("rtn").round(weights(), grid)
    changed = made.scale.clone()
    changed[0, 1] = scale(changed[0, 1])
    with pytest.raises(QuantizationError, match="has scales or minimums that its type cannot store"):
        pack(GroupQuantized(made.codes, changed, made.zero + zero, grid))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("shape", [(48, WIDTH), (48,)])
def test_a_plain_row_is_rounded_once(kind, shape):
    rows = weights(torch.float32)[:, : shape[-1]] if len(shape) == 2 else weights(torch.float32)[:, 0]
    stored = plain(rows, kind)
    kept = official.quants.dequantize(stored.numpy(), official.GGMLQuantizationType[kind])
    expected = rows.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]).float()
    assert np.array_equal(np.asarray(kept, dtype=np.float32).reshape(shape), expected.numpy())


def test_float16_overflow_is_refused():
    with pytest.raises(QuantizationError, match="float16 cannot hold; take bf16"):
        plain(torch.tensor([[1e6, 0.0]]), "F16")
    grid = GGUF.grid(VariantSpec(name="gguf-q4_0").resolved(), 32)
    with pytest.raises(QuantizationError, match="scale float16 cannot hold"):
        pack(rounding("rtn").round(torch.full((1, 32), 1e7), grid))
