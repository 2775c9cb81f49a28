"""Admission of GGUF to a release: only after it was opened, with the measuring library recorded."""

import json

import pytest

from pipeline.config.schema import Config
from pipeline.errors import CheckpointError, ModelError
from pipeline.inference import llama_cpp
from pipeline.system.files import fingerprint
from pipeline.tracking.events import Events
from pipeline.workflow.stages import measure_variant, quantize
from pipeline.workflow.workspace import Workspace

pytest.importorskip("gguf")
NAME = "gguf-q4_0"


@pytest.fixture
def made(tiny_model, tmp_path):
    """The arguments of a stage whose variant is written, and not admitted yet."""
    tree = {"name": "m", "model": {"source": str(tiny_model("llama"))}, "data": None, "evaluate": None}
    config = Config.model_validate(tree | {"quantize": {"variants": [NAME]}})
    with Workspace.claim(tmp_path / "m", config) as workspace:
        arguments = config, workspace, Events(workspace.events_path, "m"), (NAME,)
        quantize.run(*arguments)
        yield arguments


@pytest.mark.parametrize("is_installed", [True, False], ids=["llama.cpp", "gguf"])
def test_openable_file_is_admitted_with_its_size(made, monkeypatch, is_installed):
    if is_installed:
        pytest.importorskip("llama_cpp")
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: is_installed)
    workspace = made[1]
    (written,) = (workspace.quantized / NAME).glob("*.gguf")
    size = written.stat().st_size
    outcome = measure_variant.run(*made)
    result = json.loads(workspace.results_path.read_text())[NAME]
    assert (result["file"], result["size_bytes"]) == ("m-Q4_0.gguf", size)
    assert 0.3 < result["ratio"] < 0.4 and "quality" not in result
    assert workspace.release / "gguf" / "m-Q4_0.gguf" in outcome.outputs


@pytest.mark.parametrize(
    "is_installed, error", [(True, ModelError), (False, CheckpointError)], ids=["llama.cpp", "gguf"]
)
def test_a_damaged_file_stays_outside(made, monkeypatch, is_installed, error):
    if is_installed:
        pytest.importorskip("llama_cpp")
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: is_installed)
    workspace = made[1]
    (written,) = (workspace.quantized / NAME).glob("*.gguf")
    written.write_bytes(written.read_bytes()[:-5000])
    with pytest.raises(error, match=r"m-Q4_0\.gguf: (llama\.cpp cannot load it|not a whole GGUF file)"):
        measure_variant.run(*made)
    assert not (workspace.release / "gguf").exists()


def test_measuring_library_is_part_of_the_fingerprint(made, monkeypatch):
    config, workspace, *_ = made
    asked = {**config.model_dump(), "evaluate": {}, "quantize": {"variants": [NAME, "int8"]}}
    measured = Config.model_validate(asked)

    def states():
        found = [(measured, NAME), (measured, "int8"), (config, NAME)]
        return [fingerprint(measure_variant.depends(asked, workspace, (name,))) for asked, name in found]

    before = states()
    monkeypatch.setattr(measure_variant, "versions", lambda *names: dict.fromkeys(names, "another"))
    changed = [old != new for old, new in zip(before, states(), strict=True)]
    assert changed == [True, False, False]
