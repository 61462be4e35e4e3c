"""Owns what lives on the device: weights, KV pools, one row of state per slot. StepInput in, Sampled out."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels.band import PAGE_SIZE
from kernels.plan import PrefillPlan, plan_decode
from model.config import AttentionKind
from model.gpt import GPT, GroupPlan, KVPool, PagedAttention
from model.sampling import SamplingRows, sample
from model.step import NewPages, Sampled, SlotStart, StepInput


class PendingStep:
    """A launched step; `result` waits for its tokens."""

    def __init__(self, tokens: Tensor):
        self._tokens = tokens

    def result(self) -> Sampled:
        return Sampled(self._tokens.tolist())


class Runner:
    """Runs steps on one set of weights. It trusts the scheduler: every slot, page id and position is in range."""

    def __init__(self, model: GPT, num_slots: int, num_pages: Mapping[AttentionKind, int]):
        """`num_pages[kind]` is the size of each KV group's pool, for every kind that the model's layers use."""
        config = model.config
        weight = model.wte.weight
        self.model = model
        self.device, self.dtype = weight.device, weight.dtype
        shape = (config.n_head, PAGE_SIZE, config.head_dim)
        # zeros, not empty: the memory is committed page by page as it is first written.
        self.pools = [
            KVPool(*(torch.zeros(num_pages[config.kind(i)], *shape, dtype=self.dtype, device=self.device) for _ in "kv"))
            for i in range(config.n_layer)
        ]
        width = -(-config.n_positions // PAGE_SIZE)
        self.page_tables = {kind: self._slot_rows(num_slots, width, dtype=torch.int32) for kind in num_pages}
        self.last_token = self._slot_rows(num_slots, dtype=torch.int64)
        self.sampling = SamplingRows(
            temperature=self._slot_rows(num_slots, dtype=torch.float32),
            top_k=self._slot_rows(num_slots, dtype=torch.int64),
            top_p=self._slot_rows(num_slots, dtype=torch.float32),
            seed=self._slot_rows(num_slots, dtype=torch.int64),
            choice=self._slot_rows(num_slots, dtype=torch.int64),
            position=self._slot_rows(num_slots, dtype=torch.int64),
        )

    def _slot_rows(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    @torch.inference_mode()
    def launch(self, step: StepInput) -> PendingStep:
        """Apply the step's slot and page updates, run the model over its tokens and sample."""
        for start in step.starts:
            self._start_slot(start)
        for pages in step.pages:
            self._add_pages(pages)
        slots, positions = torch.tensor(step.token_slots), torch.tensor(step.token_positions)
        prompt = [token for chunk in step.chunks for token in chunk.tokens]
        tokens = torch.cat((self.last_token[slots[: len(step.decodes)]], torch.tensor(prompt, dtype=torch.int64)))
        plans = self._plans(step, slots, positions)
        hidden = self.model(tokens, positions, PagedAttention(self.model.config, self.pools, plans, len(step.decodes)))
        rows = torch.tensor(step.sampled_tokens, dtype=torch.int64)
        return PendingStep(self._sample(hidden[rows], slots[rows], positions[rows] + 1))

    def _start_slot(self, start: SlotStart) -> None:
        for name, value in start.sampling._asdict().items():
            getattr(self.sampling, name)[start.slot] = value

    def _add_pages(self, pages: NewPages) -> None:
        row = self.page_tables[pages.kind][pages.slot]
        row[pages.first : pages.first + len(pages.page_ids)] = torch.tensor(pages.page_ids, dtype=torch.int32)

    def _plans(self, step: StepInput, slots: Tensor, positions: Tensor) -> dict[AttentionKind, GroupPlan]:
        """What each KV group writes and reads in this step; slots and positions (N,) of its tokens."""
        decoding = len(step.decodes)
        chunk_slots = [chunk.slot for chunk in step.chunks]
        starts, counts = [chunk.start for chunk in step.chunks], [len(chunk.tokens) for chunk in step.chunks]
        plans: dict[AttentionKind, GroupPlan] = {}
        for kind, table in self.page_tables.items():
            band = self.model.config.band if kind == "banded" else None
            plans[kind] = GroupPlan(
                slot_mapping=table[slots, positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE,
                decode=plan_decode(table[slots[:decoding]], positions[:decoding] + 1, band),
                prefill=PrefillPlan(table[chunk_slots], starts, counts, band),
            )
        return plans

    def _sample(self, hidden: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """Sample the tokens at `positions` (B,) of `slots` (B,) from hidden states (B, C), and remember them."""
        if not len(slots):
            return self.last_token[:0]
        self.sampling.position[slots] = positions
        logits = self.model.logits(hidden)
        tokens = sample(logits, SamplingRows(*(column[slots] for column in self.sampling)))
        self.last_token[slots] = tokens
        return tokens
