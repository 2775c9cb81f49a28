"""Where a model comes from: the Hub, a folder, or a GGUF inside an installed package.

`fetch` brings any of them to a folder that holds an ordinary checkpoint; the rest of
the house knows only such folders.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline.config.catalog import GROUP_SIZES
from pipeline.config.schema import PACKAGE_SOURCE, REPO_ID, Model
from pipeline.errors import ModelError
from pipeline.hub.download import download
from pipeline.models.layer_layouts import Layout, layout
from pipeline.models.packaged_gguf import find_packaged, unpack_gguf
from pipeline.models.provenance import Origin, read_origin
from pipeline.models.safe_loading import check_beside, check_config, open_config, read_settings
from pipeline.system.files import fingerprint, sha256

# Everything at a repository's root that belongs to a checkpoint, and no pickle among it.
CHECKPOINT_FILES = re.compile(r"^([\w.-]+\.(safetensors|json|jinja|model|txt|tiktoken)|README\.md)\Z")
TERMS_FILES = re.compile(r"^(LICEN[CS]E|USE_POLICY|NOTICE)[\w.-]*\Z", re.IGNORECASE)  # they go where the model goes
TOKENIZER_FILES = re.compile(
    r"^(tokenizer[\w.-]*|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|"
    r"chat_template\.jinja|[\w.-]+\.tiktoken)$"
)
MODEL_FILES = re.compile(  # those that another model would have otherwise
    rf"^([\w.-]+\.safetensors(\.index\.json)?|config\.json|generation_config\.json|[\w.-]+\.model)$|{TOKENIZER_FILES.pattern}"
)
PLAIN_TABLE = "Embedding"  # the kind of an embedding that looks rows up and does no more
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def check_source(model: Model) -> None:
    """Cheap checks before any work: is there something of that name? No network, no heavy import.

    Raises:
        ModelError: naming the source and the way out.
    """
    package = PACKAGE_SOURCE.match(model.source)
    if model.low_disk and (package or is_local(model.source)):
        raise ModelError(
            f"model.source {model.source!r}: is on this machine already, and nothing of yours is removed; "
            "leave out --low-disk (model.low_disk)"
        )
    if package:
        find_packaged(*package.groups())
    elif is_local(model.source):
        _check_folder(Path(model.source).expanduser())
    elif not REPO_ID.match(model.source):
        raise ModelError(f"model.source {model.source!r}: not a folder here, and not a Hub id such as user/model")


def fetch(model: Model, folder: Path, on_progress: Callable[[int, int], None] | None = None) -> tuple[Path, Origin]:
    """Bring the model to disk as an ordinary checkpoint.

    Args:
        folder: where a model that must be converted is put; Hub models stay in the Hub's cache. With
            `model.low_disk` the weights stay on the Hub.

    Returns:
        The checkpoint's folder, and where it came from.
    """
    if package := PACKAGE_SOURCE.match(model.source):
        return unpack_gguf(model.source, find_packaged(*package.groups()), folder)
    if is_local(model.source):
        path = Path(model.source).expanduser()
        _check_folder(path)
        return path, read_origin(path, model.source, path.resolve().name)
    path, revision = _download(model, on_progress)
    _check_folder(path, need_weights=not model.low_disk)
    return path, read_origin(path, model.source, model.source, revision, model.source)


def check_adapter(source: str) -> None:
    """Is there an adapter of that name? No network.

    Raises:
        ModelError: naming the source and the way out.
    """
    if not is_local(source, "merge.adapter"):
        if not REPO_ID.match(source):
            raise ModelError(f"merge.adapter {source!r}: not a folder here, and not a Hub id such as user/adapter")
        return
    for name in ADAPTER_FILES:
        if not (Path(source).expanduser() / name).is_file():
            raise ModelError(f"merge.adapter {source!r}: has no {name}, so this is not an adapter's folder")


def fetch_adapter(
    source: str, revision: str | None = None, on_progress: Callable[[int, int], None] | None = None
) -> tuple[Path, Origin]:
    """The folder of a LoRA adapter that was trained elsewhere, and where it came from.

    A repository may have the adapter at its root or, as ours do, under `adapter/`.
    """
    check_adapter(source)
    if is_local(source, "merge.adapter"):
        path = Path(source).expanduser()
        return path, Origin(source, path.resolve().name)

    def choose(names: list[str]) -> list[str]:
        for prefix in ("", "adapter/"):
            if all(prefix + name in names for name in ADAPTER_FILES):
                return [prefix + name for name in ADAPTER_FILES]
        raise ModelError(f"{source}: has no {ADAPTER_FILES[1]}, neither at its root nor under adapter/")

    found = download(source, choose, revision, on_progress)
    folder = (found.folder / found.names[0]).parent
    return folder, Origin(source, source, found.revision, hub_id=source)


def linear_weights(folder: Path) -> dict[str, tuple[int, int]]:
    """Return names and shapes (N, K) of the weights that may be quantized: linear layers without the output head.

    `models.layer_layouts` tells them for well-known architectures; other models are built with transformers, on the
    meta device, which takes seconds to import and no memory for weights.

    Raises:
        ModelError: if transformers cannot build the model.
    """
    if known := _layout(folder):
        return known.linear
    import torch

    model = _skeleton(folder)
    head = model.get_output_embeddings()
    return {
        f"{name}.weight": tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def table_weights(folder: Path) -> dict[str, tuple[int, int]]:
    """Return names and shapes (V, H) of the embedding and of an output head that is a weight of its own.

    Raises:
        ModelError: if transformers cannot build the model.
    """
    if known := _layout(folder):
        return known.tables
    model = _skeleton(folder)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = (embedding,) if model.config.get_text_config().tie_word_embeddings else (embedding, head)
    return {f"{n}.weight": tuple(m.weight.shape) for n, m in model.named_modules() if any(m is t for t in tables)}


def embedding_kind(model: Path | Mapping) -> str:
    """Return `PLAIN_TABLE` if the embedding only looks rows up, otherwise the name of its class.

    Args:
        model: a checkpoint's folder, or what its `config.json` says.

    Raises:
        ModelError: if transformers cannot build the model.
    """
    if (known := _layout(model)) and known.plain_embedding:
        return PLAIN_TABLE
    return type(_skeleton(model).get_input_embeddings()).__name__


def refuse_other_matrices(model: Path | Mapping) -> None:
    """Raise where a model computes with large matrices that are no linear layers, such as stacked experts.

    Neither transformers nor this project quantizes those, and a variant that keeps most of the
    model in bf16 is none.

    Args:
        model: a checkpoint's folder, or what its `config.json` says.

    Raises:
        ModelError: naming the first of them.
    """
    if _layout(model):
        return
    import torch

    known = (torch.nn.Linear, torch.nn.Embedding, torch.nn.modules.conv._ConvNd)
    for name, module in _skeleton(model).named_modules():
        for part, parameter in module.named_parameters(recurse=False):
            is_matrix = parameter.ndim >= 2 and min(parameter.shape[-2:]) >= min(GROUP_SIZES)
            if is_matrix and not isinstance(module, known):
                raise ModelError(
                    f"{_named(model)}: {name}.{part} {tuple(parameter.shape)} belongs to a {type(module).__name__}, "
                    "not to a linear layer; such models are not quantized"
                )


def _layout(model: Path | Mapping) -> Layout | None:
    """Return the layout of a well-known architecture, or None if transformers has to build the model."""
    try:
        return layout(read_config(model) if isinstance(model, Path) else model)
    except ModelError:  # transformers says what is wrong with the file
        return None


def _skeleton(model: Path | Mapping):
    """The model without its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = open_config(model) if isinstance(model, Path) else AutoConfig.for_model(**model)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:  # a configuration from anywhere makes it raise anything
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise ModelError(f"{_named(model)}: transformers cannot build this model: {reason}") from None


