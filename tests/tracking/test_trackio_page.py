"""The page of a run in Trackio: what it opens on, its table and picture of the models, and its alerts."""

from __future__ import annotations

import json

import pytest

from pipeline.tracking.forwarder import Spool
from pipeline.tracking.trackers.places import Server
from pipeline.tracking.trackers.trackio import PICTURE, TABLE, TrackioTracker
from tests.support.trackio_server import Run, assert_once_each, configuration, stored_rows


def whole_run(run: Run) -> Run:
    run.train(1, 3)
    run.events.metrics({"eval/loss": 2.5, "eval/runtime": 1.0}, 3)
    run.events.metrics({"train/runtime": 9.0, "train/total_flos": 1e9, "train/mean_loss": 0.5}, 3)
    run.finish()
    run.compare()
    return run


@pytest.fixture
def local(tmp_path) -> Run:
    """A whole run in a project of its own, because Trackio chooses its folder once a process."""
    return whole_run(Run(tmp_path / "run", configuration(project=tmp_path.name)))


def plotted(run: Run) -> dict[str, list]:
    """What Trackio's page of metrics draws: the numbers of each name, by the query that the page sends."""
    from trackio.sqlite_storage import SQLiteStorage

    found: dict[str, list] = {}
    for log in SQLiteStorage.get_logs(run.config.track.project, "tiny", scalar_only=True):
        for name in log.keys() - {"step", "timestamp"}:
            found.setdefault(name, []).append(log[name])
    return found


def rows_of(run: Run) -> list[dict]:
    from trackio.utils import TRACKIO_DIR

    return stored_rows(TRACKIO_DIR, run.config.track.project)


def logged(rows: list[dict]) -> dict:
    """Everything that the logs of a run have, by name."""
    return {name: value for row in rows if "metrics" in row for name, value in json.loads(row["metrics"]).items()}


def test_the_page_opens_on_the_losses_and_has_a_bar_only_for_each_model(local):
    local.send()
    shown = plotted(local)
    first = sorted(name for name in shown if "/" not in name)  # Trackio puts them above all others
    assert first == ["held_out_loss", "loss"] and shown["loss"] == [1, 1 / 2, 1 / 3] and shown["held_out_loss"] == [2.5]
    models = {"base", "merged", "int8", "int4"}
    bars = {
        f"variants/{figure}/{model}" for figure in ("perplexity", "size_mb", "tokens_per_second") for model in models
    }
    assert shown.keys() == {"loss", "held_out_loss", "train/loss", "eval/loss", *bars}
    assert shown["variants/perplexity/int4"] == [8.875] and shown["variants/size_mb/int4"] == [1.0]


def test_figures_of_events_and_totals_are_kept_beside_the_plots(local):
    local.send()
    found = logged(rows_of(local))
    assert found["quantization/int8/completed"] == {"stage": "quantization", "variant": "int8", "bytes": 123}
    assert found["totals"]["train/total_flos"] == 1e9


def test_one_table_and_one_picture_show_the_models(local):
    from PIL import Image
    from trackio.utils import MEDIA_DIR

    local.send()
    rows = rows_of(local)
    table = logged(rows)[TABLE]
    assert table["_type"] == "trackio.table" and len(table["_value"]) == 4
    assert table["_value"][3] == {
        "model": "int4",
        "weights, MB": 1.0,
        "perplexity, held-out text": 8.875,
        "KL divergence, held-out text": 0.01,
        "tokens per second": 60.0,
        "peak memory, MB": 3.0,
        "within its limits": "no",
    }
    (picture,) = [
        log[PICTURE] for log in map(json.loads, (r["metrics"] for r in rows if "metrics" in r)) if PICTURE in log
    ]
    assert picture["_type"] == "trackio.image" and "tiny" in picture["caption"]
    assert Image.open(MEDIA_DIR / picture["file_path"]).size[0] > 300


def test_alerts_say_run_variant_and_outcome(local):
    local.events.failed("quantize", "int4", ValueError("no room"))
    local.send()
    said = [(r["title"], r["text"].partition("\n")[0]) for r in rows_of(local) if "text" in r]
    assert ("training_completed", "run tiny: training finished after 1.5 seconds") in said
    assert ("quantization_failed", "run tiny, variant int4: quantization ValueError: no room") in said


def test_same_figures_are_told_once_and_new_ones_again(local):
    local.compare()
    assert sum("models" in record for record in local.records()) == 1
    local.events.models([{"model": "int8", "size_bytes": 5}], {"variants/size_mb/int8": 5e-6})
    assert sum("models" in record for record in local.records()) == 2


def test_a_run_without_a_perplexity_has_a_table_and_no_picture(local):
    local.events.models([{"model": "int8", "size_bytes": 5}], {})
    local.send()
    last = json.loads([r["metrics"] for r in rows_of(local) if "metrics" in r][-1])
    assert last == {TABLE: {"_type": "trackio.table", "_value": [{"model": "int8", "weights, MB": 5e-6}]}}


def test_a_server_has_table_and_picture_once_although_it_was_away(run, server):
    server.stop()
    whole_run(run)
    assert run.send()
    server.start()
    assert run.send() is None
    spool = Spool(run.spool)
    items = spool.read()
    TrackioTracker(run.config, Server(server.url), spool.id, spool.began).send(items)  # as after a lost answer
    assert_once_each(server.rows(), run.records())
    picture = logged(server.rows())[PICTURE]
    (file,) = server.folder.rglob("*.png")
    assert file == server.folder / "media" / picture["file_path"]
    assert file.read_bytes().startswith(b"\x89PNG")
