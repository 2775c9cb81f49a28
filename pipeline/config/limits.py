"""Limits for the loss of a variant, and targets: two sections of its configuration."""

from __future__ import annotations

from pydantic import Field, model_validator

from pipeline.config.base import Real, Section


class Gate(Section):
    """The limits for the loss of a variant against the full-precision model, on each text."""

    rise: Real | None = Field(default=None, gt=0, description="rise of perplexity, as a share: 0.05 is 5 %")
    kl: Real | None = Field(default=None, gt=0, description="KL divergence, in nats per token")
    disagreement: Real | None = Field(
        default=None, gt=0, le=1, description="share of tokens for which the first choice differs"
    )


class Target(Section):
    """What a variant must reach. The bits and the group size of each layer are chosen for it. Set one key."""

    rise: Real | None = Field(
        default=None, gt=0, description="smallest variant whose perplexity rises by at most this share; 0.03 is 3 %"
    )
    size_mb: Real | None = Field(
        default=None, gt=0, description="best variant whose weight files take at most so many MB (1,000,000 bytes)"
    )
    bits: Real | None = Field(
        default=None,
        gt=0,
        description="best variant with at most so many bits a weight: linear layers, embedding and output head",
    )

    @model_validator(mode="after")
    def _has_one_key(self) -> Target:
        if len(self.asked) != 1:
            raise ValueError(f"set exactly one of {', '.join(type(self).model_fields)}")
        return self

    @property
    def asked(self) -> dict[str, float]:
        """Return its one key with its value."""
        return self.model_dump(exclude_none=True)
