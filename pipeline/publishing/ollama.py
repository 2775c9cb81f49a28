"""`Modelfile`, by which Ollama makes a model of a GGUF: its file, its turns, where answers end.

What it says is read from the GGUF itself, so that it holds for that file wherever it was made. The chat
template, which is Jinja, is said in Ollama's language only where that is proven to give the same texts.
Ollama's parser takes a text in quotes as it is; there is no way to write three quotes in one.

https://docs.ollama.com/modelfile
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from pipeline.config.catalog import VARIANTS
from pipeline.models.gguf_metadata import Dialogue, read_dialogue
from pipeline.publishing.ollama_template import Turns, find_turns

MODELFILE = "Modelfile"
_QUOTES = '"""'
_PARAMETERS = {  # of Ollama, and what a GGUF calls them
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repeat_penalty": "penalty_repeat",
}


def modelfile(files: Mapping[str, Path]) -> str:
    """The Modelfile that lies beside GGUF files.

    Args:
        files: variant -> its file. The first that is quantized is the one that Ollama takes.

    Raises:
        CheckpointError: where one is no GGUF.
    """
    chosen = default_variant(files)
    dialogue = read_dialogue(files[chosen])
    others = [f"# FROM ./{file.name}" for variant, file in files.items() if variant != chosen]
    lines = [f"FROM ./{files[chosen].name}", *others]
    lines += ["", *_turns(dialogue), ""]
    lines += [f"PARAMETER stop {said}" for text in dialogue.stops if (said := _quoted(text))]
    known = dialogue.sampling
    lines += [f"PARAMETER {name} {known[key]:.7g}" for name, key in _PARAMETERS.items() if key in known]
    return "\n".join(lines).rstrip() + "\n"


def default_variant(variants: Mapping[str, object]) -> str:
    """The one that people are to take who do not choose: the first that is quantized."""
    return next((v for v in variants if VARIANTS[v].bits < 16), next(iter(variants)))


def _turns(dialogue: Dialogue) -> list[str]:
    if dialogue.template is None:
        return ["# The model has no chat template: it continues text."]
    template, system = _told(dialogue)
    if template is None:
        return [
            "# No TEMPLATE: the chat template in the file is not one of turns alone, which Ollama's language could",
            "# be proven to say. Ollama goes by the one in the file.",
        ]
    return [f"TEMPLATE {template}", *([f"SYSTEM {system}"] if system else [])]


@functools.lru_cache(maxsize=64)
def _say(template: str, tokens: tuple[tuple[str, str], ...], first: str) -> tuple[str | None, str | None]:
    turns = find_turns(template, dict(tokens), first)
    told = _in_go(turns) if turns else None
    default = turns.default if turns else None
    quoted, system = _quoted(told) if told else None, _quoted(default) if default else None
    unsaid = default is not None and system is None  # nothing, with its marks, is no SYSTEM to Ollama
    return (None, None) if unsaid else (quoted, system)


def _told(dialogue: Dialogue) -> tuple[str | None, str | None]:
    """The chat template, and what the system says by default, in Ollama's language; None where it cannot say that."""
    first = dialogue.tokens.get("bos_token", "") if dialogue.adds_first else ""
    return _say(dialogue.template or "", tuple(dialogue.tokens.items()), first)


def _in_go(turns: Turns) -> str | None:
    """Turns as a template of Go; None where their texts would be taken for its marks."""
    texts = (turns.begin, turns.between, turns.answer, *(text for pair in turns.around.values() for text in pair))
    if any(mark in text for text in texts for mark in "{}"):
        return None
    between = f"{{{{ if $i }}}}{turns.between}{{{{ end }}}}" if turns.between else ""
    opening = "{{ range $i, $_ := .Messages }}" if between or turns.inside else "{{ range .Messages }}"
    return f"{turns.begin}{opening}{between}{_any_turn(turns)}{{{{ end }}}}{turns.answer}"


def _any_turn(turns: Turns) -> str:
    around = dict(turns.around)
    alike = {(before.replace(role, "{{ .Role }}"), behind) for role, (before, behind) in around.items()}
    if len(alike) == 1 and not turns.inside:
        return "{{ .Content }}".join(alike.pop())
    told = {role: "{{ .Content }}".join(pair) for role, pair in around.items()}
    if turns.inside:
        system = "{{ $.System }}".join(around.pop("system"))
        before, behind = around["user"]
        once = f"{{{{ if and $.System (le $i 1) }}}}{system}{{{{ end }}}}"
        told = {"user": f"{before}{once}{{{{ .Content }}}}{behind}", "assistant": told["assistant"]}
    cases = "{{ else ".join(f'if eq .Role "{role}" }}}}{text}' for role, text in told.items())
    return f"{{{{ {cases}{{{{ end }}}}"


def _quoted(text: str) -> str | None:
    """A text as a Modelfile has it; None where it cannot be said."""
    if _QUOTES in text or "\r" in text:
        return None
    return f"{_QUOTES}{text}{_QUOTES}" if '"' in text or "\n" in text else f'"{text}"'
