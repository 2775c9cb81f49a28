"""The fast decoding step: the logits of transformers, and an unchanged model."""

import copy
import os
import platform
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer

from pipeline.inference.kernels import joined, pages, step
from pipeline.inference.kernels.growing import GrowingLayer
from pipeline.inference.kernels.pages import Room
from pipeline.inference.load import load
from pipeline.models.checkpoint import Checkpoint
from pipeline.system.process_environment import ALLOCATOR
from tests.support.models import relative_error, write_tokenizer

SHAPE = {
    "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "num_hidden_layers": 3, "vocab_size": 272, "max_position_embeddings": 256, "pad_token_id": 0, "eos_token_id": None,
    "bos_token_id": None, "sliding_window": None, "use_sliding_window": False, "initializer_range": 0.1,
}  # fmt: skip
KINDS = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"num_key_value_heads": 4},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {},
    "smollm3": {"no_rope_layer_interval": 2},
}
VARIANTS = (None, "int8", "int4")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}


@pytest.fixture(scope="module")
def release(tmp_path_factory, quantized):
    """`release(kind, dtype, variant)`: a model's folder whose layers have widths and rows that can be joined."""
    made = {}

    def make(kind, dtype=torch.bfloat16, variant=None):
        key = (kind, dtype)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(kind)
            torch.manual_seed(0)
            config = AutoConfig.for_model(kind, **{**SHAPE, **KINDS[kind]}, dtype=dtype)
            model = AutoModelForCausalLM.from_config(config)
            for name, parameter in model.named_parameters():
                if name.endswith(("norm.weight", "bias")):
                    parameter.data.uniform_(0.5, 1.5)
            model.save_pretrained(made[key])
            write_tokenizer(made[key])
        return quantized(made[key], variant) if variant else made[key]

    return make


