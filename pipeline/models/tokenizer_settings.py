"""Settings of a tokenizer that may reach transformers, and a view of its folder that has no others.

transformers passes every key of `tokenizer_config.json` and `special_tokens_map.json` to the tokenizer's class. Some
classes open the file that a key names: `{"tokenizer_class": "BertTokenizer", "vocab": ".env"}` makes the lines of that
file the vocabulary, and weights that were made for it recite them. A link to a file does the same without a key.
"""

from __future__ import annotations

import inspect
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json")
TEMPLATES = "additional_chat_templates"
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx")
# No class of transformers opens a file by one of these names; a test asks all of them.
_ALLOWED = {
    "add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder", "additional_special_tokens",
    "backend", "chat_control_tokens", "chat_template", "clean_text", "clean_up_tokenization_spaces",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", "do_basic_tokenize", "do_clean_text",
    "do_lower_case", "do_lowercase", "do_lowercase_and_remove_accent", "do_split_on_punc", "errors", "extra_ids",
    "extra_special_tokens", "fix_mistral_regex", "from_slow", "grounded_generation_template", "id2lang",
    "keep_accents", "lang2id", "lang_codes", "langs", "language", "language_codes", "legacy", "legacy_behaviour",
    "mask_token_sent", "max_len", "max_length", "model_input_names", "model_max_length",
    "model_specific_special_tokens", "never_split", "normalization", "num_madeup_words", "offset",
    "pad_to_multiple_of", "pad_token_type_id", "padding_side", "predict_timestamps", "processor_class",
    "remove_space", "response_schema", "response_template", "return_token_type_ids", "sanitize_control_tokens",
    "source_lang", "special_tokens_pattern", "split_by_punct", "split_special_tokens", "src_lang", "stride",
    "strip_accents", "target_lang", "task", "tgt_lang", "token_type_ids_include_special_tokens",
    "token_type_ids_pattern", "tokenize_chinese_chars", "tokenizer_class", "tool_use_template", "trim_offsets",
    "truncation_side", "truncation_strategy", "unk_id", "use_default_system_prompt", "wordpieces_prefix",
}  # fmt: skip
_TOKEN = re.compile(r"\w+_token")  # transformers takes each of these as a special token
# These replace the tokenizer's own files, or name them. Nothing that transformers saves has one.
_REFUSED = ("vocab", "merges", "init_inputs", "fast_tokenizer_files", "gguf_file")
# Left behind by older versions. transformers looks for these files itself, and code is never run.
_LEFTOVER = re.compile(r"auto_map|name_or_path|\w+_file|\w+_spm")


def check_settings(place: object, settings: Mapping) -> None:
    """Raise an error if settings name a file to open as the vocabulary; errors name `place`.

    Raises:
        ModelError: naming the setting.
    """
    for key in _REFUSED:
        if settings.get(key):
            raise ModelError(
                f"{place}: {key} ({settings[key]!r:.60}) would make transformers open files that the model does not "
                "have. Try: another model, or remove the setting"
            )
    options = settings.get("sp_model_kwargs") or {}
    if not isinstance(options, dict) or any(isinstance(value, (str, list, dict)) for value in options.values()):
        raise ModelError(f"{place}: sp_model_kwargs ({options!r:.60}) may only switch numbers. Try: another model")


def allowed(settings: Mapping) -> dict:
    """Return the settings that may reach transformers, which name no file."""
    return {key: value for key, value in settings.items() if key in _ALLOWED or _TOKEN.fullmatch(key)}


def to_publish(settings: Mapping) -> dict:
    """Return the settings without code, and without names of files on the machine that saved them."""
    return {key: value for key, value in settings.items() if not _LEFTOVER.fullmatch(key)}


def check_links(folder: Path) -> None:
    """Raise an error if a file beside the weights is a link out of the folder.

    Anything could be read or published through such a link. Weights may be links, because only tensors are read from
    them.

    Raises:
        ModelError: naming the link.
    """
    for path in (*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*")):
        if path.is_file() and path.suffix not in _WEIGHTS:
            real_path(path)


def real_path(path: Path) -> Path:
    """Return where a file lies: in its own folder, or in the Hub's cache, which consists of links.

    Raises:
        ModelError: for a link to anywhere else, through which any file of this machine could be read.
    """
    parent = path.parent.parent if path.parent.name == TEMPLATES else path.parent  # which may be a link itself
    real = path.resolve()
    in_cache = real.parent.name == "blobs" and real.parents[1].name.startswith("models--")
    if parent.resolve() not in real.parents and not in_cache:
        raise ModelError(f"{path}: a link to {real}, outside its folder, and is not followed. Try: copy the file there")
    return real


@contextmanager
def safe_view(folder: Path, settings: Mapping[str, Mapping]) -> Iterator[Path]:
    """Yield a folder for a moment with a tokenizer's files, and with the given settings in place of its own."""
    with tempfile.TemporaryDirectory(prefix="tunepress-tokenizer-") as scratch:
        view = Path(scratch)
        for name, table in settings.items():
            (view / name).write_text(json.dumps(table), encoding="utf-8")
        for path in folder.iterdir():
            is_wanted = path.is_file() and path.suffix not in _WEIGHTS
            if path.name not in settings and (is_wanted or path.name == TEMPLATES):
                (view / path.name).symlink_to(path.resolve())
        yield view


def settle(tokenizer: PreTrainedTokenizerBase, view: Path, folder: Path) -> None:
    """Let a tokenizer that was opened from a view name its own folder."""
    for table in (vars(tokenizer), tokenizer.init_kwargs):
        for key, value in table.items():
            if isinstance(value, str) and (value == str(view) or value.startswith(f"{view}/")):
                table[key] = str(folder) + value.removeprefix(str(view))


def check_nothing_lost(place: object, tokenizer: PreTrainedTokenizerBase, left_out: Mapping) -> None:
    """Raise an error if the class of a tokenizer has use for a setting that was left out; errors name `place`.

    Raises:
        ModelError: naming the setting.
    """
    own = type(tokenizer)
    used = inspect.signature(own.__init__).parameters.keys() - own.vocab_files_names.keys()
    for key, value in left_out.items():
        if key in used and value:
            raise ModelError(f"{place}: {own.__name__} with {key} is not supported, since {key} may name files")
