"""Variants with a target: their layers' bits and groups are chosen for it, made, measured and corrected."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from pipeline.config.builders import quantize_config
from pipeline.config.loader import load_config
from pipeline.errors import ConfigError, Interrupted, StageFailed
from pipeline.quantization.calibration.blocks import BlockwiseModel
from pipeline.workflow.in_process import run_stage_here
from pipeline.workflow.reporter import Reporter
from pipeline.workflow.run import run
from pipeline.workflow.stages import allocate, measure_variant
from pipeline.workflow.workspace import Workspace
from tests.support.texts import general_text

LAYER = "model.layers.1.mlp.down_proj"


@dataclass
class Aiming:
    """A folder with a model, texts and a configuration, whose variant int4 gets a target."""

    folder: Path
    model: Path

    def write(self, target: dict | None, evaluate: dict | None = None, **quantize) -> Path:
        variant = {"name": "int4", **({"target": target} if target else {})}
        calibration = {"source": str(self.folder / "calibration.txt"), "tokens": 1024}
        tree = {
            "name": "m",
            "model": {"source": str(self.model)},
            "data": None,
            "evaluate": evaluate,
            "quantize": {"calibration": calibration, "variants": [variant], **quantize},
            "track": {"project": "tests"},
        }
        path = self.folder / "m.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    def run(self, target: dict | None, evaluate: dict | None = None, **quantize) -> list[str]:
        """Run, and return the lines that were shown."""
        shown: list[str] = []

        class Telling(Reporter):
            def show(self, lines):
                shown.extend(lines)

        path = self.write(target, evaluate, **quantize)
        run(load_config(path), self.folder / "runs", reporter=Telling(), start=run_stage_here)
        return shown

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.folder / "runs/m")

    @property
    def size(self) -> int:
        return (self.workspace.release / "int4/model.safetensors").stat().st_size

    def result(self) -> dict:
        return json.loads(self.workspace.results_path.read_text())["int4"]

    def events(self) -> list[str]:
        lines = self.workspace.events_path.read_text().splitlines()
        return [record["event"] for record in map(json.loads, lines) if "event" in record]

    def measured_on(self, tokens: int = 512) -> dict:
        (self.folder / "general.txt").write_text(general_text())
        return {"general": str(self.folder / "general.txt"), "max_tokens": tokens, "device": "cpu", "prompts": []}


@pytest.fixture
def aiming(tiny_model, tmp_path, monkeypatch) -> Aiming:
    """A model one of whose layers loses much in four bits."""
    model = Path(shutil.copytree(tiny_model("llama", intermediate_size=256), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors[f"{LAYER}.weight"] *= 20
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    (tmp_path / "calibration.txt").write_text(" ".join(f"{n} apples and {n * n} pears." for n in range(400)))
    monkeypatch.chdir(tmp_path)
    return Aiming(tmp_path, model)


def test_size_is_reached_within_a_percent_and_another_one_needs_no_second_measurement(aiming, monkeypatch):
    ran, plain = [], BlockwiseModel.loaded
    monkeypatch.setattr(BlockwiseModel, "loaded", lambda self, block: ran.append(block) or plain(self, block))
    choice = allocate._choice(load_config(aiming.write({"size_mb": 1})), aiming.model, "int4")
    smallest = choice.bytes(choice._smallest()[0])
    largest = (aiming.model / "model.safetensors").stat().st_size
    for share in (0.25, 0.5):
        before = len(ran)
        target = round((1 - share) * smallest + share * largest)
        (line,) = aiming.run({"size_mb": target / 1e6})
        assert aiming.size <= target and "expected KL divergence" in line
        assert aiming.size > 0.99 * target or line.endswith("; that is the nearest to the target"), line
        assert aiming.size > 0.95 * target and len(ran) > 0 and (before == 0 or len(ran) == before)
    made = aiming.workspace.progress("allocate", "int4")
    assert LAYER in [*made["chosen"]["int8"], *made["chosen"]["keep"]]
    assert not (aiming.workspace.folder / "allocate").exists()


def test_bits_are_those_of_all_matrices_together(aiming):
    (line,) = aiming.run({"bits": 6.0})
    tensors = load_file(aiming.workspace.release / "int4/model.safetensors")
    stored = sum(t.nbytes for name, t in tensors.items() if "norm" not in name and "bias" not in name)
    weights = sum(t.numel() for t in load_file(aiming.model / "model.safetensors").values() if t.ndim == 2)
    assert 5.5 < 8 * stored / weights <= 6.0
    assert f"{8 * stored / weights:.2f} bits a weight" in line


def test_smaller_than_the_smallest_is_refused_with_the_nearest_size(aiming):
    with pytest.raises(StageFailed, match=r"target size_mb 0.01 cannot be reached; the nearest is 0\.\d+ MB"):
        aiming.run({"size_mb": 0.01})
    with pytest.raises(ConfigError, match=r"bits 2 cannot be reached; .* Try: target: \{bits: \d\.\d+\}") as refused:
        allocate.check_reachable(load_config(aiming.write({"bits": 2})), aiming.model)
    nearest = float(str(refused.value).rpartition(": ")[2].rstrip("}"))
    allocate.check_reachable(load_config(aiming.write({"bits": nearest})), aiming.model)


def test_target_without_calibration_text_is_refused_before_work(aiming):
    with pytest.raises(ConfigError, match="int4: a target needs calibration text, .* Try: quantize.calibration.source"):
        aiming.run({"bits": 5}, calibration={})
    assert not (aiming.workspace.release).exists()


def test_rise_without_measurement_is_refused(aiming):
    with pytest.raises(ConfigError, match="evaluate: the target rise of int4 must be measured"):
        aiming.run({"rise": 0.05})


@pytest.mark.slow
def test_calibrated_variant_is_rounded_with_the_chosen_settings_and_its_card_tells_them(aiming):
    aiming.run({"bits": 6.0}, aiming.measured_on(), quality="calibrated", on_gate_failure="warn")
    known, result = aiming.workspace.progress("allocate", "int4"), aiming.result()
    assert result["variant"]["rounding"] == "gptq" and result["variant"]["int8"] == known["chosen"]["int8"] != []
    assert "target" not in result["variant"]
    assert result["weights"]["target"] == {"bits": 6.0} and result["weights"]["expected_kl"] == known["loss"]
    card = (aiming.workspace.release / "README.md").read_text()
    assert "chosen for a target of 6 bits a weight" in card
    lineage = json.loads((aiming.workspace.release / "tunepress.json").read_text())
    (asked,) = lineage["configuration"]["quantize"]["variants"]
    assert asked["target"]["bits"] == 6.0 and asked["int8"] == []
    assert lineage["results"]["int4"]["variant"]["int8"] == known["chosen"]["int8"]


@pytest.mark.slow
def test_impossible_rise_is_tried_three_times_each_of_them_counted_and_resumes(aiming, monkeypatch):
    gate, stops = {"disagreement": 1e-9}, []
    evaluate = aiming.measured_on()
    plain = allocate.next_try

    def stopped_once(*arguments):
        found = plain(*arguments)
        stops.append(found)
        if len(stops) == 2:
            raise KeyboardInterrupt
        return found

    aiming.run({"bits": 8}, evaluate, gate={"rise": 9})
    monkeypatch.setattr(allocate, "next_try", stopped_once)
    with pytest.raises(Interrupted):
        aiming.run({"rise": 0.5}, evaluate, gate=gate)
    assert (aiming.workspace.release / "int4/model.safetensors").is_file(), "the last release stays until then"
    with pytest.raises(StageFailed, match=r"withheld: .* that is the best of \d ways to make it"):
        aiming.run({"rise": 0.5}, evaluate, gate=gate)
    result = aiming.result()
    tried = result["gate"]["tried"]
    assert 2 <= len(tried) <= allocate.TRIES and result["gate"]["withheld"] and stops[0] is True
    assert [one["gate"]["corrected_for"] for one in tried] == [2, *[4] * (len(tried) - 1)]
    sizes = [one["size_bytes"] for one in tried]
    assert sizes == sorted(set(sizes)), "each try takes more bytes"
    assert not (aiming.workspace.release / "int4").exists()
    events = aiming.events()
    assert events.count("quantization_failed") == 2  # the stop, and the end


def test_missed_rise_is_corrected_until_it_passes(aiming, monkeypatch):
    evaluate = aiming.measured_on()
    plain = allocate._sensitivities

    def far_too_low(*arguments):
        found = plain(*arguments)
        return type(found)({name: share / 300 for name, share in found.shares.items()}, found.errors, found.fused)

    monkeypatch.setattr(allocate, "_sensitivities", far_too_low)
    shown = aiming.run({"rise": 0.02}, evaluate)
    result = aiming.result()
    assert result["gate"]["passed"] and result["gate"]["limits"]["rise"] == 0.02, result["gate"]
    tried = result["gate"]["tried"]
    assert not tried[0]["gate"]["passed"] and tried[-1]["gate"]["passed"]
    assert any("misses its gate. Next:" in line for line in shown)
    events = aiming.events()
    assert events.count("quantization_completed") == 1 and "quantization_failed" not in events


def test_escalation_of_earlier_configurations_is_a_target_with_one_line(aiming, capsys):
    from pipeline.config import former_keys

    former_keys._tell_of_target.cache_clear()
    path = aiming.write(None, on_gate_failure="escalate", gate={"rise": 0.04}, calibration={})
    tree = yaml.safe_load(path.read_text())
    tree["quantize"]["variants"] = ["int8", {"name": "int4", "embeddings": "keep"}]
    path.write_text(yaml.safe_dump({key: value for key, value in tree.items() if key != "evaluate"}))
    config, again = load_config(path).quantize, load_config(path).quantize
    assert config == again and config.on_gate_failure == "withhold"
    assert config.spec("int4").target.asked == {"rise": 0.04} and config.spec("int8").target is None
    assert config.spec("int4").embeddings is None and config.calibration.source == "builtin:python-docs"
    assert capsys.readouterr().err.count("quantize.variants[].target: {rise: 0.03}") == 1


@pytest.mark.slow
def test_far_too_small_a_loss_leads_to_a_smaller_variant_and_back_if_that_misses(aiming, monkeypatch):
    evaluate, plain = aiming.measured_on(), allocate._sensitivities

    def far_too_high(*arguments):
        found = plain(*arguments)
        return type(found)({name: share * 30 for name, share in found.shares.items()}, found.errors, found.fused)

    monkeypatch.setattr(allocate, "_sensitivities", far_too_high)
    shown = aiming.run({"rise": 0.3}, evaluate)
    tried = aiming.result()["gate"]["tried"]
    assert any("passes by far. Next:" in line for line in shown)
    assert [one["gate"]["passed"] for one in tried] == [True, True] and tried[1]["size_bytes"] < tried[0]["size_bytes"]
    assert aiming.size == aiming.result()["size_bytes"] == tried[1]["size_bytes"]
    judged = measure_variant.judge

    def smaller_misses(quality, limits, tries=1):
        return judged(quality, limits if tries == 2 else {"rise": 1e-9}, tries)

    monkeypatch.setattr(measure_variant, "judge", smaller_misses)
    shown = aiming.run({"rise": 0.31}, evaluate)
    result = aiming.result()
    assert any("the smaller try misses its gate, so the one before is made again" in line for line in shown)
    assert result["gate"]["passed"] and aiming.size == result["size_bytes"] == tried[0]["size_bytes"]
    assert [one["gate"]["passed"] for one in result["gate"]["tried"]] == [False, True]


def test_text_of_one_document_is_not_tried_again(aiming):
    evaluate = aiming.measured_on()
    (aiming.folder / "general.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    with pytest.raises(StageFailed, match="one document"):
        aiming.run({"rise": 0.5}, evaluate)
    assert "tried" not in aiming.result()["gate"]
    assert len(aiming.workspace.progress("allocate", "int4")["tries"]) == 1


def test_variant_with_a_target_stays_only_with_its_text(aiming):
    config = quantize_config(str(aiming.model), aiming.folder / "out", ["int8"])
    aimed = [{"name": "int4", "target": {"bits": 6}}]
    text = f"quantize.calibration.source={aiming.folder / 'calibration.txt'}"
    first = quantize_config(
        str(aiming.model), aiming.folder / "out", [], settings=[f"quantize.variants={json.dumps(aimed)}", text]
    )
    out = aiming.folder / "out"
    run(first, output=out, start=run_stage_here)
    before = (out / "int4/model.safetensors").stat().st_mtime_ns
    with pytest.raises(ConfigError, match="has int4, whose target needs the calibration text .* or --remove int4"):
        run(config, output=out, start=run_stage_here)
    run(quantize_config(str(aiming.model), out, ["int8"], settings=[text]), output=out, start=run_stage_here)
    assert (out / "int4/model.safetensors").stat().st_mtime_ns == before and (out / "int8").is_dir()
    (spec,) = (v for v in Workspace(out / ".tunepress").config().quantize.variants if v.name == "int4")
    assert spec.target.asked == {"bits": 6.0} and spec.int8 == []


def test_card_counts_layers_by_group_size(aiming):
    sizes = {64: ["*.1.mlp.down_proj"], 128: ["*.0.mlp.down_proj"]}
    aiming.run(None, variants=[{"name": "int4", "group_size": 32, "group_sizes": sizes}])
    card = (aiming.workspace.release / "README.md").read_text()
    assert "layers by group size: 12 in groups of 32, 1 in groups of 64, 1 in groups of 128" in card
