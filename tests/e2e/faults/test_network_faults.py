"""Network faults on every route to the Hub: a complete release, or the untouched earlier one."""

from __future__ import annotations

import logging
import re
import time

import pytest
from huggingface_hub import constants

from pipeline.errors import HubError
from pipeline.hub.download import download
from tests.e2e.faults.sameness import untrue_commits
from tests.support.fake_runs import REPO, weights
from tests.support.hub.faults import Faults

# Every route that publishing takes, once a release is there.
ROUTES = {
    "who am I": r"GET /api/whoami-v2",
    "what is the repository": r"GET /api/models/ada/tiny$",
    "which files are there": r"GET /api/models/ada/tiny/tree/",
    "what does the last lineage say": r"GET /ada/tiny/resolve/.*tunepress\.json",
    "is the card's metadata right": r"POST /api/validate-yaml",
    "how are files to be sent": r"POST /api/models/ada/tiny/preupload/",
    "which large files are missing": r"POST /ada/tiny\.git/info/lfs/objects/batch",
    "a large file": r"PUT /lfs-storage/",
    "has it arrived": r"POST /ada/tiny\.git/info/lfs/objects/verify",
    "the commit": r"POST /api/models/ada/tiny/commit/",
    "which tags are there": r"GET /api/models/ada/tiny/refs",
    "a tag": r"POST /api/models/ada/tiny/tag/",
}
PASSING = {
    "unwell": [
        {"status": 429, "headers": {"Retry-After": "0"}}, {"status": 500}, {"status": 502}, {"status": 503},
    ],
    "broken": [{"reset": True}, {"reset": True, "after": True}],  # the second was done, and its answer is lost
}  # fmt: skip
STAYING = [
    {"status": 429}, {"status": 401}, {"status": 412},
    *(pytest.param(fault, marks=pytest.mark.slow) for fault in ({"status": 500}, {"status": 503}, {"reset": True})),
]  # fmt: skip
each_route = pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)


@pytest.fixture
def published(hub, finished):
    """A release that is there, and the run that has a newer one."""
    finished.publish()
    made = finished.workspace.placed("merge")
    same = {path.relative_to(finished.release).as_posix(): path.read_bytes() for path in made}
    finished.make("merge", {**same, "model.safetensors": weights(5000)})
    figures = finished.workspace.read_measurement("training")
    finished.workspace.write_measurement("training", {**figures, "train_loss": 1.5})  # which the card tells
    return finished


def is_complete(hub, run) -> bool:
    """Does the head hold the run's release, to the byte?"""
    files = {path.relative_to(run.release).as_posix(): path for path in run.release.rglob("*") if path.is_file()}
    there = hub.files(REPO).keys() - {".gitattributes"}
    return there == files.keys() and all(hub.read(REPO, name) == path.read_bytes() for name, path in files.items())


@each_route
@pytest.mark.parametrize("kind", PASSING)
def test_temporary_fault_is_retried_until_the_release_is_complete(hub, published, route, kind):
    for fault in PASSING[kind]:
        hub.fault(route, **fault)
    published.publish()
    # What had arrived is not asked about again.
    assert len(hub.faults.left) == (len(PASSING[kind]) - 1 if "verify" in route else 0)
    assert is_complete(hub, published)
    assert not list(untrue_commits(hub, REPO)) and list(hub.repo(REPO).tags) == ["release-1", "release-2"]


@each_route
@pytest.mark.parametrize("fault", STAYING, ids=lambda fault: "-".join(map(str, fault.values())))
def test_permanent_fault_leaves_a_whole_release_and_the_next_publish_completes_it(hub, published, route, fault):
    before = hub.commits(REPO)
    hub.fault(route, times=1000, **fault)
    if "verify" in route and fault.get("status") != 401:  # what had arrived is not asked about again
        published.publish()
    else:
        with pytest.raises(HubError) as error:
            published.publish()
        assert "ada/tiny" in str(error.value) and "\n" not in str(error.value)
    struck = [r for r in hub.requests if re.search(route, f"{r.method} {r.path}") and r.status in (0, *fault.values())]
    assert 1 <= len(struck) <= 8
    assert hub.commits(REPO) == before or is_complete(hub, published)
    hub.faults = Faults()
    published.publish()
    assert is_complete(hub, published) and not list(untrue_commits(hub, REPO))
    assert list(hub.repo(REPO).tags) == ["release-1", "release-2"]


