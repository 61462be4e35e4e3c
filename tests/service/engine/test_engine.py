"""The engine with a scripted runner: text, stops, queue limits, aborts, failing steps, drain; with and without overlap."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from model.step import StepInput
from service.engine.choice import Output
from service.engine.engine import (
    DoesNotFitError,
    Engine,
    Generation,
    QueueFullError,
    RetiredError,
    StepFailedError,
    UnavailableError,
)
from service.engine.request import GenerationRequest, Prompt, SamplingParams
from service.engine.scheduler import NO_ADAPTER, AdapterRef, Delta, Sequence
from tests.service.engine.fakes import FakeEngine
from tests.service.helpers import run, until

EOS = FakeEngine.tokenizer.special_tokens["<|endoftext|>"]


@pytest.fixture(params=[0, 1], autouse=True)
def overlap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run every test without and with overlap: it must not change what a client sees."""
    monkeypatch.setattr(FakeEngine, "overlap", request.param)
    return int(request.param)


def request(
    max_tokens: int = 4,
    *,
    num_prompts: int = 1,
    num_prompt: int = 3,
    adapter: AdapterRef = NO_ADAPTER,
    ignore_eos: bool = False,
    stop: tuple[str, ...] = (),
    client: bytes | None = None,
) -> GenerationRequest:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, stop=stop)
    return GenerationRequest([Prompt([1] * num_prompt)] * num_prompts, params, adapter, client)


@asynccontextmanager
async def running(fake: FakeEngine) -> AsyncIterator[Engine]:
    fake.engine.start()
    try:
        yield fake.engine
    finally:
        fake.runner.gate.set()
        await fake.engine.stop()


async def collect(engine: Engine, request: GenerationRequest) -> list[Output]:
    return await finish(engine.generate(request))


async def finish(generation: Generation) -> list[Output]:
    async with aclosing(generation.outputs()) as outputs:
        return [output async for step in outputs for output in step]


def text_of(outputs: list[Output], choice: int = 0) -> str:
    return "".join(output.text for output in outputs if output.choice == choice)


def test_text_length_and_finish_reason() -> None:
    async def test() -> None:
        async with running(FakeEngine()) as engine:
            outputs = await collect(engine, request(6, num_prompts=2))
            assert text_of(outputs, 0) == text_of(outputs, 1) == " one two three four one two"
            last = {output.choice: output.finish_reason for output in outputs}
            assert last == {0: "length", 1: "length"}

    run(test)


def test_end_of_text_ends_without_text_unless_ignored() -> None:
    async def test() -> None:
        async with running(FakeEngine(" one<|endoftext|>")) as engine:
            outputs = await collect(engine, request(9))
            assert text_of(outputs) == " one"
            assert [output.tokens for output in outputs][-1] == [EOS]
            assert outputs[-1].finish_reason == "stop"
            ignoring = await collect(engine, request(4, ignore_eos=True))
            assert text_of(ignoring) == " one one"
            assert ignoring[-1].finish_reason == "length"

    run(test)


def test_a_stop_string_across_tokens_ends_the_choice_and_frees_its_pages() -> None:
    async def test() -> None:
        fake = FakeEngine()
        async with running(fake) as engine:
            outputs = await collect(engine, request(100, num_prompts=2, stop=("o thr",)))
            assert text_of(outputs, 0) == " one tw"
            assert text_of(outputs, 1) == " one tw"
            assert all("thr" not in output.text for output in outputs)
            assert {output.finish_reason for output in outputs} == {None, "stop"}
            await until(lambda: fake.scheduler.idle)
            assert fake.scheduler.cache.check_integrity() == []
        assert fake.metric("requests_total", outcome="stop") == 2
        assert fake.metric("kv_pages_held", group="dense") == 0

    run(test)


def test_max_tokens_0_ends_at_once() -> None:
    async def test() -> None:
        async with running(FakeEngine()) as engine:
            assert await collect(engine, request(0)) == [Output(0, "", [], "length")]

    run(test)


def test_closing_the_iterator_aborts_running_and_waiting_choices() -> None:
    async def test() -> None:
        fake = FakeEngine(max_slots=1)
        fake.runner.fault = lambda step: time.sleep(0.001)
        async with running(fake) as engine:
            async with aclosing(engine.generate(request(200, num_prompts=2)).outputs()) as outputs:
                await anext(outputs)
            await until(lambda: fake.scheduler.idle)
            assert fake.scheduler.cache.check_integrity() == []
            assert text_of(await collect(engine, request(2))) == " one two"
        assert fake.metric("requests_total", outcome="abort") == 2

    run(test)


