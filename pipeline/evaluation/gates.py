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


def judge(quality: Mapping[str, dict], limits: Mapping[str, float]) -> dict:
    """The verdict on a variant, as plain data.

    Args:
        quality: what was measured by text, as `results.json` has it.

    Returns:
        `passed`, the `limits`, and under `checks` for each text and limit the value, its standard error, how many
        of these the value has to stay below the limit (`quantile`), and `passed`.
    """
    checks = [_check(text, name, limit, found) for text, found in quality.items() for name, limit in limits.items()]
    return {"passed": all(check["passed"] for check in checks), "limits": dict(limits), "checks": checks}


def _check(text: str, name: str, limit: float, found: Mapping) -> dict:
    known = found["agreement" if name == "disagreement" else name]
    value = 1 - known["value"] if name == "disagreement" else known["value"]
    # A few tokens that all agree do not show that all others would.
    error = max(known["stderr"], 1 / found["tokens"]) if name == "disagreement" else known["stderr"]
    sequences = found["sequences"]
    reach = quantile(MARGIN, sequences)
    passed = value + reach * error <= limit
    about = {"text": text, "figure": name, "value": value, "stderr": error, "sequences": sequences}
    return {**about, "quantile": reach, "limit": limit, "passed": passed}


def missed(verdict: Mapping) -> list[dict]:
    """The checks that were not passed; the value itself may be within the limit, and only its error not."""
    return [check for check in verdict["checks"] if not check["passed"]]


def is_unsure(check: Mapping) -> bool:
    """Is the value within the limit, and only its error not?"""
    return check["value"] <= check["limit"]


def tell(verdict: Mapping) -> str:
    """What a variant missed, in one line."""
    told = []
    for check in missed(verdict):
        unit = 1 if check["figure"] == "kl" else 100
        percent = "" if unit == 1 else " %"
        said = SAID[check["figure"]].format(_figure(check, unit) + percent)
        limit = f"{unit * check['limit']:.3g}{percent}"
        over = "which with its error may be more than the limit of" if is_unsure(check) else "and the limit is"
        told.append(f"{said} on {check['text'].replace('_', '-')} text, {over} {limit}")
    unsure = any(map(is_unsure, missed(verdict)))
    return "; ".join(told) + ("; more tokens (evaluate.max_tokens) may show that it passes" if unsure else "")


def _figure(check: Mapping, unit: float) -> str:
    """`12.1 ± 1.3`: two digits of the error, and as many decimals of the value."""
    error = unit * check["stderr"]
    decimals = max(0, 1 - math.floor(math.log10(error))) if error else 3
    return f"{unit * check['value']:.{decimals}f}" + (f" ± {error:.{decimals}f}" if error else "")
