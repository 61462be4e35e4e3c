"""The command line: one line and status 2 for what the user can fix, and commands on a tiny checkpoint."""

import io
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import kernels.torch_ops
from model.checkpoint.weights import load_model, save_model
from service.cli import main
from service.jobs.runner import Jobs
from service.jobs.store import Store
from service.settings import Settings
from tests.demand import needs_vnni
from tests.model.checkpoint.checkpoints import tiny


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Settings are the defaults, with any free port and plain PyTorch; log level and signal handler are restored."""
    for name in [name for name in os.environ if name.startswith("BANDED_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("BANDED_PORT", "0")
    monkeypatch.setenv("BANDED_COMPILE", "0")
    level, handler = logging.getLogger().level, signal.getsignal(signal.SIGTERM)
    yield
    logging.getLogger().setLevel(level)
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("banded", tmp_path_factory.mktemp("model"), vocab_size=50257)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a command prints before it ends with status 2."""
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if " INFO " not in line]
    assert line.startswith("banded: ")
    return line.removeprefix("banded: ")


def make(directory: Path, **files: object) -> Path:
    """A model directory of these files, JSON unless they are text."""
    directory.mkdir()
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name.replace("__", ".")).write_text(text)
    return directory


GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 64, "n_embd": 8, "n_layer": 1, "n_head": 1}


def test_directories_that_are_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_file = tmp_path / "file"
    a_file.write_text("hello")
    empty = make(tmp_path / "empty")
    for directory, message in {
        tmp_path / "nowhere": "no such directory",
        a_file: "is a file; a model is a directory with config.json and model.safetensors",
        empty: "holds no config.json",
        make(tmp_path / "text", config__json="hello"): "can't be read as JSON",
        make(tmp_path / "list", config__json=[1]): "must hold a JSON object, got list",
        make(tmp_path / "llama", config__json={"model_type": "llama"}): "model_type 'llama' is not supported, only",
        make(tmp_path / "bare", config__json=GPT2): "holds neither model.safetensors nor model.safetensors.index.json",
        make(
            tmp_path / "pickle", config__json=GPT2, pytorch_model__bin="x"
        ): "to make a model of pytorch_model.bin: banded convert",
        make(tmp_path / "cut", config__json=GPT2, model__safetensors="x"): "can't be read as safetensors",
    }.items():
        for command in (("serve",), ("complete", "hello"), ("doctor",)):
            line = refused(capsys, *command, "--model", directory)
            assert line.startswith(str(directory))
            assert message in line


def test_a_vocabulary_that_does_not_suit_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "complete", "hello", "--model", tiny("banded", tmp_path))
    assert line == f"{tmp_path / 'banded'}: config.json: vocab_size is 331, r50k_base needs 50257"


