"""Who owns which KV page. Counts only: the keys themselves live in the runner's pools under the same page ids.

A page's life: free -> held by one slot or, where slots share a prompt, by several -> let go by the last of them, behind the
band (`release_behind`) or with its slot (`free`). Pages that a prompt has filled are cached then instead of free: they can
be found by what they hold (`prefix`) until room is needed for others; those let go first make it.

A reservation made at admission promises that `extend` never finds the pool empty. Cached pages are room.
"""

import hashlib
import math
from array import array
from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import NamedTuple

from kernels.band import PAGE_SIZE, first_key
from model.config import GPTConfig, KVGroup
from model.step import NewPages, PageCopy


def pages_for(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_SIZE)


def resting_pages(num_tokens: int, band: int | None) -> int:
    """Pages that a sequence of `num_tokens` holds between steps, at most: all of them, or what a band can straddle."""
    return pages_for(num_tokens) if band is None else min(pages_for(num_tokens), pages_for(band) + 1)


def chunk_slack(band: int | None, step_tokens: int) -> int:
    """Pages that the prompt chunks of one step may add to what all sequences hold at rest: see KVCache."""
    return 0 if band is None else pages_for(step_tokens)


def page_bytes(config: GPTConfig, group: KVGroup, item_bytes: int) -> int:
    """Bytes of one page across the layers of a group: keys and values of 64 positions."""
    layers = sum(config.group(layer) == group for layer in range(config.n_layer))
    return 2 * layers * config.n_embd * PAGE_SIZE * item_bytes


def sequence_bytes(config: GPTConfig, num_tokens: int, item_bytes: int) -> int:
    """Bytes of KV cache that a sequence of `num_tokens` holds at rest, over all groups."""
    return sum(resting_pages(num_tokens, band) * page_bytes(config, group, item_bytes) for group, band in groups(config))


def groups(config: GPTConfig) -> list[tuple[KVGroup, int | None]]:
    """The KV groups that the layers of a model need, with their bands."""
    used = {config.group(layer) for layer in range(config.n_layer)}
    return [(group, config.band if group == "banded" else None) for group in ("dense", "banded") if group in used]


def pool_sizes(config: GPTConfig, *, kv_bytes: int, item_bytes: int, max_slots: int, step_tokens: int) -> dict[KVGroup, int]:
    """Pages of each group's pool: as many full-context sequences as fit `kv_bytes`, at most `max_slots`.

    Banded pools get the pages that one step's prompt chunks may add on top (see KVCache).
    Raises ValueError with the numbers when not even one sequence of the whole context fits.
    """
    slack = {group: chunk_slack(band, step_tokens) for group, band in groups(config)}
    slack_bytes = sum(slack[group] * page_bytes(config, group, item_bytes) for group in slack)
    one = sequence_bytes(config, config.n_positions, item_bytes)
    if kv_bytes < one + slack_bytes:
        raise ValueError(
            f"kv_bytes is {kv_bytes}, but one sequence of {config.n_positions} tokens needs {one} bytes of KV cache "
            f"and a step of {step_tokens} prompt tokens {slack_bytes} more"
        )
    sequences = min(max_slots, (kv_bytes - slack_bytes) / one)
    return {group: int(sequences * resting_pages(config.n_positions, band)) + slack[group] for group, band in groups(config)}


# What a full page of a prompt holds: a hash of its tokens and of all before them.
PageKey = bytes


def page_keys(prompt: Items[int], adapter: bytes = b"") -> list[PageKey]:
    """Keys of the full pages of a prompt. Equal keys mean equal tokens from the first on, and the same adapter, whose name
    `adapter` is, as sure as SHA-256 is."""
    keys, key = [], adapter
    for stop in range(PAGE_SIZE, len(prompt) + 1, PAGE_SIZE):
        key = hashlib.sha256(key + array("q", prompt[stop - PAGE_SIZE : stop]).tobytes()).digest()
        keys.append(key)
    return keys


@dataclass(eq=False)
class Reservation:
    """Pages promised to the slots that share a prompt: the prompt's once, and what each will add. Often to a single slot."""

    shared: int
    own: int
    slots: set[int]

    @property
    def pages(self) -> int:
        return self.shared + self.own * len(self.slots)


@dataclass(eq=False)
class HeldPages:
    """A slot's pages of one group: page_ids[i] holds positions (first + i) * 64 and on."""

    reservation: Reservation
    first: int = 0
    page_ids: deque[int] = field(default_factory=deque)

    @property
    def end(self) -> int:
        return self.first + len(self.page_ids)


