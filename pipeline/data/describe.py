"""The description of training data: plain data for the results, and lines to read before training.

    description = describe(data_set, encoded, tokenizer)
    for line in report(description, samples(data_set, encoded, tokenizer)): ...

The results are published, and rows may be private: so no text of any row is in the description.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.data import DataSet
from pipeline.data.encode import NO_LOSS, Encoded, EncodedSet
from pipeline.data.overlap import NEAR, RUN, overlap
from pipeline.data.splitting import SPLIT_BY
from pipeline.data.supplied_template import is_supplied
from pipeline.data.system_prompt import added_prompt, describe_prompt, without_prompt

OWN_TEMPLATE, SUPPLIED_TEMPLATE = "the model's own", "supplied"
CHOSEN_TEMPLATE = "chosen with data.chat_template"

_SAMPLES = 3
_WIDTH = 100  # characters of a line that is shown
_RUNS = 4  # stretches of a sample that are shown, learned and not
_SHOWN_SKIPPED = 5
_WORSE = "the worse answer: "
_MARKS = ("{+", "+}")  # around what is learned


@dataclass(frozen=True)
class Samples:
    """Examples that are shown and never published.

    Attributes:
        examples: rendered training examples, each in stretches of (is it learned?, text).
        skipped: places and reasons of the first bad rows.
    """

    examples: tuple[tuple[tuple[bool, str], ...], ...]
    skipped: tuple[tuple[str, str], ...]


def describe(data_set: DataSet, encoded: dict[str, EncodedSet], tokenizer: Any) -> dict[str, Any]:
    """Return the data set in plain values, without any text of its rows.

    Args:
        encoded: "training" and "held-out", as `encode_examples` made them of `data_set`.
        tokenizer: the one they were made with.
    """
    examples = {"training": data_set.train, "held-out": data_set.held_out}
    return {
        "source": data_set.source,
        "subset": data_set.subset,
        "split": data_set.split,
        "revision": data_set.revision,
        "form": data_set.form,
        "rows": data_set.rows,
        "duplicates": data_set.duplicates,
        "skipped": data_set.skipped.total,
        "unused_columns": list(data_set.unused),
        "fingerprint": data_set.fingerprint,
        "trained_from": data_set.trained_from,
        "split_by": SPLIT_BY,
        "license": data_set.license,
        "language": data_set.language,
        "template": _template(data_set, tokenizer),
        "system_prompt": None if data_set.form == "text" else added_prompt(tokenizer) or None,
        "without_system": without_prompt((*data_set.train, *data_set.held_out)),
        "overlap": {
            **asdict(overlap(data_set.train, data_set.held_out, data_set.loss_on)),
            "run_of_words": RUN,
            "near_from": NEAR,
        },
        **_about_parts(data_set),
        "splits": {name: _describe_split(len(examples[name]), part) for name, part in encoded.items()},
    }


def _about_parts(data_set: DataSet) -> dict[str, Any]:
    """Return the sources if there are several, and what was left out because of `data.validation`."""
    if len(data_set.parts) < 2:
        return {}
    keys = ("source", "subset", "split", "revision", "form", "rows")
    parts = {str(i): {key: getattr(part, key) for key in keys} for i, part in enumerate(data_set.parts, start=1)}
    return {"parts": parts, "kept_out": data_set.kept_out}


def samples(data_set: DataSet, encoded: dict[str, EncodedSet], tokenizer: Any) -> Samples:
    """Return three training examples as the model will see them, and the first skipped rows.

    Examples are in random order already, so that the first ones are as good as any.
    """
    chosen = encoded["training"].examples[:_SAMPLES]
    return Samples(tuple(_stretches(example, tokenizer) for example in chosen), data_set.skipped.first)


def report(description: dict[str, Any], samples: Samples, system: str | None = None) -> list[str]:
    """Return the lines to show before training, free of characters that move a cursor.

    `system` is the system prompt that the configuration asks for.
    """
    lines = [_about_rows(description)]
    lines += [f"{'':<9} {_about_rows(part | _NOTHING)[10:]}" for part in description.get("parts", {}).values()]
    lines += [f"skipped   {where}: {reason}" for where, reason in samples.skipped[:_SHOWN_SKIPPED]]
    if description["unused_columns"]:
        lines.append(f"unused    columns {', '.join(description['unused_columns'])}")
    for name, part in description["splits"].items():
        lines += _about_split(name, part)
    lines += _about_overlap(description["overlap"])
    if description["template"] == SUPPLIED_TEMPLATE:
        lines.append(
            "template  the model has none: turns are marked in plain text, and the template goes with the model"
        )
    prompt, count = description["system_prompt"], description["without_system"]
    if prompt and count:
        total = sum(part["examples"] + part["dropped"] for part in description["splits"].values())
        lines.append(f"system    {describe_prompt(prompt, system is not None, count, total)}")
    if samples.examples:
        lines.append(f"examples  what is learned stands between {_MARKS[0]} and {_MARKS[1]}")
    for number, example in enumerate(samples.examples, start=1):
        lines += _shown(f"{number}  ", example)
    return [_harmless(line) for line in lines]


def _template(data_set: DataSet, tokenizer: Any) -> str | None:
    if data_set.form == "text":
        return None
    return SUPPLIED_TEMPLATE if is_supplied(tokenizer) else OWN_TEMPLATE


def _describe_split(examples: int, part: EncodedSet) -> dict[str, Any]:
    lengths = sorted(len(sequence.input_ids) for example in part.examples for sequence in example.sequences)
    return {
        "examples": examples - part.dropped,
        "sequences": len(part.examples),
        "tokens": part.tokens,
        "loss_tokens": part.loss_tokens,
        "truncated": part.truncated,
        "dropped": part.dropped,
        "cut": part.cut,
        "lengths": {name: _rank(lengths, share) for name, share in _SHARES.items()},
    }


_NOTHING = {"duplicates": 0, "skipped": 0}
_SHARES = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}


def _rank(ordered: Sequence[int], share: float) -> int | None:
    """Return the smallest value that at least this share of all does not exceed."""
    if not ordered:
        return None
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def _stretches(example: Encoded, tokenizer: Any) -> tuple[tuple[bool, str], ...]:
    pairs = zip(example.input_ids, example.labels, strict=True)
    found = [
        (learned, tokenizer.decode([token for token, _ in group], clean_up_tokenization_spaces=False))
        for learned, group in itertools.groupby(pairs, key=lambda pair: pair[1] != NO_LOSS)
    ]
    if example.rejected:
        worse = example.rejected.input_ids[example.prompt_length :]
        found.append((False, f"\n{_WORSE}{tokenizer.decode(worse, clean_up_tokenization_spaces=False)}"))
    return tuple(found)


def _about_rows(description: dict[str, Any]) -> str:
    where = [description["source"]]
    where += [f"{key} {description[key]}" for key in ("subset", "split") if description[key]]
    where += [f"at {description['revision'][:12]}"] if description["revision"] else []
    parts = [f"{description['rows']:,} rows", f"form {description['form']}"]
    if description.get("kept_out"):
        parts.append(f"{description['kept_out']:,} examples left out, because data.validation has their prompts")
    parts += [f"{description['duplicates']:,} duplicates left out"] if description["duplicates"] else []
    parts += [f"{description['skipped']:,} bad rows skipped"] if description["skipped"] else []
    return f"data      {' '.join(where)}: {', '.join(parts)}"


def _about_split(name: str, part: dict[str, Any]) -> list[str]:
    head, lengths = f"{name:<9}", part["lengths"]
    if not part["sequences"]:
        return [f"{head} no examples; {part['dropped']:,} left out, since no answer was left within train.max_length"]
    share = part["loss_tokens"] / part["tokens"]
    lines = [
        f"{head} {part['examples']:,} examples, {part['tokens']:,} tokens, {share:.0%} of them learned; "
        f"lengths {lengths['min']:,} to {lengths['max']:,}, median {lengths['median']:,}, 95 % up to {lengths['p95']:,}"
    ]
    losses = [
        (part["truncated"], "cut off at train.max_length"),
        (part["dropped"], "left out, since no answer was left within train.max_length"),
        (part["cut"], f"longer than train.max_length and cut into windows, {part['sequences']:,} sequences in all"),
    ]
    said = [f"{count:,} {what}" for count, what in losses if count]
    return [*lines, *([f"{'':<9} {'; '.join(said)}"] if said else [])]


def _about_overlap(found: dict[str, Any]) -> list[str]:
    lines = [f"overlap   none of the answers of {found['compared']:,} held-out example(s) found in training"]
    if found["same"] or found["near"]:
        lines = [
            f"overlap   of {found['compared']:,} held-out examples, {found['same']:,} have answers that training has "
            f"too, and {found['near']:,} share at least {found['near_from']:.0%} of their runs of "
            f"{found['run_of_words']} words"
        ]
    if found["trained"]:
        lines.append(
            f"{'':<9} {found['trained']:,} of {found['answers']:,} held-out answers are also trained on in exactly "
            "the same context"
        )
    return lines


def _shown(head: str, example: Sequence[tuple[bool, str]]) -> list[str]:
    """Return one example in a few lines: the beginning and the end of each stretch, without the middle."""
    if len(example) > _RUNS:
        example = [*example[: _RUNS - 2], (False, "..."), *example[-2:]]
    lines = []
    for learned, text in example:
        first, last = _MARKS if learned else ("", "")
        lines += _few(f"{first}{text}{last}".strip("\n"))
    return [f"{head if number == 0 else ' ' * len(head)}{line}" for number, line in enumerate(lines)]


def _few(text: str) -> list[str]:
    """Return at most five lines of text, none of them long."""
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 5:
        lines = [*lines[:2], "...", *lines[-2:]]
    return [line if len(line) <= _WIDTH else f"{line[: _WIDTH // 2]} ... {line[-(_WIDTH // 2) :]}" for line in lines]


def _harmless(line: str) -> str:
    """Return a line with escapes for control, formatting and unknown characters."""
    return "".join(
        character if unicodedata.category(character)[0] not in "CZ" or character == " " else ascii(character)[1:-1]
        for character in line
    )
