"""Errors of clusters: no closed gate opens by chance more often than it should, and none stays closed for good."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pipeline.evaluation import cluster_errors, metrics
from pipeline.evaluation.cluster_errors import margin_of_tries, quantile
from pipeline.evaluation.gates import corrections, judge
from pipeline.evaluation.metrics import Scores
from pipeline.evaluation.model_result import Estimate, Quality
from pipeline.evaluation.results import Comparison
from pipeline.retraining.decision import better

NOMINAL, ALLOWED = 0.0228, 0.03  # what lies beyond two standard errors, and the most that may pass at the limit
DRAWS = 3000
LIMIT = 0.05  # of the rise of perplexity
AT_LIMIT = math.log1p(LIMIT)  # the same in nats a token

# Tokens of each text or prompt, and the share of the variance that the tokens of one have in common.
TEXTS = {
    "equal prompts": ([25] * 16, 0.1),
    "texts of many windows": ([200, 150, 100, 100, 50, 50], 0.2),
    "unequal prompts": ([*range(5, 45)], 0.05),
    "very unequal prompts": ([round(math.exp(2 + 2.2 * math.sin(n) ** 3)) for n in range(60)], 0.2),
    "few prompts with most of the tokens": ([300] * 3 + [10] * 17, 0.05),
    "two prompts with most of the tokens": ([200] * 2 + [5] * 38, 0.05),
    "one prompt with most of the tokens": ([400] + [10] * 19, 0.05),
    "independent tokens": ([300] * 3 + [10] * 17, 0.0),
}


def drawn(sizes: list[int], common: float, mean: float, draws: int = DRAWS) -> tuple[torch.Tensor, torch.Tensor]:
    """Return losses (draws, T) about a true mean, and the cluster of each token (T,); each draw is a new sample."""
    random = np.random.default_rng(len(sizes))
    cluster = np.repeat(np.arange(len(sizes)), sizes)
    shared = random.standard_normal((draws, len(sizes)))[:, cluster]
    values = math.sqrt(common) * shared + math.sqrt(1 - common) * random.standard_normal((draws, len(cluster)))
    return torch.from_numpy(mean + 0.05 * values), torch.from_numpy(cluster)


def measured(losses: torch.Tensor, cluster: torch.Tensor) -> dict[str, Quality]:
    """Return the quality of a variant that loses so much (T,) more than the full-precision model."""
    unused = torch.zeros(len(losses), dtype=torch.long)
    ours, theirs = (Scores(nll, unused, cluster, None) for nll in (losses, torch.zeros_like(losses)))
    found = metrics.rise(ours, theirs)
    return {"general": Quality(tokens=len(losses), rise=found, freedom=metrics.freedom(cluster))}


def opens(losses: torch.Tensor, cluster: torch.Tensor, tries: int = 1) -> bool:
    return bool(judge(measured(losses, cluster), {"rise": LIMIT}, tries).passed)


def is_better(losses: torch.Tensor, cluster: torch.Tensor) -> bool:
    difference, freedom = metrics.mean(losses, cluster), metrics.freedom(cluster)
    return better(Comparison(difference=difference, prompts=int(cluster.max()) + 1, freedom=freedom), 2)


def shares(texts: str, mean: float, draws: int = DRAWS) -> tuple[float, float]:
    """Return how often a gate opens for so much loss, and how often a model that much below the limit is better."""
    losses, cluster = drawn(*TEXTS[texts], mean, draws)
    return tuple(
        sum(passes(sample, cluster) for sample in samples) / draws
        for passes, samples in ((opens, losses), (is_better, losses - AT_LIMIT))
    )


@pytest.mark.parametrize("texts", TEXTS)
def test_what_is_exactly_at_the_limit_rarely_passes(texts):
    gate, retraining = shares(texts, AT_LIMIT)
    assert gate <= ALLOWED and retraining <= ALLOWED


@pytest.mark.parametrize(
    ("texts", "often"),
    [("equal prompts", 0.95), ("unequal prompts", 0.95), ("very unequal prompts", 0.9), ("texts of many windows", 0.8)],
)
def test_what_is_well_within_the_limit_passes(texts, often):
    gate, retraining = shares(texts, 0.0, 300)
    assert gate > often and retraining > often


def test_limit_is_passed_as_often_as_promised_if_prompts_have_equal_lengths():
    assert shares("equal prompts", AT_LIMIT) == pytest.approx((NOMINAL, NOMINAL), abs=0.007)  # 2.5 errors of a share


def several_ways(mean: float, ways: int, draws: int) -> Iterator[bool]:
    """Yield whether a variant gets out in each draw, if it is made in so many ways that all lose `mean`."""
    shared, cluster = drawn([25] * 16, 0.1, mean, draws)
    own, _ = drawn([25] * 16, 0.1, mean, draws * ways)
    for sample, several in zip(shared, own.view(draws, ways, -1), strict=True):
        found = (
            mean + (sample - mean + way - mean) / math.sqrt(2) for way in several
        )  # half of the variance in common
        yield any(opens(losses, cluster, corrections(ways, not n)) for n, losses in enumerate(found))


def test_many_ways_that_are_exactly_at_the_limit_rarely_get_one_through():
    assert sum(several_ways(AT_LIMIT, ways=11, draws=1000)) / 1000 <= ALLOWED
    assert sum(several_ways(0.0, ways=11, draws=100)) / 100 > 0.95


def test_all_tries_together_err_as_rarely_as_one():
    normal = torch.distributions.Normal(0, 1)
    for ways in (1, 2, 5, 11):
        tries = [corrections(ways, n == 0) for n in range(ways)]
        chances = [float(normal.cdf(torch.tensor(-margin_of_tries(n), dtype=torch.float64))) for n in tries]
        assert sum(chances) == pytest.approx(NOMINAL, abs=1e-4)
        assert margin_of_tries(tries[0]) <= 2.28  # the settings asked for lose little


def test_windows_of_one_text_show_nothing():
    losses, cluster = drawn([500], 0.2, -1.0, 20)
    assert not any(opens(sample, cluster) or is_better(sample, cluster) for sample in losses)
    found = metrics.mean(losses[0], cluster)
    assert math.isfinite(found.value) and math.isnan(found.stderr)


def test_error_is_the_jackknife_over_clusters():
    totals, sizes = torch.tensor([3.0, -1.0, 4.0, 1.5], dtype=torch.float64), torch.tensor([5, 2, 9, 3])
    without = [(totals.sum() - t) / (sizes.sum() - s) for t, s in zip(totals, sizes, strict=True)]
    found, ratio = cluster_errors.ratio(totals, sizes), float(totals.sum() / sizes.sum())
    assert found.value == pytest.approx(ratio)
    assert found.stderr == pytest.approx(math.sqrt(3 / 4 * sum(float(w - ratio) ** 2 for w in without)))


@pytest.mark.parametrize(
    "sizes", [[7] * 9, [1, 2], [3, 1, 4, 1, 5, 9, 2, 6], [1000, 10, 10], *(s for s, _ in TEXTS.values())]
)
def test_degrees_of_freedom_are_satterthwaites_for_this_error(sizes):
    """The squared error is a quadratic form in the clusters' sums; its mean and variance give the degrees."""
    leverage = np.array(sizes) / sum(sizes)
    residuals = np.eye(len(sizes)) - np.outer(leverage, np.ones(len(sizes)))
    weighted = residuals / (1 - leverage)[:, None]
    form = weighted @ np.diag(sizes) @ weighted.T
    freedom = np.trace(form) ** 2 / np.trace(form @ form)
    assert cluster_errors.freedom(torch.tensor(sizes)) == pytest.approx(freedom)
    if len(set(sizes)) == 1:
        assert freedom == pytest.approx(len(sizes) - 1)