NO_GPU = "device cuda: PyTorch sees no GPU here; use --device cpu, or install a CUDA build of torch"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--device", "cuda"], NO_GPU),
        (["serve", "--device", "tpu"], "device: Input should be 'auto', 'cpu' or 'cuda'"),
        (["serve", "--metrics-alias", "tgi"], "metrics_alias: Input should be 'vllm'"),
        (["doctor", "--device", "cuda"], NO_GPU),
        (["serve", "--dtype", "int4"], "dtype: Input should be 'auto', 'float32', 'bfloat16', 'float16' or 'int8'"),
        (["serve", "--port", "70000"], "port: Input should be less than or equal to 65535"),
        (["serve", "--port", "-1"], "port: Input should be greater than or equal to 0"),
        (
            ["serve", "--host", "0.0.0.0"],
            "host 0.0.0.0 can be reached from outside: set BANDED_API_KEYS, or say --allow-unauthenticated",
        ),
        (
            ["complete", "a", "--device", "cuda"],
            NO_GPU,
        ),
        (["complete", "a", "--max-tokens", "-1"], "'max_tokens': must be at least 0, got -1"),
        (["complete", "a", "--temperature", "2.5"], "'temperature': must be from 0 to 2, got 2.5"),
        (["complete", "a", "--temperature", "nan"], "'temperature': must be from 0 to 2, got nan"),
        (["complete", "a", "--top-p", "-0.5"], "'top_p': must be from 0 to 1, got -0.5"),
        (["complete", "a", "--seed", str(2**63)], f"'seed': must be from {-(2**63)} to {2**63 - 1}, got {2**63}"),
    ],
)
def test_options_out_of_range(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, *arguments) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "FILE", "--out", "OUT", "--size", "gpt4"], "there is no size 'gpt4', only demo, gpt3-125m, "),
        (["train", "FILE", "--out", "OUT", "--init", "MODEL", "--size", "gpt4"], "there is no size 'gpt4', only demo, "),
        (["train", "FILE", "--out", "OUT", "--device", "cuda"], NO_GPU),
        (["train", "FILE", "--out", "OUT"], "the corpus has 3 tokens; at least 2049 are needed"),
        (
            ["train", "FILE", "--out", "OUT", "--window", "4096"],
            "a window of 4096 tokens is longer than the model's 2048 positions",
        ),
        (["train", "FILE", "--out", "OUT", "--tokens", "100"], "a batch of 4096 tokens does not fit training on 100"),
        (
            ["train", "FILE", "--out", "MODEL", "--init", "MODEL", "--tokens", "5000"],
            "MODEL holds model.safetensors, but no ",
        ),
        (["finetune", "JSONL", "--out", "OUT", "--device", "cuda"], NO_GPU),
        (["finetune", "FILE", "--out", "OUT"], "tales.txt, line 1: not JSON: "),
        (
            ["finetune", "JSONL", "--out", "OUT", "--full", "--rank", "8"],
            "--full changes all weights: --rank and --targets ",
        ),
        (["finetune", "JSONL", "--out", "OUT", "--targets", "wte"], "targets must be some of c_attn, c_proj, c_fc, got wte"),
        (
            ["finetune", "JSONL", "--out", "MODEL", "--model", "MODEL"],
            "MODEL holds model.safetensors, but no training run: ",
        ),
    ],
)
def test_training_that_can_not_be(
    arguments: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tales.txt").write_text("a king" if "--init" not in arguments else "a king " * 500, encoding="utf-8")
    (tmp_path / "data.jsonl").write_text('{"prompt": "a =>", "completion": " b"}\n', encoding="utf-8")
    paths = {"FILE": "tales.txt", "OUT": "out", "JSONL": "data.jsonl"}
    places = {name: str(tmp_path / path) for name, path in paths.items()} | {"MODEL": str(checkpoint)}
    line = refused(capsys, *(places.get(argument, argument) for argument in arguments))
    assert line.startswith(message.replace("MODEL", places["MODEL"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "f", "--out", "o", "--tokens", "inf"], "argument --tokens: must be a positive number, got inf"),
        (["train", "f", "--out", "o", "--learning-rate", "0"], "argument --learning-rate: must be a positive number, got 0"),
        (["train", "f", "--out", "o", "--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["finetune", "f", "--out", "o", "--learning-rate", "-1"], "argument --learning-rate: must be a positive number, "),
        (["plan", "--train-tflops", "0"], "argument --train-tflops: must be a positive number, got 0"),
    ],
)
def test_numbers_that_mean_nothing(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_train_then_finetune_all_weights_then_complete(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, examples = tmp_path / "tales.txt", tmp_path / "data.jsonl"
    corpus.write_text("a king had a golden bird " * 100, encoding="utf-8")
    examples.write_text('{"prompt": "a =>", "completion": " b"}\n' * 4, encoding="utf-8")
    card = checkpoint / "banded.json"
    card.write_text('{"separator": " ; "}')
    trained, tuned = tmp_path / "trained", tmp_path / "tuned"
    sizes = "--tokens 2000 --window 64 --learning-rate 0.01 --batch-tokens 128 --micro-tokens 128"
    options = ["--init", str(checkpoint), *sizes.split()]
    assert main(["train", str(corpus), "--out", str(trained), "--valid", str(corpus), *options]) == 0
    shown = capsys.readouterr().out
    assert re.fullmatch(r"held-out perplexity \d+\.\d\d over 602 tokens\n", shown)
    assert float(shown.split()[2]) < 100
    assert main(["train", str(corpus), "--out", str(trained), *options[:-1], "64", "--resume"]) == 2
    assert "is the state of another run: micro_tokens 64, not 128" in capsys.readouterr().err
    data = [str(examples), "--valid", str(examples)]
    assert main(["finetune", *data, "--model", str(trained), "--out", str(tuned), "--full", "--learning-rate", "0.01"]) == 0
    before, after = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines())
    assert after < before - 1
    assert (tuned / "banded.json").read_text() == card.read_text()
    card.unlink()
    assert main(["complete", "a =>", "--model", str(tuned), "--max-tokens", "3", "--dtype", "float32"]) == 0
    assert capsys.readouterr().out.startswith("a =>")


def test_the_environment_is_read_and_checked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("BANDED_MODEL", "/nowhere")
    assert refused(capsys, "serve") == "/nowhere: no such directory"
    monkeypatch.setenv("BANDED_MAX_SLOTS", "many")
    assert refused(capsys, "serve").startswith("max_slots: Input should be a valid integer")
    monkeypatch.setenv("BANDED_MAX_SLOTZ", "3")
    assert refused(capsys, "serve").startswith("BANDED_MAX_SLOTZ: no such setting; there are model, ")


def test_serve_hands_on_every_setting_of_the_application(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Enough(Exception):
        pass

    def create_app(models: object, metrics: object, settings: Settings, jobs: Jobs) -> None:
        raise Enough(settings, jobs)

    monkeypatch.setattr("service.api.app.create_app", create_app)
    given = {"api_keys": "a,b", "limit_requests": "5", "limit_tokens": "6", "max_body_bytes": "7", "cors_origins": "*"}
    kept = {"data_dir": str(tmp_path / "data"), "max_adapters": "3"}
    for name, value in {**given, **kept, "open_metrics": "1"}.items():
        monkeypatch.setenv(f"BANDED_{name.upper()}", value)
    with pytest.raises(Enough) as caught:
        main(["serve", "--port", "0", "--model", str(checkpoint), "--lenient", "--metrics-alias", "vllm"])
    settings, jobs = caught.value.args
    assert jobs.store.directory == tmp_path / "data"
    Store(tmp_path / "data").close()  # a failed start leaves the directory to others
    expected = {
        "max_adapters": 3,
        "api_keys": ("a", "b"),
        "open_metrics": True,
        "limit_requests": 5,
        "limit_tokens": 6,
        "max_body_bytes": 7,
        "cors_origins": ("*",),
        "lenient": True,
        "metrics_alias": "vllm",
    }
    assert {name: getattr(settings, name) for name in expected} == expected


def test_complete_listens_nowhere_so_the_address_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BANDED_HOST", "0.0.0.0")
    assert refused(capsys, "complete", "a", "--model", "/nowhere") == "/nowhere: no such directory"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["serve", "--port", "http"], "argument --port: invalid int value: 'http'"),
        (["complete"], "the following arguments are required: prompt"),
        (["dance"], "argument COMMAND: invalid choice: 'dance'"),
        (["serve", "--prot", "1"], "unrecognized arguments: --prot 1"),
    ],
)
def test_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_kv_budget_too_small_for_one_sequence(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BANDED_KV_BYTES", "1000")
    line = refused(capsys, "serve", "--model", checkpoint)
    assert line.startswith("kv_bytes is 1000, but one sequence of 256 tokens needs ")


def test_a_foreign_package_of_our_name_is_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "kernels" / "__init__.py"))
    message = f"the package 'kernels' in {tmp_path / 'kernels'} is not Banded's; use an environment of its own"
    assert refused(capsys, "serve") == message


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ("Once upon", 255, "257 tokens (2 in the prompt, 255 for the completion)"),
        (" a" * 300, 1, "301 tokens (300 in the prompt, 1 for the completion): the prompt is too long"),
    ],
)
def test_complete_refuses_more_than_the_context(
    prompt: str, max_tokens: int, message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, "complete", prompt, "--model", checkpoint, "--max-tokens", max_tokens)
    assert line == f"This model's maximum context length is 256 tokens, but the request asks for {message}"


