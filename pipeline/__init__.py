"""tunepress: fine-tune, merge, quantize and publish a language model, with every number measured.

from pipeline import load, load_config, run
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.config.loader import load_config
from pipeline.workflow.run import run

if TYPE_CHECKING:
    from pipeline.inference.load import load

__all__ = ["load", "load_config", "run"]


def __getattr__(name: str) -> object:
    if name == "load":  # brings transformers in, so only when it is asked for
        from pipeline.inference.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
