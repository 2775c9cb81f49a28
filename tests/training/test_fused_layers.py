"""Fused layers for training on a CPU: the results of the libraries' layers, with less memory."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl.trainer.utils import add_fused_lm_head

from pipeline.config.schema import Config
from pipeline.data.encode import NO_LOSS, Encoded, EncodedSet
from pipeline.evaluation import metrics
from pipeline.inference.kernels.attention import MODELS
from pipeline.system import hardware
from pipeline.training import fused_layers, fused_loss
from pipeline.training.fused_layers import fuse_layers
from pipeline.training.fused_loss import fuse_training_step
from pipeline.training.trainers import Job
from pipeline.training.trainers.sft import build
from pipeline.workflow.stages.merge import live_model
from tests.support.compute_watch import BF16Products

TOKENS = 40
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(folder, dtype=torch.float32, dropout=0.0, targets=TARGETS):
    """A model with an adapter, in float32 and with neither factor zero, always of the same numbers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape) * 0.1
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    return model.train()


def inputs():
    torch.manual_seed(1)
    ids = torch.randint(0, 256, (2, TOKENS))
    labels = ids.clone()
    labels[:, : TOKENS // 3] = -100
    return {"input_ids": ids, "labels": labels, "fused_lm_head": True}


def packed():
    """Three sequences of other lengths in one row, as trl packs them."""
    lengths = torch.tensor([17, 2, 21])
    bounds = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    given = {key: value[:1] if isinstance(value, torch.Tensor) else value for key, value in inputs().items()}
    given["labels"] = given["labels"].masked_fill(positions == 0, -100)
    longest = int(lengths.max())
    more = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return given | more | {"position_ids": positions}


def step(model, given):
    """Return the outputs and the adapter's gradients of one training step."""
    model.zero_grad()
    out = model(**given)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, tolerance):
    out, gradients = ours
    expected, expected_gradients = theirs
    assert gradients.keys() == expected_gradients.keys()
    assert torch.equal(out.label_mask, expected.label_mask)
    for name in ("loss", "log_probs", "entropy"):
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), rtol=tolerance, atol=tolerance)
    for name, gradient in gradients.items():
        difference = (gradient - expected_gradients[name]).norm() / expected_gradients[name].norm()
        assert difference < 10 * tolerance, f"{name}: {difference}"


@pytest.mark.parametrize("kind", ["batch", "packed"])
def test_step_in_float32_gives_the_libraries_numbers(any_model, kind):
    given = {"batch": inputs, "packed": packed}[kind]()
    plain, ours = adapted(any_model), adapted(any_model)
    fuse_training_step(ours, torch.float32)
    found, expected = step(ours, given), step(plain, given)
    assert_same(found, expected, 1e-4)
    assert torch.equal(found[0].is_top1.bool(), expected[0].is_top1.bool())


def test_step_keeps_weights_as_stored_and_computes_in_float32(tiny_model):
    folder = tiny_model("llama")
    ours, exact = adapted(folder, torch.bfloat16), adapted(folder)
    fuse_training_step(ours, torch.float32)
    stored = {name: p.dtype for name, p in ours.named_parameters() if p.ndim > 1 and "lora" not in name}
    assert set(stored.values()) == {torch.bfloat16}
    assert_same(step(ours, inputs()), step(exact, inputs()), 1e-4)


def test_step_in_bfloat16_is_close_to_float32(tiny_model):
    folder = tiny_model("llama")
    ours, exact = adapted(folder, torch.bfloat16), adapted(folder)
    fuse_training_step(ours, torch.bfloat16)
    (found, gradients), (expected, exact_gradients) = step(ours, inputs()), step(exact, inputs())
    assert abs(float(found.loss) / float(expected.loss) - 1) < 0.01
    for name, gradient in gradients.items():
        assert torch.cosine_similarity(gradient.flatten(), exact_gradients[name].flatten(), dim=0) > 0.98, name


def test_adapter_on_some_layers_trains_those_alone(tiny_model):
    folder, targets = tiny_model("llama"), ["q_proj", "up_proj"]
    plain, ours = adapted(folder, targets=targets), adapted(folder, targets=targets)
    fuse_training_step(ours, torch.float32)
    assert_same(step(ours, inputs()), step(plain, inputs()), 1e-4)


def test_dropout_drops_the_adapters_input_and_nothing_else(tiny_model):
    model = adapted(tiny_model("llama"), dropout=0.5)
    fuse_training_step(model, torch.float32)
    layer = next(m for m in model.modules() if hasattr(m, "lora_A") and m.base_layer.in_features == 160)
    x = torch.randn(1, TOKENS, 160, requires_grad=True)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    kept = torch.empty(x.shape, dtype=torch.bool).bernoulli_(0.5)
    assert 0.3 < kept.float().mean() < 0.7
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    mine = x.detach().requires_grad_()
    expected = layer.base_layer.weight @ mine[0].T
    expected = (expected + layer.scaling["default"] * (b @ (a @ (mine * kept * 2)[0].T))).T
    expected = expected + layer.base_layer.bias if layer.base_layer.bias is not None else expected
    torch.testing.assert_close(y[0], expected, rtol=1e-4, atol=1e-4)
    slope = torch.randn_like(expected)
    found = torch.autograd.grad(y, (x, a, b), slope[None])
    wanted = torch.autograd.grad(expected, (mine, a, b), slope)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    model.eval()
    torch.testing.assert_close(layer(x), layer(x))


