"""User text on a card: kept when a release is published again, while our section is updated."""

from __future__ import annotations

import re

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.publishing.cards.own_text import END, START, keep_own_text, note

OURS = f"""---
library_name: transformers
license: apache-2.0
pipeline_tag: text-generation
tags:
- tunepress
- int8
model-index:
- name: user/a-model
  results:
  - task:
      type: text-generation
    dataset:
      name: tickets, held-out text
      type: org/tickets
      config: held-out
    metrics:
    - type: perplexity
      value: 17.1
    source:
      name: tunepress
      url: https://huggingface.co/user/a-model
---
{START}
# user/a-model

```python
print("new")
```
NOTE
{END}
"""
OURS = OURS.replace("NOTE", note(OURS.split("---")[1]))
SECTION = OURS[OURS.index(START) :].strip()
OLD = f"{START}\n# user/a-model\n\n```python\nprint('old')\n```\n{END}"


def kept(existing: str, rendered: str = OURS) -> str:
    """What is made of `existing`; made of that once more it is the same, and a valid card."""
    made = keep_own_text(rendered, existing)
    assert keep_own_text(rendered, made) == made
    assert ModelCard(made, ignore_metadata_errors=True).data.library_name == "transformers"
    return made


def body(card: str) -> str:
    return ModelCard(card, ignore_metadata_errors=True).text


def metadata(card: str) -> dict:
    return yaml.safe_load(re.split(r"(?:\A|\r\n|\r|\n)---[ \t]*(?=\r|\n|\Z)", card)[1])


# ---- the text


def test_a_card_without_words_of_others_is_replaced_whole():
    assert keep_own_text(OURS, OURS) == OURS
    assert keep_own_text(OURS, "") == OURS
    assert keep_own_text(OURS, "\ufeff \r\n") == OURS


def test_text_around_the_section_stays():
    assert body(kept(f"# Mine\n\n{OLD}\n\nThanks to *all*.")) == f"# Mine\n\n{SECTION}\n\nThanks to *all*."


def test_text_on_the_markers_lines_stays():
    assert body(kept(f"Before. {OLD}After.\n")) == f"Before. {SECTION}After.\n"


@pytest.mark.parametrize("text", ["# Mine", "# Mine\n", "# Mine\n\n"])
def test_section_is_appended_to_user_text(text):
    assert body(kept(text)) == f"{text.removesuffix(chr(10))}\n\n{SECTION}\n"


def test_duplicate_sections_become_one():
    assert body(kept(f"a\n{OLD}\nb\n{OLD}\nc\n")) == f"a\n{SECTION}\nb\n\nc\n"


@pytest.mark.parametrize(
    "text", [f"a\n{START}\nb\n", f"a\n{END}\nb\n", f"a\n{END}\nb\n{START}\nc\n", f"a\n{START}\nb\n{START}\nc\n"]
)
def test_unpaired_markers_lose_no_user_text(text):
    assert body(kept(text)) == f"{text}\n{SECTION}\n"


def test_a_section_begins_at_the_marker_next_to_its_end():
    assert body(kept(f"{START}\nMine.\n{OLD}\n{END}\n")) == f"{START}\nMine.\n{SECTION}\n{END}\n"


@pytest.mark.parametrize(
    "quoted",
    [
        f"```html\n{OLD}\n```\n".replace("```python", "~~~").replace(")\n```", ")\n~~~"),
        f"~~~\n{START}\n```\nx\n{END}\n~~~\n",
        f"````\n```\n{START}\n{END}\n````\n",
        f"    {START}\n    {END}\n",
        f"> {START}\n> {END}\n",
        f"Do not write between `{START}` and ``{END}``.\n",
        f"The first line is:\n```\n{START}\n```\nand the last:\n```\n{END}\n```\n",
    ],
)
def test_markers_in_code_and_quotations_are_text(quoted):
    assert body(kept(quoted)) == f"{quoted}\n{SECTION}\n"
    assert body(kept(f"{quoted}\n{OLD}\n")) == f"{quoted}\n{SECTION}\n"


def test_a_code_block_that_was_left_open_is_closed_before_our_section():
    assert body(kept("Mine:\n~~~~sh\nmake\n")) == f"Mine:\n~~~~sh\nmake\n~~~~\n\n{SECTION}\n"


def test_broken_code_block_ends_with_our_section():
    assert body(kept(f"a\n{OLD.replace(chr(10) + '```' + chr(10), chr(10))}\nb\n")) == f"a\n{SECTION}\nb\n"


@pytest.mark.parametrize(
    "text", ["# Mine\n\nText.\n", f"# Mine\n\n{OLD}\n\nText.\n", f"---\na: 1\n---\n{OLD}\nText.\n"]
)
def test_line_endings_follow_the_existing_card(text):
    made = kept(text.replace("\n", "\r\n"))
    assert "\n" not in made.replace("\r\n", "")
    assert made.replace("\r\n", "\n") == kept(text)


# ---- the metadata


