"""Settings of the process's runtime libraries without which steps, of serving or training, run at half speed.

Imports torch only where it is used: a server sets its memory ahead of the thread that takes seconds to import torch.
"""

import ctypes
import gc
import logging
import math
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from service.engine.cores import cpu_quota

log = logging.getLogger("banded")

# Parameters of glibc's mallopt.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8
KEEP_BYTES = 2**31 - 1
# Blocks from this size on are logits of prompts, 51 MB, in a server. Kept by malloc too, they would take room for several:
# small tensors come to lie in what was freed, and the next one no longer fits there.
MAPPED_BYTES = 32 << 20
SWITCH_SECONDS = 0.001


def keep_freed_memory(smaller_than: int = KEEP_BYTES) -> None:
    """Have malloc keep what is freed, in blocks smaller than so many bytes, instead of returning it to the kernel.

    Every step allocates and frees tensors of the same sizes. By default glibc maps and unmaps those of a few megabytes
    each time, and the page faults take longer than the arithmetic. Other C libraries are left as they are.
    """
    _set_malloc(M_MMAP_THRESHOLD, smaller_than)
    _set_malloc(M_TRIM_THRESHOLD, KEEP_BYTES)


def share_freed_memory() -> None:
    """Have threads that start from now on use memory that others have freed.

    By default glibc gives each an arena of its own, up to eight a core, which keeps as much as it ever held at a time.
    """
    _set_malloc(M_ARENA_MAX, 1)


def _set_malloc(parameter: int, value: int) -> None:
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(parameter, value)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keep torch from starting worker threads in this thread.

    OpenMP keeps a team of workers for every thread that ever ran something in parallel. If all teams together outnumber
    the cores, no worker spins while it waits, and a step takes twice as long.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def keep_to_quota() -> None:
    """Have torch use no more threads than the container's quota of CPUs: beyond it all are halted, for milliseconds."""
    import torch

    threads, quota = torch.get_num_threads(), cpu_quota()
    if quota < threads:
        allowed = max(1, math.floor(quota))
        torch.set_num_threads(allowed)
        log.info("threads: %d, because the container's quota is %.4g CPUs", allowed, quota)


def switch_threads_often() -> None:
    """Have a thread that runs Python give way after a millisecond, not after five.

    A step takes the interpreter back dozens of times, after each of torch's operations. Next to a thread that parses a large
    request, each time would cost those five.
    """
    sys.setswitchinterval(SWITCH_SECONDS)


def freeze_loaded_objects() -> None:
    """Hide the objects that exist now from the garbage collector: they last as long as the process.

    Modules and models are two hundred thousand objects, and a full collection visits them while every thread waits.
    """
    gc.collect()
    gc.freeze()
