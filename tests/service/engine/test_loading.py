"""From a directory to a running engine. Its tokens equal those of transformers; what cannot be served is refused."""

import asyncio
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels import torch_ops
from kernels.cpu import compiled as cpu_compiled
from kernels.cpu.build import Shape
from kernels.names import KernelChoice
from model.config import SIZES
from service.engine import loading
from service.engine.loading import (
    LoadError,
    choose_device,
    choose_dtype,
    explained_weight,
    kernels_in_words,
    kv_budget,
    load_served,
    served_name,
)
from service.engine.metrics import Metrics
from service.engine.models import ModelEntry
from service.engine.options import EngineOptions
from service.engine.request import GenerationRequest, Prompt, SamplingParams
from service.engine.scheduler import MIN_CHUNK
from service.settings import Settings
from tests.demand import needs_vnni
from tests.model.checkpoint.checkpoints import tiny
from tests.service.helpers import settings_of


def served(directory: Path, metrics: Metrics | None = None, **settings: Any) -> ModelEntry:
    options = Settings(**{"model": str(directory), "dtype": "float32"} | settings).engine
    return load_served(options, metrics or Metrics("tiny")).base


def request(prompt: list[int], max_tokens: int, **params: Any) -> GenerationRequest:
    return GenerationRequest([Prompt(prompt)], SamplingParams(max_tokens=max_tokens, **{"ignore_eos": True} | params))


async def generate(model: ModelEntry, requests: list[GenerationRequest]) -> list[list[int]]:
    """The tokens of each request. All requests run at once."""

    async def tokens(request: GenerationRequest) -> list[int]:
        return [x async for step in model.engine.generate(request).outputs() for output in step for x in output.tokens]

    model.engine.start()
    async with asyncio.timeout(120):
        found = await asyncio.gather(*map(tokens, requests))
    await model.engine.stop()
    return found


def set_overlap(model: ModelEntry, overlap: bool) -> None:
    """Turn overlap on, as on a GPU, or off. Turn drafts off in both cases."""
    model.engine._steps._num_ahead, model.engine._scheduler.max_draft = int(overlap), 0


def test_a_ragged_batch_generates_what_transformers_does(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    directory = tiny("gpt_neo", tmp_path, vocab_size=50257, window_size=40)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(50257, (n,), generator=generator).tolist() for n in (1, 40, 64, 150, 200, 7)]
    # Few rows and small steps: sequences queue, chunks share steps with decode rows, and pages are released.
    model = served(directory, max_slots=4, step_tokens=48)
    ours = asyncio.run(generate(model, [request(prompt, 30, temperature=0.0) for prompt in prompts]))
    theirs = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32).eval()
    for prompt, tokens in zip(prompts, ours, strict=True):
        with torch.inference_mode():
            logits = theirs(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        assert tokens == logits.argmax(-1).tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("int8", marks=needs_vnni)])
def test_the_same_seed_gives_the_same_tokens_alone_and_in_a_batch(dtype: str, tmp_path: Path) -> None:
    directory = tiny("banded", tmp_path, vocab_size=50257, band=40)

    def seeded(seed: int) -> GenerationRequest:
        return request([seed] * (3 + 25 * seed), 20, temperature=0.9, top_p=0.95, seed=seed)

    # Small steps: each prompt is cut wherever a step runs out of room.
    model = served(directory, dtype=dtype, max_slots=8, step_tokens=70)
    together = asyncio.run(generate(model, [seeded(seed) for seed in range(8)]))
    assert len({tuple(tokens) for tokens in together}) == 8
    for seed in (3, 7):
        alone = asyncio.run(generate(served(directory, dtype=dtype, max_slots=8), [seeded(seed)]))
        assert alone[0] == together[seed]


@pytest.mark.parametrize(("overlap", "lengths"), [(False, (64, 1)), (True, (17, 1, 70))])
def test_the_triton_path_generates_what_the_cpu_does(overlap: bool, lengths: tuple[int, ...], tmp_path: Path) -> None:
    """The whole engine. Prompt lengths lie around the borders of bands and pages; chunks share steps with decode rows."""
    directory = tiny("banded", tmp_path, n_layer=2, vocab_size=50257, attention=("dense", "banded", "strided"), stride=32)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(50257, (n,), generator=generator).tolist() for n in lengths]
    tokens = []
    for kernels in ("auto", "triton"):
        model = served(directory, max_slots=2, step_tokens=40, kernels=kernels)
        set_overlap(model, overlap)
        tokens.append(asyncio.run(generate(model, [request(prompt, 4, temperature=0.0) for prompt in prompts])))
    assert tokens[0] == tokens[1]