def test_user_keys_stay_and_our_keys_are_updated():
    made = kept("---\nlicense: mit\nthumbnail: me.png\nwidget: [{text: Hi}]\n---\nMine.\n")
    assert metadata(made) == {**metadata(OURS), "thumbnail": "me.png", "widget": [{"text": "Hi"}]}


def test_user_license_and_language_stay_if_unknown():
    made = kept("---\nlicense: mit\nlanguage: no\n---\nMine.\n", OURS.replace("license: apache-2.0\n", ""))
    assert "\nlicense: mit\nlanguage: no\n" in made


def test_lines_that_do_not_change_stay_byte_for_byte():
    theirs = "# by hand\ndate: 2026-01-02   # as released\nlanguage: [no,  en]\n"
    theirs += "description: |\n  a\n  # b\n\nlicense:  'apache-2.0'"
    assert kept(f"---\n{theirs}\n---\nMine.\n").startswith(f"---\n{theirs}\nlibrary_name: transformers\n")


def test_comments_within_lines_that_change_stay():
    made = kept("---\n# first\ntags:\n# the two\n- mine\n  # and\n- tunepress\n# last\n---\nMine.\n")
    assert metadata(made)["tags"] == ["mine", "tunepress", "int8"]
    assert re.findall("# .*", made[: made.index("Mine")]) == ["# first", "# the two", "# and", "# last"]


@pytest.mark.parametrize("tags", ["[mine, no, tunepress]", "\n- mine\n- 'no'\n- tunepress"])
def test_tags_are_a_union(tags):
    assert metadata(kept(f"---\ntags: {tags}\n---\n"))["tags"] == ["mine", "no", "tunepress", "int8"]
    assert metadata(kept("---\ntags: mine\n---\n"))["tags"] == ["mine", "tunepress", "int8"]


def test_the_name_of_a_variant_that_is_gone_is_no_tag_any_more():
    assert metadata(kept("---\ntags: [int4, mine]\n---\n"))["tags"] == ["mine", "tunepress", "int8"]


def result(dataset: str, value: float, **more) -> dict:
    about = {"name": "x", "type": dataset, "config": "held-out"}
    metric = {"type": "perplexity", "value": value}
    return {"task": {"type": "text-generation"}, "dataset": about, "metrics": [metric], **more}


def index(*entries: tuple[str, list[dict]]) -> str:
    text = yaml.safe_dump({"model-index": [{"name": name, "results": found} for name, found in entries]})
    return f"---\n{text}---\nMine.\n"


def results_of(card: str) -> dict:
    about = {}
    for entry in metadata(card)["model-index"]:
        about[entry["name"]] = [(r["dataset"]["type"], r["metrics"][0]["value"]) for r in entry["results"]]
    return about


def test_results_of_other_models_and_data_sets_stay():
    made = kept(index(("other", [result("a", 1)]), ("user/a-model", [result("b", 2), result("org/tickets", 3)])))
    assert results_of(made) == {"other": [("a", 1)], "user/a-model": [("org/tickets", 17.1), ("b", 2)]}


def test_foreign_metric_on_the_same_data_stays():
    about = result("org/tickets", 3)
    both = {**about, "metrics": [*about["metrics"], {"type": "accuracy", "value": 0.5}]}
    assert results_of(kept(index(("user/a-model", [about, both])))) == {
        "user/a-model": [("org/tickets", 17.1), ("org/tickets", 3)]
    }


def test_former_results_are_removed():
    former = result("org/earlier", 9, source={"name": "tunepress", "url": "https://huggingface.co/user/a-model"})
    made = kept(index(("user/a-model", [former]), ("former-name", [former]), ("other", [former, result("a", 1)])))
    assert results_of(made) == {"user/a-model": [("org/tickets", 17.1)], "other": [("a", 1)]}
    unmeasured = re.sub("model-index:.*?(?=---)", "", OURS, flags=re.DOTALL)
    assert "model-index" not in metadata(kept(index(("user/a-model", [former])), unmeasured))
    assert results_of(kept(index(("other", [result("a", 1)])), unmeasured)) == {"other": [("a", 1)]}


def test_untouched_key_without_value_is_removed():
    front = {"license": "mit", "library_name": "transformers"}
    later = yaml.safe_dump(front)
    later = f"---\n{later}---\n{START}\nNew.\n{note(later)}\n{END}\n"
    assert metadata(kept(OURS + "Mine.\n", later)) == front
    changed = OURS.replace("- int8", "- int8\n- mine").replace("pipeline_tag: text-generation\n", "")
    found = metadata(kept(changed + "Mine.\n", later))
    assert found == {"library_name": "transformers", "license": "mit", "tags": ["tunepress", "int8", "mine"]}
    assert results_of(kept(OURS.replace("value: 17.1", "value: 17.2"), OURS)) == {
        "user/a-model": [("org/tickets", 17.1)]
    }


