"""Loaders: one that would need more memory than there is, or packages that are missing, is not tried."""

from __future__ import annotations

import importlib.metadata
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest

from pipeline.config.engines import TUNEPRESS
from pipeline.config.schema import VariantSpec
from pipeline.evaluation.model_result import ModelResult
from pipeline.evaluation.speed import by_loader
from pipeline.inference import loaders
from pipeline.inference.loaders import PACKED, STOCK, missing_packages
from pipeline.models.checkpoint import Checkpoint
from pipeline.system import hardware
from pipeline.verification.measure_again import _cannot_be_had


@pytest.mark.parametrize("variant, runs", [("w4a16", False), ("int8", True)])
def test_stock_loader_that_would_dequantize_too_much_is_not_tried(tiny_model, quantized, monkeypatch, variant, runs):
    root = quantized(tiny_model("llama"), variant)
    free = int(0.9 * Checkpoint(root).nbytes / hardware.WEIGHTS_SHARE)  # too little for the dequantized model
    monkeypatch.setattr(hardware, "free_bytes", lambda device: free)
    found = by_loader(root / variant, [7, 200, 31], (STOCK, PACKED), "cpu")
    assert found[PACKED].runs and found[STOCK].runs is runs
    assert bool(found[STOCK].reason and "dequantizes all weights" in found[STOCK].reason) is not runs


def test_each_engine_needs_the_packages_of_the_packing(monkeypatch):
    def lacks(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", lacks)
    assert missing_packages("fp8", None) == missing_packages("fp8", None, TUNEPRESS) == ["compressed-tensors>=0.15"]
    assert missing_packages("fp8", "torchao") == ["torchao"] and missing_packages("fp8", "torchao", TUNEPRESS) == []
    assert missing_packages("w4a16", None, TUNEPRESS) == [] == missing_packages("base", None)


def test_float8_of_torchao_needs_no_extra():
    assert VariantSpec(name="fp8").requires == (("compressed_tensors", "compressed-tensors"),)
    assert VariantSpec(name="fp8", packing="torchao").requires == ()


def test_verify_does_not_measure_what_cannot_be_opened_here(monkeypatch):
    claims = SimpleNamespace(results={"fp8": ModelResult(), "w4a16": ModelResult()}, reference=None, has_root=False)
    assert _cannot_be_had(claims, None, "fp8") is None
    monkeypatch.setattr(loaders, "lacking", list)
    assert _cannot_be_had(claims, None, "fp8") == "not measured: needs compressed-tensors>=0.15"
    assert _cannot_be_had(claims, None, "w4a16") is None
