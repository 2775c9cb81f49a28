"""Check the variants `gptq` and `awq` with gptqmodel, the package that transformers loads them with.

gptqmodel needs other versions of its dependencies than tunepress, so it gets an environment of its own:

    python scripts/check_gptq_awq.py write FOLDER        # in the environment of tunepress
    python -m venv gptqmodel-env
    gptqmodel-env/bin/pip install torch transformers gptqmodel
    gptqmodel-env/bin/python scripts/check_gptq_awq.py read FOLDER

The first command writes a small random model, both variants of it, and for each the logits and the greedy answer that
its dequantized weights give in transformers. The second loads each variant with gptqmodel and compares. It uses
nothing of tunepress. `--model` takes another full-precision model than the random one.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the tests' random model
VARIANTS = ("gptq", "awq")
PROMPT = "The quick brown fox jumps over the lazy dog, and"
NEW_TOKENS = 32
TOLERANCE = 0.02  # of the norm of the logits; gptqmodel computes in float16
EXPECTED = "expected.pt"


def main() -> None:
    """Write or read, as the first argument says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("write", "read"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, help="folder of a full-precision model (default: a random one)")
    asked = parser.parse_args()
    if asked.action == "write":
        write(asked.folder, asked.model)
    else:
        read(asked.folder)


def write(folder: Path, model: Path | None) -> None:
    """Write the model, its variants, and what their dequantized weights compute."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pipeline.config.schema import VariantSpec
    from pipeline.models.checkpoint import Checkpoint
    from pipeline.models.matrices import linear_weights
    from pipeline.quantization.formats import format_of
    from pipeline.quantization.writer import quantize_checkpoint
    from tests.support.models import write_model

    if model is None:
        model = folder / "model"
        write_model(model, "llama", hidden_size=256, intermediate_size=512)
    linear = linear_weights(model)
    specs = [VariantSpec(name=name).resolved() for name in VARIANTS]
    quantize_checkpoint(model, specs, {spec.name: folder / spec.name for spec in specs}, linear)
    ids = AutoTokenizer.from_pretrained(model)(PROMPT, return_tensors="pt").input_ids
    for spec in specs:
        dequantized, stored = (
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            Checkpoint(folder / spec.name),
        )
        for name, shape in linear.items():
            weight = format_of(spec).read(stored, name, shape).dequantize()
            dequantized.get_submodule(name.removesuffix(".weight")).weight.data = weight
        torch.save(answer(dequantized, ids), folder / spec.name / EXPECTED)
    print(f"{folder}: written. Next: python scripts/check_gptq_awq.py read {folder}, in the environment of gptqmodel")


def read(folder: Path) -> None:
    """Load each variant with gptqmodel, and compare."""
    from gptqmodel import BACKEND, GPTQModel

    failed = False
    for name, backend in zip(VARIANTS, (BACKEND.GPTQ_TORCH, BACKEND.AWQ_TORCH), strict=True):
        model = GPTQModel.load(str(folder / name), device="cpu", backend=backend, dtype=torch.float16).model
        expected = torch.load(folder / name / EXPECTED)
        found = answer(model, expected["ids"])
        difference = float((found["logits"] - expected["logits"]).norm() / expected["logits"].norm())
        same = torch.equal(found["tokens"], expected["tokens"])
        layers = {type(module).__name__ for module in model.modules() if hasattr(module, "qweight")}
        print(json.dumps({"variant": name, "layers": sorted(layers), "logits_off": difference, "same_tokens": same}))
        failed |= not layers or not difference < TOLERANCE
    if failed:
        raise SystemExit("a variant computes something else in gptqmodel than its dequantized weights")


def answer(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the logits (T, V) of a prompt, and the greedy answer to it."""
    with torch.no_grad():
        logits = model(ids).logits[0].float()
        tokens = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    return {"ids": ids, "logits": logits, "tokens": tokens}


if __name__ == "__main__":
    main()