@pytest.fixture
def steps(monkeypatch):
    """How many steps were taken so far, as a list of their results."""
    taken, call = [], step.Step.__call__

    def count(self, *args, **kwargs):
        output = call(self, *args, **kwargs)
        taken.append(output is not None)
        return output

    monkeypatch.setattr(step.Step, "__call__", count)
    return taken


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 250, (batch, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def written(model, prompt, count, mask=None, quick=True):
    """The logits of `count` tokens after a prompt, each given by itself."""
    kept, model.base_model.__dict__["_step"] = model.base_model.__dict__["_step"], None
    if quick:
        model.base_model.__dict__["_step"] = kept
    cache, logits = DynamicCache(config=model.config), []
    name = "cache" if step._output_type()[1] == "cache" else "past_key_values"
    for position, token in enumerate([prompt, *ids(len(prompt), count).split(1, dim=1)]):
        seen = None if mask is None else torch.cat((mask, mask.new_ones(len(mask), position)), dim=1)
        logits.append(model(token, attention_mask=seen, use_cache=True, **{name: cache}).logits[:, -1].float())
    model.base_model.__dict__["_step"] = kept
    return torch.stack(logits)


@pytest.mark.parametrize("batch, padded", [(1, False), (1, True), (3, False), (3, True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", step.MODELS)
def test_decoding_step_gives_the_logits_of_transformers(release, steps, kind, variant, dtype, batch, padded):
    model, _ = load(release(kind, dtype, variant), variant)
    mask = None
    if padded:
        mask = torch.ones(batch, 12, dtype=torch.long)
        mask[-1, :5] = 0
    ours, theirs = (written(model, ids(batch, 12), 6, mask, quick) for quick in (True, False))
    assert steps == [False] + 6 * [True]
    assert relative_error(ours[1:], theirs[1:]) < TOLERANCE[dtype]


@pytest.mark.parametrize("variant, kind", [("int8", joined.JoinedInt8), ("int4", joined.JoinedInt4)])
def test_joined_layers_are_views_and_are_saved_unchanged(release, tmp_path, variant, kind):
    folder = release("llama", variant=variant)
    model, tokenizer = load(folder, variant)
    block = model.model._step.blocks[1]
    assert type(block.qkv) is type(block.gate_up) is kind
    joined = block.qkv.codes if variant == "int8" else block.qkv.packed
    attention = model.model.layers[1].self_attn
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
        part = layer.codes if variant == "int8" else layer.packed
        assert part.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()
    model.save_pretrained(tmp_path)
    before, after = Checkpoint(folder / variant), Checkpoint(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before.read(name), after.read(name)) for name in before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_generate_output_is_unchanged(release, steps, variant):
    model, _ = load(release("llama", torch.float32, variant), variant)
    prompt, options = ids(2, 9), {"max_new_tokens": 12, "do_sample": False}
    ways = [{}, {"num_beams": 2, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 3}]
    for way in ways:
        given = prompt[:1] if "prompt_lookup_num_tokens" in way else prompt
        before = len(steps)
        ours = model.generate(given, attention_mask=torch.ones_like(given), **options, **way)
        assert any(steps[before:])
        kept = model.model.__dict__.pop("_step")
        theirs = model.generate(given, attention_mask=torch.ones_like(given), **options, **way)
        model.model.__dict__["_step"] = kept
        assert torch.equal(ours, theirs), way


@pytest.mark.parametrize(
    "what", ["hook", "adapter", "hidden states", "attentions", "gradients", "tuple", "mask", "global"]
)
@torch.no_grad()
def test_unsupported_step_falls_back_to_the_model(release, steps, what):
    model, _ = load(release("llama", variant="int8"), "int8")
    cache = model(ids(1, 5), use_cache=True).past_key_values
    token, seen, options = ids(1, 1), [], {"past_key_values": cache, "use_cache": True}
    before, handle = len(steps), None
    if what == "hook":
        handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    if what == "global":
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    if what == "adapter":
        model.model.layers[0].self_attn.q_proj = torch.nn.Sequential(model.model.layers[0].self_attn.q_proj)
    if what == "mask":
        options["attention_mask"] = torch.zeros(1, 1, 1, 6)
    with torch.set_grad_enabled(what == "gradients"):
        output = model(
            token, output_hidden_states=what == "hidden states", output_attentions=what == "attentions",
            return_dict=what != "tuple", **options,
        )  # fmt: skip
    if handle:
        handle.remove()
    assert steps[before:] == [False] if what != "tuple" else True
    assert seen or what not in ("hook", "global")
    if what == "hidden states":
        assert len(output.hidden_states) == 4
    if what == "tuple":
        assert isinstance(output, tuple)


@torch.no_grad()
def test_steps_leave_tensors_that_can_be_written_to_as_any_others(release, steps):
    model, _ = load(release("llama", variant="int4"), "int4")
    cache = model(ids(1, 5), use_cache=True).past_key_values
    with torch.inference_mode():
        model(ids(1, 1), past_key_values=cache)
    logits = model(ids(1, 1), past_key_values=cache).logits
    logits /= 2
    model(ids(1, 3), past_key_values=cache)
    cache.layers[0].keys.zero_()
    model(ids(1, 1), past_key_values=cache)
    assert steps == [False, True, True, False, True] and not logits.is_inference()


def test_a_window_that_slides_goes_the_ordinary_way(tmp_path, steps):
    config = AutoConfig.for_model("mistral", **{**SHAPE, "sliding_window": 8})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    model, _ = load(tmp_path)
    model.generate(ids(1, 12), max_new_tokens=4, do_sample=False)
    assert steps and not any(steps)


@pytest.mark.parametrize("variant", VARIANTS)
def test_copies_and_models_of_another_type_compute_with_their_own_weights(release, steps, variant):
    model, _ = load(release("llama", variant=variant), variant)
    expected = written(model, ids(1, 5), 3)
    other = copy.deepcopy(model)
    for parameter in (*model.parameters(), *model.buffers()):
        parameter.zero_()
    assert torch.equal(written(other, ids(1, 5), 3), expected)
    torch.nn.Module.float(other)  # which transformers forbids for quantized models
    assert relative_error(written(other, ids(1, 5), 3), written(other, ids(1, 5), 3, quick=False)) < 1e-4
    assert all(steps[1:4]) and all(steps[5:8])


def layers(*shape, count=3):
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(shape, generator=generator) for _ in range(2)] for _ in range(count)]


@torch.no_grad()
def test_growing_cache_equals_dynamic_cache():
    theirs = DynamicLayer()
    ours = GrowingLayer()
    rooms = set()
    for number in range(700):
        part = layers(2, 3, 1 + number % 3, 4, count=1)[0]
        assert all(torch.equal(*pair) for pair in zip(ours.update(*part), theirs.update(*part), strict=True))
        rooms.add(ours._room.data_ptr() if ours._room is not None else 0)
        if number == 300:
            for layer in (ours, theirs):
                layer.crop(-7)
                layer.reorder_cache(torch.tensor([1, 0]))
        if number == 400:
            for layer in (ours, theirs):
                layer.batch_repeat_interleave(2)
                layer.batch_select_indices(torch.tensor([0, 2]))
    assert len(rooms) < 15 and ours.get_seq_length() == theirs.get_seq_length()
    for layer in (ours, theirs):
        layer.reset()
        layer.update(*layers(1, 3, 5, 4, count=1)[0])
    assert torch.equal(ours.keys, theirs.keys)


@torch.no_grad()
def test_cropped_cache_tensors_are_not_overwritten():
    layer = GrowingLayer()
    for part in layers(1, 2, 3, 4):
        layer.update(*part)
    kept, copied = layer.keys, layer.keys.clone()
    layer.crop(-4)
    layer.make_room(1)
    layer.append(torch.zeros(1, 4, 4))
    assert torch.equal(kept, copied)


@pytest.mark.parametrize("large", [True, False])
def test_tensors_of_a_room_lie_in_it_one_after_the_other_where_kernels_can_read_them(monkeypatch, large):
    if not large:
        monkeypatch.delattr(pages.mmap, "MADV_HUGEPAGE", raising=False)
    parts = [torch.arange(50, dtype=torch.uint8).view(5, 10), torch.randn(6, 3, 2).bfloat16()]
    room = Room(Room.needed([*parts, parts[0]]))
    first, second, third = (
        room.cat(parts[:1]),
        room.cat(parts[1].split(1), dim=0),
        room.cat([parts[0].T[:5]] * 2, dim=1),
    )
    assert torch.equal(first, parts[0]) and torch.equal(second, parts[1])
    assert torch.equal(third, torch.cat([parts[0].T[:5]] * 2, dim=1))
    assert [(t.data_ptr() - first.data_ptr()) for t in (first, second, third)] == [0, 64, 192]
    assert first.data_ptr() % 64 == 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc")
def test_freed_memory_returns_to_the_system(cold):
    program = """
import torch
from pipeline.inference.kernels.pages import give_back
held = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
blocks = [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(200)]
full, blocks = held(), blocks[::2]
kept = held()
give_back()
print(full - kept, full - held())
"""
    environment = {**os.environ, "GLIBC_TUNABLES": ALLOCATOR}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    before, after = map(int, done.stdout.split())
    assert before < 20e6 and after > 90e6


def test_window_holds_with_a_cache_that_does_not_know_of_it(tmp_path):
    config = AutoConfig.for_model("mistral", **{**SHAPE, "sliding_window": 8}, dtype=torch.float32)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    model, _ = load(tmp_path, device="cpu")
    ids = torch.arange(20)[None] % 200 + 3
    with torch.no_grad():
        expected = model(ids).logits[:, -1]
        for cache in (DynamicCache(), DynamicCache(config=model.config)):
            model(ids[:, :19], past_key_values=cache)
            found = model(ids[:, 19:], past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
