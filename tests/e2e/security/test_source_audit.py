"""An audit of the source code: no pickles, no evaluated text, no remote code."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.config.loader import _StrictLoader
from pipeline.system.hub_yaml import HubLoader
from tests.support import REPOSITORY

SOURCES = sorted(path for folder in ("pipeline", "scripts") for path in (REPOSITORY / folder).rglob("*.py"))
MODULES = ("pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "tarfile", "runpy")
BUILTINS = ("eval", "exec", "compile", "__import__", "execfile")
CALLS = re.compile(
    r"torch\.(load|save|hub\.load|jit\.load)|(np|numpy)\.(load|save)|pd\.read_pickle|yaml\.(unsafe|full)_load(_all)?"
    r"|yaml\.load_all|os\.(system|popen|spawn\w+)|subprocess\.get(status)?output|shutil\.unpack_archive"
    r"|zipfile\.ZipFile|importlib\.(import_module|reload)"
)
METHODS = ("extractall", "unpack_archive", "read_pickle", "to_pickle")
# What they open has no code: settings, an adapter that was read before, the name of a quantization.
NO_CODE = ("GenerationConfig", "PeftModel", "AutoHfQuantizer")
# What opens the files of a model, and the modules that check them before; `packaged_gguf` opens installed packages.
OPENERS = re.compile(r"(Auto\w+|GenerationConfig|PreTrained\w+)\.(from_pretrained|for_model)")
CHECKED = {
    "pipeline/models/safe_loading.py": {
        f"{name}.from_pretrained"
        for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "GenerationConfig")
    },
    "pipeline/models/matrices.py": {"AutoConfig.for_model"},
    "pipeline/models/packaged_gguf.py": {"AutoModelForCausalLM.from_pretrained", "AutoTokenizer.from_pretrained"},
}
LOADERS = ("HubLoader", "_StrictLoader")  # of YAML
REGISTRIES = (
    "quantization/formats",
    "quantization/roundings",
    "tracking/trackers",
    "training/trainers",
    "workflow/stages",
)
ALLOWED = {
    ("pipeline/workflow/stages/fine_tune.py", "imports pickle"),  # the error that `weights_only` raises, by its name
    # Modules of this package, by the names in a registry.
    *((f"pipeline/{registry}/__init__.py", "calls importlib.import_module") for registry in REGISTRIES),
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_source_files_neither_execute_nor_unpickle_input(path):
    name = path.relative_to(REPOSITORY).as_posix()
    found = {(name, what) for what in forbidden(ast.parse(path.read_text()))}
    assert found <= ALLOWED


def test_allowed_exceptions_still_exist():
    """So that the list of exceptions does not outlive them."""
    for name, what in ALLOWED:
        assert what in set(forbidden(ast.parse((REPOSITORY / name).read_text())))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_files_of_models_are_opened_by_the_module_that_checks_them(path):
    """Elsewhere, a setting of a hostile model could name any file of this machine."""
    name = path.relative_to(REPOSITORY).as_posix()
    found = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
    opened = {call for call in found if OPENERS.fullmatch(call)}
    assert opened <= CHECKED.get(name, set()) or name.startswith("scripts/benchmark_")


def test_openers_are_where_they_were():
    for name, calls in CHECKED.items():
        found = ast.walk(ast.parse((REPOSITORY / name).read_text()))
        assert calls <= {ast.unparse(node.func) for node in found if isinstance(node, ast.Call)}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "def f():\n    from joblib import load",
        "np.load('x', allow_pickle=True)",
        "eval('1')",
        "__import__('os')",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.load(text, yaml.FullLoader)",
        "subprocess.run('ls', shell=True)",
        "os.system('ls')",
        "archive.extractall(folder)",
        "AutoTokenizer.from_pretrained(folder)",
        "AutoConfig.from_pretrained(folder, trust_remote_code=True)",
        "AutoConfig.from_pretrained(folder, trust_remote_code=asked)",
        "AutoModelForCausalLM.from_config(config)",
        "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)",
        "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, use_safetensors=None)",
        "CHILD = '''\nimport pickle\npickle.loads(b'')\n'''",
        "options = {'trust_remote_code': True}",
    ],
)
def test_source_audit_detects_violations(source):
    assert list(forbidden(ast.parse(source)))


def test_the_loaders_of_yaml_make_plain_values_alone():
    for loader in (HubLoader, _StrictLoader):
        assert issubclass(loader, yaml.SafeLoader)
        assert not any(tag and "python" in tag for tag in loader.yaml_constructors)
        assert not any(tag and "python" in tag for tag in loader.yaml_multi_constructors)


def test_transformers_opens_checkpoints_of_a_training_without_code():
    """Of FSDP there are `optimizer.bin` and its like, which are pickles; with `weights_only` they hold numbers."""
    found = importlib.util.find_spec("transformers.trainer")
    calls = [node for node in ast.walk(ast.parse(Path(found.origin).read_text())) if isinstance(node, ast.Call)]
    opening = [call for call in calls if ast.unparse(call.func) == "torch.load"]
    assert len(opening) > 5 and all(is_constant(call, "weights_only", True) for call in opening)


def forbidden(tree: ast.AST) -> Iterator[str]:
    """What stands in a source that may not; programs that it holds as text are looked through too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"imports {a.name}" for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module.split(".")[0] in MODULES:
                yield f"imports {node.module}"
        elif isinstance(node, ast.Call):
            yield from called(node)
        elif isinstance(node, ast.Dict):
            asked = zip(node.keys, node.values, strict=True)
            if any(ast.unparse(key) == "'trust_remote_code'" and not is_false(value) for key, value in asked if key):
                yield "asks for code"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\nimport " in node.value:
            yield from forbidden(ast.parse(node.value))


def called(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    first, _, last = name.rpartition(".")
    if name in BUILTINS or CALLS.fullmatch(name) or last in METHODS:
        yield f"calls {name}"
    if name == "yaml.load" and not any(k.arg == "Loader" and ast.unparse(k.value) in LOADERS for k in call.keywords):
        yield "calls yaml.load with another loader"
    if first == "subprocess" and any(k.arg == "shell" for k in call.keywords):
        yield f"calls {name} with a shell"
    if any(k.arg in ("allow_pickle", "trust_remote_code") and not is_false(k.value) for k in call.keywords):
        yield f"calls {name} with what may run code"
    if last not in ("from_pretrained", "from_config") or first in NO_CODE:
        return
    if not is_constant(call, "trust_remote_code", False):
        yield f"calls {name} without trust_remote_code=False"
    opens_weights = first.startswith("AutoModel") and last == "from_pretrained"
    is_gguf = any(k.arg == "gguf_file" for k in call.keywords)
    if opens_weights and not is_gguf and not is_constant(call, "use_safetensors", True):
        yield f"calls {name} without use_safetensors=True"


def is_constant(call: ast.Call, key: str, value: bool) -> bool:
    return any(k.arg == key and isinstance(k.value, ast.Constant) and k.value.value is value for k in call.keywords)


def is_false(value: ast.AST) -> bool:
    return isinstance(value, ast.Constant) and value.value is False
