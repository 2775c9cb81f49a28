"""Whole runs of the shipped recipes on tiny models, one of them published: files, the Hub, events and Trackio."""

from __future__ import annotations

import json
import sys

import pytest
import yaml

from pipeline.config.loader import load_config, parse_config
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.matrices import linear_weights
from tests.support.hub import LoopbackHub
from tests.support.recipes import RECIPES
from tests.support.runs import TOKEN, run_recipe
from tests.support.warm import COLD

STAGES = ("training", "merge", "evaluation", "quantization", "publish")


# Run on demand; in every suite the published run answers for them.
SLOW = ("gemma-3-1b", "qwen3-1.7b", "qwen3-4b", "smollm3-3b", "tinyllama-1.1b")
# The recipe whose run is published.
PUBLISHED = "llama-3.2-1b"
# What `run_recipe` puts in the place of the recipe's own.
REPLACED = {
    "name": None, "model": {"source"}, "data": {"source", "held_out"}, "train": {"max_steps"},
    "evaluate": {"general", "max_tokens", "prompts"}, "quantize": {"on_gate_failure"},
    "publish": {"repo"}, "track": {"project"},
}  # fmt: skip

# Loads what a run made as a reader of its card would, without this project.
STOCK = """
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {}
for folder in ("", "int8", "int4"):
    path = "runs/tiny/release/" + folder
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True)
    kinds = {type(m.weight.data).__name__ for n, m in model.named_modules() if n.endswith("_proj")}
    found[folder] = {"problems": [str(v) for v in info.values() if v], "kinds": sorted(kinds)}
    if folder != "int4":  # which stock transformers loads everywhere, and runs on CUDA
        tokenizer = AutoTokenizer.from_pretrained(path)
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": "What is 2 plus 2?"}], add_generation_prompt=True, return_tensors="pt",
            return_dict=True,
        )
        out = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        found[folder]["new"] = out.shape[1] - inputs["input_ids"].shape[1]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory, tiny_model):
    """A finished run of the recipe for Llama 3.2, published per stage, by processes of the real Python."""
    folder = tmp_path_factory.mktemp("published")
    with LoopbackHub(folder / "hub", {TOKEN: {"name": "ada", "role": "write"}}) as hub:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "executable", COLD)
            place = run_recipe(folder / "work", "llama-3.2-1b", tiny_model, hub)
        yield place


@pytest.fixture(params=[pytest.param(r, marks=pytest.mark.slow) if r in SLOW else r for r in RECIPES])
def recipe_run(request, finished_run):
    """(recipe, its finished run) for each recipe; not to be changed."""
    if request.param == PUBLISHED:
        return PUBLISHED, request.getfixturevalue("published")
    return request.param, finished_run(request.param)


def test_the_release_loads_in_stock_transformers_with_every_variant(recipe_run):
    _, place = recipe_run
    found = json.loads(place.python(STOCK).splitlines()[-1])
    assert [found[folder]["problems"] for folder in found] == [[], [], []]
    assert found["int8"]["kinds"] == ["Int8Tensor"] and found["int4"]["kinds"] == ["Int4Tensor"]
    assert found[""]["new"] == found["int8"]["new"] == 5


def test_recipe_card_and_lineage_name_every_part(recipe_run):
    recipe, place = recipe_run
    card = (place.release / "README.md").read_text()
    lineage = json.loads((place.release / "tunepress.json").read_text())
    assert all(f"{variant}/" in card and variant in lineage["results"] for variant in ("int8", "int4"))
    assert "adapter/adapter_model.safetensors" in lineage["files"]
    assert f"{load_config(recipe).train.learning_rate:g}" in json.dumps(lineage)


def test_the_recipes_own_values_reached_the_run(recipe_run):
    recipe, place = recipe_run
    asked = yaml.safe_load((place.run_folder / "config.yaml").read_text())
    ours = load_config(recipe).model_dump(mode="json")
    replaced = load_config(recipe).model_dump(mode="json")
    for section, keys in REPLACED.items():
        if keys is None:
            replaced[section] = asked[section]
        else:
            replaced[section] |= {key: asked[section][key] for key in keys}
    assert parse_config(asked, "run") == parse_config(replaced, recipe)

    train = ours["train"]
    adapter = json.loads((place.release / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (train["lora"]["rank"], train["lora"]["alpha"])
    assert len({name.rpartition(".")[2] for name in adapter["target_modules"]}) == 7  # every kind of linear layer
    rates = [row["learning_rate"] for row in place.results()["training"]["history"] if "learning_rate" in row]
    assert max(rates) == pytest.approx(train["learning_rate"])


def test_int4_has_the_recipes_groups_wherever_they_divide_the_width(recipe_run):
    recipe, place = recipe_run
    asked = load_config(recipe).quantize.spec("int4").group_size
    stored = Checkpoint(place.release / "int4")
    for name, (_, width) in linear_weights(place.release).items():
        groups = stored[name.replace(".weight", "._weight_scale")].shape[0]
        assert width // groups == (asked if width % asked == 0 else 32), name


def test_the_repository_is_private_and_is_the_release_to_the_byte(published):
    assert published.hub.repo("ada/tiny").private
    assert not (published.release / "adapter_config.json").exists()  # which would hijack loading with `subfolder`
    local = {p.relative_to(published.release).as_posix(): p for p in published.release.rglob("*") if p.is_file()}
    assert set(published.hub.files("ada/tiny")) - {".gitattributes"} == set(local)
    for name, path in local.items():
        assert published.hub.read("ada/tiny", name) == path.read_bytes(), name


def test_each_stage_reports_start_completion_and_push_in_order(published):
    names = published.names()
    expected = [
        "training_started", "training_completed", "merge_started", "merge_completed",
        "evaluation_started", "evaluation_completed",
        "publish_started", "adapter_pushed", "merged_model_pushed", "evaluation_pushed", "model_card_pushed",
        "publish_completed",
        "quantization_started int8", "quantization_started int4", "quantization_completed int8",
        "publish_started", "quantized_model_pushed int8", "model_card_pushed", "publish_completed",
        "quantization_completed int4",
        "publish_started", "quantized_model_pushed int4", "model_card_pushed", "publish_completed",
    ]  # fmt: skip
    assert names == expected


def test_push_events_name_a_commit_that_holds_the_files(published):
    what = {
        "adapter_pushed": "adapter/adapter_model.safetensors",
        "merged_model_pushed": "model.safetensors",
        "quantized_model_pushed": "{}/model.safetensors",
        "model_card_pushed": "README.md",
    }
    pushed = [e for e in published.events() if e["event"] in what]
    assert len(pushed) >= 6
    for event in pushed:
        files = published.hub.commit_files("ada/tiny", event["commit"])
        assert what[event["event"]].format(event.get("variant")) in files


def test_at_every_commit_the_lineage_and_card_name_exactly_the_variants_there(published):
    for commit in published.hub.commits("ada/tiny")[:-1]:  # the oldest is the Hub's own
        files = published.hub.commit_files("ada/tiny", commit)
        there = {v for v in ("int8", "int4") if f"{v}/config.json" in files}
        card = published.hub.read("ada/tiny", "README.md", commit).decode()
        lineage = json.loads(published.hub.read("ada/tiny", "tunepress.json", commit))
        assert {v for v in ("int8", "int4") if f"{v}/" in card} == there
        assert set(lineage["results"]) & {"int8", "int4"} == there
        ours = set(files) - {".gitattributes"}
        assert {name for name in lineage["files"]} == {
            n for n in ours if not n.endswith("README.md") and n != "tunepress.json" and not n.startswith("assets/")
        }


def test_trackio_holds_every_event_once_and_the_training_curve_in_the_same_run(published):
    titles = [a["title"] for a in published.alerts()]
    assert sorted(titles) == sorted(e["event"] for e in published.events())
    for stage in STAGES:
        assert f"{stage}_started" in titles and f"{stage}_completed" in titles
    code = (
        "import json, sqlite3, glob\n"
        "database = sqlite3.connect(glob.glob('trackio/*.db')[0])\n"
        "rows = database.execute('select run_name, metrics from metrics')\n"
        "print(json.dumps([[row[0], json.loads(row[1])] for row in rows]))"
    )
    rows = json.loads(published.python(code))
    assert {run for run, _ in rows} == {"tiny"}
    merged = {key: value for _, metrics in rows for key, value in metrics.items()}
    assert {"loss", "held_out_loss", "train/loss", "eval/loss", "quantization/int8/completed"} <= merged.keys()
    assert merged["quantization/int4/completed"]["ratio"] < 1
    assert [row["model"] for row in merged["models"]["_value"]] == ["base model", "merged model", "int8", "int4"]


@pytest.mark.parametrize("subfolder", ["", "int8"])
def test_published_model_loads_in_transformers_and_generates(published, subfolder):
    out = published.python(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained('ada/tiny', subfolder={subfolder!r}, dtype='auto')\n"
        f"tokenizer = AutoTokenizer.from_pretrained('ada/tiny', subfolder={subfolder!r})\n"
        "ids = tokenizer('What is', return_tensors='pt')\n"
        "print(model.generate(**ids, max_new_tokens=5, min_new_tokens=5, do_sample=False).shape[1])"
    )
    assert int(out.split()[-1]) == len("What is") + 5  # the tokenizer is one of bytes


def test_pipeline_load_runs_published_int4_on_a_cpu(published):
    code = (
        "import sys; sys.path.insert(0, {!r})\n"
        "from pipeline import load\n"
        "model, tokenizer = load('ada/tiny', 'int4', device='cpu')\n"
        "assert 'Int4Linear' in repr(model)\n"
        "ids = tokenizer('What is', return_tensors='pt')\n"
        "print(model.generate(**ids, max_new_tokens=5, min_new_tokens=5).shape[1])"
    )
    from tests.support import REPOSITORY

    assert published.python(code.format(str(REPOSITORY))).split()[-1] == str(len("What is") + 5)


def test_the_token_is_nowhere(published, tmp_path):
    done = published.output
    assert TOKEN not in done.stdout + done.stderr
    for path in published.folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert TOKEN.encode() not in path.read_bytes(), path


def test_running_again_does_nothing(published):
    before, requests = published.names(), len(published.hub.requests)
    done = published.tunepress("run", "tiny.yaml")
    assert published.names() == before and "\n> " not in done.stdout
    assert {r.method for r in published.hub.requests[requests:]} <= {"GET"}


def test_a_finished_run_goes_to_another_repository_in_one_commit(published):
    published.tunepress("publish", "runs/tiny", "--repo", "ada/second", "--public")
    assert len(published.hub.commits("ada/second")) == 2  # the Hub's own, and ours
    assert not published.hub.repo("ada/second").private
    assert "ada/second" in published.hub.read("ada/second", "README.md").decode()
    # Back to where it was, for the tests that come after this one.
    published.tunepress("publish", "runs/tiny", "--repo", "ada/tiny")


def test_published_release_verifies(published):
    done = published.tunepress("verify", "ada/tiny", "--no-measure", "--json")
    found = json.loads(done.stdout)
    assert found["defects"] == 0 and {f["verdict"] for f in found["findings"]} == {"ok"}
