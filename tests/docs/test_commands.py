"""Every command in README, docs/ and CONTRIBUTING.md runs, on tiny models, little data and the loopback Hub.

A fenced block of `sh` is a script, `console` is a command with lines that it prints, and `python` is a program. A block
of `yaml` is a configuration or a part of one; if its first line is `# NAME.yaml`, it is that file. After the language a
block can say `slow` (it runs with `-m slow`) or `skip="reason"` (only its options are checked).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import yaml
from markdown_it import MarkdownIt

from pipeline.config.loader import parse_config
from pipeline.config.training_catalog import METHODS, SMALLEST_METHOD
from tests.support import REPOSITORY
from tests.support.hub import LoopbackHub
from tests.support.texts import general_text
from tests.support.warm import COLD

PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    REPOSITORY / "SECURITY.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
TOKEN = "hf_tunepressSecretForDocs0123456789"
# What the pages name -> what stands for it here. Longer names come first.
STAND_INS = {
    "HuggingFaceTB/SmolLM2-360M-Instruct": "ada/model",
    "USER/MODEL": "ada/model",
    "USER/small": "ada/small",
    "notes.txt": "general.txt",
    "USER/NAME": "ada/demo",
    "run qwen3-1.7b": "run first.yaml",
    "--measure": "--measure --set evaluate.max_tokens=256 --set evaluate.general=general.txt",
    "./launch.sh --test": "./launch.sh --test --version",
}
# What makes a run a tiny one, for each configuration that a page writes.
TINY = {
    "data": {"held_out": 0.25},
    "train": {"max_steps": 2, "batch_size": 2, "accumulate": 2, "learning_rate": 0.01, "max_length": 96},
    "evaluate": {"general": "general.txt", "max_tokens": 256},
    "quantize": {"on_gate_failure": "warn"},
}
DEMO = {
    "name": "demo",
    "model": {"source": "ada/model"},
    "data": {"source": "tickets.jsonl"},
    "quantize": {"variants": ["int8", {"name": "int4", "group_size": 32}]},
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    options: tuple[str, ...]
    text: str

    @property
    def skip(self) -> str | None:
        return next((option.removeprefix("skip=") for option in self.options if option.startswith("skip=")), None)

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def file(self) -> str | None:
        """The name of the file that the block is."""
        found = re.match(r"# ([\w.-]+\.yaml)\n", self.text)
        return found[1] if found else None


def blocks(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in _blocks_of(page) if block.language in languages]


def _blocks_of(page: Path) -> Iterator[Block]:
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "fence":
            language, *options = shlex.split(token.info) or [""]
            yield Block(page, token.map[0] + 1, language, tuple(options), token.content)


class Clone:
    """A clone in which `./launch.sh`, `tunepress`, `python`, `pip` and `hf` work, and whose .venv is there already."""

    def __init__(self, folder: Path, hub: LoopbackHub):
        self.folder = folder
        commands = folder / ".venv" / "bin"
        commands.mkdir(parents=True)
        for name in ("launch.sh", "pyproject.toml"):
            shutil.copy(REPOSITORY / name, folder)
        (folder / "scripts").symlink_to(REPOSITORY / "scripts")
        _write_program(commands / "python", f'[ "$1 $2" = "-m pip" ] || exec {sys.executable} "$@"')
        _write_program(commands / "tunepress", f'exec {sys.executable} -m pipeline "$@"')
        _write_program(commands / "pip", "exit 0")  # the extras that pages name are checked by a test of their own
        (commands / "hf").symlink_to(Path(COLD).with_name("hf"))
        rows = [f'{{"prompt": "What is {n} plus {n}?", "completion": "It is {2 * n}."}}\n' for n in range(24)]
        (folder / "tickets.jsonl").write_text("".join(rows))
        (folder / "general.txt").write_text(general_text())
        (folder / "configs").mkdir()
        self.write_config("configs/demo.yaml", DEMO)
        for block in blocks("yaml"):
            if block.file:
                self.write_config(block.file, yaml.safe_load(_with_stand_ins(block.text)))
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRACKIO_"))}
        self.env = {
            **plain, **hub.env_for(TOKEN, home=str(folder / "hf")), "HF_HOME": str(folder / "hf"),
            "TRACKIO_DIR": str(folder / "trackio"), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1",
            "PATH": f"{commands}:{plain['PATH']}", "COLUMNS": "400",
        }  # fmt: skip

    def write_config(self, name: str, tree: dict) -> None:
        bases = METHODS[(tree.get("train") or {}).get("method", SMALLEST_METHOD.name)].merge_bases
        tree = _merged(tree, {**TINY, "merge": {"base": bases[0]}})  # one merge, which saves time
        if tree.get("publish", {}).get("repo"):
            tree["publish"]["repo"] = f"ada/{tree['name']}"  # a repository takes the release of one run
        (self.folder / name).write_text(yaml.safe_dump(tree))

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess:
        done = subprocess.run(
            command, cwd=self.folder, env=self.env, input="Hello?\n\n", capture_output=True, text=True, timeout=500
        )
        said = f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert not check or done.returncode == 0, said
        return done


def _write_program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def _merged(tree: dict, more: dict) -> dict:
    return {
        **tree,
        **{k: _merged(tree.get(k) or {}, v) if isinstance(v, dict) else v for k, v in more.items()},
    }


def _with_stand_ins(text: str) -> str:
    for real, tiny in STAND_INS.items():
        text = text.replace(real, tiny)
    return text


@pytest.fixture(scope="module")
def clone(tmp_path_factory, tiny_model) -> Iterator[Clone]:
    """A clone with a finished and published demo. `ada/model` is a tiny model on the Hub, `adapter/` is an adapter."""
    folder = tmp_path_factory.mktemp("docs")
    with LoopbackHub(folder / "hub", {TOKEN: {"name": "ada", "role": "write"}}) as hub:
        clone = Clone(folder / "clone", hub)
        upload = f"upload_folder(repo_id='ada/model', folder_path={str(tiny_model('qwen3'))!r})"
        clone.run("python", "-c", f"from huggingface_hub import *; create_repo('ada/model'); {upload}")
        clone.run("./launch.sh", "--demo")
        shutil.copytree(clone.folder / "runs" / "demo" / "adapter", clone.folder / "adapter")
        clone.run("tunepress", "publish", "runs/demo", "--repo", "ada/demo")
        yield clone


def _cases(*languages: str) -> list:
    """Return the blocks that run, as parameters of a test; slow ones are marked."""
    return [
        pytest.param(block, id=block.name, marks=[pytest.mark.slow] if "slow" in block.options else [])
        for block in blocks(*languages)
        if not block.skip
    ]


@pytest.mark.parametrize("block", _cases("sh"))
def test_commands_run(clone, block):
    clone.run("bash", "-euo", "pipefail", "-c", _with_stand_ins(block.text))


@pytest.mark.parametrize("block", _cases("console"))
def test_commands_print_what_the_page_says(clone, block):
    command, *lines = _with_stand_ins(block.text).splitlines()
    done = clone.run("bash", "-c", command.removeprefix("$ "), check=False)
    said = " ".join((done.stdout + done.stderr).split())
    for line in lines:
        for part in line.split("..."):
            assert " ".join(part.split()) in said, said


@pytest.mark.parametrize("block", _cases("python"))
def test_programs_run(clone, block):
    clone.run("python", "-c", _with_stand_ins(block.text))


@pytest.mark.parametrize("block", [pytest.param(block, id=block.name) for block in blocks("yaml")])
def test_configurations_are_valid(block):
    part = yaml.safe_load(block.text)
    whole = {"name": "part", "model": {"source": "USER/MODEL"}, "data": {"source": "rows.jsonl"}}
    parse_config(part if block.file else {**whole, **part}, block.name)


@pytest.mark.parametrize("block", [pytest.param(b, id=b.name) for b in blocks("sh", "console") if b.skip])
def test_options_of_commands_that_cannot_run_here_exist(block):
    for line in block.text.splitlines():
        program, *words = shlex.split(line.removeprefix("$ "), comments=True) or [""]
        if program == "tunepress":
            _parse(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_within_sentences_exist(page):
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        for code in (part.content for part in token.children or () if part.type == "code_inline"):
            program, *words = shlex.split(code) if code.startswith(("tunepress ", "./launch.sh ")) else [""]
            if words and words[0].isidentifier() and not words[0].isupper():
                _parse([word for word in words if word != "--help"])
            elif program == "./launch.sh" and words[0] != "VERB":
                assert f"./launch.sh {words[0]} " in (REPOSITORY / "launch.sh").read_text(), code


def _parse(words: list[str]) -> None:
    """Let the command line read words of `tunepress`; fail for an unknown verb or option."""
    from pipeline.cli import app

    verb = typer.main.get_command(app).commands[words[0]]
    try:
        verb.make_context(words[0], list(words[1:]))
    except Exception as error:
        if type(error).__name__ != "MissingParameter":  # a sentence may leave arguments out
            raise


def test_every_language_of_a_block_is_checked():
    known = {"sh", "console", "python", "yaml", "text"}
    assert {block.language for page in PAGES for block in _blocks_of(page)} <= known


def test_extras_that_pages_name_exist():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page in PAGES:
        for named in re.findall(r"(?:tunepress|'\.)\[([\w,-]+)\]", page.read_text(encoding="utf-8")):
            assert set(named.split(",")) <= extras.keys(), f"{page.name}: {named}"


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_paths_that_pages_name_exist():
    named = re.compile(r"`((?:pipeline|scripts|tests|docs|configs|templates)/[\w./-]+)`")
    for page in PAGES:
        for path in named.findall(page.read_text(encoding="utf-8")):
            assert "NAME" in path or (REPOSITORY / path).exists(), f"{page.name}: {path}"