def test_a_reader_that_was_away_gets_what_has_come_at_once() -> None:
    """Sent one by one without a pause, events would go on to a connection that has just been found closed."""

    async def test() -> None:
        fake, away = FakeEngine(), threading.Event()

        def fault(step: StepInput) -> None:
            assert len(fake.runner.steps) < 3 or away.wait(20)

        fake.runner.fault = fault
        async with running(fake) as engine, aclosing(engine.generate(request(9, num_prompts=2)).outputs()) as outputs:
            first = await anext(outputs)
            away.set()
            await until(lambda: fake.scheduler.idle)
            rest = await anext(outputs)
            assert [len(output.tokens) for output in first + rest] == [1] * 18
            assert [output.finish_reason for output in rest if output.finish_reason] == ["length"] * 2
            assert [output async for output in outputs] == []

    run(test)


def test_what_a_step_did_is_reported_while_the_next_one_computes(overlap: int) -> None:
    """Ahead of its launch, the event loop's work on it would keep the interpreter from the step thread."""

    async def test() -> None:
        fake = FakeEngine()
        async with running(fake) as engine:
            steps, calls, launch, report = engine._steps, fake.runner.calls, fake.runner.launch, engine._steps._report_to

            def launching(step: StepInput, *begins: Any) -> Any:
                calls.append("prepare")
                return launch(step, *begins)

            def reporting(deltas: list[Delta], ended: float) -> None:
                calls.append("report")
                report(deltas, ended)

            fake.runner.launch = launching  # type: ignore[method-assign, assignment]
            steps._report_to = reporting
            assert text_of(await collect(engine, request(4))) == " one two three four"
        begun, later = ["prepare", "report", "launch"], ["prepare", "report", "launch", "result"]
        if overlap:
            expected = [*begun, "prepare", "launch", "result", *later * 2, "report", "result", "report"]
        else:
            expected = [*begun, "result", *later * 3, "report"]
        assert calls == expected

    run(test)


def test_an_answer_that_was_computed_ahead_of_a_failure_is_given(overlap: int) -> None:
    async def test() -> None:
        fake = FakeEngine()
        launch = fake.runner.launch

        def failing(step: StepInput, *begins: Any) -> Any:
            if len(fake.runner.steps) > overlap:
                raise RuntimeError("device on fire")
            return launch(step, *begins)

        fake.runner.launch = failing  # type: ignore[method-assign, assignment]
        async with running(fake) as engine:
            answers = (collect(engine, request(1)), collect(engine, request(9)))
            first, second = await asyncio.gather(*answers, return_exceptions=True)
            assert not isinstance(first, BaseException), repr(first)
            assert text_of(first) == " one"
            assert isinstance(second, StepFailedError)
            await until(lambda: engine.has_failed)

    run(test)


def test_a_full_queue_is_refused_with_a_time_to_retry() -> None:
    async def test() -> None:
        fake = FakeEngine(max_slots=2, max_queue=1)
        async with running(fake) as engine:
            fake.runner.gate.clear()
            others = asyncio.create_task(collect(engine, request(num_prompts=3)))
            await until(lambda: len(fake.scheduler.running) == 2)
            with pytest.raises(QueueFullError, match=r"1 choices are waiting, the limit is 1; try again in \d+ s") as error:
                await collect(engine, request())
            assert error.value.retry_after >= 1
            fake.runner.gate.set()
            assert len(await others) == 12
            assert text_of(await collect(engine, request(1))) == " one"
        assert fake.metric("requests_total", outcome="rejected") == 1

    run(test)


def test_each_client_has_a_queue_of_its_own() -> None:
    async def test() -> None:
        fake = FakeEngine(max_slots=2, max_queue=1)
        async with running(fake) as engine:
            fake.runner.gate.clear()
            others = [asyncio.create_task(collect(engine, request(num_prompts=3, client=b"a")))]
            await until(lambda: len(fake.scheduler.running) == 2)
            others.append(asyncio.create_task(collect(engine, request(client=b"b"))))
            await asyncio.sleep(0)
            for client in (b"a", b"b"):
                with pytest.raises(QueueFullError, match="1 choices are waiting, the limit is 1"):
                    await collect(engine, request(client=client))
            fake.runner.gate.set()
            assert [len(outputs) for outputs in await asyncio.gather(*others)] == [12, 4]

    run(test)


