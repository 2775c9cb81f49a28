"""The model that a repository has now: what it was made of, and what of that is another now.

Asking costs a few requests and a look at the data; nothing is trained, and no weights are fetched.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ValidationError

from pipeline import hub, models
from pipeline.commands import command
from pipeline.config import PACKAGE_SOURCE, Config
from pipeline.data import Example, load_examples
from pipeline.data.sources import is_builtin, locate
from pipeline.data.splitting import place
from pipeline.download import in_one_line
from pipeline.errors import DataError, HubError, ModelError
from pipeline.files import fingerprint, read_json, sha256, write_json
from pipeline.hub import CARD, LINEAGE, Tree
from pipeline.hub.trouble import persist
from pipeline.packaged import find_packaged
from pipeline.private import file_name
from pipeline.workspace import Workspace

FEWEST = 16  # examples; from fewer the error of a difference is hardly known
NOT_FOR_THE_MODEL = {"data": {"revision"}, "model": {"revision", "low_disk"}, "train": {"checkpoint_every"}}


@dataclass(frozen=True)
class Live:
    """The release at the head of a repository.

    Attributes:
        head: the commit.
        model: a digest of the full model's files there; people may write into cards without changing it.
        lineage: its `tunepress.json`.
    """

    repo: str
    head: str
    model: str
    lineage: dict

    @property
    def results(self) -> dict:
        return self.lineage.get("results") or {}

    @property
    def weights(self) -> str:
        """A digest of the full model's weights, as `weights_of` makes it."""
        return weights_of({path: f["sha256"] for path, f in self.lineage["files"].items()})


@dataclass(frozen=True)
class Inputs:
    """What a run would be made of.

    Attributes:
        config: with the revisions of what is on the Hub put in, so that the run is of these.
        base: a digest of the base model's files.
        data: the commit of the data set, or where it is none on the Hub, the fingerprint of its examples.
    """

    config: Config
    base: str
    data: str

    def to_dict(self) -> dict:
        return {"base": self.base, "data": self.data, "settings": settings(self.config)}


def read_live(repo: str) -> Live | None:
    """The release that `repo` has; None where there is no repository, or nothing of ours in it.

    Raises:
        HubError: where a model is there that tunepress did not put there, or the Hub does not say.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    def attempt() -> Live | None:
        try:
            return live_in(hub.read_tree(repo))
        except RepositoryNotFoundError:
            return None

    return persist(repo, attempt)


def live_in(tree: Tree) -> Live | None:
    """The release in a tree, if there is one with a full model."""
    if tree.lineage.run is None or "config.json" not in tree.files:
        if "config.json" in tree.files:
            raise HubError(f"{tree.repo}: has a config.json that tunepress did not put there; use another repository")
        return None
    return Live(tree.repo, tree.head, model_in(tree), json.loads(tree.read(LINEAGE)))


def model_in(tree: Tree) -> str:
    """A digest of the full model at the root of a tree."""
    files = [(p, f.sha256 or f.blob) for p, f in sorted(tree.files.items()) if models.CHECKPOINT_FILES.match(p)]
    return fingerprint([file for file in files if file[0] not in (CARD, LINEAGE)])


def weights_of(files: Mapping[str, str]) -> str:
    """A digest of the full model's weights in a release, from the sha256 of its files by path."""
    return fingerprint({p: s for p, s in files.items() if "/" not in p and p.endswith(".safetensors")})


def inputs_of(config: Config) -> Inputs:
    """What a run would be made of now. Of what lies on the Hub only the commit is asked, and the hashes of files."""
    base, data = _base_commit(config), _data_commit(config)
    update = {
        "model": config.model.model_copy(update={"revision": base or config.model.revision}),
        "data": config.data.model_copy(update={"revision": data or config.data.revision}),
    }
    pinned = config.model_copy(update=update)
    digest = _files_at(config.model.source, base) if base else _base_digest(config)
    return Inputs(pinned, digest, data or load_examples(config.data).fingerprint)


