"""Weights that a calibration has rounded, on disk: one file for each block of each variant."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from pipeline.errors import QuantizationError
from pipeline.models.checkpoint import Checkpoint
from pipeline.quantization.equivalences.folding import FoldedPowers
from pipeline.quantization.grid import Grid, GroupQuantized
from pipeline.quantization.input_range import InputRange
from pipeline.quantization.statistics import Statistics
from pipeline.system.files import sync

_PARTS = ("codes", "scale", "zero")
_MOMENTS, _TOKENS, _COUNTS, _LARGEST = "second_moments", "tokens", "counts", "largest"
_DIVIDED, _MULTIPLIED = "divided", "multiplied"  # exponents of the smoothing


def save_block(folder: Path, block: int, weights: Mapping[str, GroupQuantized]) -> None:
    """Write the rounded weights of one block as a whole, or not at all."""
    tensors = {
        f"{name}:{part}": tensor.contiguous()
        for name, weight in weights.items()
        for part in _PARTS
        if (tensor := getattr(weight, part)) is not None
    }
    save_whole(tensors, folder / f"block-{block:04}.safetensors")


def save_whole(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a file of tensors under a temporary name, and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    save_file(dict(tensors), partial)
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


class RoundedFolder:
    """The rounded weights of a variant, read by rows when they are written in its format."""

    def __init__(self, folder: Path):
        self._checkpoint = Checkpoint.of_files(sorted(folder.glob("block-*.safetensors")))

    def __contains__(self, name: object) -> bool:
        return f"{name}:{_PARTS[0]}" in self._checkpoint

    def rows(self, name: str, grid: Grid, first: int, stop: int) -> GroupQuantized:
        """Return rows of a weight.

        Raises:
            QuantizationError: if it was rounded on another grid.
        """
        parts = {
            part: self._checkpoint.read_rows(key, first, stop)
            for part in _PARTS
            if (key := f"{name}:{part}") in self._checkpoint
        }
        made = GroupQuantized(parts["codes"], parts["scale"], parts.get("zero"), grid)
        groups = made.codes.shape[1] // grid.group(made.codes.shape[1])
        if made.scale.shape[1] != groups or made.scale.dtype != grid.scale_dtype:
            raise QuantizationError(f"{name}: was calibrated on another grid. Try: remove the run's calibration/")
        return made


def statistics_as_tensors(collected: Mapping[str, Statistics]) -> dict[str, torch.Tensor]:
    """Return second moments, numbers of tokens and ranges as tensors for a file; Gram matrices are not kept."""
    found: dict[str, torch.Tensor] = {}
    for name, of in collected.items():
        found[f"{name}:{_MOMENTS}"] = of.second_moments.cpu().clone()  # a file holds no shared memory
        found[f"{name}:{_TOKENS}"] = torch.tensor(of.tokens)
        if of.range is not None:
            found[f"{name}:{_COUNTS}"] = of.range.counts.cpu().clone()
            found[f"{name}:{_LARGEST}"] = of.range.largest.cpu().clone()
    return found


def statistics_from(tensors: Mapping[str, torch.Tensor]) -> dict[str, Statistics]:
    """Return the statistics of layers that such tensors hold, by the name of the weight."""
    names = [key.removesuffix(f":{_MOMENTS}") for key in tensors if key.endswith(f":{_MOMENTS}")]
    found = {}
    for name in names:
        counts, largest = tensors.get(f"{name}:{_COUNTS}"), tensors.get(f"{name}:{_LARGEST}")
        sizes = None if counts is None or largest is None else InputRange(counts, largest)
        found[name] = Statistics(int(tensors[f"{name}:{_TOKENS}"]), tensors[f"{name}:{_MOMENTS}"], range=sizes)
    return found


def powers_as_tensors(powers: FoldedPowers) -> dict[str, torch.Tensor]:
    """Return the powers of a smoothing as tensors for a file."""
    parts = {_DIVIDED: powers.divided, _MULTIPLIED: powers.multiplied}
    return {f"{name}:{part}": tensor.clone() for part, of in parts.items() for name, tensor in of.items()}


def powers_from(tensors: Mapping[str, torch.Tensor]) -> FoldedPowers:
    """Return the powers of a smoothing that such tensors hold."""

    def part(kind: str) -> dict[str, torch.Tensor]:
        return {key.removesuffix(f":{kind}"): tensors[key] for key in tensors if key.endswith(f":{kind}")}

    return FoldedPowers(part(_DIVIDED), part(_MULTIPLIED))


def read_statistics(path: Path) -> tuple[dict[str, Statistics], FoldedPowers]:
    """Return the statistics in a file, by the name of the weight, and the smoothing of their ranges."""
    checkpoint = Checkpoint.of_files([path])
    tensors = {name: checkpoint.read(name) for name in checkpoint}
    return statistics_from(tensors), powers_from(tensors)


class RoundedLayers(Mapping[str, GroupQuantized]):
    """The rounded weights of a variant by name, each read when it is asked for.

    Args:
        folder: the weights.
        grids: shape (N, K) and grid of each of them.
    """

    def __init__(self, folder: RoundedFolder, grids: Mapping[str, tuple[tuple[int, int], Grid]]):
        self._folder, self._grids = folder, {name: of for name, of in grids.items() if name in folder}

    def __getitem__(self, name: str) -> GroupQuantized:
        shape, grid = self._grids[name]
        return self._folder.rows(name, grid, 0, shape[0])

    def __contains__(self, name: object) -> bool:
        return name in self._grids

    def __iter__(self) -> Iterator[str]:
        return iter(self._grids)

    def __len__(self) -> int:
        return len(self._grids)
