"""A LoRA adapter, applied to the tensors of its base model a few rows at a time.

The adapter is never held in memory. The factors of a weight are read together with its rows, so that an adapter of high
rank costs no more than one of low rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import ModelError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.checkpoint.row_blocks import tiles

PREFIX = "base_model.model."
# What an adapter may carry beyond this; none of it is merged here.
_UNHANDLED = (
    "fan_in_fan_out", "layer_replication", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
    "velora_config", "monteclora_config", "ensure_weight_tying",
    "megatron_config",  # names a module, which peft imports
)  # fmt: skip
# Ways to begin that leave the base as it is; the others (PiSSA, OLoRA, LoftQ, ...) change it.
_PLAIN_BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")
_PART = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector)")


@dataclass(frozen=True)
class Change:
    """The change of a weight (N, K) to W + scale * B @ A; with DoRA, rows are then scaled to learned lengths.

    `a` (r, K), `b` (N, r) and `magnitude` (N,) are names in the adapter's file.
    """

    a: str
    b: str
    scale: float
    magnitude: str | None = None


@dataclass(frozen=True)
class Adapter:
    """The changes of a peft LoRA adapter, by the names of the tensors that change.

    Attributes:
        changes: weights to which a product of factors is added.
        shifts: biases to which a vector is added: (name in the file, scale).
        replaced: tensors that were trained whole: name in the file.
        dtype: the type in which products are added, before the result is rounded to bf16.
    """

    tensors: Checkpoint
    changes: dict[str, Change] = field(default_factory=dict)
    shifts: dict[str, tuple[str, float]] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    @classmethod
    def read(cls, folder: Path, dtype: torch.dtype = torch.float32) -> Adapter:
        """Read a peft LoRA adapter, whose products are added in `dtype`.

        Raises:
            ModelError: naming what it carries that is not handled, rather than leaving it out.
        """
        config = _config(folder)
        tensors = Checkpoint.of_files([folder / "adapter_model.safetensors"])
        parts, replaced = _sorted_out(folder, config, tensors)
        changes, shifts = {}, {}
        for module, names in parts.items():
            rank, scale = _rank_and_scale(folder, config, module)
            shapes = {part: tensors[name].shape for part, name in names.items()}
            _check_shapes(folder, config, module, shapes, rank)
            magnitude = names.get("lora_magnitude_vector")
            changes[f"{module}.weight"] = Change(names["lora_A.weight"], names["lora_B.weight"], scale, magnitude)
            if bias := names.get("lora_B.bias"):
                shifts[f"{module}.bias"] = (bias, scale)
        return cls(tensors, changes, shifts, replaced, dtype)

    @classmethod
    def of_whole_model(cls, folder: Path, base: Mapping[str, Any], tied_rows: int | None) -> Adapter:
        """Return the change to the trained weights in a folder, of which each replaces a tensor of the base.

        Tensors of the base that the model does not use stay as they are.

        Args:
            folder: the trained weights, as transformers writes a model.
            base: the tensors of the base by name, each with its shape.
            tied_rows: the size of the vocabulary if the output head is the embedding. Some bases store this table
                twice, transformers does not.
        """
        tensors = Checkpoint(folder)
        replaced = {name: name for name in tensors}
        if tied_rows is not None:
            tables = [name for name, info in tensors.items() if info.shape[:1] == (tied_rows,)]
            for name in base.keys() - tensors.keys():
                if tables and base[name].shape == tensors[tables[0]].shape:
                    replaced[name] = tables[0]
        return cls(tensors, replaced=replaced)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every changed tensor with the shape that it must have."""
        of = self.tensors
        return {
            **{name: of[stored].shape for name, stored in self.replaced.items()},
            **{name: of[stored].shape for name, (stored, _) in self.shifts.items()},
            **{name: (of[c.b].shape[0], of[c.a].shape[1]) for name, c in self.changes.items()},
        }

    def apply(self, name: str, rows: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Return rows of a tensor, from row `first` on, with the adapter applied, rounded once to bf16."""
        stop = first + len(rows) if rows.ndim else 0
        if name in self.replaced:
            rows = self.tensors.read_rows(self.replaced[name], first, stop)
        if name in self.shifts:
            stored, scale = self.shifts[name]
            rows = rows.float() + scale * self._rows(stored, first, stop)
        if name in self.changes:
            return self._changed(self.changes[name], rows, first)
        return rows.to(torch.bfloat16) if rows.is_floating_point() else rows

    def _changed(self, change: Change, rows: torch.Tensor, first: int) -> torch.Tensor:
        a, b = self.tensors.read(change.a).float(), self._rows(change.b, first, first + len(rows))
        length = self._rows(change.magnitude, first, first + len(rows)) if change.magnitude else None
        result = torch.empty(rows.shape, dtype=torch.bfloat16)
        for start, stop in tiles(*rows.shape):
            weight = with_product(rows[start:stop], a, b[start:stop], change.scale, self.dtype)
            if length is not None:
                weight *= (length[start:stop] / torch.linalg.vector_norm(weight, dim=1)).unsqueeze(1)
            result[start:stop] = weight
        return result

    def _rows(self, stored: str, first: int, stop: int) -> torch.Tensor:
        return self.tensors.read_rows(stored, first, stop).float()


def with_product(
    rows: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """Return rows (n, K) + scale * b @ a in `dtype`, for the factors a (r, K) and b (n, r) of any floating type."""
    return torch.addmm(rows.to(dtype), b.to(dtype), a.to(dtype), alpha=scale)


def _config(folder: Path) -> dict:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise ModelError(f"{folder}: no readable adapter_config.json, so this is not an adapter")
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder}: a {config.get('peft_type')} adapter; only LoRA is merged")
    if used := [key for key in _UNHANDLED if config.get(key)]:
        raise ModelError(f"{folder}: the adapter uses {', '.join(used)}, which is not merged yet")
    if config.get("init_lora_weights") not in _PLAIN_BEGINNINGS:
        how = config["init_lora_weights"]
        raise ModelError(f"{folder}: init_lora_weights {how!r} changed the base; convert the adapter to plain LoRA")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise ModelError(f"{folder}: {key} in its adapter_config.json is not a table")
    whole = config.get("modules_to_save") or []
    if not isinstance(whole, list) or not all(isinstance(name, str) for name in whole):
        raise ModelError(f"{folder}: modules_to_save in its adapter_config.json is not a list of names")
    return config


def _sorted_out(folder: Path, config: dict, tensors: Checkpoint) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Return the tensors by module and part, and those that replace a whole tensor of the base model."""
    parts: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    whole = config.get("modules_to_save") or []
    for stored in tensors:
        name = stored.removeprefix(PREFIX)
        if match := _PART.fullmatch(name):
            parts.setdefault(match[1], {})[match[2]] = stored
            continue
        target = name.replace(".base_layer.", ".")
        # By the end of a module's name, as peft matches them: "norm" also names every layernorm.
        parents = [target[:dot] for dot, letter in enumerate(target) if letter == "."]
        saved = any(parent.endswith(module) for parent in parents for module in whole)
        trained_bias = target.endswith(".bias") and config.get("bias", "none") != "none"
        if ".lora_" in name or not (saved or trained_bias or target != name):
            raise ModelError(f"{folder}: {stored!r} is not a LoRA factor, and is not merged yet")
        replaced[target] = stored
    return parts, replaced


def _rank_and_scale(folder: Path, config: dict, module: str) -> tuple[int, float]:
    """Return rank and scale as peft does: of the first pattern that fits the end of the name, else the common ones."""

    def of(key: str, patterns: Mapping[str, Any]) -> Any:
        try:
            return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), config.get(key))
        except re.error:
            raise ModelError(f"{folder}: a pattern in its adapter_config.json is no regular expression") from None

    rank = of("r", config.get("rank_pattern") or {})
    alpha = of("lora_alpha", config.get("alpha_pattern") or {})
    sound = type(rank) is int and 1 <= rank < 2**31 and isinstance(alpha, (int, float)) and -1e9 < alpha < 1e9
    if not sound:
        raise ModelError(f"{folder}: its adapter_config.json has no rank and alpha for {module!r}")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_shapes(folder: Path, config: dict, module: str, shapes: dict[str, tuple[int, ...]], rank: int) -> None:
    a, b = shapes.get("lora_A.weight", ()), shapes.get("lora_B.weight", ())
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
        raise ModelError(f"{folder}: '{module}.weight' has no factors A and B of rank {rank}")
    for key, part in (("use_dora", "lora_magnitude_vector"), ("lora_bias", "lora_B.bias")):
        if bool(config.get(key)) != (part in shapes) or (part in shapes and shapes[part] != b[:1]):
            raise ModelError(f"{folder}: {key} is {bool(config.get(key))}, and {module!r} has no {part} that fits")
