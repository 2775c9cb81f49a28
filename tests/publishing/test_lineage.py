"""Names in `tunepress.json`: whole for the Hub, without the path for local files."""

from __future__ import annotations

import json

import pytest

from tests.support.fake_runs import REPO


@pytest.mark.parametrize("is_there", [True, False])
def test_lineage_shortens_local_paths_and_keeps_hub_names(hub, finished, tmp_path, monkeypatch, is_there):
    monkeypatch.chdir(tmp_path)
    if is_there:
        (tmp_path / "data" / "rows").mkdir(parents=True)
    known = finished.workspace.read_measurement("data") | {"source": "data/rows"}
    finished.configure(data={"source": "data/rows"})
    for commit, name in ((None, "rows"), ("c0ffee", "data/rows")):
        read = {"revision": commit, "split": commit and "train"}
        finished.workspace.write_measurement("data", known | read)
        finished.publish()
        lineage = json.loads(hub.read(REPO, "tunepress.json"))
        assert lineage["configuration"]["data"]["source"] == lineage["results"]["data"]["source"] == name
