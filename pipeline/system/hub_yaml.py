"""YAML as the Hub reads it in cards: by the rules of version 1.2, so that `no` is a language and a date is a text."""

from __future__ import annotations

import re

import yaml

# Errors of PyYAML for any text, such as an `!!int` that is not a number, or a 30th of February.
UNREADABLE = (yaml.YAMLError, ValueError, RecursionError, LookupError, TypeError, AttributeError)
FRONT_MATTER = re.compile(r"\s*---[ \t]*(?:\r\n|\r|\n)(?:([\S\s]*?)(?:\r\n|\r|\n))??---[ \t]*(?:\r\n|\r|\n|\Z)")


class HubLoader(yaml.SafeLoader):
    """A loader without the booleans and dates of YAML 1.1."""


HubLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in rules if not tag.endswith((":bool", ":timestamp"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
HubLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")
)
