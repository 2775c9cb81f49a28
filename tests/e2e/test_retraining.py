"""Retraining: only a better model is published, and a kill loses nothing."""

from __future__ import annotations

import json
import shlex

import pytest

from pipeline.evaluation.cluster_errors import quantile
from tests.support.hub import LoopbackHub
from tests.support.retraining import BASE, IDENTITY, PUBLISHER_TOKEN, REPO, Retraining, Story, as_options, kill
from tests.support.runs import TOKEN, write_place

pytestmark = pytest.mark.timeout(1800)  # the story is told in the first test


@pytest.fixture(scope="module")
def story(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("retraining")
    users = {TOKEN: {"name": "ada"}, PUBLISHER_TOKEN: {"name": "ada", "role": "publisher"}}
    with LoopbackHub(folder / "hub", users) as hub:
        hub.publishers[REPO, IDENTITY] = PUBLISHER_TOKEN
        place = Retraining(folder / "work", hub)
        hub.put(BASE, {path.name: path.read_bytes() for path in tiny_model("llama").iterdir()})
        write_place(
            place.folder,
            BASE,
            hub,
            train={"method": "lora", "checkpoint_every": 1},
            merge={"base": "bf16"},
            data={"held_out": 0.5},
            evaluate={"max_tokens": 1024, "prompts": []},
            quantize={"variants": []},
        )
        (place.folder / "general.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 3)
        first = place.decision("first")
        first_commit, requests = hub.commits(REPO)[0], len(hub.requests)
        unchanged = place.decision("first", "--summary", "unchanged.md")
        while_unchanged, worse_place = hub.requests[requests:], place.copy(folder / "worse")

        process = place.start("better")
        busy = place.retrain("better")
        kill(process, place)
        process.communicate()
        head_after_kill = hub.commits(REPO)[0]
        better = place.decision("better", "--summary", "better.md")
        commits = hub.commits(REPO)

        worse = worse_place.decision("first", "--summary", "worse.md")
        worse_events = len(worse_place.events())
        worse_again = worse_place.decision("first")
        yield Story(
            place, first, first_commit, unchanged, while_unchanged, busy, head_after_kill, better, commits[0], commits,
            worse_place, worse, worse_again, worse_events,
        )  # fmt: skip


def test_the_first_model_is_published_for_there_is_nothing_to_beat(story):
    assert (story.first["outcome"], story.first["exit_code"]) == ("published", 0)
    assert story.first["commit"] == story.first_commit and story.first["comparison"] is None
    assert "config.json" in story.place.hub.files(REPO, story.first_commit)


def test_unchanged_inputs_skip_training_with_their_own_exit_code(story):
    assert (story.unchanged["outcome"], story.unchanged["exit_code"]) == ("skipped", 4)
    assert {request.method for request in story.requests_while_unchanged} <= {"GET", "HEAD"}
    assert story.worse_place.names().count("training_started") == 1  # which shares this past


def test_concurrent_retraining_is_refused(story):
    assert story.busy.returncode == 75
    assert REPO in story.busy.stderr and len(story.busy.stderr.strip().splitlines()) == 1


def test_killed_retraining_leaves_the_published_model_and_is_resumed(story):
    assert story.head_after_kill == story.first_commit
    assert story.better["outcome"] == "published"
    assert story.place.names().count("training_completed") == 2  # the first, and this one


def test_a_better_model_is_published_in_one_commit_with_its_lineage(story):
    hub, place = story.place.hub, story.place
    assert hub.commits(REPO)[:2] == [story.better_commit, story.first_commit]
    lineage = place.lineage(story.better_commit)
    assert lineage["configuration"]["train"]["max_steps"] == 30
    told = lineage["results"]["retraining"]
    assert told["compared_with"] == {"repo": REPO, "commit": story.first_commit}
    assert told["paired_by"] == "token" and (told["examples"], told["prompts"]) == (
        17,
        17,
    )  # of 24, as many as 1024 tokens allow
    assert told["difference"]["value"] < -2 * told["difference"]["stderr"] < 0
    new, live = told["new"]["value"], told["live"]["value"]
    assert told["difference"]["value"] == pytest.approx(new - live)
    # The live model's loss as its own run had measured it, on the same examples.
    before = place.lineage(story.first_commit)["results"]["merged"]["quality"]["held_out"]["loss"]["value"]
    assert live == pytest.approx(before, rel=1e-3)


def test_changes_since_the_published_model_are_listed(story):
    assert story.better["changes"] == ["train.max_steps: 4 -> 30", "train.learning_rate: 0.005 -> 0.02"]


def test_worse_model_changes_nothing_on_the_hub(story):
    assert (story.worse["outcome"], story.worse["exit_code"]) == ("not_better", 3)
    assert story.place.hub.commits(REPO)[-len(story.commits) :] == story.commits
    assert story.worse["commit"] is None and story.worse["comparison"]["difference"]["value"] > 0
    gap, mirrored = (told["comparison"]["difference"] for told in (story.worse, story.better))
    assert gap["value"] == pytest.approx(-mirrored["value"]) and gap["stderr"] == pytest.approx(mirrored["stderr"])


def test_decided_comparison_is_not_measured_again(story):
    assert (story.worse_again["outcome"], story.worse_again["exit_code"]) == ("not_better", 3)
    assert story.worse_again["comparison"] == story.worse["comparison"]
    assert "measured before" in story.worse_again["reason"]
    assert len(story.worse_place.events()) == story.worse_events


def test_summary_shows_figures_rule_and_location(story):
    better, unchanged = ((story.place.folder / f"{name}.md").read_text() for name in ("better", "unchanged"))
    worse = (story.worse_place.folder / "worse.md").read_text()
    assert f"Retraining {REPO}: Published" in better and story.better["url"] in better
    gap = story.better["comparison"]["difference"]
    assert f"| new - published | {gap['value']:+.4f} ± {gap['stderr']:.4f} |" in better
    reach = quantile(2, story.better["comparison"]["freedom"])
    assert 2.0 < reach < 2.3
    assert (
        f"{reach:.2f} standard errors of the difference (2 of many prompts of equal length)" in better
        and story.first_commit[:12] in better
        and "`train.max_steps: 4 -> 30`" in better
    )
    assert "Not better" in worse and "Skipped" in unchanged


def test_decisions_are_in_trackio_beside_the_training(story):
    assert story.place.decided() == [1.0]
    assert story.worse_place.decided() == [0.0]


# From here on: the better model's run, again finished but for its publishing, beside a hub that has the first model.


@pytest.fixture
def undecided(story, tmp_path):
    """A copy of the place, where "better" is trained and compared with nothing yet, and the first model is live."""
    story.place.put_back(story.first_commit)
    return story.place.copy(tmp_path / "copy")


def test_pull_request_leaves_the_main_branch(undecided, story):
    head = undecided.hub.commits(REPO)[0]
    told = undecided.decision("better", "--pull-request", "--summary", "proposed.md")
    assert told["outcome"] == "published" and "/discussions/" in told["url"]
    assert undecided.hub.commits(REPO)[0] == head
    number = int(told["url"].rpartition("/")[2])
    weights = undecided.hub.read(REPO, "model.safetensors", f"refs/pr/{number}")
    assert weights == undecided.hub.read(REPO, "model.safetensors", story.better_commit)
    assert told["url"] in (undecided.folder / "proposed.md").read_text()
    # It is not proposed again, whatever became of it.
    again = undecided.decision("better", "--pull-request")
    assert (again["outcome"], again["exit_code"]) == ("skipped", 4) and told["url"] in again["reason"]


STRICT = ("--set", "quantize.gate.kl=1e-9", "--set", "quantize.gate.rise=100")


@pytest.mark.slow
def test_withheld_variant_is_dropped_unless_it_is_published(undecided, story):
    hub, asked = undecided.hub, ("--set", "quantize.variants=[int8]", "--set", "quantize.on_gate_failure=withhold")
    lineage = undecided.lineage(story.first_commit)
    lineage["results"]["int8"] = {}
    head = hub.put(REPO, {"tunepress.json": json.dumps(lineage).encode()})
    done = undecided.retrain("better", *asked, *STRICT)
    assert done.returncode == 2 and hub.commits(REPO)[0] == head
    assert "quantize int8: withheld: KL divergence is" in done.stderr and "would lose int8" in done.stderr
    del lineage["results"]["int8"]
    hub.put(REPO, {"tunepress.json": json.dumps(lineage).encode()})
    told = undecided.decision("better", *asked, *STRICT)
    assert told["outcome"] == "published" and "; quantize int8: withheld: KL divergence is" in told["reason"]
    assert "tried and withheld" in hub.read(REPO, "README.md").decode()
    assert "int8/model.safetensors" not in hub.files(REPO)


def test_concurrent_publish_is_compared_with_the_new_model(undecided):
    hub = undecided.hub
    theirs = {"config.json": hub.read(REPO, "config.json").replace(b"{", b'{"edited": true, ', 1)}
    hub.fault(r"POST .*/commit/main", status=412, first=lambda: hub.put(REPO, theirs))
    told = undecided.decision("better")
    ours, before, *_ = hub.commits(REPO)
    assert b"edited" in hub.read(REPO, "config.json", before) and b"edited" not in hub.read(REPO, "config.json")
    assert (told["outcome"], told["commit"]) == ("published", ours)
    assert told["comparison"]["compared_with"]["commit"] == before
    assert undecided.decided() == [1.0, 1.0, 1.0]  # in the place that this is a copy of, before, and after


def test_untagged_release_is_reported_and_tagged_by_the_next_run(undecided):
    undecided.hub.fault(r"GET .*/refs", status=403, times=9)
    done = undecided.retrain("better")
    assert done.returncode == 2 and "published, but not tagged" in done.stderr
    undecided.hub.faults = type(undecided.hub.faults)()
    commits = undecided.hub.commits(REPO)
    assert undecided.decision("better")["outcome"] == "published"
    assert undecided.hub.commits(REPO) == commits


def test_commit_with_lost_answer_is_recognized(undecided):
    before = undecided.hub.commits(REPO)
    undecided.hub.fault(r"POST .*/commit/main", reset=True, after=True)
    told = undecided.decision("better")
    assert told["outcome"] == "published" and undecided.hub.commits(REPO) == [told["commit"], *before]


def test_a_first_model_that_was_published_and_not_tagged_is_finished(undecided):
    elsewhere = ("--set", "publish.repo=ada/second")
    undecided.hub.fault(r"GET .*/refs", status=403, times=9)
    done = undecided.retrain("better", *elsewhere)
    assert done.returncode == 2 and "published, but not tagged" in done.stderr
    undecided.hub.faults = type(undecided.hub.faults)()
    commits = undecided.hub.commits("ada/second")
    told = undecided.decision("better", *elsewhere)
    assert (told["outcome"], told["reason"]) == ("published", "the first model of this repository")
    assert undecided.hub.commits("ada/second") == commits and told["comparison"] is None


def test_retraining_killed_after_its_commit_finishes_without_another(undecided, story):
    before_it_is_tagged = r"GET .*/refs"
    undecided.hub.fault(before_it_is_tagged, reset=True, first=lambda: kill(process, undecided))
    process = undecided.start("better", until="publish_started")
    process.communicate()
    commits = undecided.hub.commits(REPO)
    assert undecided.hub.read(REPO, "model.safetensors") == undecided.hub.read(
        REPO, "model.safetensors", story.better_commit
    )
    told = undecided.decision("better")
    assert (told["outcome"], told["commit"]) == ("published", commits[0])
    assert undecided.hub.commits(REPO) == commits
    assert undecided.decision("better")["outcome"] == "skipped"


def test_killed_retraining_does_not_bind_an_ordinary_run(undecided):
    undecided.hub.fault(r"POST .*/commit/main", reset=True, first=lambda: kill(process, undecided))
    process = undecided.start("better", until="publish_started")
    process.communicate()
    edited = undecided.hub.read(REPO, "config.json").replace(b"{", b'{"edited": true, ', 1)
    undecided.hub.put(REPO, {"config.json": edited})
    undecided.tunepress("publish", "runs/tiny")
    assert b"edited" not in undecided.hub.read(REPO, "config.json")


@pytest.mark.slow
def test_forced_retraining_keeps_user_files_in_the_run_folder(undecided):
    head, trained = undecided.hub.commits(REPO)[0], undecided.ledger()["train"]
    card = undecided.release / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    process = undecided.start("better", "--force", until="training_completed")
    kill(process, undecided)
    process.communicate()
    assert undecided.hub.commits(REPO)[0] == head
    assert card.read_text().endswith("My own words.\n")
    history = json.loads((undecided.run_folder / "measurements" / "training.json").read_text())
    assert history["resumed_from_step"] is None
    assert undecided.decision("better")["outcome"] == "published"
    assert undecided.ledger()["train"]["finished"] > trained["finished"]
    # The repository has another card than the last publish left, so this one is set aside beside it.
    assert any("My own words." in path.read_text() for path in undecided.release.glob("README*"))


def test_text_that_people_write_into_the_card_meanwhile_is_no_other_model(undecided):
    card = undecided.hub.read(REPO, "README.md")
    edit = {"README.md": card + b"\nMy own words.\n"}
    undecided.hub.fault(r"POST .*/commit/main", status=412, first=lambda: undecided.hub.put(REPO, edit))
    assert undecided.decision("better")["outcome"] == "published"
    assert b"My own words." in undecided.hub.read(REPO, "README.md")


def test_a_trusted_publisher_needs_no_stored_token(undecided):
    undecided.environment = {"HF_TOKEN": "", "HF_OIDC_RESOURCE": REPO, "HF_OIDC_ID_TOKEN": IDENTITY}
    told = undecided.decision("better")
    assert told["outcome"] == "published" and told["commit"] == undecided.hub.commits(REPO)[0]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        (
            {"HF_OIDC_RESOURCE": "ada/other", "HF_OIDC_ID_TOKEN": IDENTITY},
            "keyless login is for another repository",
        ),
        ({"HF_OIDC_RESOURCE": REPO, "HF_OIDC_ID_TOKEN": "of somebody else"}, "Trusted Publishers"),
        ({"HF_OIDC_RESOURCE": REPO}, "the keyless login failed"),
    ],
)
def test_failed_keyless_login_gives_one_line(undecided, environment, reason):
    undecided.environment = {"HF_TOKEN": "", **environment}
    done = undecided.retrain("better")
    assert done.returncode == 2
    assert reason in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_model_is_not_retrained_from_what_it_is_published_to(undecided):
    done = undecided.retrain("better", "--set", f"model.source={REPO}")
    assert done.returncode == 2 and f"model.source {REPO}: is publish.repo too" in done.stderr


