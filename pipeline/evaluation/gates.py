"""The gate: limits that a variant must keep to be published, error of the measurement included.

A variant passes if `value + quantile * stderr <= limit` on every text. This is a test of non-inferiority to the
full-precision model, on differences that are paired token by token, with documents and prompts as units. So the
measurement must show that a variant is good enough. A text of one document has no error, and shows nothing.

If several ways to make a variant are tried, each of them could pass by chance. So the quantiles allow for all of them,
after Bonferroni: C. E. Bonferroni, Teoria statistica delle classi e calcolo delle probabilita, 1936. The settings that
were asked for may use half of the chance, and the fallbacks share the other half (`corrections`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pipeline.config.catalog import VARIANTS
from pipeline.config.schema import Quantize
from pipeline.evaluation.cluster_errors import margin_of_tries, quantile
from pipeline.evaluation.model_result import GENERAL, HELD_OUT, TEXTS, Check, ModelResult, Quality, Verdict

SAID = {
    "rise": "perplexity rises by {}",
    "kl": "KL divergence is {} nats a token",
    "disagreement": "the first choice differs at {} of tokens",
}
ONE_CLUSTER = {
    HELD_OUT: (
        "held-out text: one text, or answers to one prompt, so its figures have no error and show no limit kept. "
        "Try: raise data.held_out or evaluate.max_tokens"
    ),
    GENERAL: (
        "general text: one document, so its figures have no error and show no limit kept. "
        "Try: put two empty lines between the documents of evaluate.general"
    ),
}


def limits(quantize: Quantize, variant: str) -> dict[str, float]:
    """Return the limits of a variant: `rise` of perplexity and `disagreement` as shares, `kl` in nats per token.

    On text that is like the calibration text, perplexity rises less than the KL divergence says. So a calibrated
    variant has the same limit for both, unless another is set.
    """
    layers = (quantize.gate, quantize.spec(variant).gate)
    said = {name: value for layer in layers for name, value in layer.model_dump().items() if value is not None}
    target = quantize.spec(variant).target
    aimed = {"rise": target.rise} if target and target.rise else {}
    found = {"rise": VARIANTS[variant].rise, **said, **aimed}
    return {"kl": found["rise"], **found} if variant in quantize.calibrated else found


def corrections(ways: int, is_as_asked: bool) -> int:
    """Return the number of tries that a test allows for, so that all tests of a variant together err as one would.

    Args:
        ways: number of ways to make the variant that may be tested.
        is_as_asked: True for the settings that were asked for, which are tested first.
    """
    if ways < 2:
        return 1
    return 2 if is_as_asked else 2 * (ways - 1)


def judge(quality: Mapping[str, Quality], limits: Mapping[str, float], tries: int = 1) -> Verdict:
    """Return the verdict on a variant: every limit is checked on every text.

    Args:
        quality: the measured quality, by text.
        limits: the limits, by figure.
        tries: number of tries to allow for, from `corrections`.
    """
    checks = tuple(
        _check(text, name, limit, found, tries) for text, found in quality.items() for name, limit in limits.items()
    )
    passed = all(check.passed for check in checks)
    return Verdict(passed=passed, corrected_for=tries, limits=dict(limits), checks=checks)


def distance(verdict: Verdict) -> float:
    """Return the largest of a variant's figures, error included, as a multiple of its limit."""
    uppers = ((check.value + check.quantile * check.stderr) / check.limit for check in verdict.checks)
    return max(uppers, default=math.inf)


def best(tried: Sequence[ModelResult]) -> ModelResult:
    """Return the try that came nearest to its limits, if none passed."""
    return min(tried, key=lambda one: distance(one.verdict))


def _check(text: str, figure: str, limit: float, found: Quality, tries: int) -> Check:
    measured = {"rise": found.rise, "kl": found.kl, "disagreement": found.agreement}[figure]
    assert measured and found.tokens and found.freedom is not None, f"{text}: {figure} was not measured"
    value, error = measured.value, measured.stderr
    if figure == "disagreement":
        # If all of a few tokens agree, that does not show that all others would.
        value, error = 1 - value, max(error, 1 / found.tokens)
    reach = quantile(margin_of_tries(tries), found.freedom)
    return Check(
        text=text,
        figure=figure,
        value=value,
        stderr=error,
        clusters=found.clusters,
        quantile=reach,
        limit=limit,
        passed=value + reach * error <= limit,
    )


def describe_missed(verdict: Verdict) -> str:
    """Return one line with the limits that a variant missed."""
    parts = []
    for check in verdict.missed:
        if not check.has_error:
            parts.append(ONE_CLUSTER[str(check.text)])
            continue
        unit = 1 if check.figure == "kl" else 100
        percent = "" if unit == 1 else " %"
        said = SAID[str(check.figure)].format(_figure(check, unit) + percent)
        limit = f"{unit * check.limit:.3g}{percent}"
        over = "which with its error may be more than the limit of" if check.is_unsure else "and the limit is"
        parts.append(f"{said} on {TEXTS[str(check.text)]} text, {over} {limit}")
    unsure = any(check.is_unsure and check.has_error for check in verdict.missed)
    advice = ["more tokens (evaluate.max_tokens) may show that it passes"] if unsure else []
    return "; ".join([*dict.fromkeys(parts), *advice])


def _figure(check: Check, unit: float) -> str:
    """Return a figure such as `12.1 ± 1.3`: two digits of the error, and the same number of decimals for the value."""
    error = unit * check.stderr
    decimals = max(0, 1 - math.floor(math.log10(error))) if error else 3
    return f"{unit * check.value:.{decimals}f}" + (f" ± {error:.{decimals}f}" if error else "")
