"""compressed-tensors: folders that its own functions and stock transformers read as the codes that were chosen."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.catalog import VARIANTS, Need
from pipeline.config.quantize import Quantize
from pipeline.config.schema import VariantSpec
from pipeline.errors import CheckpointError, ModelError
from pipeline.inference.load import load
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.matrices import linear_weights
from pipeline.quantization.calibration.blocks import BlockwiseModel
from pipeline.quantization.calibration.collect import collect
from pipeline.quantization.equivalences.folding import FoldedPowers
from pipeline.quantization.formats import format_of, stored_bytes, stored_weights
from pipeline.quantization.formats.compressed_tensors import packed
from pipeline.quantization.statistics import Statistics
from pipeline.quantization.writer import Variants

EXTRA = ("compressed_tensors", "compressed-tensors")
NAMES = [name for name in VARIANTS if EXTRA in VariantSpec(name=name).requires]
STATIC = [name for name in NAMES if VARIANTS[name].static_inputs]
IDS = torch.tensor([[7, 200, 31, 64, 5, 5, 90, 12, 250, 33, 2, 149]])
KEPT = ("model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj")

# Loads each folder as a reader of the model card would, without this project, and writes what it found.
STOCK_LOADER = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

ids = torch.tensor(json.loads(sys.argv[2]))
for number, (root, subfolder) in enumerate(json.loads(sys.argv[1])):
    model, info = AutoModelForCausalLM.from_pretrained(
        root, subfolder=subfolder, dtype="auto", output_loading_info=True
    )
    with torch.no_grad():
        tensors = {"logits": model(ids).logits.float()}  # which also decompresses the weights
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            tensors[name] = module.weight.data.clone()
    save_file(tensors, f"{number}.safetensors")
    problems = {key: sorted(map(str, value)) for key, value in info.items() if value}
    with open(f"{number}.json", "w") as file:
        json.dump({"problems": problems, "package": "pipeline" in sys.modules}, file)
"""


@pytest.fixture(scope="module")
def calibrated(tiny_model, tmp_path_factory):
    """A checkpoint with each variant beside it whose inputs have static scales."""
    source = shutil.copytree(tiny_model("llama"), tmp_path_factory.mktemp("static") / "model")
    statistics, smoothing = {}, FoldedPowers()
    for found in collect(BlockwiseModel(source), [IDS[0].tolist()] * 2, Need.SECOND_MOMENTS, ranges=True):
        statistics |= found.statistics
        smoothing |= found.smoothing
    specs = [VariantSpec(name=name).resolved() for name in STATIC]
    variants = Variants(
        specs,
        {name: source / name for name in STATIC},
        linear_weights(source),
        statistics=statistics,
        equivalences=dict.fromkeys(STATIC, smoothing),
    )
    variants.make_of(source)
    assert not variants.failed
    return source


@pytest.fixture(scope="module")
def releases(tiny_model, quantized, calibrated):
    """Checkpoints with a variant beside them, by a name that says what is special."""
    llama, tied, biased = tiny_model("llama"), tiny_model("qwen3"), tiny_model("qwen2")
    made = {name: (calibrated if name in STATIC else quantized(llama, name), name) for name in NAMES}
    return made | {
        "w4a16, tied": (quantized(tied, "w4a16"), "w4a16"),
        "w4a16, tied, in shards": (quantized(tied, "w4a16", shard_bytes=60_000), "w4a16"),
        "w4a16 with biases": (quantized(biased, "w4a16"), "w4a16"),
        "w4a16 with layers kept": (quantized(llama, "w4a16", keep=["*.o_proj"]), "w4a16"),
        "w8a16 in groups": (quantized(llama, "w8a16", group_size=32), "w8a16"),
        "w8a16 in shards": (quantized(llama, "w8a16", shard_bytes=60_000), "w8a16"),
        "w8a8 in shards": (quantized(llama, "w8a8", shard_bytes=60_000), "w8a8"),
        "w4a16 of rows": (quantized(tiny_model("llama", hidden_size=80), "w4a16"), "w4a16"),
    }


@pytest.fixture(scope="module")
def stock(releases, tmp_path_factory):
    """What a fresh process with stock transformers finds in each release."""
    folder = tmp_path_factory.mktemp("stock")
    jobs = json.dumps([(str(root), variant) for root, variant in releases.values()])
    command = [sys.executable, "-I", "-c", STOCK_LOADER, jobs, json.dumps(IDS.tolist())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        name: (json.loads((folder / f"{n}.json").read_text()), load_file(folder / f"{n}.safetensors"))
        for n, name in enumerate(releases)
    }


