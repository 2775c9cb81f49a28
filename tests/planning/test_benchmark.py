"""The benchmark of plans: it measures every stage, and fails if one is missing."""

from __future__ import annotations

import importlib
import time

import pytest

from pipeline.config.schema import Config
from pipeline.errors import WorkspaceError
from pipeline.planning import memory
from pipeline.planning.benchmark_process import measure_in_time
from pipeline.planning.devices import Machine
from pipeline.planning.plan import Plan
from pipeline.planning.stages import stages_of
from pipeline.workflow import stage_process
from tests.support import REPOSITORY
from tests.support.planning import sizes_of
from tests.support.recipes import shapes_of

SCRIPTS = REPOSITORY / "scripts"
VERBS = ("train", "merge", "evaluate", "quantize")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("benchmark_plan")


@pytest.fixture(scope="module")
def plan() -> Plan:
    config = Config.model_validate({"name": "x", "model": {"source": "ada/base"}, "data": {"source": "ada/rows"}})
    sizes, here = sizes_of(shapes_of("qwen3-1.7b")), Machine("here", host_bytes=10**12)
    stages = stages_of(config, sizes, here, 0, 10**6)
    return Plan(config, here, sizes, None, 10**6, None, stages, [], [], {}, None)


@pytest.mark.parametrize(
    ("stage", "variants", "name"),
    [("train", (), "train"), ("quantize", ("int8", "int4"), "quantize"), ("measure_variant", ("int4",), "int4")],
)
def test_benchmark_recognizes_a_stage_by_its_command(benchmark, stage, variants, name):
    stage_of = importlib.import_module("process_memory").stage_of
    assert stage_of(stage_process._command(None, ("runs/x", stage, *variants))) == name
    assert stage_of(["python", "-m", "pipeline.evaluation.load_probe", "runs/x", "stock"]) is None


def test_unmeasured_stage_fails_the_benchmark(benchmark, plan):
    peaks = {stage.name: memory.total(stage.host) for stage in plan.stages}
    rows = benchmark.compare("x", plan, VERBS, peaks)
    assert [row["stage"] for row in rows] == [*VERBS, "int8", "int4"] and all(row["passes"] for row in rows)
    del peaks["int8"]
    assert [row["stage"] for row in benchmark.compare("x", plan, VERBS, peaks) if not row["passes"]] == ["int8"]


def test_plan_that_is_wrong_by_more_than_a_quarter_fails(benchmark, plan):
    peaks = {stage.name: int(memory.total(stage.host) / 1.3) for stage in plan.stages}
    assert not any(row["passes"] for row in benchmark.compare("x", plan, VERBS, peaks))


@pytest.mark.usefixtures("cold")
def test_measuring_this_machine_ends_at_its_limit():
    begun = time.monotonic()
    with pytest.raises(WorkspaceError, match="^here: not measured within 1 s"):
        measure_in_time("here", lambda what: None, limit=1.0)
    assert time.monotonic() - begun < 10
