"""Measuring GGUF in llama.cpp: figures of its numbers, and one line for unsupported files."""

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
import torch
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config.catalog import VARIANTS
from pipeline.config.schema import Config
from pipeline.errors import MissingExtra, ModelError
from pipeline.evaluation import metrics
from pipeline.evaluation.evaluate import _check_tokens, evaluate
from pipeline.evaluation.generation import stop_tokens
from pipeline.evaluation.load_probe import probe
from pipeline.inference import llama_cpp, output_head
from pipeline.inference.load import load_dequantized
from pipeline.system import hardware
from pipeline.workflow.stages.inputs import run_texts
from pipeline.workflow.workspace import Workspace
from tests.support.gguf_files import MODELS
from tests.support.models import random_text
from tests.support.texts import general_text

pytest.importorskip("llama_cpp")
IDS = [7, 200, 31, 64, 5, 5, 90, 12, 250, 33, 2, 149]
VOCABULARY = 272


@pytest.fixture(autouse=True)
def _one_core(monkeypatch):
    """llama.cpp's threads wait for one another by turning, and tests run beside tests."""
    monkeypatch.setattr(hardware, "cores", lambda: 1)


@pytest.fixture(scope="module")
def figures(written):
    """`figures(source, variant)`: perplexity in transformers and in llama.cpp, and how the latter differs."""

    def make(source, variant):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        reference, head = metrics.score(model, random_text()), output_head.head_of(model)
        with llama_cpp.opened(written(source, variant), 64) as reader:
            logits = metrics.counted_logits(reader, random_text())
            scores, compared = metrics.compare_logits(logits, random_text(), reference, head)
        return metrics.perplexity(reference), metrics.perplexity(scores), compared

    return make


@pytest.mark.parametrize("architecture", MODELS)
def test_sixteen_bits_have_the_perplexity_of_transformers_and_four_are_further_off(tiny_model, figures, architecture):
    source = tiny_model(architecture, **MODELS[architecture])
    theirs, ours, near = figures(source, "gguf-f16")
    assert ours.value == pytest.approx(theirs.value, rel=2e-3)
    assert ours.stderr == pytest.approx(theirs.stderr, rel=2e-2)
    assert 0 <= near.kl.value < 1e-3 and near.agreement.value > 0.97
    _, _, far = figures(source, "gguf-q4_0")
    assert far.kl.value > 10 * near.kl.value


def test_dequantized_weights_have_the_same_figures(tiny_model, written, figures):
    source = tiny_model("llama", "float32")
    _, found, compared = figures(source, "gguf-q4_0")
    model, _ = load_dequantized(written(source, "gguf-q4_0"), source)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    scores, reference = (metrics.score(m, random_text()) for m in (model, original))
    assert found.value == pytest.approx(metrics.perplexity(scores).value, rel=0.02)
    expected = metrics.divergence(scores, output_head.head_of(model), reference, output_head.head_of(original))
    assert compared.kl.value == pytest.approx(expected.kl.value, rel=0.1)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if VARIANTS[name].quantizer])
def test_k_quants_are_read_back_as_llama_cpp_has_them(tiny_model, written, figures, variant):
    source = tiny_model("llama", "float32", hidden_size=256, intermediate_size=512)
    _, found, _ = figures(source, variant)
    scores = metrics.score(load_dequantized(written(source, variant), source)[0], random_text())
    assert found.value == pytest.approx(metrics.perplexity(scores).value, rel=0.02)


def test_metrics_equal_those_of_transformers(tiny_model):
    a, b = (
        AutoModelForCausalLM.from_pretrained(tiny_model("llama", **changes), dtype=torch.float32).eval()
        for changes in ({}, {"initializer_range": 0.12})
    )
    reference, scores = metrics.score(a, random_text()), metrics.score(b, random_text())
    expected = metrics.divergence(scores, output_head.head_of(b), reference, output_head.head_of(a))

    def pieces():
        with torch.no_grad():
            for sequence in random_text():
                counted = torch.tensor(sequence.labels[1:]) != -100
                yield from b(torch.tensor([sequence.input_ids])).logits[0, :-1][counted].split(5)

    told = []
    found, compared = metrics.compare_logits(
        pieces(), random_text(), reference, output_head.head_of(a), on_progress=lambda *state: told.append(state)
    )
    assert torch.allclose(found.nll, scores.nll, atol=1e-4) and torch.equal(found.choice, scores.choice)
    assert torch.equal(found.cluster, scores.cluster) and told[-1] == (len(found.nll), len(found.nll))
    for ours, theirs in ((compared.kl, expected.kl), (compared.agreement, expected.agreement)):
        assert ours.value == pytest.approx(theirs.value, rel=1e-3)
        assert ours.stderr == pytest.approx(theirs.stderr, rel=1e-3)
    with pytest.raises(ModelError, match="not scored on the same tokens"):
        metrics.compare_logits(pieces(), random_text(seed=1), reference, output_head.head_of(a))


