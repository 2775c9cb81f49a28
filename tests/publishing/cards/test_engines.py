"""The section "Where it runs": engines by model, layers that a kernel cannot take, and commands."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.config.catalog import VARIANTS
from pipeline.config.engines import CPU, CUDA, EVERYWHERE, SGLANG, VLLM, on
from pipeline.publishing.cards import folder_card, mirror_card, model_card
from tests.support.sample import BOTH, GGUF, about, gated_results, gguf_about, replaced, results, variants_about


@pytest.fixture
def for_servers(monkeypatch):
    """An int8 that servers run, if its layers suit their kernel."""
    kernel = {"columns": 128, "rows": 64, "capability": 8.9}
    ways = (*EVERYWHERE, *on(VLLM, CUDA, **kernel), *on(VLLM, CPU), *on(SGLANG, CUDA, **kernel))
    monkeypatch.setitem(VARIANTS, "int8", replace(VARIANTS["int8"], runs_on=ways))


def section(card: str) -> str:
    return card.split("## Where it runs\n")[1].split("\n## Use\n")[0]


def cells(card: str) -> dict[str, dict[str, str]]:
    header, _, *rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in section(card).splitlines() if line.startswith("|")
    ]
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def test_table_has_a_row_for_models_that_run_alike():
    found = cells(model_card(gguf_about(), [*BOTH, *GGUF]))
    assert list(found) == ["merged model", "`int8/`", "`int4/`", "`gguf/` Q8_0, `gguf/` Q4_0"]
    assert found["merged model"] | {"vLLM": "CPU, CUDA", "llama.cpp": "no"} == found["merged model"]
    assert found["`int4/`"]["transformers"] == "CPU (stored only); CUDA with torchao and mslk"
    assert found["`gguf/` Q8_0, `gguf/` Q4_0"]["llama.cpp"] == "CPU, GPU"
    assert "llama.cpp" not in section(model_card(about(), BOTH))


def test_variants_without_a_merged_model_have_no_row_for_one():
    assert list(cells(model_card(variants_about(), BOTH))) == ["`int8/`", "`int4/`"]


@pytest.mark.parametrize("shapes, fits", [(((576, 576), (192, 576)), False), (((4096, 1024),), True), ((), True)])
def test_layers_that_a_kernel_cannot_take_are_named(for_servers, shapes, fits):
    found = replaced(results(), ("int8", "weights", "shapes"), shapes)
    card = model_card(about(found, location="user/a-model"), BOTH)
    row = cells(card)["`int8/`"]
    if fits:
        assert (row["vLLM"], row["SGLang"]) == ("CUDA from Ada, CPU", "CUDA from Ada")
    else:
        assert (row["vLLM"], row["SGLang"]) == ("not on CUDA from Ada (a); CPU", "not on CUDA from Ada (a)")
        assert "(a) Its kernel cannot take layers of this model: 576 columns are not a multiple of 128." in card
    assert ("--model-path ./demo/int8" in card) == fits


def test_commands_fetch_the_folder_that_they_serve(for_servers):
    card = section(model_card(about(location="user/a-model"), BOTH))
    assert "\nvllm serve user/a-model\n" in card
    block = "hf download user/a-model --include 'int8/*' --local-dir demo\nvllm serve ./demo/int8\n"
    assert f"`int8/`:\n\n```bash\n{block}" in card
    assert card.count("hf download") == 2


def test_commands_for_one_file_name_its_type():
    card = section(folder_card(gguf_about(), list(GGUF)))
    assert "llama-server -hf user/a-model:Q4_0\nollama run hf.co/user/a-model:Q4_0\n" in card
    assert "hf download" not in card and "vllm serve" not in card


def test_commands_for_a_mirror_and_a_local_release_fetch_nothing(for_servers):
    mirror = section(mirror_card(about(location="user/a-model"), "int8", "user/mirror"))
    assert "\nvllm serve user/mirror\n" in mirror and "hf download" not in mirror
    mirrored = about(location="user/a-model", mirrors={"int8": "user/mirror"})
    assert "\nvllm serve user/mirror\n" in model_card(mirrored, BOTH)
    local = section(folder_card(about(location="/runs/a model"), ["int8"]))
    assert "\nvllm serve '/runs/a model/int8'\n" in local and "hf download" not in local
    files = section(folder_card(gguf_about(location="/runs/demo"), list(GGUF)))
    assert "\nllama-server -m /runs/demo/gguf/demo-Q4_0.gguf\n" in files and "ollama" not in files


def test_variants_that_the_same_code_loads_share_it():
    card = model_card(about(), BOTH)
    assert "transformers: int8</summary>" in card and "transformers: int4</summary>" in card
    found = results() | {"int8-dynamic": results()["int8"]}
    card = model_card(about(found), [*BOTH, "int8-dynamic"])
    assert "transformers: int8, int8-dynamic</summary>" in card
    assert 'with `"int8-dynamic"` in place of `"int8"`' in card
    assert "- `int8-dynamic/`: its linear layers" in card


def test_card_groups_variants_by_the_engines_that_they_are_for():
    found = results() | {"w4a16": results()["int4"]}
    card = model_card(about(found), [*BOTH, "w4a16"])
    assert "for transformers; `w4a16/` (46\u00a0% of the size) for vLLM and SGLang; or the files" in card
    assert "; `compressed-tensors>=0.15` for `w4a16/`." in card and ", and `torchao` for `int8/`, `int4/`" in card


def test_card_recommends_no_engine_whose_kernel_cannot_take_the_layers():
    found = results() | {"w4a16": results()["int4"], "fp8": results()["int8"]}
    found = replaced(found, ("w4a16", "weights", "shapes"), ((576, 576),))
    found = replaced(found, ("fp8", "variant", "packing"), "torchao")
    card = model_card(about(found), [*BOTH, "w4a16", "fp8"])
    assert "`w4a16/` (46\u00a0% of the size) for vLLM; or the files" in card
    assert "Take `int8/`" in card and "or `fp8/`" in card.split(" for transformers;")[0]


def test_long_list_of_variants_is_folded():
    assert "Each variant in words" not in model_card(about(), BOTH)
    more = dict.fromkeys(("int8-dynamic", "w8a8", "fp8"), results()["int8"])
    assert "Each variant in words" in model_card(about(results() | more), [*BOTH, *more])


def test_of_many_variants_those_that_miss_their_limits_are_not_recommended():
    bad = gated_results()["int8"]
    many = {"w4a16": bad, "w8a8": results()["int8"], "fp8": results()["int8"], "gptq": bad, "awq": bad, "w8a16": bad}
    card = model_card(about(results() | many), [*BOTH, *many])
    asked = card.split(" for transformers; ")[1].split(" for vLLM and SGLang; ")[0]
    assert "`w8a8/`" in asked and "`fp8/`" in asked
    assert not any(f"`{name}/`" in asked for name in ("w4a16", "gptq", "awq", "w8a16"))
    assert "**These variants miss their limits for lost quality, and are published with a warning:**" in card
    assert "\n- `w4a16/`: perplexity rises by" in card and "**`w4a16/` misses" not in card
