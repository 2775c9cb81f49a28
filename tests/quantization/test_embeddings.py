"""`embeddings: int8`: one byte a weight, ties kept, and the same model in every loader."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config.schema import VariantSpec
from pipeline.errors import ModelError, QuantizationError
from pipeline.evaluation import metrics
from pipeline.inference import output_head
from pipeline.inference.kernels.plain import PlainLinear
from pipeline.inference.kernels.table import Int8Embedding
from pipeline.inference.load import _load_stock, load
from pipeline.models.checkpoint import SINGLE_NAME, Checkpoint
from pipeline.models.matrices import linear_weights, table_weights
from pipeline.quantization.formats.torchao.format import INT8
from pipeline.quantization.roundings import rounding
from pipeline.quantization.writer import quantize_checkpoint, unfit
from tests.support.models import ARCHITECTURES, relative_error

PLAIN = [kind for kind in ARCHITECTURES if kind != "gemma3_text"]  # whose embedding only looks up

IDS = torch.arange(3, 90).unsqueeze(0)
MADE = [("int8", {}), ("int8", {"group_size": 32}), ("int4", {})]
NAMES = ["int8", "int8-32", "int4"]
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


@pytest.fixture
def release(tiny_model, quantized):
    def make(variant: str, options: dict, tied: bool = True, architecture: str = "llama", embeddings: str = "int8"):
        source = tiny_model(architecture, tie_word_embeddings=tied)
        return quantized(source, variant, embeddings=embeddings, **options)

    return make


@TIED
@pytest.mark.parametrize("variant, options", MADE, ids=NAMES)
def test_int8_tables_shrink_the_file(release, variant, options, tied):
    kept, small = (Checkpoint(release(variant, options, tied, embeddings=how) / variant) for how in ("keep", "int8"))
    tables = table_weights(release(variant, options, tied))
    assert len(tables) == (1 if tied else 2)
    rows, width = next(iter(tables.values()))
    assert kept.nbytes - small.nbytes == len(tables) * (2 * rows * width - rows * (width + 4 + 1))


@TIED
@pytest.mark.parametrize("variant, options", MADE, ids=NAMES)
@pytest.mark.parametrize("architecture", PLAIN)
def test_int8_embeddings_compute_their_dequantized_values(release, dequantized, architecture, variant, options, tied):
    root = release(variant, options, tied, architecture)
    model, _ = load(root, variant)
    assert isinstance(model.get_input_embeddings(), Int8Embedding)
    assert type(model.get_output_embeddings()).__name__ == "Int8Linear"
    expected = dequantized(root, variant, **options)
    for name in table_weights(root):
        weight = expected.get_parameter(name)
        weight.data = rounding("rtn").round(weight.data, INT8).dequantize(weight.dtype)
    assert relative_error(logits(model), logits(expected)) < 0.03
    with torch.no_grad():
        looked_up = model.get_input_embeddings()(IDS), expected.get_input_embeddings()(IDS)
    assert torch.equal(*looked_up)


@TIED
@pytest.mark.parametrize("variant, options", MADE, ids=NAMES)
def test_transformers_keeps_the_tied_embeddings(release, variant, options, tied):
    from torchao.quantization import Int8Tensor

    root = release(variant, options, tied)
    model = AutoModelForCausalLM.from_pretrained(root, subfolder=variant, dtype="auto")
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert isinstance(table.data, Int8Tensor) and isinstance(head.data, Int8Tensor) and (table is head) == tied
    if variant == "int8":  # which stock torchao computes with on a CPU
        assert relative_error(logits(model), logits(load(root, variant)[0])) < 0.03


@TIED
@pytest.mark.parametrize("variant, options", MADE, ids=NAMES)
@pytest.mark.parametrize("way", ["assembled", "stock"])
def test_loaded_embeddings_are_saved_as_portable(release, tmp_path, variant, options, tied, way):
    folder = release(variant, options, tied) / variant
    if way == "assembled":
        load(folder)[0].save_pretrained(tmp_path)
        before, after = Checkpoint(folder), Checkpoint(tmp_path)
        assert before.keys() == after.keys()
        assert all(torch.equal(before.read(name), after.read(name)) for name in before)
    else:  # packed after the stock loader: what state dicts hold is the same
        states = [m.state_dict() for m in (load(folder)[0], _load_stock(folder, torch.device("cpu")))]
        assert states[0].keys() == states[1].keys()


def test_a_head_without_a_kernel_is_saved_as_it_was_stored(tiny_model, quantized, tmp_path):
    source = tiny_model("llama", hidden_size=72, num_attention_heads=2, head_dim=36, intermediate_size=72)
    folder = quantized(source, "int8", embeddings="int8") / "int8"
    model, _ = load(folder)
    assert type(model.get_output_embeddings()) is PlainLinear
    model.save_pretrained(tmp_path)
    before, after = Checkpoint(folder), Checkpoint(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before.read(name), after.read(name)) for name in before)


@TIED
def test_output_matrix_is_found_for_measuring(release, tied):
    from tests.support.models import random_text

    model, _ = load(release("int8", {}, tied), "int8")
    name = sorted(table_weights(release("int8", {}, tied)))[0 if not tied else -1]
    stored = Checkpoint(release("int8", {}, tied)).read(name)
    assert torch.equal(output_head.head_matrix(model).dequantize(), rounding("rtn").round(stored, INT8).dequantize())
    assert len(metrics.score(model, random_text()).nll) > 0


def test_a_tied_table_that_is_stored_twice_is_refused_by_name(tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(tiny_model("llama", tie_word_embeddings=True), tmp_path / "model"))
    tensors = load_file(model / SINGLE_NAME)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / SINGLE_NAME)
    spec, tables = VariantSpec(name="int8", embeddings="int8").resolved(), table_weights(model)
    with pytest.raises(QuantizationError, match="lm_head.weight: of the embedding's shape"):
        quantize_checkpoint(model, [spec], {"int8": tmp_path / "out"}, linear_weights(model), tables=tables)
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("name, options", [("int8", {}), ("int4", {}), ("int4", {"packing": "tile_packed"})])
def test_an_embedding_that_does_more_than_look_up_is_refused_by_name(tiny_model, tmp_path, name, options):
    source, spec = tiny_model("gemma3_text"), VariantSpec(name=name, embeddings="int8", **options).resolved()
    linear, tables = linear_weights(source), table_weights(source)
    message = "cannot load a Gemma3TextScaledWordEmbedding in int8; use embeddings: keep"
    assert message in unfit(spec, linear, source)
    with pytest.raises(ModelError, match=message):
        quantize_checkpoint(source, [spec], {name: tmp_path / "out"}, linear, tables=tables)
    assert not (tmp_path / "out").exists()
    kept = spec.model_copy(update={"embeddings": "keep"})
    assert (
        unfit(kept, linear, source) is None and unfit(VariantSpec(name="gguf-q8_0").resolved(), linear, source) is None
    )
