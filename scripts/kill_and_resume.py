"""Kill a run with -9 at many moments, resume it, and compare the result with that of an undisturbed run.

    python scripts/kill_and_resume.py [--kills 40] [--together 1] [--method lora] [--variants int4,int8]
                                      [--only 3,17] [--jobs 1] [--scratch DIR] [--keep]

A tiny random model is trained, merged, measured, quantized and published to a hub on loopback. The moments are
spread over all stages, half by time and half by events. `--together 5` kills each run five times, one moment after
the other, before it is left to end, which takes less time. Nothing but the first process is killed: what it
had started has to end by itself, while the same command already runs again.

Exit code 0 only if every run ended with the same weights, configurations, tokenizer and adapter, hash for hash, with
the same cards and lineage but for times, speeds and memory, with no event missing in the spool or in Trackio, and with
a repository that was at every commit a whole and true release. Needs tunepress's `test` extra, and a clone.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the tests' hub and tiny models


def main() -> int:
    from tests.e2e.faults.runs import disturbed, undisturbed
    from tests.support.models import write_model

    arguments = _arguments()
    scratch = Path(tempfile.mkdtemp(prefix="kill-and-resume-", dir=arguments.scratch))
    write_model(scratch / "model", "qwen3")
    settings = {"method": arguments.method, "variants": arguments.variants.split(",")}
    print(f"{scratch}: an undisturbed run", flush=True)
    with undisturbed(scratch / "undisturbed", scratch / "model", **settings) as (whole, timeline):
        moments = timeline.moments(arguments.kills)
        chosen = [int(number) - 1 for number in arguments.only.split(",")] if arguments.only else range(len(moments))
        print(f"{timeline.seconds[-1]:.0f} s, {len(timeline.names) - 1} events; now {len(chosen)} kills", flush=True)
        failed, late = 0, 0
        groups = [chosen[i : i + arguments.together] for i in range(0, len(chosen), arguments.together)]

        def disturb(group: list[int]) -> tuple[list[bool], list[str], float]:
            start, folder = time.monotonic(), scratch / f"killed-{group[0] + 1}"
            picked = [moments[number] for number in group]
            killed, found = disturbed(folder, scratch / "model", whole, timeline, picked, **settings)
            if not (found or arguments.keep):
                shutil.rmtree(folder)
            return killed, found, time.monotonic() - start

        with ThreadPoolExecutor(arguments.jobs) as pool:
            for group, (killed, found, seconds) in zip(groups, pool.map(disturb, groups), strict=True):
                failed += bool(found)
                late += killed.count(False)
                for number, in_time in zip(group, killed, strict=True):
                    print(f"{number + 1:4}  {moments[number]!s:45}  {'killed' if in_time else 'had ended before'}")
                print(f"      {'DIFFERS' if found else 'the same'}, {seconds:.0f} s", flush=True)
                for line in found:
                    print(f"      {line}", flush=True)
    print(f"{len(groups) - failed} of {len(groups)} runs are the same, after {len(chosen) - late} kills")
    if not (failed or arguments.keep):
        shutil.rmtree(scratch)
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, metavar="N", help="moments at which to kill")
    parser.add_argument("--together", type=int, default=1, metavar="K", help="kills of one run, before it may end")
    parser.add_argument("--only", metavar="I,J", help="only these moments, counted from 1")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    parser.add_argument("--method", choices=("lora", "qlora"), default="lora")
    parser.add_argument("--variants", default="int4", metavar="A,B", help="variants to make")
    parser.add_argument("--scratch", metavar="DIR", help="where to work; by default the system's place for that")
    parser.add_argument("--keep", action="store_true", help="keep the folders of runs that ended the same")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
