"""Changed inputs of a published model, and held-out examples that it cannot have seen."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.loader import parse_config
from pipeline.config.schema import Data
from pipeline.data import load_examples
from pipeline.errors import DataError
from pipeline.evaluation.eligible_prompts import unseen_examples
from pipeline.hub.tree import Tree
from pipeline.models.sources import digest_here
from pipeline.publishing.published_model import PublishedModel
from pipeline.retraining.input_changes import Inputs, changes, changes_beside, inputs_of, settings
from pipeline.system.files import fingerprint
from pipeline.tracking.events import Events
from pipeline.workflow.stages import calibration_text
from pipeline.workflow.stages.inputs import base_model
from pipeline.workflow.workspace import Workspace
from tests.support import REPOSITORY
from tests.support.hub import LoopbackHub
from tests.support.runs import TOKEN


@pytest.fixture
def configure(tmp_path):
    """`configure(rows, **keys of data)`: a configuration for so many rows in a file of their own."""

    def make(rows: int, first: int = 0, **data):
        path = tmp_path / f"rows-{first}-{rows}.jsonl"
        numbers = range(first, first + rows)
        path.write_text("".join(json.dumps({"prompt": f"p{n}", "completion": f"c{n}"}) + "\n" for n in numbers))
        return parse_config(
            {"name": "tiny", "model": {"source": "ada/base"}, "data": {"source": str(path), **data}}, ""
        )

    return make


def published(config, base: str = "a" * 40) -> PublishedModel:
    """The release that a run of this configuration would have left, as far as it is asked."""
    data = load_examples(config.data)
    told = {"fingerprint": data.fingerprint, "trained_from": data.trained_from, "split_by": "first learned answer"}
    lineage = {
        "base": {"revision": base},
        "data": {"fingerprint": data.fingerprint},
        "configuration": json.loads(config.model_dump_json()),
        "results": {"data": told},
    }
    return PublishedModel(Tree("ada/tiny", "b" * 40, {}), lineage)


def inputs(config, base: str = "a" * 40) -> Inputs:
    pinned = config.model_copy(update={"model": config.model.model_copy(update={"revision": base})})
    return Inputs(pinned, base, load_examples(config.data).fingerprint)


def test_the_same_inputs_are_no_change_wherever_the_files_lie(configure, tmp_path):
    config = configure(50)
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "rows-0-50.jsonl"
    moved.write_bytes((tmp_path / "rows-0-50.jsonl").read_bytes())
    elsewhere = config.model_copy(update={"data": config.data.model_copy(update={"source": str(moved)})})
    assert changes(published(config), inputs(elsewhere)) == ()


def test_each_input_that_changed_is_named(configure):
    live = published(configure(50))
    seed, rows = configure(50, seed=3), configure(51)
    assert [line.split(":")[0] for line in changes(live, inputs(seed))] == ["data rows-0-50.jsonl", "data.seed"]
    assert [line.split(":")[0] for line in changes(live, inputs(rows))] == ["data rows-0-51.jsonl", "data.source"]


def test_changed_rows_and_weights_of_several_sources_are_named(configure, tmp_path):
    first, second, own = (configure(rows, rows).data.source for rows in (30, 60, 10))

    def mixed(weight=1, rows=second, revision=None):
        sources = [{"source": first}, {"source": rows, "weight": weight, "revision": revision}]
        tree = {"name": "tiny", "model": {"source": "ada/base"}}
        return parse_config({**tree, "data": {"sources": sources, "validation": {"source": own}}}, "")

    live = published(mixed())
    sources = json.loads(json.dumps(live.lineage["configuration"]["data"]["sources"]))
    live.lineage["configuration"]["data"]["sources"] = [
        part | {"source": Path(part["source"]).name} for part in sources
    ]
    live.lineage["configuration"]["data"]["validation"]["source"] = Path(own).name
    assert changes(live, inputs(mixed())) == ()
    assert settings(mixed(revision="c0ffee")) == settings(mixed())
    names = "data rows-30-30.jsonl, rows-60-60.jsonl, rows-10-10.jsonl"
    assert [line.split(":")[0] for line in changes(live, inputs(mixed(weight=2)))] == [names, "data.sources"]
    Path(second).write_text(Path(second).read_text() + '{"prompt": "new", "completion": "c"}\n')
    assert [line.split(":")[0] for line in changes(live, inputs(mixed()))] == [names]


def test_changed_preference_pairs_are_named(configure, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    rows = [json.dumps({"prompt": f"q{i}", "chosen": "yes", "rejected": "no"}) + "\n" for i in range(20)]
    pairs.write_text("".join(rows))
    tree = json.loads(configure(50).model_dump_json()) | {"train": {"preference": {"data": {"source": str(pairs)}}}}
    tree["model"] = {"source": str(tmp_path)}
    (tmp_path / "config.json").write_text("{}")
    config = parse_config(tree, "")
    made = inputs_of(config)
    live = published(config)
    live.lineage["results"]["data"]["preference"] = {"fingerprint": made.pairs}
    live.lineage["base"] = {"digest": made.base}
    assert changes(live, made) == ()
    pairs.write_text("".join(rows[1:]))
    now = inputs_of(config)
    assert [line.split(":")[0] for line in changes(live, now)] == ["data pairs.jsonl"]
    assert now.to_dict() != made.to_dict()
    tree["train"]["preference"]["data"]["revision"] = "v2"
    assert settings(parse_config(tree, "")) == settings(config)


def test_revisions_are_those_of_each_source():
    sources = [{"source": "ada/a", "revision": "v1"}, {"source": "ada/b"}]
    data = Data(sources=sources, validation={"source": "ada/c", "split": "test"})
    pinned = data.at_revisions(["1" * 40, None, "3" * 40])
    assert [part.revision for part in pinned.all_parts] == ["1" * 40, None, "3" * 40]
    assert pinned.named == "ada/a, ada/b" and pinned.held_out_named == "ada/c"
    assert data.at_revisions([None]) == data
    one = Data(source="ada/a", revision="v1")
    assert one.at_revisions(["1" * 40]).revision == "1" * 40 and one.at_revisions([None]) == one
    assert one.parts == one.all_parts == (one,)


def test_settings_that_make_no_other_model_are_no_change(configure):
    config = configure(50)
    other = {"quantize": {"variants": []}, "train": {"checkpoint_every": 7}}
    other["publish"] = {"repo": "ada/tiny", "license": "mit"}
    other["evaluate"] = {"max_tokens": 512, "general": "/elsewhere/general.txt", "device": "cpu"}
    tree = json.loads(config.model_dump_json())
    changed = parse_config({**tree, **{k: {**tree[k], **v} for k, v in other.items()}}, "")
    assert settings(changed) == settings(config)
    beside = changes_beside(published(config), Inputs(changed, "base", "data"))
    assert beside == ("publish.license", "quantize.variants", "evaluate.general", "evaluate.max_tokens")
    assert changes_beside(published(config), Inputs(config, "base", "data")) == ()


def test_calibration_text_in_another_folder_is_no_change_and_another_quality_is_one(configure):
    plain = json.loads(configure(50).model_dump_json())
    plain["quantize"] |= {"variants": [{"name": "int4", "rounding": "search"}], "quality": "fast"}

    def calibrated_on(source):
        quantize = plain["quantize"] | {"quality": "calibrated", "calibration": {"source": source}}
        return parse_config({**plain, "quantize": quantize}, "")

    live = published(calibrated_on("notes.txt"))  # a lineage names files without their folders
    assert changes_beside(live, Inputs(calibrated_on("/elsewhere/notes.txt"), "base", "data")) == ()
    other = changes_beside(live, Inputs(calibrated_on("/elsewhere/other.txt"), "base", "data"))
    assert other == ("quantize.calibration.source",)
    assert "quantize.quality" in changes_beside(live, Inputs(parse_config(plain, ""), "base", "data"))


def test_changed_content_of_a_calibration_text_is_a_change(configure, tmp_path):
    notes, plain = tmp_path / "notes.txt", json.loads(configure(50).model_dump_json())
    notes.write_text("Some text.")
    calibration = {"source": [str(notes), "builtin:python-docs"]}
    quantize = {"quality": "calibrated", "calibration": calibration, "variants": ["int4"]}
    config = parse_config({**plain, "quantize": quantize}, "")
    live = published(config)
    with Workspace.claim(tmp_path / "tiny", config) as workspace:
        live.lineage["results"]["int4"] = {"weights": calibration_text.about(config, workspace)}
    beside = Inputs(config, "base", "data")
    assert changes_beside(live, beside) == ()
    notes.write_text("Some other text.")
    assert changes_beside(live, beside) == ("the content of quantize.calibration.source",)
    notes.unlink()
    assert changes_beside(live, beside) == ()  # nothing is known about it


def test_a_base_in_a_folder_is_its_weights_configuration_and_tokenizer_and_not_what_else_lies_there(tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text(name)
    before = digest_here(str(tmp_path))
    for name in ("README.md", "tunepress.json", "requirements.txt", "results.json"):
        (tmp_path / name).write_text(name)
    assert digest_here(str(tmp_path)) == before
    for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json"):
        (tmp_path / name).write_text("other")
        assert digest_here(str(tmp_path)) != before
        before = digest_here(str(tmp_path))


def test_a_run_records_which_base_in_a_folder_it_was_made_of(configure, tiny_model, tmp_path):
    base = Path(shutil.copytree(tiny_model("llama"), tmp_path / "base"))
    tree = json.loads(configure(50).model_dump_json())
    config = parse_config({**tree, "model": {"source": str(base)}}, "")
    live = published(config)
    with Workspace.claim(tmp_path / "tiny", config) as workspace:
        for heat in (0.5, 0.6):  # also where the folder is known, and the model in it another one
            base_model(config, workspace, Events(workspace.events_path, "tiny"))
            live.lineage["base"] = workspace.read_measurement("origin")
            assert changes(live, inputs_of(config)) == ()
            (base / "generation_config.json").write_text(json.dumps({"temperature": heat}))
            (told,) = changes(live, inputs_of(config))
            assert told.startswith("base model base: ")


def test_comparison_record_depends_on_its_inputs(configure):
    config = configure(50)
    more = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"max_tokens": 99999})})
    assert inputs(config).to_dict() != inputs(more).to_dict()
    assert changes(published(config), inputs(more)) == ()


def test_that_prompts_are_told_apart_word_for_word_is_said_where_the_data_is_another(configure, tmp_path):
    live = published(configure(200, held_out=0.4))
    path = tmp_path / "with-system-prompts.jsonl"
    rows = ({"system": "Be brief.", "prompt": f"p{n}", "completion": f"c{n}"} for n in range(200))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = parse_config(
        {"name": "tiny", "model": {"source": "ada/base"}, "data": {"source": str(path), "held_out": 0.4}}, ""
    )
    data = load_examples(other.data)
    kept, said = compared(data, live)
    asked = {example.messages[-2]["content"] for example in kept}
    known = {example.messages[-2]["content"] for example in load_examples(configure(200, held_out=0.4).data).train}
    assert asked & known  # which is why it has to be said
    assert "word for word" in said and "it may know the question" in said


@pytest.mark.parametrize("grown", [510, 600, 1000, 4000])
@pytest.mark.parametrize("held_out", [0.05, 0.3])
def test_grown_data_is_compared_on_unseen_examples(configure, grown, held_out):
    old, new = (load_examples(configure(rows, held_out=held_out).data) for rows in (500, grown))
    live = published(configure(500, held_out=held_out))
    kept, said = compared(new, live)
    assert not set(map(str, kept)) & set(map(str, old.train))
    assert len(kept) == len(new.held_out) or "left out" in said
    assert len(kept) >= 0.5 * len(new.held_out)  # the split holds as data grows, so most of it is usable


def test_same_data_is_compared_on_all_held_out_examples(configure):
    data = load_examples(configure(50, held_out=0.4).data)
    assert compared(data, published(configure(50, held_out=0.4)))[0] == data.held_out


def test_too_few_examples_to_compare_on_are_counted(configure):
    data = load_examples(configure(50, held_out=0.3).data)
    with pytest.raises(DataError, match="too few held-out prompts .*15; 16 are needed.. Try: raise data.held_out"):
        compared(data, published(configure(50, held_out=0.3)))


def test_changed_seed_leaves_too_few_unseen_examples(configure):
    new = load_examples(configure(200, seed=1, held_out=0.1).data)
    with pytest.raises(DataError, match="set data.seed to 0"):
        compared(new, published(configure(200, held_out=0.1)))


def test_unknown_split_of_a_release_is_stated(configure):
    live = published(configure(50, held_out=0.4))
    del live.lineage["results"]["data"]["trained_from"]
    new = load_examples(configure(60, held_out=0.4).data)
    kept, said = compared(new, live)
    assert kept == new.held_out and "may have been trained on some" in said


def test_template_in_a_file_is_compared_by_its_content_and_not_by_its_path(configure, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text("one")
    config = configure(50, chat_template=str(template))
    live = published(config)
    live.lineage["configuration"]["data"]["chat_template"] = template.name  # as releases have it
    live.lineage["results"]["data"]["chosen_digest"] = fingerprint("one")
    assert changes(live, inputs(config)) == ()
    template.write_text("two")
    (change,) = changes(live, inputs(config))
    assert change.startswith("data.chat_template own.jinja: ")


def turn_by_turn(path, talks, ends=(2, 4, 6)):
    """A configuration for conversations of three turns, with a row for each turn that ends at one of `ends`."""
    texts = [[(role, f"{role} {n}.{i}") for i in range(3) for role in ("user", "assistant")] for n in talks]
    rows = [[{"role": role, "content": text} for role, text in talk[:end]] for talk in texts for end in ends]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    source = {"source": str(path), "held_out": 0.4}
    return parse_config({"name": "tiny", "model": {"source": "ada/base"}, "data": source}, "")


def test_no_answer_that_the_published_model_learned_is_compared_on(tmp_path):
    old = turn_by_turn(tmp_path / "old.jsonl", range(100))
    new = turn_by_turn(tmp_path / "new.jsonl", range(110), ends=(2, 6))
    kept, said = compared(load_examples(new.data), published(old))
    known = {str(e.messages[: i + 1]) for e in load_examples(old.data).train for i in e.answers()}
    assert "neither model was trained on these prompts" in said
    assert not [e for e in kept for i in e.answers() if str(e.messages[: i + 1]) in known]


def test_only_last_answers_learned_by_the_published_model_leave_out_each_answer_that_it_may_know(tmp_path):
    old = turn_by_turn(tmp_path / "old.jsonl", range(400))
    old = old.model_copy(update={"train": old.train.model_copy(update={"loss_on": "completion"})})
    live = published(old)
    data = load_examples(old.data, "completion")
    live.lineage["results"]["data"] |= {"fingerprint": data.fingerprint, "trained_from": data.trained_from}
    new = load_examples(turn_by_turn(tmp_path / "new.jsonl", range(410), ends=(4,)).data)
    kept, _ = compared(new, live)
    known = {str(e.messages[: e.last_answer + 1]) for e in data.train}
    assert not [e for e in kept for i in e.answers() if str(e.messages[: i + 1]) in known]


def test_a_release_that_was_split_by_last_answers_is_said_to_know_earlier_ones(tmp_path):
    live = published(turn_by_turn(tmp_path / "old.jsonl", range(100)))
    del live.lineage["results"]["data"]["split_by"]
    data = load_examples(turn_by_turn(tmp_path / "old.jsonl", range(100)).data, "completion")
    live.lineage["results"]["data"] |= {"fingerprint": data.fingerprint, "trained_from": data.trained_from}
    _, said = compared(load_examples(turn_by_turn(tmp_path / "new.jsonl", range(110)).data), live)
    assert "may have been trained on earlier answers" in said and "neither" not in said


ASK = """
import json, sys
from pipeline.config.loader import parse_config
from pipeline.retraining.input_changes import changes, inputs_of
from pipeline.hub.tree import Tree
from pipeline.publishing.published_model import PublishedModel
tree, lineage = json.load(sys.stdin)
found = inputs_of(parse_config(tree, ""))
told = list(changes(PublishedModel(Tree("ada/tiny", "b" * 40, {}), lineage), found)) if lineage else None
print(json.dumps([found.config.model.revision, found.config.data.revision, told]))
"""


def test_on_the_hub_a_new_commit_counts_only_where_it_brings_other_examples(tmp_path):
    rows = [json.dumps({"prompt": f"p{n}", "completion": f"c{n}"}) for n in range(40)]
    config = {"name": "tiny", "model": {"source": "ada/base"}, "data": {"source": "ada/rows"}}

    def ask(lineage: dict | None) -> list:
        env = {**os.environ, **hub.env_for(TOKEN, tmp_path / "hf"), "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(
            [sys.executable, "-c", ASK], input=json.dumps([config, lineage]), env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    with LoopbackHub(tmp_path / "hub", {TOKEN: {"name": "ada"}}) as hub:
        base = hub.put("ada/base", {"config.json": b"{}"})
        data = hub.put("ada/rows", {"rows.jsonl": "\n".join(rows).encode()}, repo_type="dataset")
        assert ask(None) == [base, data, None]
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(rows))
        fingerprint = load_examples(parse_config({**config, "data": {"source": str(path)}}, "").data).fingerprint
        configuration = json.loads(parse_config(config, "").model_dump_json())
        lineage = {"base": {"revision": base}, "data": {"revision": data, "fingerprint": fingerprint}}
        lineage |= {"configuration": configuration, "results": {}}
        assert ask(lineage)[2] == []
        hub.put("ada/base", {"README.md": b"# Base\n", "requirements.txt": b"torch\n"})
        assert ask(lineage)[2] == []
        other = hub.put("ada/base", {"config.json": b'{"other": 1}'})
        assert ask(lineage)[2] == [f"base model base: {base[:12]} -> {other[:12]}"]
        lineage["base"]["revision"] = other
        hub.put("ada/rows", {"README.md": b"# Rows\n"}, repo_type="dataset")
        assert ask(lineage)[2] == []
        hub.put("ada/rows", {"rows.jsonl": "\n".join(rows[1:]).encode()}, repo_type="dataset")
        (told,) = ask(lineage)[2]
        assert told.startswith(f"data rows: {fingerprint[:12]} -> ")


def compared(data, live):
    return unseen_examples(data.held_out, data.fingerprint, live.repo, live.lineage)