def with_metadata(**changes) -> str:
    """Our card with other metadata of ours."""
    front = yaml.safe_dump(metadata(OURS) | {"language": ["en"], "base_model": "org/base"} | changes, sort_keys=False)
    return f"---\n{front}---\n{START}\nOurs.\n{note(front)}\n{END}\n"


EDITS = {
    "license: apache-2.0": "license: mit",
    "pipeline_tag: text-generation": "pipeline_tag: question-answering",
    "base_model: org/base": "base_model: org/the-true-one",
    "- en\n": "- en\n- de\n",
    "- tunepress\n": "",
}


@pytest.mark.parametrize("old", EDITS)
def test_user_changes_of_our_metadata_stay(old):
    ours = with_metadata()
    edited = ours.replace(old, EDITS[old], 1)
    assert edited != ours and kept(edited, ours) == edited


def test_user_changes_stay_if_our_value_changes():
    edited = with_metadata()
    for old, new in EDITS.items():
        edited = edited.replace(old, new, 1)
    made = metadata(kept(edited, with_metadata(license="gemma", base_model="org/next", language=["fr", "de"])))
    assert made["license"] == "mit" and made["base_model"] == "org/the-true-one"
    assert made["language"] == ["en", "de", "fr"] and made["tags"] == ["int8"]


def test_existing_lists_are_extended():
    made = metadata(kept("---\nlanguage: de\n---\nMine.\n", with_metadata()))
    assert made["language"] == ["de", "en"]


def test_license_name_goes_with_the_license():
    ours = with_metadata(license="other", license_name="org-research")
    corrected = ours.replace("license: other", "license: mit").replace("license_name: org-research\n", "")
    assert kept(corrected, ours) == corrected
    named = ours.replace("org-research", "org-research-2")
    assert kept(named, ours) == named


@pytest.mark.parametrize(
    "theirs",
    ["a: [", "a: b: c", "- a\n- b", "just words", "a: 1\na: 2", "a: !!python/object:os.system {}", "a: ```\tb: `\n\tc"],
)
def test_metadata_that_cannot_be_read_is_moved_into_the_text_word_for_word(theirs):
    made = kept(f"---\n{theirs}\n---\nMine.\n")
    assert metadata(made) == metadata(OURS)
    marks = "````" if "```" in theirs else "```"
    assert f"was moved here:\n\n{marks}yaml\n{theirs}\n{marks}\n\nMine.\n" in made


@pytest.mark.parametrize(
    "theirs",
    [
        "{a: 1, tags: [mine]}",
        "  a: 1\n  tags: [mine]",
        "? a\n: 1\n? tags\n: [mine]",
        "x: &t [mine]\na: 1\ntags: *t\n...",
    ],
)
def test_any_yaml_style_is_understood(theirs):
    found = metadata(kept(f"---\n{theirs}\n---\nMine.\n"))
    assert found["a"] == 1 and found["tags"] == ["mine", "tunepress", "int8"] and found["license"] == "apache-2.0"


@pytest.mark.parametrize("front", ["---\n---\n", "---\n\n---\n", "---\n# nothing\n---\n", "\n---\n---  \n"])
def test_empty_metadata_is_filled(front):
    made = kept(f"{front}Mine.\n")
    assert metadata(made) == metadata(OURS) and body(made).startswith("Mine.\n")


def test_unclosed_front_matter_is_text():
    assert body(kept("---\nlicense: mit\n\nMine.\n")).startswith("---\nlicense: mit\n\nMine.\n")


# ---- whatever it is

WORDS = "word|a: b|a: [|- c|#|:|{|}|'|&a|*a|\u2028|\ufeff|`|```|~~~|---|    |> "
LINES = ("\n", "\r\n", "\r", "\n---\n", "\ntags: [x, no]\n", "\nmodel-index: 5\n", "\nlicense: mit\n")
PIECES = st.sampled_from([*WORDS.split("|"), *LINES, START, END, OLD, OURS])


@settings(max_examples=100, deadline=None)
@given(st.lists(PIECES | st.text(max_size=5), max_size=14).map("".join))
@example("\n---\n&a\n---\n")  # an anchor on nothing is no mapping, and says nothing
@example(f"\n---\n#{OURS}")  # dashes at the end of a comment close nothing
@example(f"\n---\na: b{OURS}")
@example(f"{OLD}{START}{OLD}{END}")  # what is left of the second is a section only when the inner one is gone
def test_whatever_stands_there_the_second_time_changes_nothing(existing):
    made = keep_own_text(OURS, existing)
    assert keep_own_text(OURS, made) == made
    assert made.replace("\r\n", "\n").replace("\r", "\n").count(SECTION) >= 1
    assert metadata(made)["license"] in ("apache-2.0", "mit")  # the latter where it stands above what we wrote


@settings(max_examples=100, deadline=None)
@given(st.lists(PIECES.filter(lambda piece: END not in piece) | st.text(max_size=5), max_size=14).map("".join))
def test_incomplete_section_keeps_every_word(text):
    text = f"Mine.\n{text}"
    assert body(keep_own_text(OURS, text)).startswith(text)
