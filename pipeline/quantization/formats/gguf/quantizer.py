"""llama.cpp's quantizer as a process: `python -P quantizer.py SOURCE TARGET TYPE`.

Started by `pipeline.quantization.formats.gguf.k_quants` alone, and by its path, so that it imports nothing
but llama-cpp-python. Prints a line "DONE TOTAL" for each tensor; what goes wrong goes to standard error.
"""

from __future__ import annotations

import os
import re
import sys

# Bytes of a tensor, as float32 and quantized, that llama.cpp holds at a time; versions that know no such
# limit hold the widest tensor. The file's bytes do not depend on it.
BUFFER_BYTES = 64 << 20
ERROR = 4  # GGML_LOG_LEVEL_ERROR
STEP = re.compile(rb"(\d+) (\d+)\n")  # a line of progress
_STEP = re.compile(rb"\[\s*(\d+)/\s*(\d+)\]")  # as llama.cpp tells of it


def main(source: str, target: str, kind: str) -> int:
    """Quantize the file `source` to `target`; return 0 if llama.cpp succeeded."""
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
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if hasattr(settings, "max_buf_size"):
        settings.max_buf_size = BUFFER_BYTES
    return llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), settings)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
