"""How many of the machine's cores this process may use, and whether it gets them."""

import logging
import math
from contextlib import suppress
from pathlib import Path, PurePosixPath

log = logging.getLogger("banded")

# CoreWatch looks at so many seconds of steps, in which threads may wait for cores for this share of the time, in sum.
WATCH_SECONDS = 10.0
MAX_WAITED = 0.5


def cpu_quota(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """How many CPUs the control groups of this process, and those above them, allow it. Infinite without a limit."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # only Linux has them
        return math.inf
    found = [math.inf]
    for line in lines:
        _, controllers, path = line.split(":", 2)  # version 2 has one hierarchy, without named controllers
        if controllers and "cpu" not in controllers.split(","):
            continue
        # A container may see a path of its host's, of which nothing exists here. Its own group is then the root.
        named = PurePosixPath(path.lstrip("/"))
        found += [group_quota(groups / controllers / group) for group in (named, *named.parents)]
    return min(found)


def group_quota(group: Path) -> float:
    try:
        quota, period = (group / "cpu.max").read_text().split()
    except OSError:
        try:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:  # no such group, or a root, which has no limit
            return math.inf
    return math.inf if quota == "max" or int(quota) < 0 else int(quota) / int(period)


class CoreWatch:
    """Says in the log, once, that the threads of this process wait for cores which others hold."""

    def __init__(self) -> None:
        self._seconds, self._waited, self._said = 0.0, seconds_waited(), False

    def add_step(self, seconds: float) -> None:
        self._seconds += seconds
        if self._said or self._seconds < WATCH_SECONDS:
            return
        waited = seconds_waited()
        share = (waited - self._waited) / self._seconds
        self._seconds, self._waited, self._said = 0.0, waited, share > MAX_WAITED
        if self._said:
            log.warning(
                "other processes hold this machine's cores: in %.0f s of steps our threads waited %.1f s for one; give the "
                "server cores of its own, or set OMP_NUM_THREADS to the number of cores that are free",
                *(WATCH_SECONDS, share * WATCH_SECONDS),
            )


def seconds_waited() -> float:
    """For how long this process's threads were ready to run without a core, in sum; 0 where the kernel doesn't say."""
    waited = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # the thread has ended
            waited += int(file.read_text().split()[1])
    return waited / 1e9
