"""An importance matrix from second moments, as llama.cpp's tools write one."""

from __future__ import annotations

import ctypes
import os

import pytest
import torch

from pipeline.models.checkpoint import Checkpoint
from pipeline.models.matrices import linear_weights
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
    llama_cpp = pytest.importorskip("llama_cpp")
    if not hasattr(llama_cpp, "llama_model_imatrix_data"):
        pytest.skip("this llama.cpp takes no importance matrix")
    model, entry = tiny_model("llama"), llama_cpp.llama_model_imatrix_data
    write_importance_matrix(tmp_path / "imatrix.gguf", moments, 1536, model)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "imatrix.gguf").tensors}
    means = {
        name.removesuffix(".in_sum2"): (data / tensors[name.replace("in_sum2", "counts")]).ravel().astype("float32")
        for name, data in tensors.items()
        if name.endswith("in_sum2")
    }
    entries = (entry * (len(means) + 1))()  # the last one is empty and ends the list
    for place, (name, data) in zip(entries, means.items(), strict=False):
        place.name, place.size = name.encode(), len(data)
        place.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    errors = {}
    for kind, given in (("plain", None), ("weighted", entries)):
        settings, target = llama_cpp.llama_model_quantize_default_params(), tmp_path / f"{kind}.gguf"
        settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
        if given is not None:
            settings.imatrix = given
        source = os.fsencode(written(model, "gguf-bf16"))
        assert llama_cpp.llama_model_quantize(source, os.fsencode(target), settings) == 0
        found, full = GgufWeights(target, Checkpoint(model), torch.float32), Checkpoint(model)
        lost = {n: ((found.read(n).float() - full.read(n).float()) ** 2 @ of).mean() for n, of in moments.items()}
        errors[kind] = lost
    for name, lost in errors["plain"].items():
        assert errors["weighted"][name] < lost, name
