"""The context of a model: the most tokens that it reads at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import ConfigError

_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return the context in tokens by the content of `config.json`; None for a model without a limit."""
    for key in _KEYS:
        if type(found := config.get(key)) is int and found > 0:
            return found
    nested = config.get("text_config")
    return context_length(nested) if isinstance(nested, Mapping) else None


def check_length(max_length: int, context: int | None) -> None:
    """Check that the training sequences fit into the model's context.

    Beyond it a model with learned positions fails, and others were never trained.

    Raises:
        ConfigError: naming both lengths.
    """
    if context is not None and max_length > context:
        raise ConfigError(
            f"train.max_length {max_length}: longer than the model's context of {context} tokens. "
            f"Try: --set train.max_length={context}"
        )
