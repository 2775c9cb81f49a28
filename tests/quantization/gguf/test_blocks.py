"""Packed GGUF rows: the official package reads the chosen numbers, bit for bit."""

import numpy as np
import pytest
import torch

from pipeline.config.catalog import VARIANTS
from pipeline.config.schema import VariantSpec
from pipeline.errors import QuantizationError
from pipeline.quantization.formats.gguf.blocks import pack, plain, row_bytes
from pipeline.quantization.formats.gguf.format import FORMAT as GGUF
from pipeline.quantization.roundings import rounding

official = pytest.importorskip("gguf")
QUANTIZED = [(name, how) for name, variant in VARIANTS.items() if variant.format == "gguf" for how in variant.data_free]


def weights(dtype=torch.bfloat16):
    torch.manual_seed(0)
    weight = torch.randn(48, 160) * 0.05
    weight[3, :32], weight[4, 32:64], weight[5, 7] = 0, 0.25, 9.0  # nothing, all the same, an outlier
    return weight.to(dtype)


def kind_of(variant):
    return official.GGMLQuantizationType[VariantSpec(name=variant).variant.file_type]


@pytest.mark.parametrize("variant, how", QUANTIZED)
def test_packed_rows_dequantize_to_the_chosen_values(variant, how):
    spec = VariantSpec(name=variant, rounding=how).resolved()
    grid = GGUF.grid(spec, 160)
    block = rounding(how).round(weights(), grid)
    packed = pack(block)
    assert packed.dtype == torch.uint8 and packed.shape == (48, row_bytes("", 160, grid))
    assert len(packed.flatten()) == 48 * official.quants.quant_shape_to_byte_shape((160,), kind_of(variant))[0]
    found = torch.from_numpy(official.quants.dequantize(packed.numpy(), kind_of(variant)))
    assert torch.equal(found, block.dequantize())


@pytest.mark.parametrize("variant, how", [(v, how) for v, how in QUANTIZED if how != "rtn"])
def test_the_chosen_numbers_are_as_close_as_those_of_the_official_package(variant, how):
    grid, weight = GGUF.grid(VariantSpec(name=variant).resolved(), 160), weights(torch.float32)
    theirs = official.quants.quantize(weight.numpy(), kind_of(variant))
    error = (torch.from_numpy(official.quants.dequantize(theirs, kind_of(variant))) - weight).square().mean()
    assert (rounding(how).round(weight, grid).dequantize() - weight).square().mean() < 1.1 * error


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("shape", [(48, 160), (48,)])
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
