"""A text of one document: its figures have no error, which is said before, in the results, the verdict and the card."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from pipeline.cli.terminal import summary
from pipeline.config.schema import Config
from pipeline.evaluation.gates import ONE_CLUSTER
from pipeline.evaluation.results import Results
from pipeline.tracking.events import Events
from pipeline.workflow.stages import evaluate, measure_variant, quantize
from pipeline.workflow.stages.render import render
from pipeline.workflow.workspace import Entry, Workspace


@pytest.mark.slow
def test_variant_is_withheld_and_everything_says_why(tiny_model, tmp_path):
    (tmp_path / "general.txt").write_text("The quick brown fox jumps over the lazy dog near the river bank. " * 20)
    evaluated = {"general": str(tmp_path / "general.txt"), "max_tokens": 512, "device": "cpu"}
    tree = {"name": "m", "model": {"source": str(tiny_model("llama"))}, "data": None, "evaluate": evaluated}
    quantized = {"variants": ["int8"], "gate": {"rise": 100.0}}
    config = Config.model_validate({**tree, "quantize": quantized})
    shown: list[str] = []
    with Workspace.claim(tmp_path / "m", config) as workspace:
        events = Events(workspace.events_path, "m", None, shown.extend)
        outcome = evaluate.run(config, workspace, events, ())
        workspace.record("evaluate", Entry("", workspace.digests(outcome.outputs), outcome.summary))
        assert shown == [ONE_CLUSTER["general"]]
        quantize.run(config, workspace, events, ("int8",))
        outcome = measure_variant.run(config, workspace, events, ("int8",))
        refusal = str(outcome.refusal)
        config = Config.model_validate({**tree, "quantize": quantized | {"on_gate_failure": "warn"}})
        outcome = measure_variant.run(config, workspace, events, ("int8",))
        workspace.record("quantize/int8", Entry("", workspace.digests(outcome.outputs), outcome.summary))
        documents = render(config, workspace, ("int8",), lambda path: None)
        written = workspace.read_measurement("int8")
        printed = io.StringIO()
        summary(Console(file=printed, width=80), config, workspace)
    assert ONE_CLUSTER["general"] in refusal
    general = written["quality"]["general"]
    assert general["clusters"] == 1 and general["freedom"] == 0 and general["rise"]["stderr"] is None
    assert [check["passed"] for check in written["gate"]["checks"]] == [False]
    results = Results.model_validate(json.loads(documents["tunepress.json"])["results"])
    assert results.to_json() == json.loads(documents["tunepress.json"])["results"]
    assert "nan" not in printed.getvalue().lower() and f"{general['perplexity']['value']:.2f}" in printed.getvalue()
    card = documents["int8/README.md"].decode()
    assert "There is no ±, because one document says nothing about others." in card
