"""The wizard at a terminal, from the first question to a release, with wrong answers in between."""

from __future__ import annotations

import io
import sys
from dataclasses import replace

import pytest
import yaml
from rich.console import Console

from pipeline.cli.wizard import QUESTIONS, wizard
from pipeline.config.loader import load_config
from tests.support.runs import TOKEN
from tests.support.wizard import READS

WRITE_TOKEN = "write-token-0123456789"
UNMEASURED = ("Measure this machine", "no")


def test_a_persons_answers_become_a_finished_run_on_the_hub(desk, hub, launch):
    with desk.sit_down(launch=launch) as person:
        person.answers("Model", "./model")
        person.answers("Data set", "rows.jsonl")
        person.sees("question: What is 0 plus 0?")
        person.sees("form question_answer")
        person.answers("Profile")
        person.answers("Epochs")
        person.answers("Maximum steps", "2")
        person.answers("Maximum length", "96")
        person.answers("Batch size", "2")
        person.answers("Hub repository", "ada/mine")
        person.sees("no Hub token")
        person.sees("not shown, not stored")
        person.types(TOKEN)
        person.answers("Private", "yes")
        person.answers("Tracker")
        person.answers("Make quantized models")
        person.answers("Where the quantized models will run")
        person.answers("Quantized models", "int8")
        person.answers("GGUF")
        person.sees("If perplexity rises by more than int8 2 %: withhold: not published")
        person.answers("Failed quality gate", "warn")
        person.answers("Name of the run", "mine")
        person.answers(*UNMEASURED)
        person.answers("Configuration file")
        person.sees("2 steps of 2 x 8 sequences of up to 96 tokens")
        person.sees("ada/mine (private")
        person.answers("Start now")
        person.sees("Release")
        person.sees("/a\\ clone/launch.sh chat runs/mine")
        assert person.ends() == 0
    assert hub.repo("ada/mine").private
    assert {"README.md", "model.safetensors", "int8/model.safetensors"} <= hub.files("ada/mine").keys()
    assert desk.hidden_in(TOKEN) == [] and TOKEN not in person.screen


def test_wrong_answers_are_told_in_a_line_and_asked_again(desk):
    desk.token = READS
    with desk.sit_down("--no-run") as person:
        person.answers("Model", "./nothing")
        person.sees("no such folder")
        person.answers("Model", "./model")
        person.answers("Data set", "other.jsonl")
        person.sees("no known form: columns found are ask, reply")
        person.answers("Columns", "question=ask,answer=nothing")
        person.sees("which is not there")
        person.answers("Columns", "question=ask,answer=reply")
        person.answers("Profile", "reckless")
        person.sees("Try: standard, conservative, aggressive, extreme")
        person.answers("Profile")
        person.answers("Epochs", "-1")
        person.sees("greater than 0")
        person.answers("Epochs")
        person.answers("Maximum steps")
        person.answers("Maximum length", "100000000")
        person.sees("longer than the model's context")
        person.answers("Maximum length", "128")
        person.answers("Batch size", "100000")
        person.sees("not enough main memory")
        person.answers("Batch size", "1")
        person.answers("Hub repository", "my model")
        person.sees("a repository is written USER/NAME")
        person.answers("Hub repository", "ada/mine")
        person.sees("the Hub token can only read")
        person.sees("not shown, not stored")
        person.types("hf_nobodyKnowsThisToken0123456789")
        person.sees("the Hub does not know this token")
        person.answers("Hub repository", "none")
        person.answers("Tracker", "https://trackio.example.org")
        person.sees("no write token")
        person.sees("not shown, not stored")
        person.types(WRITE_TOKEN)
        person.answers("Make quantized models", "no")
        person.answers("Name of the run")
        person.answers(*UNMEASURED)
        person.answers("Configuration file")
        assert person.ends() == 0
    config = load_config(desk.folder / "model.yaml")
    assert config.data.columns == {"question": "ask", "answer": "reply"}
    assert (config.train.max_length, config.train.batch_size, config.train.accumulate) == (128, 1, 16)
    assert config.publish.repo is None and config.quantize.variants == []
    assert config.track.server == "https://trackio.example.org"
    for secret in (READS, WRITE_TOKEN, "hf_nobodyKnowsThisToken0123456789"):
        assert desk.hidden_in(secret) == [] and secret not in person.screen


