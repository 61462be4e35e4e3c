"""Who owns which KV page. Counts only: the keys themselves live in the runner's pools under the same page ids.

A page is *free*, *held* by the batch rows that read it, or *cached*. Rows that share a prompt hold its pages together. The
last holder lets a page go when it falls out of the band (`release_passed`) or when its row ends (`free`). If a prompt has
filled the page, it becomes cached instead of free: `prefix` finds it by its content until its memory is needed. The page
that was let go first is reused first.

A reservation made at admission promises that `extend` always finds a page. Cached pages count as available.
"""

import hashlib
import math
from array import array
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kernels.band import PAGE_SIZE, first_key
from model.config import GPTConfig, KVGroup
from model.step import NewPages, PageCopy


def pages_for(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_SIZE)


def resting_pages(num_tokens: int, band: int | None) -> int:
    """The most pages that a sequence of `num_tokens` holds between steps: all of them, or as many as a band can straddle."""
    return pages_for(num_tokens) if band is None else min(pages_for(num_tokens), pages_for(band) + 1)


def chunk_slack(band: int | None, step_tokens: int) -> int:
    """Pages that one step's prompt chunks may need beyond all reservations: see PageAllocator."""
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


def pool_sizes(config: GPTConfig, *, kv_bytes: int, item_bytes: int, max_rows: int, step_tokens: int) -> dict[KVGroup, int]:
    """Pages of each group's pool: room for as many full-context sequences as fit `kv_bytes`, at most `max_rows`.

    Banded pools also get the slack for one step's prompt chunks (see PageAllocator).
    Raises ValueError with the numbers when not even one full-context sequence fits.
    """
    slack = {group: chunk_slack(band, step_tokens) for group, band in groups(config)}
    slack_bytes = sum(slack[group] * page_bytes(config, group, item_bytes) for group in slack)
    one = sequence_bytes(config, config.n_positions, item_bytes)
    if kv_bytes < one + slack_bytes:
        raise ValueError(
            f"kv_bytes is {kv_bytes}, but one sequence of {config.n_positions} tokens needs {one} bytes of KV cache "
            f"and a step of {step_tokens} prompt tokens {slack_bytes} more"
        )
    sequences = min(max_rows, (kv_bytes - slack_bytes) / one)
    return {group: int(sequences * resting_pages(config.n_positions, band)) + slack[group] for group, band in groups(config)}


# Of a full page of a prompt: a hash of its tokens, of all tokens before them, and of who may find it.
PageHash = bytes


def page_hashes(prompt: Sequence[int], adapter: bytes = b"", scope: str = "") -> list[PageHash]:
    """Hashes of the full pages of a prompt, computed with the adapter called `adapter` for those who share `scope`.

    Two equal hashes mean the same adapter and scope and equal tokens from the first on, as far as SHA-256 has no collisions.
    """
    hashes, last = [], hashlib.sha256(b"%d %b%b" % (len(adapter), adapter, scope.encode())).digest()
    for stop in range(PAGE_SIZE, len(prompt) + 1, PAGE_SIZE):
        last = hashlib.sha256(last + array("q", prompt[stop - PAGE_SIZE : stop]).tobytes()).digest()
        hashes.append(last)
    return hashes


@dataclass(eq=False)
class Reservation:
    """Pages promised to the rows that share a prompt, often a single row."""

    shared: int  # pages of the prompt, counted once
    own: int  # what each row will add
    rows: set[int]

    @property
    def pages(self) -> int:
        return self.shared + self.own * len(self.rows)


@dataclass(eq=False)
class HeldPages:
    """A row's pages of one group: page_ids[i] holds positions (first + i) * 64 and on."""

    reservation: Reservation
    first: int = 0
    page_ids: deque[int] = field(default_factory=deque)

    @property
    def end(self) -> int:
        return self.first + len(self.page_ids)


class FilledPage(NamedTuple):
    """A page that a step fills with prompt tokens."""

    group: KVGroup
    page_id: int
    content: PageHash


