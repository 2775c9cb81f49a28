"""The section of a configuration about the data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.base import Count, Real, Section, Seed
from pipeline.config.catalog import DATA_FORMS


class Rows(Section):
    """One source of rows."""

    source: str = Field(min_length=1, description="file, Hub id, or `builtin:python-docs`")
    subset: str | None = Field(default=None, min_length=1, description="configuration of a data set on the Hub")
    revision: str | None = Field(default=None, min_length=1, description="branch, tag or commit on the Hub")
    split: str = Field(default="train", min_length=1, description="split of a data set on the Hub")
    form: Literal["auto", *DATA_FORMS] = Field(  # type: ignore[valid-type]  # the catalogue has the names
        default="auto", description="form of the rows; `auto` finds it from the columns"
    )
    columns: dict[str, str] = Field(default={}, description="a column of the form -> its name in this data set")


class HeldOutRows(Rows):
    """The held-out examples, if they are not a share of the training data."""

    limit: Count | None = Field(default=None, description="use at most this many examples of this source")


class WeightedRows(HeldOutRows):
    """One of several sources of training data."""

    weight: Real = Field(
        default=1,
        gt=0,
        le=100,
        description="how often each of its training examples is used in an epoch; 0.5 uses half of them",
    )


_KEYS_OF_ROWS = tuple(key for key in Rows.model_fields if key != "source")


class Data(Rows):
    """The data set. `data: null` makes a run without training."""

    source: str = Field(
        default="",
        min_length=1,
        validate_default=False,
        exclude_if=lambda value: not value,
        description="file, Hub id, or `builtin:python-docs`; or set `sources`",
    )
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
    template_options: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], bool | int | Real | str] = Field(
        default={},
        exclude_if=lambda value: not value,
        description="variables of the chat template, as `{enable_thinking: false}`; also in the published template",
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
    sources: list[WeightedRows] = Field(
        default=[],
        exclude_if=lambda value: not value,
        description="several sources instead of `source`, each with its own keys",
    )
    validation: HeldOutRows | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="the held-out examples, instead of a share of the training data",
    )

    @property
    def parts(self) -> tuple[Data, ...]:
        """The sources of training data, each as the settings of a single source."""
        if not self.sources:
            return (self if self.validation is None else self.model_copy(update={"validation": None}),)
        return tuple(self._part(rows) for rows in self.sources)

    @property
    def held_out_part(self) -> Data | None:
        """The source of the held-out examples as the settings of a single source; None if they are a share."""
        return self._part(self.validation) if self.validation else None

    @property
    def all_parts(self) -> tuple[Data, ...]:
        """The sources of training data, and then that of the held-out examples if there is one."""
        return self.parts if self.held_out_part is None else (*self.parts, self.held_out_part)

    @property
    def named(self) -> str:
        """The sources of training data in words."""
        return ", ".join(part.source for part in self.parts)

    @property
    def held_out_named(self) -> str:
        """The sources of the held-out examples in words."""
        return self.validation.source if self.validation else self.named

    def at_revisions(self, revisions: Sequence[str | None]) -> Data:
        """Return these settings with other revisions, one for each of `all_parts`; None keeps a revision."""

        def at(rows: Rows, revision: str | None) -> Rows:
            return rows.model_copy(update={"revision": revision or rows.revision})

        known = iter([*revisions, *[None] * len(self.all_parts)])
        sources = [at(rows, next(known)) for rows in self.sources]
        revision = self.revision if sources else next(known) or self.revision
        validation = at(self.validation, next(known)) if self.validation else None
        return self.model_copy(update={"sources": sources, "revision": revision, "validation": validation})

    def _part(self, rows: HeldOutRows) -> Data:
        of_rows = {key: getattr(rows, key) for key in HeldOutRows.model_fields}
        return self.model_copy(update={**of_rows, "sources": [], "validation": None})

    @model_validator(mode="after")
    def _sources_fit(self) -> Data:
        if bool(self.source) == bool(self.sources):
            both = "both are set" if self.source else "neither is set"
            raise ValueError(f"source or sources: {both}. Try: one of them")
        if self.sources:
            for key in _KEYS_OF_ROWS:
                if getattr(self, key) != Data.model_fields[key].default:
                    raise ValueError(f"{key}: belongs to one of the sources. Try: data.sources with {key} in its entry")
        seen: list[tuple] = []
        for part in self.all_parts:
            rows = (part.source, part.subset, part.revision, part.split)
            if rows in seen:
                raise ValueError(f"{part.source}: named twice. Try: another split or file, or the key weight")
            seen.append(rows)
        if self.validation and self.held_out != Data.model_fields["held_out"].default:
            raise ValueError("held_out: not used beside validation. Try: remove held_out")
        return self
