"""The formats of GPTQ and AWQ: packed as their libraries define it, written in blocks, and loaded."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.schema import VariantSpec
from pipeline.errors import ModelError
from pipeline.inference.kernels import cpu
from pipeline.inference.load import load
from pipeline.models.checkpoint import SINGLE_NAME, Checkpoint, row_blocks
from pipeline.models.matrices import linear_weights
from pipeline.quantization.formats import storage, stored_bytes
from pipeline.quantization.layers import unfit
from pipeline.quantization.roundings import rounding
from pipeline.quantization.writer import quantize_checkpoint
from tests.support.models import relative_error

NAMES = ["gptq", "awq"]
IDS = torch.tensor([[7, 200, 31, 64, 5, 5, 90, 12, 250, 33, 2, 149]])
KEEP = ["*.o_proj", "model.layers.1.mlp.down_proj"]


def spec_of(name: str, **options) -> VariantSpec:
    return VariantSpec(name=name, **options).resolved()


def write(source, folder, spec):
    (made,) = quantize_checkpoint(source, [spec], {spec.name: folder}, linear_weights(source)).values()
    return made


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama", hidden_size=256, intermediate_size=384)


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    root = tmp_path_factory.mktemp("written")
    for name in NAMES:
        write(model, root / name, spec_of(name))
    return root


def numbers(packed: torch.Tensor, position: int) -> torch.Tensor:
    """Return the four bits at a position of each int32."""
    return (packed.long() >> 4 * position) & 0xF


def as_gptq_defines(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the weight (N, K), number by number, from the definition of version 1."""
    width, rows = 8 * len(parts["qweight"]), parts["qweight"].shape[1]
    weight = torch.empty(rows, width)
    for k in range(width):
        group = int(parts["g_idx"][k])
        codes = numbers(parts["qweight"][k // 8], k % 8)
        zeros = torch.stack([numbers(parts["qzeros"][group, n // 8], n % 8) for n in range(rows)]) + 1
        weight[:, k] = (codes - zeros) * parts["scales"][group].float()
    return weight


def as_awq_defines(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the weight (N, K) as compressed-tensors' own converter for AutoAWQ reads it."""
    converter = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq").AutoAWQConverter
    groups, rows = parts["scales"].shape
    codes, scale, zeros = converter()._convert_gemm_module(parts["qweight"], parts["scales"], parts["qzeros"])
    offset = (codes.float().view(rows, groups, -1) - zeros.float().unsqueeze(-1)) * scale.float().unsqueeze(-1)
    return offset.flatten(1)


DEFINITIONS = {"gptq": as_gptq_defines, "awq": as_awq_defines}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group_size", [32, 64, None])
def test_stored_parts_mean_what_the_library_of_the_format_defines(name, group_size):
    form, generator = storage(name), torch.Generator().manual_seed(3)
    grid = form.grid(spec_of(name).model_copy(update={"group_size": group_size}), 192)
    weight = rounding("rtn").round(torch.randn(40, 192, generator=generator) * 0.1 + 0.03, grid)
    stored = form.rows("a.weight", weight) | form.rest("a.weight", (40, 192), weight.scale, weight.zero, grid)
    parts = {part.removeprefix("a."): tensor for part, tensor in stored.items()}
    assert torch.equal(DEFINITIONS[name](parts), weight.dequantize())
    assert {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in stored.items()} == form.plan(
        "a.weight", (40, 192), grid
    )


@pytest.mark.parametrize("name", NAMES)
def test_written_weights_are_read_back_and_scales_are_positive(model, written, name):
    source, stored, form = Checkpoint(model), Checkpoint(written / name), storage(name)
    linear, spec = linear_weights(model), spec_of(name)
    assert set(form.weights(stored)) == set(linear)
    for weight, shape in linear.items():
        found = form.read(stored, weight, shape)
        expected = rounding(spec.rounding).round(source.read(weight), form.grid(spec, shape[1]))
        assert found.grid == expected.grid and torch.equal(found.dequantize(), expected.dequantize())
        assert (found.scale > 0).all() and found.scale.dtype == torch.float16


@pytest.mark.parametrize("name", NAMES)
def test_size_of_the_blocks_does_not_show_in_the_files(model, written, tmp_path, monkeypatch, name):
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr(row_blocks, "TILE_ELEMENTS", 3000)
    write(model, tmp_path, spec_of(name))
    assert (tmp_path / SINGLE_NAME).read_bytes() == (written / name / SINGLE_NAME).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_loads_with_the_numbers_of_its_codes_and_is_saved_as_it_was(model, written, tmp_path, name):
    loaded, _ = load(written / name, device="cpu")
    plain, _ = load(model, device="cpu")
    stored, form = Checkpoint(written / name), storage(name)
    for weight, shape in linear_weights(model).items():
        layer = plain.get_submodule(weight.removesuffix(".weight"))
        layer.weight.data = form.read(stored, weight, shape).dequantize(torch.bfloat16)
    with torch.no_grad():
        assert relative_error(loaded(IDS).logits, plain(IDS).logits) < 0.03
    loaded.save_pretrained(tmp_path)
    for file in (SINGLE_NAME, "config.json"):
        if file == SINGLE_NAME:
            ours, theirs = load_file(written / name / file), load_file(tmp_path / file)
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[part], theirs[part]) for part in ours)
        else:
            assert json.loads((written / name / file).read_text()) == json.loads((tmp_path / file).read_text())


@pytest.mark.parametrize("name", NAMES)
def test_all_layers_get_the_largest_group_size_that_divides_every_width(tiny_model, tmp_path, name):
    source = tiny_model("llama", hidden_size=256, intermediate_size=320)
    made = write(source, tmp_path / "all", spec_of(name))
    assert made.group_sizes == dict.fromkeys(linear_weights(source), 64)
    assert json.loads((tmp_path / "all" / "config.json").read_text())["quantization_config"]["group_size"] == 64
    kept = write(source, tmp_path / "kept", spec_of(name, keep=["*.down_proj"]))
    assert kept.group_sizes == {}  # the width of 320 no longer counts


@pytest.mark.parametrize("name", NAMES)
def test_one_scale_a_row_if_no_group_size_divides_every_width(tiny_model, tmp_path, name):
    source = tiny_model("llama", hidden_size=80)
    write(source, tmp_path, spec_of(name))
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["group_size"] == -1
    scales = Checkpoint(tmp_path)["model.layers.0.self_attn.q_proj.scales"]
    assert scales.shape == (1, 80)
    assert load(tmp_path, device="cpu")[0](IDS).logits.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_kept_layers_stay_and_the_configuration_names_them(model, tmp_path, name):
    made = write(model, tmp_path, spec_of(name, keep=KEEP))
    assert len(made.kept) == 3
    assert all(torch.equal(Checkpoint(tmp_path).read(n), Checkpoint(model).read(n)) for n in made.kept)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    text = json.dumps(config.get("dynamic") or config["modules_to_not_convert"]).replace("\\", "")
    assert all(layer.removesuffix(".weight") in text for layer in made.kept)
    assert load(tmp_path, device="cpu")[0](IDS).logits.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_planned_bytes_are_those_that_are_written(model, written, name):
    tensors = {tensor: (info.shape, info.dtype.itemsize) for tensor, info in Checkpoint(model).items()}
    planned = stored_bytes(spec_of(name), tensors, linear_weights(model), ())
    assert planned == Checkpoint(written / name).nbytes


@pytest.mark.parametrize("name", NAMES)
def test_layers_that_cannot_be_packed_are_refused_by_name(tiny_model, name):
    source = tiny_model("llama", hidden_size=160, intermediate_size=196)
    found = unfit(spec_of(name), linear_weights(source), source)
    assert found and "mlp.gate_proj.weight" in found and "196 x 160" in found and "keep" in found


@pytest.mark.parametrize("options", [{"embeddings": "int8"}, {"group_sizes": {"32": ["*.o_proj"]}}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_what_the_format_cannot_hold_is_refused(name, options):
    with pytest.raises(ValueError, match=f"{name}.*Try: "):
        VariantSpec(name=name, **options)


@pytest.mark.parametrize("change", ["zeros", "order", "missing"])
def test_files_of_others_that_hold_more_are_refused(model, written, tmp_path, change):
    tensors = load_file(written / "gptq" / SINGLE_NAME)
    layer = "model.layers.1.mlp.up_proj"
    if change == "zeros":
        tensors[f"{layer}.qzeros"][0, 0] += 1
    elif change == "order":
        tensors[f"{layer}.g_idx"] = tensors[f"{layer}.g_idx"].flip(0)
    else:
        del tensors[f"{layer}.scales"]
    for file in (written / "gptq").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / SINGLE_NAME, {"format": "pt"})
    with pytest.raises(ModelError, match="layers.1.mlp.up_proj"):
        load(tmp_path, device="cpu")


@pytest.mark.parametrize("name", NAMES)
def test_read_from_the_files_layer_by_layer_it_computes_the_same(written, name):
    whole, _ = load(written / name, device="cpu")
    offloaded, _ = load(written / name, device="cpu", offload=True)
    with torch.no_grad():
        assert relative_error(offloaded(IDS).logits, whole(IDS).logits) < 0.03


@pytest.mark.parametrize("name", NAMES)
def test_codes_in_the_int4_kernel_are_given_back_exactly(name):
    form, generator = storage(name), torch.Generator().manual_seed(5)
    grid = form.grid(spec_of(name, group_size=32), 128)
    weight = rounding("rtn").round(torch.randn(64, 128, generator=generator) + 0.4, grid)
    layer = cpu.linear(weight, None)
    back = layer.portable()
    assert isinstance(layer, cpu.Int4Linear) and back.grid == grid
    assert torch.equal(back.codes, weight.codes) and torch.equal(back.scale, weight.scale)
    assert weight.zero is None or torch.equal(back.zero, weight.zero)
    x = torch.randn(3, 128, generator=generator).bfloat16()
    assert relative_error(layer(x), x.float() @ weight.dequantize().T) < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_model_that_only_the_stock_loader_may_open_is_refused_with_the_package(written, tmp_path, name):
    """Such as one with other tensor names than the model of transformers."""
    for file in (written / name).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    stray = {"model.other.weight": torch.zeros(2)}
    save_file(load_file(tmp_path / SINGLE_NAME) | stray, tmp_path / SINGLE_NAME, {"format": "pt"})
    with pytest.raises(ModelError, match=r"cannot load it: .*requires (optimum|gptqmodel)"):
        load(tmp_path, device="cpu")
