"""The peers of the accuracy benchmark: files of llama.cpp's own quantizer, without and with an importance matrix.

They are made of the same full-precision model, and measured by the same functions on the same tokens as ours. The
importance matrix has the second moments of the same calibration text. Each file is made and measured once.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path

from accuracy_making import Row, base_folder, silent
from accuracy_ways import Peer
from process_memory import Watch

from pipeline.config.schema import Config, VariantSpec
from pipeline.errors import ConfigError, MissingExtra
from pipeline.evaluation.model_result import ModelResult
from pipeline.system.files import empty_folder, fingerprint, read_json, states, write_json
from pipeline.workflow.workspace import Workspace


def check_peers(peers: list[Peer]) -> tuple[list[Peer], str | None]:
    """Refuse peers that cannot be made here.

    Returns:
        The peers that can be made, and why there are none with an importance matrix if llama.cpp takes none.

    Raises:
        MissingExtra: if llama-cpp-python is not installed.
        ConfigError: naming a type that llama.cpp does not know.
    """
    from pipeline.inference import llama_cpp
    from pipeline.quantization.formats.gguf.quantizer import PURE, takes_importance
    from pipeline.system.libraries import versions

    if not peers:
        return [], None
    if not llama_cpp.is_installed():
        raise MissingExtra("--peers", "llama-cpp")
    api, package = llama_cpp.library(), "llama-cpp-python"
    for peer in peers:
        if peer.kind not in PURE and not hasattr(api, f"LLAMA_FTYPE_MOSTLY_{peer.kind}"):
            raise ConfigError(f"--peers {peer.kind}: llama.cpp has no such type")
    plain = [peer for peer in peers if not peer.has_matrix]
    if takes_importance(api) or plain == peers:
        return peers, None
    version = versions(package)[package]
    return plain, f"importance matrix: not possible through the C interface of {package} {version}"


class Peers:
    """The files of llama.cpp's own quantizer.

    Args:
        base: the run that measured the full-precision model.
        output: the benchmark's folder.
        moments: returns the run of a variant that is calibrated with second moments.
    """

    def __init__(self, config: Config, base: Workspace, output: Path, moments: Callable[[], Workspace]):
        self._config, self._base, self._output, self._moments = config, base, output / "llama.cpp", moments

    def make(self, peer: Peer) -> tuple[Path, list[Row]]:
        """Make and measure one file, unless that is done, and return its folder and its row.

        Raises:
            QuantizationError: with the reason that llama.cpp gives.
        """
        from pipeline.evaluation.evaluate import evaluate
        from pipeline.quantization.formats.gguf import k_quants, quantizer
        from pipeline.workflow.stages.inputs import run_texts

        folder = self._output / f"{peer.kind}{'-imatrix' if peer.has_matrix else ''}"
        full, making = self._full
        matrix = None
        if peer.has_matrix:
            matrix, more = self._matrix
            making = making | more
        file, notes = folder / f"model-{peer.kind}.gguf", folder / "row.json"
        kept = read_json(notes, {})
        if not file.exists():
            empty_folder(folder)
            start = time.perf_counter()
            with Watch(os.getpid(), lambda words: "it" if quantizer.__file__ in words else None) as watch:
                k_quants.quantize(full, folder / "partial", peer.kind, lambda done, total: None, matrix)
            kept = {"quantize": _taken(start, watch.peaks.get("it"))}
            write_json(notes, kept)
            os.replace(folder / "partial", file)
        about = fingerprint([states([file]), self._config.evaluate.model_dump(mode="json")])
        if kept.get("about") != about:
            texts = run_texts(self._base)
            result = evaluate(peer.label, folder, self._config, texts, silent, base_folder(self._base))
            kept |= {"about": about, "result": result.to_json()}
            write_json(notes, kept)
        result = ModelResult.model_validate(kept["result"])
        kind = f"llama.cpp, {'with' if peer.has_matrix else 'without'} importance matrix"
        steps = {**making, "quantize": kept["quantize"]}
        return folder, [Row(peer.label, kind, result, folder, steps, is_peer=True)]

    @functools.cached_property
    def _full(self) -> tuple[Path, dict]:
        """The model in full precision as GGUF, and what it took."""
        from pipeline.models.matrices import linear_weights
        from pipeline.quantization.writer import quantize_checkpoint

        spec, folder, source = VariantSpec(name="gguf-bf16").resolved(), self._output / "full", base_folder(self._base)
        notes = folder / "making.json"
        if not notes.is_file():
            start = time.perf_counter()
            quantize_checkpoint(source, [spec], {spec.name: empty_folder(folder)}, linear_weights(source))
            write_json(notes, {"convert": _taken(start, None)})
        return next(folder.glob("*.gguf")), read_json(notes, {})

    @functools.cached_property
    def _matrix(self) -> tuple[Path, dict]:
        """The importance matrix, and what its statistics took."""
        from pipeline.quantization.calibration.store import read_statistics
        from pipeline.quantization.formats.gguf.importance_matrix import write_importance_matrix
        from pipeline.workflow.stages.calibrate import FOLDER, STATISTICS

        run, path = self._moments(), self._output / "imatrix.gguf"
        tokens = run.ledger()["calibrate"].summary["tokens"]
        found, _ = read_statistics(run.folder / FOLDER / STATISTICS)
        moments = {name: of.second_moments for name, of in found.items()}
        write_importance_matrix(path, moments, tokens, base_folder(self._base))
        return path, {"calibrate": read_json(run.folder.parent / "making.json", {}).get("calibrate", {})}


def _taken(start: float, peak: int | None) -> dict:
    return {"seconds": time.perf_counter() - start, "peak_memory_bytes": peak}
