"""K-quants of our own roundings: the types of the tensors, and no larger error than that of llama.cpp's quantizer."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from pipeline.config.schema import VariantSpec
from pipeline.models.checkpoint import Checkpoint, row_blocks
from pipeline.models.gguf_metadata import read_header
from pipeline.models.matrices import linear_weights
from pipeline.quantization.formats.gguf import k_quants, quantizer
from pipeline.quantization.formats.gguf.format import FORMAT as GGUF
from pipeline.quantization.formats.gguf.importance_matrix import write_importance_matrix
from pipeline.quantization.formats.gguf.reader import GgufWeights
from pipeline.quantization.grid import SuperBlock, choose_codes, in_groups
from pipeline.quantization.roundings import search, super_blocks
from pipeline.quantization.statistics import Statistics
from pipeline.quantization.writer import Variants, quantize_checkpoint

gguf = pytest.importorskip("gguf")
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
NAMES = {"gguf-q4_k": "Q4_K", "gguf-q5_k": "Q5_K", "gguf-q6_k": "Q6_K"}


def spec_of(name: str) -> VariantSpec:
    return VariantSpec(name=name, rounding="search").resolved()


def weights(width: int = 512) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.distributions.StudentT(4.0).sample((32, width)) * 0.02


def moments(width: int) -> torch.Tensor:
    """Mean squares that differ much between columns."""
    return torch.randn(width, generator=torch.Generator().manual_seed(1)).exp() ** 3


@pytest.mark.parametrize("name, kind", NAMES.items())
def test_search_weights_columns_and_fits_scales_of_super_blocks(name, kind, monkeypatch):
    weight, of, grid = weights(), moments(512), GGUF.grid(spec_of(name), 512)
    assert gguf.GGMLQuantizationType[kind].name == kind and grid.super_block is not None

    def error(made):
        return float(((made.dequantize() - weight) ** 2 @ of).sum())

    plain, weighted = search.round(weight, grid), search.round(weight, grid, Statistics(9, of))
    assert error(weighted) < 0.8 * error(plain)
    monkeypatch.setattr(super_blocks, "fit", lambda groups, scale, zero, grid, weights: (scale, zero))
    assert error(weighted) < 0.99 * error(search.round(weight, grid, Statistics(9, of)))  # scales rounded once


def test_scales_are_the_nearest_integers_times_one_number():
    of = SuperBlock(groups=4, highest=63, dtype=torch.float16)
    values = torch.tensor([[0.63, 0.1, 0.004, 0.3, 1e-9, 0, 0, 0]])
    number, integers = of.split(values)
    assert number.shape == (1, 2) and integers.shape == (1, 2, 4)
    assert integers[0, 0].tolist() == [63, 10, 0, 30] and integers[0, 1].tolist() == [0, 0, 0, 0]
    sizes = 10 ** torch.linspace(-8, 4, 5000).unsqueeze(1)
    stored = of.nearest(torch.rand(5000, 4, generator=torch.Generator().manual_seed(0)) * sizes)
    assert torch.equal(of.nearest(stored), stored)  # float16 is coarse for the smallest ones


def test_codes_of_a_scale_of_zero_are_zero():
    grid = GGUF.grid(spec_of("gguf-q4_k"), 256)
    weight = weights(256) * 1e-3
    weight[:, :32] = 5.0
    made = search.round(weight, grid)
    assert (made.scale == 0).any() and made.dequantize().isfinite().all()
    codes = choose_codes(in_groups(weight, grid), made.scale, made.zero, grid)
    assert (codes[made.scale == 0] == 0).all()


@pytest.mark.parametrize("block, tile", [(50_000, 20_000), (10**9, 12_000)])
def test_bytes_do_not_depend_on_the_blocks(tiny_model, written, tmp_path, monkeypatch, block, tile):
    source = tiny_model("llama", **WIDE)
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", block)
    monkeypatch.setattr(row_blocks, "TILE_ELEMENTS", tile)
    for name in NAMES:
        Variants([spec_of(name)], {name: tmp_path}, linear_weights(source), name="tiny").make_of(source)
    monkeypatch.undo()
    for name, kind in NAMES.items():
        expected = written(source, name, rounding="search").read_bytes()
        assert (tmp_path / f"tiny-{kind}.gguf").read_bytes() == expected


@pytest.mark.parametrize("name, kind, instead", [
    ("gguf-q4_k", "Q4_K", "Q5_0"), ("gguf-q5_k", "Q5_K", "Q5_1"), ("gguf-q6_k", "Q6_K", "Q8_0"),
])  # fmt: skip
def test_widths_that_are_no_multiple_of_256_get_the_type_that_llama_cpp_gives_them(
    tiny_model, tmp_path, name, kind, instead
):
    source = tiny_model("llama", intermediate_size=512)  # hidden size 160
    linear = linear_weights(source)
    (files,) = quantize_checkpoint(source, [spec_of(name)], {name: tmp_path}, linear, name="tiny").values()
    wide = sum(width % 256 == 0 for _, width in linear.values())
    expected = Counter({kind: wide, instead: len(linear) - wide})
    expected["Q8_0"] += 2  # embedding and output head
    assert wide == 2 and {key: count for key, count in files.types.items() if key != "F32"} == expected


@pytest.mark.parametrize("name", NAMES)
def test_no_layer_loses_more_than_with_llama_cpp_and_the_same_importance(tiny_model, tmp_path, written, name):
    if not quantizer.takes_importance(pytest.importorskip("llama_cpp")):
        pytest.skip("this llama.cpp takes no importance matrix")
    model, matrix, grid = tiny_model("llama", **WIDE), tmp_path / "imatrix.gguf", GGUF.grid(spec_of(name), 256)
    weighted = {n: moments(width) for n, (_, width) in linear_weights(model).items() if "lm_head" not in n}
    write_importance_matrix(matrix, weighted, 1536, model)
    file = tmp_path / "theirs.gguf"
    k_quants.quantize(written(model, "gguf-bf16"), file, NAMES[name], lambda done, total: None, matrix)
    types = {n: tensor.kind for n, tensor in read_header(file).tensors.items() if "blk" in n and tensor.kind != "F32"}
    assert set(types.values()) == {NAMES[name]}
    theirs, full = GgufWeights(file, Checkpoint(model), torch.float32), Checkpoint(model)
    for layer, of in weighted.items():
        weight = full.read(layer).float()
        ours = search.round(weight, grid, Statistics(1536, of)).dequantize()
        errors = [float(((made - weight) ** 2 @ of).mean()) for made in (ours, theirs.read(layer))]
        assert errors[0] < errors[1], layer
