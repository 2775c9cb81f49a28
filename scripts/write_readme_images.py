"""Make the README's two pictures from a finished run: the summary on the terminal, and quality against size.

python scripts/write_readme_images.py runs/demo [--output docs/images]
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

from pipeline.cli.terminal import summary
from pipeline.workflow.workspace import Workspace

WIDTH = 104  # columns of the terminal in the picture


def write_images(run: Path, output: Path) -> None:
    """Write `demo-summary.svg` and `quality_vs_size.png` of a finished run to a folder."""
    workspace = Workspace.open(run)
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, highlight=False)
    summary(console, workspace.config(), workspace)
    output.mkdir(parents=True, exist_ok=True)
    console.save_svg(str(output / "demo-summary.svg"), title="./launch.sh --demo", theme=MONOKAI, unique_id="demo")
    shutil.copyfile(workspace.release / "assets" / "quality_vs_size.png", output / "quality_vs_size.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run of the demo, such as runs/demo")
    parser.add_argument("--output", type=Path, default=Path("docs/images"), help="folder for the pictures")
    arguments = parser.parse_args()
    write_images(arguments.run, arguments.output)


if __name__ == "__main__":
    main()
