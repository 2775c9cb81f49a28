"""Decoding by compiled code: a cache of fixed size, and `torch.compile` of the step that writes a token.

This is transformers' own way, switched on: prompts are read as ever, whatever their length, and
only single steps are compiled. What is written is the same up to rounding.

It is meant for CUDA, where a step of a small model is mostly waiting for kernels to be started; it
has not been run there yet. On a CPU it does not pay. Of one core's time, the widths of SmolLM2-135M
in int4 wrote 55 tokens a second without it and 22 with it, after half a minute of compiling: every
step attends to all positions that the cache has room for, and even with room for no more than 256
it wrote no faster. `python scripts/benchmark_decode.py --size 135m --prompt 32 --sides
int4,int4-compiled` shows it.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

import torch

from pipeline.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Positions that the cache has room for; one that has to grow beyond is compiled for anew.
CONTEXT = 1024
_COMPILERS = ("g++", "clang++", "c++")


def compile_decoding(model: PreTrainedModel) -> None:
    """Let `model.generate` compile its steps, and compile them now; says so on stderr, with the time it took.

    Nothing in the model changes but `generate`, so it is saved as it was. With another batch size
    it compiles again.

    Raises:
        ModelError: where there is no C++ compiler.
    """
    from transformers import CompileConfig

    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), *_COMPILERS)):
        raise ModelError("compile: needs a C++ compiler; install one (apt install g++), or leave compile off")
    on_cpu = model.device.type == "cpu"
    config = CompileConfig(mode="default") if on_cpu else CompileConfig()
    config._compile_all_devices = on_cpu  # transformers leaves CPUs out by itself
    model.generate = partial(model.generate, cache_implementation="static", compile_config=config)
    print("compiling the decoding step, which may take minutes ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    _warm_up(model)
    print(f"compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def _warm_up(model: PreTrainedModel) -> None:
    """Write two tokens into a cache as long as all later ones: transformers keeps the greatest length asked for."""

    def done(ids: torch.Tensor, *_, **__) -> torch.Tensor:
        return torch.full((len(ids),), ids.shape[1] >= 4, device=ids.device)

    limit = getattr(model.config, "max_position_embeddings", None) or CONTEXT
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    mask, stop = torch.ones_like(ids), [done]
    model.generate(
        ids,
        attention_mask=mask,
        max_length=min(limit, CONTEXT),
        min_new_tokens=3,
        do_sample=False,
        stopping_criteria=stop,
        pad_token_id=0,
    )
