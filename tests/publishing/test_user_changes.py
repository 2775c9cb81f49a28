"""User changes in a repository before, between and during publishes: kept."""

from __future__ import annotations

import json

import pytest

from pipeline.errors import UserError
from pipeline.publishing.cards.own_text import END, START
from tests.support.fake_runs import REPO

MINE = "\n## A word of mine\n\nAsk me before you use it for medicine.\n"


def commit_requests(hub, since: int = 0) -> list[int]:
    """The answers to requests for a commit."""
    return [r.status for r in hub.requests[since:] if r.method == "POST" and "/commit/" in r.path]


def test_a_section_added_to_a_card_by_hand_survives_what_we_publish_after_it(hub, finished):
    finished.publish(("int8",))
    for card in ("README.md", "int8/README.md"):
        hub.put(REPO, {card: hub.read(REPO, card) + MINE.encode()})
    finished.make_variant("int4")
    finished.publish()
    for card in ("README.md", "int8/README.md"):
        text = hub.read(REPO, card).decode()
        assert text.endswith(MINE) and text.count(START) == text.count(END) == 1, card
        assert (finished.release / card).read_text() == text
    assert "int4/" in hub.read(REPO, "README.md").decode().split(END)[0]


def test_a_card_that_people_wrote_before_us_is_kept_and_ours_is_added(hub, finished):
    hub.put(REPO, {"README.md": b"---\nlicense: mit\nthumbnail: cat.png\n---\n# Our project\n"})
    finished.publish()
    text = hub.read(REPO, "README.md").decode()
    assert "# Our project\n" in text and "thumbnail: cat.png" in text and START in text
    assert finished.publish()["files_sent"] == 0


def test_text_added_to_the_local_card_goes_along_with_the_first_publish(hub, finished):
    from pipeline.workflow.stages import render

    render.run(finished.config, finished.workspace, finished.pen(), ("int8", "int4"))
    card = finished.release / "README.md"
    card.write_text(card.read_text() + MINE)
    render.run(finished.config, finished.workspace, finished.pen(), ("int8", "int4"))
    assert card.read_text().endswith(MINE)
    finished.publish()
    assert hub.read(REPO, "README.md").decode().endswith(MINE)


def test_text_added_to_the_local_card_goes_along_with_a_later_publish_too(hub, finished):
    finished.publish()
    for card in ("README.md", "int8/README.md"):
        (finished.release / card).write_text((finished.release / card).read_text() + MINE)
    assert finished.publish()["files_sent"] == 2
    for card in ("README.md", "int8/README.md"):
        assert hub.read(REPO, card).decode().endswith(MINE)
        assert hub.read(REPO, card) == (finished.release / card).read_bytes()


def test_removed_variant_card_keeps_user_text(hub, finished):
    finished.publish()
    hub.put(REPO, {"int4/README.md": hub.read(REPO, "int4/README.md") + MINE.encode()})
    finished.publish(("int8",))
    assert hub.read(REPO, "int4/README.md").decode() == MINE.strip() + "\n"
    assert [name for name in hub.files(REPO) if name.startswith("int4/")] == ["int4/README.md"]
    commits = hub.commits(REPO)
    finished.publish(("int8",))
    assert hub.commits(REPO) == commits


def test_concurrent_commit_is_retried_and_the_card_stays_true(hub, finished):
    finished.publish(("int8",))
    edited = hub.read(REPO, "README.md") + MINE.encode()
    hub.fault(r"POST .*/commit/main", first=lambda: hub.put(REPO, {"README.md": edited, "notes.md": b"mine"}))
    requests = len(hub.requests)
    finished.make_variant("int4")
    finished.publish()
    assert commit_requests(hub, requests) == [412, 200]
    text = hub.read(REPO, "README.md").decode()
    assert text.endswith(MINE) and "int4/" in text.split(END)[0] and hub.read(REPO, "notes.md") == b"mine"
    assert "int4" in json.loads(hub.read(REPO, "tunepress.json"))["results"]
    puts = [r.path for r in hub.requests[requests:] if r.method == "PUT"]
    assert len(puts) == len(set(puts))


def test_binary_card_is_refused_and_left(hub, finished):
    hub.put(REPO, {"README.md": b"# Caf\xe9\n"})
    with pytest.raises(UserError, match="not UTF-8"):
        finished.publish()
    assert hub.read(REPO, "README.md") == b"# Caf\xe9\n" and len(hub.files(REPO)) == 2
