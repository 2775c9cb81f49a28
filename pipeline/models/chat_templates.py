"""The chat templates of a model: one, or several by name.

transformers keeps several in `additional_chat_templates/`, or as a list in `tokenizer_config.json`. A copy keeps them
as that list, because one file goes with a tokenizer wherever it is copied.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import ModelError
from pipeline.models.safe_loading import read_settings
from pipeline.models.tokenizer_settings import SETTINGS_FILES, TEMPLATES, real_path

DEFAULT = "default"
FILE = "chat_template.jinja"


def chat_templates(folder: Path) -> dict[str, str]:
    """Return the chat templates in a folder by name, as transformers reads them; the main one is `default`."""
    files = {path.stem: path for path in sorted(folder.glob(f"{TEMPLATES}/*.jinja"))}
    if (folder / FILE).is_file():
        files[DEFAULT] = folder / FILE
    if files:
        return {name: real_path(path).read_text(encoding="utf-8") for name, path in files.items()}
    settings = folder / SETTINGS_FILES[0]
    try:
        found = read_settings(settings).get("chat_template") if settings.is_file() else None
    except ModelError:  # transformers says what is wrong with the file
        found = None
    if isinstance(found, list):
        pairs = [(one.get("name"), one.get("template")) for one in found if isinstance(one, dict)]
        return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
    return {DEFAULT: found} if isinstance(found, str) and found else {}


def has_chat_template(folder: Path) -> bool:
    """Return True if the tokenizer in a folder has a chat template."""
    return bool(chat_templates(folder))


def write_chat_templates(folder: Path, templates: Mapping[str, str]) -> None:
    """Write the chat templates of the tokenizer in a folder, in place of those that it has."""
    path = folder / SETTINGS_FILES[0]
    settings = before = read_settings(path) if path.is_file() else {}
    settings = {key: value for key, value in settings.items() if key != "chat_template"}
    if templates.keys() == {DEFAULT}:
        (folder / FILE).write_text(templates[DEFAULT], encoding="utf-8")
    else:
        (folder / FILE).unlink(missing_ok=True)  # transformers would read no other
        settings["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    if settings != before:
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