def _named(model: Path | Mapping) -> object:
    return model if isinstance(model, Path) else model.get("model_type")


def stored_bytes(folder: Path) -> int:
    """Size of a checkpoint's weights on disk, in bytes; of a GGUF's file where it is one."""
    files = list(folder.glob("*.safetensors")) or folder.glob("*.gguf")
    return sum(path.stat().st_size for path in files)


def model_digest(files: Mapping[str, str]) -> str:
    """A digest of the model at the root of a folder or repository, from the hashes of all files there by path."""
    return fingerprint({path: digest for path, digest in files.items() if MODEL_FILES.match(path)})


def digest_here(source: str) -> str:
    """A digest of a model that lies on this machine, in a folder or in an installed package; it is read whole."""
    if package := PACKAGE_SOURCE.match(source):
        return sha256(find_packaged(*package.groups()))
    paths = [path for path in Path(source).expanduser().iterdir() if path.is_file()]
    return model_digest({path.name: sha256(path) for path in paths if MODEL_FILES.match(path.name)})


def companions(source: Path) -> list[Path]:
    """The tokenizer, its chat template, the generation settings and the terms of use beside a checkpoint."""
    return [
        path
        for path in sorted(source.iterdir())
        if TOKENIZER_FILES.match(path.name) or TERMS_FILES.match(path.name) or path.name == "generation_config.json"
        if path.is_file()
    ]


