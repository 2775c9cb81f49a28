"""Processes forked from the warm Python: like those of a fresh one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import REPOSITORY
from tests.support.warm import COLD, is_possible

pytestmark = pytest.mark.skipif(not is_possible(), reason="processes are those of the real Python here")

# Every plain value of the libraries that read the environment while they are imported.
SETTINGS = """
import importlib, json, pathlib, sys
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
plain = (str, bool, int, float, type(None), pathlib.Path)
found = {}
for name, module in sorted(sys.modules.items()):
    if name.partition(".")[0] in ("huggingface_hub", "datasets", "transformers", "trackio"):
        values = {k: v for k, v in vars(module).items() if k[0] != "_" and k.isupper() and isinstance(v, plain)}
        found |= {f"{name}.{key}": str(value) for key, value in values.items()}
from huggingface_hub import hf_api
found["endpoint"] = hf_api.api.endpoint
print(json.dumps(found))
"""
IMPORTED = ["huggingface_hub.constants", "huggingface_hub.hf_api", "huggingface_hub.utils._cache_manager",
            "datasets.config", "transformers.utils.hub", "trackio.utils", "trackio.sqlite_storage"]  # fmt: skip


def python(program: str, *arguments: str, **settings) -> subprocess.CompletedProcess:
    return subprocess.run([program, *arguments], capture_output=True, text=True, **settings)


def test_warm_libraries_have_the_settings_of_their_own_environment(tmp_path):
    env = os.environ | {
        "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": "http://127.0.0.1:7", "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_DOWNLOAD_TIMEOUT": "77",
    }  # fmt: skip
    cold, warm = (
        json.loads(python(program, "-c", SETTINGS, json.dumps(IMPORTED), env=env).stdout)
        for program in (COLD, sys.executable)
    )
    del cold["transformers.utils.hub.SESSION_ID"]  # a random one
    assert {name: warm.get(name) for name in cold} == cold
    assert warm["endpoint"] == "http://127.0.0.1:7" and warm["trackio.utils.TRACKIO_DIR"] == str(tmp_path / "trackio")


def test_warm_process_has_the_libraries_imported_and_not_ours():
    said = python(sys.executable, "-c", "import sys; print('torch' in sys.modules, 'pipeline' in sys.modules)").stdout
    assert said.split() == ["True", "False"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("-c", "import sys; print(sys.argv, sys.path[0], __name__)", "-m", "x"),
        ("-P", "-c", "import os, sys; print(os.getcwd(), sys.path[0])"),
        ("-I", "-c", "import sys; print(sys.path)"),
        ("-m", "script", "one"),
        ("-P", "-m", "script"),
        ("script.py", "one", "two"),
        ("-c", "import sys; print(repr(sys.stdin.read()), sys.stdin.encoding, sys.stdout.encoding)"),
        ("-c", "import sys; sys.exit(3)"),
        ("-c", "import sys; sys.exit(130)"),
        ("-c", "import os, signal; os.kill(os.getpid(), signal.SIGINT)"),
        ("-c", "import tempfile; print(tempfile.gettempdir())"),
        ("-c", "import sys; sys.exit('why')"),
        ("-c", "import atexit; atexit.register(print, 'last'); print('first')"),
        ("-c", "import threading; threading.Timer(0.1, print, ['late']).start()"),
        ("-c", "import os; os._exit(5)"),
        ("-c", "def wrong(): raise ValueError('what')\nwrong()"),
        ("-c", "import os; os.kill(os.getpid(), 9)"),
        ("-c", "import os; os.kill(os.getpid(), 15)"),
        ("-c", "import sys; print('\\udc80', file=sys.stderr)"),
        ("-c",),
        ("-S", "-c", "import sys; print('site' in sys.modules)"),
    ],
    ids=lambda arguments: " ".join(arguments)[:40],
)  # fmt: skip
def test_warm_process_does_and_ends_as_a_cold_one(tmp_path, arguments):
    (tmp_path / "script.py").write_text("import sys\nprint(sys.argv, sys.path[0], __name__, __file__)\n")
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "TMPDIR": str(tmp_path)}
    cold, warm = (
        python(program, *arguments, cwd=tmp_path, env=env, input="what\nelse") for program in (COLD, sys.executable)
    )
    told = warm.stderr.replace(sys.executable, COLD)
    assert (warm.returncode, warm.stdout, told) == (cold.returncode, cold.stdout, cold.stderr)


def test_warm_process_is_another_python_if_a_library_is_to_be_loaded_otherwise():
    env = os.environ | {"OMP_NUM_THREADS": "2"}
    assert python(sys.executable, "-c", "import sys; print('torch' in sys.modules)", env=env).stdout == "False\n"


def test_warm_process_gets_signals_and_goes_with_its_client(tmp_path):
    code = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)"
    for number, ended in ((signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -9)):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        child = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait(30) == ended
        end = time.monotonic() + 30
        while Path(f"/proc/{child}").exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        process.stdout.close()
