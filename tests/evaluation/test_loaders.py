"""Loaders that are timed in fresh processes: one that would need more memory than there is, is not tried."""

from __future__ import annotations

import pytest

from pipeline.evaluation.evaluate import _speed
from pipeline.inference.loaders import PACKED, STOCK
from pipeline.models.checkpoint import Checkpoint
from pipeline.system import hardware


@pytest.mark.parametrize("variant, runs", [("w4a16", False), ("int8", True)])
def test_stock_loader_that_would_dequantize_too_much_is_not_tried(tiny_model, quantized, monkeypatch, variant, runs):
    root = quantized(tiny_model("llama"), variant)
    free = int(0.9 * Checkpoint(root).nbytes / hardware.WEIGHTS_SHARE)  # too little for the dequantized model
    monkeypatch.setattr(hardware, "free_bytes", lambda device: free)
    found = _speed(variant, root / variant, [7, 200, 31], (STOCK, PACKED), "cpu")
    assert found[PACKED].runs and found[STOCK].runs is runs
    assert bool(found[STOCK].reason and "dequantizes all weights" in found[STOCK].reason) is not runs
