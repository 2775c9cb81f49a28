"""Removals from a repository: nothing leaves it unless a person agreed."""

from __future__ import annotations

import pytest

from pipeline.errors import HubError
from pipeline.publishing.commit import check_destination
from pipeline.publishing.removal import NO_REMOVAL, Removal
from pipeline.workflow.kept_variants import note_removal
from tests.support.fake_runs import MIRROR, REPO

ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"theirs", "notes.txt": b"theirs too"}


def test_variants_of_the_repository_that_the_configuration_lacks_stop_a_publish(hub, finished):
    finished.publish()
    files = hub.files(REPO)
    finished.configure(quantize={"variants": ["int8"]})
    for work in (lambda: finished.publish(("int8",)), lambda: check_destination(REPO, "demo", asked=["int8"])):
        with pytest.raises(HubError, match=f"^{REPO}: has int4, which .* or --remove int4$"):
            work()
    assert hub.files(REPO) == files


@pytest.mark.parametrize("agreed", [Removal(("int4",)), Removal(others=True)])
def test_agreed_removal_is_done_and_told_once(hub, finished, agreed):
    finished.publish()
    finished.configure(quantize={"variants": ["int8"]})
    note_removal(finished.workspace, agreed)
    assert finished.publish(("int8",))["removed"] == "int4"
    assert not [path for path in hub.files(REPO) if path.startswith("int4/")]
    assert finished.workspace.read_ledger().removal == NO_REMOVAL
    assert "removed" not in finished.publish(("int8",))


def test_adapter_of_others_at_the_root_is_refused_before_any_work(hub, finished):
    hub.put(REPO, ADAPTER)
    files = hub.files(REPO)
    for work in (finished.publish, lambda: check_destination(REPO, "demo", asked=["int8", "int4"])):
        with pytest.raises(HubError, match=f"^{REPO}: has an adapter .*adapter_config.json.* Try: --replace-adapter"):
            work()
    assert hub.files(REPO) == files


def test_adapter_of_others_is_removed_with_consent(hub, finished):
    hub.put(REPO, ADAPTER)
    note_removal(finished.workspace, Removal(adapter=True))
    assert finished.publish()["removed"] == "adapter_config.json, adapter_model.safetensors"
    files = set(hub.files(REPO))
    assert "notes.txt" in files and not files & {"adapter_config.json", "adapter_model.safetensors"}
    assert "adapter/adapter_config.json" in files


def test_adapter_at_the_root_of_a_mirror_is_refused(hub, mirrored):
    hub.put(MIRROR, ADAPTER)
    with pytest.raises(HubError, match=f"^publish.mirrors.int8: {MIRROR}: has an adapter"):
        mirrored.publish()
