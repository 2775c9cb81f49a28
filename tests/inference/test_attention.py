"""Attention on a CPU: the same result as transformers for every shape and mask."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pipeline.inference.kernels import attention
from pipeline.inference.load import load
from tests.support.models import ARCHITECTURES, write_tokenizer


class Layer(torch.nn.Module):
    is_causal = True

    def __init__(self, groups: int):
        super().__init__()
        self.num_key_value_groups = groups


def inputs(heads: int, shared: int, tokens: int, length: int, dtype: torch.dtype, batch: int = 2):
    generator = torch.Generator().manual_seed(heads * tokens + length)
    shapes = (batch, heads, tokens, 16), (batch, heads // shared, length, 16), (batch, heads // shared, length, 16)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def check(groups: int, query, key, value, mask, **options) -> None:
    layer = Layer(groups)
    ours, _ = attention.attend(layer, query, key, value, mask, scaling=0.3, **options)
    theirs, _ = sdpa_attention_forward(layer, query, key, value, mask, scaling=0.3, **options)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.is_contiguous()
    tolerance = 1e-5 if query.dtype == torch.float32 else 2e-2
    assert float((ours - theirs).abs().max()) < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shared", [1, 2, 8])
@pytest.mark.parametrize("tokens, length", [(1, 1), (1, 40), (5, 5), (127, 127), (128, 128), (300, 300), (3, 40)])
def test_with_and_without_a_past(dtype, shared, tokens, length):
    mask = None
    if tokens not in (1, length):
        mask = torch.ones(tokens, length, dtype=torch.bool).tril(length - tokens)[None, None]
    check(shared, *inputs(8, shared, tokens, length, dtype), mask)


@pytest.mark.parametrize("shared", [1, 4])
@pytest.mark.parametrize("tokens", [1, 30])
@pytest.mark.parametrize("kind", ["padding", "added", "of each head"])
def test_with_a_mask(shared, tokens, kind):
    mask = torch.ones(2, 1, tokens, 30, dtype=torch.bool).tril(30 - tokens)
    mask[1, :, :, :7] = False
    mask[1, :, :, 7] = True  # every position sees something
    if kind == "added":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -1e9)
    if kind == "of each head":
        mask = mask.repeat(1, 8, 1, 1)
        mask[:, 3, :, 10:20] = False
    check(shared, *inputs(8, shared, tokens, 30, torch.float32), mask)


def test_non_causal_attention_stays_non_causal():
    check(4, *inputs(8, 4, 20, 20, torch.float32), None, is_causal=False)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padded_batches_write_what_they_write_with_transformers_own(tiny_model, architecture):
    folder = tiny_model(architecture, "float32")
    ours, tokenizer = load(folder)
    assert ours.config._attn_implementation == attention.NAME
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer.padding_side = "left"
    batch = tokenizer(["Tell me about the sea, and ships", "Why?"], return_tensors="pt", padding=True)
    written = [m.generate(**batch, max_new_tokens=12, do_sample=False) for m in (ours, theirs)]
    assert torch.equal(*written)


def test_attention_choice_is_not_saved(tiny_model, tmp_path):
    load(tiny_model("llama"))[0].save_pretrained(tmp_path)
    assert "attn" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("kind", attention.MODELS)
def test_fused_attention_keeps_the_logits_of_every_model(kind, tmp_path):
    from transformers import AutoConfig

    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"head_dim": 16, "num_hidden_layers": 4, "vocab_size": 160, "sliding_window": 16, "pad_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **shape, **more, max_position_embeddings=256)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    ours, _ = load(tmp_path)
    assert ours.config._attn_implementation == attention.NAME
    ids = torch.arange(80).view(2, 40) % 150 + 3
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    with torch.no_grad():
        for given in (None, mask):
            a, b = (model(ids, attention_mask=given).logits for model in (ours, theirs))
            counted = slice(None) if given is None else given.bool()
            assert torch.allclose(a[counted], b[counted], atol=1e-4)
    written = [m.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False) for m in (ours, theirs)]
    assert torch.equal(*written)


def test_a_model_that_looks_for_the_name_keeps_it(tmp_path):
    from transformers import AutoConfig

    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 160}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", num_hidden_layers=1, **shape))
    attention.quicken_attention(model)
    assert model.config._attn_implementation == "sdpa"
