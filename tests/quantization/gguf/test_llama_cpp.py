"""GGUF in llama.cpp: every type and architecture computes the logits of transformers."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.schema import VariantSpec
from pipeline.errors import ModelError, QuantizationError
from pipeline.inference import llama_cpp
from pipeline.inference.load import load_dequantized
from pipeline.models.checkpoint import SINGLE_NAME, Checkpoint
from pipeline.models.gguf_metadata import read_header
from pipeline.quantization.formats.gguf.format import FORMAT as GGUF
from pipeline.quantization.formats.gguf.names import ARCHITECTURES, BIASES
from tests.support.gguf_files import IDS, MODELS, OFF, OFF_QUANTIZED, TYPES, expected_logits
from tests.support.models import MIXTURES, relative_error

ROPES = {
    "llama3": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128},
}  # fmt: skip


@pytest.mark.parametrize("variant", TYPES)
@pytest.mark.parametrize("architecture", MODELS)
def test_llama_cpp_computes_the_logits_of_transformers(tiny_model, written, logits, architecture, variant):
    source = tiny_model(architecture, **MODELS[architecture])
    found, expected = logits(written(source, variant), IDS), expected_logits(source, variant)
    if architecture in MIXTURES:
        found, expected = _alike(found, expected)
    assert relative_error(found, expected) < OFF.get(variant, OFF_QUANTIZED)
    if variant == "gguf-f16":
        assert (found - expected).abs().max() < 1e-2


def _alike(found, expected):
    """Return the tokens that agree; rounded inputs send some to another expert, if the router is undecided."""
    alike = (found - expected).norm(dim=1) < OFF_QUANTIZED * expected.norm(dim=1)
    assert alike.sum() > 0.6 * len(alike)
    return found[alike], expected[alike]


def test_experts_in_super_blocks_are_computed_as_well(tiny_model, written, logits):
    source = tiny_model("mixtral", hidden_size=256, intermediate_size=256)
    ids = IDS[:8]  # so few that no router is undecided
    found, expected = logits(written(source, "gguf-q4_k"), ids), expected_logits(source, "gguf-q4_k", ids)
    assert relative_error(found, expected) < OFF_QUANTIZED
    tensors = read_header(written(source, "gguf-q4_k_m")).tensors
    types = {tensor.kind for name, tensor in tensors.items() if "exps" in name}
    assert types == {"Q4_K", "Q6_K"}


@pytest.mark.parametrize("variant", ["gguf-q4_k", "gguf-q5_k", "gguf-q6_k"])
def test_llama_cpp_computes_with_super_blocks(tiny_model, written, logits, variant):
    source, how = tiny_model("llama", hidden_size=256, intermediate_size=512), {"rounding": "search"}
    found, expected = logits(written(source, variant, **how), IDS), expected_logits(source, variant, **how)
    assert relative_error(found, expected) < OFF_QUANTIZED


def test_shares_of_experts_that_do_not_sum_to_one_are_not_scaled(tiny_model, written, logits):
    source = tiny_model("olmoe")
    assert relative_error(logits(written(source, "gguf-f16"), IDS), expected_logits(source)) < OFF["gguf-f16"]


@pytest.mark.parametrize(
    "architecture, changes, said",
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is False; llama.cpp computes with True"),
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob is True; llama.cpp computes with False"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ("olmoe", {"num_key_value_heads": 2}, "as many key heads as query heads"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "has layers without experts"),
    ],
)
def test_mixtures_that_llama_cpp_computes_otherwise_are_refused(tiny_model, architecture, changes, said):
    with pytest.raises(ModelError, match=said):
        GGUF.check(VariantSpec(name="gguf-q8_0").resolved(), tiny_model(architecture, **changes))


def test_experts_are_one_stack_and_their_router_is_exact(tiny_model, written):
    from gguf import GGUFReader

    tensors = {tensor.name: tensor for tensor in GGUFReader(written(tiny_model("mixtral"), "gguf-q4_0")).tensors}
    router, stack = tensors["blk.1.ffn_gate_inp.weight"], tensors["blk.1.ffn_down_exps.weight"]
    assert (router.tensor_type.name, list(router.shape)) == ("F32", [96, 4])
    assert (stack.tensor_type.name, list(stack.shape)) == ("Q4_0", [160, 96, 4])


def test_experts_of_a_stack_cannot_differ_in_type(tiny_model, written):
    with pytest.raises(QuantizationError, match=r"experts\.2\.w2.* which one stack cannot hold"):
        written(tiny_model("mixtral"), "gguf-q4_0", keep=["*.experts.2.w2"])
    kinds = written(tiny_model("mixtral"), "gguf-q4_0", keep=["*.experts.*"])
    assert kinds.is_file()


@pytest.mark.parametrize("variant", ["gguf-f16", "gguf-q4_1"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_untied_output_head_is_stored(tiny_model, written, logits, architecture, variant, tied):
    source = tiny_model(architecture, **MODELS[architecture], tie_word_embeddings=tied)
    path = written(source, variant)
    assert (b"output.weight" in path.read_bytes().replace(b"attn_output.weight", b"")) != tied
    assert relative_error(logits(path, IDS), expected_logits(source, variant)) < OFF.get(variant, OFF_QUANTIZED)


@pytest.fixture(scope="module")
def both(tiny_model, tmp_path_factory):
    """A model whose configuration ties the head to the embedding, and whose checkpoint has another head."""
    folder = shutil.copytree(
        tiny_model("qwen3", hidden_size=256, intermediate_size=512), tmp_path_factory.mktemp("both") / "model"
    )
    tensors = load_file(folder / SINGLE_NAME)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, folder / SINGLE_NAME, {"format": "pt"})
    return folder


@pytest.mark.parametrize("variant", ["gguf-f16", "gguf-q8_0", "gguf-q4_k_m"])
def test_a_head_that_is_stored_beside_the_embedding_is_the_head_whatever_the_configuration_says(
    both, written, logits, variant
):
    path, ids = written(both, variant), torch.tensor([IDS])
    found, expected = logits(path, IDS), expected_logits(both)
    assert relative_error(found, expected) < (0.3 if variant == "gguf-q4_k_m" else OFF_QUANTIZED)
    for offload in (False, True):
        with torch.no_grad():
            assert relative_error(load_dequantized(path, both, offload=offload)[0](ids).logits[0].float(), found) < 0.05


def test_a_stored_head_is_quantized_as_the_embedding_is(both, written):
    from gguf import GGUFReader

    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(written(both, "gguf-q4_0")).tensors}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"


@pytest.mark.parametrize("options", [{"rounding": "hqq"}, {"rounding": "rtn"}, {"embeddings": "keep"}], ids=str)
def test_other_roundings_and_plain_embeddings_are_read_as_well(tiny_model, written, logits, options):
    source = tiny_model("llama")
    found = logits(written(source, "gguf-q4_1", **options), IDS)
    assert relative_error(found, expected_logits(source, "gguf-q4_1", **options)) < OFF_QUANTIZED


def test_layers_that_are_kept_stay_as_they_are(tiny_model, written):
    from gguf import GGUFReader

    path = written(tiny_model("llama"), "gguf-q4_0", keep=["*.down_proj"])
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
    assert kinds["blk.1.ffn_down.weight"] == "BF16" and kinds["blk.1.ffn_up.weight"] == "Q4_0"
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == kinds["blk.0.attn_q.bias"] == "F32"


@pytest.mark.parametrize(
    "architecture, rope",
    [("llama", "llama3"), *((a, r) for a in ("llama", "qwen3") for r in ("linear", "yarn"))],
)
def test_scaled_rotary_embeddings_are_scaled_alike(tiny_model, written, logits, architecture, rope):
    source = tiny_model(architecture, **MODELS[architecture], rope_parameters=ROPES[rope])
    plain = expected_logits(tiny_model(architecture, **MODELS[architecture]))
    found, expected = logits(written(source, "gguf-f16"), IDS), expected_logits(source)
    assert relative_error(plain, expected) > 0.02  # or nothing is seen of the scaling
    assert relative_error(found, expected) < OFF["gguf-f16"]


def test_gemmas_two_rotary_bases_are_both_stored(tiny_model, written, logits):
    both = {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    }
    source = tiny_model("gemma3_text", rope_parameters=both)
    assert relative_error(logits(written(source, "gguf-f16"), IDS), expected_logits(source)) < OFF["gguf-f16"]


def with_biases(folder, *layers):
    """Biases in a checkpoint that had none in these layers."""
    tensors = load_file(folder / SINGLE_NAME)
    for name in [name for name in tensors if name.endswith(tuple(f"{layer}.weight" for layer in layers))]:
        tensors[name.replace("weight", "bias")] = tensors[name][:, 0].clone()
    save_file(tensors, folder / SINGLE_NAME, {"format": "pt"})


@pytest.mark.parametrize("architecture", MODELS)
def test_the_biases_that_are_written_are_those_that_llama_cpp_loads(tiny_model, written, tmp_path, architecture):
    pytest.importorskip("llama_cpp")
    original, loaded = tiny_model(architecture, **MODELS[architecture]), ARCHITECTURES[architecture].biases
    source = shutil.copytree(original, tmp_path / "loaded")
    with_biases(source, *loaded)
    llama_cpp.check(written(source, "gguf-f16"))
    there = {name.rsplit(".", 2)[-2] for name in Checkpoint(original)}
    for layer in there & {layer for layers in BIASES.values() for layer in layers} - set(loaded):
        source = shutil.copytree(original, tmp_path / layer)
        with_biases(source, layer)
        with pytest.raises(QuantizationError, match=rf"{layer}\.bias: llama\.cpp knows no such tensor"):
            written(source, "gguf-f16")


def test_biases_of_the_mlp_are_computed_with(tiny_model, written, logits):
    source = tiny_model("llama", mlp_bias=True)
    assert relative_error(logits(written(source, "gguf-f16"), IDS), expected_logits(source)) < OFF["gguf-f16"]


REFUSED = [
    ("smollm3", {"num_hidden_layers": 2, "no_rope_layer_interval": 2}, "no_rope_layers"),
    ("gemma3_text", {"query_pre_attn_scalar": 48}, "query_pre_attn_scalar is 48"),
    ("gemma3_text", {"layer_types": ["full_attention", "full_attention"]}, "layer_types: every layer is a full one"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "sliding window"),
    ("llama", {"hidden_act": "gelu"}, "activation is gelu"),
    ("qwen3", {"rope_parameters": ROPES["llama3"]}, "rope_parameters: llama3"),
    ("qwen3", {"rope_parameters": ROPES["yarn"] | {"truncate": False}}, "rope_parameters: yarn as it is set here"),
    ("smollm3", {**MODELS["smollm3"], "mlp_bias": True}, "mlp_bias: .* the bias of gate_proj in smollm3"),
    *((a, {**MODELS[a], "attention_bias": True}, f"attention_bias: .* the bias of o_proj in {n}")
      for a, n in (("smollm3", "smollm3"), ("qwen3", "qwen3"), ("gemma3_text", "gemma3"))),
]  # fmt: skip


@pytest.mark.parametrize(
    "architecture, changes, message", REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_architecture_that_llama_cpp_computes_differently_is_refused(tiny_model, architecture, changes, message):
    source = tiny_model(architecture, **changes)
    with pytest.raises(ModelError, match=message) as caught:
        GGUF.check(VariantSpec(name="gguf-f16"), source)
    assert str(source) in str(caught.value) and "\n" not in str(caught.value)