def test_a_client_gets_a_slot_while_anothers_choices_fill_them_and_everything_is_counted_once() -> None:
    async def test() -> None:
        fake = FakeEngine(max_slots=3, kv_sequences=3, max_queue=20)
        slow_down(fake, 0.001)
        async with running(fake) as engine:
            large = asyncio.create_task(collect(engine, request(60, num_prompts=9, num_prompt=100, client=b"a")))
            await until(lambda: fake.metric("generated_tokens_total") > 0)
            for _ in range(5):
                assert text_of(await collect(engine, request(1, client=b"b"))) == " one"
            assert not large.done()
            texts = [text_of(await large, choice) for choice in range(9)]
            assert texts == [text_of(await collect(engine, request(60, num_prompt=100)))] * 9
        assert fake.metric("put_back_total") == fake.scheduler.num_put_back > 0
        assert fake.metric("generated_tokens_total") == 10 * 60 + 5
        assert fake.metric("prefix_cache_queries_total") == 10 * 100 + 5 * 3
        assert fake.metric("requests_total", outcome="length") == 10 + 5
        assert fake.metric("queue_time_seconds_count") == 10 + 5

    run(test)


def test_what_never_fits_is_refused_at_once() -> None:
    async def test() -> None:
        async with running(FakeEngine(max_slots=2, max_queue=1, kv_sequences=1)) as engine:
            with pytest.raises(DoesNotFitError, match="asks for 4 choices; this server holds at most 3"):
                await collect(engine, request(num_prompts=4))
        async with running(FakeEngine(kv_sequences=1)) as engine:
            with pytest.raises(
                DoesNotFitError,
                match="prompt of 200 tokens with max_tokens 100 needs more KV cache than this server's 4 dense",
            ):
                await collect(engine, request(100, num_prompt=200))

    run(test)


def test_waiting_too_long_ends_in_unavailable() -> None:
    async def test() -> None:
        fake = FakeEngine(max_slots=1, queue_timeout=0.1)
        slow_down(fake, 0.01)
        async with running(fake) as engine:
            first = asyncio.create_task(collect(engine, request(60)))
            await until(lambda: bool(fake.scheduler.running))
            with pytest.raises(UnavailableError, match=r"waited more than 0\.1 s for a slot"):
                await collect(engine, request())
            assert len(await first) == 60

    run(test)


def test_a_request_that_never_got_a_slot_does_not_lengthen_the_time_to_retry() -> None:
    async def test() -> None:
        fake = FakeEngine(max_slots=1, max_queue=1, queue_timeout=0.05)
        slow_down(fake, 0.01)
        async with running(fake) as engine:
            busy = asyncio.create_task(collect(engine, request(100)))
            await until(lambda: bool(fake.scheduler.running))
            with pytest.raises(UnavailableError):
                await collect(engine, request())
            late = asyncio.create_task(collect(engine, request()))
            await asyncio.sleep(0)
            with pytest.raises(QueueFullError) as refused:
                await collect(engine, request())
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


def test_a_step_is_launched_before_the_tokens_of_the_one_before_it_are_read(overlap: int) -> None:
    async def test() -> None:
        fake = FakeEngine()
        async with running(fake) as engine:
            assert text_of(await collect(engine, request(4))) == " one two three four"
        if overlap:
            assert fake.runner.calls == ["launch", *["launch", "result"] * 3, "result"]
        else:
            assert fake.runner.calls == ["launch", "result"] * 4

    run(test)


def test_the_end_of_text_in_a_step_drops_the_one_after_it(overlap: int) -> None:
    async def test() -> None:
        fake = FakeEngine(" one<|endoftext|>", max_slots=1)
        async with running(fake) as engine:
            outputs = await collect(engine, request(9, num_prompts=2))
            assert text_of(outputs, 0) == text_of(outputs, 1) == " one"
        assert len(fake.runner.steps) == 4 + 2 * overlap, "overlap runs one step too many for each sequence"
        assert fake.metric("generated_tokens_total") == 4
        assert fake.metric("page_accounting_faults_total") == 0

    run(test)