def settings(config: Config) -> dict[str, object]:
    """The part of a configuration that makes the model, as dotted keys; of paths the last part, as lineages have it."""
    sections = {name: getattr(config, name).model_dump() for name in ("model", "data", "train", "merge")}
    flat = {}
    for name, section in sections.items():
        _flatten(name, {k: v for k, v in section.items() if k not in NOT_FOR_THE_MODEL.get(name, ())}, flat)
    for key in ("model.source", "data.source"):
        flat[key] = str(flat[key]) if ":" in str(flat[key]) else file_name(str(flat[key]))
    return flat


def settings_beside(config: Config) -> dict[str, object]:
    """The part of a configuration that makes what is published beside the model, and its figures, as dotted keys."""
    flat: dict[str, object] = {"publish.mirrors": config.publish.mirrors}
    _flatten("quantize", config.quantize.model_dump(), flat)
    _flatten("evaluate", config.evaluate.model_dump(exclude={"device"}), flat)
    general = config.evaluate.general
    return flat | {"evaluate.general": general if ":" in general else file_name(general)}


def changes_beside(live: Live, inputs: Inputs) -> tuple[str, ...]:
    """The keys of what else is published with the model that are not as they were, where `changes` finds nothing."""
    was, now = (settings_beside(c) for c in (Config.model_validate(live.lineage["configuration"]), inputs.config))
    return tuple(key for key in now if was.get(key) != now[key])


def changes(live: Live, inputs: Inputs) -> tuple[str, ...]:
    """What a new run would be made of that the live model was not: a line each; none where it is all the same."""
    found = [*_changed_base(live, inputs), *_changed_data(live, inputs)]
    try:
        made_with = settings(Config.model_validate(live.lineage["configuration"]))
    except (ValidationError, KeyError, AttributeError):
        return (*found, "configuration: the live model's is of another version of tunepress")
    now = settings(inputs.config)
    found += [f"{k}: {made_with.get(k)} -> {v}" for k, v in now.items() if made_with.get(k) != v]
    return tuple(found)


def untouched(held_out: tuple[Example, ...], data: str, live: Live) -> tuple[tuple[Example, ...], str | None]:
    """The held-out examples that the live model was not trained on either.

    Args:
        held_out: of this run, none of which it trains on.
        data: the fingerprint of this run's examples.

    Returns:
        The examples, and what has to be said of them, if anything.

    Raises:
        DataError: where there are too few to compare on.
    """
    theirs = live.results.get("data") or {}
    if len(held_out) < FEWEST:
        raise DataError(
            f"{live.repo}: to compare with it takes {FEWEST} held-out examples, and there are {len(held_out)}; "
            "raise data.held_out"
        )
    if theirs.get("fingerprint") == data:
        return held_out, None
    if not theirs.get("trained_from"):
        return held_out, (
            "the live release does not say how its data was split, so it may have been trained on some of "
            "these examples, which speaks for it"
        )
    seed = live.lineage["configuration"]["data"]["seed"]
    kept = tuple(e for e in held_out if place(e, seed) < theirs["trained_from"])
    if len(kept) < FEWEST:
        raise DataError(
            f"{live.repo}: to compare with it takes {FEWEST} held-out examples, and of {len(held_out)} only "
            f"{len(kept)} were surely held out from the live model too; set data.seed to its {seed}, raise "
            f"data.held_out, or publish without comparing: {command('run')}"
        )
    left_out = len(held_out) - len(kept)
    return kept, f"{left_out} held-out examples left out that the live model may know" if left_out else None


def note(workspace: Workspace, live: Live | None, inputs: Inputs) -> None:
    """Leave in the workspace what the run is compared with, until it is published."""
    about = {"live": asdict(live) if live else None, "inputs": inputs.to_dict()}
    write_json(_noted(workspace), about)


