"""How far chance reaches, where the error of a figure is itself estimated."""

from __future__ import annotations

import math

MARGIN = 2.0  # standard errors, of many examples


def quantile(margin: float, examples: int) -> float:
    """How many standard errors, estimated from so many examples, chance exceeds as rarely as `margin` known ones.

    Student's t of examples - 1 degrees of freedom, at the probability that the normal distribution leaves beyond
    `margin`; by D. L. Wallace, Bounds on normal approximations to Student's and the chi-square distributions, 1959,
    to 0.001 for 15 degrees of freedom at a margin of 2.
    """
    freedom = examples - 1
    normal = margin * (8 * freedom + 3) / (8 * freedom + 1)
    return math.sqrt(freedom * math.expm1(normal**2 / freedom))
