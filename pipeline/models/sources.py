"""Sources of models: the Hub, a folder, or a GGUF file inside an installed package.

`fetch` brings any of them into a folder that holds an ordinary checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipeline.config.schema import PACKAGE_SOURCE, REPO_ID, Model
from pipeline.errors import HubError, ModelError
from pipeline.hub.client import OFFLINE
from pipeline.hub.download import RemoteFiles, download
from pipeline.models.checkpoint_files import (
    ADAPTER_FILES,
    MODEL_FILES,
    checkpoint_names,
    model_digest,
    read_config,
    weight_names,
)
from pipeline.models.packaged_gguf import find_packaged, unpack_gguf
from pipeline.models.provenance import Origin, read_origin
from pipeline.models.safe_loading import check_beside, check_config
from pipeline.system.files import sha256


def check_source(model: Model) -> None:
    """Raise an error if there is no model of that name; uses no network and no heavy imports.

    Raises:
        ModelError: naming the source and the way out.
    """
    package = PACKAGE_SOURCE.match(model.source)
    is_here = package or is_local(model.source)
    if model.revision is not None and is_here:
        raise ModelError(f"model.revision {model.revision!r}: is for models on the Hub; remove it")
    if model.low_disk and is_here:
        raise ModelError(
            f"model.source {model.source!r}: is on this machine already, and nothing of yours is removed; "
            "leave out --low-disk (model.low_disk)"
        )
    if package:
        find_packaged(*package.groups())
    elif is_here:
        _check_folder(Path(model.source).expanduser())
    elif not REPO_ID.match(model.source):
        raise ModelError(f"model.source {model.source!r}: not a folder here, and not a Hub id such as user/model")


def fetch(
    model: Model,
    folder: Path,
    on_progress: Callable[[int, int], None] | None = None,
    tell: Callable[[str], object] = print,
) -> tuple[Path, Origin]:
    """Bring the model to disk as an ordinary checkpoint.

    Args:
        folder: where a model that must be converted is put; Hub models stay in the Hub's cache. With
            `model.low_disk` the weights stay on the Hub.
        on_progress: called with the bytes that are here, and all bytes.
        tell: called with a line for each key of the model's card that cannot be read, and for tensors that are not.

    Returns:
        The checkpoint's folder, and where it came from.

    Raises:
        ModelError: if it is not a model that can be used, such as one without some of its tensors.
    """
    from pipeline.models.tensor_names import open_checkpoint

    if package := PACKAGE_SOURCE.match(model.source):
        return unpack_gguf(model.source, find_packaged(*package.groups()), folder)
    if is_local(model.source):
        path = Path(model.source).expanduser()
        _check_folder(path)
        open_checkpoint(path, tell=tell)
        return path, read_origin(path, model.source, path.resolve().name, tell=tell)
    path, revision = _download(model, on_progress)
    _check_folder(path, need_weights=not model.low_disk)
    if not model.low_disk:
        open_checkpoint(path, tell=tell)
    return path, read_origin(path, model.source, model.source, revision, model.source, tell)


def check_adapter(source: str) -> None:
    """Raise an error if there is no adapter of that name, without the network.

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
    """Return the folder of a LoRA adapter that was trained elsewhere, and its origin.

    A repository may have the adapter at its root or, as ours do, under `adapter/`.
    """
    check_adapter(source)
    if is_local(source, "merge.adapter"):
        path = Path(source).expanduser()
        return path, Origin(source, path.resolve().name)

    def choose(files: RemoteFiles) -> list[str]:
        names = files.sizes
        for prefix in ("", "adapter/"):
            if all(prefix + name in names for name in ADAPTER_FILES):
                return [prefix + name for name in ADAPTER_FILES]
        raise ModelError(f"{source}: has no {ADAPTER_FILES[1]}, neither at its root nor under adapter/")

    found = download(source, choose, revision, on_progress)
    folder = (found.folder / found.names[0]).parent
    return folder, Origin(source, source, found.revision, hub_id=source)


def digest_here(source: str) -> str:
    """Return a digest of a model on this machine, in a folder or in an installed package, reading all of it."""
    if package := PACKAGE_SOURCE.match(source):
        return sha256(find_packaged(*package.groups()))
    paths = [path for path in Path(source).expanduser().iterdir() if path.is_file()]
    return model_digest({path.name: sha256(path) for path in paths if MODEL_FILES.match(path.name)})


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


def model_files(files: RemoteFiles, prefix: str = "", with_weights: bool = True) -> list[str]:
    """Return the files of a repository that are fetched for a model. Of its weights only those that transformers reads.

    Args:
        prefix: beginning of the paths of the model's files.

    Raises:
        ModelError: if there are no such weights.
        HubError: if the Hub is switched off, and its cache lacks some of them.
    """
    try:
        weights = weight_names(files.repo, files.sizes, lambda name: files.path(name).read_bytes(), prefix)
    except ModelError:
        if files.folder:
            raise HubError(f"{files.repo}: its weights are not whole in the Hub's cache{OFFLINE}") from None
        raise
    return checkpoint_names(files.sizes, weights if with_weights else (), prefix)


def _download(model: Model, on_progress: Callable[[int, int], None] | None) -> tuple[Path, str]:
    def choose(files: RemoteFiles) -> list[str]:
        if model.low_disk and files.folder:
            raise HubError(f"{model.source}: --low-disk reads the weights from the Hub{OFFLINE}")
        return model_files(files, with_weights=not model.low_disk)

    found = download(model.source, choose, model.revision, on_progress)
    return found.folder, found.revision
