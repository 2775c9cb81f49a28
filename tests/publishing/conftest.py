"""Runs that are published to a Hub on loopback: with mirrors, with GGUF files, beside their source."""

from __future__ import annotations

import pytest

from pipeline.workflow.workspace import HIDDEN, Workspace
from tests.support import sample
from tests.support.fake_runs import MIRROR, REPO, SOURCE_FILES, TERMS, WITH_GGUF, FakeRun, gguf_bytes


@pytest.fixture
def guest(hub, tmp_path) -> FakeRun:
    """Variants of a model, made to be published beside it."""
    revision = hub.put(REPO, SOURCE_FILES)
    run = FakeRun(
        Workspace(tmp_path / "out" / HIDDEN),
        sample.config(data=None, model={"source": REPO}, publish={"repo": REPO, "commits": "single"}),
    )
    origin = {"source": REPO, "name": REPO, "hub_id": REPO, "revision": revision, "license": "mit"}
    run.workspace.write_measurement("origin", origin)
    run.workspace.write_measurement("base", sample.results()["merged"])
    run.make_variant("int8")
    run.make_variant("int4")
    return run


@pytest.fixture
def shared(finished, tmp_path) -> FakeRun:
    """A run with int8 and two variants of GGUF, each of which brought the terms of use."""
    for variant in sample.GGUF:
        files = {sample.GGUF_FILES[variant]: gguf_bytes(tmp_path, variant), "LICENSE": TERMS}
        finished.make(f"quantize/{variant}", {f"gguf/{name}": content for name, content in files.items()})
        finished.workspace.write_measurement(variant, sample.gguf_results()[variant])
    finished.configure(quantize={"variants": list(WITH_GGUF)})
    return finished


@pytest.fixture
def mirrored(finished):
    """The run with a mirror of int8, not yet published."""
    finished.configure(mirrors={"int8": MIRROR})
    return finished
