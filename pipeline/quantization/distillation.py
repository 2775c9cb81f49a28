"""Distillation: scales and zeros of a rounded model, trained to give the logits of the full-precision model.

Codes stay as they are. The loss is the KL divergence to the full-precision model, of all tokens. Scales and zeros are
trained in float32, and the loss is computed with the values that would be stored. A forward and a backward pass go one
decoder block at a time, so that memory holds one block, the output head, and all scales and zeros with their two
moments. The values with the smallest divergence on held-out windows are kept, so the result is never worse there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from pipeline.quantization.calibration import gradients
from pipeline.quantization.calibration.blocks import BlockwiseModel
from pipeline.quantization.calibration.collect import batches_of
from pipeline.quantization.calibration.gradients import OutputHead, Rounded
from pipeline.quantization.calibration.store import save_whole
from pipeline.quantization.grid import Grid, GroupQuantized

Tell = Callable[[int, int, str], None]  # called with the steps done, the steps in all, and the state of the loss
Values = Mapping[str, tuple[torch.Tensor, torch.Tensor | None]]  # name of a weight -> its scales and zeros (N, G)

STATE = "distillation.safetensors"
TOGETHER = 16  # batches whose activations are in memory together, before the training
BETAS = (0.9, 0.95)
ZERO_SPEED = 2.0  # of a zero's steps, relative to those of its scale
FINAL_RATE = 0.1  # of the learning rate, at the end of the cosine


@dataclass(frozen=True)
class Schedule:
    """How to train.

    Attributes:
        steps: the largest number of steps, one batch each.
        rate: the largest change of a scale in one step, relative to the mean scale of its layer.
        warmup: share of the steps during which the rate rises.
        every: steps between two measurements on the held-out windows, which are also the checkpoints.
        patience: measurements without a better one, after which the training ends.
    """

    steps: int
    rate: float = 5e-4
    warmup: float = 0.1
    every: int = 20
    patience: int = 3

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step, which begins at 0."""
        rising = min(1.0, (step + 1) / max(1.0, self.warmup * self.steps))
        falling = (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.rate * rising * (FINAL_RATE + (1 - FINAL_RATE) * falling)


@dataclass(frozen=True)
class Distilled:
    """What a distillation reached.

    Attributes:
        steps: steps until the values that are kept.
        before, after: KL divergence on the held-out windows, in nats a token.
    """

    steps: int
    before: float
    after: float


def distill(
    model: BlockwiseModel,
    heads: tuple[OutputHead, OutputHead],
    rounded: Rounded,
    windows: Sequence[list[int]],
    held_out: Sequence[list[int]],
    schedule: Schedule,
    folder: Path,
    tell: Tell,
) -> tuple[Distilled, Values]:
    """Train the scales and zeros of the linear layers in the decoder blocks.

    Args:
        model: the full-precision model.
        heads: the output head in full precision, and rounded; the same one twice if it is not rounded.
        rounded: weights on their grids.
        windows: text to train on; it is read again if it is shorter than all steps.
        held_out: text to choose the best values on.
        schedule: how to train.
        folder: holds activations, and the state from which a stopped distillation goes on.
        tell: called after each step.

    Returns:
        What it reached; and by name of the weight the scales and zeros (N, G) as they will be stored.
    """
    trainer = _Trainer(model, heads, rounded, folder)
    measured = batches_of(held_out)
    trainer.prepare([*batches_of(windows), *measured], len(measured))
    return trainer.run(schedule, tell)


class _Trainer:
    """The scales and zeros that are trained, and the passes over the model."""

    def __init__(
        self, model: BlockwiseModel, heads: tuple[OutputHead, OutputHead], rounded: Rounded, folder: Path
    ) -> None:
        self._model, self._heads, self._rounded, self._folder = model, heads, rounded, folder
        self._names = [n for block in range(model.count) for n in model.weights_of(block) if n in rounded]
        self._values: dict[str, list[torch.nn.Parameter]] = {}
        self._grids: dict[str, Grid] = {}
        groups = []
        for name in self._names:
            made = rounded[name]
            self._grids[name] = made.grid
            parts = [made.scale] if made.zero is None or made.grid.zero != "float" else [made.scale, made.zero]
            self._values[name] = [
                torch.nn.Parameter(part.float().to(model.device), requires_grad=False) for part in parts
            ]
            step = float(made.scale.float().abs().mean())
            for values, speed in zip(self._values[name], (1.0, ZERO_SPEED), strict=False):
                groups.append({"params": [values], "step": step * speed})
        self._optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)

    def prepare(self, batches: list[torch.Tensor], held_out: int) -> None:
        """Write what does not change: the last hidden states of the full-precision model.

        Args:
            batches: tokens (B, T) each; the last `held_out` of them are measured on.
        """
        self._batches, self._training = batches, len(batches) - held_out
        missing = [number for number in range(len(batches)) if not self._wanted(number).is_file()]
        for first in range(0, len(missing), TOGETHER):
            self._prepare(missing[first : first + TOGETHER])

    def _prepare(self, numbers: Sequence[int]) -> None:
        """Write the last hidden states of the full-precision model for some batches."""
        batches = [self._batches[number] for number in numbers]
        states = gradients.enter(self._model, {}, batches)
        for block in range(self._model.count):
            with self._model.loaded(block):
                states = [self._model.run(block, ids, hidden) for ids, hidden in zip(batches, states, strict=True)]
        for number, ids, hidden in zip(numbers, batches, states, strict=True):
            save_whole({"states": self._model.finish(ids, hidden).cpu().contiguous()}, self._wanted(number))

    def run(self, schedule: Schedule, tell: Tell) -> tuple[Distilled, Values]:
        """Train, and return the best values."""
        first, best, waited = self._resume()
        if not first:
            best = Distilled(0, start := self._held_out(), start)
            self._keep(0, best, waited, is_best=True)
        for step in range(first, schedule.steps):
            tell(step, schedule.steps, f"KL {best.before:.4f} -> {best.after:.4f}")
            rate = schedule.rate_at(step)
            for group in self._optimizer.param_groups:
                group["lr"] = rate * group["step"]
            self._step(self._batch(step))
            if (step + 1) % schedule.every and step + 1 < schedule.steps:
                continue
            found = self._held_out()
            is_best = found < best.after
            waited = 0 if is_best else waited + 1
            best = Distilled(step + 1, best.before, found) if is_best else best
            self._keep(step + 1, best, waited, is_best)
            if waited >= schedule.patience:
                break
        tell(schedule.steps, schedule.steps, f"KL {best.before:.4f} -> {best.after:.4f}")
        return best, {name: self._stored(name, values) for name, values in self._best().items()}

    def _batch(self, step: int) -> int:
        """Return the batch of a step; each pass over the text has another order."""
        round_, place = divmod(step, self._training)
        order = torch.randperm(self._training, generator=torch.Generator().manual_seed(round_))
        return int(order[place])

    def _step(self, number: int) -> None:
        """Take one step on a batch."""
        ids, model = self._batches[number], self._model
        states = self._forward(ids, keep=True)
        flat, wanted = model.finish(ids, states).flatten(0, 1), self._target(number)
        gradient = torch.empty_like(flat)
        for rows, logits, exact in gradients.pieces(self._heads[1], flat, self._heads[0], wanted):
            _, slope = gradients.divergence(logits, exact, len(flat))
            gradient[rows] = self._heads[1].gradient(logits, slope).to(gradient.dtype)
        passed = model.differentiate_end(ids, states, gradient.view_as(states))
        for block in reversed(range(model.count)):
            (hidden,) = gradients.border(self._folder, block, model.device)
            with model.loaded(block), self._in_place(block, trained=True) as made:
                passed = model.differentiate(block, ids, hidden, passed)
                for name, weight in made.items():
                    self._set_gradients(name, weight, model.gradient_of(name))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _held_out(self) -> float:
        """Return the KL divergence on the held-out windows, in nats a token."""
        total, tokens = 0.0, sum(ids.numel() for ids in self._batches[self._training :])
        for number in range(self._training, len(self._batches)):
            ids = self._batches[number]
            flat = self._model.finish(ids, self._forward(ids)).flatten(0, 1)
            pieces = gradients.pieces(self._heads[1], flat, self._heads[0], self._target(number))
            total += sum(gradients.divergence(logits, exact, tokens)[0] for _, logits, exact in pieces)
        return total

    def _forward(self, ids: torch.Tensor, keep: bool = False) -> torch.Tensor:
        """Return the output of the last block for tokens (B, T).

        Args:
            keep: write the inputs of each block to a file.
        """
        (states,) = gradients.enter(self._model, self._rounded, [ids])
        for block in range(self._model.count):
            if keep:
                gradients.keep_border(self._folder, block, [states])
            with self._model.loaded(block), self._in_place(block):
                states = self._model.run(block, ids, states)
        return states

    @contextmanager
    def _in_place(self, block: int, trained: bool = False) -> Iterator[dict[str, GroupQuantized]]:
        """Hold a block's weights as they would be stored with the present scales and zeros."""
        names = [name for name in self._model.weights_of(block) if name in self._values]
        made = {name: self._made(name) for name in names}
        with self._model.replaced({name: weight.dequantize() for name, weight in made.items()}, trained):
            yield made

    def _made(self, name: str) -> GroupQuantized:
        old = self._rounded[name].to(self._model.device)
        scale, zero = self._stored(name, self._values[name])
        return GroupQuantized(old.codes, scale, old.zero if zero is None else zero, old.grid)

    def _stored(self, name: str, values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return scales and zeros as they can be stored."""
        scale, *zero = (part.detach() for part in values)
        return self._grids[name].stored(scale, zero[0] if zero else None)

    def _set_gradients(self, name: str, made: GroupQuantized, gradient: torch.Tensor) -> None:
        """Set the gradients for scales and zeros (N, G), given that for the weight (N, K)."""
        rows, groups = made.scale.shape
        by_group = gradient.float().view(rows, groups, -1)
        codes = made.codes.view(rows, groups, -1).float()
        if made.zero is not None and made.grid.zero == "integer":
            codes -= made.zero.float().unsqueeze(-1)
        scale, *zero = self._values[name]
        scale.grad = (by_group * codes).sum(-1)
        for values in zero:
            values.grad = by_group.sum(-1)

    def _target(self, number: int) -> torch.Tensor:
        """Return the last hidden states (T, H) of the full-precision model."""
        return load_file(self._wanted(number), str(self._model.device))["states"].flatten(0, 1)

    def _wanted(self, number: int) -> Path:
        return self._folder / f"wanted-{number:05}.safetensors"

    def _keep(self, step: int, best: Distilled, waited: int, is_best: bool) -> None:
        """Write the state from which a stopped distillation goes on."""
        if is_best:
            save_whole({f"{name}:{n}": v.detach() for name, n, v in self._all()}, self._folder / f"best-{STATE}")
        moments = {
            f"{key}:{name}:{n}": self._optimizer.state[values][key]
            for name, n, values in self._all()
            for key in self._optimizer.state.get(values, {})
        }
        values = {f"values:{name}:{n}": v.detach() for name, n, v in self._all()}
        counts = torch.tensor([step, best.steps, waited])
        losses = torch.tensor([best.before, best.after], dtype=torch.float64)
        save_whole({**values, **moments, "counts": counts, "losses": losses}, self._folder / STATE)

    def _resume(self) -> tuple[int, Distilled, int]:
        """Read the state, and return the steps done, the best result, and the measurements since then."""
        if not (self._folder / STATE).is_file():
            return 0, Distilled(0, math.inf, math.inf), 0
        kept = load_file(self._folder / STATE, str(self._model.device))
        step, at, waited = kept.pop("counts").tolist()
        before, after = kept.pop("losses").tolist()
        for name, n, values in self._all():
            values.data = kept.pop(f"values:{name}:{n}")
        for name, n, values in self._all():
            of = {key: kept[f"{key}:{name}:{n}"] for key in ("step", "exp_avg", "exp_avg_sq") if step}
            if of:
                self._optimizer.state[values] = of
        return step, Distilled(at, before, after), waited

    def _best(self) -> dict[str, list[torch.Tensor]]:
        kept = load_file(self._folder / f"best-{STATE}")
        return {name: [kept[f"{name}:{n}"] for n in range(len(values))] for name, values in self._values.items()}

    def _all(self) -> Iterator[tuple[str, int, torch.nn.Parameter]]:
        for name, values in self._values.items():
            for number, part in enumerate(values):
                yield name, number, part
