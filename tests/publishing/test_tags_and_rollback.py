"""Tags of finished releases, and rollbacks to an earlier one."""

from __future__ import annotations

import json

import pytest

from pipeline.errors import HubError
from pipeline.publishing.cards.own_text import END, START
from pipeline.publishing.rollback import rollback
from tests.support.fake_runs import REPO, sent_bytes, uploads, weights

MINE = "\n## A word of mine\n"


def tags(hub, repo: str = REPO) -> dict[str, str]:
    return dict(hub.repo(repo).tags)


def release(hub, finished, size: int = 3000) -> dict[str, bytes]:
    """Publish a release with another int4; what the repository then holds."""
    finished.make_variant("int8")
    finished.make_variant("int4")
    finished.make("quantize/int4", {"int4/config.json": b"%d" % size, "int4/model.safetensors": weights(size)})
    finished.publish()
    return contents(hub)


def contents(hub) -> dict[str, bytes]:
    return {path: hub.read(REPO, path) for path in hub.files(REPO)}


@pytest.fixture
def two(hub, finished) -> list[dict[str, bytes]]:
    """What the repository held at release-1 and at release-2, which has a file more and one less."""
    finished.make("merge", {"config.json": b"{}", "old.txt": b"old"})
    first = release(hub, finished, 3001)
    finished.make("merge", {"config.json": b'{"new": 1}', "new.safetensors": weights(1000)})
    return [first, release(hub, finished, 3002)]


def test_each_finished_release_gets_the_next_number_and_an_unfinished_one_none(hub, finished):
    finished.publish(("int8",))
    assert tags(hub) == {}
    release(hub, finished)
    assert tags(hub) == {"release-1": hub.commits(REPO)[0]}
    release(hub, finished, 4000)
    assert tags(hub)["release-2"] == hub.commits(REPO)[0] and len(tags(hub)) == 2


def test_the_next_number_is_free_whoever_tagged_what(hub, finished):
    hub.put(REPO, {"notes.md": b"mine"})
    hub.repo(REPO).tags.update({"release-7": hub.commits(REPO)[0], "release-x": hub.commits(REPO)[0]})
    release(hub, finished)
    assert tags(hub)["release-8"] == hub.commits(REPO)[0]


def test_unchanged_release_gets_no_new_tag(hub, finished):
    release(hub, finished)
    assert finished.publish()["tag"] == "release-1"
    hub.put(REPO, {"README.md": hub.read(REPO, "README.md") + MINE.encode(), "notes.md": b"mine"})
    assert finished.publish()["tag"] == "release-1"
    assert list(tags(hub)) == ["release-1"]


def test_a_tag_that_failed_is_made_by_the_next_publish(hub, finished):
    hub.fault(r"POST .*/tag/", status=403)
    with pytest.raises(HubError, match="published, but not tagged: ada/tiny: this token cannot write"):
        release(hub, finished)
    head = hub.commits(REPO)[0]
    assert tags(hub) == {} and finished.events("model_card_pushed")
    assert finished.publish()["tag"] == "release-1"
    assert tags(hub) == {"release-1": head} and hub.commits(REPO)[0] == head


def test_tag_taken_by_others_is_left_alone(hub, finished):
    taken = {}

    def take():
        taken.update({"release-1": hub.commits(REPO)[-1]})
        hub.repo(REPO).tags.update(taken)

    hub.fault(r"POST .*/tag/", first=take)
    release(hub, finished)
    assert tags(hub) == {**taken, "release-2": hub.commits(REPO)[0]}


def test_rolling_back_restores_every_file_in_one_commit_and_sends_no_large_file(hub, two):
    commits, requests = hub.commits(REPO), len(hub.requests)
    done = rollback(REPO)
    assert done.tag == "release-1" and hub.commits(REPO)[0] == done.commit.oid and hub.commits(REPO)[1:] == commits
    assert contents(hub) == two[0]
    assert uploads(hub, requests) == [] and done.commit.deleted == ("new.safetensors",)
    assert len(tags(hub)) == 2


def test_rolling_back_and_forth_ends_where_it_began(hub, finished, two):
    rollback(REPO)
    done = rollback(REPO, to="release-2")
    assert done.tag == "release-2" and contents(hub) == two[1]
    requests = len(hub.requests)
    assert rollback(REPO, to="release-2").commit.sent == () and sent_bytes(hub, requests) == 0
    rollback(REPO)
    finished.publish()
    assert contents(hub) == two[1] and len(tags(hub)) == 2


