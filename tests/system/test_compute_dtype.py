"""The float32 compute type: no half-precision products of many rows, and the same results."""

import threading

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.evaluation import metrics
from pipeline.inference import kernels
from pipeline.inference.kernels import products
from pipeline.inference.kernels.float32_mode import Float32Products, quicken_products
from pipeline.inference.kernels.plain import PlainLinear, quicken_linears
from pipeline.inference.load import load
from pipeline.quantization.formats.torchao.format import INT8
from pipeline.system import hardware
from tests.support.compute_watch import BF16Products
from tests.support.grids import int4, int8, weight_on_grid
from tests.support.models import ARCHITECTURES, LOOKUP_EMBEDDINGS, random_text, relative_error

VARIANTS = {
    "bf16": None,
    "int8": {},
    "int8 in groups": {"group_size": 32},
    "int4": {},
    "int8 tables": {"embeddings": "int8"},
    "int8, a layer kept": {"keep": ["*.down_proj"]},
}
LOADED = [(a, k) for k in VARIANTS for a in (LOOKUP_EMBEDDINGS if k == "int8 tables" else ARCHITECTURES)]
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture
def float32(monkeypatch):
    """This machine computes in float32."""
    monkeypatch.setenv(hardware.COMPUTE_DTYPE, "float32")


def read_and_score(model) -> metrics.Scores:
    """Read a prompt, write after it, and score texts: all that inference multiplies."""
    ids = torch.arange(80).view(1, 80) % 250
    with torch.no_grad():
        out = model(ids, use_cache=True)
        model(ids[:, :1], past_key_values=out.past_key_values)
        model(ids[:, :40].expand(2, -1), attention_mask=(torch.arange(80).view(2, 40) > 7).long())
    return metrics.score(model, random_text())


@pytest.mark.parametrize("architecture, kind", LOADED)
def test_a_loaded_model_multiplies_no_many_rows_in_half_precision(
    float32, monkeypatch, tiny_model, quantized, architecture, kind
):
    source, spec, variant = tiny_model(architecture), VARIANTS[kind], kind[:4] if kind != "bf16" else None
    root = source if spec is None else quantized(source, variant, **spec)
    model, _ = load(root, variant)
    with BF16Products() as seen:
        scores = read_and_score(model)
    assert not seen.many_rows
    if kind != "int8 tables":  # of which nothing is left in half precision; elsewhere one token is multiplied as stored
        assert any(product.rows <= products.FEW_ROWS for product in seen.products)
    monkeypatch.setenv(hardware.COMPUTE_DTYPE, "bfloat16")
    with BF16Products() as seen:
        expected = metrics.score(load(root, variant)[0], random_text())
    assert seen.many_rows
    assert metrics.perplexity(scores).value == pytest.approx(metrics.perplexity(expected).value, rel=0.02)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("variant", [None, "int8", "int4"])
def test_models_of_other_types_are_loaded_and_scored(float32, tiny_model, quantized, variant, dtype):
    source = tiny_model("llama", dtype)
    model, _ = load(quantized(source, variant) if variant else source, variant)
    assert model.dtype == getattr(torch, dtype)
    with BF16Products() as seen:
        scores = read_and_score(model)
    assert not seen.many_rows and scores.hidden.dtype == model.dtype


@pytest.mark.parametrize("variant", [None, "int8", "int4"])
def test_an_offloaded_model_multiplies_no_many_rows_in_half_precision(float32, tiny_model, quantized, variant):
    source = tiny_model("gemma3_text")
    root = quantized(source, variant) if variant else source
    model, _ = load(root, variant, offload=True)
    with torch.no_grad(), BF16Products() as seen:
        model(torch.arange(80).view(1, 80))
        scores = metrics.score(model, random_text())
    assert not seen.many_rows
    whole = metrics.score(load(root, variant)[0], random_text())
    assert metrics.perplexity(scores).value == pytest.approx(metrics.perplexity(whole).value, rel=0.02)


SHAPE = {
    "vocab_size": 272, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["mixtral", "gemma2", "falcon", "bloom", "gpt_neox", "qwen2_moe", "gpt2", "phi"])
