"""CONTRIBUTING.md lists the packages as they are, with the charters of their docstrings."""

from __future__ import annotations

import ast
import re
import tomllib

from tests.support import REPOSITORY


def test_house_lists_every_package_with_its_charter_in_import_order():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)/` \| (.+) \|$", text, re.MULTILINE)
    contract = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    packages = [name for name in reversed(contract["layers"]) if (REPOSITORY / "pipeline" / name).is_dir()]
    assert listed == [(name, _charter(name)) for name in packages]


def _charter(package: str) -> str:
    source = (REPOSITORY / "pipeline" / package / "__init__.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)).splitlines()[0]
