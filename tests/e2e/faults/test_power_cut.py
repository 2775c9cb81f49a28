"""Power cuts: names and records appear only after their files are synced to the disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.system.files import place_files, replace_folder, write_text
from pipeline.workflow.workspace import Workspace
from tests.e2e.faults.power_cut import hasty
from tests.e2e.faults.runs import SPY
from tests.support import sample


@pytest.mark.parametrize(
    "code, told",
    [
        ("write(new); os.replace(new, name); sync('.')", "came before"),
        ("write(new); sync(new); os.replace(new, name)", "never had on the disk"),
        ("write(new); sync(new); write(new, 'ab'); os.replace(new, name); sync('.')", "came before"),
        ("write(new); sync(new); os.replace(new, name); sync('.')", None),
    ],
)
def test_spy_detects_unsynced_names(tmp_path, code, told):
    helpers = (
        "import os, pathlib; new, name = 'new', 'name'\n"
        "def write(path, text='a'): pathlib.Path(path).write_text(text)\n"
        "def sync(path): os.fsync(os.open(path, os.O_RDONLY))\n"
    )
    env = os.environ | {"PYTHONPATH": str(SPY), "SPY_ON_DISK": str(tmp_path / "notes")}
    subprocess.run([sys.executable, "-c", helpers + code], cwd=tmp_path, env=env, check=True)
    found = list(hasty(tmp_path / "notes", tmp_path))
    assert told in found[0] if told else not found


def put_folder(place: Path) -> None:
    """A folder's next state, made and put in its place as a stage does it."""
    partial = place / "partial"
    if not partial.exists():  # whatever a kill left of it, a stage makes it anew
        partial.mkdir()
    write_text(partial / "new.txt", "new")
    replace_folder(partial, place / "folder")


def put_files(place: Path) -> None:
    partial = place / "partial"
    (partial / "inner").mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "new.txt", "inner/new.txt"):
        write_text(partial / name, "new")
    place_files(partial, place / "folder")


def put_file(place: Path) -> None:
    write_text(place / "folder/new.txt", "new")


@pytest.mark.parametrize("put", [put_folder, put_files, put_file])
def test_write_killed_before_any_system_call_is_old_or_new_and_can_be_completed(tmp_path, put):
    def tree(place: Path) -> dict[str, str]:
        return {p.relative_to(place).as_posix(): p.read_text() for p in place.rglob("*") if p.is_file()}

    def fresh(name: str) -> Path:
        place = tmp_path / name
        write_text(place / "folder/new.txt", "old")
        return place

    put(fresh("undisturbed"))
    calls = 0
    while True:
        place = fresh(f"killed-{calls}")
        killed = _killed_before_call(calls, lambda place=place: put(place))
        assert all(text in ("old", "new") for text in tree(place).values()), "a file is neither old nor new"
        put(place)
        assert tree(place) == tree(tmp_path / "undisturbed")
        if not killed:
            break
        calls += 1
    assert calls >= 4


def test_fresh_start_killed_before_any_system_call_can_be_repeated(tmp_path):
    folder, config, calls = tmp_path / "demo", sample.config(), 0

    def claim(fresh: bool = True) -> None:
        with Workspace.claim(folder, config, fresh):
            pass

    while True:
        claim(fresh=False)
        for name in ("data/held_out.jsonl", "ledger.json", "zeroes"):
            write_text(folder / name, "{}")
        killed = _killed_before_call(calls, claim)
        claim()
        assert os.listdir(folder) == ["config.yaml"]
        if not killed:
            break
        calls += 1
    assert calls >= 10


def _killed_before_call(number: int, work) -> bool:
    """Do a piece of work in a process that ends before the `number`-th thing that it asks the system for."""
    child = os.fork()
    if child == 0:
        left = [number]

        def watch(event: str, arguments: tuple) -> None:
            if event in WATCHED:
                if not left[0]:
                    os._exit(9)
                left[0] -= 1

        sys.addaudithook(watch)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}
