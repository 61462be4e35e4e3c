"""The Python API, as a program uses it that has nothing but the installed packages."""

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from service import LLM, AsyncLLM, Completion, EngineError, RequestError, SamplingParams
from service.engine.request import BOUNDS
from service.llm import list_of

GREEDY = SamplingParams(max_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", dtype="float32", kv_bytes=64 << 20, max_slots=4) as llm:
        yield llm


def test_the_docstrings_example_in_a_program_outside_the_checkout(tmp_path: Path) -> None:
    program = (
        "from service import LLM, SamplingParams\n"
        "with LLM('demo', dtype='float32') as llm:\n"
        "    print(llm.generate(['Once upon a time'], SamplingParams(max_tokens=5, temperature=0))[0].text)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


def test_importing_the_package_takes_no_torch() -> None:
    script = "import sys, service; service.SamplingParams(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
    with pytest.raises(ImportError, match="cannot import name 'LLMs'"):
        from service import LLMs  # noqa: F401


def test_prompts_as_text_and_as_token_ids_give_the_same_completions(llm: LLM) -> None:
    texts = ["Once upon a time", "The king said"]
    together = llm.generate(texts, GREEDY)
    assert [type(each) for each in together] == [Completion] * 2
    assert [each.finish_reason for each in together] == ["length"] * 2
    assert all(len(each.tokens) == 8 and each.text and each.logprobs is None for each in together)
    assert llm.generate([llm.tokenize(text) for text in texts], GREEDY) == together
    assert [llm.generate(text, GREEDY)[0] for text in texts] == together
    assert llm.generate(llm.tokenize(texts[0]), GREEDY) == together[:1]
    assert llm.detokenize(together[0].tokens) == together[0].text


def test_choices_of_each_prompt_come_together_and_seeds_repeat(llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, n=2, seed=5)
    found = llm.generate(["One", "Two"], params)
    assert len(found) == 4
    assert found[0].text != found[1].text
    assert llm.generate(["One", "Two"], params) == found


def test_best_of_returns_those_with_the_highest_mean_logprob(llm: LLM) -> None:
    every = llm.generate("The", SamplingParams(max_tokens=4, n=5, seed=3, logprobs=0))
    best = llm.generate("The", SamplingParams(max_tokens=4, n=2, best_of=5, seed=3, logprobs=0))

    def mean(completion: Completion) -> float:
        assert completion.logprobs is not None
        return sum(each.logprob for each in completion.logprobs if each) / len(completion.tokens)

    assert best == sorted(every, key=mean, reverse=True)[:2]


def test_more_prompts_than_slots_and_any_queue_are_completed(llm: LLM) -> None:
    found = llm.generate([[token] for token in range(1000, 1100)], SamplingParams(max_tokens=1, temperature=0))
    assert len(found) == 100


def test_a_stream_is_the_completion_in_pieces_and_may_be_left(llm: LLM) -> None:
    whole = llm.generate("Once upon a time", GREEDY)[0].text
    assert "".join(llm.stream("Once upon a time", GREEDY)) == whole
    pieces = llm.stream("Once upon a time", SamplingParams(max_tokens=1000, temperature=0, ignore_eos=True))
    assert whole.startswith(next(pieces))
    pieces.close()
    assert llm.generate("Once upon a time", GREEDY)[0].text == whole


def test_echo_logprobs_and_scores_agree(llm: LLM) -> None:
    prompt, continuation = llm.tokenize("The king"), llm.tokenize(" said that")
    echoed = llm.generate(prompt + continuation, SamplingParams(max_tokens=0, echo=True, logprobs=1))[0]
    assert echoed.text == "The king said that"
    assert echoed.logprobs is not None
    assert echoed.logprobs[0] is None
    expected = sum(each.logprob for each in echoed.logprobs[len(prompt) :] if each)
    by_text, by_tokens = llm.score("The king", [" said that", continuation])
    assert by_text == by_tokens
    assert by_text.logprob == pytest.approx(expected, abs=1e-4)
    assert by_text.mean_logprob == pytest.approx(expected / len(continuation), abs=1e-4)
    assert by_text.tokens == continuation


def test_threads_share_one_model(llm: LLM) -> None:
    expected = {text: llm.generate(text, GREEDY)[0].text for text in ("One", "Two", "Three")}
    found: dict[str, str] = {}

    def work(text: str) -> None:
        found[text] = llm.generate(text, GREEDY)[0].text

    threads = [threading.Thread(target=work, args=(text,)) for text in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_the_async_twin_runs_in_the_callers_loop(llm: LLM) -> None:
    async def main() -> tuple[list[str], str]:
        async with AsyncLLM("demo", dtype="float32", kv_bytes=64 << 20) as other:
            found = await asyncio.gather(other.generate("One", GREEDY), other.generate("Two", GREEDY))
            streamed = "".join([piece async for piece in other.stream("One", GREEDY)])
            (score,) = await other.score("One", [" day"])
            assert score.logprob < 0
            return [each[0].text for each in found], streamed

    texts, streamed = asyncio.run(main())
    assert texts == [each.text for each in llm.generate(["One", "Two"], GREEDY)]
    assert streamed == texts[0]


@pytest.mark.parametrize("name", BOUNDS)
def test_numbers_out_of_bounds_are_refused_by_name(name: str) -> None:
    least, most = BOUNDS[name]
    with pytest.raises(RequestError, match=f"'{name}': must be ") as refused:
        SamplingParams(**{name: least - 1})  # type: ignore[arg-type]
    assert refused.value.param == name
    with pytest.raises(RequestError, match=f"'{name}': must be "):
        SamplingParams(**{name: 2 * most + 1})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": -1}, "'max_tokens': must be at least 0, got -1"),
        ({"temperature": 3}, "'temperature': must be from 0 to 2, got 3"),
        ({"repetition_penalty": 0}, "'repetition_penalty': must be above 0 and at most 10, got 0"),
        ({"stop": "."}, "'stop': must be a tuple of texts, none of them empty"),
        ({"stop": ("",)}, "'stop': must be a tuple of texts, none of them empty"),
        ({"n": 3, "best_of": 2}, "'best_of': is 2, less than n 3"),
        ({"max_tokens": 1, "min_tokens": 2}, "'min_tokens': is 2, more than max_tokens 1"),
        ({"bad_words": "a"}, "'bad_words': must hold texts, each of more than spaces"),
        ({"bad_words": ("a", " ")}, "'bad_words': must hold texts, each of more than spaces"),
        ({"logit_bias": {5: 101.0}}, "'logit_bias': holds a bias that is not from -100 to 100"),
    ],
)
def test_params_that_make_no_sense_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError) as refused:
        SamplingParams(**fields)  # type: ignore[arg-type]
    assert str(refused.value) == message