def noted(workspace: Workspace) -> tuple[Live | None, dict]:
    """What `note` left: the live model, and the inputs."""
    about = read_json(_noted(workspace), {"live": None, "inputs": {}})
    return (Live(**about["live"]) if about["live"] else None), about["inputs"]


def forget(workspace: Workspace) -> None:
    _noted(workspace).unlink(missing_ok=True)


def own_weights(workspace: Workspace) -> str:
    """A digest of the new model's weights, to be compared with that of a release."""
    files = workspace.state_of("merge").get("merge", {})
    return weights_of({path.removeprefix("release/"): sha256 for path, sha256 in files.items()})


def check_is_compared(workspace: Workspace, tree: Tree) -> None:
    """Refuse to publish on top of another model than the one that this run was compared with, if it was with any.

    Its own is none: it is there where the answer to a commit was lost.

    Raises:
        HubError: where somebody else has published in between.
    """
    if not _noted(workspace).is_file():
        return
    compared, now = noted(workspace)[0], live_in(tree)
    is_ours = now is not None and now.weights == own_weights(workspace)
    if not is_ours and (compared.model if compared else None) != (now.model if now else None):
        raise HubError(f"{tree.repo}: has another model than the one that this was compared with; retrain again")


def _noted(workspace: Workspace) -> Path:
    return workspace.folder / "live.json"


def _base_commit(config: Config) -> str | None:
    from huggingface_hub import HfApi

    source = config.model.source
    if PACKAGE_SOURCE.match(source) or models.is_local(source):
        return None
    with in_one_line(source, config.model.revision, "the Hub could not be asked"):
        return HfApi().model_info(source, revision=config.model.revision).sha


def _files_at(source: str, commit: str) -> str:
    with in_one_line(source, commit, "the Hub could not be asked"):
        return model_in(hub.read_tree(source, commit))


def _base_digest(config: Config) -> str:
    if package := PACKAGE_SOURCE.match(config.model.source):
        return sha256(find_packaged(*package.groups()))
    folder = Path(config.model.source).expanduser()
    files = [path for path in sorted(folder.iterdir()) if models.CHECKPOINT_FILES.match(path.name) and path.is_file()]
    return fingerprint({path.name: sha256(path) for path in files})


def _data_commit(config: Config) -> str | None:
    from pipeline.data.hub import commit_of

    source = config.data.source
    return None if is_builtin(source) or locate(source) else commit_of(config.data)


def _changed_base(live: Live, inputs: Inputs) -> list[str]:
    source, now = inputs.config.model.source, inputs.config.model.revision
    then, told = (live.lineage.get("base") or {}).get("revision"), live.results.get("retraining")
    # What is recorded beside the comparison holds for the very model that it was made of.
    known = told["inputs"].get("base") if told and told.get("weights") == live.weights else None
    if known == inputs.base or (now and now == then):
        return []
    if now and then:  # a new commit may have changed no more than a card
        with contextlib.suppress(ModelError):  # where it is gone, or is of another repository
            if _files_at(source, then) == inputs.base:
                return []
    return [f"base model {file_name(source)}: {_short(then or known)} -> {_short(now or inputs.base)}"]


def _changed_data(live: Live, inputs: Inputs) -> list[str]:
    theirs, source = live.lineage.get("data") or {}, inputs.config.data.source
    if inputs.data in (theirs.get("revision"), theirs.get("fingerprint")):
        return []
    now = load_examples(inputs.config.data).fingerprint  # a new commit may have changed no more than a card
    if now == theirs.get("fingerprint"):
        return []
    return [f"data {file_name(source)}: {_short(theirs.get('fingerprint'))} -> {_short(now)}"]


def _flatten(prefix: str, content: dict, flat: dict[str, object]) -> None:
    for key, value in content.items():
        if isinstance(value, dict):
            _flatten(f"{prefix}.{key}", value, flat)
        else:
            flat[f"{prefix}.{key}"] = value


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "not recorded"
