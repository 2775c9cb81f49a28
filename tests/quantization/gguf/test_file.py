"""GGUF files: written in the common pass, the same bytes for any block size, or no file."""

import importlib.util
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.schema import VariantSpec
from pipeline.errors import MissingExtra, ModelError, QuantizationError
from pipeline.models.checkpoint import SINGLE_NAME, row_blocks
from pipeline.models.matrices import linear_weights, table_weights
from pipeline.quantization.layers import unfit
from pipeline.quantization.writer import Variants, quantize_checkpoint
from tests.support.gguf_files import TYPES


def quantize(source, folder, *variants, **options):
    specs = [VariantSpec(name=v).resolved() for v in variants]
    places = {v: folder / ("gguf" if v in TYPES else v) for v in variants}
    linear, tables = linear_weights(source), table_weights(source)
    asked = Variants(specs, places, linear, tables, name="tiny", **options)
    made = asked.make_of(source)
    for error in asked.failed.values():
        raise error
    return made


@pytest.mark.parametrize("block, tile", [(2000, 10_000), (10**9, 500)])
def test_one_pass_in_any_blocks_makes_the_same_files(tiny_model, written, tmp_path, monkeypatch, block, tile):
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", block)
    monkeypatch.setattr(row_blocks, "TILE_ELEMENTS", tile)
    source = tiny_model("llama")
    quantize(source, tmp_path, "int8", "int4", *TYPES)
    monkeypatch.undo()
    assert len(list((tmp_path / "gguf").iterdir())) == len(TYPES)
    for variant in TYPES:
        name = f"tiny-{variant.removeprefix('gguf-').upper()}.gguf"
        assert (tmp_path / "gguf" / name).read_bytes() == written(source, variant).read_bytes()


def test_gguf_stream_reports_the_size_of_the_weights(tiny_model, tmp_path):
    source = tiny_model("llama")
    made = quantize(source, tmp_path, "gguf-q4_0", "gguf-bf16")
    tables = sum(rows * width for rows, width in table_weights(source).values())
    linear = sum(rows * width for rows, width in linear_weights(source).values())
    assert made["gguf-q4_0"].weight_bytes == linear * 18 // 32 + tables * 34 // 32
    assert made["gguf-q4_0"].source_bytes == 2 * (linear + tables)
    assert made["gguf-bf16"].weight_bytes == made["gguf-bf16"].source_bytes == 2 * linear


def test_a_broken_model_leaves_no_file(tiny_model, tmp_path):
    source = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    tensors = load_file(source / SINGLE_NAME)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, source / SINGLE_NAME, {"format": "pt"})
    with pytest.raises(QuantizationError, match=r"layers\.1\.mlp\.up_proj\.weight: has values that are not finite"):
        quantize(source, tmp_path, "gguf-q4_0")
    assert list((tmp_path / "gguf").iterdir()) == []


@pytest.mark.parametrize("variant, message", [("gguf-f16", "cannot hold; take bf16"), ("gguf-q8_0", "scale float16")])
def test_unstorable_value_is_refused_with_the_weight_name(tiny_model, tmp_path, variant, message):
    source = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    tensors = load_file(source / SINGLE_NAME)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e9
    save_file(tensors, source / SINGLE_NAME, {"format": "pt"})
    with pytest.raises(QuantizationError, match=rf"layers\.1\.mlp\.up_proj\.weight: .*{message}"):
        quantize(source, tmp_path, variant)
    assert list((tmp_path / "gguf").iterdir()) == []


def test_a_tensor_that_llama_cpp_has_no_place_for_is_refused_by_name(tiny_model, tmp_path):
    source = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    tensors = {**load_file(source / SINGLE_NAME), "model.extra.weight": torch.zeros(3)}
    save_file(tensors, source / SINGLE_NAME, {"format": "pt"})
    with pytest.raises(QuantizationError, match=r"model\.extra\.weight: llama\.cpp knows no such tensor"):
        quantize(source, tmp_path, "gguf-f16")
    assert not (tmp_path / "gguf").exists()


def test_another_architecture_is_refused_by_name_before_anything_is_written(tiny_model, tmp_path):
    source = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    spec, linear = VariantSpec(name="gguf-q4_0").resolved(), linear_weights(tiny_model("llama"))
    assert "mistral: not written as GGUF; handled are llama, " in unfit(spec, linear, source)
    with pytest.raises(ModelError, match="mistral"):
        quantize_checkpoint(source, [spec], {spec.name: tmp_path / "gguf"}, linear)
    assert not (tmp_path / "gguf").exists()


