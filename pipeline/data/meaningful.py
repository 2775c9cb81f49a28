"""Columns that change what a row means, although no form reads them.

A row with one of them is a bad row, because without the column something else would be learned. `data.ignore` names
columns that are left out on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from pipeline.data.rows import BadRow, is_empty, shorten

_MEDIA = ("image", "images", "image_url", "video", "videos", "audio", "audios")
_BETTER = ("chosen", "chosen_response", "chosen_messages", "preferred_output")
_WORSE = ("rejected", "rejected_response", "rejected_messages", "non_preferred_output")
_HELD_BACK = ("test", "val", "dev", "eval")  # beginnings of the names of splits


def _any(value: Any) -> bool:
    return True


def _is_false(value: Any) -> bool:
    return value is False or str(value).lower() == "false"


def _is_held_back(value: Any) -> bool:
    return str(value).lower().startswith(_HELD_BACK)


def _is_no_full_weight(value: Any) -> bool:
    """Return True for a number other than 1; text such as "70 kg" is no weight of an example."""
    try:
        return float(value) != 1
    except (TypeError, ValueError):
        return False


@dataclass(frozen=True)
class _Meaning:
    """The meaning of a column in the data sets that have it.

    Attributes:
        said: the reason why its row cannot be learned without it; `{value}` stands for its value.
        matters: a value that is not empty -> True if it changes what the row means.
        beside: the forms for which it changes something; empty for all.
    """

    said: str
    matters: Callable[[Any], bool] = _any
    beside: tuple[str, ...] = ()


_SINGLE_QUESTIONS = ("prompt_completion", "instruction", "question_answer", "preference")
_CONVERSATIONS = ("messages", *_SINGLE_QUESTIONS)
_PREFERENCE = _Meaning("is one of two answers, of which people prefer one; only one answer is learned")
_TASTE = _Meaning("is false, so people rejected this answer", _is_false, _CONVERSATIONS)
_WEIGHT = _Meaning("is {value}, and all rows are learned with the weight 1", _is_no_full_weight)
_QUESTION = _Meaning("belongs to the question, and would be left out", _any, _SINGLE_QUESTIONS)
_UNREAD = _Meaning("changes the conversation, and cannot be read beside the other columns", _any, _CONVERSATIONS)

_MEANINGS: dict[str, _Meaning] = {
    **dict.fromkeys(_MEDIA, _Meaning("belongs to the row, and only text is learned")),
    **dict.fromkeys(("label", "kto_tag"), _TASTE),
    **dict.fromkeys((*_BETTER, *_WORSE), _PREFERENCE),
    "split": _Meaning("is {value}, so the row is held back from training", _is_held_back),
    **dict.fromkeys(("weight", "sample_weight", "loss_weight"), _WEIGHT),
    **dict.fromkeys(("context", "input", "passage", "choices", "options"), _QUESTION),
    **dict.fromkeys(("history", "tools", "functions", "system", "system_prompt", "system_message"), _UNREAD),
    "chat_template_kwargs": _UNREAD,  # trl's: settings of the template for this row
}


def watched_columns(form: str, unused: Iterable[str], read: Collection[str], demanded: bool = False) -> tuple[str, ...]:
    """Return the unused columns that may change what a row of this form means.

    A preference that is read under another name (`data.columns`) is decided, so the other answer is not watched.
    A part of the question is not watched if the form is demanded (`data.form`).
    """
    decided = {_PREFERENCE} if set(read) & {*_BETTER, *_WORSE} else set()
    decided |= {_QUESTION} if demanded else set()
    return tuple(
        column
        for column in unused
        if (meaning := _MEANINGS.get(column))
        and (not meaning.beside or form in meaning.beside)
        and meaning not in decided
    )


def check_watched(row: dict, watched: Iterable[str], columns: Collection[str]) -> None:
    """Raise an error if a watched column changes what the row means.

    Raises:
        BadRow: with the way out.
    """
    for column in watched:
        value = row.get(column)
        meaning = _MEANINGS[column]
        if not is_empty(value) and meaning.matters(value):
            said = meaning.said.format(value=shorten(value, 20))
            raise BadRow(f"`{column}` {said}; {_remedy(column, columns)}")


def preference_problem(columns: Collection[str]) -> str | None:
    """Return the reason why rows of preferences have no form, or None if they are no preferences."""
    found = next((column for column in columns if column in (*_BETTER, *_WORSE)), None)
    return None if found is None else f"`{found}` {_PREFERENCE.said}; {_remedy(found, columns)}"


def _remedy(column: str, columns: Collection[str]) -> str:
    meaning = _MEANINGS[column]
    ignore = f"set data.ignore: [{column}] to learn without it"
    better = next((name for name in _BETTER if name in columns), None)
    if meaning is _PREFERENCE and better:
        ways = " or ".join(f"data.columns: {{{pair}}}" for pair in _ways_to_read(better, columns))
        return f"to learn the better one, set {ways}"
    if meaning is _QUESTION:
        question, answer = ("question", "answer") if "question" in columns else ("prompt", "completion")
        if {question, answer} <= {*columns}:
            pairs = f"instruction: {question}, input: {column}, output: {answer}"
            return f"set data.columns: {{{pairs}}}, or {ignore}"
    return f"set data.on_bad_row: skip to leave such rows out, or {ignore}"


def _ways_to_read(better: str, columns: Collection[str]) -> list[str]:
    asked = next((name for name in ("conversations", "messages") if name in columns), None)
    if asked:
        return [f"prompt: {asked}, completion: {better}"]
    if "instruction" in columns:
        return [f"output: {better}"]
    if "question" in columns:
        return [f"answer: {better}"]
    whole = [f"messages: {better}", f"text: {better}"]
    return [f"completion: {better}", whole[0]] if "prompt" in columns else whole
