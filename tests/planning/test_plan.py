"""`tunepress plan`: the needs of a run, from metadata alone."""

from __future__ import annotations

import gzip
import json

import pytest
from huggingface_hub import DatasetInfo

from pipeline.config.loader import load_config, parse_config, shipped_configs
from pipeline.config.schema import Data, VariantSpec
from pipeline.errors import DataError
from pipeline.planning import memory
from pipeline.planning.data import data_size, fetched_bytes, split_figures
from pipeline.planning.model import read_sizes
from pipeline.quantization.formats import is_dequantized_to_run
from tests.support.recipes import MODELS, put_hollow

# Runs the command, and prints which of these libraries it imported.
WITHOUT_TORCH = """
import sys
sys.argv = ["tunepress", "plan", "qwen3-1.7b", "--json"]
from pipeline.cli import main
try:
    main()
except SystemExit as end:
    assert end.code in (None, 0, 3), end.code  # 3 if it does not fit this machine
print(sorted({"torch", "transformers", "datasets"} & sys.modules.keys()))
"""


def test_every_shipped_recipe_has_a_hub_model():
    assert set(shipped_configs()) == {*MODELS, "demo"}


@pytest.mark.parametrize("recipe", MODELS)
def test_recipe_is_planned_without_weights_or_written_files(place, hub, recipe):
    before, asked = place.files(), len(hub.requests)
    plan = place.plan(recipe, "--set", "publish.repo=ada/mine")
    assert plan["model"]["parameters"] == MODELS[recipe][0]
    assert plan["model"]["bf16_bytes"] == 2 * MODELS[recipe][0]
    weights = [r for r in hub.requests[asked:] if r.method == "GET" and r.path.endswith(".safetensors")]
    assert weights and {r.status for r in weights} == {206}  # single ranges, the headers
    assert place.files() == before
    stages = {stage["stage"]: stage for stage in plan["stages"]}
    assert list(stages) == ["train", "merge", "evaluate", "calibrate", "quantize", "int8", "int4", "publish"]
    assert {"weights", "adapter and optimizer", "activations", "logits"} <= stages["train"]["memory"].keys()
    assert stages["train"]["fetched_bytes"] == plan["model"]["fetched_bytes"] > plan["model"]["bf16_bytes"]
    made = plan["model"]["bf16_bytes"] + sum(stages["quantize"]["writes"].values())
    assert stages["publish"]["uploaded_bytes"] == pytest.approx(made + 4 * plan["adapter_parameters"], rel=0.001)
    assert plan["disk_bytes"] > made


@pytest.mark.usefixtures("cold")
def test_plan_does_not_import_torch(place):
    place.folder.joinpath("runs").mkdir()
    assert place.python(f"import sys; sys.path.insert(0, {place.env['PYTHONPATH']!r})\n{WITHOUT_TORCH}").endswith(
        "[]\n"
    )


def test_demo_is_planned_from_the_header_in_its_package(place):
    plan = place.plan("demo")
    assert plan["model"]["parameters"] == 134_515_008
    assert plan["stages"][0]["writes"]["unpacked base model"] > plan["model"]["bf16_bytes"]
    assert plan["data"]["steps"] == 60


def test_dry_run_prints_the_plan_and_writes_nothing(place):
    before = place.files()
    dry = place.plan("tinyllama-1.1b", "--dry-run", verb="run")
    plan = place.plan("tinyllama-1.1b")
    for found in (dry, plan):  # other processes may take some of its memory
        found |= {"machine": None, "shortages": None, "fits": None, "changes": None}
    assert dry == plan and place.files() == before


def test_dry_run_in_several_processes_is_refused_in_one_line(place):
    done = place.tunepress("run", "tinyllama-1.1b", "--dry-run", "--accelerate", "cpu-two", check=2)
    assert "--dry-run: plans one process" in done.stderr and len(done.stderr.splitlines()) == 1
    done = place.tunepress("run", "tinyllama-1.1b", "--dry-run", "--accelerate", "ddq", check=2)
    assert "--accelerate ddq: no such file" in done.stderr


def test_plan_prints_a_page(place):
    page = place.tunepress("plan", "qwen3-4b", "--device", "h100-80gb").stdout
    assert "4.02 G parameters" in page and "h100-80gb" in page and "fits" in page
    assert "no times: the speed of that machine was not measured" in page
    assert "GPU memory comes from formulas" in page


