"""Variants of an earlier release: they stay, with their files and figures, until their removal is asked for."""

from __future__ import annotations

import pytest

from pipeline.config.builders import quantize_config
from pipeline.errors import ConfigError, WorkspaceError
from pipeline.workflow.in_process import run_stage_here
from pipeline.workflow.kept_variants import removal, with_kept_variants
from pipeline.workflow.reporter import Reporter
from pipeline.workflow.run import run
from pipeline.workflow.workspace import HIDDEN, Workspace


class Lines(Reporter):
    """The lines that a run shows, and the summaries of its steps."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.summaries: dict[str, dict] = {}

    def show(self, lines):
        self.lines += lines

    def finished(self, step, entry):
        self.summaries[step] = entry.summary


@pytest.fixture(scope="module")
def source(tiny_model):
    return tiny_model("llama")


@pytest.fixture
def quantize(source, tmp_path):
    def make(*variants: str, model=source, agreed=(), replace=False, **options) -> tuple[Workspace, Lines]:
        told, out = Lines(), tmp_path / "out"
        config = quantize_config(str(model), out, list(variants), **options)
        asked = removal(agreed, replace)
        return run(config, reporter=told, output=out, removal=asked, start=run_stage_here), told

    return make


def _released(workspace: Workspace) -> set[str]:
    return {path.parent.name for path in workspace.release.glob("*/model.safetensors")}


def test_quantizing_another_variant_into_a_folder_keeps_those_that_are_there(quantize):
    workspace, _ = quantize("int8")
    before = (workspace.release / "int8/model.safetensors").stat()
    workspace, told = quantize("int4")
    assert _released(workspace) == {"int8", "int4"}
    assert (workspace.release / "int8/model.safetensors").stat().st_mtime_ns == before.st_mtime_ns
    assert told.lines == ["int8: in the last release, so kept; leave out with --remove int8, or with --replace"]
    card = (workspace.release / "README.md").read_text()
    assert "int8/" in card and "int4/" in card
    assert [spec.name for spec in workspace.config().quantize.variants] == ["int8", "int4"]


@pytest.mark.parametrize("how", [{"agreed": ["int8"]}, {"replace": True}])
def test_asked_removal_takes_a_variant_out_of_the_folder_and_is_told(quantize, how):
    quantize("int8", "int4")
    workspace, told = quantize("int4", **how)
    assert _released(workspace) == {"int4"} and "int8" not in workspace.results_path.read_text()
    assert told.summaries["render"]["removed"] == "int8"


def test_variants_of_another_model_are_not_replaced_without_a_word(quantize, tiny_model):
    workspace, _ = quantize("int8")
    with pytest.raises(WorkspaceError, match="out: has int8 of another model .* or --replace$"):
        quantize("int4", model=tiny_model("qwen3"))
    assert _released(workspace) == {"int8"}


def test_one_folder_by_another_path_is_the_same_model(quantize, source, monkeypatch):
    quantize("int8")
    monkeypatch.chdir(source.parent)
    workspace, _ = quantize("int4", model=source.name)
    assert _released(workspace) == {"int8", "int4"}


def test_folder_that_was_measured_stays_measured(source, tmp_path):
    folder = tmp_path / "out"
    measured = quantize_config(str(source), folder, ["int8"], measure=True)
    workspace = Workspace(folder / HIDDEN)
    with Workspace.claim(workspace.folder, measured):
        (folder / "int8").mkdir()
        (folder / "int8" / "config.json").write_text("{}")
        from pipeline.workflow.workspace import Entry

        workspace.record("quantize/int8", Entry("", workspace.digests([folder / "int8" / "config.json"])))
    told: list[str] = []
    asked = quantize_config(str(source), folder, ["int4"])
    config, _ = with_kept_variants(asked, workspace, removal(), told.extend)
    assert config.evaluate == measured.evaluate and "measured" in told[-1]
    config, _ = with_kept_variants(asked, workspace, removal(others=True), told.extend)
    assert config == asked
    with pytest.raises(ConfigError, match="--low-disk"):
        with_kept_variants(
            quantize_config("ada/model", folder, ["int8"], low_disk=True).model_copy(
                update={"model": measured.model.model_copy(update={"low_disk": True})}
            ),
            workspace,
            removal(),
            told.extend,
        )


def test_unknown_variant_to_remove_and_a_release_of_nothing_are_refused(quantize):
    with pytest.raises(ConfigError, match="^--remove int5: not a variant"):
        removal(["int5"])
    with pytest.raises(ConfigError, match="^--remove int8: nothing would be left"):
        quantize("int8", agreed=["int8"])


def test_merged_model_is_not_replaced_by_variants_alone_without_a_word(finished):
    alone = finished.config.model_copy(update={"data": None})
    with pytest.raises(WorkspaceError, match="has a merged model, which would be lost"):
        with_kept_variants(alone, finished.workspace, removal(), print)
    assert with_kept_variants(alone, finished.workspace, removal(others=True), print)[0] == alone


def test_calibrated_variant_is_not_made_again_without_calibration(quantize, tmp_path):
    (tmp_path / "notes.txt").write_text(" ".join(f"{n} apples and {n * n} pears." for n in range(200)))
    source = f"quantize.calibration.source={tmp_path / 'notes.txt'}"
    calibrated = ["quantize.quality=calibrated", source, "quantize.calibration.tokens=512"]
    workspace, _ = quantize("int4", settings=calibrated)
    before = (workspace.release / "int4/model.safetensors").stat()
    with pytest.raises(ConfigError, match="has int4, which was calibrated .* fast. Try: --set quantize.quality=calibr"):
        quantize("int8")
    workspace, _ = quantize("int8", settings=calibrated)
    assert _released(workspace) == {"int8", "int4"}
    assert (workspace.release / "int4/model.safetensors").stat().st_mtime_ns == before.st_mtime_ns
