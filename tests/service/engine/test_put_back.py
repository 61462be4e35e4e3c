"""Sequences that yield their rows to another client and go on later: a real model gives them the same bits."""

import asyncio
import random
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from model.config import GPTConfig
from model.step import StepInput
from service.engine.engine import Engine
from service.engine.loading import load_served
from service.engine.metrics import Metrics
from service.engine.pages import chunk_slack, groups, page_bytes, sequence_bytes
from service.engine.request import GenerationRequest, Prompt, SamplingParams
from service.settings import Settings
from tests.demand import needs_vnni
from tests.model.checkpoint.checkpoints import FIELDS, tiny
from tests.serving import PATIENCE

SHAPE: dict[str, Any] = {"vocab_size": 50257, "n_layer": 2, "band": 40, "n_positions": 512}
STEP_TOKENS = 100
INT8 = pytest.param("int8", True, marks=needs_vnni)


def requests() -> list[GenerationRequest]:
    """Of one client: forks with all that sampling remembers, explained prompts, one that is not cached, and plain ones."""
    rng = random.Random(1)
    long, short, other = ([rng.randrange(50257) for _ in range(length)] for length in (210, 20, 150))
    fields: dict[str, Any] = {"max_tokens": 100, "ignore_eos": True, "logprobs": 2, "seed": 3}
    params = [
        (long, SamplingParams(**fields, n=3, temperature=0.8, repetition_penalty=1.3, frequency_penalty=0.5)),
        (short, SamplingParams(**fields, n=2, temperature=0.0, bad_words=("the", " a b"), min_tokens=90)),
        (other, SamplingParams(**fields, echo=True, cache_prompt=False, presence_penalty=1.0, logit_bias={5: 9.0})),
        (long, SamplingParams(**fields, prompt_logprobs=1)),
    ]
    return [GenerationRequest([Prompt(tokens)], each, client=b"large") for tokens, each in params]


def kv_bytes(num_sequences: float, item_bytes: int) -> int:
    """Memory for so many full contexts."""
    config = GPTConfig(**FIELDS["banded"] | SHAPE)
    slack = sum(chunk_slack(band, STEP_TOKENS) * page_bytes(config, group, item_bytes) for group, band in groups(config))
    return int(num_sequences * sequence_bytes(config, config.n_positions, item_bytes)) + slack


async def finish(engine: Engine, request: GenerationRequest) -> list[Any]:
    """All that a client may see of the answer, and what it is billed."""
    generation = engine.generate(request)
    async with aclosing(generation.outputs()) as steps:
        async for _ in steps:
            pass
    choices = [
        (each.text, each.tokens, [*each.shown], [*each.prompt_logprobs], each.finish_reason) for each in generation.best()
    ]
    return [choices, generation.prompt_tokens, generation.completion_tokens]


class Ran:
    """What became of all requests at once, while another client sent `num_others` short ones of its own."""

    def __init__(self, directory: Path, dtype: str, *, compiled: bool, max_slots: int, kv_bytes: int, num_others: int):
        self.metrics = Metrics("tiny")
        settings: dict[str, Any] = {"model": str(directory), "dtype": dtype, "compile": compiled}
        options = Settings(**settings, max_slots=max_slots, kv_bytes=kv_bytes, step_tokens=STEP_TOKENS).engine
        self.engine = load_served(options, self.metrics).base.engine
        self.steps: list[StepInput] = []
        runner = self.engine._steps._runner
        self._launch = runner.launch
        runner.launch = self._noting  # type: ignore[method-assign, assignment]
        self.answers = asyncio.run(asyncio.wait_for(self._run(num_others), PATIENCE))

    def _noting(self, step: StepInput, *begins: Any) -> Any:
        self.steps.append(step)
        return self._launch(step, *begins)

    async def _run(self, num_others: int) -> list[Any]:
        self.engine.start()
        large = [asyncio.create_task(finish(self.engine, request)) for request in requests()]
        await asyncio.sleep(0)
        for i in range(num_others):
            await self._steps_more(20)
            params = SamplingParams(max_tokens=3, ignore_eos=True, seed=i)
            await finish(self.engine, GenerationRequest([Prompt([7, 8, i])], params, client=b"small"))
        found = await asyncio.gather(*large)
        await self.engine.stop()
        assert self.metrics.registry.get_sample_value("banded_page_accounting_faults_total", {"model": "tiny"}) == 0
        return found

    async def _steps_more(self, count: int) -> None:
        end = len(self.steps) + count
        while len(self.steps) < end:
            await asyncio.sleep(0.001)

    @property
    def num_resumed(self) -> int:
        """How often a sequence went on in another row."""
        return sum(bool(start.generated) for step in self.steps for start in step.starts)

    @property
    def num_recomputed(self) -> int:
        """How many tokens of texts were computed again."""
        return sum(len(step.decodes) for step in self.steps) - sum(
            sample.token < len(step.decodes) for step in self.steps for sample in step.samples
        )


@pytest.mark.parametrize(("dtype", "compiled"), [("float32", False), ("bfloat16", True), INT8])
def test_texts_and_logprobs_have_the_same_bits_with_and_without_being_put_back(
    dtype: str, compiled: bool, tmp_path: Path
) -> None:
    directory = tiny("banded", tmp_path, **SHAPE)
    item_bytes = 4 if dtype == "float32" else 2
    sizes: dict[str, Any] = {"max_slots": 8, "kv_bytes": kv_bytes(8, item_bytes), "num_others": 0}
    alone = Ran(directory, dtype, compiled=compiled, **sizes)
    assert alone.num_resumed == alone.num_recomputed == 0
    kept = Ran(directory, dtype, compiled=compiled, **sizes | {"max_slots": 4, "num_others": 6})
    assert kept.num_resumed > 3
    assert kept.num_recomputed == 0
    lost = Ran(directory, dtype, compiled=compiled, max_slots=4, kv_bytes=kv_bytes(2, item_bytes), num_others=6)
    assert lost.num_resumed > 3
    assert lost.num_recomputed > 50
    assert kept.answers == alone.answers
    assert lost.answers == alone.answers
