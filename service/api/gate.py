"""How many connections may be open, whose request begins next, and which end when time or room runs out."""

import asyncio
import logging
import math
import resource
import select
import time
from collections import Counter, OrderedDict, abc
from collections.abc import Callable
from typing import Protocol

log = logging.getLogger("banded.api")

HEAD_SECONDS = 30.0  # from the connection, or from a request's first byte, to the end of its headers
BODY_SECONDS = 30.0  # that a body may rest
CLOSE_SECONDS = 30.0  # in which a client takes nothing of its last answer
LINGER_SECONDS = 2.0  # that a refused client has to read why and close
# Bytes of unfinished headers and of waiting requests that all connections may have together.
MAX_HELD = 16 << 20
MOST_READ = 256 << 10  # bytes that a connection reads at a time
# What else needs descriptors: files, jobs, and connections that come at once and are about to be refused.
OTHER_FILES = 1024
SECONDS_BETWEEN_POLLS = 0.5
SECONDS_BETWEEN_REPORTS = 10.0
MOST_AT_ONCE = 64  # ended in one sweep, so that none holds the event loop up
# Requests that begin at once, and in so many seconds: each takes a tenth to half of a millisecond. Connections wait to be
# accepted and read meanwhile.
STARTS_AT_ONCE, START_SECONDS = 8, 0.004
# As many may begin at once after a rest: a batch of streams that ends together is followed by the next.
STARTS_AFTER_REST = 32
# The same of requests that ask whether the server lives. The newest goes first, so that a crowd's delay no later one.
PROBES_AT_ONCE, PROBE_SECONDS = 16, 0.004
HEADS_PER_TURN = 8  # long heads that are parsed in one turn of the event loop
# Pieces of bodies that are read after their answer, in so many seconds: each takes a fifth of a millisecond.
DISCARDS_AT_ONCE, DISCARD_SECONDS = 4, 0.002
# Connections of clients that have left, closed in so many seconds: each takes the kernel a hundredth of a millisecond.
CLOSES_AT_ONCE, CLOSE_TURN_SECONDS = 64, 0.002
# Of all requests that were sent ahead of an answer, so many begin in so many seconds: nobody else feels them.
AHEAD_AT_ONCE, AHEAD_SECONDS = 4, 0.02


class Wait:
    """What a client is waited for, in the order in which such connections give way to new ones."""

    LINGER = "the end"
    CLOSING = "reading the last answer"
    IDLE = "another request"
    HEAD = "the end of the headers"
    UNREAD = "reading the answer"
    BODY = "the body"


class Guest(Protocol):
    """A connection, as the gate sees it."""

    wait: str | None  # of Wait; only the gate writes it
    held: int  # bytes; only the gate writes it

    def overdue(self, wait: str) -> None:
        """The client has been waited for too long. The guest waits for nothing until it says so again."""

    def give_way(self) -> None:
        """Close at once, for another connection."""

    def has_left(self) -> None:
        """The client has closed its end, which was not seen because nothing is read."""

    def descriptor(self) -> int: ...


class Turns:
    """Calls a function for one guest after the other, at most `most` in `seconds`; 0 is one turn of the event loop.

    The seconds begin once the tasks that those calls create have run, so that others have a turn on a slow machine too.
    What is not used is saved, up to `saved` calls.
    """

    def __init__(self, most: int, seconds: float, *, saved: int = 0, newest_first: bool = False):
        self._most, self._seconds, self._newest_first = most, seconds, newest_first
        self._left = self._saved = max(most, saved)
        self._is_counting = False
        self._waiting: dict[Guest, Callable[[], None]] = {}

    def call(self, guest: Guest, function: Callable[[], None]) -> None:
        """Call it now, if there is room and nobody waits, or later, unless `guest` waits already."""
        self._waiting.setdefault(guest, function)
        self._go_on()

    def forget(self, guest: Guest) -> None:
        self._waiting.pop(guest, None)

    def _go_on(self) -> None:
        if (self._waiting or self._left < self._saved) and not self._is_counting:
            self._is_counting = True
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, loop.call_later, self._seconds, self._begin)
        while self._waiting and self._left:
            self._left -= 1
            guest = next(reversed(self._waiting) if self._newest_first else iter(self._waiting))
            self._waiting.pop(guest)()

    def _begin(self) -> None:
        self._is_counting, self._left = False, min(self._saved, self._left + self._most)
        self._go_on()