class PagePool:
    """One group's pages: which are free, which are cached, what each row holds and what has been promised."""

    def __init__(self, band: int | None, num_pages: int, slack: int):
        self.band = band
        self.num_pages = num_pages
        self.capacity = num_pages - slack  # what reservations may add up to
        self.free = list(range(num_pages - 1, -1, -1))
        self.cached: dict[int, None] = {}  # held by no row, in the order in which they were let go
        self.held: dict[int, HeldPages] = {}
        self.reserved = 0
        self._holders = [0] * num_pages
        # Of pages that hold part of a prompt, or will hold it when a step in flight ends.
        self._hash_of: dict[int, PageHash] = {}
        self._published: dict[PageHash, int] = {}

    def reserve(self, row: int, need: Reservation) -> None:
        self.held[row] = HeldPages(need)
        self.reserved += need.pages

    def join(self, row: int, parent: int, joint: Reservation) -> None:
        """Replace the reservation of `parent` and of all rows that share it by `joint`, which includes `row`."""
        self.reserved += joint.pages - self.held[parent].reservation.pages
        for member in joint.rows - {row}:
            self.held[member].reservation = joint
        self.held[row] = HeldPages(joint)

    def move(self, row: int, to: int) -> None:
        held = self.held[to] = self.held.pop(row)
        held.reservation.rows.remove(row)
        held.reservation.rows.add(to)

    def pages_before(self, num_pages: int) -> range:
        """Which of a sequence's first `num_pages` pages the query right after them sees."""
        return range(first_key(num_pages * PAGE_SIZE, self.band) // PAGE_SIZE, num_pages)

    def longest_prefix(self, hashes: Sequence[PageHash]) -> int:
        """An upper bound on the number of leading pages for which `has_prefix` holds."""
        if self.band is not None:
            return len(hashes)
        return next((i for i, each in enumerate(hashes) if each not in self._published), len(hashes))

    def has_prefix(self, hashes: Sequence[PageHash]) -> bool:
        """Whether a sequence can continue after cached pages with these hashes, the first ones of its prompt."""
        return all(hashes[i] in self._published for i in self.pages_before(len(hashes)))

    def hold_prefix(self, row: int, hashes: Sequence[PageHash]) -> tuple[int, list[int]]:
        live = self.pages_before(len(hashes))
        return self._hold(row, live.start, [self._published[hashes[i]] for i in live])

    def share(self, row: int, parent: int, num_pages: int) -> tuple[int, list[int]]:
        """Let `row` hold the first `num_pages` pages of `parent`, as far as the parent still holds them."""
        source = self.held[parent]
        return self._hold(row, source.first, list(source.page_ids)[: num_pages - source.first])

    def _hold(self, row: int, first: int, page_ids: list[int]) -> tuple[int, list[int]]:
        for page in page_ids:
            self.cached.pop(page, None)
            self._holders[page] += 1
        self.held[row].first = first
        self.held[row].page_ids += page_ids
        return first, page_ids

    def extend(self, row: int, stop: int) -> tuple[int, list[int]]:
        """Back the positions before `stop` with pages; returns the new ones as (index of the first, ids)."""
        held = self.held[row]
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
            self._forget_hash(page)
        self._holders[page] = 1
        return page

    def release_passed(self, row: int, next_position: int) -> None:
        """Let go of the pages that no query from `next_position` on will see."""
        held = self.held[row]
        live = first_key(next_position, self.band) // PAGE_SIZE
        while held.page_ids and held.first < live:
            self._let_go(held.page_ids.popleft())
            held.first += 1

    def reserved_end(self, row: int) -> float:
        """The first position that would take one page more than a row holds between steps. A dense pool has none."""
        return math.inf if self.band is None else (self.held[row].first + pages_for(self.band) + 1) * PAGE_SIZE

    def release(self, row: int) -> None:
        held = self.held.pop(row)
        # The last page first: it is reused first, and a prefix that lacks its end is still useful.
        for page in reversed(held.page_ids):
            self._let_go(page)
        before = held.reservation.pages
        held.reservation.rows.remove(row)
        if not held.reservation.rows:
            held.reservation.shared = 0
        self.reserved += held.reservation.pages - before

    def _let_go(self, page: int) -> None:
        self._holders[page] -= 1
        if not self._holders[page]:
            if page in self._hash_of:
                self.cached[page] = None
            else:
                self.free.append(page)

    def fill(self, row: int, pages: range, hashes: Sequence[PageHash]) -> list[tuple[int, PageHash]]:
        """Note that these pages of `row` will hold part of a prompt once the step that writes them has run."""
        held = self.held[row]
        filled = [(held.page_ids[i - held.first], hashes[i]) for i in pages]
        self._hash_of.update(filled)
        return filled

    def publish(self, page: int, content: PageHash) -> None:
        """The page has been written: it can be found, unless another page already holds the same."""
        if self._hash_of.get(page) == content and self._published.setdefault(content, page) != page:
            self.discard(page, content)

    def discard(self, page: int, content: PageHash) -> None:
        """The page will never be found: the step that was to write it has failed."""
        if self._hash_of.get(page) == content:
            self._forget_hash(page)
            if page in self.cached:
                del self.cached[page]
                self.free.append(page)

    def unpublish(self, content: PageHash) -> None:
        """No page is found by this content any more, whoever wrote it. Rows that hold one keep it."""
        if content in self._published:
            self.discard(self._published[content], content)

    def _forget_hash(self, page: int) -> None:
        content = self._hash_of.pop(page)
        if self._published.get(content) == page:
            del self._published[content]

    def check_integrity(self) -> list[str]:
        faults = []
        holders = [0] * self.num_pages
        for held in self.held.values():
            for page in held.page_ids:
                holders[page] += 1
        pages = [*self.free, *self.cached, *(page for page in range(self.num_pages) if holders[page])]
        if sorted(pages) != list(range(self.num_pages)):
            faults.append(f"{len(pages)} pages accounted for, {len(set(pages))} distinct, of {self.num_pages}")
        if holders != self._holders:
            faults.append(f"rows hold {sum(holders)} pages, {sum(self._holders)} are booked")
        if not self.cached.keys() <= self._hash_of.keys() or not set(self._published.values()) <= self._hash_of.keys():
            faults.append("a page is cached without a hash of its content")
        reservations = {id(held.reservation): held.reservation for held in self.held.values()}.values()
        promised = sum(reservation.pages for reservation in reservations)
        if promised != self.reserved or promised > self.capacity:
            faults.append(f"{promised} pages promised to rows, {self.reserved} booked, of {self.capacity}")
        for reservation in reservations:
            distinct = {page for row in reservation.rows for page in self.held[row].page_ids}
            if len(distinct) > reservation.pages:
                rows = ", ".join(map(str, sorted(reservation.rows)))
                faults.append(f"rows {rows} hold {len(distinct)} pages but reserved {reservation.pages}")
        return faults


class PoolUsage(NamedTuple):
    held: int
    total: int

    @property
    def share(self) -> float:
        return self.held / self.total


class PageAllocator:
    """Page accounting of all groups, keyed by batch row.

    A sequence reserves the most pages that it holds between steps. While a chunk of c prompt tokens runs, a banded layer
    holds up to ceil(c / 64) pages more, so each banded pool keeps ceil(step_tokens / 64) pages back. That is enough
    because at most one prompt rests inside a page. A chunk that begins at a page's start exceeds its reservation only by
    whole pages of its own, fewer than c / 64. So all chunks of a step together, with the one that begins inside a page,
    exceed theirs by no more than ceil(step_tokens / 64).

    Rows that share a prompt reserve its pages once: see `try_join`. If rows share pages because their content happens to
    be equal, each row reserves them, so that none depends on how long another runs.
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

    def try_reserve(self, row: int, num_tokens: int) -> bool:
        """Promise a row the pages for `num_tokens` positions in every group, or change nothing."""
        needs = {group: Reservation(0, resting_pages(num_tokens, pool.band), {row}) for group, pool in self.pools.items()}
        if any(pool.reserved + needs[group].pages > pool.capacity for group, pool in self.pools.items()):
            return False
        for group, pool in self.pools.items():
            pool.reserve(row, needs[group])
        return True

    def try_join(self, row: int, parent: int, num_prompt: int, num_tokens: int) -> bool:
        """Promise `row`, which will `fork` after the prompt of `parent`, the pages that it needs beyond the parent's.

        Both write `num_tokens` positions, of which `num_prompt` are the prompt. The prompt's full pages count once, until
        the last row that shares them has ended. Changes nothing if it returns False.
        """
        joint = {}
        for group, pool in self.pools.items():
            full = num_prompt // PAGE_SIZE
            shared = min(full, resting_pages(num_prompt, pool.band))
            own = min(pages_for(num_tokens) - full, resting_pages(num_tokens, pool.band))
            joint[group] = Reservation(shared, own, {row} | pool.held[parent].reservation.rows)
        for group, pool in self.pools.items():
            if pool.reserved + joint[group].pages - pool.held[parent].reservation.pages > pool.capacity:
                return False
        for group, pool in self.pools.items():
            pool.join(row, parent, joint[group])
        return True

    def move(self, row: int, to: int) -> None:
        """Let `to`, which has nothing, have what `row` has reserved and holds. Either may be a number that is no row's."""
        for pool in self.pools.values():
            pool.move(row, to)

    def pages_of(self, row: int) -> list[NewPages]:
        """All that a row holds, for a device that does not know it."""
        return self._added(
            row, {group: (pool.held[row].first, list(pool.held[row].page_ids)) for group, pool in self.pools.items()}
        )

    def prefix(self, hashes: Sequence[PageHash]) -> int:
        """How many of a prompt's first pages a sequence can take from the cache: each group has those that it sees."""
        longest = min(pool.longest_prefix(hashes) for pool in self.pools.values())
        return next(
            (n for n in range(longest, 0, -1) if all(pool.has_prefix(hashes[:n]) for pool in self.pools.values())), 0
        )

    def start_after(self, row: int, hashes: Sequence[PageHash]) -> list[NewPages]:
        """Let a row that holds nothing begin after the cached pages with these hashes; returns those that it sees."""
        return self._added(row, {group: pool.hold_prefix(row, hashes) for group, pool in self.pools.items()})

    def fork(self, row: int, parent: int, num_prompt: int) -> tuple[list[NewPages], list[PageCopy]]:
        """Let a row that holds nothing continue after the prompt of `parent`: it shares the prompt's full pages.

        Both rows will write to the prompt's last partial page, so `row` gets a copy of it.
        """
        full = num_prompt // PAGE_SIZE
        pages = self._added(row, {group: pool.share(row, parent, full) for group, pool in self.pools.items()})
        copies = []
        for new in self.extend(row, num_prompt):
            pages.append(new)
            source = self.pools[new.group].held[parent]
            copies.append(PageCopy(new.group, source.page_ids[full - source.first], new.page_ids[0]))
        return pages, copies

    def extend(self, row: int, stop: int) -> list[NewPages]:
        """Back every position before `stop` with a page in every group; returns the new pages."""
        return self._added(row, {group: pool.extend(row, stop) for group, pool in self.pools.items()})

    def _added(self, row: int, added: Mapping[KVGroup, tuple[int, list[int]]]) -> list[NewPages]:
        return [NewPages(row, group, first, page_ids) for group, (first, page_ids) in added.items() if page_ids]

    def reserved_end(self, row: int) -> float:
        """Positions before this fit the pages that the row has reserved."""
        return min(pool.reserved_end(row) for pool in self.pools.values())

    def fill(self, row: int, start: int, stop: int, hashes: Sequence[PageHash]) -> list[FilledPage]:
        """The pages that the prompt tokens [start, stop) of a row complete. `publish` them when their step has run."""
        pages = range(start // PAGE_SIZE, min(stop // PAGE_SIZE, len(hashes)))
        return [
            FilledPage(group, page, content)
            for group, pool in self.pools.items()
            for page, content in pool.fill(row, pages, hashes)
        ]

    def publish(self, filled: Iterable[FilledPage]) -> None:
        """The steps that fill these pages have run: other sequences may share them."""
        for group, page, content in filled:
            self.pools[group].publish(page, content)

    def discard(self, filled: Iterable[FilledPage]) -> None:
        """The steps that fill these pages have failed, or wrote them for a sequence that had."""
        for group, page, content in filled:
            self.pools[group].discard(page, content)

    def unpublish(self, hashes: Sequence[PageHash]) -> None:
        """Pages with these hashes can't be trusted: none will be found, whoever wrote or holds it."""
        for pool in self.pools.values():
            for content in hashes:
                pool.unpublish(content)

    def release_passed(self, row: int, next_position: int) -> None:
        for pool in self.pools.values():
            pool.release_passed(row, next_position)

    @property
    def _banded(self) -> list[PagePool]:
        return [pool for pool in self.pools.values() if pool.band is not None]

    @property
    def spare_pages(self) -> int:
        """Pages that no row has reserved, of the pools of which rows pass pages."""
        return min((pool.capacity - pool.reserved for pool in self._banded), default=0)

    def num_passed(self, position: int, next_position: int) -> int:
        """How many pages the query at `position` sees, in a group, and the one at `next_position` does not."""
        starts = [[first_key(each, pool.band) // PAGE_SIZE for each in (position, next_position)] for pool in self._banded]
        return max((after - before for before, after in starts), default=0)

    def holds(self, row: int, position: int) -> bool:
        """Whether a row still holds all pages that its query at `position` sees."""
        return all(pool.held[row].first <= first_key(position, pool.band) // PAGE_SIZE for pool in self.pools.values())

    def free(self, row: int) -> None:
        for pool in self.pools.values():
            pool.release(row)

    def usage(self) -> dict[KVGroup, PoolUsage]:
        """Pages held by rows; cached ones count as free."""
        return {
            group: PoolUsage(pool.num_pages - len(pool.free) - len(pool.cached), pool.num_pages)
            for group, pool in self.pools.items()
        }

    def check_integrity(self) -> list[str]:
        """What is wrong with the accounts, in words; empty when they balance. Call between steps, all sequences at rest."""
        return [f"{group}: {fault}" for group, pool in self.pools.items() for fault in pool.check_integrity()]
