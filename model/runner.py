"""Owns what lives on the device: weights, KV pools, the state of each batch row. StepInput in, Sampled out.

Steps that only decode are padded to a bucket. On CUDA each bucket is one captured graph over buffers of fixed address and
size. Everything else is the same code on every device.

Shapes: N tokens in a step, B sampled tokens, R rows of logits, K likeliest tokens, C the width, V the vocabulary.
"""

import gc
import math
import operator
from array import array
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.band import PAGE_SIZE
from kernels.block_layout import block_layout
from kernels.names import NOT_FINITE, PatternKind
from kernels.ops import Ops
from kernels.plan import PrefillPlan, StepPlan
from kernels.sampling_state import COLUMNS, TABLES, SamplingState
from model.config import KVGroup
from model.gpt import GPT, Adapt, KVPool, PagedGPT
from model.lora import Adapters
from model.step import (
    NewPages,
    PageCopy,
    PromptChunk,
    RowStart,
    Sample,
    Sampled,
    Sampling,
    StepInput,
    TokenLogprobs,
)

# Rows of logits that exist at a time: one row takes as much memory as a hundred hidden states. With 128 rows logprobs of
# prompts take an eighth longer.
LOGIT_ROWS = 256
# Stands for the row's last sampled token, which only the device knows yet.
UNKNOWN = -1


class FoundLogprobs(NamedTuple):
    """For each row of logits: the logprob of one token, and the K likeliest tokens, likeliest first."""

    chosen: Tensor  # (R,)
    top_ids: Tensor  # (R, K)
    top_logprobs: Tensor  # (R, K)


class PendingStep:
    """A launched step; `result` waits for its tokens."""

    def __init__(self, step: StepInput, tokens: Tensor, found: list[FoundLogprobs]):
        """Start to move `tokens` (B,), which later steps of a device may overwrite, and `found` to the host.

        `found` holds the samples that want logprobs first, then the prompt's logprobs.
        """
        self._step = step
        self._tokens = to_host(tokens)
        self._found = [FoundLogprobs(*map(to_host, each)) for each in found]
        self._copied = torch.cuda.Event() if tokens.is_cuda else None
        if self._copied:
            self._copied.record()

    def result(self) -> Sampled:
        if self._copied:
            self._copied.synchronize()
        rows = chain.from_iterable(zip(*(column.tolist() for column in each), strict=True) for each in self._found)

        def logprobs(num_top: int) -> TokenLogprobs:
            chosen, ids, values = next(rows)
            return TokenLogprobs(chosen, array("i", ids[:num_top]), array("f", values[:num_top]))

        step = self._step
        sampled = [None if sample.top_logprobs is None else logprobs(sample.top_logprobs) for sample in step.samples]
        prompt = [[logprobs(wanted.top_logprobs) for _ in wanted.targets] for wanted in step.prompt_logprobs]
        # A token that was banned may have had the only logit that is not finite.
        tokens = [
            token if token < 0 or found is None or math.isfinite(found.logprob) else NOT_FINITE
            for token, found in zip(self._tokens.tolist(), sampled, strict=True)
        ]
        return Sampled(tokens, sampled, prompt)


