"""The subject of a card: results, configuration, and the names of models and sources in markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.config.catalog import VARIANTS
from pipeline.config.schema import PACKAGE_SOURCE, REPO_ID, Config
from pipeline.evaluation.results import BASE, MERGED, Origin, Results
from pipeline.publishing.cards.markdown import Markdown, code, escape, listed
from pipeline.publishing.lineage import hub_sources
from pipeline.system.redaction import file_name

ROOT = MERGED  # the model at the root of a release, if it has one
_BUILTIN = {
    "builtin:python-docs": "docstrings of Python's standard library",
    "builtin:python-docs-pairs": "docstrings of Python's standard library, each with a worse answer",
    "builtin:python-topics": "topics of Python's language reference",
}


@dataclass(frozen=True)
class About:
    """The subject of a card.

    Attributes:
        name: the title.
        location: `user/model`, or the path of the release's folder.
        config: the configuration of the run.
        results: the figures of the models in the release; any of them may be missing.
        chats: True if the tokenizer has a chat template.
        mirrors: variant -> the repository that holds it at its root, if that exists already.
        files: variant that is one file -> the name of that file.
    """

    name: str
    location: str
    config: Config
    results: Results
    chats: bool = True
    mirrors: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """Return the key of the full-precision model that variants are compared with."""
        return ROOT if self.config.merges else BASE

    @property
    def repo(self) -> str | None:
        """Return the release's repository on the Hub, if it has one."""
        return self.location if self.location == self.config.publish.repo else None

    @property
    def is_guest(self) -> bool:
        """Return True if variants go into the repository of their source, whose card belongs to its author."""
        home, ours = self.results.origin.hub_id or "", self.repo or ""
        return self.reference != ROOT and ours != "" and home.casefold() == ours.casefold()

    @property
    def explains_adapter(self) -> bool:
        """Return True if an adapter was trained here whose base is in no repository."""
        return self.config.data is not None and self.config.has_adapter and not self.results.origin.hub_id

    @property
    def license_conflict(self) -> bool:
        """Return True if the configuration names another license than the base model."""
        chosen, of_base = self.config.publish.license, self.results.origin.license
        return bool(chosen and of_base and chosen != of_base.lower())

    def models(self, variants: Sequence[str], with_base: bool = True) -> dict[str, Markdown]:
        """Return the models of a card in its order: key in the results -> name."""
        found = {BASE: Markdown("original model" if self.is_guest else "base model")}
        found = found if with_base or self.reference == BASE else {}
        if self.reference == ROOT:
            found[ROOT] = Markdown("merged model")
        return found | {v: place(v) for v in variants}

    @property
    def data_source(self) -> str | None:
        """Return the source of the training data, as it was named when it was read."""
        recorded = self.results.data.source if self.results.data else None
        return recorded or (self.config.data.source if self.config.data else None)

    @property
    def data_sources(self) -> list[str]:
        """Return the sources of the data, and of preference pairs, as they were named when they were read."""
        data = self.results.data
        several = [part.source for part in data.parts.values() if part.source] if data else []
        pairs = data.preference.source if data and data.preference else None
        return [*(several or filter(None, [self.data_source])), *(pairs.split(", ") if pairs else [])]

    @property
    def data_repos(self) -> list[str]:
        """Return the training data sets on the Hub."""
        there = hub_sources(self.results)
        return [source for source in dict.fromkeys(self.data_sources) if source in there]

    def text_source(self, source: str) -> Markdown:
        """Return the origin of a text or data set. A local file is named without its folder."""
        if several := self._several(source):
            return listed(map(self.text_source, several), " and ")
        if source in _BUILTIN:
            return Markdown(f"{_BUILTIN[source]} ({code(source)})")
        return (
            link(source, "datasets/") if source in self.data_repos else Markdown(f"the file {code(file_name(source))}")
        )

    def public_name(self, source: str) -> str:
        """Return a source for metadata: a name that reveals nothing about the machine."""
        if several := self._several(source):
            return ", ".join(map(self.public_name, several))
        return source if source in _BUILTIN or source in self.data_repos else file_name(source)

    def _several(self, source: str) -> list[str]:
        """Return the sources of the data that are joined in `source`, if there are several."""
        pieces = source.split(", ")
        return pieces if len(pieces) > 1 and set(pieces) <= set(self.data_sources) else []

    @property
    def home(self) -> Markdown:
        """Return the release for a card: a link, or the folder's name."""
        return link(self.repo) if self.repo else code(file_name(self.location))


def place(variant: str) -> Markdown:
    """Return the folder of a variant, and its file type if several variants share that folder."""
    folder = code(f"{VARIANTS[variant].folder}/")
    kind = VARIANTS[variant].file_type
    return Markdown(f"{folder} {kind}") if kind else folder


def link(repo: str, kind: str = "", revision: object = None) -> Markdown:
    """Return a link to a repository on the Hub, at a revision. `kind` is "datasets/" for data sets."""
    at = f" at revision {code(str(revision)[:12])}" if revision else ""
    return Markdown(f"[{escape(repo)}](https://huggingface.co/{kind}{repo}){at}")


def model_source(found: Origin | None, configured: str | None = None) -> Markdown:
    """Return the origin of a model or adapter. A local folder is named without its path.

    Args:
        found: the record from when it was read.
        configured: the name in the configuration, if nothing was recorded.
    """
    origin = found or Origin()
    source, hub = origin.source or configured or "", origin.hub_id or ""
    if REPO_ID.fullmatch(hub):
        return link(hub, revision=origin.revision)
    if package := PACKAGE_SOURCE.match(source):
        place = Markdown(f"{code(package[2])} of the Python package {code(package[1])}")
    elif origin.source:
        place = Markdown(f"the local folder {code(file_name(source))}")
    else:
        place = code(source if REPO_ID.match(source) else file_name(source))
    return Markdown(f"{escape(origin.name)} ({place})") if origin.name else place
