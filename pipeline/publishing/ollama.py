"""The `Modelfile` from which Ollama makes a model: the GGUF file, the chat template, the stop texts.

Its content comes from the GGUF file alone. The chat template, which is Jinja, is translated into Ollama's
language only if both are proven to give the same texts. Ollama's parser reads a quoted text unchanged, so
that a text with three quotes cannot be written.

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
_PARAMETERS = {  # name in Ollama: name in GGUF
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repeat_penalty": "penalty_repeat",
}


def modelfile(files: Mapping[str, Path]) -> str:
    """Return the Modelfile for GGUF files in one folder.

    Args:
        files: variant -> its file. Ollama takes the first that is quantized.

    Raises:
        CheckpointError: if a file is not GGUF.
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
    """Return the recommended variant: the first that is quantized, or else the first."""
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
    unsaid = default is not None and system is None  # Ollama takes an empty text for no SYSTEM
    return (None, None) if unsaid else (quoted, system)


def _told(dialogue: Dialogue) -> tuple[str | None, str | None]:
    """Return the chat template and the default system text in Ollama's language; None if it cannot express them."""
    first = dialogue.tokens.get("bos_token", "") if dialogue.adds_first else ""
    return _say(dialogue.template or "", tuple(dialogue.tokens.items()), first)


def _in_go(turns: Turns) -> str | None:
    """Return turns as a template of Go; None if their texts contain its marks."""
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
    """Return a text in the quotes of a Modelfile; None if it cannot be quoted."""
    if _QUOTES in text or "\r" in text:
        return None
    return f"{_QUOTES}{text}{_QUOTES}" if '"' in text or "\n" in text else f'"{text}"'
