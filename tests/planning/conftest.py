"""A hub with the models of the shipped recipes, and a place to plan in."""

from __future__ import annotations

import pytest

from tests.support.hub import LoopbackHub
from tests.support.planning import Planner
from tests.support.recipes import put_recipes
from tests.support.runs import TOKEN


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub with the model of every shipped recipe."""
    with LoopbackHub(tmp_path_factory.mktemp("hub"), {TOKEN: {"name": "ada", "role": "write"}}) as hub:
        put_recipes(hub)
        yield hub


@pytest.fixture
def place(hub, tmp_path) -> Planner:
    folder = tmp_path / "work"
    folder.mkdir()
    return Planner(folder, hub)
