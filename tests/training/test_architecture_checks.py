"""What the loaded model is asked before training: packed rows stay apart, and the loss is that of its own logits."""

from __future__ import annotations

import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer
from trl.trainer.utils import add_fused_lm_head

from pipeline.config.schema import Config
from pipeline.data.encode import NO_LOSS, Encoded, EncodedSet
from pipeline.errors import ModelError
from pipeline.system import hardware
from pipeline.training.architecture_checks import LENGTHS, check_logits, packs_apart
from pipeline.training.fused_loss import fuse_training_step
from pipeline.training.nf4_base import load_base
from pipeline.training.trainers import Job
from pipeline.training.trainers.sft import build as build_trainer
from tests.support.architectures import build
from tests.support.compute_watch import LEAST_WORK, BF16Products
from tests.support.models import relative_error, write_tokenizer

TOKENS = random.Random(0).choices(range(3, 250), k=16)


@pytest.mark.parametrize(
    "kind",
    [
        "bamba", "biogpt", "bloom", "falcon_h1", "gpt_oss", "jamba", "lfm2", "mamba", "mamba2", "mpt", "openai-gpt",
        "opt", "qwen3_next", "recurrent_gemma", "xglm",
    ],
)  # fmt: skip
def test_architectures_whose_packed_rows_see_each_other_are_found(kind):
    assert not packs_apart(build(kind))


@pytest.mark.parametrize("kind", ["cohere2", "gemma2", "gpt2", "granite", "llama", "mixtral", "phi", "qwen3"])
def test_architectures_that_keep_packed_rows_apart_may_pack(kind):
    model = build(kind).train()
    assert packs_apart(model) and packs_apart(model.to(torch.bfloat16))
    assert model.training and not any(parameter.grad is not None for parameter in model.parameters())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """`checkpoint(kind, **changes)`: the folder of a tiny random model in bfloat16 with a tokenizer."""

    def make(kind, **changes):
        folder = tmp_path_factory.mktemp(kind)
        build(kind, **changes).to(torch.bfloat16).save_pretrained(folder)
        write_tokenizer(folder)
        return folder

    return make


@pytest.mark.parametrize("kind, apart", [("llama", True), ("opt", False)])
def test_four_bit_weights_change_no_answer(checkpoint, kind, apart):
    assert packs_apart(load_base(checkpoint(kind), in_nf4=True)) == apart


def test_asking_multiplies_in_the_compute_type(monkeypatch):
    monkeypatch.setenv(hardware.COMPUTE_DTYPE, "float32")
    model = build("llama").to(torch.bfloat16)
    with BF16Products() as seen:
        assert packs_apart(model)
    assert not [product for product in seen.products if product.work >= LEAST_WORK and product.function != "bmm"]
    assert not any("forward" in layer.__dict__ for layer in model.modules())


def test_wrong_positions_count_even_if_no_row_sees_another():
    model = build("gpt2")
    assert packs_apart(model)
    table = model.transformer.wpe
    table.register_forward_pre_hook(lambda _, given: (given[0] + 30 * (given[0].shape[1] > LENGTHS[1]),))
    assert not packs_apart(model)


def trainer_of(folder, tmp_path, said=None, **settings):
    train = {"method": "lora", "batch_size": 2, "accumulate": 1, "max_length": 64, "max_steps": 1, **settings}
    tree = {"name": "asked", "model": {"source": str(folder)}, "data": {"source": "unused"}, "train": train}
    draw = random.Random(0)
    rows = [[draw.randrange(250) for _ in range(n)] for n in (20, 25, 11, 30)]
    encoded = EncodedSet([Encoded(row, [NO_LOSS] * 3 + row[3:]) for row in rows], 0, 0, sum(map(len, rows)), 0)
    job = Job(tmp_path) if said is None else Job(tmp_path, say=said.append)
    parts = {"training": encoded, "held-out": encoded}
    return build_trainer(Config.model_validate(tree), folder, AutoTokenizer.from_pretrained(folder), parts, job)


def test_examples_train_in_rows_of_their_own_where_packed_ones_would_see_each_other(checkpoint, tmp_path):
    said = []
    trainer = trainer_of(checkpoint("bloom"), tmp_path, said)
    (line,) = said
    assert line.startswith("train.packing: off, since packed examples would see each other in a model of type bloom")
    assert not trainer.args.packing
    backbone = trainer.model.get_base_model().base_model
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        batch = next(iter(loader))
        with torch.no_grad():
            states = backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
            for row, ids, mask in zip(states, batch["input_ids"], batch["attention_mask"].bool(), strict=True):
                assert relative_error(row[mask], backbone(input_ids=ids[mask][None])[0][0]) < 0.05


def test_packing_is_left_alone_where_rows_stay_apart_or_nobody_asked(checkpoint, tmp_path):
    said = []
    assert trainer_of(checkpoint("llama"), tmp_path, said).args.packing
    assert not trainer_of(checkpoint("bloom"), tmp_path, said, packing=False).args.packing
    assert not said


HEADS = {
    "gemma2": {"final_logit_softcapping": 0.5},
    "recurrent_gemma": {"logits_soft_cap": 0.2},
    "granite": {"logits_scaling": 0.2},
    "hyperclovax": {"logits_scaling": 3.0},
    "minicpm3": {"dim_model_base": 16},
    "cohere": {"logit_scale": 3.0},
    "falcon_h1": {"lm_head_multiplier": 3.0},
    "phi": {},
    "gptj": {},
}


def adapted(kind, **changes):
    """A model of an architecture with an adapter that is not zero, as trl prepares it."""
    model = build(kind, **changes)
    with torch.no_grad():
        if getattr(model.get_output_embeddings(), "bias", None) is not None:
            model.get_output_embeddings().bias.normal_()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    targets = ["q_proj", "up_proj"] if kind == "falcon_h1" else "all-linear"  # peft refuses the rest
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape) * 0.1
    return model.eval()


@pytest.mark.parametrize("kind", HEADS)
def test_loss_and_gradient_are_those_of_the_models_own_logits(kind):
    ids, losses, gradients = torch.tensor([TOKENS]), [], []
    for ours in (True, False):
        model = adapted(kind, **HEADS[kind])
        if ours:
            fuse_training_step(model, torch.float32)
            check_logits(model.get_base_model(), TOKENS)
            loss = model(input_ids=ids, labels=ids, fused_lm_head=True).loss
        else:
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
        loss.backward()
        losses.append(float(loss))
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[1].items():
        assert relative_error(gradients[0][name], expected) < 1e-3, name


def test_a_loss_of_other_logits_is_refused_before_the_first_step():
    model = adapted("recurrent_gemma", logits_soft_cap=0.2)  # with the loss of trl, which does not know this bound
    with pytest.raises(ModelError, match="^recurrent_gemma: the loss that trl computes is not that of the model's own"):
        check_logits(model.get_base_model(), TOKENS)


def test_a_head_that_does_more_is_refused_before_the_first_step(checkpoint, tmp_path, monkeypatch):
    from transformers import CohereForCausalLM

    own = CohereForCausalLM.forward

    def forward(self, *arguments, **settings):
        output = own(self, *arguments, **settings)
        output.logits = output.logits.abs()
        return output

    monkeypatch.setattr(CohereForCausalLM, "forward", forward)
    with pytest.raises(ModelError, match="^cohere: its logits are more than its last hidden states times a matrix"):
        trainer_of(checkpoint("cohere"), tmp_path)
