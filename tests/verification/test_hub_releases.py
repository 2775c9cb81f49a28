"""Releases on the Hub: judged by metadata before anything large is fetched."""

from __future__ import annotations

import pytest

from pipeline.errors import UserError
from pipeline.verification import verify
from tests.support.fake_runs import REPO
from tests.support.releases import told


@pytest.fixture
def repository(hub, made):  # noqa: F811
    files = {p.relative_to(made.folder).as_posix(): p.read_bytes() for p in made.folder.rglob("*") if p.is_file()}
    hub.put(REPO, files)
    return hub


def fetched(hub) -> set[str]:  # noqa: F811
    """Names of the files whose content was asked for."""
    paths = (r.path.partition("?")[0] for r in hub.requests if r.method == "GET" and "/resolve/" in r.path)
    return {path.split("/resolve/")[1].partition("/")[2] for path in paths}


def test_without_measuring_no_weights_are_fetched(repository):
    found = verify(REPO, measure=False)
    assert told(found) == [] and found.exit_code == 0 and found.revision
    there = fetched(repository)
    assert {"tunepress.json", "README.md", "int4/README.md", "int8/config.json"} <= there
    assert not [path for path in there if path.endswith(".safetensors")]


def test_wrong_weights_are_found_before_they_are_fetched(repository, made):
    data = bytearray((made.folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    first = verify(REPO, measure=False).revision
    repository.put(REPO, {"model.safetensors": bytes(data), "int8/model.safetensors": b"short"})
    found = verify(REPO, measure=False)
    assert [line.split(":")[0] for line in told(found)] == ["files int8/model.safetensors", "files model.safetensors"]
    assert not [path for path in fetched(repository) if path.endswith(".safetensors")]
    assert verify(REPO, first, measure=False).exit_code == 0


def test_missing_repository_gives_one_line(repository):
    with pytest.raises(UserError, match="ada/nothing: no such model on the Hub"):
        verify("ada/nothing")
    with pytest.raises(UserError, match="no such revision"):
        verify(REPO, "other")
    repository.put("ada/plain", {"README.md": b"x"})
    with pytest.raises(UserError, match=r"ada/plain: has no tunepress.json"):
        verify("ada/plain")
