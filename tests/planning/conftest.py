"""Models on the hub on loopback that have headers and sizes, and no weights: their files are holes."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from functools import cache
from pathlib import Path

import pytest

from tests.config.test_values import MODELS
from tests.support.hub import LoopbackHub
from tests.support.hub.store import Entry
from tests.workflow.conftest import TOKEN, Place

SHARD_BYTES = 3_000_000_000


class Planner(Place):
    """A place whose caches are its own too, so that everything that is written shows."""

    @property
    def env(self) -> dict[str, str]:
        return {**super().env, "XDG_CACHE_HOME": str(self.folder / "cache")}

    def plan(self, *arguments: str) -> dict:
        return self.planned("plan", *arguments)

    def planned(self, *arguments: str) -> dict:
        """What a verb plans; its exit code says whether that fits."""
        done = self.tunepress(*arguments, "--json", check=None)
        assert done.returncode in (0, 3), done.stderr
        plan = json.loads(done.stdout)
        assert plan["fits"] == (done.returncode == 0)
        return plan

    def files(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}


@cache
def shapes_of(recipe: str) -> dict[str, tuple[int, ...]]:
    """Every stored tensor of a recipe's model; no weight is made."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(MODELS[recipe][1])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def put_recipes(hub: LoopbackHub) -> None:
    """The model of every shipped recipe."""
    from pipeline.config.loader import load_config

    for recipe, (_, config) in MODELS.items():
        put_hollow(hub, load_config(recipe).model.source, shapes_of(recipe), config)


def put_hollow(hub: LoopbackHub, repo: str, shapes: dict[str, tuple[int, ...]], config: dict) -> None:
    """A repository whose shards are headers with nothing behind them, and as long as if there were."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if size > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += _bytes(shape)
    names = ["model.safetensors"]
    files = {"config.json": json.dumps(config).encode(), "tokenizer.json": b"{}"}
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        where = {name: file for file, tensors in zip(names, shards, strict=True) for name in tensors}
        files["model.safetensors.index.json"] = json.dumps({"weight_map": where}).encode()
    hub.put(repo, files)
    repository = hub.repo(repo)
    head = repository.resolve("main")
    entries = {name: _hollow(hub, f"{repo}/{name}", tensors) for name, tensors in zip(names, shards, strict=True)}
    commit = repository.add_commit(head, {**head.files, **entries}, title="weights", author=repository.owner)
    repository.move("main", commit)


def _hollow(hub: LoopbackHub, seed: str, tensors: dict[str, tuple[int, ...]]) -> Entry:
    header, position = {}, 0
    for name, shape in tensors.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + _bytes(shape)]}
        position += _bytes(shape)
    text = json.dumps(header).encode()
    name = hashlib.sha256(seed.encode()).hexdigest()
    path: Path = hub.store.blobs.path(name)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)
    return Entry.of_lfs(name, 8 + len(text) + position)


def _bytes(shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)


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
