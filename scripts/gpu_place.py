"""The place of a GPU check: its folder and device, the product's commands there, and how results are compared."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from process_memory import Watch, stage_of

from pipeline.config.training_catalog import DEFAULT_TRAINER, METHODS, TRAINERS
from pipeline.evaluation.speed import LOGIT_TOLERANCE
from pipeline.system.files import read_json

if TYPE_CHECKING:
    import torch

STEPS, CHECKPOINT = 12, 4  # a training is killed after its first checkpoint
TEXT = "The capital of France is Paris. def add(a, b): return a + b. Water boils when it is hot. Once upon a time"
POLL_SECONDS = 0.02
ANSWERS = "prompt_completion"  # the form of data for trainers that learn answers
FOR_GPUS = (("attention", "flash"), ("liger", True), ("compile", True))  # settings of `train` that a CPU refuses
Figures = dict[str, Any]


class NotHere(Exception):
    """A check that is not possible on this machine; its message says why."""


class Wrong(Exception):
    """A result that is wrong."""


@dataclass(frozen=True)
class Place:
    """The folder and the device of a check, and its model.

    Attributes:
        folder: for all files of all checks.
        device: `cpu` or `cuda`.
        quick: True for a tiny random model.
        source: a model as `model.source` names it; None for the default one.
    """

    folder: Path
    device: str
    quick: bool
    source: str | None = None

    @property
    def model(self) -> Path:
        """The folder of the full-precision model."""
        return Path(read_json(self.folder / "model.json", {})["folder"])

    @property
    def runs(self) -> Path:
        """The folder of the runs."""
        return self.folder / "runs"

    def config(self, training: str) -> Path:
        """Write and return the configuration of a short training of that name."""
        path, chosen = self.folder / f"{training}.yaml", trainings()[training]
        method, forms = METHODS[chosen["method"]], TRAINERS[chosen.get("trainer", DEFAULT_TRAINER)].forms
        train = {
            "max_steps": STEPS,
            "batch_size": 4 if self.device == "cuda" else 2,
            "accumulate": 1,
            "max_length": 64 if self.quick else 256 if self.device == "cuda" else 128,
            "learning_rate": 1e-2 if self.quick else 1e-3,
            "optimizer": "paged_adamw_8bit" if self.device == "cuda" and method.in_nf4 else "adamw",
            "evaluate_every": STEPS,
            "checkpoint_every": CHECKPOINT,
            "lora": {"dropout": 0.0},
            **chosen,
        }
        form = ANSWERS if ANSWERS in forms else forms[0]
        tree = {
            "name": training,
            "model": {"source": str(self.model)},
            "data": {"source": str(self._rows(form)), "form": form, "held_out": 0.1},
            "train": train,
            "merge": {"base": next(iter(method.merge_bases), "auto")},
            "evaluate": {"max_tokens": 512 if self.quick else 2048},
            "quantize": {"variants": []},
        }
        path.write_text(yaml.safe_dump(tree))
        return path

    def _rows(self, form: str) -> Path:
        """Write and return short questions with answers, or with a better and a worse answer, as the form needs."""
        path, rows = self.folder / f"{form}.jsonl", []
        for n in range(200):
            better, worse = f"It is {n + 1}. " * (1 + n % 9), f"I do not know {n}. "
            answers = {"completion": better} if form == ANSWERS else {"chosen": better, "rejected": worse}
            rows.append({"prompt": f"{n} plus 1?", **answers})
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def tunepress(self, verb: str, config: Path, runs: Path, settings: Sequence[str] = ()) -> None:
        """Run a verb of tunepress to its end.

        Raises:
            Wrong: with the last line that it printed, if it fails.
        """
        run(command(verb, config, runs, settings))

    def training(self, method: str, runs: Path | None = None) -> dict:
        """Return the figures of a training."""
        found = read_json((runs or self.runs) / method / "results.json", {}).get("training")
        if found is None:
            raise Wrong("the training left no figures")
        return found

    def losses(self, method: str, runs: Path | None = None) -> list[float]:
        """Return the training losses, step by step."""
        return [row["loss"] for row in self.training(method, runs)["history"] if "loss" in row]

    @contextmanager
    def peaks(self) -> Iterator[dict[str, int]]:
        """Yield a mapping that gets the peak bytes of the stage `train`: `host`, and `gpu` on a GPU."""
        import os

        found: dict[str, int] = {}
        ended, watcher = threading.Event(), None
        if self.device == "cuda":
            watcher = threading.Thread(target=self._watch_gpu, args=(found, ended), daemon=True)
            watcher.start()
        with Watch(os.getpid(), stage_of) as watch:
            yield found
        ended.set()
        if watcher:
            watcher.join()
        found["host"] = watch.peaks["train"]

    @staticmethod
    def _watch_gpu(found: dict[str, int], ended: threading.Event) -> None:
        """Look how much memory of the GPU all processes use more than at the start, this one not counted."""
        import torch

        before, found["gpu"] = torch.cuda.mem_get_info()[0], 0
        while not ended.wait(POLL_SECONDS):
            found["gpu"] = max(found["gpu"], before - torch.cuda.mem_get_info()[0])


def trainings() -> dict[str, dict[str, Any]]:
    """Return the trainings by name, each with its settings: one for each method, trainer, and setting for a GPU."""
    found: dict[str, dict[str, Any]] = {name: {"method": name} for name in METHODS}
    main = {"method": next(iter(METHODS))}
    found |= {name: {**main, "trainer": name} for name in TRAINERS if name != DEFAULT_TRAINER}
    return found | {f"{key}-{value}".lower(): {**main, key: value} for key, value in FOR_GPUS}


def command(verb: str, config: Path, runs: Path, settings: Sequence[str] = ()) -> list[str]:
    """Return the command line of a verb of tunepress."""
    sets = [word for setting in settings for word in ("--set", setting)]
    return [sys.executable, "-P", "-m", "pipeline", verb, str(config), "--runs", str(runs), *sets]


def run(words: list[str]) -> None:
    """Run a command to its end; raise Wrong with the last line that it printed if it fails."""
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL)
    print(done.stdout, file=sys.stderr)
    if done.returncode:
        raise Wrong(f"{Path(words[-1]).name if 'pipeline' not in words else words[4]}: {last_line(done.stdout)}")


def last_line(text: str) -> str:
    """Return the last line of a text that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")


