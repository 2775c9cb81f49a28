"""Variants published into the repository of their own source model."""

from __future__ import annotations

import json

import pytest

from pipeline.errors import HubError
from pipeline.publishing.cards.own_text import END, START
from pipeline.publishing.rollback import rollback
from tests.support.fake_runs import BOTH, REPO, SOURCE_CARD, SOURCE_FILES


def split(card: bytes) -> tuple[bytes, bytes]:
    """(what is not ours, our section)"""
    before, _, after = card.partition(START.encode())
    section, _, after = after.partition(END.encode())
    return before + after, section


def test_a_card_that_was_there_gains_a_section_and_loses_no_byte(hub, guest):
    hub.put(REPO, {"README.md": SOURCE_CARD})
    guest.publish()
    theirs, section = split(hub.read(REPO, "README.md"))
    assert theirs.startswith(SOURCE_CARD) and not theirs[len(SOURCE_CARD) :].strip()
    assert b"\n## Quantized variants\n" in section and b"\n# " not in section
    assert guest.publish()["bytes_sent"] == 0


def test_later_author_edits_stay_and_only_our_section_is_updated(hub, guest):
    hub.put(REPO, {"README.md": SOURCE_CARD})
    guest.publish()
    edited = hub.read(REPO, "README.md").replace(b"license: mit  # ours", b"license:   apache-2.0") + b"\nMore.\n"
    hub.put(REPO, {"README.md": edited})
    guest.publish(("int8",))
    card = hub.read(REPO, "README.md")
    assert split(card)[0] == split(edited)[0] and b"`int4/`" not in split(card)[1]
    assert set(SOURCE_FILES) <= set(hub.files(REPO)) and "int4/model.safetensors" not in hub.files(REPO)


def test_a_repository_without_a_card_gets_a_whole_one_that_is_kept_up_to_date(hub, guest):
    guest.publish(("int8",))
    guest.make_variant("int4")
    card = hub.read(REPO, "README.md").decode()
    assert "library_name: transformers" in card and f"\n# {REPO}\n" in card and card.count("\n# ") == 1
    assert "base_model" not in card  # it would be its own
    guest.publish()
    card = hub.read(REPO, "README.md").decode()
    assert card.count(START) == 1 and "- int4\n" in card and "perplexity of int4" in card
    assert guest.publish()["bytes_sent"] == 0


def test_a_rollback_takes_back_the_section_and_not_its_authors_metadata(hub, guest):
    hub.put(REPO, {"README.md": SOURCE_CARD})
    guest.configure(quantize={"variants": ["int8"]})
    guest.publish(("int8",))
    section = split(hub.read(REPO, "README.md"))[1]
    guest.configure(quantize={"variants": list(BOTH)})
    guest.make_variant("int4")
    guest.publish()
    edited = hub.read(REPO, "README.md").replace(b"license: mit  # ours", b"license:   apache-2.0")
    hub.put(REPO, {"README.md": edited})
    assert rollback(REPO).tag == "release-1"
    assert split(hub.read(REPO, "README.md")) == (split(edited)[0], section)
    assert set(SOURCE_FILES) <= set(hub.files(REPO)) and "int4/model.safetensors" not in hub.files(REPO)


def test_picture_is_not_put_into_a_foreign_repository(hub, guest):
    guest.publish()
    assert not [name for name in hub.files(REPO) if name.startswith("assets/")]
    assert "README.md" in json.loads(hub.read(REPO, "tunepress.json"))["documents"]


def test_variants_alone_never_take_the_place_of_a_release_with_a_model(hub, finished, guest):
    """Though both runs have the same name, as they have when they are called after the repository."""
    hub.put(REPO, dict.fromkeys(SOURCE_FILES))
    finished.publish()
    before = hub.commits(REPO)
    guest.configure(name=finished.config.name)
    with pytest.raises(HubError, match="with a model at the root, and this release has variants only"):
        guest.publish()
    assert hub.commits(REPO) == before
