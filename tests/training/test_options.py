"""Options of trl and peft: wrong ones are refused in one line before a model is loaded, right ones reach training."""

import json
import random
import shutil
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config.loader import load_config
from pipeline.config.schema import Config, TrainingRun
from pipeline.data.encode import Encoded, EncodedSet
from pipeline.errors import ConfigError, StageFailed, UserError
from pipeline.models.matrices import linear_weights
from pipeline.training import merge
from pipeline.training.adapter_files import keep_beginning, save_adapter
from pipeline.training.checkpoints import TRAINER_STATE, find_best_checkpoint
from pipeline.training.merge import check_mergeable, merge_checkpoint
from pipeline.training.options import check_options
from pipeline.training.trainers import Job
from pipeline.training.trainers.sft import build
from pipeline.workflow.in_process import run_stage_here
from pipeline.workflow.preflight import preflight
from pipeline.workflow.run import run_one
from pipeline.workflow.stages.fine_tune import largest_part, with_batch_size
from tests.extension import hungry_trainer
from tests.support.runs import write_place

TINY = {"batch_size": 2, "accumulate": 1, "max_length": 64, "packing": False, "max_steps": 3, "learning_rate": 0.01}


def config_for(folder="ada/base", **train) -> TrainingRun:
    tree = {"name": "named", "model": {"source": str(folder)}, "data": {"source": "builtin:python-docs"}}
    return Config.model_validate({**tree, "train": train})


REFUSED_IN_TRAINING = [
    ({"optim": "adafactor"}, "optim is set by train.optimizer"),
    ({"learning_rate": 1e-3}, "set by train.learning_rate"),
    ({"max_grad_norm": 0.5}, "set by train.max_grad_norm"),
    ({"per_device_train_batch_size": 8}, "set by train.batch_size"),
    ({"num_train_epochs": 2}, "set by train.epochs"),
    ({"packing": True}, "set by train.packing"),
    ({"seed": 3}, "set by train.seed"),
    ({"output_dir": "there"}, "set by name"),
    ({"report_to": "wandb"}, "set by track.tracker"),
    ({"push_to_hub": True}, "set by publish.repo"),
    ({"chat_template_path": "x.jinja"}, "set by data.chat_template"),
    ({"bf16": True}, "bf16 cannot be set: the machine decides"),
    ({"fsdp": "full_shard"}, "fsdp cannot be set: it is part of the file for --accelerate"),
    ({"save_only_model": True}, "a stopped training must continue with the same result"),
    ({"logging_steps": 10}, "every step is logged here"),
    ({"auto_find_batch_size": True}, "is halved here"),
    ({"remove_unused_columns": False}, "data arrives here as tokens"),
    ({"neftune_noise": 5}, "SFTConfig has no option 'neftune_noise'; did you mean 'neftune_noise_alpha'"),
    ({"qqq": 5}, "has no option 'qqq'; see its documentation"),
    ({"adam_beta2": "high"}, "train.options.adam_beta2: high is refused: Input should be a valid number"),
    ({"adam_beta2": True}, "train.options.adam_beta2: True is refused"),
    ({"dataloader_num_workers": 1.5}, "dataloader_num_workers: 1.5 is refused: Input should be a valid integer"),
    ({"tf32": "yes"}, "tf32: yes is refused: Input should be a valid boolean"),
    ({"debug": "everything"}, "train.options: SFTConfig refuses them: everything is not a valid DebugOption"),
]
REFUSED_IN_LORA = [
    ({"r": 8}, "r is set by train.lora.rank"),
    ({"lora_alpha": 8}, "set by train.lora.alpha"),
    ({"target_modules": "q_proj"}, "set by train.lora.target_modules"),
    ({"fan_in_fan_out": True}, "the result cannot be merged"),
    ({"trainable_token_indices": [1]}, "the result cannot be merged"),
    ({"loftq_config": {}}, "so a stopped training could not be continued"),
    ({"init_lora_weights": "loftq"}, "cannot be merged or resumed. Try: true, false, gaussian"),
    ({"init_lora_weights": "pissa"}, "holds in 4 bits. Try: --set train.method=lora"),
    ({"use_lora": True}, "LoraConfig has no option 'use_lora'; did you mean 'use_rslora'"),
    ({"use_dora": "yes"}, "use_dora: yes is refused: Input should be a valid boolean"),
    ({"bias": "some"}, "bias: some is refused: Input should be 'none', 'all' or 'lora_only'"),
    ({"rank_pattern": ["q_proj"]}, "rank_pattern: .* is refused: Input should be a valid dict"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED_IN_TRAINING, ids=str)
def test_wrong_training_option_is_refused_in_one_line(options, said):
    with pytest.raises((ConfigError, ValueError), match=said):
        check_options(config_for(options=options))


@pytest.mark.parametrize(("options", "said"), REFUSED_IN_LORA, ids=str)
def test_wrong_adapter_option_is_refused_in_one_line(options, said):
    with pytest.raises((ConfigError, ValueError), match=said):
        check_options(config_for(lora={"options": options}))


@pytest.mark.parametrize(
    ("train", "name"),
    [
        (
            {"trainer": "dpo", "method": "lora", "lora": {"options": {"init_lora_weights": "pissa"}}},
            "init_lora_weights",
        ),
        ({"trainer": "kto", "lora": {"options": {"bias": "all"}}}, "bias"),
        ({"preference": {"data": {"source": "x.jsonl"}}, "lora": {"options": {"bias": "lora_only"}}}, "bias"),
    ],
    ids=str,
)
def test_option_that_changes_the_reference_is_refused(train, name):
    with pytest.raises(ConfigError, match=f"{name} .*: it changes the base model.* Try: .* without {name}"):
        check_options(config_for(**train))


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"early_stopping": 2, "checkpoint_every": 30, "evaluate_every": 20}, "Try: checkpoint_every=20"),
        ({"early_stopping": 2, "checkpoint_every": 40, "evaluate_every": 20}, "Try: checkpoint_every=20"),
        ({"early_stopping": 0}, "greater than or equal to 1"),
        ({"max_grad_norm": -1}, "greater than or equal to 0"),
        ({"weight_decay": 2}, "less than or equal to 1"),
        ({"keep_checkpoints": 0}, "greater than or equal to 1"),
        ({"attention": "xformers"}, "'auto', 'eager', 'sdpa' or 'flash'"),
    ],
    ids=str,
)
def test_wrong_value_of_a_key_is_refused(train, said):
    with pytest.raises(ValueError, match=said):
        config_for(**train)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what these keys need")
