"""Reading GGUF back: the names, order and values of the checkpoint."""

import json

import pytest
import torch

from pipeline.config.schema import VariantSpec
from pipeline.errors import CheckpointError, ModelError
from pipeline.evaluation import metrics
from pipeline.inference.load import load, load_dequantized
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.matrices import quantizable_weights, table_weights
from pipeline.quantization.formats.gguf.format import FORMAT as GGUF
from pipeline.quantization.formats.gguf.reader import GgufWeights
from pipeline.quantization.roundings import rounding
from pipeline.system import hardware
from tests.support.compute_watch import BF16Products
from tests.support.gguf_files import MODELS, TYPES
from tests.support.models import random_text

pytest.importorskip("gguf")
PLAIN = {"gguf-f16": torch.float16, "gguf-bf16": torch.bfloat16}


def read_back(path, source, dtype=torch.float32):
    return GgufWeights(path, Checkpoint(source), dtype)


def meaning(source, variant, **options):
    """Every tensor of a checkpoint in float32, as a variant has it."""
    spec, checkpoint = VariantSpec(name=variant, **options).resolved(), Checkpoint(source)
    linear, tables = quantizable_weights(source), table_weights(source) if spec.embeddings == "int8" else {}
    found = {}
    for name in checkpoint:
        weight = checkpoint.read(name).float()
        if name in tables:
            found[name] = rounding("rtn").round(weight, GGUF.TABLE).dequantize()
        elif name in linear and spec.rounding:
            found[name] = rounding(spec.rounding).round(weight, GGUF.grid(spec, weight.shape[1])).dequantize()
        else:
            found[name] = weight.to(PLAIN[variant]).float() if variant in PLAIN and weight.ndim == 2 else weight
    return found


@pytest.mark.parametrize("variant", TYPES)
@pytest.mark.parametrize("architecture", MODELS)
def test_every_tensor_of_every_type_comes_back(tiny_model, written, architecture, variant):
    source = tiny_model(architecture, **MODELS[architecture])
    found = read_back(written(source, variant), source)
    expected = meaning(source, variant)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        tensor = found.read(name)
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.allclose(tensor.float(), weight, rtol=0, atol=1e-7 if "norm" in name else 0), name


@pytest.mark.parametrize("variant", ["gguf-q4_k", "gguf-q5_k", "gguf-q6_k"])
def test_super_blocks_come_back_bit_for_bit(tiny_model, written, variant):
    source = tiny_model("llama", intermediate_size=512)  # hidden size 160, which is stored in another type
    found = read_back(written(source, variant, rounding="rtn"), source)
    for name, weight in meaning(source, variant, rounding="rtn").items():
        assert torch.equal(found.read(name).float(), weight) or "norm" in name, name


def test_the_model_is_whole_and_of_the_type_that_it_was_of(tiny_model, written):
    source = tiny_model("llama")
    model, tokenizer = load_dequantized(written(source, "gguf-bf16"), source)
    original, _ = load(source)
    assert model.dtype == torch.bfloat16 and tokenizer.chat_template
    for name, weight in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("variant", ["gguf-f16", "gguf-q8_0"])
def test_missing_dtype_comes_from_the_checkpoint(model_copy, written, variant, offload):
    config = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    path = written(model_copy, variant)
    assert load_dequantized(path, model_copy, offload=offload)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_model_computes_from_a_mapped_file(tiny_model, written, architecture):
    source, ids = tiny_model(architecture), torch.tensor([[7, 200, 31, 64, 5, 5, 90]])
    with torch.no_grad():
        whole, offloaded = (
            load_dequantized(written(source, "gguf-q4_0"), source, offload=offload)[0](ids).logits
            for offload in (False, True)
        )
    assert torch.allclose(whole, offloaded, atol=1e-2)


@pytest.mark.parametrize("offload", [False, True])
def test_no_half_precision_products_with_float32_compute_type(tiny_model, written, monkeypatch, offload):
    monkeypatch.setenv(hardware.COMPUTE_DTYPE, "float32")
    source = tiny_model("llama")
    model, _ = load_dequantized(written(source, "gguf-q8_0"), source, offload=offload)
    with BF16Products() as seen:
        metrics.score(model, random_text())
    assert not seen.many_rows


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999], ids=str)
def test_a_truncated_file_is_told_in_one_line(tiny_model, written, tmp_path, keep):
    source = tiny_model("llama")
    data, path = written(source, "gguf-q4_0").read_bytes(), tmp_path / "cut.gguf"
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError, match="cut.gguf: not a (whole )?GGUF file") as caught:
        read_back(path, source)
    assert "\n" not in str(caught.value)


def test_a_file_of_another_model_is_refused(tiny_model, written):
    tied, untied = tiny_model("qwen3"), tiny_model("qwen3", tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r"has no 'output\.weight'"):
        load_dequantized(written(tied, "gguf-q8_0"), untied)
    with pytest.raises(ModelError, match=r"Q8_0\.gguf: 'model\..*' is of \(.*, and of \("):
        load_dequantized(written(tied, "gguf-q8_0"), tiny_model("qwen3", hidden_size=64))
