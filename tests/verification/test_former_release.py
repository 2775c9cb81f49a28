"""A release that version 0.1 wrote still verifies: its lineage and its cards, beside the same models."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.verification import Verdict
from tests.support.releases import Release, told

FORMER = Path(__file__).parent / "release_0_1"  # tunepress.json and the cards, without weights


@pytest.fixture
def former(release) -> Release:
    """The documents of version 0.1 beside the models of today, which have the same bytes and may have other hashes."""
    shutil.copytree(FORMER, release.folder, dirs_exist_ok=True)
    content = release.lineage()
    release.write_lineage(content)
    for path in content["files"]:
        release.own(path)
    return release


def test_former_release_has_no_defect(former):
    found = former.verify()
    assert told(found) == [] and found.exit_code == 0
    right = told(found, Verdict.right)
    assert "figures tunepress.json: agree with each other and with the files" in right
    assert any(line.startswith("files int4/: ") for line in right)


def test_former_release_with_a_changed_figure_has_a_defect(former):
    content = former.lineage()
    content["results"]["int8"]["quality"]["general"]["perplexity"]["value"] *= 2
    former.write_lineage(content)
    assert {line.split(":")[0] for line in told(former.verify())} == {"card README.md", "card int8/README.md"}


def test_former_release_is_measured_again(former):
    found = former.verify(measure=True)
    assert told(found) == []
    assert [line for line in told(found, Verdict.right) if line.startswith("measured int4, general text: perplexity ")]
