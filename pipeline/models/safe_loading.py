"""Safe opening of models, tokenizers and configurations with transformers.

By itself transformers runs code that a repository names, or asks for it at the terminal. It also downloads and runs
kernels that a configuration names, opens a pickle if there are no safetensors, loads another model if an adapter's
configuration lies beside one, and opens any file that a tokenizer's settings name. Here it does none of that.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ModelError
from pipeline.models.tokenizer_settings import (
    SETTINGS_FILES,
    allowed,
    check_links,
    check_nothing_lost,
    check_settings,
    real_path,
    safe_view,
    settle,
)

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

GENERATES = ("ForCausalLM", "LMHeadModel")  # how the classes of decoders that generate text are called
# Ways to compute attention and experts that come with torch; any other may be fetched and run.
_OWN_KERNELS = (None, "eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm")
SHOWN = 3  # tensors that a line names
_OTHER_FILES = ("configuration_files", "transformers_weights")  # read instead of those that are checked
_KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def open_config(folder: Path) -> PreTrainedConfig:
    """Return the configuration in a model's folder.

    Raises:
        ModelError: if transformers cannot read it, or it asks for code or for another file.
    """
    from transformers import AutoConfig

    check_code(folder, read_settings(folder / "config.json"))
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a file from anywhere makes it raise anything
        raise _unreadable(folder, "configuration", error) from None


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a model's folder.

    Raises:
        ModelError: if there is none that transformers can read, or its settings name files.
    """
    from transformers import AutoTokenizer

    check_tokenizer(folder)
    if (folder / "config.json").is_file():  # it may name the tokenizer's class
        config = read_settings(folder / "config.json")
        check_code(folder, config)
        _check_tokenizer_class(folder, config.get("tokenizer_class"))
    found = {name: read_settings(folder / name) for name in SETTINGS_FILES if (folder / name).is_file()}
    _check_tokenizer_class(folder, found.get(SETTINGS_FILES[0], {}).get("tokenizer_class"))
    passed = {name: allowed(settings) for name, settings in found.items()}
    with safe_view(folder, passed) as view:
        try:
            tokenizer = AutoTokenizer.from_pretrained(view, trust_remote_code=False)
        except Exception as error:
            raise _unreadable(folder, "tokenizer", error) from None
    settle(tokenizer, view, folder)
    for name, settings in found.items():
        left_out = {key: value for key, value in settings.items() if key not in passed[name]}
        check_nothing_lost(folder / name, tokenizer, left_out)
    return tokenizer


def open_generation_config(folder: Path) -> GenerationConfig:
    """Return how the model in a folder generates: from its own file, or else from its configuration.

    Raises:
        ModelError: if transformers cannot read it.
    """
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return GenerationConfig.from_model_config(open_config(folder))
    check_links(folder)
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:
        raise _unreadable(folder, "generation_config.json", error) from None


def open_model(folder: Path, **options: Any) -> Any:
    """Return a causal language model; `options` go to `from_pretrained`, whose errors pass through.

    Raises:
        ModelError: if the model asks for code or for another file, or tensors are missing, which transformers would
            draw at random.
        CheckpointError: if its index names a file outside its folder.
    """
    from transformers import AutoModelForCausalLM

    from pipeline.models.checkpoint.reader import shard_files

    check_code(folder, read_settings(folder / "config.json"))
    check_beside(folder)
    shard_files(folder, Path.is_file)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **options
    )
    model, report = loaded
    refuse_missing(folder, report["missing_keys"])
    return model


def refuse_missing(model: object, names: Collection[str]) -> None:
    """Raise an error that names missing tensors, if there are any.

    Raises:
        ModelError: naming the first of them.
    """
    if names:
        raise ModelError(
            f"{model}: its checkpoint has no {some_names(names)}, which the model needs; fetch the model again"
        )