@each_route
def test_a_hub_that_stalls_is_asked_again(hub, published, route, monkeypatch):
    monkeypatch.setenv("TUNEPRESS_HUB_TIMEOUT", "1")
    monkeypatch.setattr("pipeline.hub.auth.ANSWER_SECONDS", 1)
    hub.fault(route, stall=2)
    published.publish()
    assert is_complete(hub, published) and not list(untrue_commits(hub, REPO))
    end = time.monotonic() + 10
    while len([r for r in hub.requests if re.search(route, f"{r.method} {r.path}")]) < 2:
        assert time.monotonic() < end  # the hub notes the first one when it has stalled
        time.sleep(0.1)


READING = {
    "which files are there": r"GET /api/models/ada/base",
    "what a file is": r"HEAD /ada/base/resolve/",
    "a file": r"GET /ada/base/resolve/.*model\.safetensors",
}


@pytest.mark.parametrize("route", READING.values(), ids=READING)
@pytest.mark.parametrize("fault", [{"status": 429}, {"status": 503}, {"reset": True}, {"cut": 1000}], ids=str)
def test_a_model_is_fetched_whole_whatever_passes(hub, tmp_path, monkeypatch, route, fault):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    held = {"config.json": b"{}" + b" " * 2000, "model.safetensors": weights(20_000)}
    hub.put("ada/base", held)
    hub.fault(route, **fault, times=2)
    got = download("ada/base", lambda files: [name for name in files.sizes if name in held])
    assert not hub.faults.left or "cut" in fault
    assert {name: (got.folder / name).read_bytes() for name in got.names} == held


@pytest.mark.parametrize("fault", [*PASSING["broken"], {"status": 503}, {"status": 401}], ids=str)
def test_a_repository_is_made_whatever_the_first_answer(hub, finished, fault):
    hub.fault(r"POST /api/repos/create", **fault)
    if fault == {"status": 401}:
        with pytest.raises(HubError, match="^ada/tiny: the Hub refuses this token. Try: "):
            finished.publish()
    finished.publish()
    assert is_complete(hub, finished) and hub.repo(REPO).private


def test_each_retry_wait_is_reported(hub, finished, caplog):
    hub.fault(r"GET /api/whoami-v2", status=503)
    hub.fault(r"POST .*/commit/", status=429, headers={"Retry-After": "1"})
    with caplog.at_level(logging.WARNING, "pipeline.hub.retry"):
        finished.publish()
    first, second = caplog.messages
    assert first == "ada/tiny: the Hub has a problem (503 Service Unavailable); again in 0 s (2 of 5)"
    assert second == "ada/tiny: the Hub has a problem (429 Too Many Requests); again in 1 s (2 of 8)"


def test_long_retry_after_is_not_waited_for(hub, finished):
    hub.fault(r"POST .*/commit/", status=429, headers={"Retry-After": "3600"})
    with pytest.raises(HubError, match=r"^ada/tiny: the Hub has a problem .*; it asks to wait 3600 s\. Try: run again"):
        finished.publish()
    assert len([r for r in hub.requests if "/commit/" in r.path]) == 1


@pytest.mark.parametrize("text", ["soon", "-1", "nan"])
def test_invalid_wait_time_is_refused(hub, finished, monkeypatch, text):
    monkeypatch.setenv("TUNEPRESS_HUB_WAIT", text)
    with pytest.raises(HubError, match=rf"^TUNEPRESS_HUB_WAIT: not a number of at least 0 \('{text}'\)"):
        finished.publish()
