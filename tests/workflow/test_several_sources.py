"""A training on several data sets, with held-out examples of their own and an option of the chat template."""

from __future__ import annotations

import json

import pytest
import yaml

from pipeline.config.loader import load_config
from pipeline.data import read_examples
from pipeline.models.safe_loading import open_tokenizer
from pipeline.planning.plan import make_plan
from pipeline.workflow.in_process import run_stage_here
from pipeline.workflow.run import run_one
from pipeline.workflow.stages import train
from tests.data.test_recipe_chat_templates import REAL
from tests.support.models import write_model
from tests.support.runs import write_place

ASKED = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A run on two files, whose held-out examples are in a third."""
    write_model(tmp_path / "model", "qwen3")
    (tmp_path / "model" / "chat_template.jinja").write_text((REAL / "qwen3.jinja").read_text(encoding="utf-8"))
    for name, count in (("more", 20), ("own", 24)):
        rows = [{"instruction": f"{name} {n}", "output": f"The answer of {name} is {n}."} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    made = write_place(tmp_path, tmp_path / "model", train={"method": "lora", "max_length": 256, "max_steps": 1})
    tree = yaml.safe_load(made.config.read_text())
    tree["data"] = {
        "sources": [{"source": "rows.jsonl"}, {"source": "more.jsonl", "weight": 1.5}],
        "validation": {"source": "own.jsonl"},
        "template_options": {"enable_thinking": False},
    }
    made.config.write_text(yaml.safe_dump(tree))
    return made


def test_run_trains_on_all_sources_and_measures_on_the_examples_of_their_own(place):
    config = load_config(str(place.config))
    assert make_plan(config).data.examples == 48 + 30
    for stage in ("train", "merge"):
        workspace = run_one(config, stage, start=run_stage_here)
    held_out = read_examples(workspace.data / "held_out.jsonl")
    assert len(held_out) == 24 and all(e.messages[0]["content"].startswith("own") for e in held_out)
    told = place.results()["data"]
    assert [part["source"] for part in told["parts"].values()] == ["rows.jsonl", "more.jsonl", "own.jsonl"]
    assert told["splits"]["training"]["examples"] == 78 and told["form"] == "prompt_completion and instruction"
    tokenizer = open_tokenizer(workspace.release)
    text = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<think>\n\n</think>\n\n")
    before = train.depends(config, workspace, ())
    (place.folder / "own.jsonl").write_text((place.folder / "own.jsonl").read_text() * 2)
    assert train.depends(config, workspace, ()) != before
