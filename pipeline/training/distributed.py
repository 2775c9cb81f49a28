"""The processes that train together: which one this is, and what they send to each other."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

from pipeline.errors import UserError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

# Long enough for any download. If a process dies, the wait of the others ends at once.
TIMEOUT = datetime.timedelta(days=7)
# Errors that show that another process ended.
_PEER_ERRORS = ("Terminated", "DistBackendError", "DistNetworkError", "DistStoreError")
_PEER_MESSAGES = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")

Value = TypeVar("Value")


@dataclass(frozen=True)
class TrainingProcess:
    """This process among those that `accelerate launch` started; by default it is the only one.

    Attributes:
        rank: its number among all processes.
        local_rank: its number among the processes on this machine.
        machine: number of this machine.
        size: number of all processes.
    """

    rank: int = 0
    local_rank: int = 0
    machine: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> TrainingProcess:
        """Return this process as its environment describes it, or the only one if tunepress did not launch it."""
        if "TUNEPRESS_PROCESSES" not in os.environ:
            return cls()
        rank, local_rank, machine, size = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("GROUP_RANK", 0), ("WORLD_SIZE", 1))
        )
        if str(size) != os.environ["TUNEPRESS_PROCESSES"]:
            raise UserError(f"accelerate started {size} processes, not {os.environ['TUNEPRESS_PROCESSES']}")
        return cls(rank, local_rank, machine, size)

    @property
    def is_main(self) -> bool:
        """Return True if this process writes the results."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Return True if this process fetches and unpacks files on its machine."""
        return self.local_rank == 0

    def join_group(self) -> ProcessGroup:
        """Connect to the other processes; imports torch."""
        if self.size == 1:
            return ProcessGroup(self, None)
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())  # also selects the GPU of this process
        return ProcessGroup(self, torch.distributed.new_group(backend="gloo", timeout=TIMEOUT))


@dataclass(frozen=True)
class ProcessGroup:
    """The connection between the processes, for anything but gradients; `group` is None if there is one process."""

    process: TrainingProcess
    group: torch.distributed.ProcessGroup | None

    @contextlib.contextmanager
    def local_main_first(self) -> Iterator[None]:
        """Let one process of each machine go first, and the others after it is done."""
        if not self.process.is_local_main:
            self.wait()
        yield
        if self.process.is_local_main:
            self.wait()

    def wait(self) -> None:
        """Wait until every process calls this."""
        if self.group is not None:
            import torch

            torch.distributed.barrier(group=self.group)

    def broadcast(self, value: Value) -> Value:
        """Return the value of the main process, in every process."""
        if self.group is None:
            return value
        import torch

        values = [value]
        torch.distributed.broadcast_object_list(values, src=0, group=self.group)
        return values[0]


def is_caused_by_other_process(error: BaseException) -> bool:
    """Return True if this error only shows that another process ended, or asked for the end."""
    text = str(error).lower()
    return type(error).__name__ in _PEER_ERRORS or (
        isinstance(error, RuntimeError) and any(word in text for word in _PEER_MESSAGES) and "out of memory" not in text
    )


def sharding() -> str | None:
    """Return how the model is sharded among the processes: `fsdp` or `deepspeed`; None if it is not sharded."""
    from accelerate.utils import parse_flag_from_env

    kinds = {"fsdp": "ACCELERATE_USE_FSDP", "deepspeed": "ACCELERATE_USE_DEEPSPEED"}
    return next((kind for kind, variable in kinds.items() if parse_flag_from_env(variable)), None)


def gather_adapter(model: PeftModel) -> dict[str, torch.Tensor] | None:
    """Return the trained weights by name, gathered from the shards in all processes; None for a model without shards.

    Every process must call it.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if sharding() == "fsdp":
        from torch.distributed.tensor import DTensor

        return {name: cast(DTensor, p).full_tensor().detach().cpu() for name, p in trained.items()}
    if sharding() == "deepspeed":
        from deepspeed.zero import GatheredParameters

        with GatheredParameters(list(trained.values())):
            return {name: p.detach().cpu().clone() for name, p in trained.items()}
    return None
