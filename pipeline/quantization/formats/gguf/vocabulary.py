"""A tokenizer of transformers for llama.cpp: tokens, types, merges or scores, and the pre-tokenizer.

llama.cpp has two kinds that matter here: `gpt2` for byte-level BPE, which cuts text by one of a few
patterns that it knows by name, and `llama` for SentencePiece's BPE, which merges by scores.
What a tokenizer does is read from its own description, so that one whose vocabulary grew or
shrank still finds its pattern; a tokenizer that llama.cpp cannot follow is refused. One thing is let pass:
before byte-level BPE a tokenizer may bring text into the composed form of Unicode (NFC), as Qwen's does, in
which nearly all text is; llama.cpp takes text as it comes.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
SPACE = "\u2581"  # SentencePiece's
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How text is cut -> llama.cpp's name for it: by words as GPT-2 does, digits one by one before that or not;
# or by a pattern, with or without a look for whole words in the vocabulary before anything is merged.
_CUTS = {
    (("gpt2",), False): "gpt-2",
    (("digits", "gpt2"), False): "smollm",
    (("|".join((_CONTRACTIONS, _WORDS, r"\p{N}", _REST)),), False): "qwen2",
    (("|".join((_CONTRACTIONS, _WORDS, r"\p{N}{1,3}", _REST)),), True): "llama-bpe",
    (("|".join((_CONTRACTIONS, _WORDS, r"\p{N}{1,3}", _REST)),), False): "smaug-bpe",
}


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, and what llama.cpp needs to cut text into them.

    Attributes:
        model: `gpt2` or `llama`.
        cut: llama.cpp's name of the pre-tokenizer.
        merges: of `gpt2`, "left right", the first first; else None.
        scores: of `llama`, one for each token, the highest merged first; else None.
        space_first: a space is put before the text.
    """

    model: str
    cut: str
    tokens: list[str]
    types: list[int]
    merges: list[str] | None
    scores: list[float] | None
    space_first: bool


def vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """Return the vocabulary of a fast tokenizer, padded to the `size` of the embedding.

    Raises:
        ModelError: if it has more tokens than the model, or llama.cpp cannot do the same.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError("its tokenizer has no tokenizer.json, from which GGUF's is made")
    about = json.loads(tokenizer.backend_tokenizer.to_str())
    model = about["model"]
    odd = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if model.get("type") != "BPE" or odd:
        raise ModelError(f"its tokenizer is {model.get('type')}{f' with {odd[0]}' if odd else ''}, not plain BPE")
    for token in about["added_tokens"]:
        if flag := next((flag for flag in ("single_word", "lstrip", "rstrip") if token[flag]), None):
            raise ModelError(f"its tokenizer has the token {token['content']!r} with {flag}, which llama.cpp has not")
    tokens, types = _tokens(about, size)
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    steps = _steps(about["pre_tokenizer"])
    if model.get("byte_fallback"):
        space_first = _space_first(about["normalizer"], steps)
        own = [t["content"] for t in about["added_tokens"] if t["normalized"] and not t["special"]]
        if space_first and own:  # transformers puts the space before them too, and then looks for them
            raise ModelError(f"its tokenizer looks for {own[0]!r} behind a space, which llama.cpp does not")
        if model.get("unk_token") in model["vocab"]:
            types[model["vocab"][model["unk_token"]]] = UNKNOWN
        return Vocabulary("llama", "default", tokens, types, None, _scores(tokens, merges), space_first)
    for change in _changes(about["normalizer"]):
        if change["type"] != "NFC":
            raise ModelError(f"its tokenizer changes text by {change['type']}, which llama.cpp does not")
    cut = _cut(steps, bool(model.get("ignore_merges")))
    # llama.cpp wants merges, and GGUF's writer no empty list of them; what this one makes is no token, and falls apart.
    return Vocabulary("gpt2", cut, tokens, types, [" ".join(pair) for pair in merges] or ["Ġ Ġ"], None, False)


def _tokens(about: dict, size: int) -> tuple[list[str], list[int]]:
    """Return the tokens and their types by id."""
    by_bytes = about["model"].get("byte_fallback")
    found = {
        i: (text, BYTE if by_bytes and _BYTE.fullmatch(text) else NORMAL) for text, i in about["model"]["vocab"].items()
    }
    for token in about["added_tokens"]:
        text = token["content"]
        if not token["special"] and by_bytes:  # llama.cpp looks for these before it changes spaces
            text = text.replace(SPACE, " ")
        found[token["id"]] = (text, CONTROL if token["special"] else USER_DEFINED)
    if max(found) >= size:
        raise ModelError(f"its tokenizer has tokens up to {max(found)}, its embedding {size} rows")
    filled = [found.get(i, (f"[PAD{i}]", UNUSED)) for i in range(size)]
    return [text for text, _ in filled], [kind for _, kind in filled]


def _changes(normalizer: dict | None) -> list[dict]:
    return [] if normalizer is None else normalizer.get("normalizers", [normalizer])


def _steps(pre_tokenizer: dict | None) -> list[dict]:
    if pre_tokenizer is None:
        return []
    return pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _cut(steps: list[dict], whole_words: bool) -> str:
    """Return the name in llama.cpp of the pre-tokenizer of byte-level BPE."""
    found: list[str] = []
    for step in steps:
        if step["type"] == "Digits" and step["individual_digits"]:
            found.append("digits")
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            found.append(step["pattern"].get("Regex", ""))
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            found += ["gpt2"] if step["use_regex"] else []
        else:
            found.append(step["type"])
    name = _CUTS.get((tuple(found), whole_words)) if steps and steps[-1]["type"] == "ByteLevel" else None
    if name is None:
        raise ModelError(f"its tokenizer cuts text in a way that GGUF's are not made of ({' then '.join(found)})")
    return name


def _space_first(normalizer: dict | None, steps: list[dict]) -> bool:
    """Return True if a SentencePiece tokenizer puts a space before the text."""
    for change in _changes(normalizer):
        if change["type"] == "Prepend" and change["prepend"] == SPACE:
            return True
        if change["type"] != "Replace" or change["content"] != SPACE:
            raise ModelError(f"its tokenizer changes text by {change['type']}, which llama.cpp does not")
    scheme = next((step["prepend_scheme"] for step in steps if step["type"] == "Metaspace"), "never")
    return scheme != "never"


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Return a score for each token. Tokens of earlier merges score higher; tokens of no merge come last."""
    rank: dict[str, int] = {}
    for number, pair in enumerate(merges):
        rank.setdefault("".join(pair), number)
    return [-float(rank.get(token, len(merges))) for token in tokens]
