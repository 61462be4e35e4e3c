"""One sequence of a request, as the scheduler sees it, and what a step did to it."""

import math
from collections import abc
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from kernels.band import PAGE_SIZE
from model.step import Sampling, TokenLogprobs
from service.engine.drafting import PromptLookup
from service.engine.pages import PageHash, page_hashes

# "stop" and "length" are for the client. "error": the step raised. "timeout": the sequence waited too long to start.
FinishReason = Literal["stop", "length", "error", "timeout"]


class AdapterRef(NamedTuple):
    """One of the runner's adapters. No number ever stands for two names."""

    number: int
    name: bytes


NO_ADAPTER = AdapterRef(0, b"")


@dataclass(eq=False, frozen=True)
class PrefixGroup:
    """Sequences of a request whose prompts begin alike. The first to run, the *parent*, computes the beginning for all."""

    num_common: int  # leading tokens that all prompts share
    forks: bool  # all prompts are equal: the others fork from the parent at the end of its prompt


@dataclass(eq=False)
class Sequence:
    """A prompt and what has become of it. Its maker hands it over to the scheduler, which alone reads and writes it then.

    Positions [0, num_computed) have their keys in the cache once the steps in flight have run. During the prompt
    num_computed grows by chunks. Afterwards the token at position num_computed is the last one that a scheduled step
    samples.
    """

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int] = frozenset()  # tokens that end the sequence when sampled
    min_tokens: int = 0  # none of stop_ids is sampled before so many other tokens
    # How many of the likeliest tokens to report with each generated one; None: no logprobs at all.
    top_logprobs: int | None = None
    # First position of the prompt whose token gets logprobs too, at least 1. Earlier tokens may come from the cache.
    prompt_logprobs_from: int | None = None
    group: PrefixGroup | None = None
    adapter: AdapterRef = NO_ADAPTER
    deadline: float = math.inf  # when to give up waiting for a row, on the scheduler's clock
    siblings: abc.Sequence["Sequence"] = ()  # those it was submitted with: once one has a row, none of them times out
    row: int = -1  # while running
    admitted: float = 0.0  # when it got its row
    num_computed: int = 0  # booked when a step is scheduled
    num_generated: int = 0  # tokens known, booked when a step is committed
    lookup: PromptLookup | None = None  # its text, once it decodes, if its tokens can be guessed

    @property
    def num_written(self) -> int:
        """Positions that will ever be in the cache: the last token is sampled but never computed."""
        return len(self.prompt) + max(self.max_tokens - 1, 0)

    @property
    def in_prompt(self) -> bool:
        return self.num_computed < len(self.prompt)

    @property
    def is_decoding(self) -> bool:
        """Whether the next step computes its last token: it is past its prompt and short of max_tokens.

        If a token in flight turns out to be the end, the token after it is dropped.
        """
        return len(self.prompt) <= self.num_computed < self.num_written

    @property
    def may_fork(self) -> bool:
        """Whether it may begin at the end of another sequence's prompt, which equals its own."""
        return self.group is not None and self.group.forks

    @cached_property
    def page_hashes(self) -> list[PageHash]:
        return page_hashes(self.prompt, self.adapter.name)

    @property
    def usable_hashes(self) -> list[PageHash]:
        """Of pages that may come from the cache: at least one token is computed, and all that logprobs are taken after."""
        end = len(self.prompt) if self.prompt_logprobs_from is None else self.prompt_logprobs_from
        return self.page_hashes[: (end - 1) // PAGE_SIZE]

    def banned(self) -> tuple[int, ...]:
        """What must not be sampled after the last token that has been scheduled."""
        few = self.num_computed - len(self.prompt) < self.min_tokens
        return tuple(sorted(self.stop_ids)) if few else ()


class Start(NamedTuple):
    """When a sequence got its row, and what the prefix cache knew of its prompt when the first tokens were scheduled."""

    admitted: float
    num_looked_up: int  # prompt tokens that the prefix cache was asked for
    num_cached: int  # prompt tokens that it had


class Delta(NamedTuple):
    """What one step did to one sequence: its tokens (none, one, or several if a draft came true), and why it ended."""

    sequence: Sequence
    tokens: list[int]
    finish_reason: FinishReason | None
    logprobs: abc.Sequence[TokenLogprobs] = ()  # of `tokens`, where asked for
    prompt_logprobs: abc.Sequence[TokenLogprobs] = ()  # of the prompt's next tokens, from prompt_logprobs_from on
    start: Start | None = None  # in the first delta of a sequence that began, which comes before the step has run
