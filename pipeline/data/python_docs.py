"""Data that every machine has: the documentation inside Python's standard library.

`python_docs()` turns the docstrings of the standard library into questions and
answers, for training, and `python_docs_pairs()` adds a worse answer to each.
`python_topics()` is the language reference as `help()` shows it, for measuring how
well a model still reads general text. They share nothing with it.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from pipeline.data.example import Example
from pipeline.errors import DataError

LICENSE = "psf-2.0"
LANGUAGE = "en"

_SHORTEST, _LONGEST = 40, 1500  # characters of a docstring that is worth an answer
_LONGEST_IN_PAIR = 400  # characters of a docstring that becomes a preference pair
_FEWEST_WORDS = 6
_LONGEST_CALL = 80  # characters of `name(arguments)` inside a question
_SHORTEST_TOPIC = 1000

# Not documentation of the library but its tests, its tools, and topics that are measured on.
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "site-packages", "dist-packages"}

_QUESTIONS = {
    "module": (
        "What is Python's `{}` module for?",
        "What does the module `{}` of Python's standard library provide?",
        "Describe the Python module `{}`.",
    ),
    "class": (
        "What is the Python class `{}`?",
        "Describe the class `{}` of Python's standard library.",
        "What is `{}` used for in Python?",
    ),
    "function": (
        "What does the function `{}` do?",
        "Explain `{}` from Python's standard library.",
        "How does the Python function `{}` work?",
    ),
    "method": (
        "What does the method `{}` do?",
        "Explain the Python method `{}`.",
        "What happens when `{}` is called in Python?",
    ),
    "property": (
        "What is the property `{}`?",
        "What does `{}` hold in Python?",
    ),
}


def python_docs(folder: Path | None = None) -> list[Example]:
    """Return one question and answer for every public docstring of the standard library.

    The sources are parsed, never imported. Order and content depend on nothing but the
    sources: the same Python gives the same examples everywhere.

    Args:
        folder: where the standard library's sources are; by default this Python's own.

    Raises:
        DataError: if this Python comes without its sources.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    examples, names, docs = [], set(), set()
    for path, module in _modules(folder):
        for kind, name, call, doc in _documented(path, module):
            words = " ".join(re.findall(r"\w+", doc.lower()))
            if name in names or words in docs or not _worth_asking(doc):
                continue
            names.add(name)
            docs.add(words)
            messages = ({"role": "user", "content": _question(kind, name, call)}, {"role": "assistant", "content": doc})
            examples.append(Example(messages))
    if not examples:
        raise DataError(f"builtin:python-docs: no sources of the standard library under {folder}; name a data file")
    return examples


def python_docs_pairs(folder: Path | None = None) -> list[Example]:
    """Return short answers of `python_docs`, each with a worse answer to the same question.

    Of three worse answers, two are the docstring of the next thing of the same module, and one breaks off in the middle
    of a sentence. Order and content depend on nothing but the sources.

    Args:
        folder: as in `python_docs`.

    Raises:
        DataError: if this Python comes without its sources.
    """
    short = [e for e in python_docs(folder) if len(e.messages[-1]["content"]) <= _LONGEST_IN_PAIR]
    pairs = []
    for example, sibling in zip(short, [*short[1:], *short[:1]], strict=True):
        (question, answer), (_, other) = example.messages, sibling.messages
        if _number(question["content"]) % 3 == 0:
            words = answer["content"].split(" ")
            other = answer | {"content": " ".join(words[: max(1, len(words) // 2)]).rstrip(" .")}
        if other != answer:
            pairs.append(Example(example.messages, rejected=other))
    return pairs


def python_topics() -> tuple[str, ...]:
    """Return the long topics of the language reference, in alphabetical order.

    A topic that is mostly a part of longer ones is left out: text that comes twice is
    easy to predict the second time. About 360,000 characters with Python 3.11.

    Raises:
        DataError: if this Python comes without `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            "builtin:python-topics: this Python has no pydoc_data.topics; set evaluate.general to a .txt file"
        ) from None
    long = {name: text.strip() for name, text in topics.items() if len(text) >= _SHORTEST_TOPIC}
    kept: dict[str, str] = {}
    seen: set[str] = set()
    for name, text in sorted(long.items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = text.split("\n\n")
        if sum(len(p) for p in paragraphs if p in seen) < len(text) / 4:
            kept[name] = text
            seen.update(paragraphs)
    return tuple(kept[name] for name in sorted(kept))


def _modules(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield every public module's file and dotted name, sorted."""
    for path in sorted(folder.rglob("*.py"), key=lambda p: p.relative_to(folder).parts):
        *packages, file = path.relative_to(folder).with_suffix("").parts
        parts = packages if file == "__init__" else [*packages, file]
        if not parts or parts[0] not in sys.stdlib_module_names:
            continue
        if any(part.startswith("_") or part in _SKIPPED or not part.isidentifier() for part in parts):
            continue
        yield path, ".".join(parts)


def _documented(path: Path, module: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield (kind, dotted name, name with arguments, docstring) of everything public in a file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old string escapes in old modules
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    if doc := _docstring(tree):
        yield "module", module, module, doc
    yield from _members(tree, module, inside_class=False)


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return (ast.get_docstring(node) or "").strip()


def _members(node: ast.AST, prefix: str, inside_class: bool) -> Iterator[tuple[str, str, str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.If, ast.Try)):  # definitions that depend on the platform
            yield from _members(child, prefix, inside_class)
        if not isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) or child.name.startswith("_"):
            continue
        name, doc = f"{prefix}.{child.name}", _docstring(child)
        if isinstance(child, ast.ClassDef):
            if doc:
                yield "class", name, name, doc
            yield from _members(child, name, inside_class=True)
        elif doc:
            yield _kind(child, inside_class), name, _call(child, name, inside_class), doc


def _kind(function: ast.FunctionDef | ast.AsyncFunctionDef, inside_class: bool) -> str:
    if any(d.endswith("property") for d in _decorators(function)):
        return "property"
    return "method" if inside_class else "function"


def _call(function: ast.FunctionDef | ast.AsyncFunctionDef, name: str, inside_class: bool) -> str:
    """Return `name(arguments)` as a caller writes it, or the name alone if that gets long."""
    decorators, arguments = _decorators(function), function.args
    if any(d.endswith("property") for d in decorators):
        return name
    if inside_class and "staticmethod" not in decorators:
        del (arguments.posonlyargs or arguments.args)[:1]  # self
    call = f"{name}({ast.unparse(arguments)})"
    return call if len(call) <= _LONGEST_CALL else name


def _decorators(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    return [ast.unparse(d) for d in function.decorator_list]


def _worth_asking(doc: str) -> bool:
    """Return True if a docstring has words, beyond a signature, a link or an example."""
    if not _SHORTEST <= len(doc) <= _LONGEST or doc.startswith(">>>"):
        return False
    prose = re.sub(r"\w+://\S+|^[\w.]+\(.*?\)(\s*->.*)?$", " ", doc, flags=re.MULTILINE)
    return len(re.findall(r"[A-Za-z]{2,}", prose)) >= _FEWEST_WORDS


def _question(kind: str, name: str, call: str) -> str:
    """Return one of a few phrasings, chosen by the name."""
    phrasings = _QUESTIONS[kind]
    return phrasings[_number(name) % len(phrasings)].format(call)


def _number(text: str) -> int:
    """Return a number that is as good as random, and the same everywhere."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
