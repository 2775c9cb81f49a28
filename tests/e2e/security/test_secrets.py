"""Secrets: no token reaches logs, tracebacks, errors, events or results."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.cli.exit_codes import plain_errors
from pipeline.errors import UserError, holds_secret, redact
from pipeline.system.redaction import Redactor, without_private
from pipeline.tracking.events import Events, one_line, read_events
from pipeline.workflow import stage_log
from pipeline.workflow.workspace import Workspace
from tests.support import REPOSITORY
from tests.support.audit_watch import HUB_TOKEN, SECRETS, TOKEN, WRITE_TOKEN

LIKE_A_STAGE = """
import os, signal, sys, threading
from pipeline.workflow.stage_log import print_without_tokens, wait_for

writer = print_without_tokens(os.dup(1))
{body}
"""


@pytest.mark.parametrize(
    "form", ["{}", "'{}'", "x={}&y", "Bearer {}", "https://ada:{}@hub.org/a", "https://hub.org/?token={}"]
)
@pytest.mark.parametrize("secret", SECRETS)
def test_a_token_is_hidden_in_whatever_form(place, form, secret):
    assert secret not in redact(form.format(secret))


UNKNOWN = [
    "see https://ada:pass-word-of-ada@hub.org", "x?access_token=0123456789ab&y", "write_token=0123456789abcdef !",
    "Authorization: Bearer 0123456789abcdef", "{'authorization': 'Basic YWRhOnBhc3Mtd29yZA=='}",
    '{"api_key": "0123456789abcdef"}', "password=correct-horse", "api_org_0123456789abcdef .",
    "hf_jwt_01234567.89abcdef-0123.45", "hf_oauth_0123456789",
]  # fmt: skip


def test_a_secret_is_hidden_whole_if_its_end_is_the_beginning_of_another(place, monkeypatch):
    monkeypatch.setenv("OTHER_API_KEY", WRITE_TOKEN[-3:] + "andMoreThanSixteenLetters")
    for text in (WRITE_TOKEN, f"It is {WRITE_TOKEN}{WRITE_TOKEN} or not"):
        for cut in range(len(text) + 1):
            redactor = Redactor()
            told = redactor.feed(text[:cut]) + redactor.feed(text[cut:]) + redactor.end()
            assert told == redact(text), cut


@pytest.mark.parametrize("text", [*(f"It is {secret} or not" for secret in SECRETS), *UNKNOWN])
def test_a_secret_that_is_cut_by_two_writes_is_hidden_whole(place, text):
    hidden = redact(text)
    assert "***" in hidden
    for cut in range(len(text)):
        redactor = Redactor()
        assert redactor.feed(text[:cut]) + redactor.feed(text[cut:]) + redactor.end() == hidden, cut
    redactor = Redactor()
    assert "".join(map(redactor.feed, text)) + redactor.end() == hidden


def test_text_without_secrets_is_not_kept_back(place):
    """People wait for a prompt, and for the next word of an answer."""
    for text in ("Model [demo]: ", "> ", "An answer, in 12 words", "你好", "50 % of hf_models done. ", "Yes!"):
        assert Redactor().feed(text) == text


def test_what_is_longer_than_any_secret_is_not_kept_back(place):
    redactor = Redactor()
    assert len(redactor.feed("https://" + "x" * 5000)) > 5000 and redactor.end() == ""


@pytest.mark.parametrize("name", ["GITHUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "SMTP_PASSWORD"])
def test_secrets_of_other_programs_are_hidden(monkeypatch, name):
    monkeypatch.setenv(name, "zYx987wVu654tSr321")
    monkeypatch.setenv("EOS_TOKEN", "<|endoftext|>")
    monkeypatch.setenv("SOME_SECRET", "/run/secrets/some-file")
    assert (
        redact("zYx987wVu654tSr321 <|endoftext|> /run/secrets/some-file") == "*** <|endoftext|> /run/secrets/some-file"
    )


def test_every_way_to_write_to_the_terminal_is_redacted(place, capfd):
    with plain_errors("tunepress"):
        for stream in (sys.stdout, sys.stderr):
            stream.writelines([f"a {TOKEN}\n", f"b {WRITE_TOKEN}\n"])
            stream.buffer.write(f"c {HUB_TOKEN}\n".encode())
            stream.write(f"d {TOKEN[:9]}")
            stream.flush()
            stream.write(f"{TOKEN[9:]}\n")
            stream.write(WRITE_TOKEN)
    for told in capfd.readouterr():
        assert told == "a ***\nb ***\nc ***\nd ***\n***"


@pytest.mark.parametrize("secret", [*SECRETS, "hf_jwt_" + "0123456789-" * 300 + "0"])
@pytest.mark.parametrize("length", [10, (1 << 20) + 1])
def test_a_secret_that_is_cut_by_two_reads_of_a_log_is_hidden_whole(place, monkeypatch, secret, length):
    read, pipe = os.read, -17
    for cut in (1, 12, len(secret) - 1):
        parts = [f"{'x' * length} {secret[:cut]}".encode(), f"{secret[cut:]} y".encode(), b""]

        def next_part(file, size, parts=parts):
            return parts.pop(0) if file == pipe else read(file, size)

        with monkeypatch.context() as patch, open(place / "log", "wb") as log:
            patch.setattr(os, "read", next_part)
            stage_log._copy(pipe, log.fileno())
        assert (place / "log").read_text() == "x" * length + " *** y"


def test_results_in_tuples_are_redacted(place):
    assert without_private({"languages": (TOKEN, "en"), "a": [(TOKEN,)]}, place) == {
        "languages": ["***", "en"],
        "a": [["***"]],
    }


def test_unknown_secrets_in_secret_positions_are_redacted():
    told = redact(
        "GET https://ada:pass-word@hub.org/a?X-Amz-Signature=0af9&size=7 with Authorization: Bearer 0123456789ab"
    )
    assert told == "GET https://***@hub.org/a?X-Amz-Signature=***&size=7 with Authorization: Bearer ***"


def test_ordinary_words_are_not_redacted():
    plain = "see https://hub.org/ada/model?size=7#at, ada@hub.org, eos_token='</s>' and ./hf_models at 1e-3"
    assert redact(plain) == plain and not holds_secret("./hf_internaltestingrandommodels/x")


def test_escaped_letters_of_a_secret_are_redacted(monkeypatch):
    """In events, letters stay as they are and quotes do not."""
    secret = 'schlüssel "zum" wald'
    monkeypatch.setenv("TRACKIO_WRITE_TOKEN", secret)
    for text in (repr(secret + "'"), json.dumps(secret), json.dumps(secret, ensure_ascii=False)):
        assert "wald" not in redact(text)


def test_escaped_forms_of_a_secret_are_redacted(monkeypatch):
    monkeypatch.setenv("TRACKIO_WRITE_TOKEN", 'my "own" / token')
    for text in ('my "own" / token', json.dumps('my "own" / token'), "https://x/?a=my%20%22own%22%20%2F%20token"):
        assert "own" not in redact(text)


def test_a_token_that_is_cut_off_is_hidden_whole(place):
    assert WRITE_TOKEN[:8] not in one_line(ValueError("x" * 480 + WRITE_TOKEN))


def test_events_are_one_line_without_tokens(place):
    events = Events(place / "events.jsonl", "tiny")
    events.failed("train", None, ValueError(f"\x1b[2J \ud800 {TOKEN} {WRITE_TOKEN}\nmore"))
    text = (place / "events.jsonl").read_text()
    assert not any(secret in text for secret in SECRETS) and "\x1b" not in text
    assert read_events(place / "events.jsonl")[0][0]["event"] == "training_failed"


def test_training_text_is_not_in_results(place):
    workspace = Workspace(place)
    workspace.write_measurement("merged", {"answers": [{"prompt": "Which?", "answer": f"It is {TOKEN}."}]})
    assert TOKEN not in workspace.results_path.read_text() and "Which?" in workspace.results_path.read_text()


def test_tracebacks_contain_no_token(place, capfd):
    with pytest.raises(SystemExit) as ended, plain_errors("tunepress"):
        try:
            raise ValueError(f"https://ada:{WRITE_TOKEN}@x {HUB_TOKEN}")
        except ValueError as error:
            raise RuntimeError(TOKEN) from error
    told = capfd.readouterr().err
    assert ended.value.code == 1 and "Traceback" in told and "RuntimeError: ***" in told
    assert not any(secret in told for secret in SECRETS)


def test_json_output_has_no_token_and_stays_parseable(place, capfd):
    with plain_errors("tunepress"):
        print(json.dumps({"run": "runs/hf_checkpoints", "of": f"https://ada:{WRITE_TOKEN}@x", "by": TOKEN}))
    told = json.loads(capfd.readouterr().out)
    assert told == {"run": "runs/hf_checkpoints", "of": "https://***@x", "by": "***"}


@pytest.mark.parametrize(
    "words",
    [
        ["publish", "runs/x", TOKEN],
        ["status", TOKEN],
        ["status", "runs/x", "--last", HUB_TOKEN],
        ["run", WRITE_TOKEN],
        ["run", "demo", "--set", f"publish.repo={TOKEN}"],
        ["run", "demo", "--set", f"name={TOKEN}"],
        ["run", "demo", "--set", f"track.server=https://ada:{WRITE_TOKEN}@x.org"],
        ["quantize", f"https://ada:{TOKEN}@hub.org/x", "--output", "out"],
        ["merge", "base/model", TOKEN, "--output", "out"],
        ["verify", TOKEN],
        ["chat", f"./{TOKEN}"],
        ["sync", "\x1b]0;owned\x07"],
        [f"--{TOKEN}"],
    ],
)
def test_a_command_does_not_repeat_a_token(place, capfd, monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["tunepress", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    told = "".join(capfd.readouterr())
    assert ended.value.code == 2 and "Traceback" not in told and "\x1b]" not in told
    assert not any(secret in told.replace("\n", "") for secret in SECRETS)
    assert [path.name for path in place.iterdir()] == []


def test_errors_are_one_line_without_control_characters():
    assert str(UserError("a\nb\x1b[2J\u202e\udcff\x07")) == r"a b\x1b[2J\u202e\udcff\x07"


def run(body: str, check: int = 0) -> str:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_TOKEN": HUB_TOKEN, "TRACKIO_WRITE_TOKEN": WRITE_TOKEN}
    command = [sys.executable, "-c", LIKE_A_STAGE.format(body=body)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == check, done
    return done.stdout


def test_logs_contain_no_token():
    body = f"""
