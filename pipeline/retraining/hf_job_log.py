"""Log of a Job on the Hub, and the decision in it."""

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
FINAL_READS = 3  # of the log of a Job that has ended, if its exit code is not there yet
STATUS_ATTEMPTS = 12  # over some minutes, in which the Job goes on


class JobLog:
    """The log of a Job.

    Args:
        started: the Job's `id`, `namespace` and `repo`.
        say: takes the lines of the log.

    Attributes:
        told: the decision that the Job printed.
        code: the exit code of its command.
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
        """Return the decision if the Job ended with its exit code."""
        return self.told if self.told and self.code == self.told.get("exit_code") else None

    def follow(self) -> str:
        """Read the log until the Job has ended, and return its final status. A log that ends early is read again.

        Raises:
            HubError: if the Hub does not return the status of the Job.
        """
        from huggingface_hub import HfApi

        while True:
            self._take()
            job = retry_or_explain(self._repo, lambda: HfApi().inspect_job(**self._about), attempts=STATUS_ATTEMPTS)
            if job.status.stage not in ("RUNNING", "SCHEDULING"):
                break
            time.sleep(POLL_SECONDS)
        for _ in range(FINAL_READS):  # the Job may have ended while its log could not be read
            if self.code is None:
                time.sleep(POLL_SECONDS)
                self._take()
        return f"{job.status.stage}{f' ({job.status.message})' if job.status.message else ''}"

    def _take(self) -> None:
        """Read the new part of the log if the Hub answers; the client of the Hub retries."""
        with contextlib.suppress(HubError):
            retry_or_explain(self._repo, self._read_on, attempts=1)

    def _read_on(self) -> None:
        """Read the lines after the last one that was read."""
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
    """Return the decision in a line; None if the line is other text, or an incomplete decision."""
    try:
        return json.loads(line) if line.startswith('{"outcome"') else None
    except ValueError:
        return None
