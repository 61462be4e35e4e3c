"""The engine with a scripted runner: text, stops, queue limits, aborts, failing steps, drain."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager

import pytest

from model.step import SamplingParams, StepInput
from service.choice import Output
from service.engine import DoesNotFitError, Engine, QueueFullError, StepFailedError, UnavailableError
from service.scheduler import Sequence
from tests.service.fakes import FakeEngine

EOS = FakeEngine.tokenizer.eos_id


def sequence(max_tokens: int = 4, *, num_prompt: int = 3, ignore_eos: bool = False) -> Sequence:
    return Sequence([1] * num_prompt, max_tokens, SamplingParams(), None if ignore_eos else EOS)


@asynccontextmanager
async def running(fake: FakeEngine) -> AsyncIterator[Engine]:
    fake.engine.start()
    try:
        yield fake.engine
    finally:
        fake.runner.gate.set()
        await fake.engine.stop()


async def collect(engine: Engine, sequences: list[Sequence], stops: tuple[str, ...] = ()) -> list[Output]:
    async with aclosing(engine.generate(sequences, stops)) as outputs:
        return [output async for output in outputs]


def text_of(outputs: list[Output], choice: int = 0) -> str:
    return "".join(output.text for output in outputs if output.choice == choice)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(30):
            await test()

    asyncio.run(limited())


def test_text_length_and_finish_reason() -> None:
    async def test() -> None:
        async with running(FakeEngine()) as engine:
            outputs = await collect(engine, [sequence(3), sequence(6)])
            assert text_of(outputs, 0) == " one two three"
            assert text_of(outputs, 1) == " one two three four one two"
            last = {output.choice: output.finish_reason for output in outputs}
            assert last == {0: "length", 1: "length"}

    run(test)


def test_end_of_text_ends_without_text_unless_ignored() -> None:
    async def test() -> None:
        async with running(FakeEngine(" one<|endoftext|>")) as engine:
            outputs = await collect(engine, [sequence(9)])
            assert text_of(outputs) == " one"
            assert [output.tokens for output in outputs][-1] == [EOS]
            assert outputs[-1].finish_reason == "stop"
            ignoring = await collect(engine, [sequence(4, ignore_eos=True)])
            assert text_of(ignoring) == " one one"
            assert ignoring[-1].finish_reason == "length"

    run(test)


def test_a_stop_string_across_tokens_ends_the_choice_and_frees_its_pages() -> None:
    async def test() -> None:
        fake = FakeEngine()
        async with running(fake) as engine:
            outputs = await collect(engine, [sequence(100), sequence(3)], ("o thr",))
            assert text_of(outputs, 0) == " one tw"
            assert text_of(outputs, 1) == " one tw"
            assert all("thr" not in output.text for output in outputs)
            assert {output.finish_reason for output in outputs} == {None, "stop"}
            await until(lambda: fake.scheduler.idle)
            assert fake.scheduler.cache.faults() == []
        assert fake.metric("requests_total", outcome="stop") == 2
        assert fake.metric("kv_pages_held", group="dense") == 0

    run(test)


def test_max_tokens_0_ends_at_once() -> None:
    async def test() -> None:
        async with running(FakeEngine()) as engine:
            assert await collect(engine, [sequence(0)]) == [Output(0, "", [], "length")]

    run(test)


def test_closing_the_iterator_aborts_running_and_waiting_choices() -> None:
    async def test() -> None:
        fake = FakeEngine(max_slots=1)
        async with running(fake) as engine:
            async with aclosing(engine.generate([sequence(200), sequence(200)])) as outputs:
                await anext(outputs)
            await until(lambda: fake.scheduler.idle)
            assert fake.scheduler.cache.faults() == []
            assert text_of(await collect(engine, [sequence(2)])) == " one two"
        assert fake.metric("requests_total", outcome="abort") == 2

    run(test)


def test_a_full_queue_is_refused_with_a_time_to_retry() -> None:
    async def test() -> None:
        fake = FakeEngine(max_slots=2, max_queue=1)
        async with running(fake) as engine:
            fake.runner.gate.clear()
            others = asyncio.create_task(collect(engine, [sequence() for _ in range(3)]))  # noqa: RUF006 - awaited below
            await until(lambda: len(fake.scheduler.running) == 2)
            with pytest.raises(QueueFullError, match=r"1 choices are waiting, the limit is 1; try again in \d+ s") as error:
                await collect(engine, [sequence()])
            assert error.value.retry_after >= 1
            fake.runner.gate.set()
            assert len(await others) == 12
            assert text_of(await collect(engine, [sequence(1)])) == " one"
        assert fake.metric("requests_total", outcome="rejected") == 1

    run(test)


def test_what_never_fits_is_refused_at_once() -> None:
    async def test() -> None:
        async with running(FakeEngine(max_slots=2, max_queue=1, kv_sequences=1)) as engine:
            with pytest.raises(DoesNotFitError, match="asks for 4 choices; this server holds at most 3"):
                await collect(engine, [sequence() for _ in range(4)])
        async with running(FakeEngine(kv_sequences=1)) as engine:
            with pytest.raises(
                DoesNotFitError,
                match="prompt of 200 tokens with max_tokens 100 needs more KV cache than this server's 4 dense",
            ):
                await collect(engine, [sequence(100, num_prompt=200)])

    run(test)


def test_waiting_too_long_ends_in_unavailable() -> None:
    async def test() -> None:
        fake = FakeEngine(max_slots=1, queue_timeout=0.1)
        slow_down(fake, 0.01)
        async with running(fake) as engine:
            first = asyncio.create_task(collect(engine, [sequence(60)]))
            await until(lambda: bool(fake.scheduler.running))
            with pytest.raises(UnavailableError, match=r"waited more than 0\.1 s for a slot"):
                await collect(engine, [sequence()])
            assert len(await first) == 60

    run(test)


def test_a_request_that_never_got_a_slot_does_not_lengthen_the_time_to_retry() -> None:
    async def test() -> None:
        fake = FakeEngine(max_slots=1, max_queue=1, queue_timeout=0.05)
        slow_down(fake, 0.01)
        async with running(fake) as engine:
            busy = asyncio.create_task(collect(engine, [sequence(100)]))
            await until(lambda: bool(fake.scheduler.running))
            with pytest.raises(UnavailableError):
                await collect(engine, [sequence()])
            late = asyncio.create_task(collect(engine, [sequence()]))
            await asyncio.sleep(0)
            with pytest.raises(QueueFullError) as refused:
                await collect(engine, [sequence()])
            assert refused.value.retry_after <= 3
            await asyncio.gather(busy, late, return_exceptions=True)

    run(test)


def slow_down(fake: FakeEngine, seconds: float) -> None:
    fake.runner.fault = lambda step: time.sleep(seconds)


def fail_once(fake: FakeEngine) -> None:
    def fault(step: StepInput) -> None:
        fake.runner.fault = lambda step: None
        raise RuntimeError("device on fire")

    fake.runner.fault = fault


def test_a_step_that_raises_fails_its_requests_and_no_others(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        fake = FakeEngine(max_slots=1)
        async with running(fake) as engine:
            fail_once(fake)
            doomed = asyncio.create_task(collect(engine, [sequence()]))
            await asyncio.sleep(0)
            waiting = asyncio.create_task(collect(engine, [sequence(2)]))
            with pytest.raises(StepFailedError, match="the engine failed while it ran this request"):
                await doomed
            assert text_of(await waiting) == " one two"
            assert engine.unready_reason is None
            await until(lambda: fake.scheduler.idle)
            assert fake.scheduler.cache.faults() == []
        assert fake.metric("requests_total", outcome="error") == 1

    run(test)
    assert "device on fire" in caplog.text


def test_two_failing_steps_in_a_row_end_the_engine() -> None:
    async def test() -> None:
        fake = FakeEngine(max_slots=1)

        def fault(step: StepInput) -> None:
            raise RuntimeError("again")

        fake.runner.fault = fault
        async with running(fake) as engine:
            results = await asyncio.gather(*(collect(engine, [sequence()]) for _ in range(4)), return_exceptions=True)
            assert [type(result) for result in results] == [StepFailedError] * 4
            await engine.failed()
            assert engine.unready_reason == "the engine has failed"
            with pytest.raises(UnavailableError, match="the engine has failed"):
                await collect(engine, [sequence()])

    run(test)


def test_a_step_that_succeeds_forgives_the_one_that_failed() -> None:
    async def test() -> None:
        fake = FakeEngine(max_slots=1)
        async with running(fake) as engine:
            for _ in range(3):
                fail_once(fake)
                with pytest.raises(StepFailedError):
                    await collect(engine, [sequence()])
                assert text_of(await collect(engine, [sequence(1)])) == " one"
            assert engine.unready_reason is None

    run(test)


def test_a_failed_step_has_its_accounts_checked() -> None:
    async def test() -> None:
        fake = FakeEngine(max_slots=1)
        async with running(fake) as engine:
            slow_down(fake, 0.01)
            busy = asyncio.create_task(collect(engine, [sequence(200)]))
            await until(lambda: bool(fake.scheduler.running))
            fake.scheduler.cache.pools["dense"].free.pop(0)
            fail_once(fake)
            with pytest.raises(StepFailedError):
                await busy
            await until(lambda: fake.metric("page_accounting_faults_total") >= 1)

    run(test)


def test_only_a_step_that_hangs_makes_a_busy_engine_unready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.engine.STALL_SECONDS", 0.05)

    async def test() -> None:
        fake = FakeEngine()
        async with running(fake) as engine:
            await collect(engine, [sequence(1)])
            await asyncio.sleep(0.1)
            assert engine.unready_reason is None, "idle"
            slow_reader = engine.generate([sequence(4)])
            await anext(slow_reader)
            await until(lambda: fake.scheduler.idle)
            await asyncio.sleep(0.1)
            assert engine.unready_reason is None, "a client that does not read is not a step that hangs"
            await slow_reader.aclose()
            fake.runner.gate.clear()
            hanging = asyncio.create_task(collect(engine, [sequence(1)]))
            await asyncio.sleep(0)
            assert engine.unready_reason is None, "the clock starts with the work, not with the last step before it"
            await until(lambda: engine.unready_reason is not None)
            fake.runner.gate.set()
            await hanging
            await until(lambda: engine.unready_reason is None)

    run(test)


def test_a_step_that_hangs_does_not_keep_the_engine_from_stopping() -> None:
    async def test() -> None:
        fake = FakeEngine()
        async with running(fake) as engine:
            fake.runner.gate.clear()
            hanging = asyncio.create_task(collect(engine, [sequence(1)]))
            await asyncio.sleep(0.02)
            await engine.drain(0.05)
            with pytest.raises(UnavailableError):
                await hanging
            await engine.stop(0.05)
            assert engine.hangs
            assert engine.has_failed

    run(test)


def test_choices_that_wait_for_pages_count_as_waiting_whatever_slots_are_free() -> None:
    async def test() -> None:
        fake = FakeEngine(max_slots=4, max_queue=2, kv_sequences=1)
        async with running(fake) as engine:
            slow_down(fake, 0.01)
            tasks = [asyncio.create_task(collect(engine, [sequence(100, num_prompt=100)])) for _ in range(3)]
            await until(lambda: fake.scheduler.blocked and len(fake.scheduler.waiting) == 2)
            with pytest.raises(QueueFullError, match="2 choices are waiting, the limit is 2"):
                await collect(engine, [sequence()])
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    run(test)


def test_drain_lets_requests_finish_and_refuses_new_ones() -> None:
    async def test() -> None:
        fake = FakeEngine()
        slow_down(fake, 0.005)
        async with running(fake) as engine:
            last = asyncio.create_task(collect(engine, [sequence(20)]))
            await asyncio.sleep(0)
            draining = asyncio.create_task(engine.drain(10))
            await asyncio.sleep(0)
            with pytest.raises(UnavailableError, match="shutting down"):
                await collect(engine, [sequence()])
            await draining
            assert len(await last) == 20

    run(test)


def test_drain_ends_what_takes_too_long_with_an_error() -> None:
    async def test() -> None:
        fake = FakeEngine()
        slow_down(fake, 0.01)
        async with running(fake) as engine:
            endless = asyncio.create_task(collect(engine, [sequence(200)]))
            await asyncio.sleep(0)
            await engine.drain(0.1)
            with pytest.raises(UnavailableError, match="shut down before the request was finished"):
                await endless

    run(test)


def test_accounting_faults_are_counted_when_idle() -> None:
    async def test() -> None:
        fake = FakeEngine()
        async with running(fake) as engine:
            await collect(engine, [sequence(2)])
            await until(lambda: fake.scheduler.idle)
            assert fake.metric("page_accounting_faults_total") == 0
            fake.scheduler.cache.pools["dense"].free.pop()
            await collect(engine, [sequence(2)])
            await until(lambda: fake.metric("page_accounting_faults_total") == 1)

    run(test)
