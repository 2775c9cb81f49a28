"""The texts that every model of a run is measured on, as tokens.

Held-out text is the data set's own split, with the loss mask of training; general text
is what the configuration names, cut into windows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.config import Config
from pipeline.data import general_text, read_examples
from pipeline.data.chat import supply_template
from pipeline.data.describe import SUPPLIED_TEMPLATE
from pipeline.data.encode import Encoded, encode_examples, encode_text
from pipeline.errors import DataError
from pipeline.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens of general text that a model sees at once; fewer where there would not be this many windows,
# since an error cannot be estimated from one.
WINDOW, WINDOWS = 1024, 16
HELD_OUT, GENERAL = "held_out", "general"


def held_out(config: Config, workspace: Workspace, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Held-out examples, whole ones, up to `evaluate.max_tokens` tokens of input."""
    examples = read_examples(workspace.data / "held_out.jsonl")
    return chosen(config, encode_examples(examples, tokenizer, config.train.loss_on, config.train.max_length).examples)


def chosen(config: Config, encoded: Sequence[Encoded]) -> list[Encoded]:
    """Those of the held-out examples that are measured on.

    Raises:
        DataError: for less than two, since an error cannot be estimated from one.
    """
    taken, tokens = [], 0
    for example in encoded:
        tokens += len(example.input_ids)
        if len(taken) >= 2 and tokens > config.evaluate.max_tokens:
            break
        taken.append(example)
    if len(taken) < 2:
        raise DataError(
            f"{config.data.source}: fewer than two held-out examples have an answer within train.max_length "
            f"{config.train.max_length} tokens; raise data.held_out, train.max_length or evaluate.max_tokens"
        )
    return taken


def general(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """General text in windows, up to `evaluate.max_tokens` tokens.

    Raises:
        DataError: for a text of less than two windows.
    """
    text = general_text(config.evaluate.general)
    tokens = min(config.evaluate.max_tokens, len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    windows = encode_text(text, tokenizer, min(WINDOW, max(2, tokens // WINDOWS)), config.evaluate.max_tokens)
    if len(windows) < 2:
        raise DataError(f"evaluate.general {config.evaluate.general}: too short to measure on; give a longer text")
    return windows


def all_texts(config: Config, workspace: Workspace, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Encoded]]:
    """The texts by name; held-out text only where there is a data set."""
    kept = {HELD_OUT: held_out(config, workspace, tokenizer)} if config.data else {}
    return kept | {GENERAL: general(config, tokenizer)}


def digest(sequences: Sequence[Encoded]) -> str:
    """A digest of a text as tokens, and of which of them count: two figures of the same one can be compared."""
    told = hashlib.sha256()
    for sequence in sequences:
        told.update(json.dumps([sequence.input_ids, sequence.labels]).encode())
    return told.hexdigest()[:24]


def with_template(tokenizer: PreTrainedTokenizerBase, workspace: Workspace) -> PreTrainedTokenizerBase:
    """The tokenizer as training had it: with the chat template that was supplied where the base has none."""
    if workspace.read_measurement("data").get("template") == SUPPLIED_TEMPLATE:
        supply_template(tokenizer)
    return tokenizer
