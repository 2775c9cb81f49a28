"""K-quants: the output of llama.cpp's own quantizer, or no file."""

import importlib.util
import shutil
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from pipeline.config.catalog import VARIANTS
from pipeline.config.schema import VariantSpec
from pipeline.errors import MissingExtra, QuantizationError
from pipeline.models.checkpoint import SINGLE_NAME
from pipeline.models.matrices import linear_weights
from pipeline.quantization.formats.gguf import k_quants as kquants
from pipeline.quantization.layers import unfit
from pipeline.quantization.writer import Variants
from tests.support.gguf_files import IDS, MODELS, expected_logits
from tests.support.models import relative_error

pytest.importorskip("llama_cpp")
KQUANTS = [name for name, variant in VARIANTS.items() if variant.quantizer]
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
FOR = {"gguf-q4_k_m": "Q4_K", "gguf-q5_k_m": "Q5_K", "gguf-q6_k": "Q6_K"}


def quantize(source, folder, *names, **options):
    specs = [VariantSpec(name=name).resolved() for name in names]
    return Variants(specs, dict.fromkeys(names, folder), linear_weights(source), name="tiny", **options)


@pytest.mark.parametrize("variant", KQUANTS)
def test_every_type_is_made_in_one_pass_and_nothing_else_is_left(tiny_model, tmp_path, variant):
    told = []
    made = quantize(tiny_model("llama", **WIDE), tmp_path, *KQUANTS, tell=lambda *about: told.append(about))
    files = made.make_of(tiny_model("llama", **WIDE))
    assert {path.name for path in tmp_path.iterdir()} == {"tiny-Q4_K_M.gguf", "tiny-Q5_K_M.gguf", "tiny-Q6_K.gguf"}
    found = files[variant]
    assert found.types[FOR[variant]] >= 8 and found.types["F32"] == 5 + 8  # norms, and biases of the attention
    assert 0.25 < found.weight_bytes / found.source_bytes < 0.45
    total = sum(found.types.values())
    assert (total, total, f"quantizing {variant} with llama.cpp") in told


@pytest.mark.parametrize("beside, dtype", [((), "bfloat16"), (["gguf-bf16"], "bfloat16"), (["gguf-bf16"], "float32")])
def test_all_of_a_pass_are_made_of_one_file(tiny_model, tmp_path, monkeypatch, beside, dtype):
    source, seen = tiny_model("llama", dtype, **WIDE), []
    make = kquants.quantize

    def look(path, *rest):
        seen.append((path.name, sorted(p.name for p in (tmp_path / "together").iterdir() if p.suffix == ".full")))
        make(path, *rest)

    monkeypatch.setattr(kquants, "quantize", look)
    quantize(source, tmp_path / "together", *KQUANTS, *beside).make_of(source)
    is_there = beside and dtype == "bfloat16"  # then the variant of sixteen bits is the model as it is
    full = ("tiny-BF16.gguf", []) if is_there else ("tiny.gguf.full", ["tiny.gguf.full"])
    assert seen == [full] * len(KQUANTS)
    monkeypatch.undo()
    for name in KQUANTS:
        quantize(source, tmp_path / "alone", name).make_of(source)
    files = sorted((tmp_path / "alone").iterdir())
    assert len(files) == len(KQUANTS)
    assert all(path.read_bytes() == (tmp_path / "together" / path.name).read_bytes() for path in files)
    assert len(list((tmp_path / "together").iterdir())) == len(KQUANTS) + len(beside)


@pytest.mark.parametrize("architecture", MODELS)
def test_k_quants_in_llama_cpp_compute_the_model(tiny_model, tmp_path, logits, architecture):
    source = tiny_model(architecture, **MODELS[architecture])
    quantize(source, tmp_path, "gguf-q6_k").make_of(source)
    assert relative_error(logits(tmp_path / "tiny-Q6_K.gguf", IDS), expected_logits(source)) < 0.06


def test_indivisible_rows_are_stored_in_another_type(tiny_model, tmp_path):
    source = tiny_model("llama")  # 160 and 192 columns
    types = quantize(source, tmp_path, "gguf-q4_k_m").make_of(source)["gguf-q4_k_m"].types
    assert "Q5_0" in types and "Q4_K" not in types


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_k_quants_are_made_of_unrounded_weights(tiny_model, tmp_path, dtype, monkeypatch):
    from gguf import GGUFReader

    source, kinds = tiny_model("llama", dtype, **WIDE), set()
    make = kquants.quantize

    def look(path, *rest):
        kinds.update(tensor.tensor_type.name for tensor in GGUFReader(path).tensors)
        make(path, *rest)

    monkeypatch.setattr(kquants, "quantize", look)
    quantize(source, tmp_path, "gguf-q4_k_m").make_of(source)
    assert kinds == {"F32", {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]}


