"""Which held-out examples two models can be compared on: prompts new to both, that both read whole.

Answers to one prompt go together, so it is prompts that are counted, not examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.config.schema import Config, TrainingRun
from pipeline.data import Example
from pipeline.data.encode import EncodedSet, encode_examples
from pipeline.data.splitting import place
from pipeline.errors import DataError
from pipeline.evaluation.results import Data, Results
from pipeline.system.command_names import command

FEWEST = 16  # prompts; from fewer the error of a difference is hardly known


def untouched(
    held_out: tuple[Example, ...], data: str, repo: str, lineage: Mapping[str, Any]
) -> tuple[tuple[Example, ...], str]:
    """Return the held-out examples whose prompts the published model was not trained on either.

    Prompts are told apart word for word: the question of an old example below a new system prompt is another one.

    Args:
        held_out: of this run, none of which it trains on.
        data: the fingerprint of this run's examples.
        repo: USER/NAME of the published model.
        lineage: its `tunepress.json`.

    Returns:
        The examples, and what can be said of them.

    Raises:
        DataError: where they have too few prompts to compare on.
    """
    theirs, there = Results.of_lineage(lineage, repo).data or Data(), prompts(held_out)
    if there < FEWEST:
        raise DataError(
            f"{repo}: to compare with it takes held-out examples of {FEWEST} prompts, and they are of {there}; "
            "raise data.held_out"
        )
    if theirs.fingerprint == data:
        return held_out, "neither model was trained on these prompts"
    if not theirs.trained_from:
        return held_out, (
            "the live release does not say how its data was split, so it may have been trained on some of "
            "these examples, which speaks for it"
        )
    seed = lineage["configuration"]["data"]["seed"]
    kept = tuple(e for e in held_out if place(e, seed) < theirs.trained_from)
    if prompts(kept) < FEWEST:
        raise DataError(
            f"{repo}: to compare with it takes held-out examples of {FEWEST} prompts, and of {there} only "
            f"{prompts(kept)} were surely held out from the live model too; set data.seed to its {seed}, raise "
            f"data.held_out, or publish without comparing: {command('run')}"
        )
    said = (
        "neither model was trained on these prompts, word for word; the data is not what the live model was trained "
        "on, and where prompts changed only their form, such as their system prompt, it may know the question"
    )
    left_out = len(held_out) - len(kept)
    return kept, f"{said}; {left_out} held-out examples were left out, which it may know" if left_out else said


def prompts(examples: tuple[Example, ...]) -> int:
    """How many different prompts examples have."""
    return len({example.prompt() for example in examples})


def fitting(
    config: Config, examples: tuple[Example, ...], tokenizers: dict[str, Any]
) -> Iterator[tuple[Example, dict[str, EncodedSet]]]:
    """The examples that every model reads whole, with their tokens by the tokenizer's name."""
    for example in examples:
        encoded = {
            name: encode_examples((example,), tokenizer, config.train.loss_on, config.train.max_length)
            for name, tokenizer in tokenizers.items()
        }
        if not any(part.dropped or part.truncated for part in encoded.values()):
            yield example, encoded


def too_few(config: TrainingRun, there: int, all_of: int) -> DataError:
    return DataError(
        f"{config.data.source}: to compare takes held-out examples of {FEWEST} prompts, and of {all_of} those of "
        f"{there} fit into train.max_length {config.train.max_length} tokens; raise data.held_out or train.max_length"
    )


def check_tokens(config: TrainingRun, examples: tuple[Example, ...], tokenizer: Any) -> None:
    """Check that enough prompts fit into the training length; without examples there is nothing to check.

    Raises:
        DataError: if the examples that fit have too few prompts.
    """
    found: set[str] = set()
    for example, _ in fitting(config, examples, {"new": tokenizer}):
        found.add(example.prompt())
        if len(found) == FEWEST:
            return
    if examples:
        raise too_few(config, len(found), prompts(examples))
