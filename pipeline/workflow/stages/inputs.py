"""Inputs of stages: the base model, an adapter from elsewhere, the full-precision model, texts.

An input that is no longer on this machine is fetched again, in the same revision.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.schema import Config, MeasuredRun
from pipeline.data import general_text
from pipeline.data.describe import SUPPLIED_TEMPLATE
from pipeline.evaluation.texts import RunTexts
from pipeline.models.checkpoint_files import stored_bytes
from pipeline.system.files import Digest, fingerprint
from pipeline.tracking.events import Events
from pipeline.workflow.ledger import BaseModel, Ledger
from pipeline.workflow.workspace import Workspace

TEMPLATE = "chat_template.jinja"  # of training, if the configuration chooses it

if TYPE_CHECKING:
    from pipeline.models.checkpoint.shard_stream import PassingCheckpoint


def model_depends(config: Config, workspace: Workspace) -> dict:
    """Return the settings of the base model, and the hashes of its files if it is a local folder."""
    files = hashes_of(workspace, config.model.source)
    return config.model.model_dump(exclude={"low_disk"}) | {"files": files}


def adapter_depends(config: Config, workspace: Workspace) -> dict:
    """Return the hashes of the files of an adapter from elsewhere, if it is a local folder."""
    return hashes_of(workspace, config.merge.adapter) if config.merge.adapter else {}


def text_depends(config: MeasuredRun, workspace: Workspace) -> object:
    """Return the hash of the general text (of its file, or of the text of this Python), and how it is measured."""
    source = config.evaluate.general
    text = fingerprint(general_text(source)) if source.startswith("builtin:") else hashes_of(workspace, source)
    return {"text": text, "errors": "by cluster"}  # figures of earlier versions are measured again


def base_model(config: Config, workspace: Workspace, events: Events) -> Path:
    """Return the folder of the base model, fetched if need be. A branch on the Hub stays at its first commit."""
    from pipeline.models.checkpoint_files import model_digest
    from pipeline.models.sources import digest_here, fetch, is_local

    settings, source = config.model.model_dump(), config.model.source
    here = model_digest(hashes_of(workspace, source)) if is_local(source) else None
    known = workspace.read_ledger().base
    is_there = known is not None and known.model == settings and (Path(known.folder) / "config.json").is_file()
    # The order matters: a fetch replaces the measurement, even if it is damaged.
    if known and is_there and here in (None, workspace.read_measurement("origin").get("digest")):
        return Path(known.folder)
    pinned = base_revision(config, workspace)
    model = config.model.model_copy(update={"revision": pinned}) if pinned else config.model
    events.progress(0, 1, "fetching the model")
    progress = functools.partial(events.progress, what="fetching the model")
    folder, found = fetch(model, workspace.base, progress, lambda line: events.show([line]))
    # A local model has no revision, so a digest shows later if it has changed.
    digest = {} if found.revision else {"digest": here or digest_here(source)}
    workspace.write_measurement("origin", asdict(found) | digest)
    size = known.bytes if known and (known.model, known.revision) == (settings, found.revision) else None
    base = BaseModel(settings, str(folder.resolve()), found.revision, size)
    workspace.update(lambda ledger: replace(ledger, base=base))
    return folder.resolve()


def adapter(config: Config, workspace: Workspace, events: Events) -> Path:
    """Return the folder of the adapter to merge, or of the weights that were trained here in its place."""
    from pipeline.models.sources import fetch_adapter

    if config.merge.adapter is None:
        return workspace.adapter if config.train.adapts else workspace.trained
    events.progress(0, 1, "fetching the adapter")
    known = workspace.read_measurement("adapter")
    pinned = known.get("revision") if known.get("source") == config.merge.adapter else None
    tell = functools.partial(events.progress, what="fetching the adapter")
    folder, found = fetch_adapter(config.merge.adapter, pinned, tell)
    workspace.write_measurement(
        "adapter", {"source": found.source, "name": found.name, "revision": found.revision, "hub_id": found.hub_id}
    )
    return folder


def device_name(config: Config) -> str:
    """Return the device that models are run on: `auto`, `cpu` or `cuda`; runs that measure nothing choose it."""
    return config.evaluate.device if isinstance(config, MeasuredRun) else "auto"


def full_model(config: Config, workspace: Workspace, events: Events) -> Path:
    """Return the full-precision model that variants are made of and compared with."""
    return workspace.release if config.merges else base_model(config, workspace, events)


@contextlib.contextmanager
def shard_by_shard(
    config: Config, workspace: Workspace, events: Events, folder: Path
) -> Iterator[PassingCheckpoint | None]:
    """Yield the streamed checkpoint of a model whose weights are not kept; None if they all lie in `folder`."""
    if not config.model.low_disk:
        yield None
        return
    from pipeline.models.checkpoint.shard_stream import PassingCheckpoint

    tell = functools.partial(events.progress, what="fetching, rounding and writing")
    scratch, revision = workspace.folder / "shards.partial", base_revision(config, workspace)
    assert revision, "a model that is read shard by shard comes from a commit on the Hub"
    with PassingCheckpoint(config.model.source, revision, folder, scratch, tell) as checkpoint:

        def with_size(ledger: Ledger) -> Ledger:
            base = ledger.base and replace(ledger.base, bytes=checkpoint.file_bytes)
            return replace(ledger, base=base)

        workspace.update(with_size)
        yield checkpoint


def model_bytes(config: Config, workspace: Workspace, folder: Path) -> int:
    """Return the size of the full-precision model's weights, even if they were not kept."""
    base = workspace.read_ledger().base
    return (config.model.low_disk and base and base.bytes) or stored_bytes(folder)


