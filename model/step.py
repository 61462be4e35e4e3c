"""The seam between scheduler and runner: plain numbers, no torch.

A running sequence owns a *batch row*: the line of each per-sequence table on the device (last token, page table, sampling
state) that belongs to it for as long as it runs.
"""

from collections.abc import Sequence
from typing import NamedTuple

from model.config import KVGroup


class Sampling(NamedTuple):
    """How a sequence picks its tokens. The generator is keyed by (seed, choice, position): nothing else matters to it."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    seed: int = 0  # 64-bit signed
    choice: int = 0  # number of the sequence in its request
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)
    allowed_token_ids: tuple[int, ...] = ()  # no other token is sampled; empty: all may be

    @property
    def adjusted(self) -> bool:
        """Whether logits are changed before the temperature applies."""
        penalties = (self.repetition_penalty - 1.0, self.presence_penalty, self.frequency_penalty)
        return bool(self.logit_bias or self.allowed_token_ids) or any(penalties)


class RowStart(NamedTuple):
    """A sequence takes a batch row, or has its own as it was after some tokens."""

    row: int
    sampling: Sampling
    prompt: list[int]  # the whole prompt, whatever part of it the step computes: penalties look at it
    adapter: int = 0  # number of the adapter that computes its tokens; 0: none
    generated: Sequence[int] = ()  # what it has generated already: penalties look at it


class NewPages(NamedTuple):
    """Pages added to a row's page table: page_ids[i] holds positions (first + i) * 64 and on. Rows may share pages."""

    row: int
    group: KVGroup
    first: int
    page_ids: list[int]


class PageCopy(NamedTuple):
    """After the step has written its keys, page `source` is copied to `target` in every layer of the group."""

    group: KVGroup
    source: int
    target: int


class DecodeToken(NamedTuple):
    """The token at `position` is computed: `token`, or the row's last sampled one where the host does not know it yet."""

    row: int
    position: int
    token: int | None = None


class PromptChunk(NamedTuple):
    """Prompt tokens from position `start` on are computed."""

    row: int
    start: int
    tokens: list[int]


class Sample(NamedTuple):
    """Sample a token for `row` from the logits of the step's token number `token`.

    That token may belong to another row: sequences that fork after the same prompt sample from its last token.
    """

    row: int
    token: int
    top_logprobs: int | None = None  # how many of the likeliest tokens to report with it; None: no logprobs at all
    banned: tuple[int, ...] = ()  # tokens that must not be sampled this time


class PromptLogprobs(NamedTuple):
    """Log probabilities of given tokens: targets[i] follows the step's token `first + i`."""

    first: int
    targets: list[int]
    top_logprobs: int


class StepInput(NamedTuple):
    """All that the runner needs for one step, in the order of application: `starts` and `pages` first, `copies` last.

    The step's tokens form one sequence: those of `decodes`, then those of each chunk. `samples` begins with those of
    `decodes`, in order, one for each that is not followed by a known token. Several of `decodes` may be successive positions
    of one row: drafts, or known tokens whose keys are computed again.
    """

    starts: list[RowStart]
    pages: list[NewPages]
    decodes: list[DecodeToken]
    chunks: list[PromptChunk]
    samples: list[Sample]
    prompt_logprobs: list[PromptLogprobs]
    copies: list[PageCopy]

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(len(chunk.tokens) for chunk in self.chunks)

    @property
    def token_rows(self) -> list[int]:
        """The row of every token."""
        return [token.row for token in self.decodes] + [chunk.row for chunk in self.chunks for _ in chunk.tokens]

    @property
    def token_positions(self) -> list[int]:
        """The position of every token in its sequence."""
        positions = [token.position for token in self.decodes]
        for chunk in self.chunks:
            positions += range(chunk.start, chunk.start + len(chunk.tokens))
        return positions


class TokenLogprobs(NamedTuple):
    """Of one token, under the model's own distribution: before temperature, penalties, bias and bans."""

    logprob: float
    # The likeliest tokens, likeliest first, and their logprobs. In arrays they take a sixth of the memory of pairs.
    ids: Sequence[int] = ()
    values: Sequence[float] = ()

    @property
    def top(self) -> list[tuple[int, float]]:
        return list(zip(self.ids, self.values, strict=True))


class Sampled(NamedTuple):
    """What a step brought forth."""

    tokens: list[int]  # one for each of StepInput.samples: an id, or NOT_FINITE or NONE_LEFT of kernels.names
    logprobs: list[TokenLogprobs | None]  # of these tokens, where asked for
    prompt_logprobs: list[list[TokenLogprobs]]  # for each of StepInput.prompt_logprobs, one for each target