class Written(io.StringIO):
    """Standard output that remembers every piece."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return super().write(text)


def test_complete_prints_the_text_as_it_comes(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", stdout := Written())
    options = {"--model": str(checkpoint), "--dtype": "float32", "--max-tokens": "20", "--seed": "3"}
    command = ["complete", "Once upon", *(word for option in options.items() for word in option)]
    assert main(command) == 0
    once = stdout.getvalue()
    assert stdout.pieces[0] == "Once upon"
    assert len([piece for piece in stdout.pieces if piece.strip()]) > 10
    assert once.endswith("\n")
    assert main(command) == 0
    assert stdout.getvalue() == once + once  # same seed, same text


def table(out: str) -> dict[str, list[str]]:
    """The rows of the doctor's table, by their first column."""
    return {name: cells for name, *cells in (line.split() for line in out.split("\n\n")[1].splitlines()[1:])}


def test_the_doctor_prints_a_row_for_each_kind(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", str(checkpoint), "--dtype", "float32"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(
        "banded, float32: PyTorch on CPU, against the reference\n"
        "logits of the last 64 of 215 random tokens, standard deviation 1.62\n\n"
        "kernels    max |Δ logit|  of the deviation\n"
        "dense     "
    )
    rows = table(out)
    assert list(rows) == ["dense", "banded", "pointwise", "all", "limit"]
    assert rows["limit"] == ["0.00162", "0.1%"]
    assert all(float(error) < 1e-4 for error, _ in list(rows.values())[:-1])


