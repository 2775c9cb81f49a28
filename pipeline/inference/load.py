"""Loading of a published model or variant, packed for this machine.

The portable codes are read layer by layer. Each layer becomes the fastest one for this machine,
or an ordinary one with dequantized weights.
"""

from __future__ import annotations

import fnmatch
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pipeline.config.catalog import TRANSFORMERS, VARIANTS, resolve_variants
from pipeline.errors import CheckpointError, ModelError
from pipeline.hub.download import RemoteFiles, download
from pipeline.models.checkpoint_files import read_config
from pipeline.models.safe_loading import check_beside, check_code, open_config, open_model, open_tokenizer
from pipeline.models.sources import local_folder, model_files
from pipeline.quantization.formats import FileWeights, format_of_file, settle, unpack
from pipeline.system.libraries import quiet, quiet_progress_bars

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipeline.quantization.grid import GroupQuantized


def load(
    source: str | Path,
    variant: str | None = None,
    device: str = "auto",
    revision: str | None = None,
    offload: bool | Literal["auto"] = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model and its tokenizer, ready to generate on this machine.

    Args:
        source: a repository `user/model`, a run's folder, or any folder with a model.
        variant: `int8`, `int4`, ...; None for the full-precision model at the root.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`. The type of the weights does not depend on it: a CPU
            without bfloat16 instructions computes bfloat16 weights in float32, block by block, but a GPU whose
            compute type is float16 (`machine.compute_dtype`) still computes them in bfloat16, slowly.
        revision: branch, tag or commit of a repository.
        offload: leave the weights in their files, and read those of a layer whenever it computes. This is for
            measuring in little memory. `auto` does so if the model does not fit into the memory.
            The `device` of the model is then `meta`; `pipeline.inference.output_head.device_of` returns the real one.

    Raises:
        ModelError: if no such model or variant exists, or if it is for llama.cpp.

    Example:
        >>> model, tokenizer = load("user/model", variant="int4")
    """
    quiet()
    if variant is not None and (engine := engine_of(variant)) != TRANSFORMERS:
        raise ModelError(f"{variant}: is for {engine}, not for transformers; {_opening(source, variant)}")
    return _load(locate(source, variant, revision), device_named(device), offload)


def load_dequantized(
    file: Path, folder: Path, device: str = "auto", offload: bool | Literal["auto"] = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model in `folder` with the dequantized weights of a GGUF file that was made of it.

    Args:
        device, offload: as `load` takes them.

    Raises:
        ModelError: if the file is damaged, or of another model.
        MissingExtra: if the package `gguf` is not installed.
    """
    quiet()
    from pipeline.inference.assemble import own_type
    from pipeline.models.tensor_names import open_checkpoint

    config = open_config(folder)
    try:
        checkpoint = open_checkpoint(folder)
        weights = format_of_file(file).weights_of_file(file, checkpoint, own_type(config, checkpoint.values()))
    except CheckpointError as error:
        raise ModelError(str(error)) from None
    return _load(folder, device_named(device), offload, weights)


def _load(
    folder: Path, target: torch.device, offload: bool | Literal["auto"], weights: FileWeights | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from safetensors import SafetensorError

    from pipeline.inference import kernels
    from pipeline.inference.assemble import assemble
    from pipeline.inference.offload import assemble_offloaded, fits

    quiet_progress_bars()
    try:
        if offload is True or (offload == "auto" and not fits(folder, target)):
            model = assemble_offloaded(folder, target, weights)
        else:
            model = assemble(folder, target, weights) or _load_stock(folder, target)
        tokenizer = open_tokenizer(folder)
    except CheckpointError as error:
        raise ModelError(str(error)) from None
    except (ImportError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"{folder}: transformers cannot load it: {reason}") from None
    model.eval().requires_grad_(False)
    if target.type == "cpu":
        kernels.quicken(model)
    return model, tokenizer


def _load_stock(folder: Path, device: torch.device) -> PreTrainedModel:
    """Load a model with transformers, and pack its layers if it is quantized."""
    import torch

    from pipeline.models.checkpoint.header import read_header

    for path in sorted(folder.glob("*.safetensors")):
        read_header(path)  # refuses a file that was cut off, with its name

    # bitsandbytes would choose the GPU by itself.
    place = {"": device} if device.type == "cpu" and torch.cuda.is_available() else None
    model = open_model(folder, dtype="auto", device_map=place)
    if getattr(model.config, "quantization_config", None) is not None:
        settle(model)
        pack(model, device)
    return cast(Any, model).to(device)


def pack(model: PreTrainedModel, device: torch.device) -> dict[str, int]:
    """Replace every quantized layer of a stock-loaded model, layer by layer, and move it to `device`.

    Returns:
        The number of layers by the class name of their replacement.
    """
    import torch

    from pipeline.inference.assemble import place

    used: dict[str, int] = {}
    for name, module in list(model.named_modules()):
        replaced = model.get_submodule(name) is not module  # a tied head goes with its embedding
        known = isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) and not replaced
        found = unpack(module.weight.data) if known else None
        if found is not None:
            weight, form = found
            kind = place(model, name, weight, device, functools.partial(_same, weight), form)
            used[kind] = used.get(kind, 0) + 1
    cast(Any, model).to(device)
    return used


def _same(weight: GroupQuantized) -> GroupQuantized:
    return weight


def locate(source: str | Path, variant: str | None = None, revision: str | None = None) -> Path:
    """Return the folder with the files of a model or of one of its variants; they are downloaded if needed."""
    name = variant and _name(variant)
    if path := _local(source):
        folder = path / name if name else path
        if not (folder / "config.json").is_file():
            there = sorted(p.parent.name for p in path.glob("*/config.json"))
            raise ModelError(f"{folder}: no model there; variants in {path}: {', '.join(there) or 'none'}")
    else:
        folder = _fetch(str(source), name, revision)
    check_code(folder, read_config(folder))
    check_beside(folder)
    return folder


def engine_of(variant: str | None) -> str:
    """Return the engine that runs a variant; None is the full-precision model.

    Raises:
        ModelError: if there is no such variant.
    """
    return TRANSFORMERS if variant is None else VARIANTS[_name(variant)].engine


def locate_file(source: str | Path, variant: str, revision: str | None = None) -> Path:
    """Return the .gguf file of a variant; it is downloaded if needed.

    Raises:
        ModelError: if there is no such file.
    """
    pattern = _pattern(variant)
    if path := _local(source):
        found = sorted(path.glob(pattern))
        if not found:
            there = ", ".join(sorted(p.name for p in path.glob(_any_file(variant))))
            raise ModelError(f"{path}: no {pattern}; files for llama.cpp there: {there or 'none'}")
        return found[0]

    def choose(files: RemoteFiles) -> list[str]:
        names = list(files.sizes)
        wanted = sorted(fnmatch.filter(names, pattern))[:1]
        if not wanted:
            there = ", ".join(sorted(fnmatch.filter(names, _any_file(variant))))
            raise ModelError(f"{source}: no {pattern}; files for llama.cpp there: {there or 'none'}")
        return wanted

    snapshot = download(str(source), choose, revision)
    return snapshot.folder / snapshot.names[0]


def _opening(source: str | Path, variant: str) -> str:
    """Return the command or call that opens a variant in llama.cpp."""
    if _local(source):
        return f"open it with: llama-cli -m {locate_file(source, variant)}"
    return f"open it with: llama_cpp.Llama.from_pretrained({str(source)!r}, filename={_pattern(variant)!r})"


def _pattern(variant: str) -> str:
    found = VARIANTS[_name(variant)]
    return f"{found.folder}/*-{found.file_type}{found.suffix}"


def _any_file(variant: str) -> str:
    found = VARIANTS[_name(variant)]
    return f"{found.folder}/*{found.suffix}"


def _name(variant: str) -> str:
    try:
        (name,) = resolve_variants(variant)
    except (KeyError, ValueError):
        raise ModelError(f"variant {variant!r}: not one that tunepress makes. Try: {', '.join(VARIANTS)}") from None
    return name


def _local(source: str | Path) -> Path | None:
    """Return the folder of a release on this machine, or None if `source` is a repository."""
    path = local_folder(str(source))
    if path and (path / "config.yaml").is_file() and (path / "release").is_dir():
        return path / "release"  # of a run's folder
    return path


def _fetch(repo: str, variant: str | None, revision: str | None) -> Path:
    prefix = f"{variant}/" if variant else ""

    def choose(files: RemoteFiles) -> list[str]:
        if f"{prefix}config.json" not in files.sizes:
            there = sorted({n.split("/")[0] for n in files.sizes if n.endswith("/config.json")})
            raise ModelError(f"{repo}: no variant {variant!r}; there are: {', '.join(there) or 'none'}")
        return model_files(files, prefix)

    folder = download(repo, choose, revision).folder
    return folder / prefix


def device_named(name: str) -> torch.device:
    """Return the device of that name; `auto` is CUDA if available, else the CPU.

    Raises:
        ModelError: if this machine has no such device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ModelError(f"device {name!r}: use auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {name!r}: torch finds no CUDA here; use cpu, or install a CUDA build of torch")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices here, counted from 0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError(f"device {name!r}: torch finds no MPS here; use cpu")
    return device
