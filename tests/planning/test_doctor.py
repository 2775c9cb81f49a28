"""`tunepress doctor`: the machine, the login and the measured speeds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.cli.wizard import summary
from pipeline.config.catalog import VARIANTS
from pipeline.config.loader import load_config
from pipeline.planning import Plan, benchmark, devices, doctor, make_plan
from pipeline.planning.devices import this_machine
from pipeline.planning.report import as_json
from pipeline.system import hardware
from pipeline.system.libraries import EXTRAS, MEASURING, lacking
from tests.support.hub import LoopbackHub
from tests.support.planning import SPEEDS, Planner
from tests.support.runs import TOKEN


def examined(place: Planner) -> dict:
    return json.loads(place.tunepress("doctor", "--no-calibrate", "--json").stdout)


def test_doctor_reports_devices_kernels_versions_and_disk(place):
    found = examined(place)
    assert found["devices"][-1]["kind"] == "cpu" and found["devices"][-1]["capability"]
    assert set(found["kernels"]) == {"int8", "int8, in groups", "int4"}
    assert {"python", "torch", "transformers", "trackio"} <= found["versions"].keys()
    assert found["disk"]["runs"]["free_bytes"] > 0 and found["disk"]["hub_cache"]["folder"].startswith(
        str(place.folder)
    )
    assert found["extras"]["gguf"] is True and found["trackio"]["folder"].endswith("trackio")


CPU = {"kind": "cpu", "name": "a CPU", "capability": "AVX2"}


@pytest.mark.parametrize(
    ("capability", "available"), [(None, False), ("7.5", False), ("8.6", False), ("8.9", True), ("10.0", True)]
)
def test_doctor_says_whether_float8_is_available(capability, available):
    cards = [{"kind": "cuda", "name": "a card", "capability": capability}] if capability else []
    assert doctor.float8([*cards, CPU])["available"] is available
    runs = doctor.runs_on([*cards, CPU])
    ways = {name: [way for way in variant.ways() if way.capability == 8.9] for name, variant in VARIANTS.items()}
    assert any(ways.values())
    for name, found in ways.items():
        for way in found:  # some engines also compute float8 on a CPU
            elsewhere = any(other.engine == way.engine and other.hardware == "CPU" for other in VARIANTS[name].ways())
            assert (name in runs.get(way.engine, [])) == (available or elsewhere)
    assert ("fp8" in runs.get("sglang", [])) == available


def test_doctor_lists_the_variants_that_engines_run_here(place):
    cpu, card = doctor.runs_on([CPU]), doctor.runs_on([{"kind": "cuda", "name": "a card", "capability": "9.0"}, CPU])
    assert {"int8", "int4", "bnb-nf4"} <= set(cpu["tunepress"]) and "gguf-q4_0" in cpu["llama.cpp"]
    assert "int4" not in cpu["transformers"]  # it opens there, and has no kernel
    assert "bnb-nf4" in card["vllm"] and "bnb-nf4" not in cpu.get("vllm", [])
    assert all(set(names) <= set(card[engine]) for engine, names in cpu.items())
    page = place.tunepress("doctor", "--no-calibrate").stdout
    assert "Runs        transformers: int8" in page and "Float8      " in page


@pytest.mark.parametrize(
    ("role", "writes_to", "may_write"),
    [("write", (), True), ("read", (), False), ("fineGrained", (), False), ("fineGrained", ("ada/mine",), True)],
)
def test_doctor_reports_the_login_without_the_token(tmp_path, role, writes_to, may_write):
    with LoopbackHub(tmp_path / "hub", {TOKEN: {"name": "ada", "role": role, "writes_to": writes_to}}) as hub:
        place = Planner(tmp_path, hub)
        done = place.tunepress("doctor", "--no-calibrate", "--json")
    hub_says = json.loads(done.stdout)["hub"]
    assert (hub_says["name"], hub_says["may_write"], hub_says["problem"]) == ("ada", may_write, None)
    assert TOKEN not in done.stdout and TOKEN not in done.stderr


@pytest.mark.parametrize("dtype", hardware.COMPUTE_DTYPES)
def test_doctor_reports_the_compute_type(place, monkeypatch, dtype):
    monkeypatch.setenv(hardware.COMPUTE_DTYPE, dtype)
    assert examined(place)["compute_dtype"] == dtype
    assert f"Compute     {dtype}" in place.tunepress("doctor", "--no-calibrate").stdout


def test_doctor_reports_a_missing_network_and_continues(tmp_path):
    with LoopbackHub(tmp_path / "hub", {TOKEN: {"name": "ada"}}) as hub:
        place = Planner(tmp_path, hub)
    found = examined(place)  # the hub is gone
    assert "could not be reached" in found["hub"]["problem"] and "\n" not in found["hub"]["problem"]
    assert TOKEN not in json.dumps(found) and found["versions"]


def test_doctor_page_explains_how_to_log_in(tmp_path):
    page = Planner(tmp_path).tunepress("doctor", "--no-calibrate").stdout
    assert f"Compute     {hardware.dtype_name(hardware.compute_dtype('cpu'))}" in page
    assert "hf auth login" in page and "Int4Linear" in page and "Try: tunepress doctor --calibrate" in page


@pytest.mark.slow
def test_measured_speeds_are_stored_and_used_by_plan(place):
    before = place.plan("demo")
    assert before["seconds"] is None and any("doctor" in note for note in before["notes"])
    measured = json.loads(place.tunepress("doctor", "--calibrate", "--json").stdout)["calibration"]
    assert measured["is_of_here"] and all(value for value in measured["figures"].values())
    after = place.plan("demo")
    assert after["seconds"] == pytest.approx(sum(stage["seconds"] for stage in after["stages"]))
    assert place.plan("demo", "--device", "l4-24gb")["seconds"] is None  # whose speed was not measured
    assert json.loads(place.tunepress("doctor", "--json").stdout)["calibration"] == measured  # only once


def test_unsaved_speeds_give_one_line_and_doctor_continues(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "measure_in_time", lambda place, tell: replace(SPEEDS, place=place))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = doctor.examine(tmp_path, calibrate=True)
    assert found["versions"] and found["calibration"]["is_of_here"]
    assert "calibration.json: cannot be written, so the speeds are not kept" in dict(doctor._lines(found))["Speed"]


def test_unwritable_folder_gives_no_speeds_and_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir("/proc")  # which not even root can write to
    found = doctor.examine(tmp_path, calibrate=True)
    assert found["versions"] and found["calibration"]["figures"] is None
    assert dict(doctor._lines(found))["Speed"].startswith("/proc: cannot be written, so nothing was measured")


def test_speeds_of_another_machine_give_no_times(place):
    file = place.folder / "cache" / "tunepress" / "calibration.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({**SPEEDS.__dict__, "place": "another"}))
    plan = place.plan("demo")
    assert plan["seconds"] is None and any("has changed" in note for note in plan["notes"])


def test_machine_name_tells_processors_with_as_many_cores_apart(tmp_path, monkeypatch):
    ours = this_machine(tmp_path).name
    monkeypatch.setattr("pipeline.system.hardware.cpu_name", lambda: "Abacus 1")
    assert "Abacus 1" in (theirs := this_machine(tmp_path).name) and theirs != ours


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 1}', '{"version": 0, "train": 1}'])
def test_damaged_speeds_are_ignored(tmp_path, monkeypatch, content):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    benchmark.save_speeds(SPEEDS)
    assert benchmark.read_speeds() == SPEEDS
    benchmark.path().write_text(content)
    assert benchmark.read_speeds() is None


def test_slower_speeds_make_longer_times(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    here = replace(SPEEDS, place=this_machine(Path("runs")).name)
    config = load_config("demo")
    limit = 60 * config.train.max_minutes
    unlimited = config.model_copy(update={"train": config.train.model_copy(update={"max_minutes": None})})
    benchmark.save_speeds(here)
    usual = make_plan(unlimited).seconds
    benchmark.save_speeds(replace(here, train=here.train / 2))
    slower = make_plan(unlimited).seconds
    assert slower["train"] > 1.8 * usual["train"] and slower["quantize"] == usual["quantize"]
    benchmark.save_speeds(replace(here, train=here.train / 1000))
    assert limit < make_plan(config).seconds["train"] < limit + 60


def test_training_with_quantization_takes_longer_by_the_speed_of_rounding(measured):
    config = load_config("demo", ["train.max_minutes=null", "quantize.quality=fast"])
    with_qat = config.model_copy(update={"train": config.train.model_copy(update={"qat": "int4"})})
    plain, trained = (make_plan(asked).seconds["train"] for asked in (config, with_qat))
    benchmark.save_speeds(
        replace(SPEEDS, place=this_machine(Path("runs")).name, rounding=dict.fromkeys(SPEEDS.rounding, 1e7))
    )
    slower = make_plan(with_qat).seconds["train"]
    assert trained > plain and slower - plain == pytest.approx(10 * (trained - plain))


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Give this machine a known speed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    benchmark.save_speeds(replace(SPEEDS, place=this_machine(Path("runs")).name))


def told(plan: Plan) -> str:
    (line,) = [note for note in as_json(plan)["notes"] if note.startswith("time: ")]
    return line


def test_unknown_steps_give_no_total_time(measured, tmp_path, tiny_model):
    (tmp_path / "rows.json").write_text(json.dumps([{"prompt": "a", "completion": "b"}] * 9))  # rows are not counted
    own = [f"data.source={tmp_path / 'rows.json'}", f"model.source={tiny_model('llama')}", "train.packing=false"]
    configurations = [load_config("demo", [*own, f"train.max_steps={n}"]) for n in ("null", "60")]
    unknown, known = (make_plan(config, read_rows=False) for config in configurations)
    assert "train" not in unknown.seconds and unknown.seconds["merge"] == known.seconds["merge"]
    assert unknown.total_seconds is None and as_json(unknown)["seconds"] is None
    assert "without train, whose steps are not known, and without the network" in told(unknown)
    assert known.total_seconds == sum(known.seconds.values()) and "train" in known.seconds
    assert "train" not in told(known)
    assert "whose steps are not known" in dict(summary._lines(configurations[0], unknown))["Takes"]


def test_offloaded_model_has_no_estimated_time(measured, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.system.hardware.free_host_bytes", lambda: 300_000_000)
    plan = make_plan(load_config("demo"))
    assert plan.total_seconds is None and not {"evaluate"} & plan.seconds.keys()
    assert "without evaluate, which reads its model from the disk many times" in told(plan)


def test_unknown_device_speed_gives_no_time(measured):
    plan = make_plan(load_config("demo", ["evaluate.device=cuda"]))  # nothing here has one
    assert not {"evaluate", "int8", "int4"} & plan.seconds.keys() and "quantize" in plan.seconds


def test_only_free_gpu_memory_counts(monkeypatch):
    import torch

    monkeypatch.setattr(devices, "may_have_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Abacus 1")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 10**9, 80 * 10**9))
    assert devices.gpu_here() == ("Abacus 1", 3 * 10**9)


def test_amd_gpu_advice_appears_only_without_kernels(monkeypatch):
    monkeypatch.delenv("HSA_OVERRIDE_GFX_VERSION", raising=False)
    assert "HSA_OVERRIDE_GFX_VERSION=10.3.0" in doctor.rocm_advice("gfx1031")
    assert "HSA_OVERRIDE_GFX_VERSION=11.0.0" in doctor.rocm_advice("gfx1103")
    assert doctor.rocm_advice("gfx1100") is None and doctor.rocm_advice("gfx90a:sramecc+:xnack-") is None
    monkeypatch.setenv("HSA_OVERRIDE_GFX_VERSION", "10.3.0")
    assert doctor.rocm_advice("gfx1031") is None


@pytest.mark.parametrize(("driver", "words"), [("kfd", "AMD"), ("nvidiactl", "NVIDIA")])
def test_unused_gpu_is_reported(tmp_path, driver, words):
    assert doctor.missing_gpu(tmp_path) is None
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / driver).touch()
    assert words in doctor.missing_gpu(tmp_path)


def test_rocm_without_driver_is_reported(tmp_path):
    (tmp_path / "opt" / "rocm").mkdir(parents=True)
    assert "load the amdgpu driver" in doctor.missing_gpu(tmp_path)


def test_packages_of_every_variant_are_known_to_doctor_and_verify():
    rows = [part for row in VARIANTS.values() for part in (row, *row.packings.values())]
    needs = [*(row.requires for row in rows), *(row.quantizer_requires for row in VARIANTS.values())]
    extras = {pair for pairs in needs for pair in pairs}
    assert extras and all(module in EXTRAS[extra] for module, extra in extras)
    assert {name for row in VARIANTS.values() for name in row.measured_with} <= {*MEASURING}
    assert lacking(["torch>=2", "no-such-package>=1"]) == ["no-such-package>=1"]
