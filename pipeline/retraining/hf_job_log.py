"""What a Job of the Hub says: its log, as far as the Hub gives it, and the decision in it."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable

from pipeline.errors import HubError, redact
from pipeline.hub.retry import retry_or_explain

EXIT_CODE = re.compile(r"tunepress: exit code (\d+)\s*\Z")
POLL_SECONDS = 2.0
LAST_LOOKS = 3  # at the log of a Job that has ended without its exit code in it
PATIENCE = 12  # times that the Hub is asked how a Job is, over some minutes; it goes on meanwhile


class JobLog:
    """What a Job says.

    Attributes:
        told: the decision, as it printed it.
        code: the exit code of the command that it ran.
        complaint: its last error.
    """

    told: dict | None = None
    code: int | None = None
    complaint: str | None = None

    def __init__(self, started: dict, say: Callable[[str], None]):
        self._repo, self._say, self._read = started["repo"], say, 0
        self._about = {"job_id": started["id"], "namespace": started["namespace"]}

    @property
    def decision(self) -> dict | None:
        """What it decided, if it ended with that."""
        return self.told if self.told and self.code == self.told.get("exit_code") else None

    def follow(self) -> str:
        """Read the log until the Job has ended; how it ended. What the Hub leaves out of a log is no end of the Job.

        Raises:
            HubError: where the Hub does not say how the Job is.
        """
        from huggingface_hub import HfApi

        while True:
            self._take()
            job = retry_or_explain(self._repo, lambda: HfApi().inspect_job(**self._about), attempts=PATIENCE)
            if job.status.stage not in ("RUNNING", "SCHEDULING"):
                break
            time.sleep(POLL_SECONDS)
        for _ in range(LAST_LOOKS):  # it may have ended while its log could not be read
            if self.code is None:
                time.sleep(POLL_SECONDS)
                self._take()
        return f"{job.status.stage}{f' ({job.status.message})' if job.status.message else ''}"

    def _take(self) -> None:
        """Read on, as far as the Hub gives it; its client tries more than once."""
        with contextlib.suppress(HubError):
            retry_or_explain(self._repo, self._read_on, attempts=1)

    def _read_on(self) -> None:
        """From the first line that was not read."""
        from huggingface_hub import HfApi

        for number, line in enumerate(HfApi().fetch_job_logs(**self._about, follow=True)):
            if number < self._read:
                continue
            self._read += 1
            line = redact(line.rstrip("\n"))
            if decision := _decision_in(line):
                self.told = decision
                continue
            self._say(line)
            if found := EXIT_CODE.match(line):
                self.code = int(found[1])
            elif line.startswith("retrain: "):
                self.complaint = line.removeprefix("retrain: ")


def _decision_in(line: str) -> dict | None:
    """The decision that a line is; a line that was cut is text as any other."""
    try:
        return json.loads(line) if line.startswith('{"outcome"') else None
    except ValueError:
        return None