def codes_of(root, variant):
    """Return the stored weights of a variant by the names of their layers."""
    checkpoint, shapes = Checkpoint(root / variant), linear_weights(root)
    forms = stored_weights(checkpoint)
    return {name.removesuffix(".weight"): form.read(checkpoint, name, shapes[name]) for name, form in forms.items()}


CASES = [
    *NAMES, "w4a16, tied", "w4a16, tied, in shards", "w4a16 with biases", "w4a16 with layers kept", "w8a16 in groups",
    "w8a16 in shards", "w8a8 in shards", "w4a16 of rows",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_stock_transformers_decompresses_the_codes_that_were_chosen(stock, releases, dequantized, case):
    (found, tensors), (root, variant) = stock[case], releases[case]
    assert not found["package"] and not found["problems"]
    codes = codes_of(root, variant)
    for layer in set(tensors) - {"logits", "lm_head"}:
        if "kept" in case and layer in KEPT:
            assert layer not in codes
        else:
            assert torch.equal(tensors[layer], codes[layer].dequantize(torch.bfloat16)), layer
            assert (codes[layer].scale > 0).all()
    assert len(codes) == 2 * 7 - ("kept" in case) * 2


@pytest.mark.parametrize("case", CASES)
def test_stock_logits_are_those_of_the_codes(stock, releases, case):

    root, variant = releases[case]
    model = dequantized(root, variant)
    with torch.no_grad():
        expected = model(IDS).logits.float()
    difference = (stock[case][1]["logits"] - expected).norm() / expected.norm()
    if VARIANTS[variant].rounds_inputs:
        assert 0.001 < difference < 0.15
    else:
        assert difference == 0


@pytest.mark.parametrize("case", CASES)
def test_pipeline_load_gives_the_logits_of_the_stock_loader(stock, releases, case):
    root, variant = releases[case]
    model, _ = load(root / variant, device="cpu")
    with torch.no_grad():
        ours = model(IDS).logits.float()
    difference = (ours - stock[case][1]["logits"]).norm() / ours.norm()
    assert difference < 0.03
    layer = type(model.model.layers[0].mlp.up_proj).__name__
    rounded = VARIANTS[variant].rounds_inputs or "rows" in case or VARIANTS[variant].values != "integer"
    assert layer == ("PlainLinear" if rounded else {4: "Int4Linear", 8: "Int8Linear"}[VARIANTS[variant].bits]) or (
        "groups" in case and layer == "Int8GroupLinear"
    )


@pytest.mark.parametrize("case", ["w4a16, tied", "w8a16 in groups", "fp8-weight"])
def test_offloaded_layers_read_the_same_weights(stock, releases, case):
    root, variant = releases[case]
    model, _ = load(root / variant, device="cpu", offload=True)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits.float(), stock[case][1]["logits"])


@pytest.mark.parametrize("case", ["w4a16, tied", "w8a16", "fp8-weight"])
def test_saving_a_loaded_model_writes_the_same_tensors(releases, tmp_path, case):
    root, variant = releases[case]
    load(root / variant, device="cpu")[0].save_pretrained(tmp_path)
    before, after = load_file(root / variant / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (root / variant, tmp_path)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_those_of_compressed_tensors(releases, name):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    root, variant = releases[name]
    ours = json.loads((root / variant / "config.json").read_text())["quantization_config"]
    theirs = QuantizationConfig.model_validate(ours)
    assert {**theirs.model_dump(exclude_unset=True), "version": ours["version"]} == ours
    (scheme,) = theirs.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(theirs.format)
    stored = {key.rpartition(".")[2] for key in Checkpoint(root / variant) if ".up_proj." in key}
    inputs = {"input_scale"} if variant in STATIC else set()
    assert stored == set(compressor.compression_param_names(scheme)) | inputs


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [32, 64, 33, 39, 1])
def test_codes_are_packed_as_the_package_packs_them(bits, width):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    half = 1 << bits - 1
    codes = torch.randint(-half, half, (5, width), dtype=torch.int8)
    words = packed.pack(codes, bits)
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(packed.unpack(words, bits, width), codes)


