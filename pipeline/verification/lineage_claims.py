"""The claims of a release about itself in `tunepress.json`, checked for their form before use.

A lineage may come from anywhere. A file name that leaves the release's folder makes it malformed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.config.catalog import VARIANTS, is_one_file
from pipeline.config.schema import Config
from pipeline.evaluation.results import MERGED, Results, first_problem
from pipeline.hub.tree import LINEAGE
from pipeline.publishing.lineage import SCHEMA

MOST_BYTES = 32_000_000  # of a lineage; ours have tens of thousands
ROOT, ADAPTER = MERGED, "adapter"  # models of a release, besides its variants
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_PART = re.compile(r"(?!\.{1,2}\Z)[^\\/:\x00-\x1f\x7f]{1,255}\Z")


T = TypeVar("T", bound=BaseModel)


class Malformed(Exception):
    """A lineage that tunepress cannot have written. `str(error)` is the reason, in one line."""


@dataclass(frozen=True)
class File:
    """The hash and the size in bytes of a file, as the lineage claims."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Claims:
    """A lineage that was checked for its form.

    Attributes:
        files: the files of the models, by path in the release.
        documents: paths of the documents for people.
        results: every figure; empty if they cannot be read.
        configuration: the configuration of the run; None if it cannot be read.
        unread: the reason why configuration or results cannot be read; empty if both can.
        made_with: versions of the libraries.
        cards: version of the words and tables of the cards.
        mirror_of: the repository whose variant this release has at its root.
    """

    files: Mapping[str, File]
    documents: tuple[str, ...]
    results: Results
    configuration: Config | None
    unread: str
    made_with: Mapping[str, str]
    cards: object
    mirror_of: str | None

    @property
    def config(self) -> Config:
        """Return the configuration of a lineage whose configuration could be read."""
        assert self.configuration is not None, "an unread configuration is reported before anything asks for it"
        return self.configuration

    @property
    def variants(self) -> tuple[str, ...]:
        """Return the variants with files and figures, in the order of the configuration and the cards."""
        asked = [spec.name for spec in self.configuration.quantize.variants] if self.configuration else []
        return tuple(
            name for name in dict.fromkeys((*asked, *VARIANTS)) if name in self.results.variants and self._holds(name)
        )

    def _holds(self, variant: str) -> bool:
        file = self.file_of(variant) if is_one_file(variant) else f"{self.prefix(variant)}config.json"
        return file in self.files

    @property
    def models(self) -> tuple[str, ...]:
        """Return everything that can be loaded: the root, its adapter, the variants."""
        root = (ROOT,) if self.has_root else ()
        adapter = (ADAPTER,) if f"{ADAPTER}/adapter_config.json" in self.files else ()
        return (*root, *adapter, *self.variants)

    @property
    def has_root(self) -> bool:
        """Return True if the release has the full-precision model."""
        return "config.json" in self.files and not self.mirror_of

    @property
    def reference(self) -> str | None:
        """Return the model whose tokenizer an adapter and GGUF need: the root, or else a packed variant."""
        return ROOT if self.has_root else next((v for v in self.variants if not is_one_file(v)), None)

    def prefix(self, model: str) -> str:
        """Return the beginning of the paths of a model's files."""
        if model == ROOT or self.mirror_of:
            return ""
        return f"{ADAPTER if model == ADAPTER else VARIANTS[model].folder}/"

    def files_of(self, model: str) -> dict[str, File]:
        """Return the files of a model, without those of other variants in its folder."""
        prefix = self.prefix(model)
        there = {p: f for p, f in self.files.items() if p.startswith(prefix) and "/" not in p.removeprefix(prefix)}
        if not is_one_file(model):
            return there
        own, suffix = self.file_of(model), VARIANTS[model].suffix
        assert suffix is not None, "a variant that is one file has a suffix"
        return {path: file for path, file in there.items() if path == own or not path.endswith(suffix)}

    def file_of(self, model: str) -> str | None:
        """Return the path of a variant that is one file; None if its figures name no file of the release."""
        path = f"{self.prefix(model)}{self.results[model].file}"
        return path if path in self.files else None


def read_claims(content: bytes) -> Claims:
    """Return the claims of a lineage.

    Raises:
        Malformed: if the content is not a lineage.
    """
    if len(content) > MOST_BYTES:
        raise Malformed(f"not read: {len(content):,} bytes, more than any lineage of ours")
    try:
        told = json.loads(content)
    except (ValueError, RecursionError):
        raise Malformed("not readable JSON") from None
    if not isinstance(told, dict):
        raise Malformed("not a lineage")
    if told.get("schema") != SCHEMA:
        raise Malformed(f"schema {told.get('schema')!r}, but this tunepress reads {SCHEMA}. Try: the newest tunepress")
    made_with, mirror_of = _table(told, "made_with"), told.get("mirror_of")
    config, config_problem = _read(Config, told, "configuration")
    results, results_problem = _read(Results, told, "results")
    return Claims(
        files={path: _file(path, about) for path, about in _table(told, "files").items()},
        documents=_documents(told.get("documents")),
        results=results or Results(),
        configuration=config,
        unread=config_problem or results_problem,
        made_with={name: version for name, version in made_with.items() if isinstance(version, str)},
        cards=told.get("cards", 1),
        mirror_of=mirror_of if isinstance(mirror_of, str) else None,
    )


def _table(told: dict, key: str) -> dict:
    if not isinstance(told.get(key), dict):
        raise Malformed(f"has no table {key!r}")
    return told[key]


def _file(path: str, about: Any) -> File:
    check_path(path)
    digest, size = (about.get("sha256"), about.get("size")) if isinstance(about, dict) else (None, None)
    if not isinstance(digest, str) or not _SHA256.match(digest) or type(size) is not int or size < 0:
        raise Malformed(f"has no sha256 and size of {path!r}")
    return File(digest, size)


def _documents(paths: Any) -> tuple[str, ...]:
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise Malformed("has no list of documents")
    for path in paths:
        check_path(path)
    return tuple(paths)


def check_path(path: str) -> None:
    """Raise Malformed if a path leaves the release's folder, or has characters that no file of ours has."""
    if not all(_PART.match(part) for part in path.split("/")) or path == LINEAGE:
        raise Malformed(f"names a file {path!r}, which cannot be in a release; nothing else was checked")


def _read(form: type[T], told: dict, key: str) -> tuple[T | None, str]:
    """Return a part of the lineage, or None and why it cannot be read."""
    try:
        return form.model_validate(_table(told, key)), ""
    except ValidationError as error:
        return None, f"{key}.{first_problem(error)}"
    except RecursionError:
        return None, f"{key}: nested too deeply"
