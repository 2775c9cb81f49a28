"""int4 tiles for tensor cores: packed and unpacked without a GPU."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.schema import VariantSpec
from pipeline.errors import ModelError
from pipeline.inference import kernels
from pipeline.inference.kernels import cuda
from pipeline.inference.load import load
from pipeline.models.checkpoint import SINGLE_NAME, Checkpoint, row_blocks
from pipeline.models.matrices import linear_weights, table_weights
from pipeline.quantization.formats import storage
from pipeline.quantization.formats.tile_packed import format as tile_packed
from pipeline.quantization.grid import GroupQuantized
from pipeline.quantization.roundings import rounding
from pipeline.quantization.writer import Variants, quantize_checkpoint
from tests.support.checkpoints import assert_same_headers
from tests.support.grids import int4, weight_on_grid

IDS = torch.tensor([[7, 200, 31, 64, 5, 5, 90, 12, 250, 33, 2, 149]])
SHAPES = [(8, 1024), (16, 32), (24, 576), (40, 2048), (3, 96), (17, 1056), (272, 160)]
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


def same(a: GroupQuantized, b: GroupQuantized) -> bool:
    parts = [(a.codes, b.codes), (a.scale, b.scale), *([(a.zero, b.zero)] if a.grid.zero == "float" else [])]
    return a.grid == b.grid and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in parts)


def as_tensor_cores_read(tiles: torch.Tensor, scale_and_zero: torch.Tensor, group_size: int) -> torch.Tensor:
    """The weight (N', K') that `aten._weight_int4pack_mm` multiplies by, from what each lane of a warp holds.

    Of a number, the kernel takes nibbles i and i + 4 as a pair; pairs 0 and 1 are the registers b0 and b1 of
    one mma.m16n8k16, pairs 2 and 3 those of the next. The PTX manual says where they stand in B (16 x 8):
    row 2 * (lane % 4) + (0 or 1) + 8 * register, column lane / 4.
    """
    numbers = tiles.long() & 0xFFFFFFFF
    eights, many = tiles.shape[:2]
    weight = torch.full((eights * 8, many * 128), float("nan"))
    n, outer = torch.arange(eights)[:, None] * 8, torch.arange(many)[None] * 128
    for lane in range(32):
        for number in range(4):
            for pair in range(4):
                for half in (0, 1):
                    code = (numbers[:, :, lane, number] >> 4 * (pair + 4 * half)) & 15
                    step, register = divmod(pair, 2)
                    row = n + lane // 4
                    column = outer + (2 * number + step) * 16 + 2 * (lane % 4) + half + 8 * register
                    scale, zero = scale_and_zero[column // group_size, row].float().unbind(-1)
                    weight[row, column] = (code - 8) * scale + zero
    return weight


@pytest.mark.parametrize("rows, width", SHAPES)
def test_packing_is_undone_exactly(rows, width):
    weight = weight_on_grid(int4(), rows, width)
    tiles, scale_and_zero = tile_packed.to_tiles(weight)
    assert same(tile_packed.from_tiles(tiles, scale_and_zero, (rows, width), 32), weight)


@pytest.mark.parametrize("rows, width", SHAPES)
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_tiles_hold_the_weight_and_zero_padding(rows, width, group_size):
    if width % group_size:
        width = -(-width // group_size) * group_size
    weight = weight_on_grid(int4(group_size), rows, width)
    tiles, scale_and_zero = tile_packed.to_tiles(weight)
    assert tiles.is_contiguous() and scale_and_zero.is_contiguous()
    read = as_tensor_cores_read(tiles, scale_and_zero, group_size)
    assert read.shape[0] % 8 == 0 and read.shape[1] % 1024 == 0
    assert torch.equal(read[:rows, :width], weight.dequantize())
    assert not read[rows:].any() and not read[:, width:].any()


@pytest.mark.parametrize("rows", [8, 24, 19])
def test_blocks_of_rows_give_the_rows_of_the_whole(rows):
    weight = weight_on_grid(int4(), rows, 64)
    grid, (whole,) = weight.grid, tile_packed.FORMAT.rows("a.weight", weight).values()
    for first in range(0, rows, tile_packed.FORMAT.together(grid)):
        part = slice(first, first + tile_packed.FORMAT.together(grid))
        block = GroupQuantized(weight.codes[part], weight.scale[part], weight.zero[part], grid)
        (tiles,) = tile_packed.FORMAT.rows("a.weight", block).values()
        assert torch.equal(tiles, whole[first // 8 : first // 8 + 1])


def test_the_layer_for_cuda_holds_these_tiles_and_gives_back_what_it_was_made_from():
    weight = weight_on_grid(int4(), 17, 160)
    layer = cuda.Int4Linear(weight, None)
    tiles, scale_and_zero = tile_packed.to_tiles(weight)
    assert torch.equal(layer.packed, tiles) and torch.equal(layer.scale_and_zero, scale_and_zero)
    assert same(layer.portable(), weight) and not layer.state_dict()


@needs_card
@pytest.mark.parametrize("rows, width", [shape for shape in SHAPES if shape[0] % 8 == 0])
def test_torch_packs_the_same_codes_into_the_same_tiles(rows, width):
    codes = torch.nn.functional.pad(weight_on_grid(int4(), rows, width).codes, (0, -width % 1024)).cuda()
    unsigned = (codes + 8).to(torch.uint8)
    theirs = torch.ops.aten._convert_weight_to_int4pack((unsigned[:, ::2] << 4 | unsigned[:, 1::2]).contiguous(), 8)
    assert torch.equal(tile_packed.pack_codes(codes), theirs)


@pytest.fixture(scope="module")
def releases(tiny_model, quantized_with):
    """Folders with an int4 variant in each packing, by a name that says what is special."""
    llama, odd = tiny_model("llama"), tiny_model("llama", intermediate_size=200)  # which no group size divides
    return {
        "llama": quantized_with(llama),
        "in shards": quantized_with(llama, shard_bytes=60_000),
        "tied": quantized_with(tiny_model("qwen3")),
        "with layers kept": quantized_with(odd, keep=["*.down_proj"]),
        "with embeddings in int8": quantized_with(tiny_model("qwen3"), embeddings="int8"),
    }


@pytest.fixture(scope="module")
def quantized_with(tmp_path_factory):
    """`quantized_with(source)`: folders with `plain/int4` and `tile_packed/int4` of it."""

    def make(source, shard_bytes: int = 10**9, **spec):
        folder = tmp_path_factory.mktemp("packings")
        for packing in ("plain", "tile_packed"):
            asked = VariantSpec(name="int4", packing=packing, **spec).resolved()
            output, tables = {"int4": folder / packing / "int4"}, table_weights(source)
            quantize_checkpoint(source, [asked], output, linear_weights(source), shard_bytes=shard_bytes, tables=tables)
        return folder

    return make


NAMES = ["llama", "in shards", "tied", "with layers kept", "with embeddings in int8"]


@pytest.mark.parametrize("name", NAMES)
def test_tiles_load_as_the_plain_packing(releases, name):
    models = [load(releases[name] / packing, "int4")[0] for packing in ("plain", "tile_packed")]
    assert {type(m).__name__ for m in models[1].modules()} == {type(m).__name__ for m in models[0].modules()}
    for layer, other in zip(models[0].modules(), models[1].modules(), strict=True):
        if hasattr(layer, "portable"):
            assert same(layer.portable(), other.portable())
    with torch.no_grad():
        first, second = (model(IDS).logits for model in models)
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["llama", "tied", "with embeddings in int8"])
def test_saving_what_was_loaded_gives_the_tiles_again(releases, tmp_path, name):
    folder = releases[name] / "tile_packed" / "int4"
    model, _ = load(folder)
    model.save_pretrained(tmp_path)
    before, after = load_file(folder / SINGLE_NAME), load_file(tmp_path / SINGLE_NAME)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert_same_headers(folder, tmp_path)
    configs = [json.loads((place / "config.json").read_text()) for place in (folder, tmp_path)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


STOCK = """
import sys, torch
from safetensors.torch import save_file
from torchao.quantization import Int4TilePackedTo4dTensor
from transformers import AutoModelForCausalLM

