"""Mixtures of experts in every format that holds them: stock transformers and the loader compute what codes mean."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config.catalog import VARIANTS
from pipeline.config.schema import VariantSpec
from pipeline.errors import ModelError, QuantizationError
from pipeline.inference.load import load, load_dequantized
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.experts import expert_places, gates
from pipeline.models.matrices import linear_weights, quantizable_weights, skeleton, table_weights
from pipeline.quantization.calibration.blocks import BlockwiseModel
from pipeline.quantization.experts import check_experts
from pipeline.quantization.formats import storage, stored_weights
from pipeline.quantization.layers import unfit
from pipeline.quantization.writer import quantize_checkpoint
from tests.support.models import MIXTURES, relative_error, weight_in

IDS = torch.tensor([[7, 100, 31, 64, 5, 5, 90, 12, 120, 33]])
IN_EIGHT = {"int8": ["*.experts.*"]}
STORED = [("int8", {}), ("int8", {"group_size": 32}), ("int8-dynamic", {}), ("int8", {"embeddings": "int8"})]


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits.float()


def alike(found, expected):
    """Return True if most tokens agree; one whose router is undecided may go to another expert."""
    off = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    return off.median() < 0.05


@pytest.mark.parametrize("kind", MIXTURES)
def test_every_expert_is_found_and_the_router_is_not(tiny_model, kind):
    folder = tiny_model(kind)
    linear, found = linear_weights(folder), quantizable_weights(folder)
    experts = found.keys() - linear.keys()
    assert len(experts) == 2 * 4 * 3 and linear.keys() <= found.keys() <= Checkpoint(folder).keys()
    assert len(gates(Checkpoint(folder))) == 2 and not gates(Checkpoint(folder)) & found.keys()
    model, checkpoint = AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), Checkpoint(folder)
    assert all(torch.equal(weight_in(model, name), checkpoint.read(name)) for name in experts)


def test_models_without_stacks_have_no_places(tiny_model):
    assert expert_places(skeleton(tiny_model("llama"))) == {}


@pytest.mark.parametrize("variant, options", STORED, ids=str)
@pytest.mark.parametrize("kind", MIXTURES)
def test_stacks_in_eight_bits_are_computed_by_stock_transformers(
    tiny_model, quantized, dequantized, kind, variant, options
):
    root = quantized(tiny_model(kind), variant, **options)
    model, report = AutoModelForCausalLM.from_pretrained(root / variant, dtype="auto", output_loading_info=True)
    assert not any(report.values())
    stacks = {place.stack for place in expert_places(skeleton(root)).values()}
    assert len(stacks) == 4
    assert all(type(model.get_parameter(stack).data).__name__ == "Int8Tensor" for stack in stacks)
    expected = logits(dequantized(root, variant, **{k: v for k, v in options.items() if k == "group_size"}))
    assert alike(logits(model), expected)
    assert alike(logits(load(root, variant)[0]), expected)
    if variant == "int8":
        assert alike(logits(load(root, variant, offload=True)[0]), expected)


def test_codes_of_experts_are_those_of_their_own_rows(tiny_model, quantized, dequantized):
    root = quantized(tiny_model("qwen3_moe"), "int8")
    stack = dequantized(root, "int8").model.layers[1].mlp.experts.gate_up_proj
    stored = storage("torchao").read(Checkpoint(root / "int8"), "model.layers.1.mlp.experts.gate_up_proj", stack.shape)
    assert torch.equal(stored.dequantize(torch.bfloat16).view(stack.shape), stack)


@pytest.mark.parametrize("kind", MIXTURES)
def test_few_bits_of_torchao_leave_experts_in_eight(tiny_model, quantized, kind):
    folder = tiny_model(kind)
    said = unfit(VariantSpec(name="int4").resolved(), quantizable_weights(folder), folder)
    assert said and said.startswith("stock transformers cannot run experts in 4 bits of torchao, but in eight")
    assert "(int8: ['*.experts.*']). Try: w4a16" in said
    root = quantized(folder, "int4", **IN_EIGHT)
    model, report = AutoModelForCausalLM.from_pretrained(root / "int4", dtype="auto", output_loading_info=True)
    assert not any(report.values())
    experts, attention = model.model.layers[0].mlp.experts, model.model.layers[0].self_attn
    assert type(experts.down_proj.data).__name__ == "Int8Tensor"
    assert type(attention.q_proj.weight.data).__name__ == "Int4Tensor"
    packed, offloaded = logits(load(root, "int4")[0]), logits(load(root, "int4", offload=True)[0])
    assert alike(packed, offloaded)


def test_experts_that_are_kept_stay_as_they_are(tiny_model, quantized):
    root = quantized(tiny_model("mixtral"), "int8", keep=["*.experts.*"])
    model, report = AutoModelForCausalLM.from_pretrained(root / "int8", dtype="auto", output_loading_info=True)
    assert not any(report.values())
    assert model.model.layers[0].mlp.experts.gate_up_proj.data.dtype == torch.bfloat16
    assert type(model.model.layers[0].self_attn.q_proj.weight.data).__name__ == "Int8Tensor"


def test_experts_of_a_stack_cannot_differ(tiny_model, tmp_path):
    folder = tiny_model("mixtral")
    spec = VariantSpec(name="int8", keep=["*.experts.2.w1"]).resolved()
    with pytest.raises(QuantizationError, match=r"experts\.2\.w1.* which one stack cannot hold"):
        quantize_checkpoint(folder, [spec], {"int8": tmp_path}, quantizable_weights(folder))


@pytest.mark.parametrize("variant", ["w4a16", "w8a16", "fp8", "fp8-weight"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_stock_transformers_stacks_the_experts_of_compressed_tensors(tiny_model, quantized, kind, variant):
    pytest.importorskip("compressed_tensors")
    root = quantized(tiny_model(kind), variant)
    stored = Checkpoint(root / variant)
    forms = stored_weights(stored)
    assert forms.keys() == quantizable_weights(root).keys()
    model, report = AutoModelForCausalLM.from_pretrained(root / variant, dtype="auto", output_loading_info=True)
    assert not any(report.values())
    for name, place in expert_places(skeleton(root)).items():
        rows = model.get_parameter(place.stack).flatten(0, 1)[place.first_row :][: place.shape[0]]
        assert torch.equal(rows, forms[name].read(stored, name, place.shape).dequantize(torch.bfloat16)), name
    assert alike(logits(load(root, variant)[0]), logits(model))
    if not VARIANTS[variant].rounds_inputs:
        assert alike(logits(load(root, variant, offload=True)[0]), logits(model))
    ignored = json.loads((root / variant / "config.json").read_text())["quantization_config"]["ignore"]
    parent = "block_sparse_moe" if kind == "mixtral" else "mlp"
    assert {"lm_head", "model.layers.0.mlp.gate", f"model.layers.1.{parent}.gate"} <= {*ignored}


def test_integers_that_stock_transformers_cannot_stack_are_refused(tiny_model):
    with pytest.raises(ModelError, match="w8a8: stock transformers cannot load a mixture of experts so. Try: int8, "):
        check_experts(VariantSpec(name="w8a8").resolved(), quantizable_weights(tiny_model("mixtral")))


@pytest.mark.parametrize("variant, keep", [("w4a16", "*.experts.*"), ("w8a8", "*.experts.*"), ("fp8", "*.experts.0.*")])
def test_experts_that_stock_transformers_cannot_leave_out_are_refused(tiny_model, variant, keep):
    with pytest.raises(ModelError, match=f"{variant}: stock transformers cannot load"):
        check_experts(VariantSpec(name=variant, keep=[keep]).resolved(), quantizable_weights(tiny_model("mixtral")))


@pytest.mark.parametrize("variant, options", [("bnb-int8", {}), ("fp8", {}), ("fp8", {"packing": "torchao"})], ids=str)
def test_formats_without_experts_can_keep_them(tiny_model, quantized, variant, options):
    pytest.importorskip("compressed_tensors" if variant == "fp8" else "bitsandbytes")
    root = quantized(tiny_model("qwen3_moe"), variant, keep=["*.experts.*"], **options)
    model, report = AutoModelForCausalLM.from_pretrained(root / variant, dtype="auto", output_loading_info=True)
    assert not any(report.values())
    stored = Checkpoint(root)
    for name, place in expert_places(skeleton(root)).items():
        rows = model.get_parameter(place.stack).flatten(0, 1)[place.first_row :][: place.shape[0]]
        assert torch.equal(rows, stored.read(name)), name


@pytest.mark.parametrize("variant", ["bnb-int8", "gptq", "awq"])
def test_gates_beside_kept_experts_are_not_taken_for_quantized_layers(tiny_model, quantized, variant):
    root = quantized(tiny_model("qwen2_moe"), variant, keep=["*.experts.*"])
    said = json.dumps(json.loads((root / variant / "config.json").read_text())["quantization_config"])
    assert "model.layers.1.mlp.shared_expert_gate" in said.replace("\\", "")
    if variant == "bnb-int8":
        model = AutoModelForCausalLM.from_pretrained(root / variant, dtype="auto")
        assert type(model.model.layers[1].mlp.shared_expert_gate) is torch.nn.Linear
        expected = logits(AutoModelForCausalLM.from_pretrained(root, dtype="auto"))
        assert alike(logits(model), expected)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("kind", MIXTURES)
def test_gguf_is_read_back_as_the_stacks_of_the_model(tiny_model, tmp_path, kind, offload):
    pytest.importorskip("gguf")
    folder, spec = tiny_model(kind), VariantSpec(name="gguf-bf16").resolved()
    quantize_checkpoint(
        folder, [spec], {spec.name: tmp_path}, quantizable_weights(folder), tables=table_weights(folder)
    )
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))
    model, _ = load_dequantized(next(tmp_path.iterdir()), folder, offload=offload)
    assert relative_error(logits(model), expected) < 0.01


def test_blocks_of_rows_do_not_change_the_stacks(tiny_model, quantized, tmp_path, monkeypatch):
    whole = Checkpoint(quantized(tiny_model("mixtral"), "int8") / "int8")
    monkeypatch.setattr("pipeline.models.checkpoint.row_blocks.BLOCK_BYTES", 2000)
    monkeypatch.setattr("pipeline.models.checkpoint.row_blocks.TILE_ELEMENTS", 500)
    folder, spec = tiny_model("mixtral"), VariantSpec(name="int8").resolved()
    quantize_checkpoint(folder, [spec], {"int8": tmp_path}, quantizable_weights(folder))
    pieces = Checkpoint(tmp_path)
    assert whole.keys() == pieces.keys()
    assert all(torch.equal(whole.read(name), pieces.read(name)) for name in whole)


def test_formats_without_experts_refuse_them_by_name(tiny_model, monkeypatch):
    monkeypatch.setattr(storage("gguf"), "holds_experts", False)
    experts = quantizable_weights(tiny_model("mixtral"))
    spec = VariantSpec(name="gguf-q4_0").resolved()
    with pytest.raises(ModelError, match=r"gguf-q4_0: does not hold experts. Try: w4a16\Z"):
        check_experts(spec, experts)
    check_experts(spec, linear_weights(tiny_model("llama")))


def test_calibration_is_refused_with_the_way_out(tiny_model):
    folder = tiny_model("mixtral")
    with pytest.raises(ModelError, match="a mixture of experts is not calibrated.*Try: quantize.quality=fast"):
        BlockwiseModel(folder)
    with pytest.raises(ModelError, match="rounding gptq needs the inputs of every expert.*Try: quantize.quality=fast"):
        check_experts(VariantSpec(name="gguf-q4_0", rounding="gptq").resolved(), quantizable_weights(folder))


def test_a_lost_expert_is_named(tiny_model, quantized, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_model("mixtral"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(QuantizationError, match=r"layers\.1\.block_sparse_moe\.experts\.3\.w2"):
        spec = VariantSpec(name="int8").resolved()
        quantize_checkpoint(folder, [spec], {"int8": tmp_path / "out"}, quantizable_weights(folder))


def test_routers_and_gates_lie_beside_experts():
    others = {"0.mlp.gate_proj.weight", "1.mlp.shared_expert.gate_proj.weight", "1.mlp.experts.0.gate_proj.weight"}
    beside = {"1.mlp.gate.weight", "1.mlp.shared_expert_gate.weight", "1.mlp.router.gate.weight"}
    assert gates({*others, *beside, "1.mlp.gate.bias"}) == beside
    assert gates(others - {"1.mlp.experts.0.gate_proj.weight"}) == set()