def copy_companions(source: Path, target: Path) -> None:
    """Copy what belongs to a checkpoint beside its weights and configuration."""
    for path in companions(source):
        _copy(path, target / path.name)
    settings = target / "tokenizer_config.json"
    if settings.is_file() and "auto_map" in (told := read_settings(settings)):  # code that is not published
        told.pop("auto_map")
        settings.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_terms(source: Path, target: Path) -> None:
    """Copy the terms of use that lie beside a checkpoint, which go where its weights go."""
    for path in companions(source):
        if TERMS_FILES.match(path.name):
            _copy(path, target / path.name)


def _copy(path: Path, target: Path) -> None:
    """Copy a file that will be published: of this folder, or of the Hub's cache, in which all are links.

    Raises:
        ModelError: for a link to anywhere else, by which any file of this machine could be published.
    """
    real, folder = path.resolve(), path.parent.resolve()
    if folder not in real.parents and real.parent != folder.parents[1] / "blobs":
        raise ModelError(f"{path}: a link to {real}, outside its folder, and would be published; copy it there")
    shutil.copyfile(real, target)


def read_config(folder: Path) -> dict:
    """`config.json` of a checkpoint, as plain data."""
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder}: no config.json, so this is not a model's folder")
    return read_settings(folder / "config.json")


def belongs_to_checkpoint(name: str) -> bool:
    """Is a file at a repository's root fetched with a model? An adapter that lies there too is another's."""
    return name not in ADAPTER_FILES and bool(CHECKPOINT_FILES.match(name) or TERMS_FILES.match(name))


def is_local(source: str, key: str = "model.source") -> bool:
    """Return True if `source` names a folder on this machine, present or not."""
    path, is_folder = _as_folder(source, f"{key} {source[:80]!r}")
    return is_folder or path.is_absolute() or source.startswith((".", "~"))


def local_folder(source: str) -> Path | None:
    """Return the folder that `source` names, or None if it names a repository.

    Raises:
        ModelError: if it names neither.
    """
    path, is_folder = _as_folder(source, source[:80])
    if not is_folder and not REPO_ID.match(source):
        raise ModelError(f"{source}: neither a folder here nor a repository such as user/model")
    return path if is_folder else None


def _as_folder(source: str, name: str) -> tuple[Path, bool]:
    """Return `source` as a path, and True if a folder is there; errors begin with `name`."""
    try:
        path = Path(source).expanduser()
        return path, path.is_dir()
    except (OSError, RuntimeError) as error:  # a name too long for a folder; a home of nobody
        raise ModelError(f"{name}: not a folder ({error.args[-1]})") from None


def _check_folder(path: Path, need_weights: bool = True) -> None:
    if not path.is_dir():
        raise ModelError(f"model.source {str(path)!r}: no such folder")
    check_config(path, read_config(path))
    if need_weights and not any(path.glob("*.safetensors")):
        raise ModelError(f"{path}: no .safetensors file; pickled weights are not read, convert them first")
    check_beside(path)


def _download(model: Model, on_progress: Callable[[int, int], None] | None) -> tuple[Path, str]:
    def choose(names: list[str]) -> list[str]:
        wanted = [name for name in names if belongs_to_checkpoint(name)]
        if not any(name.endswith(".safetensors") for name in wanted):
            raise ModelError(f"{model.source}: no .safetensors at its root; pickled weights are not read")
        return [name for name in wanted if not (model.low_disk and name.endswith(".safetensors"))]

    found = download(model.source, choose, model.revision, on_progress)
    return found.folder, found.revision
