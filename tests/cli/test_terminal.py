"""Output on a terminal: the final table, the state of a run, and the version."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from pipeline.cli import app
from pipeline.cli.terminal import show_status, summary
from pipeline.config.loader import dump_config
from pipeline.system.files import write_bytes
from pipeline.tracking.events import Events
from pipeline.workflow.run_state import run_state
from pipeline.workflow.workspace import Entry, Workspace


def _console(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width, highlight=False, soft_wrap=True)


@pytest.fixture
def measured(finished):
    """A run whose figures fill every column of the final table, with a long name and wide figures."""
    for name in ("base", "merged", "int8", "int4"):
        figures = finished.workspace.read_measurement(name)
        for text in ("held_out", "general"):
            quality = figures["quality"].setdefault(text, {"tokens": 4096})
            quality["perplexity"] = {"value": 12345.678, "stderr": 1234.567}
            quality["kl"] = {"value": 0.1234, "stderr": 0.01}
        speed = {"runs": True, "decode_tokens_per_second": 4321.0, "peak_memory_bytes": 123_456_789_000}
        figures |= {"size_bytes": 123_456_789_000, "speed": {"pipeline.load": speed}}
        finished.workspace.write_measurement(name, figures)
    return finished


@pytest.mark.parametrize("width", [60, 80, 200])
def test_final_table_keeps_its_figures_whatever_the_width(measured, width):
    console = _console(width)
    summary(console, measured.config, measured.workspace)
    table = console.file.getvalue().partition("ppl: perplexity")[0]
    assert "…" not in table and max(map(len, table.splitlines())) <= width
    assert [table.count(figure) for figure in ("12345.68 ± 1234.57", "0.1234", "4321.0 tok/s")] == [8, 4, 4]


def test_status_tells_what_runs_now_and_what_is_left(finished):
    workspace = finished.workspace
    finished.workspace.folder.mkdir(exist_ok=True)

    workspace.config_path.write_text(dump_config(finished.config))
    for key in ("quantize/int4",):
        workspace.undo(key)
    pen = Events(workspace.events_path, "demo")
    pen.emit("quantize", "started", "int4")
    state = run_state(workspace)
    assert (state.running, state.stopped) == ({}, ("quantize/int4",))
    assert state.left == ("train", "evaluate", "calibrate", "quantize/int4", "publish")
    with workspace.lock():
        state = run_state(workspace)
        console = _console()
        show_status(console, state, workspace, [])
    assert list(state.running) == ["quantize/int4"] and state.left == ("train", "evaluate", "calibrate", "publish")
    shown = console.file.getvalue()
    assert "runs now" in shown and "not done yet" in shown
    pen.emit("quantize", "completed", "int4")
    assert run_state(workspace).stopped == ()


def test_card_that_was_written_again_for_its_repository_is_not_changed(finished):

    workspace, card = finished.workspace, finished.release / "README.md"
    workspace.config_path.write_text(dump_config(finished.config))
    for step, words in (("render", b"# here"), ("publish", b"# for its repository")):
        write_bytes(card, words)
        workspace.record(step, Entry(step, workspace.digests([card])))
    assert run_state(workspace).changed == ()
    write_bytes(card, b"# by hand")
    assert run_state(workspace).changed == ("render", "publish")


def test_status_tells_a_removed_variant_from_one_that_lost_its_files(finished):
    workspace, weights = finished.workspace, finished.release / "int8" / "weights"
    write_bytes(weights, b"codes")
    workspace.record("quantize/int8", Entry("here", workspace.digests([weights])))
    weights.unlink()
    quantize = finished.config.quantize
    for asked, expected in ((("int8", "int4"), "its files changed or are gone"), (("int4",), "removed")):
        variants = [spec for spec in quantize.variants if spec.name in asked]
        named = quantize.model_copy(update={"variants": variants})
        workspace.config_path.write_text(dump_config(finished.config.model_copy(update={"quantize": named})))
        console = _console(200)
        show_status(console, run_state(workspace), workspace, [])
        (line,) = (line for line in console.file.getvalue().splitlines() if "quantize/int8" in line)
        assert expected in line
    assert run_state(workspace).changed == () and run_state(workspace).removed == ("quantize/int8",)


def test_status_as_json_has_what_is_left(finished, capsys):

    finished.workspace.config_path.write_text(dump_config(finished.config))
    with pytest.raises(SystemExit):
        app(["status", str(finished.workspace.folder), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["running"] == [] and "publish" in told["left"] and "quantize/int8" in told["ledger"]


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        app(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("tunepress ")


def test_lock_is_seen_by_others_only_while_it_is_held(tmp_path):
    workspace = Workspace(tmp_path / "runs" / "demo")
    assert not workspace.is_in_use()
    with workspace.lock():
        assert workspace.is_in_use()
    assert not workspace.is_in_use()
