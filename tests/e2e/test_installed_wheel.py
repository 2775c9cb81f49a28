"""The wheel: complete, and usable without the clone."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.support import REPOSITORY


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, REPOSITORY],
        check=True,
        timeout=300,
    )
    return next(folder.glob("tunepress-*.whl"))


def test_every_package_is_listed_for_the_wheel():
    listed = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {p.parent.relative_to(REPOSITORY) for p in (REPOSITORY / "pipeline").rglob("__init__.py")}
    assert set(listed) - {"pipeline.configs", "pipeline.templates"} == {".".join(p.parts) for p in found}


@pytest.mark.slow
def test_wheel_contains_every_module_config_and_template(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {p.relative_to(REPOSITORY).as_posix() for p in (REPOSITORY / "pipeline").rglob("*.py")}
    folder = REPOSITORY / "configs"
    configs = {f"pipeline/configs/{p.relative_to(folder)}" for p in folder.rglob("*.yaml")}
    templates = {f"pipeline/templates/{p.name}" for p in (REPOSITORY / "templates").glob("*.jinja")}
    assert configs and templates
    assert modules | configs | templates <= names
    assert not [name for name in names if name.startswith("tests/")]


@pytest.mark.slow
def test_installed_package_finds_recipes_and_templates(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "from pipeline.config.loader import load_config, shipped_configs\n"
        "from pipeline.system.resources import shipped_folder\n"
        "assert str(shipped_folder('templates')).startswith({!r})\n"
        "print(load_config('demo').name, sorted(shipped_configs()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code.format(str(tmp_path))], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("demo")
