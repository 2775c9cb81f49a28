"""int8-dynamic: torchao's computation, corrected only if torch is wrong."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config.schema import VariantSpec
from pipeline.errors import ModelError
from pipeline.inference import kernels
from pipeline.inference.kernels import rounded
from pipeline.inference.load import load

IDS = torch.tensor([[7, 100, 31, 64, 5, 5, 90, 12]])


@pytest.fixture(scope="module", params=[{}, {"embeddings": "int8"}], ids=["plain", "with embeddings in int8"])
def folder(request, tiny_model, quantized):
    return quantized(tiny_model("llama"), "int8-dynamic", **request.param) / "int8-dynamic"


@torch.no_grad()
def test_load_computes_what_the_stock_loader_does(folder):
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    kernels.quicken(stock)  # attention that is rounded otherwise gives the layers other inputs
    found, expected = load(folder)[0](IDS).logits.float(), stock(IDS).logits.float()
    assert (found - expected).norm() < 0.01 * expected.norm()  # of a head in int8 they round otherwise


@torch.no_grad()
def test_int8_products_are_corrected_where_torch_computes_them_wrongly(folder, dequantized, monkeypatch):
    """Test on any CPU the way for those without VNNI: near exact products, and near the numbers that codes mean."""
    monkeypatch.setattr(rounded, "int8_products_are_exact", lambda: False)
    found = load(folder)[0](IDS).logits.float()
    expected = dequantized(folder.parent, "int8-dynamic")(IDS).logits.float()
    assert (found - expected).norm() < 0.1 * expected.norm()
    monkeypatch.undo()
    if rounded.int8_products_are_exact():
        exact = load(folder)[0](IDS).logits.float()
        assert (found - exact).norm() < 0.05 * exact.norm()


def test_exactness_is_asked_of_the_largest_numbers():
    largest = torch.full((32, 64), 127, dtype=torch.int8)
    exact = torch.equal(torch._int_mm(largest, largest.T), largest.int() @ largest.int().T)
    assert rounded.int8_products_are_exact() == exact


@torch.no_grad()
def test_int8_dynamic_rounds_its_inputs(tiny_model, quantized):
    source = tiny_model("llama")
    both = [load(quantized(source, name) / name)[0](IDS).logits for name in ("int8", "int8-dynamic")]
    assert not torch.equal(*both)


def test_offloaded_int8_dynamic_is_not_measured_by_codes_alone(folder):
    with pytest.raises(ModelError, match="round their inputs") as caught:
        load(folder, offload=True)
    assert "\n" not in str(caught.value)


def test_int8_dynamic_has_no_groups():
    with pytest.raises(ValueError, match="int8-dynamic has no groups"):
        VariantSpec(name="int8-dynamic", group_size=64)