def test_architectures_of_every_kind_of_attention_and_experts(float32, kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE), dtype=torch.bfloat16).eval()
    model.requires_grad_(False)
    ids = torch.arange(120).view(2, 60) % 200 + 3
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    with torch.no_grad(), BF16Products() as seen:
        expected = model(ids, attention_mask=mask).logits
    assert seen.many_rows
    quicken_linears(model)
    quicken_products(model)
    with torch.no_grad(), BF16Products() as seen:
        logits = model(ids, attention_mask=mask).logits
    assert not seen.many_rows
    assert relative_error(logits[mask.bool()], expected[mask.bool()]) < 0.02


def test_a_model_leaves_the_mode_when_it_fails(float32, tiny_model):
    model, _ = load(tiny_model("llama"))
    with pytest.raises(IndexError):
        model(torch.full((1, 40), 10**6))
    x = torch.randn(40, 64).bfloat16()
    with BF16Products() as seen:
        x @ x.T
    assert seen.many_rows


@pytest.mark.parametrize("grid", [INT8, int8(), int4()], ids=["int8", "int8-32", "int4"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_packed_layers_lose_nothing_in_float32(float32, grid, dtype):
    weight = weight_on_grid(grid, 128, 256)
    x = torch.randn(100, 256).to(dtype)
    with BF16Products() as seen:
        result = kernels.linear(weight, None, torch.device("cpu"))._many(x)
    assert not seen.products
    limit = 2e-3 if dtype == torch.bfloat16 else 3e-4
    assert relative_error(result, x.double() @ weight.dequantize().double().T) < limit


def plain_layer(dtype: torch.dtype, bias: bool = True) -> torch.nn.Linear:
    layer = torch.nn.Linear(192, 160, bias=bias, dtype=dtype)
    quicken_linears(torch.nn.ModuleList([layer]))
    assert type(layer) is PlainLinear
    return layer.requires_grad_(False)


@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(192,), (1, 192), (3, 192), (2, 3, 192), (100, 192), (0, 192)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_an_ordinary_layer_computes_what_it_did(monkeypatch, compute, dtype, bias, shape):
    monkeypatch.setenv(hardware.COMPUTE_DTYPE, compute)
    monkeypatch.setattr(products, "BLOCK_ELEMENTS", 64 * 192)
    layer, x = plain_layer(dtype, bias), torch.randn(shape).to(dtype)
    expected = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    result = layer(x)
    assert result.dtype == dtype and result.shape == (*shape[:-1], 160) and torch.backends.mkldnn.enabled
    limit = {torch.float32: 1e-6, torch.float16: 1e-3}.get(dtype, 5e-3)
    assert not x.numel() or relative_error(result, expected) < limit


def test_an_ordinary_layer_is_saved_and_trained_as_it_was(float32):
    plain = torch.nn.Linear(64, 96, dtype=torch.bfloat16)
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    model = torch.nn.Sequential(plain)
    quicken_linears(model)
    assert model[0] is plain and isinstance(plain, torch.nn.Linear)
    assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in state.items())
    plain(torch.randn(40, 64).bfloat16()).sum().backward()
    assert plain.weight.grad.isfinite().all() and plain.weight.grad.any()


def test_single_rows_leave_the_libraries_of_other_threads_alone():
    layer, row, done = plain_layer(torch.bfloat16), torch.randn(1, 192).bfloat16(), threading.Event()

    def decode():
        while not done.is_set():
            layer(row)

    other = threading.Thread(target=decode)
    other.start()
    try:
        assert all(torch.backends.mkldnn.enabled for _ in range(20_000))
    finally:
        done.set()
        other.join()


def test_layers_of_other_kinds_stay_as_they_are(float32):
    class Own(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(Own(8, 8), torch.nn.Embedding(8, 8))
    quicken_linears(model)
    assert [type(layer) for layer in model] == [Own, torch.nn.Embedding]


def test_products_in_the_mode_have_gradients(float32):
    left, right = (torch.randn(40, 40, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    with Float32Products():
        left.matmul(right).sum().backward()
    assert relative_error(left.grad, right.detach().float().sum(1).expand(40, 40)) < 0.01
