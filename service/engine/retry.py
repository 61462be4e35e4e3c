"""A step that raised, run again in parts: what some of its sequences need of it, and how the parts' results make a whole.

Plain numbers: no torch, no clock, no thread.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from model.step import DecodeToken, PromptChunk, RowStart, Sample, Sampled, Sampling, StepInput, TokenLogprobs
from service.engine.scheduler import Sequence


@dataclass
class Retry:
    """The results of a step, part by part. Samples of sequences that are in no part are 0."""

    step: StepInput
    tokens: dict[int, int] = field(default_factory=dict)  # by their place in step.samples, as `logprobs`
    logprobs: dict[int, TokenLogprobs | None] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)  # by place in step.prompt_logprobs

    def part(self, sequences: Iterable[Sequence]) -> StepInput:
        """The part of the step that computes `sequences`, with their rows as they were before the step.

        A step that raised may have left anything in a row's state. A sequence that samples from another's last token must
        be together with it.
        """
        step, starts = self.step, [row_start(sequence) for sequence in sequences]
        rows = {start.row for start in starts}
        place = {old: new for new, old in enumerate(i for i, row in enumerate(step.token_rows) if row in rows)}
        pages = [new for new in step.pages if new.row in rows]
        own = {(new.group, page_id) for new in pages for page_id in new.page_ids}
        return StepInput(
            starts,
            pages,
            [token for token in step.decodes if token.row in rows],
            [chunk for chunk in step.chunks if chunk.row in rows],
            [step.samples[i]._replace(token=place[step.samples[i].token]) for i in self._samples(rows)],
            [step.prompt_logprobs[i]._replace(first=place[step.prompt_logprobs[i].first]) for i in self._explained(rows)],
            [copy for copy in step.copies if (copy.group, copy.target) in own],
        )

    def add(self, part: StepInput, sampled: Sampled) -> None:
        """Take in what a part brought forth."""
        rows = {start.row for start in part.starts}
        samples = self._samples(rows)
        self.tokens |= zip(samples, sampled.tokens, strict=True)
        self.logprobs |= zip(samples, sampled.logprobs, strict=True)
        self.prompt_logprobs |= zip(self._explained(rows), sampled.prompt_logprobs, strict=True)

    @property
    def sampled(self) -> Sampled:
        """The whole step's results so far."""
        samples, explained = range(len(self.step.samples)), range(len(self.step.prompt_logprobs))
        return Sampled(
            [self.tokens.get(i, 0) for i in samples],
            [self.logprobs.get(i) for i in samples],
            [self.prompt_logprobs.get(i, []) for i in explained],
        )

    def _samples(self, rows: set[int]) -> list[int]:
        return [i for i, sample in enumerate(self.step.samples) if sample.row in rows]

    def _explained(self, rows: set[int]) -> list[int]:
        token_rows = self.step.token_rows
        return [i for i, wanted in enumerate(self.step.prompt_logprobs) if token_rows[wanted.first] in rows]


def row_start(sequence: Sequence) -> RowStart:
    return RowStart(sequence.row, sequence.sampling, sequence.prompt, sequence.adapter.number, sequence.generated)


def canary(row: int) -> list[StepInput]:
    """Two steps that run wherever any can: a prompt of one token, and the token after it. They need no page of their own.

    `row` is the one that pads batches, so that nobody's keys are touched.
    """
    sample = [Sample(row, 0)]
    chunk = StepInput([RowStart(row, Sampling(), [0])], [], [], [PromptChunk(row, 0, [0])], sample, [], [])
    return [chunk, StepInput([], [], [DecodeToken(row, 1, 0)], [], sample, [], [])]