def test_run_that_does_not_fit_gets_settings_that_fit(place):
    large = ("--set", "train.method=lora", "--set", "train.batch_size=8", "--set", "train.max_length=8192")
    plan = place.plan("qwen3-4b", "--device", "rtx-3060-12gb", *large)
    assert not plan["fits"]
    assert {(short["stage"], short["what"]) for short in plan["shortages"]} >= {("train", "GPU memory")}
    told = [word for change in plan["changes"] for word in ("--set", change["setting"])]
    assert told
    again = place.plan("qwen3-4b", "--device", "rtx-3060-12gb", *large, *told)
    assert again["fits"] and not again["changes"]


def test_full_training_is_planned_with_all_weights_and_without_an_adapter(place):
    full = ("--set", "train.method=full")
    plan = place.plan("tinyllama-1.1b", "--device", "h100-80gb", *full)
    stages = {stage["stage"]: stage for stage in plan["stages"]}
    count = plan["model"]["parameters"]
    assert plan["fits"] and plan["adapter_parameters"] == 0
    assert stages["train"]["writes"]["trained weights"] == 4 * count
    assert stages["train"]["gpu_memory"]["weights"] == 4 * count
    assert stages["train"]["gpu_memory"]["gradients and optimizer"] == 6 * count  # moments in eight bits
    assert not [part for stage in plan["stages"] for part in stage["writes"] if "adapter" in part]
    changes = place.plan("tinyllama-1.1b", "--device", "rtx-3060-12gb", *full)["changes"]
    assert next(change["setting"] for change in changes) == "train.method=lora"


def test_every_advised_change_is_needed(place):
    large = ("--set", "train.batch_size=8", "--set", "train.max_length=4096")
    plan = place.plan("qwen3-4b", "--device", "rtx-3060-12gb", *large)
    settings = {change["key"]: change["setting"] for change in plan["changes"]}
    assert settings
    for left_out in settings.keys() - {"train.accumulate"}:  # which only keeps the step's size
        told = [word for key, setting in settings.items() if key != left_out for word in ("--set", setting)]
        assert not place.plan("qwen3-4b", "--device", "rtx-3060-12gb", *large, *told)["fits"], left_out


def test_model_that_fits_nowhere_gets_no_advice(place, hub):
    shapes = {"model.embed_tokens.weight": (128256, 16384)}
    shapes |= {f"model.layers.{i}.mlp.up_proj.weight": (53248, 16384) for i in range(126)}
    put_hollow(hub, "ada/giant", shapes, {"model_type": "llama"})
    plan = place.plan("qwen3-4b", "--set", "model.source=ada/giant", "--device", "rtx-3060-12gb")
    assert not plan["fits"] and plan["changes"] == []


def test_unknown_device_is_refused_with_the_known_ones(place):
    done = place.tunepress("plan", "demo", "--device", "abacus", check=2)
    assert "abacus" in done.stderr and "h100-80gb" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("source", "words"),
    [("ada/nothing", "no such model"), ("ada/packed", "already quantized"), ("ada/pickled", "no .safetensors")],
)
def test_unavailable_model_is_refused_in_one_line(place, hub, source, words):
    packed = json.dumps({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}).encode()
    hub.put("ada/packed", {"config.json": packed, "model.safetensors": b"\0" * 64})
    hub.put("ada/pickled", {"config.json": b'{"model_type": "llama"}', "pytorch_model.bin": b"\0"})
    done = place.tunepress("plan", "qwen3-4b", "--set", f"model.source={source}", check=2)
    assert len(done.stderr.splitlines()) == 1 and source in done.stderr and words in done.stderr


def test_invalid_header_is_refused_in_one_line(place, hub):
    hub.put("ada/broken", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"\xff" * 64})
    done = place.tunepress("plan", "qwen3-4b", "--set", "model.source=ada/broken", check=2)
    assert len(done.stderr.splitlines()) == 1 and "model.safetensors: not a safetensors file" in done.stderr


def test_gated_model_is_refused_with_the_way_to_get_access(place, hub):
    put_hollow(hub, "eve/gated", {"model.embed_tokens.weight": (8, 8)}, {"model_type": "llama"})
    hub.repo("eve/gated").gated = True
    done = place.tunepress("plan", "qwen3-4b", "--set", "model.source=eve/gated", check=2)
    assert len(done.stderr.splitlines()) == 1 and "accept its terms" in done.stderr


