"""Configuration files: defaults, overrides, and the type of a run."""

import pytest
import yaml

from pipeline.config.catalog import VARIANTS
from pipeline.config.loader import dump_config, load_config, parse_config, shipped_configs
from pipeline.config.schema import Config, MeasuredRun, TrainingRun
from tests.support.configs import SMALLEST

DEFAULTS = {
    "model.revision": None,
    "model.trust_remote_code": False,
    "data.form": "auto",
    "data.split": "train",
    "data.held_out": 0.05,
    "data.limit": None,
    "data.seed": 0,
    "train.method": "qlora",
    "train.lora.rank": 16,
    "train.lora.alpha": 32,
    "train.lora.dropout": 0.05,
    "train.lora.target_modules": "all-linear",
    "train.epochs": 1,
    "train.max_steps": None,
    "train.batch_size": 4,
    "train.accumulate": 4,
    "train.learning_rate": 2.0e-4,
    "train.schedule": "cosine",
    "train.warmup": 0.03,
    "train.max_length": 1024,
    "train.packing": True,
    "train.loss_on": "auto",
    "train.optimizer": "auto",
    "train.checkpoint_every": 100,
    "train.evaluate_every": 100,
    "train.seed": 0,
    "merge.base": "auto",
    "evaluate.general": "builtin:python-topics",
    "evaluate.max_tokens": 16384,
    "evaluate.prompts": [],
    "publish.repo": None,
    "publish.private": True,
    "publish.commits": "per_stage",
    "track.project": "tunepress",
}


def value_at(config: Config, key: str):
    for part in key.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("key", DEFAULTS)
def test_missing_keys_have_defaults(load, key):
    assert value_at(load(SMALLEST), key) == DEFAULTS[key]


def test_the_default_variants_are_int8_and_int4_with_the_defaults_of_the_catalog(load):
    specs = load(SMALLEST).quantize.variants
    assert [(s.name, s.group_size, s.rounding) for s in specs] == [
        ("int8", None, "rtn"),
        ("int4", 64, "gptq"),
    ]
    fast = load(SMALLEST + "quantize: {quality: fast}\n").quantize.variants
    assert [s.rounding for s in fast] == [VARIANTS[s.name].roundings[0] for s in fast]


def test_a_file_with_every_default_written_out_is_the_same_configuration(load):
    config = load(SMALLEST + "quantize: {variants: [{name: int4, group_size: 32, keep: ['*.down_proj']}]}\n")
    assert load(dump_config(config)) == config


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_recipes_are_found_by_name_with_and_without_the_suffix(name):
    assert load_config(name) == load_config(f"{name}.yaml") == load_config(shipped_configs()[name])


@pytest.mark.parametrize(
    "written, names",
    [
        ("int8", ["int8"]),
        ("both", ["int8", "int4"]),
        ("[INT4_weight_only]", ["int4"]),
        ("{name: int4, group_size: 128}", ["int4"]),
        ("[]", []),
    ],
)
def test_variants_are_a_name_an_alias_a_mapping_or_a_list(load, written, names):
    config = load(SMALLEST + f"quantize: {{variants: {written}}}\n")
    assert [spec.name for spec in config.quantize.variants] == names


@pytest.mark.parametrize(
    "setting, key, value",
    [
        ("train.epochs=3", "train.epochs", 3),
        ("train.learning_rate=1e-4", "train.learning_rate", 1e-4),
        ("train.lora.target_modules=[q_proj, v_proj]", "train.lora.target_modules", ["q_proj", "v_proj"]),
        ("publish.repo=user/name", "publish.repo", "user/name"),
        ("model.revision=", "model.revision", None),
        ("evaluate.prompts=['a=b?']", "evaluate.prompts", ["a=b?"]),
        (" name =other", "name", "other"),
    ],
)
def test_a_setting_overrides_the_file(load, setting, key, value):
    assert value_at(load(SMALLEST + "train: {epochs: 9}\n", setting), key) == value


def test_the_last_of_two_settings_wins_and_others_stay(load):
    config = load(SMALLEST + "train: {batch_size: 2}\n", "train.epochs=2", "train.epochs=3")
    assert (config.train.epochs, config.train.batch_size) == (3, 2)


def test_anchors_and_merge_keys_work(load):
    config = load(SMALLEST + "train: {lora: &small {rank: 4}}\n")
    assert config.train.lora.rank == 4
    text = SMALLEST + "quantize:\n  variants:\n    - &v {name: int4, group_size: 32}\n"
    assert load(text).quantize.variants[0].group_size == 32
    assert load(SMALLEST + "train:\n  <<: {epochs: 2, seed: 1}\n  seed: 5\n").train.model_dump()["seed"] == 5


def test_a_configuration_does_not_change(load):
    with pytest.raises(Exception, match="frozen"):
        load(SMALLEST).train.epochs = 5


def test_dumped_configurations_are_plain_yaml(load):
    tree = yaml.safe_load(dump_config(load(SMALLEST)))
    assert tree["train"]["lora"] == {"rank": 16, "alpha": 32.0, "dropout": 0.05, "target_modules": "all-linear"}


@pytest.mark.parametrize(
    ("sections", "kind"),
    [
        ({"data": {"source": "rows.jsonl"}}, TrainingRun),
        ({"data": None}, MeasuredRun),
        ({"data": None, "evaluate": None}, Config),
    ],
)
def test_a_configuration_has_the_type_of_its_run_and_the_same_yaml(sections, kind):
    tree = {"name": "x", "model": {"source": "a/b"}, **sections}
    config = parse_config(tree, "x.yaml")
    assert type(config) is kind
    assert list(config.model_dump()) == list(Config.model_fields)
    assert parse_config(yaml.safe_load(dump_config(config)), "x.yaml") == config


def test_a_byte_order_mark_does_no_harm(load):
    assert load(b"\xef\xbb\xbf" + SMALLEST.encode()).name == "demo"