def test_changed_variants_are_named_with_the_command_that_makes_them(undecided):
    """This folder has the better model, and the first one is live."""
    told = undecided.decision("first", "--set", "quantize.variants=[int8]")
    assert (told["outcome"], told["exit_code"]) == ("skipped", 4)
    assert "quantize.variants changed. The published model is not in runs/tiny" in told["reason"]
    assert "tunepress run" not in told["reason"]


@pytest.mark.slow
def test_the_command_that_makes_the_rest_keeps_the_model_that_is_live(story, tmp_path):
    place = story.place.copy(tmp_path / "copy")
    place.put_back(story.better_commit)
    place.hub.put(BASE, {"README.md": b"# Base, with a new card\n"})  # another commit than the one it was made of
    rest = ("--set", "quantize.variants=[int8]")
    told = place.decision("better", *rest)
    _, command = told["reason"].split("Try: tunepress ")
    assert f"--set model.revision={place.lineage()['base']['revision']}" in command
    events = place.names()
    place.tunepress(*shlex.split(command.replace("CONFIG", "tiny.yaml")), *as_options("better"), *rest)
    hub, before = place.hub, story.better_commit
    assert hub.read(REPO, "model.safetensors") == hub.read(REPO, "model.safetensors", before)
    assert "int8/model.safetensors" in hub.files(REPO)
    assert {"training_started", "merge_started"}.isdisjoint(place.names()[len(events) :])
    assert place.lineage()["results"]["retraining"] == place.lineage(before)["results"]["retraining"]


