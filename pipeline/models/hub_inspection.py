"""Checks of a repository on the Hub by its metadata and `config.json`, without its weights."""

from __future__ import annotations

from collections.abc import Collection

from pipeline.errors import ModelError
from pipeline.hub.download import in_one_line, remote_files
from pipeline.models.checkpoint_files import ADAPTER_FILES, read_config
from pipeline.models.safe_loading import check_config
from pipeline.system.command_names import command


def inspect(repo: str, revision: str | None = None) -> str:
    """Raise an error if no variants can be made from a repository, before gigabytes of it are downloaded.

    Returns:
        The commit that `revision`, or the head of the main branch, is.

    Raises:
        ModelError: if it is not there or gated, has no weights that are read, or is of another kind.
        HubError: if the Hub cannot be reached.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    with in_one_line(repo, revision, "not a folder here, and the Hub could not be read"):
        try:
            files = remote_files(repo, revision, with_sizes=False)
        except RepositoryNotFoundError as error:
            if not isinstance(error, GatedRepoError) and _is_dataset(repo):
                raise ModelError(f"{repo}: a data set, and no model") from None
            raise
        _check_files(repo, files.sizes)
        check_config(repo, read_config(files.path("config.json").parent))
    return files.revision


def _is_dataset(repo: str) -> bool:
    from huggingface_hub import HfApi

    return HfApi().repo_exists(repo, repo_type="dataset")


def _check_files(repo: str, names: Collection[str]) -> None:
    """Raise an error if the root of a repository has no safetensors checkpoint, and say what it has."""
    root = {name for name in names if "/" not in name}
    weights = {name for name in root if name.endswith(".safetensors")} - set(ADAPTER_FILES)
    if "config.json" in root and weights:
        return
    if ADAPTER_FILES[0] in root:
        what = f"an adapter alone; merge it first: {command('merge', 'BASE', repo, '--output', 'DIR')}"
    elif "model_index.json" in root:
        what = "a diffusion pipeline; only language models are handled"
    elif any(name.endswith(".gguf") for name in root):
        what = "GGUF files alone, which are quantized or made from a model elsewhere; start from that one"
    elif any(name.endswith((".bin", ".pt", ".pth", ".h5", ".msgpack")) for name in root):
        what = "no .safetensors at its root; pickled weights are not read, convert them first"
    elif weights:
        what = "no config.json at its root, so this is no model that transformers loads"
    else:
        what = "no weights at its root"
    raise ModelError(f"{repo}: {what}")
