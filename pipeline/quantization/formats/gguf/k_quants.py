"""K-quants: the pass writes the model in its own types, and the quantizer of llama.cpp makes the variant.

llama.cpp chooses the type of each tensor, as people expect of such a file. The types are read back from the file.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from pipeline.config.schema import VariantSpec
from pipeline.errors import QuantizationError
from pipeline.models.checkpoint_files import copy_terms
from pipeline.models.gguf_metadata import read_header
from pipeline.quantization.formats.gguf import quantizer
from pipeline.quantization.formats.gguf.blocks import PLAIN
from pipeline.quantization.formats.gguf.file import GgufFile
from pipeline.quantization.layers import Output, Source, Tell, VariantFiles

_FAILURE = re.compile(r"GGML_ASSERT|error|failed", re.IGNORECASE)


class FullFile(GgufFile):
    """The model in its own types, from which all K-quants of a pass are made."""

    is_temporary = True

    @staticmethod
    def file_name(spec: VariantSpec, source: Source) -> str:
        """Return the name of the temporary file."""
        return f"{source.name}.gguf.full"

    def remove(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)


class KQuantsFile(Output):
    """One output of a pass that takes no rows: `finish` makes the file from a full one."""

    def __init__(self, spec: VariantSpec, folder: Path, full: GgufFile):
        self.spec, self.full, self.made_of = spec, full, (full,)
        self.path = folder / GgufFile.file_name(spec, full.source)

    def __enter__(self) -> KQuantsFile:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        pass

    def rounds(self, name: str) -> bool:
        """Return True for every matrix, so that its values are checked."""
        return name in self.full.names and len(self.full.source.tensors[name].shape) > 1

    def together(self, name: str) -> int:
        """Return 1, because no rows are taken."""
        return 1

    def take(self, name: str, rows: torch.Tensor, first: int) -> None:
        """Take no rows; the full file has them."""

    def finish(self, model: Path, tell: Tell | None = None) -> None:
        """Quantize the full file with llama.cpp, and put the license beside the result."""
        partial = self.path.with_name(f"{self.path.name}.partial")
        what = f"quantizing {self.spec.name} with llama.cpp"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            quantize(
                self.full.path,
                partial,
                self.spec.variant.file_type or "",
                lambda d, t: tell(d, t, what) if tell else None,
            )
            os.replace(partial, self.path)
        except OSError as error:
            raise QuantizationError(f"{self.path}: cannot be written ({error.strerror})") from None
        finally:
            partial.unlink(missing_ok=True)
        copy_terms(model, self.path.parent)

    def describe(self) -> VariantFiles:
        """Return the figures of the written file."""
        stored = read_header(self.path).tensors
        sizes = {name: tensor.nbytes for name, tensor in stored.items() if tensor.kind not in PLAIN}
        before = sum(
            self.full.source.tensors[name].nbytes for name, target in self.full.names.items() if target in sizes
        )
        types = dict(Counter(tensor.kind for tensor in stored.values()))
        return VariantFiles(sum(sizes.values()), before, 0, {}, (), types)


def quantize(
    source: Path, target: Path, kind: str, on_progress: Callable[[int, int], None], matrix: Path | None = None
) -> None:
    """Quantize a GGUF with llama.cpp; the new file is on the disk when this returns.

    It runs in a process of its own, because a call into it cannot be stopped, and may abort the process.

    Args:
        kind: such as `Q4_K_M`.
        on_progress: called with tensors done and tensors in all.
        matrix: an importance matrix, as `importance_matrix` writes it.

    Raises:
        QuantizationError: with the reason that llama.cpp gives.
    """
    arguments = [str(source), str(target), kind, *([str(matrix)] if matrix else [])]
    command = [sys.executable, "-P", quantizer.__file__, *arguments]
    # Errors go to a file, because a pipe that is not read would block the process.
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints) as process,
    ):
        try:
            for line in process.stdout or ():
                if step := quantizer.STEP.fullmatch(line):
                    on_progress(*map(int, step.groups()))
        except BaseException:
            process.kill()
            raise
        if process.wait():
            complaints.seek(0)
            reason = _reason(complaints) or f"it ended with {process.returncode}"
            raise QuantizationError(f"{target.name}: llama.cpp could not quantize to {kind}: {reason}")
    with open(target, "rb") as file:
        os.fsync(file.fileno())


def _reason(complaints: Iterable[bytes]) -> str | None:
    """Return the line with the reason among those that llama.cpp and its libraries print."""
    lines = (line.decode(errors="replace").strip() for line in complaints)
    return next((line for line in lines if _FAILURE.search(line)), None)
