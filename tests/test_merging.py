"""A merged model is the base plus the adapter's change, rounded once; what cannot be merged is refused by name."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoint import SINGLE_NAME, Checkpoint
from pipeline.errors import CheckpointError, ModelError
from pipeline.merging import Adapter, as_nf4, merge_checkpoint
from pipeline.models import linear_weights
from tests.conftest import ARCHITECTURES

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
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.05)
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
    before, after, changed = Checkpoint(base), Checkpoint(tmp_path), set(Adapter.read(adapter).factors)
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


def test_the_scale_is_alpha_over_rank_or_over_its_root(tiny_model, trained):
    base = tiny_model("llama")
    assert Adapter.read(trained(base)).scale == ALPHA / RANK
    assert Adapter.read(trained(base, use_rslora=True)).scale == ALPHA / math.sqrt(RANK)


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
    before, after, factors = Checkpoint(base), Checkpoint(tmp_path), Adapter.read(adapter).factors
    for name in after:
        weight = before.read(name)
        if (held := layers.get(name.removesuffix(".weight"))) is not None:
            weight = dequantize_4bit(held.data, held.quant_state)
            assert weight.dtype == torch.bfloat16 and not torch.equal(weight, before.read(name))
        if name in factors:
            a, b = (f.float() for f in factors[name])
            expected = weight.float() + ALPHA / RANK * (b @ a)
            assert ((after.read(name).float() - expected).abs() <= HALF_ULP * expected.abs() + 1e-6).all()
        else:
            assert torch.equal(after.read(name), weight)


def test_nf4_of_nf4_is_the_same_weight():
    once = as_nf4(torch.randn(64, 128).bfloat16())
    assert (as_nf4(once) - once).abs().max() < 0.05 * once.abs().max()


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
        {"use_dora": True}, {"lora_bias": True}, {"fan_in_fan_out": True}, {"modules_to_save": ["lm_head"]},
        {"alpha_pattern": {"q_proj": 8}}, {"rank_pattern": {"q_proj": 8}}, {"layer_replication": [[0, 1]]},
        {"target_parameters": ["x"]}, {"trainable_token_indices": [1]}, {"alora_invocation_tokens": [1]},
        {"use_qalora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"}, {"init_lora_weights": "loftq"}, {"init_lora_weights": "corda"},
    ],
    ids=str,
)  # fmt: skip
def test_what_an_adapter_has_beyond_plain_lora_is_refused_by_name(adapter, values):
    (key,) = values
    with pytest.raises(ModelError, match=key):
        Adapter.read(adapter(**values))


@pytest.mark.parametrize(
    "values", [{"init_lora_weights": "gaussian"}, {"init_lora_weights": False}, {"modules_to_save": None}]
)
def test_what_makes_no_difference_to_a_merge_is_not(adapter, values):
    assert len(Adapter.read(adapter(**values)).factors) == 14


@pytest.mark.parametrize(
    "values, said",
    [
        ({"bias": "all"}, "bias"),
        ({"bias": "lora_only"}, "bias"),
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
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(2)}), "is not a LoRA factor"),
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
