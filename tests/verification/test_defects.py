"""Defects in a release: each is found and named."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from pipeline.verification import DEFECTS_FOUND, Verdict
from tests.support.releases import BOTH, told


def only(verification) -> str:
    """Return the only defect."""
    (defect,) = told(verification)
    assert verification.exit_code == DEFECTS_FOUND == 3
    return defect


def test_untouched_release_has_no_defect(release):
    found = release.verify()
    assert told(found) == [] and found.exit_code == 0
    assert told(found, Verdict.unknown) == []
    right = told(found, Verdict.right)
    assert {f"card {path}: agrees with the lineage" for path in ("README.md", "int8/README.md")} <= set(right)
    assert any(line.startswith("files int4/: ") for line in right)


def test_flipped_bit_is_found(release):
    data = bytearray((release.folder / "int4/model.safetensors").read_bytes())
    data[-100] ^= 4
    release.write("int4/model.safetensors", bytes(data))
    assert only(release.verify()).startswith("files int4/model.safetensors: changed: sha256 ")


def test_swapped_variants_are_found(release):
    first, second = (release.folder / name / "model.safetensors" for name in BOTH)
    os.rename(first, release.folder / "aside")
    os.rename(second, first)
    os.rename(release.folder / "aside", second)
    assert told(release.verify()) == [
        "files int4/model.safetensors: swapped: it has the content of int8/model.safetensors",
        "files int8/model.safetensors: swapped: it has the content of int4/model.safetensors",
    ]


def test_truncated_file_is_found(release):
    data = (release.folder / "model.safetensors").read_bytes()
    release.write("model.safetensors", data[:-1000])
    assert only(release.verify()).startswith(f"files model.safetensors: cut short: {len(data) - 1000:,} bytes")


@pytest.mark.parametrize("path", ["adapter/adapter_model.safetensors", "int8/README.md"])
def test_missing_file_is_found(release, path):
    (release.folder / path).unlink()
    assert only(release.verify()) == f"files {path}: missing"


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("int8/model-00001-of-00002.safetensors", "weights that the lineage does not name"),
        ("pytorch_model.bin", "a pickle that the lineage does not name"),
        ("int4/modeling_own.py", "code that the lineage does not name"),
        ("adapter_config.json", "loaded with the model, and not named by the lineage"),
        ("int4/added_tokens.json", "loaded with the model, and not named by the lineage"),
        (
            "int4/additional_chat_templates/tool_use.jinja",
            "loaded with the model, and not named by the lineage",
        ),
    ],
)
def test_unnamed_loadable_file_is_found(release, path, why):
    (release.folder / path).parent.mkdir(exist_ok=True)
    release.write(path, b"{}")
    assert only(release.verify()).startswith(f"files {path}: {why}")


def test_file_removed_from_the_lineage_is_found(release):
    path, content = "adapter/adapter_config.json", release.lineage()
    del content["files"][path]
    release.write_lineage(content)
    release.replace(path, '"lora_alpha"', '"lora_beta"')
    assert only(release.verify()).startswith(f"files {path}: loaded with the model, and not named by the lineage")


def test_card_removed_from_the_lineage_is_found(release):
    path, content = "int8/README.md", release.lineage()
    content["documents"].remove(path)
    release.write_lineage(content)
    (release.folder / path).unlink()
    assert only(release.verify()).startswith(f"card {path}: belongs to these models")


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("int4/tokenizer.json", '"<|im_end|>"', '"<|im_ond|>"'),
        ("config.json", '"num_hidden_layers": 2', '"num_hidden_layers": 1'),
    ],
)
def test_changed_file_is_found(release, path, old, new):
    release.replace(path, old, new)
    assert only(release.verify()).startswith(f"files {path}: changed")


def figure(release, path: str) -> str:
    """Return the perplexity of int4 in the table of a card."""
    row = next(line for line in release.read(path).splitlines() if line.startswith("|") and "int4/" in line)
    return next(cell.strip() for cell in row.split("|") if "±" in cell)


@pytest.mark.parametrize("path", ["README.md", "int4/README.md"])
def test_changed_figure_in_a_card_is_found(release, path):
    right = figure(release, path)
    wrong = right.replace(right[0], str(int(right[0]) % 9 + 1), 1)
    release.replace(path, f"| {right} |", f"| {wrong} |")
    said, true = (text.replace("\xa0", " ") for text in (wrong, right))
    expected = f'card {path}: row **`int4/`** says "{said}"; by the lineage it is "{true}"'
    assert only(release.verify()) == expected


def test_changed_figure_in_the_metadata_is_found(release):
    release.replace("README.md", "value: ", "value: 1")
    assert only(release.verify()).startswith('card README.md: says "')


def test_changed_figure_in_the_lineage_is_found(release):
    content = release.lineage()
    content["results"]["int4"]["quality"]["general"]["perplexity"]["value"] *= 0.5
    release.write_lineage(content)
    found = release.verify()
    assert {line.split()[1] for line in told(found)} == {"README.md:", "int4/README.md:"}
    assert told(found, Verdict.unknown)[0].startswith(
        "card assets/quality_vs_size.png: other pixels than these figures give here"
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"size_bytes": 1000}, "int4: size_bytes is 1000; its files have "),
        (
            {"quality": {"rise": {"value": 0.001, "stderr": 0.0001}}},
            "int4: the rise on general text is 0.001; by its p",
        ),
        (
            {"gate": {"limits": {"rise": 0.5}}},
            "int4: was judged by the limits {'rise': 0.5}; its configuration has {",
        ),
        ({"gate": {"passed": True}}, "int4: passes its gate, which does not follow from its figures"),
    ],
)
def test_figure_that_contradicts_others_is_found(release, change, says):
    content = release.lineage()
    figures, root = (content["results"][name] for name in ("int4", "merged"))
    quality = figures["quality"]["general"]
    value = quality["perplexity"]["value"] / root["quality"]["general"]["perplexity"]["value"] - 1
    figures["gate"] = {"limits": {"rise": 0.05}, "passed": False, "checks": []} | change.get("gate", {})
    quality["rise"] = {"value": value, "stderr": 1.0}
    quality |= change.get("quality", {})
    figures["size_bytes"] = change.get("size_bytes", figures["size_bytes"])
    release.write_lineage(content)
    release.rewrite_cards()
    assert any(line.startswith(f"figures tunepress.json: {says}") for line in told(release.verify()))


def test_changed_base_in_the_lineage_is_found(release):
    content = release.lineage()
    content["base"]["hub_id"] = "ada/other"
    release.write_lineage(content)
    assert only(release.verify()) == ("figures tunepress.json: 'base' differs from its configuration or results")


def test_removed_section_of_a_card_is_found(release):
    release.write("README.md", "# Nothing of tunepress here\n")
    assert "lacks" in told(release.verify())[0]


def test_changed_snippet_is_found(release):
    release.replace("int8/README.md", 'dtype="auto"', 'dtype="auto", trust_remote_code=True')
    assert "trust_remote_code" in only(release.verify())


def test_user_text_is_no_defect(release):
    card = release.read("README.md").replace("pipeline_tag: text-generation", "pipeline_tag: text-generation\nx: 1")
    release.write("README.md", f"{card}\n\nMy own words: perplexity 0.1\n")
    release.write("notes.txt", "mine")
    found = release.verify()
    assert told(found) == told(found, Verdict.unknown) == [] and found.exit_code == 0


def test_folder_with_weights_that_the_lineage_does_not_name_is_a_defect(release):
    shutil.copytree(release.folder / "int4", release.folder / "int3")
    assert only(release.verify()) == "files int3/: models that the lineage does not name (model.safetensors)"


def test_card_of_another_version_may_have_other_words_but_no_other_figures(release):
    content = release.lineage()
    content["made_with"]["tunepress"] = "0.0.1"
    release.write_lineage(content)
    release.replace("int4/README.md", "## Limits", "## Bounds")
    found = release.verify()
    assert told(found) == []
    assert "other words than those of tunepress" in told(found, Verdict.unknown)[0]
    right = figure(release, "int4/README.md")
    release.replace("int4/README.md", f"| {right} |", "| 1.0 ± 0.1 |")
    assert "1.0 ± 0.1" in only(release.verify())


def test_findings_are_printed_as_json(release, capsys):
    from pipeline.cli import app

    (release.folder / "config.json").unlink()
    with pytest.raises(SystemExit) as ended:
        app(["verify", str(release.folder), "--no-measure", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert ended.value.code == printed["exit_code"] == 3 and printed["defects"] == 1
    assert {"check": "files", "subject": "config.json", "verdict": "defect", "message": "missing"} in printed[
        "findings"
    ]