def run_texts(workspace: Workspace) -> RunTexts:
    """Return the texts that the models of this run are measured on."""
    chosen = workspace.data / TEMPLATE
    return RunTexts(
        held_out=workspace.data / "held_out.jsonl",
        reference=workspace.measurements / "reference",
        template=chosen.read_text(encoding="utf-8") if chosen.is_file() else None,
        template_was_supplied=workspace.read_measurement("data").get("template") == SUPPLIED_TEMPLATE,
        plan=workspace.read_measurement("texts"),
        keep_plan=functools.partial(workspace.write_measurement, "texts"),
    )


def keep_template(workspace: Workspace, chosen: str | None) -> None:
    """Keep the chat template that was chosen for training, for the later stages."""
    (workspace.data / TEMPLATE).unlink(missing_ok=True)
    if chosen is not None:
        (workspace.data / TEMPLATE).write_text(chosen, encoding="utf-8")


def reference(config: Config) -> str:
    """Return the key, in the results, of the model that others are compared with."""
    return "merged" if config.merges else "base"


def made_from(config: Config, workspace: Workspace) -> dict:
    """Return the dependencies of the full-precision model: outputs of earlier steps, and outside inputs."""
    steps = workspace.state_of("train", "merge") if config.merges else {}
    return steps | ({} if config.data else {"model": model_depends(config, workspace)})


def without_limit(section: dict) -> dict:
    """Return a section of the configuration without an unset time limit, so that earlier fingerprints stay valid."""
    return {key: value for key, value in section.items() if (key, value) != ("max_minutes", None)}


def hashes_of(workspace: Workspace, named: str) -> dict[str, str]:
    """Return the sha256 of a file, or of the files in a folder, by name; {} if it never existed.

    The ledger keeps them by size and time, so that gigabytes are read once. A deleted file
    counts as unchanged, because a finished run does not need its inputs to be published.
    """
    path, before = Path(named).expanduser(), workspace.read_ledger().inputs.get(named, {})
    if not path.exists():
        return {name: digest.sha256 for name, digest in before.items()}
    found = {}
    for file in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
        state, last = file.stat(), before.get(file.name)
        same = last if last and (last.size, last.mtime_ns) == (state.st_size, state.st_mtime_ns) else None
        found[file.name] = same or Digest.of(file)
    if found != before:
        workspace.update(lambda ledger: replace(ledger, inputs={**ledger.inputs, named: found}))
    return {name: digest.sha256 for name, digest in found.items()}


def base_revision(config: Config, workspace: Workspace) -> str | None:
    """Return the commit of the base model that was fetched for these settings."""
    known, model = workspace.read_ledger().base, config.model.model_dump()
    # The setting `low_disk` does not change the model.
    if known and {**known.model, "low_disk": None} == {**model, "low_disk": None}:
        return known.revision
    return None
