"""The qualities of quantization, and the sections for the text that calibration and distillation read."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from pipeline.config.base import Count, Section

# Each loses less than the one before, and takes longer.
QUALITIES = FAST_QUALITY, CALIBRATED_QUALITY, DISTILLED_QUALITY = "fast", "calibrated", "distilled"


class Calibration(Section):
    """The text that variants are calibrated on."""

    source: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)] | None = Field(
        default=None,
        description="file, Hub id, `builtin:python-docs`, or `general` (the part of `evaluate.general` that is not "
        "measured), or a list of them, which are mixed evenly; by default the training data and `general`",
    )
    tokens: Count = Field(default=32768, description="tokens of this text")

    @property
    def sources(self) -> tuple[str, ...]:
        """Return the sources; none for the training data."""
        return (self.source,) if isinstance(self.source, str) else tuple(self.source or ())


class Distillation(Section):
    """The training of scales and zeros."""

    tokens: Count = Field(default=131072, description="tokens to train on; the text is read again if it is shorter")


def with_quality(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration, as plain data, with the default quality of a training: it has text to calibrate on."""
    quantize = tree.get("quantize", {})
    if tree.get("data") is None or not isinstance(quantize, dict) or "quality" in quantize:
        return tree
    return tree | {"quantize": {"quality": CALIBRATED_QUALITY, **quantize}}
