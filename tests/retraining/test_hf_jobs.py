"""Retraining as a Hugging Face Job: the request, and the reading of its log."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import constants

from pipeline.cli import retrain
from pipeline.config.loader import load_config
from pipeline.hub.retry import HubAway
from pipeline.retraining.input_changes import inputs_of
from pipeline.retraining.lock import alone, refuse_beside_job
from tests.support.runs import TOKEN, Place, write_place

PACKAGE = "git+https://github.com/ada/training@0123abc"
FIGURES = {
    "unit": "nats per token",
    "paired_by": "token",
    "new": {"value": 1.0, "stderr": 0.1},
    "live": {"value": 1.0, "stderr": 0.1},
    "difference": {"value": 0.0, "stderr": 0.1},
    "compared_with": {"repo": "ada/tiny", "commit": "0" * 40},
    "tokens": 400,
    "examples": 20,
    "prompts": 20,
    "note": "neither model was trained on these prompts",
}
DECISION = {
    "outcome": "not_better",
    "reason": "not better: by too little",
    "exit_code": 3,
    "summary": "## Not better",
    "comparison": FIGURES,
}


@pytest.fixture
def hub(hub, tmp_path, monkeypatch):
    """The Hub with Jobs that come to `DECISION`, and no long wait before another attempt."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("pipeline.retraining.hf_job_log.POLL_SECONDS", 0.01)
    hub.jobs.log = ["Installed 99 packages", json.dumps(DECISION), "tunepress: exit code 3"]
    hub.put("ada/base", {"config.json": b"{}"})
    rows = [json.dumps({"prompt": f"p{n}", "completion": f"c{n}"}) for n in range(40)]
    hub.put("ada/rows", {"rows.jsonl": "\n".join(rows).encode()}, repo_type="dataset")
    return hub


@pytest.fixture
def place(hub, tmp_path) -> Place:
    """A configuration whose every source a Job can reach."""
    place = write_place(tmp_path / "work", "ada/base", hub)
    tree = yaml.safe_load(place.config.read_text())
    tree["data"]["source"], tree["evaluate"]["general"] = "ada/rows", "builtin:python-topics"
    place.config.write_text(yaml.safe_dump(tree))
    return place


@pytest.fixture
def submit(place, monkeypatch, capsys) -> Callable:
    """`submit(*options)`: what the command made of it."""

    def run(*options: str, package: str | None = PACKAGE, **environment: str) -> SimpleNamespace:
        chosen = ["--package", package] if package else []
        monkeypatch.chdir(place.folder)
        monkeypatch.setattr(sys, "argv", ["retrain.py", "tiny.yaml", "--on", "hf-jobs", *chosen, *options])
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            retrain.main()
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=ended.value.code, stdout=out, stderr=err)

    return run


def test_a_job_gets_the_configuration_what_to_install_and_its_tokens_as_secrets(submit, hub):
    options = ("--flavor", "h200", "--timeout", "90m", "--margin", "3", "--force", "--pull-request")
    done = submit(*options, "--set", "train.max_steps=7", TRACKIO_WRITE_TOKEN="a write token")
    (spec,) = hub.jobs.started
    assert (spec["flavor"], spec["timeoutSeconds"]) == ("h200", 5400)
    assert spec["secrets"] == {"HF_TOKEN": TOKEN, "TRACKIO_WRITE_TOKEN": "a write token"}
    assert spec["environment"]["TUNEPRESS_PACKAGE"] == f"tunepress @ {PACKAGE}"
    asked = yaml.safe_load(spec["environment"]["TUNEPRESS_CONFIG"])
    assert asked["train"]["max_steps"] == 7 and asked["publish"]["create_pr"] is True
    revisions = hub.commits("ada/base")[0], hub.commits("ada/rows", repo_type="dataset")[0]
    assert (asked["model"]["revision"], asked["data"]["revision"]) == revisions
    assert spec["command"][:2] == ["bash", "-c"] and spec["command"][3:] == ["retrain", "--margin", "3", "--force"]
    open_part = json.dumps({key: value for key, value in spec.items() if key != "secrets"})
    assert TOKEN not in open_part + done.stdout + done.stderr and "a write token" not in open_part


def test_a_job_gets_the_package_and_the_key_of_its_tracker(submit, hub):
    submit("--set", "track.tracker=wandb", WANDB_API_KEY="a key", TRACKIO_WRITE_TOKEN="of another tracker")
    (spec,) = hub.jobs.started
    assert spec["secrets"] == {"HF_TOKEN": TOKEN, "WANDB_API_KEY": "a key"}
    assert spec["environment"]["TUNEPRESS_PACKAGE"] == f"tunepress[wandb] @ {PACKAGE}"


