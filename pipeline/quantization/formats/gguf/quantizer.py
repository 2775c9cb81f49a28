"""llama.cpp's quantizer as a process: `python -P quantizer.py SOURCE TARGET TYPE [IMPORTANCE_MATRIX]`.

Started by its path, so that it imports only llama-cpp-python, and `gguf` to read an importance matrix.
Prints a line "DONE TOTAL" for each tensor, and errors to standard error.
"""

from __future__ import annotations

import os
import re
import sys
from types import ModuleType
from typing import Any

# Bytes of a tensor, as float32 and quantized, that llama.cpp holds at a time; versions that know no such
# limit hold the widest tensor. The file's bytes do not depend on it.
BUFFER_BYTES = 64 << 20
ERROR = 4  # GGML_LOG_LEVEL_ERROR
PURE = {"Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S"}  # types of all layers, with embedding and output head in Q8_0
STEP = re.compile(rb"(\d+) (\d+)\n")  # a line of progress
_STEP = re.compile(rb"\[\s*(\d+)/\s*(\d+)\]")  # as llama.cpp tells of it
SUMS, COUNTS = ".in_sum2", ".counts"  # endings of the tensors of an importance matrix


def main(source: str, target: str, kind: str, matrix: str | None = None) -> int:
    """Quantize the file `source` to `target`; return 0 if llama.cpp succeeded.

    Args:
        kind: such as `Q4_K_M`; `Q4_K` and `Q5_K` give all layers the same type.
        matrix: a file of `importance_matrix.write_importance_matrix`; needs a version that `takes_importance`.
    """
    import ctypes

    import llama_cpp

    @llama_cpp.llama_log_callback
    def log(level, text, data):
        try:
            if step := _STEP.match(text):
                os.write(1, b"%s %s\n" % step.groups())
            elif level == ERROR:
                os.write(2, text)
        except OSError:  # the parent process has ended
            os._exit(1)

    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{PURE.get(kind, kind)}")
    if kind in PURE:
        settings.pure = True
        settings.token_embedding_type = settings.output_tensor_type = llama_cpp.GGML_TYPE_Q8_0
    if hasattr(settings, "max_buf_size"):
        settings.max_buf_size = BUFFER_BYTES
    if matrix:
        settings.imatrix = _importance(llama_cpp, matrix)
    return llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), settings)


def takes_importance(api: ModuleType) -> bool:
    """Return True if the C interface of this version of llama-cpp-python takes an importance matrix."""
    return hasattr(api, "llama_model_imatrix_data")


def _importance(api: ModuleType, path: str) -> Any:
    """Return the mean squares of each matrix's inputs as an array for the C interface; its last entry is empty."""
    import ctypes

    from gguf import GGUFReader

    stored = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    layers = [name.removesuffix(SUMS) for name in stored if name.endswith(SUMS)]
    found = (api.llama_model_imatrix_data * (len(layers) + 1))()
    for entry, name in zip(found, layers, strict=False):
        means = (stored[f"{name}{SUMS}"] / stored[f"{name}{COUNTS}"]).ravel().tolist()
        entry.name, entry.size = name.encode(), len(means)
        entry.data = (ctypes.c_float * len(means))(*means)
    return found


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
