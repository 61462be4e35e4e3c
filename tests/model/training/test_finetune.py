"""Fine-tuning: completions are learnt, prompts are not, and files that can't be used are refused by line."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import model.training.finetune
import model.training.run
from kernels import torch_ops
from model.attention import TrainingAttention
from model.checkpoint.tokenizer import Tokenizer, r50k_base
from model.checkpoint.weights import load_model
from model.config import GPTConfig
from model.gpt import GPT
from model.lora import AdapterConfig, adapt_all, load_adapter
from model.training.data import tokens_of
from model.training.examples import IGNORED, Encoded, TrainingExample, advice, encode, read_examples
from model.training.finetune import completion_loss, finetune, finetuning_plan, padded
from model.training.records import CURVE_FILE, read_curve, write_curve
from model.training.trainer import next_token_loss

CONFIG = GPTConfig(
    vocab_size=50257,
    n_positions=32,
    n_embd=32,
    n_layer=2,
    n_head=2,
    n_inner=64,
    attention=("dense", "banded"),
    band=8,
)
COLOURS = ["red", "blue", "green", "white"]
DOES = ["sings", "sleeps", "eats"]


def numbered(*examples: tuple[str, str]) -> list[TrainingExample]:
    return [TrainingExample(prompt, completion, line) for line, (prompt, completion) in enumerate(examples, 1)]


EXAMPLES = numbered(*((f"the {colour} bird {does} =>", f" {colour}") for colour in COLOURS for does in DOES))
HELD_OUT = numbered(*((f"the {colour} bird flies =>", f" {colour}") for colour in COLOURS))
PAIRS = [(prompt, completion) for prompt, completion, _ in EXAMPLES]


def make_model() -> GPT:
    model = GPT(CONFIG)
    model.init_weights(0)
    with torch.no_grad():
        model.wte.weight *= 3  # as large as training makes it, which an adapter can't do
    return model


def encoded(examples: list[TrainingExample]) -> list[Encoded]:
    return list(encode(examples, r50k_base(), CONFIG.n_positions))


@pytest.mark.parametrize("adapter", [AdapterConfig(4, 8.0), None])
def test_held_out_examples_are_learnt(tmp_path: Path, adapter: AdapterConfig | None) -> None:
    model, held_out = make_model(), encoded(HELD_OUT)
    before = completion_loss(model, held_out)
    plan = finetuning_plan(encoded(EXAMPLES), epochs=80, batch=4, learning_rate=2e-2)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    after = finetune(tmp_path, model, encoded(EXAMPLES), plan, base="fp", adapter=adapter, held_out=held_out)
    assert after is not None
    assert after < before / 4
    rows = read_curve(tmp_path / CURVE_FILE)
    assert len(rows) == 12 * 80 / 4
    assert rows[-1].held_out_loss == pytest.approx(after)
    same = [torch.equal(p, weights[name]) for name, p in model.named_parameters()]
    if adapter is None:
        assert not any(same)
        assert completion_loss(load_model(tmp_path, torch.float32), held_out) == pytest.approx(after, rel=0.05)
    else:
        assert all(same), "the shared model does not change"
        adapt = adapt_all(load_adapter(tmp_path, model))
        assert completion_loss(model, held_out, adapt) == pytest.approx(after, rel=1e-5)


def test_it_goes_on_where_it_stopped_and_with_nothing_else(tmp_path: Path) -> None:
    plan = finetuning_plan(encoded(EXAMPLES), epochs=3, batch=5, learning_rate=1e-2)
    options: dict[str, Any] = {"base": "fp", "adapter": AdapterConfig(2, 4.0)}
    finetune(tmp_path / "whole", make_model(), encoded(EXAMPLES), plan, **options)

    writes = iter((write_curve, write_curve))

    with pytest.MonkeyPatch.context() as patch:
        # It saves after every update. This is as if the power had failed in the third one.
        patch.setattr(model.training.run, "write_curve", lambda *curve: next(writes)(*curve))
        with pytest.raises(StopIteration):
            finetune(tmp_path / "parts", make_model(), encoded(EXAMPLES), plan, **options, save_every=0.0)
    with pytest.raises(ValueError, match=r"is the state of another run: examples .*, not "):
        finetune(tmp_path / "parts", make_model(), encoded(EXAMPLES[1:]), plan, **options, resume=True)
    finetune(tmp_path / "parts", make_model(), encoded(EXAMPLES), plan, **options, resume=True)
    whole, parts = ((tmp_path / name / "adapter.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_what_is_computed_at_a_time_has_a_limit_and_changes_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = encoded(EXAMPLES)
    longest = max(len(example.inputs) for example in some)
    sizes = set()

    def curve(name: str) -> list[float]:
        plan = finetuning_plan(some, epochs=2, batch=9, learning_rate=1e-3)
        sizes.add(plan.micro_batch)
        finetune(tmp_path / name, make_model(), some, plan, base="fp", adapter=AdapterConfig(2, 4.0))
        return [row.loss for row in read_curve(tmp_path / name / CURVE_FILE)]

    whole = curve("whole")
    monkeypatch.setattr(model.training.finetune, "MICRO_TOKENS", 4 * longest)
    assert curve("parts") == pytest.approx(whole, rel=1e-3)
    assert len(whole) == 3, "24 examples: two batches of 9 and the rest"
    assert sizes == {4096 // longest, 4}


def test_the_prompt_is_read_and_not_learnt() -> None:
    tokenizer = r50k_base()
    (example,) = encode(numbered(("one two =>", " three four")), tokenizer, 32)
    prompt, completion = tokenizer.encode("one two =>"), tokenizer.encode(" three four")
    assert example.inputs == [*prompt, *completion]
    assert example.targets == [IGNORED] * (len(prompt) - 1) + [*completion, tokenizer.eos_id]
    (empty,) = encode(numbered(("", "x")), tokenizer, 32)
    assert empty.inputs == [tokenizer.eos_id, *tokenizer.encode("x")]


def test_a_tokenizer_without_end_of_text_ends_completions_with_nothing() -> None:
    tokenizer = Tokenizer({byte: bytes([byte]) for byte in range(256)}, range(256), special={}, added={}, eos_id=None)
    assert list(encode(numbered(("ab", "cd")), tokenizer, 32)) == [([97, 98, 99], [IGNORED, 99, 100])]
    with pytest.raises(
        ValueError, match="line 1: an empty prompt needs a token that starts a document, and the model has none"
    ):
        list(encode(numbered(("", "x")), tokenizer, 32))


def test_tokens_that_the_model_has_no_row_for_are_not_learnt() -> None:
    tokens = {byte: bytes([byte]) for byte in range(256)} | {300: b"<tool>"}
    tokenizer = Tokenizer(tokens, range(256), special={}, added={"<tool>": 300}, eos_id=0, num_rows=256)
    for example in (("a<tool>", "b"), ("a", "<tool>b")):
        with pytest.raises(ValueError, match="line 2: '<tool>' is token 300, but the model's ids end at 255"):
            list(encode(numbered(("a", "b"), example), tokenizer, 32))
    with pytest.raises(ValueError, match="'<tool>' is token 300, but the model's ids end at 255"):
        tokens_of("a<tool>", tokenizer)


def test_padding_changes_no_loss() -> None:
    model = make_model()
    some = encoded(
        [EXAMPLES[0], TrainingExample("a much longer prompt than the other ones are =>", " yes and no", 2), EXAMPLES[5]]
    )
    one_by_one = sum(
        completion_loss(model, [example]) * sum(target != IGNORED for target in example.targets) for example in some
    )
    count = sum(target != IGNORED for example in some for target in example.targets)
    assert completion_loss(model, some) == pytest.approx(one_by_one / count, rel=1e-5)
    inputs, targets = padded(some, torch.device("cpu"))
    with torch.no_grad():
        assert next_token_loss(model, inputs, targets).item() == pytest.approx(one_by_one / count, rel=0.01)
        hidden = model(inputs, torch.arange(inputs.shape[1]), TrainingAttention(CONFIG), torch_ops)
    assert hidden.isfinite().all()


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def read(path: Path) -> list[TrainingExample]:
    return list(read_examples(io.BytesIO(path.read_bytes()), path.name))


GOOD: dict[str, Any] = {"prompt": "a =>", "completion": " b"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "data.jsonl, line 2: not JSON: "),
        ([1], 'data.jsonl, line 2: expected an object of "prompt" and "completion", got \'[1]\''),
        ({"prompt": "a"}, 'data.jsonl, line 2: expected an object of "prompt" and "completion", got '),
        ({**GOOD, "weight": 1}, 'data.jsonl, line 2: expected an object of "prompt" and "completion", got '),
        ("[" * 10_000, "data.jsonl, line 2: not JSON: "),
        ({**GOOD, "prompt": 5}, "data.jsonl, line 2: prompt must be a text, got 5"),
        ({**GOOD, "completion": None}, "data.jsonl, line 2: completion must be a text, got None"),
        ({**GOOD, "completion": ""}, "data.jsonl, line 2: the completion is empty"),
    ],
)
def test_lines_that_are_no_examples(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        read(write(tmp_path / "data.jsonl", GOOD, line, GOOD))


def test_a_line_ends_where_json_lines_end(tmp_path: Path) -> None:
    example = {"prompt": "a\u2028b =>", "completion": " c\x85"}
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(example, ensure_ascii=False) + "\n" + json.dumps(GOOD) + "\n", encoding="utf-8")
    assert read(path) == numbered(("a\u2028b =>", " c\x85"), ("a =>", " b"))


def test_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path: Path) -> None:
    """As editors and spreadsheets on Windows write them. The lines keep their numbers."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{json.dumps(GOOD)}\r\n\r\n \t\n{json.dumps(GOOD)}\n\n".encode())
    assert read(path) == [TrainingExample(**GOOD, line=1), TrainingExample(**GOOD, line=4)]
    assert "leave out what stands there before: line 4" in advice(read(path))
    path.write_bytes(path.read_bytes() + b"\n{")
    with pytest.raises(ValueError, match=r"data\.jsonl, line 7: not JSON: "):
        read(path)


