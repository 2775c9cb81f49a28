"""Inputs of a run, and how they differ from those of the published model.

This takes a few requests and reads the data. A base model in a local folder or a Python package is read in full.
Nothing is trained, and no weights are downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pydantic import ValidationError

from pipeline.config.schema import PACKAGE_SOURCE, Config, MeasuredRun, TrainingRun
from pipeline.config.schema import Data as DataSettings
from pipeline.data import load_examples
from pipeline.data.sources import is_builtin, locate
from pipeline.errors import ModelError
from pipeline.evaluation.data_result import Data
from pipeline.hub.download import in_one_line
from pipeline.hub.retry import retry
from pipeline.models import sources
from pipeline.publishing.published_model import PublishedModel, is_same_model, read_published
from pipeline.system.files import fingerprint
from pipeline.system.redaction import file_name
from pipeline.workflow.stages.calibration_text import digest_now

CALIBRATION_TEXT = "quantize.calibration.source"
NOT_FOR_THE_MODEL = {
    "data": {"revision"},
    "model": {"revision", "low_disk"},
    "train": {"checkpoint_every", "keep_checkpoints"},
}


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run.

    Attributes:
        config: the configuration with the present commits of the Hub, so that the run uses these.
        base: digest of the base model's files.
        data: commit of the data set; if it is not on the Hub, or has several sources, the fingerprint of its examples.
        pairs: the same of the data of `train.preference`; None without it.
    """

    config: TrainingRun
    base: str
    data: str
    pairs: str | None = None

    def to_dict(self) -> dict:
        """Return everything that a comparison depends on, except the published model."""
        tokens = self.config.evaluate.max_tokens
        known = {"base": self.base, "data": self.data, "settings": settings(self.config), "max_tokens": tokens}
        return known | ({"pairs": self.pairs} if self.pairs else {})


def inputs_of(config: TrainingRun) -> Inputs:
    """Return the present inputs of a run. From the Hub only commits and hashes of files are read."""
    base = _base_commit(config)
    data, found = _pinned(config.data, config.train.loss_on)
    update = {"model": config.model.model_copy(update={"revision": base or config.model.revision}), "data": data}
    pairs = None
    if second := config.train.preference:
        data, pairs = _pinned(second.data, config.train.loss_on)
        preference = second.model_copy(update={"data": data})
        update["train"] = config.train.model_copy(update={"preference": preference})
    digest = _digest_at(config.model.source, base) if base else sources.digest_here(config.model.source)
    return Inputs(config.model_copy(update=update), digest, found, pairs)


def _pinned(data: DataSettings, loss_on: str) -> tuple[DataSettings, str]:
    """Return a data set with its present commits, and the commit or the fingerprint that tells if it changed."""
    commits = _data_commits(data)
    pinned = data.at_revisions(commits)
    alone = commits[0] if len(commits) == 1 else None
    return pinned, alone or load_examples(pinned, loss_on).fingerprint


def settings(config: Config) -> dict[str, object]:
    """Return the settings that determine the model, by dotted key; of paths only the name, as in lineages."""
    sections = {name: getattr(config, name).model_dump() for name in ("model", "data", "train", "merge")}
    flat: dict[str, object] = {}
    for name, section in sections.items():
        _flatten(name, {k: v for k, v in section.items() if k not in NOT_FOR_THE_MODEL.get(name, ())}, flat)
    for data in ("data", "train.preference.data"):
        for key in ("source", "chat_template", "validation.source"):
            if flat.get(f"{data}.{key}") is not None:
                flat[f"{data}.{key}"] = _named(str(flat[f"{data}.{key}"]))
        if rows := cast("list[dict]", flat.get(f"{data}.sources", [])):
            flat[f"{data}.sources"] = [{**row, "source": _named(row["source"]), "revision": None} for row in rows]
        for key in ("revision", "validation.revision"):
            flat.pop(f"{data}.{key}", None)
    flat["model.source"] = _named(str(flat["model.source"]))
    return flat


def _named(source: str) -> str:
    return source if ":" in source else file_name(source)


def settings_beside(config: MeasuredRun) -> dict[str, object]:
    """Return the settings of variants, figures and the card, which do not change the model, by dotted key."""
    keys = ("mirrors", "license", "description")
    flat: dict[str, object] = {f"publish.{key}": getattr(config.publish, key) for key in keys}
    _flatten("quantize", config.quantize.model_dump(), flat)
    _flatten("evaluate", config.evaluate.model_dump(exclude={"device"}), flat)
    flat["evaluate.general"] = _named(config.evaluate.general)
    flat[CALIBRATION_TEXT] = [_named(source) for source in config.quantize.calibration.sources]
    return flat


