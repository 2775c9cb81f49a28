"""Text that users write into local cards: published, or kept beside the card, and never lost."""

from __future__ import annotations

import pytest

from pipeline.tracking.events import Events
from pipeline.workflow.stages import render
from tests.support.fake_runs import BOTH, REPO, FakeRun

MINE = "\n## A word of mine\n"
HERS = b"\n## A word of hers\n"


def write_into(run: FakeRun, card: str = "README.md") -> None:
    path = run.release / card
    path.write_text(path.read_text() + MINE)


def asides(run: FakeRun) -> list[str]:
    return sorted(p.relative_to(run.release).as_posix() for p in run.release.rglob("*.local*"))


def test_local_card_text_goes_into_the_open_pull_request(hub, finished):
    hub.put(REPO, {"README.md": b"# Our project\n"})
    finished.configure(create_pr=True)
    finished.publish()
    write_into(finished)
    assert finished.publish()["files_sent"] == 1
    card = (finished.release / "README.md").read_text()
    assert card.endswith(MINE) and "# Our project" in card and asides(finished) == []
    assert hub.read(REPO, "README.md", "refs/pr/1").decode() == card


def test_card_changed_on_both_sides_is_kept_beside_the_new_one(hub, finished):
    finished.publish()
    for card in ("README.md", "int8/README.md"):
        write_into(finished, card)
        hub.put(REPO, {card: hub.read(REPO, card) + HERS})
    finished.publish()
    assert asides(finished) == ["README.md.local", "int8/README.md.local"]
    for card in ("README.md", "int8/README.md"):
        assert (finished.release / card).read_bytes() == hub.read(REPO, card) and HERS in hub.read(REPO, card)
        assert (finished.release / f"{card}.local").read_text().endswith(MINE)
    assert not [path for path in hub.files(REPO) if ".local" in path]


def test_a_copy_that_is_there_already_is_not_overwritten_by_the_next_one(hub, finished):
    finished.publish()
    for number in range(2):
        (finished.release / "README.md").write_text(f"# Mine {number}\n")
        hub.put(REPO, {"README.md": hub.read(REPO, "README.md") + HERS})
        finished.publish()
    kept = [(finished.release / name).read_text() for name in asides(finished)]
    assert asides(finished) == ["README.md.local", "README.md.local2"] and kept == ["# Mine 0\n", "# Mine 1\n"]


def test_concurrent_commit_keeps_the_local_card_aside(hub, finished):
    finished.publish()
    write_into(finished)
    hers = hub.read(REPO, "README.md") + HERS
    hub.fault(r"POST .*/commit/", first=lambda: hub.put(REPO, {"README.md": hers}))
    finished.publish()
    assert hub.read(REPO, "README.md") == (finished.release / "README.md").read_bytes() == hers
    assert (finished.release / "README.md.local").read_text().endswith(MINE)


def test_text_written_during_the_upload_is_kept_aside(hub, finished):
    finished.publish()
    hub.fault(r"POST .*/commit/", first=lambda: write_into(finished))
    finished.make("quantize/int8", {"int8/config.json": b"changed"})
    finished.publish()
    assert (finished.release / "README.md.local").read_text().endswith(MINE)


def test_the_same_change_on_both_sides_leaves_no_copy(hub, finished):
    finished.publish()
    write_into(finished)
    hub.put(REPO, {"README.md": (finished.release / "README.md").read_bytes()})
    assert finished.publish()["files_sent"] == 0
    assert asides(finished) == [] and (finished.release / "README.md").read_text().endswith(MINE)


def test_untouched_local_card_leaves_no_copy(hub, finished):
    finished.publish()
    hub.put(REPO, {"README.md": hub.read(REPO, "README.md") + HERS})
    finished.make("quantize/int8", {"int8/config.json": b"changed"})
    finished.publish()
    assert asides(finished) == [] and HERS in (finished.release / "README.md").read_bytes()


def test_card_text_stays_when_its_variant_leaves(hub, finished):
    finished.publish()
    write_into(finished, "int4/README.md")
    finished.publish(("int8",))
    assert [path.name for path in (finished.release / "int4").iterdir()] == ["README.md"]
    assert (finished.release / "int4" / "README.md").read_text().endswith(MINE)


def test_refused_publish_keeps_local_documents(hub, finished):
    from pipeline.errors import HubError

    finished.publish()
    before = {p: p.read_bytes() for p in finished.release.rglob("*") if p.is_file()}
    hub.fault(r"POST .*/commit/", status=403)
    finished.make("quantize/int8", {"int8/config.json": b"changed"})
    with pytest.raises(HubError, match="cannot write"):
        finished.publish()
    changed = finished.release / "int8" / "config.json"
    assert {p: p.read_bytes() for p in before} == before | {changed: b"changed"}


def test_withdrawn_release_keeps_only_user_text(hub, finished):
    finished.publish()
    write_into(finished, "int8/README.md")
    render.withdraw(finished.config, finished.workspace)
    left = {path.relative_to(finished.release).as_posix() for path in finished.release.rglob("*") if path.is_file()}
    assert not {"README.md", "tunepress.json", "int4/README.md", "assets/quality_vs_size.png"} & left
    assert "int8/README.md" in left and "int8/model.safetensors" not in left


@pytest.mark.parametrize("chosen, said", [("mit", True), ("apache-2.0", False), (None, False)])
def test_license_other_than_the_base_models_is_said_in_the_terminal(finished, chosen, said):
    finished.configure(license=chosen)
    shown: list[str] = []
    events = Events(finished.workspace.events_path, "demo", on_show=shown.extend)
    render.run(finished.config, finished.workspace, events, BOTH)
    line = "publish.license: mit, while the base model names apache-2.0, whose terms still apply; the card says so"
    assert shown == [line] * said
    assert ("These differ" in (finished.release / "README.md").read_text()) == said