def test_disabled_adapter_gives_the_base_model(tiny_model):
    folder = tiny_model("llama")
    model, base = adapted(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    fuse_layers(model.eval(), torch.float32)
    ids = inputs()["input_ids"]
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=1e-4, atol=1e-4)


def test_nf4_layer_multiplies_with_the_weights_that_merging_uses(tiny_model, monkeypatch):
    from pipeline.training.nf4_base import Nf4Weight, load_base

    folder = tiny_model("qwen3")
    lora = LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(load_base(folder, in_nf4=True), lora)
    fuse_layers(model, torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    name = "model.layers.0.mlp.up_proj"
    weight = stock.get_submodule(name).weight.data
    expected = Nf4Weight([weight], tuple(weight.shape)).rows(0, len(weight)).float()
    x = torch.randn(3, weight.shape[1])
    layer = model.get_base_model().get_submodule(name)
    torch.testing.assert_close(layer.get_base_layer()(x), x @ expected.T, rtol=1e-5, atol=1e-5)


def test_blocks_of_a_wide_weight_add_up(tiny_model, monkeypatch):
    folder = tiny_model("llama")
    plain, ours = adapted(folder), adapted(folder)
    monkeypatch.setattr(fused_layers, "BLOCK_ELEMENTS", 2000)
    monkeypatch.setattr(fused_loss, "LOGIT_ELEMENTS", 2000)
    fuse_training_step(ours, torch.float32)
    assert_same(step(ours, inputs()), step(plain, inputs()), 1e-4)


def test_packed_sequences_do_not_see_each_other(any_model):
    model = adapted(any_model).eval()
    fuse_training_step(model, torch.float32)
    given = packed()
    alone = {"input_ids": given["input_ids"][:, 19:], "labels": given["labels"][:, 19:], "fused_lm_head": True}
    with torch.no_grad():
        together, single = model(**given).log_probs[0, 19:], model(**alone).log_probs[0]
    torch.testing.assert_close(together, single, rtol=1e-4, atol=1e-4)


def test_step_keeps_less_for_the_backward_pass(tiny_model):
    folder = tiny_model("llama")
    plain, ours = adapted(folder, dropout=0.05), adapted(folder, dropout=0.05)
    fuse_training_step(ours, torch.float32)

    def kept_bytes(model) -> int:
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept = {}

        def note(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage  # held, or another tensor could get its address
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(**inputs()).loss.backward()
        return sum(storage.nbytes() for storage in kept.values())

    assert kept_bytes(ours) < 0.6 * kept_bytes(plain)


@pytest.mark.parametrize("method", ["qlora", "lora"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_training_multiplies_many_rows_in_the_compute_type_alone(any_model, tmp_path, monkeypatch, compute, method):
    monkeypatch.setenv(hardware.COMPUTE_DTYPE, compute)
    config = Config.model_validate(
        {
            "name": "watched", "model": {"source": str(any_model)}, "data": {"source": "unused"},
            "train": {"method": method, "batch_size": 2, "accumulate": 1, "max_length": 64, "max_steps": 1},
        }
    )  # fmt: skip
    torch.manual_seed(0)
    examples = [Encoded(ids, [NO_LOSS, *ids[1:]]) for ids in torch.randint(0, 250, (8, 30)).tolist()]
    parts = {name: EncodedSet(examples, 0, 0, 0, 0) for name in ("training", "held-out")}
    trainer = build(config, any_model, AutoTokenizer.from_pretrained(any_model), parts, Job(tmp_path))
    with BF16Products() as seen:
        trainer.train()
        trainer.evaluate()
    assert bool(seen.many_rows) == (compute == "bfloat16")

    trainer.save_model(str(tmp_path / "adapter"))
    live = live_model(config, any_model, tmp_path / "adapter")
    with BF16Products() as seen:
        metrics.score(live, examples)
    assert bool(seen.many_rows) == (compute == "bfloat16")


@pytest.mark.parametrize("kind", ["jamba", "mixtral", "opt", "gpt2"])
def test_architectures_of_other_kinds_train_in_float32(monkeypatch, kind):
    monkeypatch.setenv(hardware.COMPUTE_DTYPE, "float32")
    shape = {"vocab_size": 272, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "jamba":
        heads |= {"use_mamba_kernels": False, "num_experts": 2}
    config = AutoConfig.for_model(kind, **shape, **heads)
    torch.manual_seed(0)
    exact = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    stored = copy.deepcopy(exact).to(torch.bfloat16)
    exact.load_state_dict(stored.state_dict())
    models = []
    for model in (stored, exact):
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        torch.manual_seed(1)
        models.append(get_peft_model(model, lora).train())
        for parameter in models[-1].parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape) * 0.1
    for model in models:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    fuse_training_step(models[0], torch.float32)
    (found, gradients), (expected, exact_gradients) = step(models[0], inputs()), step(models[1], inputs())
    assert abs(float(found.loss) / float(expected.loss) - 1) < 0.01
    for name, gradient in gradients.items():
        assert torch.cosine_similarity(gradient.flatten(), exact_gradients[name].flatten(), dim=0) > 0.95, name


def test_other_architectures_keep_transformers_attention(tiny_model):
    folder = tiny_model("llama")
    model = adapted(folder)
    model.get_base_model().config.model_type = "unknown"
    before = copy.copy(model.get_base_model().config._attn_implementation)
    assert "unknown" not in MODELS
    fuse_layers(model, torch.float32)
    assert model.get_base_model().config._attn_implementation == before
