"""The held-out examples that two models can be compared on: prompts that are new to both, and that both read whole.

Answers to one prompt depend on each other, so prompts are counted, not examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.config.schema import Config, TrainingRun
from pipeline.data import Example
from pipeline.data.encode import EncodedSet, encode_examples
from pipeline.data.splitting import answers_of_split, place
from pipeline.errors import DataError
from pipeline.evaluation.data_result import Data
from pipeline.evaluation.results import Results
from pipeline.system.command_names import command

FEWEST = 16  # prompts; fewer give no reliable error of a difference
SINGLE_ANSWERS = ("builtin", "instruction", "question_answer", "text")  # forms of rows with one answer each


def unseen_examples(
    held_out: tuple[Example, ...], data: str, repo: str, lineage: Mapping[str, Any], loss_on: str = "auto"
) -> tuple[tuple[Example, ...], str]:
    """Return the held-out examples with prompts that the published model was not trained on either.

    Prompts are compared word for word: an old question below a new system prompt is a new prompt.

    Args:
        held_out: the held-out examples of this run.
        data: the fingerprint of the data of this run.
        repo: USER/NAME of the published model.
        lineage: its `tunepress.json`.
        loss_on: the answers that this run learns, as in `train.loss_on`.

    Returns:
        The examples, and a remark about them.

    Raises:
        DataError: if they have too few prompts.
    """
    theirs, there = Results.of_lineage(lineage, repo).data or Data(), count_prompts(held_out, loss_on)
    if there < FEWEST:
        raise DataError(
            f"{repo}: too few held-out prompts to compare with it ({there}; {FEWEST} are needed). "
            "Try: raise data.held_out"
        )
    if theirs.fingerprint == data:
        return held_out, "neither model was trained on these prompts"
    if not theirs.trained_from:
        return held_out, (
            "the published model does not record how its data was split, so it may have been trained on some of these "
            "examples, which is to its advantage"
        )
    settings = lineage["configuration"]
    seed, learned = settings["data"]["seed"], settings.get("train", {}).get("loss_on", "auto")
    answers = answers_of_split(theirs.split_by, learned)
    if learned == "completion":  # it learned single answers, and the first one says nothing about the others
        kept = tuple(e for e in held_out if max(place(p, seed) for p in e.prompts(loss_on)) < theirs.trained_from)
    else:
        kept = tuple(e for e in held_out if place(e.prompt(answers), seed) < theirs.trained_from)
    if count_prompts(kept, loss_on) < FEWEST:
        raise DataError(
            f"{repo}: too few held-out prompts that the published model surely was not trained on "
            f"({count_prompts(kept, loss_on)}; {FEWEST} are needed). "
            f"Try: set data.seed to {seed}, raise data.held_out, or publish without comparing: {command('run')}"
        )
    said = (
        "neither model was trained on these prompts, word for word; the data has changed since the published model, "
        "and if only the form of a prompt changed, such as its system prompt, it may know the question"
    )
    if not theirs.split_by and learned != "completion" and theirs.form not in SINGLE_ANSWERS:
        said = (
            "the published model was made by an earlier version, which held out only the last answers of "
            "conversations, so it may have been trained on earlier answers in these examples, which is to its advantage"
        )
    left_out = len(held_out) - len(kept)
    return kept, f"{said}; {left_out} held-out examples that it may know were left out" if left_out else said


def count_prompts(examples: tuple[Example, ...], loss_on: str = "auto") -> int:
    """Return the number of different prompts."""
    return len({example.prompt(loss_on) for example in examples})


def encode_untruncated(
    config: Config, examples: tuple[Example, ...], tokenizers: dict[str, Any]
) -> Iterator[tuple[Example, dict[str, EncodedSet]]]:
    """Yield the examples that no tokenizer truncates, with their tokens by the name of the tokenizer."""
    for example in examples:
        encoded = {
            name: encode_examples((example,), tokenizer, config.train.loss_on, config.train.max_length)
            for name, tokenizer in tokenizers.items()
        }
        if not any(part.dropped or part.truncated for part in encoded.values()):
            yield example, encoded


def too_few_prompts(config: TrainingRun, there: int, all_of: int) -> DataError:
    """Return the error for too few prompts that fit: `there` of `all_of`."""
    return DataError(
        f"{config.data.named}: too few of {all_of} held-out prompts fit into train.max_length "
        f"{config.train.max_length} tokens ({there}; {FEWEST} are needed). Try: raise data.held_out or train.max_length"
    )


def check_tokens(config: TrainingRun, examples: tuple[Example, ...], tokenizer: Any) -> None:
    """Check that enough prompts fit into the training length, if there are examples at all.

    Raises:
        DataError: if the examples that fit have too few prompts.
    """
    found: set[str] = set()
    for example, _ in encode_untruncated(config, examples, {"new": tokenizer}):
        found.add(example.prompt(config.train.loss_on))
        if len(found) == FEWEST:
            return
    if examples:
        raise too_few_prompts(config, len(found), count_prompts(examples, config.train.loss_on))
