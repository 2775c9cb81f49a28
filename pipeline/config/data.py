"""The section of a configuration about the data set."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.base import Count, Real, Section, Seed
from pipeline.config.catalog import DATA_FORMS


class Data(Section):
    """The data set. `data: null` makes a run without training."""

    source: str = Field(min_length=1, description="file, Hub id, or `builtin:python-docs`")
    subset: str | None = Field(default=None, min_length=1, description="configuration of a data set on the Hub")
    revision: str | None = Field(default=None, min_length=1, description="branch, tag or commit on the Hub")
    split: str = Field(default="train", min_length=1, description="split of a data set on the Hub")
    form: Literal["auto", *DATA_FORMS] = Field(  # type: ignore[valid-type]  # the catalogue has the names
        default="auto", description="form of the rows; `auto` finds it from the columns"
    )
    columns: dict[str, str] = Field(default={}, description="a column of the form -> its name in this data set")
    ignore: list[str] = Field(
        default=[],
        exclude_if=lambda value: not value,
        description="columns that are left out on purpose, although they change what a row means",
    )
    chat_template: str | None = Field(
        default=None,
        min_length=1,
        exclude_if=lambda value: value is None,
        description="one of the model's chat templates by its name, or a file with one",
    )
    system: str | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="system prompt of conversations without one, also in the published chat template; `''` for none",
    )
    on_bad_row: Literal["refuse", "skip"] = Field(
        default="refuse", description="stop at a row that cannot be used, or leave it out and count it"
    )
    held_out: Real = Field(default=0.05, gt=0, lt=0.9, description="share of the examples kept out of training")
    limit: Count | None = Field(default=None, description="use at most this many examples")
    seed: Seed = Field(default=0, description="seed of the split, and of the choice that `limit` makes")
