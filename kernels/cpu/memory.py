"""Memory in huge pages, where the system has them: a step reads all weights, and looks up the address of each page."""

import mmap
from contextlib import suppress

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
CHUNK = 64 << 20  # bytes that are mapped at a time
ALIGNMENT = 64  # bytes, of a cache line
# Bytes of a tensor that lies elsewhere: those of adapters come and go, and would take ever more of a chunk.
SMALL = 512 << 10


class HugePages:
    """What many tensors are laid into, one after the other. A chunk of it is freed with the last tensor there."""

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)

    def copy(self, numbers: Tensor) -> Tensor:
        """The same numbers there; below SMALL bytes in memory of their own."""
        if numbers.nbytes < SMALL:
            return numbers.clone(memory_format=torch.contiguous_format)
        size = -(-numbers.nbytes // ALIGNMENT) * ALIGNMENT
        if len(self._rest) < size:
            self._rest = mapped(max(size, CHUNK))
        room, self._rest = self._rest[:size], self._rest[size:]
        return room[: numbers.nbytes].view(numbers.dtype).view(numbers.shape).copy_(numbers)


def mapped(size: int) -> Tensor:
    """Bytes (size,) from the beginning of a huge page on."""
    memory = mmap.mmap(-1, size + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    room = torch.frombuffer(memory, dtype=torch.uint8)
    return room[-room.data_ptr() % HUGE_PAGE :][:size]
