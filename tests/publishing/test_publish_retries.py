"""Retries while publishing: uploads continue, and attempts are bounded."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections import Counter

import pytest

from pipeline.errors import HubError
from pipeline.hub import retry
from pipeline.publishing.rollback import rollback
from tests.support import REPOSITORY
from tests.support.fake_runs import REPO, FakeRun, weights
from tests.support.hub.faults import Faults
from tests.support.runs import TOKEN


@pytest.fixture
def three(finished) -> list[str]:
    """The sha256 of three large files of a release, in the order in which they are sent."""
    contents = [weights(200_000 + n) for n in range(3)]
    finished.make("merge", {f"model-{n}.safetensors": content for n, content in enumerate(contents)})
    return [hashlib.sha256(content).hexdigest() for content in contents]


def arrived(hub) -> Counter:
    """How often each large file was sent whole, by sha256."""
    puts = [r for r in hub.requests if r.method == "PUT" and r.status == 200]
    return Counter(r.path.rpartition("/")[2] for r in puts)


def test_broken_connection_resends_only_the_broken_file(hub, finished, three):
    hub.fault(rf"PUT .*{three[1]}", reset=True, times=retry.ATTEMPTS - 1)
    finished.publish()
    assert [arrived(hub)[sha] for sha in three] == [1, 1, 1] and max(arrived(hub).values()) == 1


def test_repeated_broken_connections_give_one_line_and_the_next_publish_sends_the_rest(hub, finished, three):
    hub.fault(rf"PUT .*{three[1]}", reset=True, times=10_000)
    with pytest.raises(HubError, match=r"^ada/tiny: the Hub could not be reached .*run again") as error:
        finished.publish()
    assert TOKEN not in str(error.value) and "int8/config.json" not in hub.files(REPO)
    hub.faults = Faults()
    finished.publish()
    assert [arrived(hub)[sha] for sha in three] == [1, 1, 1] and "int8/config.json" in hub.files(REPO)


PUBLISH = """
import sys
from pipeline.hub.auth import create
from pipeline.publishing.commit import publish
from pipeline.hub.tree import LocalFile
from pipeline.publishing import upload
from pathlib import Path
upload.BATCH_BYTES = 0
create(sys.argv[2], True)
publish(sys.argv[2], lambda tree: {p.name: LocalFile.of(p) for p in sorted(Path(sys.argv[1]).iterdir())}, "release")
"""


def test_killed_upload_is_continued(hub, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    contents = [weights(100_000 + n) for n in range(3)]
    for n, content in enumerate(contents):
        (folder / f"{n}.safetensors").write_bytes(content)
    shas = [hashlib.sha256(content).hexdigest() for content in contents]
    third = threading.Event()
    hub.fault(rf"PUT .*{shas[2]}", first=third.set, stall=60)
    env = {**os.environ, **hub.env_for(TOKEN, tmp_path / "home"), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-P", "-c", PUBLISH, str(folder), REPO]
    with subprocess.Popen(command, env=env) as process:
        assert third.wait(30), process.poll()
        process.kill()
    assert len(hub.commits(REPO)) == 1
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert arrived(hub) == Counter(shas)
    assert {f"{n}.safetensors" for n in range(3)} <= set(hub.files(REPO))


def test_commit_with_lost_answer_is_not_repeated(hub, finished):
    hub.fault(r"POST .*/commit/", reset=True, after=True)
    summary = finished.publish()
    assert len(hub.commits(REPO)) == 2 and summary["files_sent"] > 5
    assert summary["commit"] == hub.commits(REPO)[0]
    assert len(finished.events("model_card_pushed")) == 1


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_hub_that_is_unwell_for_a_moment_is_asked_again(hub, finished, status):
    hub.fault(r"POST .*/commit/", status=status, times=2)
    hub.fault(r"GET /api/models/", status=status, times=1)
    hub.fault(r"GET /api/whoami", status=status, times=1)
    finished.publish()
    assert len(hub.commits(REPO)) == 2


@pytest.mark.parametrize("status", [501, 505])
@pytest.mark.parametrize("request_", [r"POST .*/commit/", r"PUT ", r"GET /api/models/"])
def test_error_of_the_hub_that_does_not_pass_is_told_at_once_in_its_own_words(hub, finished, status, request_):
    hub.fault(request_, status=status, times=1000, headers={"X-Error-Message": "Commits are switched off today"})
    with pytest.raises(HubError, match=rf"^{REPO}: the Hub refuses it \(Commits are switched off today"):
        finished.publish()
    refused = [r.path for r in hub.requests if r.status == status]
    assert len(refused) == len(set(refused))  # uploads of one batch go side by side


def test_read_only_token_is_refused_without_retry(hub, finished):
    hub.fault(r"POST .*/commit/", status=403, times=100)
    with pytest.raises(HubError, match="cannot write"):
        finished.publish()
    assert [r.status for r in hub.requests if "/commit/" in r.path] == [403]


def test_concurrent_commits_end_after_a_bounded_number_of_attempts(hub, finished: FakeRun):
    hub.fault(r"POST .*/commit/", status=412, times=1000)
    with pytest.raises(HubError, match="other commits arrived"):
        finished.publish()
    assert len([r for r in hub.requests if "/commit/" in r.path]) == retry.ATTEMPTS


def test_failing_hub_gives_one_line_with_the_next_command(hub, finished):
    finished.publish()
    hub.fault(r"GET .*/refs", status=503, times=1000)
    with pytest.raises(
        HubError, match=r"^published, but not tagged: ada/tiny: the Hub has a problem .*\. Try: publish again to tag"
    ):
        finished.publish()
    with pytest.raises(HubError, match=r"^ada/tiny: the Hub has a problem \(.*\)\. Try: again later$"):
        rollback(REPO)
    hub.faults = Faults()
    finished.make("quantize/int8", {"int8/config.json": b"changed"})
    finished.publish()
    hub.fault(r"POST .*/commit/", status=503, times=1000)
    with pytest.raises(HubError, match=r"\. Try: run the rollback again$"):
        rollback(REPO)


def test_other_server_is_not_taken_for_the_hub(hub, finished, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"{hub.url}/{REPO}/resolve/main/x?")
    hub.put(REPO, {"x": b"<html>Log in to this network</html>"})
    with pytest.raises(HubError, match=f"^{REPO}: the server is not the Hub "):
        finished.publish()


def test_refused_metadata_is_reported_before_anything_is_sent(hub, finished):
    hub.put(REPO, {"README.md": b"---\nbase_model: /home/me/model\n---\n# Mine\n"})
    before = hub.commits(REPO)
    with pytest.raises(HubError, match="metadata of README.md"):
        finished.publish()
    assert hub.commits(REPO) == before and not arrived(hub)