@needs_vnni
def test_the_doctor_holds_int8_to_the_same_integers(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", str(checkpoint), "--dtype", "int8"]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("banded, int8: PyTorch on CPU, against the reference\n")
    assert float(table(out)["all"][0]) > 0


def test_the_doctor_names_wrong_kernels(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels.torch_ops, "add_layernorm", lambda x, *rest: (x, x))
    assert main(["doctor", "--model", str(checkpoint), "--dtype", "float32"]) == 1
    out, err = capsys.readouterr()
    rows = table(out)
    assert float(rows["dense"][0]) < 1e-4
    for line, kind in zip(err.splitlines(), ("pointwise", "all"), strict=True):
        error, share = rows[kind]
        assert line == (
            f"banded: kernels of kind {kind}: max |Δ logit| {error} is {share} of the logits' standard deviation 1.62, "
            "the limit for float32 is 0.1%"
        )


def test_the_doctor_on_the_interpreted_triton_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BANDED_KERNELS", "triton")
    directory = tiny("banded", tmp_path, vocab_size=50257, n_layer=1, n_positions=90)
    assert main(["doctor", "--model", str(directory), "--dtype", "float32"]) == 0
    assert capsys.readouterr().out.startswith("banded, float32: Triton, interpreted on CPU, against the reference\n")


def test_serve_with_the_doctor_refuses_wrong_kernels(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels.torch_ops, "add_layernorm", lambda x, *rest: (x, x))
    line = refused(capsys, "serve", "--doctor", "--model", checkpoint, "--dtype", "float32")
    assert line.startswith("doctor: kernels of kind pointwise: max |Δ logit| ")
    assert line.endswith("of the logits' standard deviation 1.62, the limit for float32 is 0.1%")


def test_the_doctor_has_nothing_to_compare_with_where_weights_overflow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tiny("banded", tmp_path, vocab_size=50257)
    model = load_model(directory, torch.float32)
    with torch.no_grad():
        model.wte.weight.fill_(60_000)
        model.wpe.weight.fill_(60_000)
    save_model(directory, model, torch.float32)
    line = refused(capsys, "doctor", "--model", directory, "--dtype", "float16")
    assert line == "the reference's logits are not finite: the weights are not, or too large for float16"


def test_a_full_disk_has_a_status_of_its_own(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """safetensors raises an error of its own, which tells the system's only in words."""
    examples = tmp_path / "examples.jsonl"
    examples.write_text('{"prompt": "a", "completion": " b"}\n' * 3)

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("model.checkpoint.weights.save_file", full)
    command = ["finetune", examples, "--model", checkpoint, "--out", tmp_path / "out", "--epochs", 1]
    assert main([str(argument) for argument in command]) == os.EX_TEMPFAIL
    assert "banded: [Errno 28] No space left on device: " in capsys.readouterr().err
