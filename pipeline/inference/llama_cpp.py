"""GGUF files in llama.cpp, through llama-cpp-python: logits, greedy answers, speed. On the CPU; imports no torch.

The functions of llama.h themselves are called: the class `Llama` keeps the logits of every position of
its context, which for a vocabulary of 262,144 tokens are a megabyte each.

https://github.com/ggml-org/llama.cpp/blob/master/include/llama.h
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import random
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pipeline.config.catalog import LLAMA_CPP
from pipeline.errors import MissingExtra, ModelError
from pipeline.inference.throughput import PROMPT_TOKENS, tokens_per_second
from pipeline.system import hardware, libraries

BATCH = 512  # positions computed at a time, as llama.cpp itself does, unless their logits are too many
_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_UNMAPPED = {"load_mode": 0, "use_mmap": False}  # as newer and older versions call it; they pass over the other's
_SAID_BY = re.compile(r"^\w+: (error loading model: )?")
_complaints: list[str] = []  # of llama.cpp, since it was last asked for something


def is_installed() -> bool:
    """Return True if llama-cpp-python is installed."""
    return libraries.is_installed("llama_cpp")


def library() -> ModuleType:
    """Return llama-cpp-python, with the log of llama.cpp kept off the terminal.

    Raises:
        MissingExtra: if it is not installed.
    """
    if not is_installed():
        raise MissingExtra(LLAMA_CPP, "llama-cpp")
    import llama_cpp

    _listen()
    return llama_cpp


@functools.cache  # and so it is kept for as long as llama.cpp may call it
def _listen():
    import llama_cpp

    @llama_cpp.llama_log_callback
    def listener(level: int, text: bytes, _: object) -> None:
        if level == _ERROR:
            _complaints.append(_SAID_BY.sub("", text.decode(errors="replace").strip()))

    llama_cpp.llama_log_set(listener, None)
    llama_cpp.llama_backend_init()
    return listener


def check(path: Path) -> None:
    """Raise unless llama.cpp reads the file and finds every tensor. The values are not read.

    Raises:
        ModelError: with the reason that llama.cpp gives.
        MissingExtra: if llama-cpp-python is not installed.
    """
    api, reached = library(), []

    @api.llama_progress_callback
    def stop(progress: float, _: object) -> bool:  # called when all is found and the numbers are to be read
        reached.append(progress)
        return False

    try:
        api.llama_model_free(_load(path, progress_callback=stop, **_UNMAPPED))
    except ModelError:
        if not reached:
            raise


def positions(path: Path) -> int:
    """Return the tokens of the longest sequence that the model of a file was made for.

    Raises:
        ModelError: if llama.cpp cannot load it, with its reason.
        MissingExtra: if llama-cpp-python is not installed.
    """
    api = library()
    model, value = _load(path, vocab_only=True, **_UNMAPPED), ctypes.create_string_buffer(64)
    try:
        api.llama_model_meta_val_str(model, b"general.architecture", value, len(value))
        api.llama_model_meta_val_str(model, value.value + b".context_length", value, len(value))
    finally:
        api.llama_model_free(model)
    return int(value.value)


def _load(path: Path, **settings: object) -> int:
    """Return the address of the loaded model."""
    api = library()
    asked = api.llama_model_default_params()
    for key, value in {"n_gpu_layers": 0, **settings}.items():
        setattr(asked, key, value)
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    _complaints.clear()
    model = api.llama_model_load_from_file(str(path).encode(), asked)
    if model is None:
        raise ModelError(f"{path}: llama.cpp cannot load it: {_reason()}")
    return model


def _reason() -> str:
    return _complaints[0] if _complaints else "it does not say why"


@contextlib.contextmanager
def opened(path: Path, positions: int, logits: int | None = None) -> Iterator[Reader]:
    """Open the model of a file, on all cores.

    Args:
        positions: tokens of the longest sequence. The model computes longer ones than it was made for,
            as transformers does.
        logits: the largest number of logits in memory; those of one position always fit.

    Raises:
        ModelError: if llama.cpp cannot load it, with its reason.
        MissingExtra: if llama-cpp-python is not installed.
    """
    api = library()
    with contextlib.ExitStack() as stack:
        model = _load(path)
        stack.callback(api.llama_model_free, model)
        vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        at_a_time = BATCH if logits is None else min(BATCH, max(1, logits // vocabulary))
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = positions, at_a_time, at_a_time
        settings.n_threads = settings.n_threads_batch = hardware.cores()
        settings.offload_kqv = settings.op_offload = False
        context = api.llama_init_from_model(model, settings)
        if context is None:
            raise ModelError(f"{path}: llama.cpp cannot compute with it: {_reason()}")
        stack.callback(api.llama_free, context)
        batch = api.llama_batch_init(at_a_time, 0, 1)  # its arrays are llama.cpp's own
        stack.callback(api.llama_batch_free, batch)
        yield Reader(path, model, context, batch, at_a_time, vocabulary)


class Reader:
    """A model that reads one sequence of tokens at a time. `opened` makes it and closes it."""

    def __init__(self, path: Path, model: int, context: int, batch: Any, at_a_time: int, vocabulary: int):
        self.path, self.at_a_time, self.vocabulary = path, at_a_time, vocabulary
        self.limit = library().llama_model_n_ctx_train(model)
        self._model, self._context, self._batch, self._position = model, context, batch, 0

    def cut(self, text: str) -> list[int]:
        """Return the tokens of a text, with special tokens in it recognized and none added."""
        api, data = library(), text.encode()
        room = len(data) + 2  # a space may come first
        tokens = (api.llama_token * room)()
        vocabulary = api.llama_model_get_vocab(self._model)
        return tokens[: api.llama_tokenize(vocabulary, data, len(data), tokens, room, False, True)]

    def begin(self) -> None:
        """Forget all tokens that were read."""
        api = library()
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        self._position = 0

    def read(self, tokens: Sequence[int], wanted: Sequence[bool]) -> Iterator[np.ndarray]:
        """Read more tokens.

        Yields:
            The logits (n, V) float32 after every `wanted` token, in order; n is at most `at_a_time`.

        Raises:
            ModelError: if llama.cpp cannot compute them, or they are not finite.
        """
        api, step = library(), self.at_a_time
        for first in range(0, len(tokens), step):
            part = tokens[first : first + step]
            places = [i for i in range(len(part)) if wanted[first + i]]
            self._fill(part, places)
            _complaints.clear()
            if api.llama_decode(self._context, self._batch) != 0:
                raise ModelError(f"{self.path}: llama.cpp cannot compute with it: {_reason()}")
            self._position += len(part)
            if places:
                rows = (api.llama_get_logits_ith(self._context, i) for i in places)
                logits = np.stack([np.ctypeslib.as_array(row, (self.vocabulary,)) for row in rows])
                if not np.isfinite(logits).all():
                    raise ModelError(f"{self.path}: its logits in llama.cpp are not finite; the model is broken")
                yield logits

    def _fill(self, tokens: Sequence[int], places: Collection[int]) -> None:
        """Put tokens into the batch, and mark the places that need logits."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, self._position + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = i in places

    def next_token(self, tokens: Sequence[int]) -> int:
        """Read more tokens, and return the likeliest next one."""
        (logits,) = self.read(tokens, [False] * (len(tokens) - 1) + [True])
        return int(logits[-1].argmax())

    def answer(self, tokens: Sequence[int], stops: Collection[int], new_tokens: int) -> list[int]:
        """Return the greedy continuation of `tokens`, up to one of `stops`, which is left out."""
        self.begin()
        found: list[int] = []
        token = self.next_token(tokens)
        while token not in stops and len(found) < new_tokens:
            found.append(token)
            if len(found) < new_tokens:
                token = self.next_token([token])
        return found

    def speed(self) -> dict[str, float]:
        """Return tokens per second, as `pipeline.evaluation.generation.speed` has them."""
        choose = random.Random(0)
        prompt = [choose.randrange(self.vocabulary) for _ in range(PROMPT_TOKENS)]

        def read(count: int) -> int:
            self.begin()
            return self.next_token(prompt[:count])

        return tokens_per_second(read, lambda token: self.next_token([token]), self.limit)
