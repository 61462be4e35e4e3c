"""Who owns which KV page. Counts only: the keys themselves live in the runner's pools under the same page ids.

A page's life: free -> held by a slot (`extend`) -> free again, either behind the band (`release_behind`) or with its
slot (`free`). A reservation made at admission promises that `extend` never finds the pool empty.
"""

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from kernels.band import PAGE_SIZE, first_key
from model.config import GPTConfig, KVGroup
from model.step import NewPages


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


class HeldPages:
    """A slot's pages of one group: page_ids[i] holds positions (first + i) * 64 and on."""

    def __init__(self, reserved: int):
        self.reserved = reserved
        self.first = 0
        self.page_ids: deque[int] = deque()


class PagePool:
    """One group's pages: a free list, what each slot holds and what has been promised."""

    def __init__(self, band: int | None, num_pages: int, slack: int):
        self.band = band
        self.num_pages = num_pages
        self.capacity = num_pages - slack  # what reservations may add up to
        self.free = list(range(num_pages - 1, -1, -1))
        self.held: dict[int, HeldPages] = {}
        self.reserved = 0

    def extend(self, slot: int, stop: int) -> tuple[int, list[int]]:
        """Back the positions before `stop` with pages; the new ones as (index of the first, ids)."""
        held = self.held[slot]
        first_new = held.first + len(held.page_ids)
        page_ids = [self.free.pop() for _ in range(first_new, pages_for(stop))]
        held.page_ids += page_ids
        return first_new, page_ids

    def release_behind(self, slot: int, next_position: int) -> None:
        """Return the pages that no query from `next_position` on will see."""
        held = self.held[slot]
        live = first_key(next_position, self.band) // PAGE_SIZE
        while held.page_ids and held.first < live:
            self.free.append(held.page_ids.popleft())
            held.first += 1

    def release(self, slot: int) -> None:
        held = self.held.pop(slot)
        self.free += held.page_ids
        self.reserved -= held.reserved


class Usage(NamedTuple):
    held: int
    total: int


class KVCache:
    """Page accounting of all groups, keyed by slot.

    Reservations: a sequence reserves the most it holds between steps. While a chunk of c prompt tokens runs, a banded
    layer holds up to ceil(c / 64) pages more; each banded pool keeps back ceil(step_tokens / 64) pages for that. That is
    enough because chunks are handed out first come, first served: all but the last chunk of a step finish their prompt
    and all but the first begin one, and a chunk that begins a prompt exceeds its reservation by whole pages of its own.
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
        needs = {group: resting_pages(num_tokens, pool.band) for group, pool in self.pools.items()}
        if any(pool.reserved + needs[group] > pool.capacity for group, pool in self.pools.items()):
            return False
        for group, pool in self.pools.items():
            pool.held[slot] = HeldPages(needs[group])
            pool.reserved += needs[group]
        return True

    def extend(self, slot: int, stop: int) -> list[NewPages]:
        """Back every position before `stop` with a page in every group; what was added."""
        added = []
        for group, pool in self.pools.items():
            first, page_ids = pool.extend(slot, stop)
            if page_ids:
                added.append(NewPages(slot, group, first, page_ids))
        return added

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
        return {group: Usage(pool.num_pages - len(pool.free), pool.num_pages) for group, pool in self.pools.items()}

    def faults(self) -> list[str]:
        """What is wrong with the accounts, in words; empty when every page is in exactly one place. Call between steps."""
        found = []
        for group, pool in self.pools.items():
            pages = pool.free + [page for held in pool.held.values() for page in held.page_ids]
            if sorted(pages) != list(range(pool.num_pages)):
                found.append(f"{group}: {len(pages)} pages accounted for, {len(set(pages))} distinct, of {pool.num_pages}")
            promised = sum(held.reserved for held in pool.held.values())
            if promised != pool.reserved or promised > pool.capacity:
                found.append(f"{group}: {promised} pages promised to slots, {pool.reserved} booked, of {pool.capacity}")
            found += [
                f"{group}: slot {slot} holds {len(held.page_ids)} pages but reserved {held.reserved}"
                for slot, held in pool.held.items()
                if len(held.page_ids) > held.reserved
            ]
        return found