@pytest.mark.parametrize("name", NAMES)
def test_planned_bytes_are_those_of_the_files(releases, name):
    root, variant = releases[name]
    linear = linear_weights(root)
    spec = VariantSpec(name=variant).resolved()
    tensors = {key: (info.shape, 2.0) for key, info in Checkpoint(root).items()}
    assert stored_bytes(spec, tensors, linear, ()) == Checkpoint(root / variant).nbytes


def dequantized(root, variant):
    """Return the model at the root with the weights and norms of a variant."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(root, dtype="auto")
    checkpoint, codes = Checkpoint(root / variant), codes_of(root, variant)
    for name, parameter in model.named_parameters():
        if name in checkpoint and name.removesuffix(".weight") not in codes:  # norms, which smoothing changes
            parameter.data = checkpoint.read(name)
    for name, weight in codes.items():
        model.get_submodule(name).weight.data = weight.dequantize(torch.bfloat16)
    return model.eval()


@pytest.mark.parametrize("name", STATIC)
def test_smoothed_weights_and_norms_compute_what_the_model_does(releases, name):
    from transformers import AutoModelForCausalLM

    root, variant = releases[name]
    exact, folded = AutoModelForCausalLM.from_pretrained(root, dtype="auto").eval(), dequantized(root, variant)
    parts = [dict(model.named_parameters()) for model in (exact, folded)]
    assert any(not torch.equal(parts[0][key], parts[1][key]) for key in parts[0] if parts[0][key].ndim == 1)
    with torch.no_grad():
        expected, found = exact(IDS).logits.float(), folded(IDS).logits.float()
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_layers_with_one_input_have_one_scale_of_inputs(releases):
    for name in STATIC:
        scales = load_file(releases[name][0] / name / "model.safetensors")
        for block, layers in itertools.product(
            range(2), (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
        ):
            found = {float(scales[f"model.layers.{block}.{layer}.input_scale"]) for layer in layers}
            assert len(found) == 1 and found.pop() > 0


@pytest.mark.parametrize("name", STATIC)
def test_static_inputs_need_calibration_text(name, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=f"{name}: needs calibration text. Try: quantize.quality=calibrated"):
        Quantize(variants=[name])
    assert Quantize(variants=[name], quality="calibrated").calibrated == (name,)
    source = tiny_model("llama")
    moments = {weight: Statistics(8, torch.ones(width)) for weight, (_, width) in linear_weights(source).items()}
    for statistics in ({}, moments):
        variants = Variants(
            [VariantSpec(name=name).resolved()], {name: tmp_path}, linear_weights(source), statistics=statistics
        )
        variants.make_of(source)
        assert "needs statistics that were not collected (ranges" in str(variants.failed[name])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"embeddings": "int8"}, "load no quantized embeddings. Try: embeddings: keep"),
        ({"group_sizes": {"32": ["*.q_proj"]}}, "all layers of w4a16 have the same group size"),
        ({"group_size": 256}, "allowed are 32, 64, 128"),
        ({"int8": ["*.q_proj"]}, "layers in 8 bits go with int4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_servers_cannot_load_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        VariantSpec(name="w4a16", **options)


def test_damaged_parts_are_refused_by_name(releases):
    root, variant = releases["w4a16"]
    name, (rows, width) = next(iter(linear_weights(root).items()))
    with pytest.raises(CheckpointError, match=f"{name}: its stored parts"):
        format_of(VariantSpec(name=variant)).read(Checkpoint(root / variant), name, (rows + 1, width))


def test_codes_without_scales_are_refused(tiny_model, quantized, tmp_path):
    shutil.copytree(quantized(tiny_model("llama"), "fp8-weight") / "fp8-weight", tmp_path, dirs_exist_ok=True)
    tensors, name = load_file(tmp_path / "model.safetensors"), "model.layers.0.mlp.up_proj.weight"
    del tensors[f"{name}_scale"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"{name} has codes without the scales that belong to them"):
        load(tmp_path, device="cpu")


@pytest.mark.parametrize("name", ["w4a16", "w8a8"])
def test_file_that_was_cut_off_is_named_whatever_loads_it(tiny_model, quantized, tmp_path, name):
    shutil.copytree(quantized(tiny_model("llama"), name) / name, tmp_path, dirs_exist_ok=True)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate((tmp_path / "model.safetensors").stat().st_size // 2)
    with pytest.raises(ModelError, match=r"model\.safetensors: \d+ bytes where its header says \d+; fetch it again"):
        load(tmp_path, device="cpu")
