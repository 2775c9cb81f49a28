"""Retraining as a Hugging Face Job: a machine of the Hub installs tunepress and runs the same command.

The configuration is passed in the environment, and tokens as secrets of the Job, never on the command line.
The status of a Job is only success or failure, so the exit code and the decision are read from its log.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.loader import dump_config
from pipeline.config.schema import PACKAGE_SOURCE, Config, TrainingRun
from pipeline.data.sources import is_builtin, locate
from pipeline.errors import ConfigError, HubError, UserError, redact
from pipeline.hub.auth import check_token, keyless, who_is
from pipeline.hub.retry import HubAway, retry_or_explain
from pipeline.models.sources import is_local
from pipeline.publishing.commit import check_destination
from pipeline.publishing.removal import NO_REMOVAL, Removal
from pipeline.retraining.decision import Matter, check, look
from pipeline.retraining.hf_job_log import JobLog
from pipeline.retraining.lock import IN_A_JOB, alone, labels, refuse_beside_job
from pipeline.retraining.report import plain
from pipeline.tracking.trackers import Tracker, tracker

IMAGE = "ghcr.io/astral-sh/uv:python3.12-bookworm"
TIMEOUT = re.compile(r"\d+(\.\d+)?[smhd]?\Z")
PACKAGE = re.compile(r"(git\+)?https://[^\s/@?]+/[^\s?]+\Z")  # without a password or token, because it is not secret

# The Hub takes every exit code but 0 for a failure, and "not better" and "skipped" are not failures.
SCRIPT = """
cd "$(mktemp -d)" && printf %s "$TUNEPRESS_CONFIG" > run.yaml
uv run --no-project --python 3.12 --with "$TUNEPRESS_PACKAGE" python -m pipeline.cli.retrain run.yaml --json "$@"
code=$?
echo "tunepress: exit code $code"
case $code in 3|4) exit 0 ;; esac
exit $code
"""


class JobFailed(UserError):
    """A Job ended without a decision."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Job:
    """A retraining on a machine of the Hub.

    Attributes:
        flavor: the Hub's name of the hardware.
        timeout: the longest time, such as 6h.
        package: address of tunepress for the Job, `git+https://...@COMMIT` or a wheel; None for the commit that a
            GitHub workflow runs for.
        margin, force, removal: as in `retrain`.
    """

    config: Config
    flavor: str
    timeout: str
    package: str | None
    margin: float
    force: bool
    removal: Removal = NO_REMOVAL

    def run(self, root: str | Path, say: Callable[[str], None], wait: bool = True) -> dict:
        """Start the Job, unless the decision is known already, and follow it to its end.

        Args:
            root: parent of the folder with the record.
            say: takes the lines of the Job's log.
            wait: follow the Job; otherwise only start it.

        Returns:
            The decision that the Job printed; without `wait` the result of `_start`.

        Raises:
            ConfigError: if the Job could not reach an input.
            Busy: if a Job retrains this repository already.
            HubError: if the Hub refuses.
            JobFailed: if the Job ends without a decision; with the Job's exit code if it is known.
        """
        config, package = self._check()
        repo = config.publish.target
        if keyless():
            raise HubError(f"{repo}: a keyless login cannot start Jobs; set HF_TOKEN instead of HF_OIDC_RESOURCE")
        token = check_token(repo, None if self.config.publish.create_pr else repo.split("/")[0])
        with alone(repo):  # until the Job is started; from then on its labels show it
            refuse_beside_job(repo)
            asked = [spec.name for spec in config.quantize.variants]
            check_destination(repo, config.name, asked=asked, removal=self.removal)
            matter = self._read_end(look(config, root), say)
            if not self.force and (settled := matter.settled(self.margin)):
                return plain(settled)
            started = self._start(matter.inputs.config, package, token)
            _record(matter.keep, say, job={key: started[key] for key in ("id", "namespace", "url")})
        if not wait:
            return started
        told = self._end_of(started, say)
        _record(matter.remember, say, told)
        return {**told, "job": started["url"]}

    def _read_end(self, matter: Matter, say: Callable[[str], None]) -> Matter:
        """Record the decision of the last Job for these inputs if nobody waited for it.

        Raises:
            HubAway: if the Hub does not answer, because a second Job would cost money for the same work.
        """
        job = matter.record.job
        if job is None:
            return matter
        log = JobLog({"repo": matter.repo, **job}, lambda line: None)
        try:
            stage = log.follow()
        except HubAway:
            raise
        except HubError as error:
            stage = str(error)
        if told := log.decision:
            return matter.remember(told)
        say(f"the last Job came to no decision: {log.complaint or stage} (log: {job['url']})")
        return matter.keep(job=None)

    def _start(self, config: Config, package: str, token: str) -> dict:
        """Start the Job with exactly these inputs.

        Returns:
            The keys of a decision with the outcome "started", and the `id` and `namespace` of the Job.
        """
        from huggingface_hub import HfApi

        repo = config.publish.target
        who = retry_or_explain(repo, lambda: who_is(repo, token)["name"])
        of_tracker = {name: os.environ[name] for name in self._tracker.SECRETS if os.environ.get(name)}
        options = ["--margin", f"{self.margin:g}", *(["--force"] if self.force else []), *self.removal.options]
        started = retry_or_explain(
            repo,
            lambda: HfApi().run_job(
                image=IMAGE,
                command=["bash", "-c", SCRIPT, "retrain", *options],
                env={IN_A_JOB: dump_config(config), "TUNEPRESS_PACKAGE": package},
                secrets={"HF_TOKEN": token, **of_tracker},
                flavor=self.flavor,
                timeout=self.timeout,
                labels=labels(repo),
                namespace=who,
            ),
            attempts=1,  # after a lost answer nobody knows if the Job was started
        )
        reason = f"started as a Job on {self.flavor}: {started.url}"
        summary = f"## Retraining {repo}: Started\n\n[{started.url}]({started.url}) on {self.flavor}.\n"
        about = {"id": started.id, "namespace": who, "url": started.url}
        return {"outcome": "started", "repo": repo, "reason": reason, "exit_code": 0, "summary": summary, **about}

    def _end_of(self, started: dict, say: Callable[[str], None]) -> dict:
        """Follow a Job, and return the decision that it printed."""
        say(started["reason"])
        log = JobLog(started, say)
        goes_on = f"the Job goes on: {started['url']}; to stop it: hf jobs cancel {started['id']}"
        try:
            stage = log.follow()
        except KeyboardInterrupt:
            raise JobFailed(goes_on, 130) from None
        except HubError as error:
            raise JobFailed(f"{error}; {goes_on}", 1) from None
        if log.decision:
            return log.decision
        raise JobFailed(f"{log.complaint or f'the Job ended as {stage}'} (log: {started['url']})", log.code or 1)

    @property
    def _tracker(self) -> Tracker:
        return tracker(self.config.track.tracker)

    def _package(self) -> str:
        env, package = os.environ, self.package
        if package is None and env.get("GITHUB_ACTIONS") == "true":
            package = f"git+{env['GITHUB_SERVER_URL']}/{env['GITHUB_REPOSITORY']}@{env['GITHUB_SHA']}"
        if package is None or not PACKAGE.match(package):
            raise ConfigError(
                f"--package {_without_login(package) if package else 'is not given'}: a Job can install "
                "git+https://HOST/USER/REPOSITORY@COMMIT, or a wheel at https://, with no password and no ? in it"
            )
        entries = [self._tracker.REQUIRES, *(spec.requires for spec in self.config.quantize.variants)]
        needed = ",".join(sorted({extra for requires in entries for _, extra in requires}))
        return f"tunepress{f'[{needed}]' if needed else ''} @ {package}"

    def _check(self) -> tuple[TrainingRun, str]:
        """Return the configuration and the package for the Job; raise if an input is only on this machine."""
        config, package = check(self.config, self.margin), self._package()
        if not TIMEOUT.match(self.timeout):
            raise ConfigError(f"--timeout {self.timeout}: write it as 90m, 6h or 1d")
        texts = [source for source in config.quantize.calibration.sources if not is_builtin(source) and locate(source)]
        parts = [*config.data.all_parts, *(second.data.all_parts if (second := config.train.preference) else ())]
        rows = [part.source for part in parts if not is_builtin(part.source) and locate(part.source)]
        here = {
            "model.source": (is_local(config.model.source) or PACKAGE_SOURCE.match(config.model.source))
            and config.model.source,
            "data.source": ", ".join(rows),
            "evaluate.general": not config.evaluate.general.startswith("builtin:") and config.evaluate.general,
            "quantize.calibration.source": ", ".join(texts),
        }
        for key, value in here.items():
            if value:
                raise ConfigError(f"{key} {value}: only on this machine, so a Job cannot read it. Try: upload it")
        return config, package


def _record(write: Callable, say: Callable[[str], None], *decision: dict, **known: dict) -> None:
    """Write the record of a Job; if that fails, tell it and go on, because the Job does not depend on it."""
    try:
        write(*decision, **known)
    except (OSError, HubError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        say(f"the state of the Job cannot be recorded ({reason}), so the next call may start the same Job again")


def _without_login(address: str) -> str:
    """Return an address without a password before the @ of its host, and without a possible token after a ?."""
    return redact(re.sub(r"\?.*", "?***", re.sub(r"//[^\s/]*@", "//***@", address)))