@pytest.mark.slow
def test_a_run_that_makes_another_model_does_not_publish_the_comparison_of_the_last(undecided):
    assert "retraining" in undecided.results()
    undecided.tunepress("run", "tiny.yaml", *as_options("first"))
    assert undecided.lineage()["configuration"]["train"]["max_steps"] == 4
    assert "retraining" not in undecided.lineage()["results"]


def test_too_little_to_compare_on_is_found_before_training(undecided):
    head, events = undecided.hub.commits(REPO)[0], undecided.names()
    done = undecided.retrain("better", "--set", "train.max_length=44")
    assert done.returncode == 2 and "fit into train.max_length 44 tokens" in done.stderr
    assert "training_completed" not in undecided.names()[len(events) :]
    assert undecided.hub.commits(REPO)[0] == head


def test_beside_a_job_of_the_same_repository_nothing_is_trained(undecided):
    jobs, events = undecided.hub.jobs, undecided.names()
    jobs.started.append({"labels": {"tunepress-retraining": "ada--tiny"}, "command": [], "flavor": "a10g-large"})
    jobs.stage = "RUNNING"
    try:
        done = undecided.retrain("better")
    finally:
        jobs.started.clear()
    assert done.returncode == 75 and "/jobs/ada/1" in done.stderr and undecided.names() == events