class FilledPage(NamedTuple):
    """A page that a step fills with tokens of a prompt."""

    group: KVGroup
    page_id: int
    key: PageKey


class PagePool:
    """One group's pages: which are free, which are cached, what each slot holds and what has been promised."""

    def __init__(self, band: int | None, num_pages: int, slack: int):
        self.band = band
        self.num_pages = num_pages
        self.capacity = num_pages - slack  # what reservations may add up to
        self.free = list(range(num_pages - 1, -1, -1))
        self.cached: dict[int, None] = {}  # nobody holds them; in the order in which they were let go
        self.held: dict[int, HeldPages] = {}
        self.reserved = 0
        self._holders = [0] * num_pages
        self._key_of: dict[int, PageKey] = {}  # of pages that hold, or will when a step in flight ends, a piece of a prompt
        self._found: dict[PageKey, int] = {}  # the published ones

    def reserve(self, slot: int, need: Reservation) -> None:
        self.held[slot] = HeldPages(need)
        self.reserved += need.pages

    def join(self, slot: int, leader: int, joint: Reservation) -> None:
        """Put the reservation of `leader` and those who share it, and `slot`, into `joint`."""
        self.reserved += joint.pages - self.held[leader].reservation.pages
        for member in joint.slots - {slot}:
            self.held[member].reservation = joint
        self.held[slot] = HeldPages(joint)

    def pages_before(self, num_pages: int) -> range:
        """Of the first pages of a sequence those that a query behind them sees."""
        return range(first_key(num_pages * PAGE_SIZE, self.band) // PAGE_SIZE, num_pages)

    def longest_prefix(self, keys: Items[PageKey]) -> int:
        """A bound on what `has_prefix` can be true of."""
        if self.band is not None:
            return len(keys)
        return next((i for i, key in enumerate(keys) if key not in self._found), len(keys))

    def has_prefix(self, keys: Items[PageKey]) -> bool:
        """Whether a sequence can go on behind pages with these keys, the first ones of its prompt."""
        return all(keys[i] in self._found for i in self.pages_before(len(keys)))

    def hold_prefix(self, slot: int, keys: Items[PageKey]) -> tuple[int, list[int]]:
        live = self.pages_before(len(keys))
        return self._hold(slot, live.start, [self._found[keys[i]] for i in live])

    def share(self, slot: int, leader: int, num_pages: int) -> tuple[int, list[int]]:
        """Have a slot hold the first `num_pages` of another, as far as that has not let them go."""
        source = self.held[leader]
        return self._hold(slot, source.first, list(source.page_ids)[: num_pages - source.first])

    def _hold(self, slot: int, first: int, page_ids: list[int]) -> tuple[int, list[int]]:
        for page in page_ids:
            self.cached.pop(page, None)
            self._holders[page] += 1
        self.held[slot].first = first
        self.held[slot].page_ids += page_ids
        return first, page_ids

    def extend(self, slot: int, stop: int) -> tuple[int, list[int]]:
        """Back the positions before `stop` with pages; the new ones as (index of the first, ids)."""
        held = self.held[slot]
        first_new = held.end
        page_ids = [self._take() for _ in range(first_new, pages_for(stop))]
        held.page_ids += page_ids
        return first_new, page_ids

    def _take(self) -> int:
        if self.free:
            page = self.free.pop()
        else:
            page = next(iter(self.cached))
            del self.cached[page]
            self._forget_key(page)
        self._holders[page] = 1
        return page

    def release_behind(self, slot: int, next_position: int) -> None:
        """Let go of the pages that no query from `next_position` on will see."""
        held = self.held[slot]
        live = first_key(next_position, self.band) // PAGE_SIZE
        while held.page_ids and held.first < live:
            self._let_go(held.page_ids.popleft())
            held.first += 1

    def reserved_end(self, slot: int) -> float:
        """The first position whose page would be one more than a slot holds between steps. A dense pool has none."""
        return math.inf if self.band is None else (self.held[slot].first + pages_for(self.band) + 1) * PAGE_SIZE

    def release(self, slot: int) -> None:
        held = self.held.pop(slot)
        # The last page first: a prefix without its end is of use, an end without its prefix is not.
        for page in reversed(held.page_ids):
            self._let_go(page)
        before = held.reservation.pages
        held.reservation.slots.remove(slot)
        if not held.reservation.slots:
            held.reservation.shared = 0
        self.reserved += held.reservation.pages - before

    def _let_go(self, page: int) -> None:
        self._holders[page] -= 1
        if not self._holders[page]:
            if page in self._key_of:
                self.cached[page] = None
            else:
                self.free.append(page)

    def fill(self, slot: int, pages: range, keys: Items[PageKey]) -> list[tuple[int, PageKey]]:
        """Note that these pages of a slot hold a prompt once the step that writes them has run."""
        held = self.held[slot]
        filled = [(held.page_ids[i - held.first], keys[i]) for i in pages]
        self._key_of.update(filled)
        return filled

    def publish(self, page: int, key: PageKey) -> None:
        """The page has been written: it can be found, unless another already holds the same."""
        if self._key_of.get(page) == key and self._found.setdefault(key, page) != page:
            self.discard(page, key)

    def discard(self, page: int, key: PageKey) -> None:
        """The page will never be found: its step has failed."""
        if self._key_of.get(page) == key:
            self._forget_key(page)
            if page in self.cached:
                del self.cached[page]
                self.free.append(page)

    def _forget_key(self, page: int) -> None:
        key = self._key_of.pop(page)
        if self._found.get(key) == page:
            del self._found[key]

    def faults(self) -> list[str]:
        found = []
        holders = [0] * self.num_pages
        for held in self.held.values():
            for page in held.page_ids:
                holders[page] += 1
        pages = [*self.free, *self.cached, *(page for page in range(self.num_pages) if holders[page])]
        if sorted(pages) != list(range(self.num_pages)):
            found.append(f"{len(pages)} pages accounted for, {len(set(pages))} distinct, of {self.num_pages}")
        if holders != self._holders:
            found.append(f"{sum(holders)} pages in the slots' hands, {sum(self._holders)} booked")
        if not self.cached.keys() <= self._key_of.keys() or not set(self._found.values()) <= self._key_of.keys():
            found.append("a page is cached without what it holds")
        reservations = {id(held.reservation): held.reservation for held in self.held.values()}.values()
        promised = sum(reservation.pages for reservation in reservations)
        if promised != self.reserved or promised > self.capacity:
            found.append(f"{promised} pages promised to slots, {self.reserved} booked, of {self.capacity}")
        for reservation in reservations:
            distinct = {page for slot in reservation.slots for page in self.held[slot].page_ids}
            if len(distinct) > reservation.pages:
                slots = ", ".join(map(str, sorted(reservation.slots)))
                found.append(f"slot {slots} holds {len(distinct)} pages but reserved {reservation.pages}")
        return found


class Usage(NamedTuple):
    held: int
    total: int


class KVCache:
    """Page accounting of all groups, keyed by slot.

    Reservations: a sequence reserves the most it holds between steps. While a chunk of c prompt tokens runs, a banded
    layer holds up to ceil(c / 64) pages more; each banded pool keeps back ceil(step_tokens / 64) pages for that. That is
    enough because chunks are handed out first come, first served: all but the last chunk of a step finish their prompt
    and all but the first begin one, and a chunk that begins a prompt, or goes on behind cached pages, exceeds its
    reservation by whole pages of its own.

    Slots that share a prompt reserve its pages once: see `try_join`. Pages shared by chance, found by what they hold, are
    reserved by everyone who holds them, so that nobody depends on how long another goes on.
    """

    def __init__(self, config: GPTConfig, num_pages: Mapping[KVGroup, int], *, step_tokens: int):
        self.pools = {
            group: PagePool(band, num_pages[group], chunk_slack(band, step_tokens)) for group, band in groups(config)
        }

    def fits_when_empty(self, num_tokens: int) -> bool:
        """Whether a sequence that writes `num_tokens` positions can ever be admitted."""
        return all(resting_pages(num_tokens, pool.band) <= pool.capacity for pool in self.pools.values())

    def capacity_text(self) -> str:
        return " and ".join(f"{pool.capacity} {group} pages" for group, pool in self.pools.items())

    def try_reserve(self, slot: int, num_tokens: int) -> bool:
        """Promise a slot the pages for `num_tokens` positions in every group, or change nothing."""
        needs = {group: Reservation(0, resting_pages(num_tokens, pool.band), {slot}) for group, pool in self.pools.items()}
        if any(pool.reserved + needs[group].pages > pool.capacity for group, pool in self.pools.items()):
            return False
        for group, pool in self.pools.items():
            pool.reserve(slot, needs[group])
        return True

    def try_join(self, slot: int, leader: int, num_prompt: int, num_tokens: int) -> bool:
        """Promise a slot the pages it needs beside those of `leader`, whose prompt of `num_prompt` tokens it will `fork` and
        which writes as many positions; or change nothing.

        The full pages of the prompt count once, until the last of those who share it has gone.
        """
        joint = {}
        for group, pool in self.pools.items():
            full = num_prompt // PAGE_SIZE
            shared = min(full, resting_pages(num_prompt, pool.band))
            own = min(pages_for(num_tokens) - full, resting_pages(num_tokens, pool.band))
            joint[group] = Reservation(shared, own, {slot} | pool.held[leader].reservation.slots)
        for group, pool in self.pools.items():
            if pool.reserved + joint[group].pages - pool.held[leader].reservation.pages > pool.capacity:
                return False
        for group, pool in self.pools.items():
            pool.join(slot, leader, joint[group])
        return True

    def prefix(self, keys: Items[PageKey]) -> int:
        """How many of a prompt's first pages, with these keys, a sequence can begin behind: each group has what it sees."""
        longest = min(pool.longest_prefix(keys) for pool in self.pools.values())
        return next((n for n in range(longest, 0, -1) if all(pool.has_prefix(keys[:n]) for pool in self.pools.values())), 0)

    def start_behind(self, slot: int, keys: Items[PageKey]) -> list[NewPages]:
        """Have a slot that holds nothing begin behind pages with these keys, which `prefix` has found; those it sees."""
        return self._added(slot, {group: pool.hold_prefix(slot, keys) for group, pool in self.pools.items()})

    def fork(self, slot: int, leader: int, num_prompt: int) -> tuple[list[NewPages], list[PageCopy]]:
        """Have a slot that holds nothing go on behind the prompt of `leader`: it shares the full pages, and a page that both
        will write to becomes a copy."""
        full = num_prompt // PAGE_SIZE
        pages = self._added(slot, {group: pool.share(slot, leader, full) for group, pool in self.pools.items()})
        copies = []
        for new in self.extend(slot, num_prompt):
            pages.append(new)
            source = self.pools[new.group].held[leader]
            copies.append(PageCopy(new.group, source.page_ids[full - source.first], new.page_ids[0]))
        return pages, copies

    def extend(self, slot: int, stop: int) -> list[NewPages]:
        """Back every position before `stop` with a page in every group; what was added."""
        return self._added(slot, {group: pool.extend(slot, stop) for group, pool in self.pools.items()})

    def _added(self, slot: int, added: Mapping[KVGroup, tuple[int, list[int]]]) -> list[NewPages]:
        return [NewPages(slot, group, first, page_ids) for group, (first, page_ids) in added.items() if page_ids]

    def reserved_end(self, slot: int) -> float:
        """Positions before this can be backed with pages while the slot holds no more of them than between steps."""
        return min(pool.reserved_end(slot) for pool in self.pools.values())

    def fill(self, slot: int, start: int, stop: int, keys: Items[PageKey]) -> list[FilledPage]:
        """The pages that the prompt tokens [start, stop) of a slot complete. `publish` them when their step has run."""
        pages = range(start // PAGE_SIZE, min(stop // PAGE_SIZE, len(keys)))
        return [
            FilledPage(group, page, key) for group, pool in self.pools.items() for page, key in pool.fill(slot, pages, keys)
        ]

    def publish(self, filled: Iterable[FilledPage]) -> None:
        """The steps that fill these pages have run: their content may be shared."""
        for group, page, key in filled:
            self.pools[group].publish(page, key)

    def discard(self, filled: Iterable[FilledPage]) -> None:
        """The steps that fill these pages have failed, or wrote them for a sequence that had."""
        for group, page, key in filled:
            self.pools[group].discard(page, key)

    def release_behind(self, slot: int, next_position: int) -> None:
        for pool in self.pools.values():
            pool.release_behind(slot, next_position)

    def free(self, slot: int) -> None:
        for pool in self.pools.values():
            pool.release(slot)

    def held(self, slot: int) -> dict[KVGroup, int]:
        """Pages a slot holds now."""
        return {group: len(pool.held[slot].page_ids) for group, pool in self.pools.items()}

    def usage(self) -> dict[KVGroup, Usage]:
        """Pages in slots' hands; cached ones count as free."""
        return {
            group: Usage(pool.num_pages - len(pool.free) - len(pool.cached), pool.num_pages)
            for group, pool in self.pools.items()
        }

    def faults(self) -> list[str]:
        """What is wrong with the accounts, in words; empty when they balance. Call between steps, all sequences at rest."""
        return [f"{group}: {fault}" for group, pool in self.pools.items() for fault in pool.faults()]
