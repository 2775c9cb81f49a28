"""Retraining as a Hugging Face Job: what is asked of the Hub, and what is made of what the Job says."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from tests.hub import LoopbackHub
from tests.run.conftest import REPOSITORY, TOKEN, Place, write_place

PACKAGE = "git+https://github.com/ada/training@0123abc"
DECISION = {"outcome": "not_better", "reason": "not better: by too little", "exit_code": 3, "summary": "## Not better"}


@pytest.fixture
def hub(tmp_path):
    with LoopbackHub(tmp_path / "hub", {TOKEN: {"name": "ada"}}) as hub:
        hub.jobs.log = ["Installed 99 packages", json.dumps(DECISION), "tunepress: exit code 3"]
        yield hub


@pytest.fixture
def place(hub, tmp_path) -> Place:
    """A configuration whose every source a Job can reach."""
    place = write_place(tmp_path / "work", "ada/base", hub)
    tree = yaml.safe_load(place.config.read_text())
    tree["data"]["source"], tree["evaluate"]["general"] = "ada/rows", "builtin:python-topics"
    place.config.write_text(yaml.safe_dump(tree))
    return place


def submit(place: Place, *options: str, package: str | None = PACKAGE, **environment) -> subprocess.CompletedProcess:
    script = [sys.executable, str(REPOSITORY / "scripts" / "retrain.py"), "tiny.yaml", "--on", "hf-jobs"]
    chosen = ["--package", package] if package else []
    return subprocess.run(
        [*script, *chosen, *options],
        cwd=place.folder, env={**place.env, **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_job_gets_the_configuration_what_to_install_and_its_tokens_as_secrets(place, hub):
    options = ("--flavor", "h200", "--timeout", "90m", "--margin", "3", "--force", "--pull-request")
    done = submit(place, *options, "--set", "train.max_steps=7", TRACKIO_WRITE_TOKEN="a write token")
    (spec,) = hub.jobs.started
    assert (spec["flavor"], spec["timeoutSeconds"]) == ("h200", 5400)
    assert spec["secrets"] == {"HF_TOKEN": TOKEN, "TRACKIO_WRITE_TOKEN": "a write token"}
    assert spec["environment"]["TUNEPRESS_PACKAGE"] == f"tunepress @ {PACKAGE}"
    asked = yaml.safe_load(spec["environment"]["TUNEPRESS_CONFIG"])
    assert asked["train"]["max_steps"] == 7 and asked["publish"]["create_pr"] is True
    assert spec["command"][:2] == ["bash", "-c"] and spec["command"][3:] == ["retrain", "--margin", "3", "--force"]
    open_part = json.dumps({key: value for key, value in spec.items() if key != "secrets"})
    assert TOKEN not in open_part + done.stdout + done.stderr and "a write token" not in open_part


@pytest.mark.parametrize("code", [0, 2, 3, 4, 75])
def test_the_jobs_script_runs_the_command_on_that_configuration_and_tells_its_exit_code(place, hub, tmp_path, code):
    submit(place)
    (spec,) = hub.jobs.started
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncat run.yaml > {tmp_path}/run.yaml\nexit {code}\n')
    uv.chmod(0o755)
    env = {**spec["environment"], "PATH": f"{uv.parent}:/usr/bin:/bin"}
    done = subprocess.run(spec["command"], env=env, capture_output=True, text=True)
    assert done.returncode == (0 if code in (3, 4) else code)  # a Job that is not better has not failed
    assert done.stdout.splitlines()[-1] == f"tunepress: exit code {code}"
    assert (tmp_path / "run.yaml").read_text() == spec["environment"]["TUNEPRESS_CONFIG"]
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith(f"run --no-project --python 3.12 --with tunepress @ {PACKAGE} ")
    assert asked.endswith(" -m pipeline.retrain_command run.yaml --json --margin 2\n")


def test_the_command_follows_the_log_and_ends_as_the_job_did(place, hub):
    done = submit(place, "--summary", "told.md")
    assert done.returncode == 3
    assert "Installed 99 packages" in done.stdout and done.stdout.splitlines()[-1] == DECISION["reason"]
    assert (place.folder / "told.md").read_text().startswith("## Not better")
    assert json.loads(submit(place, "--json").stdout) == {**DECISION, "job": f"{hub.url}/jobs/ada/2"}


def test_a_job_that_fails_tells_its_last_error_and_its_exit_code(place, hub):
    hub.jobs.log = ["retrain: ada/rows: no such data set on the Hub", "tunepress: exit code 2"]
    hub.jobs.stage = "ERROR"
    done = submit(place)
    assert done.returncode == 2
    assert done.stderr.strip() == (f"retrain: ada/rows: no such data set on the Hub (log: {hub.url}/jobs/ada/1)")


def test_a_job_that_ends_without_a_word_has_failed(place, hub):
    hub.jobs.log, hub.jobs.stage = ["Killed"], "ERROR"
    done = submit(place)
    assert done.returncode == 1 and "the Job ended as ERROR" in done.stderr


def test_without_waiting_it_is_only_started(place, hub):
    hub.jobs.stage = "SCHEDULING"
    done = submit(place, "--no-wait", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["url"] == f"{hub.url}/jobs/ada/1"


def test_two_jobs_of_one_repository_do_not_run_at_once(place, hub):
    hub.jobs.stage = "RUNNING"
    submit(place, "--no-wait")
    done = submit(place, "--no-wait")
    assert done.returncode == 75 and f"{hub.url}/jobs/ada/1" in done.stderr
    assert len(hub.jobs.started) == 1


def test_in_a_workflow_of_github_the_job_installs_the_commit_that_it_runs_for(place, hub):
    github = {"GITHUB_SERVER_URL": "https://github.com", "GITHUB_REPOSITORY": "ada/x", "GITHUB_SHA": "f00"}
    submit(place, package=None, GITHUB_ACTIONS="true", **github)
    assert hub.jobs.started[0]["environment"]["TUNEPRESS_PACKAGE"] == "tunepress @ git+https://github.com/ada/x@f00"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--set", "data.source=rows.jsonl"], "data.source rows.jsonl"),
        (["--set", "model.source=./base"], "model.source ./base"),
        (["--set", "evaluate.general=general.txt"], "evaluate.general general.txt"),
        (["--timeout", "soon"], "--timeout soon"),
        (["--package", "dist/tunepress-0.1-py3-none-any.whl"], "--package dist/tunepress-0.1-py3-none-any.whl"),
        (["--package", "git+https://secret@github.com/ada/x"], "without a password"),
    ],
)
def test_what_a_job_cannot_reach_is_refused_before_it_is_started(place, hub, options, named):
    done = submit(place, *options)
    assert done.returncode == 2
    assert named in done.stderr and len(done.stderr.strip().splitlines()) == 1 and "secret" not in done.stderr
    assert not hub.jobs.started
