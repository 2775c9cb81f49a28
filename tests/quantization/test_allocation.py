"""Allocation: the least loss within a size, and the smallest size within a loss."""

import itertools
import random
import time

import pytest

from pipeline.config.schema import VariantSpec
from pipeline.quantization.allocation import (
    KEPT,
    Allocation,
    Group,
    Option,
    best_within,
    bounds,
    groups_of,
    settings,
    smallest_within,
)

LINEAR = {"a.q.weight": (64, 64), "a.k.weight": (32, 64), "a.o.weight": (64, 96), "a.up.weight": (100, 64)}
TABLES = {"embed.weight": (500, 64)}
FUSED = [("a.q.weight", "a.k.weight"), ("a.o.weight",), ("a.up.weight",)]


def random_groups(count: int, seed: int, step: int = 1) -> list[Group]:
    draw = random.Random(seed)

    def options(number):
        weights, worst = draw.randrange(2_000, 90_000, step), draw.random() / 100
        kinds = ((4, 128, 0.52, 1.3), (4, 64, 0.56, 1.15), (4, 32, 0.62, 1.0), (8, None, 1.01, 0.004), (16, None, 2, 0))
        return tuple(Option(bits, size, int(weights * b), worst * loss) for bits, size, b, loss in kinds)

    return [Group((f"layer{n}.weight",), options(n)) for n in range(count)]


@pytest.mark.parametrize("seed", range(3))
def test_six_layers_lose_as_little_as_exhaustive_search_finds_and_never_exceed_the_budget(seed):
    groups = random_groups(6, seed)
    every = [Allocation(chosen) for chosen in itertools.product(*(group.options for group in groups))]
    least, most = bounds(groups)
    for share in (0.05, 0.2, 0.5, 0.9):
        budget = int(least + share * (most - least))
        best = min((way for way in every if way.bytes <= budget), key=lambda way: way.loss)
        found = best_within(groups, budget)
        assert found.bytes <= budget and found.loss <= 1.05 * best.loss
        smallest = min((way for way in every if way.loss <= found.loss), key=lambda way: way.bytes)
        small = smallest_within(groups, found.loss)
        assert small.loss <= found.loss and small.bytes <= 1.002 * smallest.bytes


def test_large_model_is_allocated_in_a_moment_and_fills_its_budget():
    groups, start = random_groups(150, 7), time.monotonic()
    least, most = bounds(groups)
    budget = int(0.7 * least + 0.3 * most)
    found = best_within(groups, budget)
    assert time.monotonic() - start < 5
    assert 0.99 * budget < found.bytes <= budget


def test_more_than_there_is_takes_all_and_less_than_the_smallest_is_none():
    groups = random_groups(4, 1)
    least, most = bounds(groups)
    assert best_within(groups, 2 * most).loss == 0
    assert best_within(groups, least).bytes == least
    assert best_within(groups, least - 1) is None
    assert smallest_within(groups, 1.0).bytes == least
    assert smallest_within(groups[:1], -1.0) is None


def groups(**asked):
    spec = VariantSpec(name="int4", target={"bits": 5}, **asked).resolved()
    items = dict.fromkeys([*LINEAR, *TABLES], 2)
    return spec, groups_of(spec, FUSED, LINEAR, TABLES, items, lambda name, bits, size: 1 / bits, ["a.up.weight"])


def test_options_are_what_the_format_stores_and_fused_layers_share_them():
    _, found = groups()
    ways = {group.names: [(o.bits, o.group_size) for o in group.options] for group in found}
    assert ways == {
        ("a.q.weight", "a.k.weight"): [(4, 32), (4, 64), (8, None), (KEPT, None)],
        ("a.o.weight",): [(4, 32), (8, None), (KEPT, None)],
        ("a.up.weight",): [(8, None), (KEPT, None)],
        ("embed.weight",): [(8, None), (KEPT, None)],
    }
    fused = found[0].options
    assert fused[1].bytes == 96 * 64 // 2 + 96 * 4 and fused[1].loss == 0.5
    assert fused[-1].bytes == 2 * 96 * 64 and fused[-1].loss == 0


def test_layers_that_the_user_has_settled_leave_no_choice():
    _, found = groups(keep=["a.q"], int8=["*.o"], embeddings="int8")
    assert [[o.bits for o in group.options] for group in found] == [[KEPT], [8], [8, KEPT], [8]]


def test_settings_name_every_layer_that_differs_from_most():
    spec, found = groups()
    q, o, up, table = (group.options for group in found)
    chosen = settings(spec, found, Allocation((q[1], o[0], up[0], table[0])), TABLES)
    assert (chosen.group_size, chosen.group_sizes) == (64, {"32": ["a.o"]})
    assert (chosen.int8, chosen.keep, chosen.embeddings) == (["a.up"], [], "int8")
    assert VariantSpec.model_validate(chosen.model_dump()).making() == chosen.making()
    assert chosen.for_layer("a.o.weight").group_size == 32 and chosen.for_layer("a.q.weight").group_size == 64
