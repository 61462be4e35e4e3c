"""Owns what lives on the device: weights, KV pools, one row of state per slot. StepInput in, Sampled out.

Steps that only decode are padded to a bucket, and on CUDA each bucket is one captured graph over buffers of fixed address
and size. Everything else is the same code on every device.
"""

import gc
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.band import PAGE_SIZE
from kernels.block_layout import block_layout
from kernels.names import PatternKind
from kernels.ops import Ops
from kernels.plan import DecodePlan, PrefillPlan, StepPlan
from kernels.sampling_state import COLUMNS, TABLES, SamplingState
from model.config import KVGroup
from model.gpt import GPT, RESCORED, KVPool, PagedGPT
from model.lora import Adapters
from model.step import DecodeRow, NewPages, PageCopy, Sampled, SampleRow, SlotStart, StepInput, TokenLogprobs

# Rows of logits that exist at a time: those of one token take as much memory as a thousand hidden states.
LOGIT_ROWS = 256
# Stands for a token that is still on the device.
UNKNOWN = -1


class FoundLogprobs(NamedTuple):
    """Of R rows of logits: the logprob of a token each, and the K likeliest tokens, likeliest first."""

    chosen: Tensor  # (R,)
    top_ids: Tensor  # (R, K)
    top_logprobs: Tensor  # (R, K)


class PendingStep:
    """A launched step; `result` waits for its tokens."""

    def __init__(self, step: StepInput, tokens: Tensor, found: list[FoundLogprobs]):
        """Starts the copies to the host: of `tokens` (B,), which later steps may overwrite, and of `found`, the rows of the
        samples that want logprobs before those of the scores."""
        self._step = step
        self._tokens = start_copy(tokens)
        self._found = [FoundLogprobs(*map(start_copy, each)) for each in found]
        self._copied = torch.cuda.Event() if tokens.is_cuda else None
        if self._copied:
            self._copied.record()

    def result(self) -> Sampled:
        if self._copied:
            self._copied.synchronize()
        rows = chain.from_iterable(zip(*(column.tolist() for column in each), strict=True) for each in self._found)

        def logprobs(num_top: int) -> TokenLogprobs:
            chosen, ids, values = next(rows)
            return TokenLogprobs(chosen, list(zip(ids[:num_top], values[:num_top], strict=True)))

        sampled = [None if row.top_logprobs is None else logprobs(row.top_logprobs) for row in self._step.samples]
        scores = [[logprobs(score.top_logprobs) for _ in score.targets] for score in self._step.scores]
        return Sampled(self._tokens.tolist(), sampled, scores)


def start_copy(tensor: Tensor) -> Tensor:
    """A copy on the host that is complete once the device has come so far."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=True)


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids and logits (R, count) of the highest of logits (R, V); equal ones in the order of their ids, as argmax has it.

    The first is argmax's, whatever the ties. That the others are the lowest ids holds for up to RESCORED equal logits at
    the end of the list; topk leaves open which of them it finds.
    """
    values, ids = logits.topk(min(count + RESCORED, logits.shape[1]))
    # Where argmax's is not among them, they all equal it, and it may stand for any.
    best = logits.argmax(-1)
    ids[:, -1] = torch.where((ids == best[:, None]).any(1), ids[:, -1], best)
    ids, order = ids.sort()
    values, order = values.gather(1, order).sort(descending=True, stable=True)
    return ids.gather(1, order)[:, :count], values[:, :count]


def decode_rows(rows: Sequence[DecodeRow]) -> list[tuple[int, int, int]]:
    """Slot, position and token of each; the token is UNKNOWN where it is the slot's last one."""
    return [(slot, position, UNKNOWN if token is None else token) for slot, position, token in rows]