def said(figures: Figures) -> str:
    """Return figures in one line."""
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items()
    )


def rate(tokens: float) -> str:
    """Return tokens per second in words."""
    return f"{tokens:.0f} tokens/s" if tokens >= 10 else f"{tokens:.1f} tokens/s"


def ids_of(folder: Path) -> list[int]:
    """Return the tokens of a text, for the model in a folder."""
    from pipeline.models.safe_loading import open_tokenizer

    return open_tokenizer(folder)(TEXT).input_ids[:64]


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Return the logits (T, V) of a model in float32, on the CPU."""
    import torch

    from pipeline.inference.output_head import device_of

    with torch.no_grad():
        return model(torch.tensor([ids], device=device_of(model))).logits[0].float().cpu()


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative distance of two tensors; not a number if one of them has such values."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def check_logits(what: str, found: torch.Tensor, expected: torch.Tensor, allowed: float = LOGIT_TOLERANCE) -> str:
    """Return how far logits are from those that are expected.

    Raises:
        Wrong: if that is more than `allowed`.
    """
    off = apart(found, expected)
    if not off <= allowed:  # not a number is neither
        raise Wrong(f"{what}: logits are off by {off:.2%}, more than {allowed:.0%}")
    return f"{off:.2%}"


def free_gpu() -> None:
    """Let the GPU's memory of models that are not used any more go, and count its peak from here."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
