"""`python -m tests.soak.server FILE serve ...`: `banded serve` that says on SIGUSR1 what it holds, as JSON in FILE.

The product is as it is, but that it returns freed memory to the system before it says so. What cannot be seen from outside
is looked up in the signal's handler: tasks of the event loop, threads of Python, bytes that malloc has given out, and living
objects by type.
"""

import asyncio
import ctypes
import gc
import json
import os
import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from service.cli import main
from service.jobs import runner
from tests.serving import JOB_COMMAND

MOST_TYPES = 60


class MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in names]


def bytes_in_use() -> int:
    """What malloc has given out, in all arenas."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallInfo
    found = mallinfo2()
    return int(found.uordblks + found.hblkhd)


def tensor_bytes(objects: list[Any]) -> int:
    """Of the storages of all tensors, each once."""
    storages = [each.untyped_storage() for each in objects if isinstance(each, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def holdings() -> dict[str, Any]:
    """What is left after a full collection. Objects that were there when the model had been loaded are not counted."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # the server keeps what it has freed, see keep_freed_memory: that is no leak
    objects = gc.get_objects()
    types = Counter(f"{type(each).__module__}.{type(each).__qualname__}" for each in objects)
    tasks = asyncio.all_tasks(asyncio.get_running_loop())
    return {
        "tasks": sorted(getattr(task.get_coro(), "__qualname__", "?") for task in tasks),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "allocated": bytes_in_use(),
        "tensors": tensor_bytes(objects),
        "objects": len(objects),
        "types": dict(types.most_common(MOST_TYPES)),
    }


def tell_on_signal(path: Path) -> None:
    def tell(signum: int, frame: FrameType | None) -> None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(holdings()))
        os.replace(part, path)

    signal.signal(signal.SIGUSR1, tell)


if __name__ == "__main__":
    runner.COMMAND = JOB_COMMAND
    tell_on_signal(Path(sys.argv.pop(1)))
    sys.exit(main())
