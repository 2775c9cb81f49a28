"""The card of an adapter whose base is in no repository."""

from __future__ import annotations

import json

import pytest

from pipeline.hub.tree import CARD, LINEAGE
from pipeline.publishing.cards import adapter_card
from pipeline.workflow.stages.render import ADAPTER_CARD
from tests.support import sample
from tests.support.fake_runs import REPO


def told(**origin: object) -> str:
    found = sample.results()
    found["origin"] |= origin
    return adapter_card(sample.about(found))


def test_card_says_that_the_adapter_fits_a_reordered_base_only_and_how_to_make_that():
    card = told()
    assert "names no base model" in card and "its 576 channels reordered" in card
    assert "on any other copy of the model it changes the wrong weights" in card
    source = sample.results()["origin"]["source"]
    assert f"tunepress merge {source} {sample.about().repo} --output merged" in card


def test_card_names_a_local_base_without_its_path():
    card = told(source="/home/someone/base", name="base", changes=None)
    assert "(the local folder `base`). The adapter fits this base only." in card
    assert "/home" not in card and "tunepress merge" not in card


def test_release_has_the_card_until_the_base_is_in_a_repository(hub, finished):
    finished.publish()
    assert ADAPTER_CARD in json.loads(hub.read(REPO, LINEAGE))["documents"]
    assert (finished.workspace.release / ADAPTER_CARD).read_bytes() == hub.read(REPO, ADAPTER_CARD)
    origin = finished.workspace.read_measurement("origin")
    finished.workspace.write_measurement("origin", origin | {"hub_id": "org/base"})
    finished.publish()
    assert ADAPTER_CARD not in hub.files(REPO) and not (finished.workspace.release / ADAPTER_CARD).exists()
    assert CARD in hub.files(REPO)


@pytest.mark.parametrize("named, kept", [("org/base", "org/base"), ("/home/me/base", None), (7, None), (None, None)])
def test_adapter_from_elsewhere_keeps_the_repository_that_it_names_as_its_base(tmp_path, named, kept):
    from pipeline.workflow.stages.merge import _own_base

    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": named}))
    config = sample.config(data=None, merge={"adapter": str(tmp_path)})
    assert _own_base(config, tmp_path) == kept
    assert _own_base(sample.config(), tmp_path) is None
