"""Names in `tunepress.json`: whole for the Hub, without the path for local files."""

from __future__ import annotations

import json

import pytest

from pipeline.config.loader import parse_config
from pipeline.evaluation.results import Results
from pipeline.publishing.lineage import lineage
from tests.support.fake_runs import REPO


@pytest.mark.parametrize("is_there", [True, False])
def test_lineage_shortens_local_paths_and_keeps_hub_names(hub, finished, tmp_path, monkeypatch, is_there):
    monkeypatch.chdir(tmp_path)
    if is_there:
        (tmp_path / "data" / "rows").mkdir(parents=True)
    known = finished.workspace.read_measurement("data") | {"source": "data/rows"}
    finished.configure(data={"source": "data/rows"})
    for commit, name in ((None, "rows"), ("c0ffee", "data/rows")):
        read = {"revision": commit, "split": commit and "train"}
        finished.workspace.write_measurement("data", known | read)
        finished.publish()
        told = json.loads(hub.read(REPO, "tunepress.json"))
        assert told["configuration"]["data"]["source"] == told["results"]["data"]["source"] == name


@pytest.mark.parametrize("order", [1, -1])
def test_lineage_names_each_of_several_sources_without_its_folder(finished, order):
    sources = [{"source": "private/a.jsonl"}, {"source": "ada/rows"}][::order]
    asked = {"sources": sources, "validation": {"source": "private/own.jsonl"}}
    config = parse_config(json.loads(finished.config.model_dump_json()) | {"data": asked}, "")
    parts = [{"source": "private/a.jsonl"}, {"source": "ada/rows", "split": "train", "revision": "c0ffee"}][::order]
    named, names = (", ".join(pair[::order]) for pair in (["private/a.jsonl", "ada/rows"], ["a.jsonl", "ada/rows"]))
    read = {"source": named, "parts": {str(n): part for n, part in enumerate(parts)}}
    text = lineage(config, Results.model_validate({"data": read}), {}, ()).decode()
    told = json.loads(text)
    assert [part["source"] for part in told["configuration"]["data"]["sources"]] == names.split(", ")
    assert told["data"]["source"] == told["results"]["data"]["source"] == names
    assert [part["source"] for part in told["results"]["data"]["parts"].values()] == names.split(", ")
    assert "private/" not in text


@pytest.mark.parametrize("source, name", [("ada/texts", "ada/texts"), ("folder/notes.txt", "notes.txt")])
def test_lineage_names_the_calibration_text_as_its_figures_do(finished, source, name):
    config = parse_config(
        json.loads(finished.config.model_dump_json()) | {"quantize": {"calibration": {"source": source}}}, ""
    )
    figures = {"weights": {"calibration_text": name, "calibration_tokens": 32768}}
    results = Results.model_validate({"int4": figures})
    told = json.loads(lineage(config, results, {}, ()))
    assert told["configuration"]["quantize"]["calibration"]["source"] == name
    assert told["results"]["int4"]["weights"]["calibration_text"] == name
