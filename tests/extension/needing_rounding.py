"""The rounding of `floor_rounding`, which needs Gram matrices here and refuses to work without them."""

from __future__ import annotations

from pipeline.config import catalog
from tests.extension import floor_rounding


def register() -> None:
    """Add the rounding."""
    catalog.register(
        catalog.Rounding(
            floor_rounding.NAME,
            __name__,
            ("none", "float"),
            "rounded down",
            catalog.Need.GRAM_MATRIX,
            catalog.Need.GRAM_MATRIX,
        )
    )


def round(rows, grid, statistics=None):
    assert statistics.gram.shape == (rows.shape[1], rows.shape[1])
    return floor_rounding.round(rows, grid)
