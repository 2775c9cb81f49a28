"""GPTQ: less error of the layer's output than any rounding that sees single columns only."""

from __future__ import annotations

import pytest
import torch

from pipeline.config.schema import VariantSpec
from pipeline.errors import QuantizationError
from pipeline.quantization.formats.gguf.format import GRIDS as GGUF
from pipeline.quantization.grid import Grid
from pipeline.quantization.layers import Source
from pipeline.quantization.roundings import gptq, search
from pipeline.quantization.statistics import Statistics

GRIDS = {
    "int4": Grid(4, 32, "float", torch.bfloat16),
    "one scale a row": Grid(4, None, "none", torch.float32),
    "Q4_0": GGUF["Q4_0"],
    "AWQ": Grid(4, 32, "integer", torch.float16, positive=True),
    "Q5_1": GGUF["Q5_1"],
    "Q4_K": GGUF["Q4_K"],
    "Q6_K": GGUF["Q6_K"],
    "positive": Grid(4, 32, "none", torch.bfloat16, positive=True),
}


def correlated(width: int, tokens: int = 512) -> Statistics:
    """Return the statistics of inputs whose columns correlate and differ in size."""
    torch.manual_seed(1)
    inputs = torch.randn(tokens, width // 4) @ torch.randn(width // 4, width) + 0.1 * torch.randn(tokens, width)
    inputs *= torch.randn(width).exp()
    gram = inputs.T @ inputs / tokens
    return Statistics(tokens, gram.diagonal().clone(), gram)


@pytest.fixture
def weight():
    torch.manual_seed(0)
    return torch.randn(24, 256).bfloat16()


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_error_of_the_output_falls_with_what_the_rounding_knows(weight, grid):
    statistics = correlated(256)
    total = {
        name: gptq.loss(weight.float(), made, statistics.gram).sum().item()
        for name, made in {
            "data-free": search.round(weight, grid),
            "weighted": search.round(weight, grid, statistics),
            "gptq": gptq.round(weight, grid, statistics),
        }.items()
    }
    assert total["weighted"] < 0.8 * total["data-free"]
    assert total["gptq"] < 0.5 * total["weighted"]


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_codes_and_scales_are_those_of_the_grid(weight, grid):
    made = gptq.round(weight, grid, correlated(256))
    assert made.codes.dtype == grid.code_dtype
    assert made.codes.min() >= grid.lowest and made.codes.max() <= grid.highest
    assert made.scale.dtype == grid.scale_dtype and (made.zero is None) == (grid.zero == "none")
    assert made.dequantize().isfinite().all() and (not grid.positive or (made.scale > 0).all())
    scale, zero = grid.stored(made.scale, made.zero)  # as they are stored already
    assert torch.equal(scale, made.scale) and (zero is None or torch.equal(zero, made.zero))


def test_polishing_makes_no_row_worse(weight):
    statistics = correlated(256)
    before = search.round(weight, GRIDS["int4"], statistics)
    after = gptq.polish(weight.float(), before, statistics.gram)
    changed = gptq.loss(weight.float(), after, statistics.gram) - gptq.loss(weight.float(), before, statistics.gram)
    assert (changed <= 0).all() and changed.mean() < 0


def test_same_inputs_give_the_same_bytes(weight):
    first, second = (gptq.round(weight, GRIDS["int4"], correlated(256)) for _ in range(2))
    assert torch.equal(first.codes, second.codes) and torch.equal(first.scale, second.scale)


@pytest.mark.parametrize("rounding", [gptq, search])
def test_inputs_that_were_always_zero_do_no_harm(weight, rounding):
    gram = correlated(256).gram.clone()
    gram[:40], gram[:, :40] = 0, 0
    made = rounding.round(weight, GRIDS["int4"], Statistics(512, gram.diagonal().clone(), gram))
    assert made.dequantize().isfinite().all()
    assert (made.dequantize() - weight.float()).abs().max() < 1.5


def test_second_moments_alone_are_refused(weight):
    with pytest.raises(ValueError, match="gram matrix"):
        gptq.round(weight, GRIDS["int4"], Statistics(8, torch.ones(256)))


def test_layer_that_the_calibration_text_never_reached_is_named(weight, tmp_path):
    """Such as an expert that no token was sent to."""
    source = Source({}, tmp_path, {"a.expert.weight": (24, 256)}, statistics={"other": correlated(256)})
    spec = VariantSpec(name="int4", rounding="gptq")
    with pytest.raises(QuantizationError, match=r"never reached this layer.* Try: keep: \[a\.expert\]"):
        source.round(spec, "gptq", "a.expert.weight", weight, 0, GRIDS["int4"])


def test_layers_of_a_block_get_the_same_bytes_whatever_the_cores(monkeypatch):
    from pipeline.models.checkpoint import row_blocks
    from pipeline.quantization.calibration import rounding

    torch.manual_seed(2)
    rows = {"q": 400, "k": 60, "o": 40, "down": 70}
    weights = {name: torch.randn(n, 256).bfloat16() for name, n in rows.items()}
    first, second = correlated(256), correlated(256, 300)
    collected = {"q": first, "k": first, "o": second, "down": second}
    grids = {n: (tuple(w.shape), GRIDS["one scale a row" if n == "down" else "int4"]) for n, w in weights.items()}
    monkeypatch.setattr(rounding, "ROWS", 60)  # q and k are cut into parts of 256 rows, as wide as they are

    def rounded(cores):
        monkeypatch.setattr(row_blocks, "cores", lambda: cores)
        return rounding.round_layers(gptq, lambda name, a, b: weights[name][a:b], grids, collected)

    made = rounded(1)
    for name, again in rounded(3).items():
        assert torch.equal(made[name].codes, again.codes) and torch.equal(made[name].scale, again.scale)
        alone = gptq.round(weights[name], grids[name][1], collected[name])
        assert (made[name].codes == alone.codes).float().mean() > 0.99 and made[name].grid == alone.grid
        assert torch.allclose(made[name].scale.float(), alone.scale.float(), rtol=0.02)


def test_rows_that_are_fitted_in_small_parts_are_the_same(weight, monkeypatch):
    expected = gptq.round(weight, GRIDS["int4"], correlated(256))
    monkeypatch.setattr(gptq, "FITTED_AT_ONCE", 1)
    monkeypatch.setattr(gptq, "FEWEST_FITTED", 1)  # row by row
    made = gptq.round(weight, GRIDS["int4"], correlated(256))
    assert (made.codes == expected.codes).float().mean() > 0.99
    assert torch.allclose(made.scale.float(), expected.scale.float(), rtol=0.02)


@pytest.mark.parametrize("rounding", [gptq, search])
@pytest.mark.parametrize("grid", [GRIDS["int4"], GRIDS["Q4_0"], GRIDS["Q4_K"]], ids=["int4", "Q4_0", "Q4_K"])
def test_every_tensor_is_made_on_the_device_of_the_weight(weight, rounding, grid):
    expected, statistics = rounding.round(weight, grid, correlated(256)), correlated(256)
    with torch.device("meta"):  # a tensor that is made on the default device could not be computed with
        made = rounding.round(weight, grid, statistics)
    assert torch.equal(made.codes, expected.codes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_gpu_rounds_as_well_as_the_cpu(weight, grid):
    from pipeline.quantization.calibration.rounding import round_layers

    of = correlated(256)
    there = Statistics(of.tokens, of.second_moments.cuda(), of.gram.cuda())
    made = round_layers(gptq, lambda name, a, b: weight[a:b], {"q": (tuple(weight.shape), grid)}, {"q": there})["q"]
    assert made.codes.device.type == "cpu"
    lost = [gptq.loss(weight.float(), one, of.gram).sum() for one in (made, gptq.round(weight, grid, of))]
    assert lost[0] < 1.05 * lost[1]
