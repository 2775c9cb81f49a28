"""Packed layers: the product with the dequantized weight, for any number of tokens."""

import pytest
import torch

from pipeline.inference import kernels
from pipeline.inference.kernels import cpu, cuda, products
from pipeline.quantization.formats.torchao.format import INT8
from pipeline.quantization.grid import Grid, GroupQuantized
from tests.support.grids import int4, int8, weight_on_grid
from tests.support.models import relative_error

CPU = torch.device("cpu")
SWITCHES = (cpu.INT8_KERNEL_TOKENS, cpu.INT8_GROUP_KERNEL_TOKENS, cpu.INT4_KERNEL_TOKENS)
TOKENS = [1, 2, 3, 7, *(switch + step for switch in SWITCHES for step in (-1, 0, 1)), 200]
TYPES = [torch.bfloat16, torch.float32, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def check(weight: GroupQuantized, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    expected = x.float() @ weight.dequantize().T + (0 if bias is None else bias.float())
    result = layer(x)
    assert result.dtype == x.dtype and result.shape == expected.shape
    assert relative_error(result, expected) < TOLERANCE[x.dtype]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    "grid, kind",
    [
        (INT8, cpu.Int8Linear),
        (int8(), cpu.Int8GroupLinear),
        (int8(64), cpu.Int8GroupLinear),
        (int4(), cpu.Int4Linear),
        (int4(64), cpu.Int4Linear),
    ],
)
def test_a_layer_multiplies_by_the_dequantized_weight(grid, kind, dtype, tokens):
    weight = weight_on_grid(grid, 96, 192)
    layer = kernels.linear(weight, None, CPU)
    assert type(layer) is kind
    check(weight, layer, torch.randn(tokens, 192).to(dtype))


@pytest.mark.parametrize("rows, width", [(16, 32), (32, 160), (80, 96), (272, 576), (64, 1536)])
@pytest.mark.parametrize("tokens", [1, 5, 100])
@pytest.mark.parametrize("grid", [INT8, int8(), int4()], ids=["int8", "int8-32", "int4"])
def test_layers_of_any_shape_that_has_a_kernel(grid, rows, width, tokens):
    weight = weight_on_grid(grid, rows, width)
    check(weight, kernels.linear(weight, None, CPU), torch.randn(tokens, width).bfloat16())


@pytest.mark.parametrize("rows", [1, 5, 63, 97])
def test_int8_takes_any_number_of_rows(rows):
    weight = weight_on_grid(INT8, rows, 64)
    for tokens in (1, 5, 100):
        check(weight, kernels.linear(weight, None, CPU), torch.randn(tokens, 64).bfloat16())


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_int4_takes_every_group_size_of_the_catalog(group_size):
    weight = weight_on_grid(int4(group_size), 64, 512)
    check(weight, kernels.linear(weight, None, CPU), torch.randn(3, 512).bfloat16())


@pytest.mark.parametrize("tokens", [1, 200])
@pytest.mark.parametrize("grid", [INT8, int4()], ids=["int8", "int4"])
def test_the_bias_is_added(grid, tokens):
    weight, bias = weight_on_grid(grid, 64, 128), torch.randn(64).bfloat16() * 5
    check(weight, kernels.linear(weight, bias, CPU), torch.randn(tokens, 128).bfloat16(), bias)


@pytest.mark.parametrize("shape", [(192,), (2, 192), (2, 3, 192), (1, 1, 1, 192), (0, 192)])
@pytest.mark.parametrize("grid", [INT8, int4()], ids=["int8", "int4"])
def test_inputs_keep_their_leading_shape(grid, shape):
    layer = kernels.linear(weight_on_grid(grid, 64, 192), None, CPU)
    assert layer(torch.randn(shape)).shape == (*shape[:-1], 64)


@pytest.mark.parametrize("grid", [INT8, int4()], ids=["int8", "int4"])
def test_inputs_need_not_be_contiguous(grid):
    weight, wide = weight_on_grid(grid, 64, 128), torch.randn(128, 300).bfloat16()
    layer = kernels.linear(weight, None, CPU)
    check(weight, layer, wide[:9].T[:128].T)
    check(weight, layer, wide.T[:5])
    check(weight, layer, wide[:2, :256].view(2, 2, 128)[:, 1])


def misplaced(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """The same tensor, `offset` elements behind an aligned address, as tensors mapped from a file are."""
    room = torch.empty(tensor.numel() + offset, dtype=tensor.dtype)[offset:].view(tensor.shape)
    return room.copy_(tensor)


@pytest.mark.parametrize("offset", [1, 8, 24])
@pytest.mark.parametrize("grid", [INT8, int4()], ids=["int8", "int4"])
def test_weights_and_inputs_may_lie_anywhere_in_memory(grid, offset):
    weight = weight_on_grid(grid, 64, 128)
    parts = (misplaced(t, offset) if t is not None else None for t in (weight.codes, weight.scale, weight.zero))
    moved = kernels.linear(GroupQuantized(*parts, grid), None, CPU)
    # The kernel may end the whole process here, so look before it runs.
    for buffer in moved.buffers():
        assert buffer.data_ptr() % 64 == 0
    assert cpu._aligned(misplaced(torch.randn(2, 128).bfloat16(), offset)).data_ptr() % 64 == 0
    for tokens in (1, 2, 40):
        check(weight, moved, misplaced(torch.randn(tokens, 128).bfloat16(), offset))


@pytest.mark.parametrize("width", [8, 24, 33, 100, 144])
def test_int8_widths_that_the_kernel_would_read_beyond_have_no_layer(width):
    assert kernels.linear(weight_on_grid(INT8, 64, width), None, CPU) is None


@pytest.mark.parametrize("rows", [1, 8, 17, 64, 100])
def test_int4_takes_any_number_of_rows(rows):
    weight = weight_on_grid(int4(), rows, 64)
    for tokens in (1, 5, 100):
        check(weight, kernels.linear(weight, None, CPU), torch.randn(tokens, 64).bfloat16())


@pytest.mark.parametrize("rows, width", [(64, 256), (100, 192), (1000, 64)])
@pytest.mark.parametrize("grid", [INT8, int8(64), int4(), int4(64)], ids=["int8", "int8-64", "int4", "int4-64"])
def test_portable_weight_is_recovered_from_a_layer(grid, rows, width):
    weight = weight_on_grid(grid, rows, width)
    back = kernels.linear(weight, None, CPU).portable()
    assert back.grid == grid and torch.equal(back.codes, weight.codes) and torch.equal(back.scale, weight.scale)
    assert back.zero is None if weight.zero is None else torch.equal(back.zero, weight.zero)


@pytest.mark.parametrize("grid", [INT8, int8(), int4()], ids=["int8", "int8-32", "int4"])
def test_layers_wider_than_a_block_are_dequantized_piece_by_piece(grid, monkeypatch):
    monkeypatch.setattr(products, "BLOCK_ELEMENTS", 64 * 128)
    weight = weight_on_grid(grid, 200, 128)
    layer = kernels.linear(weight, None, CPU)
    check(weight, layer, torch.randn(200, 128).bfloat16())
    assert torch.equal(layer.portable().codes, weight.codes)


@pytest.mark.parametrize("rows, width", [(64, 32), (192, 160)])
def test_codes_are_packed_as_torch_packs_them(rows, width):
    codes = weight_on_grid(int4(), rows, width).codes
    expected = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32) + 8, 1)
    assert torch.equal(cpu.pack_int4(codes, cpu.int4_block()), expected.view(torch.uint8))


