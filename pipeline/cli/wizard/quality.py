"""Questions about the quality of variants: how they are rounded, and the text that they are calibrated on."""

from __future__ import annotations

from pipeline.cli.wizard.draft import Draft
from pipeline.cli.wizard.prompts import Question, one_of
from pipeline.config.calibration import CALIBRATED_QUALITY, DISTILLED_QUALITY, FAST_QUALITY, QUALITIES
from pipeline.system.text_format import clock

TRAINING = "training"  # the answer for the default: training data and general text
ABOUT = {
    FAST_QUALITY: "rounds the weights as they are",
    CALIBRATED_QUALITY: "rounds so that the outputs of layers change least on a text; loses less",
    DISTILLED_QUALITY: "then trains the scales as well; loses least",
}


def _can_calibrate(draft: Draft) -> bool:
    """Return True if there is a variant that a calibration makes better."""
    return draft.quantizes and bool(draft.config({"quantize.quality": CALIBRATED_QUALITY}).quantize.calibrated)


def _about_quality(draft: Draft) -> str:
    return "\n  ".join(["How four and five bits are rounded:", *(_described(draft, name) for name in QUALITIES)])


def _described(draft: Draft, quality: str) -> str:
    config = draft.config({"quantize.quality": quality})
    if not draft.fits(config):
        return f"{quality}: {ABOUT[quality]}; does not fit this machine"
    seconds = draft.preparing_seconds(config)
    if quality == FAST_QUALITY or seconds is None:
        return f"{quality}: {ABOUT[quality]}"
    return f"{quality}: {ABOUT[quality]}; takes about {clock(seconds)} more"


def _default_quality(draft: Draft) -> str:
    config = draft.config()
    return config.quantize.quality if draft.fits(config) else FAST_QUALITY


def _take_quality(draft: Draft, answer: str) -> None:
    settings = {"quantize.quality": one_of(answer, QUALITIES)}
    draft.check_fits(draft.config(settings))
    draft.set(settings)


def _needs_text(draft: Draft) -> bool:
    """Return True if a variant is calibrated, or has a target."""
    quantize = draft.config().quantize
    return draft.quantizes and bool(quantize.calibrated or quantize.targeted)


def _take_text(draft: Draft, answer: str) -> None:
    from pipeline.workflow.stages.calibration_text import check_sources, look_up

    named = list(dict.fromkeys(filter(None, (part.strip() for part in answer.split(",")))))
    sources = [] if set(named) <= {TRAINING, draft.config().data.source} else named
    settings = {"quantize.calibration.source": sources or None}
    config = draft.config(settings)
    check_sources(config)
    for source in sources:
        look_up(source)
    draft.set(settings)


QUESTIONS = (
    Question("quality", "Quality", _about_quality, _default_quality, _take_quality, _can_calibrate),
    Question(
        "calibration-text",
        "Calibration text",
        lambda draft: (
            f"{TRAINING}: training data, mixed with general text. Or a file, a data set on the Hub (USER/NAME), or "
            "several with commas, which are mixed evenly. Never a text that is measured on."
        ),
        lambda draft: ",".join(draft.config().quantize.calibration.sources) or TRAINING,
        _take_text,
        _needs_text,
    ),
)
