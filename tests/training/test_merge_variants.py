"""Variants that are written in the pass of the merge."""

import importlib.util

import pytest
from safetensors.torch import load_file, save_file

from pipeline.config.schema import VariantSpec
from pipeline.errors import ModelError
from pipeline.models.checkpoint import SINGLE_NAME, row_blocks
from pipeline.models.matrices import linear_weights, table_weights
from pipeline.quantization.writer import Variants, quantize_checkpoint
from pipeline.training import merge
from pipeline.training.merge import merge_checkpoint
from tests.support.adapters import Q, edit


@pytest.mark.parametrize(
    "architecture, dtype, adapter_of, block",
    [
        ("llama", "bfloat16", {}, row_blocks.BLOCK_BYTES),  # untied, with biases
        ("llama", "bfloat16", {"use_dora": True, "modules_to_save": ["lm_head", "embed_tokens"]}, 20_000),
        ("qwen3", "bfloat16", {}, 20_000),  # tied
        ("smollm3", "float32", {}, 20_000),  # NF4's blocks go on from row to row; the merge rounds to bf16
    ],
)
@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_variants_made_in_the_merges_pass_are_those_of_the_merged_model_to_the_last_byte(
    tiny_model, trained, tmp_path, monkeypatch, kind, architecture, dtype, adapter_of, block
):
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", block)
    monkeypatch.setattr(row_blocks, "TILE_ELEMENTS", 3000)
    monkeypatch.setattr(merge, "SHARD_BYTES", 200_000)
    base, adapter = tiny_model(architecture, dtype), trained(tiny_model(architecture), **adapter_of)
    linear, tables = linear_weights(base), table_weights(base)
    packing = "tile_packed" if architecture == "qwen3" else "plain"  # tiles take eight rows in one
    asked = ({"name": "int8", "embeddings": "int8"}, {"name": "int4", "keep": ["*.0.*.o_proj"], "packing": packing})
    specs = [VariantSpec.model_validate(spec).resolved() for spec in asked]
    together, apart = ({s.name: tmp_path / way / s.name for s in specs} for way in ("together", "apart"))
    variants = Variants(specs, together, linear, tables, shard_bytes=100_000)
    made = merge_checkpoint(base, adapter, tmp_path / "a", kind, linear, template="of the training", variants=variants)
    merge_checkpoint(base, adapter, tmp_path / "b", kind, linear, template="of the training")
    assert made == quantize_checkpoint(tmp_path / "b", specs, apart, linear, None, 100_000, tables)
    for one, two in ((tmp_path / "a", tmp_path / "b"), *((together[s.name], apart[s.name]) for s in specs)):
        assert len(list(one.glob("*.safetensors"))) > 1
        assert (one / "chat_template.jinja").read_text() == "of the training"
        files = sorted(path.name for path in one.iterdir())
        assert files == sorted(path.name for path in two.iterdir())
        for name in files:
            assert (one / name).read_bytes() == (two / name).read_bytes(), (one, name)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_gguf_made_in_the_pass_is_that_of_the_merged_model(tiny_model, trained, tmp_path, kind, architecture):
    base, linear = tiny_model(architecture), linear_weights(tiny_model(architecture))
    own = ["gguf-q4_k_m"] if importlib.util.find_spec("llama_cpp") else []
    specs = [VariantSpec(name=name).resolved() for name in ("gguf-q4_0", "gguf-f16", *own, "int4")]
    specs[-1] = specs[-1].model_copy(update={"packing": "tile_packed"})  # eight rows, while heads have 40 or 32
    ways = [{s.name: tmp_path / way / s.name for s in specs} for way in ("together", "apart")]
    tables, template = table_weights(base), "{{ messages }}"
    variants = Variants(specs, ways[0], linear, tables, name="tiny")
    merge_checkpoint(base, trained(base), tmp_path / "a", kind, linear, template=template, variants=variants)
    quantize_checkpoint(tmp_path / "a", specs, ways[1], linear, tables=tables, name="tiny")
    for spec in specs[:-1]:
        (one,), (two,) = (list(way[spec.name].iterdir()) for way in ways)
        assert one.read_bytes() == two.read_bytes() and template.encode() in one.read_bytes()


def test_a_variant_that_fails_in_the_pass_keeps_neither_the_merge_nor_others_back(model_copy, trained, tmp_path):
    tensors = load_file(model_copy / SINGLE_NAME)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5
    save_file(tensors, model_copy / SINGLE_NAME, {"format": "pt"})
    specs = [VariantSpec(name=name).resolved() for name in ("gguf-f16", "int8")]
    places = {spec.name: tmp_path / spec.name for spec in specs}
    variants = Variants(specs, places, linear_weights(model_copy))
    made = merge_checkpoint(model_copy, trained(model_copy), tmp_path / "merged", "bf16", variants=variants)
    assert made.keys() == {"int8"} and variants.failed.keys() == {"gguf-f16"}
    assert list(places["gguf-f16"].iterdir()) == []
    assert all((folder / SINGLE_NAME).is_file() for folder in (tmp_path / "merged", places["int8"]))


def test_where_a_variant_cannot_be_made_in_the_pass_nothing_is_left_that_looks_finished(tiny_model, adapter, tmp_path):
    edit(adapter(), lambda tensors: tensors[f"{Q}.lora_B.weight"].fill_(float("nan")))
    base, out = tiny_model("llama"), {"int8": tmp_path / "int8"}
    variants = Variants([VariantSpec(name="int8").resolved()], out, linear_weights(base))
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj\.weight' that are not finite"):
        merge_checkpoint(base, adapter(), tmp_path / "merged", "bf16", variants=variants)
    assert not [*(tmp_path / "merged").glob("*.safetensors*"), *(tmp_path / "int8").iterdir()]
