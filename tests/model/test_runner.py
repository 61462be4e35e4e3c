"""The whole path of a step, weights to logits, through the paged cache: against transformers, with poisoned free pages."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import cpu
from kernels.band import PAGE_SIZE
from kernels.ops import Ops
from model.config import KVGroup
from model.runner import Runner
from model.step import DecodeRow, NewPages, PromptChunk, SamplingParams, SlotStart, StepInput
from model.weights import load_model
from service.kv_cache import KVCache, pages_for, resting_pages
from tests.model.checkpoints import tiny
from tests.model.test_weights import transformers_logits

STEP_TOKENS = 96


class PagedRun:
    """Drives a runner over given tokens, any mix of chunks and decode rows, and collects every position's logits.

    All pages that no slot holds are NaN before every step, so a single read of a dead key would show.
    """

    def __init__(self, directory: Path, sequences: list[Tensor], dtype: torch.dtype = torch.float32, ops: Ops = cpu):
        self.model = load_model(directory, dtype)
        config = self.model.config
        self.sequences = sequences
        bands: dict[KVGroup, int | None] = {
            config.group(i): config.pattern(config.kind(i)).band for i in range(config.n_layer)
        }
        sizes = {
            group: sum(resting_pages(len(tokens), band) for tokens in sequences) + pages_for(STEP_TOKENS)
            for group, band in bands.items()
        }
        self.cache = KVCache(config, sizes, step_tokens=STEP_TOKENS)
        self.runner = Runner(self.model, ops, len(sequences), sizes)
        self.model.register_forward_hook(self._record)
        self.hidden: list[Tensor] = []
        self.done = [0] * len(sequences)
        self.logits = [torch.full((len(tokens), config.vocab_size), float("nan")) for tokens in sequences]
        for slot, tokens in enumerate(sequences):
            assert self.cache.try_reserve(slot, len(tokens))

    def _record(self, module: Any, args: Any, output: Tensor) -> None:
        self.hidden.append(output)

    def poison(self) -> None:
        for layer, pool in enumerate(self.runner.pools):
            free = self.cache.pools[self.model.config.group(layer)].free
            pool.k[free] = float("nan")
            pool.v[free] = float("nan")

    def step(self, decodes: list[int], chunks: list[tuple[int, int]]) -> None:
        """Decode one token of each slot in `decodes`, and a chunk of the given length of each (slot, length)."""
        self.poison()
        pages: list[NewPages] = []
        for slot, length in [(slot, 1) for slot in decodes] + chunks:
            pages += self.cache.extend(slot, self.done[slot] + length)
        starts = [SlotStart(slot, SamplingParams(temperature=0.0)) for slot, _ in chunks if self.done[slot] == 0]
        for slot in decodes:
            # The runner would feed its own last token; these sequences are given.
            self.runner.last_token[slot] = self.sequences[slot][self.done[slot]]
        rows = [DecodeRow(slot, self.done[slot]) for slot in decodes]
        prompt = [
            PromptChunk(slot, self.done[slot], self.sequences[slot][self.done[slot] :][:length].tolist(), True)
            for slot, length in chunks
        ]
        step = StepInput(starts, pages, rows, prompt)
        sampled = self.runner.launch(step).result()
        with torch.inference_mode():
            logits = self.model.logits(self.hidden.pop()).float()
        assert sampled.tokens == logits[step.sampled_tokens].argmax(-1).tolist()
        for row, (slot, position) in enumerate(zip(step.token_slots, step.token_positions, strict=True)):
            self.logits[slot][position] = logits[row]
        for slot, length in [(slot, 1) for slot in decodes] + chunks:
            self.done[slot] += length
            self.cache.release_behind(slot, self.done[slot])
        assert self.cache.faults() == []


def random_steps(run: PagedRun, rng: random.Random) -> None:
    """Ragged steps as the scheduler would make them: any slots decode, prompts in chunks, first come, first served."""
    prompts = [rng.randrange(1, len(tokens) + 1) for tokens in run.sequences]
    while any(done < len(tokens) for done, tokens in zip(run.done, run.sequences, strict=True)):
        budget, decodes, chunks = rng.choice([5, 16, STEP_TOKENS]), [], []
        for slot, tokens in enumerate(run.sequences):
            if prompts[slot] <= run.done[slot] < len(tokens):
                decodes.append(slot)
                budget -= 1
        for slot in range(len(run.sequences)):
            length = min(budget, prompts[slot] - run.done[slot])
            if length > 0:
                chunks.append((slot, length))
                budget -= length
        run.step(decodes, chunks)


ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    "cerebras": ("cerebras", {}),
    "gpt_neo": ("gpt_neo", {}),
    "gpt_neo, band over a page": (
        "gpt_neo",
        {"window_size": 70, "attention_types": [[["local", "local", "global"], 1]], "num_layers": 3},
    ),
    "opt": ("opt", {}),
    "opt-350m": ("opt-350m", {}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_chunked_prefill_and_decode_give_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    arch, fields = ARCHITECTURES[name]
    directory = tiny(arch, tmp_path, **fields)
    generator = torch.Generator().manual_seed(5)
    lengths = [250, 1, 64, 65, 129, 190]
    sequences = [torch.randint(331, (length,), generator=generator) for length in lengths]
    expected = [transformers_logits(directory, tokens[None])[0] for tokens in sequences]
    for seed in range(3):
        run = PagedRun(directory, sequences)
        random_steps(run, random.Random(seed))
        for logits, oracle in zip(run.logits, expected, strict=True):
            assert (logits - oracle).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_prompt_token_by_token_and_in_chunks_of_any_size(name: str, tmp_path: Path) -> None:
    arch, fields = ARCHITECTURES[name]
    directory = tiny(arch, tmp_path, **fields)
    tokens = torch.randint(331, (200,), generator=torch.Generator().manual_seed(6))
    expected = transformers_logits(directory, tokens[None])[0]
    for size in (1, 17, 64, 96):
        run = PagedRun(directory, [tokens])
        while run.done[0] < len(tokens):
            run.step([], [(0, min(size, len(tokens) - run.done[0]))])
        assert (run.logits[0] - expected).abs().max() <= 1e-4
    run = PagedRun(directory, [tokens])
    run.step([], [(0, 1)])
    while run.done[0] < len(tokens):
        run.step([0], [])
    assert (run.logits[0] - expected).abs().max() <= 1e-4


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    directory = tiny("banded", tmp_path)
    tokens = torch.randint(331, (200,), generator=torch.Generator().manual_seed(7))
    exact, rounded = PagedRun(directory, [tokens]), PagedRun(directory, [tokens], torch.bfloat16)
    for run in (exact, rounded):
        random_steps(run, random.Random(1))
    scale = exact.logits[0].std()
    error = (exact.logits[0] - rounded.logits[0]).abs()
    # bf16 keeps 8 bits: a few roundings a layer over 4 layers.
    assert error.mean() < 0.02 * scale
    assert error.max() < 0.2 * scale


def test_a_slot_starts_afresh_for_its_next_sequence(tmp_path: Path) -> None:
    directory = tiny("banded", tmp_path)
    first, second = (torch.randint(331, (n,), generator=torch.Generator().manual_seed(n)) for n in (150, 90))
    used = PagedRun(directory, [first])
    random_steps(used, random.Random(2))
    used.cache.free(0)
    used.sequences, used.done = [second], [0]
    used.logits = [torch.zeros(90, 331)]
    assert used.cache.try_reserve(0, 90)
    fresh = PagedRun(directory, [second])
    for run in (used, fresh):
        random_steps(run, random.Random(3))
    assert torch.equal(used.logits[0], fresh.logits[0])
    assert PAGE_SIZE < 90, "the second sequence must reuse more than one page"