@pytest.mark.parametrize("code", [0, 2, 3, 4, 75])
def test_the_jobs_script_runs_the_command_on_that_configuration_and_tells_its_exit_code(submit, hub, tmp_path, code):
    submit()
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
    assert asked.endswith(" -m pipeline.cli.retrain run.yaml --json --margin 2\n")


def test_the_command_follows_the_log_and_ends_as_the_job_did(submit, hub, place):
    done = submit("--summary", "told.md")
    assert done.returncode == 3
    assert "Installed 99 packages" in done.stdout and done.stdout.splitlines()[-1] == DECISION["reason"]
    assert (place.folder / "told.md").read_text().startswith("## Not better")
    assert json.loads(submit("--json").stdout) == {**DECISION, "job": f"{hub.url}/jobs/ada/2"}


def test_a_job_that_fails_tells_its_last_error_and_its_exit_code(submit, hub):
    hub.jobs.log = ["retrain: ada/rows: no such data set on the Hub", "tunepress: exit code 2"]
    hub.jobs.stage = "ERROR"
    done = submit()
    assert done.returncode == 2
    assert done.stderr.strip() == (f"retrain: ada/rows: no such data set on the Hub (log: {hub.url}/jobs/ada/1)")


@pytest.mark.parametrize("log", [["Killed"], ['{"outcome": "not_bet', "Killed"]])
def test_a_job_that_ends_without_a_decision_has_failed(submit, hub, log):
    hub.jobs.log, hub.jobs.stage = log, "ERROR"
    done = submit()
    assert done.returncode == 1 and "the Job ended as ERROR" in done.stderr


