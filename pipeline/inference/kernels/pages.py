"""Memory in large pages, for weights that are read from beginning to end at every token.

With pages of 4 KB the processor looks up an address for every few rows and stops reading ahead at each border; the
int8 product of a token takes an eighth less time with pages of 2 MB. Linux gives them to whoever asks.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Sequence

import torch

_PAGE = 2 << 20
_ALIGNMENT = 64


def give_back() -> None:
    """Give what was freed back to the system, which glibc by itself does only for some sizes."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # other systems have no such function
        ctypes.CDLL(None).malloc_trim(0)


class Room:
    """`size` bytes of which tensors are taken in turn; in ordinary pages if the system has no large ones."""

    def __init__(self, size: int):
        if size and hasattr(mmap, "MADV_HUGEPAGE"):
            pages = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError):  # a kernel without large pages
                pages.madvise(mmap.MADV_HUGEPAGE)
            memory = torch.frombuffer(pages, dtype=torch.uint8)
            self._memory = memory[-memory.data_ptr() % _PAGE :]
        else:
            self._memory = torch.empty(size, dtype=torch.uint8)
        self._used = 0

    @staticmethod
    def needed(tensors: Sequence[torch.Tensor]) -> int:
        """Return the bytes that a room for these tensors has."""
        return sum(tensor.nbytes + -tensor.nbytes % _ALIGNMENT for tensor in tensors)

    def cat(self, tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
        """Return what `torch.cat` does, in this room."""
        shape = list(tensors[0].shape)
        shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
        size = sum(tensor.nbytes for tensor in tensors)
        place = self._memory[self._used : self._used + size].view(tensors[0].dtype).view(shape)
        self._used += size + -size % _ALIGNMENT
        return torch.cat(list(tensors), dim=dim, out=place)
