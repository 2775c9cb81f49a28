"""Models and data sets from the Hub, and a release in a single commit."""

from __future__ import annotations

import json

import pytest

from tests.support.hub import LoopbackHub
from tests.support.runs import TOKEN, write_place


def test_model_and_data_come_from_the_hub_with_their_revision_and_licence(hub, tmp_path, tiny_model):
    files = {p.name: p.read_bytes() for p in tiny_model("llama").iterdir()}
    hub.put("ada/base", {**files, "README.md": b"---\nlicense: mit\nlanguage: en\n---\n# Base\n", "pickle.bin": b"no"})
    rows = "".join(json.dumps({"prompt": f"Say {n}.", "completion": f"It is {n}."}) + "\n" for n in range(24))
    hub.put("ada/rows", {"rows.jsonl": rows.encode()}, repo_type="dataset")
    place = write_place(tmp_path / "work", "ada/base", hub, data={"source": "ada/rows", "held_out": 0.25})
    place.tunepress("train", "tiny.yaml")
    base = place.results()["origin"]
    assert (base["hub_id"], base["license"], base["revision"]) == ("ada/base", "mit", hub.commits("ada/base")[0])
    data = place.results()["data"]
    assert (data["rows"], data["revision"]) == (24, hub.commits("ada/rows", repo_type="dataset")[0])
    assert (
        json.loads((place.run_folder / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
        == "ada/base"
    )
    assert not any(r.path.endswith("pickle.bin") for r in hub.requests)


def test_stopped_training_goes_on_with_the_rows_that_it_began_with(hub, tmp_path, tiny_model):
    def put(count: int) -> str:
        """Commit so many rows, and return the commit."""
        rows = "".join(json.dumps({"prompt": f"Say {n}.", "completion": f"It is {n}."}) + "\n" for n in range(count))
        hub.put("ada/rows", {"rows.jsonl": rows.encode()}, repo_type="dataset")
        return hub.commits("ada/rows", repo_type="dataset")[0]

    first = put(24)
    model, data = tiny_model("llama"), {"source": "ada/rows", "held_out": 0.25}
    here, other = (write_place(tmp_path / name, model, hub, data=data, publish={"repo": None}) for name in "ab")
    here.tunepress("train", "tiny.yaml", "--set", "train.lora.target_modules=[nothing]", check=2)  # after reading
    second = put(30)
    here.tunepress("train", "tiny.yaml")
    other.tunepress("train", "tiny.yaml")
    told = [(place.results()["data"]["rows"], place.results()["data"]["revision"]) for place in (here, other)]
    assert told == [(24, first), (30, second)]
    # Machines compare what names the checkpoints: the rows that were read, not only how they are asked for.
    names = [[folder.name for folder in (place.run_folder / "checkpoints").iterdir()] for place in (here, other)]
    assert len(names[0]) == len(names[1]) == 1 and names[0] != names[1]


@pytest.mark.parametrize("section", ["model", "data"])
def test_missing_hub_source_gives_one_line(hub, tmp_path, tiny_model, section):
    place = write_place(tmp_path / "work", tiny_model("llama"), hub)
    done = place.tunepress("train", "tiny.yaml", "--set", f"{section}.source=ada/nothing", check=2)
    assert len(done.stderr.strip().splitlines()) == 1 and "ada/nothing" in done.stderr


def test_single_commits_publish_everything_at_once(hub, copied):
    copied.hub = hub
    copied.tunepress("run", "tiny.yaml", "--set", "publish.repo=ada/tiny", "--set", "publish.commits=single")
    assert len(hub.commits("ada/tiny")) == 2  # the Hub's own, and ours
    assert {"int8/model.safetensors", "int4/model.safetensors", "README.md"} <= set(hub.files("ada/tiny"))
    pushed = [name for name in copied.names() if "pushed" in name]
    assert sorted(pushed) == sorted(
        ["adapter_pushed", "merged_model_pushed", "evaluation_pushed", "model_card_pushed",
         "quantized_model_pushed int8", "quantized_model_pushed int4"]
    )  # fmt: skip


@pytest.mark.parametrize(("token", "words"), [("read", "can only read"), ("other", "token of eve cannot write")])
def test_a_token_that_may_not_write_is_refused_before_any_work(tmp_path, tiny_model, token, words):
    tokens = {TOKEN: {"name": "ada" if token == "read" else "eve", "role": "read" if token == "read" else "write"}}
    with LoopbackHub(tmp_path / "hub", tokens) as hub:
        place = write_place(tmp_path / "work", tiny_model("llama"), hub)
        done = place.tunepress("run", "tiny.yaml", check=2)
        assert words in done.stderr and not place.run_folder.exists()