def test_a_step_time_does_not_count_the_step_before_it(overlap: int) -> None:
    async def test() -> None:
        fake = FakeEngine()
        fake.runner.late_fault = lambda step: time.sleep(0.02)
        async with running(fake) as engine:
            started = time.monotonic()
            await collect(engine, request(10))
            elapsed = time.monotonic() - started
        assert fake.metric("step_time_seconds_count") == 10
        assert 10 * 0.02 <= fake.metric("step_time_seconds_sum") <= elapsed

    run(test)


def test_a_step_time_does_not_count_what_came_before_its_launch() -> None:
    async def test() -> None:
        fake = FakeEngine()
        submit = fake.scheduler.submit

        def slow_submit(sequences: Iterable[Sequence]) -> None:
            time.sleep(0.3)
            submit(sequences)

        fake.scheduler.submit = slow_submit  # type: ignore[method-assign]
        async with running(fake) as engine:
            await collect(engine, request(1))
        assert fake.metric("step_time_seconds_sum") < 0.3

    run(test)


def test_a_result_that_raises_fails_its_requests_and_the_step_after_it_is_read() -> None:
    async def test() -> None:
        fake = FakeEngine()

        def fault(step: StepInput) -> None:
            if step.decodes:
                fake.runner.late_fault = lambda step: None
                time.sleep(0.3)
                raise RuntimeError("device on fire")

        fake.runner.late_fault = fault
        async with running(fake) as engine:
            short = asyncio.create_task(collect(engine, request(1)))
            doomed = asyncio.create_task(collect(engine, request(9)))
            assert text_of(await short) == " one"
            with pytest.raises(StepFailedError, match="the engine failed while it ran this request"):
                await doomed
            await until(lambda: fake.scheduler.idle)
            assert fake.runner.calls.count("result") == len(fake.runner.steps)
            assert text_of(await collect(engine, request(2))) == " one two"
        assert fake.metric("requests_total", outcome="error") == 1
        assert fake.metric("page_accounting_faults_total") == 0
        assert fake.metric("step_time_seconds_sum") < 0.3, "the failed step's time must not count for the next step"

    run(test)


def test_a_launch_that_raises_comes_after_the_tokens_of_the_steps_before_it() -> None:
    async def test() -> None:
        fake = FakeEngine()

        def fault(step: StepInput) -> None:
            if len(fake.runner.steps) == 3:
                raise RuntimeError("device on fire")

        fake.runner.fault = fault
        async with running(fake) as engine:
            generation = engine.generate(request(9))
            with pytest.raises(StepFailedError):
                await finish(generation)
            assert generation.choices[0][0].text == " one two"
            await until(lambda: fake.scheduler.idle)
            assert fake.runner.calls.count("result") == 2 + 2
            assert len(fake.runner.steps) == 3 + 2, "after a failed launch only the two steps of the canary run"
            assert text_of(await collect(engine, request(2))) == " one two"

    run(test)


def test_an_engine_whose_every_result_raises_has_failed(overlap: int) -> None:
    async def test() -> None:
        fake = FakeEngine(max_slots=1)

        def fault(step: StepInput) -> None:
            raise RuntimeError("again")

        fake.runner.late_fault = fault
        async with running(fake) as engine:
            fake.runner.gate.clear()  # hold steps back until all four requests are there
            tasks = [asyncio.create_task(collect(engine, request())) for _ in range(4)]
            # The step thread may have taken the first request alone. It reads no others while its step waits.
            await until(lambda: len(fake.scheduler.waiting) + len(engine._steps._inbox) == 3)
            fake.runner.gate.set()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(result) for result in results] == [StepFailedError] * 4
            await engine.failed()
        assert len(fake.runner.steps) == 2 + overlap, "the last one is the canary"

    run(test)


def test_an_engine_that_stops_reads_what_is_in_flight() -> None:
    async def test() -> None:
        fake = FakeEngine()
        slow_down(fake, 0.01)
        async with running(fake) as engine:
            endless = asyncio.create_task(collect(engine, request(200)))
            await until(lambda: len(fake.runner.steps) > 3)
        assert fake.runner.calls.count("result") == fake.runner.calls.count("launch")
        endless.cancel()
        await asyncio.gather(endless, return_exceptions=True)

    run(test)