def test_overlap_changes_no_token(tmp_path: Path) -> None:
    directory = tiny("banded", tmp_path, vocab_size=50257, band=40)

    def run(overlap: bool, ends: list[int | None]) -> list[list[int]]:
        model = served(directory, dtype="bfloat16", max_slots=3, step_tokens=40)
        set_overlap(model, overlap)
        requests = [
            request([seed] * (30 * seed + 1), 30, temperature=0.9, seed=seed, stop_token_ids=() if end is None else (end,))
            for seed, end in enumerate(ends)
        ]
        return asyncio.run(generate(model, requests))

    whole = run(False, [None] * 6)
    assert run(True, [None] * 6) == whole
    # Every second sequence ends with a stop token. By then the next step is launched, and the row goes to another
    # sequence at once.
    ends = [tokens[3 * i] if i % 2 else None for i, tokens in enumerate(whole)]
    ended = [tokens[: tokens.index(end) + 1] if end is not None else tokens for tokens, end in zip(whole, ends, strict=True)]
    assert run(False, ends) == run(True, ends) == ended


def test_start_up_tells_what_is_loaded_and_how_much_fits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    directory = tiny("banded", tmp_path, vocab_size=50257)
    model = served(directory, max_slots=2)
    assert model.name == "banded"
    assert "loading banded from" in caplog.text
    assert "as float32 on cpu" in caplog.text
    assert "KV cache: 16 dense pages and 16 banded pages of" in caplog.text
    assert "2 sequences run at once, 2.0 of them at the full 256 tokens" in caplog.text
    assert "4 layers, ready in" in caplog.text


def test_a_kv_budget_below_one_sequence_is_refused_with_the_numbers(tmp_path: Path) -> None:
    directory = tiny("banded", tmp_path, vocab_size=50257)
    with pytest.raises(ValueError, match="kv_bytes is 1000, but one sequence of 256 tokens needs"):
        served(directory, kv_bytes=1000)


def test_without_the_flag_no_kernel_is_measured(tmp_path: Path) -> None:
    metrics = Metrics("tiny")
    served(tiny("banded", tmp_path, vocab_size=50257), metrics)
    assert logit_errors(metrics) == {}


def test_the_doctor_measures_every_kind_before_serving(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    metrics = Metrics("tiny")
    model = served(tiny("banded", tmp_path, vocab_size=50257), metrics, doctor=True)
    assert "doctor: dense, banded, pointwise, all within the limit" in caplog.text
    errors = logit_errors(metrics)
    assert list(errors) == ["dense", "banded", "pointwise", "all"]
    assert all(0 <= error < 1e-3 for error in errors.values())
    assert asyncio.run(generate(model, [request([1, 2, 3], 4)]))[0]


def test_the_doctor_refuses_wrong_kernels_with_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_ops, "decode_attention", lambda q, *rest: torch.zeros_like(q))
    metrics = Metrics("tiny")
    directory = tiny("banded", tmp_path, vocab_size=50257)
    with pytest.raises(LoadError) as caught:
        served(directory, metrics, doctor=True, compile=False)
    errors = logit_errors(metrics)
    faults = str(caught.value).removeprefix("doctor: ").split("; ")
    for fault, kind in zip(faults, ("dense", "banded", "all"), strict=True):
        assert fault.startswith(f"kernels of kind {kind}: max |Δ logit| {errors[kind]:.3g} is ")
        assert fault.endswith(", the limit for float32 is 0.1%")
    assert errors["pointwise"] < 1e-3


def logit_errors(metrics: Metrics) -> dict[str, float]:
    """Samples of banded_kernel_logit_error by kind."""
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]
    return {s.labels["kind"]: s.value for s in samples if s.name == "banded_kernel_logit_error"}


@pytest.mark.parametrize(
    ("device", "kernels", "words"),
    [
        ("cpu", "auto", "PyTorch on CPU"),
        ("cpu", "triton", "Triton, interpreted on CPU"),
        ("cuda", "auto", "Triton on Some GPU"),
        ("cuda", "triton", "Triton on Some GPU"),
    ],
)
def test_kernels_in_words(device: str, kernels: KernelChoice, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, (9, 0))
    assert kernels_in_words(torch.device(device), kernels) == words


def test_compiled_kernels_have_another_name_and_so_another_fingerprint() -> None:
    words = kernels_in_words(torch.device("cpu"), "auto", compiled=True)
    assert words == "compiled on CPU"


@pytest.mark.parametrize("how", [{"kernels": "triton"}, {"device": "cuda"}])
def test_int8_off_the_cpu_is_refused(how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "device" in how:
        fake_gpu(monkeypatch, (9, 0))
    with pytest.raises(LoadError, match="dtype int8: its products run on CPUs only; use --dtype bfloat16, or --device cpu"):
        served(tiny("banded", tmp_path, vocab_size=50257), dtype="int8", **how)


def fake_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "Some GPU")


def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LoadError, match="device cuda: PyTorch sees no GPU here; use --device cpu, or install a CUDA build"):
        choose_device("cuda")
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")


def test_with_a_gpu_auto_is_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, (9, 0))
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
    assert choose_device("cpu") == torch.device("cpu")


