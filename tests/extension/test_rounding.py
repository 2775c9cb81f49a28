"""A rounding that one file adds fills grids; its needs decide whether a run is refused; equivalences come first."""

from __future__ import annotations

import pytest
import torch

from pipeline.config import catalog
from pipeline.config.catalog import Need
from pipeline.config.schema import VariantSpec
from pipeline.errors import ConfigError, QuantizationError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.matrices import linear_weights
from pipeline.quantization.formats import storage
from pipeline.quantization.statistics import Collected, Statistics
from pipeline.quantization.writer import Variants
from tests.extension import floor_rounding, needing_rounding
from tests.extension.runs import quantizing


@pytest.fixture
def floor():
    yield floor_rounding.register
    catalog.remove(floor_rounding.NAME)


def made(model, folder, spec: VariantSpec, **more) -> dict[str, torch.Tensor]:
    """Make one variant; its weights, dequantized."""
    linear = linear_weights(model)
    variants = Variants([spec], {spec.name: folder}, linear, **more)
    variants.make_of(model)
    for error in variants.failed.values():
        raise error
    checkpoint = Checkpoint(folder)
    return {name: storage(spec.format).read(checkpoint, name, shape).dequantize() for name, shape in linear.items()}


def test_rounding_is_measured_told_of_in_the_card_and_verified(tmp_path, tiny_model):
    place = quantizing(tmp_path, tiny_model("llama"), {"name": "int4", "rounding": "floor"}, floor_rounding)
    place.tunepress("run", "tiny.yaml")
    assert place.results()["int4"]["variant"]["rounding"] == "floor"
    assert "rounded down" in (place.release / "int4" / "README.md").read_text()
    assert "int4" in place.tunepress("verify", str(place.release)).stdout
    assert "floor" in place.tunepress("quantize", "--help").stdout


def test_rounding_decides_the_codes(floor, tmp_path, tiny_model):
    floor()
    weights = Checkpoint(tiny_model("llama"))
    found = made(tiny_model("llama"), tmp_path, VariantSpec(name="int4", rounding="floor").resolved())
    for name, weight in found.items():
        assert (weight <= weights.read(name).float() + 1e-2).all()


def test_rounding_that_needs_statistics_is_refused_by_name_without_them(floor, tmp_path, tiny_model):
    floor(Need.SECOND_MOMENTS)
    spec = VariantSpec(name="int4", rounding="floor").resolved()
    assert spec.need(False) == Need.SECOND_MOMENTS and VariantSpec(name="int8").resolved().need(True) == Need.NOTHING
    with pytest.raises(QuantizationError, match="int4: rounding floor needs statistics.*second moments"):
        made(tiny_model("llama"), tmp_path, spec)


def test_run_is_refused_before_work_starts(floor, tmp_path, tiny_model, monkeypatch):
    from pipeline.config.loader import load_config

    floor(Need.GRAM_MATRIX)
    place = quantizing(tmp_path, tiny_model("llama"), {"name": "int4", "rounding": "floor"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="rounding floor: needs calibration text. Try: quantize.quality=calibrated"):
        load_config(str(place.config))


def test_calibration_gives_the_rounding_whole_matrices_and_what_it_needs(tmp_path, tiny_model):
    place = quantizing(tmp_path, tiny_model("llama"), {"name": "int4", "rounding": "floor"}, needing_rounding)
    (tmp_path / "calibration.txt").write_text(" ".join(f"{n} apples and {n * n} pears." for n in range(400)))
    calibrated = ("--set", "quantize.quality=calibrated", "--set", "quantize.calibration.source=calibration.txt")
    place.tunepress("run", "tiny.yaml", *calibrated, "--set", "quantize.calibration.tokens=2048")
    assert place.results()["int4"]["variant"]["rounding"] == "floor"
    assert "calibrate" in place.ledger()


def test_rounding_gets_the_statistics_of_its_layer(floor, tmp_path, tiny_model, monkeypatch):
    floor(Need.SECOND_MOMENTS)
    linear, seen = linear_weights(tiny_model("llama")), {}
    collected = {
        name: Statistics(8, torch.full((shape[1],), float(n))) for n, (name, shape) in enumerate(linear.items())
    }
    plain = floor_rounding.round

    def noting(rows, grid, statistics=None):
        seen[float(statistics.second_moments[0])] = rows.shape[1] == len(statistics.second_moments)
        return plain(rows, grid)

    monkeypatch.setattr(floor_rounding, "round", noting)
    made(tiny_model("llama"), tmp_path, VariantSpec(name="int4", rounding="floor").resolved(), statistics=collected)
    assert seen == {float(n): True for n in range(len(linear))}


class Doubled:
    """An equivalence that doubles one weight."""

    def __init__(self, name: str):
        self.name, self.names = name, {name}

    def divide(self, collected: Collected) -> Collected:
        return collected

    def apply(self, name: str, rows: torch.Tensor, first: int) -> torch.Tensor:
        return rows * 2 if name == self.name else rows


def test_equivalence_changes_weights_before_they_are_rounded(tmp_path, tiny_model):
    spec, name = VariantSpec(name="int8").resolved(), "model.layers.0.mlp.up_proj.weight"
    plain = made(tiny_model("llama"), tmp_path / "plain", spec)
    doubled = made(tiny_model("llama"), tmp_path / "doubled", spec, equivalences={"int8": Doubled(name)})
    assert torch.equal(doubled.pop(name), 2 * plain.pop(name))
    assert all(torch.equal(doubled[other], weight) for other, weight in plain.items())


def test_equivalence_of_a_tensor_that_the_checkpoint_lacks_is_refused(tmp_path, tiny_model):
    spec = VariantSpec(name="int8").resolved()
    with pytest.raises(QuantizationError, match=r"other\.weight: .* the checkpoint has no such tensor"):
        made(tiny_model("llama"), tmp_path, spec, equivalences={"int8": Doubled("other.weight")})
