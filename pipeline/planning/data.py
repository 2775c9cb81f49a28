"""The size of a data set: counted in its rows if they are few or asked for, estimated otherwise."""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.schema import Data, Train, TrainingRun
from pipeline.data import load_examples
from pipeline.data.files import ENDINGS
from pipeline.data.packed import DAMAGED, PACKED, ending_of, open_bytes, unreadable
from pipeline.data.sources import BUILTIN, is_builtin, locate
from pipeline.data.system_prompt import without_prompt
from pipeline.training.trainers import check_form

if TYPE_CHECKING:
    from huggingface_hub import DatasetInfo

BYTES_A_TOKEN = 4  # of English text, roughly; other languages and code have fewer
TEMPLATE_TOKENS = 15  # roughly; a chat template adds them to each example
READ_BYTES = 50_000_000  # of a file whose rows are read in any case, which takes seconds
SAMPLE_BYTES = 1_000_000  # of a file, to estimate its number of lines
# Examples and bytes of the docstrings of Python 3.11's standard library, because reading them takes too long here.
BUILTIN_SIZES = {BUILTIN: (4300, 1_540_000), f"{BUILTIN}-pairs": (3600, 1_150_000)}
_TIMEOUT = 10.0  # seconds


@dataclass(frozen=True)
class DataSize:
    """The size of a data set; None for an unknown figure.

    Attributes:
        examples: number of rows.
        text_bytes: bytes of all rows.
        how: the source of these figures, in a few words.
        fetched_bytes: bytes to download from the Hub.
        without_system: number of conversations without a system prompt.
    """

    examples: int | None
    text_bytes: int | None
    how: str
    fetched_bytes: int | None = 0
    without_system: int | None = None

    @property
    def tokens(self) -> int | None:
        """Return the tokens of all rows, chat template included."""
        if self.text_bytes is None:
            return None
        return self.text_bytes // BYTES_A_TOKEN + TEMPLATE_TOKENS * (self.examples or 0)


def data_size(config: TrainingRun, read_rows: bool | None = None) -> DataSize:
    """Return the size of a data set; if it is estimated, before `data.limit`.

    Args:
        config: the run.
        read_rows: read and check every row as training does, and download a data set on the Hub for that; by default
            only the rows of a local file of at most `READ_BYTES`.

    Raises:
        DataError: if the data set does not exist, or if a row that is read cannot be used.
    """
    sizes, paths = [], []
    for part in config.data.all_parts:
        path = None if is_builtin(part.source) else locate(part.source)
        paths.append(path)
        if is_builtin(part.source):
            sizes.append(DataSize(*BUILTIN_SIZES[part.source], "estimated for Python's own documentation"))
        else:
            sizes.append(_on_hub(part) if path is None else _in_file(path))
    size = _together(config.data, sizes)
    is_small = None not in paths and sum(size.text_bytes or 0 for size in sizes) <= READ_BYTES
    return _counted(config, size) if (is_small if read_rows is None else read_rows) else size


def _together(data: Data, sizes: list[DataSize]) -> DataSize:
    """Return the size of all sources of training data, each as often as its weight says; all are downloaded."""
    weights = [rows.weight for rows in data.sources] or [1.0]

    def total(figures: list[int | None], factors: list[float]) -> int | None:
        known = [figure * factor for figure, factor in zip(figures, factors, strict=False) if figure is not None]
        return round(sum(known)) if len(known) == len(factors) else None

    return DataSize(
        total([size.examples for size in sizes], weights),
        total([size.text_bytes for size in sizes], weights),
        "; ".join(dict.fromkeys(size.how for size in sizes[: len(weights)])),
        total([size.fetched_bytes for size in sizes], [1.0] * len(sizes)),
    )


def _counted(config: TrainingRun, size: DataSize) -> DataSize:
    """Return the size of all examples, after reading every row."""
    found = load_examples(config.data, config.train.loss_on)
    for part in found.parts:
        check_form(config, part.form)
    examples = found.train if config.data.validation else (*found.train, *found.held_out)
    alternatives = (alternative for example in examples for alternative in example.alternatives)
    contents = (e.text if e.text is not None else "".join(m["content"] for m in e.messages) for e in alternatives)
    without = [(found.duplicates, "duplicates"), (found.skipped.total, "bad rows")]
    left_out = " and ".join(f"{count} {what}" for count, what in without if count)
    how = "all rows read" + (f"; {left_out} left out" if left_out else "")
    return replace(
        size,
        examples=len(examples),
        text_bytes=sum(len(text.encode()) for text in contents),
        how=how,
        without_system=without_prompt(examples),
    )