def test_a_gpu_that_is_too_old_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, (7, 5))
    for device in ("cuda", "auto"):
        with pytest.raises(LoadError, match=r"Some GPU has compute capability 7\.5, the kernels need 8\.0"):
            choose_device(device)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("widened", [True, False, None])  # None: nothing can be compiled
def test_auto_dtype_is_bfloat16_where_that_is_multiplied_fast(
    native: bool, widened: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(shape: Shape) -> SimpleNamespace | None:
        assert shape == (64, torch.bfloat16)
        return None if widened is None else SimpleNamespace(has_bf16=widened)

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(cpu_compiled, "load", load)
    cpu, auto = torch.device("cpu"), settings_of(model="demo", dtype="auto").engine
    assert choose_dtype(auto, cpu, 64) is (torch.bfloat16 if native or widened else torch.float32)
    assert choose_dtype(auto, torch.device("cuda"), 64) is torch.bfloat16
    assert choose_dtype(replace(auto, dtype="float16"), cpu, 64) is torch.float16
    for without_ours in (replace(auto, compile=False), replace(auto, kernels="triton")):
        assert choose_dtype(without_ours, cpu, 64) is (torch.bfloat16 if native else torch.float32)


def test_a_prompt_token_with_logprobs_counts_as_many_as_it_takes() -> None:
    weights = [explained_weight(SIZES[name]) for name in ("demo", "gpt3-125m", "gpt3-1.3b")]
    assert weights == pytest.approx([5.1, 1.455, 1.085], rel=0.01)
    assert explained_weight(replace(SIZES["demo"], n_layer=1)) == MIN_CHUNK


def test_kv_pages_get_what_the_weights_leave_of_a_gpu_and_a_fixed_share_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * 10**9, 80 * 10**9))
    assert kv_budget(None, torch.device("cuda")) == 62 * 10**9
    assert kv_budget(None, torch.device("cpu")) == 2 << 30
    assert kv_budget(5000, torch.device("cuda")) == kv_budget(5000, torch.device("cpu")) == 5000
    with pytest.raises(LoadError, match="kv_bytes is 71000000000, but the weights leave 70000000000 of the GPU's"):
        kv_budget(71 * 10**9, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 80 * 10**9))
    message = (
        r"the weights leave 1\.0 GB of the GPU's 80\.0 GB; 8\.0 GB are kept for activations, so none are left for KV pages"
    )
    with pytest.raises(LoadError, match=message):
        kv_budget(None, torch.device("cuda"))


def test_weights_larger_than_the_gpu_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(options: EngineOptions) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")

    monkeypatch.setattr(loading, "load_checkpoint", allocate)
    with pytest.raises(LoadError, match=r"the GPU is out of memory: CUDA out of memory\. Tried to allocate 3 GiB"):
        served(tmp_path)


def test_int8_on_a_cpu_that_would_saturate_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(
        LoadError, match="dtype int8: this CPU has no VNNI instructions to multiply integers; use --dtype fl"
    ):
        served(tiny("banded", tmp_path, vocab_size=50257), dtype="int8")


def test_a_model_has_its_directorys_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--openai-community--gpt2" / "snapshots" / "607a30d783dfa663caf39e06633721c8d4cfcd7e"
    snapshot.mkdir(parents=True)
    assert served_name(str(snapshot)) == "openai-community/gpt2", "as Hugging Face's cache names its directories"
    (tmp_path / "mine").symlink_to(snapshot)
    assert served_name(str(tmp_path / "mine")) == "mine"
    assert served_name(f"{tmp_path}/mine/../mine/") == "mine"
    monkeypatch.chdir(snapshot)
    assert served_name(".") == "openai-community/gpt2"
    assert served_name("demo") == "demo"


def test_a_model_is_served_under_given_names(tmp_path: Path) -> None:
    directory = tiny("banded", tmp_path, vocab_size=50257)
    options = settings_of(model=str(directory), dtype="float32", names="first,org/second").engine
    models = load_served(options, Metrics("first"))
    assert [(entry.name, entry.root, entry.parent) for entry in models.seen_by("")] == [
        ("first", "first", None),
        ("org/second", "first", None),
    ]
    assert models.find(None, "") is models.base
    assert models.find("org/second", "") == models.base._replace(name="org/second", alias_of="first")
    assert models.find("banded", "") is None


@pytest.mark.parametrize("name", ["first", "second"])
def test_an_adapter_can_not_have_a_name_of_the_model(name: str, tmp_path: Path) -> None:
    directory, adapters = tiny("banded", tmp_path, vocab_size=50257), f"{name}=nowhere"
    options = settings_of(model=str(directory), dtype="float32", names="first,second", adapters=adapters).engine
    with pytest.raises(LoadError, match=f"adapter {name}: the model itself has that name"):
        load_served(options, Metrics("first"))