def test_files_that_hold_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.jsonl holds no examples"):
        read(write(tmp_path / "data.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "Märchen"'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.jsonl is not UTF-8"):
        read(tmp_path / "latin.jsonl")


def test_examples_longer_than_the_context_are_named() -> None:
    long = ("word " * 40, " end")
    with pytest.raises(ValueError, match="the model's context is 32 tokens; longer, up to 42: lines 2, 4"):
        encoded(numbered(PAIRS[0], long, PAIRS[1], long))


def test_good_examples_need_no_advice() -> None:
    assert advice(EXAMPLES) == []
    assert advice(numbered(("", " a tale\n"), ("", " another tale\n"))) == []


@pytest.mark.parametrize(
    ("examples", "line"),
    [
        (
            [*PAIRS, ("no separator", " x")],
            'end every prompt with the same separator, such as "\\n###\\n" or " =>"; unlike most: line 13',
        ),
        (
            [("a => b =>", " x"), ("c =>", " y")],
            "the separator ' =>' is inside the prompt too: line 1",
        ),
        (
            [*PAIRS, ("a =>", "x"), ("b =>", "y")],
            "begin every completion with a space, as words are tokens with one: lines 13, 14",
        ),
        (
            [("a =>", " one word"), ("b =>", " two words")],
            'end every completion with the same text, such as "\\n" or " END", to stop at',
        ),
        ([*PAIRS, *PAIRS[:7]], "leave out what stands there before: lines 13, 14, 15, 16, 17 and 2 more"),
    ],
)
def test_advice(examples: list[tuple[str, str]], line: str) -> None:
    assert line in advice(numbered(*examples))
