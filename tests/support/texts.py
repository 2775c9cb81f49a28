"""General texts to measure on."""

from __future__ import annotations

import random

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "near", "this", "river", "bank")


def general_text(documents: int = 40, words: int = 30) -> str:
    """Return different documents as one text, with two empty lines between them."""
    drawn = (random.Random(number).choices(WORDS, k=words) for number in range(documents))
    return "\n\n\n".join(" ".join(document) + "." for document in drawn) + "\n"