@pytest.mark.parametrize("train", [{"attention": "flash"}, {"liger": True}, {"compile": True}], ids=str)
def test_what_needs_a_gpu_is_refused_without_one(train):
    (key,) = train
    with pytest.raises(ConfigError, match=f"train.{key}.*: needs an NVIDIA GPU with CUDA"):
        preflight(config_for(**train), need_inputs=False, need_data=True, need_hub=False)
    preflight(config_for(**train), need_inputs=False, need_data=False, need_hub=False)  # trained elsewhere


def test_options_are_checked_before_a_model_is_looked_for(tmp_path):
    place = write_place(tmp_path, tmp_path / "nowhere", train={"options": {"neftune_noise": 5}})
    done = place.tunepress("plan", str(place.config), check=2)
    assert "did you mean 'neftune_noise_alpha'?" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr


def examples() -> EncodedSet:
    draw = random.Random(0)
    ids = [[draw.randrange(250) for _ in range(40)] for _ in range(16)]
    return EncodedSet([Encoded(i, [-100, *i[1:]]) for i in ids], 0, 0, 0, 0)


def trainer_for(folder, output, **train):
    config, part = config_for(folder, **{**TINY, **train}), examples()
    check_options(config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return config, build(config, folder, tokenizer, {"training": part, "held-out": part}, Job(output))


def test_keys_and_options_reach_the_training_loop(tiny_model, tmp_path):
    _, trainer = trainer_for(
        tiny_model("llama"),
        tmp_path,
        method="lora",
        weight_decay=0.1,
        max_grad_norm=0.5,
        keep_checkpoints=5,
        options={"adam_beta2": 0.95, "neftune_noise_alpha": 5, "lr_scheduler_kwargs": {"num_cycles": 0.25}},
        lora={
            "rank": 4,
            "target_modules": ["q_proj", "down_proj"],
            "options": {"use_rslora": True, "layers_to_transform": [0]},
        },
    )
    args, lora = trainer.args, trainer.model.peft_config["default"]
    assert (args.weight_decay, args.max_grad_norm, args.save_total_limit) == (0.1, 0.5, 5)
    assert (args.adam_beta2, args.neftune_noise_alpha, args.lr_scheduler_kwargs) == (0.95, 5, {"num_cycles": 0.25})
    assert (lora.use_rslora, lora.layers_to_transform) == (True, [0])
    adapted = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert adapted and all(".layers.0." in name for name in adapted)


def test_gradient_checkpointing_changes_no_number(tiny_model, tmp_path):
    losses = []
    for asked in (False, True):
        _, trainer = trainer_for(tiny_model("llama"), tmp_path / str(asked), gradient_checkpointing=asked)
        trainer.train()
        assert trainer.model.get_base_model().is_gradient_checkpointing == asked
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("loss", [{"label_smoothing_factor": 0.3}, {"loss_type": "dft"}], ids=str)
def test_held_out_loss_does_not_depend_on_the_loss_of_training(tiny_model, tmp_path, loss):
    plain = trainer_for(tiny_model("llama"), tmp_path, method="lora")[1].evaluate()["eval_loss"]
    _, other = trainer_for(tiny_model("llama"), tmp_path, method="lora", options=loss)
    assert other.evaluate()["eval_loss"] == plain
    other.train()
    assert next(row["loss"] for row in other.state.log_history if "loss" in row) != pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({"init_lora_weights": "pissa"}, 8),
        ({"init_lora_weights": "olora"}, 8),
        ({"init_lora_weights": "pissa", "use_rslora": True}, 8),
        ({"use_dora": True}, 4),
        ({"use_rslora": True, "init_lora_weights": "gaussian"}, 4),
        ({"modules_to_save": ["norm"]}, 4),
        ({"bias": "none", "lora_bias": False, "rank_pattern": {"q_proj": 2}}, 4),
    ],
    ids=str,
)
def test_merged_model_is_the_trained_one(tiny_model, tmp_path, monkeypatch, options, rank):
    monkeypatch.setenv("TUNEPRESS_COMPUTE_DTYPE", "float32")  # so that only the merge rounds
    base = tiny_model("llama")
    adapter = {"rank": 4, "alpha": 8, "options": options}
    config, trainer = trainer_for(base, tmp_path, method="lora", max_steps=8, lora=adapter)
    lora = config.train.lora
    keep_beginning(trainer.model, lora, tmp_path)
    write = partial(save_adapter, trainer.model, lora=lora, checkpoints=tmp_path)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    check_mergeable(base, write, ("bf16",), linear_weights(base))
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name])  # the check leaves the model as it was
    assert any(p.requires_grad for p in trainer.model.parameters())
    trainer.train()
    write(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["r"] == rank
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged", "bf16")
    ids = torch.tensor([examples().examples[0].input_ids])
    with torch.no_grad():
        live = trainer.model.eval()(input_ids=ids).logits.float()
        merged, start = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits
            for folder in (tmp_path / "merged", base)
        )
    assert (live - merged).norm() < 0.1 * (live - start).norm()


