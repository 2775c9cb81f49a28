"""No code compares a name: names of entries stand in their entries, the catalogues and the registries alone."""

from __future__ import annotations

import ast
import importlib.metadata
import re
from pathlib import Path

import pytest

from pipeline.config.catalog import LLAMA_CPP, ROUNDINGS, VARIANTS
from pipeline.config.training_catalog import METHODS, TRAINERS
from pipeline.inference.loaders import DEQUANTIZED, PACKED
from pipeline.quantization.formats import _ENTRIES as FORMATS
from pipeline.tracking.trackers import TRACKERS
from tests.support import REPOSITORY

PACKINGS = {packing for variant in VARIANTS.values() for packing in variant.packings}
LOADERS = {PACKED, DEQUANTIZED, LLAMA_CPP}
NAMES = {*VARIANTS, *FORMATS, *PACKINGS, *ROUNDINGS, *METHODS, *TRAINERS, *TRACKERS, *LOADERS}

# Names that also mean something else: English words, modules and distributions. In a module that imports no catalogue
# and no registry they cannot mean an entry.
INSTALLED = importlib.metadata.packages_distributions()
WORDS = {"plain", "search", "lora", *INSTALLED, *(name for names in INSTALLED.values() for name in names)}
REGISTRIES = re.compile(r"pipeline\.(config|quantization\.(formats|roundings)|training\.trainers|tracking\.trackers)\b")

# Catalogues and registries name every entry.
CATALOGUES = {
    "config/catalog.py", "config/engines.py", "config/presets.py", "config/registry.py", "config/served_variants.py",
    "config/training_catalog.py", "config/track.py", "inference/loaders.py", "quantization/formats/__init__.py",
    "training/trainers/__init__.py", "tracking/trackers/__init__.py",
}  # fmt: skip
ENTRIES = re.compile(r"(quantization/formats|quantization/roundings|training/trainers|tracking/trackers)/(\w+)")
MODULES = sorted((REPOSITORY / "pipeline").rglob("*.py"))


def documentation(tree: ast.AST) -> set[int]:
    """Return the ids of the docstrings in a module."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = (node.body for node in ast.walk(tree) if isinstance(node, kinds) and node.body)
    return {id(body[0].value) for body in bodies if isinstance(body[0], ast.Expr)}


def imports_a_registry(tree: ast.AST) -> bool:
    found = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return any(REGISTRIES.match(module) for module in found)


def _names_of(entry: str) -> set[str]:
    """Return what the folder or module of an entry may name: itself, its formats, and what they write."""
    forms = {entry, *(name for name, (module, _) in FORMATS.items() if entry in module.split("."))}
    packings = {name for v in VARIANTS.values() for name, packing in v.packings.items() if packing.format in forms}
    written = (v for v in VARIANTS.values() if forms & {v.format, *(p.format for p in v.packings.values())})
    return {*forms, *packings, *(variant.name for variant in written)}


def named(path: str, text: str) -> list[str]:
    """Return the literal names in a module of `pipeline/` that stand outside their own entries.

    Args:
        path: below `pipeline/`.
    """
    if path in CATALOGUES:
        return []
    tree, own = ast.parse(text), ENTRIES.match(path)
    skipped = documentation(tree)
    names = NAMES - _names_of(own[2]) if own else NAMES
    names = names if imports_a_registry(tree) else names - WORDS
    literals = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in skipped]
    return [f"{path}:{node.lineno}: {node.value!r}" for node in literals if node.value in names]


def named_in_template(name: str, text: str) -> list[str]:
    """Return the literal names in the expressions and statements of a template."""
    code = " ".join(re.findall(r"\{[{%](.*?)[%}]\}", text, re.DOTALL))
    literals = [a or b for a, b in re.findall(r"\"([^\"]*)\"|'([^']*)'", code)]
    keys = re.findall(r"\bresults\.([\w-]+)", code)
    return [f"{name}: {found!r}" for found in [*literals, *keys] if found in NAMES]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(REPOSITORY / "pipeline").as_posix())
def test_module_names_no_entry_of_a_registry(path: Path):
    assert named(path.relative_to(REPOSITORY / "pipeline").as_posix(), path.read_text("utf-8")) == []


@pytest.mark.parametrize("path", sorted((REPOSITORY / "templates").glob("*.jinja")), ids=lambda path: path.name)
def test_template_names_no_entry_of_a_registry(path: Path):
    assert named_in_template(path.name, path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "path, text, found",
    [
        ("planning/x.py", "def f(spec):\n    return spec.name == 'int4'", 1),
        ("planning/x.py", "def f(spec):\n    'int4'\n    return spec.name", 0),
        ("planning/x.py", "x = 'plain'", 0),
        ("planning/x.py", "from pipeline.config.catalog import VARIANTS\nx = 'plain'", 1),
        ("quantization/formats/torchao/x.py", "x = 'int8'", 0),
        ("quantization/formats/gguf/x.py", "x = 'int8'", 1),
        ("quantization/roundings/hqq.py", "x = 'hqq'", 0),
        ("quantization/roundings/hqq.py", "x = 'rtn'", 1),
        ("config/catalog.py", "x = 'rtn'", 0),
    ],
)
def test_check_detects_literal_names(path, text, found):
    assert len(named(path, text)) == found


def test_check_detects_literal_names_in_templates():
    text = "{% if results.int4.x == \"hqq\" %}int8 'rtn'{% endif %}"
    assert named_in_template("x", text) == ["x: 'hqq'", "x: 'int4'"]