def test_unknown_packing_has_no_layer(monkeypatch):
    monkeypatch.setattr(cpu, "int4_block", lambda: None)
    assert kernels.linear(weight_on_grid(int4(), 64, 64), None, CPU) is None


@pytest.mark.parametrize(
    "grid, rows",
    [
        (Grid(4, None, "none", torch.bfloat16), 64),
        (Grid(8, None, "none", torch.bfloat16, values="e4m3"), 64),
        (int8(16), 64),
        (int8(32), 63),
    ],
    ids=str,
)
def test_grids_without_a_kernel_have_no_layer(grid, rows):
    assert kernels.linear(weight_on_grid(grid, rows, 64), None, CPU) is None


@pytest.mark.parametrize("device", ["mps", "meta"])
def test_devices_without_kernels_have_no_layer(device):
    assert kernels.linear(weight_on_grid(INT8, 64, 64), None, torch.device(device)) is None


@pytest.mark.parametrize("tokens", [2, 200])
def test_long_float16_inputs_do_not_overflow(tokens):
    weight = weight_on_grid(INT8, 4, 4096)
    weight = GroupQuantized(torch.full_like(weight.codes, 127), weight.scale, None, INT8)
    result = cpu.Int8Linear(weight, None)(torch.full((tokens, 4096), 3, dtype=torch.float16))
    assert result.isfinite().all()


def test_int8_keeps_its_layout_only_on_cuda():
    weights = {"int8": weight_on_grid(INT8, 64, 64), "int4": weight_on_grid(int4(), 64, 64)}
    kept = {
        (n, d) for n, w in weights.items() for d in ("cpu", "cuda", "mps") if kernels.runs_as_stored(w, torch.device(d))
    }
    assert kept == {("int8", "cuda")}


@pytest.mark.parametrize("grid", [INT8, int4()], ids=["int8", "int4"])
def test_layers_say_what_they_are(grid):
    assert "in_features=128, out_features=64" in repr(kernels.linear(weight_on_grid(grid, 64, 128), None, CPU))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("rows, width, group_size", [(64, 576, 64), (128, 1024, 128), (17, 160, 32), (256, 4096, 256)])
@pytest.mark.parametrize("tokens", [1, 9, 200])
def test_the_tensor_core_layer_multiplies_by_the_dequantized_weight(rows, width, group_size, tokens):
    weight, bias = weight_on_grid(int4(group_size), rows, width), torch.randn(rows).bfloat16()
    layer = cuda.linear(weight, bias, torch.device("cuda")).cuda()
    x = torch.randn(tokens, width).bfloat16()
    expected = x.float() @ weight.dequantize().T + bias.float()
    assert relative_error(layer(x.cuda()).cpu(), expected) < 1e-2
