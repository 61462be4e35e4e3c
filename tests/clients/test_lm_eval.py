"""lm-evaluation-harness, unmodified, against a real server: its scores next to those of its own transformers backend.

It is given a model's name and a URL, nothing else: it finds the server's tokenizer by itself (/tokenizer_info, /tokenize),
sends token ids with echo, logprobs 1 and max_tokens 1, and cuts long texts into windows for a context of 2048 tokens.

By hand, from the root of the repository:

    lm_eval run --model local-completions --model_args model=NAME,base_url=http://localhost:8000/v1/completions \
        --tasks habitats,lamps --include_path tests/clients/lm_eval_tasks
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.checkpoint.tokenizer import END_OF_TEXT, GPT2_PATTERN, R50K_FILE
from tests.conformance import contract
from tests.model.checkpoint.checkpoints import tiny
from tests.serving import Served, banded_serve

ROOT = Path(__file__).parent.parent.parent
TASK_FILES = ROOT / "tests/clients/lm_eval_tasks"
TASKS = ["habitats", "bare", "lamps", "going_on"]

# lm-eval and what it imports warn about themselves.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A GPT-Neo, so that transformers reads the same weights."""
    folder = tmp_path_factory.mktemp("lm-eval")
    layers: dict[str, Any] = {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 100}
    checkpoint = tiny("gpt_neo", folder, vocab_size=50257, max_position_embeddings=2048, **layers)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"eos_token_id": 50256}))
    with banded_serve(checkpoint, folder / "log") as server:
        yield server


def evaluate(model: Any, names: list[str] = TASKS, **fields: Any) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(TASK_FILES), include_defaults=False)
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=model, tasks=names, task_manager=tasks, log_samples=True, bootstrap_iters=0, **fields
    )
    return found


def transformers_backend(checkpoint: Path) -> Any:
    """lm-eval's `hf` model on the same weights, with a tokenizer made from the same ranks."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter = TikTokenConverter(vocab_file=str(R50K_FILE), pattern=GPT2_PATTERN, extra_special_tokens=[END_OF_TEXT])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=converter.converted(), eos_token=END_OF_TEXT)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    # 2048 less the token that the completions client generates and the one before each window.
    return HFLM(pretrained=model, tokenizer=tokenizer, max_length=2046, batch_size=1, device="cpu")


@pytest.fixture(scope="module")
def results(server: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The results of the server and of transformers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the task files name their data from there
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("huggingface")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield evaluate("local-completions", model_args=given(server)), evaluate(transformers_backend(server.checkpoint))


def given(server: Served) -> dict[str, Any]:
    return {"model": server.checkpoint.name, "base_url": f"{server.url}/v1/completions"}


def responses(found: dict[str, Any], task: str) -> list[Any]:
    """The model's answers, request by request."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [response for sample in samples for response in sample["filtered_resps"]]


@contract("clients", "lm-eval local-completions", "log likelihoods, with worked examples and with an empty context")
@pytest.mark.parametrize("task", ["habitats", "bare"])
def test_log_likelihoods(task: str, results: tuple[dict[str, Any], dict[str, Any]]) -> None:
    ours, theirs = (responses(found, task) for found in results)
    assert len(ours) == len(theirs) == 18
    for (logprob, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert float(logprob) == pytest.approx(float(expected), abs=1e-4)
        assert str(greedy) == str(expected_greedy)


@contract("clients", "lm-eval local-completions", "is_greedy, of continuations that are greedy, and greedy only at first")
@pytest.mark.usefixtures("results")  # for their environment
def test_is_greedy(server: Served) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    def instances(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Any]:
        return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]

    theirs, ours = transformers_backend(server.checkpoint), LocalCompletionsAPI(**given(server))
    contexts = [f"Where does {animal} live?\nAnswer:" for animal in ("a camel", "a whale", "a mole", "a polar bear")]
    three_tokens = {"until": [], "max_gen_toks": 3, "do_sample": False}
    greedy = theirs.generate_until(instances("generate_until", [(context, dict(three_tokens)) for context in contexts]))
    pairs = [*zip(contexts, greedy, strict=True)]
    pairs += [(context, f"{continuation} and so on") for context, continuation in pairs]

    found, expected = (model.loglikelihood(instances("loglikelihood", pairs)) for model in (ours, theirs))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected] == [True] * 4 + [False] * 4
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in expected], abs=1e-4)


@contract("clients", "lm-eval local-completions", "several prompts in a request, and several requests at once")
def test_batches(server: Served, results: tuple[dict[str, Any], dict[str, Any]]) -> None:
    together = evaluate(
        "local-completions", ["habitats", "going_on"], model_args=given(server) | {"batch_size": 4, "num_concurrent": 2}
    )
    alone = results[0]
    for (logprob, greedy), (expected, expected_greedy) in zip(
        responses(together, "habitats"), responses(alone, "habitats"), strict=True
    ):
        assert float(logprob) == pytest.approx(float(expected), abs=1e-4)
        assert str(greedy) == str(expected_greedy)
    assert responses(together, "going_on") == responses(alone, "going_on")


@contract("clients", "lm-eval local-completions", "rolling likelihoods of texts longer than the context")
def test_rolling_likelihoods(server: Served, results: tuple[dict[str, Any], dict[str, Any]]) -> None:
    texts = [json.loads(line)["text"] for line in (TASK_FILES / "lamps.jsonl").read_text().splitlines()]
    lengths = [httpx.post(f"{server.url}/tokenize", json={"prompt": text}).json()["count"] for text in texts]
    assert max(lengths) > 2048, "no text is cut into windows"
    ours, theirs = (responses(found, "lamps") for found in results)
    assert len(ours) == 4
    for logprob, expected in zip(ours, theirs, strict=True):
        assert float(logprob) == pytest.approx(float(expected), rel=1e-7, abs=1e-4)


@contract("clients", "lm-eval local-completions", "greedy generation with stop strings")
def test_generation(results: tuple[dict[str, Any], dict[str, Any]]) -> None:
    ours, theirs = (responses(found, "going_on") for found in results)
    assert ours == theirs
    assert len(set(ours)) > 1


@contract("clients", "lm-eval local-completions", "the metrics of its tables are those of its transformers backend")
def test_the_metrics_are_equal(results: tuple[dict[str, Any], dict[str, Any]]) -> None:
    ours, theirs = (found["results"] for found in results)
    for task in TASKS:
        for metric, value in theirs[task].items():
            if isinstance(value, float):
                assert ours[task][metric] == pytest.approx(value, rel=1e-6), (task, metric)
                print(f"{task:10} {metric:28} banded {ours[task][metric]:.8g}  transformers {value:.8g}")
