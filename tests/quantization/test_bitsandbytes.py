"""Variants of bitsandbytes are the files that transformers makes with it, and load wherever those load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from pipeline.config.catalog import VARIANTS
from pipeline.config.schema import VariantSpec
from pipeline.errors import CheckpointError, ModelError, QuantizationError
from pipeline.inference.load import load
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.matrices import linear_weights
from pipeline.quantization.formats import storage, stored_bytes
from pipeline.quantization.writer import quantize_checkpoint, unfit
from pipeline.system.files import sha256
from pipeline.system.process_environment import with_own_package

NAMES = [name for name, variant in VARIANTS.items() if variant.format == "bitsandbytes"]
BNB = storage("bitsandbytes")
# With biases and an output head of its own, and with a head that shares the embedding.
MODELS = {
    "llama": {"hidden_size": 128, "intermediate_size": 320},
    "qwen2": {"hidden_size": 64, "intermediate_size": 192, "tie_word_embeddings": True},
}
IDS = [7, 200, 31, 64, 5, 5, 90, 12, 250, 33, 2, 149]
# Opens the files of a pass, in whose threads bitsandbytes must not be imported, and stops before the first row.
FIRST_ROW = """
import sys
from pathlib import Path
from pipeline.config.schema import VariantSpec
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.matrices import linear_weights
from pipeline.quantization.writer import Variants

source, out = map(Path, sys.argv[1:])
spec = VariantSpec(name="bnb-int8").resolved()
assert "bitsandbytes" not in sys.modules
with Variants([spec], {spec.name: out}, linear_weights(source)).writing(Checkpoint(source), source):
    print("bitsandbytes.backends.cpu.ops" in sys.modules, flush=True)
    raise KeyboardInterrupt
"""
# Loads a folder as a user of transformers would, without this project.
STOCK_LOADER = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

ids = torch.tensor([json.loads(sys.argv[1])])
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and "pipeline" not in sys.modules, info
    with torch.no_grad():
        save_file({"logits": model(ids).logits}, folder + "/logits")
"""


@pytest.fixture(scope="module", params=MODELS)
def source(request, tiny_model) -> Path:
    return tiny_model(request.param, **MODELS[request.param])