def test_rolling_back_again_goes_one_release_further(hub, finished, two):
    release(hub, finished, 3003)
    assert [rollback(REPO).tag, rollback(REPO).tag] == ["release-2", "release-1"]
    assert contents(hub) == two[0]
    with pytest.raises(
        HubError, match=r"ada/tiny: no release with this tag \(release-9\)\. Tagged releases: release-1, release-2"
    ):
        rollback(REPO, to="release-9")
    with pytest.raises(HubError, match=r"no release before release-1\. Other releases: release-2, release-3"):
        rollback(REPO)


def test_user_files_and_text_survive_rollbacks(hub, two):
    hub.put(REPO, {"notes.md": b"mine", "README.md": hub.read(REPO, "README.md") + MINE.encode()})
    for tag, held in (("release-1", two[0]), ("release-2", two[1])):
        rollback(REPO, to=tag)
        assert contents(hub) == {**held, "notes.md": b"mine", "README.md": held["README.md"] + MINE.encode()}


def edit(hub, old: str, new: str, path: str = "README.md") -> None:
    text = hub.read(REPO, path).decode()
    assert old in text
    hub.put(REPO, {path: text.replace(old, new, 1).encode()})


def test_rollback_keeps_current_user_metadata(hub, finished, two):
    edit(hub, "---\n", "---\nthumbnail: old.png\nmuted: true\n")
    release(hub, finished, 3003)
    release(hub, finished, 3004)
    edit(hub, "thumbnail: old.png\nmuted: true\n", "thumbnail: new.png\n")
    rollback(REPO)
    text = hub.read(REPO, "README.md").decode()
    assert "thumbnail: new.png" in text and "muted" not in text
    assert finished.publish() and "thumbnail: new.png" in hub.read(REPO, "README.md").decode()


def test_rollback_restores_only_our_section(hub, finished, two):
    words = f"\nWORDS OF MINE: do not edit between `{START}` and `{END}`.\n"
    hub.put(REPO, {"README.md": hub.read(REPO, "README.md") + words.encode()})
    release(hub, finished, 3003)
    release(hub, finished, 3004)
    edit(hub, "WORDS OF MINE", "OTHER WORDS")
    rollback(REPO)
    text = hub.read(REPO, "README.md").decode()
    assert text.count("OTHER WORDS") == 1 and "WORDS OF MINE" not in text and text.count(START) == 2


def test_rollback_keeps_a_card_without_our_section(hub, finished, two):
    hub.put(REPO, {"int8/README.md": b"# Theirs\n"})
    head, tag = hub.commits(REPO)[0], "release-9"
    hub.repo(REPO).tags[tag] = head
    hub.put(REPO, {"int8/README.md": b"# Theirs, later\n"})
    rollback(REPO, to=tag)
    assert hub.read(REPO, "int8/README.md") == b"# Theirs, later\n"


def test_a_commit_that_slips_into_a_rollback_is_taken_along(hub, two):
    edited = hub.read(REPO, "README.md") + MINE.encode()
    hub.fault(r"POST .*/commit/", first=lambda: hub.put(REPO, {"README.md": edited}))
    rollback(REPO)
    assert contents(hub) == {**two[0], "README.md": two[0]["README.md"] + MINE.encode()}


def test_foreign_file_stops_a_rollback(hub, two):
    hub.put(REPO, {"old.txt": b"mine"})
    before = contents(hub)
    with pytest.raises(HubError, match="tunepress did not put old.txt there"):
        rollback(REPO)
    assert contents(hub) == before


def test_rollback_without_releases_is_refused(hub):
    hub.put(REPO, {"notes.md": b"mine"})
    with pytest.raises(HubError, match="no release before the current one"):
        rollback(REPO)
    with pytest.raises(HubError, match="^ada/nothing: no such repository, or this token cannot see it"):
        rollback("ada/nothing")
    with pytest.raises(HubError, match="nothing: not a repository. Try: USER/NAME"):
        rollback("nothing")


def test_rollback_command_reports_its_result(hub, two):
    from typer.testing import CliRunner

    from pipeline.cli import app

    done = CliRunner().invoke(app, ["rollback", REPO, "--json"])
    assert json.loads(done.stdout)["tag"] == "release-1" and contents(hub) == two[0]
    done = CliRunner().invoke(app, ["rollback", REPO, "--to", "release-1"])
    assert f"{REPO} is at release-1" in done.stdout
