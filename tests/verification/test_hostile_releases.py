"""Hostile releases: nothing of theirs runs, and one line names the reason."""

from __future__ import annotations

import json
import os

import pytest

from pipeline.cli import app
from pipeline.errors import UserError
from pipeline.verification import NoRelease, Verdict, verify
from pipeline.verification.lineage_claims import MOST_BYTES
from pipeline.verification.location import open_place
from pipeline.verification.measure_again import find_texts, refused
from tests.support.releases import line, told

OUTSIDE = ("../secret", "/etc/hostname", "int8/../../secret", "int8//x", "a\\b", "C:x", "", ".", "int8/\u0000", "x/..")


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("where", ["files", "documents"])
def test_name_that_leaves_the_folder_is_refused(release, path, where):
    (release.folder.parent / "secret").write_text("not for you")
    content = release.lineage()
    if where == "files":
        content["files"][path] = {"sha256": "0" * 64, "size": 1}
    else:
        content["documents"].append(path)
    release.write_lineage(content)
    found = release.verify()
    (defect,) = told(found)
    assert defect.startswith("lineage tunepress.json: names a file ") and len(found.findings) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not readable JSON"),
        (b"\xff\xfe{", "not readable JSON"),
        (b"[" * 200_000, "not readable JSON"),
        (b"[]", "not a lineage"),
        (b"{}", "schema None"),
        (b'{"schema": 2}', "schema 2, but this tunepress reads 1"),
        (b'{"schema": 1, "made_with": []}', "has no table 'made_with'"),
        (b" " * (MOST_BYTES + 1), "more than any lineage of ours"),
    ],
)
def test_invalid_lineage_is_refused(release, content, says):
    release.write("tunepress.json", content)
    found = release.verify()
    (defect,) = told(found)
    assert says in defect and found.exit_code == 3 and len(found.findings) == 1


@pytest.mark.parametrize("about", [None, [], {"sha256": "x", "size": 1}, {"sha256": "0" * 64, "size": True}])
def test_file_without_a_hash_is_refused(release, about):
    content = release.lineage()
    content["files"]["config.json"] = about
    release.write_lineage(content)
    assert "has no sha256 and size of 'config.json'" in told(release.verify())[0]


def test_configuration_that_asks_for_code_is_not_read(release):
    content = release.lineage()
    content["configuration"]["model"]["trust_remote_code"] = True
    release.write_lineage(content)
    assert "cannot be read (configuration.model.trust_remote_code" in told(release.verify())[0]


@pytest.mark.parametrize(
    "value", ["a text", [], 7, {"quality": []}, {"size_bytes": "7"}, {"quality": {"general": {"perplexity": "7"}}}]
)
def test_results_of_any_form_give_one_defect(release, value):
    content = release.lineage()
    content["results"]["int8"] = content["results"]["origin"] = value
    release.write_lineage(content)
    found = release.verify()
    (defect,) = told(found)
    assert defect.startswith("lineage tunepress.json: cannot be read (results.") and "not checked" in defect


def test_model_that_names_its_own_code_is_not_loaded(release):
    config = json.loads(release.read("int8/config.json"))
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    release.write("int8/config.json", json.dumps(config))
    release.own("int8/config.json")
    place, claims = opened(release)
    assert refused(claims, place, "int8").endswith(
        "code of its own, which is never run; use one that transformers knows"
    )


def test_pickle_that_the_lineage_names_is_refused(release):
    release.write("int8/extra.bin", b"x")
    release.own("int8/extra.bin")
    assert "never writes and never loads" in told(release.verify())[0]


def test_local_files_are_not_read_for_a_lineage_from_elsewhere(release):
    private = release.folder.parent / "private.txt"
    private.write_text("private words " * 100)
    content = release.lineage()
    content["configuration"]["evaluate"]["general"] = str(private)
    release.write_lineage(content)
    place, claims = opened(release)
    texts = find_texts(claims, place, release.folder.parent / "scratch")
    assert texts.names == () and "is not part of a release" in texts.problems["general"]


def test_findings_contain_no_control_characters(release):
    release.replace("README.md", "## Limits", "## Limits \x1b]0;owned\x07[red]")
    found = release.verify()
    assert told(found) and not any("\x1b" in line or "\x07" in line for line in told(found))


def test_pipe_instead_of_a_file_does_not_block(release):
    (release.folder / "int4/config.json").unlink()
    os.mkfifo(release.folder / "int4/config.json")
    assert told(release.verify()) == ["files int4/config.json: missing"]


def test_empty_folder_is_refused(tmp_path, capsys):
    with pytest.raises(NoRelease, match="has no tunepress.json"):
        verify(str(tmp_path))
    with pytest.raises(UserError, match="neither a folder here nor a repository") as error:
        verify("no such/thing/at all")
    assert error.value.exit_code == 2
    with pytest.raises(UserError, match="a folder has no revisions"):
        app(["verify", str(tmp_path), "--revision", "main"])


def test_invalid_lineage_stops_measuring(release):
    release.write("tunepress.json", b"[]")
    assert [line(f) for f in release.verify(measure=True).findings if f.verdict is not Verdict.wrong] == []


def opened(release):
    from pipeline.verification.lineage_claims import read_claims

    place = open_place(str(release.folder), None, lambda done, total, what: None)
    return place, read_claims(place.lineage())
