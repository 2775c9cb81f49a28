"""A dashboard in a Space: Trackio's own server in its mode for Spaces."""

from __future__ import annotations

import pytest

from pipeline.errors import TrackError
from pipeline.tracking.trackers import sync
from pipeline.tracking.trackers.trackio import check, dashboard
from tests.support.hub import LoopbackHub
from tests.support.hub.server import User
from tests.support.trackio_server import Run, TrackioServer, assert_once_each, configuration

ADA, READER, BEN = "hf_adaWritesInTests0123", "hf_adaReadsInTests01234", "hf_benWritesInTests0123"
BOARD = "ada/board"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that knows Ada, her token that only reads, and Ben. Ada's token is the one in use."""
    who = {ADA: {"name": "ada"}, READER: {"name": "ada", "role": "read"}, BEN: {"name": "ben"}}
    with LoopbackHub(tmp_path / "hub", who) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", ADA)
        monkeypatch.delenv("TRACKIO_WRITE_TOKEN")
        yield hub


@pytest.fixture
def space(hub, tmp_path):
    """The program of the Space ada/board."""
    more = {
        "SYSTEM": "spaces",
        "SPACE_AUTHOR_NAME": "ada",
        "SPACE_REPO_NAME": "board",
        "HF_TOKEN": "hf_spacesOwnInTests01234",
    }
    server = TrackioServer(tmp_path / "server", more).start()
    hub.store.create("space", BOARD).host = server.url
    yield server
    server.stop()


@pytest.fixture
def stranger(tmp_path):
    """A program that records its requests."""
    with LoopbackHub(tmp_path / "stranger", {}) as program:
        yield program


@pytest.fixture
def run(tmp_path) -> Run:
    run = Run(tmp_path / "run", configuration(space=BOARD))
    run.train(1, 10)
    run.finish()
    run.compare()
    return run


def kept_by(space: TrackioServer) -> list[dict]:
    """Stop the Space, whose database is locked until then, and return its rows."""
    space.stop()
    return space.rows()


def test_run_is_stored_once_with_the_hub_token_of_the_writer(run, space, hub):
    assert run.send() is None
    assert run.send() is None
    assert any(r.path.endswith("/auth-check/write") and r.status == 200 for r in hub.requests)
    assert_once_each(kept_by(space), run.records())
    assert len(list(space.folder.rglob("*.png"))) == 1


def test_member_of_the_organization_may_write(run, space, hub):
    hub.users[ADA] = User("ann", "write", ("ada",))
    assert run.send() is None
    assert_once_each(kept_by(space), run.records())


def test_foreign_token_is_neither_sent_nor_shown(run, stranger, hub, monkeypatch):
    hub.store.create("space", BOARD).host = stranger.url
    monkeypatch.setenv("HF_TOKEN", BEN)
    problem = run.send()
    assert problem.startswith(f"track.space {BOARD}: ") and "the Hub token of ben" in problem and BEN not in problem
    assert stranger.requests == []


def test_sync_sends_no_token_to_the_space_of_a_stranger(run, stranger, hub):
    hub.store.create("space", "eve/board").host = stranger.url
    with pytest.raises(TrackError, match="track.space eve/board: the Hub token of ada"):
        sync(run.folder / "events.jsonl", configuration(space="eve/board"))
    assert stranger.requests == []


def test_no_token_is_sent_while_the_hub_cannot_be_asked(run, stranger, hub):
    hub.store.create("space", BOARD).host = stranger.url
    hub.fault("GET /api/spaces/", status=503, times=10)
    assert "no token is sent" in run.send()
    assert stranger.requests == []


def test_sleeping_space_gets_the_records_when_it_answers_again(run, space):
    space.stop()
    assert "no answer" in run.send()
    space.start()
    assert run.send() is None
    assert_once_each(kept_by(space), run.records())


def test_missing_space_is_refused_with_the_way_to_make_it(run, hub):
    problem = run.send()
    assert problem.startswith(f"track.space {BOARD}: no such Space on the Hub. Try: a new Gradio Space")
    assert {r.method for r in hub.requests} == {"GET"}
    with pytest.raises(TrackError, match="no such Space"):
        check(run.config.track)


def test_static_space_is_refused(run, hub, stranger):
    space = hub.store.create("space", BOARD)
    space.host, space.sdk = stranger.url, "static"
    assert "static, so it takes no data" in run.send() and stranger.requests == []


def test_space_is_reached_at_the_address_that_the_hub_names(run, hub, stranger):
    hub.store.create("space", BOARD).host = stranger.url
    run.send()
    assert [r.path for r in stranger.requests] == ["/version"]
    assert dashboard(run.config) == f"https://huggingface.co/spaces/{BOARD}"


def test_write_access_passes_the_check(hub):
    hub.store.create("space", BOARD).host = "https://ada-board.hf.space"
    check(configuration(space=BOARD).track)


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        (READER, "the Hub token can only read"),
        (BEN, "the Hub token of ben cannot write"),
        ("hf_nobodyKnowsThis0123", "the Hub does not know this token"),
        ("", "no Hub token"),
    ],
)
def test_token_that_cannot_write_is_refused_before_the_run(hub, monkeypatch, token, reason):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(TrackError, match=reason) as refused:
        check(configuration(space=BOARD).track)
    assert BOARD in str(refused.value) and refused.value.exit_code == 2
    assert not token or token not in str(refused.value)


@pytest.mark.parametrize("place", [{"space": BOARD}, {"server": "http://127.0.0.1:9"}, {}])
def test_place_that_does_not_answer_is_not_refused(hub, monkeypatch, place):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("TRACKIO_WRITE_TOKEN", "aTokenOfThisServer-0123")
    check(configuration(**place).track)


@pytest.mark.parametrize(
    ("token", "reason"), [(None, "no write token"), (" ", "no write token"), ("a\nb", "invalid characters")]
)
def test_server_needs_a_write_token_before_the_run(monkeypatch, token, reason):
    monkeypatch.delenv("TRACKIO_WRITE_TOKEN")
    if token is not None:
        monkeypatch.setenv("TRACKIO_WRITE_TOKEN", token)
    with pytest.raises(TrackError, match=reason) as refused:
        check(configuration(server="https://trackio.example.org").track)
    assert "TRACKIO_WRITE_TOKEN" in str(refused.value) and refused.value.exit_code == 2


def test_run_on_this_machine_needs_no_token(monkeypatch):
    monkeypatch.delenv("TRACKIO_WRITE_TOKEN")
    check(configuration().track)
