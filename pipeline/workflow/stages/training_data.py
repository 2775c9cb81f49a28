"""The data of a training: read, split and turned into tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from pipeline.config.schema import Data, TrainingRun
from pipeline.data import DataSet, Example, load_examples, write_examples
from pipeline.data.encode import EncodedSet, encode_examples
from pipeline.data.reading import Check
from pipeline.errors import DataError
from pipeline.evaluation import eligible_prompts
from pipeline.system.files import fingerprint
from pipeline.tracking.events import Events
from pipeline.training.distributed import TrainingProcess
from pipeline.training.trainers import check_form
from pipeline.workflow import baseline
from pipeline.workflow.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


HELD_OUT_PAIRS = 256  # that are measured: an accuracy's standard error is then at most 3 %
PAIRS = "pairs"  # the note about the data of `train.preference`


def read_data(
    config: TrainingRun, workspace: Workspace, process: TrainingProcess, check: Check | None = None
) -> tuple[DataSet, tuple[Example, ...]]:
    """Return the data, and the held-out examples to compare with a published model.

    One process of each machine writes the held-out examples, and the places of bad rows that are skipped.

    Args:
        check: raises BadRow for an example that the model's chat template refuses.
    """
    workspace.data.mkdir(exist_ok=True)
    skipped = workspace.data / "skipped.txt"
    with open(skipped if process.is_local_main else os.devnull, "w", encoding="utf-8") as log:
        on_skip = partial(print, sep=": ", file=log)
        data = load_examples(pinned(config, workspace), config.train.loss_on, on_skip, check)
    if process.is_local_main:
        workspace.note("train", data=_read_at(config.data, data))
        if not data.skipped.total:
            skipped.unlink()
        write_examples(workspace.data / "held_out.jsonl", data.held_out)
    for part in data.parts:
        check_form(config, part.form)
    # Check before the training that there is enough text to measure on, and to compare with a published model.
    published, _ = baseline.noted(workspace)
    if not published:
        return data, ()
    compared, _ = eligible_prompts.unseen_examples(
        data.held_out, data.fingerprint, published.repo, published.lineage, config.train.loss_on
    )
    return data, compared


def encode_data(
    config: TrainingRun, data: DataSet, tokenizer: PreTrainedTokenizerBase, events: Events
) -> dict[str, EncodedSet]:
    """Return the tokens of both splits."""
    return {
        name: encode_examples(
            examples,
            tokenizer,
            config.train.loss_on,
            config.train.max_length,
            partial(events.progress, what=f"tokenizing {name} examples"),
        )
        for name, examples in (("training", data.train), ("held-out", data.held_out))
    }


@dataclass(frozen=True)
class Pairs:
    """The preference pairs of `train.preference`.

    Attributes:
        encoded: the tokens of the `training` and the `held-out` pairs.
        content: fingerprint of the pairs.
        description: counts for the card.
    """

    encoded: dict[str, EncodedSet]
    content: str
    description: dict


def read_pairs(
    config: TrainingRun,
    workspace: Workspace,
    process: TrainingProcess,
    tokenizer: PreTrainedTokenizerBase,
    events: Events,
    measured: Sequence[Example],
) -> Pairs:
    """Return the preference pairs, without training pairs whose question is in the text that models are measured on.

    Args:
        measured: the held-out examples of the first training.

    Raises:
        DataError: if they are no pairs, or nothing is left of them.
    """
    from pipeline.data.chat import ChatTemplate

    second = config.preference_run()
    skipped = workspace.data / "skipped_pairs.txt"
    with open(skipped if process.is_local_main else os.devnull, "w", encoding="utf-8") as log:
        on_skip = partial(print, sep=": ", file=log)
        source = pinned(second, workspace, PAIRS)
        data = load_examples(source, second.train.loss_on, on_skip, ChatTemplate(tokenizer).check)
    if process.is_local_main:
        workspace.note("train", **{PAIRS: _read_at(second.data, data)})
        if not data.skipped.total:
            skipped.unlink()
    for part in data.parts:
        check_form(second, part.form)
    questions = {example.prompt(config.train.loss_on) for example in measured}
    kept = tuple(pair for pair in data.train if pair.prompt("completion") not in questions)
    if len(kept) < len(data.train):
        count = len(data.train) - len(kept)
        events.show([f"train.preference: {count} pairs left out, since models are measured on their questions"])
    encoded = encode_data(second, replace(data, train=kept, held_out=data.held_out[:HELD_OUT_PAIRS]), tokenizer, events)
    if not encoded["training"].examples or not encoded["held-out"].examples:
        longest = config.train.max_length
        raise DataError(f"{second.data.named}: train.max_length {longest} leaves no pair to train on, or to measure")
    description = {
        "source": second.data.named,
        "revision": data.revision,
        "fingerprint": data.fingerprint,
        "license": data.license,
        "training_pairs": len(encoded["training"].examples),
        "held_out_pairs": len(encoded["held-out"].examples),
    }
    return Pairs(encoded, fingerprint([data.fingerprint, len(kept)]), description)


def pinned(config: TrainingRun, workspace: Workspace, noted: str = "data") -> Data:
    """Return the settings of the data with the commit that this run has read before.

    A branch on the Hub stays at its first commit, so that a stopped training goes on with the same rows.
    """
    known = workspace.progress("train", noted)
    if known.get("asked") != _asked_of_hub(config.data):
        return config.data
    return config.data.at_revisions(known.get("revisions") or [known.get("revision")])


def _read_at(asked: Data, found: DataSet) -> dict:
    """Return a note of the commits that were read, for `pinned`."""
    revisions = [part.revision for part in found.parts]
    known = {"revision": found.revision} if len(revisions) == 1 else {"revisions": revisions}
    return {"asked": _asked_of_hub(asked), **known}


def _asked_of_hub(data: Data) -> dict:
    return data.model_dump(include={"source", "subset", "revision", "split", "sources", "validation"})
