"""Architectures: every decoder is quantized whole and read by transformers, or refused by name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config.schema import VariantSpec
from pipeline.errors import ModelError, QuantizationError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.matrices import linear_weights, refuse_other_matrices
from pipeline.quantization.writer import quantize_checkpoint

COMMON = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.1,
}  # fmt: skip
HANDLED = {  # and the layers of each block
    "qwen2": ({}, 7),  # biases of q, k and v
    "phi3": ({}, 4),  # qkv and gate_up in one tensor each
    "gpt_neox": ({}, 4),  # fused qkv with biases, an output head of another name
    "opt": ({"ffn_dim": 96, "word_embed_proj_dim": 64}, 6),  # biases everywhere, tied, learned positions
    "starcoder2": ({"use_bias": True}, 6),
}
REFUSED = {  # and the name that is said
    "gpt2": ({"n_embd": 64, "n_layer": 2, "n_head": 4}, r"transformer\.h\.0\.attn\.c_attn\.weight"),
    "gpt_oss": ({"num_local_experts": 4, "head_dim": 16}, r"model\.layers\.0\.mlp\.experts\.gate_up_proj"),
}
IDS = torch.tensor([[7, 100, 31, 64, 5, 5, 90, 12, 120, 33]])

STOCK_LOADER = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

ids, found = torch.tensor(json.loads(sys.argv[2])), {}
for name, folder in json.loads(sys.argv[1]).items():
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), (name, info)
    kinds = [type(m.weight.data).__name__ for m in model.modules() if isinstance(m, torch.nn.Linear)]
    found[f"{name}.quantized"] = torch.tensor(kinds.count("Int8Tensor") + kinds.count("Int4Tensor"))
    if "int8" in name:
        with torch.no_grad():
            found[name] = model(ids).logits.float()
save_file(found, sys.argv[3])
"""


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """`model_of("qwen2")`: the folder of a tiny random model of that architecture."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = {}

    def make(architecture):
        if architecture not in made:
            settings, _ = {**HANDLED, **REFUSED}[architecture]
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **{**COMMON, **settings}))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter.add_(torch.randn_like(parameter) * 0.1)
            made[architecture] = tmp_path_factory.mktemp(architecture)
            model.to(torch.bfloat16).save_pretrained(made[architecture])
        return made[architecture]

    return make


def quantize(source, folder, *variants):
    specs = [VariantSpec(name=variant).resolved() for variant in variants]
    output = {variant: folder / variant for variant in variants}
    return quantize_checkpoint(source, specs, output, linear_weights(source))


@pytest.fixture(scope="module")
def stock(model_of, tmp_path_factory):
    """What stock transformers finds in both variants of every architecture, in a fresh process."""
    folder, jobs = tmp_path_factory.mktemp("stock"), {}
    for architecture in HANDLED:
        quantize(model_of(architecture), folder / architecture, "int8", "int4")
        for variant in ("int8", "int4"):
            jobs[f"{architecture}.{variant}"] = str(folder / architecture / variant)
    command = [sys.executable, "-I", "-c", STOCK_LOADER, json.dumps(jobs), json.dumps(IDS.tolist())]
    done = subprocess.run([*command, str(folder / "found")], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "found")


@pytest.mark.parametrize("variant", ["int8", "int4"])
@pytest.mark.parametrize("architecture", HANDLED)
def test_stock_transformers_finds_every_linear_layer_quantized(stock, architecture, variant):
    _, layers = HANDLED[architecture]
    assert stock[f"{architecture}.{variant}.quantized"] == 2 * layers


@pytest.mark.parametrize("architecture", HANDLED)
def test_stock_transformers_computes_what_the_codes_mean(stock, model_of, dequantized, architecture):
    refuse_other_matrices(model_of(architecture))
    with torch.no_grad():
        expected = dequantized(model_of(architecture), "int8")(IDS).logits.float()
    found = stock[f"{architecture}.int8"]
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("architecture", HANDLED)
def test_what_the_loader_packs_computes_what_the_int4_codes_mean(model_of, dequantized, tmp_path, architecture):
    from transformers import AutoModelForCausalLM

    from pipeline.inference.load import pack

    quantize(model_of(architecture), tmp_path, "int4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "int4", dtype="auto").eval()
    pack(model, torch.device("cpu"))
    with torch.no_grad():
        found = model(IDS).logits.float()
        expected = dequantized(model_of(architecture), "int4")(IDS).logits.float()
    assert (found - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("architecture", REFUSED)
def test_matrices_that_are_no_linear_layers_are_refused_by_name(model_of, architecture):
    _, name = REFUSED[architecture]
    with pytest.raises(ModelError, match=name) as caught:
        refuse_other_matrices(model_of(architecture))
    assert "\n" not in str(caught.value)


@pytest.fixture
def stored(model_of, tmp_path):
    """`stored(change)`: a folder with a tiny Qwen2 whose tensors went through `change`."""
    from safetensors.torch import save_file

    def save(change) -> Path:
        source = model_of("qwen2")
        (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
        save_file(change(load_file(source / "model.safetensors")), tmp_path / "model.safetensors", {"format": "pt"})
        return tmp_path

    return save


def test_a_checkpoint_with_other_names_than_the_modules_is_refused_by_name(stored):
    folder = stored(lambda tensors: {name.replace("layers", "blocks"): tensor for name, tensor in tensors.items()})
    with pytest.raises(ModelError, match=r"has no 'model\.layers\.0\.input_layernorm\.weight'"):
        quantize(folder, folder / "out", "int8")
    assert not (folder / "out").exists()


def test_weights_that_are_not_of_a_full_precision_type_are_refused_by_name(stored):
    name = "model.layers.1.mlp.up_proj.weight"
    folder = stored(lambda tensors: tensors | {name: tensors[name].to(torch.float8_e4m3fn)})
    with pytest.raises(QuantizationError, match=f"{name}: stored as float8_e4m3fn"):
        quantize(folder, folder / "out", "int8")
    assert not (folder / "out").exists()


def test_biases_and_tied_weights_keep_their_bytes(model_of, tmp_path):
    for architecture in ("qwen2", "opt"):
        source = model_of(architecture)
        quantize(source, tmp_path / architecture, "int4")
        before, after = Checkpoint(source), Checkpoint(tmp_path / architecture / "int4")
        plain = [name for name in before if name not in linear_weights(source)]
        assert any("bias" in name for name in plain) and set(plain) <= set(after)
        assert all(torch.equal(before.read(name), after.read(name)) for name in plain)
