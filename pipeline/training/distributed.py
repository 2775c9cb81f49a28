"""The processes that train together, as each of them sees the others."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

# A download takes as long as it takes; whoever dies meanwhile ends the wait by that.
PATIENCE = datetime.timedelta(days=7)
# How the end of another process shows in this one.
_ECHOES = ("Terminated", "DistBackendError", "DistNetworkError", "DistStoreError")
_ECHOED = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")


@dataclass(frozen=True)
class Team:
    """This process among those that `accelerate launch` started; by default it is alone."""

    rank: int = 0
    local_rank: int = 0  # among those on this machine
    machine: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Team:
        """As the environment says; without a launch of ours nothing there counts."""
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
    def leads(self) -> bool:
        """Is this the one that writes what remains?"""
        return self.rank == 0

    @property
    def hosts(self) -> bool:
        """Is this the one that fetches and unpacks on its machine?"""
        return self.local_rank == 0

    def meet(self) -> Meeting:
        """Meet the others; imports torch."""
        if self.size == 1:
            return Meeting(self, None)
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())  # which takes this process's GPU too
        return Meeting(self, torch.distributed.new_group(backend="gloo", timeout=PATIENCE))


@dataclass(frozen=True)
class Meeting:
    """What the processes of a team say to each other besides gradients."""

    team: Team
    group: object

    @contextlib.contextmanager
    def host_first(self) -> Iterator[None]:
        """One process of each machine goes first, and the others when it is through."""
        if not self.team.hosts:
            self.wait()
        yield
        if self.team.hosts:
            self.wait()

    def wait(self) -> None:
        """Until all are here."""
        if self.group is not None:
            import torch

            torch.distributed.barrier(group=self.group)

    def told(self, value):
        """What the leading process says; the others' `value` is not heard."""
        if self.group is None:
            return value
        import torch

        said = [value]
        torch.distributed.broadcast_object_list(said, src=0, group=self.group)
        return said[0]


def is_echo(error: BaseException) -> bool:
    """Does this error only tell that another process has ended, or asked for the end?"""
    text = str(error).lower()
    return type(error).__name__ in _ECHOES or (
        isinstance(error, RuntimeError) and any(word in text for word in _ECHOED) and "out of memory" not in text
    )


def divided() -> str | None:
    """Return what divides the model among the processes, `fsdp` or `deepspeed`; None if nothing does."""
    from accelerate.utils import parse_flag_from_env

    kinds = {"fsdp": "ACCELERATE_USE_FSDP", "deepspeed": "ACCELERATE_USE_DEEPSPEED"}
    return next((kind for kind, variable in kinds.items() if parse_flag_from_env(variable)), None)


def whole_adapter(model: PeftModel) -> dict[str, torch.Tensor] | None:
    """Return the trained weights by name, put together from the parts in all processes.

    Every process must call it. The result is None if the model holds its weights whole.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if divided() == "fsdp":
        return {name: p.full_tensor().detach().cpu() for name, p in trained.items()}
    if divided() == "deepspeed":
        from deepspeed.zero import GatheredParameters

        with GatheredParameters(list(trained.values())):
            return {name: p.detach().cpu().clone() for name, p in trained.items()}
    return None
