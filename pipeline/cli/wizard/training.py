"""Questions about training: profile, epochs, steps, sequence length, and batch size."""

from __future__ import annotations

import contextlib

from pipeline.cli.wizard.draft import Draft
from pipeline.cli.wizard.presets import PROFILES
from pipeline.cli.wizard.prompts import Question, one_of
from pipeline.errors import ConfigError
from pipeline.planning.advice import smaller_batches

PASSES_COUNT = "no"
LEAST_LENGTH = 32  # tokens; a chat template alone takes half of them


def _about_profile(draft: Draft) -> str:
    profiles = [f"{name}: {profile.about}" for name, profile in PROFILES.items()]
    return "\n  ".join(["Memory use and output size:", *profiles])


def _default_profile(draft: Draft) -> str:
    """Return the first profile that fits this machine; else the last one, whose sizes are reduced further."""
    return next((n for n, p in PROFILES.items() if draft.fits(draft.config(p.settings))), list(PROFILES)[-1])


def _take_profile(draft: Draft, answer: str) -> None:
    profile = one_of(answer, list(PROFILES))
    wanted = PROFILES[profile].settings
    settings = draft.fitting(wanted)
    draft.set(settings)
    draft.profile = profile
    if changed := [f"{key}={value}" for key, value in settings.items() if wanted.get(key) != value]:
        draft.tell(f"made smaller to fit this model and this machine: {' '.join(changed)}")


def _take_max_steps(draft: Draft, answer: str) -> None:
    draft.set({"train.max_steps": None if answer.lower() in (PASSES_COUNT, "none") else _number(answer)})


def _take_max_length(draft: Draft, answer: str) -> None:
    """Check that one sequence of this length fits. The next question asks for the batch size."""
    length = {"train.max_length": _number(answer)}
    if draft.config(length).train.max_length < LEAST_LENGTH:
        raise ConfigError(f"{answer}: too short for a question and an answer. Try: at least {LEAST_LENGTH}")
    draft.check_fits(draft.config({**length, "train.batch_size": 1}))
    draft.set(length)


def _default_batch_size(draft: Draft) -> str:
    """Return the largest batch size that fits, up to that of the profile, or 1."""
    train = draft.config().train
    sizes = (train.batch_size, *(size for size, _ in smaller_batches(train)))
    return str(next((size for size in sizes if draft.fits(draft.config({"train.batch_size": size}))), 1))


def _take_batch_size(draft: Draft, answer: str) -> None:
    """Set the batch size, and keep the sequences of an optimizer step as near as possible to their number before."""
    before = draft.config().train
    step = before.batch_size * before.accumulate
    size = draft.config({"train.batch_size": _number(answer)}).train.batch_size
    accumulate = max(1, round(step / size))
    settings = {"train.batch_size": size, "train.accumulate": accumulate}
    draft.check_fits(draft.config(settings))
    draft.set(settings)
    if size * accumulate != step:
        draft.tell(f"an optimizer step has {size * accumulate} sequences now: {step} is no multiple of {size}")


def _number(answer: str) -> int | float:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(answer)
    raise ConfigError(f"{answer!r}: not a number. Try: digits only")


QUESTIONS = (
    Question("profile", "Profile", _about_profile, _default_profile, _take_profile),
    Question(
        "epochs",
        "Epochs",
        lambda draft: "Passes over the data: 1 to 3 is usual; with more, the model learns examples by heart.",
        lambda draft: f"{draft.config().train.epochs:g}",
        lambda draft, answer: draft.set({"train.epochs": _number(answer)}),
    ),
    Question(
        "max-steps",
        "Maximum steps",
        lambda draft: f"Stop after this many optimizer steps; {PASSES_COUNT}: train all epochs.",
        lambda draft: str(draft.config().train.max_steps or PASSES_COUNT),
        _take_max_steps,
    ),
    Question(
        "max-length",
        "Maximum length",
        lambda draft: "In tokens of about 4 letters. Longer examples are cut; longer sequences need more memory.",
        lambda draft: str(draft.config().train.max_length),
        _take_max_length,
    ),
    Question(
        "batch-size",
        "Batch size",
        lambda draft: "Sequences at a time. More is faster if memory allows; the result hardly changes.",
        _default_batch_size,
        _take_batch_size,
    ),
)