def steps(data: Data, train: Train, size: DataSize) -> int | None:
    """Return the number of optimizer steps; None if it is not known."""
    if train.max_steps is not None:
        return train.max_steps
    if size.tokens is None or (size.examples is None and (data.limit or not train.packs)):
        return None
    used = min(1.0, data.limit / size.examples) if data.limit and size.examples else 1.0
    share = used if data.validation else used * (1 - data.held_out)
    rows = share * (size.tokens / train.max_length if train.packs else size.examples or 0)
    return math.ceil(max(1.0, rows / (train.batch_size * train.accumulate)) * train.epochs)


def _in_file(path: Path) -> DataSize:
    size, kind = path.stat().st_size, ending_of(path).removesuffix(PACKED)
    if kind == ".parquet":
        from pyarrow import parquet

        found = parquet.read_metadata(path)
        groups = (found.row_group(i).total_byte_size for i in range(found.num_row_groups))
        return DataSize(found.num_rows, sum(groups), "from the file's metadata")
    sample, size = _beginning(path, size)
    if kind in (".json", ".txt"):
        return DataSize(None, size, "estimated from the file's size")
    lines = sum(1 for line in sample.splitlines() if line.strip())
    whole = len(sample) == size
    examples = lines if whole else round(lines * size / len(sample))
    head = kind in (".csv", ".tsv")
    return DataSize(max(0, examples - head), size, "lines counted" if whole else "estimated from the first lines")


def _beginning(path: Path, size: int) -> tuple[bytes, int]:
    """Return the first bytes of a file, unpacked, and its unpacked size, estimated if it is packed."""
    try:
        with open_bytes(path) as file:
            sample, is_whole = file.read(SAMPLE_BYTES), not file.read(1)
    except DAMAGED as error:
        raise unreadable(str(path), error) from None
    if ending_of(path).endswith(PACKED):
        size = len(sample) if is_whole else round(size * len(sample) / len(gzip.compress(sample)))
    return sample, size


def _on_hub(data: Data) -> DataSize:
    from huggingface_hub import HfApi

    from pipeline.data.hub import reason
    from pipeline.errors import DataError

    try:
        info = HfApi().dataset_info(data.source, revision=data.revision, timeout=_TIMEOUT, files_metadata=True)
    except Exception as error:
        raise DataError(f"{data.source}: {reason(error, data)}") from None
    found = getattr(info.card_data, "dataset_info", None)
    fetched = fetched_bytes(info, data)
    if told := split_figures(found, data):
        return DataSize(told.get("num_examples"), told.get("num_bytes"), "from the data set's card", fetched)
    return DataSize(None, None, "its card does not say its size", fetched)


def split_figures(found: object, data: Data) -> dict | None:
    """Return the card's figures of the configured split; None if the card has none."""
    subsets = _subsets(found)
    for subset in _named(subsets, data) or subsets[:1]:
        splits = subset.get("splits")
        for split in splits if isinstance(splits, list) else ():
            if isinstance(split, dict) and split.get("name") == data.split:
                return split
    return None


def fetched_bytes(info: DatasetInfo, data: Data) -> int | None:
    """Return the bytes to download: a subset with all its splits; None if the card does not say."""
    sizes, configs = (_subsets(getattr(info.card_data, key, None)) for key in ("dataset_info", "configs"))
    if data.subset or max(len(sizes), len(configs)) > 1:
        said = [subset.get("download_size") for subset in _named(sizes, data)]
        return said[0] if said and isinstance(said[0], int) else None
    files = [s for s in info.siblings or [] if ending_of(s.rfilename) in ENDINGS]
    return sum(int(s.size or 0) for s in files) or None


def _subsets(found: object) -> list[dict]:
    return [s for s in (found if isinstance(found, list) else [found]) if isinstance(s, dict)]


def _named(subsets: list[dict], data: Data) -> list[dict]:
    return [s for s in subsets if s.get("config_name", "default") == (data.subset or "default")]