@pytest.mark.parametrize(
    ("normal", "freedom", "known"),
    [  # one-sided 2.5 %, 5 %, 0.5 % and 0.05 %, from tables of Student's t
        (1.959964, 15, 2.13145), (1.959964, 30, 2.04227), (1.959964, 120, 1.97993), (1.644854, 15, 1.75305),
        (2.575829, 15, 2.94671), (2.575829, 60, 2.66028), (3.290527, 20, 3.84952), (0, 15, 0),
    ],
)  # fmt: skip
def test_few_clusters_use_students_t(normal, freedom, known):
    assert quantile(normal, freedom) == pytest.approx(known, rel=1e-3)


@pytest.mark.parametrize(("freedom", "known"), [(1, 13.9677), (2, 4.52655), (3, 3.30683), (5, 2.64865)])
def test_quantile_is_never_too_small_for_very_few_clusters(freedom, known):
    assert known <= quantile(2, freedom) < 1.5 * known


def test_weighting_by_tokens_gives_the_mean_of_all_tokens():
    losses, cluster = drawn([300, 10, 10, 40], 0.5, 1.0, 1)
    assert metrics.mean(losses[0], cluster).value == pytest.approx(float(losses[0].mean()), rel=1e-12)
    assert metrics.mean(losses[0], cluster) != Estimate(float(losses[0].mean()), 0.0)
