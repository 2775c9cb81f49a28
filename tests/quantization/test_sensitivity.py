"""Sensitivity: the shares of layers in the loss, and the largest ones measured alone."""

import json
import shutil

import pytest
import torch

from pipeline.config.builders import quantize_config
from pipeline.errors import ConfigError, QuantizationError
from pipeline.evaluation import metrics, sensitivity, texts
from pipeline.inference import output_head
from pipeline.inference.load import load
from pipeline.models.matrices import linear_weights
from pipeline.quantization.calibration.blocks import BlockwiseModel
from pipeline.quantization.calibration.sensitivities import grids_to_mix, key, stand_in
from pipeline.quantization.formats import format_of
from pipeline.quantization.grid import Grid
from pipeline.quantization.layers import layer_grids
from pipeline.quantization.roundings import rounding
from pipeline.quantization.statistics import Statistics
from tests.support.texts import general_text

LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture
def asked(tmp_path):
    """`asked(model, variant)`: the configuration of a report on little text."""
    (tmp_path / "general.txt").write_text(general_text())

    def make(model, variant="int4"):
        settings = [f"evaluate.general={tmp_path / 'general.txt'}", "evaluate.max_tokens=512"]
        return quantize_config(str(model), tmp_path / "out", [variant], measure=True, settings=settings)

    return make


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    """A model one of whose layers has columns that nothing comes to, and beside which no scale suits the others."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_model("llama"), tmp_path_factory.mktemp("sensitive") / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{LAYER}.weight"][:, ::32] *= 60
    tensors[f"{LAYER}.weight".replace("down", "up")][::32] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_most_sensitive_layer_is_in_json_and_picture(model, asked, tmp_path):
    found = sensitivity.report(asked(model), tmp_path / "out", lambda *_: None)
    assert json.loads((tmp_path / "out" / "sensitivity.json").read_text()) == found
    assert [layer["name"] + ".weight" for layer in found["layers"]] == list(linear_weights(model))
    order = sorted(found["layers"], key=lambda layer: -layer["kl"]["value"])
    assert order[0]["name"] == LAYER and order[0]["kl"]["value"] > 3 * order[1]["kl"]["value"]
    assert {layer["name"] for layer in found["layers"] if "checked" in layer} == {
        layer["name"] for layer in order[: sensitivity.CHECKED]
    }
    assert (tmp_path / "out" / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["sensitivity.json", "sensitivity.png"]


def test_checked_figure_is_that_of_the_model_with_this_layer_alone_rounded(model, asked, tmp_path):
    config = asked(model)
    found = sensitivity.report(config, tmp_path / "out", lambda *_: None)
    loaded, tokenizer = load(model, device="cpu")
    sequences = texts.general(config, tokenizer, None)
    full, head = metrics.score(loaded, sequences), output_head.head_of(loaded)
    weight = loaded.get_submodule(LAYER).weight
    grid = Grid(4, 64, "float", torch.bfloat16)
    weight.data = rounding("search").round(weight.data, grid).dequantize(weight.dtype)
    scores = metrics.score(loaded, sequences)
    (told,) = (layer for layer in found["layers"] if layer["name"] == LAYER)
    assert told["checked"]["rise"]["value"] == pytest.approx(metrics.rise(scores, full).value)
    assert told["checked"]["kl"]["value"] == pytest.approx(metrics.divergence(scores, head, full, head).kl.value)
    assert told["weights"] == weight.numel()


@pytest.mark.parametrize("variant", ["int4", "int8", "gguf-q4_0"])
def test_shares_add_up_to_about_the_divergence_of_the_whole(tiny_model, asked, variant):
    folder = tiny_model("llama")
    config = asked(folder, variant)
    (spec,) = config.quantize.variants
    layers = sensitivity.sensitivity(config, spec, folder, lambda *_: None)
    loaded, tokenizer = load(folder, device="cpu")
    sequences = texts.general(config, tokenizer, None)
    full, head = metrics.score(loaded, sequences), output_head.head_of(loaded)
    for name, (_, grid) in layer_grids(spec, linear_weights(folder))[0].items():
        weight = loaded.get_parameter(name)
        weight.data = rounding(spec.rounding).round(weight.data, grid).dequantize(weight.dtype)
    kl = metrics.divergence(metrics.score(loaded, sequences), head, full, head).kl.value
    assert sum(layer.kl.value for layer in layers) == pytest.approx(kl, rel=0.3)


def test_errors_on_other_grids_are_ratios_of_weighted_errors_and_layers_with_one_input_are_fused(tiny_model, tmp_path):
    from pipeline.config.schema import VariantSpec

    folder = tiny_model("llama", intermediate_size=256)
    spec = VariantSpec(name="int4").resolved()
    linear = linear_weights(folder)
    grids = grids_to_mix(spec, linear)
    windows = torch.randint(5, 60, (8, 64), generator=torch.Generator().manual_seed(0)).tolist()
    found = sensitivity.measured(spec, True, folder, grids, {}, windows, tmp_path, lambda *_: None, "cpu")
    name, moments = f"{LAYER}.weight", {}
    model, ids = BlockwiseModel(folder), torch.tensor(windows)
    with model.embedding():
        hidden = model.enter(ids)
    for block in range(2):
        with model.loaded(block):
            observe = lambda name, given: moments.update({name: given.float().square().mean(0)})  # noqa: E731
            hidden = model.run(block, ids, hidden, observe)
    weight, errors = model.weight(name), {}
    for grid in grids[name]:
        how = rounding("search" if grid.bits == 4 else "rtn")
        off = how.round(weight, grid, Statistics(512, moments[name])).dequantize() - weight.float()
        errors[key(grid.bits, grid.group_size)] = float((off.square() * moments[name]).sum())
    assert list(errors) == ["4/32", "4/64", "4/128", "4/256", "8/row"]
    assert found.errors[name] == pytest.approx({k: e / errors["4/32"] for k, e in errors.items()}, rel=0.02)
    assert found.loss(name, 8, None) == found.shares[name] * found.errors[name]["8/row"] < found.shares[name] / 20
    block = "model.layers.0"
    together = [[f"{block}.self_attn.{p}_proj.weight" for p in "qkv"], [f"{block}.self_attn.o_proj.weight"]]
    together += [[f"{block}.mlp.{p}_proj.weight" for p in ("gate", "up")], [f"{block}.mlp.down_proj.weight"]]
    assert sorted(map(sorted, found.fused[:4])) == sorted(map(sorted, together))


def test_rounding_with_whole_matrices_is_estimated_by_one_with_second_moments():
    from pipeline.config.quantize import Quantize

    (spec,) = Quantize(quality="calibrated", variants=["int4"]).variants
    how, uses_moments, gain = stand_in(spec, True)
    assert (how, uses_moments) == ("search", True) and 0 < gain < 1
    (spec,) = Quantize(variants=[{"name": "int4", "rounding": "hqq"}]).variants
    assert stand_in(spec, False) == ("hqq", False, 1.0)
    assert format_of(spec).TABLE.bits == 8


def test_model_larger_than_the_memory_has_shares_and_no_check(model, asked, monkeypatch):
    config = asked(model)
    (spec,) = config.quantize.variants
    monkeypatch.setattr("pipeline.system.hardware.free_bytes", lambda device: 1000)
    monkeypatch.setattr("pipeline.inference.load.load", lambda *_, **__: pytest.fail("it was loaded"))
    layers = sensitivity.sensitivity(config, spec, model, lambda *_: None)
    assert max(layers, key=lambda layer: layer.kl.value).name == LAYER
    assert all(layer.checked is None for layer in layers)


def test_variant_without_grid_is_refused(model, asked, tmp_path):
    with pytest.raises(QuantizationError, match="gguf-q4_k_m: its layers cannot be rounded one by one. Try: one"):
        sensitivity.report(asked(model, "gguf-q4_k_m"), tmp_path / "out", print)
    with pytest.raises(ConfigError, match="int5: allowed are"):
        asked(model, "int5")
