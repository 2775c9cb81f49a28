"""Roundings: int8 equals torchao, the others beat rounding to nearest, and rows are independent."""

import pytest
import torch

from pipeline.config.catalog import VARIANTS
from pipeline.quantization.formats.torchao.format import INT8
from pipeline.quantization.grid import Grid
from pipeline.quantization.roundings import rounding, search

TYPES = (torch.float32, torch.bfloat16, torch.float16)
INT4 = Grid(4, 32, "float", torch.bfloat16)
CASES = [("rtn", INT8), ("rtn", Grid(4, 64, "integer", torch.float16))]
DATA_FREE = VARIANTS["int4"].data_free
BETTER = [name for name in DATA_FREE if name != "rtn"]
CASES += [(name, INT4) for name in DATA_FREE]
CASES += [(name, Grid(4, 32, "float", torch.float16, from_zero=True)) for name in DATA_FREE]
CASES += [("search", Grid(4, 32, "none", torch.float16)), ("search", Grid(8, 32, "none", torch.float16))]
CASES += [("search", Grid(4, 64, "integer", torch.float16, positive=True))]
CASES += [("hqq", INT8), ("hqq", Grid(8, 64, "none", torch.float32)), ("hqq", Grid(4, 32, "none", torch.float16))]


def weights(seed: int = 0, rows: int = 48, width: int = 192, size: float = 0.05) -> torch.Tensor:
    """What trained weights look like: nearly normal, with a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator) * size
    return weight + torch.randn(rows, width, generator=generator).pow(5) * size * 0.02


def awkward(dtype: torch.dtype, size: float) -> torch.Tensor:
    """Rows of zeros, of one sign, of one number, of ties between two codes."""
    weight = weights(size=size).clamp(-6e4, 6e4)
    weight[0] = 0
    weight[1] = weight[1].abs()
    weight[2] = -weight[2].abs()
    weight[3] = 0
    weight[3, 7] = size
    weight[4] = size
    weight[5] = (torch.arange(192) % 128 - 63.5) * size / 127.5
    return weight.to(dtype)


@pytest.mark.parametrize("size", [1e-9, 1e-4, 0.05, 1.0, 300.0])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_int8_is_bit_identical_to_torchao(dtype, size):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    weight = awkward(dtype, size)
    layer = torch.nn.Linear(192, 48, bias=False, dtype=dtype)
    layer.weight.data = weight.clone()
    quantize_(layer, Int8WeightOnlyConfig())
    theirs, ours = layer.weight, rounding("rtn").round(weight, INT8)
    assert torch.equal(ours.codes, theirs.qdata)
    assert torch.equal(ours.scale, theirs.scale) and ours.scale.dtype == theirs.scale.dtype
    assert ours.zero is None and not theirs.zero_point.any()
    assert torch.equal(ours.dequantize(dtype), theirs.dequantize())


@pytest.mark.parametrize("size", [1e-4, 0.05, 300.0])
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_int8_in_groups_is_bit_identical_to_torchao(dtype, group_size, size):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    weight = awkward(dtype, size)
    layer = torch.nn.Linear(192, 48, bias=False, dtype=dtype)
    layer.weight.data = weight.clone()
    quantize_(layer, Int8WeightOnlyConfig(granularity=PerGroup(group_size)))
    theirs, ours = layer.weight, rounding("rtn").round(weight, Grid(8, group_size, "none", torch.float32))
    assert torch.equal(ours.codes, theirs.qdata) and torch.equal(ours.scale, theirs.scale.float())
    assert torch.equal(ours.dequantize(dtype), theirs.dequantize())


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", BETTER)
def test_the_better_roundings_have_a_smaller_mean_error_than_rounding_to_nearest(name, seed, group_size):
    grid, weight = Grid(4, group_size, "float", torch.bfloat16), weights(seed, width=256)
    ours, nearest = ((rounding(n).round(weight, grid).dequantize() - weight).abs().mean() for n in (name, "rtn"))
    assert ours < 0.99 * nearest


@pytest.mark.parametrize(("grid", "at_most"), [(INT4, 0.95), (Grid(4, 32, "none", torch.float16), 0.99)], ids=str)
def test_search_gains_from_narrower_ranges(monkeypatch, grid, at_most):
    """Regression from the full range alone stops at a worse result in many groups."""

    def error() -> float:
        return float((rounding("search").round(weight, grid).dequantize() - weight).square().mean())

    weight = weights(width=512)
    found = error()
    monkeypatch.setattr(search, "NARROWER", (1.0,))
    assert found < at_most * error()


@pytest.mark.parametrize("seed", range(3))
def test_hqq_makes_no_group_worse(seed):
    weight = weights(seed)
    hqq, rtn = (
        (rounding(name).round(weight, INT4).dequantize() - weight).abs().view(48, -1, 32).mean(-1)
        for name in ("hqq", "rtn")
    )
    assert (hqq <= rtn * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    "grid", [INT8, Grid(8, 32, "none", torch.float32), Grid(4, 32, "none", torch.float16)], ids=str
)
def test_hqq_fits_the_scales_of_a_grid_without_zeros(grid):
    weight = weights()
    hqq, rtn = ((rounding(name).round(weight, grid).dequantize() - weight).abs() for name in ("hqq", "rtn"))
    groups = 192 // grid.group(192)
    assert (hqq.view(48, groups, -1).mean(-1) <= rtn.view(48, groups, -1).mean(-1) * (1 + 1e-5)).all()
    assert hqq.mean() < 0.999 * rtn.mean()


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_search_fits_scales_of_either_sign_where_there_are_no_zeros(bits):
    weight, grid = weights(), Grid(bits, 32, "none", torch.float16)
    found, rtn = (rounding(name).round(weight, grid) for name in ("search", "rtn"))
    error, nearest = ((q.dequantize() - weight).square().view(48, 6, 32).mean(-1) for q in (found, rtn))
    assert (error <= nearest * (1 + 1e-5)).all() and error.mean() < 0.9 * nearest.mean()
    assert (found.scale < 0).any() and (found.scale > 0).any() and (found.codes == grid.lowest).any()


@pytest.mark.parametrize("values", ["integer", "e4m3"])
@pytest.mark.parametrize("bits", [4, 8])
def test_search_keeps_scales_positive_if_the_grid_says_so(bits, values):
    if values == "e4m3" and bits != 8:
        pytest.skip("float8 has eight bits")
    weight, grid = weights(), Grid(bits, 32, "none", torch.bfloat16, positive=True, values=values)
    found, rtn = (rounding(name).round(weight, grid) for name in ("search", "rtn"))
    error, nearest = ((q.dequantize() - weight).square().view(48, 6, 32).mean(-1) for q in (found, rtn))
    assert (found.scale > 0).all()
    assert (error <= nearest * (1 + 1e-5)).all() and error.mean() < 0.99 * nearest.mean()


def test_hqq_refuses_integer_zeros():
    with pytest.raises(ValueError, match="float zeros"):
        rounding("hqq").round(weights(), Grid(4, 32, "integer", torch.float16))


def parts(quantized) -> tuple[torch.Tensor, ...]:
    return tuple(t for t in (quantized.codes, quantized.scale, quantized.zero) if t is not None)


@pytest.mark.parametrize("block", [1, 7, 16])
@pytest.mark.parametrize("name, grid", CASES, ids=str)
def test_blocks_of_rows_give_what_the_whole_gives(name, grid, block):
    weight = weights()
    # Groups for which hqq has nothing to improve must not stop, nor be carried on by, the others.
    weight[::3] = torch.linspace(-1, 1, 192)
    weight[1] = 0.25
    whole = rounding(name).round(weight, grid)
    pieces = [rounding(name).round(weight[i : i + block], grid) for i in range(0, 48, block)]
    for together, apart in zip(parts(whole), zip(*map(parts, pieces), strict=True), strict=True):
        assert torch.equal(together, torch.cat(apart))


@pytest.mark.parametrize("name, grid", CASES, ids=str)
def test_the_same_weight_gives_the_same_codes_however_many_threads(name, grid):
    before, weight = torch.get_num_threads(), weights(rows=96)
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(parts(rounding(name).round(weight, grid)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name, grid", CASES, ids=str)
def test_the_weight_itself_is_left_as_it_was(name, grid):
    weight = weights()
    rounding(name).round(weight, grid)
    assert torch.equal(weight, weights())


# Without zeros it is another matter: scales are computed in the weight's type, as torchao does.
@pytest.mark.parametrize("name, grid", [case for case in CASES if case[1].zero != "none"], ids=str)
def test_bf16_weights_are_rounded_as_their_float32_values_are(name, grid):
    weight = weights().bfloat16()
    for a, b in zip(
        parts(rounding(name).round(weight, grid)), parts(rounding(name).round(weight.float(), grid)), strict=True
    ):
        assert torch.equal(a, b)


def test_every_rounding_in_the_catalog_exists():
    named = {name for variant in VARIANTS.values() for name in variant.roundings}
    assert "rtn" in named
    assert all(callable(rounding(name).round) for name in named)


@pytest.mark.parametrize(
    "group_size, shift, at_most", [(32, 0, 0.93), (32, 0.1, 0.88), (128, 0, 0.92), (None, 0, 0.88)]
)
def test_search_with_integer_zeros_loses_less_than_rounding_to_nearest_in_every_group(group_size, shift, at_most):
    grid, weight = Grid(4, group_size, "integer", torch.float16, positive=True), weights(width=256) + shift
    errors = []
    for name in ("search", "rtn"):
        made = rounding(name).round(weight, grid)
        assert made.zero.dtype == torch.uint8 and made.zero.max() <= 15 and (made.scale > 0).all()
        errors.append((made.dequantize() - weight).square().view(48, -1, grid.group(256)).mean(-1))
    assert (errors[0] <= errors[1] * 1.0001).all() and errors[0].mean() < at_most * errors[1].mean()