def test_k_quants_share_header_and_license_with_other_gguf(tiny_model, tmp_path):
    from gguf import GGUFReader

    source = shutil.copytree(tiny_model("llama", **WIDE), tmp_path / "model")
    (source / "LICENSE").write_text("terms")
    quantize(source, tmp_path / "out", "gguf-q4_k_m", license="mit").make_of(source)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"LICENSE", "tiny-Q4_K_M.gguf"}
    fields = GGUFReader(tmp_path / "out" / "tiny-Q4_K_M.gguf").fields
    found = {key: fields[f"general.{key}"].contents() for key in ("name", "license", "file_type")}
    assert found == {"name": "tiny", "license": "mit", "file_type": 15}
    assert not any(str(tmp_path) in str(field.contents()) for key, field in fields.items() if "token" not in key)


def test_a_broken_model_leaves_no_file(tiny_model, tmp_path):
    source = shutil.copytree(tiny_model("llama", **WIDE), tmp_path / "model")
    tensors = load_file(source / SINGLE_NAME)
    tensors["model.embed_tokens.weight"][3, 4] = float("inf")
    save_file(tensors, source / SINGLE_NAME, {"format": "pt"})
    with pytest.raises(QuantizationError, match=r"embed_tokens\.weight: has values that are not finite"):
        quantize(source, tmp_path / "out", "gguf-q4_k_m").make_of(source)
    assert list((tmp_path / "out").iterdir()) == []


def test_quantizer_error_gives_one_line(tiny_model, written, tmp_path):
    path = written(tiny_model("llama"), "gguf-bf16")
    with pytest.raises(QuantizationError, match=r"llama\.cpp could not quantize to Q4_K_M: .*failed") as caught:
        kquants.quantize(path, tmp_path, "Q4_K_M", lambda *_: None)  # a folder, where it cannot write
    assert "\n" not in str(caught.value)


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """`pretend(lines)`: a program of these lines in the place of llama.cpp's quantizer."""

    def replace(lines):
        program = tmp_path / "program.py"
        program.write_text(lines)
        monkeypatch.setattr(kquants.quantizer, "__file__", str(program))

    return replace


def test_quantizer_process_ends_with_its_parent(pretend, tmp_path, monkeypatch):
    class Stop(BaseException):
        pass

    def stop(*about):
        raise Stop

    started = []
    start = subprocess.Popen

    def watch(*args, **options):
        started.append(start(*args, **options))
        return started[-1]

    monkeypatch.setattr(kquants.subprocess, "Popen", watch)
    pretend("import time; print('1 2', flush=True); time.sleep(600)")
    with pytest.raises(Stop):
        kquants.quantize(tmp_path / "in", tmp_path / "out", "Q4_K_M", stop)
    assert started[0].returncode == -signal.SIGKILL


def test_stopped_quantizer_leaves_nothing(tiny_model, tmp_path):
    def stop(*about):
        raise KeyboardInterrupt

    source = tiny_model("llama", **WIDE)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", "gguf-q4_k_m", tell=stop).make_of(source)
    assert list((tmp_path / "out").iterdir()) == []


def test_lines_that_are_no_progress_are_passed_over(pretend, tmp_path):
    (tmp_path / "out").write_bytes(b"")
    pretend("print('To enable this, rebuild'); print('1 2'); print('[1/2] 3'); print('2 2')")
    told = []
    kquants.quantize(tmp_path / "in", tmp_path / "out", "Q4_K_M", lambda *about: told.append(about))
    assert told == [(1, 2), (2, 2)]


def test_long_quantizer_output_does_not_block(pretend, tmp_path):
    pretend(
        "import os, sys; sys.stderr.write('a warning\\n' * 100_000); sys.stderr.flush()\n"
        "print('1 2', flush=True); sys.stderr.write('x.cpp:3: GGML_ASSERT(x) failed\\n[New LWP 7]\\n'); os._exit(1)"
    )
    with pytest.raises(QuantizationError, match=r"to Q4_K_M: x\.cpp:3: GGML_ASSERT\(x\) failed$"):
        kquants.quantize(tmp_path / "in", tmp_path / "out", "Q4_K_M", lambda *_: None)
    pretend("import os; os.abort()")
    with pytest.raises(QuantizationError, match=r"to Q4_K_M: it ended with -6$"):
        kquants.quantize(tmp_path / "in", tmp_path / "out", "Q4_K_M", lambda *_: None)


def test_missing_llama_cpp_names_the_extra_before_any_work(tiny_model, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else find(name))
    source, spec = tiny_model("llama", **WIDE), VariantSpec(name="gguf-q4_k_m").resolved()
    install = f"{sys.executable} -m pip install 'tunepress[llama-cpp]'"
    message = f"gguf-q4_k_m needs a package that is not installed; run: {install}"
    assert unfit(spec, linear_weights(source), source) == message
    for spec in (VariantSpec(name="gguf-q4_0"), VariantSpec(name="gguf-q6_k", rounding="search")):
        assert unfit(spec.resolved(), linear_weights(source), source) is None
    asked = quantize(source, tmp_path / "out", "gguf-q4_k_m")
    assert asked.make_of(source) == {} and isinstance(asked.failed["gguf-q4_k_m"], MissingExtra)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option", [{"rounding": "hqq"}, {"group_size": 32}, {"embeddings": "keep"}, {"keep": ["*"]}, {"packing": "plain"}]
)
def test_options_are_refused_by_name(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name}: gguf-q5_k_m is made by llama.cpp's own quantizer"):
        VariantSpec(name="gguf-q5_k_m", **option)
