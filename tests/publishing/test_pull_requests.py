"""Releases proposed in a pull request."""

from __future__ import annotations

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from tests.support.fake_runs import BOTH, REPO, sent_bytes
from tests.support.runs import OTHER_TOKEN


@pytest.fixture
def proposed(hub, finished):
    """The run, whose release is in pull request 1."""
    finished.configure(create_pr=True)
    finished.summary = finished.publish()
    return finished


def test_pull_request_holds_the_release_and_is_reported_and_main_is_unchanged(hub, proposed):
    assert list(hub.files(REPO)) == [".gitattributes"]
    assert {"config.json", "int8/model.safetensors", "README.md"} <= set(hub.files(REPO, "refs/pr/1"))
    assert hub.repo(REPO).tags == {}
    assert proposed.summary["url"] == f"{hub.url}/{REPO}/discussions/1"
    for event in ("merged_model_pushed", "quantized_model_pushed", "model_card_pushed"):
        for record in proposed.events(event):
            assert (record["url"], record["pull_request"]) == (proposed.summary["url"], 1)
            assert record["commit"] == hub.commits(REPO, "refs/pr/1")[0]


def test_publishing_again_sends_nothing_and_opens_nothing(hub, proposed):
    requests = len(hub.requests)
    assert proposed.publish()["files_sent"] == 0
    assert sent_bytes(hub, requests) == 0 and list(hub.repo(REPO).pull_requests) == [1]


def test_a_change_goes_to_the_same_pull_request(hub, proposed):
    proposed.make_variant("int4")
    proposed.make("quantize/int4", {"int4/config.json": b"changed"})
    proposed.publish()
    assert list(hub.repo(REPO).pull_requests) == [1]
    assert hub.read(REPO, "int4/config.json", "refs/pr/1") == b"changed"
    assert len(hub.commits(REPO, "refs/pr/1")) == 3


@pytest.mark.parametrize("title", [None, "Please merge"])
def test_pull_request_is_found_by_title_or_number(hub, proposed, title):
    if title:
        hub.repo(REPO).discussions[1].title = title
    else:
        proposed.workspace.undo("publish")
    proposed.make("quantize/int4", {"int4/config.json": b"changed"})
    proposed.publish()
    assert list(hub.repo(REPO).pull_requests) == [1]


def test_merged_pull_request_leaves_nothing_to_propose(hub, proposed):
    HfApi().merge_pull_request(REPO, 1)
    commits = hub.commits(REPO)
    assert proposed.publish()["files_sent"] == 0
    assert hub.commits(REPO) == commits and list(hub.repo(REPO).pull_requests) == [1]


def test_closed_pull_request_is_followed_by_another(hub, proposed):
    HfApi().change_discussion_status(REPO, 1, "closed")
    proposed.publish()
    assert list(hub.repo(REPO).pull_requests) == [1, 2]


def test_pull_request_with_lost_answer_is_not_opened_twice(hub, finished):
    finished.configure(create_pr=True)
    hub.fault(r"POST .*/commit/", reset=True, after=True)
    summary = finished.publish()
    assert list(hub.repo(REPO).pull_requests) == [1] and summary["pull_request"] == 1 and summary["files_sent"] > 5


def test_unrelated_pull_request_is_left_alone(hub, finished):
    finished.publish()
    hub.put(REPO, {"notes.md": b"mine"})
    typo = [CommitOperationAdd("notes.md", b"better")]
    HfApi().create_commit(REPO, typo, commit_message="Mend a typo", create_pr=True)
    finished.configure(create_pr=True)
    finished.make("quantize/int8", {"int8/config.json": b"changed"})
    finished.publish()
    assert list(hub.repo(REPO).pull_requests) == [1, 2]
    assert hub.read(REPO, "int8/config.json", "refs/pr/1") != b"changed"


def test_other_users_can_propose(hub, finished, monkeypatch):
    hub.put(REPO, {"notes.md": b"mine"})
    monkeypatch.setenv("HF_TOKEN", OTHER_TOKEN)
    finished.configure(create_pr=True)
    finished.publish(BOTH)
    assert hub.repo(REPO).discussions[1].author == "bob" and "README.md" not in hub.files(REPO)
