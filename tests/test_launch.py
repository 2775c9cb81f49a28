"""`launch.sh` prepares .venv once and hands over to the command; the installation itself is stood in for."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def launch(tmp_path):
    """`launch("run", "x.yaml")`: what launch.sh does in a clone whose .venv holds programs that say their names."""
    clone = tmp_path / "a clone"
    commands = clone / ".venv" / "bin"
    commands.mkdir(parents=True)
    for name in ("launch.sh", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, clone)
    for name in ("python", "tunepress"):
        (commands / name).write_text(f'#!/bin/sh\nprintf "%s|" {name} "$@"; echo "in $PWD"\n')
        (commands / name).chmod(0o755)

    def call(*arguments: str) -> list[str]:
        done = subprocess.run(
            [clone / "launch.sh", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    call.folder = tmp_path
    return call


def test_without_arguments_it_starts_the_wizard_where_the_person_stands(launch):
    assert launch()[-1] == f"tunepress|wizard|in {launch.folder}"


def test_options_are_answers_to_the_wizard(launch):
    assert launch("--yes", "--data", "my rows.jsonl")[-1].startswith("tunepress|wizard|--yes|--data|my rows.jsonl|in")


def test_a_verb_and_its_arguments_are_passed_on_as_they_are(launch):
    assert launch("run", "my run.yaml", "--set", "a=b c")[-1].startswith("tunepress|run|my run.yaml|--set|a=b c|in")


def test_the_demo_and_the_tests_run_in_the_clone(launch):
    assert launch("--demo", "--fresh")[-1] == f"tunepress|run|configs/demo.yaml|--fresh|in {launch.folder / 'a clone'}"
    assert launch("--test", "-x")[-1] == f"python|-m|pytest|-x|in {launch.folder / 'a clone'}"


def test_it_installs_once(launch):
    assert any("|pip|install|" in line for line in launch())
    assert len(launch()) == 1


def test_help_tells_of_the_wizard_and_installs_nothing(launch):
    text = "\n".join(launch("--help"))
    assert "the wizard" in text and "--demo" in text and "VERB" in text and "pip" not in text
