"""An engine without weights, for tests of the code around the model: a row's tokens depend only on its own history."""

import functools
import threading
from collections.abc import Callable
from typing import NamedTuple

from model.checkpoint.tokenizer import Tokenizer, r50k_base
from model.config import GPTConfig
from model.step import RowStart, Sampled, StepInput, TokenLogprobs
from service.engine.engine import Engine
from service.engine.metrics import Metrics
from service.engine.pages import PageAllocator
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
    """Answers every prompt with `script`, again and again. A step computes only when its result is asked for.

    `script_of` may give a sequence a script of its own. Banned tokens are left out of a script. `gate` holds launches
    back when they have begun, `fault` makes them raise, and `late_fault` makes results raise.
    """

    def __init__(self, script: list[int]):
        self.script = script
        self.script_of: Callable[[RowStart], list[int]] = lambda start: self.script
        self.fault: Callable[[StepInput], None] = lambda step: None
        self.late_fault: Callable[[StepInput], None] = lambda step: None
        self.gate = threading.Event()
        self.gate.set()
        self.steps: list[StepInput] = []
        self.calls: list[str] = []
        self._starts: dict[int, RowStart] = {}

    def launch(self, step: StepInput, begins: Callable[[], object] = lambda: None) -> FakePending:
        begins()
        assert self.gate.wait(20)
        self.steps.append(step)
        self.calls.append("launch")
        self.fault(step)
        return FakePending(functools.partial(self._compute, step))

    def _compute(self, step: StepInput) -> Sampled:
        self.calls.append("result")
        self.late_fault(step)
        self._starts |= {start.row: start for start in step.starts}
        tokens = []
        for sample in step.samples:
            start = self._starts[sample.row]
            script = [token for token in self.script_of(start) if token not in sample.banned]
            place = step.token_positions[sample.token] + 1 - len(start.prompt)
            tokens.append(script[place % len(script)])
        logprobs = [
            None if sample.top_logprobs is None else fake_logprobs(token, sample.top_logprobs)
            for sample, token in zip(step.samples, tokens, strict=True)
        ]
        prompt = [[fake_logprobs(token, some.top_logprobs) for token in some.targets] for some in step.prompt_logprobs]
        return Sampled(tokens, logprobs, prompt)


def fake_logprobs(token: int, num_top: int) -> TokenLogprobs:
    """A function of the token alone. The likeliest ids count up from the token, or from the next id if the token is odd."""
    first = token + token % 2
    return TokenLogprobs(-1.0 - token % 2, [first + i for i in range(num_top)], [-1.0 - i for i in range(num_top)])


class FakeEngine:
    """An engine over a FakeRunner. Its parts are attributes, so that tests can look at them. It answers with `text`."""

    tokenizer: Tokenizer = r50k_base()
    overlap = False  # a test that must pass with and without overlap sets both

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
            PageAllocator(CONFIG, {"dense": sizes["dense"], "banded": sizes["banded"]}, step_tokens=64),
            max_rows=max_slots,
            step_tokens=64,
            max_draft=max_draft,
        )
        self.metrics = Metrics("fake")
        self.engine = Engine(
            self.runner,
            self.scheduler,
            self.tokenizer,
            self.metrics,
            max_queue=max_queue,
            queue_timeout=queue_timeout,
            overlap=self.overlap,
        )

    def metric(self, name: str, **labels: str) -> float:
        value = self.metrics.registry.get_sample_value(f"banded_{name}", {"model": "fake", **labels})
        return -1.0 if value is None else value
