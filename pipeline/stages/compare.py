"""Score the new model and the live one on the same held-out examples, which neither was trained on."""

from __future__ import annotations

import functools
import math
from dataclasses import asdict
from typing import TYPE_CHECKING

from pipeline import live
from pipeline.config import Config
from pipeline.events import Events
from pipeline.libraries import versions
from pipeline.stages import Outcome
from pipeline.workspace import Workspace

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from pipeline.data import Example
    from pipeline.data.encode import Encoded
    from pipeline.measure import Estimate, Scores

LIBRARIES = ("torch", "transformers")
RESULT = "retraining"  # the measurement, and the key in the results and the lineage


def parameters(config: Config, variant: str | None) -> dict:
    return {}


def depends(config: Config, workspace: Workspace, variants: tuple[str, ...]) -> dict:
    compared, inputs = live.noted(workspace)
    return {
        "live": compared and compared.model,
        "inputs": inputs,
        "max_tokens": config.evaluate and config.evaluate.max_tokens,
        "after": workspace.state_of("train", "merge"),
        "versions": versions(*LIBRARIES),
    }


def run(config: Config, workspace: Workspace, events: Events, variants: tuple[str, ...]) -> Outcome:
    """Without a live model there is only recorded what the new one was made of."""
    compared, inputs = live.noted(workspace)
    figures = _compare(config, workspace, events, compared) if compared else {}
    content = {"inputs": inputs, "weights": live.own_weights(workspace), **figures}
    return Outcome((workspace.write_measurement(RESULT, content),), {"compared": bool(compared)})


def _compare(config: Config, workspace: Workspace, events: Events, compared: live.Live) -> dict:
    """The loss of both models and the difference, paired by token; or by example, where their tokens are not the same.

    The loss is in nats a token. Models with other tokens are compared in bits a byte of what was to be learned.
    """
    from pipeline import measure
    from pipeline.data import read_examples
    from pipeline.loading import load

    fingerprint = workspace.read_measurement("data")["fingerprint"]
    examples, caveat = live.untouched(read_examples(workspace.data / "held_out.jsonl"), fingerprint, compared)
    sides = {"new": (workspace.release, None), "live": (compared.repo, compared.head)}
    tokenizers = {name: _tokenizer(*place) for name, place in sides.items()}
    encoded, sizes, by_token = _encode(config, examples, tokenizers)
    scores: dict[str, Scores] = {}
    for name, (source, revision) in sides.items():
        tell = functools.partial(events.progress, what=f"measuring the {name} model")
        model, _ = load(source, revision=revision, offload="auto")
        scores[name] = measure.score(model, [s for e in encoded[name] for s in e], tell)
        device = str(measure.device_of(model))
        del model
    if by_token:
        values = {name: s.nll for name, s in scores.items()}
        mean = functools.partial(measure.mean, sequence=_examples_of(scores["new"], encoded["new"]))
    else:
        values = {name: _bits(s, encoded[name]) for name, s in scores.items()}
        mean = functools.partial(_per_byte, sizes=sizes)
    return {
        "compared_with": {"repo": compared.repo, "commit": compared.head},
        "unit": "nats per token" if by_token else "bits per byte",
        "paired_by": "token" if by_token else "example",
        "new": asdict(mean(values["new"])),
        "live": asdict(mean(values["live"])),
        "difference": asdict(mean(values["new"] - values["live"])),
        "tokens": len(scores["new"].nll),
        "examples": len(encoded["new"]),
        "note": caveat,
        "device": device,
    }


def _tokenizer(source: object, revision: str | None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    from pipeline.loading import locate

    return AutoTokenizer.from_pretrained(locate(source, revision=revision))


def _encode(
    config: Config, examples: tuple[Example, ...], tokenizers: dict[str, PreTrainedTokenizerBase]
) -> tuple[dict[str, list[list[Encoded]]], torch.Tensor, bool]:
    """The examples as each model reads them: those that both read whole, up to `evaluate.max_tokens` tokens.

    Returns:
        Sequences of each example by model; bytes to be learned of each example, (E,); whether the tokens are the same.

    Raises:
        DataError: for too few examples.
    """
    import torch

    from pipeline.data.encode import NO_LOSS, encode_examples
    from pipeline.errors import DataError

    encoded: dict[str, list[list[Encoded]]] = {name: [] for name in tokenizers}
    sizes, tokens = [], 0
    for example in examples:
        both = {
            name: encode_examples((example,), tokenizer, config.train.loss_on, config.train.max_length)
            for name, tokenizer in tokenizers.items()
        }
        if any(part.dropped or part.truncated for part in both.values()):
            continue
        tokens += both["new"].tokens
        if len(sizes) >= live.FEWEST and tokens > config.evaluate.max_tokens:
            break
        for name, part in both.items():
            encoded[name].append(part.examples)
        counted = [label for sequence in both["new"].examples for label in sequence.labels if label != NO_LOSS]
        sizes.append(len(tokenizers["new"].decode(counted, skip_special_tokens=True).encode()))
    if len(sizes) < live.FEWEST:
        raise DataError(
            f"{config.data.source}: to compare takes {live.FEWEST} held-out examples, and {len(sizes)} of "
            f"{len(examples)} fit into train.max_length {config.train.max_length} tokens; raise data.held_out or "
            "train.max_length"
        )
    return encoded, torch.tensor(sizes, dtype=torch.float64), encoded["new"] == encoded["live"]


def _bits(scores: Scores, encoded: list[list[Encoded]]) -> torch.Tensor:
    """Bits that a model needs for each example, (E,)."""
    import torch

    bits = torch.zeros(len(encoded), dtype=torch.float64)
    return bits.index_add_(0, _examples_of(scores, encoded), scores.nll.double() / math.log(2))


def _examples_of(scores: Scores, encoded: list[list[Encoded]]) -> torch.Tensor:
    """Which example each token belongs to, (T,): a long text is several sequences."""
    import torch

    return torch.tensor([i for i, sequences in enumerate(encoded) for _ in sequences])[scores.sequence]


def _per_byte(values: torch.Tensor, sizes: torch.Tensor) -> Estimate:
    """The sum of `values` over that of `sizes`, and its error as a ratio estimator over examples; both (E,)."""
    from pipeline.measure import Estimate

    ratio = float(values.sum() / sizes.sum())
    residual = (values - ratio * sizes).square().sum()
    return Estimate(ratio, math.sqrt(len(sizes) / (len(sizes) - 1) * float(residual)) / float(sizes.sum()))
