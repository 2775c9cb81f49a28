"""The check of the cards: each is rendered again from the lineage, and our section is compared.

Text that people wrote outside our section is no defect. Cards of other versions have other words and tables; each of
their figures must be a figure of the same row here.
"""

from __future__ import annotations

import ast
import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from itertools import zip_longest
from pathlib import Path

from pipeline.config.catalog import is_one_file
from pipeline.errors import UserError
from pipeline.hub.tree import CARD
from pipeline.models.chat_templates import has_chat_template
from pipeline.models.gguf_metadata import read_dialogue
from pipeline.publishing.cards import (
    PLOT,
    About,
    adapter_card,
    folder_card,
    mirror_card,
    model_card,
    plot_quality,
)
from pipeline.publishing.cards.readmes import merged
from pipeline.publishing.lineage import CARDS, own_version
from pipeline.publishing.ollama import MODELFILE, modelfile
from pipeline.publishing.snippets import blocks
from pipeline.verification.findings import Finding, right, unknown, wrong
from pipeline.verification.lineage_claims import Claims
from pipeline.verification.location import Place
from pipeline.workflow.stages.render import ADAPTER_CARD, folders

LONGEST_CARD = 20_000  # lines; ours have hundreds, and comparing takes long
MOST_LINES = 5  # differences that are shown for one card
AROUND = 60  # characters shown on each side of the first difference
_FIGURE = re.compile(r"\|.*\d|\s*(- )?value:")


@dataclass(frozen=True)
class Cards:
    """The cards of a release, rendered from its lineage.

    Attributes:
        about: the subject of the cards.
        expected: path -> the expected text, with people's own text in it.
    """

    about: About
    expected: Mapping[str, str]


def render(claims: Claims, place: Place) -> Cards:
    """Return the cards, rendered again from the lineage.

    Raises:
        UserError: if the results do not give a card.
    """
    found = [_render(claims, place, chats) for chats in _chats(claims, place)]
    return next((c for c in found if all(place.read(p) in (None, s.encode()) for p, s in c.expected.items())), found[0])


def _render(claims: Claims, place: Place, chats: bool) -> Cards:
    about = about_release(claims, place, chats)
    found = {}
    for path, card in rendered(about, claims).items():
        there = place.read(path)
        is_others = about.is_guest and path == CARD
        found[path] = card if there is None else merged(card.encode(), there, is_others).decode()
    return Cards(about, found)


def rendered(about: About, claims: Claims) -> dict[str, str]:
    """Return the text of every card by path, without people's text."""
    variants = claims.variants
    if claims.mirror_of:
        return {CARD: mirror_card(about, variants[0], about.config.publish.mirrors[variants[0]])}
    cards = {f"{folder}/{CARD}": folder_card(about, those) for folder, those in folders(variants).items()}
    if ADAPTER_CARD in claims.documents and about.explains_adapter:
        cards[ADAPTER_CARD] = adapter_card(about)
    return {CARD: model_card(about, variants), **cards}


def about_release(claims: Claims, place: Place, chats: bool) -> About:
    """Return the subject of the cards, as `pipeline.workflow.stages.render` had it."""
    config, variants = claims.config, claims.variants
    there = (place.read(CARD) or b"").decode(errors="replace")
    mirrors = {
        v: repo
        for v, repo in config.publish.mirrors.items()
        if v in variants and f"(https://huggingface.co/{repo})" in there
    }
    return About(
        name=config.publish.repo or config.name,
        location=config.publish.repo or said_location(there) or str(place.folder),
        config=config,
        results=claims.results,
        chats=chats,
        mirrors={} if claims.mirror_of else mirrors,
        files={v: Path(file).name for v in variants if is_one_file(v) and (file := claims.file_of(v))},
    )


def _chats(claims: Claims, place: Place) -> tuple[bool, ...]:
    """Return whether the tokenizer has a chat template; both answers if only GGUF files on the Hub could tell."""
    prefixes = {claims.prefix(model) for model in claims.models}
    if any(has_chat_template(place.folder / prefix) for prefix in prefixes):
        return (True,)
    files = [place.folder / path for path in claims.files if path.endswith(".gguf")]
    if any(read_dialogue(file).template for file in files if file.is_file()):
        return (True,)
    return (False,) if all(file.is_file() for file in files) else (False, True)


def said_location(card: str) -> str | None:
    """Return the folder that a card's snippets load from; None if they name none."""
    for block in blocks(card):
        try:
            tree = ast.parse(block)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                name, value = getattr(node.targets[0], "id", None), node.value.value
                if name == "location" and isinstance(value, str):
                    return value
                if name == "file" and isinstance(value, str):
                    return Path(value).parent.parent.as_posix()
    return None


def local(about: About, place: Place) -> About:
    """Return `about` with the folder of the verified files, so that its snippets load only these.

    Answers of models are left out, so that all code comes from the templates.
    """
    return replace(about, location=str(place.folder.resolve()), results=about.results.without_answers())


