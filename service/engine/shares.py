"""Who goes next, where clients compete: for slots, and for the prompt tokens of a step.

Plain numbers: no clock, no pages, no rows. What shares the engine is a client: all keys of a name, a key without one, or a
request where there are no keys.
Within a client the order of arrival rules.

A free slot goes to the client that holds the fewest. Of several it goes to the one that got a slot longest ago, so that
none waits for more than one slot of every other. A client that holds at least two more than another yields its newest.

Prompt tokens follow a virtual clock (weighted fair queueing). It runs as fast as each client's share of the tokens: by n / m
in a step of n prompt tokens, if m clients have prompts. Every prompt is due when its client's share would have computed it,
and the one that is due first goes first. So a short prompt passes long ones of others, equal ones keep their order, and no
prompt is passed for ever: the clock reaches it.
"""

from collections import Counter, deque
from collections.abc import Hashable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar


class Claim(Protocol):
    """What waits for a slot."""

    @property
    def client(self) -> Hashable: ...


T = TypeVar("T", bound=Claim)


class Shares(Generic[T]):
    """Those that wait for a slot, and what their clients have had. Iterates over them, client by client."""

    def __init__(self) -> None:
        # Of each client that waits, in order of arrival. First the client that got a slot longest ago.
        self._lines: dict[Hashable, deque[T]] = {}
        self._num_waiting = 0  # one number, which other threads may read
        self._held: Counter[Hashable] = Counter()  # slots of each client that has any
        self._clock = 0.0
        self._due: dict[Hashable, float] = {}  # when the last prompt of each client is, if later than the clock

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[T]:
        return (item for line in self._lines.values() for item in line)

    def __contains__(self, item: T) -> bool:
        return item in self._lines.get(item.client, ())

    def held(self, client: Hashable) -> int:
        """Slots that a client has."""
        return self._held[client]

    def has_waiting(self, client: Hashable) -> bool:
        return client in self._lines

    def add(self, item: T) -> None:
        """Put it at the end of its client's line."""
        self._lines.setdefault(item.client, deque()).append(item)
        self._num_waiting += 1

    def remove(self, item: T) -> None:
        """It waits no longer. Raises ValueError if it does not wait."""
        line = self._lines.get(item.client, deque())
        line.remove(item)
        self._num_waiting -= 1
        if not line:
            del self._lines[item.client]

    def first(self) -> T | None:
        """Who gets the next slot."""
        lines = self._lines
        client = next((client for client in lines if not self._held[client]), None) or min(
            lines, key=self._held.__getitem__, default=None
        )
        return lines[client][0] if client in lines else None

    def take(self, item: T, num_tokens: int) -> float:
        """The first of its client's line gets a slot. Returns when the `num_tokens` of its prompt are due."""
        self.remove(item)
        client = item.client
        if client in self._lines:
            self._lines[client] = self._lines.pop(client)
        self._held[client] += 1
        self._due = {other: due for other, due in self._due.items() if due > self._clock}
        self._due[client] = max(self._clock, self._due.get(client, 0.0)) + num_tokens
        return self._due[client]

    def refund(self, client: Hashable, num_tokens: int) -> None:
        """So many tokens of a prompt that was taken are not computed after all: the client's next prompt is due earlier."""
        if client in self._due:
            self._due[client] -= num_tokens

    def leave(self, item: T) -> None:
        """It gives its slot up."""
        self._held[item.client] -= 1
        if not self._held[item.client]:
            del self._held[item.client]

    def put_back(self, item: T) -> None:
        """It gives its slot up and waits again, at the head of its client's line."""
        self.leave(item)
        self._lines.setdefault(item.client, deque()).appendleft(item)
        self._num_waiting += 1

    def over(self, client: Hashable) -> Hashable | None:
        """The client with the most slots, if it has so many more than `client` that it must yield one."""
        most = max(self._held, key=self._held.__getitem__, default=None)
        return most if self._held[most] >= self._held[client] + 2 else None

    def advance(self, num_tokens: int, clients: Iterable[Hashable]) -> None:
        """A step computes so many prompt tokens while these clients have prompts."""
        if num_tokens:
            self._clock += num_tokens / len({*clients})
