"""The plan's lines about where variants run: engines, and layers that a kernel cannot take."""

from __future__ import annotations

from pipeline.config.loader import parse_config
from pipeline.planning.engines import tell_places
from tests.support.planning import sizes_of

NARROW = {"model.layers.0.mlp.up_proj.weight": (1536, 576), "model.layers.0.mlp.down_proj.weight": (576, 1536)}
WIDE = {"model.layers.0.mlp.up_proj.weight": (4096, 1024)}


def lines(shapes: dict, *variants: object) -> list[str]:
    tree = {"name": "x", "model": {"source": "ada/base"}, "data": None, "quantize": {"variants": list(variants)}}
    return list(tell_places(parse_config(tree, "x"), sizes_of(shapes)))


def test_plan_names_the_layers_that_a_kernel_cannot_take():
    runs, stored = lines(NARROW, "w4a16")
    assert runs.startswith("w4a16 runs in: transformers on CPU, CUDA with compressed-tensors>=0.15; pipeline.load")
    assert "vLLM on CPU" in runs and "SGLang" not in runs
    assert stored == (
        "w4a16 does not run in: SGLang on CUDA from Ampere, because 576 columns are not a multiple of 128"
    )


def test_plan_names_all_engines_that_run_a_variant_with_these_layers():
    (runs,) = lines(WIDE, "w4a16")
    assert "vLLM on CPU, CUDA from Ampere; SGLang on CUDA from Ampere" in runs


def test_experts_that_an_engine_cannot_compute_are_named():
    experts = {"model.layers.0.mlp.experts.3.up_proj.weight": (4096, 1024)}
    runs, stored = lines(experts, "int8")
    assert "vLLM" not in runs and "vLLM" in stored and stored.endswith("experts in this format have no kernel there")
    assert len(lines(experts | WIDE, {"name": "int8", "keep": ["*.experts.*"]})) == 1


def test_layers_that_are_kept_need_no_kernel():
    kept = {"name": "w4a16", "keep": ["model.layers.0.mlp.up_proj"]}
    assert len(lines(NARROW, "w4a16")) == 2 and len(lines(NARROW, kept)) == 1


def test_plan_tells_what_cannot_be_made_of_these_layers():
    (line,) = lines(NARROW | {"model.layers.0.mlp.down_proj.weight": (576, 1500)}, "bnb-nf4")
    assert line.startswith("bnb-nf4 cannot be made: model.layers.0.mlp.down_proj.weight: blocks of 64 do not divide")
    assert line.endswith("Try: keep: ['*.down_proj']")


def test_packing_has_engines_of_its_own():
    assert "vLLM" in lines(WIDE, "int4")[0]
    assert "vLLM" not in lines(WIDE, {"name": "int4", "packing": "tile_packed"})[0]
