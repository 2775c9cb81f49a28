"""Generated configurations, valid and invalid, through the commands that read one."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cli import main
from pipeline.config.loader import load_config
from pipeline.errors import UserError
from pipeline.workflow.preflight import preflight
from pipeline.workflow.workspace import Workspace
from tests.support.audit_watch import SECRETS, TOKEN, watching
from tests.support.strategies import ANY, NAMES, NUMBERS, QUIET

RUN_NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,30}", fullmatch=True)
WORDS = st.text(st.characters(exclude_categories=("Cc", "Cf", "Cs", "Zl", "Zp")), max_size=30)
SHARES = st.floats(0.001, 0.5)
VARIANTS = st.lists(
    st.sampled_from(["int8", "int4", "int8-dynamic", "nf4", "fp8"])
    | st.fixed_dictionaries(
        {"name": st.just("int4")},
        optional={
            "group_size": st.sampled_from([32, 64]),
            "rounding": st.sampled_from(["rtn", "hqq", "search"]),
            "embeddings": st.sampled_from(["keep", "int8"]),
            "keep": st.lists(st.sampled_from(["*.down_proj", "model.layers.0.*", "[", "**"]), max_size=2),
            "gate": st.fixed_dictionaries({}, optional={"rise": SHARES, "kl": SHARES}),
        },
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda variant: variant["name"] if isinstance(variant, dict) else variant,
)
MODELS = ["model", "./model", "../work/model", "./model/../model"]
GOOD = st.fixed_dictionaries(
    {"name": RUN_NAMES, "model": st.fixed_dictionaries({"source": st.sampled_from(MODELS)})},
    optional={
        "train": st.fixed_dictionaries(
            {},
            optional={
                "method": st.sampled_from(["qlora", "lora"]),
                "epochs": st.floats(0.01, 1000),
                "max_steps": st.integers(1, 2**31 - 1),
                "batch_size": st.integers(1, 2**31 - 1),
                "max_length": st.integers(1, 2**20),
                "learning_rate": st.floats(1e-12, 1),
                "schedule": st.sampled_from(["cosine", "constant"]),
                "seed": st.integers(0, 2**32 - 1),
                "lora": st.fixed_dictionaries(
                    {},
                    optional={
                        "rank": st.integers(1, 2**31 - 1),
                        "target_modules": st.sampled_from(["all-linear", ["q_proj"], ["nowhere"], ".*"]),
                    },
                ),
            },
        ),
        "evaluate": st.fixed_dictionaries(
            {"general": st.sampled_from(["general.txt", "./general.txt", "builtin:python-topics"])},
            optional={"max_tokens": st.integers(256, 2**31 - 1), "prompts": st.lists(WORDS, max_size=3)},
        ),
        "quantize": st.fixed_dictionaries({"variants": VARIANTS}),
        "publish": st.fixed_dictionaries({"private": st.booleans(), "create_pr": st.booleans()}),
        "track": st.fixed_dictionaries({"project": RUN_NAMES}),
    },
).flatmap(lambda tree: st.sampled_from([None, {"source": "rows.jsonl"}, {"source": "./rows.jsonl", "limit": 7}]).map(
    lambda data: tree | {"data": data})
)  # fmt: skip
HOSTILE = st.sampled_from([TOKEN, "../../up", "/etc/passwd", "a\x1b[2Jb", "\ud800", "$(touch owned)"]) | NAMES
WHERE = st.sampled_from(
    ["name", "model.source", "model.revision", "data.source", "data.split", "data.subset", "data.columns", "train.seed",
     "train.epochs", "train.lora.rank", "train.lora.target_modules", "merge.adapter", "evaluate.general",
     "evaluate.prompts", "quantize.variants", "quantize.gate.rise", "publish.repo", "publish.mirrors", "track.project",
     "track.server", "track.space", "nonsense"]
)  # fmt: skip


@st.composite
def spoilt(draw) -> dict:
    """A good one with something else in one place."""
    tree, keys = draw(GOOD), draw(WHERE).split(".")
    value, here = draw(HOSTILE | NUMBERS | ANY), tree
    for key in keys[:-1]:
        if not isinstance(here.get(key), dict):
            here[key] = {}
        here = here[key]
    here[keys[-1]] = value
    return tree


@pytest.fixture
def desk(place, tiny_model):
    """A folder with what configurations name: a model, rows and a text."""
    shutil.copytree(tiny_model("llama"), place / "model")
    rows = [{"prompt": f"What is {n}?", "completion": f"{n}."} for n in range(20)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "general.txt").write_text("Words that say nothing. " * 50)
    return place


@pytest.mark.parametrize("trees, least", [(GOOD, {"taken": 150}), (spoilt(), {"taken": 8, "refused": 100})])
def test_any_configuration_is_accepted_or_refused_in_one_line(desk, capfd, monkeypatch, trees, least):
    ends: Counter[str] = Counter()

    @settings(QUIET, max_examples=225)
    @given(tree=trees)
    def check(tree):
        (desk / "x.yaml").write_text(yaml.safe_dump(tree))
        with watching(desk) as watch:
            code, out, err = command(monkeypatch, capfd, "plan", "x.yaml", "--json")
            assert code in (0, 2, 3), err
            if code == 2:
                assert not out and one_line(err), err
            else:
                assert json.loads(out) and not err, err
                kept(desk)
        assert watch.seen == []
        assert {path.name for path in desk.iterdir()} <= {"model", "rows.jsonl", "general.txt", "x.yaml", "runs"}
        assert not any(secret in text for secret in SECRETS for text in (out, err))
        ends["refused" if code == 2 else "taken"] += 1
        shutil.rmtree(desk / "runs", ignore_errors=True)

    check()
    print(f"{sum(ends.values())} configurations: {dict(ends)}")
    assert all(ends[end] >= number for end, number in least.items()), ends


def kept(desk) -> None:
    """What a run does before its first stage: everything is checked, and the configuration put into its folder."""
    try:
        config = load_config("x.yaml")
        preflight(config, need_hub=False)
    except UserError as error:
        assert one_line(f"{error}\n")
        return
    with Workspace.claim(desk / "runs" / config.name, config) as workspace:
        assert workspace.folder.parent == desk / "runs" and workspace.config() == config
    written = [path.read_text() for path in (desk / "runs").rglob("*") if path.is_file()]
    assert written and not any(secret in text for secret in SECRETS for text in written)


def command(monkeypatch, capfd, *words: str) -> tuple[int, str, str]:
    """The exit code of a command of ours, and what it printed."""
    monkeypatch.setattr(sys, "argv", ["tunepress", *words])
    capfd.readouterr()
    try:
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    return code, *capfd.readouterr()


def one_line(text: str) -> bool:
    return text.count("\n") == 1 and text[:-1].isprintable() and "Traceback" not in text
