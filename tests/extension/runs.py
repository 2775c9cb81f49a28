"""Runs with what a module of this folder adds."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import yaml

from tests.support import REPOSITORY
from tests.support.runs import Place
from tests.support.texts import general_text

SITE = Path(__file__).parent / "site"


def quantizing(folder: Path, model: Path, variant: object, *extensions: ModuleType) -> Place:
    """Write `tiny.yaml`, which makes and measures one variant; its commands register the extensions first."""
    (folder / "general.txt").write_text(general_text())
    tree = {
        "name": "tiny",
        "model": {"source": str(model)},
        "data": None,
        "evaluate": {"general": "general.txt", "max_tokens": 512, "prompts": []},
        "quantize": {"variants": variant if isinstance(variant, list) else [variant], "on_gate_failure": "warn"},
        "track": {"project": "tests"},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return with_extensions(Place(folder), *extensions)


def with_extensions(place: Place, *extensions: ModuleType) -> Place:
    """Return `place`, whose commands register the extensions first, in all of their processes."""
    place.more_env["PYTHONPATH"] = os.pathsep.join((str(REPOSITORY), str(SITE)))
    place.more_env["EXTENSIONS"] = ",".join(module.__name__ for module in extensions)
    return place
