"""The typed description of the training data in the results of a run."""

from __future__ import annotations

from typing import Annotated

from pipeline.evaluation.model_result import Count, Number, Part, Record, Table, Text, Texts


class Overlap(Record):
    """Counts of held-out examples that are also in the training data."""

    compared: Count | None = None
    same: Count | None = None
    near: Count | None = None
    answers: Count | None = None
    trained: Count | None = None
    run_of_words: Count | None = None
    near_from: Number | None = None


class Lengths(Record):
    """Lengths of sequences, in tokens."""

    min: Count | None = None
    median: Count | None = None
    p95: Count | None = None
    max: Count | None = None


class Split(Record):
    """Counts of the training examples, or of the held-out examples."""

    examples: Count | None = None
    sequences: Count | None = None
    tokens: Count | None = None
    loss_tokens: Count | None = None
    truncated: Count | None = None
    dropped: Count | None = None
    cut: Count | None = None
    lengths: Annotated[Lengths, Part] = Lengths()


class PairsData(Record):
    """The preference pairs of a second training."""

    source: Text | None = None
    revision: Text | None = None
    fingerprint: Text | None = None
    license: Text | None = None
    training_pairs: Count | None = None
    held_out_pairs: Count | None = None


class DataPart(Record):
    """One source of the data set."""

    source: Text | None = None
    subset: Text | None = None
    split: Text | None = None
    revision: Text | None = None
    form: Text | None = None
    rows: Count | None = None


class Data(DataPart):
    """The data set of the training; several sources of training data are joined with commas in `source`."""

    duplicates: Count | None = None
    skipped: Count | None = None
    unused_columns: Texts = ()
    fingerprint: Text | None = None
    trained_from: Text | None = None
    split_by: Text | None = None
    license: Text | None = None
    language: Text | None = None
    template: Text | None = None
    chosen_digest: Text | None = None  # of the template that `data.chat_template` names
    system_prompt: Text | None = None
    without_system: Count | None = None
    preference: PairsData | None = None
    overlap: Annotated[Overlap, Part] = Overlap()
    splits: Annotated[dict[str, Split], Table] = {}
    # The sources if there are several, by number, with that of held-out examples of their own as the last one.
    parts: Annotated[dict[str, DataPart], Table] = {}
    kept_out: Count | None = None  # training examples that learn an answer in the context of a held-out one
