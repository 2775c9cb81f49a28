"""Presets: sets of variants by purpose, for the wizard."""

from __future__ import annotations

from pipeline.config.catalog import EIGHT_BITS

# name -> a description, and the value of `quantize.variants`
PRESETS: dict[str, tuple[str, tuple[dict, ...]]] = {
    "balanced": (
        "int8, and int4 in groups of 64 with embeddings in 8 bits: about half and a third of the size",
        ({"name": "int8"}, {"name": "int4", "group_size": 64, "embeddings": EIGHT_BITS}),
    ),
    "high_quality": (
        "int8, and int4 in groups of 32 with embeddings in 8 bits: somewhat larger, and loses least",
        ({"name": "int8"}, {"name": "int4", "group_size": 32, "embeddings": EIGHT_BITS}),
    ),
    "edge": (
        "int4 in groups of 128 and embeddings in 8 bits: the smallest, for CPUs and small devices",
        ({"name": "int4", "group_size": 128, "embeddings": EIGHT_BITS},),
    ),
    "gpu_optimized": (
        "int8 and int4 stored in the order of CUDA's tensor cores, in groups of 128",
        ({"name": "int8"}, {"name": "int4", "group_size": 128, "packing": "tile_packed"}),
    ),
}
