"""The whole path of a step, from weights to logits, through the paged cache, against transformers. Free pages are NaN."""

import math
import random
import sys
from collections import abc
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.band import PAGE_SIZE
from kernels.names import NONE_LEFT, NOT_FINITE
from model.runner import decode_buckets
from model.step import (
    DecodeToken,
    NewPages,
    PageCopy,
    PromptChunk,
    PromptLogprobs,
    RowStart,
    Sample,
    Sampled,
    Sampling,
    StepInput,
)
from tests.kernels.interpreter import exact_bf16
from tests.kernels.paths import CPU_PATH, CUDA, ServedPath, served_paths, triton_paths
from tests.model.checkpoint.checkpoints import ARCHITECTURES, tiny
from tests.model.logits import our_logits, transformers_logits
from tests.model.paged_run import PagedRun, random_steps


@pytest.fixture(autouse=True)
def bf16_is_right() -> Iterator[None]:
    with exact_bf16():
        yield


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_chunked_prefill_and_decode_give_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    arch, fields = ARCHITECTURES[name]
    directory = tiny(arch, tmp_path, **fields)
    generator = torch.Generator().manual_seed(5)
    lengths = [250, 1, 64, 65, 129, 190]
    sequences = [torch.randint(331, (length,), generator=generator) for length in lengths]
    expected = [transformers_logits(directory, tokens[None])[0] for tokens in sequences]
    for seed in range(2):
        run = PagedRun(directory, sequences)
        random_steps(run, random.Random(seed))
        for logits, oracle in zip(run.logits, expected, strict=True):
            assert (logits - oracle).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_prompt_token_by_token_and_in_chunks_of_any_size(name: str, tmp_path: Path) -> None:
    arch, fields = ARCHITECTURES[name]
    directory = tiny(arch, tmp_path, **fields)
    tokens = torch.randint(331, (140,), generator=torch.Generator().manual_seed(6))
    expected = transformers_logits(directory, tokens[None])[0]
    for size in (1, 17, 64, 96):
        run = PagedRun(directory, [tokens])
        while run.done[0] < len(tokens):
            run.step([], [(0, min(size, len(tokens) - run.done[0]))])
        assert (run.logits[0] - expected).abs().max() <= 1e-4
    run = PagedRun(directory, [tokens])
    run.step([], [(0, 1)])
    while run.done[0] < len(tokens):
        run.step([0], [])
    assert (run.logits[0] - expected).abs().max() <= 1e-4


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    directory = tiny("banded", tmp_path)
    tokens = torch.randint(331, (200,), generator=torch.Generator().manual_seed(7))
    exact, rounded = PagedRun(directory, [tokens]), PagedRun(directory, [tokens], torch.bfloat16)
    for run in (exact, rounded):
        random_steps(run, random.Random(1))
    scale = exact.logits[0].std()
    error = (exact.logits[0] - rounded.logits[0]).abs()
    # bf16 keeps 8 bits: a few roundings a layer over 4 layers.
    assert error.mean() < 0.02 * scale
    assert error.max() < 0.2 * scale


def test_a_slot_starts_afresh_for_its_next_sequence(tmp_path: Path) -> None:
    directory = tiny("banded", tmp_path)
    first, second = (torch.randint(331, (n,), generator=torch.Generator().manual_seed(n)) for n in (150, 90))
    used = PagedRun(directory, [first])
    random_steps(used, random.Random(2))
    used.cache.free(0)
    used.sequences, used.done = [second], [0]
    used.logits = [torch.zeros(90, 331)]
    assert used.cache.try_reserve(0, 90)
    fresh = PagedRun(directory, [second])
    for run in (used, fresh):
        random_steps(run, random.Random(3))
    assert torch.equal(used.logits[0], fresh.logits[0])
    assert PAGE_SIZE < 90, "the second sequence must reuse more than one page"


FOUR_KINDS: dict[str, Any] = {"attention": ("dense", "banded", "strided", "fixed"), "stride": 32, "summary": 5}


