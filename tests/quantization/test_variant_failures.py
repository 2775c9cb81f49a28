"""A variant that cannot be made: no effect on the others, and no files left."""

import importlib.util
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.catalog import VARIANTS
from pipeline.config.engines import ENGINES
from pipeline.config.schema import Config, VariantSpec
from pipeline.errors import CheckpointError, QuantizationError
from pipeline.models.checkpoint import SINGLE_NAME
from pipeline.models.matrices import linear_weights, table_weights
from pipeline.quantization.formats.gguf import k_quants as kquants
from pipeline.quantization.layers import unfit
from pipeline.quantization.writer import Variants, quantize_checkpoint
from pipeline.tracking.events import Events, read_events
from pipeline.workflow.stages import quantize
from pipeline.workflow.workspace import Workspace

pytest.importorskip("gguf")
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}


def specs_of(*asked):
    return [VariantSpec.model_validate(each).resolved() for each in asked]


@pytest.fixture
def make(tmp_path):
    """`make(source, *variants)`: why variants failed; those that did not are the same as made alone."""

    def together(source, *asked):
        linear, tables, specs = linear_weights(source), table_weights(source), specs_of(*asked)
        folders = {spec.name: tmp_path / "together" / spec.name for spec in specs}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        variants = Variants(specs, folders, linear, tables)
        made = variants.make_of(source)
        for spec in specs:
            if spec.name in variants.failed:
                assert not [path for path in folders[spec.name].iterdir() if path.is_file()]
                continue
            alone = tmp_path / "alone" / spec.name
            assert quantize_checkpoint(source, [spec], {spec.name: alone}, linear, tables=tables) == {
                spec.name: made[spec.name]
            }
            assert contents(folders[spec.name]) == contents(alone)
        assert made.keys() | variants.failed.keys() == folders.keys() and made
        return variants.failed

    return together


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def change(tmp_path):
    """`change(source, edit)`: a copy of a model whose tensors `edit` has changed."""

    def copy(source, edit):
        folder = shutil.copytree(source, tmp_path / "model")
        tensors = load_file(folder / SINGLE_NAME)
        edit(tensors)
        save_file(tensors, folder / SINGLE_NAME, {"format": "pt"})
        return folder

    return copy


