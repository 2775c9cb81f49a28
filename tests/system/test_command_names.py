"""Suggested commands: those that the user has, the command or launch.sh."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.schema import Config
from pipeline.errors import LAUNCHED_BY, HubError, MissingExtra
from pipeline.hub.auth import check_token
from pipeline.planning import make_plan
from pipeline.system.command_names import command

TREE = {"name": "tiny", "data": None, "quantize": {"variants": []}}


@pytest.fixture
def launched(monkeypatch):
    """As launch.sh says it, for a shell."""
    monkeypatch.setenv(LAUNCHED_BY, "/home/ada/a\\ clone/launch.sh")


def test_command_words_are_shell_quoted(launched):
    line = command("chat", Path("my runs/demo"))
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True).stdout
    assert words.splitlines() == ["/home/ada/a clone/launch.sh", "chat", "my runs/demo"]


def test_plain_command_is_named_without_launch_sh(monkeypatch):
    monkeypatch.delenv(LAUNCHED_BY, raising=False)
    assert command("doctor") == "tunepress doctor"


def test_install_hint_is_of_the_running_python():
    assert str(MissingExtra("q", "gguf")).endswith(f"run: {sys.executable} -m pip install 'tunepress[gguf]'")


def test_a_login_is_told_by_a_program_that_is_there(launched, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent")
    with pytest.raises(HubError, match=f"{Path(sys.executable).parent}/hf auth login"):
        check_token("ada/mine", "ada")


def test_bad_token_of_the_variable_is_not_answered_by_a_login(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_nobodyKnowsThisToken0123456789")
    with pytest.raises(HubError, match="does not know this token. Try: set HF_TOKEN to another token; it is used inst"):
        check_token("ada/mine", "ada")


def test_a_plan_says_how_to_measure(launched, tiny_model, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plan = make_plan(Config.model_validate({**TREE, "model": {"source": str(tiny_model("llama"))}}), runs=tmp_path)
    assert plan.why_no_times.endswith("launch.sh doctor --calibrate")
