"""GGUF files of tiny models, and llama.cpp to read them with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.config.schema import VariantSpec
from pipeline.models.matrices import quantizable_weights, table_weights
from pipeline.quantization.writer import quantize_checkpoint


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """`written(folder, "gguf-q4_0")`: the file made of a checkpoint; made once. Keywords go into the `VariantSpec`."""
    made: dict[tuple, Path] = {}

    def make(source: Path, variant: str, **spec) -> Path:
        key = (source, variant, repr(sorted(spec.items())))
        if key not in made:
            asked, folder = VariantSpec(name=variant, **spec).resolved(), tmp_path_factory.mktemp("gguf")
            tables = table_weights(source) if asked.embeddings == "int8" else {}
            linear = quantizable_weights(source)
            quantize_checkpoint(source, [asked], {variant: folder}, linear, tables=tables, name="tiny")
            (made[key],) = folder.iterdir()
        return made[key]

    return make


@pytest.fixture(scope="session")
def opened():
    """`opened(path)`: the file in llama.cpp."""
    llama_cpp = pytest.importorskip("llama_cpp")

    def load(path: Path, **options):
        return llama_cpp.Llama(str(path), **{"n_ctx": 64, "n_threads": 1, "verbose": False, **options})

    return load


@pytest.fixture(scope="session")
def logits(opened):
    """`logits(path, ids)`: what llama.cpp computes, (T, V) float32."""

    def compute(path: Path, ids: list[int]) -> torch.Tensor:
        model = opened(path, logits_all=True)
        model.eval(ids)
        return torch.tensor(model.scores[: len(ids)])

    return compute
