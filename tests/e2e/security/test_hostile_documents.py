"""Lineages, cards, answers, launch files and ledgers from anywhere: each is read, or refused in one line."""

from __future__ import annotations

import json

import pytest

from tests.support.audit_watch import TOKEN
from tests.support.hostile import BOMB, DEEP, ESCAPES, PICKLE

LINEAGES = [
    b"", DEEP, PICKLE, b"[]", b"7", b'{"schema": 1}', b'{"files": 7, "documents": 7}',
    b'{"files": {"../x": 1}, "documents": [["a"]], "run": {"a": 1}, "mirror_of": [1]}', b"9" * 6000,
    b'{"files": [{}], "documents": []}',
]  # fmt: skip


@pytest.mark.parametrize("content", LINEAGES, ids=range(len(LINEAGES)))
def test_lineage_is_read_or_refused(survives, content):
    from pipeline.hub.tree import Lineage
    from pipeline.verification.lineage_claims import Malformed, read_claims

    def read():
        found = Lineage.parse(content)
        assert found.run is None or isinstance(found.run, str)
        try:
            read_claims(content)
        except Malformed as error:
            assert str(error)

    survives(read)


CARDS = {
    "object": "!!python/object/apply:os.system ['touch owned']",
    "name": "!!python/name:os.system",
    "bomb": BOMB,
    "cycle": "a: &a [*a]",
    "deep": "a: " + "[" * 1000,
    "no number": "a: !!int x",
    "no number at all": "a: !!int ''",
    "no time": "a: !!timestamp x",
    "list as key": "? [a]\n: b",
    "half a character": 'a: "\\ud800"',
    "huge number": "a: 0x" + "f" * 6000,
    "ours of no kind": "tags: {a: b}\nlicense: [x]\nmodel-index: 7\nlanguage: {}",
    "an index of no kind": "model-index: [7, {results: 7}, {name: [x], results: [7, {source: 7}]}]",
    "twice": "license: a\nlicense: b",
    "escapes": f"license: '{ESCAPES}'",
}  # fmt: skip


OURS = "---\nlicense: mit\ntags:\n- int8\nmodel-index:\n- name: x\n  results: []\n---\n"


@pytest.mark.parametrize("name", CARDS)
def test_card_metadata_is_read_or_refused(survives, place, name):
    from pipeline.models.provenance import read_origin
    from pipeline.publishing.cards.front_matter import merge, only

    survives(lambda: merge("license: mit\ntags: [int8]\n", CARDS[name]))
    survives(lambda: only(CARDS[name], ["license"]))
    (place / "README.md").write_bytes(f"---\n{CARDS[name]}\n---\n".encode("utf-8", "surrogatepass"))
    survives(lambda: read_origin(place, "x", "x"))
    assert not (place / "owned").exists()


@pytest.mark.parametrize(
    "text", ["", "---", "---\n---", "<!--" * 5000, "```" * 5000, ESCAPES, "\ufeff---\na: b\n---", TOKEN]
)
def test_card_text_is_read_or_refused(survives, text):
    from pipeline.publishing.cards.own_text import keep_own_text, our_part, their_part

    def read():
        rendered = f"{OURS}<!-- tunepress:begin -->\nwords\n<!-- tunepress:end -->\n"
        for existing in (text, rendered + text, text + rendered, rendered.replace("end", "begin") + text):
            keep_own_text(rendered, existing)
            our_part(existing), their_part(existing)

    survives(read)


ANSWERS = [
    b"model: !!python/object/apply:os.system ['touch owned']", BOMB.encode(), DEEP, PICKLE, b"model: [*a]",
    b"? [a]\n: b", b"model: !!timestamp x", b"a: &a [*a]", b"model: x\nmodel: y", b"nonsense: x", b"\x00", b"7",
]  # fmt: skip


@pytest.mark.parametrize("content", ANSWERS, ids=range(len(ANSWERS)))
def test_wizard_answers_are_refused(survives, place, content):
    from pipeline.cli.wizard.session import read_answers

    (place / "wizard-answers.yaml").write_bytes(content)
    assert survives(lambda: read_answers(place / "wizard-answers.yaml")) and not (place / "owned").exists()


LAUNCHES = [
    "!!python/object/apply:os.system ['touch owned']", "[" * 1000, "? [a]\n: b", "a: &a [*a]", "7", "{}", "\x00",
    "compute_environment: LOCAL_MACHINE\nnum_processes: '2; touch owned'", "compute_environment: AMAZON_SAGEMAKER",
]  # fmt: skip


@pytest.mark.parametrize("content", LAUNCHES, ids=range(len(LAUNCHES)))
def test_accelerate_file_is_refused(survives, place, content):
    from pipeline.training.accelerate_launch import read_launch

    (place / "launch.yaml").write_text(content)
    assert survives(lambda: read_launch("launch.yaml")) and not (place / "owned").exists()


EMPTY_LEDGER = {"steps": {}, "inputs": {}, "base": None, "comparison": None}


LEDGERS = ["../../private", "/etc/passwd", "release/../../../private", ".."]


@pytest.mark.parametrize("path", LEDGERS)
@pytest.mark.parametrize("folder", ["runs/tiny", "out/.tunepress"])
def test_ledger_with_foreign_files_is_refused(survives, place, path, folder):
    from pipeline.workflow.workspace import Workspace

    (place / "private").write_text("x")
    workspace = Workspace(place / folder)
    workspace.folder.mkdir(parents=True)
    digest = {"sha256": "0" * 64, "size": 1, "mtime_ns": 1}
    entry = {"fingerprint": "", "outputs": {path: digest}, "summary": {}, "finished": 0, "seconds": 0}
    workspace.ledger_path.write_text(json.dumps({**EMPTY_LEDGER, "steps": {"quantize/int8": entry}}))
    assert "damaged" in survives(lambda: workspace.remove("quantize/int8", []))
    assert (place / "private").exists()
