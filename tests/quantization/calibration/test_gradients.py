"""Gradients and distillation block by block do what a whole model in memory does."""

from __future__ import annotations

import pytest
import torch

from pipeline.inference.output_head import Head, head_names
from pipeline.models.matrices import linear_weights
from pipeline.quantization.calibration.blocks import BlockwiseModel
from pipeline.quantization.calibration.gradients import shares
from pipeline.quantization.distillation import STATE, Schedule, distill
from pipeline.quantization.grid import Grid, SuperBlock
from pipeline.quantization.roundings import rtn, search

MODELS = ("llama", "qwen3", "gemma3_text", "opt", "gpt_neo")
GRID = Grid(bits=3, group_size=16, zero="float", scale_dtype=torch.bfloat16)
IN_SUPER_BLOCKS = Grid(3, 16, "float", torch.float32, from_zero=True, super_block=SuperBlock(2, 63, torch.float16))
TABLE = Grid(bits=4, group_size=None, zero="none", scale_dtype=torch.float32)


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Compute in float32, so that both ways differ only by the order of sums."""
    monkeypatch.setenv("TUNEPRESS_COMPUTE_DTYPE", "float32")


def windows(count: int, seed: int = 0) -> list[list[int]]:
    """Return windows of 24 random tokens."""
    return torch.randint(5, 60, (count, 24), generator=torch.Generator().manual_seed(seed)).tolist()


def rounded_model(folder, with_table: bool = True, grid: Grid = GRID):
    """Return a model block by block, its weights on coarse grids, its heads, and the name of its output head."""
    from transformers import AutoModelForCausalLM

    model = BlockwiseModel(folder)
    names = head_names(AutoModelForCausalLM.from_pretrained(folder))
    made = {name: search.round(model.weight(name), grid) for name in linear_weights(folder)}
    full = names.read(folder)
    head = full
    if with_table:
        made[names.weight] = made[model.table] = rtn.round(model.weight(names.weight), TABLE)
        if model.table != names.weight:
            made[model.table] = rtn.round(model.weight(model.table), TABLE)
        bias = model._checkpoint.read(names.bias) if names.bias else None
        head = Head(made[names.weight], bias, full.scale, full.softcap)
    return model, made, (full, head), names.weight


def whole(folder, made):
    """Return the full-precision model and the rounded one, in float32."""
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for _ in range(2)]
    for name, weight in made.items():
        models[1].get_parameter(name).data = weight.dequantize()
    return models


@pytest.mark.parametrize("kind", MODELS)
def test_shares_are_those_of_one_gradient_pass_of_the_whole_model(tiny_model, kind, tmp_path):
    folder = tiny_model(kind)
    model, made, heads, head = rounded_model(folder)
    ids = torch.tensor(windows(5))
    full, coarse = whole(folder, made)
    with torch.no_grad():
        wanted = full(input_ids=ids).logits.log_softmax(-1)
    given = coarse(input_ids=ids).logits.log_softmax(-1)
    kl = (wanted.exp() * (wanted - given)).sum(-1).mean()
    kl.backward()

    found = shares(model, heads, made, windows(5), tmp_path, lambda *_: None, head)

    assert found.kl == pytest.approx(kl.item(), rel=1e-3)
    for name in made:
        parameter = coarse.get_parameter(name)
        share = (parameter.grad * (parameter.data - full.get_parameter(name).data)).sum().item() / 2
        assert found.by_weight[name] == pytest.approx(share, rel=2e-3, abs=1e-4 * kl.item()), name


@pytest.mark.parametrize("grid, share", [(GRID, 0.9), (IN_SUPER_BLOCKS, 0.95)], ids=["groups", "super-blocks"])
def test_distilled_scales_and_zeros_lower_the_divergence(tiny_model, tmp_path, grid, share):
    model, made, heads, _ = rounded_model(tiny_model("llama"), grid=grid)
    schedule = Schedule(steps=40, rate=5e-3, every=10)
    told = []

    found, values = distill(
        model, heads, made, windows(32), windows(8, 1), schedule, tmp_path, lambda *a: told.append(a)
    )

    assert found.after < share * found.before
    assert told[0][:2] == (0, 40)
    assert told[-1][:2] == (40, 40)
    assert set(values) == set(linear_weights(tiny_model("llama")))
    for name, (scale, zero) in values.items():
        assert (scale.dtype, zero.dtype) == (grid.scale_dtype, grid.scale_dtype)
        assert all(map(torch.equal, grid.stored(scale, zero), (scale, zero)))
        assert scale.shape == made[name].scale.shape
    after = {name: type(w)(w.codes, *values.get(name, (w.scale, w.zero)), w.grid) for name, w in made.items()}
    measured = shares(model, heads, after, windows(8, 1), tmp_path, lambda *_: None).kl
    assert measured == pytest.approx(found.after, rel=1e-3)  # the values that are returned are those that were measured


def test_a_stopped_distillation_ends_with_the_same_values(tiny_model, tmp_path):
    model, made, heads, _ = rounded_model(tiny_model("llama"), with_table=False)
    schedule = Schedule(steps=12, rate=2e-3, every=3)
    arguments = (windows(12), windows(4, 1), schedule)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole_run, values = distill(model, heads, made, *arguments, tmp_path / "a", lambda *_: None)

    def stop(done, total, what):
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(model, heads, made, *arguments, tmp_path / "b", stop)
    assert (tmp_path / "b" / STATE).is_file()
    continued, others = distill(model, heads, made, *arguments, tmp_path / "b", lambda *_: None)

    assert continued == whole_run
    for name, (scale, zero) in values.items():
        assert torch.equal(scale, others[name][0]), name
        assert torch.equal(zero, others[name][1]), name


def test_values_that_get_worse_are_not_kept(tiny_model, tmp_path):
    model, made, heads, _ = rounded_model(tiny_model("llama"), with_table=False)
    schedule = Schedule(steps=6, rate=0.5, every=2, patience=2)

    found, values = distill(model, heads, made, windows(4), windows(4, 1), schedule, tmp_path, lambda *_: None)

    assert (found.steps, found.after) == (0, found.before)
    for name, (scale, zero) in values.items():
        assert torch.equal(scale, made[name].scale), name
        assert torch.equal(zero, made[name].zero), name
