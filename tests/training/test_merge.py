"""Merging: the base plus the adapter's change, rounded once, and refusals by name."""

import importlib.util
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.schema import VariantSpec
from pipeline.errors import CheckpointError, ModelError
from pipeline.models.checkpoint import SINGLE_NAME, Checkpoint, row_blocks
from pipeline.models.lora_adapter import Adapter
from pipeline.models.matrices import linear_weights, table_weights
from pipeline.quantization.writer import Variants, quantize_checkpoint
from pipeline.training import merge
from pipeline.training.merge import merge_checkpoint
from pipeline.training.nf4_base import Nf4Weight, row_multiple
from tests.support.models import ARCHITECTURES

RANK, ALPHA = 4, 12
HALF_ULP = 2**-8  # relative, of bf16


def base_model(folder, dtype=torch.bfloat16, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


@pytest.fixture(scope="session")
def trained(tiny_model, tmp_path_factory):
    """`trained(base, use_rslora=True)`: the folder of a LoRA adapter for it, with factors that are not zero."""
    from peft import LoraConfig, get_peft_model

    made = {}

    def make(base, **options):
        key = (base, repr(sorted(options.items())))
        if key not in made:
            torch.manual_seed(1)
            settings = {
                "r": RANK,
                "lora_alpha": ALPHA,
                "target_modules": "all-linear",
                "task_type": "CAUSAL_LM",
                **options,
            }
            model = get_peft_model(base_model(base), LoraConfig(**settings))
            for name, parameter in model.named_parameters():
                if "lora_B" in name or (parameter.requires_grad and "lora_A" not in name):
                    with torch.no_grad():  # factors begin at 0, and what is trained whole begins at the base's own
                        parameter.add_(torch.randn_like(parameter) * 0.05)
            made[key] = tmp_path_factory.mktemp("adapter")
            model.save_pretrained(made[key])
        return made[key]

    return make


def weights_of(model) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "down_proj"]}], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_merge_into_bf16_is_pefts_own_rounded_once(tiny_model, trained, tmp_path, architecture, options):
    from peft import PeftModel

    base = tiny_model(architecture)
    adapter = trained(base, **options)
    merge_checkpoint(base, adapter, tmp_path, "bf16")
    exact = weights_of(PeftModel.from_pretrained(base_model(base, torch.float32), adapter).merge_and_unload())
    before, after, changed = Checkpoint(base), Checkpoint(tmp_path), set(Adapter.read(adapter).changes)
    assert set(after) == set(before) and len(changed) == (4 if "target_modules" in options else 14)
    for name in after:
        ours = after.read(name)
        assert ours.dtype == torch.bfloat16
        if name in changed:
            error = (ours.float() - exact[name]).abs()
            assert (error <= HALF_ULP * exact[name].abs() + 1e-6).all(), name
            assert not torch.equal(ours, before.read(name))
        else:
            assert torch.equal(ours, before.read(name))


BEYOND = {
    "ranks and alphas": {
        "rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\.down_proj": 2}, "alpha_pattern": {"q_proj": 3},
    },
    "ranks and alphas, rslora": {
        "rank_pattern": {"model.layers.0.*up_proj": 8}, "alpha_pattern": {"up_proj": 5, "v_proj": 7},
        "use_rslora": True,
    },
    "biases of the factors": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "every bias": {"bias": "all"},
    "biases of the layers": {"bias": "lora_only", "target_modules": ["k_proj", "up_proj"]},
    "modules trained whole": {"modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "a head with factors": {"target_modules": ["q_proj", "lm_head"]},
    "DoRA": {"use_dora": True},
    "DoRA, rslora, ranks": {"use_dora": True, "use_rslora": True, "rank_pattern": {"o_proj": 6}},
}  # fmt: skip


@pytest.mark.parametrize("what", BEYOND)
def test_whatever_else_an_adapter_carries_is_merged_as_peft_merges_it(tiny_model, trained, tmp_path, monkeypatch, what):
    from peft import PeftModel

    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 20_000)  # every weight in several blocks
    monkeypatch.setattr(row_blocks, "TILE_ELEMENTS", 3000)
    base = tiny_model("llama")
    adapter = trained(base, **BEYOND[what])
    merge_checkpoint(base, adapter, tmp_path, "bf16")
    exact = PeftModel.from_pretrained(base_model(base, torch.float32), adapter).merge_and_unload().state_dict()
    before, after = Checkpoint(base), Checkpoint(tmp_path)
    touched = Adapter.read(adapter).shapes()
    assert set(after) == set(before) == set(exact)
    for name in after:
        error = (after.read(name).float() - exact[name]).abs()
        assert (error <= HALF_ULP * exact[name].abs() + 1e-6).all(), name
        assert torch.equal(after.read(name), before.read(name)) == (name not in touched), name


