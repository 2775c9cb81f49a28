"""Grids: numbers by definition, and weights rounded to the nearest code."""

import itertools

import pytest
import torch

from pipeline.config.catalog import GROUP_SIZES, fitting_group_size
from pipeline.quantization.grid import (
    Grid,
    GroupQuantized,
    assemble,
    choose_codes,
    in_groups,
)
from pipeline.quantization.roundings import rounding

GRIDS = [
    Grid(bits, group, zero, dtype)
    for bits, group, zero, dtype in itertools.product(
        (4, 8), (None, 32), ("none", "integer", "float"), (torch.float32, torch.bfloat16, torch.float16)
    )
]
FLOAT8 = Grid(8, None, "none", torch.bfloat16, positive=True, values="e4m3")


def name_of(grid: Grid) -> str:
    return f"{grid.bits}-{grid.group_size}-{grid.zero}-{str(grid.scale_dtype).removeprefix('torch.')}"


@pytest.fixture(params=GRIDS, ids=name_of)
def grid(request) -> Grid:
    return request.param


def weights(seed: int, rows: int = 6, width: int = 96) -> torch.Tensor:
    """Rows of very different size and centre, as float32."""
    generator = torch.Generator().manual_seed(seed)
    spread = 10 ** torch.empty(rows, 1).uniform_(-4, 2, generator=generator)
    return torch.randn(rows, width, generator=generator) * spread


def rtn(weight: torch.Tensor, grid: Grid) -> GroupQuantized:
    return rounding("rtn").round(weight, grid)


@pytest.mark.parametrize(
    "bits, zero, lowest, highest",
    [(8, "none", -128, 127), (4, "none", -8, 7), (4, "float", -8, 7), (4, "integer", 0, 15), (8, "integer", 0, 255)],
)
def test_codes_are_signed_unless_the_zero_is_a_code(bits, zero, lowest, highest):
    grid = Grid(bits, 32, zero, torch.bfloat16)
    assert (grid.lowest, grid.highest) == (lowest, highest)


def test_dequantize_is_its_definition_element_by_element(grid):
    weight = rtn(weights(1, rows=3, width=64), grid)
    result = weight.dequantize()
    for row, column in itertools.product(range(3), range(64)):
        group = column // grid.group(64)
        code, scale = float(weight.codes[row, column]), weight.scale[row, group].float()
        if grid.zero == "none":
            expected = code * scale
        elif grid.zero == "integer":
            expected = (code - float(weight.zero[row, group])) * scale
        else:
            expected = code * scale + weight.zero[row, group].float()
        assert result[row, column] == expected


def test_dequantize_rounds_once_to_the_type_asked_for(grid):
    weight = rtn(weights(2), grid)
    assert torch.equal(weight.dequantize(torch.bfloat16), weight.dequantize().bfloat16())


@pytest.mark.parametrize("seed", range(5))
def test_codes_are_in_range_and_everything_has_its_shape_and_type(grid, seed):
    weight = rtn(weights(seed), grid)
    groups = 96 // grid.group(96)
    assert weight.codes.shape == (6, 96) and weight.scale.shape == (6, groups)
    assert weight.codes.dtype == (torch.int8 if grid.signed else torch.uint8) and weight.scale.dtype == grid.scale_dtype
    assert weight.codes.min() >= grid.lowest and weight.codes.max() <= grid.highest
    assert (weight.scale > 0).all()
    expected = {"none": None, "integer": torch.uint8, "float": grid.scale_dtype}[grid.zero]
    assert weight.zero is None if expected is None else weight.zero.dtype == expected
    assert weight.zero is None or weight.zero.shape == (6, groups)


@pytest.mark.parametrize("seed", range(10))
def test_a_weight_inside_the_grids_range_is_off_by_half_a_step_at_most(grid, seed):
    weight = weights(seed)
    quantized = rtn(weight, grid)
    groups, scale = in_groups(weight, grid), quantized.scale.float().unsqueeze(-1)
    zero = 0 if quantized.zero is None else quantized.zero.float().unsqueeze(-1)
    low, high = (
        (code - zero) * scale if grid.zero == "integer" else code * scale + zero for code in (grid.lowest, grid.highest)
    )
    error = (in_groups(quantized.dequantize(), grid) - groups).abs()
    inside = (groups >= low) & (groups <= high)
    assert inside.float().mean() > 0.9
    assert (error <= scale * 0.5 * (1 + 1e-4))[inside].all()


@pytest.mark.parametrize("seed", range(10))
def test_no_weight_lies_far_outside_the_range_that_rtn_chooses(grid, seed):
    weight = weights(seed) * 100  # float16 has few digits for scales under 1e-4
    quantized = rtn(weight, grid)
    error = (in_groups(quantized.dequantize(), grid) - in_groups(weight, grid)).abs()
    # Half a step, and what rounding the scale and the zero to their type moves the ends by.
    resolution = torch.finfo(grid.scale_dtype).eps
    ends = in_groups(weight, grid).abs().amax(-1, keepdim=True)
    assert (error <= quantized.scale.float().unsqueeze(-1) * 0.51 + 2 * resolution * ends + 1e-6).all()


