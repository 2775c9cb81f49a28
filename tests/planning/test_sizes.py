"""Planned sizes: equal to those of written files, with memory that grows with its causes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config.catalog import VARIANTS
from pipeline.config.schema import Config, Lora, Model, Train, VariantSpec
from pipeline.errors import ModelError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.gguf_metadata import read_header
from pipeline.planning import memory, training_memory
from pipeline.planning.advice import advise
from pipeline.planning.devices import Machine
from pipeline.planning.headers import gguf_header
from pipeline.planning.model import Sizes, read_sizes
from pipeline.planning.plan import shortages
from pipeline.planning.stages import stages_of
from tests.support.checkpoints import rewrite, unprefixed
from tests.support.planning import sizes_of
from tests.support.recipes import shapes_of

HERE = Machine("here", host_bytes=10**12)
GPU = Machine("a GPU", gpu_bytes=10**12)


def quantize_only(**model) -> Config:
    tree = {"name": "x", "model": {"source": "ada/base", **model}, "data": None, "evaluate": None}
    return Config.model_validate(tree)


def config(source: Path | str = "ada/base", **sections) -> Config:
    return Config.model_validate(
        {"name": "x", "model": {"source": str(source)}, "data": {"source": "ada/rows"}, **sections}
    )


@pytest.fixture(scope="module")
def qwen() -> Sizes:
    return sizes_of(shapes_of("qwen3-1.7b"))


def test_folder_sizes_come_from_headers(any_model):
    sizes, checkpoint = read_sizes(Model(source=str(any_model))), Checkpoint(any_model)
    from pipeline.models.matrices import linear_weights, table_weights

    assert {name: t.shape for name, t in sizes.tensors.items()} == {name: t.shape for name, t in checkpoint.items()}
    assert sizes.linear == linear_weights(any_model)
    if "gemma" not in any_model.name:
        assert sizes.tables.keys() >= table_weights(any_model).keys()


@pytest.mark.parametrize(
    "spec",
    [{"name": "int8"}, {"name": "int8", "group_size": 32}, {"name": "int4"}, {"name": "int4", "group_size": 32},
     {"name": "int4", "packing": "tile_packed"}, {"name": "int4", "embeddings": "int8"},
     {"name": "int4", "int8": ["*.down_proj", "*.0.*.q_proj"]}],
)  # fmt: skip
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_variant_has_the_planned_size(tiny_model, quantized, architecture, spec):
    folder = tiny_model(architecture)
    made = Checkpoint(quantized(folder, **{"variant" if k == "name" else k: v for k, v in spec.items()}) / spec["name"])
    assert (
        read_sizes(Model(source=str(folder))).stored_bytes(VariantSpec(**spec).resolved(), merged=True) == made.nbytes
    )


@pytest.mark.parametrize("variant", ["gguf-f16", "gguf-q8_0", "gguf-q4_0", "gguf-q5_1", "gguf-q4_k", "gguf-q6_k"])
def test_gguf_has_the_planned_size(tiny_model, tmp_path, variant):
    from gguf import GGUFReader

    from pipeline.models.matrices import linear_weights, table_weights
    from pipeline.quantization.writer import Variants

    folder = tiny_model("qwen3", intermediate_size=512)  # K-quants have a type for each of two widths
    spec = VariantSpec(name=variant, rounding="rtn" if VARIANTS[variant].roundings else None).resolved()
    Variants([spec], {variant: tmp_path}, linear_weights(folder), table_weights(folder)).make_of(folder)
    made = sum(tensor.n_bytes for tensor in GGUFReader(next(tmp_path.glob("*.gguf"))).tensors)
    assert read_sizes(Model(source=str(folder))).stored_bytes(spec, merged=True) == made
    fields, tensors = gguf_header(next(tmp_path.glob("*.gguf")))
    assert fields["general.architecture"] == "qwen3"
    assert sum(t.numel for t in tensors.values()) == read_sizes(Model(source=str(folder))).parameters


@pytest.mark.parametrize("variant", ["gguf-q4_k_m", "gguf-q6_k"])
def test_k_quants_have_about_the_planned_size(tiny_model, tmp_path, variant):
    pytest.importorskip("llama_cpp")
    from pipeline.models.matrices import linear_weights
    from pipeline.quantization.writer import Variants

    folder = tiny_model("llama", hidden_size=256, intermediate_size=768)
    spec = VariantSpec(name=variant).resolved()
    Variants([spec], {variant: tmp_path}, linear_weights(folder)).make_of(folder)
    made = sum(tensor.nbytes for tensor in read_header(next(tmp_path.glob("*.gguf"))).tensors.values())
    assert read_sizes(Model(source=str(folder))).stored_bytes(spec, merged=True) == pytest.approx(made, rel=0.1)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_adapter_has_the_size_of_pefts_adapter(tiny_model, targets):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tiny_model("qwen3")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=4, target_modules=targets))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sizes = read_sizes(Model(source=str(folder)))
    assert training_memory.adapter_parameters(sizes, Train(lora=Lora(rank=4, target_modules=targets))) == trained


@pytest.mark.parametrize("on_gpu", [False, True])
def test_advice_reduces_memory(qwen, on_gpu):
    def held(**train) -> int:
        return sum(memory.wanted(need) for need in training_memory.training(qwen, Train(**train), on_gpu))

    usual = held()
    assert held(batch_size=2) < usual and held(max_length=512) < usual and held(lora=Lora(rank=4)) < usual
    assert held(method="lora") > usual


def test_gradient_checkpointing_keeps_activations_small_on_a_gpu(qwen):
    here, _ = training_memory.training(qwen, Train(), on_gpu=False)
    _, gpu = training_memory.training(qwen, Train(), on_gpu=True)
    assert gpu["activations"] < here["activations"] / 5


def test_quantizing_memory_does_not_depend_on_the_model(qwen):
    specs = [VariantSpec(name="int8").resolved()]
    assert memory.quantizing(qwen, specs) == memory.quantizing(sizes_of(shapes_of("qwen3-4b")), specs)


def test_single_base_merge_makes_the_variants_in_its_pass(qwen):
    both, one = (
        {s.name: s for s in stages_of(config(merge={"base": base}, quantize={"quality": "fast"}), qwen, HERE, 0, 10**6)}
        for base in ("auto", "nf4")
    )
    assert both["merge"].temporary and "quantize" in both
    assert not one["merge"].temporary and "quantize" not in one
    assert any(name.startswith("int4") for name in one["merge"].writes)


def test_little_disk_advises_shard_streaming(tmp_path):
    sizes = sizes_of(shapes_of("qwen3-4b"), kind="hub", shard_bytes=10**9, fetched_bytes=8 * 10**9)
    whole, by_shard = (stages_of(quantize_only(low_disk=low), sizes, HERE, 0, 0) for low in (False, True))
    assert (whole[0].caches, by_shard[0].caches) == (8 * 10**9, 0)
    assert not whole[0].temporary and sum(by_shard[0].temporary.values()) == 2 * 10**9
    tight = replace(HERE, disk_free=12 * 10**9, cache_free=12 * 10**9, one_disk=True)
    assert [short.what for short in shortages(whole, tight)] == ["disk"] and not shortages(by_shard, tight)
    changes = advise(quantize_only(), lambda asked: bool(shortages(stages_of(asked, sizes, tight, 0, 0), tight)))
    assert [change.setting for change in changes] == ["model.low_disk=true"]


@pytest.mark.parametrize(("batch_size", "accumulate"), [(10000, 1), (3, 1), (6, 5), (7, 3)])
def test_advised_batch_size_keeps_the_size_of_a_step(batch_size, accumulate):
    asked = config(train={"batch_size": batch_size, "accumulate": accumulate})
    for most in (1, 2, 600):
        changes = {c.key: c.value for c in advise(asked, lambda config, most=most: config.train.batch_size > most)}
        assert changes.get("train.batch_size", batch_size) <= max(most, 1)
        if changes:
            assert changes["train.batch_size"] * changes["train.accumulate"] == batch_size * accumulate


def test_model_that_does_not_fit_is_measured_from_its_files(qwen):
    small, large = (
        {s.name: s for s in stages_of(config(), qwen, machine, 0, 10**6)}["evaluate"]
        for machine in (Machine("small", host_bytes=3 * 10**9), HERE)
    )
    assert "layer by layer" in small.notes[0] and not large.notes
    assert memory.total(small.host) < memory.total(large.host) / 2


def test_models_are_measured_on_the_configured_device(qwen):
    def measured(device: str, machine: Machine) -> list:
        asked = config(evaluate={"device": device})
        return [s for s in stages_of(asked, qwen, machine, 0, 10**6) if s.name in ("evaluate", "int8", "int4")]

    assert all(stage.gpu for stage in measured("auto", GPU) + measured("cuda", GPU))
    on_cpu = measured("cpu", GPU)
    assert not any(stage.gpu for stage in on_cpu)
    assert [s.host for s in on_cpu] == [s.host for s in measured("auto", HERE)]


def test_missing_gpu_is_a_shortage_with_advice(qwen):
    def short(asked: Config) -> list:
        return shortages(stages_of(asked, qwen, HERE, 0, 10**6), HERE)

    asked = config(evaluate={"device": "cuda"})
    assert {(s.stage, s.what, s.have) for s in short(asked)} == {
        (stage, "GPU memory", 0) for stage in ("evaluate", "int8", "int4")
    }
    assert [c.setting for c in advise(asked, lambda config: bool(short(config)))] == ["evaluate.device=auto"]


def test_only_training_and_measuring_use_the_gpu(qwen):
    stages = {s.name: s for s in stages_of(config(merge={"base": "bf16"}), qwen, GPU, 0, 10**6)}
    assert {name for name, stage in stages.items() if stage.gpu} == {"train", "evaluate", "int8", "int4"}


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.1.self_attn.k_proj.bias"])
def test_missing_tensor_is_named_by_the_plan(tiny_model, tmp_path, name):
    folder = rewrite(tiny_model("llama"), tmp_path / "base", lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=f"its checkpoint has no '{name}'"):
        read_sizes(Model(source=str(folder)))


@pytest.mark.parametrize("change", [unprefixed, lambda tensors: tensors.update(extra=tensors["model.norm.weight"] + 0)])
def test_other_names_and_tensors_do_not_stop_a_plan(tiny_model, tmp_path, change):
    folder = rewrite(tiny_model("qwen3"), tmp_path / "base", change)
    assert read_sizes(Model(source=str(folder))).layers == 2


def test_target_is_planned_with_its_size_and_a_stage_that_holds_one_block(qwen):
    def planned(target):
        quantize = {"variants": [{"name": "int4", "target": target}], "quality": "calibrated"}
        asked = config(quantize=quantize, merge={"base": "bf16"}, train={"method": "lora"})
        stages = {stage.name: stage for stage in stages_of(asked, qwen, HERE, 0, 0)}
        return asked.quantize.spec("int4"), stages

    spec, stages = planned({"size_mb": 1200})
    assert qwen.stored_bytes(spec, merged=True) == 1_200_000_000
    assert list(stages).index("merge") < list(stages).index("allocate") < list(stages).index("calibrate")
    assert not any("int4" in name for name in stages["merge"].writes) and not stages["allocate"].notes
    weights = qwen.linear_parameters + sum(rows * width for rows, width in qwen.tables.values())
    spec, _ = planned({"bits": 6.0})
    assert qwen.stored_bytes(spec, merged=True) == pytest.approx(0.75 * weights, rel=1e-3)
    spec, stages = planned({"rise": 0.03})
    assert 0.5 * weights < qwen.stored_bytes(spec, merged=True) < 0.75 * weights
    assert "up to three times" in stages["allocate"].notes[0]
    host = stages["allocate"].host
    assert host["block"] < 12 * qwen.linear_parameters / qwen.layers and memory.total(host) < 3e9


def test_distillation_is_planned_after_the_calibration(qwen):
    def planned(**quantize):
        quantize = {"variants": [{"name": "int4"}, {"name": "int8"}], **quantize}
        return {s.name: s for s in stages_of(config(quantize=quantize), qwen, HERE, 0, 10**6)}

    assert "distill" not in planned(quality="calibrated")
    stages = planned(quality="distilled")
    names = list(stages)
    assert names.index("calibrate") + 1 == names.index("distill") == names.index("quantize") - 1
    distill, longer = stages["distill"], planned(quality="distilled", distillation={"tokens": 10**6})["distill"]
    assert distill.host["scales and zeros"] == 32 * (qwen.linear_parameters // 64)
    assert longer.host["activations"] == distill.host["activations"]  # the memory does not grow with the text
    assert sum(longer.temporary.values()) > sum(distill.temporary.values())
