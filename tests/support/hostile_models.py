"""Models that lead a reader to a private file or to foreign code, each in another way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.audit_watch import BAIT


@dataclass(frozen=True)
class Lead:
    """One way, and a part of the line that refuses it."""

    change: Callable[[Path, str], object]
    reason: str
    of_tokenizer: bool = True


def settings_of(model: Path, file: str, **more: object) -> None:
    """Add settings to a JSON file of a model."""
    path = model / file
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(before | more))


def lead_to(model: Path, name: str, bait: str | None = None) -> None:
    """Let a model in a folder lead to a private file: by default `BAIT`, beside the folder that is worked in."""
    LEADS[name].change(model, bait or str(model.resolve().parents[1] / BAIT))


def _bert(model: Path, **more: object) -> None:
    """A vocabulary of words, which transformers reads from wherever a setting says."""
    (model / "tokenizer.json").unlink()
    settings_of(model, "tokenizer_config.json", tokenizer_class="BertTokenizer", **more)


def _special_tokens(model: Path, bait: str) -> None:
    _bert(model)
    settings_of(model, "special_tokens_map.json", vocab=bait)


def _linked_vocabulary(model: Path, bait: str) -> None:
    _bert(model)
    (model / "vocab.txt").symlink_to(bait)


def _linked_template(model: Path, bait: str) -> None:
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").symlink_to(bait)


def _other_configuration(model: Path, bait: str) -> None:
    """The file that is read has what the file that is checked has not."""
    settings_of(model, "config.json", configuration_files=["config.4.0.0.json"])
    told = json.loads((model / "config.json").read_text())
    del told["configuration_files"]
    (model / "config.4.0.0.json").write_text(json.dumps(told | {"attn_implementation": "somebody/kernel"}))


def _other_tokenizer(model: Path, bait: str) -> None:
    away = model.parent / "elsewhere"
    away.mkdir()
    (model / "tokenizer.json").rename(away / "tokenizer.4.0.0.json")
    settings_of(model, "tokenizer_config.json", fast_tokenizer_files=["../elsewhere/tokenizer.4.0.0.json"])


def _own_code(model: Path, bait: str) -> None:
    settings_of(model, "config.json", auto_map={"AutoConfig": "own.Own"}, model_type="own")
    (model / "own.py").write_text(f"open({bait!r})")


def _adapter_beside(model: Path, bait: str) -> None:
    settings_of(model, "adapter_config.json", base_model_name_or_path=bait, peft_type="LORA")


def _other_weights(model: Path, bait: str) -> None:
    shutil.copyfile(model / "model.safetensors", model / "other.safetensors")
    settings_of(model, "config.json", transformers_weights="other.safetensors")


LEADS = {
    "a vocabulary": Lead(lambda model, bait: _bert(model, vocab=bait), "vocab ("),
    "merges": Lead(lambda model, bait: settings_of(model, "tokenizer_config.json", merges=bait), "merges ("),
    "an argument by place": Lead(lambda model, bait: _bert(model, init_inputs=[bait]), "init_inputs ("),
    "a map of special tokens": Lead(_special_tokens, "vocab ("),
    "a file of SentencePiece": Lead(
        lambda model, bait: settings_of(model, "tokenizer_config.json", sp_model_kwargs={"model_file": bait}),
        "sp_model_kwargs (",
    ),
    "another tokenizer": Lead(_other_tokenizer, "fast_tokenizer_files ("),
    "a linked vocabulary": Lead(_linked_vocabulary, "a link to"),
    "a linked chat template": Lead(_linked_template, "a link to"),
    "another configuration": Lead(_other_configuration, "configuration_files (", of_tokenizer=False),
    "code of its own": Lead(_own_code, "code of its own, which is never run", of_tokenizer=False),
    "a kernel": Lead(
        lambda model, bait: settings_of(model, "config.json", attn_implementation=f"{bait}/kernel"),
        "names code to fetch and run",
        of_tokenizer=False,
    ),
    "an adapter beside": Lead(_adapter_beside, "an adapter_config.json lies beside the model", of_tokenizer=False),
    "other weights": Lead(_other_weights, "transformers_weights (", of_tokenizer=False),
}