@pytest.fixture(scope="module")
def pairs(source, quantized, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Folders by variant: ours, and that of a model which transformers has quantized; each with its logits."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    settings = {
        "bnb-int8": {"load_in_8bit": True},
        "bnb-nf4": {**four, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "bnb-fp4": {**four, "bnb_4bit_quant_type": "fp4"},
    }
    made = {}
    for name in NAMES:
        config = BitsAndBytesConfig(**settings[name])
        theirs = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(theirs)
        made[name] = (quantized(source, name, shard_bytes=60_000) / name, theirs)
    folders = [str(folder) for pair in made.values() for folder in pair]
    command = [sys.executable, "-c", STOCK_LOADER, json.dumps(IDS), *folders]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return made


def make(source: Path, folder: Path) -> None:
    specs = [VariantSpec(name=name).resolved() for name in NAMES]
    quantize_checkpoint(source, specs, {name: folder / name for name in NAMES}, linear_weights(source))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def logits(folder: Path) -> torch.Tensor:
    return load_file(folder / "logits")["logits"]


@pytest.mark.parametrize("name", NAMES)
def test_files_hold_what_transformers_saves(pairs, name):
    ours, theirs = map(tensors, pairs[name])
    assert len(list(pairs[name][0].glob("*.safetensors"))) > 1 and ours.keys() == theirs.keys()
    for part, expected in theirs.items():
        found = ours[part]
        if part.endswith("bitsandbytes__nf4"):  # spaces at the end make its length known before the pass
            found = found[: len(expected)]
            assert not ours[part][len(expected) :].ne(ord(" ")).any()
        assert found.dtype == expected.dtype and torch.equal(found, expected), part
    with safe_open(next(pairs[name][0].glob("*.safetensors")), "pt") as file:
        assert file.metadata() == {"format": "pt"}
    ours, theirs = (json.loads((folder / "config.json").read_text())["quantization_config"] for folder in pairs[name])
    assert ours == theirs


@pytest.mark.parametrize("name", NAMES)
def test_stock_loader_gives_the_logits_of_a_model_that_transformers_quantized(pairs, name):
    ours, theirs = map(logits, pairs[name])
    assert torch.equal(ours, theirs) and ours.isfinite().all()


def test_other_instructions_and_threads_write_the_same_bytes(source, tmp_path):
    imports = "import sys; from pathlib import Path; from tests.quantization.test_bitsandbytes import make"
    command = [sys.executable, "-c", f"{imports}; make(*map(Path, sys.argv[1:]))", str(source), str(tmp_path / "there")]
    plain = with_own_package(os.environ) | {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "2"}
    subprocess.run(command, check=True, env=plain, capture_output=True)
    make(source, tmp_path / "here")
    for name in NAMES:
        ours, theirs = (sha256(tmp_path / place / name / "model.safetensors") for place in ("here", "there"))
        assert ours == theirs, name


@pytest.mark.usefixtures("cold")
def test_bitsandbytes_is_whole_before_threads_round_rows(source, tmp_path):
    command = [sys.executable, "-c", FIRST_ROW, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, env=with_own_package(os.environ), capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_pipeline_load_computes_with_the_layers_of_bitsandbytes(pairs, name):
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    model, _ = load(pairs[name][0], device="cpu")
    layers = [layer for layer in model.modules() if isinstance(layer, (Linear4bit, Linear8bitLt))]
    assert len(layers) == 14
    with torch.no_grad():
        found = model(torch.tensor([IDS])).logits
        text = model.generate(torch.tensor([IDS]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert (found - logits(pairs[name][0])).norm() < 0.05 * found.norm() and text.shape == (1, len(IDS) + 4)
    states = [state for layer in layers if (state := getattr(layer.weight, "quant_state", None))]
    assert not any(getattr(state, "packing_format_for_cpu", False) for state in states)


@pytest.mark.parametrize("name", NAMES)
def test_stored_weight_is_read_as_bitsandbytes_dequantizes_it(pairs, source, name):
    from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant

    checkpoint = Checkpoint(pairs[name][0])
    linear = linear_weights(source)
    assert set(BNB.weights(checkpoint)) == linear.keys()
    stored = tensors(pairs[name][1])
    for weight, shape in linear.items():
        found = BNB.read(checkpoint, weight, shape)
        if name == "bnb-int8":
            expected = int8_vectorwise_dequant(stored[weight], stored[f"{weight.removesuffix('.weight')}.SCB"])
        else:
            state = {part.removeprefix(f"{weight}."): t for part, t in stored.items() if part.startswith(f"{weight}.")}
            expected = dequantize_4bit(stored[weight], QuantState.from_dict(state, torch.device("cpu")))
        assert torch.equal(found.dequantize(expected.dtype), expected)
        assert torch.equal(found.rows(3, 9).dequantize(expected.dtype), expected[3:9])
    with pytest.raises(CheckpointError, match="stored parts"):
        BNB.read(checkpoint, weight, (shape[0], 2 * shape[1]))


def test_model_that_is_larger_than_the_memory_computes_with_the_same_numbers(pairs):
    folder = pairs["bnb-nf4"][0]
    whole, _ = load(folder, device="cpu")
    offloaded, _ = load(folder, device="cpu", offload=True)
    with torch.no_grad():
        expected, found = (model(torch.tensor([IDS])).logits for model in (whole, offloaded))
    assert (found - expected).norm() < 0.02 * expected.norm()
    with pytest.raises(ModelError, match="round their inputs"):
        load(pairs["bnb-int8"][0], device="cpu", offload=True)


@pytest.mark.parametrize("name", NAMES)
def test_planned_bytes_are_those_of_the_files(pairs, source, name):
    spec, checkpoint = VariantSpec(name=name).resolved(), Checkpoint(source)
    shapes = {weight: (info.shape, info.dtype.itemsize) for weight, info in checkpoint.items()}
    written = sum(info.nbytes for info in Checkpoint(pairs[name][0]).values())
    assert stored_bytes(spec, shapes, linear_weights(source), ()) == written


@pytest.mark.parametrize("name", NAMES)
def test_kept_layer_stays_as_it_is(source, name, quantized):
    kept = "model.layers.0.mlp.down_proj"
    folder = quantized(source, name, keep=[kept]) / name
    assert tensors(folder)[f"{kept}.weight"].dtype == torch.bfloat16
    model, _ = load(folder, device="cpu")
    assert model.get_submodule(kept).weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert model(torch.tensor([IDS])).logits.isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_four_bits_are_rounded_from_bfloat16(tiny_model, quantized, dtype):
    source = tiny_model("llama", dtype=dtype, **MODELS["llama"])
    found = tensors(quantized(source, "bnb-nf4") / "bnb-nf4")
    weight = "model.layers.0.mlp.up_proj.weight"
    rounded = BNB.quantize(Checkpoint(source).read(weight).bfloat16(), BNB.grid(VariantSpec(name="bnb-nf4"), 128))
    assert torch.equal(found[weight].flatten(), rounded.codes.flatten())


def test_width_without_whole_blocks_is_refused_by_name(tiny_model):
    source = tiny_model("llama")  # 160 columns
    for name in NAMES:
        reason = unfit(VariantSpec(name=name).resolved(), linear_weights(source), source)
        if name == "bnb-int8":
            assert reason is None
        else:
            assert "q_proj" in reason and "64 do not divide a width of 160" in reason and "Try: " in reason


def test_weight_too_large_for_float16_is_refused(tiny_model, tmp_path):
    source = tiny_model("llama", **MODELS["llama"])
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e6
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(QuantizationError, match="too large for float16"):
        quantize_checkpoint(
            tmp_path,
            [VariantSpec(name="bnb-int8").resolved()],
            {"bnb-int8": tmp_path / "out"},
            linear_weights(tmp_path),
        )
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embeddings": "int8"}, "load no quantized embeddings"),
        ({"rounding": "rtn"}, "rounds by itself"),
        ({"group_size": 64}, "has no groups"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_options_that_bitsandbytes_does_not_have_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        VariantSpec(name=name, **options)


@pytest.mark.slow
def test_run_plans_measures_describes_and_verifies_every_variant(tiny_model, tmp_path):
    from tests.extension.runs import quantizing

    place = quantizing(tmp_path, tiny_model("llama", **MODELS["llama"]), NAMES)
    plan = json.loads(place.tunepress("plan", "tiny.yaml", "--json").stdout)
    place.tunepress("run", "tiny.yaml")
    (stage,) = (stage for stage in plan["stages"] if stage["stage"] == "quantize")
    for name in NAMES:
        folder, found = place.release / name, place.results()[name]
        written = (folder / "model.safetensors").stat().st_size
        assert 0.98 * written < stage["writes"][name] < 1.02 * written + 20_000
        assert found["speed"]["pipeline.load"]["runs"] and found["speed"]["stock"]["runs"]
        assert "bitsandbytes makes and runs them" in (folder / "README.md").read_text()
    lines = place.tunepress("verify", str(place.release)).stdout.splitlines()
    assert sum(line.split()[:2] == ["+", "measured"] for line in lines) == len(NAMES)


@pytest.mark.parametrize("change", ["fewer scales", "smaller blocks"])
def test_parts_that_bitsandbytes_would_read_beyond_are_refused_before_it_loads_them(
    tiny_model, quantized, tmp_path, change
):
    kept = quantized(tiny_model("llama", **MODELS["llama"]), "bnb-fp4") / "bnb-fp4"
    shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
    tensors, name = load_file(kept / "model.safetensors"), "model.layers.0.mlp.up_proj.weight"
    if change == "fewer scales":
        tensors[f"{name}.absmax"] = tensors[f"{name}.absmax"][:4].clone()
    else:
        state = f"{name}.quant_state.bitsandbytes__fp4"
        text = bytes(tensors[state].tolist()).replace(b'"blocksize": 64', b'"blocksize": 16')
        tensors[state] = torch.tensor(list(text), dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"{name}: its stored parts are not those of a layer of 320 x 128"):
        load(tmp_path, device="cpu")
