"""Whole runs on tiny models, in processes of their own, with their own Trackio and Hub cache."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tests.support import REPOSITORY
from tests.support.hub import LoopbackHub
from tests.support.recipes import RECIPES
from tests.support.texts import general_text

TOKEN = "hf_tunepressSecretForTests0123456789"
OTHER_TOKEN = "hf_somebodyElse0123456789"


@dataclass
class Place:
    """A folder to work in, with its own Trackio, Hub cache and configuration."""

    folder: Path
    hub: LoopbackHub | None = None
    more_env: dict[str, str] = field(default_factory=dict)
    patience: float = 600.0  # seconds that a command may take

    @property
    def env(self) -> dict[str, str]:
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRACKIO_"))}
        hub = (
            self.hub.env_for(TOKEN, home=str(self.folder / "hf")) if self.hub else {"HF_ENDPOINT": "http://127.0.0.1:9"}
        )
        more = {"PYTHONPATH": str(REPOSITORY), "TRACKIO_DIR": str(self.folder / "trackio"), "OMP_NUM_THREADS": "1"}
        return {**plain, **hub, **more, "HF_HOME": str(self.folder / "hf"), **self.more_env}

    @property
    def config(self) -> Path:
        return self.folder / "tiny.yaml"

    @property
    def run_folder(self) -> Path:
        return self.folder / "runs" / "tiny"

    @property
    def release(self) -> Path:
        return self.run_folder / "release"

    def copy(self, folder: Path) -> Place:
        """A copy that a test may change, with the same hub."""
        return Place(Path(shutil.copytree(self.folder, folder, symlinks=True)), self.hub)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "pipeline", *arguments]

    def tunepress(self, *arguments: str, check: int | None = 0) -> subprocess.CompletedProcess:
        """Run the command to its end; `check` is the exit code that it must have."""
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=self.patience,
        )
        if check is not None:
            assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def python(self, code: str) -> str:
        """Run code in a fresh process that knows nothing of this one; its output."""
        env = {k: v for k, v in self.env.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=self.folder, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def events(self) -> list[dict]:
        path = self.run_folder / "events.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        return [r for r in records if "event" in r]

    def names(self) -> list[str]:
        """Events as `quantization_completed int8`, in order."""
        return [" ".join(filter(None, (e["event"], e.get("variant")))) for e in self.events()]

    def alerts(self) -> list[dict]:
        """What Trackio's database holds: title, level and the record it carries."""
        code = (
            "import json, trackio\n"
            "print('\\n' + json.dumps([[a['title'], a['level'], a['text']] for a in trackio.Api().alerts('tests')]))"
        )
        rows = json.loads(self.python(code).splitlines()[-1])
        told = [(title, level, text.partition("\n")[2]) for title, level, text in rows]
        return [{"title": title, "level": level, "record": json.loads(record)} for title, level, record in told]

    def ledger(self) -> dict:
        """The finished steps."""
        steps = json.loads((self.run_folder / "ledger.json").read_text())["steps"]
        return {key: entry for key, entry in steps.items() if entry["state"] == "done"}

    def results(self) -> dict:
        return json.loads((self.run_folder / "results.json").read_text())


def processes_in(folder: Path) -> list[int]:
    """Return the processes that stand in a folder, as all do that a command has started there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if (process / "cwd").readlink() == folder and int(process.name) != os.getpid():
                found.append(int(process.name))
    return found


def run_recipe(folder: Path, recipe: str, tiny_model, hub: LoopbackHub | None = None) -> Place:
    """A finished run of a shipped recipe on a tiny model and little data; the rest of the recipe is as it is.

    `tiny.yaml` is then the run's own record of its configuration, which asks for the same run.
    """
    architecture, changes = RECIPES[recipe]
    _write_texts(folder)
    place = Place(folder, hub)
    settings = (
        "name=tiny", f"model.source={tiny_model(architecture, **changes)}", "data.source=rows.jsonl",
        "data.held_out=0.25", "train.max_steps=12", "evaluate.general=general.txt", "evaluate.max_tokens=1024",
        "evaluate.prompts=['Hello?']", "track.project=tests",
        "quantize.on_gate_failure=warn", *(["publish.repo=ada/tiny"] if hub else []),
    )  # fmt: skip
    place.output = place.tunepress("run", recipe, *(word for s in settings for word in ("--set", s)))
    shutil.copyfile(place.run_folder / "config.yaml", place.config)
    return place


def _write_texts(folder: Path) -> None:
    """What is trained on, and what is measured on besides."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"What is {n} plus {n}?", "completion": f"It is {2 * n}, of course."} for n in range(48)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "general.txt").write_text(general_text())


def write_place(folder: Path, model: Path, hub: LoopbackHub | None = None, **changes) -> Place:
    """A configuration for a tiny run in `folder`; `changes` replace sections' keys."""
    _write_texts(folder)
    tree = {
        "name": "tiny",
        "model": {"source": str(model)},
        "data": {"source": "rows.jsonl", "held_out": 0.25},
        "train": {
            "max_steps": 4, "batch_size": 2, "accumulate": 1, "learning_rate": 0.01, "max_length": 96,
            "checkpoint_every": 2, "evaluate_every": 4, "lora": {"rank": 4, "alpha": 8},
        },
        "evaluate": {"general": "general.txt", "max_tokens": 1024, "prompts": ["Hello?"]},
        # On so little text next to nothing is shown to be good enough.
        "quantize": {"variants": ["int8", {"name": "int4", "group_size": 128}], "on_gate_failure": "warn"},
        "publish": {"repo": "ada/tiny" if hub else None},
        "track": {"project": "tests"},
    }  # fmt: skip
    for section, keys in changes.items():
        tree[section] = None if keys is None else {**tree.get(section, {}), **keys}
    place = Place(folder, hub)
    place.config.write_text(yaml.safe_dump(tree))
    return place


def wait_for_training(place: Place, process: subprocess.Popen) -> None:
    spool = place.run_folder / "events.jsonl"
    for _ in range(600):
        if spool.is_file() and '"metrics"' in spool.read_text():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("training did not begin")


def stage_process_of(place: Place) -> int:
    """Return the process of the stage that runs there."""
    for process in processes_in(place.folder):
        with contextlib.suppress(OSError):  # it has ended
            if b"pipeline.workflow.stages" in Path(f"/proc/{process}/cmdline").read_bytes():
                return process
    raise AssertionError("no stage is running")