def test_a_width_that_groups_of_32_do_not_divide_is_refused(tiny_model):
    source = tiny_model("llama", hidden_size=80)
    assert "groups of 32 do not divide a width of 80" in unfit(
        VariantSpec(name="gguf-q8_0").resolved(), linear_weights(source), source
    )
    assert unfit(VariantSpec(name="gguf-f16").resolved(), linear_weights(source), source) is None


def test_missing_gguf_package_names_the_extra(tiny_model, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(MissingExtra, match=r"pip install 'tunepress\[gguf\]'"):
        quantize(tiny_model("llama"), tmp_path, "gguf-f16")


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"name": "gguf-q4_0", "group_size": 64}, "allowed are 32"),
        ({"name": "gguf-f16", "group_size": 32}, "has no groups"),
        ({"name": "gguf-f16", "embeddings": "int8"}, "is not quantized"),
        ({"name": "gguf-q4_0", "rounding": "nearly"}, "allowed for gguf-q4_0 are search, hqq, rtn, gptq"),
    ],
    ids=str,
)
def test_unsupported_option_of_a_type_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        VariantSpec.model_validate(asked)


def test_gguf_header_names_model_and_types(tiny_model, tmp_path):
    from gguf import GGUFReader

    source = tiny_model("llama")
    made = quantize(source, tmp_path, "gguf-q4_0", "int8", license="apache-2.0")
    (path,) = (tmp_path / "gguf").iterdir()
    found = GGUFReader(path)
    general = {k: f.contents() for k, f in found.fields.items() if k.startswith("general.")}
    assert general == {
        "general.architecture": "llama", "general.type": "model", "general.name": "tiny",
        "general.license": "apache-2.0", "general.size_label": "427K",
        "general.file_type": 2, "general.quantization_version": 2,
    }  # fmt: skip
    types = [tensor.tensor_type.name for tensor in found.tensors]
    assert made["gguf-q4_0"].types == {kind: types.count(kind) for kind in set(types)}
    assert made["gguf-q4_0"].types.keys() == {"Q4_0", "Q8_0", "F32"} and made["int8"].types == {}


def test_license_file_goes_with_the_gguf(model_copy, tmp_path):
    (model_copy / "LICENSE").write_text("terms")
    (model_copy / "NOTICE.txt").write_text("notice")
    quantize(model_copy, tmp_path, "gguf-q4_0", "gguf-q8_0")
    names = {path.name for path in (tmp_path / "gguf").iterdir()}
    assert names == {"LICENSE", "NOTICE.txt", "tiny-Q4_0.gguf", "tiny-Q8_0.gguf"}


def test_a_model_without_a_tokenizer_is_refused_in_one_line(model_copy):
    for path in model_copy.glob("token*"):
        path.unlink()
    problem = unfit(VariantSpec(name="gguf-q4_0").resolved(), linear_weights(model_copy), model_copy)
    assert problem.startswith(f"{model_copy}: transformers cannot read its tokenizer: ")
    assert "\n" not in problem and len(problem) < 400


def test_only_its_own_libraries_can_change_a_variant(tmp_path):
    from pipeline.config.loader import parse_config
    from pipeline.system.libraries import versions
    from pipeline.workflow.stages.quantize import depends
    from pipeline.workflow.workspace import Workspace

    own = {
        "int8": {"torch", "torchao", "transformers"},
        "gguf-q4_0": {"torch", "gguf", "transformers"},
        "gguf-q4_k_m": {"torch", "gguf", "transformers", "llama-cpp-python"},
    }
    tree = {"name": "t", "model": {"source": str(tmp_path)}, "data": None, "evaluate": None}
    config = parse_config(tree | {"quantize": {"variants": [*own]}}, "test", ())
    for variant, libraries in own.items():
        found = depends(config, Workspace(tmp_path), (variant,))["versions"]
        assert found == versions(*sorted(libraries))


def test_a_tokenizer_is_read_once_for_all_variants_of_a_pass_and_again_where_it_changed(
    model_copy, tmp_path, monkeypatch
):
    from transformers import AutoTokenizer

    read, count = AutoTokenizer.from_pretrained, []
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: count.append(a) or read(*a, **k))
    specs = [VariantSpec(name=name).resolved() for name in ("gguf-q4_0", "gguf-q8_0", "gguf-f16")]
    assert not any(unfit(spec, linear_weights(model_copy), model_copy) for spec in specs)
    quantize(model_copy, tmp_path, *(spec.name for spec in specs))
    assert len(count) == 1
    about = json.loads((model_copy / "tokenizer.json").read_text())
    about["normalizer"] = {"type": "Lowercase"}
    (model_copy / "tokenizer.json").write_text(json.dumps(about))
    assert "Lowercase" in unfit(specs[0], linear_weights(model_copy), model_copy)
