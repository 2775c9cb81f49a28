"""The loaders that open a model, by their keys in `results.json`. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.catalog import LLAMA_CPP, TRANSFORMERS, VARIANTS
from pipeline.system.libraries import lacking

PACKED = "pipeline.load"  # our loader: every layer is packed for the machine
STOCK = "stock"  # transformers alone
DEQUANTIZED = "dequantized"  # transformers, with the dequantized weights of a file for another engine

# Loaders whose speed is measured: key -> phrase for cards. The first that runs stands for the model.
TIMED = {PACKED: "`pipeline.load`", STOCK: "stock transformers", LLAMA_CPP: LLAMA_CPP}


def default_loader(model: str) -> str:
    """Return the loader that measures a model, unless something else is recorded of it."""
    return VARIANTS[model].engine if model in VARIANTS and VARIANTS[model].is_one_file else PACKED


def missing_packages(model: str, packing: str | None, engine: str = TRANSFORMERS) -> list[str]:
    """Return the packages that an engine needs to open a variant and this machine lacks."""
    return lacking(VARIANTS[model].opened_with(packing, engine)) if model in VARIANTS else []


def only_file(folder: Path) -> Path | None:
    """Return the file of a variant that is one file; None for a folder that transformers opens."""
    suffixes = {variant.suffix for variant in VARIANTS.values() if variant.suffix}
    return next((path for path in folder.iterdir() if path.suffix in suffixes), None)
