"""An importance matrix from second moments, as llama.cpp's tools write one."""

from __future__ import annotations

import pytest
import torch

from pipeline.models.checkpoint import Checkpoint
from pipeline.models.matrices import linear_weights
from pipeline.quantization.formats.gguf import k_quants, quantizer
from pipeline.quantization.formats.gguf.importance_matrix import write_importance_matrix
from pipeline.quantization.formats.gguf.reader import GgufWeights

gguf = pytest.importorskip("gguf")


@pytest.fixture
def moments(tiny_model):
    """Mean squares that differ much between columns."""
    torch.manual_seed(0)
    shapes = linear_weights(tiny_model("llama")).items()
    return {name: torch.randn(width).exp() ** 3 for name, (_, width) in shapes if "lm_head" not in name}


def test_file_has_the_sums_and_counts_of_every_layer(tiny_model, tmp_path, moments):
    write_importance_matrix(tmp_path / "imatrix.gguf", moments, 1536, tiny_model("llama"), "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["imatrix.gguf"]
    found = gguf.GGUFReader(tmp_path / "imatrix.gguf")
    keys = {name: field.contents() for name, field in found.fields.items() if not name.startswith("GGUF.")}
    assert keys == {
        "general.type": "imatrix",
        "imatrix.datasets": ["notes.txt"],
        "imatrix.chunk_count": 3,
        "imatrix.chunk_size": 512,
    }
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in found.tensors}
    assert len(tensors) == 2 * len(moments)
    of = moments["model.layers.1.mlp.down_proj.weight"]
    assert tensors["blk.1.ffn_down.weight.in_sum2"].shape == (1, len(of))
    assert torch.allclose(tensors["blk.1.ffn_down.weight.in_sum2"][0] / 1536, of)
    assert tensors["blk.1.ffn_down.weight.counts"].tolist() == [[1536]]


def test_llama_cpp_loses_less_of_the_output_with_it(tiny_model, tmp_path, written, moments):
    if not quantizer.takes_importance(pytest.importorskip("llama_cpp")):
        pytest.skip("this llama.cpp takes no importance matrix")
    model, matrix = tiny_model("llama"), tmp_path / "imatrix.gguf"
    write_importance_matrix(matrix, moments, 1536, model)
    errors = {}
    for kind, given in (("plain", None), ("weighted", matrix)):
        target = tmp_path / f"{kind}.gguf"
        k_quants.quantize(written(model, "gguf-bf16"), target, "Q4_0", lambda done, total: None, given)
        found, full = GgufWeights(target, Checkpoint(model), torch.float32), Checkpoint(model)
        lost = {n: ((found.read(n).float() - full.read(n).float()) ** 2 @ of).mean() for n, of in moments.items()}
        errors[kind] = lost
    for name, lost in errors["plain"].items():
        assert errors["weighted"][name] < lost, name