def too_large(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5


def test_a_value_that_its_type_cannot_hold(tiny_model, make, change):
    failed = make(change(tiny_model("llama"), too_large), "int8", "gguf-f16", "gguf-bf16", "gguf-q4_0")
    assert failed.keys() == {"gguf-f16"}
    assert str(failed["gguf-f16"]).startswith("model.layers.1.mlp.up_proj.weight: has values that float16 cannot hold")


def test_a_tensor_that_llama_cpp_has_no_place_for(tiny_model, make, change):
    model = change(tiny_model("llama"), lambda tensors: tensors.update({"model.extra.weight": torch.zeros(3)}))
    failed = make(model, "gguf-q4_0", "int8")
    assert failed.keys() == {"gguf-q4_0"} and "model.extra.weight: llama.cpp knows" in str(failed["gguf-q4_0"])


def test_a_tied_table_that_is_stored_twice(tiny_model, make, change):
    def store_twice(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    model = change(tiny_model("llama", tie_word_embeddings=True), store_twice)
    failed = make(model, {"name": "int8", "embeddings": "int8"}, "int4", "gguf-q4_0")
    assert failed.keys() == {"int8"} and "lm_head.weight: of the embedding's shape" in str(failed["int8"])


def test_a_file_that_cannot_get_its_name(tiny_model, make, tmp_path):
    (tmp_path / "together" / "gguf-f16" / "model-F16.gguf").mkdir(parents=True)
    failed = make(tiny_model("llama"), "gguf-f16", "int8", "gguf-q8_0")
    assert failed.keys() == {"gguf-f16"} and isinstance(failed["gguf-f16"], CheckpointError)


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_a_quantizer_that_gives_up(tiny_model, make, tmp_path, monkeypatch):
    program = tmp_path / "program.py"
    own = f"runpy.run_path({kquants.quantizer.__file__!r}, run_name='__main__')"
    program.write_text(f"import runpy, sys\nsys.exit('an error') if 'Q4_K_M' in sys.argv else {own}")
    monkeypatch.setattr(kquants.quantizer, "__file__", str(program))
    failed = make(tiny_model("llama", **WIDE), "gguf-q4_k_m", "gguf-q6_k", "int8")
    assert failed.keys() == {"gguf-q4_k_m"}
    assert str(failed["gguf-q4_k_m"]).endswith("llama.cpp could not quantize to Q4_K_M: an error")


def test_reading_stops_when_every_variant_failed(tiny_model, change, tmp_path, monkeypatch):
    model, told = change(tiny_model("llama"), lambda tensors: [t.fill_(1e5) for t in tensors.values()]), []
    variants = Variants(specs_of("gguf-f16"), {"gguf-f16": tmp_path / "out"}, linear_weights(model))
    assert variants.make_of(model, lambda *about: told.append(about)) == {}
    assert variants.failed.keys() == {"gguf-f16"} and told[-1][0] < told[-1][1]


def test_model_error_stops_every_variant(tiny_model, make, change):
    def breaks(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")

    with pytest.raises(QuantizationError, match="has values that are not finite; the model is broken"):
        make(change(tiny_model("llama"), breaks), "int8", "gguf-f16")


def test_stage_reports_a_failed_variant_and_keeps_the_others(tiny_model, change, tmp_path):
    names = ("gguf-f16", "gguf-q4_0")
    tree = {"name": "m", "model": {"source": str(change(tiny_model("llama"), too_large))}, "data": None}
    config = Config.model_validate(tree | {"evaluate": None, "quantize": {"variants": list(names)}})
    with Workspace.claim(tmp_path / "m", config) as workspace:
        events = Events(workspace.events_path, "m")
        summary = quantize.run(config, workspace, events, names).summary
        (reason,) = summary["refused"].values()
        assert summary["made"] == ["gguf-q4_0"] and summary["refused"].keys() == {"gguf-f16"}
        assert {path.name for path in workspace.quantized.iterdir()} == {"gguf-q4_0"}
        (event,) = read_events(workspace.events_path)[0]
    assert (event["event"], event["variant"], event["message"]) == ("quantization_failed", "gguf-f16", reason)
    assert "float16 cannot hold; take bf16 instead" in reason


def _fuses(variant) -> bool:
    return any(ENGINES[way.engine].fuses and way.computes and not way.experimental for way in variant.ways())


SERVED = [name for name, variant in VARIANTS.items() if _fuses(variant)]
BLOCK = {
    **{f"model.layers.0.self_attn.{part}_proj.weight": (128, 128) for part in "qkvo"},
    **{f"model.layers.0.mlp.{part}_proj.weight": (128, 128) for part in ("gate", "up", "down")},
}


@pytest.mark.parametrize("name", SERVED)
def test_layers_that_servers_fuse_are_kept_together_or_not_at_all(name):
    def problem(*keep: str) -> str | None:
        return unfit(VariantSpec(name=name, keep=list(keep)).resolved(), BLOCK)

    attention = "model.layers.0.self_attn"
    assert problem() is None and problem("*o_proj", "*down_proj") is None
    assert problem("*q_proj", "*k_proj", "*v_proj") is None and problem("*gate_proj", "*up_proj") is None
    assert problem("*k_proj") == (
        f"'keep' names {attention}.k_proj, which vLLM computes as one with {attention}.q_proj, {attention}.v_proj. "
        "Try: keep all of them"
    )
    assert "computes as one with model.layers.0.mlp.gate_proj" in problem("*up_proj")


@pytest.mark.parametrize("name", SERVED)
def test_variants_for_servers_have_one_group_size_and_one_width_of_codes(name):
    variant = VARIANTS[name]
    assert variant.one_group_size or not variant.group_sizes
    assert not any(packing.mixes for packing in variant.packings.values())


def test_single_layers_of_variants_that_no_server_fuses_can_be_kept():
    assert SERVED and "int4" not in SERVED
    assert unfit(VariantSpec(name="int4", keep=["*k_proj"]).resolved(), BLOCK) is None


def test_stage_tells_which_engines_cannot_take_the_layers(tiny_model, tmp_path):
    tree = {"name": "m", "model": {"source": str(tiny_model("llama"))}, "data": None, "evaluate": None}
    config = Config.model_validate(tree | {"quantize": {"variants": ["int8", "w8a16"]}})
    shown: list[str] = []
    with Workspace.claim(tmp_path / "m", config) as workspace:
        events = Events(workspace.events_path, "m", on_show=shown.extend)
        quantize.run(config, workspace, events, ("int8", "w8a16"))
    (line,) = shown
    assert line.startswith("w8a16 does not run in: ") and line.endswith("columns are not a multiple of 128")