def check_cards(claims: Claims, place: Place, cards: Cards) -> Iterator[Finding]:
    """Yield a finding for each figure or line of ours that differs from the lineage, or one for a correct card."""
    is_same_version = (claims.made_with.get("tunepress"), claims.cards) == (own_version(), CARDS)
    for path, expected in cards.expected.items():
        there = place.read(path)
        if path not in claims.documents:
            found = wrong if is_same_version else unknown
            yield found("card", path, "belongs to these models, and the lineage does not name it")
        if there is None:
            continue  # the check of the files reports it
        if there.count(b"\n") > LONGEST_CARD:
            yield wrong("card", path, f"not read: more than {LONGEST_CARD:,} lines")
            continue
        lines = list(_differences(there.decode(errors="replace"), expected))
        shown = lines if is_same_version else list(_other_figures(lines, expected, cards.about))
        for line in shown[:MOST_LINES]:
            yield wrong("card", path, line.told())
        if len(shown) > MOST_LINES:
            yield wrong("card", path, f"{len(shown) - MOST_LINES} more lines differ from the lineage")
        if lines and not shown:
            made_with = claims.made_with.get("tunepress", "another version")
            yield unknown("card", path, f"other words than those of tunepress {own_version()}: made with {made_with}")
        if not lines:
            yield right("card", path, "agrees with the lineage")


@dataclass(frozen=True)
class Difference:
    """A line of a card and the expected line; None stands for no line."""

    there: str | None
    expected: str | None

    def told(self) -> str:
        """Return the difference in words."""
        if self.there is None:
            return f'lacks "{_cut(self.expected, 0)}", which follows from the lineage'
        if self.expected is None:
            return f'says "{_cut(self.there, 0)}", which does not follow from the lineage'
        if cells := self._cells():
            return f'row {cells[0]} says "{cells[1]}"; by the lineage it is "{cells[2]}"'
        first = next((i for i, (a, b) in enumerate(zip(self.there, self.expected, strict=False)) if a != b), 0)
        return f'says "{_cut(self.there, first)}"; by the lineage it is "{_cut(self.expected, first)}"'

    def _cells(self) -> tuple[str, str, str] | None:
        """Return (first cell, cell, expected cell) of the first difference in the same row of a table."""
        there, expected = (
            line.split("|") if line and line.startswith("|") else [] for line in (self.there, self.expected)
        )
        if len(there) != len(expected) or there[:2] != expected[:2]:
            return None
        pairs = zip(there, expected, strict=True)
        return next(((there[1].strip(), a.strip(), b.strip()) for a, b in pairs if a != b), None)


def _differences(there: str, expected: str) -> Iterator[Difference]:
    ours, theirs = expected.splitlines(), there.splitlines()
    for kind, i, j, m, n in SequenceMatcher(None, theirs, ours, autojunk=False).get_opcodes():
        if kind != "equal":
            yield from (Difference(a, b) for a, b in zip_longest(theirs[i:j], ours[m:n]))


def _other_figures(lines: list[Difference], expected: str, about: About) -> Iterator[Difference]:
    """Yield the lines of another version's card that have a number which the same row does not have here."""
    known: dict[str, set[str]] = {}
    for row in expected.splitlines():
        label, figures = _figures(row)
        known.setdefault(label, set()).update(figures)
    full = about.models(())[about.reference]
    for line in lines:
        label, figures = _figures(line.there or "")
        here = known.get(re.sub(r"^root\b", full, label), set())
        bounds = [_number(figure[2:]) for figure in here if figure.startswith("< ")]
        if any(f not in here and _number(f) > max(bounds, default=-1.0) for f in figures):
            yield line


def _figures(line: str) -> tuple[str, set[str]]:
    """Return the label of a line of figures, a row or a value of the metadata, and its figures; none of other lines."""
    if not _FIGURE.match(line):
        return "", set()
    label, _, rest = line.strip("| ").replace("**", "").partition(" | " if line.startswith("|") else ":")
    return label.strip(" -"), set(re.findall(r"(?:< )?\d[\d.,]*", rest.replace("\u00a0", " ")))


def _number(figure: str) -> float:
    try:
        return float(figure.replace(",", "").rstrip("."))
    except ValueError:
        return math.inf


def _cut(line: str | None, around: int) -> str:
    line = line or ""
    start = max(0, around - AROUND)
    text = line[start : around + AROUND]
    return f"{'...' if start else ''}{text}{'...' if around + AROUND < len(line) else ''}"


def check_modelfiles(claims: Claims, place: Place) -> Iterator[Finding]:
    """Yield a finding for each Modelfile, which must follow from the GGUF files beside it."""
    for path in (path for path in claims.documents if Path(path).name == MODELFILE):
        files = {v: place.folder / file for v in claims.variants if is_one_file(v) and (file := claims.file_of(v))}
        there = place.read(path)
        if there is None:
            continue
        if not files or not all(file.is_file() for file in files.values()):
            yield unknown("card", path, "not checked: the GGUF files were not downloaded")
            continue
        try:
            is_right = there.decode(errors="replace") == modelfile(files)
        except UserError as error:
            yield wrong("card", path, str(error))
            continue
        if is_right:
            yield right("card", path, "agrees with the GGUF files")
        else:
            yield wrong("card", path, "does not follow from the GGUF files beside it")


def check_picture(claims: Claims, place: Place, about: About) -> Iterator[Finding]:
    """Yield a finding about the picture. Another version of matplotlib may draw it differently."""
    there = place.read(PLOT)
    if PLOT not in claims.documents or there is None:
        return
    with tempfile.TemporaryDirectory() as scratch:
        drawn = Path(scratch) / "picture.png"
        if plot_quality(about, claims.variants, drawn) and drawn.read_bytes() == there:
            yield right("card", PLOT, "agrees with the lineage")
        else:
            yield unknown(
                "card",
                PLOT,
                "other pixels than these figures give here; another version of matplotlib may be the reason",
            )