def test_steps_follow_from_the_counted_rows(place):
    rows = [
        {"prompt": f"What is {n}?", "completion": "It is a number, as far as one can tell. " * 10} for n in range(400)
    ]
    place.folder.joinpath("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = place.plan("tinyllama-1.1b", "--set", "data.source=rows.jsonl", "--set", "train.packing=false")["data"]
    assert told["examples"] == 400 and told["how"] == "all rows read"
    assert told["steps"] == -(-380 // 8)  # a twentieth is held out, four rows at a time, twice


def write_rows(place, *more: str) -> tuple[str, ...]:
    """Settings for 400 good rows, and these lines behind them."""
    rows = [json.dumps({"prompt": f"What is {n}?", "completion": "It is a number."}) for n in range(400)]
    place.folder.joinpath("rows.jsonl").write_text("\n".join([*rows, *more]))
    return ("tinyllama-1.1b", "--set", "data.source=rows.jsonl")


@pytest.mark.parametrize("last", ['{"prompt": "Why?"}', "no JSON", '{"prompt": "Why?", "completion": ""}'])
def test_bad_row_is_refused_by_its_place_before_training(place, last):
    settings = write_rows(place, last)
    refused = place.tunepress("plan", *settings, check=2).stderr
    assert "rows.jsonl, line 401: " in refused and len(refused.splitlines()) == 1
    assert place.plan(*settings, "--no-data")["data"]["how"] == "lines counted"
    skipped = place.plan(*settings, "--set", "data.on_bad_row=skip")["data"]
    assert (skipped["examples"], skipped["how"]) == (400, "all rows read; 1 bad rows left out")


def test_rows_of_a_large_file_or_of_the_hub_are_read_if_asked_for(place, hub, monkeypatch, tiny_model):
    config = parse_config(
        {"name": "tiny", "model": {"source": str(tiny_model("llama"))}, "data": {"source": "rows.jsonl"}}, ""
    )
    write_rows(place, "no JSON")
    monkeypatch.chdir(place.folder)
    monkeypatch.setattr("pipeline.planning.data.READ_BYTES", 1000)
    assert data_size(config).how == "lines counted"
    with pytest.raises(DataError, match="line 401"):
        data_size(config, read_rows=True)
    hub.put("ada/bad", {"rows.jsonl": (place.folder / "rows.jsonl").read_bytes()}, repo_type="dataset")
    there = ("tinyllama-1.1b", "--set", "data.source=ada/bad")
    assert "does not say" in place.plan(*there)["data"]["how"]
    assert "ada/bad" in place.tunepress("plan", *there, "--data", check=2).stderr


def test_size_of_a_packed_file_is_that_of_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.planning.data.SAMPLE_BYTES", 20_000)
    rows = "".join(json.dumps({"prompt": f"What is {n}?", "completion": f"{n * n}."}) + "\n" for n in range(4000))
    for count, error in ((100, 0), (4000, 0.3)):  # a small file is counted, a large one is estimated
        content = "\n".join(rows.splitlines()[:count]).encode()
        (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(content))
        data = {"source": str(tmp_path / "rows.jsonl.gz")}
        config = parse_config({"name": "tiny", "model": {"source": "./model"}, "data": data}, "")
        size = data_size(config, read_rows=False)
        assert abs(size.text_bytes - len(content)) <= error * len(content)
        assert abs(size.examples - count) <= error * count
    (tmp_path / "rows.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="not a gzip file, or a damaged one"):
        data_size(config, read_rows=False)


@pytest.mark.parametrize(
    ("wanted", "name"),
    [("[q_proj,nothing]", "nothing"), (".*other", ".*other"), ("[embed_tokens]", "embed_tokens")],
)
def test_unknown_target_module_is_refused_with_the_known_ones(place, wanted, name):
    done = place.tunepress("plan", "tinyllama-1.1b", "--set", f"train.lora.target_modules={wanted}", check=2)
    assert f"train.lora.target_modules: no linear layer of the model is {name!r}" in done.stderr
    assert "Try: down_proj, gate_proj, k_proj" in done.stderr and len(done.stderr.splitlines()) == 1
    for known in ("[q_proj,mlp.up_proj]", "all-linear", ".*mlp.*"):
        place.plan("tinyllama-1.1b", "--set", f"train.lora.target_modules={known}")


def test_split_size_comes_from_the_card():
    def told(card: object, **data) -> int | None:
        return (split_figures(card, Data(source="ada/told", **data)) or {}).get("num_examples")

    one = {"splits": [{"name": "train", "num_examples": 5000}, {"name": "test", "num_examples": 50}]}
    assert (told(one), told(one, split="test"), told(one, split="all")) == (5000, 50, None)
    two = [{"config_name": "de", "splits": [{"name": "train", "num_examples": 7}]}, {"config_name": "en"}]
    assert (told(two, subset="de"), told(two, subset="en")) == (7, None)
    assert [told(card) for card in (None, "much", [3], [{"splits": 4}], {"splits": ["train"]})] == [None] * 5


def test_data_set_of_unknown_size_is_reported(place, hub):
    hub.put("ada/untold", {"rows.jsonl": b"{}\n"}, repo_type="dataset")
    untold = place.plan("tinyllama-1.1b", "--set", "data.source=ada/untold")["data"]
    assert untold["examples"] is None and untold["steps"] is None and "does not say" in untold["how"]


def test_subset_size_comes_from_the_card():
    def fetched(card: dict, **data) -> int | None:
        files = [{"rfilename": "README.md", "size": 5}, {"rfilename": "large.jsonl", "size": 10**9}]
        about = {"id": "ada/many", "private": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        return fetched_bytes(DatasetInfo(**about, siblings=files, cardData=card), Data(source="ada/many", **data))

    sizes = {"dataset_info": [{"config_name": "easy", "download_size": 77}, {"config_name": "hard"}]}
    folders = {"configs": [{"config_name": name, "data_files": f"{name}/*"} for name in ("easy", "hard")]}
    one = {"configs": folders["configs"][:1], "dataset_info": {"download_size": 3}}
    assert fetched({}) == fetched(one) == 10**9
    assert fetched(sizes, subset="easy") == 77
    assert [fetched(sizes, subset="hard"), fetched({}, subset="easy"), fetched(sizes), fetched(folders)] == [None] * 4


def test_small_subset_needs_only_its_own_space(place, hub):
    hub.put("ada/large", {"rows.jsonl": b"{}\n" * 999}, repo_type="dataset")
    data = ("tinyllama-1.1b", "--set", "data.source=ada/large")
    plan = place.plan(*data, "--set", "data.subset=easy")
    assert plan["data"]["fetched_bytes"] is None and "data: the size of the download is not known" in plan["notes"]
    assert place.plan(*data)["fetched_bytes"] == plan["fetched_bytes"] + 3 * 999


def test_missing_requirements_do_not_stop_planning(place):
    """Another machine may have a GPU or a token, but a wrong configuration is still refused."""
    elsewhere = ("--set", "evaluate.device=cuda", "--set", "track.server=http://127.0.0.1:9")
    assert place.plan("qwen3-1.7b", "--device", "h100-80gb", *elsewhere)["fits"]
    here = place.plan("qwen3-1.7b", *elsewhere)
    assert here["machine"]["gpu_bytes"] or not here["fits"]
    both = ("--set", "train.method=lora", "--set", "merge.base=nf4")
    assert "does not train on this base" in place.tunepress("plan", "qwen3-1.7b", *both, check=2).stderr
    assert "rows.jsonl" in place.tunepress("plan", "qwen3-1.7b", "--set", "data.source=./rows.jsonl", check=2).stderr


def test_cached_files_are_not_planned_as_downloads(place, hub):
    put_hollow(hub, "ada/small", {"model.embed_tokens.weight": (64, 8)}, {"model_type": "llama"})
    settings = ("qwen3-4b", "--set", "model.source=ada/small")
    missing = place.plan(*settings)["fetched_bytes"]
    place.python("from huggingface_hub import hf_hub_download as get; get('ada/small', 'model.safetensors')")
    assert place.plan(*settings)["fetched_bytes"] < missing


def test_variant_that_stock_transformers_dequantizes_takes_the_memory_of_the_model(place):
    plan = place.plan("qwen3-1.7b", "--set", "quantize.variants=[w4a16,w8a8,fp8-weight]")
    memory = {stage["stage"]: stage["memory"] for stage in plan["stages"]}
    size = plan["model"]["bf16_bytes"]
    assert memory["w8a8"]["weights"] == memory["fp8-weight"]["weights"] == size
    assert memory["w4a16"]["weights"] < 0.5 * size


@pytest.mark.parametrize(
    "variant, layer, experts", [("w4a16", False, True), ("w8a8", True, True), ("int8", False, False)]
)
def test_experts_of_compressed_tensors_are_planned_dequantized(variant, layer, experts):
    spec = VariantSpec(name=variant).resolved()
    assert is_dequantized_to_run(spec, ["model.layers.0.mlp.up_proj.weight"]) == layer
    assert is_dequantized_to_run(spec, ["model.layers.0.mlp.experts.3.up_proj.weight"]) == experts


def test_calibration_with_static_inputs_needs_more_memory():
    hosts = []
    for variant in ("w8a8-static", "int4"):
        settings = ["quantize.quality=calibrated", f'quantize.variants=[{{"name": "{variant}", "rounding": "rtn"}}]']
        config = load_config("demo", settings)
        hosts.append(memory.calibrating(read_sizes(config.model), config.quantize))
    assert hosts[0].keys() - hosts[1].keys() == {"ranges of channels", "changed weights"}
    assert memory.total(hosts[0]) > memory.total(hosts[1])