def test_a_step_that_raises_fails_its_requests_and_no_others(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        fake = FakeEngine(max_slots=1)
        async with running(fake) as engine:
            fail_once(fake)
            doomed = asyncio.create_task(collect(engine, request()))
            await asyncio.sleep(0)
            waiting = asyncio.create_task(collect(engine, request(2)))
            with pytest.raises(StepFailedError, match="the engine failed while it ran this request"):
                await doomed
            assert text_of(await waiting) == " one two"
            assert engine.unready_reason is None
            await until(lambda: fake.scheduler.idle)
            assert fake.scheduler.cache.check_integrity() == []
        assert fake.metric("requests_total", outcome="error") == 1

    run(test)
    assert "device on fire" in caplog.text


def test_an_engine_whose_every_step_raises_has_failed() -> None:
    async def test() -> None:
        fake = FakeEngine(max_slots=1)

        def fault(step: StepInput) -> None:
            raise RuntimeError("again")

        fake.runner.fault = fault
        async with running(fake) as engine:
            results = await asyncio.gather(*(collect(engine, request()) for _ in range(4)), return_exceptions=True)
            assert [type(result) for result in results] == [StepFailedError] * 4
            await engine.failed()
            assert engine.unready_reason == "the engine has failed"
            with pytest.raises(UnavailableError, match="the engine has failed"):
                await collect(engine, request())

    run(test)


def test_however_many_requests_raise_in_a_row_the_engine_goes_on() -> None:
    async def test() -> None:
        fake = FakeEngine(max_slots=1)
        async with running(fake) as engine:
            for _ in range(3):
                fail_once(fake)
                with pytest.raises(StepFailedError):
                    await collect(engine, request())
                fail_once(fake)
                with pytest.raises(StepFailedError):
                    await collect(engine, request())
                assert text_of(await collect(engine, request(1))) == " one"
            assert engine.unready_reason is None

    run(test)


def test_a_step_of_several_requests_that_raises_once_harms_none() -> None:
    async def test() -> None:
        fake = FakeEngine()
        async with running(fake) as engine:
            fake.runner.gate.clear()
            tasks = [asyncio.create_task(collect(engine, request(9))) for _ in range(3)]
            await until(lambda: len(fake.scheduler.running) + len(engine._steps._inbox) == 3)

            def fault(step: StepInput) -> None:
                if len(step.decodes) == 3:
                    fail_once(fake)
                    fake.runner.fault(step)

            fake.runner.fault = fault
            fake.runner.gate.set()
            assert [text_of(each) for each in await asyncio.gather(*tasks)] == [
                " one two three four one two three four one"
            ] * 3
        assert fake.metric("requests_total", outcome="error") == 0

    run(test)


def test_a_request_that_raises_takes_none_of_those_with_it_that_its_steps_hold(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        fake = FakeEngine(max_slots=8)
        rows: dict[int, int] = {}

        def fault(step: StepInput) -> None:
            rows.update((start.row, len(start.prompt)) for start in step.starts)
            if any(
                rows[row] == 5 and position == 8 for row, position in zip(step.token_rows, step.token_positions, strict=True)
            ):
                raise RuntimeError("device on fire")

        fake.runner.late_fault = fault
        async with running(fake) as engine:
            fake.runner.gate.clear()
            tasks = [asyncio.create_task(collect(engine, request(9, num_prompt=3 + i))) for i in range(7)]
            await until(lambda: len(fake.scheduler.running) + len(engine._steps._inbox) == 7)
            fake.runner.gate.set()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(found.pop(2), StepFailedError)
            assert [text_of(each) for each in found if isinstance(each, list)] == [
                " one two three four one two three four one"
            ] * 6
            await until(lambda: fake.scheduler.idle)
            assert fake.scheduler.cache.check_integrity() == []

    run(test)
    assert "a step raised: 1 of its 7 requests end with an error" in caplog.text


def test_a_failed_step_has_its_accounts_checked() -> None:
    async def test() -> None:
        fake = FakeEngine(max_slots=1)
        async with running(fake) as engine:
            slow_down(fake, 0.01)
            busy = asyncio.create_task(collect(engine, request(200)))
            await until(lambda: bool(fake.scheduler.running))
            fake.scheduler.cache.pools["dense"].free.pop(0)
            fail_once(fake)
            with pytest.raises(StepFailedError):
                await busy
            await until(lambda: fake.metric("page_accounting_faults_total") == 2)  # once at the failure, once when idle

    run(test)


def test_only_a_step_that_hangs_makes_a_busy_engine_unready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.engine.engine.STALL_SECONDS", 0.05)

    async def test() -> None:
        fake = FakeEngine()
        async with running(fake) as engine:
            await collect(engine, request(1))
            await asyncio.sleep(0.1)
            assert engine.unready_reason is None, "an idle engine is ready"
            slow_reader = engine.generate(request(4)).outputs()
            await anext(slow_reader)
            await until(lambda: fake.scheduler.idle)
            await asyncio.sleep(0.1)
            assert engine.unready_reason is None, "a client that does not read is no hanging step"
            await slow_reader.aclose()
            fake.runner.gate.clear()
            hanging = asyncio.create_task(collect(engine, request(1)))
            await asyncio.sleep(0)
            assert engine.unready_reason is None, "the clock starts with the work, not with an earlier step"
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
            hanging = asyncio.create_task(collect(engine, request(1)))
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
            tasks = [asyncio.create_task(collect(engine, request(100, num_prompt=100))) for _ in range(3)]
            await until(lambda: fake.scheduler.lacks_pages and len(fake.scheduler.waiting) == 2)
            with pytest.raises(QueueFullError, match="2 choices are waiting, the limit is 2"):
                await collect(engine, request())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    run(test)


def test_drain_lets_requests_finish_and_refuses_new_ones() -> None:
    async def test() -> None:
        fake = FakeEngine()
        slow_down(fake, 0.005)
        async with running(fake) as engine:
            last = asyncio.create_task(collect(engine, request(20)))
            await asyncio.sleep(0)
            draining = asyncio.create_task(engine.drain(10))
            await asyncio.sleep(0)
            with pytest.raises(UnavailableError, match="shutting down"):
                await collect(engine, request())
            await draining
            assert len(await last) == 20

    run(test)


def test_drain_ends_what_takes_too_long_with_an_error() -> None:
    async def test() -> None:
        fake = FakeEngine()
        slow_down(fake, 0.01)
        async with running(fake) as engine:
            endless = asyncio.create_task(collect(engine, request(200)))
            await asyncio.sleep(0)
            await engine.drain(0.1)
            with pytest.raises(UnavailableError, match="shut down before the request was finished"):
                await endless

    run(test)


def test_accounting_faults_are_counted_when_idle() -> None:
    """Once each time. The page is lost in the step thread, so that no check of the idle engine is under way."""

    def lose(fake: FakeEngine) -> None:
        fake.scheduler.cache.pools["dense"].free.pop()

    async def test() -> None:
        fake = FakeEngine()
        async with running(fake) as engine:
            await collect(engine, request(2))
            await until(lambda: fake.scheduler.idle)
            assert fake.metric("page_accounting_faults_total") == 0
            await engine.between_steps(lambda: lose(fake))
            await until(lambda: fake.metric("page_accounting_faults_total") == 1)
            await collect(engine, request(2))
            await until(lambda: fake.metric("page_accounting_faults_total") == 2)

    run(test)


def test_a_retired_adapter_is_removed_when_its_choices_have_ended_and_takes_in_no_more() -> None:
    async def test() -> None:
        fake = FakeEngine()
        async with running(fake) as engine:
            mine, other = AdapterRef(1, b"1"), AdapterRef(2, b"2")
            fake.runner.gate.clear()  # hold steps back
            runs = asyncio.create_task(collect(engine, request(adapter=mine)))
            await until(lambda: bool(fake.scheduler.running))
            removed = asyncio.Event()
            retiring = asyncio.create_task(engine.retire(mine, removed.set))
            await asyncio.sleep(0.2)
            with pytest.raises(RetiredError, match="the model has been deleted"):
                await collect(engine, request(adapter=mine))  # it had looked up the model before the deletion
            assert not removed.is_set()
            fake.runner.gate.set()
            assert text_of(await runs) == " one two three four"
            await retiring
            assert removed.is_set()
            assert text_of(await collect(engine, request(adapter=other))) == " one two three four"

    run(test)