def test_unsuitable_columns_allow_another_data_set(desk):
    with desk.sit_down("--model", "./model", "--no-run") as person:
        person.answers("Data set", "other.jsonl")
        person.answers("Columns")
        person.answers("Data set", "rows.jsonl")
        person.sees("form question_answer")
        person.answers("Profile")


def test_ctrl_c_keeps_the_answers_and_resuming_asks_the_rest(desk):
    desk.token = TOKEN
    with desk.sit_down("--name", "resumed", "--runs", "my runs") as person:
        person.answers("Model", "./model")
        person.answers("Data set", "rows.jsonl")
        person.answers("Profile", "aggressive")
        person.answers("Epochs", "2")
        person.sees("Maximum steps [no]: ")
        person.presses("\x03")
        person.sees("Continue with: tunepress wizard --resume wizard-answers.yaml --runs 'my runs'")
        assert person.ends() == 130
    kept = yaml.safe_load((desk.folder / "wizard-answers.yaml").read_text())
    typed = {"model": "./model", "data": "rows.jsonl", "profile": "aggressive", "epochs": "2"}
    assert kept == {**typed, "name": "resumed"}
    given = ("--resume", "wizard-answers.yaml", "--runs", "my runs", "--no-run", "--no-calibrate")
    with desk.sit_down(*given) as person:
        person.answers("Maximum steps", "7")
        assert "Model [" not in person.screen and "Epochs" not in person.screen
        for question in ("Maximum length", "Batch size", "Hub repository", "Tracker"):
            person.answers(question)
        for question in ("Make quantized models", "Where the quantized models will run", "Quantized models"):
            person.answers(question)
        for question in ("Group size of int4", "GGUF"):
            person.answers(question)
        person.answers("Failed quality gate")
        person.sees("distilled: then trains the scales as well")
        person.answers("Quality", "calibratd")
        person.sees("Try: fast, calibrated, distilled")
        person.answers("Quality")
        person.answers("Calibration text", "nothing.txt")
        person.sees("nothing.txt: cannot be read")
        person.answers("Calibration text")
        person.answers("Configuration file")
        assert person.ends() == 0
    assert "resumed.yaml --runs 'my runs'" in (desk.folder / "resumed.yaml").read_text()
    train = load_config(desk.folder / "resumed.yaml").train
    assert (train.epochs, train.max_steps, train.max_length) == (2, 7, 512)
    assert not (desk.folder / "wizard-answers.yaml").exists()


def test_ctrl_c_at_the_first_question_keeps_what_was_given_ahead(desk, launch):
    with desk.sit_down("--name", "mine", "--epochs", "3", launch=launch) as person:
        person.sees("Model [demo]: ")
        person.presses("\x03")
        person.sees("/a\\ clone/launch.sh wizard --resume wizard-answers.yaml")
        assert person.ends() == 130
    assert yaml.safe_load((desk.folder / "wizard-answers.yaml").read_text()) == {"name": "mine", "epochs": "3"}


def test_ctrl_d_at_the_token_prompt_keeps_the_answers(desk):
    with desk.sit_down("--model", "./model", "--data", "rows.jsonl", "--profile", "standard") as person:
        for question in ("Epochs", "Maximum steps", "Maximum length", "Batch size"):
            person.answers(question)
        person.answers("Hub repository", "ada/mine")
        person.sees("not shown, not stored")
        person.sees("again): ")
        person.presses("\x04")
        person.sees("Continue with: tunepress wizard --resume wizard-answers.yaml")
        assert person.ends() == 130


