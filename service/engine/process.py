"""What this process's runtime libraries have to be told for steps, of serving or of training, to run at full speed."""

import ctypes
import gc
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# glibc's names for the parameters of mallopt.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
KEEP_BYTES = 2**31 - 1


def keep_freed_memory() -> None:
    """Have malloc keep what is freed instead of returning it to the kernel.

    A step frees and allocates tensors of the same sizes again and again; by default glibc maps and unmaps those of a few
    megabytes each time, and their page faults took longer than the arithmetic. Other libraries are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, KEEP_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keep torch from starting worker threads in this thread.

    OpenMP keeps a team of workers for every thread that ever ran something in parallel, and where all teams together
    outnumber the cores it lets none of them spin while it waits: a step then takes twice as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def freeze_loaded_objects() -> None:
    """Take what exists by now out of the garbage collector's sight: it lasts as long as the process.

    Modules and models are two hundred thousand objects. A full collection walks through them while every thread waits.
    """
    gc.collect()
    gc.freeze()