def test_no_other_code_would_have_been_nearer(grid):
    weight = weights(3, rows=2, width=32)
    quantized = rtn(weight, grid)
    chosen = (quantized.dequantize() - weight).abs()
    for code in range(grid.lowest, grid.highest + 1):
        other = GroupQuantized(torch.full_like(quantized.codes, code), quantized.scale, quantized.zero, grid)
        assert (chosen <= (other.dequantize() - weight).abs() * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize("seed", range(3))
def test_float8_codes_are_the_nearest_of_all_finite_ones(seed):
    weight = weights(seed, rows=4, width=32)
    quantized = rtn(weight, FLOAT8)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()]
    scaled = weight * (1 / quantized.scale.float())
    nearest = (scaled.unsqueeze(-1) - codes).abs().amin(-1)
    assert quantized.codes.dtype == torch.float8_e4m3fn
    assert torch.equal((scaled - quantized.codes.float()).abs(), nearest)
    assert quantized.codes.float().abs().amax(1).min() >= 416  # the range is used


def test_codes_are_chosen_for_the_scale_that_is_stored():
    grid = Grid(4, 32, "float", torch.bfloat16)
    weight = rtn(weights(4), grid)
    groups = in_groups(weights(4), grid)
    again = choose_codes(groups, weight.scale, weight.zero, grid).flatten(1)
    assert torch.equal(again.to(torch.int8), weight.codes)
    exact_scale = (groups.amax(-1) - groups.amin(-1)) / 15
    exact = assemble(groups, exact_scale, groups.amin(-1) + 8 * exact_scale, grid)
    assert not torch.equal(exact.codes, weight.codes)  # the difference is real
    stored = GroupQuantized(exact.codes, weight.scale, weight.zero, grid)
    step = weight.scale.float().unsqueeze(-1)
    ours, theirs = (((in_groups(w.dequantize(), grid) - groups) / step).square().sum() for w in (weight, stored))
    assert ours < theirs


@pytest.mark.parametrize("value", [0.0, 0.75, -0.75, 1e-3, -1e-8, 96.0])
def test_a_group_of_equal_weights_keeps_its_value(grid, value):
    weight = torch.full((3, 64), value)
    quantized = rtn(weight, grid)
    result = quantized.dequantize()
    assert (quantized.scale > 0).all()
    # A positive end of a symmetric grid is at 127/127.5 or 7/7.5 of the largest weight.
    ceiling = abs(value) / (grid.highest - grid.lowest) * 1.02 if grid.zero == "none" else 0
    assert result.isfinite().all()
    assert (result - weight).abs().max() <= ceiling + abs(value) * 2 * torch.finfo(grid.scale_dtype).eps + 1e-6


def test_a_row_of_zeros_stays_exactly_zero(grid):
    weight = weights(5)
    weight[2] = 0
    assert (rtn(weight, grid).dequantize()[2] == 0).all()


def test_a_matrix_without_rows_has_none_afterwards(grid):
    assert rtn(torch.zeros(0, 64), grid).dequantize().shape == (0, 64)


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e20, 1e38])
def test_extreme_weights_stay_finite_and_near(size):
    for grid in (Grid(4, 32, "float", torch.bfloat16), Grid(8, None, "none", torch.float32)):
        weight = torch.linspace(-1, 1, 64).repeat(2, 1) * size
        quantized = rtn(weight, grid)
        error = (quantized.dequantize() - weight).abs().max()
        assert error <= max(float(quantized.scale.max()), 2 * torch.finfo(torch.float32).eps)
        assert quantized.scale.isfinite().all()


def test_one_outlier_costs_only_its_own_group():
    grid, weight = Grid(4, 32, "float", torch.bfloat16), weights(6, rows=1)
    spoiled = weight.clone()
    spoiled[0, 40] = 1e4
    clean, dirty = rtn(weight, grid).dequantize(), rtn(spoiled, grid).dequantize()
    assert torch.equal(clean[:, :32], dirty[:, :32]) and torch.equal(clean[:, 64:], dirty[:, 64:])
    assert not torch.equal(clean[:, 32:64], dirty[:, 32:64])


@pytest.mark.parametrize("width", [32, 96, 160, 192, 256, 576, 1536, 48, 31])
@pytest.mark.parametrize("wanted", GROUP_SIZES)
def test_the_fitting_group_size_is_the_largest_that_is_allowed_and_divides(width, wanted):
    candidates = [size for size in GROUP_SIZES if size <= wanted and width % size == 0]
    assert fitting_group_size(width, wanted) == (max(candidates) if candidates else None)
