"""The engines that run variants: what each needs, and whether a model's layers fit its kernels."""

from __future__ import annotations

import pytest

from pipeline.config.catalog import VARIANTS
from pipeline.config.engines import CPU, CUDA, ENGINES, FULL_PRECISION, TRANSFORMERS, VLLM, Runs, on, tell


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_names_known_engines(name):
    variant = VARIANTS[name]
    for packing in [None, *variant.packings]:
        ways = variant.ways(packing)
        assert ways and {way.engine for way in ways} <= ENGINES.keys()
        assert any(way.engine == variant.engine for way in ways)  # the engine that measures it


def test_packing_has_engines_of_its_own():
    plain, tiles = (VARIANTS["int4"].ways(packing) for packing in ("plain", "tile_packed"))
    assert VARIANTS["int4"].ways() == plain
    assert any(way.engine == VLLM for way in plain)
    assert not any(way.engine == VLLM for way in tiles)


def test_layers_that_a_kernel_cannot_take_are_named():
    marlin = Runs(VLLM, CUDA, capability=8.0, columns=128, rows=64)
    assert marlin.misfit([(64, 128), (4096, 4096)]) is None
    assert marlin.misfit([(64, 128), (64, 576)]) == "576 columns are not a multiple of 128"
    assert marlin.misfit([(96, 128)]) == "96 rows are not a multiple of 64"
    assert Runs(TRANSFORMERS, CPU).misfit([(3, 5)]) is None


def test_experts_without_a_kernel_are_named():
    ways = on(VLLM, CPU, experts=False) + on(VLLM, CUDA)
    assert tell(ways, VLLM, [(64, 64)]) == [("CPU, CUDA", None)]
    told = tell(ways, VLLM, [(64, 64)], has_experts=True)
    assert told == [("CPU", "experts in this format have no kernel there"), ("CUDA", None)]


def test_hardware_with_the_same_needs_is_told_together():
    ways = (
        *on(VLLM, CPU, CUDA, packages=("torchao", "mslk")),
        Runs(VLLM, CUDA, capability=8.9, experimental=True, rows=64),
        Runs(TRANSFORMERS, CPU, computes=False),
        Runs(TRANSFORMERS, CUDA, capability=8.6),
    )
    assert tell(ways, VLLM, ()) == [
        ("CPU, CUDA with torchao and mslk", None),
        ("CUDA from Ada (experimental)", None),
    ]
    assert tell(ways, VLLM, [(32, 64)])[1] == ("CUDA from Ada", "32 rows are not a multiple of 64")
    assert tell(ways, TRANSFORMERS, ()) == [
        ("CPU (stored only)", None),
        ("CUDA from compute capability 8.6", None),
    ]


def test_ways_of_an_engine_differ_in_hardware_only():
    assert [way.hardware for way in on(VLLM, CPU, CUDA, rows=32)] == [CPU, CUDA]
    assert all(way.rows == 32 for way in on(VLLM, CPU, CUDA, rows=32))
    assert FULL_PRECISION[0] == Runs(TRANSFORMERS, CPU)
