"""GitHub workflows: triggers, permissions, and the meaning of exit codes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support import REPOSITORY

WORKFLOWS = REPOSITORY / ".github" / "workflows"


def workflow(name: str) -> dict:
    content = yaml.safe_load((WORKFLOWS / name).read_text())
    return {**content, "on": content[True]}  # YAML's `on` is a truth value


def steps(name: str, job: str) -> list[dict]:
    return workflow(name)["jobs"][job]["steps"]


def step(name: str) -> dict:
    """A step of the retraining, by its name."""
    return next(found for found in steps("retrain.yml", "retrain") if found.get("name") == name)


def test_retraining_starts_by_hand_on_a_schedule_on_a_push_and_on_a_dispatch():
    on = workflow("retrain.yml")["on"]
    assert set(on) == {"workflow_dispatch", "schedule", "push", "repository_dispatch"}
    assert set(on["workflow_dispatch"]["inputs"]) == {"config", "pull_request", "force", "on", "runner"}
    assert on["push"]["paths"] == ["configs/**", "data/**"]
    assert on["repository_dispatch"]["types"] == ["retrain"]
    assert all(len(entry["cron"].split()) == 5 for entry in on["schedule"])


def test_retraining_may_prove_who_it_is_and_read_the_clone_and_nothing_else():
    assert workflow("retrain.yml")["permissions"] == {"contents": "read", "id-token": "write"}
    assert workflow("ci.yml")["permissions"] == {"contents": "read"}


def test_retrainings_of_a_configuration_wait_for_each_other():
    concurrency = workflow("retrain.yml")["concurrency"]
    assert concurrency["cancel-in-progress"] is False
    assert "vars.RETRAIN_CONFIG" in concurrency["group"] and "client_payload.config" in concurrency["group"]


def test_a_record_is_brought_to_new_machines_alone_and_kept_however_the_retraining_ends():
    recall, remember = step("Recall"), step("Remember")
    assert recall["if"] == "runner.environment == 'github-hosted'"
    assert remember["if"] == "always() && runner.environment == 'github-hosted'"
    assert recall["with"]["path"] == remember["with"]["path"] and recall["with"]["key"] == remember["with"]["key"]


def test_on_githubs_own_machines_there_is_time_left_to_keep_the_record():
    limit = step("Retrain")["timeout-minutes"]
    assert limit == "${{ runner.environment == 'github-hosted' && 330 || 1440 }}"  # of the 360 that such a job has


def test_a_stored_token_goes_before_the_keyless_login():
    env = step("Retrain")["env"]
    assert env["HF_OIDC_RESOURCE"] == "${{ !secrets.HF_TOKEN && vars.RETRAIN_REPO || '' }}"


@pytest.mark.parametrize("name", ["retrain.yml", "ci.yml"])
def test_untrusted_values_never_stand_in_a_script(name):
    for job in workflow(name)["jobs"].values():
        assert all("${{" not in step.get("run", "") for step in job["steps"])


@pytest.mark.parametrize(
    ("code", "ends", "told"),
    [(0, 0, "published"), (3, 0, "not better"), (4, 0, "skipped"), (75, 75, "another"), (2, 2, ""), (1, 1, "")],
)
def test_not_better_and_skipped_are_successes_with_a_notice(tmp_path, code, ends, told):
    done = _retrain_step(tmp_path, code)
    assert done.returncode == ends
    assert told in done.stdout and ("::notice" in done.stdout) == (ends == 0)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, ""),
        ({"PULL_REQUEST": "true", "FORCE": "true"}, " --pull-request --force"),
        ({"PLACE": "hf-jobs", "FLAVOR": "h200"}, " --on hf-jobs --flavor h200"),
    ],
)
def test_inputs_become_options(tmp_path, settings, options):
    _retrain_step(tmp_path, 0, **settings)
    assert (
        tmp_path / "asked"
    ).read_text() == f"scripts/retrain.py my run.yaml --runs {tmp_path}/tunepress-runs{options}\n"


def test_a_machine_that_only_starts_a_job_installs_no_cuda():
    index = step("Install")["env"]["PIP_EXTRA_INDEX_URL"]
    place = workflow("retrain.yml")["jobs"]["retrain"]["runs-on"]
    is_job = place[len("${{ ") : place.index(" && 'ubuntu-latest'")]  # the same condition decides where it runs
    assert index == f"${{{{ {is_job} && 'https://download.pytorch.org/whl/cpu' || '' }}}}"


def test_ci_runs_the_check_and_test_commands_of_the_readme_and_caches_packages():
    repository = WORKFLOWS.parents[1]
    readme = (repository / "README.md").read_text()
    commands = [step["run"] for step in steps("ci.yml", "test") if "run" in step]
    assert commands == ["./launch.sh --check", "./launch.sh --test"]
    assert all(command in readme for command in commands)
    lines = (repository / ".ci" / "run").read_text().splitlines()
    assert [line.removeprefix("exec ") for line in lines[-2:]] == commands
    assert {"push", "pull_request"} <= set(workflow("ci.yml")["on"])
    setup = next(step["with"] for step in steps("ci.yml", "test") if "setup-python" in step.get("uses", ""))
    assert setup["cache"] == "pip"


def _retrain_step(folder: Path, code: int, **settings: str) -> subprocess.CompletedProcess:
    """Run the step's script as GitHub does, with a Python that notes what it is asked and ends with `code`."""
    python = folder / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" > {folder}/asked\nexit {code}\n')
    python.chmod(0o755)
    script = folder / "step.sh"
    script.write_text(step("Retrain")["run"])
    env = {"CONFIG": "my run.yaml", "PULL_REQUEST": "", "FORCE": "", "PLACE": "runner", "FLAVOR": "a10g-large"}
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", str(script)],
        env={**os.environ, **env, **settings, "RUNNER_TEMP": str(folder), "HOME": str(folder)},
        capture_output=True,
        text=True,
    )