def test_job_without_waiting_is_only_started(submit, hub):
    hub.jobs.stage = "SCHEDULING"
    done = submit("--no-wait", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["url"] == f"{hub.url}/jobs/ada/1"


def test_a_job_that_nobody_waited_for_is_asked_what_it_decided_before_another_is_paid(submit, hub, place):
    compared(hub, release(hub, place, max_steps=3))
    hub.jobs.stage = "RUNNING"
    assert submit("--no-wait").returncode == 0
    hub.jobs.stage = "COMPLETED"
    done = submit("--no-wait", "--json")
    assert done.returncode == 3 and "measured before" in json.loads(done.stdout)["reason"]
    assert len(hub.jobs.started) == 1


def test_a_job_that_nobody_waited_for_and_that_failed_is_started_again_which_is_said(submit, hub):
    hub.jobs.log, hub.jobs.stage = ["retrain: no space left", "tunepress: exit code 2"], "ERROR"
    submit("--no-wait")
    done = submit("--no-wait")
    assert "the last Job came to no decision: no space left" in done.stdout and len(hub.jobs.started) == 2


def test_a_decision_against_another_model_than_the_one_that_is_live_settles_nothing(submit, hub, place):
    compared(hub, release(hub, place, max_steps=3))
    submit("--no-wait")
    release(hub, place, max_steps=5)
    hub.put("ada/tiny", {"config.json": b'{"other": 1}'})
    submit("--no-wait")
    assert len(hub.jobs.started) == 2


def test_only_one_of_two_concurrent_starts_makes_a_job(submit, hub):
    with alone("ada/tiny"):
        done = submit()
    assert done.returncode == 75 and not hub.jobs.started


def test_a_token_that_may_not_list_jobs_may_retrain_here(hub):
    for status in (401, 403, 404):
        hub.fault(r"GET /api/jobs/ada", status=status)
        refuse_beside_job("ada/tiny")
    hub.fault(r"GET /api/whoami", status=503, times=9)
    with pytest.raises(HubAway):
        refuse_beside_job("ada/tiny")


def test_a_pull_request_to_somebody_elses_repository_needs_no_right_to_write_there(submit, hub):
    assert submit("--set", "publish.repo=bob/tiny").returncode == 2
    submit("--set", "publish.repo=bob/tiny", "--pull-request")
    assert len(hub.jobs.started) == 1


def test_a_mistake_in_the_configuration_is_summed_up_under_its_name(submit, place):
    done = submit("--set", "train.max_stepz=1", "--summary", "told.md")
    assert done.returncode == 2
    told = (place.folder / "told.md").read_text()
    assert told.startswith("## Retraining tiny.yaml: Failed") and "max_stepz" in told


def test_two_jobs_of_one_repository_do_not_run_at_once(submit, hub):
    hub.jobs.stage = "RUNNING"
    submit("--no-wait")
    done = submit("--no-wait")
    assert done.returncode == 75 and f"{hub.url}/jobs/ada/1" in done.stderr
    assert len(hub.jobs.started) == 1


def test_trouble_with_the_log_is_no_end_of_the_job(submit, hub):
    hub.fault(r"GET .*/logs", status=503)
    hub.fault(r"GET .*/logs", cut=150)
    hub.fault(r"GET .*/logs", status=403)
    hub.fault(r"GET /api/jobs/ada/1$", status=503, times=3)
    done = submit()
    assert done.returncode == 3 and done.stdout.splitlines()[-1] == DECISION["reason"]
    assert done.stdout.count("Installed 99 packages") == 1


def test_unreachable_job_continues_and_its_address_is_shown(submit, hub):
    hub.fault(r"GET /api/jobs/ada/1$", status=403, times=9)
    done = submit()
    assert done.returncode == 1
    assert f"the Job goes on: {hub.url}/jobs/ada/1" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def release(hub, place: Place, **changes) -> str:
    """Publish what a run of the configuration would leave, but for `changes` to its `train`; the commit."""
    config = load_config(place.config)
    inputs = inputs_of(config)
    configuration = json.loads(inputs.config.model_dump_json())
    configuration["train"] |= changes
    lineage = {
        "run": "tiny",
        "base": {"revision": inputs.config.model.revision},
        "data": {"revision": inputs.data},
        "configuration": configuration,
        "files": {"config.json": {"sha256": "0", "size": 2}},
        "documents": [],
        "results": {},
    }
    return hub.put("ada/tiny", {"config.json": b"{}", "tunepress.json": json.dumps(lineage).encode()})


def compared(hub, head: str) -> None:
    """Have Jobs come to `DECISION` about this commit."""
    figures = {**FIGURES, "compared_with": {"repo": "ada/tiny", "commit": head}}
    hub.jobs.log = [json.dumps({**DECISION, "comparison": figures}), "tunepress: exit code 3"]


def test_no_job_is_started_where_nothing_changed(submit, hub, place):
    head = release(hub, place)
    done = submit("--json", "--summary", "told.md")
    assert done.returncode == 4 and head[:12] in json.loads(done.stdout)["reason"]
    assert "Skipped" in (place.folder / "told.md").read_text() and not hub.jobs.started
    assert submit("--force").returncode == 3 and len(hub.jobs.started) == 1


def test_job_decision_is_recorded_locally(submit, hub, place):
    compared(hub, release(hub, place, max_steps=3))
    assert submit().returncode == 3
    again = submit("--json")
    assert again.returncode == 3 and "measured before" in json.loads(again.stdout)["reason"]
    assert len(hub.jobs.started) == 1
    assert submit("--set", "train.max_steps=9").returncode == 3 and len(hub.jobs.started) == 2


def test_in_a_workflow_of_github_the_job_installs_the_commit_that_it_runs_for(submit, hub):
    github = {"GITHUB_SERVER_URL": "https://github.com", "GITHUB_REPOSITORY": "ada/x", "GITHUB_SHA": "f00"}
    submit(package=None, GITHUB_ACTIONS="true", **github)
    assert hub.jobs.started[0]["environment"]["TUNEPRESS_PACKAGE"] == "tunepress @ git+https://github.com/ada/x@f00"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--set", "data.source=rows.jsonl"], "data.source rows.jsonl"),
        (["--set", "model.source=./base"], "model.source ./base"),
        (["--set", "evaluate.general=general.txt"], "evaluate.general general.txt"),
        (["--set", "quantize.calibration.source=general.txt"], "quantize.calibration.source general.txt"),
        (["--timeout", "soon"], "--timeout soon"),
        (["--package", "dist/tunepress-0.1-py3-none-any.whl"], "--package dist/tunepress-0.1-py3-none-any.whl"),
        (["--package", "git+https://secret@github.com/ada/x"], "with no password"),
        (["--package", "https://example.org/x.whl?token=secret"], "no ? in it"),
    ],
)
def test_local_inputs_are_refused_before_a_job_starts(submit, hub, options, named):
    done = submit(*options)
    assert done.returncode == 2
    assert named in done.stderr and len(done.stderr.strip().splitlines()) == 1 and "secret" not in done.stderr
    assert not hub.jobs.started