def decode_buckets(num_slots: int) -> list[int]:
    """Batch sizes that decode steps are padded to, up to `num_slots`: at most a quarter of a batch is padding."""
    buckets = [1]
    while buckets[-1] < num_slots:
        buckets.append(min(num_slots, buckets[-1] + max(1, buckets[-1] // 4)))
    return buckets


class Runner:
    """Runs steps on one set of weights. It trusts the scheduler: every slot, page id and position is in range.

    Behind the slots that the scheduler knows stands one more, with a page of its own in every pool: the rows that pad a
    bucket are sequences of one token in it, so nothing has to treat them apart.
    """

    def __init__(self, model: GPT, ops: Ops, num_slots: int, num_pages: Mapping[KVGroup, int]):
        """`num_pages[group]` is the size of each KV group's pools, for every group that the model's layers use.

        `ops` must run on the device of the weights.
        """
        config = model.config
        weight = model.wte.weight
        self.model = model
        self.ops = ops
        self.device, self.dtype = weight.device, weight.dtype
        shape = (config.n_head, PAGE_SIZE, config.head_dim)
        # zeros, not empty: a CPU commits the memory page by page as it is first written.
        self.pools = [
            KVPool(*(self._zeros(num_pages[config.group(i)] + 1, *shape, dtype=self.dtype) for _ in "kv"))
            for i in range(config.n_layer)
        ]
        self.paged = PagedGPT(model, ops, self.pools)
        self.group_of: dict[PatternKind, KVGroup] = {config.kind(i): config.group(i) for i in range(config.n_layer)}
        self.patterns = {kind: config.pattern(kind) for kind in self.group_of}
        self.layouts = {
            kind: block_layout(pattern, config.n_positions, self.device) if pattern.is_sparse else None
            for kind, pattern in self.patterns.items()
        }
        self.scratch_slot = num_slots
        # One column more than a context has pages: kernels read one entry ahead.
        width = -(-config.n_positions // PAGE_SIZE) + 1
        self.page_tables = {group: self._zeros(num_slots + 1, width, dtype=torch.int32) for group in num_pages}
        for group, table in self.page_tables.items():
            table[self.scratch_slot] = num_pages[group]
        self.last_token = self._zeros(num_slots + 1, dtype=torch.int64)
        self.adapters = Adapters(model, ops)
        self._adapter_of = [0] * (num_slots + 1)  # of each slot
        self.sampling = self._sampling_state(num_slots + 1)
        # A graph is made for one size. On a CPU only a lone row is padded: its products would have other bits.
        self.buckets = decode_buckets(num_slots) if self.device.type == "cuda" else [2]
        # What a graph reads and writes, at addresses that never change: the three rows of `_decode`; sampled tokens.
        self._decode_input = self._zeros(3 * self.buckets[-1], dtype=torch.int64)
        self._decode_output = self._zeros(self.buckets[-1], dtype=torch.int64)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def _zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _sampling_state(self, num_slots: int) -> SamplingState:
        vocab_size, padded = self.model.config.vocab_size, self.model.config.padded_vocab_size
        columns = {name: self._zeros(num_slots, dtype=dtype) for name, dtype in COLUMNS.items()}
        # Rows of the padded vocabulary, so that each is aligned to 16 bytes.
        tables = {name: self._zeros(num_slots, padded, dtype=dtype)[:, :vocab_size] for name, dtype in TABLES.items()}
        return SamplingState(**columns, **tables)

    @torch.inference_mode()
    def capture(self) -> None:
        """Record one CUDA graph for each decode bucket. Until then, and on a CPU, the same steps run op by op."""
        gc.collect()  # a dead graph freed while another is recorded would end the recording
        pool = None
        for bucket in reversed(self.buckets):  # the largest first: the others share its memory
            rows = self._decode_input[: 3 * bucket].view(3, bucket)
            rows.copy_(torch.tensor([self._padding_row]).T)
            self._decode(rows)  # compiles the kernels, which must not happen while a graph is recorded
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._decode_output[:bucket], _ = self._decode(rows)
            pool = pool or graph.pool()
            self._graphs[bucket] = graph

    @torch.inference_mode()
    def launch(self, step: StepInput) -> PendingStep:
        """Apply the step's slot and page updates, run the model over its tokens, sample and score."""
        if step.starts:
            self._start_slots(step.starts)
        if step.pages:
            self._add_pages(step.pages)
        pending = self._run_mixed(step) if step.chunks else self._run_decode(step)
        if step.copies:
            self._copy_pages(step.copies)
        return pending

    def _to_device(self, *columns: Sequence[float], dtype: torch.dtype = torch.int64) -> list[Tensor]:
        """Lists of numbers as tensors on the device, in one transfer that nobody waits for."""
        pinned = torch.tensor(list(chain(*columns)), dtype=dtype, pin_memory=self.device.type == "cuda")
        return list(pinned.to(self.device, non_blocking=True).split([len(column) for column in columns]))

    def _start_slots(self, starts: list[SlotStart]) -> None:
        for start in starts:
            self._adapter_of[start.slot] = start.adapter
        state = self.sampling
        (slots,) = self._to_device([start.slot for start in starts])
        for dtype in (torch.int64, torch.float32):
            names = [name for name, column in COLUMNS.items() if column.is_floating_point == dtype.is_floating_point]
            values = self._to_device(*([getattr(start.sampling, name) for start in starts] for name in names), dtype=dtype)
            for name, column in zip(names, values, strict=True):
                getattr(state, name)[slots] = column.to(COLUMNS[name])
        for start in starts:
            if not start.sampling.adjusted:
                continue  # nobody reads its tables
            for table in (state.bias, state.generated, state.in_prompt):
                table[start.slot] = 0
            if start.sampling.logit_bias:
                tokens, bias = zip(*start.sampling.logit_bias, strict=True)
                state.bias[start.slot, self._to_device(tokens)[0]] = self._to_device(bias, dtype=torch.float32)[0]
            state.in_prompt[start.slot, self._to_device(start.prompt)[0]] = True

    def _add_pages(self, pages: list[NewPages]) -> None:
        for group, table in self.page_tables.items():
            rows = [
                (new.slot, new.first + i, page_id)
                for new in pages
                if new.group == group
                for i, page_id in enumerate(new.page_ids)
            ]
            if rows:
                slots, places, page_ids = self._to_device(*zip(*rows, strict=True))
                table[slots, places] = page_ids.to(torch.int32)

    def _copy_pages(self, copies: list[PageCopy]) -> None:
        for group in self.page_tables:
            pairs = [(copy.source, copy.target) for copy in copies if copy.group == group]
            if pairs:
                sources, targets = self._to_device(*zip(*pairs, strict=True))
                for layer, pool in enumerate(self.pools):
                    if self.model.config.group(layer) == group:
                        for pages in pool:
                            pages[targets] = pages[sources]

    @property
    def _padding_row(self) -> tuple[int, int, int]:
        return self.scratch_slot, 0, UNKNOWN

    def _run_decode(self, step: StepInput) -> PendingStep:
        """A step without prompt tokens: padded to a bucket. Graphs know neither logprobs nor bans."""
        count = len(step.decodes)
        place = bisect_left(self.buckets, count)
        bucket = self.buckets[place] if place < len(self.buckets) else count
        padded = [*decode_rows(step.decodes), *[self._padding_row] * (bucket - count)]
        rows = torch.tensor(list(zip(*padded, strict=True)), pin_memory=self.device.type == "cuda")
        plain = all(row.top_logprobs is None and not row.banned for row in step.samples)
        adapted = self.adapters.ops_for([self._adapter_of[slot] for slot, _, _ in padded])
        if plain and adapted is None and bucket in self._graphs:
            self._decode_input[: 3 * bucket].copy_(rows.flatten(), non_blocking=True)
            self._graphs[bucket].replay()
            return PendingStep(step, self._decode_output[:count], [])
        tokens, found = self._decode(rows.to(self.device, non_blocking=True), [] if plain else step.samples, adapted)
        return PendingStep(step, tokens[:count], found)

    def _decode(
        self, rows: Tensor, samples: Sequence[SampleRow] = (), adapted: Ops | None = None
    ) -> tuple[Tensor, list[FoundLogprobs]]:
        """One token of each of B decode_rows, (3, B). Without `samples`, which are as `_sample` says, and `adapted` ops it
        is what a graph holds: nothing here may wait for the device."""
        slots, positions, given = rows.unbind()
        plans = {
            kind: StepPlan(
                self._slot_mapping(kind, slots, positions), self._decode_plan(kind, slots, positions), None, len(slots)
            )
            for kind in self.patterns
        }
        hidden = self.paged(self._decode_tokens(slots, given), positions, plans, adapted)
        return self._sample(hidden, slots, positions + 1, samples)

    def _decode_tokens(self, slots: Tensor, given: Tensor) -> Tensor:
        """The tokens of decode rows: those given, or what was sampled last."""
        return torch.where(given == UNKNOWN, self.last_token[slots], given)

    def _run_mixed(self, step: StepInput) -> PendingStep:
        """A step with prompt chunks, behind decode rows or alone."""
        count = len(step.decodes)
        prompt = [token for chunk in step.chunks for token in chunk.tokens]
        slots, positions, given, prompt_tokens, chunk_slots, sampled, sampling_slots = self._to_device(
            step.token_slots,
            step.token_positions,
            [given for _, _, given in decode_rows(step.decodes)],
            prompt,
            [chunk.slot for chunk in step.chunks],
            [row.token for row in step.samples],
            [row.slot for row in step.samples],
        )
        starts, lengths = [chunk.start for chunk in step.chunks], [len(chunk.tokens) for chunk in step.chunks]
        plans = {}
        for kind, pattern in self.patterns.items():
            table = self.page_tables[self.group_of[kind]]
            plans[kind] = StepPlan(
                slot_mapping=self._slot_mapping(kind, slots, positions),
                decode=self._decode_plan(kind, slots[:count], positions[:count]) if count else None,
                prefill=PrefillPlan(table[chunk_slots], starts, lengths, pattern, self.layouts[kind]),
                num_decodes=count,
            )
        tokens = torch.cat((self._decode_tokens(slots[:count], given), prompt_tokens))
        adapted = self.adapters.ops_for([self._adapter_of[slot] for slot in step.token_slots])
        hidden = self.paged(tokens, positions, plans, adapted)
        new_tokens, found = self._sample(hidden[sampled], sampling_slots, positions[sampled] + 1, step.samples)
        return PendingStep(step, new_tokens, found + self._score(hidden, step))

    def _slot_mapping(self, kind: PatternKind, slots: Tensor, positions: Tensor) -> Tensor:
        pages = self.page_tables[self.group_of[kind]][slots, positions // PAGE_SIZE]
        return pages.long() * PAGE_SIZE + positions % PAGE_SIZE

    def _decode_plan(self, kind: PatternKind, slots: Tensor, positions: Tensor) -> DecodePlan:
        table = self.page_tables[self.group_of[kind]]
        return DecodePlan(table[slots], positions + 1, self.patterns[kind], self.layouts[kind])

    def _sample(
        self, hidden: Tensor, slots: Tensor, positions: Tensor, rows: Sequence[SampleRow]
    ) -> tuple[Tensor, list[FoundLogprobs]]:
        """Sample the tokens at `positions` (B,) of `slots` (B,) from hidden states (B, C), and remember them.

        `rows` say of the first of them, in order, what is banned and who wants logprobs; these come second.
        """
        num_top = max((row.top_logprobs or 0 for row in rows), default=0)
        parts, found = [], []
        for start in range(0, len(slots), LOGIT_ROWS):
            part = slice(start, start + LOGIT_ROWS)
            logits = self.model.logits(hidden[part], self.ops)
            wanted = [i for i, row in enumerate(rows[part]) if row.top_logprobs is not None]
            if wanted:
                totals, (top_ids, top_logits) = logits.logsumexp(-1, keepdim=True), likeliest(logits, num_top)
            banned = [(i, token) for i, row in enumerate(rows[part]) for token in row.banned]
            if banned:
                places, tokens = self._to_device(*zip(*banned, strict=True))
                logits[places, tokens] = float("-inf")
            tokens = self.ops.sample(logits, self.sampling, slots[part], positions[part])
            parts.append(tokens)
            if wanted:
                chosen = logits.gather(1, tokens[:, None]) - totals
                (kept,) = self._to_device(wanted)
                found.append(FoundLogprobs(chosen[kept, 0], top_ids[kept], (top_logits - totals)[kept]))
            del logits  # or it would live on while the next ones are made
        tokens = torch.cat(parts) if parts else slots
        self.last_token[slots] = tokens
        self.sampling.generated[slots, tokens] += 1
        return tokens, found

    def _score(self, hidden: Tensor, step: StepInput) -> list[FoundLogprobs]:
        """Logprobs of the targets of step.scores after hidden states (N, C), a slice of rows of logits at a time."""
        num_top = max((score.top_logprobs for score in step.scores), default=0)
        after = [score.first + i for score in step.scores for i in range(len(score.targets))]
        rows, targets = self._to_device(after, [token for score in step.scores for token in score.targets])
        found = []
        for some_rows, some_targets in zip(rows.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
            if not len(some_rows):
                break  # splitting nothing gives one empty piece
            logits = self.model.logits(hidden[some_rows], self.ops)
            totals, (top_ids, top_logits) = logits.logsumexp(-1, keepdim=True), likeliest(logits, num_top)
            chosen = logits.gather(1, some_targets[:, None]) - totals
            found.append(FoundLogprobs(chosen[:, 0], top_ids, top_logits - totals))
            del logits
        return found
