"""A variant that misses its gate: withheld and reported; a changed limit changes only the verdict."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest

from pipeline.system.files import sha256
from tests.support.hub import LoopbackHub
from tests.support.runs import TOKEN, Place, write_place

ANY = {"rise": 100.0, "kl": 100.0}  # limits that a variant of any model meets
LOOSE, TIGHT = "quantize.gate.kl=100", "quantize.gate.kl=1e-9"


@dataclass
class Told:
    """What one run left: exit code, output, events of it alone, results, and what the repository has then."""

    code: int
    stdout: str
    stderr: str
    events: list[dict]
    results: dict
    files: dict[str, bytes] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    head: str = ""
    written: int = 0  # when the file of int4's weights was, wherever it lies

    @property
    def card(self) -> str:
        return self.files["README.md"].decode()

    @property
    def lineage(self) -> dict:
        return json.loads(self.files["tunepress.json"])

    def names(self, variant: str) -> list[str]:
        return [e["event"] for e in self.events if e.get("variant") == variant]


def run(place: Place, *settings: str) -> Told:
    before = len(place.events()) if place.run_folder.is_dir() else 0
    done = place.tunepress("run", "tiny.yaml", *(word for s in settings for word in ("--set", s)), check=None)
    files = {name: place.hub.read("ada/tiny", name) for name in place.hub.files("ada/tiny")}
    tags = list(place.hub.repo("ada/tiny").tags)
    (weights,) = place.run_folder.glob("*/int4/model.safetensors")
    told = (done.returncode, done.stdout, done.stderr, place.events()[before:], place.results())
    head = place.hub.commits("ada/tiny")[0]
    return Told(*told, files, tags, head, weights.stat().st_mtime_ns)


def measured(told: Told) -> dict:
    """What was measured of int4, speeds and all, which would not be the same a second time."""
    return {key: value for key, value in told.results["int4"].items() if key != "gate"}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("gates")
    variants = [{"name": "int8", "gate": ANY}, {"name": "int4", "group_size": 128}]
    with LoopbackHub(folder / "hub", {TOKEN: {"name": "ada", "role": "write"}}) as hub:
        yield write_place(
            folder / "work", tiny_model("llama"), hub,
            train={"max_steps": 2}, evaluate={"max_tokens": 512, "prompts": []},
            quantize={"variants": variants, "gate": {"rise": 100.0, "kl": 1e-9}, "on_gate_failure": "withhold"},
        )  # fmt: skip


@pytest.fixture(scope="module")
def withheld(place) -> Told:
    return run(place)


@pytest.fixture(scope="module")
def again(place, withheld) -> Told:
    return run(place)


@pytest.fixture(scope="module")
def let_in(place, again) -> Told:
    return run(place, LOOSE)


@pytest.fixture(scope="module")
def judged_anew(place, let_in) -> Told:
    """Both variants, which are published, held against another limit."""
    return run(place, LOOSE, "quantize.gate.disagreement=1")


@pytest.fixture(scope="module")
def taken_back(place, judged_anew) -> Told:
    return run(place, TIGHT)


@pytest.fixture(scope="module")
def warned(place, taken_back) -> Told:
    return run(place, TIGHT, "quantize.on_gate_failure=warn")


def test_a_variant_that_misses_its_gate_is_not_published_and_all_else_is(withheld):
    assert not any(name.startswith("int4/") for name in withheld.files)
    assert {"model.safetensors", "int8/model.safetensors", "adapter/adapter_config.json"} <= withheld.files.keys()
    assert withheld.tags == ["release-1"]


def test_the_run_ends_with_one_line_that_names_variant_figure_and_limit(withheld):
    assert withheld.code == 2
    (line,) = withheld.stderr.splitlines()
    assert line.startswith("tunepress: quantize int4: withheld: KL divergence is ")
    assert "nats a token on held-out text, and the limit is 1e-09" in line


def test_the_event_says_why(withheld):
    assert withheld.names("int4") == ["quantization_started", "quantization_failed"]
    (failed,) = (e for e in withheld.events if e["event"] == "quantization_failed")
    assert failed["error"] == "GateError" and "the limit is 1e-09" in failed["message"]
    assert withheld.names("int8")[-2:] == ["quantization_completed", "quantized_model_pushed"]


def test_card_and_lineage_tell_of_it_with_its_figures_and_its_limits(withheld):
    assert "- `int4/` was **tried and withheld** (" in withheld.card
    assert "the limit is 0.000000001" in withheld.card or "the limit is 1e-09" in withheld.card
    told = withheld.lineage["results"]
    assert "int4" not in told and told["int8"]["gate"]["passed"] is True
    verdict = told["withheld"]["int4"]["gate"]
    assert verdict["passed"] is False and verdict["withheld"] is True
    assert verdict["limits"] == {"rise": 100.0, "kl": 1e-9}
    assert told["withheld"]["int4"]["quality"] == withheld.results["int4"]["quality"]


def test_withheld_variant_is_not_judged_again(again, withheld):
    assert again.code == 2 and again.stderr == withheld.stderr
    assert "> " not in again.stdout and again.stdout.count("done before") == 6
    assert again.events == []


def test_looser_limit_admits_without_making_or_measuring_again(let_in, withheld):
    assert let_in.code == 0, let_in.stderr
    assert "int4/model.safetensors" in let_in.files and "withheld" not in let_in.card
    assert let_in.lineage["results"]["int4"]["gate"]["passed"] is True
    assert measured(let_in) == measured(withheld) and let_in.written == withheld.written
    assert let_in.names("int4")[-2:] == ["quantization_completed", "quantized_model_pushed"]


def test_changed_limit_keeps_variants_until_judged(judged_anew, let_in, place):
    assert judged_anew.code == 0, judged_anew.stderr
    assert judged_anew.names("int4") == ["quantization_started", "quantization_completed", "quantized_model_pushed"]
    assert measured(judged_anew) == measured(let_in) and judged_anew.written == let_in.written
    commits = place.hub.commits("ada/tiny")
    since = commits[: commits.index(let_in.head)]
    assert since and all("int4/model.safetensors" in place.hub.files("ada/tiny", commit) for commit in since)


def test_stricter_limit_withholds_the_variant_and_keeps_its_files(taken_back, let_in):
    assert taken_back.code == 2
    assert not any(name.startswith("int4/") for name in taken_back.files)
    assert "tried and withheld" in taken_back.card
    assert measured(taken_back) == measured(let_in) and taken_back.written == let_in.written


def test_with_a_warning_it_is_published_and_both_cards_say_so(warned, let_in):
    assert warned.code == 0, warned.stderr
    line = "**`int4/` misses its limits for lost quality and is published with a warning: KL divergence is "
    assert line in warned.card and line in warned.files["int4/README.md"].decode()
    assert "misses its gate: KL divergence" in warned.stdout
    verdict = warned.lineage["results"]["int4"]["gate"]
    assert (verdict["passed"], verdict["withheld"]) == (False, False)
    assert warned.files["int4/model.safetensors"] == let_in.files["int4/model.safetensors"]


@pytest.mark.slow
def test_publishing_again_sends_nothing_and_other_settings_make_it_anew(place, warned):
    commits = place.hub.commits("ada/tiny")
    done = place.tunepress("run", "tiny.yaml", "--set", TIGHT, "--set", "quantize.on_gate_failure=warn")
    assert "> " not in done.stdout and place.hub.commits("ada/tiny") == commits
    before = sha256(place.release / "int4" / "model.safetensors")
    variants = "quantize.variants=[{name: int8, gate: {rise: 100, kl: 100}}, {name: int4, group_size: 32}]"
    done = place.tunepress("run", "tiny.yaml", "--set", TIGHT, "--set", variants, check=2)
    assert not (place.release / "int4").exists() and "quantize/int4" in done.stdout
    assert sha256(place.run_folder / "quantized" / "int4" / "model.safetensors") != before
