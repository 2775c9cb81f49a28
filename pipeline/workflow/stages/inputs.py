"""What stages start from: the base model, an adapter from elsewhere, the model that variants are made of.

Whatever of it is not on this machine (any more) is fetched, as it was the first time.
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
from pipeline.models.sources import stored_bytes
from pipeline.system.files import fingerprint
from pipeline.tracking.events import Events
from pipeline.workflow.workspace import Workspace

if TYPE_CHECKING:
    from pipeline.models.checkpoint.shard_stream import PassingCheckpoint


def model_depends(config: Config, workspace: Workspace) -> dict:
    """The settings of the base model, and the hashes of its files where it is a local folder."""
    files = workspace.hashes_of(config.model.source)
    return config.model.model_dump(exclude={"low_disk"}) | {"files": files}


def adapter_depends(config: Config, workspace: Workspace) -> dict:
    """The hashes of the files of an adapter from elsewhere, where it is a local folder."""
    return workspace.hashes_of(config.merge.adapter) if config.merge.adapter else {}


def text_depends(config: MeasuredRun, workspace: Workspace) -> object:
    """The general text that is measured on: the hash of its file, or of what this Python brings."""
    source = config.evaluate.general
    return fingerprint(general_text(source)) if source.startswith("builtin:") else workspace.hashes_of(source)


def base_model(config: Config, workspace: Workspace, events: Events) -> Path:
    """The folder of the base model. A branch that moves on the Hub is read once, and then stays where it was."""
    from pipeline.models.sources import digest_here, fetch, is_local, model_digest

    settings, source = config.model.model_dump(), config.model.source
    here = model_digest(workspace.hashes_of(source)) if is_local(source) else None
    known = workspace.base_folder(settings)
    if known and here in (None, workspace.read_measurement("origin").get("digest")):
        return known
    pinned = workspace.base_revision(settings)
    model = config.model.model_copy(update={"revision": pinned}) if pinned else config.model
    events.progress(0, 1, "fetching the model")
    folder, found = fetch(model, workspace.base, lambda d, t: events.progress(d, t, "fetching the model"))
    # What is on no Hub has no revision, so a digest says later whether it is still the same.
    digest = {} if found.revision else {"digest": here or digest_here(source)}
    workspace.write_measurement("origin", asdict(found) | digest)
    workspace.remember_base(settings, folder, found.revision)
    return folder.resolve()


def adapter(config: Config, workspace: Workspace, events: Events) -> Path:
    """The folder of the adapter to merge: the one that was trained here, or the one that was brought."""
    from pipeline.models.sources import fetch_adapter

    if config.merge.adapter is None:
        return workspace.adapter
    events.progress(0, 1, "fetching the adapter")
    known = workspace.read_measurement("adapter")
    pinned = known.get("revision") if known.get("source") == config.merge.adapter else None
    tell = functools.partial(events.progress, what="fetching the adapter")
    folder, found = fetch_adapter(config.merge.adapter, pinned, tell)
    workspace.write_measurement(
        "adapter", {"source": found.source, "name": found.name, "revision": found.revision, "hub_id": found.hub_id}
    )
    return folder


def full_model(config: Config, workspace: Workspace, events: Events) -> Path:
    """The full-precision model that variants are made of and compared with."""
    return workspace.release if config.merges else base_model(config, workspace, events)


@contextlib.contextmanager
def shard_by_shard(
    config: Config, workspace: Workspace, events: Events, folder: Path
) -> Iterator[PassingCheckpoint | None]:
    """The checkpoint of a model whose weights never lie here together; None where they do, in `folder`."""
    if not config.model.low_disk:
        yield None
        return
    from pipeline.models.checkpoint.shard_stream import PassingCheckpoint

    tell = functools.partial(events.progress, what="fetching, rounding and writing")
    scratch, revision = workspace.folder / "shards.partial", workspace.base_revision(config.model.model_dump())
    with PassingCheckpoint(config.model.source, revision, folder, scratch, tell) as checkpoint:
        workspace.update(lambda ledger: replace(ledger, base=replace(ledger.base, bytes=checkpoint.file_bytes)))
        yield checkpoint


def model_bytes(config: Config, workspace: Workspace, folder: Path) -> int:
    """Size of the files of the full-precision model's weights, also where they lie here no more."""
    base = workspace.read_ledger().base
    return (config.model.low_disk and base and base.bytes) or stored_bytes(folder)


def run_texts(workspace: Workspace) -> RunTexts:
    """Return the texts that the models of this run are measured on."""
    return RunTexts(
        held_out=workspace.data / "held_out.jsonl",
        reference=workspace.measurements / "reference",
        template_was_supplied=workspace.read_measurement("data").get("template") == SUPPLIED_TEMPLATE,
        plan=workspace.read_measurement("texts"),
        keep_plan=functools.partial(workspace.write_measurement, "texts"),
    )


def reference(config: Config) -> str:
    """The key, in the results, of the model that others are compared with."""
    return "merged" if config.merges else "base"


def made_from(config: Config, workspace: Workspace) -> dict:
    """What the full-precision model depends on: earlier steps' outputs, and what came from elsewhere."""
    steps = workspace.state_of("train", "merge") if config.merges else {}
    return steps | ({} if config.data else {"model": model_depends(config, workspace)})


def without_limit(section: dict) -> dict:
    """Return a section of the configuration without a limit of time that is not set, as it was before there was one."""
    return {key: value for key, value in section.items() if (key, value) != ("max_minutes", None)}
