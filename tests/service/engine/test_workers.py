"""Work that waits for a thread must not keep the process from ending."""

import subprocess
import sys
import time


def test_what_waits_for_a_thread_is_given_up_at_the_end() -> None:
    code = (
        "import time; from service.engine import workers\n"
        "for pool in (workers.template_thread, workers.workers):\n"
        "    [pool.submit(time.sleep, 2) for _ in range(30)]\n"
        "workers.drop_waiting()"
    )
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert time.monotonic() - started < 15, "30 waits of 2 s in one thread would take a minute"
