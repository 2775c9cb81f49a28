"""Keys that people bring from other tools are answered with the key that they have here."""

from __future__ import annotations

import pytest

from pipeline.config.aliases import NO_KEY, OUR_KEYS
from pipeline.config.base import fields
from pipeline.config.schema import Config
from tests.support.configs import SMALLEST

KEYS = dict(fields(Config))


def test_every_name_leads_to_a_key_of_the_schema():
    assert {key for targets in OUR_KEYS.values() for key in targets} <= KEYS.keys()
    assert len(OUR_KEYS) >= 60


def test_no_name_is_answered_in_two_ways():
    assert not OUR_KEYS.keys() & NO_KEY.keys()
    assert not (OUR_KEYS.keys() | NO_KEY.keys()) & {key for key in KEYS if "." not in key}


# The keys of configurations as people have them: axolotl, LLaMA-Factory, trl and peft, unsloth, mlx-lm.
BROUGHT = {
    "base_model": "model.source",
    "model_name_or_path": "model.source",
    "datasets": "data.source",
    "dataset": "data.source",
    "val_set_size": "data.held_out",
    "val_size": "data.held_out",
    "max_samples": "data.limit",
    "adapter": "train.method",
    "finetuning_type": "train.method",
    "load_in_4bit": "train.method",
    "lora_r": "train.lora.rank",
    "lora_alpha": "train.lora.alpha",
    "lora_target": "train.lora.target_modules",
    "lr": "train.learning_rate",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "iters": "train.max_steps",
    "micro_batch_size": "train.batch_size",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulate",
    "lr_scheduler_type": "train.schedule",
    "warmup_steps": "train.warmup",
    "cutoff_len": "train.max_length",
    "sequence_len": "train.max_length",
    "max_seq_length": "train.max_length",
    "sample_packing": "train.packing",
    "train_on_inputs": "train.loss_on",
    "optim": "train.optimizer",
    "save_steps": "train.checkpoint_every",
    "eval_steps": "train.evaluate_every",
    "hub_model_id": "publish.repo",
    "report_to": "track.tracker",
    "wandb_project": "track.project",
    "output_dir": "name",
}


@pytest.mark.parametrize("place", ["", "train.", "train.lora."])
@pytest.mark.parametrize("name", BROUGHT)
def test_a_brought_name_is_answered_wherever_it_stands(refusal, name, place):
    message = refusal(SMALLEST, f"{place}{name}=1")
    assert f"{place}{name}: unknown key; here it is called " in message
    assert f"{BROUGHT[name]} ({KEYS[BROUGHT[name]].description})" in message


@pytest.mark.parametrize(
    "text, said",
    [
        ("learning_rate: 1.0e-4\n", "learning_rate: unknown key; here it is called train.learning_rate (highest"),
        ("learning-rate: 1.0e-4\n", "here it is called train.learning_rate (highest"),
        ("train: {rank: 8}\n", "train.rank: unknown key; here it is called train.lora.rank (rank of"),
        (
            "seed: 1\n",
            "here it is called data.seed (seed of the split, and of the choice that `limit` makes) or train.seed",
        ),
        ("quantize: {variants: [{name: int4, bits: 4}]}\n", "variants.0.bits: unknown key; here it is called quantize"),
    ],
)
def test_a_key_in_another_section_is_answered_with_its_place(refusal, text, said):
    assert said in refusal(SMALLEST + text)


@pytest.mark.parametrize(
    "name, said",
    [
        ("bf16", "here this is chosen automatically: bf16 if the machine computes fast in it"),
        ("fp16", "here this is chosen automatically"),
        ("pure_bf16", "bf16 if the machine computes fast in it"),
        ("logging_steps", "here every step is logged"),
        ("resume_from_checkpoint", "--fresh starts it again"),
        ("hub_token", "Try: HF_TOKEN"),
    ],
)
def test_what_has_no_key_here_is_explained(refusal, name, said):
    assert f"train.{name}: unknown key; " in refusal(SMALLEST, f"train.{name}=true")
    assert said in refusal(SMALLEST, f"train.{name}=true")


def test_a_whole_file_of_another_tool_is_answered_by_its_first_key(refusal):
    text = "base_model: user/model\nload_in_4bit: true\ndatasets:\n  - path: tickets.jsonl\nnum_epochs: 3\n"
    assert "run.yaml: base_model: unknown key; here it is called model.source (Hub id" in refusal(text)
