"""`load`: a model that computes the published numbers, or one line with the reason."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import ModelError
from pipeline.inference import kernels
from pipeline.inference import load as loading
from pipeline.inference.assemble import assemble
from pipeline.inference.load import load, locate
from pipeline.models.checkpoint import SINGLE_NAME, Checkpoint
from tests.support.models import ARCHITECTURES, relative_error

PROMPT = "Tell me about the sea, and about ships."
VARIANTS = ("int8", "int4")


def logits(model, tokenizer, repeat: int = 1) -> torch.Tensor:
    ids = torch.tensor([tokenizer(PROMPT * repeat)["input_ids"]])
    with torch.no_grad():
        return model(ids).logits.float()


def layer_types(model) -> set[str]:
    return {type(m).__name__ for n, m in model.named_modules() if n.endswith("_proj")}


@pytest.mark.parametrize("repeat", [1, 4], ids=["short", "long"])
@pytest.mark.parametrize("variant, kind", [("int8", "Int8Linear"), ("int4", "Int4Linear")])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loaded_variant_computes_its_dequantized_weights(
    tiny_model, quantized, dequantized, architecture, variant, kind, repeat
):
    source = tiny_model(architecture)
    model, tokenizer = load(quantized(source, variant), variant)
    assert layer_types(model) == {kind}
    expected = logits(dequantized(source, variant), tokenizer, repeat)
    assert relative_error(logits(model, tokenizer, repeat), expected) < 0.03
    # Far nearer to the numbers in the files than those are to the original.
    assert relative_error(expected, logits(load(source)[0], tokenizer, repeat)) > 0.03 or variant == "int8"


@pytest.mark.parametrize("variant", VARIANTS)
def test_loaded_variant_is_exact_in_float32(tiny_model, quantized, dequantized, variant):
    source = tiny_model("llama", "float32")
    model, tokenizer = load(quantized(source, variant), variant)
    assert relative_error(logits(model, tokenizer), logits(dequantized(source, variant), tokenizer)) < 1e-4


def test_the_root_is_the_full_precision_model_itself(any_model):
    from transformers import AutoModelForCausalLM

    model, tokenizer = load(any_model)
    stock = AutoModelForCausalLM.from_pretrained(any_model, dtype="auto")
    kernels.quicken(stock)
    assert model.dtype == torch.bfloat16 and not model.training
    assert torch.equal(logits(model, tokenizer), logits(stock, tokenizer))


@pytest.mark.parametrize("variant", [None, *VARIANTS])
def test_generation_works_and_is_the_same_with_and_without_the_cache(tiny_model, quantized, variant):
    root = quantized(tiny_model("llama", "float32"), variant or "int8")
    model, tokenizer = load(root, variant)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answers = [
        model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert answers[0].shape[1] == inputs["input_ids"].shape[1] + 12
    assert torch.equal(*answers)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_layers_without_a_kernel_become_ordinary_ones_of_the_models_type(
    tiny_model, quantized, dequantized, monkeypatch, variant, dtype
):
    monkeypatch.setattr(kernels, "linear", lambda *_: None)
    source = tiny_model("llama", dtype)
    model, tokenizer = load(quantized(source, variant), variant)
    assert layer_types(model) == {"PlainLinear"}
    assert model.model.layers[0].mlp.up_proj.weight.dtype == getattr(torch, dtype)
    assert relative_error(logits(model, tokenizer), logits(dequantized(source, variant), tokenizer)) < 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_that_were_kept_stay_ordinary(tiny_model, quantized, variant):
    root = quantized(tiny_model("llama"), variant, keep=["*.down_proj"])
    model, _ = load(root, variant)
    kinds = {type(m).__name__ for n, m in model.named_modules() if n.endswith("down_proj")}
    assert kinds == {"PlainLinear"} and layer_types(model) > kinds


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_load_equals_stock_loader_with_repacking_bit_for_bit(tiny_model, quantized, architecture, variant):
    root = quantized(tiny_model(architecture), variant)
    model, tokenizer = load(root, variant)
    stock = loading._load_stock(root / variant, torch.device("cpu")).eval()
    kernels.quicken(stock)
    assert layer_types(model) == layer_types(stock)
    for repeat in (1, 4):
        assert torch.equal(logits(model, tokenizer, repeat), logits(stock, tokenizer, repeat))
    assert model.generation_config.to_dict() == stock.generation_config.to_dict()
    assert model.config.to_dict() == stock.config.to_dict()
    buffers, others = dict(model.named_buffers()), dict(stock.named_buffers())
    assert buffers.keys() == others.keys() and all(torch.equal(buffers[n], others[n]) for n in buffers)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("variant, shard_bytes", [("int8", 10**9), ("int4", 10**9), ("int4", 60_000)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loaded_variant_is_saved_as_portable(tiny_model, quantized, tmp_path, architecture, variant, shard_bytes):
    root = quantized(tiny_model(architecture), variant, shard_bytes)
    model, tokenizer = load(root, variant)
    model.save_pretrained(tmp_path)
    before, after = Checkpoint(root / variant), Checkpoint(tmp_path)
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype and torch.equal(before.read(name), after.read(name)), name
    tokenizer.save_pretrained(tmp_path)
    again, _ = load(tmp_path)
    assert torch.equal(logits(again, tokenizer), logits(model, tokenizer))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_of_several_shards_is_read_like_one_of_a_single_file(tiny_model, quantized, variant):
    source = tiny_model("llama")
    one, tokenizer = load(quantized(source, variant), variant)
    many, _ = load(quantized(source, variant, 60_000), variant)
    assert torch.equal(logits(one, tokenizer), logits(many, tokenizer))


def renamed(folder, changes: dict[str, str]):
    """The same checkpoint with tensors under other names; a name for '' is left out."""
    tensors = {n: Checkpoint(folder).read(n) for n in Checkpoint(folder)}
    metadata = Checkpoint(folder).metadata
    save_file({changes.get(n, n): t for n, t in tensors.items() if changes.get(n, n)}, folder / SINGLE_NAME, metadata)
    return folder


@pytest.mark.parametrize("variant", ["", *VARIANTS])
@pytest.mark.parametrize("other", ["", "model.final.weight"])
def test_a_tensor_that_is_missing_is_named_and_never_made_up(tiny_model, quantized, tmp_path, variant, other):
    folder = Path(shutil.copytree(quantized(tiny_model("llama"), variant or "int8") / variant, tmp_path / "broken"))
    renamed(folder, {"model.norm.weight": other})
    with pytest.raises(ModelError, match="has no 'model.norm.weight'"):
        load(folder)


@pytest.mark.parametrize("variant", [None, "int8"])
def test_mixtures_of_experts_go_through_the_stock_loader(tiny_model, quantized, variant):
    from transformers import AutoModelForCausalLM

    root = quantized(tiny_model("mixtral"), variant or "int8")
    assert assemble(root / (variant or ""), torch.device("cpu")) is None
    model, tokenizer = load(root, variant)
    expected = logits(AutoModelForCausalLM.from_pretrained(root / (variant or ""), dtype="auto"), tokenizer)
    assert relative_error(logits(model, tokenizer), expected) < 0.03


@pytest.mark.parametrize("part", ["qdata", "scale", "zero_point"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_that_do_not_fit_their_layer_are_refused(tiny_model, quantized, tmp_path, variant, part):
    folder = Path(shutil.copytree(quantized(tiny_model("llama"), variant) / variant, tmp_path / "broken"))
    name = f"model.layers.0.mlp.up_proj._weight_{part}"
    tensors = {n: Checkpoint(folder).read(n) for n in Checkpoint(folder)}
    save_file({**tensors, name: tensors[name][:-1].clone()}, folder / SINGLE_NAME, Checkpoint(folder).metadata)
    with pytest.raises(ModelError, match="up_proj.weight: its stored parts are not those of a layer"):
        load(folder)


def test_pack_reports_what_it_put_in(tiny_model, quantized):
    from transformers import AutoModelForCausalLM

    root = quantized(tiny_model("llama"), "int4", keep=["*.down_proj"])
    model = AutoModelForCausalLM.from_pretrained(root / "int4", dtype="auto")
    assert loading.pack(model, torch.device("cpu")) == {"Int4Linear": 12}


def test_layers_that_run_as_stored_are_not_repacked(tiny_model, quantized, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(kernels, "runs_as_stored", lambda weight, device: True)
    root = quantized(tiny_model("llama"), "int8")
    model = AutoModelForCausalLM.from_pretrained(root / "int8", dtype="auto")
    assert loading.pack(model, torch.device("cpu")) == {"Int8Tensor": 14}
    assert type(model.model.layers[0].mlp.up_proj.weight.data).__name__ == "Int8Tensor"


@pytest.mark.parametrize("name", ["int4_weight_only", "INT4", " int4 "])
def test_a_variant_is_found_by_its_other_names(tiny_model, quantized, name):
    root = quantized(tiny_model("llama"), "int4")
    assert locate(root, name) == root / "int4"


@pytest.mark.parametrize("variant", ["int3", "", "both", "../int4"])
def test_unknown_variant_is_refused(tiny_model, quantized, variant):
    with pytest.raises(ModelError, match="not one that tunepress makes. Try: int8, .*int4"):
        load(quantized(tiny_model("llama"), "int4"), variant)


def test_missing_variant_is_refused_with_the_existing_ones(tiny_model, quantized):
    with pytest.raises(ModelError, match="no model there; variants in .*: int4$"):
        load(quantized(tiny_model("llama"), "int4"), "int8")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no model there; variants in .*: none"):
        load(tmp_path)


@pytest.mark.parametrize(
    "source", ["nowhere", "/nowhere/at/all", "a/b/c", "", "user/na me", "~nobody-of-that-name/x", "x" * 5000, "a\nb"]
)
def test_invalid_model_location_is_refused_in_one_line(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ModelError, match="neither a folder here nor a repository|not a folder|no model there"
    ) as caught:
        load(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", "meta", "xla", "cpu:-2"])
def test_invalid_device_is_refused(tiny_model, device):
    with pytest.raises(ModelError, match="use auto, cpu, cuda, cuda:N or mps"):
        load(tiny_model("llama"), device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_missing_cuda_is_refused(tiny_model, device):
    with pytest.raises(ModelError, match="torch finds no CUDA here"):
        load(tiny_model("llama"), device=device)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="is about machines without MPS")
def test_missing_mps_is_refused(tiny_model):
    with pytest.raises(ModelError, match="torch finds no MPS here"):
        load(tiny_model("llama"), device="mps")


@pytest.mark.parametrize("damage", ["cut", "no weights", "unknown model", "no tokenizer"])
def test_damaged_folder_gives_one_line(model_copy, damage):
    weights = model_copy / SINGLE_NAME
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "unknown model":
        (model_copy / "config.json").write_text('{"model_type": "of-tomorrow"}')
    else:
        for path in model_copy.glob("*token*"):
            path.unlink()
    with pytest.raises(ModelError, match="transformers cannot|fetch it again|no model.safetensors") as caught:
        load(model_copy)
    assert str(model_copy) in str(caught.value) and "\n" not in str(caught.value)


def test_loading_does_not_change_the_folder(tiny_model, quantized, tmp_path):
    root = shutil.copytree(quantized(tiny_model("llama"), "int4"), tmp_path / "release")
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    load(root, "int4")
    assert before == {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
