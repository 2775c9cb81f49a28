"""The folder of GGUF variants: one card, Modelfile and license, and variants that leave one by one."""

from __future__ import annotations

import json

import pytest

from tests.support import sample
from tests.support.fake_runs import BOTH, REPO, TERMS, WITH_GGUF, FakeRun

gguf = pytest.importorskip("gguf")

MIRROR = "ada/tiny-q4_0"
Q8_0, Q4_0 = sample.GGUF


def in_gguf(hub, repo: str = REPO) -> set[str]:
    return {name.removeprefix("gguf/") for name in hub.files(repo) if name.startswith("gguf/")}


def here(run: FakeRun) -> set[str]:
    return {path.name for path in (run.release / "gguf").iterdir()}


def test_gguf_variants_share_folder_card_and_modelfile(hub, shared):
    shared.publish(WITH_GGUF)
    files = {"demo-Q8_0.gguf", "demo-Q4_0.gguf", "LICENSE", "README.md", "Modelfile"}
    assert in_gguf(hub) == here(shared) == files
    assert not [name for name in hub.files(REPO) if name.startswith("gguf-")]
    card = hub.read(REPO, "gguf/README.md").decode()
    assert "**`gguf/` Q8_0**" in card and "**`gguf/` Q4_0**" in card
    said = hub.read(REPO, "gguf/Modelfile").decode()
    assert said.startswith("FROM ./demo-Q8_0.gguf\n# FROM ./demo-Q4_0.gguf\n") and 'stop "[/]"' in said
    assert '"{{ range .Messages }}[{{ .Role }}]{{ .Content }}[/]{{ end }}[assistant]"' in said
    lineage = json.loads(hub.read(REPO, "tunepress.json"))
    assert {"gguf/demo-Q8_0.gguf", "gguf/demo-Q4_0.gguf", "gguf/LICENSE"} <= set(lineage["files"])
    assert {"gguf/README.md", "gguf/Modelfile"} <= set(lineage["documents"])
    commits = hub.commits(REPO)
    assert shared.publish(WITH_GGUF)["files_sent"] == 0 and hub.commits(REPO) == commits


def test_edited_modelfile_is_kept_beside_the_new_one(hub, shared):
    shared.publish(WITH_GGUF)
    path, mine = shared.release / "gguf/Modelfile", "PARAMETER num_ctx 8192\n"
    path.write_text(path.read_text() + mine)
    shared.publish(WITH_GGUF)
    assert (shared.release / "gguf/Modelfile.local").read_text().endswith(mine) and mine not in path.read_text()
    shared.publish((Q8_0, "int8"))
    assert not list((shared.release / "gguf").glob("Modelfile.local2"))
    assert not [name for name in hub.files(REPO) if ".local" in name]


def test_leaving_gguf_variant_takes_only_its_own_files(hub, shared):
    shared.publish(WITH_GGUF)
    shared.publish(("int8", Q8_0))
    assert in_gguf(hub) == here(shared) == {"demo-Q8_0.gguf", "LICENSE", "README.md", "Modelfile"}
    assert "Q4_0" not in hub.read(REPO, "gguf/README.md").decode() + hub.read(REPO, "gguf/Modelfile").decode()
    assert hub.read(REPO, "gguf/LICENSE") == TERMS
    assert shared.workspace.holds(f"quantize/{Q8_0}", f"quantize/{Q8_0}")


def test_last_gguf_variant_takes_the_folder(hub, shared):
    shared.publish(WITH_GGUF)
    assert "gguf" in json.loads(hub.read(REPO, "tunepress.json"))["made_with"]
    shared.publish(("int8",))
    assert "gguf" not in json.loads(hub.read(REPO, "tunepress.json"))["made_with"]
    assert in_gguf(hub) == set() and not (shared.release / "gguf").exists()
    assert "gguf/" not in hub.read(REPO, "README.md").decode()


def test_user_text_stays_when_gguf_variants_leave(hub, shared):
    shared.publish(WITH_GGUF)
    hub.put(REPO, {"gguf/README.md": hub.read(REPO, "gguf/README.md") + b"\n## Hers\n"})
    shared.publish(("int8", Q8_0))
    assert hub.read(REPO, "gguf/README.md").endswith(b"\n## Hers\n")
    for name, mine in (("README.md", "\nMine.\n"), ("Modelfile", "PARAMETER num_ctx 4096\n")):
        path = shared.release / "gguf" / name
        path.write_text(path.read_text() + mine)
    shared.publish(("int8",))
    assert here(shared) == {"README.md", "Modelfile"}


def test_a_modelfile_that_was_there_before_is_refused_and_left(hub, shared):
    from pipeline.errors import HubError

    hub.put(REPO, {"gguf/Modelfile": b"FROM ./mine.gguf\n"})
    with pytest.raises(HubError, match="tunepress did not put gguf/Modelfile there"):
        shared.publish(WITH_GGUF)
    assert hub.read(REPO, "gguf/Modelfile") == b"FROM ./mine.gguf\n"


def test_a_mirror_has_one_of_them_at_its_root(hub, shared):
    shared.configure(mirrors={Q4_0: MIRROR})
    shared.publish(WITH_GGUF)
    files = {"demo-Q4_0.gguf", "LICENSE", "README.md", "Modelfile", "tunepress.json", ".gitattributes"}
    assert set(hub.files(MIRROR)) == files
    assert hub.read(MIRROR, "demo-Q4_0.gguf") == hub.read(REPO, "gguf/demo-Q4_0.gguf")
    assert hub.read(MIRROR, "Modelfile").startswith(b"FROM ./demo-Q4_0.gguf\n\n")
    assert MIRROR in hub.read(REPO, "gguf/README.md").decode()


def test_new_gguf_replaces_only_its_own_files(shared, tmp_path):
    made = tmp_path / "quantized"
    made.mkdir()
    (made / "demo-Q4_0.gguf").write_bytes(b"new")
    theirs = shared.release / "gguf" / "other.safetensors"
    theirs.write_bytes(b"theirs")
    shared.workspace.place(made, shared.release / "gguf", f"quantize/{Q4_0}")
    assert here(shared) == {"demo-Q4_0.gguf", "demo-Q8_0.gguf", "LICENSE", "other.safetensors"}
    assert (shared.release / "gguf" / "LICENSE").read_bytes() == TERMS


def test_gguf_file_decides_whether_the_card_shows_chat(hub, shared):
    from pipeline.workflow.stages.render import render

    documents = render(shared.config, shared.workspace, (Q4_0,), lambda path: None)
    assert "create_chat_completion" in documents["gguf/README.md"].decode()
    assert BOTH[0] not in documents["README.md"].decode()