def test_what_trl_refuses_later_is_one_line(tiny_model, tmp_path):
    with pytest.raises(UserError, match="train.options: refused: "):
        trainer_for(tiny_model("llama"), tmp_path, method="lora", options={"loss_type": "best"})


STOPPED = {"learning_rate": 0.5, "max_steps": 30, "early_stopping": 2, "evaluate_every": 1, "checkpoint_every": 1}


def test_early_stopping_keeps_the_adapter_with_the_lowest_held_out_loss(tiny_model, tmp_path, monkeypatch):
    place = write_place(tmp_path, tiny_model("llama"), train=STOPPED)
    monkeypatch.chdir(tmp_path)

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as broken:  # after the last checkpoint, before the adapter is in its place
        broken.setattr(merge, "make_portable", fail)
        with pytest.raises(StageFailed, match="the disk is full"):
            run_one(load_config(str(place.config)), "train", start=run_stage_here)
    workspace = run_one(load_config(str(place.config)), "train", start=run_stage_here)
    found = workspace.read_measurement("training")
    losses = {row["step"]: row["eval_loss"] for row in found["history"] if "eval_loss" in row}
    best = min(losses, key=losses.get)
    assert (found["best_step"], found["held_out_loss"]) == (best, losses[best])
    assert found["resumed_from_step"] == found["steps"] == best + 2 < 30


def test_best_checkpoint_is_found_again_after_a_move_and_never_done_without(tmp_path):
    best, last = tmp_path / "checkpoint-4", tmp_path / "checkpoint-6"
    for folder in (best, last):
        folder.mkdir()
        (folder / TRAINER_STATE).write_text(
            json.dumps({"global_step": 6, "best_model_checkpoint": "/elsewhere/checkpoint-4"})
        )
    find_best_checkpoint(last)
    assert json.loads((last / TRAINER_STATE).read_text()) == {"global_step": 6, "best_model_checkpoint": str(best)}
    shutil.rmtree(best)
    with pytest.raises(UserError, match=f"checkpoint-4: the best checkpoint .* Try: remove {tmp_path}"):
        find_best_checkpoint(last)


def test_batch_that_does_not_fit_is_halved_with_the_same_global_batch(tiny_model, tmp_path, monkeypatch):
    hungry_trainer.register()
    place = write_place(
        tmp_path, tiny_model("llama"), train={"trainer": "hungry", "batch_size": 6, "accumulate": 1, "packing": False}
    )
    monkeypatch.chdir(tmp_path)
    workspace = run_one(load_config(str(place.config)), "train", start=run_stage_here)
    assert workspace.read_measurement("training")["steps"] == 4
    assert hungry_trainer.TRIED == [(6, 1), (3, 2), (2, 3), (1, 6)]
    assert workspace.progress("train", "fitting_batch")["batch_size"] == 1


def test_smaller_batches_divide_the_present_one():
    assert [largest_part(12, below) for below in (12, 6, 4, 3, 2)] == [6, 4, 3, 2, 1]
    config = with_batch_size(config_for(batch_size=12, accumulate=3), 4)
    assert (config.train.batch_size, config.train.accumulate) == (4, 9)
