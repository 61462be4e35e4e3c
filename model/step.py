"""The seam between scheduler and runner: plain numbers, no torch."""

from typing import NamedTuple

from model.config import KVGroup


class SamplingParams(NamedTuple):
    """How one choice picks its tokens. The generator is keyed by (seed, choice, position), so nothing else matters to it."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    seed: int = 0  # 64-bit signed
    choice: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)

    @property
    def adjusted(self) -> bool:
        """Whether logits are changed before the temperature applies."""
        penalties = (self.repetition_penalty - 1.0, self.presence_penalty, self.frequency_penalty)
        return bool(self.logit_bias) or any(penalties)


class SlotStart(NamedTuple):
    """A sequence takes a slot."""

    slot: int
    sampling: SamplingParams
    prompt: list[int]  # all of it, whatever part the step computes: penalties look at it
    adapter: int = 0  # which of the runner's adapters computes its tokens; 0: none


class NewPages(NamedTuple):
    """Pages that join a slot's table: page_ids[i] holds positions (first + i) * 64 and on. Other slots may share them."""

    slot: int
    group: KVGroup
    first: int
    page_ids: list[int]


class PageCopy(NamedTuple):
    """What page `source` holds once the step's keys are written is copied to `target`, in every layer of the group."""

    group: KVGroup
    source: int
    target: int


class DecodeRow(NamedTuple):
    """The token at `position` is computed: `token`, or what was sampled last for the slot where that is not known yet."""

    slot: int
    position: int
    token: int | None = None


class PromptChunk(NamedTuple):
    """Prompt tokens from position `start` on are computed."""

    slot: int
    start: int
    tokens: list[int]


class SampleRow(NamedTuple):
    """A token is sampled for `slot` from the logits of the step's token number `token`, which may stand in another slot:
    choices with one prompt share its last row."""

    slot: int
    token: int
    top_logprobs: int | None = None  # how many of the likeliest tokens to report beside it; None: no logprobs at all
    banned: tuple[int, ...] = ()  # tokens that must not be sampled this time


class ScoreRows(NamedTuple):
    """Log probabilities of given tokens: targets[i] follows the step's token `first + i`."""

    first: int
    targets: list[int]
    top_logprobs: int


class StepInput(NamedTuple):
    """Everything the runner needs for one step, in the order it is applied: first `starts` and `pages`, last `copies`.

    The tokens of a step stand in one row: those of `decodes`, then those of each chunk. `samples` begins with one row for
    each of `decodes`, in order. Several rows of `decodes` may be successive positions of one slot: drafts.
    """

    starts: list[SlotStart]
    pages: list[NewPages]
    decodes: list[DecodeRow]
    chunks: list[PromptChunk]
    samples: list[SampleRow]
    scores: list[ScoreRows]
    copies: list[PageCopy]

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(len(chunk.tokens) for chunk in self.chunks)

    @property
    def token_slots(self) -> list[int]:
        """The slot of every token."""
        return [row.slot for row in self.decodes] + [chunk.slot for chunk in self.chunks for _ in chunk.tokens]

    @property
    def token_positions(self) -> list[int]:
        """The position of every token in its sequence."""
        positions = [row.position for row in self.decodes]
        for chunk in self.chunks:
            positions += range(chunk.start, chunk.start + len(chunk.tokens))
        return positions


class TokenLogprobs(NamedTuple):
    """Of one token, under the model's own distribution: before temperature, penalties, bias and bans."""

    logprob: float
    top: list[tuple[int, float]]  # (token, logprob) of the likeliest tokens, likeliest first


class Sampled(NamedTuple):
    """What a step brought forth."""

    tokens: list[int]  # one for each of StepInput.samples
    logprobs: list[TokenLogprobs | None]  # of these tokens, where asked for
    scores: list[list[TokenLogprobs]]  # for each of StepInput.scores, one for each of its targets
