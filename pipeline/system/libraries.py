"""The heavy libraries: their versions, without importing them, and their log output."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import re
import warnings
from collections.abc import Iterable

# Those whose version can change the bytes or the numbers of a release.
STACK = ("torch", "transformers", "peft", "trl", "bitsandbytes", "torchao", "datasets", "accelerate", "tokenizers")
# Those whose version can change the figures of a model that is measured again.
MEASURING = (
    "torch", "torchao", "bitsandbytes", "compressed-tensors", "transformers", "peft", "llama-cpp-python",
)  # fmt: skip
# Those whose version can change an adapter, and a merged model.
TRAINING = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "tokenizers")
MERGING = ("torch", "transformers", "peft", "bitsandbytes")
# Further distributions whose versions the diagnosis shows, and the modules of each extra.
OURS = ("tunepress", "huggingface_hub", "trackio", "gguf", "llama-cpp-python", "compressed-tensors")
EXTRAS = {
    "gguf": ("gguf",),
    "llama-cpp": ("llama_cpp",),
    "compressed-tensors": ("compressed_tensors",),
    "deepspeed": ("deepspeed",),
    "flash": ("flash_attn",),
    "liger": ("liger_kernel",),
    "test": ("pytest", "hypothesis", "xdist"),
}


def versions(*names: str) -> dict[str, str]:
    """Return installed versions by distribution name, without those that are not installed."""
    found = {}
    for name in names or STACK:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def lacking(packages: Iterable[str]) -> list[str]:
    """Return the packages that are not installed; a lowest version, as in `torchao>=0.15`, is not compared."""
    return [package for package in packages if not versions(re.split("[<>=!~]", package)[0])]


def is_installed(package: str) -> bool:
    """Return True if a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def quiet() -> None:
    """Silence import warnings and progress bars of the libraries; errors still show.

    torchao warns about CUDA extensions on every machine without CUDA, and torch about torchao's enums. Users cannot act
    on either. Call this before importing them.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    os.environ.setdefault("COMPRESSED_TENSORS_LOG_DISABLED", "true")
    os.environ.setdefault("TQDM_DISABLE", "1")
    for name in ("torchao", "torch.utils._pytree", "datasets", "bitsandbytes", "filelock", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch(ao)?\b.*")
    warnings.filterwarnings("ignore", category=FutureWarning)


def quiet_progress_bars() -> None:
    """Silence the progress bars that transformers draws by itself; imports transformers."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
