"""The two texts that every model of a run is measured on, as tokens.

Held-out text is the data set's own split, with the loss mask of training; general text
is what the configuration names, cut into windows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.config import Config
from pipeline.data import general_text, read_examples
from pipeline.data.encode import Encoded, encode_examples, encode_text
from pipeline.errors import DataError
from pipeline.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 1024  # tokens of general text that a model sees at once
HELD_OUT, GENERAL = "held_out", "general"


def held_out(config: Config, workspace: Workspace, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Held-out examples, whole ones, up to `evaluate.max_tokens` tokens of input."""
    examples = read_examples(workspace.data / "held_out.jsonl")
    encoded = encode_examples(examples, tokenizer, config.train.loss_on, config.train.max_length).examples
    chosen, tokens = [], 0
    for example in encoded:
        tokens += len(example.input_ids)
        if chosen and tokens > config.evaluate.max_tokens:
            break
        chosen.append(example)
    if not chosen:
        raise DataError(f"{config.data.source}: no held-out example has an answer within train.max_length tokens")
    return chosen


def general(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """General text in windows, up to `evaluate.max_tokens` tokens."""
    return encode_text(general_text(config.evaluate.general), tokenizer, WINDOW, config.evaluate.max_tokens)


def both(config: Config, workspace: Workspace, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Encoded]]:
    """Both texts by name."""
    return {HELD_OUT: held_out(config, workspace, tokenizer), GENERAL: general(config, tokenizer)}
