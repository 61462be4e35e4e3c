"""Drives a runner over given tokens, for tests and benchmarks of the whole path from weights to logits."""

import random
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from model.checkpoint.weights import load_model
from model.config import KVGroup
from model.runner import Runner
from model.step import DecodeToken, NewPages, PromptChunk, PromptLogprobs, RowStart, Sample, Sampled, Sampling, StepInput
from service.engine.pages import PageAllocator, pages_for, resting_pages
from tests.kernels.paths import CPU_PATH, ServedPath

STEP_TOKENS = 96


class PagedRun:
    """Drives a runner over given tokens in any mix of chunks and decode rows, and collects the logits of all positions.

    All pages that no row holds are NaN before every step, so a single read of a dead key would show. So is all that the
    rows which pad a bucket could leave behind.
    """

    def __init__(
        self,
        directory: Path,
        sequences: list[Tensor],
        dtype: torch.dtype = torch.float32,
        path: ServedPath = CPU_PATH,
        *,
        pack: Literal["as it is", "int8"] | None = None,
    ):
        self.model = load_model(directory, dtype, path.device)
        if pack:
            self.model.pack(path.ops, quantize=pack == "int8")
        config = self.model.config
        self.sequences = sequences
        bands: dict[KVGroup, int | None] = {
            config.group(i): config.pattern(config.kind(i)).band for i in range(config.n_layer)
        }
        sizes = {
            group: sum(resting_pages(len(tokens), band) for tokens in sequences) + pages_for(STEP_TOKENS)
            for group, band in bands.items()
        }
        self.cache = PageAllocator(config, sizes, step_tokens=STEP_TOKENS)
        self.runner = Runner(self.model, path.ops, len(sequences), sizes)
        self.is_native = self.runner.paged._native_forward is not None
        self.hidden: list[Tensor] = []
        self.runner.paged = self._recording(self.runner.paged)
        self.num_top: int | None = None  # if set, asks for logprobs of all tokens and checks them
        self.done = [0] * len(sequences)
        self.logits = [torch.full((len(tokens), config.vocab_size), float("nan")) for tokens in sequences]
        for row, tokens in enumerate(sequences):
            assert self.cache.try_reserve(row, len(tokens))

    def _recording(self, paged: Callable[..., Tensor]) -> Any:
        def run(*arguments: Any) -> Tensor:
            self.hidden.append(paged(*arguments))
            return self.hidden[-1]

        return run

    def poison(self) -> None:
        for layer, pool in enumerate(self.runner.pools):
            free = self.cache.pools[self.model.config.group(layer)].free
            for pages in pool:
                pages[free] = float("nan")
                pages[-1] = float("nan")
        scratch = self.runner.scratch_row
        self.runner.last_token[scratch] = int(torch.randint(self.model.config.vocab_size, ()))
        sampling = self.runner.sampling
        sampling.adjusted[scratch] = True
        sampling.repetition_penalty[scratch] = 1.0
        sampling.bias[scratch] = float("nan")

    def step(self, decodes: list[int], chunks: list[tuple[int, int]]) -> None:
        """Decode one token of each row in `decodes`, and a chunk of the given length of each (row, length)."""
        self.poison()
        pages: list[NewPages] = []
        for row, length in [(row, 1) for row in decodes] + chunks:
            pages += self.cache.extend(row, self.done[row] + length)
        starts = [
            RowStart(row, Sampling(temperature=0.0), self.sequences[row].tolist())
            for row, _ in chunks
            if self.done[row] == 0
        ]
        for row in decodes:
            # The runner would feed its own last token, but these sequences are given.
            self.runner.last_token[row] = self.sequences[row][self.done[row]]
        rows = [DecodeToken(row, self.done[row]) for row in decodes]
        prompt = [
            PromptChunk(row, self.done[row], self.sequences[row][self.done[row] :][:length].tolist())
            for row, length in chunks
        ]
        ends = list(accumulate((length for _, length in chunks), initial=len(rows)))
        samples = [Sample(row, i, self.num_top) for i, row in enumerate(decodes)]
        samples += [Sample(row, end - 1, self.num_top) for (row, _), end in zip(chunks, ends[1:], strict=True)]
        scores = []
        if self.num_top is not None:
            scores = [PromptLogprobs(start, c.tokens[1:], self.num_top) for c, start in zip(prompt, ends, strict=False)]
        step = StepInput(starts, pages, rows, prompt, samples, scores, [])
        begun: list[int] = []
        sampled = self.runner.launch(step, lambda: begun.append(len(self.hidden))).result()
        is_late = self.runner.device.type == "cuda"  # it computes when the launch has returned
        assert begun == [0] * (not is_late), "the caller is told once, and before the model has computed"
        with torch.inference_mode():
            logits = self.model.logits(self.hidden.pop(), self.runner.ops).cpu()
        assert sampled.tokens == logits[[row.token for row in samples]].argmax(-1).tolist()
        if self.num_top is not None:
            self._check_logprobs(step, sampled, logits)
        for i, (row, position) in enumerate(zip(step.token_rows, step.token_positions, strict=True)):
            self.logits[row][position] = logits[i]
        for row, length in [(row, 1) for row in decodes] + chunks:
            self.done[row] += length
            self.cache.release_passed(row, self.done[row])
        assert self.cache.check_integrity() == []

    def _check_logprobs(self, step: StepInput, sampled: Sampled, logits: Tensor) -> None:
        expected = logits.double().log_softmax(-1)
        found = [(row.token, token) for row, token in zip(step.samples, sampled.tokens, strict=True)]
        found += [(score.first + i, token) for score in step.prompt_logprobs for i, token in enumerate(score.targets)]
        every = [*sampled.logprobs, *(each for scores in sampled.prompt_logprobs for each in scores)]
        for (index, token), logprobs in zip(found, every, strict=True):
            assert logprobs is not None
            assert abs(logprobs.logprob - expected[index, token].item()) < 1e-5
            highest = expected[index].topk(len(logprobs.top)).values.tolist()
            assert len(logprobs.top) == self.num_top
            assert [value for _, value in logprobs.top] == pytest.approx(highest, abs=1e-5)
            assert dict(logprobs.top).get(token, logprobs.logprob) == logprobs.logprob, "to the last bit"
        for token, logprobs in zip(sampled.tokens, sampled.logprobs, strict=True):
            assert logprobs is not None
            assert not logprobs.top or logprobs.top[0][0] == token, "greedy is the likeliest"


def random_steps(
    run: PagedRun, rng: random.Random, budgets: tuple[int, ...] = (5, 16, STEP_TOKENS), most_decoded: int = 2048
) -> None:
    """Ragged steps as the scheduler would make them: any rows decode, prompts in chunks, first come, first served.

    Of each sequence at most the last `most_decoded` tokens are decoded.
    """
    prompts = [rng.randrange(max(len(tokens) - most_decoded, 1), len(tokens) + 1) for tokens in run.sequences]
    while any(done < len(tokens) for done, tokens in zip(run.done, run.sequences, strict=True)):
        budget, decodes, chunks = rng.choice(budgets), [], []
        for row, tokens in enumerate(run.sequences):
            if prompts[row] <= run.done[row] < len(tokens):
                decodes.append(row)
                budget -= 1
        for row in range(len(run.sequences)):
            length = min(budget, prompts[row] - run.done[row])
            if length > 0:
                chunks.append((row, length))
                budget -= length
        run.step(decodes, chunks)