def to_host(tensor: Tensor) -> Tensor:
    """The tensor on the host, complete once the device has reached this point of its queue."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def decode_buckets(num_rows: int) -> list[int]:
    """Batch sizes that decode steps are padded to, up to `num_rows`: at most a quarter of a batch is padding."""
    buckets = [1]
    while buckets[-1] < num_rows:
        buckets.append(min(num_rows, buckets[-1] + max(1, buckets[-1] // 4)))
    return buckets


class Runner:
    """Runs steps on one set of weights. It trusts the scheduler: every row, page id and position is in range.

    Each table has one row more than the scheduler knows, and each pool one page more. Padding consists of one-token
    sequences in that row and page, so nothing treats it differently.
    """

    def __init__(self, model: GPT, ops: Ops, num_rows: int, num_pages: Mapping[KVGroup, int]):
        """`num_pages[group]` is the size of each KV group's pools, for every group that the model's layers use.

        `ops` must run on the device of the weights.
        """
        config = model.config
        weight = model.wte.weight
        self.model = model
        self.ops = ops
        self.device, self.dtype = weight.device, weight.dtype
        shape = (config.n_head, PAGE_SIZE, config.head_dim)
        # zeros, not empty: on a CPU the kernel then commits the memory page by page, at the first write.
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
        self.scratch_row = num_rows
        self._padding = (self.scratch_row, 0, UNKNOWN)  # a column of `_decode`
        # One column more than a context has pages: kernels read one entry ahead.
        width = -(-config.n_positions // PAGE_SIZE) + 1
        self.page_tables = {group: self._zeros(num_rows + 1, width, dtype=torch.int32) for group in num_pages}
        for group, table in self.page_tables.items():
            table[self.scratch_row] = num_pages[group]
        self.last_token = self._zeros(num_rows + 1, dtype=torch.int64)
        self.adapters = Adapters(model, ops)
        self._adapter_of = [0] * (num_rows + 1)  # of each row
        self.sampling = self._sampling_state(num_rows + 1)
        self._last_bias: tuple[tuple[object, object], Tensor] | None = None  # and what it was made of
        # A graph has one size. On a CPU only a lone token is padded: a product of one row has other bits.
        self.buckets = decode_buckets(num_rows) if self.device.type == "cuda" else [2]
        # What a graph reads and writes, at fixed addresses: the columns of `_decode`; the sampled tokens.
        self._decode_input = self._zeros(3 * self.buckets[-1], dtype=torch.int64)
        self._decode_output = self._zeros(self.buckets[-1], dtype=torch.int64)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def _zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _sampling_state(self, num_rows: int) -> SamplingState:
        vocab_size, padded = self.model.config.vocab_size, self.model.config.padded_vocab_size
        columns = {name: self._zeros(num_rows, dtype=dtype) for name, dtype in COLUMNS.items()}
        # Rows of the padded vocabulary, so that each is aligned to 16 bytes.
        tables = {name: self._zeros(num_rows, padded, dtype=dtype)[:, :vocab_size] for name, dtype in TABLES.items()}
        return SamplingState(**columns, **tables)

    @torch.inference_mode()
    def capture(self) -> None:
        """Record one CUDA graph for each decode bucket. Until then, and on a CPU, the same steps run op by op."""
        gc.collect()  # a dead graph freed while another is recorded would end the recording
        pool = None
        for bucket in reversed(self.buckets):  # the largest first: the others share its memory
            columns = self._decode_input[: 3 * bucket].view(3, bucket)
            columns.copy_(torch.tensor([self._padding]).T)
            self._decode(columns)  # compiles the kernels, which must not happen while a graph is recorded
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._decode_output[:bucket], _ = self._decode(columns)
            pool = pool or graph.pool()
            self._graphs[bucket] = graph

    @torch.inference_mode()
    def launch(self, step: StepInput, begins: Callable[[], object] = lambda: None) -> PendingStep:
        """Apply the step's row and page updates, run the model over its tokens, sample and collect logprobs.

        A CPU has computed the step when this returns, so there `begins` is called when it begins to: time for the Python of
        other threads.
        """
        if step.starts:
            self._start_rows(step.starts)
        self._add_pages(step.pages)
        decodes_only = not step.chunks and len(step.samples) == len(step.decodes)
        pending = self._run_decode(step, begins) if decodes_only else self._run_mixed(step, begins)
        self._copy_pages(step.copies)
        return pending

    def _to_device(self, *columns: Sequence[float], dtype: torch.dtype = torch.int64) -> list[Tensor]:
        """Lists of numbers as tensors on the device, in one asynchronous transfer."""
        pinned = torch.tensor(list(chain(*columns)), dtype=dtype, pin_memory=self.device.type == "cuda")
        return list(pinned.to(self.device, non_blocking=True).split([len(column) for column in columns]))

    def _start_rows(self, starts: list[RowStart]) -> None:
        for start in starts:
            self._adapter_of[start.row] = start.adapter
        state = self.sampling
        (rows,) = self._to_device([start.row for start in starts])
        for dtype in (torch.int64, torch.float32):
            names = [name for name, column in COLUMNS.items() if column.is_floating_point == dtype.is_floating_point]
            values = self._to_device(*([getattr(start.sampling, name) for start in starts] for name in names), dtype=dtype)
            for name, column in zip(names, values, strict=True):
                getattr(state, name)[rows] = column.to(COLUMNS[name])
        for start in starts:
            if start.generated:
                self.last_token[start.row] = start.generated[-1]
            if not start.sampling.adjusted:
                continue  # its tables are never read
            state.bias[start.row] = self._bias_of(start.sampling)
            for table in (state.generated, state.in_prompt):
                table[start.row] = 0
            state.in_prompt[start.row, self._to_device(start.prompt)[0]] = True
            if start.generated:
                (generated,) = self._to_device(start.generated)
                state.generated[start.row] = generated.bincount(minlength=state.generated.shape[1])

    def _bias_of(self, sampling: Sampling) -> Tensor:
        """What is added to the logits (V,). The last one is kept, because the choices of a request share their entries."""
        entries = sampling.logit_bias, sampling.allowed_token_ids
        if self._last_bias is None or any(map(operator.is_not, self._last_bias[0], entries)):
            bias = torch.zeros_like(self.sampling.bias[0])
            if sampling.logit_bias:
                tokens, values = zip(*sampling.logit_bias, strict=True)
                bias[self._to_device(tokens)[0]] = self._to_device(values, dtype=torch.float32)[0]
            if sampling.allowed_token_ids:
                barred = torch.full_like(bias, float("-inf"))
                barred[self._to_device(sampling.allowed_token_ids)[0]] = 0
                bias += barred
            self._last_bias = entries, bias
        return self._last_bias[1]

    def _add_pages(self, pages: list[NewPages]) -> None:
        for group, table in self.page_tables.items():
            entries = [
                (new.row, new.first + i, page_id)
                for new in pages
                if new.group == group
                for i, page_id in enumerate(new.page_ids)
            ]
            if entries:
                rows, places, page_ids = self._to_device(*zip(*entries, strict=True))
                table[rows, places] = page_ids.to(torch.int32)

    def _copy_pages(self, copies: list[PageCopy]) -> None:
        for group in self.page_tables:
            pairs = [(copy.source, copy.target) for copy in copies if copy.group == group]
            if pairs:
                sources, targets = self._to_device(*zip(*pairs, strict=True))
                for layer, pool in enumerate(self.pools):
                    if self.model.config.group(layer) == group:
                        for pages in pool:
                            pages[targets] = pages[sources]

    def _run_decode(self, step: StepInput, begins: Callable[[], object]) -> PendingStep:
        """A step that samples after each of its tokens, padded to a bucket. Graphs support neither logprobs nor bans."""
        count = len(step.decodes)
        bucket = next((size for size in self.buckets if size >= count), count)
        padded = [(row, position, UNKNOWN if token is None else token) for row, position, token in step.decodes]
        padded += [self._padding] * (bucket - count)
        columns = torch.tensor(list(zip(*padded, strict=True)), pin_memory=self.device.type == "cuda")
        plain = all(sample.top_logprobs is None and not sample.banned for sample in step.samples)
        adapt = self.adapters.of_rows([self._adapter_of[row] for row, _, _ in padded])
        if plain and adapt is None and bucket in self._graphs:
            self._decode_input[: 3 * bucket].copy_(columns.flatten(), non_blocking=True)
            self._graphs[bucket].replay()
            return PendingStep(step, self._decode_output[:count], [])
        columns = columns.to(self.device, non_blocking=True)
        tokens, found = self._decode(columns, [] if plain else step.samples, adapt, begins)
        return PendingStep(step, tokens[:count], found)

    def _decode(
        self,
        columns: Tensor,
        samples: Sequence[Sample] = (),
        adapt: Adapt | None = None,
        begins: Callable[[], object] = lambda: None,
    ) -> tuple[Tensor, list[FoundLogprobs]]:
        """Sample a token after each of `columns` (3, B). A column is a row, a position and the token there, or UNKNOWN.

        `samples` is as in `_sample`. A graph records this call without `samples` and `adapt`, so nothing in it may wait for
        the device.
        """
        rows, positions, given = columns.unbind()  # (B,) each
        tokens = torch.where(given == UNKNOWN, self.last_token[rows], given)
        plans = self._plans(rows, positions, len(rows), [], rows[:0])
        hidden = self.paged(tokens, positions, plans, adapt, begins)  # (B, C)
        return self._sample(hidden, rows, positions + 1, samples)

    def _run_mixed(self, step: StepInput, begins: Callable[[], object]) -> PendingStep:
        """A step with tokens that nothing is sampled after: prompt chunks, or known ones. It may also have others."""
        given = [UNKNOWN if token is None else token for _, _, token in step.decodes]
        prompt = [token for chunk in step.chunks for token in chunk.tokens]
        rows, positions, tokens, chunk_rows, sampled, sampling_rows = self._to_device(
            step.token_rows,
            step.token_positions,
            given + prompt,
            [chunk.row for chunk in step.chunks],
            [sample.token for sample in step.samples],
            [sample.row for sample in step.samples],
        )
        tokens = torch.where(tokens == UNKNOWN, self.last_token[rows], tokens)  # (N,)
        adapt = self.adapters.of_rows([self._adapter_of[row] for row in step.token_rows])
        plans = self._plans(rows, positions, len(step.decodes), step.chunks, chunk_rows)
        hidden = self.paged(tokens, positions, plans, adapt, begins)  # (N, C)
        new_tokens, found = self._sample(hidden[sampled], sampling_rows, positions[sampled] + 1, step.samples)
        return PendingStep(step, new_tokens, found + self._prompt_logprobs(hidden, step))

    def _plans(
        self, rows: Tensor, positions: Tensor, count: int, chunks: Sequence[PromptChunk], chunk_rows: Tensor
    ) -> dict[PatternKind, StepPlan]:
        """Plans of tokens at `positions` (N,) of `rows` (N,): `count` decode rows first, then `chunks` of `chunk_rows`."""
        starts, lengths = [chunk.start for chunk in chunks], [len(chunk.tokens) for chunk in chunks]
        plans = {}
        for kind, pattern in self.patterns.items():
            table, layout = self.page_tables[self.group_of[kind]], self.layouts[kind]
            prefill = PrefillPlan(table[chunk_rows], starts, lengths, pattern, layout) if chunks else None
            plans[kind] = StepPlan(table, rows, positions, count, prefill, pattern, layout)
        return plans

    def _sample(
        self, hidden: Tensor, rows: Tensor, positions: Tensor, samples: Sequence[Sample]
    ) -> tuple[Tensor, list[FoundLogprobs]]:
        """Sample and remember the tokens at `positions` (B,) of batch rows `rows` (B,) from hidden states (B, C).

        `samples` describes the first of them, in order: what is banned, and which want logprobs. Also returns these
        logprobs, for at most LOGIT_ROWS rows of logits each.
        """
        num_top = max((sample.top_logprobs or 0 for sample in samples), default=0)
        parts, found = [], []
        for start in range(0, len(rows), LOGIT_ROWS):
            part = slice(start, start + LOGIT_ROWS)
            logits = self.model.logits(hidden[part], self.ops)  # (R, V)
            wanted = [i for i, sample in enumerate(samples[part]) if sample.top_logprobs is not None]
            if wanted:
                top = self.ops.top_logprobs(logits, num_top)
            banned = [(i, token) for i, sample in enumerate(samples[part]) for token in sample.banned]
            if banned:
                places, tokens = self._to_device(*zip(*banned, strict=True))
                logits[places, tokens] = float("-inf")
            tokens = self.ops.sample(logits, self.sampling, rows[part], positions[part])
            parts.append(tokens)
            if wanted:
                chosen = logits.gather(1, tokens[:, None].clamp_min(0)) - top.totals
                some = FoundLogprobs(chosen[:, 0], top.ids, top.logprobs)
                if len(wanted) < len(logits):
                    (kept,) = self._to_device(wanted)
                    some = FoundLogprobs(*(column[kept] for column in some))
                found.append(some)
            del logits  # or it would stay allocated while the next ones are computed
        tokens = torch.cat(parts) if parts else rows
        known = tokens.clamp_min(0)  # the next step may be launched before anyone sees that there is no token
        self.last_token[rows] = known
        self.sampling.generated[rows, known] += 1
        return tokens, found

    def _prompt_logprobs(self, hidden: Tensor, step: StepInput) -> list[FoundLogprobs]:
        """Logprobs of all targets of step.prompt_logprobs from hidden states (N, C), LOGIT_ROWS rows at a time."""
        wanted = step.prompt_logprobs
        num_top = max((some.top_logprobs for some in wanted), default=0)
        after = [some.first + i for some in wanted for i in range(len(some.targets))]
        rows, targets = self._to_device(after, [token for some in wanted for token in some.targets])
        found = []
        for some_rows, some_targets in zip(rows.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
            if not len(some_rows):
                break  # splitting an empty tensor gives one empty piece
            logits = self.model.logits(hidden[some_rows], self.ops)  # (R, V)
            top = self.ops.top_logprobs(logits, num_top)
            chosen = logits.gather(1, some_targets[:, None]) - top.totals
            found.append(FoundLogprobs(chosen[:, 0], top.ids, top.logprobs))
            del logits
        return found
