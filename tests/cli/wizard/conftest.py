"""A folder with data and a model, and a Hub that knows several tokens."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from rich.console import Console

from pipeline.cli.wizard import wizard
from pipeline.config.loader import load_config
from pipeline.config.schema import Config
from tests.support import REPOSITORY
from tests.support.hub import LoopbackHub
from tests.support.wizard import TOKENS, Desk, write_rows


@pytest.fixture
def hub(tmp_path):
    with LoopbackHub(tmp_path / "hub", TOKENS) as hub:
        yield hub


@pytest.fixture
def desk(tmp_path, tiny_model, hub) -> Desk:
    """A tiny model under `model`, and rows with and without columns that are known."""
    folder = tmp_path / "desk"
    shutil.copytree(tiny_model("llama"), folder / "model")
    rows = [{"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}."} for n in range(40)]
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "other.jsonl", [{"ask": row["question"], "reply": row["answer"]} for row in rows])
    write_rows(folder / "one.jsonl", rows[:1])
    (folder / "broken.jsonl").write_text("{\n" + (folder / "rows.jsonl").read_text())
    return Desk(folder, hub)


@pytest.fixture
def launch(tmp_path) -> Path:
    """The launch.sh of a clone whose .venv is there, with this very package in it; what it installs is stood in for."""
    clone = tmp_path / "a clone"
    programs = clone / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("launch.sh", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, clone)
    for name, line in (("python", "exit 0"), ("tunepress", f'exec {sys.executable} -P -m pipeline "$@"')):
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    return clone / "launch.sh"


@pytest.fixture
def ask(desk, hub, monkeypatch):
    """`ask(model="./model", ...)`: the wizard in this process, with answers given ahead and defaults for the rest."""
    monkeypatch.chdir(desk.folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(desk.folder / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("TRACKIO_WRITE_TOKEN", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(desk.folder / "no-token"))
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    def ask(**answers: str) -> Config:
        given = {key.replace("_", "-"): answer for key, answer in answers.items()}
        written = wizard(Console(), {"run": "no", **given}, yes=True)
        return load_config(written.path)

    return ask
