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


class NewPages(NamedTuple):
    """Pages that join a slot's table: page_ids[i] holds positions (first + i) * 64 and on."""

    slot: int
    group: KVGroup
    first: int
    page_ids: list[int]


class DecodeRow(NamedTuple):
    """The slot's last sampled token, at `position`, is computed and the next one sampled."""

    slot: int
    position: int


class PromptChunk(NamedTuple):
    """Prompt tokens from position `start` on; `samples` when the prompt ends here and a token is wanted."""

    slot: int
    start: int
    tokens: list[int]
    samples: bool


class StepInput(NamedTuple):
    """Everything the runner needs for one step, in the order it is applied.

    The tokens of a step stand in one row: those of `decodes`, then those of each chunk.
    """

    starts: list[SlotStart]
    pages: list[NewPages]
    decodes: list[DecodeRow]
    chunks: list[PromptChunk]

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

    @property
    def sampled_tokens(self) -> list[int]:
        """Indices of the tokens whose successor is sampled."""
        indices = list(range(len(self.decodes)))
        end = len(indices)
        for chunk in self.chunks:
            end += len(chunk.tokens)
            if chunk.samples:
                indices.append(end - 1)
        return indices


class Sampled(NamedTuple):
    """One token for each of StepInput.sampled_tokens."""

    tokens: list[int]
