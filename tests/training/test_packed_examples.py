"""Examples packed into one row: they do not see each other on any recipe's architecture."""

from __future__ import annotations

import random

import pytest
import torch

from pipeline.config.schema import Config
from pipeline.data.encode import NO_LOSS, Encoded, EncodedSet
from pipeline.training.trainers import Job
from pipeline.training.trainers.sft import build
from tests.support.models import ARCHITECTURES, relative_error
from tests.support.recipes import RECIPES

LENGTHS = (40, 25, 31, 50, 12, 33, 28, 60, 90, 7)


@pytest.fixture(scope="module")
def examples():
    """Random examples of several lengths; the first five tokens of each are a question."""
    draw = random.Random(0)
    sequences = [[draw.randrange(250) for _ in range(n)] for n in LENGTHS]
    encoded = [Encoded(ids, [NO_LOSS] * 5 + ids[5:]) for ids in sequences]
    return EncodedSet(encoded, truncated=0, dropped=0, tokens=sum(LENGTHS), loss_tokens=sum(LENGTHS) - 50)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "llama-3.2-1b"])
def test_packed_examples_do_not_see_each_other(tiny_model, tmp_path, examples, architecture):
    from transformers import AutoTokenizer

    name, changes = RECIPES.get(architecture, (architecture, {}))
    folder = tiny_model(name, **changes)
    config = Config.model_validate(
        {
            "name": "packed", "model": {"source": str(folder)}, "data": {"source": "unused"},
            "train": {"method": "lora", "batch_size": 2, "accumulate": 1, "max_length": 128, "packing": True},
        }
    )  # fmt: skip
    encoded = {"training": examples, "held-out": examples}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = build(config, folder, tokenizer, encoded, Job(tmp_path))
    backbone, seen = trainer.model.get_base_model().base_model, []
    hook = backbone.register_forward_hook(lambda module, arguments, output: seen.append(output[0]))
    with torch.no_grad():
        for batch in (next(iter(trainer.get_train_dataloader())), next(iter(trainer.get_eval_dataloader()))):
            counted = (batch["labels"] != NO_LOSS).sum()
            trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=counted)
            packed, ids = seen.pop()[0], batch["input_ids"]
            starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
            assert len(starts) > 1 and len(ids) == 1
            together = backbone(input_ids=ids, use_cache=False)[0][0]
            for start, end in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
                alone = backbone(input_ids=ids[:, start:end], use_cache=False)[0][0]
                assert relative_error(packed[start:end], alone) < 0.05
                # A mistake would look like this: examples that see each other.
                assert start == 0 or relative_error(together[start:end], alone) > 0.2
            seen.clear()
    hook.remove()
