"""`tunepress.json`: the origin of every byte of a release."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from pipeline.config.catalog import VARIANTS
from pipeline.config.schema import REPO_ID, Config, TrainingRun
from pipeline.data.sources import names_a_file
from pipeline.evaluation.data_result import Data, DataPart
from pipeline.evaluation.results import Results
from pipeline.system.libraries import STACK, versions
from pipeline.system.redaction import file_name

if TYPE_CHECKING:
    from pipeline.hub.tree import LocalFile

SCHEMA = 1
CARDS = 2  # the version of the words and tables of cards; a lineage without it has version 1


def lineage(
    config: Config,
    results: Results,
    files: Mapping[str, LocalFile],
    documents: Collection[str],
    mirror_of: str | None = None,
) -> bytes:
    """Return the lineage of a release as JSON.

    Args:
        results: the figures of the models in this release.
        files: the files of the models, by path in the release.
        documents: paths of the other documents, which show the same figures to people.
        mirror_of: the repository whose variant this release has at its root.
    """
    content = {
        "schema": SCHEMA,
        "made_with": {"tunepress": own_version(), **versions(*STACK, *_libraries(results))},
        "cards": CARDS,
        "run": config.name,
        **({"mirror_of": mirror_of} if mirror_of else {}),
        "base": results.origin.to_json(),
        **({"adapter": results.adapter.to_json()} if results.adapter else {}),
        **({"data": _data(config, results)} if isinstance(config, TrainingRun) else {}),
        "configuration": json.loads(config.model_dump_json(exclude={"track"})),
        **({"merged_into": results.merge.base} if results.merge else {}),
        "files": {name: {"sha256": f.sha256, "size": f.size} for name, f in sorted(files.items())},
        "documents": sorted(documents),
        "results": results.to_json(),
    }
    local = _sources(config) - hub_sources(results)
    return (json.dumps(_portable(content, local), indent=2, ensure_ascii=False) + "\n").encode()


def _libraries(results: Results) -> list[str]:
    """Return the further distributions that the variants are written and measured with."""
    made = [variant for name, variant in VARIANTS.items() if name in results.variants]
    used = (library for variant in made for library in (*variant.libraries, *variant.measured_with))
    return [library for library in dict.fromkeys(used) if library not in STACK]


def hub_sources(results: Results) -> set[str]:
    """Return the repositories on the Hub that models and data were read from, as recorded at that time.

    A name alone does not tell a repository from a file that is gone by now.
    """
    found = {origin.hub_id for origin in (results.origin, results.adapter) if origin}
    read: list[Data | DataPart] = [results.data, *results.data.parts.values()] if results.data else []
    for data in read:
        if (data.revision or data.split) and not names_a_file(str(data.source)):
            found.add(data.source)
    pairs = results.data.preference if results.data else None
    if pairs and pairs.revision and not names_a_file(str(pairs.source)):
        found.add(pairs.source)
    texts = (made.weights.calibration_text for made in results.variants.values() if made.weights)
    found |= {source for text in texts if text for source in text.split(", ")}
    return {source for source in found if source and REPO_ID.match(source)}


def _data(config: TrainingRun, results: Results) -> dict:
    """Return the data of the training: the configuration, overridden by the recorded facts."""
    keys = {"source", "subset", "revision", "split", "form"}
    recorded = results.data or Data()
    found = recorded.model_dump(include=keys | {"fingerprint", "license"}, exclude_none=True)
    asked = config.data.model_dump(include=keys) if not recorded.parts else {"source": config.data.named}
    return {**asked, **found}


def _sources(config: Config) -> set[str]:
    """Return the sources of the configuration that may be files on this machine."""
    second = config.train.preference
    named = (
        config.model.source,
        *(part.source for data in (config.data, second and second.data) if data for part in data.all_parts),
        config.data and config.data.chat_template,
        config.evaluate and config.evaluate.general,
        *config.quantize.calibration.sources,
        config.merge.adapter,
    )
    return {source for source in named if source}


def _portable(content: Any, local: Collection[str]) -> Any:
    """Return `content` with only the names of local files and folders, without their paths on this machine."""
    if isinstance(content, dict):
        return {key: _portable(value, local) for key, value in content.items()}
    if isinstance(content, list):
        return [_portable(value, local) for value in content]
    if not isinstance(content, str) or content.startswith("package:"):
        return content
    if content in local:
        return content if content.startswith("builtin:") else file_name(content)
    several = content.split(", ")
    return ", ".join(_portable(source, local) for source in several) if len(several) > 1 else content


def own_version() -> str:
    """Return the installed version of tunepress; "source" if it runs from a clone that is not installed."""
    try:
        return version("tunepress")
    except PackageNotFoundError:
        return "source"