def test_a_tokenizer_that_llama_cpp_does_not_follow_is_told_in_one_line(tiny_model, written):
    source = tiny_model("llama")
    tokenizer = AutoTokenizer.from_pretrained(source)
    with llama_cpp.opened(written(source, "gguf-f16"), 64) as reader:
        _check_tokens(reader, tokenizer, ["a text", "One <|im_start|> TWO", ""])
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
        _check_tokens(reader, tokenizer, ["all lower"])
        with pytest.raises(ModelError, match=r"F16\.gguf: llama\.cpp cuts 'two' into other tokens") as caught:
            _check_tokens(reader, tokenizer, ["one <|im_start|> TWO"])
    assert "\n" not in str(caught.value)


def test_long_positions_compute_like_transformers(tiny_model, written):
    source = tiny_model("llama", max_position_embeddings=8)
    path = written(source, "gguf-f16")
    assert llama_cpp.positions(path) == 8
    with llama_cpp.opened(path, 64) as reader:
        found = torch.cat([torch.from_numpy(part) for part in all_logits(reader, [True] * len(IDS))])
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0]
    assert len(IDS) > 8 and (found - expected).norm() < 0.003 * expected.norm()


def all_logits(reader, wanted):
    reader.begin()
    return list(reader.read(IDS, wanted))


def test_held_logits_are_bounded(tiny_model, written):
    path, wanted = written(tiny_model("llama"), "gguf-f16"), [i % 4 != 3 for i in range(len(IDS))]
    with llama_cpp.opened(path, 64) as reader:
        (whole,) = all_logits(reader, wanted)
    with llama_cpp.opened(path, 64, logits=3 * VOCABULARY + 1) as reader:
        pieces = all_logits(reader, wanted)
    assert whole.shape == (9, VOCABULARY) and len(pieces) > 3
    assert all(piece.size <= 3 * VOCABULARY for piece in pieces)
    assert torch.allclose(*(torch.cat([torch.from_numpy(p) for p in part]) for part in ([whole], pieces)), atol=2e-2)
    with llama_cpp.opened(path, 64, logits=1) as reader:
        assert [piece.shape for piece in all_logits(reader, wanted)] == [(1, VOCABULARY)] * 9


def test_sequences_are_independent(tiny_model, written):
    wanted = [True] * len(IDS)
    with llama_cpp.opened(written(tiny_model("gemma3_text"), "gguf-f16"), 64) as reader:
        first, again = (all_logits(reader, wanted)[0] for _ in range(2))
        assert (first == again).all()
        reader.begin()
        assert not (next(reader.read(IDS[3:], wanted[3:])) == first[3:]).all()


def test_tokens_before_those_that_count_are_read_as_well(tiny_model, written):
    with llama_cpp.opened(written(tiny_model("llama"), "gguf-f16"), 64, logits=2 * VOCABULARY) as reader:
        last = all_logits(reader, [False] * (len(IDS) - 1) + [True])
        every = all_logits(reader, [True] * len(IDS))
    assert len(last) == 1 and torch.allclose(torch.from_numpy(last[0][-1]), torch.from_numpy(every[-1][-1]), atol=2e-2)


def test_answers_are_greedy_and_end_before_a_stop_token(tiny_model, written):
    with llama_cpp.opened(written(tiny_model("llama"), "gguf-f16"), 64) as reader:
        free = reader.answer(IDS, set(), 12)
        assert len(free) == 12 and free == reader.answer(IDS, set(), 12)
        stop = free[5]
        assert reader.answer(IDS, {stop}, 12) == free[: free.index(stop)]
        reader.begin()
        assert free[0] == reader.next_token(IDS)


def test_every_token_of_an_answer_is_the_likeliest_of_the_dequantized_weights(tiny_model, written):
    source = tiny_model("llama", "float32")
    with llama_cpp.opened(written(source, "gguf-q4_0"), 64) as reader:
        answer = reader.answer(IDS, set(), 12)
    model, _ = load_dequantized(written(source, "gguf-q4_0"), source)
    with torch.no_grad():
        logits = model(torch.tensor([IDS + answer])).logits[0, len(IDS) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert (logits.max(-1).values - chosen).max() < 0.1 * logits.std()


def test_llama_cpp_stops_at_the_same_token(tiny_model, model_copy):
    assert stop_tokens(tiny_model("gemma3_text")) == {259}
    (model_copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 256]}))
    assert stop_tokens(model_copy) == {256, 258}
    (model_copy / "generation_config.json").unlink()
    assert stop_tokens(model_copy) == {258}


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999], ids=str)
def test_truncated_file_gives_the_error_of_llama_cpp(tiny_model, written, tmp_path, keep):
    data, path = written(tiny_model("llama"), "gguf-q4_0").read_bytes(), tmp_path / "cut.gguf"
    llama_cpp.check(written(tiny_model("llama"), "gguf-q4_0"))
    path.write_bytes(data[: int(len(data) * keep)])
    for attempt in (lambda: llama_cpp.check(path), lambda: llama_cpp.opened(path, 64).__enter__()):
        with pytest.raises(ModelError, match=r"cut\.gguf: llama\.cpp cannot load it: .*(failed to read|bounds)"):
            attempt()


