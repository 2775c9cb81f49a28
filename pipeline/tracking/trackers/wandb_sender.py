"""The process that writes one run with the client of Weights & Biases, asked line by line by `wandb`.

Each line of the input is a request in JSON, `[NAME, ARGUMENTS]`, and each line of the output its answer: `{"stored":
COUNT}`, or `{"problem": TEXT}`. The process ends with its input, even within a request. Then nothing more is sent,
because another process may already be writing the same run. The argument is a folder for the client's files. It is
removed at the end.
"""

from __future__ import annotations

import base64
import io
import json
import os
import queue
import shutil
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from pipeline.errors import redact
from pipeline.tracking.events import STAGES

COMPLETE = "tunepress.json"  # in the folder of a complete offline run: how many records it has
OPEN_SECONDS, STORE_SECONDS, FINISH_SECONDS = 20, 30, 15
TRANSMIT_SECONDS = 1  # between two requests of the client; whole seconds


class Sender:
    """One run of one W&B project. It is opened on the server only when there is something to send."""

    def open(self, **about: Any) -> int:
        """Keep the identity of the run, and return how many records it has."""
        import wandb

        self._about, self._online = about, about["mode"] == "online"
        self._run: Any = None
        if self._online:
            self._api = wandb.Api(overrides={"base_url": about["server"]}, timeout=OPEN_SECONDS)
            self._path = f"{about['entity'] or self._api.default_entity}/{about['project']}/{about['id']}"
        self._stored = 0 if self._online else _complete_records(Path(about["folder"], "wandb"), about["id"])
        return self.stored()

    def send(self, records: list[dict]) -> int:
        """Write records that are not stored yet, wait until they are stored, and then send their alerts."""
        new = [record for record in records if record["number"] >= self._stored]
        if new and self._run is None:
            self._run = self._begin()
        for record in new:
            self._run.log(_row(record), step=record["number"], commit=True)
        if new:
            self._wait(new[-1]["number"] + 1)
        for record in new:
            if alert := record.get("alert"):
                self._run.alert(**alert, wait_duration=timedelta(milliseconds=1))
        return self._stored

    def stored(self) -> int:
        """Return how many records the run has."""
        if self._online:
            try:
                self._stored = self._api.run(self._path).lastHistoryStep + 1
            except Exception as error:
                if "Could not find run" not in str(error):
                    raise
                self._stored = 0
        return self._stored

    def close(self, exit_code: int) -> int:
        """Finish the run if it was opened; an offline run is complete with that."""
        if self._run:
            folder = Path(self._run.dir).parent
            self._run.finish(exit_code=exit_code)
            if not self._online:
                (folder / COMPLETE).write_text(json.dumps({"records": self._stored}))
        return self._stored

    def _begin(self) -> Any:
        """Begin or resume the run.

        Nothing of this machine is collected: no console, code, git, hardware or list of packages.
        """
        import wandb

        about = self._about
        settings = wandb.Settings(
            base_url=about["server"], program="tunepress", host="", console="off", silent=True, symlink=False,
            disable_code=True, disable_git=True, disable_job_creation=True, save_code=False, sagemaker_disable=True,
            x_disable_stats=True, x_disable_meta=True, x_disable_machine_info=True, x_save_requirements=False,
            x_skip_transaction_log=self._online, x_file_stream_transmit_interval=TRANSMIT_SECONDS,
            init_timeout=OPEN_SECONDS, finish_timeout=FINISH_SECONDS, finish_timeout_raises=True, stop_fn=lambda: None,
        )  # fmt: skip
        run = wandb.init(
            project=about["project"], entity=about["entity"], name=about["name"], id=about["id"],
            config=about["config"], mode=about["mode"], dir=sys.argv[1] if self._online else about["folder"],
            resume="allow" if self._online else None, settings=settings,
        )  # fmt: skip
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        for stage, _ in STAGES.values():
            run.define_metric(f"{stage}/*", hidden=True)  # values that a run has once make no curve
        return run

    def _wait(self, count: int) -> None:
        """Wait until the run has this many records."""
        end = time.monotonic() + STORE_SECONDS
        if not self._online:
            self._stored = count
        while self._stored < count and self.stored() < count:
            if time.monotonic() > end:
                raise TimeoutError(f"no answer: the records are not stored after {STORE_SECONDS} seconds")
            time.sleep(TRANSMIT_SECONDS / 2)


def _row(record: dict) -> dict:
    """Return the row of history, with the table and the picture of all models."""
    import wandb

    row = record["row"] | {"_timestamp": record["time"]}
    if table := record.get("table"):
        row[table["name"]] = wandb.Html(table["html"])
    if picture := record.get("picture"):
        from PIL import Image

        row[picture["name"]] = wandb.Image(Image.open(io.BytesIO(base64.b64decode(picture["png"]))))
    return row


def _complete_records(folder: Path, run_id: str) -> int:
    """Return how many records the complete offline runs of this id have, and remove the incomplete ones."""
    found = [0]
    for run in folder.glob(f"offline-run-*-{run_id}"):
        if (run / COMPLETE).is_file():
            found.append(json.loads((run / COMPLETE).read_text())["records"])
        else:
            shutil.rmtree(run)
    return max(found)


def main() -> None:
    """Answer requests, one after the other."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the client prints
    sender, requests = Sender(), queue.SimpleQueue[str]()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    while True:
        name, arguments = json.loads(requests.get())
        try:
            answer = {"stored": getattr(sender, name)(**arguments)}
        except Exception as error:
            answer = {"problem": redact(" ".join(str(error).split())) or type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)


def _read(requests: queue.SimpleQueue[str]) -> None:
    """Pass requests on, and end the process with its input."""
    for line in sys.stdin:
        requests.put(line)
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    os._exit(0)  # without the hooks of the client, which would go on sending


if __name__ == "__main__":
    main()
