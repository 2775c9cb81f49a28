"""Every verb that opens a model refuses one that leads to a private file or needs code, before anything is done."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import constants

from pipeline.cli import VERBS, main
from pipeline.cli.exit_codes import plain_errors
from pipeline.config.schema import Model
from pipeline.models.checkpoint_files import ADAPTER_FILES
from pipeline.verification import Verdict
from tests.support import REPOSITORY
from tests.support.audit_watch import BAIT, PASSWORD, SECRETS, watching
from tests.support.hostile_models import LEADS, lead_to
from tests.support.releases import Release, make_release

# What each verb is given; a person who has the model in a folder writes the same.
COMMANDS = {
    "run": ["run", "trained.yaml"],
    "run --dry-run": ["run", "trained.yaml", "--dry-run"],
    "train": ["train", "trained.yaml"],
    "merge": ["merge", "trained.yaml"],
    "merge of an adapter": ["merge", "model", "adapter", "--output", "out"],
    "evaluate": ["evaluate", "trained.yaml"],
    "quantize": ["quantize", "trained.yaml"],
    "quantize of a model": ["quantize", "model", "--output", "out"],
    "publish": ["publish", "quantized.yaml", "--repo", "ada/tiny"],
    "plan": ["plan", "trained.yaml"],
    "sensitivity": ["sensitivity", "model", "--set", "evaluate.general=general.txt"],
    "chat": ["chat", "./model"],
    "wizard": ["wizard", "--model", "./model", "--yes", "--no-calibrate", "--repo", "none", "--no-run"],
}
OPEN_NO_MODEL = {"status", "sync", "rollback", "clean", "schema", "doctor"}
IN_OTHER_TESTS = {"verify"}
NOT_ON_THE_HUB = {"a linked vocabulary", "a linked chat template", "an adapter beside"}  # neither is downloaded


def test_every_verb_is_here():
    names = {verb.__name__ for verb in VERBS}
    assert names == {words[0] for words in COMMANDS.values()} | OPEN_NO_MODEL | IN_OTHER_TESTS


@pytest.fixture
def model(place, tiny_model) -> Path:
    """A model, beside what the configurations name."""
    folder = shutil.copytree(tiny_model("llama"), place / "model")
    (place / "adapter").mkdir()
    for name in ADAPTER_FILES:
        (place / "adapter" / name).touch()
    rows = [{"prompt": f"What is {n}?", "completion": f"{n}."} for n in range(20)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "general.txt").write_text("Words that say nothing. " * 50)
    tree = {"name": "tiny", "model": {"source": "model"}, "evaluate": {"general": "general.txt"}}
    (place / "quantized.yaml").write_text(yaml.safe_dump(tree | {"data": None}))
    (place / "trained.yaml").write_text(yaml.safe_dump(tree | {"data": {"source": "rows.jsonl"}}))
    return folder


@pytest.fixture
def refuses(place, capfd, monkeypatch) -> Callable[[Callable[[], object], str], None]:
    """`refuses(command, reason)`: it ends with one line and exit code 2, and has done nothing."""

    def check(command: Callable[[], object], reason: str) -> None:
        before = {path.relative_to(place) for path in place.rglob("*")}
        with watching(place) as watch, pytest.raises(SystemExit) as ended:
            command()
        out, err = capfd.readouterr()
        assert watch.seen == []
        assert ended.value.code == 2 and reason in out + err and "Traceback" not in err, err
        assert not any(secret in out + err for secret in (*SECRETS, PASSWORD))
        new = {path.relative_to(place) for path in place.rglob("*")} - before
        assert not [path for path in new if path.suffix not in (".lock", "")], new

    return check


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("verb", COMMANDS)
def test_verb_refuses_a_hostile_model(refuses, model, monkeypatch, verb, lead):
    lead_to(model, lead)
    monkeypatch.setattr(sys, "argv", ["tunepress", *COMMANDS[verb]])
    refuses(main, LEADS[lead].reason)


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("script", ["quantize_standalone", "retrain"])
def test_script_refuses_a_hostile_model(refuses, model, place, monkeypatch, script, lead):
    lead_to(model, lead)
    words = {
        "quantize_standalone": ["model", "ada/tiny", "--save-only", "--output", "out", "--calibration", "general.txt"],
        "retrain": ["trained.yaml", "--set", "publish.repo=ada/tiny"],
    }
    monkeypatch.setattr(sys, "argv", [script, *words[script]])
    monkeypatch.setattr(constants, "HF_HOME", str(place / "cache"))  # of the lock
    refuses(lambda: run_script(script), LEADS[lead].reason)


def run_script(name: str) -> None:
    """Run a script in this process, as a shell does in another."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if hasattr(module, "main"):
        return module.main()
    with plain_errors(name):
        return module.app()


@pytest.mark.parametrize("lead", LEADS)
def test_verify_does_not_load_a_hostile_model(survives, model, lead):
    from pipeline.verification.measure_again import refused

    claims, found = SimpleNamespace(prefix=lambda name: ""), []
    assert refused(claims, SimpleNamespace(folder=model), "merged") is None
    lead_to(model, lead)
    survives(lambda: found.append(refused(claims, SimpleNamespace(folder=model), "merged")))
    assert found[0].startswith("not loaded: ") and LEADS[lead].reason in found[0]


@pytest.mark.slow
def test_verify_reports_a_hostile_model(tmp_path_factory, place, tiny_model, capfd, monkeypatch):
    """Its author has written the lineage and the cards anew, so that only its settings tell."""
    release = Release(make_release(tmp_path_factory.mktemp("verify"), tiny_model("llama"), ["int8"]).release)
    for folder in (".", "int8"):
        lead_to(release.folder / folder, "merges", str(place.parent / BAIT))
        release.own(f"{folder}/tokenizer_config.json".removeprefix("./"))
    release.rewrite_cards()
    monkeypatch.setattr(sys, "argv", ["tunepress", "verify", str(release.folder), "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    told = json.loads(capfd.readouterr().out)
    wrong = [finding for finding in told["findings"] if finding["verdict"] == Verdict.wrong]
    assert ended.value.code == 3 and {finding["subject"] for finding in wrong} >= {"merged", "int8"}
    assert all("merges (" in finding["message"] for finding in wrong if finding["subject"] in ("merged", "int8")), wrong


@pytest.mark.parametrize("lead", sorted(LEADS.keys() - NOT_ON_THE_HUB))
def test_hostile_model_on_the_hub_is_refused_after_the_download(place, hub, model, capfd, monkeypatch, lead):
    from pipeline.errors import ModelError
    from pipeline.models.sources import fetch

    lead_to(model, lead)
    hub.put("ada/model", {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "cache"))
    with pytest.raises(ModelError, match=re.escape(LEADS[lead].reason)):
        fetch(Model(source="ada/model"), place / "base")
    monkeypatch.setattr(sys, "argv", ["tunepress", "chat", "ada/model"])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capfd.readouterr()
    assert ended.value.code == 2 and LEADS[lead].reason in err and PASSWORD not in out + err
