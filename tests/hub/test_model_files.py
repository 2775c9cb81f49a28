"""Files of a model on the Hub: only those that transformers reads, and from the cache if the Hub is switched off."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import safetensors
from huggingface_hub import constants

from pipeline.config.schema import Model
from pipeline.errors import HubError, ModelError
from pipeline.hub.auth import check_access
from pipeline.inference.load import locate
from pipeline.models.hub_inspection import inspect
from pipeline.models.sources import fetch
from pipeline.planning.model import read_sizes
from tests.support.runs import Place, write_place

INDEX = "model.safetensors.index.json"
TWICE = ("consolidated.safetensors", "model.fp32.safetensors", "model.fp32-00001-of-00002.safetensors")


def _put(hub, repo: str, folder, **more: bytes) -> int:
    """Put a model on the Hub, beside other files; return the bytes of its weights."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.put(repo, {**files, **more})
    return len(files["model.safetensors"])


@pytest.fixture
def offline(monkeypatch):
    """Switch the Hub off, as HF_HUB_OFFLINE=1 does in a new process."""

    def switch() -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    return switch


@pytest.mark.parametrize("is_sharded", [False, True])
def test_weights_that_are_there_several_times_are_fetched_once(hub, tiny_model, tmp_path, is_sharded):
    repo, more = f"ada/twice-{is_sharded}", {name: b"again" * 1000 for name in TWICE}
    weights = _put(hub, repo, tiny_model("llama"), **more)
    own = {"model.safetensors"}
    if is_sharded:
        whole = hub.read(repo, "model.safetensors")
        names = safetensors.safe_open(tiny_model("llama") / "model.safetensors", "np").keys()
        index = json.dumps({"weight_map": dict.fromkeys(names, "part.safetensors")}).encode()
        hub.put(repo, {"part.safetensors": whole, INDEX: index, "model.safetensors": None})
        own = {"part.safetensors"}
    folder, _ = fetch(Model(source=repo), tmp_path)
    assert {path.name for path in folder.glob("*.safetensors")} == own
    assert locate(repo) == folder and (folder / "tokenizer.json").is_file()
    if not is_sharded:
        sizes = read_sizes(Model(source=repo))
        assert sizes.file_bytes == weights and sizes.fetched_bytes - sizes.other_bytes == weights
    asked = {request.path.rpartition("/")[2] for request in hub.requests}
    assert not asked & set(TWICE)


def test_weights_of_other_names_are_refused_before_they_are_fetched(hub, tmp_path):
    hub.put("ada/others", {"config.json": b'{"model_type": "llama"}', "consolidated.safetensors": b"0" * 1000})
    with pytest.raises(ModelError, match="^ada/others: no model.safetensors and no .*consolidated.safetensors"):
        fetch(Model(source="ada/others"), tmp_path)


def test_model_in_the_cache_is_used_while_the_hub_is_switched_off(hub, tiny_model, tmp_path, offline):
    _put(hub, "ada/kept", tiny_model("llama"))
    online = fetch(Model(source="ada/kept"), tmp_path)
    sizes = read_sizes(Model(source="ada/kept"))
    offline()
    requests = len(hub.requests)
    assert fetch(Model(source="ada/kept"), tmp_path) == online
    assert fetch(Model(source="ada/kept", revision=online[1].revision), tmp_path)[0] == online[0]
    assert (locate("ada/kept"), inspect("ada/kept")) == (online[0], online[1].revision)
    assert read_sizes(Model(source="ada/kept")).tensors == sizes.tensors
    assert len(hub.requests) == requests


def test_what_the_cache_lacks_is_told_at_once(hub, tiny_model, tmp_path, offline):
    _put(hub, "ada/half", tiny_model("llama"))
    inspect("ada/half")  # which fetches the configuration only
    offline()
    told = "not whole in the Hub's cache, and the Hub is switched off. Try: unset HF_HUB_OFFLINE"
    with pytest.raises(HubError, match=f"^ada/half: its weights are {told}"):
        fetch(Model(source="ada/half"), tmp_path)
    with pytest.raises(HubError, match="^ada/never: the model is not in the Hub's cache, and the Hub is switched off"):
        locate("ada/never")
    with pytest.raises(HubError, match="^ada/mine: the Hub is needed, and the Hub is switched off"):
        check_access("ada/mine")


def test_commands_use_the_cache_while_the_hub_is_switched_off(hub, tiny_model, tmp_path):
    _put(hub, "ada/base", tiny_model("llama"))
    place: Place = write_place(tmp_path / "work", "ada/base", hub)
    place.tunepress("quantize", "ada/base", "--output", "online", "--variants", "int8")
    place.more_env = {"HF_HUB_OFFLINE": "1"}
    requests = len(hub.requests)
    place.tunepress("quantize", "ada/base", "--output", "offline", "--variants", "int4", "--measure")
    place.tunepress("plan", "tiny.yaml", "--set", "publish.repo=null", check=None)
    code = "import pipeline; print(type(pipeline.load('ada/base')[0]).__name__)"
    loaded = subprocess.run([sys.executable, "-c", code], env=place.env, capture_output=True, text=True, check=True)
    assert "LlamaForCausalLM" in loaded.stdout
    assert (place.folder / "offline/int4/model.safetensors").is_file() and len(hub.requests) == requests
