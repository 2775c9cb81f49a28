"""Sensitivity: each layer quantized alone and measured once."""

import json
import shutil

import pytest
import torch

from pipeline.config.builders import quantize_config
from pipeline.errors import ConfigError, ModelError, QuantizationError
from pipeline.evaluation import metrics, sensitivity, texts
from pipeline.inference import output_head
from pipeline.inference.load import load
from pipeline.models.matrices import linear_weights
from pipeline.quantization.grid import Grid
from pipeline.quantization.roundings import rounding
from tests.support.texts import general_text

LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture
def asked(tmp_path):
    """`asked(model, variant)`: the configuration of a report on little text."""
    (tmp_path / "general.txt").write_text(general_text())

    def make(model, variant="int4"):
        settings = [f"evaluate.general={tmp_path / 'general.txt'}", "evaluate.max_tokens=256"]
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
    found = sensitivity.report(asked(model), tmp_path / "out", print)
    assert json.loads((tmp_path / "out" / "sensitivity.json").read_text()) == found
    assert [layer["name"] + ".weight" for layer in found["layers"]] == list(linear_weights(model))
    worst = max(found["layers"], key=lambda layer: layer["kl"]["value"])
    assert worst["name"] == LAYER and worst["kl"]["value"] > 3 * worst["kl"]["stderr"] > 0
    assert (tmp_path / "out" / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["sensitivity.json", "sensitivity.png"]


def test_a_layers_figure_is_that_of_the_model_with_this_layer_alone_rounded(model, asked, tmp_path):
    config = asked(model)
    found = sensitivity.report(config, tmp_path / "out", print)
    loaded, tokenizer = load(model, device="cpu")
    sequences = texts.general(config, tokenizer, None)
    full, head = metrics.score(loaded, sequences), output_head.head_of(loaded)
    weight = loaded.get_submodule(LAYER).weight
    grid = Grid(4, 64, "float", torch.bfloat16)
    weight.data = rounding("search").round(weight.data, grid).dequantize(weight.dtype)
    scores = metrics.score(loaded, sequences)
    (told,) = (layer for layer in found["layers"] if layer["name"] == LAYER)
    assert told["rise"]["value"] == pytest.approx(metrics.rise(scores, full).value)
    assert told["kl"]["value"] == pytest.approx(metrics.divergence(scores, head, full, head).kl.value)
    assert told["weights"] == weight.numel()


def test_stopped_sensitivity_run_resumes(model, asked):
    config, kept = asked(model), []
    (spec,) = config.quantize.variants

    def stop(done, total, what):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sensitivity.sensitivity(config, spec, model, {}, lambda found: kept.append(json.dumps(found)), stop)
    known, steps = json.loads(kept[-1]), []
    before = set(known["layers"])
    assert len(before) == len(kept) == 5
    layers = sensitivity.sensitivity(config, spec, model, known, kept.append, lambda done, *_: steps.append(done))
    assert steps[:2] == [5, 6] and {f"{layers[i].name}.weight" for i in range(5)} == before
    sensitivity.sensitivity(config, spec, model, kept[-1], kept.append, stop)  # which has nothing left to measure


def test_other_text_in_the_same_file_is_measured_again(model, asked, tmp_path):
    config, kept, steps = asked(model), [{}], []
    (spec,) = config.quantize.variants
    for text in ("A sleepy cat lies down under the old oak tree. ", "Nobody knows how deep the lake is. "):
        (tmp_path / "general.txt").write_text(text * 12)
        steps.clear()
        sensitivity.sensitivity(config, spec, model, kept[-1], kept.append, lambda done, *_: steps.append(done))
    assert steps[0] == 0  # nothing that was measured on the first text counts


def test_other_variant_is_measured_again(model, asked):
    kept, found = [{}], {}
    for variant in ("int4", "int8"):
        config = asked(model, variant)
        (spec,) = config.quantize.variants
        layers = sensitivity.sensitivity(config, spec, model, kept[-1], kept.append, lambda *_: None)
        found[variant] = sum(layer.kl.value for layer in layers)
    assert found["int8"] < found["int4"] / 3


def test_a_model_larger_than_the_memory_is_refused_before_it_is_loaded(model, asked, monkeypatch):
    config, kept = asked(model), []
    (spec,) = config.quantize.variants
    size = (model / "model.safetensors").stat().st_size
    monkeypatch.setattr("pipeline.system.hardware.free_bytes", lambda device: size)
    monkeypatch.setattr("pipeline.inference.load.load", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ModelError, match=rf"take [\d,]+ bytes, and may take 75% of the {size:,} that are free"):
        sensitivity.sensitivity(config, spec, model, {}, kept.append, lambda *_: None)
    assert not kept


def test_variant_without_grid_is_refused(model, asked, tmp_path):
    with pytest.raises(QuantizationError, match="gguf-q4_k_m: its layers cannot be rounded one by one. Try: one"):
        sensitivity.report(asked(model, "gguf-q4_k_m"), tmp_path / "out", print)
    with pytest.raises(ConfigError, match="int5: allowed are"):
        asked(model, "int5")
