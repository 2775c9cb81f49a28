"""Verify a release: its files, cards, models and snippets must agree with its lineage.

A release may be hostile. None of its code is run, no pickle is opened, and no file outside it is read. A model is
loaded only if every file in its folder has the hash that the lineage names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pipeline.errors import UserError
from pipeline.hub.tree import LINEAGE
from pipeline.publishing.lineage import own_version
from pipeline.verification.findings import DEFECTS_FOUND, Finding, Verdict, Verification, right, unknown, wrong
from pipeline.verification.lineage_claims import Claims, Malformed, read_claims
from pipeline.verification.location import NoRelease, Place, open_place

__all__ = ["DEFECTS_FOUND", "Finding", "NoRelease", "Verdict", "Verification", "verify"]


def verify(
    source: str,
    revision: str | None = None,
    measure: bool = True,
    tell: Callable[[int, int, str], None] | None = None,
    on_finding: Callable[[Finding], None] | None = None,
) -> Verification:
    """Verify a release.

    Args:
        source: a repository, a folder with a release, or a run's folder.
        revision: branch, tag or commit of a repository.
        measure: True to load and measure the models and run the snippets. Otherwise only files and cards are
            checked, and no weights are downloaded.
        tell: progress callback, called with (done, total, text).
        on_finding: called with each finding at once.

    Raises:
        NoRelease: if there is no lineage.
        UserError: if there is no such repository or folder, or the Hub does not answer.
    """
    place = open_place(source, revision, tell or (lambda done, total, text: None))
    findings = []
    for finding in _findings(place, measure):
        findings.append(finding)
        if on_finding:
            on_finding(finding)
    return Verification(place.name, place.revision, tuple(findings))


def _findings(place: Place, measure: bool) -> Iterator[Finding]:
    from pipeline.verification.check_files import check_files, sound_models

    try:
        claims = read_claims(place.lineage())
    except Malformed as error:
        yield wrong("lineage", LINEAGE, str(error))
        return
    yield right("lineage", LINEAGE, f"names {len(claims.files)} files and {len(claims.models)} models")
    found = check_files(claims, place)
    yield from found
    if claims.unread:
        yield _unread(claims)
        return
    models = sound_models(claims, found)
    if measure:
        arrived = _bring(claims, place, models)
        yield from arrived
        models = sound_models(claims, [*found, *arrived])
    yield from _cards_and_models(claims, place, models, measure)


def _unread(claims: Claims) -> Finding:
    """Return the finding about an unreadable lineage: a defect only if this version wrote it."""
    made_with, own = claims.made_with.get("tunepress"), own_version()
    problem = f"cannot be read ({claims.unread}), so cards and models were not checked"
    if made_with == own:
        return wrong("lineage", LINEAGE, problem)
    return unknown("lineage", LINEAGE, f"{problem}; made with tunepress {made_with}, checked with {own}")


def _bring(claims: Claims, place: Place, models: list[str]) -> list[Finding]:
    """Download the files of these models, and return a finding for each that arrived damaged."""
    paths = sorted({path for model in models for path in claims.files_of(model)})
    if place.tree is None:
        return []
    place.bring([LINEAGE, *claims.documents, *paths])
    found, done, total = [], 0, sum(claims.files[path].size for path in paths)
    for path in paths:
        if place.digest_here(path) != claims.files[path].sha256:
            lies = place.folder / path
            found.append(
                wrong("files", path, f"damaged by the download. Try: remove {lies.resolve()} and verify again")
            )
        done += claims.files[path].size
        place.tell(done, total, "checking the downloaded files")
    return found


def _cards_and_models(claims: Claims, place: Place, models: list[str], measure: bool) -> Iterator[Finding]:
    from pipeline.verification.check_cards import check_cards, check_modelfiles, check_picture, render
    from pipeline.verification.check_figures import check_figures
    from pipeline.verification.measure_again import measure_models
    from pipeline.verification.run_snippets import run_examples

    place.tell(0, 1, "rendering the cards again")
    try:
        cards = render(claims, place)
        picture = list(check_picture(claims, place, cards.about))
        figures = list(check_figures(claims, place))
    except UserError as error:
        yield wrong("card", LINEAGE, f"no card can be rendered from its results ({error})")
        return
    yield from figures
    yield from check_cards(claims, place, cards)
    yield from check_modelfiles(claims, place)
    yield from picture
    if not measure:
        return
    for model in claims.models:
        if model not in models:
            yield unknown("measured", model, "not loaded: its files, or files that it needs, differ from the lineage")
    failed = set()
    for finding in measure_models(claims, place, models):
        if finding.verdict in (Verdict.wrong, Verdict.outdated):
            failed.add(finding.subject.split(",")[0])
        yield finding
    yield from run_examples(claims, place, cards, [model for model in models if model not in failed])
