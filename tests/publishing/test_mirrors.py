"""Mirrors: a variant in a repository of its own, beside the main one."""

from __future__ import annotations

import json

import pytest

from pipeline.errors import HubError
from pipeline.system.files import fingerprint
from pipeline.tracking.events import Events
from pipeline.workflow.stages import measure_variant, publish
from pipeline.workflow.workspace import Entry
from tests.support.fake_runs import MIRROR, REPO, sent_bytes, uploads


def test_the_variant_is_at_the_root_with_a_card_and_a_lineage_of_its_own(hub, mirrored):
    mirrored.publish()
    files = {"config.json", "tokenizer.json", "model.safetensors", "README.md", "tunepress.json", ".gitattributes"}
    assert set(hub.files(MIRROR)) == files
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert hub.read(MIRROR, name) == hub.read(REPO, f"int8/{name}")
    lineage = json.loads(hub.read(MIRROR, "tunepress.json"))
    assert {*lineage["files"], *lineage["documents"], "tunepress.json", ".gitattributes"} == files
    assert lineage["mirror_of"] == REPO and "int4" not in lineage["results"]
    assert MIRROR in hub.read(REPO, "README.md").decode() and REPO in hub.read(MIRROR, "README.md").decode()


def test_mirror_of_a_withheld_variant_is_reported(hub, mirrored):
    mirrored.publish()
    config, workspace, shown = mirrored.config, mirrored.workspace, []
    workspace.remove("quantize/int8", ())
    depends_on = fingerprint(measure_variant.depends(config, workspace, ("int8",)))
    workspace.record("quantize/int8", Entry(depends_on, {}, {"withheld": "it lost too much"}))
    publish.run(config, workspace, Events(workspace.events_path, config.name, on_show=shown.extend), ("int4",))
    assert "int8/model.safetensors" not in hub.files(REPO) and "model.safetensors" in hub.files(MIRROR)
    assert shown == [f"{MIRROR}: still has int8 of an earlier release, which is withheld now; remove it there"]


def test_mirror_that_failed_is_not_linked(hub, mirrored):
    hub.store.create("model", REPO)
    hub.fault(r"POST /api/repos/create", status=403)
    with pytest.raises(HubError, match=rf"^publish.mirrors.int8: {MIRROR}: this token cannot write here"):
        mirrored.publish()
    assert "int8/model.safetensors" in hub.files(REPO) and MIRROR not in hub.read(REPO, "README.md").decode()
    mirrored.publish()
    assert MIRROR in hub.read(REPO, "README.md").decode()


def test_outdated_mirror_is_still_linked(hub, mirrored):
    mirrored.publish()
    mirrored.make("quantize/int8", {"int8/config.json": b"changed"})
    hub.fault(rf"POST .*{MIRROR}/commit/", status=403)
    with pytest.raises(HubError, match="publish.mirrors.int8"):
        mirrored.publish()
    assert hub.read(REPO, "int8/config.json") == b"changed" and MIRROR in hub.read(REPO, "README.md").decode()


def test_a_card_of_a_mirror_that_is_no_text_keeps_nothing_else_back(hub, mirrored):
    hub.put(MIRROR, {"README.md": b"# Caf\xe9\n"})
    with pytest.raises(HubError, match="publish.mirrors.int8: .*not UTF-8"):
        mirrored.publish()
    assert "int8/model.safetensors" in hub.files(REPO) and hub.read(MIRROR, "README.md") == b"# Caf\xe9\n"


@pytest.mark.parametrize("private", [True, False])
def test_mirror_has_the_visibility_of_the_main_repository(hub, mirrored, private):
    hub.put(REPO, {"notes.md": b"mine"}, private=private)
    mirrored.configure(private=not private)
    mirrored.publish()
    assert hub.repo(MIRROR).private == private


def test_mirror_is_sent_and_reported_once(hub, mirrored):
    mirrored.publish()
    commits, requests = (hub.commits(REPO), hub.commits(MIRROR)), len(hub.requests)
    assert mirrored.publish()["files_sent"] == 0
    assert (hub.commits(REPO), hub.commits(MIRROR)) == commits and sent_bytes(hub, requests) == 0
    pushed = mirrored.events("quantized_model_pushed")
    assert [(e["variant"], e["commit"]) for e in pushed if e["repo"] == MIRROR] == [("int8", commits[1][0])]
    assert len([e for e in pushed if e["repo"] == REPO]) == 2


def test_change_of_another_variant_leaves_the_mirror(hub, mirrored):
    mirrored.publish()
    commits = hub.commits(MIRROR)
    mirrored.make("quantize/int4", {"int4/config.json": b"changed"})
    mirrored.publish()
    assert hub.commits(MIRROR) == commits


def test_text_by_hand_stays_in_its_card(hub, mirrored):
    mirrored.publish()
    hub.put(MIRROR, {"README.md": hub.read(MIRROR, "README.md") + b"\n## Mine\n", "notes.md": b"mine"})
    commits = hub.commits(MIRROR)
    mirrored.publish()
    assert hub.commits(MIRROR) == commits
    mirrored.make("quantize/int8", {"int8/config.json": b"changed"})
    mirrored.publish()
    assert hub.read(MIRROR, "README.md").endswith(b"\n## Mine\n") and hub.read(MIRROR, "notes.md") == b"mine"


def test_a_mirror_that_fails_is_named_and_keeps_nothing_else_back(hub, mirrored):
    hub.put(MIRROR, {"config.json": b"mine"})
    mirrored.configure(mirrors={"int8": MIRROR, "int4": "ada/tiny-int4"})
    with pytest.raises(HubError, match=rf"^publish.mirrors.int8: {MIRROR}: tunepress did not put config.json there"):
        mirrored.publish()
    assert "int8/model.safetensors" in hub.files(REPO) and "model.safetensors" in hub.files("ada/tiny-int4")
    assert list(hub.repo(REPO).tags) == ["release-1"] and mirrored.events("merged_model_pushed")
    hub.put(MIRROR, {"config.json": None})
    requests = len(hub.requests)
    mirrored.publish()
    assert "model.safetensors" in hub.files(MIRROR) and uploads(hub, requests) == [3000]


def test_foreign_mirror_is_refused_with_its_key(hub, mirrored):
    mirrored.configure(mirrors={"int8": "bob/tiny"})
    with pytest.raises(HubError, match=r"^publish.mirrors.int8: bob/tiny: .*cannot write to bob/"):
        mirrored.publish()
    assert "README.md" in hub.files(REPO)


def test_a_finished_release_is_tagged_in_the_mirror_too(hub, mirrored):
    mirrored.publish(("int8",))
    assert not hub.repo(MIRROR).tags
    mirrored.make_variant("int4")
    mirrored.publish()
    assert hub.repo(MIRROR).tags == {"release-1": hub.commits(MIRROR)[0]}


def test_a_pull_request_is_opened_in_each(hub, mirrored):
    mirrored.configure(create_pr=True)
    mirrored.publish()
    assert "model.safetensors" in hub.files(MIRROR, "refs/pr/1") and "README.md" not in hub.files(MIRROR)
    requests = len(hub.requests)
    mirrored.publish()
    assert sent_bytes(hub, requests) == 0 and list(hub.repo(MIRROR).pull_requests) == [1]
