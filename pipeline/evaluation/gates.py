"""The gate: limits that a variant must keep to be published, error of the measurement included.

A variant passes if `value + quantile * stderr <= limit` on every text. This is a test of non-inferiority to the
full-precision model, on differences that are paired token by token, with whole sequences as units. So the measurement
must show that a variant is good enough.
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
    """Return the limits of a variant: `rise` of perplexity and `disagreement` as shares, `kl` in nats per token."""
    layers = (quantize.gate, quantize.spec(variant).gate)
    said = {name: value for layer in layers for name, value in layer.model_dump().items() if value is not None}
    return {"rise": VARIANTS[variant].rise, **said}


def judge(quality: Mapping[str, Quality], limits: Mapping[str, float]) -> Verdict:
    """Return the verdict on a variant: every limit is checked on every text.

    Args:
        quality: the measured quality, by text.
        limits: the limits, by figure.
    """
    checks = tuple(
        _check(text, name, limit, found) for text, found in quality.items() for name, limit in limits.items()
    )
    return Verdict(passed=all(check.passed for check in checks), limits=dict(limits), checks=checks)


def _check(text: str, figure: str, limit: float, found: Quality) -> Check:
    measured = {"rise": found.rise, "kl": found.kl, "disagreement": found.agreement}[figure]
    assert measured and found.tokens and found.sequences, f"{text}: {figure} was not measured"
    value, error = measured.value, measured.stderr
    if figure == "disagreement":
        # If all of a few tokens agree, that does not show that all others would.
        value, error = 1 - value, max(error, 1 / found.tokens)
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


def describe_missed(verdict: Verdict) -> str:
    """Return one line with the limits that a variant missed."""
    parts = []
    for check in verdict.missed:
        unit = 1 if check.figure == "kl" else 100
        percent = "" if unit == 1 else " %"
        said = SAID[str(check.figure)].format(_figure(check, unit) + percent)
        limit = f"{unit * check.limit:.3g}{percent}"
        over = "which with its error may be more than the limit of" if check.is_unsure else "and the limit is"
        parts.append(f"{said} on {TEXTS[str(check.text)]} text, {over} {limit}")
    unsure = any(check.is_unsure for check in verdict.missed)
    return "; ".join(parts) + ("; more tokens (evaluate.max_tokens) may show that it passes" if unsure else "")


def _figure(check: Check, unit: float) -> str:
    """Return a figure such as `12.1 ± 1.3`: two digits of the error, and the same number of decimals for the value."""
    error = unit * check.stderr
    decimals = max(0, 1 - math.floor(math.log10(error))) if error else 3
    return f"{unit * check.value:.{decimals}f}" + (f" ± {error:.{decimals}f}" if error else "")