def test_blocks_of_rows_of_any_size_give_the_same_weights(tiny_model, trained, tmp_path, monkeypatch):
    base = tiny_model("llama")
    adapter = trained(base, use_dora=True)
    for kind in ("bf16", "nf4"):
        merge_checkpoint(base, adapter, tmp_path / kind, kind, linear_weights(base))
        with monkeypatch.context() as small:
            small.setattr(row_blocks, "BLOCK_BYTES", 5000)
            small.setattr(row_blocks, "TILE_ELEMENTS", 1000)
            merge_checkpoint(base, adapter, tmp_path / f"{kind}-small", kind, linear_weights(base))
        whole, apart = Checkpoint(tmp_path / kind), Checkpoint(tmp_path / f"{kind}-small")
        for name in whole:  # a product of other shapes may sum in another order
            assert torch.allclose(whole.read(name).float(), apart.read(name).float(), rtol=2 * HALF_ULP, atol=1e-6)


def test_pefts_merge_in_bf16_is_within_its_own_rounding(tiny_model, trained, tmp_path):
    from peft import PeftModel

    base = tiny_model("llama")
    merge_checkpoint(base, trained(base), tmp_path, "bf16")
    theirs = weights_of(PeftModel.from_pretrained(base_model(base), trained(base)).merge_and_unload())
    ours = Checkpoint(tmp_path)
    for name in ours:
        assert torch.allclose(ours.read(name).float(), theirs[name].float(), rtol=4 * HALF_ULP, atol=2e-3)


def test_the_merged_model_answers_like_the_live_adapter(any_model, trained, tmp_path):
    from peft import PeftModel

    merge_checkpoint(any_model, trained(any_model), tmp_path, "bf16")
    ids = torch.arange(40, 80)[None]
    with torch.no_grad():
        merged, base = (base_model(f)(ids).logits.float() for f in (tmp_path, any_model))
        live = PeftModel.from_pretrained(base_model(any_model), trained(any_model)).eval()(ids).logits.float()
    assert (merged - live).norm() < 0.05 * live.norm() < 0.2 * (base - live).norm()


def test_the_scale_is_alpha_over_rank_or_over_its_root_layer_by_layer(tiny_model, trained):
    base = tiny_model("llama")

    def scales(**options):
        return {name: change.scale for name, change in Adapter.read(trained(base, **options)).changes.items()}

    assert set(scales().values()) == {ALPHA / RANK}
    assert set(scales(use_rslora=True).values()) == {ALPHA / math.sqrt(RANK)}
    by_layer = scales(rank_pattern={"q_proj": 8}, alpha_pattern={r"layers\.1\.self_attn\.q_proj": 3})
    assert by_layer["model.layers.0.self_attn.q_proj.weight"] == ALPHA / 8
    assert by_layer["model.layers.1.self_attn.q_proj.weight"] == 3 / 8
    assert by_layer["model.layers.1.self_attn.k_proj.weight"] == ALPHA / RANK


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_merge_into_nf4_starts_from_what_training_saw(tiny_model, trained, tmp_path, architecture):
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig

    base = tiny_model(architecture)
    adapter = trained(base, target_modules=["q_proj", "up_proj"])  # the other layers are NF4 too
    merge_checkpoint(base, adapter, tmp_path, "nf4", linear_weights(base))
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    seen = base_model(base, quantization_config=nf4)
    layers = {n: m.weight for n, m in seen.named_modules() if isinstance(m, Linear4bit)}
    assert {f"{name}.weight" for name in layers} == set(linear_weights(base))
    before, after, read = Checkpoint(base), Checkpoint(tmp_path), Adapter.read(adapter)
    for name in after:
        weight = before.read(name)
        if (held := layers.get(name.removesuffix(".weight"))) is not None:
            weight = dequantize_4bit(held.data, held.quant_state)
            assert weight.dtype == torch.bfloat16 and not torch.equal(weight, before.read(name))
        if change := read.changes.get(name):
            a, b = (read.tensors.read(factor).float() for factor in (change.a, change.b))
            expected = weight.float() + ALPHA / RANK * (b @ a)
            assert ((after.read(name).float() - expected).abs() <= HALF_ULP * expected.abs() + 1e-6).all()
        else:
            assert torch.equal(after.read(name), weight)