@served_paths
def test_every_pattern_in_one_model_gives_the_logits_of_whole_windows(path: ServedPath, tmp_path: Path) -> None:
    directory = tiny("banded", tmp_path, **FOUR_KINDS)
    sequences = [torch.randint(331, (n,), generator=torch.Generator().manual_seed(n)) for n in (134, 18)]
    run = PagedRun(directory, sequences, path=path)
    run.step([], [(0, 90)])
    run.step([], [(0, 6), (1, 15)])
    run.step([1], [(0, 36)])
    while run.done[0] < 134:
        run.step([0, 1] if run.done[1] < 18 else [0], [])
    for logits, tokens in zip(run.logits, sequences, strict=True):
        assert (logits - our_logits(directory, tokens[None])[0]).abs().max() <= 1e-4


@triton_paths
@pytest.mark.parametrize(("band", "lengths"), [(16, (17, 65, 1)), (70, (71, 63, 130))])
def test_the_triton_path_gives_the_logits_of_whole_windows(
    path: ServedPath, band: int, lengths: tuple[int, ...], tmp_path: Path
) -> None:
    """Prompts that end around the borders of bands, pages and tiles, in ragged batches of chunks and decode rows."""
    directory = tiny("banded", tmp_path, n_layer=2, band=band)
    sequences = [torch.randint(331, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    run = PagedRun(directory, sequences, path=path)
    random_steps(run, random.Random(band), budgets=(33, 96), most_decoded=8)
    for logits, tokens in zip(run.logits, sequences, strict=True):
        assert (logits - our_logits(directory, tokens[None])[0]).abs().max() <= 1e-4


@pytest.mark.parametrize("num_rows", [1, 2, 5, 8, 32, 100, 1024])
def test_buckets_end_at_the_slots_and_pad_a_quarter_at_most(num_rows: int) -> None:
    buckets = decode_buckets(num_rows)
    assert buckets == sorted(set(buckets))
    assert (buckets[0], buckets[-1]) == (1, num_rows)
    assert all(b - a - 1 <= max(0, a // 4) for a, b in pairwise(buckets))
    assert len(buckets) <= 32


@served_paths
def test_rows_that_pad_a_bucket_change_nothing(path: ServedPath, tmp_path: Path) -> None:
    """bf16 products have the same bits at any batch size. cuBLAS does not promise that: on a GPU, fp32 and nearly equal."""
    on_gpu = path.device.type == "cuda"
    directory = tiny("banded", tmp_path, n_layer=2)
    sequences = [torch.randint(331, (n,), generator=torch.Generator().manual_seed(n)) for n in (12, 10, 8)]
    runs = [PagedRun(directory, sequences, torch.float32 if on_gpu else torch.bfloat16, path) for _ in range(2)]
    runs[0].runner.buckets = [1, 2, 3]
    runs[1].runner.buckets = [3]
    for run in runs:
        run.step([], [(0, 6), (1, 6), (2, 6)])
        for live in ([0, 1, 2], [0, 1], [0]):
            run.step(live, [])
    for exact, padded in zip(runs[0].logits, runs[1].logits, strict=True):
        done = ~exact.isnan()
        assert torch.allclose(exact[done], padded[done], rtol=0, atol=1e-4 if on_gpu else 0)


def test_a_bucket_is_the_smallest_that_holds_the_batch_or_else_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = PagedRun(tiny("banded", tmp_path, n_layer=1), [torch.zeros(9, dtype=torch.int64)] * 7)
    run.runner.buckets = [2, 4]
    seen: list[int] = []

    def decode(rows: torch.Tensor, *_: object) -> tuple[torch.Tensor, list[object]]:
        seen.append(rows.shape[1])
        return rows[0], []

    monkeypatch.setattr(run.runner, "_decode", decode)
    for count in range(1, 8):
        run.runner.launch(step_of([], [], [DecodeToken(row, 0) for row in range(count)], []))
    assert seen == [2, 2, 4, 4, 5, 6, 7]


def step_of(
    starts: list[RowStart],
    pages: list[NewPages],
    decodes: list[DecodeToken],
    chunks: list[PromptChunk],
    **fields: Any,
) -> StepInput:
    """A step that samples after every decode row and every chunk, unless `fields` say otherwise."""
    ends = accumulate((len(chunk.tokens) for chunk in chunks), initial=len(decodes))
    samples = [Sample(token.row, i) for i, token in enumerate(decodes)]
    samples += [Sample(chunk.row, end - 1) for chunk, end in zip(chunks, list(ends)[1:], strict=True)]
    given: dict[str, Any] = {"samples": samples, "prompt_logprobs": [], "copies": []}
    return StepInput(starts, pages, decodes, chunks, **given | fields)


def decoded(path: ServedPath, sampling: Sampling, directory: Path, *, count: int = 16, capture: bool = False) -> list[int]:
    """The tokens that a runner samples after a prompt of 20, fed only by its own state."""
    run = PagedRun(directory, [torch.zeros(60, dtype=torch.int64)], path=path)
    if capture:
        run.runner.capture()
    pages = run.cache.extend(0, 60)
    prompt = PromptChunk(0, 0, list(range(20)))
    step = step_of([RowStart(0, sampling, prompt.tokens)], pages, [], [prompt])
    tokens = run.runner.launch(step).result().tokens
    for position in range(20, 19 + count):
        tokens += run.runner.launch(step_of([], [], [DecodeToken(0, position)], [])).result().tokens
    return tokens


SAMPLINGS = [
    Sampling(temperature=0.0),
    Sampling(temperature=0.9, top_p=0.9, seed=3),
    Sampling(temperature=0.9, top_k=40, min_p=0.02, seed=4, logit_bias=((7, 5.0), (9, -100.0))),
    Sampling(temperature=0.7, seed=5, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.7),
]


@triton_paths
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_triton_path_samples_what_the_cpu_does(path: ServedPath, sampling: Sampling, tmp_path: Path) -> None:
    directory = tiny("banded", tmp_path, n_layer=1)
    count = 6  # interpreted, a token takes a tenth of a second
    assert decoded(path, sampling, directory, count=count) == decoded(CPU_PATH, sampling, directory, count=count)


def test_penalties_and_bias_reach_the_sampler_and_end_with_their_sequence(tmp_path: Path) -> None:
    directory = tiny("banded", tmp_path, n_layer=1)
    greedy = Sampling(temperature=0.0)
    plain = decoded(CPU_PATH, greedy, directory)
    assert decoded(CPU_PATH, greedy._replace(logit_bias=((7, 100.0),)), directory) == [7] * 16
    free_of_plain = decoded(CPU_PATH, greedy._replace(logit_bias=tuple((token, -100.0) for token in set(plain))), directory)
    assert not set(free_of_plain) & set(plain)
    never_twice = decoded(CPU_PATH, greedy._replace(presence_penalty=100.0), directory)
    assert len(set(never_twice)) == 16
    not_from_prompt = decoded(CPU_PATH, greedy._replace(repetition_penalty=1e6), directory)
    assert len(set(not_from_prompt) | set(range(20))) == 36, "neither the prompt's tokens nor its own come again"
    run = PagedRun(directory, [torch.zeros(60, dtype=torch.int64)])
    pages = run.cache.extend(0, 60)
    prompt = [PromptChunk(0, 0, list(range(20)))]
    biased = greedy._replace(logit_bias=((7, 100.0),))
    for sampling, expected in ((biased, 7), (greedy, plain[0]), (greedy._replace(presence_penalty=0.1), plain[0])):
        step = step_of([RowStart(0, sampling, prompt[0].tokens)], pages, [], prompt)
        assert run.runner.launch(step).result().tokens == [expected]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_what_was_sampled_goes_on_the_same_when_it_is_computed_again_as_a_prompt(sampling: Sampling, tmp_path: Path) -> None:
    """So a decode row is fed the last sampled token, and a position has its own random numbers, however it is reached."""
    directory = tiny("banded", tmp_path, n_layer=1)
    sampling = sampling._replace(repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0)
    tokens = list(range(20)) + decoded(CPU_PATH, sampling, directory)
    for length in range(20, len(tokens)):
        run = PagedRun(directory, [torch.zeros(60, dtype=torch.int64)])
        prompt, pages = PromptChunk(0, 0, tokens[:length]), run.cache.extend(0, 60)
        step = step_of([RowStart(0, sampling, prompt.tokens)], pages, [], [prompt])
        assert run.runner.launch(step).result().tokens == [tokens[length]]


def test_penalties_look_at_no_earlier_prompt_of_the_slot(tmp_path: Path) -> None:
    run = PagedRun(tiny("banded", tmp_path, n_layer=1), [torch.zeros(60, dtype=torch.int64)])
    pages = run.cache.extend(0, 60)
    sampling = Sampling(temperature=0.0, repetition_penalty=1e6)
    for prompt in (range(331), range(20)):
        start = RowStart(0, sampling, list(prompt))
        run.runner.launch(step_of([start], pages, [], [PromptChunk(0, 0, list(range(20)))])).result()
        assert run.runner.sampling.in_prompt[0].nonzero().flatten().tolist() == list(prompt)


def test_a_page_is_copied_in_the_layers_of_its_group_alone(tmp_path: Path) -> None:
    run = PagedRun(tiny("banded", tmp_path, n_layer=2), [torch.zeros(60, dtype=torch.int64)])
    prompt, pages = PromptChunk(0, 0, list(range(20))), run.cache.extend(0, 60)
    groups = [run.model.config.group(layer) for layer in range(2)]
    assert set(groups) == {"dense", "banded"}
    (source,) = (new.page_ids[0] for new in pages if new.group == "banded")
    target = next(page for page in range(len(run.runner.pools[0].k) - 1) if page != source)
    for pool in run.runner.pools:
        for each in pool:
            each[target] = -7.0
    start = RowStart(0, Sampling(), prompt.tokens)
    run.runner.launch(step_of([start], pages, [], [prompt], copies=[PageCopy("banded", source, target)])).result()
    for group, pool in zip(groups, run.runner.pools, strict=True):
        for each in pool:
            assert torch.equal(each[target], each[source]) == (group == "banded")
            assert bool((each[target] == -7.0).all()) == (group == "dense")


def ragged_steps(run: PagedRun) -> list[StepInput]:
    """Five rows that start and decode in changing company, every row fed by the runner's own state."""
    lengths, steps = [0] * 5, []
    for live, starting in (
        ([], [0, 1, 2, 3]),
        ([0, 1, 2, 3], []),
        ([0, 1, 2], [4]),
        ([0, 1, 2, 3, 4], []),
        ([2], []),
        ([4, 1], []),
        ([3, 0, 1, 4], []),
        ([0, 1, 2, 3, 4], []),
    ):
        chunks = [PromptChunk(row, 0, list(range(row, 20 + 3 * row))) for row in starting]
        rows = [DecodeToken(row, lengths[row]) for row in live]
        for row, count in [(row, 1) for row in live] + [(chunk.row, len(chunk.tokens)) for chunk in chunks]:
            lengths[row] += count
        pages = [page for chunk in chunks for page in run.cache.extend(chunk.row, 60)]
        starts = [RowStart(chunk.row, SAMPLINGS[chunk.row % 4], chunk.tokens) for chunk in chunks]
        steps.append(step_of(starts, pages, rows, chunks))
    return steps


@pytest.mark.parametrize(
    ("path", "capture"),
    [
        pytest.param(CPU_PATH, False, id="cpu"),
        pytest.param(CUDA, False, id="cuda", marks=pytest.mark.gpu),
        pytest.param(CUDA, True, id="captured", marks=pytest.mark.gpu),
    ],
)
def test_tokens_outlive_the_steps_after_them(path: ServedPath, capture: bool, tmp_path: Path) -> None:
    """The loop may launch a step ahead of reading the previous one. Graphs may replay in any order, between chunks."""
    directory = tiny("banded", tmp_path, n_layer=2)
    runs = [PagedRun(directory, [torch.zeros(60, dtype=torch.int64)] * 5, path=path) for _ in range(2)]
    read_at_once = [runs[0].runner.launch(step).result().tokens for step in ragged_steps(runs[0])]
    if capture:
        runs[1].runner.capture()
    pending = [runs[1].runner.launch(step) for step in ragged_steps(runs[1])]
    assert [step.result().tokens for step in pending] == read_at_once
    assert len({token for tokens in read_at_once for token in tokens}) > 10


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_captured_graphs_sample_what_the_same_steps_do_op_by_op(sampling: Sampling, tmp_path: Path) -> None:
    directory = tiny("banded", tmp_path)
    assert decoded(CUDA, sampling, directory, capture=True) == decoded(CUDA, sampling, directory)


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
@pytest.mark.parametrize("logit_rows", [3, 256])
def test_logprobs_of_samples_and_targets(
    num_top: int, logit_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a log_softmax of the recorded hidden states' logits, in ragged steps and slices: see PagedRun."""
    monkeypatch.setattr("model.runner.LOGIT_ROWS", logit_rows)
    sequences = [torch.randint(331, (n,), generator=torch.Generator().manual_seed(n)) for n in (150, 1, 64, 70)]
    run = PagedRun(tiny("banded", tmp_path, n_layer=2), sequences)
    run.num_top = num_top
    random_steps(run, random.Random(num_top))


@triton_paths
def test_the_triton_path_finds_the_same_logprobs(path: ServedPath, tmp_path: Path) -> None:
    run = PagedRun(tiny("banded", tmp_path, n_layer=1), [torch.arange(20)], path=path)
    run.num_top = 3
    run.step([], [(0, 18)])
    run.step([0], [])
    run.step([0], [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_logits_are_listed_lowest_id_first(dtype: torch.dtype, tmp_path: Path) -> None:
    run = PagedRun(tiny("banded", tmp_path, n_layer=1), [torch.zeros(60, dtype=torch.int64)], dtype)
    prompt, pages = PromptChunk(0, 0, list(range(20))), run.cache.extend(0, 60)
    step = step_of([RowStart(0, Sampling(temperature=0.0), prompt.tokens)], pages, [], [prompt], samples=[Sample(0, 19, 5)])
    (likeliest,) = run.runner.launch(step).result().tokens
    twins = sorted({30, likeliest, 300})
    with torch.no_grad():
        run.model.wte.weight[twins] = run.model.wte.weight[likeliest].clone()
    found = run.runner.launch(step).result()
    assert found.tokens == twins[:1]
    assert found.logprobs[0] is not None
    assert [token for token, _ in found.logprobs[0].top[: len(twins)]] == twins


def test_what_is_banned_is_not_sampled_and_keeps_its_logprob(tmp_path: Path) -> None:
    run = PagedRun(tiny("banded", tmp_path, n_layer=1), [torch.zeros(60, dtype=torch.int64)])
    prompt, pages = [PromptChunk(0, 0, list(range(20)))], run.cache.extend(0, 60)

    def sample(banned: tuple[int, ...], decodes: list[DecodeToken], chunks: list[PromptChunk]) -> Sampled:
        samples = [Sample(0, 19 if chunks else 0, 3, banned)]
        starts = [RowStart(0, Sampling(temperature=0.0), prompt[0].tokens)] if chunks else []
        return run.runner.launch(step_of(starts, pages, decodes, chunks, samples=samples)).result()

    for decodes, chunks in (([], prompt), ([DecodeToken(0, 20)], [])):
        run.runner.last_token[0] = 5
        free = sample((), decodes, chunks)
        run.runner.last_token[0] = 5
        assert free.logprobs[0] is not None
        first, second, third = free.logprobs[0].ids
        assert free.tokens == [first]
        banned = sample((first, second), decodes, chunks)
        assert banned.tokens == [third]
        assert banned.logprobs[0] == free.logprobs[0]._replace(logprob=free.logprobs[0].values[2])


def test_a_step_of_prompts_alone_may_sample_nothing_and_score(tmp_path: Path) -> None:
    run = PagedRun(tiny("banded", tmp_path, n_layer=1), [torch.zeros(60, dtype=torch.int64)])
    prompt, pages = PromptChunk(0, 0, list(range(20))), run.cache.extend(0, 60)
    start = RowStart(0, Sampling(), prompt.tokens)
    assert run.runner.launch(step_of([start], pages, [], [prompt], samples=[])).result() == Sampled([], [], [])
    wanted = [PromptLogprobs(3, [4, 5], 0), PromptLogprobs(19, [7], 2)]
    sampled = run.runner.launch(step_of([start], [], [], [prompt], samples=[], prompt_logprobs=wanted)).result()
    assert [[len(each.top) for each in some] for some in sampled.prompt_logprobs] == [[0, 0], [2]]


@served_paths
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("sampling", "num_top"), [(SAMPLINGS[0], 2), (SAMPLINGS[3], None)])
def test_a_row_of_nan_says_so_and_disturbs_neither_the_rows_next_to_it_nor_later_steps(
    path: ServedPath, sampling: Sampling, num_top: int | None, tmp_path: Path
) -> None:
    """Row 0 meets the position whose embedding is NaN. A step is launched on top of it before that is known."""
    directory = tiny("banded", tmp_path, n_layer=2)
    found = []
    for poison in (False, True):
        run = PagedRun(directory, [torch.zeros(60, dtype=torch.int64)] * 2, path=path)
        run.runner.buckets = [2]
        if poison:
            with torch.inference_mode():
                run.model.wpe.weight[12] = math.nan
        pages = [new for row in range(2) for new in run.cache.extend(row, 60)]
        prompts = [PromptChunk(0, 0, list(range(12))), PromptChunk(1, 0, list(range(5)))]
        starts = [RowStart(chunk.row, sampling, chunk.tokens) for chunk in prompts]
        pending = [run.runner.launch(step_of(starts, pages, [], prompts))]
        for i in range(3):
            samples = [Sample(0, 0, num_top), Sample(1, 1, num_top)]
            decodes = [DecodeToken(0, 12 + i), DecodeToken(1, 5 + i)]
            pending.append(run.runner.launch(step_of([], [], decodes, [], samples=samples)))
        found.append([each.result() for each in pending])
    clean, poisoned = found
    assert [step.tokens[0] for step in poisoned] == [clean[0].tokens[0], *[NOT_FINITE] * 3]
    assert [(step.tokens[1], step.logprobs[1]) for step in poisoned] == [
        (step.tokens[1], step.logprobs[1]) for step in clean
    ]


def test_bans_may_leave_no_token_or_hide_the_only_logit_that_is_not_finite(tmp_path: Path) -> None:
    run = PagedRun(tiny("banded", tmp_path, n_layer=1, tied_head=False), [torch.zeros(60, dtype=torch.int64)])
    assert run.model.lm_head is not None
    prompt, pages = PromptChunk(0, 0, list(range(20))), run.cache.extend(0, 60)

    def sampled(num_top: int | None, banned: abc.Iterable[int]) -> int:
        samples = [Sample(0, 19, num_top, tuple(banned))]
        step = step_of([RowStart(0, Sampling(), prompt.tokens)], pages, [], [prompt], samples=samples)
        (token,) = run.runner.launch(step).result().tokens
        return token

    for num_top in (None, 2):
        assert sampled(num_top, range(331)) == NONE_LEFT
        assert sampled(num_top, {*range(331)} - {330}) == 330
    with torch.inference_mode():
        run.model.lm_head.weight[7] = math.nan
    assert sampled(None, [7]) >= 0
    assert sampled(2, [7]) == NOT_FINITE, "its logprob is no number"
    assert sampled(None, [8]) == sampled(2, [8]) == NOT_FINITE


def test_graphs_are_replayed_for_plain_steps_only(tmp_path: Path) -> None:
    run = PagedRun(tiny("banded", tmp_path, n_layer=1), [torch.zeros(60, dtype=torch.int64)])
    prompt, pages = PromptChunk(0, 0, list(range(20))), run.cache.extend(0, 60)
    run.runner.launch(step_of([RowStart(0, Sampling(), prompt.tokens)], pages, [], [prompt])).result()
    replayed = []

    class Graph:
        def replay(self) -> None:
            replayed.append(1)

    run.runner._graphs[run.runner.buckets[0]] = Graph()  # type: ignore[assignment]
    for row in (Sample(0, 0), Sample(0, 0, 2), Sample(0, 0, None, (5,)), Sample(0, 0)):
        run.runner.launch(step_of([], [], [DecodeToken(0, 20)], [], samples=[row])).result()
    assert len(replayed) == 2


@pytest.mark.parametrize("num_prompt", [1, 63, 64, 150])
@pytest.mark.parametrize("sampling", [SAMPLINGS[0], SAMPLINGS[2], SAMPLINGS[3]])
def test_a_fork_goes_on_as_if_it_had_prefilled_alone(num_prompt: int, sampling: Sampling, tmp_path: Path) -> None:
    """In another row, behind full pages that it shares and a copy of the last, with free pages of NaN."""
    directory = tiny("banded", tmp_path, n_layer=2, band=70)
    prompt = list(range(num_prompt))
    choices = [sampling._replace(choice=choice) for choice in range(2)]

    def start(run: PagedRun, row: int, choice: int) -> list[int]:
        run.cache.free(row)
        assert run.cache.try_reserve(row, num_prompt + 12)
        run.poison()
        pages = run.cache.extend(row, num_prompt)
        chunk = PromptChunk(row, 0, prompt)
        return run.runner.launch(step_of([RowStart(row, choices[choice], prompt)], pages, [], [chunk])).result().tokens

    def go_on(run: PagedRun, rows: list[int], tokens: list[list[int]]) -> list[list[int]]:
        for position in range(num_prompt, num_prompt + 12):
            pages = [new for row in rows for new in run.cache.extend(row, position + 1)]
            run.poison()
            step = step_of([], pages, [DecodeToken(row, position) for row in rows], [])
            for found, token in zip(tokens, run.runner.launch(step).result().tokens, strict=True):
                found.append(token)
            for row in rows:
                run.cache.release_passed(row, position + 1)
        return tokens

    def fresh() -> PagedRun:
        return PagedRun(directory, [torch.zeros(num_prompt + 12, dtype=torch.int64)] * 2, torch.bfloat16)

    alone = []
    for choice in range(2):
        run = fresh()
        alone += go_on(run, [0], [start(run, 0, choice)])
    run = fresh()
    run.cache.free(0)
    run.cache.free(1)
    assert run.cache.try_reserve(0, num_prompt + 12)
    assert run.cache.try_join(1, 0, num_prompt, num_prompt + 12)
    run.poison()
    pages = run.cache.extend(0, num_prompt)
    shared, copies = run.cache.fork(1, 0, num_prompt)
    assert {copy.group for copy in copies} == ({"dense", "banded"} if num_prompt % PAGE_SIZE else set())
    assert all(isinstance(copy, PageCopy) for copy in copies)
    starts = [RowStart(row, choices[row], prompt) for row in range(2)]
    samples = [Sample(row, num_prompt - 1) for row in range(2)]
    chunk = PromptChunk(0, 0, prompt)
    step = step_of(starts, pages + shared, [], [chunk], samples=samples, copies=copies)
    first = run.runner.launch(step).result().tokens
    assert go_on(run, [0, 1], [[token] for token in first]) == alone


def test_logprobs_are_small(tmp_path: Path) -> None:
    """A whole answer may hold those of 64 contexts. Pairs of Python's numbers took 2.5 kB a token."""
    run = PagedRun(tiny("banded", tmp_path, n_layer=1), [torch.zeros(60, dtype=torch.int64)])
    start, pages = RowStart(0, Sampling(), [0] * 20), run.cache.extend(0, 60)
    step = step_of(
        [start], pages, [], [PromptChunk(0, 0, [0] * 20)], samples=[], prompt_logprobs=[PromptLogprobs(3, [4], 20)]
    )
    [[found]] = run.runner.launch(step).result().prompt_logprobs
    assert len(found.top) == 20
    assert sum(map(sys.getsizeof, (found, *found))) < 450
