"""float8 as tensors of torchao: the files, headers and settings that torchao and transformers write themselves."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config.schema import VariantSpec
from pipeline.inference.load import load
from pipeline.models.checkpoint import SINGLE_NAME, Checkpoint
from pipeline.models.matrices import linear_weights
from pipeline.quantization.formats import format_of, stored_bytes, stored_weights
from pipeline.quantization.formats.torchao.float8 import FLOAT8
from pipeline.quantization.roundings import rounding
from tests.support.checkpoints import assert_same_headers

IDS = torch.tensor([[7, 200, 31, 64, 5, 5, 90, 12, 250, 33, 2, 149]])
NAMES = ("fp8-weight", "fp8")


def spec_of(name: str) -> VariantSpec:
    return VariantSpec(name=name, packing="torchao").resolved()


def settings(name: str):
    """Return torchao's settings for a variant."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Float8WeightOnlyConfig, PerRow

    dynamic = name == "fp8"
    return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()) if dynamic else Float8WeightOnlyConfig()


@pytest.mark.parametrize("kept", [[], ["a"]], ids=["all", "one kept"])
@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_is_what_transformers_writes(name, kept, tiny_model):
    from transformers import TorchAoConfig

    expected = TorchAoConfig(settings(name), modules_to_not_convert=["lm_head", *kept] if kept else None)
    found = format_of(spec_of(name)).quantization_config(spec_of(name), kept, [], [], {}, tiny_model("llama"))
    assert json.dumps(found, sort_keys=True) == json.dumps(expected.to_dict(), sort_keys=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_the_headers_metadata_is_what_torchaos_encoder_writes(name, dtype):
    from torchao.prototype.safetensors.safetensors_utils import TensorSubclassAttributeJSONEncoder
    from torchao.quantization import Float8Tensor
    from torchao.quantization.quantize_.workflows.float8.float8_tensor import QuantizeTensorToFloat8Kwargs

    grids = {"layer.weight": ((96, 128), FLOAT8)}
    found = format_of(spec_of(name)).metadata(spec_of(name), grids, ["norm.weight"], dict.fromkeys(grids, dtype), ())
    dynamic = name == "fp8"
    weight = Float8Tensor(
        torch.empty(96, 128, dtype=torch.float8_e4m3fn, device="meta"),
        torch.empty(96, 1, device="meta"),
        [1, 128],
        mm_config=settings(name).mm_config if dynamic else None,
        act_quant_kwargs=QuantizeTensorToFloat8Kwargs() if dynamic else None,
        dtype=dtype,
    )
    for key, entry in {"norm.weight": {"_type": "Tensor"}, "layer.weight": weight}.items():
        assert found[key] == json.dumps(entry, cls=TensorSubclassAttributeJSONEncoder)
    assert sorted(json.loads(found["tensor_names"])) == ["layer.weight", "norm.weight"]


@pytest.mark.parametrize("architecture, dtype", [("llama", "bfloat16"), ("llama", "float32"), ("qwen3", "bfloat16")])
def test_the_folder_is_what_transformers_saves_itself(tiny_model, quantized, tmp_path, architecture, dtype):
    from transformers import AutoModelForCausalLM, TorchAoConfig

    source = tiny_model(architecture, dtype)
    asked = TorchAoConfig(settings("fp8-weight"))
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", quantization_config=asked)
    model.save_pretrained(tmp_path)
    ours = quantized(source, "fp8-weight", packing="torchao") / "fp8-weight"
    a, b = load_file(ours / SINGLE_NAME), load_file(tmp_path / SINGLE_NAME)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))
    assert_same_headers(ours, tmp_path)


@pytest.mark.parametrize("shard_bytes", [10**9, 60_000], ids=["one file", "shards"])
@pytest.mark.parametrize("name", NAMES)
def test_stock_transformers_and_ours_compute_what_the_codes_say(tiny_model, quantized, name, shard_bytes):
    from torchao.quantization import Float8Tensor
    from transformers import AutoModelForCausalLM

    root = quantized(tiny_model("llama"), name, packing="torchao", shard_bytes=shard_bytes)
    checkpoint, linear = Checkpoint(root / name), linear_weights(root)
    forms = stored_weights(checkpoint)
    assert forms.keys() == linear.keys()
    plain = AutoModelForCausalLM.from_pretrained(root, dtype="auto")
    for weight, form in forms.items():
        codes = form.read(checkpoint, weight, linear[weight])
        assert torch.equal(codes.dequantize(), rounding("rtn").round(plain.get_parameter(weight), FLOAT8).dequantize())
        plain.get_parameter(weight).data = codes.dequantize(torch.bfloat16)
    stock = AutoModelForCausalLM.from_pretrained(root / name, dtype="auto")
    assert all(isinstance(stock.get_parameter(weight).data, Float8Tensor) for weight in linear)
    ours = load(root / name, device="cpu")[0]
    with torch.no_grad():
        expected, found, loaded = (model(IDS).logits.float() for model in (plain, stock, ours))
    assert (found - expected).norm() / expected.norm() < (0.15 if name == "fp8" else 0.03)
    assert (loaded - found).norm() / found.norm() < 0.03


@pytest.mark.parametrize("name", NAMES)
def test_planned_bytes_are_those_of_the_files(tiny_model, quantized, name):
    root = quantized(tiny_model("llama"), name, packing="torchao")
    tensors = {key: (info.shape, 2.0) for key, info in Checkpoint(root).items()}
    assert stored_bytes(spec_of(name), tensors, linear_weights(root), ()) == Checkpoint(root / name).nbytes
