"""int4 with some layers in eight bits: the same model in every loader."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config.schema import VariantSpec
from pipeline.errors import QuantizationError
from pipeline.inference.load import load
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.matrices import linear_weights
from pipeline.quantization.formats import stored_bytes, unpack
from pipeline.quantization.formats.torchao.format import INT8
from pipeline.quantization.roundings import rounding
from pipeline.quantization.writer import quantize_checkpoint
from tests.support.models import ARCHITECTURES

IDS = torch.arange(3, 90).unsqueeze(0)
EIGHT = ["*.down_proj", "model.layers.0.self_attn.v_proj"]


def in_eight(name: str) -> bool:
    return "down_proj" in name or "layers.0.self_attn.v_proj" in name


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


@pytest.mark.parametrize("embeddings", ["keep", "int8"])
@pytest.mark.parametrize("architecture", [kind for kind in ARCHITECTURES if kind != "gemma3_text"])
def test_every_loader_has_each_layer_in_its_bits(tiny_model, quantized, dequantized, architecture, embeddings):
    from torchao.quantization import Int4Tensor, Int8Tensor

    source = tiny_model(architecture)
    root = quantized(source, "int4", group_size=32, int8=EIGHT, embeddings=embeddings)
    stock = AutoModelForCausalLM.from_pretrained(root, subfolder="int4", dtype="auto")
    for name in linear_weights(source):
        assert isinstance(stock.get_parameter(name).data, Int8Tensor if in_eight(name) else Int4Tensor), name
    head = stock.get_output_embeddings().weight.data
    assert isinstance(head, Int8Tensor) == (embeddings == "int8")
    if embeddings == "int8":
        return
    expected = dequantized(source, "int4", group_size=32)
    original = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    for name in filter(in_eight, linear_weights(source)):
        weight = original.get_parameter(name).data
        expected.get_parameter(name).data = rounding("rtn").round(weight, INT8).dequantize(weight.dtype)
    ours = logits(load(root, "int4")[0])
    assert float((ours - logits(expected)).norm() / ours.norm()) < 0.03


def test_mixed_precision_with_kept_layers(tiny_model, quantized):
    from torchao.quantization import Int4Tensor, Int8Tensor

    root = quantized(tiny_model("llama"), "int4", int8=["*.down_proj"], keep=["*.o_proj"])
    stock = AutoModelForCausalLM.from_pretrained(root, subfolder="int4", dtype="auto")
    layer = stock.model.layers[1]
    kinds = [type(m.weight.data) for m in (layer.mlp.down_proj, layer.self_attn.o_proj, layer.mlp.up_proj)]
    assert kinds == [Int8Tensor, torch.Tensor, Int4Tensor]
    assert type(stock.get_output_embeddings().weight.data) is torch.Tensor


def test_mixed_precision_is_saved_as_stored(tiny_model, quantized, tmp_path):
    folder = quantized(tiny_model("llama"), "int4", int8=EIGHT) / "int4"
    load(folder)[0].save_pretrained(tmp_path)
    before, after = Checkpoint(folder), Checkpoint(tmp_path)
    assert before.keys() == after.keys() and all(torch.equal(before.read(name), after.read(name)) for name in before)


def test_written_configuration_names_the_eight_bit_layers(tiny_model, tmp_path):
    source = tiny_model("llama")
    spec = VariantSpec(name="int4", int8=["*.1.mlp.down_proj"], keep=["*.o_proj"]).resolved()
    made = quantize_checkpoint(source, [spec], {"int4": tmp_path}, linear_weights(source))["int4"]
    assert made.eight == ("model.layers.1.mlp.down_proj.weight",) and not set(made.eight) & made.group_sizes.keys()


def test_a_pattern_that_names_nothing_is_refused(tiny_model, tmp_path):
    source, spec = tiny_model("llama"), VariantSpec(name="int4", int8=["down_proj"]).resolved()
    with pytest.raises(QuantizationError, match=r"'int8' names 'down_proj', which no layer .* mean '\*down_proj'"):
        quantize_checkpoint(source, [spec], {"int4": tmp_path}, linear_weights(source))


@pytest.mark.parametrize("asked", [{"name": "int8"}, {"name": "gguf-q4_0"}, {"name": "int4", "packing": "tile_packed"}])
def test_only_int4_as_it_is_stored_by_default_takes_it(asked):
    with pytest.raises(ValueError, match="layers in 8 bits go with int4 in its plain packing"):
        VariantSpec(**asked, int8=["*"])


def test_layers_with_other_group_sizes_are_stored_loaded_and_counted_so(tiny_model, tmp_path):
    source = tiny_model("llama", intermediate_size=256)
    sizes = {"64": ["*.1.mlp.down_proj"], 128: ["model.layers.0.mlp.down_proj"]}
    spec = VariantSpec(name="int4", group_size=32, group_sizes=sizes).resolved()
    linear = linear_weights(source)
    made = quantize_checkpoint(source, [spec], {"int4": tmp_path}, linear)["int4"]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    used = {name: stock.get_parameter(name).data.block_size[1] for name in linear}
    fine = {name for name in linear if "down_proj" not in name}
    assert {name for name, size in used.items() if size == 32} == fine
    assert used["model.layers.0.mlp.down_proj.weight"] == 128 and used["model.layers.1.mlp.down_proj.weight"] == 64
    assert made.groups == {"128": 1, "32": len(fine), "64": 1} and not made.group_sizes
    expected = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    for name in linear:
        weight = expected.get_parameter(name)
        weight.data = unpack(stock.get_parameter(name).data)[0].dequantize(weight.dtype)
    ours = logits(load(tmp_path)[0])
    assert float((ours - logits(expected)).norm() / ours.norm()) < 0.03
    stored = sum(info.nbytes for info in Checkpoint(tmp_path).values())
    tensors = {name: (info.shape, info.dtype.itemsize) for name, info in Checkpoint(source).items()}
    assert stored == stored_bytes(spec, tensors, linear, ())


@pytest.mark.parametrize(
    "sizes, message",
    [({48: ["*"]}, "group_sizes 48: allowed are 32, 64"), ({32: ["no.such"]}, "'group_sizes' names 'no.such'")],
)
def test_group_sizes_that_cannot_be_are_refused(tiny_model, tmp_path, sizes, message):
    source = tiny_model("llama")
    with pytest.raises((ValueError, QuantizationError), match=message):
        spec = VariantSpec(name="int4", group_sizes=sizes).resolved()
        quantize_checkpoint(source, [spec], {"int4": tmp_path}, linear_weights(source))


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"name": "int8", "target": {"bits": 5}}, "target: int8, as it is packed, has the same bits in all layers"),
        ({"name": "int4", "packing": "tile_packed", "target": {"bits": 5}}, "Try: int4"),
        ({"name": "int4", "target": {"bits": 5, "rise": 0.1}}, "set exactly one of rise, size_mb, bits"),
        ({"name": "int4", "target": {}}, "set exactly one of"),
    ],
)
def test_target_that_cannot_be_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        VariantSpec(**asked)
