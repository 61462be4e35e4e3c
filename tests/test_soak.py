"""A soak of a few seconds, and whether its judgement sees what is left over."""

import json
import random

import pytest

from tests.soak.__main__ import KEYS, MODEL, run
from tests.soak.cases import Case, Cases, error_of, fault, other_way, seeded, substance
from tests.soak.judge import ALLOCATED, MEMORY, Sample, bad_lines, missed, pooled, table
from tests.soak.wire import Answer, post

LEFT = {"tasks": ["serve"], "types": {"a.Leak": 3}}
CALM = Sample(0, 0, 0, 0, 0, 0, 20, 12, 4, 500 << 20, 300 << 20, 90 << 20, 10_000, LEFT)


def cases(seed: int = 1) -> Cases:
    return Cases(seed, MODEL, KEYS, most_choices=32)


def test_a_short_soak_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(2, 1, rounds=1, num_seeded=3, trains=False) == []
    out = capsys.readouterr().out
    assert "left over" in out
    assert "answers to 3 requests compared" in out


@pytest.mark.parametrize(
    "leak",
    ["held", "running", "waiting", "page_faults", "non_finite", "responses_500", "descriptors", "threads", "tasks"],
)
def test_one_thing_that_is_left_is_a_miss(leak: str) -> None:
    left = CALM._replace(**{leak: getattr(CALM, leak) + 1})
    assert missed([CALM] * 4) == []
    [found] = missed([CALM, CALM, left, CALM])
    assert "round 2" in found
    assert leak in found


@pytest.mark.parametrize(("name", "room"), [("memory", MEMORY), ("allocated", ALLOCATED)])
def test_memory_that_grows_from_round_to_round_is_a_miss_and_says_of_what_there_is_more(name: str, room: int) -> None:
    def grown(by: int) -> Sample:
        return CALM._replace(**{name: getattr(CALM, name) + (300 << 20) + by})

    first, most = grown(0), grown(room)  # what the first round adds is no leak
    assert missed([CALM, first, first, most]) == []
    leaky = grown(room + (1 << 20))._replace(detail={"types": {"a.Leak": 5000}})
    bound = f"{getattr(most, name) / 2**20:.1f}"
    assert missed([CALM, first, first, leaky]) == [
        f"{name} has grown to {getattr(leaky, name) / 2**20:.1f} MB, at most {bound}: {{'a.Leak': 4997}}"
    ]
    assert bound in "\n".join(table([CALM, first, first, leaky]))
    assert missed([CALM, leaky]) == [], "one round shows no growth"


def test_memory_that_a_round_happened_to_need_less_of_is_no_miss() -> None:
    low, high = CALM, CALM._replace(memory=CALM.memory + 30 * 2**20)
    assert missed([CALM, low, high, high]) == missed([CALM, high, low, high]) == []
    assert len(missed([CALM, low, low, high])) == 1


def test_threads_of_a_pool_count_beyond_its_size() -> None:
    pool = [f"large-request_{number}" for number in range(6)]
    assert [pooled(["MainThread", *pool[:count]]) for count in (0, 3, 4, 6)] == [0, 3, 4, 4]


def test_a_soak_without_a_round_is_a_miss() -> None:
    assert missed([]) == missed([CALM]) == ["no round has ended"]
    assert table([])[0].split() == ["left", "over", "at", "most"]


def test_a_miss_names_the_tasks_that_are_left() -> None:
    left = CALM._replace(tasks=5, detail={"tasks": ["serve", "EventStream._comment"]})
    assert missed([CALM, left])[0].endswith("{'EventStream._comment': 1}")


def test_a_traceback_and_a_warning_of_asyncio_are_bad_lines() -> None:
    log = 'INFO 1 - "POST /v1/completions HTTP/1.1" 500\nTask exception was never retrieved\nTraceback (most recent call)'
    assert bad_lines(log) == log.splitlines()[1:]


def test_the_same_seed_draws_the_same_and_another_draws_others() -> None:
    drawn = [[cases(seed).any(random.Random(str(i))) for i in range(10)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert seeded(cases(), 1, 20) == seeded(cases(), 1, 20)


STREAM = (
    b'data: {"choices": [{"index": 1, "text": "a", "logprobs": {"tokens": ["a"]}, "finish_reason": null}]}\n\n: keep-alive\n'
    b'data: {"choices": [{"index": 0, "text": "b", "logprobs": {"tokens": ["b"]}, "finish_reason": "length"}]}\n\n'
    b'data: {"choices": [{"index": 1, "text": "c", "logprobs": {"tokens": ["c"]}, "finish_reason": "stop"}]}\n\n'
    b"data: [DONE]\n\n"
)
WHOLE = {
    "choices": [
        {"index": 0, "text": "b", "logprobs": {"tokens": ["b"]}, "finish_reason": "length"},
        {"index": 1, "text": "ac", "logprobs": {"tokens": ["a", "c"]}, "finish_reason": "stop"},
    ]
}
ERROR = (
    b'data: {"error": {"message": "", "type": "server_error", "param": null, "code": "internal_error"}}\n\ndata: [DONE]\n\n'
)
ASKED = Case("completion", post("/v1/completions", {}, "sk-1"), num_choices=2)


def test_a_stream_has_the_substance_of_the_whole_answer() -> None:
    stream = Answer(200, "text/event-stream", STREAM)
    whole = Answer(200, "application/json", json.dumps(WHOLE).encode())
    assert substance(stream) == substance(whole)
    assert fault(ASKED, stream) is None
    assert fault(ASKED, whole) is None
    assert fault(ASKED._replace(num_choices=3), whole) == "2 choices, not 3"


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        (Answer(500, "application/json", b'{"error": {}}'), "500"),
        (Answer(400, "application/json", b'{"error": {}}'), "400"),
        (Answer(200, "text/event-stream", STREAM[:-20]), "a stream without an end"),
        (Answer(200, "text/event-stream", STREAM.replace(b'"stop"', b"null")), "a choice without an end"),
        (Answer(200, "text/event-stream", STREAM[:100] + b"\n\n" + ERROR), "500"),
        (Answer(200, "application/json", b"{"), "JSONDecodeError"),
        (Answer(429, "application/json", b'{"error": {"message": "a"}}'), "an error of another form"),
    ],
)
def test_an_answer_that_the_contract_does_not_allow_is_a_fault(answer: Answer, wrong: str) -> None:
    assert (fault(ASKED, answer) or "").startswith(wrong)


def test_an_error_event_counts_as_its_status() -> None:
    late = ERROR.replace(b"internal_error", b"unavailable")
    assert error_of(Answer(200, "text/event-stream", late)) == 503
    assert fault(ASKED, Answer(200, "text/event-stream", late)) is None


def test_a_request_that_is_asked_again_differs_in_nothing_but_how_it_is_answered() -> None:
    for case in seeded(cases(), 1, 20):
        again = other_way(case, random.Random(1))
        bodies = [json.loads(each.request.body) for each in (case, again)]
        for body in bodies:
            body.pop("stream", None)
        assert bodies[0] == bodies[1]
