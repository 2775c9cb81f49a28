"""Escalation: a variant that misses its gate gets the smallest fallback that passes."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pipeline.config.schema import Config
from pipeline.evaluation import sensitivity
from pipeline.system.files import fingerprint
from pipeline.tracking.events import Events
from pipeline.workflow.stages import Outcome, evaluate, measure_variant, quantize
from pipeline.workflow.stages.render import render
from pipeline.workflow.workspace import Entry, Workspace
from tests.support.texts import general_text

LAYER = "model.layers.1.mlp.down_proj"


@dataclass
class Trying:
    """A workspace with a measured model, in which a variant is made and judged, in this process."""

    workspace: Workspace
    tree: dict

    def __post_init__(self):
        self.told: list[str] = []
        self.shown: list[str] = []

    def config(self, **quantize_) -> Config:
        asked = {"variants": [{"name": "int4", "group_size": 128}], "on_gate_failure": "escalate"}
        return Config.model_validate({**self.tree, "quantize": {**asked, **quantize_}})

    def judge(self, stop_at: str | None = None, **quantize_) -> Outcome:
        """Make and admit int4; stopped when it is told of `stop_at`."""

        def progress(done, total, what):
            self.told.append(what)
            if stop_at and stop_at in what:
                raise KeyboardInterrupt

        config = self.config(**quantize_)
        events = Events(self.workspace.events_path, "m", progress, self.shown.extend)
        quantize.run(config, self.workspace, events, ("int4",))
        self.told.clear()
        outcome = measure_variant.run(config, self.workspace, events, ("int4",))
        depends_on = fingerprint(measure_variant.depends(config, self.workspace, ("int4",)))
        entry = Entry(depends_on, self.workspace.digests(outcome.outputs), outcome.summary)
        self.workspace.record("quantize/int4", entry)
        return outcome

    def result(self) -> dict:
        return json.loads(self.workspace.results_path.read_text())["int4"]

    def tries(self) -> list[str]:
        """What was made and measured since the last call."""
        return sorted({what.split(":")[0] for what in self.told if ", try " in what})


@pytest.fixture(scope="module")
def trying(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("escalation")
    model = Path(shutil.copytree(tiny_model("llama"), folder / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors[f"{LAYER}.weight"][:, ::32] *= 60  # columns that nothing comes to, and that spoil the scales of others
    tensors[f"{LAYER}.weight".replace("down", "up")][::32] = 0
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    (folder / "general.txt").write_text(general_text())
    tree = {"name": "m", "model": {"source": str(model)}, "data": None}
    tree["evaluate"] = {"general": str(folder / "general.txt"), "max_tokens": 512, "device": "cpu"}
    config = Config.model_validate(tree)
    with Workspace.claim(folder / "m", config) as workspace:
        events = Events(workspace.events_path, "m")
        outcome = evaluate.run(config, workspace, events, ())
        workspace.record("evaluate", Entry("", workspace.digests(outcome.outputs), outcome.summary))
        yield Trying(workspace, tree)


IMPOSSIBLE = {"rise": 100.0, "kl": 1e-9}


@pytest.fixture(scope="module")
def none_passes(trying):
    """Stopped at its third try, and then finished: (what was tried before, and after), the outcome, the result."""
    with pytest.raises(KeyboardInterrupt):
        trying.judge("try 3", gate=IMPOSSIBLE)
    before = trying.tries()
    outcome = trying.judge(gate=IMPOSSIBLE)
    return before, trying.tries(), outcome, trying.result()


def test_stopped_escalation_resumes_at_its_attempt(none_passes):
    before, after, _, result = none_passes
    done = {name for name in before if "try 3" not in name}
    assert done and not done & set(after) and any("try 3" in name for name in after)
    assert len(result["gate"]["tried"]) == len(done | set(after)) + 1  # and as it was asked for


def test_gate_allows_for_every_way_and_layers_are_chosen_on_text_that_it_does_not_measure(none_passes, trying):
    tried = none_passes[3]["gate"]["tried"]
    asked = trying.config().quantize.spec("int4").making()
    for way in tried:
        others = 2 * (len(tried) - 1)
        assert way["gate"]["corrected_for"] == (2 if way["variant"] == asked else others)
        assert all(check["quantile"] > (2.28 if way["variant"] == asked else 2.9) for check in way["gate"]["checks"])
    assert trying.workspace.progress("quantize/int4", "layers")["about"]["unmeasured"] == sensitivity.TOKENS


def test_best_failing_fallback_is_reported_and_withheld(none_passes, trying):
    _, _, outcome, result = none_passes
    tried = result["gate"]["tried"]
    nearest = min(tried, key=lambda rung: max(c["value"] + c["quantile"] * c["stderr"] for c in kl(rung)))
    assert result["variant"] == nearest["variant"] and result["gate"]["withheld"] is True
    line = outcome.summary["withheld"]
    assert f"that is the best of {len(tried)} ways to make it, and takes {nearest['size_bytes']:,} bytes" in line
    assert not (trying.workspace.release / "int4").exists()


def kl(rung: dict) -> list[dict]:
    return [check for check in rung["gate"]["checks"] if check["figure"] == "kl"]


def test_the_ladder_has_other_roundings_smaller_groups_and_sensitive_layers_in_eight_bits(none_passes):
    specs = [rung["variant"] for rung in none_passes[3]["gate"]["tried"]]
    assert {"search", "hqq"} <= {spec["rounding"] for spec in specs}
    assert {128, 64, 32} <= {spec["group_size"] for spec in specs}
    assert {"keep", "int8"} == {spec["embeddings"] for spec in specs}
    mixed = sorted((spec["int8"] for spec in specs if spec.get("int8")), key=len)
    assert len(mixed) >= 3 and all(LAYER in layers for layers in mixed)
    assert all(set(few) <= set(more) for few, more in zip(mixed, mixed[1:], strict=False))


@pytest.fixture(scope="module")
def one_passes(none_passes, trying):
    """With a limit that the best of them just meets: the outcome, the result, its card and what was measured."""
    tried = none_passes[3]["gate"]["tried"]
    (check,) = kl(min(tried, key=lambda rung: kl(rung)[0]["value"]))
    limit = 1.001 * (check["value"] + check["quantile"] * check["stderr"])
    outcome = trying.judge(gate={"rise": 100.0, "kl": limit})
    config = trying.config(gate={"rise": 100.0, "kl": limit})
    documents = render(config, trying.workspace, ("int4",), lambda path: None)
    return outcome, trying.result(), documents, trying.tries()


def test_the_smallest_that_passes_is_taken_and_nothing_known_is_measured_again(one_passes, none_passes, trying):
    outcome, result, _, measured_again = one_passes
    assert outcome.refusal is None and result["gate"]["passed"] and measured_again == []
    passing = [rung for rung in result["gate"]["tried"] if rung["gate"]["passed"]]
    assert len(passing) == 1 and passing[0] == result["gate"]["tried"][-1]
    assert result["variant"] == passing[0]["variant"] and result["size_bytes"] == passing[0]["size_bytes"]
    assert result["speed"]["pipeline.load"]["runs"] and result["quality"] == passing[0]["quality"]


def test_chosen_fallback_loads_in_transformers(one_passes, trying):
    from torchao.quantization import Int4Tensor, Int8Tensor
    from transformers import AutoModelForCausalLM

    spec = one_passes[1]["variant"]
    model = AutoModelForCausalLM.from_pretrained(trying.workspace.release / "int4", dtype="auto")
    kinds = {name: type(model.get_submodule(name).weight.data) for name in (LAYER, "model.layers.0.mlp.up_proj")}
    assert all(kind is (Int8Tensor if name in spec.get("int8", ()) else Int4Tensor) for name, kind in kinds.items())
    assert kinds[LAYER] is Int8Tensor


def test_the_card_and_the_lineage_have_every_try(one_passes):
    _, result, documents, _ = one_passes
    card = documents["README.md"].decode()
    assert "## `int4/`: what was tried" in card and "layers in eight bits" in card
    table = card[card.index("what was tried") :].split("\n\n")[3]
    assert table.count("\n") == len(result["gate"]["tried"]) + 1 and table.count("passes |") == 1
    told = json.loads(documents["tunepress.json"])["results"]["int4"]["gate"]["tried"]
    assert [rung["size_bytes"] for rung in told] == [rung["size_bytes"] for rung in result["gate"]["tried"]]


@pytest.mark.slow
def test_looser_limit_gives_the_variant_as_requested(one_passes, trying):
    outcome = trying.judge(gate={"rise": 100.0, "kl": 100.0})
    result = trying.result()
    assert outcome.refusal is None and result["gate"]["passed"]
    assert result["variant"] == trying.config().quantize.spec("int4").making()  # and not a smaller one that was tried
    assert "tried" not in result["gate"] and trying.tries() == []


def test_small_memory_tries_fallbacks_without_layer_measurement(one_passes, trying, monkeypatch):
    monkeypatch.setattr("pipeline.system.hardware.free_bytes", lambda device: 1000)
    trying.shown.clear()
    trying.judge(gate=IMPOSSIBLE)
    assert any(rung["variant"].get("int8") for rung in trying.result()["gate"]["tried"])  # measured before, and kept
    assert trying.shown == []
    trying.workspace.note("quantize/int4", layers=None)
    trying.judge(gate=IMPOSSIBLE)
    tried = [rung["variant"] for rung in trying.result()["gate"]["tried"]]
    assert len(tried) > 2 and not any(spec.get("int8") for spec in tried)
    (line,) = trying.shown
    assert line.startswith("int4: not tried with its most sensitive layers in eight bits: ")
    assert "may take 75% of the 1,000 that are free (cpu)" in line
