"""The layers that get an adapter, by `train.lora.target_modules`."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pipeline.config.schema import Lora
from pipeline.errors import ConfigError

ALL = "all-linear"


def is_target(wanted: str | list[str], weight: str) -> bool:
    """Return True if a linear layer gets an adapter, by the same rules as in peft.

    Args:
        wanted: `all-linear`, a regular expression for whole names, or the last parts of names.
        weight: name of the layer's weight, such as `model.layers.0.self_attn.q_proj.weight`.
    """
    name = weight.removesuffix(".weight")
    if isinstance(wanted, str):
        # Files of a bare decoder have names without the prefix that the model gives them.
        return wanted == ALL or any(re.fullmatch(wanted, n) for n in (name, f"model.{name}"))
    return f".{name}".endswith(tuple(f".{part}" for part in wanted))


def check_targets(lora: Lora, linear: Iterable[str]) -> None:
    """Check that every name in `train.lora.target_modules` is that of a linear layer.

    peft ignores a name that no layer has if another name fits.

    Args:
        lora: the settings of the adapter.
        linear: names of the weights of the model's linear layers.

    Raises:
        ConfigError: naming what no layer has, and the names that there are.
    """
    names = list(linear)
    wanted = lora.target_modules
    for said, one in [(wanted, wanted)] if isinstance(wanted, str) else [(part, [part]) for part in wanted]:
        if one != ALL and not any(is_target(one, name) for name in names):
            known = {name.removesuffix(".weight").rpartition(".")[2] for name in names}
            raise ConfigError(
                f"train.lora.target_modules: no linear layer of the model is {said!r}. "
                f"Try: {', '.join(sorted(known)) or ALL}"
            )
