"""The choice between the two ways to merge: the lower held-out loss, or within its error the closer one."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from pipeline.config.schema import Config
from pipeline.data import Example, write_examples
from pipeline.data.encode import encode_examples
from pipeline.data.supplied_template import supply_template
from pipeline.evaluation import metrics
from pipeline.evaluation.model_result import Estimate
from pipeline.evaluation.results import MergeComparison, MergeLoss
from pipeline.inference.load import load
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.matrices import linear_weights
from pipeline.models.safe_loading import open_tokenizer
from pipeline.tracking.events import Events
from pipeline.training.merge import merge_checkpoint
from pipeline.workflow.stages import merge
from pipeline.workflow.workspace import Workspace


@pytest.mark.parametrize(
    ("gap", "freedom", "closer", "chosen"),
    [
        (Estimate(0.03, 0.01), 100.0, "nf4", "bf16"),
        (Estimate(-0.03, 0.01), 100.0, "bf16", "nf4"),
        (Estimate(0.019, 0.01), 100.0, "nf4", "nf4"),
        (Estimate(-0.019, 0.01), 100.0, "bf16", "bf16"),
        (Estimate(0.03, 0.01), 2.0, "nf4", "nf4"),  # few prompts have most of the tokens
        (Estimate(9.0, float("nan")), 0.0, "nf4", "nf4"),  # one prompt
    ],
)
def test_difference_counts_if_it_is_beyond_its_error(gap, freedom, closer, chosen):
    losses = {kind: MergeLoss(kl=Estimate(0.1 if kind == closer else 0.2, 0.01)) for kind in ("nf4", "bf16")}
    assert merge._better(MergeComparison(**losses, nf4_minus_bf16=gap, freedom=freedom)) == chosen


@pytest.fixture(scope="module")
def both(tiny_model, tmp_path_factory) -> dict[str, Path]:
    """A base, an adapter that changes next to nothing, and the two merges of them."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("merges")
    base, adapter = Path(tiny_model("llama", initializer_range=0.12)), folder / "adapter"
    torch.manual_seed(0)
    settings = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), settings).save_pretrained(adapter)
    for kind in ("nf4", "bf16"):
        merge_checkpoint(base, adapter, folder / kind, kind, linear_weights(base))
    return {"base": base, "adapter": adapter, "nf4": folder / "nf4", "bf16": folder / "bf16"}


def answers_that_suit(both: dict[str, Path], kind: str) -> list[Example]:
    """Return one answer to each of 24 prompts: of many, the one that this merge finds easiest beside the other."""
    draw, words = random.Random(1), ("red", "green", "blue", "one", "two", "many", "cat", "dog", "tree", "sky")
    examples = [
        Example(
            (
                {"role": "user", "content": f"What is {number}?"},
                {"role": "assistant", "content": " ".join(draw.choices(words, k=3))},
            )
        )
        for number in range(24)
        for _ in range(12)
    ]
    tokenizer = open_tokenizer(both["base"])
    if not tokenizer.chat_template:
        supply_template(tokenizer)
    sequences, losses = encode_examples(examples, tokenizer, "auto", 128).examples, {}
    for name in ("nf4", "bf16"):
        model, _ = load(both[name], device="cpu")
        scores = metrics.score(model, sequences)
        losses[name] = metrics.totals(scores.nll, scores.cluster)
    other = "bf16" if kind == "nf4" else "nf4"
    easier = (losses[other] - losses[kind]).view(24, 12).argmax(1)
    return [examples[12 * prompt + int(answer)] for prompt, answer in enumerate(easier)]


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_stage_keeps_the_merge_with_the_lower_held_out_loss(both, tmp_path, kind):
    pytest.importorskip("bitsandbytes")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Unused?", "completion": "Yes."}) + "\n")
    tree = {"name": "m", "model": {"source": str(both["base"])}, "data": {"source": str(tmp_path / "rows.jsonl")}}
    config = Config.model_validate({**tree, "quantize": {"variants": []}, "train": {"max_length": 128}})
    with Workspace.claim(tmp_path / "m", config) as workspace:
        workspace.data.mkdir(parents=True, exist_ok=True)
        workspace.adapter.parent.mkdir(parents=True, exist_ok=True)
        workspace.adapter.symlink_to(both["adapter"])
        write_examples(workspace.data / "held_out.jsonl", answers_that_suit(both, kind))
        outcome = merge.run(config, workspace, Events(workspace.events_path, "m"), ())
        compared = workspace.read_measurement("merge")["compared"]
        assert outcome.summary["base"] == kind
        assert (compared["nf4_minus_bf16"]["value"] < 0) == (kind == "nf4") and compared["freedom"] > 10
        kept, other = Checkpoint(workspace.release), Checkpoint(both[kind])
        name = "model.layers.0.mlp.up_proj.weight"
        assert kept.read(name).equal(other.read(name))
