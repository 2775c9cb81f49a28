"""A small measured release to verify, and copies of it to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.releases import Release, make_release


@pytest.fixture(scope="session")
def made(tmp_path_factory, tiny_model) -> Release:
    """The release; not to be changed."""
    folder = tmp_path_factory.mktemp("verify")
    return Release(make_release(folder, tiny_model("llama")).release)


@pytest.fixture
def release(made, tmp_path) -> Release:
    """A copy of it, elsewhere, without the run that made it."""
    return Release(Path(shutil.copytree(made.folder, tmp_path / "moved")))
