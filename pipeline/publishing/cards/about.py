"""What a card is about: results, configuration, and the names of models and sources as markdown.

Every figure in a card is read from here, from `results.json` or the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.config.catalog import VARIANTS
from pipeline.config.schema import PACKAGE_SOURCE, REPO_ID, Config
from pipeline.publishing.cards.markdown import Markdown, code, escape
from pipeline.publishing.lineage import hub_sources
from pipeline.system.redaction import file_name

ROOT, BASE = "merged", "base"  # keys of the results: the model at the root, and the one that all began with
TEXTS = {"held_out": "held-out", "general": "general"}
_BUILTIN = {
    "builtin:python-docs": "docstrings of Python's standard library",
    "builtin:python-topics": "topics of Python's language reference",
}


@dataclass(frozen=True)
class About:
    """What a card is about.

    Attributes:
        name: the title.
        location: where the release is: `user/model`, or a folder's path.
        config: the configuration of the run.
        results: the content of `results.json`; any key may be missing.
        chats: has the tokenizer a chat template?
        mirrors: variant -> the repository that holds it at its root; only those that are there already.
        files: variant of GGUF -> the name of its file.
    """

    name: str
    location: str
    config: Config
    results: dict
    chats: bool = True
    mirrors: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    def get(self, *keys: str) -> Any:
        """A value in the results, or None where it was not measured."""
        found: Any = self.results
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    @property
    def reference(self) -> str:
        """The key of the full-precision model that variants are compared with."""
        return ROOT if self.config.merges else BASE

    @property
    def repo(self) -> str | None:
        """The release's repository on the Hub, if it has one."""
        return self.location if self.location == self.config.publish.repo else None

    @property
    def is_guest(self) -> bool:
        """Do the variants go into the repository of the very model that they are made of, whose card is another's?"""
        home = self.get("origin", "hub_id")
        ours = self.repo if self.reference != ROOT else None
        return isinstance(home, str) and ours is not None and home.casefold() == ours.casefold()

    def models(self, variants: Sequence[str], with_base: bool = True) -> dict[str, Markdown]:
        """The models that a card tells about, in its order: key in the results -> name."""
        found = {BASE: Markdown("root" if self.is_guest else "base model")}
        found = found if with_base or self.reference == BASE else {}
        if self.reference == ROOT:
            found[ROOT] = Markdown("root")
        return found | {v: place(v) for v in variants}

    @property
    def data_source(self) -> str | None:
        """What was trained on, by the name that it was read by."""
        return self.get("data", "source") or (self.config.data.source if self.config.data else None)

    @property
    def data_repo(self) -> str | None:
        """The data set on the Hub that was trained on, if it was one."""
        return self.data_source if self.data_source in hub_sources(self.results) else None

    def text_source(self, source: str) -> Markdown:
        """Where a text or a data set comes from; of a file on someone's disk only its name."""
        if source in _BUILTIN:
            return Markdown(f"{_BUILTIN[source]} ({code(source)})")
        return (
            link(source, "datasets/") if source == self.data_repo else Markdown(f"the file {code(file_name(source))}")
        )

    def public_name(self, source: str) -> str:
        """The same for metadata: a name that tells nothing about the machine."""
        return source if source in _BUILTIN or source == self.data_repo else file_name(source)

    @property
    def home(self) -> Markdown:
        """The release, named in a card: a link, or the folder's name."""
        return link(self.repo) if self.repo else code(file_name(self.location))


def place(variant: str) -> Markdown:
    """Where a variant lies in the release; several share the folder of GGUF."""
    folder = code(f"{VARIANTS[variant].folder}/")
    kind = VARIANTS[variant].file_type
    return Markdown(f"{folder} {kind}") if kind else folder


def link(repo: str, kind: str = "", revision: object = None) -> Markdown:
    """A repository on the Hub, `kind` being "datasets/" for one of data, at the revision that was used."""
    at = f" at revision {code(str(revision)[:12])}" if revision else ""
    return Markdown(f"[{escape(repo)}](https://huggingface.co/{kind}{repo}){at}")


def model_source(found: dict | None, configured: str | None = None) -> Markdown:
    """Where a model or an adapter can be found; of a folder on someone's disk only its name.

    Args:
        found: what was recorded when it was read.
        configured: by what name it is asked for, where nothing was.
    """
    found = found if isinstance(found, dict) else {}
    source, hub = str(found.get("source") or configured or ""), found.get("hub_id") or ""
    if REPO_ID.fullmatch(str(hub)):
        return link(hub, revision=found.get("revision"))
    if package := PACKAGE_SOURCE.match(source):
        place = Markdown(f"{code(package[2])} of the Python package {code(package[1])}")
    elif found:
        place = Markdown(f"the local folder {code(file_name(source))}")
    else:
        place = code(source if REPO_ID.match(source) else file_name(source))
    return Markdown(f"{escape(found['name'])} ({place})") if found.get("name") else place
