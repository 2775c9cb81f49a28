"""Commands and facts of a retraining story on the loopback Hub."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import REPOSITORY
from tests.support.runs import Place, processes_in

REPO, BASE = "ada/tiny", "ada/base"
PUBLISHER_TOKEN, IDENTITY = "hf_jwt_ofATrustedPublisher.0123", "an identity token of the CI"
# Of the same data; the second makes a model that is surely better than that of the first.
SETTINGS = {
    "first": ["train.max_steps=4", "train.learning_rate=0.005"],
    "better": ["train.max_steps=30", "train.learning_rate=0.02"],
}


@dataclass
class Retraining(Place):
    """A place to retrain in."""

    environment: dict[str, str] = field(default_factory=dict)

    @property
    def env(self) -> dict[str, str]:
        return {**super().env, **self.environment}

    def command_line(self, settings: str, *options: str) -> list[str]:
        script = str(REPOSITORY / "scripts" / "retrain.py")
        return [sys.executable, script, "tiny.yaml", *as_options(settings), *options]

    def retrain(self, settings: str, *options: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command_line(settings, *options),
            cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=600,
        )  # fmt: skip

    def decision(self, settings: str, *options: str) -> dict:
        """The decision as --json prints it; the exit code is held to be the one that it tells."""
        done = self.retrain(settings, "--json", *options)
        assert done.stdout, done.stderr
        told = json.loads(done.stdout)
        assert done.returncode == told["exit_code"]
        return told

    def start(self, settings: str, *options: str, until: str = "training_started") -> subprocess.Popen:
        """A retraining under way: it has come to the event `until`."""
        known = self.names().count(until)
        process = subprocess.Popen(
            self.command_line(settings, *options), cwd=self.folder, env=self.env, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while self.names().count(until) == known:
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        return process

    def lineage(self, commit: str = "main") -> dict:
        return json.loads(self.hub.read(REPO, "tunepress.json", commit))

    def put_back(self, commit: str) -> str:
        """Somebody makes the repository what it was at `commit`; the new head."""
        there, old = self.hub.files(REPO), self.hub.files(REPO, commit)
        gone = {path: None for path in there.keys() - old.keys()}
        return self.hub.put(REPO, gone | {path: self.hub.read(REPO, path, commit) for path in old})

    def copy(self, folder: Path) -> Retraining:
        """The same place once more, where is not known what was decided in this one."""
        place = Retraining(Path(shutil.copytree(self.folder, folder, symlinks=True)), self.hub)
        (folder / "runs" / ".tiny.retraining.json").unlink()
        return place

    def decided(self) -> list[float]:
        """What Trackio has of decisions: 1 for better, 0 for not better."""
        code = (
            "import json, sqlite3, glob\n"
            "database = sqlite3.connect(glob.glob('trackio/*.db')[0])\n"
            "rows = [json.loads(row[0]) for row in database.execute('select metrics from metrics order by id')]\n"
            "print(json.dumps([row['retraining/decided'] for row in rows if 'retraining/decided' in row]))"
        )
        return json.loads(self.python(code).splitlines()[-1])


def as_options(settings: str) -> list[str]:
    return [word for setting in SETTINGS[settings] for word in ("--set", setting)]


def kill(process: subprocess.Popen, place: Place) -> None:
    """End a retraining as a power cut would: nothing of it is asked."""
    process.kill()
    for child in processes_in(place.folder):
        with contextlib.suppress(ProcessLookupError):  # it ends with its parent
            os.kill(child, signal.SIGKILL)


@dataclass
class Story:
    """What happened one after the other, for tests to look at."""

    place: Retraining
    first: dict
    first_commit: str
    unchanged: dict
    requests_while_unchanged: list
    busy: subprocess.CompletedProcess
    head_after_kill: str
    better: dict
    better_commit: str
    commits: list[str]
    worse_place: Retraining  # where the first model was made, and is now compared with the better one
    worse: dict
    worse_again: dict
    worse_events: int
