"""The metadata at the top of a README: enough YAML to list it, and the Hub's complaints about it."""

import re

_BLOCK = re.compile(r"---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_MODEL_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def metadata(text: str) -> dict:
    """Scalars and flat lists of the front matter; anything nested is left out."""
    block = _BLOCK.match(text)
    found: dict = {}
    key = None
    for line in block[1].splitlines() if block else []:
        if item := re.fullmatch(r"\s*-\s+(.*)", line):
            value = item[1]
            if key is None or ": " in value or not isinstance(found.setdefault(key, []), list):
                found.pop(key, None)
                key = None
            else:
                found[key].append(_scalar(value))
        elif pair := re.fullmatch(r"([\w-]+):\s*(.*)", line):
            key, value = pair[1], pair[2].strip()
            if value.startswith("[") and value.endswith("]"):
                found[key] = [_scalar(part) for part in value[1:-1].split(",") if part.strip()]
            elif value:
                found[key] = _scalar(value)
        else:
            found.pop(key, None)
            key = None
    return found


def problems(text: str) -> tuple[list[str], list[str]]:
    """What the Hub says about a README's metadata: errors, for which it refuses it, and warnings."""
    if not text.startswith("---"):
        return [], ["empty or missing yaml metadata in repo card"]
    if not _BLOCK.match(text):
        return ["the metadata block is not closed by a line of three dashes"], []
    models = metadata(text).get("base_model", [])
    models = models if isinstance(models, list) else [models]
    wrong = [model for model in models if not _MODEL_ID.fullmatch(str(model))]
    return [f'"base_model" with value "{model}" is not valid: it has to be a model id' for model in wrong], []


def _scalar(text: str):
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if text in ("true", "false"):
        return text == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return None if text in ("null", "~") else text
