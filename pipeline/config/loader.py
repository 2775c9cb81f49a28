"""Configurations from YAML files: strict reading, `--set`, and the shipped recipes.

`load_config("demo.yaml", ["train.epochs=2"])` returns a `Config`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config.aliases import NO_KEY, OUR_KEYS
from pipeline.config.base import fields
from pipeline.config.schema import Config
from pipeline.errors import ConfigError, redact
from pipeline.system.resources import shipped_folder


def shipped_configs() -> dict[str, Path]:
    """Return the shipped recipes by name, in a clone and in an installed wheel."""
    return {p.stem: p for p in sorted(shipped_folder("configs").glob("*.yaml"))}


def load_config(source: str | Path, settings: Sequence[str] = ()) -> Config:
    """Read a configuration file, or a shipped recipe by its name.

    Args:
        source: path of a YAML file, or the name of a shipped recipe such as `demo`.
        settings: `key=value` overrides, with dotted keys and YAML values.

    Raises:
        ConfigError: if the file cannot be read, or if a value is refused.
    """
    path = Path(source)
    try:
        if not path.exists() and str(source).removesuffix(".yaml") in shipped_configs():
            path = shipped_configs()[str(source).removesuffix(".yaml")]
        if not path.is_file():
            raise ConfigError(
                f"{source}: no such configuration file. Try: a path, or one of {', '.join(shipped_configs())}"
            )
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{cut(str(path))}: cannot be read ({error.strerror})") from None
    tree = read_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: not a mapping of keys to values. Try: 'name: my-run'")
    return parse_config(tree, str(path), settings)


def parse_config(tree: dict, origin: str, settings: Sequence[str] = ()) -> Config:
    """Return the configuration from plain data and `key=value` overrides.

    Raises:
        ConfigError: if a value is refused. The error names `origin`.
    """
    for setting in settings:
        _apply(tree, setting)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {explain(error)}") from None


def dump_config(config: Config) -> str:
    """Return the configuration as YAML, with every default written out."""
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False, allow_unicode=True)


class _StrictLoader(yaml.SafeLoader):
    """A safe YAML loader that refuses a key that occurs twice in a mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} occurs twice", problem_mark=key_node.start_mark)
            seen.add(key if isinstance(key, str) else id(key_node))
        return super().construct_mapping(node, deep)


def read_yaml(text: str, origin: str) -> Any:
    """Return the content of a YAML text; errors name `origin`.

    Raises:
        ConfigError: if it is not valid, or has a key twice.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except RecursionError:
        raise ConfigError(f"{origin}: nested too deeply for a configuration") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark and "\n" in text else ""
        raise ConfigError(f"{origin}{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        # Errors of PyYAML's constructors, for example for a 30th of February.
        reason = error if isinstance(error, ValueError) else "a value that does not fit its tag"
        raise ConfigError(f"{origin}: not valid YAML: {reason}") from None


def _apply(tree: dict, setting: str) -> None:
    key, separator, text = setting.partition("=")
    setting = cut(redact(setting))
    if not separator or not key.strip():
        raise ConfigError(f"--set {setting}: not of the form key=value. Try: --set train.epochs=2")
    value = read_yaml(text, f"--set {setting}")
    *parents, last = key.strip().split(".")
    for name in parents:
        tree = tree.setdefault(name, {}) if isinstance(tree, dict) else None
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {setting}: {name!r} is a value, not a section")
    tree[last] = value


def explain(error: ValidationError, known: type[BaseModel] = Config) -> str:
    """Return the first problem in one line. A misspelled key comes first, because it causes others (`nmae`, `name`).

    Args:
        error: the error of pydantic.
        known: the type that was read, for suggestions of keys.
    """
    problems = error.errors(include_url=False)
    meant = {n: _meant(p["loc"], known) for n, p in enumerate(problems) if p["type"] == "extra_forbidden"}
    place = next((n for n, key in meant.items() if key), 0)
    first = problems[place]
    key = ".".join(str(part) for part in first["loc"] if part not in ("str", "list[str]"))
    if place in meant:
        beside = ", ".join(_keys_beside(first["loc"], known))
        message = f"{key}: unknown key; {meant[place] or f'known here are {beside}'}"
    elif first["type"] == "missing":
        hint = "; null makes a run without training" if key == "data" else ""
        message = f"{key}: missing, and it has no default{hint}"
    elif not key:  # a rule about several sections names them itself
        message = first["msg"].removeprefix("Value error, ")
    else:
        reason = first["msg"].removeprefix("Value error, ")
        message = f"{key}: {cut(redact(_show(first['input'])))} is refused: {reason}"
    return message + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


def _show(value: Any, depth: int = 2) -> str:
    """Return the beginning of a value in one line, because aliases can make a value huge or endless."""
    if isinstance(value, dict):
        few = [f"{key}: {_show(v, depth - 1)}" for key, v in list(value.items())[:4]] if depth else []
        return "{" + ", ".join(few + ["..."] * (len(few) < len(value))) + "}"
    if isinstance(value, list):
        few = [_show(v, depth - 1) for v in value[:4]] if depth else []
        return "[" + ", ".join(few + ["..."] * (len(few) < len(value))) + "]"
    if isinstance(value, int) and value.bit_length() > 256:
        return "a number of hundreds of digits"
    return json.dumps(value, default=str, ensure_ascii=False)


def cut(text: str) -> str:
    """Return at most 80 characters of a text, for an error."""
    return text if len(text) <= 80 else text[:77] + "..."


def _meant(location: tuple, whole: type[BaseModel]) -> str:
    """Return the key that an unknown one stands for: by another tool's name, in another section, or misspelled.

    Returns:
        Words for an error; empty if there is no such key.
    """
    name = str(location[-1]).strip().lower().replace("-", "_")
    keys = dict(fields(whole))
    places = OUR_KEYS.get(name) if whole is Config else None
    places = places or tuple(key for key in keys if key.rpartition(".")[2] == name)
    places = tuple(key for key in places if not any(key.endswith(f".{other}") for other in places))  # the outer ones
    if places:
        return "here it is called " + " or ".join(f"{key} ({keys[key].description})" for key in places)
    if whole is Config and name in NO_KEY:
        return NO_KEY[name]
    close = difflib.get_close_matches(str(location[-1]), _keys_beside(location, whole), n=1)
    return f"did you mean {close[0]!r}?" if close else ""


def _keys_beside(location: tuple, whole: type[BaseModel]) -> list[str]:
    section = ".".join(part for part in location[:-1] if not isinstance(part, int))
    return [name for key, _ in fields(whole) for place, _, name in [key.rpartition(".")] if place == section]
