"""Releases of earlier versions still verify: their lineage and their cards, beside the same models."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.verification import Verdict
from tests.support.releases import Release, told
from tests.verification.test_defects import figure

FORMER = ("release_0_1", "release_0_2")  # folders with tunepress.json and the cards, without weights


@pytest.fixture(params=FORMER)
def former(release, request) -> Release:
    """The documents of an earlier version beside today's models: the same bytes, perhaps other hashes."""
    shutil.copytree(Path(__file__).parent / request.param, release.folder, dirs_exist_ok=True)
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


def test_former_card_with_a_changed_figure_has_a_defect(former):
    right = figure(former, "int4/README.md")
    former.replace("int4/README.md", f"| {right} |", "| 1.0 ± 0.1 |")
    assert any("1.0 ± 0.1" in line for line in told(former.verify()))


def test_former_release_is_measured_again(former):
    found = former.verify(measure=True)
    assert told(found) == []
    assert [line for line in told(found, Verdict.right) if line.startswith("measured int4, general text: perplexity ")]
