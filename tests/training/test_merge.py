"""Merging: the base plus the change of the adapter, rounded once."""

import json
import math

import pytest
import torch

from pipeline.errors import ModelError
from pipeline.models.checkpoint import Checkpoint, row_blocks
from pipeline.models.lora_adapter import Adapter
from pipeline.models.matrices import linear_weights
from pipeline.training.merge import merge_checkpoint
from pipeline.training.nf4_base import Nf4Weight, row_multiple
from tests.support.adapters import ALPHA, RANK, base_model
from tests.support.checkpoints import rewrite, unprefixed
from tests.support.models import ARCHITECTURES

HALF_ULP = 2**-8  # relative, of bf16


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


def test_a_merge_into_a_base_without_a_norm_is_refused_before_anything_is_written(tiny_model, trained, tmp_path):
    source = tiny_model("llama")
    folder = rewrite(source, tmp_path / "base", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ModelError, match="has no 'model.norm.weight'"):
        merge_checkpoint(folder, trained(source), tmp_path / "merged", "bf16")
    assert not (tmp_path / "merged").exists()


def test_a_merge_into_a_checkpoint_of_the_bare_decoder_is_that_into_the_model(tiny_model, trained, tmp_path):
    source = tiny_model("llama")
    folder = rewrite(source, tmp_path / "base", unprefixed)
    for kind, base in (("whole", source), ("bare", folder)):
        merge_checkpoint(base, trained(source), tmp_path / kind, "bf16")
    whole, bare = (Checkpoint(tmp_path / kind) for kind in ("whole", "bare"))
    assert whole.keys() == bare.keys()
    assert all(torch.equal(whole.read(name), bare.read(name)) for name in whole)


def test_learned_end_of_turn_is_added_to_the_tokens_that_end_an_answer_once(tiny_model, trained, tmp_path):
    base = tiny_model("llama")  # which ends an answer with 258
    for name, end in (("known", 258), ("new", 257)):
        merge_checkpoint(base, trained(base), tmp_path / name, "bf16", end_of_turn=end)
    for name in ("config.json", "generation_config.json"):
        known, new = (json.loads((tmp_path / kind / name).read_text()) for kind in ("known", "new"))
        assert new == {**known, "eos_token_id": [258, 257]} and known["eos_token_id"] == 258
    own = base / "generation_config.json"
    assert (tmp_path / "known" / own.name).read_bytes() == own.read_bytes()