model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto", output_loading_info=True)
assert not any(info.values()), info
tensors = {}
for name, module in model.named_modules():
    if isinstance(module, torch.nn.Linear) and isinstance(module.weight.data, Int4TilePackedTo4dTensor):
        weight = module.weight.data
        assert weight.shape == (module.out_features, module.in_features)
        tensors[name + ".weight"] = weight.qdata.contiguous()
        tensors[name + ".sz"] = weight.scale_and_zero.contiguous()
if torch.cuda.is_available():
    with torch.no_grad():
        tensors["logits"] = model.cuda()(torch.tensor([%s]).cuda()).logits.float().cpu()
assert "pipeline" not in sys.modules
save_file(tensors, sys.argv[2])
"""


@pytest.mark.parametrize(
    "name", [*NAMES[1:3], *(pytest.param(name, marks=pytest.mark.slow) for name in (NAMES[0], *NAMES[3:]))]
)
def test_stock_transformers_loads_the_tiles_and_runs_them_on_a_card(releases, tmp_path, name):
    folder = releases[name] / "tile_packed" / "int4"
    command = [sys.executable, "-I", "-c", STOCK % IDS[0].tolist(), str(folder), str(tmp_path / "found")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found, stored = load_file(tmp_path / "found"), Checkpoint(folder)
    tiled = [n for n in found if n.endswith(".weight")]
    assert len(tiled) == 14 - 2 * (name == "with layers kept")
    for weight in tiled:
        qdata, scale_and_zero = tile_packed.FORMAT.part_names(weight)
        assert torch.equal(found[weight], stored.read(qdata))
        assert torch.equal(found[weight.replace(".weight", ".sz")], stored.read(scale_and_zero))
    if torch.cuda.is_available():
        model, _ = load(releases[name] / "plain" / "int4", device="cpu")
        with torch.no_grad():
            expected = model(IDS).logits.float()
        assert (found["logits"] - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("block, tile", [(1, 1), (1000, 10_000), (10**9, 500)])
def test_the_size_of_the_blocks_does_not_show_in_the_files(tiny_model, releases, tmp_path, monkeypatch, block, tile):
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", block)
    monkeypatch.setattr(row_blocks, "TILE_ELEMENTS", tile)
    source = tiny_model("llama")
    specs = [VariantSpec(name="int4", packing="tile_packed").resolved(), VariantSpec(name="int8").resolved()]
    output = {spec.name: tmp_path / spec.name for spec in specs}
    quantize_checkpoint(source, specs, output, linear_weights(source))
    written = (releases["llama"] / "tile_packed" / "int4" / SINGLE_NAME).read_bytes()
    assert (tmp_path / "int4" / SINGLE_NAME).read_bytes() == written


def test_the_padding_is_counted(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"layer.weight": torch.randn(17, 1536).bfloat16()}, tmp_path / SINGLE_NAME)
    made = {}
    for packing in ("plain", "tile_packed"):
        spec = VariantSpec(name="int4", packing=packing).resolved()
        linear, output = {"layer.weight": (17, 1536)}, {"int4": tmp_path / packing}
        made[packing] = Variants([spec], output, linear).make_of(tmp_path, checkpoint=Checkpoint(tmp_path))["int4"]
    assert made["plain"].padding_bytes == 0
    added = 24 * 2048 - 17 * 1536
    assert made["tile_packed"].padding_bytes == added // 2 + added // 64 * 4
    assert made["tile_packed"].weight_bytes == Checkpoint(tmp_path / "tile_packed").nbytes
    assert made["tile_packed"].weight_bytes - made["plain"].weight_bytes == made["tile_packed"].padding_bytes


@pytest.mark.parametrize("part", ["qdata", "scale_and_zero"])
def test_tiles_of_another_shape_are_refused_by_name(releases, tmp_path, part):
    folder = releases["llama"] / "tile_packed" / "int4"
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    name = f"model.layers.1.mlp.up_proj._weight_{part}"
    tensors, metadata = load_file(folder / SINGLE_NAME), Checkpoint(folder).metadata
    for wrong in (tensors[name][:-1].clone(), tensors[name].flatten()[:7].clone(), tensors[name].flatten()[0].clone()):
        save_file({**tensors, name: wrong}, tmp_path / SINGLE_NAME, metadata)
        with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight: its stored parts are not those"):
            load(tmp_path)


def test_int8_beside_tiles_is_unchanged():
    weight = rounding("rtn").round(torch.randn(16, 64).bfloat16(), storage("torchao").TABLE)
    for function, arguments in (
        ("plan", ("a.weight", (16, 64), weight.grid)),
        ("rows", ("a.weight", weight)),
        ("rest", ("a.weight", (16, 64), weight.scale, None, weight.grid)),
    ):
        ours, theirs = (getattr(storage(name), function)(*arguments) for name in ("tile_packed", "torchao"))
        assert ours.keys() == theirs.keys()
    assert kernels.linear(weight, None, torch.device("cpu")) is not None
