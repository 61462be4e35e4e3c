"""`banded evaluate`: perplexity equals that of the model in process, prompts are few-shot prompts, errors are clear."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint.tokenizer import r50k_base
from model.checkpoint.weights import load_model
from model.training.trainer import mean_loss
from service.cli import main
from service.commands.measure import few_shot_table
from service.tools.evaluate import (
    RemoteModel,
    TaskItem,
    few_shot_accuracy,
    few_shot_questions,
    few_shot_text,
    perplexity,
    read_items,
)
from tests.model.checkpoint.checkpoints import tiny
from tests.serving import banded_serve

TEXT = "Once upon a time there was a king who had a golden bird. " * 60 + "Es war einmal – so beginnt es."


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("banded", tmp_path_factory.mktemp("model"), vocab_size=50257)


def test_over_http_and_in_process_a_text_has_one_perplexity(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A window begins with the last token of the one before, so every token of the text but the first is predicted once."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    lines = [{"input": word, "output": word[::-1]} for word in ["bird", "king", "gold", "tale", "wood"]]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    report = tmp_path / "report.json"
    with banded_serve(checkpoint, tmp_path / "log") as server:
        found = perplexity(RemoteModel(server.url, checkpoint.name), TEXT)
        options = ["--url", server.url, "--text", str(tmp_path / "text.txt"), "--json", str(report)]
        assert main(["evaluate", *options, "--few-shot", str(tmp_path / "items.jsonl"), "--shots", "4", "0"]) == 0
        with pytest.raises(ValueError, match=r"POST /tokenize: 404 .*'nobody'"):
            perplexity(RemoteModel(server.url, "nobody"), TEXT)
    written = json.loads(report.read_text(encoding="utf-8"))
    assert written["model"] == checkpoint.name
    assert written["text"] == pytest.approx(found)
    assert written["few_shot"] == {"all": {"0": 0.0, "4": 0.0}}
    shown = capsys.readouterr().out
    assert (
        f"perplexity {found['perplexity']:.2f}, {found['bits_per_byte']:.3f} bits per byte, {found['tokens']} tokens"
        in shown
    )

    model = load_model(checkpoint, torch.float32)
    tokens = torch.tensor(r50k_base().encode(TEXT))
    assert len(tokens) > 2 * model.config.n_positions
    assert found["tokens"] == len(tokens)
    context = model.config.n_positions
    windows = [tokens[start : start + context] for start in range(0, len(tokens) - 1, context - 1)]
    nats = sum(mean_loss(model, window) * (len(window) - 1) for window in windows)
    assert found["perplexity"] == pytest.approx(math.exp(nats / (len(tokens) - 1)), rel=1e-3)
    bits = (len(tokens) - 1) * math.log2(found["perplexity"])
    assert found["bits_per_byte"] == pytest.approx(bits / len(TEXT.encode()), rel=1e-3)


class Fake(RemoteModel):
    """A model that copies the pattern of the examples it sees."""

    def __init__(self, answer: Any) -> None:
        super().__init__("nowhere", "fake")
        object.__setattr__(self, "answer", answer)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self.answer(path, body)  # type: ignore[attr-defined]


def test_windows_overlap_by_a_token_and_every_other_one_is_counted_once() -> None:
    seen: list[list[int]] = []

    def answer(path: str, body: dict[str, Any]) -> Any:
        if path == "/tokenize":
            return {"tokens": list(range(1, 101)), "max_model_len": 30}
        assert body["max_tokens"] == 0
        assert body["echo"]
        window = body["prompt"]
        seen.append(window)
        return {"choices": [{"logprobs": {"token_logprobs": [None, *(-float(token) for token in window[1:])]}}]}

    found = perplexity(Fake(answer), "x" * 300)
    assert sorted(token for window in seen for token in window[1:]) == list(range(2, 101))
    assert max(map(len, seen)) == 30
    nats = sum(range(2, 101))
    assert found == {
        "tokens": 100,
        "bytes": 300,
        "perplexity": math.exp(nats / 99),
        "bits_per_byte": nats / math.log(2) / 300,
    }


def test_a_text_of_one_token_has_no_perplexity() -> None:
    with pytest.raises(ValueError, match="the text has 1 tokens; perplexity needs 2 at least"):
        perplexity(Fake(lambda *_: {"tokens": [5], "max_model_len": 30}), "x")


def test_examples_are_laid_out_with_the_default_separator_and_prefixes() -> None:
    examples = [TaskItem("t", "hot", "cold"), TaskItem("t", "big", "small")]
    assert few_shot_text(examples, "old") == "hot => cold\n###\nbig => small\n###\nold =>"
    assert few_shot_text([], "old") == "old =>"


def test_accuracy_counts_exact_answers_by_task_and_examples() -> None:
    items = [TaskItem(task, f"{task}{i}", str(i)) for task in ("one", "two") for i in range(10)]
    prompts: list[str] = []

    def answer(path: str, body: dict[str, Any]) -> Any:
        assert (path, body["temperature"], body["stop"]) == ("/v1/completions", 0, ["\n###\n"])
        assert body["max_tokens"] == 7, "a space, a digit and what ends it"
        *examples, query = body["prompt"].split("\n###\n")
        prompts.append(body["prompt"])
        query = query.removesuffix(" =>")
        assert all(example.split(" => ")[0] != query for example in examples), "the answer is not given away"
        is_right = len(examples) == 3 or (query.startswith("two") and examples)
        return {"choices": [{"text": f" {query[3:]} " if is_right else " no"}]}

    found = few_shot_accuracy(Fake(answer), few_shot_questions(items, items, [0, 1, 3]))
    assert found == {"one": {0: 0.0, 1: 0.0, 3: 1.0}, "two": {0: 0.0, 1: 1.0, 3: 1.0}}
    assert len(set(prompts)) == len(prompts) == 60
    assert few_shot_table(found)[-1].split() == ["mean", "0.0%", "50.0%", "100.0%"]


def test_a_task_with_too_few_examples_is_named() -> None:
    items = [TaskItem("one", str(i), "x") for i in range(4)]
    with pytest.raises(ValueError, match=r"task one has 3 other examples; 4 are needed \(--examples\)"):
        few_shot_questions(items, items, [0, 4])


def test_an_answer_that_would_be_cut_is_named() -> None:
    items = [TaskItem("one", "a", "x\n###\ny"), TaskItem("one", "b", "y")]
    with pytest.raises(ValueError, match=r"task one, input 'a': an answer ends at .*, which its output holds"):
        few_shot_questions(items, items, [0])


@pytest.mark.parametrize(
    ("tokenized", "choice", "message"),
    [
        ({"tokens": [1, 2]}, {}, "POST nowhere/tokenize: the answer lacks tokens or max_model_len"),
        ([], {}, "POST nowhere/tokenize: the answer lacks tokens or max_model_len"),
        ({"tokens": [1, 2, 3], "max_model_len": 9}, {"logprobs": None}, "logprobs of 3 tokens was asked for, 0 came"),
        (
            {"tokens": [1, 2, 3], "max_model_len": 9},
            {"logprobs": {"token_logprobs": [-1.0]}},
            "POST nowhere/v1/completions: echo with logprobs of 3 tokens was asked for, 1 came",
        ),
    ],
)
def test_a_server_that_answers_something_else_is_not_believed(tokenized: Any, choice: Any, message: str) -> None:
    served = Fake(lambda path, _: tokenized if path == "/tokenize" else {"choices": [choice]})
    with pytest.raises(ValueError, match=re.escape(message)):
        perplexity(served, "x y z")


@pytest.mark.parametrize(
    "line",
    ['{"input": "a"}', '{"input": "a", "output": 3}', '{"input": "a", "output": "b", "extra": "c"}', "[1]", "{"],
)
def test_lines_that_are_no_items(tmp_path: Path, line: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(f'{{"input": "a", "output": "b"}}\n{line}\n', encoding="utf-8")
    expected = 'expected an object of the texts "input", "output" and perhaps "task"'
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}, line 2: {expected}, got {line!r}')}$"):
        read_items(path)


def test_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    item = '{"input": "a", "output": "b"}'
    path.write_bytes(b"\xef\xbb\xbf" + f"{item}\r\n\r\n{item}\n \n{{".encode())
    with pytest.raises(ValueError, match="line 5: expected an object"):
        read_items(path)
    path.write_bytes(path.read_bytes()[:-1])
    assert read_items(path) == [("all", "a", "b")] * 2


def test_what_can_not_be_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latin, empty = tmp_path / "latin.txt", tmp_path / "empty.jsonl"
    latin.write_bytes("Märchen".encode("latin-1"))
    empty.write_text("", encoding="utf-8")
    for arguments, expected in (
        ([], "nothing to evaluate: give --text, --few-shot or both"),
        (["--text", latin], f"{latin} is not UTF-8: "),
        (["--few-shot", empty], f"{empty} holds no items"),
        (["--text", latin, "--json", tmp_path / "no" / "x"], f"--json {tmp_path}/no/x: there is no such directory"),
        (["--text", empty, "--shots", "1"], "--examples and --shots are for --few-shot"),
        (["--few-shot", empty, "--shots", "-1"], "--shots -1: examples can't be fewer than none"),
        (["--text", empty, "--url", "http://127.0.0.1:9", "--model", "m"], "POST http://127.0.0.1:9/tokenize: "),
        (["--text", empty, "--url", "http://127.0.0.1:9", "--dtype", "int8"], "--dtype and --device say how a server is"),
    ):
        assert main(["evaluate", *map(str, arguments)]) == 2
        assert f"banded: {expected}" in capsys.readouterr().err