def changes_beside(live: PublishedModel, inputs: Inputs) -> tuple[str, ...]:
    """Return the changed keys of `settings_beside`; call this only if `changes` is empty."""
    was, now = (settings_beside(c) for c in (made_with(live), inputs.config))
    found = [key for key in {**now, **was} if was.get(key) != now.get(key)]
    if CALIBRATION_TEXT not in found:
        digests = {made.weights.calibration_digest for made in live.results.variants.values() if made.weights} - {None}
        if digests and digest_now(inputs.config) not in {None, *digests}:
            found.append(f"the content of {CALIBRATION_TEXT}")
    return tuple(found)


def changes(live: PublishedModel, inputs: Inputs) -> tuple[str, ...]:
    """Return one line for each input that differs from the inputs of the published model."""
    found = [*_changed_base(live, inputs), *_changed_data(live, inputs), *_changed_template(live, inputs)]
    try:
        then = settings(made_with(live))
    except (ValidationError, KeyError, AttributeError):
        return (*found, "configuration: the published model was made by another version of tunepress")
    now = settings(inputs.config)
    keys = [key for key in {**now, **then} if then.get(key) != now.get(key)]
    found += [f"{key}: {then.get(key, 'default')} -> {now.get(key, 'default')}" for key in keys]
    return tuple(found)


def made_with(live: PublishedModel) -> TrainingRun:
    """Return the configuration of the run that made the published model.

    Raises:
        ValidationError, KeyError: if another version of tunepress wrote it.
    """
    return TrainingRun.model_validate(live.lineage["configuration"])


def _base_commit(config: Config) -> str | None:
    from huggingface_hub import HfApi

    source = config.model.source
    if PACKAGE_SOURCE.match(source) or sources.is_local(source):
        return None
    with in_one_line(source, config.model.revision, "the Hub could not be asked"):
        return retry(source, lambda: HfApi().model_info(source, revision=config.model.revision)).sha


def _digest_at(source: str, commit: str) -> str:
    there = read_published(source, commit)
    if there is None:
        raise ModelError(f"model.source {source}: the commit {commit[:12]} disappeared while it was read. Try: again")
    return there.model


def _data_commits(data: DataSettings) -> list[str | None]:
    """Return the present commit of each source of a data set, None for one that is not on the Hub."""
    from pipeline.data.hub import commit_of

    return [None if is_builtin(part.source) or locate(part.source) else commit_of(part) for part in data.all_parts]


def _changed_base(live: PublishedModel, inputs: Inputs) -> list[str]:
    source, now = inputs.config.model.source, inputs.config.model.revision
    base, told = live.lineage.get("base") or {}, live.results.retraining
    then, known = base.get("revision"), base.get("digest")
    if told and told.weights == live.weights:  # recorded for exactly this model
        known = told.inputs.get("base")
    if known == inputs.base or (now and now == then):
        return []
    if now and then and is_same_model(source, then, now):  # the new commit changed only the card
        return []
    return [f"base model {file_name(source)}: {_short(then or known)} -> {_short(now or inputs.base)}"]


def _changed_data(live: PublishedModel, inputs: Inputs) -> list[str]:
    """Return a line for each data set whose examples changed: that of the training, and that of `train.preference`."""
    theirs, config = live.lineage.get("data") or {}, inputs.config
    compared = [(config.data, inputs.data, theirs.get("revision"), theirs.get("fingerprint"))]
    pairs, second = (live.results.data or Data()).preference, config.train.preference
    if pairs and second and inputs.pairs:  # one that is new, or gone, is a changed setting
        compared.append((second.data, inputs.pairs, pairs.revision, pairs.fingerprint))
    lines = []
    for data, known, *then in compared:
        # A new commit may have changed only the card.
        if known in then or (now := load_examples(data, config.train.loss_on).fingerprint) == then[1]:
            continue
        named = ", ".join(file_name(part.source) for part in data.all_parts)
        lines.append(f"data {named}: {_short(then[1])} -> {_short(now)}")
    return lines


def _changed_template(live: PublishedModel, inputs: Inputs) -> list[str]:
    """Return a line if the file that `data.chat_template` names has other content than at the training."""
    chosen, then = (
        Path(inputs.config.data.chat_template or "").expanduser(),
        (live.results.data or Data()).chosen_digest,
    )
    if then is None or not chosen.is_file():
        return []
    now = fingerprint(chosen.read_text(encoding="utf-8", errors="replace"))
    return [] if now == then else [f"data.chat_template {chosen.name}: {_short(then)} -> {_short(now)}"]


def _flatten(prefix: str, content: dict, flat: dict[str, object]) -> None:
    for key, value in content.items():
        if isinstance(value, dict):
            _flatten(f"{prefix}.{key}", value, flat)
        else:
            flat[f"{prefix}.{key}"] = value


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "not recorded"
