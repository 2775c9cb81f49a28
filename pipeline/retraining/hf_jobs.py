"""A retraining as a Hugging Face Job: a machine of the Hub's that installs tunepress and runs the same command.

The configuration goes along in the environment, tokens as the Job's secrets, and neither on the command line.
A Job's status knows success and failure only, so the exit code and the decision are read from its log.
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
from pipeline.retraining.decision import Matter, check, look
from pipeline.retraining.hf_job_log import JobLog
from pipeline.retraining.lock import IN_A_JOB, alone, labels, refuse_beside_job
from pipeline.retraining.report import plain

IMAGE = "ghcr.io/astral-sh/uv:python3.12-bookworm"
TIMEOUT = re.compile(r"\d+(\.\d+)?[smhd]?\Z")
PACKAGE = re.compile(r"(git\+)?https://[^\s/@?]+/[^\s?]+\Z")  # no password or token in it, for it is not kept secret
SECRETS = ("TRACKIO_WRITE_TOKEN",)  # besides the Hub's, where they are set

# A Job is a failure where it does not end with 0, and "not better" is none.
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
    """A retraining to be run elsewhere.

    Attributes:
        flavor: hardware, as the Hub names it.
        timeout: the longest time, such as 6h.
        package: what the Job installs, `git+https://...@COMMIT` or a wheel's address; None for the commit that a
            GitHub workflow runs for.
    """

    config: Config
    flavor: str
    timeout: str
    package: str | None
    margin: float
    force: bool

    def run(self, root: str | Path, say: Callable[[str], None], wait: bool = True) -> dict:
        """Start it, where it is not decided already, and follow it to its end.

        Args:
            root: folder under which is kept what was decided.
            say: takes the lines of its log.
            wait: follow it; else it is only started.

        Returns:
            The decision, as the Job printed it; of one that is only started, what `_start` returns.

        Raises:
            ConfigError: where the Job could not reach what it needs.
            Busy: where a Job retrains this repository already.
            HubError: where the Hub refuses.
            JobFailed: where it came to no decision; with the Job's own exit code where it told one.
        """
        config, package = self._check()
        repo = config.publish.target
        if keyless():
            raise HubError(f"{repo}: a keyless login cannot start Jobs; set HF_TOKEN instead of HF_OIDC_RESOURCE")
        token = check_token(repo, None if self.config.publish.create_pr else repo.split("/")[0])
        with alone(repo):  # until it is started, and then it is found by its labels
            refuse_beside_job(repo)
            matter = self._read_end(look(config, root), say)
            if not self.force and (settled := matter.settled(self.margin)):
                return plain(settled)
            started = self._start(matter.inputs.config, package, token)
            _keep(matter.keep, say, job={key: started[key] for key in ("id", "namespace", "url")})
        if not wait:
            return started
        told = self._end_of(started, say)
        _keep(matter.remember, say, told)
        return {**told, "job": started["url"]}

    def _read_end(self, matter: Matter, say: Callable[[str], None]) -> Matter:
        """What is known with what the last Job for these inputs came to, where nobody waited for it.

        Raises:
            HubAway: where the Hub does not say, for then another one might be paid for the same.
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
        """Start it, on these very inputs.

        Returns:
            What to tell: as a decision has it, the outcome being "started", and the Job's `id` and `namespace`.
        """
        from huggingface_hub import HfApi

        repo = config.publish.target
        who = retry_or_explain(repo, lambda: who_is(repo, token)["name"])
        secrets = {"HF_TOKEN": token, **{name: os.environ[name] for name in SECRETS if os.environ.get(name)}}
        options = ["--margin", f"{self.margin:g}", *(["--force"] if self.force else [])]
        started = retry_or_explain(
            repo,
            lambda: HfApi().run_job(
                image=IMAGE,
                command=["bash", "-c", SCRIPT, "retrain", *options],
                env={IN_A_JOB: dump_config(config), "TUNEPRESS_PACKAGE": package},
                secrets=secrets,
                flavor=self.flavor,
                timeout=self.timeout,
                labels=labels(repo),
                namespace=who,
            ),
            attempts=1,  # whether it was started is not known after an answer that was lost
        )
        reason = f"started as a Job on {self.flavor}: {started.url}"
        summary = f"## Retraining {repo}: Started\n\n[{started.url}]({started.url}) on {self.flavor}.\n"
        about = {"id": started.id, "namespace": who, "url": started.url}
        return {"outcome": "started", "repo": repo, "reason": reason, "exit_code": 0, "summary": summary, **about}

    def _end_of(self, started: dict, say: Callable[[str], None]) -> dict:
        """Follow a Job; the decision that it printed."""
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

    def _package(self) -> str:
        env, package = os.environ, self.package
        if package is None and env.get("GITHUB_ACTIONS") == "true":
            package = f"git+{env['GITHUB_SERVER_URL']}/{env['GITHUB_REPOSITORY']}@{env['GITHUB_SHA']}"
        if package is None or not PACKAGE.match(package):
            raise ConfigError(
                f"--package {_without_login(package) if package else 'is not given'}: a Job can install "
                "git+https://HOST/USER/REPOSITORY@COMMIT, or a wheel at https://, with no password and no ? in it"
            )
        variants = [spec.variant for spec in self.config.quantize.variants]
        needed = ",".join(sorted({extra for variant in variants for _, extra in variant.requires}))
        return f"tunepress{f'[{needed}]' if needed else ''} @ {package}"

    def _check(self) -> tuple[TrainingRun, str]:
        """Refuse what is only on this machine; return the configuration, and what the Job installs."""
        config, package = check(self.config, self.margin), self._package()
        if not TIMEOUT.match(self.timeout):
            raise ConfigError(f"--timeout {self.timeout}: write it as 90m, 6h or 1d")
        here = {
            "model.source": is_local(config.model.source) or PACKAGE_SOURCE.match(config.model.source),
            "data.source": not is_builtin(config.data.source) and locate(config.data.source),
            "evaluate.general": not config.evaluate.general.startswith("builtin:"),
        }
        for key, is_here in here.items():
            if is_here:
                section, name = key.split(".")
                value = getattr(getattr(config, section), name)
                raise ConfigError(f"{key} {value}: is on this machine, where a Job cannot read it; put it on the Hub")
        return config, package


def _keep(keep: Callable, say: Callable[[str], None], *what: dict, **known: dict) -> None:
    """Keep what is known of a Job; that goes on, or is decided, all the same."""
    try:
        keep(*what, **known)
    except (OSError, HubError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        say(f"what became of the Job cannot be kept ({reason}), so the next call may start another for the same")


def _without_login(address: str) -> str:
    """An address as it may be shown: before an @ of its host stands a password, and after a ? perhaps a token."""
    return redact(re.sub(r"\?.*", "?***", re.sub(r"//[^\s/]*@", "//***@", address)))