@pytest.mark.parametrize("shape", [(160, 192), (33, 64), (96, 80), (33, 96), (6, 32), (70, 31), (1, 64)], ids=str)
@pytest.mark.parametrize("times", [1, 3, 1000])
def test_a_weight_seen_in_pieces_is_held_in_nf4_to_the_last_bit_as_if_seen_whole(shape, times):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(shape).bfloat16()
    step = times * row_multiple(*shape)
    cuts = [(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]
    held = Nf4Weight((weight[a:b] for a, b in cuts), shape)
    whole = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
    assert torch.equal(torch.cat([held.rows(a, b) for a, b in cuts]), whole)
    assert not torch.equal(whole, weight)


@pytest.mark.parametrize("linear, said", [((), "every linear layer"), (("ghost.weight",), "ghost.weight")])
def test_a_merge_into_nf4_that_would_quantize_nothing_is_refused(tiny_model, trained, tmp_path, linear, said):
    base = tiny_model("llama")
    with pytest.raises(ModelError, match=f"cannot tell what NF4 training saw; {said} is missing"):
        merge_checkpoint(base, trained(base), tmp_path, "nf4", linear)


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_float32_bases_become_bf16_and_the_configuration_says_so(tiny_model, trained, tmp_path, kind):
    base = tiny_model("qwen3", "float32")
    merge_checkpoint(base, trained(tiny_model("qwen3")), tmp_path, kind, linear_weights(base))
    assert {info.dtype for info in Checkpoint(tmp_path).values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config
    assert base_model(tmp_path, "auto").dtype == torch.bfloat16


def test_sharded_bases_are_merged_alike(tiny_model, trained, tmp_path):
    base, sharded = tiny_model("llama"), tmp_path / "sharded"
    base_model(base).save_pretrained(sharded, max_shard_size="150KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    for source, target in ((base, "a"), (sharded, "b")):
        merge_checkpoint(source, trained(base), tmp_path / target, "bf16")
    a, b = Checkpoint(tmp_path / "a"), Checkpoint(tmp_path / "b")
    assert all(torch.equal(a.read(name), b.read(name)) for name in a) and set(a) == set(b)


def test_tokenizer_and_template_come_along_and_progress_ends(tiny_model, trained, tmp_path):
    base, seen = tiny_model("llama"), []
    merge_checkpoint(base, trained(base), tmp_path, "bf16", on_progress=lambda done, total: seen.append((done, total)))
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= {p.name for p in tmp_path.iterdir()}
    total = Checkpoint(base).nbytes
    assert seen[-1] == (total, total)


# -- variants in the same pass


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
    assert [*(tmp_path / "merged").iterdir(), *(tmp_path / "int8").iterdir()] == []


# -- adapters that are not merged


@pytest.fixture
def adapter(tiny_model, trained, tmp_path):
    """An adapter that a test may change, and a function that changes its configuration."""
    folder = shutil.copytree(trained(tiny_model("llama")), tmp_path / "adapter")

    def change(**values):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return folder

    return change


@pytest.mark.parametrize(
    "values",
    [
        {"fan_in_fan_out": True}, {"layer_replication": [[0, 1]]}, {"ensure_weight_tying": True},
        {"target_parameters": ["x"]}, {"trainable_token_indices": [1]}, {"alora_invocation_tokens": [1]},
        {"use_qalora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"}, {"init_lora_weights": "loftq"}, {"init_lora_weights": "corda"},
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_merged_is_refused_by_name(adapter, values):
    (key,) = values
    with pytest.raises(ModelError, match=key):
        Adapter.read(adapter(**values))


@pytest.mark.parametrize(
    "values", [{"init_lora_weights": "gaussian"}, {"init_lora_weights": False}, {"modules_to_save": None}]
)
def test_harmless_adapter_settings_are_accepted(adapter, values):
    assert len(Adapter.read(adapter(**values)).changes) == 14


@pytest.mark.parametrize(
    "values, said",
    [
        ({"use_dora": True}, "use_dora is True, and .* no lora_magnitude_vector"),
        ({"lora_bias": True}, "lora_bias is True, and .* no lora_B.bias"),
        ({"rank_pattern": {"q_proj": 8}}, "q_proj.weight' has no factors A and B of rank 8"),
        ({"rank_pattern": {"q_proj": "8"}}, "no rank and alpha for 'model.layers.0.self_attn.q_proj'"),
        ({"rank_pattern": {"q_(proj": 8}}, "no regular expression"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern in its adapter_config.json is not a table"),
        ({"peft_type": "IA3"}, "a IA3 adapter; only LoRA"),
        ({"r": 8}, "no factors A and B of rank 8"),
        ({"r": 0}, "no rank and alpha"),
        ({"r": None}, "no rank and alpha"),
        ({"lora_alpha": "many"}, "no rank and alpha"),
    ],
)
def test_other_configurations_are_refused(adapter, values, said):
    with pytest.raises(ModelError, match=said):
        Adapter.read(adapter(**values))


@pytest.mark.parametrize("text", [None, "", "[]", "5", "[" * 100_000, b"\xff\xfe"])
def test_a_folder_that_is_no_adapter_is_refused(adapter, text):
    path = adapter() / "adapter_config.json"
    path.unlink() if text is None else path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ModelError, match="this is not an adapter"):
        Adapter.read(path.parent)


def test_an_adapter_without_its_weights_is_refused(adapter):
    (adapter() / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="adapter_model.safetensors: cannot be read"):
        Adapter.read(adapter())


def edit(folder, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2, 2)}),
            "lm_head.weight' is not a LoRA factor",
        ),
        (lambda t: t.update({f"{Q}.bias": torch.ones(160)}), "q_proj.bias' is not a LoRA factor"),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(160)}), "use_dora is False"),
        (lambda t: t.update({f"{Q}.lora_B.bias": torch.ones(160)}), "lora_bias is False"),
        (lambda t: t.update({f"{Q}.lora_embedding_A": torch.ones(2, 2)}), "is not a LoRA factor"),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "q_proj.weight' has no factors A and B of rank 4"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(5, 160)}), "no factors A and B of rank 4"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 160, 1, 1)}), "no factors A and B of rank 4"),
    ],
)
def test_tensors_that_are_not_pairs_of_factors_are_refused_by_name(adapter, change, said):
    edit(adapter(), change)
    with pytest.raises(ModelError, match=said):
        Adapter.read(adapter())


