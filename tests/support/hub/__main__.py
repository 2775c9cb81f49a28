"""Run the hub by hand: python -m tests.support.hub FOLDER --port 8123 --token ann=hf_ann

Repositories live as long as the process; only file contents stay in FOLDER.
"""

import argparse
import contextlib
import shlex
import threading

from . import LoopbackHub


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support.hub", description="A Hugging Face Hub look-alike.")
    parser.add_argument("folder", help="where file contents are kept")
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1 (default: any free one)")
    parser.add_argument("--token", action="append", default=[], metavar="NAME=TOKEN", help="a user who may write")
    arguments = parser.parse_args()
    pairs = [pair.partition("=") for pair in arguments.token]
    if not all(name and token for name, _, token in pairs):
        parser.error("--token wants NAME=TOKEN")
    tokens = {token: {"name": name} for name, _, token in pairs}
    with LoopbackHub(arguments.folder, tokens, port=arguments.port) as hub:
        env = hub.env_for(next(iter(tokens))) if tokens else hub.env
        print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in env.items()), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
