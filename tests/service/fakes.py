"""An engine without weights: a runner whose tokens are a function of the slot's history, for tests of what surrounds it."""

import threading
from collections.abc import Callable

from model.config import GPTConfig
from model.step import Sampled, StepInput
from model.tokenizer import Tokenizer, r50k_base
from service.engine import Engine
from service.kv_cache import KVCache
from service.metrics import Metrics
from service.scheduler import Scheduler

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


class FakeRunner:
    """Answers every prompt with `script`, again and again; `gate` holds steps back, `fault` makes them raise."""

    def __init__(self, script: list[int]):
        self.script = script
        self.fault: Callable[[StepInput], None] = lambda step: None
        self.gate = threading.Event()
        self.gate.set()
        self.steps: list[StepInput] = []
        self._given: dict[int, int] = {}

    def launch(self, step: StepInput) -> "FakeRunner":
        assert self.gate.wait(20)
        self.steps.append(step)
        self.fault(step)
        self._given.update(dict.fromkeys((start.slot for start in step.starts), 0))
        self._tokens = []
        for index in step.sampled_tokens:
            slot = step.token_slots[index]
            self._tokens.append(self.script[self._given[slot] % len(self.script)])
            self._given[slot] += 1
        return self

    def result(self) -> Sampled:
        return Sampled(self._tokens)


class FakeEngine:
    """An engine over a FakeRunner, with what tests look at within reach. `text` is what it answers with."""

    tokenizer: Tokenizer = r50k_base()

    def __init__(
        self,
        text: str = " one two three four",
        *,
        max_slots: int = 4,
        max_queue: int = 8,
        queue_timeout: float = 60.0,
        kv_sequences: int = 4,
    ):
        self.runner = FakeRunner(self.tokenizer.encode(text, allow_special=True))
        sizes = {"dense": 4 * kv_sequences, "banded": 2 * kv_sequences + 1}
        self.scheduler = Scheduler(
            KVCache(CONFIG, {"dense": sizes["dense"], "banded": sizes["banded"]}, step_tokens=64),
            max_slots=max_slots,
            step_tokens=64,
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
        )

    def metric(self, name: str, **labels: str) -> float:
        value = self.metrics.registry.get_sample_value(f"banded_{name}", {"model": "fake", **labels})
        return -1.0 if value is None else value