def test_enter_at_the_token_prompt_asks_even_a_question_that_an_option_answered(desk):
    with desk.sit_down("--repo", "ada/mine", "--model", "./model", "--data", "rows.jsonl") as person:
        for question in ("Profile", "Epochs", "Maximum steps", "Maximum length", "Batch size"):
            person.answers(question)
        person.sees("press Enter to answer the question again): ")
        person.types("")
        person.sees("no token, so nothing can be sent")
        person.answers("Hub repository", "ada/other")
        person.sees("press Enter to answer the question again): ")
        person.types("hf_nobodyKnowsThisToken0123456789")
        person.sees("the Hub does not know this token")
        person.answers("Hub repository", "none")
        person.answers("Tracker")


def test_wrong_option_ends_the_wizard_and_keeps_the_other_answers(desk):
    with desk.sit_down("--profile", "reckless", "--name", "mine") as person:
        person.answers("Model", "./model")
        person.answers("Data set", "rows.jsonl")
        person.sees("Your answers are in wizard-answers.yaml")
        person.sees("Try: standard, conservative")
        assert person.ends() == 2
    kept = yaml.safe_load((desk.folder / "wizard-answers.yaml").read_text())
    assert kept == {"model": "./model", "data": "rows.jsonl", "name": "mine"}


def test_unwritable_answers_are_kept_in_another_folder(desk, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (desk.folder / "wizard-answers.yaml.partial").mkdir()  # in the way of the file, for root too
    with desk.sit_down() as person:
        person.answers("Model", "./model")
        person.sees("Data set [")
        person.presses("\x03")
        person.sees(f"Your answers are in {tmp_path}/wizard-answers.yaml")
        assert person.ends() == 130
    assert yaml.safe_load((tmp_path / "wizard-answers.yaml").read_text()) == {"model": "./model"}


class Typed(io.StringIO):
    """Lines that a person types in this process."""

    def isatty(self) -> bool:
        return True


def test_internal_error_keeps_the_answers(desk, monkeypatch):
    monkeypatch.chdir(desk.folder)
    monkeypatch.setattr(sys, "stdin", Typed("./model\n"))
    broken = replace(QUESTIONS[1], default=lambda draft: str(1 / 0))
    monkeypatch.setattr("pipeline.cli.wizard.session.QUESTIONS", (QUESTIONS[0], broken))
    with pytest.raises(ZeroDivisionError):
        wizard(Console(), {})
    assert yaml.safe_load((desk.folder / "wizard-answers.yaml").read_text()) == {"model": "./model"}


@pytest.mark.usefixtures("cold")  # a fork has no terminal of its own, which could close
def test_a_terminal_that_closes_keeps_the_answers_too(desk):
    with desk.sit_down() as person:
        person.answers("Model", "./model")
        person.sees("Data set [")
    assert yaml.safe_load((desk.folder / "wizard-answers.yaml").read_text()) == {"model": "./model"}


def test_different_existing_file_is_replaced_only_after_asking(desk):
    (desk.folder / "mine.yaml").write_text("precious: true\n")
    answers = {"model": "./model", "data": "rows.jsonl", "profile": "standard", "epochs": "1", "max-steps": "1",
               "max-length": "64", "batch-size": "1", "repo": "none", "track": "local", "name": "mine"}  # fmt: skip
    given = [word for name, answer in answers.items() for word in (f"--{name}", answer)]
    with desk.sit_down(*given, "--no-quantize", "--no-calibrate", "--no-run") as person:
        person.answers("Configuration file")
        person.sees("Replace it? yes or no [no]: ")
        person.types("")
        person.sees("exists with another configuration")
        assert (desk.folder / "mine.yaml").read_text() == "precious: true\n"
        person.answers("Configuration file")
        person.sees("Replace it?")
        person.types("yes")
        assert person.ends() == 0
    assert load_config(desk.folder / "mine.yaml").name == "mine"
