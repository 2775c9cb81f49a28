"""The check of the cards: each is rendered again from the lineage, and our section of it is compared.

Text that people wrote beside our section is no defect.
"""

from __future__ import annotations

import ast
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
from pipeline.models.gguf_metadata import read_dialogue
from pipeline.models.provenance import has_chat_template
from pipeline.publishing.cards import PLOT, About, folder_card, mirror_card, model_card, plot_quality
from pipeline.publishing.cards.readmes import merged
from pipeline.publishing.lineage import own_version
from pipeline.publishing.ollama import MODELFILE, modelfile
from pipeline.publishing.snippets import blocks
from pipeline.verification.findings import Finding, right, unknown, wrong
from pipeline.verification.lineage_claims import Claims
from pipeline.verification.location import Place
from pipeline.workflow.stages.render import folders

LONGEST_CARD = 20_000  # lines; ours have some hundreds, and finding what differs takes long
MOST_LINES = 5  # of a card that are shown; a card that is another altogether would fill the screen
AROUND = 60  # characters shown on each side of where two lines begin to differ
_FIGURE = re.compile(r"\|.*\d|\s*(- )?value:")


@dataclass(frozen=True)
class Cards:
    """The cards of a release as the lineage has them.

    Attributes:
        about: what they are rendered from.
        expected: path -> what is to stand there, with what people wrote beside it.
    """

    about: About
    expected: Mapping[str, str]


def render(claims: Claims, place: Place) -> Cards:
    """The cards, rendered from the lineage as they were when it was written.

    Raises:
        Exception: of any kind, where the results are of a form that ours never have.
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
    """The text of every card, without what people wrote."""
    variants = claims.variants
    if claims.mirror_of:
        return {CARD: mirror_card(about, variants[0], about.config.publish.mirrors[variants[0]])}
    cards = {f"{folder}/{CARD}": folder_card(about, those) for folder, those in folders(variants).items()}
    return {CARD: model_card(about, variants), **cards}


def about_release(claims: Claims, place: Place, chats: bool) -> About:
    """What the cards are about, which is what `pipeline.workflow.stages.render` knew when it wrote them."""
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
    """Has the tokenizer a chat template? Where only GGUF files could tell that were not fetched, perhaps."""
    prefixes = {claims.prefix(model) for model in claims.models}
    if any(has_chat_template(place.folder / prefix) for prefix in prefixes):
        return (True,)
    files = [place.folder / path for path in claims.files if path.endswith(".gguf")]
    if any(read_dialogue(file).template for file in files if file.is_file()):
        return (True,)
    return (False,) if all(file.is_file() for file in files) else (False, True)


def said_location(card: str) -> str | None:
    """The folder that a card's snippets load from, in which the release lay when the card was written."""
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
    """The same for the files that were verified, wherever they lie now: its snippets load these and nothing else.

    What models answered is left out, so that there is no code but that of the templates.
    """
    return replace(about, location=str(place.folder.resolve()), results=about.results.without_answers())


def check_cards(claims: Claims, place: Place, cards: Cards) -> Iterator[Finding]:
    """A line for each figure or word of ours that is not as the lineage has it; one for each card that is right."""
    is_same_version = claims.made_with.get("tunepress") == own_version()
    for path, expected in cards.expected.items():
        there = place.read(path)
        if path not in claims.documents:
            found = wrong if is_same_version else unknown
            yield found("card", path, "belongs to a release with these models, and the lineage does not name it")
        if there is None:
            continue  # which was told, here or with the files
        if there.count(b"\n") > LONGEST_CARD:
            yield wrong("card", path, f"more than {LONGEST_CARD:,} lines, which were not read")
            continue
        lines = list(_differences(there.decode(errors="replace"), expected))
        figures = [line for line in lines if line.is_figure]
        shown = lines if is_same_version else figures
        for line in shown[:MOST_LINES]:
            yield wrong("card", path, line.told())
        if len(shown) > MOST_LINES:
            yield wrong("card", path, f"and {len(shown) - MOST_LINES} more lines are not as the lineage has them")
        if lines and not shown:
            made_with = claims.made_with.get("tunepress", "another version")
            yield unknown("card", path, f"other words than tunepress {own_version()} writes, made with {made_with}")
        if not lines:
            yield right("card", path, "says what the lineage says")


@dataclass(frozen=True)
class Difference:
    """A line of a card, and what should stand there; None where there is no such line."""

    there: str | None
    expected: str | None

    @property
    def is_figure(self) -> bool:
        return any(line is not None and _FIGURE.match(line) for line in (self.there, self.expected))

    def told(self) -> str:
        if self.there is None:
            return f'does not say "{_cut(self.expected, 0)}", which follows from the lineage'
        if self.expected is None:
            return f'says "{_cut(self.there, 0)}", which does not follow from the lineage'
        if cells := self._cells():
            return f'in the row of {cells[0]}, says "{cells[1]}", and by the lineage it is "{cells[2]}"'
        first = next((i for i, (a, b) in enumerate(zip(self.there, self.expected, strict=False)) if a != b), 0)
        return f'says "{_cut(self.there, first)}", and by the lineage it is "{_cut(self.expected, first)}"'

    def _cells(self) -> tuple[str, str, str] | None:
        """Of two rows of a table about the same: what they are about, and the first cells that differ."""
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


def _cut(line: str | None, around: int) -> str:
    line = line or ""
    start = max(0, around - AROUND)
    text = line[start : around + AROUND]
    return f"{'...' if start else ''}{text}{'...' if around + AROUND < len(line) else ''}"


def check_modelfiles(claims: Claims, place: Place) -> Iterator[Finding]:
    """Is each Modelfile what follows from the GGUF files beside it?"""
    for path in (path for path in claims.documents if Path(path).name == MODELFILE):
        files = {v: place.folder / file for v in claims.variants if is_one_file(v) and (file := claims.file_of(v))}
        there = place.read(path)
        if there is None:
            continue
        if not files or not all(file.is_file() for file in files.values()):
            yield unknown("card", path, "follows from the GGUF files, which were not fetched")
            continue
        try:
            is_right = there.decode(errors="replace") == modelfile(files)
        except UserError as error:
            yield wrong("card", path, str(error))
            continue
        if is_right:
            yield right("card", path, "says what the GGUF files say")
        else:
            yield wrong("card", path, "is not what follows from the GGUF files beside it")


def check_picture(claims: Claims, place: Place, about: About) -> Iterator[Finding]:
    """Is the picture the one that these figures draw? Where it is not, another matplotlib may have drawn it."""
    there = place.read(PLOT)
    if PLOT not in claims.documents or there is None:
        return
    with tempfile.TemporaryDirectory() as scratch:
        drawn = Path(scratch) / "picture.png"
        if plot_quality(about, claims.variants, drawn) and drawn.read_bytes() == there:
            yield right("card", PLOT, "shows what the lineage says")
        else:
            yield unknown(
                "card", PLOT, "is not, dot for dot, what these figures draw here; another matplotlib may be why"
            )
