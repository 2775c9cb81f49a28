"""Standard errors of figures whose tokens depend on each other, and the degrees of freedom of these errors.

The tokens of one text, or of the answers to one prompt, have much in common. They are a cluster, and only clusters are
independent of each other. A few clusters often have most of the tokens. Then the usual error is too small, and
Student's t with clusters - 1 degrees of freedom is too lenient. Two remedies are used together:

- The error is the jackknife over clusters (CV3): J. G. MacKinnon, M. O. Nielsen and M. D. Webb, Fast and reliable
  jackknife and bootstrap methods for cluster-robust inference, 2023. It leaves out one cluster after the other.
- The degrees of freedom are Satterthwaite's for this error: R. M. Bell and D. F. McCaffrey, Bias reduction in standard
  errors for linear regression with multi-stage samples, 2002. They depend on the sizes of the clusters only.

Both suppose that the effects of clusters are about normal. If few clusters lose very much more than the others, no
error that is estimated from the clusters is safe.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING

from pipeline.evaluation.model_result import Estimate

if TYPE_CHECKING:
    import torch

MARGIN = 2.0  # standard errors, for many clusters


def ratio(totals: torch.Tensor, sizes: torch.Tensor) -> Estimate:
    """Return the sum of `totals` over that of `sizes`, with its error.

    Args:
        totals: sum of a figure in each cluster, (C,) float64.
        sizes: tokens or bytes of each cluster, (C,).

    Returns:
        The ratio. For a single cluster the error is NaN, because one cluster says nothing about others.
    """
    clusters, whole = len(sizes), float(sizes.sum())
    value = float(totals.sum()) / whole
    if clusters < 2:
        return Estimate(value, math.nan)
    shifts = (totals - value * sizes) / (whole - sizes)  # of the ratio, if a cluster is left out
    return Estimate(value, math.sqrt((clusters - 1) / clusters * float(shifts.square().sum())))


def freedom(sizes: torch.Tensor) -> float:
    """Return the degrees of freedom of the error of `ratio`: clusters - 1 if all have one size, else fewer.

    Args:
        sizes: tokens or bytes of each cluster, (C,). A single cluster has no degrees of freedom.
    """
    if len(sizes) < 2:
        return 0.0
    # The squared error is a quadratic form x' K x of independent x with one variance for each token. The result is
    # trace(K)^2 / trace(K^2), in closed form, with `share / (1 - share)` for the leverage of each cluster.
    share = sizes.double() / sizes.sum()
    odds = share / (1 - share)
    squares = odds.square()
    spread = (squares * (1 - 2 * share) / (1 - share).square()).sum() + squares.sum().square()
    return max(1.0, float(odds.sum().square() / spread))


def quantile(margin: float, freedom: float) -> float:
    """Return the number of estimated standard errors that is as rare as `margin` known ones; NaN for no freedom.

    This is the quantile of Student's t, at the probability beyond `margin` in the normal distribution. The
    approximation is that of D. L. Wallace, Bounds on normal approximations to Student's and the chi-square
    distributions, 1959: to 0.001 for 15 degrees of freedom and a margin of 2, and too large below 3 degrees.
    """
    if not freedom:
        return math.nan
    normal = margin * (8 * freedom + 3) / (8 * freedom + 1)
    return math.sqrt(freedom * math.expm1(normal**2 / freedom))


def margin_of_tries(tries: int) -> float:
    """Return the margin at which `tries` tests together err as rarely as one test at `MARGIN`, after Bonferroni."""
    normal = NormalDist()
    return -normal.inv_cdf(normal.cdf(-MARGIN) / tries) if tries > 1 else MARGIN
