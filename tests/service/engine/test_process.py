import subprocess
import sys

import torch

from service.engine.process import one_torch_thread, switch_threads_often

# For a script: the bytes of its process that are resident.
RESIDENT = (
    "from pathlib import Path\n"
    "from resource import getpagesize\n"
    "resident = lambda: int(Path('/proc/self/statm').read_text().split()[1]) * getpagesize()\n"
)


def printed(script: str) -> int:
    """The number that a script prints in a process of its own, because settings of malloc can't be undone."""
    return int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


def test_one_torch_thread_is_given_back_even_after_an_error() -> None:
    before = torch.get_num_threads()
    try:
        with one_torch_thread():
            assert torch.get_num_threads() == 1
            raise KeyError
    except KeyError:
        pass
    assert torch.get_num_threads() == before


def test_freed_memory_stays_with_the_process() -> None:
    """8 MB blocks are reused without new page faults."""
    script = (
        "import resource\n"
        "from service.engine.process import keep_freed_memory\n"
        "keep_freed_memory()\n"
        "def use():\n"
        "    block = bytearray(8 << 20)\n"
        "    block[::4096] = bytes(2048)\n"
        "use()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(20):\n"
        "    use()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    faults = printed(script)
    assert faults < 2048, "freed memory was mapped anew: 20 x 2048 pages in all"


def test_large_blocks_are_returned() -> None:
    """Logits of prompts. In the heap, a block behind them that is in use would keep their room with the process."""
    script = (
        "from service.engine.process import MAPPED_BYTES, keep_freed_memory\n"
        "keep_freed_memory(MAPPED_BYTES)\n"
        "before, behind = resident(), []\n"
        "for _ in range(8):\n"
        "    block = bytearray(b'a') * MAPPED_BYTES\n"
        "    behind.append(bytearray(8 << 20))\n"
        "del block\n"
        "print(resident() - before)\n"
    )
    kept = printed(RESIDENT + script)
    assert kept < 80 << 20, "8 x 8 MB are in use"


def test_threads_share_what_they_have_freed() -> None:
    """Of 8 threads that use 24 MB each, one after the other. With an arena a thread, each would keep its own."""
    script = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from threading import Barrier\n"
        "from service.engine.process import keep_freed_memory, share_freed_memory\n"
        "share_freed_memory()\n"
        "keep_freed_memory()\n"
        "use = lambda: len([bytearray(b'a') * 8192 for _ in range(3072)])\n"
        "started = Barrier(8)\n"
        "with ThreadPoolExecutor(8) as pool:\n"
        "    list(pool.map(lambda _: started.wait(), range(8)))\n"
        "    before = resident()\n"
        "    for _ in range(64):\n"
        "        pool.submit(use).result()\n"
        "    print(resident() - before)\n"
    )
    kept = printed(RESIDENT + script)
    assert kept < 40 << 20, "8 x 24 MB were used"


def test_a_thread_that_runs_python_gives_way_often() -> None:
    before = sys.getswitchinterval()
    try:
        sys.setswitchinterval(0.005)  # Python's own; another test may have changed it
        switch_threads_often()
        assert sys.getswitchinterval() < 0.0025
    finally:
        sys.setswitchinterval(before)
