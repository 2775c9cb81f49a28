"""Pieces of hostile files: a pickle that runs a command, deep nesting, an alias bomb, terminal escapes."""

from __future__ import annotations

import os
import pickle


class Owned:
    def __reduce__(self):
        return os.system, ("touch owned",)


PICKLE = pickle.dumps(Owned())
DEEP = b"[" * 200_000
_LETTERS = "abcdefghi"
BOMB = "a: &a [x, x, x, x]\n" + "".join(
    f"{n}: &{n} [*{p}, *{p}, *{p}, *{p}]\n" for p, n in zip(_LETTERS, _LETTERS[1:], strict=False)
)
ESCAPES = "\x1b]0;owned\x07\x1b[2J"
