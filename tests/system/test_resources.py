"""Templates and recipes in a clone and in an installed package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from tests.support import REPOSITORY


def test_installed_package_finds_its_own_templates(tmp_path):
    shutil.copytree(REPOSITORY / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pipeline" / "templates").mkdir()
    code = "from pipeline.system.resources import shipped_folder; print(shipped_folder('templates'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(tmp_path / "pipeline" / "templates")
