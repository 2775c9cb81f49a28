"""A model that is run one decoder block at a time, with the weights of one block in memory.

The model's own forward pass runs for each block, so that masks and positions are right for every architecture. All
blocks before it hand their input on, the block replaces its input by stored activations, and then the pass ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import ModelError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.experts import expert_places
from pipeline.models.matrices import linear_weights, skeleton
from pipeline.models.meta_model import computing_type, fill_buffers, put
from pipeline.models.tensor_names import open_checkpoint
from pipeline.system.hardware import compute_dtype

Observe = Callable[[str, torch.Tensor], None]  # name of a weight, and the inputs (T, K) of its layer


class _End(Exception):
    """The end of a forward pass after the block that was asked for."""

    def __init__(self, output: torch.Tensor):
        self.output = output


class BlockwiseModel:
    """A full-precision model whose decoder blocks are loaded and run one after the other.

    Attributes:
        architecture: the name of its class in transformers.
        linear: the weights of linear layers, name -> (N, K).
        count: number of decoder blocks.
        table: the name of the embedding's weight.
        skeleton: the model, with only some weights in memory.
        dtype: the compute type.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint | None = None, device: str = "cpu"):
        self.device, self.dtype = torch.device(device), compute_dtype(device)
        self._checkpoint = open_checkpoint(folder) if checkpoint is None else checkpoint
        self.linear = linear_weights(folder)
        self.skeleton = skeleton(folder).to(self.dtype).eval()
        self.architecture = type(self.skeleton).__name__
        if expert_places(self.skeleton):
            raise ModelError(
                f"{self.architecture}: a mixture of experts is not calibrated, since some experts see little of any "
                "text. Try: quantize.quality=fast"
            )
        self._prefix, self._layers = _decoder_blocks(self.skeleton, self.linear, folder)
        self._learn(None)
        self.count = len(self._layers)
        table, head = self.skeleton.get_input_embeddings(), self.skeleton.get_output_embeddings()
        others = {f"{name}." for name, module in self.skeleton.named_modules() if module in (table, head)}
        self.table = next(f"{name}.weight" for name, module in self.skeleton.named_modules() if module is table)
        read = self.skeleton.state_dict().keys()  # some checkpoints also hold tensors that the model does not read
        self._stored = [name for name in self._checkpoint if name in read]
        for name in self._stored:
            if not name.startswith((self._prefix, *others)):
                self._put(name)
        fill_buffers(self.skeleton, self.device)
        self._embedding = table

    def weights_of(self, block: int) -> list[str]:
        """Return the names of the linear weights of a block."""
        return [name for name in self.linear if name.startswith(f"{self._prefix}{block}.")]

    def names_of(self, block: int) -> list[str]:
        """Return the names of the parameters of a block."""
        return [name for name in self._stored_in(block) if _is_parameter(self.skeleton, name)]

    def weight(self, name: str) -> torch.Tensor:
        """Return a weight (N, K) as it is stored."""
        return self._checkpoint.read(name)

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the type in which a parameter is stored."""
        return self._checkpoint[name].dtype

    def weight_rows(self, name: str, first: int, stop: int) -> torch.Tensor:
        """Return rows (n, K) of a weight as they are stored."""
        return self._checkpoint.read_rows(name, first, stop)

    @contextmanager
    def loaded(self, block: int) -> Iterator[None]:
        """Hold the weights of a block in memory."""
        names = self._stored_in(block)
        shapes = {name: self.skeleton.get_parameter(name) for name in self.names_of(block)}
        for name in names:
            self._put(name)
        try:
            yield
        finally:
            for name, empty in shapes.items():
                put(self.skeleton, name, empty.data)

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """Hold the embedding in memory, which only the first block needs."""
        empty = self._embedding.weight.data
        self._put(self.table)
        try:
            yield
        finally:
            put(self.skeleton, self.table, empty)

    @torch.no_grad()
    def enter(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the input (B, T, H) of the first block for tokens (B, T); the embedding must be loaded."""

        def end(hidden: torch.Tensor, *_: Any, **__: Any) -> None:
            raise _End(hidden)

        return self._forward({0: end}, ids, self._embedding)

    @torch.no_grad()
    def outputs(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """Return the output (B, T, H) of every block in the model's own forward pass.

        Args:
            ids: tokens (B, T); the embedding must be loaded.
        """
        found: list[torch.Tensor] = []

        def compute(block: int, *args: Any, **kwargs: Any) -> Any:
            if block != len(found):
                raise ModelError(f"{self.architecture}: its decoder blocks do not run in order")
            with self.loaded(block):
                returned = type(self._layers[block]).forward(self._layers[block], *args, **kwargs)
            found.append(returned[0] if isinstance(returned, tuple) else returned)
            if block + 1 == self.count:
                raise _End(found[-1])
            return returned

        self._forward({block: partial(compute, block) for block in range(self.count)}, ids, self._embedding)
        return found

    @torch.no_grad()
    def run(self, block: int, ids: torch.Tensor, hidden: torch.Tensor, observe: Observe | None = None) -> torch.Tensor:
        """Return the output (B, T, H) of a loaded block.

        Args:
            ids: tokens (B, T), from which the model makes masks and positions.
            hidden: the input (B, T, H) of the block.
            observe: called with the inputs of each linear layer.
        """
        hooks = self._observe(block, observe) if observe else []
        try:
            return self._output(block, ids, hidden)
        finally:
            for hook in hooks:
                hook.remove()

    @torch.enable_grad()
    def differentiate(
        self, block: int, ids: torch.Tensor, hidden: torch.Tensor, gradient: torch.Tensor
    ) -> torch.Tensor:
        """Return the gradient for the input (B, T, H) of a loaded block, given that for its output.

        Gradients for weights that `trained` holds are added up in `gradient_of`.
        """
        hidden = hidden.detach().requires_grad_()
        self._output(block, ids, hidden).backward(gradient)
        assert hidden.grad is not None, "a block's output depends on its input"
        return hidden.grad

    @torch.no_grad()
    def finish(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return the last hidden states (B, T, H) of the model, given the output of its last block."""
        return self._finish(ids, hidden)

    @torch.enable_grad()
    def differentiate_end(self, ids: torch.Tensor, hidden: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient for the output (B, T, H) of the last block, given that for the last hidden states."""
        hidden = hidden.detach().requires_grad_()
        self._finish(ids, hidden).backward(gradient)
        assert hidden.grad is not None, "the model's output depends on its last block"
        return hidden.grad

    @contextmanager
    def replaced(self, weights: Mapping[str, torch.Tensor], trained: bool = False) -> Iterator[None]:
        """Hold other weights (N, K) in their places, in the compute type, and then those from before.

        Args:
            trained: gradients for them are wanted.
        """
        before = {name: self.skeleton.get_parameter(name).data for name in weights}
        try:
            for name, weight in weights.items():
                put(self.skeleton, name, weight.to(self.device, before[name].dtype))
                self.skeleton.get_parameter(name).requires_grad_(trained)
            yield
        finally:
            for name, weight in before.items():
                put(self.skeleton, name, weight)

    def gradient_of(self, name: str) -> torch.Tensor:
        """Return the gradient (N, K) for a weight that is trained, and forget it."""
        parameter = self.skeleton.get_parameter(name)
        gradient, parameter.grad = parameter.grad, None
        return torch.zeros_like(parameter.data) if gradient is None else gradient

    def _output(self, block: int, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        forward = type(self._layers[block]).forward

        def compute(_: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            found = forward(self._layers[block], hidden, *args, **kwargs)
            self._learn(found)
            raise _End(found[0] if isinstance(found, tuple) else found)

        return self._forward({**{before: self._hand_on for before in range(block)}, block: compute}, ids, None)

    def _finish(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        def last(_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return self._hand_on(hidden)

        instead = {**{block: self._hand_on for block in range(self.count - 1)}, self.count - 1: last}
        states: torch.Tensor = self._pass(instead, ids, None)[0]
        return states

    def _learn(self, returned: Any) -> None:
        """Let the blocks that only hand their input on return it in the form of this output."""
        rest = (None,) * (len(returned) - 1) if isinstance(returned, tuple) else None
        self._hand_on: Callable = lambda hidden, *_, **__: hidden if rest is None else (hidden, *rest)

    def _observe(self, block: int, observe: Observe) -> list[Any]:
        def hook(name: str) -> Callable:
            def tell(_: Any, given: tuple[torch.Tensor, ...]) -> None:  # a result would replace the inputs
                observe(name, given[0].reshape(-1, given[0].shape[-1]))

            return tell

        names = [name.removesuffix(".weight") for name in self.weights_of(block)]
        return [self.skeleton.get_submodule(n).register_forward_pre_hook(hook(f"{n}.weight")) for n in names]

    def _forward(self, instead: dict[int, Callable], ids: torch.Tensor, embedding: Any) -> torch.Tensor:
        """Run the model until a block ends the pass, and return what that block gives."""
        try:
            self._pass(instead, ids, embedding)
        except _End as end:
            return end.output
        raise ModelError(f"{self.architecture}: its decoder blocks do not run in order")

    def _pass(self, instead: dict[int, Callable], ids: torch.Tensor, embedding: Any) -> Any:
        """Run the model without its head.

        Args:
            instead: block -> its forward for this pass.
            embedding: None if the embedded tokens do not matter.
        """
        for block, forward in instead.items():
            self._layers[block].forward = forward
        if embedding is None:
            width = self._embedding.weight.shape[1]
            self._embedding.forward = lambda ids: torch.zeros(*ids.shape, width, dtype=self.dtype, device=self.device)
        try:
            return self.skeleton.base_model(input_ids=ids.to(self.device), use_cache=False)
        finally:
            for block in instead:
                del self._layers[block].forward
            if embedding is None:
                del self._embedding.forward

    def _stored_in(self, block: int) -> list[str]:
        """Return the names of the stored parameters and buffers of a block."""
        return [name for name in self._stored if name.startswith(f"{self._prefix}{block}.")]

    def _put(self, name: str) -> None:
        stored = self._checkpoint.read(name)
        put(self.skeleton, name, stored.to(self.device, computing_type(self.skeleton, name, stored.dtype)))


def _is_parameter(model: torch.nn.Module, name: str) -> bool:
    return name.rpartition(".")[2] in model.get_submodule(name.rpartition(".")[0])._parameters


def _decoder_blocks(model: Any, linear: dict[str, Any], folder: Path) -> tuple[str, torch.nn.ModuleList]:
    """Return the list of decoder blocks, the one with the most linear layers, and the prefix of its parameters.

    Raises:
        ModelError: if there is none.
    """
    lists = {f"{n}.": module for n, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)}
    held = {prefix: sum(name.startswith(prefix) for name in linear) for prefix in lists}
    best = max(held, key=lambda prefix: (held[prefix], -len(prefix)), default="")
    if not best or not held[best]:
        raise ModelError(f"{folder}: no list of decoder blocks was found, so the model cannot be calibrated")
    return best, lists[best]