def test_prompts_that_the_model_cannot_take_are_refused(llm: LLM) -> None:
    with pytest.raises(
        RequestError, match=r"maximum context length is 2048 tokens, but the request asks for 2049 tokens \(1 in the prompt"
    ):
        llm.generate([5], SamplingParams(max_tokens=2048))
    with pytest.raises(RequestError, match=r"token id 50257 is outside the model's vocabulary of 50257 \(0 to 50256\)"):
        llm.generate([50257])
    with pytest.raises(RequestError, match="a prompt of token ids is empty"):
        llm.generate([[5], []])
    with pytest.raises(RequestError, match="there is no prompt"):
        list_of([])
    with pytest.raises(RequestError, match="a stream is of one choice, not of 2"):
        next(llm.stream("a", SamplingParams(n=2)))
    with pytest.raises(RequestError, match="a continuation is empty, so that there is nothing to score"):
        llm.score("a", [" b", ""])
    with pytest.raises(RequestError, match="no adapter is called 'mine'; there are none"):
        llm.generate("a", adapter="mine")


def test_a_setting_of_the_server_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="max_queue, port: no such setting; there are dtype, device, kernels"):
        LLM("demo", port=8000, max_queue=5)


def test_ctrl_c_ends_a_completion_with_its_status(tmp_path: Path) -> None:
    command = "import sys; from service.cli import main; sys.exit(main())"
    options = ["complete", "Once", "--dtype", "float32", "--max-tokens", "2000", "--temperature", "0"]
    with subprocess.Popen(
        [sys.executable, "-c", command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pipesize=4096,  # bytes: less than the text, which the process can't end before it is read
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(5)  # it generates
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr == ""


def test_a_closed_model_says_so_and_ends_its_streams(recwarn: pytest.WarningsRecorder) -> None:
    llm = LLM("demo", dtype="float32", kv_bytes=64 << 20)
    stream = llm.stream("Once", SamplingParams(max_tokens=1000, ignore_eos=True))
    next(stream)
    llm.close()
    with pytest.raises(EngineError, match="the model has been closed"):
        list(stream)
    stream.close()
    assert list(recwarn) == []
    llm.close()
    with pytest.raises(EngineError, match="the model has been closed"):
        llm.generate("a")


def test_of_the_allowed_tokens_the_likeliest_is_taken(llm: LLM) -> None:
    allowed = [1842, 257, 640, 11, 5822, 318, 13]
    greedy = replace(GREEDY, allowed_token_ids=tuple(allowed), max_tokens=6)
    [found] = llm.generate("Once upon", greedy)
    tokens = llm.tokenize("Once upon")
    for token in found.tokens:  # the oracle: each allowed token is scored
        scores = llm.score(tokens, [[each] for each in allowed])
        assert token == allowed[max(range(len(allowed)), key=lambda i: scores[i].logprob)]
        tokens.append(token)
    drawn = llm.generate("Once upon", replace(greedy, temperature=2.0, n=8, seed=3, top_p=0.9, logit_bias={5822: 5, 7: 100}))
    assert {token for each in drawn for token in each.tokens} <= set(allowed)
    assert sum(each.tokens.count(5822) for each in drawn) > 20, "the bias applies to those that are allowed"
    [plain] = llm.generate("Once upon", GREEDY)
    assert not set(plain.tokens) <= set(allowed), "the row is free again"


def test_bad_words_of_one_and_of_several_tokens(llm: LLM) -> None:
    params = replace(GREEDY, max_tokens=12)
    [plain] = llm.generate("Once upon a time", params)
    words = plain.text.split()
    [without] = llm.generate("Once upon a time", replace(params, bad_words=(f"{words[0]} {words[1]}",)))
    assert without.text.split()[0] == words[0], "a run is banned at its last token"
    assert without.text.split()[1] != words[1]
    [never] = llm.generate("Once upon a time", replace(params, bad_words=tuple(words)))
    assert not {*never.text.split()} & {*words}


def test_logprobs_of_a_prompt_without_its_echo(llm: LLM) -> None:
    prompt = "Once upon a time"
    [found] = llm.generate(prompt, replace(GREEDY, prompt_logprobs=3))
    [echoed] = llm.generate(prompt, replace(GREEDY, echo=True, logprobs=3))
    assert found.prompt_logprobs is not None
    assert echoed.logprobs is not None
    assert found.logprobs is None
    assert found.prompt_logprobs == echoed.logprobs[:4]
    [both] = llm.generate(prompt, replace(GREEDY, prompt_logprobs=1, logprobs=2))
    assert both.prompt_logprobs is not None
    assert both.logprobs is not None
    assert [each.logprob for each in both.prompt_logprobs[1:] if each] == [
        each.logprob for each in found.prompt_logprobs[1:] if each
    ]
    assert {len(each.top) for each in both.logprobs if each} == {2}


@pytest.mark.parametrize("name", ["allowed_token_ids", "stop_token_ids"])
def test_tokens_of_parameters_that_the_model_lacks_are_refused(name: str, llm: LLM) -> None:
    params = SamplingParams(**{name: (5, 50304)})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="token id 50304 is outside the model's vocabulary of 5"):
        llm.generate("a", params)
    with pytest.raises(RequestError, match="token id 50304 is outside"):
        list(llm.stream("a", params))
