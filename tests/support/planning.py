"""A place to plan in, with sizes and speeds."""

from __future__ import annotations

import json

from pipeline.planning.benchmark import ROUNDINGS, Speeds
from pipeline.planning.headers import Tensor
from pipeline.planning.model import Sizes
from tests.support.runs import Place

SPEEDS = Speeds(
    place="this machine",
    train=1e9,
    forward=4e9,
    exact=1e9,
    decode_bytes=1e10,
    rounding={f"{name}/{how}": 1e8 for name, how in ROUNDINGS},
    nf4_bytes=1e8,
    nf4_weights=1e9,
    disk_write=1e8,
    start_seconds=5.0,
)


class Planner(Place):
    """A place with its own caches, so that every written file shows."""

    @property
    def env(self) -> dict[str, str]:
        return {**super().env, "XDG_CACHE_HOME": str(self.folder / "cache")}

    def plan(self, *arguments: str, verb: str = "plan") -> dict:
        """Return the plan of a verb, after comparing its exit code."""
        done = self.tunepress(verb, *arguments, "--json", check=None)
        assert done.returncode in (0, 3), done.stderr
        plan = json.loads(done.stdout)
        assert plan["fits"] == (done.returncode == 0)
        return plan

    def files(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}


def sizes_of(shapes: dict, **more) -> Sizes:
    tensors = {name: Tensor(shape) for name, shape in shapes.items()}
    return Sizes(**{"kind": "folder", "tensors": tensors, "file_bytes": 2 * 10**9, **more})
