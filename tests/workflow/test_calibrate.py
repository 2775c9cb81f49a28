"""Stage `calibrate`: it goes on after a stop, and variants are made of what it left."""

from __future__ import annotations

import copy
import gc
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from itertools import chain

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.cli.terminal import show_status
from pipeline.config.loader import load_config
from pipeline.data import load_examples, write_examples
from pipeline.data.encode import Encoded
from pipeline.errors import ConfigError, DataError, Interrupted, StageFailed
from pipeline.evaluation import evaluate
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.matrices import linear_weights
from pipeline.quantization.calibration.blocks import BlockwiseModel
from pipeline.quantization.calibration.store import read_statistics
from pipeline.quantization.formats import storage
from pipeline.quantization.statistics import Statistics
from pipeline.workflow.cleanup import clean
from pipeline.workflow.in_process import run_stage_here
from pipeline.workflow.run import run
from pipeline.workflow.run_state import run_state
from pipeline.workflow.stages import calibrate, calibration_text
from pipeline.workflow.workspace import Workspace
from tests.support.hub import LoopbackHub
from tests.support.runs import TOKEN, Place

VARIANT = {"name": "int4", "group_size": 32}


@pytest.fixture
def place(tmp_path, tiny_model, monkeypatch) -> Place:
    """A run that calibrates on a text of its own and measures nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "calibration.txt").write_text(" ".join(f"{n} apples and {n * n} pears." for n in range(400)))
    write(tmp_path, tiny_model("llama"))
    return Place(tmp_path)


def write(folder, model, **quantize):
    calibration = {"source": "calibration.txt", "tokens": 2048}
    tree = {
        "name": "tiny",
        "model": {"source": str(model)},
        "data": None,
        "evaluate": None,
        "quantize": {"quality": "calibrated", "calibration": calibration, "variants": [VARIANT], **quantize},
        "track": {"project": "tests"},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))


def made(place) -> dict[str, str]:
    """Run, and return the digests of the variant's weights."""
    workspace = run(load_config(str(place.config)), "runs", start=run_stage_here)
    files = sorted((workspace.release / "int4").glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def weights(folder, model) -> dict[str, torch.Tensor]:
    checkpoint, form = Checkpoint(folder), storage("torchao")
    return {name: form.read(checkpoint, name, shape).dequantize() for name, shape in linear_weights(model).items()}


def test_calibrated_variant_has_less_output_error_than_a_fast_one(place, tmp_path, tiny_model):
    made(place)
    model = tiny_model("llama")
    calibrated = weights(tmp_path / "runs/tiny/release/int4", model)
    write(tmp_path, model, quality="fast")
    made(place)
    fast, full = weights(tmp_path / "runs/tiny/release/int4", model), Checkpoint(model)
    other = " ".join(f"{n} apples and {n * n} pears." for n in range(600, 800))
    windows = torch.tensor([AutoTokenizer.from_pretrained(model)(other)["input_ids"][:1024]])
    blocks, inputs = BlockwiseModel(model), {}
    with blocks.embedding():
        hidden = blocks.enter(windows)
    with blocks.loaded(0):
        blocks.run(0, windows, hidden, lambda name, given: inputs.setdefault(name, given.float()))
    for name, given in inputs.items():
        exact = given @ full.read(name).float().T
        error = {k: (given @ w[name].T - exact).square().mean() for k, w in (("cal", calibrated), ("fast", fast))}
        assert error["cal"] < error["fast"], name


def made_after_a_stop(place, monkeypatch) -> dict[str, str]:
    """Stop a run after its first block was calibrated, and run it again; return the digests of the int4 weights."""
    ran, plain = [], BlockwiseModel.loaded

    def loaded(self, block):
        ran.append(block)
        if ran == [0, 1, 0, 1, 0, 1]:  # the check runs every block twice
            raise KeyboardInterrupt
        return plain(self, block)

    monkeypatch.setattr(BlockwiseModel, "loaded", loaded)
    with pytest.raises(Interrupted):
        made(place)
    resumed = made(place)
    assert ran == [0, 1, 0, 1, 0, 1, 1]
    return resumed


def test_stopped_calibration_goes_on_with_the_next_block_and_gives_the_same_bytes(place, monkeypatch):
    resumed = made_after_a_stop(place, monkeypatch)
    monkeypatch.undo()
    monkeypatch.chdir(place.folder)
    run(load_config(str(place.config)), "runs", fresh=True, start=run_stage_here)
    assert resumed == made(place)


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_smoothed_variant_is_the_model_in_eight_bits_also_after_a_stop(
    place, tmp_path, tiny_model, monkeypatch, rounding
):
    static = {"name": "w8a8-static", "rounding": rounding}
    model = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    norms = [name for name in weights if name.endswith("input_layernorm.weight")]
    for name in norms:
        weights[name][3] *= 64  # a channel that is much larger than the others
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    write(tmp_path, model, variants=[static, VARIANT])
    together = made_after_a_stop(place, monkeypatch)
    release = tmp_path / "runs/tiny/release"
    stored, base = (Checkpoint(folder) for folder in (release / "w8a8-static", model))
    assert all(stored.read(name)[3] <= base.read(name)[3] / 4 for name in norms) and len(norms) == 2
    form = storage("static-quantized")
    smoothed = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    exact = copy.deepcopy(smoothed)
    for name in (name for name in weights if weights[name].ndim == 1):
        smoothed.get_parameter(name).data = stored.read(name).float()
    for name, shape in linear_weights(model).items():
        smoothed.get_parameter(name).data = form.read(stored, name, shape).dequantize(torch.float32)
    ids = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        expected, found = exact(ids).logits, smoothed(ids).logits
    assert (found - expected).norm() < 0.1 * expected.norm()
    write(tmp_path, model)
    run(load_config(str(place.config)), "runs", fresh=True, start=run_stage_here)
    assert made(place) == together  # int4 does not depend on the other variant's smoothing


def test_status_tells_a_calibration_that_runs_is_stopped_done_or_cleaned(place, tmp_path, monkeypatch):
    workspace, plain = Workspace(tmp_path / "runs/tiny"), BlockwiseModel.loaded
    seen = []

    def loaded(self, block):
        seen.append(run_state(workspace))
        if len(seen) == 6:
            raise KeyboardInterrupt
        return plain(self, block)

    monkeypatch.setattr(BlockwiseModel, "loaded", loaded)
    with pytest.raises(Interrupted):
        made(place)
    assert list(seen[0].running) == ["calibrate"] and seen[0].left == ("quantize/int4", "render")
    stopped = run_state(workspace)
    assert stopped.stopped == ("calibrate",) and stopped.left == ("calibrate", "quantize/int4", "render")
    made(place)
    console = Console(file=io.StringIO(), width=200)
    show_status(console, run_state(workspace), workspace, [])
    assert "2,048 tokens of text" in console.file.getvalue()
    clean(workspace)
    cleaned = run_state(workspace)
    assert (cleaned.removed, cleaned.changed, cleaned.left, cleaned.stopped) == (("calibrate",), (), (), ())


def test_changed_calibration_text_makes_the_variant_again(place, tmp_path):
    before = made(place)
    assert made(place) == before
    (tmp_path / "calibration.txt").write_text(" ".join(f"{n} plums or {n * n} figs!" for n in range(400)))
    assert made(place) != before


def test_calibration_without_a_text_is_refused_before_work(place, tmp_path, tiny_model):
    write(tmp_path, tiny_model("llama"), calibration={})
    with pytest.raises(ConfigError, match="no training data to calibrate on. Try: quantize.calibration.source"):
        made(place)
    assert not (tmp_path / "runs/tiny/release").exists()


def measure_on(place, text):
    tree = yaml.safe_load(place.config.read_text())
    tree["evaluate"] = {"general": text, "max_tokens": 512, "prompts": []}
    tree["quantize"]["on_gate_failure"] = "warn"
    place.config.write_text(yaml.safe_dump(tree))


@pytest.mark.parametrize(
    "source, message",
    [
        ("none.txt", "none.txt: cannot be read: No such file"),
        ("none.jsonl", "none.jsonl: no such file"),
        (["calibration.txt", "none.txt"], "none.txt: cannot be read: No such file"),
        ("empty.txt", "empty.txt: is empty"),
        (".", ".: is a folder"),
        ("builtin:none", "builtin:none: no such builtin data set"),
        ("nothing", "nothing: neither a file nor a data set on the Hub"),
        ("general.txt", "general.txt: is the general text, which is measured on"),
    ],
)
def test_calibration_source_that_cannot_be_used_is_refused_before_work(place, tmp_path, tiny_model, source, message):
    (tmp_path / "empty.txt").write_text(" ")
    (tmp_path / "general.txt").write_text("\n\n\n".join(f"{n} plums or {n * n} figs!" * 30 for n in range(40)))
    write(tmp_path, tiny_model("llama"), calibration={"source": source})
    measure_on(place, "./general.txt")
    with pytest.raises(DataError, match="quantize.calibration.source:? " + re.escape(message) + ".* Try: ") as refused:
        made(place)
    assert "\n" not in str(refused.value) and not (tmp_path / "runs").exists()


def test_calibration_text_that_is_too_short_or_measured_on_is_refused_before_the_model_is_measured(
    place, tmp_path, monkeypatch
):
    def measured(*args):
        raise AssertionError("was measured")

    monkeypatch.setattr(evaluate, "evaluate", measured)
    (tmp_path / "general.txt").write_text("Before.\n\n\n" + (tmp_path / "calibration.txt").read_text())
    measure_on(place, "general.txt")
    with pytest.raises(StageFailed, match="a part of the general text, which is measured on. Try: another"):
        made(place)
    (tmp_path / "general.txt").write_text("\n\n\n".join(f"{n} plums or {n * n} figs!" * 30 for n in range(40)))
    for text, message in {
        "Short.": "calibration.txt: the text is too short",
        "A text. " * 20: "one window has",
    }.items():
        (tmp_path / "calibration.txt").write_text(text)
        with pytest.raises(StageFailed, match=message + ".* Try: more text"):
            made(place)


def test_finished_calibration_is_checked_against_a_text_that_is_measured_on_later(place, tmp_path, monkeypatch):
    before, general = made(place), tmp_path / "general.txt"
    general.write_text("\n\n\n".join(f"{n} plums or {n * n} figs!" * 30 for n in range(40)))
    ran, plain = [], BlockwiseModel.loaded
    monkeypatch.setattr(BlockwiseModel, "loaded", lambda self, block: ran.append(block) or plain(self, block))

    measure_on(place, "general.txt")
    assert made(place) == before and not ran
    (tmp_path / "later.txt").write_text((tmp_path / "calibration.txt").read_text())
    measure_on(place, "later.txt")
    with pytest.raises(StageFailed, match="a part of the general text, which is measured on"):
        made(place)


@pytest.mark.slow
def test_training_data_is_calibrated_on_without_examples_that_share_text_with_held_out_ones(
    place, tmp_path, tiny_model
):
    common = " ".join(f"licence{n}" for n in range(20))  # as in half of all answers
    answers = (f"{common if n % 2 else ''} {n} apples, {n * n} pears, {n**3} plums" for n in range(60))
    rows = [{"prompt": f"Count {n}!", "completion": answer} for n, answer in enumerate(answers)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write(tmp_path, tiny_model("llama"), calibration={"tokens": 512}, on_gate_failure="warn")
    tree = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    tree["data"] = {"source": "rows.jsonl", "held_out": 0.2}
    tree["train"] = {"method": "lora", "max_steps": 1}
    tree["merge"] = {"base": "bf16"}
    tree["evaluate"] = {"max_tokens": 1024, "prompts": []}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    assert made(place)
    config, workspace = load_config(str(place.config)), Workspace(tmp_path / "runs/tiny")
    assert workspace.ledger()["calibrate"].summary["tokens"] == 512
    tokenizer = AutoTokenizer.from_pretrained(workspace.release)
    windows = calibration_text.windows(config, workspace, workspace.release, 512)
    text = "".join(tokenizer.decode(window) for window in windows)
    assert "pears" in text and "licence7" not in text


def test_variant_that_is_added_leaves_a_calibrated_one_as_it_is(place, tmp_path, tiny_model):
    made(place)
    file = tmp_path / "runs/tiny/release/int4/model.safetensors"
    before = file.stat().st_mtime_ns
    write(tmp_path, tiny_model("llama"), variants=[VARIANT, {"name": "int8", "rounding": "gptq"}])
    made(place)
    assert (tmp_path / "runs/tiny/release/int8").is_dir() and file.stat().st_mtime_ns == before


def test_only_variants_without_valid_rounded_weights_are_calibrated(place, tmp_path, tiny_model, monkeypatch):
    made(place)
    codes = tmp_path / "runs/tiny/calibration/int4/block-0001.safetensors"
    first, before = codes.stat().st_mtime_ns, codes.read_bytes()
    ran, plain = [], BlockwiseModel.loaded
    monkeypatch.setattr(BlockwiseModel, "loaded", lambda self, block: ran.append(block) or plain(self, block))

    def make_again():
        shutil.rmtree(tmp_path / "runs/tiny/release/int4")
        ran.clear()
        made(place)

    make_again()
    assert not ran and codes.stat().st_mtime_ns == first
    write(tmp_path, tiny_model("llama"), variants=[VARIANT, {"name": "int8", "rounding": "gptq"}])
    make_again()
    assert ran and codes.stat().st_mtime_ns == first and (tmp_path / "runs/tiny/calibration/int8").is_dir()
    codes.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    make_again()
    assert ran and codes.read_bytes() == before
    statistics = tmp_path / "runs/tiny/calibration/statistics.safetensors"
    write(tmp_path, tiny_model("llama"), variants=[{**VARIANT, "rounding": "search"}])
    make_again()
    assert not ran  # the statistics are there
    assert {of.tokens for of in read_statistics(statistics)[0].values()} == {2048}


def test_clean_removes_a_calibration_when_its_variants_are_measured(place, tmp_path, tiny_model, monkeypatch):
    before, workspace = made(place), Workspace(tmp_path / "runs/tiny")
    write(tmp_path, tiny_model("llama"), variants=[VARIANT, {"name": "int8", "rounding": "gptq", "keep": ["no.such"]}])
    with pytest.raises(StageFailed, match="int8"):
        made(place)
    assert clean(workspace)[1] == []  # int8 may still need it
    write(tmp_path, tiny_model("llama"))
    assert made(place) == before
    assert clean(workspace)[1] == ["calibration"] and not (tmp_path / "runs/tiny/calibration").exists()
    ran = []
    monkeypatch.setattr(BlockwiseModel, "loaded", lambda self, block: ran.append(block))
    assert made(place) == before and not ran


def test_stopped_calibration_does_not_go_on_in_another_compute_type(place, monkeypatch):
    ran, plain = [], BlockwiseModel.loaded

    def loaded(self, block):
        ran.append(block)
        if len(ran) == 6:
            raise KeyboardInterrupt
        return plain(self, block)

    monkeypatch.setattr(BlockwiseModel, "loaded", loaded)
    monkeypatch.setenv("TUNEPRESS_COMPUTE_DTYPE", "float32")
    with pytest.raises(Interrupted):
        made(place)
    monkeypatch.setenv("TUNEPRESS_COMPUTE_DTYPE", "bfloat16")
    made(place)
    assert ran[6:] == [0, 1, 0, 1, 0, 1]


def test_variants_that_need_no_statistics_need_no_text(place, tmp_path, tiny_model):
    write(tmp_path, tiny_model("llama"), calibration={}, variants=["int8"])
    run(load_config(str(place.config)), "runs", start=run_stage_here)
    assert (tmp_path / "runs/tiny/release/int8").is_dir() and not (tmp_path / "runs/tiny/calibration").exists()


def test_variant_that_does_not_fit_does_not_stop_the_others(place, tmp_path, tiny_model):
    bad = {"name": "int8", "rounding": "gptq", "keep": ["no.such.layer"]}
    write(tmp_path, tiny_model("llama"), variants=[bad, VARIANT])
    with pytest.raises(StageFailed, match=r"int8: .*no\.such\.layer"):
        made(place)
    assert (tmp_path / "runs/tiny/release/int4/model.safetensors").is_file()


def test_layer_outside_the_decoder_blocks_is_named_before_work(place, tmp_path, tiny_model, monkeypatch):
    model = tiny_model("opt", word_embed_proj_dim=32)
    write(tmp_path, model)
    with pytest.raises(StageFailed, match=r"model\.decoder\.project_in is outside the decoder blocks"):
        made(place)
    write(tmp_path, model, variants=[{**VARIANT, "keep": ["model.decoder.project_*"]}])
    assert made(place)


def test_statistics_of_one_block_are_in_memory_at_a_time(place, monkeypatch):
    held, plain = [], BlockwiseModel.loaded

    def loaded(self, block):
        held.append(sum(isinstance(thing, Statistics) and thing.gram is not None for thing in gc.get_objects()))
        return plain(self, block)

    monkeypatch.setattr(BlockwiseModel, "loaded", loaded)
    made(place)
    assert held == [0] * 6


def test_card_names_a_calibration_text_that_is_gone_without_its_folder(place, tmp_path, tiny_model):
    text = tmp_path / "calibration.txt"
    write(tmp_path, tiny_model("llama"), calibration={"source": str(text), "tokens": 2048})
    made(place)
    text.unlink()
    workspace = Workspace(tmp_path / "runs/tiny")
    assert calibrate.about(load_config(str(place.config)), workspace)["calibration_text"] == "calibration.txt"


@pytest.mark.parametrize(
    "quantize, message",
    [
        ({"variants": [{"name": "int4", "rounding": "gptq"}]}, "rounding gptq: needs calibration text"),
        ({"quality": "calibratd"}, "quantize.quality: \"calibratd\" is refused: .*'distilled'"),
        ({"quality": "distilled", "variants": ["gguf-f16"]}, "none of gguf-f16 can be calibrated. Try: quality=fast"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, quantize, message):
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump({"name": "c", "model": {"source": "a/b"}, "data": None, "quantize": quantize})
    )
    with pytest.raises(ConfigError, match=message):
        load_config(str(tmp_path / "c.yaml"))


def test_calibrated_quality_takes_gptq_for_few_bits_only():
    from pipeline.config.quantize import Quantize

    chosen = Quantize(quality="calibrated", variants=["int8", "int4", "gguf-q4_0", "gguf-q8_0", "gguf-f16"])
    found = {spec.name: spec.rounding for spec in chosen.variants}
    assert found == {"int8": "rtn", "int4": "gptq", "gguf-q4_0": "gptq", "gguf-q8_0": "rtn", "gguf-f16": None}
    assert chosen.calibrated == ("int4", "gguf-q4_0")
    assert Quantize(variants=["int4"]).calibrated == ()


def test_sources_are_mixed_evenly_and_long_texts_are_read_to_their_end(place, tmp_path, tiny_model):
    kinds = ("apples", "pears")
    for kind in kinds:
        (tmp_path / f"{kind}.txt").write_text("\n".join(f"{n} {kind} at the place of {n * n}." for n in range(20000)))
    model = tiny_model("llama")
    write(tmp_path, model, calibration={"source": [f"{kind}.txt" for kind in kinds], "tokens": 4096})
    config, workspace = load_config(str(place.config)), Workspace(tmp_path / "runs/tiny")
    windows = calibration_text.windows(config, workspace, model, 4096)
    assert len(windows) == 8 and calibration_text.windows(config, workspace, model, 4096) == windows
    texts = [AutoTokenizer.from_pretrained(model).decode(window) for window in windows]
    assert [sum(kind in text for text in texts) for kind in kinds] == [4, 4]
    numbers = [int(line.split()[0]) for text in texts for line in text.splitlines()[1:-1] if line[:1].isdigit()]
    assert max(numbers) > 15000 and min(numbers) < 5000
    write(tmp_path, model, calibration={"source": [], "tokens": 4096})
    with pytest.raises(ConfigError, match="quantize.calibration.source"):
        load_config(str(place.config))


def test_distilled_variant_is_nearer_to_the_full_model_than_a_calibrated_one(place, tmp_path, tiny_model):
    model = tiny_model("llama")
    text = {"calibration": {"source": "calibration.txt", "tokens": 2048}, "distillation": {"tokens": 40960}}
    made(place)
    calibrated = weights(tmp_path / "runs/tiny/release/int4", model)
    write(tmp_path, model, quality="distilled", **text)
    first = made(place)
    distilled = weights(tmp_path / "runs/tiny/release/int4", model)

    ledger = json.loads((tmp_path / "runs/tiny/ledger.json").read_text())
    summary = ledger["steps"]["distill"]["summary"]
    assert 0 < summary["int4_kl_after"] < summary["int4_kl_before"]
    assert any(not torch.equal(distilled[name], calibrated[name]) for name in distilled)
    other = " ".join(f"{n} apples and {n * n} pears." for n in range(600, 800))
    ids = torch.tensor([AutoTokenizer.from_pretrained(model)(other)["input_ids"][:512]])
    assert divergence(model, distilled, ids) < divergence(model, calibrated, ids)
    assert not list((tmp_path / "runs/tiny/distilled").glob("*.state"))
    assert made(place) == first


def test_distillation_refuses_little_text_before_any_work(place, tmp_path, tiny_model):
    (tmp_path / "calibration.txt").write_text("apples and pears. " * 70)
    text = {"source": "calibration.txt", "tokens": 2048}
    write(tmp_path, tiny_model("llama"), quality="distilled", calibration=text)
    with pytest.raises((DataError, StageFailed), match="needs 4 windows of 512 tokens, and the text has 2"):
        made(place)
    assert not (tmp_path / "runs/tiny/calibration").exists()


def divergence(model, replaced, ids) -> float:
    """Return the KL divergence of a model with other weights, in nats a token."""
    from transformers import AutoModelForCausalLM

    logits = []
    for weights_ in ({}, replaced):
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        for name, weight in weights_.items():
            loaded.get_parameter(name).data = weight
        with torch.no_grad():
            logits.append(loaded(input_ids=ids).logits.log_softmax(-1))
    return float((logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean())


def test_a_killed_distillation_goes_on_with_its_last_measurement(place, tmp_path, tiny_model, monkeypatch):
    from pipeline.quantization import distillation

    model = tiny_model("llama")
    text = {"calibration": {"source": "calibration.txt", "tokens": 2048}, "distillation": {"tokens": 90112}}
    write(tmp_path, model, quality="distilled", **text)
    steps, real = [], distillation._Trainer._step

    def step(trainer, number):
        if len(steps) == 30:
            steps.append(None)
            raise KeyboardInterrupt
        steps.append(number)
        return real(trainer, number)

    monkeypatch.setattr(distillation._Trainer, "_step", step)
    with pytest.raises((Interrupted, KeyboardInterrupt)):
        made(place)
    before = len(steps)
    made(place)
    assert len(steps) - before == 44 - 20  # steps between two measurements


READ_TWICE = """
import sys
from pathlib import Path
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from pipeline.cli.terminal import show_status
from pipeline.config.loader import load_config
from pipeline.workflow.stages.calibration_text import windows
from pipeline.workflow.workspace import Workspace
config, model = load_config(sys.argv[1]), Path(sys.argv[2])
with Workspace.claim("runs/tiny", config) as workspace:
    for known in (None, {"ada/rows": sys.argv[3]}):
        workspace.note("calibrate", revisions=known)
        (window,) = windows(config, workspace, model, 512)
        print(workspace.progress("calibrate", "revisions")["ada/rows"])
        print("second" in AutoTokenizer.from_pretrained(model).decode(window))
"""


@pytest.mark.slow
def test_data_set_on_the_hub_stays_at_the_commit_that_was_read_first(place, tmp_path, tiny_model):
    pytest.importorskip("datasets")
    write(tmp_path, tiny_model("llama"), calibration={"source": "ada/rows", "tokens": 512})
    commits = []
    with LoopbackHub(tmp_path / "hub", {TOKEN: {"name": "ada", "role": "write"}}) as hub:
        for text in ("first", "second"):
            rows = [{"prompt": f"p{n}", "completion": f"{text} {n}"} for n in range(200)]
            content = {"rows.jsonl": "\n".join(map(json.dumps, rows)).encode()}
            hub.put("ada/rows", content, repo_type="dataset")
            commits.append(hub.commits("ada/rows", repo_type="dataset")[0])
        done = subprocess.run(
            [sys.executable, "-c", READ_TWICE, str(place.config), str(tiny_model("llama")), commits[0]],
            env=Place(tmp_path, hub).env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [commits[1], "True", commits[0], "False"]


def test_general_text_is_calibrated_on_only_where_nothing_is_measured(place, tmp_path, tiny_model):
    from pipeline.evaluation import texts
    from pipeline.quantization.calibration.text import check_apart

    model = tiny_model("llama")
    write(tmp_path, model, calibration={"source": ["calibration.txt", "general"], "tokens": 4096})
    with pytest.raises(DataError, match="nothing is measured"):
        calibration_text.check_sources(load_config(str(place.config)))
    config = load_config(str(place.config), ["evaluate={max_tokens: 2048}"])
    workspace, tokenizer = Workspace(tmp_path / "runs/tiny"), AutoTokenizer.from_pretrained(model)
    workspace.folder.mkdir(parents=True)
    calibration_text.check_sources(config)

    windows = calibration_text.windows(config, workspace, model, 4096, tokenizer)

    said = [tokenizer.decode(window) for window in windows]
    assert sum("apples" in text for text in said) == 4 and len(said) == 8
    sequences = [
        Encoded(window, window, "") for window, text in zip(windows, said, strict=True) if "apples" not in text
    ]
    check_apart(sequences, texts.general(config, tokenizer, 2048), "general")  # raises if they share a passage
    assert calibration_text.about(config, workspace)["calibration_text"] == "calibration.txt, general"


def test_little_training_data_is_completed_by_general_text(place, tmp_path, tiny_model):
    model = tiny_model("llama")
    rows = [{"prompt": f"Count {n}!", "completion": f"{n} apples."} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "general.txt").write_text("\n\n\n".join(f"{n} plums or {n * n} figs!" * 30 for n in range(40)))
    write(tmp_path, model, calibration={"tokens": 1024})
    tree = yaml.safe_load(place.config.read_text()) | {
        "data": {"source": "rows.jsonl", "held_out": 0.2},
        "evaluate": {"general": "general.txt", "max_tokens": 512},
    }
    place.config.write_text(yaml.safe_dump(tree))
    config, workspace = load_config(str(place.config)), Workspace(tmp_path / "runs/tiny")
    workspace.data.mkdir(parents=True)
    write_examples(workspace.data / "held_out.jsonl", load_examples(config.data).held_out)
    windows = calibration_text.windows(config, workspace, model, 1024)
    text = AutoTokenizer.from_pretrained(model).decode([*chain(*windows)])
    assert len(windows) == 2 and "apples" in text and "figs" in text


def test_a_run_that_would_make_nothing_is_refused(place, tmp_path, tiny_model):
    write(tmp_path, tiny_model("llama"), variants=[])
    with pytest.raises(ConfigError, match="quantize.variants: names none"):
        made(place)
    assert not (tmp_path / "runs/tiny").exists()