def test_a_table_that_the_base_uses_twice_is_not_replaced_in_one_of_its_places(tiny_model, trained, tmp_path):
    for module, said in (("embed_tokens", "uses twice"), ("lm_head", "changes 'lm_head.weight', which .* not have")):
        base = tiny_model("qwen3")
        with pytest.raises(ModelError, match=said):
            merge_checkpoint(base, trained(base, modules_to_save=[module]), tmp_path / "out", "bf16")
    assert not (tmp_path / "out").exists()


def test_tied_table_stored_twice_is_replaced_in_both_places_or_refused(tiny_model, trained, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model("llama"), base)
    adapter = trained(tiny_model("llama"), target_modules=["q_proj", "lm_head"])
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ModelError, match="'lm_head.weight', which .* uses twice"):
        merge_checkpoint(base, adapter, tmp_path / "out", "bf16")


@pytest.mark.parametrize("architecture, said", [("qwen3", "made for a"), ("smollm3", "made for a")])
def test_an_adapter_of_another_model_is_refused_by_name(tiny_model, adapter, tmp_path, architecture, said):
    with pytest.raises(ModelError, match=rf"{said} 'model\.layers"):
        merge_checkpoint(tiny_model(architecture), adapter(), tmp_path / "out", "bf16")


def test_a_layer_that_the_base_lacks_is_refused_by_name(tiny_model, adapter, tmp_path):
    def deeper(tensors):
        for half in "AB":
            name = f"{Q}.lora_{half}.weight"
            tensors[name.replace("layers.0", "layers.9")] = tensors[name].clone()

    edit(adapter(), deeper)
    with pytest.raises(ModelError, match=r"changes 'model\.layers\.9\.self_attn\.q_proj\.weight'"):
        merge_checkpoint(tiny_model("llama"), adapter(), tmp_path / "out", "bf16")
    assert not (tmp_path / "out" / SINGLE_NAME).exists()


@pytest.mark.parametrize("whose", ["adapter", "base"])
def test_non_finite_values_are_refused_with_their_origin(tiny_model, trained, tmp_path, whose):
    base = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    adapter = shutil.copytree(trained(tiny_model("llama")), tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors" if whose == "adapter" else base / SINGLE_NAME
    tensors = load_file(path)
    ending = "down_proj.lora_B.weight" if whose == "adapter" else "down_proj.weight"
    name = next(name for name in sorted(tensors) if name.endswith(ending))
    tensors[name][0, 0] = math.nan
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"{whose}: makes values of .*down_proj.weight' that are not finite"):
        merge_checkpoint(base, adapter, tmp_path / "out", "bf16")
    assert not list((tmp_path / "out").glob("*.safetensors*"))
