"""An adapter added into a base model, tensor by tensor: W + scale * B @ A, in bf16.

Training with QLoRA saw dequantized NF4 weights, so there are two bases to merge into:
the original one, and the NF4 one as training saw it. Which is better is measured, not
assumed (`pipeline.stages.merge`).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from pipeline.checkpoint import SHARD_BYTES, Checkpoint, CheckpointWriter
from pipeline.errors import ModelError
from pipeline.models import ADAPTER_FILES, copy_companions, read_config
from pipeline.nf4 import as_nf4

PREFIX = "base_model.model."
# What an adapter may carry beyond plain LoRA on linear layers; none of it is merged here.
_UNHANDLED = (
    "use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save", "alpha_pattern", "rank_pattern",
    "layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens",
    "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip
# Ways to begin that leave the base as it is; the others (PiSSA, OLoRA, LoftQ, ...) change it.
_PLAIN_BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Adapter:
    """LoRA factors by the name of the weight they change: (A (r, K), B (N, r)), and their common scale."""

    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    scale: float

    @classmethod
    def read(cls, folder: Path) -> Adapter:
        """Read a peft LoRA adapter.

        Raises:
            ModelError: naming what it carries that is not handled, rather than leaving it out.
        """
        try:
            config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            config = None
        if not isinstance(config, dict):
            raise ModelError(f"{folder}: no readable adapter_config.json, so this is not an adapter")
        if config.get("peft_type") != "LORA":
            raise ModelError(f"{folder}: a {config.get('peft_type')} adapter; only LoRA is merged")
        used = [key for key in _UNHANDLED if config.get(key)]
        if used or config.get("bias", "none") != "none":
            raise ModelError(f"{folder}: the adapter uses {', '.join(used) or 'bias'}, which is not merged yet")
        if config.get("init_lora_weights") not in _PLAIN_BEGINNINGS:
            how = config["init_lora_weights"]
            raise ModelError(f"{folder}: init_lora_weights {how!r} changed the base; convert the adapter to plain LoRA")
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
            raise ModelError(f"{folder}: its adapter_config.json has no rank and alpha")
        tensors = Checkpoint.of_files([folder / "adapter_model.safetensors"])
        halves: dict[str, dict[str, torch.Tensor]] = {}
        for name in tensors:
            module, _, rest = name.removeprefix(PREFIX).rpartition(".lora_")
            if not module or rest not in ("A.weight", "B.weight"):
                raise ModelError(f"{folder}: {name!r} is not a LoRA factor, and is not merged yet")
            halves.setdefault(f"{module}.weight", {})[rest[0]] = tensors.read(name)
        for name, half in halves.items():
            sound = set(half) == {"A", "B"} and half["A"].shape[:1] == half["B"].shape[1:] == (rank,)
            if not sound or any(factor.ndim != 2 for factor in half.values()):
                raise ModelError(f"{folder}: {name!r} has no factors A and B of rank {rank}")
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        return cls({name: (half["A"], half["B"]) for name, half in halves.items()}, scale)

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """`weight` (N, K) with its change added: computed in float32, rounded once to bf16."""
        if name in self.factors:
            a, b = (factor.float() for factor in self.factors[name])
            weight = torch.addmm(weight.float(), b, a, alpha=self.scale)
        return weight.to(torch.bfloat16) if weight.is_floating_point() else weight


def merge_checkpoint(
    base: Path,
    adapter_folder: Path,
    output: Path,
    kind: Literal["bf16", "nf4"],
    linear: Collection[str] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the merged model, with its configuration and tokenizer, to `output`.

    Args:
        kind: `bf16` merges into the base as it is; `nf4` into what NF4 training saw of it.
        linear: weights that training held in NF4, which is every linear layer but the head.

    Raises:
        ModelError: where the adapter changes a weight that the base lacks or has in another
            shape, or, for nf4, where a linear layer is not in the checkpoint.
    """
    checkpoint, adapter = Checkpoint(base), Adapter.read(adapter_folder)
    for name, (a, b) in sorted(adapter.factors.items()):
        if name not in checkpoint:
            raise ModelError(f"{adapter_folder}: changes {name!r}, which {base} does not have")
        if checkpoint[name].shape != (b.shape[0], a.shape[1]):
            found, made = checkpoint[name].shape, (b.shape[0], a.shape[1])
            raise ModelError(f"{adapter_folder}: made for a {name!r} of {made}; in {base} it is {found}")
    if kind == "nf4" and not (linear and set(linear) <= checkpoint.keys()):
        lost = [*sorted(set(linear) - checkpoint.keys()), "every linear layer"][0]
        raise ModelError(f"{base}: cannot tell what NF4 training saw; {lost} is missing")
    plan = {
        name: (torch.bfloat16 if info.dtype.is_floating_point else info.dtype, info.shape)
        for name, info in checkpoint.items()
    }
    done = 0
    with CheckpointWriter(output, plan, shard_bytes=SHARD_BYTES) as writer:
        for name, info in checkpoint.items():
            weight = checkpoint.read(name)
            if kind == "nf4" and name in linear:
                weight = as_nf4(weight)
            writer.write(name, adapter.apply(name, weight))
            done += info.nbytes
            if on_progress:
                on_progress(done, checkpoint.nbytes)
    # Paths of this machine, and code that is not published, stay behind.
    dropped = ("_name_or_path", "_model_name_or_path", "auto_map")
    config = {k: v for k, v in read_config(base).items() if k not in dropped}
    config["dtype"] = "bfloat16"
    config.pop("torch_dtype", None)
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (output / "config.json").write_text(text + "\n", encoding="utf-8")
    copy_companions(base, output)


def copy_adapter(source: Path, target: Path, hub_id: str | None) -> None:
    """An adapter's two files, without what describes the machine it was trained on."""
    target.mkdir(parents=True)
    for name in ADAPTER_FILES:
        shutil.copyfile(source / name, target / name)
    make_portable(target, hub_id)


def make_portable(adapter: Path, hub_id: str | None) -> None:
    """peft writes the base model's path on this machine into an adapter; a Hub id or nothing belongs there."""
    path = adapter / "adapter_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["base_model_name_or_path"] = hub_id
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
