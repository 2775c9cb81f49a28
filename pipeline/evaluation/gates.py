"""Is a variant good enough to be published, given the error of the measurement?

A variant is held against limits on how far it may be from the model in full precision, on every text that was
measured. It passes where `value + quantile * stderr <= limit`: a test of non-inferiority on differences that are
paired token by token, with whole sequences as the units. So it has to be shown that a variant is good enough; that
nothing was shown against it does not do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pipeline.config.catalog import VARIANTS
from pipeline.config.schema import Quantize
from pipeline.evaluation.model_result import TEXTS, Check, Quality, Verdict
from pipeline.evaluation.student_t import MARGIN, quantile

SAID = {
    "rise": "perplexity rises by {}",
    "kl": "KL divergence is {} nats a token",
    "disagreement": "the first choice differs at {} of tokens",
}


def limits(quantize: Quantize, variant: str) -> dict[str, float]:
    """What a variant may lose at most: `rise` of perplexity and `disagreement` as shares, `kl` in nats a token."""
    layers = (quantize.gate, quantize.spec(variant).gate)
    said = {name: value for layer in layers for name, value in layer.model_dump().items() if value is not None}
    return {"rise": VARIANTS[variant].rise, **said}


def judge(quality: Mapping[str, Quality], limits: Mapping[str, float]) -> Verdict:
    """Return the verdict on a variant: every limit is checked on every text.

    Args:
        quality: what was measured, by text.
    """
    checks = tuple(
        _check(text, name, limit, found) for text, found in quality.items() for name, limit in limits.items()
    )
    return Verdict(passed=all(check.passed for check in checks), limits=dict(limits), checks=checks)


def _check(text: str, figure: str, limit: float, found: Quality) -> Check:
    if figure == "disagreement":
        value = 1 - found.agreement.value
        # A few tokens that all agree do not show that all others would.
        error = max(found.agreement.stderr, 1 / found.tokens)
    else:
        measured = found.rise if figure == "rise" else found.kl
        value, error = measured.value, measured.stderr
    reach = quantile(MARGIN, found.sequences)
    return Check(
        text=text,
        figure=figure,
        value=value,
        stderr=error,
        sequences=found.sequences,
        quantile=reach,
        limit=limit,
        passed=value + reach * error <= limit,
    )


def tell(verdict: Verdict) -> str:
    """Return in one line what a variant missed."""
    told = []
    for check in verdict.missed:
        unit = 1 if check.figure == "kl" else 100
        percent = "" if unit == 1 else " %"
        said = SAID[check.figure].format(_figure(check, unit) + percent)
        limit = f"{unit * check.limit:.3g}{percent}"
        over = "which with its error may be more than the limit of" if check.is_unsure else "and the limit is"
        told.append(f"{said} on {TEXTS[check.text]} text, {over} {limit}")
    unsure = any(check.is_unsure for check in verdict.missed)
    return "; ".join(told) + ("; more tokens (evaluate.max_tokens) may show that it passes" if unsure else "")


def _figure(check: Check, unit: float) -> str:
    """Return a figure as `12.1 ± 1.3`: two digits of the error, and as many decimals of the value."""
    error = unit * check.stderr
    decimals = max(0, 1 - math.floor(math.log10(error))) if error else 3
    return f"{unit * check.value:.{decimals}f}" + (f" ± {error:.{decimals}f}" if error else "")