class Gate:
    """The open connections of a server, and whose request begins next. Belongs to the event loop."""

    def __init__(self, limit: int, keep_alive: float, probes: abc.Set[str] = frozenset()):
        """At most `limit` are open. One that had its answer may be idle for `keep_alive` seconds.

        Requests for the paths `probes` pass all others.
        """
        self.limit = limit
        self._probes = probes
        self._first = Turns(PROBES_AT_ONCE, PROBE_SECONDS, newest_first=True)
        self._starts = Turns(STARTS_AT_ONCE, START_SECONDS, saved=STARTS_AFTER_REST)
        self._starts_ahead = Turns(AHEAD_AT_ONCE, AHEAD_SECONDS)
        self._long_heads = Turns(HEADS_PER_TURN, 0)
        self._discards = Turns(DISCARDS_AT_ONCE, DISCARD_SECONDS)
        self._closes = Turns(CLOSES_AT_ONCE, CLOSE_TURN_SECONDS)
        # What connections read into, one after the other, and take out at once.
        self.buffer = memoryview(bytearray(MOST_READ))
        self._open: set[Guest] = set()
        self._seconds = {
            Wait.LINGER: LINGER_SECONDS,
            Wait.CLOSING: CLOSE_SECONDS,
            Wait.IDLE: keep_alive,
            Wait.HEAD: HEAD_SECONDS,
            Wait.UNREAD: math.inf,
            Wait.BODY: BODY_SECONDS,
        }
        # When each began, the longest wait first.
        self._waiting: dict[str, OrderedDict[Guest, float]] = {wait: OrderedDict() for wait in self._seconds}
        self._held = 0
        self._deaf: set[Guest] = set()
        self._ended: Counter[str] = Counter()
        self._polled = self._reported = 0.0

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, guest: Guest) -> bool:
        """Let a new connection in. At the limit the one that has waited longest for its client gives way; if none, False."""
        if len(self._open) >= self.limit and not self._end_one():
            return False
        self._open.add(guest)
        self.wait(guest, Wait.HEAD)
        return True

    def leave(self, guest: Guest) -> None:
        """The connection is closed."""
        self._open.discard(guest)
        self.forget(guest)
        self.wait(guest, None)
        self._held -= guest.held
        guest.held = 0
        self.listen(guest)

    def is_probe(self, path: str) -> bool:
        """Whether a request for `path` asks whether the server lives."""
        return path.rstrip("/") in self._probes

    def start(self, guest: Guest, path: str, begin: Callable[[], None], *, is_ahead: bool, has_more: bool) -> None:
        """Call `begin`, which starts to answer a request of `guest`, in its turn.

        `is_ahead`: it came ahead of an answer. `has_more`: more came after it, as no prober sends it, so it passes nobody.
        """
        first = self._first if self.is_probe(path) and not has_more else self._starts
        (self._starts_ahead if is_ahead else first).call(guest, begin)

    def parse(self, guest: Guest, advance: Callable[[], None]) -> None:
        """Call `advance`, which parses a long head, in its turn."""
        self._long_heads.call(guest, advance)

    def discard(self, guest: Guest, read_on: Callable[[], None]) -> None:
        """Call `read_on`, which reads a piece of a body that nobody wants, in its turn."""
        self._discards.call(guest, read_on)

    def close(self, guest: Guest, close: Callable[[], None]) -> None:
        """Call `close`, which closes the connection of a client that has left, in its turn."""
        self._closes.call(guest, close)

    def forget(self, guest: Guest) -> None:
        """Nothing of `guest` is to be started, parsed or closed any more."""
        for turns in (self._first, self._starts, self._starts_ahead, self._long_heads, self._discards, self._closes):
            turns.forget(guest)

    def wait(self, guest: Guest, wait: str | None) -> None:
        """What `guest` waits for from now on, one of Wait. The wait begins anew."""
        if guest.wait is not None:
            del self._waiting[guest.wait][guest]
        guest.wait = wait
        if wait is not None:
            self._waiting[wait][guest] = time.monotonic()

    def hold(self, guest: Guest, num_bytes: int) -> None:
        """What `guest` keeps that is not a request yet. If all together keep too much, those that keep most give way."""
        self._held += num_bytes - guest.held
        guest.held = num_bytes
        if self._held > MAX_HELD:
            # Some more than needed, since finding them takes a millisecond.
            for other in sorted(self._open, key=lambda other: other.held, reverse=True):
                if self._held <= MAX_HELD - MAX_HELD // 4:
                    break
                self._end(other, "sent far ahead")

    def ignore(self, guest: Guest) -> None:
        """Nothing of `guest` is read for now. The gate looks whether its client leaves."""
        self._deaf.add(guest)

    def listen(self, guest: Guest) -> None:
        self._deaf.discard(guest)

    def count(self, reason: str) -> None:
        """A connection that the server ended, for the log."""
        self._ended[reason] += 1

    def sweep(self) -> None:
        """End what is overdue. To be called several times a second."""
        now = time.monotonic()
        for wait, waiting in self._waiting.items():
            for _ in range(min(MOST_AT_ONCE, len(waiting))):
                guest, since = next(iter(waiting.items()))
                if now - since < self._seconds[wait]:
                    break
                self.wait(guest, None)
                guest.overdue(wait)
        if self._deaf and now - self._polled > SECONDS_BETWEEN_POLLS:
            self._polled = now
            self._find_those_who_left()
        if self._ended and now - self._reported > SECONDS_BETWEEN_REPORTS:
            self._reported = now
            ended = ", ".join(f"{count} x {reason}" for reason, count in self._ended.most_common())
            log.warning("connections that the server refused or ended: %s; %d are open", ended, len(self._open))
            self._ended.clear()

    def _end_one(self) -> bool:
        """End the connection that has waited longest for the first thing in Wait that any waits for."""
        for wait, waiting in self._waiting.items():
            if waiting:
                self._end(next(iter(waiting)), f"gave way, waiting for {wait}")
                return True
        return False

    def _end(self, guest: Guest, reason: str) -> None:
        self.leave(guest)
        self.count(reason)
        guest.give_way()

    def _find_those_who_left(self) -> None:
        if not hasattr(select, "POLLRDHUP"):
            return  # not Linux: the end is seen when the server reads on
        poll = select.poll()
        guests = {guest.descriptor(): guest for guest in self._deaf}
        guests.pop(-1, None)  # of those that are being closed
        for descriptor in guests:
            poll.register(descriptor, select.POLLRDHUP)
        left = [guests[descriptor] for descriptor, _ in poll.poll(0)]
        for guest in left[:MOST_AT_ONCE]:
            guest.has_left()
        if len(left) > MOST_AT_ONCE:
            self._polled = 0.0  # the others in the next sweep


def affordable(connections: int) -> int:
    """As many of `connections` as the system's limit of open files allows, which is raised first as far as it goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return connections
    fewer = max(1, soft - min(OTHER_FILES, soft // 2))
    log.warning("at most %d connections, not %d: the system allows this process %d open files", fewer, connections, soft)
    return fewer
