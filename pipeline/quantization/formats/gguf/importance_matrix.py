"""An importance matrix in llama.cpp's own file format, for its quantizer.

Format: tools/imatrix of https://github.com/ggml-org/llama.cpp. A GGUF file holds two float32 tensors for each matrix:
`NAME.in_sum2`, sums of the squared inputs of each column, and `NAME.counts`, the number of tokens.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from pipeline.models.safe_loading import open_config
from pipeline.quantization.formats.gguf.names import architecture, library, stored_names

CHUNK = 512  # tokens; llama.cpp counts its text in chunks and only reports them


def write_importance_matrix(
    path: Path, moments: Mapping[str, torch.Tensor], tokens: int, folder: Path, text: str = "calibration text"
) -> None:
    """Write second moments of the layers' inputs as an importance matrix of llama.cpp.

    Args:
        path: the file; it gets its name when every byte is written.
        moments: mean squares (K,) of the inputs, by the name of the weight in the checkpoint.
        tokens: how many inputs the means were taken over.
        folder: the model, whose architecture gives the names in GGUF.
        text: a name for the calibration text, which llama.cpp writes into the files that it quantizes.

    Raises:
        ModelError: if the architecture is not written as GGUF.
        QuantizationError: if llama.cpp has no place for a weight.
        MissingExtra: if the package `gguf` is not installed.
    """
    gguf, config = library(), open_config(folder)
    of = architecture(config.model_type)
    names = stored_names(of, config.num_hidden_layers, moments)
    partial = path.with_name(f"{path.name}.partial")
    writer = gguf.GGUFWriter(partial, of.name)
    writer.kv_data[0].clear()  # of a model; llama.cpp writes no architecture here
    writer.add_type(gguf.GGUFType.IMATRIX)
    writer.add_array(gguf.Keys.IMatrix.DATASETS, [text])
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, max(1, tokens // CHUNK))
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, CHUNK)
    for name, target in names.items():
        sums = moments[name].double() * tokens
        writer.add_tensor(f"{target}.in_sum2", sums.float().reshape(1, -1).cpu().numpy())
        writer.add_tensor(f"{target}.counts", np.full((1, 1), tokens, np.float32))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
