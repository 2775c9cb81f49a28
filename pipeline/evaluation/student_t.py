"""Quantiles of Student's t, for figures with an estimated error."""

from __future__ import annotations

import math

MARGIN = 2.0  # standard errors, for many examples


def quantile(margin: float, examples: int) -> float:
    """Return the number of estimated standard errors that is as rare as `margin` known ones.

    This is the quantile of Student's t with examples - 1 degrees of freedom, at the probability beyond `margin` in the
    normal distribution. The approximation is that of D. L. Wallace, Bounds on normal approximations to Student's and
    the chi-square distributions, 1959: to 0.001 for 15 degrees of freedom and a margin of 2.
    """
    freedom = examples - 1
    normal = margin * (8 * freedom + 3) / (8 * freedom + 1)
    return math.sqrt(freedom * math.expm1(normal**2 / freedom))
