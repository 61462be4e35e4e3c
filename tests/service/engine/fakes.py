"""An engine without weights: a runner whose tokens are a function of the slot's history, for tests of what surrounds it."""

import functools
import threading
from collections.abc import Callable
from typing import NamedTuple

from model.checkpoint.tokenizer import Tokenizer, r50k_base
from model.config import GPTConfig
from model.step import Sampled, SlotStart, StepInput, TokenLogprobs
from service.engine.engine import Engine
from service.engine.metrics import Metrics
from service.engine.pages import KVCache
from service.engine.scheduler import Scheduler

CONFIG = GPTConfig(
    vocab_size=50257,
    n_positions=256,
    n_embd=8,
    n_layer=2,
    n_head=1,
    n_inner=8,
    attention=("dense", "banded"),
    band=64,
)


class FakePending(NamedTuple):
    result: Callable[[], Sampled]


class FakeRunner:
    """Answers every prompt with `script`, again and again. As on a device, a step computes when its result is asked for.

    `script_of` may give choices scripts of their own; what is banned is left out of them. `gate` holds launches back,
    `fault` makes them raise, `late_fault` makes results raise.
    """

    def __init__(self, script: list[int]):
        self.script = script
        self.script_of: Callable[[SlotStart], list[int]] = lambda start: self.script
        self.fault: Callable[[StepInput], None] = lambda step: None
        self.late_fault: Callable[[StepInput], None] = lambda step: None
        self.gate = threading.Event()
        self.gate.set()
        self.steps: list[StepInput] = []
        self.calls: list[str] = []
        self._starts: dict[int, SlotStart] = {}

    def launch(self, step: StepInput) -> FakePending:
        assert self.gate.wait(20)
        self.steps.append(step)
        self.calls.append("launch")
        self.fault(step)
        return FakePending(functools.partial(self._compute, step))

    def _compute(self, step: StepInput) -> Sampled:
        self.calls.append("result")
        self.late_fault(step)
        self._starts |= {start.slot: start for start in step.starts}
        tokens = []
        for row in step.samples:
            start = self._starts[row.slot]
            script = [token for token in self.script_of(start) if token not in row.banned]
            place = step.token_positions[row.token] + 1 - len(start.prompt)
            tokens.append(script[place % len(script)])
        logprobs = [
            None if row.top_logprobs is None else fake_logprobs(token, row.top_logprobs)
            for row, token in zip(step.samples, tokens, strict=True)
        ]
        scores = [[fake_logprobs(token, rows.top_logprobs) for token in rows.targets] for rows in step.scores]
        return Sampled(tokens, logprobs, scores)


def fake_logprobs(token: int, num_top: int) -> TokenLogprobs:
    """A function of the token alone. The likeliest are the token itself, if it is even, and those behind it."""
    first = token + token % 2
    return TokenLogprobs(-1.0 - token % 2, [(first + i, -1.0 - i) for i in range(num_top)])


class FakeEngine:
    """An engine over a FakeRunner, with what tests look at within reach. `text` is what it answers with."""

    tokenizer: Tokenizer = r50k_base()
    steps_ahead = 0  # a test that holds however far the step loop runs ahead sets it to each

    def __init__(
        self,
        text: str = " one two three four",
        *,
        max_slots: int = 4,
        max_queue: int = 8,
        queue_timeout: float = 60.0,
        kv_sequences: int = 4,
        max_draft: int = 0,
    ):
        self.runner = FakeRunner(self.tokenizer.encode(text, allow_special=True))
        sizes = {"dense": 4 * kv_sequences, "banded": 2 * kv_sequences + 1}
        self.scheduler = Scheduler(
            KVCache(CONFIG, {"dense": sizes["dense"], "banded": sizes["banded"]}, step_tokens=64),
            max_slots=max_slots,
            step_tokens=64,
            max_draft=max_draft,
        )
        self.metrics = Metrics("fake")
        self.engine = Engine(
            self.runner,
            self.scheduler,
            self.tokenizer,
            self.metrics,
            max_slots=max_slots,
            max_queue=max_queue,
            queue_timeout=queue_timeout,
            steps_ahead=self.steps_ahead,
        )

    def metric(self, name: str, **labels: str) -> float:
        value = self.metrics.registry.get_sample_value(f"banded_{name}", {"model": "fake", **labels})
        return -1.0 if value is None else value
