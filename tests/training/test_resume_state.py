"""The state that training resumes from: restored exactly, without pickles."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch

from pipeline.errors import CheckpointError
from pipeline.models.checkpoint import read_header
from pipeline.training.resume_state import load_state, random_state, save_state, set_random_state


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state.safetensors"


def test_an_optimizer_and_its_schedule_go_on_as_they_were(path):
    def begin():
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 3)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        return layer, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))

    def steps(layer, optimizer, schedule, count):
        for _ in range(count):
            optimizer.zero_grad()
            layer(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            schedule.step()
        return [parameter.detach().clone() for parameter in layer.parameters()]

    layer, optimizer, schedule = begin()
    steps(layer, optimizer, schedule, 3)
    save_state(path, {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()})
    weights, expected = layer.state_dict(), None
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    expected = steps(layer, optimizer, schedule, 3)
    again, optimizer, schedule = begin()
    again.load_state_dict(weights)
    state = load_state(path)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    assert all(map(torch.equal, steps(again, optimizer, schedule, 3), expected))


def test_random_numbers_go_on_where_they_were(path):
    save_state(path, random_state())

    def drawn():
        return random.random(), np.random.rand(), float(torch.rand(())), random.gauss(0, 1), np.random.randn()

    first = drawn()
    drawn()
    set_random_state(load_state(path))
    assert drawn() == first


def test_values_come_back_as_they_were_and_of_their_kind(path):
    shared = torch.arange(4)
    state = {0: (1, 2.5, None), "a": [True, "x", float("inf")], (1, 2): {"t": torch.tensor(3.0), "v": shared[:2]}}
    save_state(path, state | {"whole": shared, "again": shared, "eight": torch.ones(3, dtype=torch.uint8).bfloat16()})
    found = load_state(path)
    assert found[0] == (1, 2.5, None) and found["a"] == [True, "x", float("inf")] and found["a"][0] is True
    assert found[1, 2]["t"].shape == () and torch.equal(found[1, 2]["v"], shared[:2])
    assert torch.equal(found["whole"], shared) and torch.equal(found["again"], shared)
    assert found["eight"].dtype == torch.bfloat16
    assert read_header(path)[0]  # and whether it is whole can be told by its header


def test_non_numbers_are_not_stored(path):
    with pytest.raises(TypeError, match="a function in a training's state"):
        save_state(path, {"f": save_state})
    assert not path.exists()


@pytest.mark.parametrize("content", [None, b"", pickle.dumps({"a": 1}), b"\x02\0\0\0\0\0\0\0{}"])
def test_a_damaged_state_is_refused_in_one_line(path, content):
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged, or of another kind. Try: remove its folder"):
        load_state(path)
