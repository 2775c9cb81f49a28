"""Any text as a configuration: a valid run, or one line with the reason; no side effects."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.loader import dump_config, load_config, parse_config
from pipeline.config.schema import Config
from pipeline.errors import ConfigError
from pipeline.workflow.workspace import Workspace
from tests.support.audit_watch import SECRETS, TOKEN, watching
from tests.support.strategies import ANY, NAMES, NUMBERS, QUIET


def section(**keys):
    return st.fixed_dictionaries({}, optional=keys) | ANY


TREES = st.fixed_dictionaries(
    {"name": NAMES, "model": section(source=NAMES, revision=NAMES, trust_remote_code=st.booleans() | NUMBERS)},
    optional={
        "data": section(source=NAMES, split=NAMES, columns=ANY, held_out=NUMBERS, limit=NUMBERS, seed=NUMBERS),
        "train": section(
            epochs=NUMBERS, max_steps=NUMBERS, batch_size=NUMBERS, lora=section(rank=NUMBERS, target_modules=ANY)
        ),
        "merge": section(adapter=NAMES, base=NAMES),
        "evaluate": section(general=NAMES, max_tokens=NUMBERS, prompts=ANY),
        "quantize": section(variants=ANY | st.lists(st.sampled_from(["int8", "int4", "both", "int3"]), max_size=3)),
        "publish": section(repo=NAMES, mirrors=ANY, private=NUMBERS),
        "track": section(project=NAMES, space=NAMES, server=NAMES),
        TOKEN: ANY,
    },
)
SMALLEST = {"name": "tiny", "model": {"source": "user/model"}, "data": {"source": "rows.jsonl"}}
# Pieces that YAML has and JSON does not.
PIECES = st.sampled_from(
    [
        "!!python/object/apply:os.system ['touch owned']",
        "!!python/name:os.system",
        "!!python/module:os",
        "&a [*a]",
        "*nobody",
        "<<: *a",
        "{? [a, b] : c}",
        "? a\n: b",
        "!!int 'x'",
        "!!timestamp 2020-02-30",
        "2020-02-30",
        "!!binary 'x'",
        "0x" + "f" * 5000,
        "1" * 5000,
        "- - - - -",
        "[" * 3000,
        "%YAML 9.9",
        "---\na: b\n---\n",
        "name: a\nname: b",
        "\t- x",
        "\ufeff",
        "\x00",
        "!<tag:x> y",
        "'unfinished",
        "| \n x",
        "~",
        "!!set {a, b}",
        "!!omap [a: b]",
        "!!pairs [a: b]",
        "key: value",
        "name: tiny",
        "model: {source: user/model}",
        "data: {source: x.jsonl}",
        f"track: {{server: {TOKEN}}}",
    ]
)


def judged(call) -> Config | None:
    """A configuration, or None after a line; anything else that is raised fails the test."""
    try:
        return call()
    except ConfigError as error:
        told = str(error)
        assert told.isprintable() and not any(secret in told for secret in SECRETS), told
        return None


def assert_safe(config: Config, place) -> None:
    """What was taken stays below the folder of runs, has no token in it, and says the same when it is read again."""
    text = dump_config(config)
    assert not any(secret in text for secret in SECRETS)
    assert not any(ord(c) < 32 and c not in "\n\t" for c in text)
    workspace = Workspace(place / "runs" / config.name)
    assert (place / "runs").resolve() in workspace.folder.resolve().parents
    assert parse_config(yaml.safe_load(text), "again") == config
    json.loads(config.model_dump_json())


@QUIET
@given(tree=TREES)
def test_any_values_are_accepted_or_refused_in_one_line(place, tree):
    with watching(place) as watch:
        config = judged(lambda: parse_config(tree, "x.yaml"))
    assert watch.seen == []
    if config:
        assert_safe(config, place)


@QUIET
@given(pieces=st.lists(PIECES | st.text(max_size=20), max_size=6), between=st.sampled_from(["\n", " ", ": ", "\n  "]))
def test_any_text_is_accepted_or_refused_in_one_line(place, pieces, between):
    path = place / "x.yaml"
    path.write_bytes(between.join(pieces).encode("utf-8", "surrogatepass"))
    with watching(place) as watch:
        config = judged(lambda: load_config(path))
    assert watch.seen == [] and not (place / "owned").exists()
    if config:
        assert_safe(config, place)


@settings(QUIET, max_examples=60)
@given(
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
    prompts=st.lists(st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=30), max_size=3),
    steps=st.integers(1, 2**31 - 1),
    variants=st.lists(st.sampled_from(["int8", "int4", "int8-dynamic"]), unique=True, max_size=3),
)
def test_good_values_are_taken(place, name, prompts, steps, variants):
    tree = SMALLEST | {"name": name, "train": {"max_steps": steps}, "quantize": {"variants": variants}}
    plain = [
        p
        for p in prompts
        if not any(c in p for c in "\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    ]
    config = parse_config(tree | {"evaluate": {"prompts": plain}}, "x.yaml")
    assert config.name == name and config.evaluate.prompts == plain
    assert_safe(config, place)


WHERE = [
    "name",
    "model.source",
    "model.revision",
    "data.source",
    "data.split",
    "evaluate.prompts",
    "merge.adapter",
    "publish.repo",
    "track.server",
    "track.project",
    "train.lora.target_modules",
    "data.columns",
    "nonsense",
]


@pytest.mark.parametrize("key", WHERE)
@pytest.mark.parametrize("form", ["{}", "see {}", "https://ada:{}@hub.org/x", "https://hub.org/x?token={}"])
@pytest.mark.parametrize("secret", SECRETS)
def test_token_in_any_key_is_refused_and_not_repeated(place, key, form, secret):
    value = form.format(secret)
    if key in ("evaluate.prompts", "train.lora.target_modules"):
        value = [value]
    if key == "data.columns":
        value = {"question": value}
    with pytest.raises(ConfigError) as error:
        parse_config(json.loads(json.dumps(SMALLEST)), "x.yaml", [f"{key}={json.dumps(value)}"])
    assert key.split(".")[-1] in str(error.value) or "data" in str(error.value)
    assert not any(s in str(error.value) for s in SECRETS)


@pytest.mark.parametrize("key", ["model.source", "data.source", "publish.repo", "track.server", "data.split"])
@pytest.mark.parametrize(
    "address",
    [
        "https://ada:0f3c-none-of-the-Hubs@data.org/rows.jsonl",
        "https://0f3c-none-of-the-Hubs@data.org/rows.jsonl",
        "https://trackio.org/?write_token=0f3c-none-of-the-Hubs",
        "https://trackio.org/?project=x&api_key=0f3c-none-of-the-Hubs",
    ],
)
def test_unknown_secrets_in_secret_positions_are_refused(place, key, address):
    with pytest.raises(ConfigError) as error:
        parse_config(json.loads(json.dumps(SMALLEST)), "x.yaml", [f"{key}={address}"])
    assert "0f3c" not in str(error.value)


def test_folder_name_that_resembles_a_token_is_accepted(place):
    tree = SMALLEST | {"model": {"source": "./hf_checkpoints/hf_internal_testing"}}
    assert parse_config(tree, "x.yaml").model.source.endswith("testing")


def test_code_is_asked_for_by_name_and_refused(place):
    with pytest.raises(ConfigError, match="model.trust_remote_code: true is refused: a model's own code is never run"):
        parse_config(SMALLEST | {"model": {"source": "user/model", "trust_remote_code": True}}, "x.yaml")
