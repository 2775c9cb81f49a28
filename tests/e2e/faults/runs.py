"""Tiny runs for fault tests: an undisturbed one, and killed ones."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.config.calibration import CALIBRATED_QUALITY
from tests.e2e.faults.kills import Moment, Timeline, kill_at, left
from tests.e2e.faults.sameness import differences
from tests.support import REPOSITORY
from tests.support.hub import LoopbackHub
from tests.support.runs import TOKEN, Place, write_place

SPY = Path(__file__).parent / "spy"
SETTINGS = {"method": "lora", "variants": ["int4"]}
WHO = {TOKEN: {"name": "ada", "role": "write"}}


@contextmanager
def undisturbed(folder: Path, model: Path, **settings) -> Iterator[tuple[Place, Timeline]]:
    """A finished run, published to a hub of its own, and when its events came; `disk.jsonl` is what the spy saw."""
    with LoopbackHub(folder / "hub", WHO) as hub:
        place = write(folder, model, hub, **settings)
        path = os.pathsep.join((str(REPOSITORY), str(SPY)))
        place.more_env = {"PYTHONPATH": path, "SPY_ON_DISK": str(place.folder / "disk.jsonl")}
        start = time.time()
        place.tunepress("run", place.config.name)
        yield place, Timeline.of(place, start, time.time())


def disturbed(
    folder: Path, model: Path, whole: Place, timeline: Timeline, moments: Sequence[Moment], **settings
) -> tuple[list[bool], list[str]]:
    """A run that is killed at these moments, one after the other, and then resumed.

    Returns:
        Whether each moment came before the end, and in what the result differs from `whole`.
    """
    with LoopbackHub(folder / "hub", WHO) as hub:
        place = write(folder, model, hub, **settings)
        orphans = [kill_at(place, timeline, moment) for moment in moments]
        place.tunepress("run", place.config.name)
        found = [f"process {pid}: did not end by itself" for known in orphans for pid in left(known or [])]
        return [known is not None for known in orphans], [*found, *differences(place, whole)]


def write(
    folder: Path, model: Path, hub: LoopbackHub, method: str, variants: Sequence[str], quality: str = CALIBRATED_QUALITY
) -> Place:
    """A place to work in, with the configuration of a run that trains on the CPU, and makes little of everything."""
    specs = [{"name": "int4", "group_size": 64} if name == "int4" else name for name in variants]
    quantize = {"variants": specs, "quality": quality}
    place = write_place(folder / "work", model, hub, train={"method": method}, quantize=quantize)
    place.patience = 3600.0  # on a machine that has other work, too
    return place
