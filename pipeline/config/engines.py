"""The engines that run published models, and what each of them needs. It imports nothing heavy.

A variant names the engines that run it in its row of the catalogue, as a list of `Runs`. Plan, cards, wizard and
documentation read them there. An engine that no `Runs` of a variant names cannot open that variant.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

TRANSFORMERS = "transformers"  # the engine that runs variants unless they name others
TUNEPRESS = "tunepress"
VLLM = "vllm"
SGLANG = "sglang"
LLAMA_CPP = "llama.cpp"
OLLAMA = "ollama"

CPU = "CPU"
CUDA = "CUDA"
GPU = "GPU"  # of any kind that llama.cpp supports
ONLY_STORED = "stored only"  # the engine opens the variant, but has no kernel that computes with it
GENERATIONS = {6.0: "Pascal", 7.0: "Volta", 7.5: "Turing", 8.0: "Ampere", 8.9: "Ada", 9.0: "Hopper", 10.0: "Blackwell"}
FP8_CAPABILITY = 8.9  # the lowest CUDA compute capability with kernels for float8


@dataclass(frozen=True)
class Engine:
    """A program that runs models.

    Templates name `{repo}`, `{folder}` (a variant's folder on this machine), `{file}` (a variant that is one file),
    `{type}` (its file type) and `{flags}`.

    Attributes:
        serve: the template of the command that serves a folder or a file on this machine; empty if code runs it.
        from_hub: the template of the command that fetches one file from the Hub and serves it.
        fuses: True if it computes the layers of `FUSED` as one, so that they must be stored alike.
    """

    label: str
    serve: str = ""
    from_hub: str = ""
    fuses: bool = False


ENGINES: dict[str, Engine] = {
    TRANSFORMERS: Engine("transformers"),
    TUNEPRESS: Engine("`pipeline.load`"),
    VLLM: Engine("vLLM", "vllm serve {folder}{flags}", fuses=True),
    SGLANG: Engine("SGLang", "python -m sglang.launch_server --model-path {folder}{flags}", fuses=True),
    LLAMA_CPP: Engine("llama.cpp", "llama-server -m {file}", "llama-server -hf {repo}:{type}"),
    OLLAMA: Engine("Ollama, LM Studio", from_hub="ollama run hf.co/{repo}:{type}"),
}
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))  # layers of one block
# Servers read the root of a repository or a local folder, so they need the folder of a variant on this machine.
FETCH = "hf download {repo} --include {files} --local-dir {target}"


@dataclass(frozen=True)
class Runs:
    """A way in which an engine runs a variant.

    Attributes:
        engine: key of `ENGINES`.
        hardware: `CPU`, `CUDA` or `GPU`.
        capability: the lowest compute capability of a CUDA card; 0 for any.
        packages: further packages that it needs, with their lowest versions.
        columns: the widths of all quantized layers must be a multiple of this.
        rows: the rows of all quantized layers must be a multiple of this.
        flags: further arguments of the command that serves it.
        experts: False if it has no kernel for mixtures of experts in this format.
        experimental: True if the engine's own documentation calls it experimental, or nobody tested it.
        computes: False if the engine opens the variant there, but has no kernel that computes with it.
    """

    engine: str
    hardware: str
    capability: float = 0
    packages: tuple[str, ...] = ()
    columns: int = 1
    rows: int = 1
    flags: str = ""
    experts: bool = True
    experimental: bool = False
    computes: bool = True

    def misfit(self, shapes: Iterable[Sequence[int]], has_experts: bool = False) -> str | None:
        """Return the reason why these layers do not fit the kernel, in words; None if they do.

        Args:
            shapes: (rows, columns) of the quantized layers.
            has_experts: True if experts are among them.
        """
        if has_experts and not self.experts:
            return "experts in this format have no kernel there"
        for rows, columns in sorted({(shape[0], shape[1]) for shape in shapes}):
            if columns % self.columns:
                return f"{columns} columns are not a multiple of {self.columns}"
            if rows % self.rows:
                return f"{rows} rows are not a multiple of {self.rows}"
        return None

    @property
    def place(self) -> str:
        """Return its hardware in words: `CUDA from Ada`."""
        if not self.capability:
            return self.hardware
        return f"{self.hardware} from {GENERATIONS.get(self.capability, f'compute capability {self.capability:.1f}')}"

    @property
    def said(self) -> str:
        """Return what there is to say beyond its hardware: ` with torchao (experimental)`."""
        if not self.computes:
            return f" ({ONLY_STORED})"
        packages = f" with {' and '.join(self.packages)}" if self.packages else ""
        return f"{packages} (experimental)" if self.experimental else packages


def tell(
    ways: Iterable[Runs], engine: str, shapes: Collection[Sequence[int]], has_experts: bool = False
) -> list[tuple[str, str | None]]:
    """Return how an engine runs a variant, in words, each with the reason why it does not with these layers.

    `[("CPU, CUDA with torchao", None)]`: the last word says what all of its hardware needs.

    Args:
        shapes: (rows, columns) of the quantized layers.
        has_experts: True if experts are among them.
    """
    found = []
    of_engine = [way for way in ways if way.engine == engine]
    for (said, misfit), alike in groupby(of_engine, lambda way: (way.said, way.misfit(shapes, has_experts))):
        hardware = ", ".join(way.place for way in alike)
        found.append((hardware if misfit else hardware + said, misfit))
    return found


def misfits(ways: Sequence[Runs], shapes: Collection[Sequence[int]], has_experts: bool = False) -> list[str]:
    """Return lines about the engines that do not run a variant with these layers: `does not run in: vLLM on CUDA, ...`.

    Args:
        shapes: (rows, columns) of the quantized layers.
        has_experts: True if experts are among them.
    """
    found: dict[str, list[str]] = {}
    for engine, row in ENGINES.items():
        for hardware, why in tell(ways, engine, shapes, has_experts):
            if why:
                found.setdefault(why, []).append(f"{row.label.strip('`')} on {hardware}")
    return [f"does not run in: {'; '.join(where)}, because {why}" for why, where in found.items()]


def on(engine: str, *hardware: str, **needs: object) -> tuple[Runs, ...]:
    """Return the ways of an engine that has the same needs on several kinds of hardware.

    Args:
        needs: further fields of `Runs`.
    """
    return tuple(Runs(engine, kind, **needs) for kind in hardware)  # type: ignore[arg-type]  # fields by name


EVERYWHERE = (*on(TRANSFORMERS, CPU, CUDA), *on(TUNEPRESS, CPU, CUDA))
TORCHAO = (*on(TRANSFORMERS, CPU, CUDA, packages=("torchao",)), *on(TUNEPRESS, CPU, CUDA))
FULL_PRECISION = (*EVERYWHERE, *on(VLLM, CPU, CUDA), *on(SGLANG, CUDA))  # an ordinary checkpoint of bf16
# vLLM reads torchao's tensors if it is told so; its own tests do no more than that.
TORCHAO_IN_VLLM = on(
    VLLM, CUDA, packages=("torchao>=0.15",), flags=" --quantization torchao", experts=False, experimental=True
)
GGUF_ENGINES = (
    *on(LLAMA_CPP, CPU, GPU),
    *on(OLLAMA, CPU, GPU),
    *on(VLLM, CUDA, packages=("vllm-gguf-plugin",), experimental=True),
    *on(SGLANG, CUDA, experimental=True),
)