def test_a_tensor_that_is_not_there_is_named_without_reading_the_others(tiny_model, written, tmp_path):
    data = written(tiny_model("llama"), "gguf-q4_0").read_bytes()
    (tmp_path / "odd.gguf").write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(ModelError, match=r"tensor 'blk\.1\.ffn_up\.weight' not found"):
        llama_cpp.check(tmp_path / "odd.gguf")


@pytest.mark.usefixtures("cold")
def test_llama_cpp_says_nothing_on_the_terminal(tiny_model, written, tmp_path):
    path = written(tiny_model("llama"), "gguf-q4_0")
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:5000])
    code = (
        "import sys; from pathlib import Path\n"
        "from pipeline.errors import ModelError; from pipeline.inference import llama_cpp\n"
        "with llama_cpp.opened(Path(sys.argv[1]), 64) as reader: reader.answer([7, 5], set(), 3)\n"
        "try: llama_cpp.check(Path(sys.argv[2]))\n"
        "except ModelError: print('refused', 'torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "cut.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, env=None)
    assert (done.returncode, done.stdout, done.stderr) == (0, "refused False\n", "")


@pytest.mark.usefixtures("cold")
def test_speed_and_memory_are_those_of_a_fresh_process(tiny_model, written):
    found = probe(written(tiny_model("llama", max_position_embeddings=48), "gguf-q8_0"), "llama.cpp")
    speed = found.figures
    assert speed.runs and found.logits is None
    assert speed.loader == "llama.cpp" and speed.device == "cpu"
    assert (speed.prompt_tokens, speed.new_tokens) == (24, 24)
    for key in ("load_seconds", "prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory_bytes"):
        assert getattr(speed, key) > 0
    assert speed.peak_memory_bytes < 200_000_000  # torch alone takes more


@pytest.fixture(scope="module")
def measured(tmp_path_factory, tiny_model, written):
    """A model and what its q4_0 is measured as, in llama.cpp and where that is not installed."""
    folder, source = tmp_path_factory.mktemp("measured"), tiny_model("llama")
    (folder / "general.txt").write_text(general_text())
    evaluated = {"general": str(folder / "general.txt"), "max_tokens": 512, "prompts": ["Hello?"]}
    tree = {"name": "m", "model": {"source": str(source)}, "data": None, "evaluate": evaluated}
    config, file = Config.model_validate(tree), written(source, "gguf-q4_0")
    with pytest.MonkeyPatch.context() as patch, Workspace.claim(folder / "run", config) as workspace:
        patch.setattr(hardware, "cores", lambda: 1)
        found = {}
        kept = run_texts(workspace)
        evaluate("base", source, config, kept, print)
        with pytest.raises(ModelError, match="into other tokens"):
            evaluate("gguf-q4_0", file.parent, config, kept, print, in_lower_case(source, folder / "lower"))
        for is_installed in (True, False):
            patch.setattr(llama_cpp, "is_installed", lambda there=is_installed: there)
            result = evaluate("gguf-q4_0", file.parent, config, kept, print, source)
            found[result.loader] = result
    return file, found


def in_lower_case(source, folder):
    """The model with a tokenizer that brings text into lower case first."""
    about = json.loads((shutil.copytree(source, folder) / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(about | {"normalizer": {"type": "Lowercase"}}))
    return folder


def test_a_variant_is_measured_in_llama_cpp_where_it_is_installed_and_else_dequantized(measured):
    file, found = measured
    assert list(found) == ["llama.cpp", "dequantized"]
    for result in found.values():
        assert result.file == file.name and result.size_bytes == file.stat().st_size
        assert result.device == "cpu" and result.machine and "parameters" not in result.to_json()
        assert set(result.on("general").to_json()) == {
            "text",
            "tokens",
            "sequences",
            "digest",
            "loss",
            "perplexity",
            "rise",
            "kl",
            "agreement",
        }
    ours, plain = (result.on("general") for result in found.values())
    assert (ours.tokens, ours.sequences) == (plain.tokens, plain.sequences)
    assert ours.perplexity.value == pytest.approx(plain.perplexity.value, rel=0.02)
    assert ours.kl.value == pytest.approx(plain.kl.value, rel=0.2)
    assert found["llama.cpp"].speed["llama.cpp"].runs and found["dequantized"].speed == {}
    assert [a.prompt for r in found.values() for a in r.answers] == ["Hello?"] * 2


def test_missing_llama_cpp_names_the_extra(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else find(name))
    with pytest.raises(MissingExtra, match=r"pip install 'tunepress\[llama-cpp\]'"):
        llama_cpp.check(tmp_path / "any.gguf")
