"""A folder with secrets in the environment, and a watch on what this process does with hostile input."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import UserError
from tests.support.audit_watch import BAIT, HUB_TOKEN, PASSWORD, SECRETS, WRITE_TOKEN, audit, watching


@pytest.fixture(scope="session", autouse=True)
def _eyes():
    sys.addaudithook(audit)  # there is no way to take one off; it sees nothing where nobody watches


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder to work in, beside a file with a password, and with tokens in the environment."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    (tmp_path / BAIT).write_text(f"[UNK]\n{PASSWORD}\n")
    monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
    monkeypatch.setenv("TRACKIO_WRITE_TOKEN", WRITE_TOKEN)
    return folder


@pytest.fixture
def survives(place, capfd) -> Callable:
    """`survives(call)`: what comes back, or the line of the refusal; and that nothing else came of it."""

    def check(call: Callable[[], object]) -> str | None:
        with watching(place) as watch:
            try:
                call()
                told = None
            except UserError as error:
                told = str(error)
        assert watch.seen == []
        if told is not None:
            assert told.isprintable() and told.strip(), told
            assert len(told) < 4000, told
        out, err = capfd.readouterr()
        assert not any(secret in text for secret in (*SECRETS, PASSWORD) for text in (told or "", out, err))
        return told

    return check
