"""Repositories that hold another run's release: refused."""

from __future__ import annotations

import pytest

from pipeline.errors import HubError
from pipeline.publishing.commit import check_destination
from pipeline.publishing.rollback import rollback
from tests.support.fake_runs import REPO, FakeRun, make_run

MIRROR = "ada/tiny-int8"


@pytest.fixture
def other(tmp_path) -> FakeRun:
    """Another run, that somebody points at the same repository."""
    run = make_run(tmp_path / "elsewhere" / "other")
    run.configure(name="other")
    return run


def test_another_runs_repository_is_refused_with_both_names_and_left(hub, finished, other):
    finished.publish()
    commits = hub.commits(REPO)
    line = (
        rf"^{REPO}: holds run 'demo', and this is run 'other'. Try: another repository, or the same name for this run$"
    )
    other.configure(mirrors={"int8": "ada/other-int8"})
    for create_pr in (False, True):
        other.configure(create_pr=create_pr)
        with pytest.raises(HubError, match=line):
            other.publish()
    assert hub.commits(REPO) == commits and not hub.repo(REPO).pull_requests
    with pytest.raises(KeyError):
        hub.repo("ada/other-int8")


def test_a_run_that_was_given_the_same_name_replaces_it(hub, finished, other):
    finished.publish()
    other.configure(name="demo")
    other.publish()
    assert hub.read(REPO, "model.safetensors") == (other.release / "model.safetensors").read_bytes()


def test_the_mirror_of_another_run_is_refused_and_the_main_repository_is_published(hub, finished, other):
    finished.configure(mirrors={"int8": MIRROR})
    finished.publish()
    other.configure(repo="ada/other", mirrors={"int8": MIRROR})
    commits = hub.commits(MIRROR)
    line = rf"{MIRROR}: holds run 'demo' as a mirror of {REPO}, and this is run 'other' as a mirror of ada/other. "
    with pytest.raises(HubError, match=f"^publish.mirrors.int8: {line}Try: another repository$"):
        other.publish()
    assert hub.commits(MIRROR) == commits and MIRROR not in hub.read("ada/other", "README.md").decode()


def test_a_destination_can_be_asked_about_before_there_is_anything_to_publish(hub, finished):
    check_destination("ada/not-there-yet", "demo")
    finished.configure(mirrors={"int8": MIRROR})
    finished.publish()
    check_destination(REPO, "demo")
    check_destination(MIRROR, "demo", mirror_of=REPO)
    for run, mirror_of in (("other", REPO), ("demo", None)):
        with pytest.raises(HubError, match=f"^{MIRROR}: holds run 'demo' as a mirror of {REPO}"):
            check_destination(MIRROR, run, mirror_of)


def test_a_main_repository_is_no_mirror(hub, finished, other):
    finished.publish()
    other.configure(repo="ada/other", mirrors={"int8": REPO})
    with pytest.raises(HubError, match=rf"^publish.mirrors.int8: {REPO}: holds run 'demo', and this is run 'other' as"):
        other.publish()


def test_a_release_under_an_older_name_can_be_gone_back_to(hub, finished, other):
    finished.publish()
    renamed = hub.read(REPO, "tunepress.json").replace(b'"run": "demo"', b'"run": "other"')
    hub.put(REPO, {"tunepress.json": renamed})
    other.publish()
    done = rollback(REPO)
    assert done.tag == "release-1" and b'"run": "demo"' in hub.read(REPO, "tunepress.json")
