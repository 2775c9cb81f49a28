"""What a card is about: results, configuration, and the names of models and sources as markdown.

Every figure in a card is read from here, from `results.json` or the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.config.catalog import VARIANTS
from pipeline.config.schema import PACKAGE_SOURCE, REPO_ID, Config
from pipeline.evaluation.results import BASE, MERGED, Origin, Results
from pipeline.publishing.cards.markdown import Markdown, code, escape
from pipeline.publishing.lineage import hub_sources
from pipeline.system.redaction import file_name

ROOT = MERGED  # the model at the root of a release, if it has one
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
        results: the figures of the models in the release; any of them may be missing.
        chats: has the tokenizer a chat template?
        mirrors: variant -> the repository that holds it at its root; only those that are there already.
        files: variant of GGUF -> the name of its file.
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
        """The key of the full-precision model that variants are compared with."""
        return ROOT if self.config.merges else BASE

    @property
    def repo(self) -> str | None:
        """The release's repository on the Hub, if it has one."""
        return self.location if self.location == self.config.publish.repo else None

    @property
    def is_guest(self) -> bool:
        """Do the variants go into the repository of the very model that they are made of, whose card is another's?"""
        home, ours = self.results.origin.hub_id, self.repo if self.reference != ROOT else None
        return bool(home and ours) and home.casefold() == ours.casefold()

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
        recorded = self.results.data.source if self.results.data else None
        return recorded or (self.config.data.source if self.config.data else None)

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


def model_source(found: Origin | None, configured: str | None = None) -> Markdown:
    """Where a model or an adapter can be found; of a folder on someone's disk only its name.

    Args:
        found: what was recorded when it was read.
        configured: by what name it is asked for, where nothing was.
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