def test_unwritable_lock_gives_one_line(undecided):
    (undecided.folder / "file").write_text("")
    place = {"HF_HOME": str(undecided.folder / "file" / "home")}
    undecided.environment = place
    done = undecided.retrain("better")
    assert done.returncode == 2 and place["HF_HOME"] in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_failure_writes_the_ci_summary(undecided):
    undecided.environment = {"GITHUB_STEP_SUMMARY": str(undecided.folder / "step.md"), "HF_TOKEN": "hf_ofNobodyAtAll"}
    assert undecided.retrain("better").returncode == 2
    told = (undecided.folder / "step.md").read_text()
    assert "Failed" in told and "does not know this token" in told


def test_unwritable_summary_is_refused_before_any_work(undecided):
    before = undecided.names()
    done = undecided.retrain("better", "--force", "--summary", "nowhere/told.md")
    assert done.returncode == 2 and undecided.names() == before
    assert done.stderr.strip() == "retrain: --summary nowhere/told.md: cannot be written (No such file or directory)"


def test_retraining_writes_no_token_anywhere(story):
    """`story.place.folder` lies beside the folder that the hub keeps large files in."""
    secrets, hub = (TOKEN.encode(), PUBLISHER_TOKEN.encode()), story.place.hub
    for path in story.place.folder.parent.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert not any(secret in path.read_bytes() for secret in secrets), path
    for commit in hub.commits(REPO):
        for path in hub.files(REPO, commit):
            assert not any(secret in hub.read(REPO, path, commit) for secret in secrets), path
