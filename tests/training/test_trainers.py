"""Registries of trainers and trackers leave configurations that do not name one as they were."""

from __future__ import annotations

import pytest

from pipeline.config.loader import dump_config
from pipeline.config.schema import Config, TrainingRun
from pipeline.config.training_catalog import METHODS, NF4_BASE, TRAINERS, UNCHANGED_BASE, Trainer
from pipeline.errors import ConfigError, DataError
from pipeline.retraining.input_changes import settings
from pipeline.training.trainers import check_form, merge_bases, trainer_module
from pipeline.workflow.preflight import check_inputs
from pipeline.workflow.stages import train
from pipeline.workflow.workspace import Workspace


def config_for(**sections) -> TrainingRun:
    tree = {"name": "named", "model": {"source": "ada/base"}, "data": {"source": "builtin:python-docs"}}
    return Config.model_validate({**tree, **sections})


def test_pairs_are_refused_by_a_trainer_of_single_answers(monkeypatch):
    monkeypatch.setitem(TRAINERS, "pairs", Trainer("pairs", "m", ("preference",), "eval_loss"))
    with pytest.raises(DataError, match="train.trainer sft takes only .* Try: .*train.trainer=pairs or data.columns="):
        check_form(config_for(), "preference")
    check_form(config_for(train={"trainer": "pairs"}), "preference")


@pytest.fixture
def other_trainer():
    TRAINERS["other"] = Trainer("other", "pipeline.training.trainers.sft", ("text",), "eval_loss", (UNCHANGED_BASE,))
    yield "other"
    del TRAINERS["other"]


def test_default_names_are_left_out_of_files_settings_and_fingerprints(tmp_path):
    plain, named = config_for(), config_for(train={"trainer": "sft"}, track={"tracker": "trackio"})
    assert dump_config(plain) == dump_config(named)
    assert "trainer" not in dump_config(plain) and "tracker" not in dump_config(plain)
    assert "train.trainer" not in settings(plain)
    assert "trainer" not in train.depends(plain, Workspace(tmp_path), ())["train"]


def test_another_trainer_is_kept_and_makes_another_training(tmp_path, other_trainer):
    plain, other = config_for(), config_for(train={"trainer": other_trainer})
    assert "trainer: other" in dump_config(other)
    assert settings(other)["train.trainer"] == other_trainer
    parts = [train.depends(config, Workspace(tmp_path), ())["train"] for config in (plain, other)]
    assert parts[1] == {"trainer": other_trainer, **parts[0]}
    assert trainer_module(other).build is trainer_module(plain).build


def test_merge_bases_are_those_of_method_and_trainer(other_trainer):
    for name, method in METHODS.items():
        assert merge_bases(config_for(train={"method": name})) == method.merge_bases
        assert merge_bases(config_for(train={"method": name, "trainer": other_trainer})) == (UNCHANGED_BASE,)
    assert merge_bases(config_for(merge={"base": NF4_BASE})) == (NF4_BASE,)
    assert merge_bases(config_for(data=None, merge={"adapter": "ada/adapter"})) == (UNCHANGED_BASE,)


def test_base_that_training_never_saw_is_refused():
    config = config_for(train={"method": "lora"}, merge={"base": NF4_BASE})
    with pytest.raises(ConfigError, match="merge.base nf4: train.method lora does not train on this base"):
        check_inputs(config, need_model=False, need_data=False)
