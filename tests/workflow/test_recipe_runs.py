"""Every shipped recipe as a whole run, on a tiny model of its architecture."""

from __future__ import annotations

import json

import pytest
import yaml

from pipeline.config.loader import load_config, parse_config
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.matrices import linear_weights
from tests.workflow.conftest import RECIPES

# Run on demand; in every suite the published run answers for them.
SLOW = ("gemma-3-1b", "qwen3-1.7b", "qwen3-4b", "smollm3-3b", "tinyllama-1.1b")
# The recipe that makes the published run of `test_published_run`, which is held to the same checks there.
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


@pytest.fixture(params=[pytest.param(r, marks=pytest.mark.slow) if r in SLOW else r for r in RECIPES if r != PUBLISHED])
def recipe_run(request, finished_run):
    """(recipe, its finished run) for each recipe; not to be changed."""
    return request.param, finished_run(request.param)


def test_the_release_loads_in_stock_transformers_with_every_variant(recipe_run):
    _, place = recipe_run
    found = json.loads(place.python(STOCK).splitlines()[-1])
    assert [found[folder]["problems"] for folder in found] == [[], [], []]
    assert found["int8"]["kinds"] == ["Int8Tensor"] and found["int4"]["kinds"] == ["Int4Tensor"]
    assert found[""]["new"] == found["int8"]["new"] == 5


def test_its_card_and_lineage_tell_what_was_made_from_what(recipe_run):
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


def test_int8_is_nearer_to_what_was_merged_than_int4(recipe_run):
    _, place = recipe_run
    results = place.results()
    kl = {name: results[name]["quality"]["held_out"]["kl"]["value"] for name in ("int8", "int4")}
    assert 0 <= kl["int8"] < kl["int4"]


CHECKS = (
    test_the_release_loads_in_stock_transformers_with_every_variant,
    test_its_card_and_lineage_tell_what_was_made_from_what,
    test_the_recipes_own_values_reached_the_run,
    test_int4_has_the_recipes_groups_wherever_they_divide_the_width,
    test_int8_is_nearer_to_what_was_merged_than_int4,
)
