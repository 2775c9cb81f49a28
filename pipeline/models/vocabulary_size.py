"""Tokenizers with more tokens than the embedding of their model has rows.

People add a `[PAD]` to a tokenizer and leave the embedding as it is. The IndexError of torch then names neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ModelError
from pipeline.models.matrices import table_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def pad_within_embedding(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Let a tokenizer pad with a token that the model in `folder` can read.

    Pads are masked, so that it does not matter which token that is.
    """
    rows = _rows(folder)
    usable = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    first = next(token for token in usable if token is not None and token < rows)
    if first != tokenizer.pad_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(first)


def check_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase, sequences: Iterable[Sequence[int]]) -> None:
    """Raise an error if a text has a token that the model cannot read.

    Args:
        folder: of the model.
        sequences: the token ids of the texts.

    Raises:
        ModelError: naming the token and the embedding.
    """
    largest = max((max(ids, default=0) for ids in sequences), default=0)
    rows = _rows(folder)
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ModelError(
            f"{folder}: its tokenizer writes {token!r} as {largest}, and its embedding has only {rows} rows. "
            "Try: a model whose embedding was resized for its tokenizer"
        )


def _rows(folder: Path) -> int:
    rows, _ = next(iter(table_weights(folder).values()))
    return rows