def some_names(names: Collection[str]) -> str:
    """Return the first of these names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(repr(name) for name in sorted(names)[:SHOWN]) + more


def check_beside(folder: Path) -> None:
    """Raise an error if a file beside the checkpoint would make transformers load something else.

    Raises:
        ModelError: naming it.
    """
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder}: an adapter_config.json lies beside the model, and transformers would load what that names "
            "instead; move it elsewhere, and name it with merge.adapter"
        )
    check_tokenizer(folder)


def check_tokenizer(folder: Path) -> None:
    """Raise an error if a tokenizer needs code of its own, or leads to files outside its folder.

    Raises:
        ModelError: naming the link or the setting, or saying that the settings are not readable.
    """
    check_links(folder)
    for path in (folder / name for name in SETTINGS_FILES):
        if path.is_file():
            settings = read_settings(path)
            check_settings(path, settings)
            if settings.get("auto_map") and not _is_known_tokenizer(settings.get("tokenizer_class")):
                raise ModelError(
                    f"{folder}: its tokenizer needs code of its own, which is never run. Try: another model"
                )


def read_settings(path: Path) -> dict:
    """Return a table of settings in JSON.

    Raises:
        ModelError: if the file is not a JSON object, or a link out of its folder.
    """
    if not path.is_file():  # a device has no end
        raise ModelError(f"{path}: not a file")
    try:
        return parse_settings(path, real_path(path).read_bytes())
    except OSError:
        raise ModelError(f"{path}: not readable JSON") from None


def parse_settings(place: object, content: bytes) -> dict:
    """Return a table of settings in JSON; `place` is named in errors.

    Raises:
        ModelError: if the content is not a JSON object.
    """
    try:
        found = json.loads(content.decode())
    except (ValueError, RecursionError):
        raise ModelError(f"{place}: not readable JSON") from None
    if not isinstance(found, dict):
        raise ModelError(f"{place}: not a table of settings")
    return found


def check_config(place: object, config: dict) -> None:
    """Raise an error if models of this configuration are not supported; errors name `place`.

    Raises:
        ModelError: saying why it is not.
    """
    check_code(place, config)
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ModelError(f"{place}: already quantized ({method}); start from the full-precision model")
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{place}: an encoder-decoder; only decoders that generate text are handled")
    # Their text model lies inside another, and under other names in the checkpoint than in the model.
    if others := [part for part in ("vision_config", "audio_config") if config.get(part)]:
        raise ModelError(f"{place}: more than a text model ({', '.join(others)}); choose one for text alone")
    named = config.get("architectures")
    if isinstance(named, list) and named and not any(str(name).endswith(GENERATES) for name in named):
        raise ModelError(f"{place}: a {named[0]}; only decoders that generate text are handled")


def check_code(place: object, config: dict) -> None:
    """Raise an error if a model asks for code of its own; errors name `place`.

    Raises:
        ModelError: naming it.
    """
    if config.get("auto_map") and not _is_known_model(config.get("model_type")):
        raise ModelError(
            f"{place}: the model needs code of its own, which is never run; use one that transformers knows"
        )
    for key in _OTHER_FILES:
        if config.get(key):
            raise ModelError(f"{place}: {key} ({config[key]!r:.60}) names files to read instead. Try: remove it")
    _check_kernels(place, config)


def _check_kernels(place: object, config: dict) -> None:
    """Raise an error if a configuration names a kernel to download and run; errors name `place`.

    Raises:
        ModelError: naming it.
    """
    for key, value in _entries(config):
        if key in _KERNEL_KEYS and value not in _OWN_KERNELS:
            raise ModelError(f"{place}: {key} {value!r} names code to fetch and run, which is never done; remove it")


def _entries(tree: dict) -> Iterator[tuple[str, Any]]:
    """Yield every key with its value, also those in nested tables."""
    waiting: list[Any] = [tree]
    while waiting:
        here = waiting.pop()
        if isinstance(here, dict):
            yield from here.items()
            waiting += here.values()
        elif isinstance(here, list):
            waiting += here


def _is_known_model(model_type: object) -> bool:
    """Return True if transformers itself has this architecture."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return isinstance(model_type, str) and model_type in CONFIG_MAPPING_NAMES


def _is_known_tokenizer(name: object) -> bool:
    """Return True if transformers itself has this tokenizer."""
    return isinstance(name, str) and _transformers_class(name) is not None


def _check_tokenizer_class(folder: Path, name: object) -> None:
    """Raise an error if the class of a tokenizer is anything else that transformers has, such as a processor.

    Raises:
        ModelError: naming it.
    """
    from transformers import PreTrainedTokenizerBase

    if name is None:
        return
    found = _transformers_class(name) if isinstance(name, str) else name
    is_tokenizer = isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)
    if found is not None and not is_tokenizer and not getattr(found, "is_dummy", False):
        raise ModelError(f"{folder}: tokenizer_class ({name!r:.60}) is not a tokenizer. Try: another model")


def _transformers_class(name: str) -> Any:
    """Return what transformers has of this name, or a dummy that tells the package it needs; None if it has none."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    return tokenizer_class_from_name(name)


def _unreadable(folder: Path, what: str, error: Exception) -> ModelError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ModelError(f"{folder}: transformers cannot read its {what}: {reason}")