os.write(2, b"of C: {TOKEN}\\n")
print("of Python: {WRITE_TOKEN}")
os.system("echo of another process: $HF_TOKEN")
os.write(1, b"in two "); os.write(1, b"parts: {TOKEN[:20]}"); os.write(1, b"{TOKEN[20:]}\\r")
os.write(1, b"\\xff no text, and no end")
wait_for(writer)
"""
    told = run(body.replace("\\xff", ""))
    assert not any(secret in told for secret in SECRETS)
    words = ("of C: ***", "of Python: ***", "of another process: ***", "in two parts: ***", "no end")
    assert all(word in told for word in words)


def test_the_last_words_of_a_process_that_is_killed_are_in_its_log():
    told = run(f'os.write(2, b"out of memory, {TOKEN}"); os.kill(os.getpid(), signal.SIGKILL)', check=-9)
    assert told == "out of memory, ***"


def test_a_line_without_an_end_is_written_too():
    told = run(f'os.write(1, b"x" * 1_200_000 + b" {TOKEN} " + b"y" * 1_200_000); wait_for(writer)')
    assert told == "x" * 1_200_000 + " *** " + "y" * 1_200_000


def test_a_run_that_fails_with_a_token_leaves_none(place, tiny_model, monkeypatch):
    """The row, the chat template and the environment have tokens, and the stage's process dies of one of them."""
    model = shutil.copytree(tiny_model("llama"), place / "model")
    (model / "chat_template.jinja").write_text(f"{{{{ raise_exception('no {TOKEN}') }}}}")
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {TOKEN}."} for n in range(20)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "general.txt").write_text("Words that say nothing. " * 200)
    tree = {"name": "tiny", "model": {"source": "model"}, "data": {"source": "rows.jsonl"}}
    (place / "x.yaml").write_text(json.dumps(tree | {"evaluate": {"general": "general.txt"}}))
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TRACKIO_DIR": str(place / "trackio")}
    command = [sys.executable, "-m", "pipeline", "run", "x.yaml"]
    seen = set()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process:
        while process.poll() is None:
            seen |= command_lines()
            time.sleep(0.05)
        told = process.stdout.read()
    assert process.returncode == 2 and "Traceback" not in told and "chat template" in told, told
    assert any("pipeline.workflow.stages" in line for line in seen)
    kept = [path for path in (place / "runs").rglob("*") if path.is_file() and path.parent.name != "data"]
    assert {"config.yaml", "events.jsonl", "train.log"} <= {path.name for path in kept}
    for text in (told, *seen, *(path.read_text(errors="replace") for path in kept)):
        assert not any(secret in text for secret in SECRETS)


def command_lines() -> set[str]:
    """What every process here was started with, as anybody on the machine may read it."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.add(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return found
