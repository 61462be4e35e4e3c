"""One table of cases for all kernels: each is checked against the reference, then timed next to PyTorch."""

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from kernels import reference, torch_ops
from kernels.band import PAGE_SIZE
from kernels.ops import Ops
from kernels.patterns import Pattern
from kernels.sampling_state import SamplingState
from tests.kernels.paged import DecodeCase, PrefillCase, decode_case, prefill_case

OURS, PYTORCH = "Banded", "PyTorch"
# The largest relative error (L2) that a row of a result may have: twice the error of rounding to the dtype. A row of
# 2048 keys that misses one page of 64 is wrong by 0.18.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

Unit = Literal["TB/s", "TFLOP/s"]
AttentionOp = Literal["decode_attention", "prefill_attention"]
Output = Tensor | tuple[Tensor, ...]
Call = Callable[[], Output]


class Shapes(NamedTuple):
    """The sizes of the cases."""

    dtype: torch.dtype
    width: int  # heads * head_dim
    head_dims: tuple[int, ...]
    context: int  # keys of a decoding sequence, tokens of a prompt
    batch: int  # decoding sequences
    prompts: int
    band: int
    stride: int
    summary: int
    tokens: int  # rows of kv_write, add_layernorm and bias_activation
    sampled: int  # rows of logits
    vocab: int
    copied: int  # bytes, for the measured bandwidth
    matmul: int  # rows and columns, for the measured TFLOP/s


# A band takes 128 sequences * 256 keys * width 2048 * 2 (K and V) * 2 bytes, that is, 256 MiB. Dense keys take 8 times as
# much. 4 prompts with 16 heads of 128 give the 64 heads of the goals. Stride 128 and summary 32 are from Child et al. 2019.
REAL = Shapes(torch.bfloat16, 2048, (64, 128), 2048, 128, 4, 256, 128, 32, 2048, 32, 50304, 1 << 30, 8192)
# fp32, because Triton's interpreter gets bf16 wrong.
DRY = Shapes(torch.float32, 128, (64, 128), 128, 2, 1, 64, 32, 8, 5, 2, 5000, 1 << 20, 64)


class Task(NamedTuple):
    """One op on one input, and the least work that it takes: bytes moved, or FLOPs."""

    name: str
    work: int
    unit: Unit
    tolerance: float


class Case(NamedTuple):
    """A task, its right result, and the ways to do it. A way prepares its inputs and returns the call that is timed."""

    task: Task
    expected: Output
    ways: Mapping[str, Callable[[], Call]]


class Row(NamedTuple):
    """A way's time for a task, or why there is none."""

    task: Task
    way: str
    error: float = float("nan")
    ms: tuple[float, ...] = ()  # p20, p50, p80
    problem: str = ""
    failed: bool = False

    @property
    def rate(self) -> float:
        """The rate of the median call, in the task's unit."""
        return self.task.work / self.ms[1] / 1e9


class WrongResultError(ValueError):
    pass


def measure(case: Case, device: torch.device) -> Iterator[Row]:
    """A row for each way, even if it can't run. The row is a failure if the way is ours or its result is wrong."""
    for way, prepare in case.ways.items():
        error = float("nan")
        try:
            call = prepare()
            error = relative_error(call(), case.expected)
            if not error <= case.task.tolerance:  # NaN is wrong too
                raise WrongResultError(f"wrong: relative error {error:.2g}, allowed {case.task.tolerance:g}")
            yield Row(case.task, way, error, quantiles(call, device))
        except Exception as problem:
            failed = way == OURS or isinstance(problem, WrongResultError)
            yield Row(case.task, way, error, (), first_line(problem), failed)


def first_line(problem: Exception) -> str:
    return (str(problem).strip() or repr(problem)).splitlines()[0]


def relative_error(output: Output, expected: Output) -> float:
    """The largest L2 error of a row, relative to the norm of the expected row. For token ids: infinite if any differs."""
    if isinstance(output, tuple) or isinstance(expected, tuple):
        return max(relative_error(x, y) for x, y in zip(output, expected, strict=True))
    assert output.shape == expected.shape, f"the result has shape {tuple(output.shape)}, not {tuple(expected.shape)}"
    if not expected.is_floating_point():
        return 0.0 if torch.equal(output, expected) else float("inf")
    norm = expected.double().norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
    return ((output.double() - expected.double()).norm(dim=-1) / norm).max().item()


def quantiles(call: Call, device: torch.device) -> tuple[float, ...]:
    """Milliseconds of a call at p20, p50 and p80. On CUDA the L2 cache is emptied before each call."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return tuple(do_bench(call, quantiles=[0.2, 0.5, 0.8]))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return tuple(sorted(times))


def measured_limits(shapes: Shapes, device: torch.device) -> tuple[float, float]:
    """TB/s of a copy and TFLOP/s of a square bf16 product: the best that a device reaches."""
    source = torch.zeros(shapes.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, shapes.matmul, shapes.matmul, device=device).bfloat16()
    copy_ms = quantiles(lambda: target.copy_(source), device)[1]
    return 2 * shapes.copied / copy_ms / 1e9, 2 * shapes.matmul**3 / quantiles(lambda: a @ b, device)[1] / 1e9


def attention_flops(pattern: Pattern, length: int, head_dim: int) -> int:
    """The least FLOPs of one head over a prompt: q @ k and p @ v for every key that a query sees."""
    positions = torch.arange(length)
    return 4 * head_dim * int(pattern.sees(positions[:, None], positions).sum())


def decode_bytes(pattern: Pattern, length: int, row_bytes: int) -> int:
    """Bytes of one head's query and output, and of the keys and values it sees from the last of `length` positions."""
    return (2 + 2 * int(pattern.sees(length - 1, torch.arange(length)).sum())) * row_bytes


def attention_name(op: str, pattern: Pattern, head_dim: int) -> str:
    return f"{op} {pattern.kind}{f' {pattern.size}' if pattern.size else ''}, D {head_dim}"


def attention(op: AttentionOp, pattern: Pattern, dim: int, shapes: Shapes, ops: Ops, device: torch.device) -> Case:
    """Sequences of `context` keys. A decode queries from the last, a prefill from all. Results are (B, queries, H, D)."""
    heads, length, scale = shapes.width // dim, shapes.context, dim**-0.5
    size = {"heads": heads, "dim": dim, "dtype": shapes.dtype, "max_pages": -(-length // PAGE_SIZE)}
    name, tolerance = attention_name(op, pattern, dim), TOLERANCE[shapes.dtype]
    case: DecodeCase | PrefillCase
    if op == "decode_attention":
        batch, count = shapes.batch, 1
        case = decode_case([length] * batch, pattern, device=device, **size)
        work = batch * heads * decode_bytes(pattern, length, dim * shapes.dtype.itemsize)
        task = Task(name, work, "TB/s", tolerance)
    else:
        batch, count = shapes.prompts, length
        case = prefill_case([0] * batch, [length] * batch, pattern, device=device, **size)
        task = Task(name, batch * heads * attention_flops(pattern, length, dim), "TFLOP/s", tolerance)

    def paged(ops: Ops) -> Call:
        attend = getattr(ops, op)
        return lambda: attend(case.q, case.cache.k, case.cache.v, case.plan, scale).view(batch, count, heads, dim)

    def contiguous() -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, queries, D), k and v (B, H, keys, D), with zeros for freed pages."""
        pages = case.cache.page_table[:, :-1].long()
        k, v = (x[pages].transpose(1, 2).flatten(2, 3)[:, :, :length].nan_to_num() for x in (case.cache.k, case.cache.v))
        return case.q.unflatten(0, (batch, count)).transpose(1, 2).contiguous(), k, v

    def sdpa() -> Call:
        """For a decode, the seen keys are gathered ahead of the call. So the call needs no mask and reads no other keys."""
        q, k, v = contiguous()
        seen = pattern.sees(torch.arange(length - count, length)[:, None], torch.arange(length)).to(device)
        if count == 1:
            k, v = (x[:, :, seen[0]].contiguous() for x in (k, v))
        causal = count > 1 and pattern.kind == "dense"
        mask = None if count == 1 or causal else seen
        return lambda: F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale).transpose(1, 2)

    def flex() -> Call:
        q, k, v = contiguous()
        torch.compiler.reset()  # PyTorch compiles 8 shapes at most; others would run without a kernel
        mask = create_block_mask(
            lambda b, h, q, k: pattern.sees(q + (length - count), k), None, None, count, length, device=device
        )
        attend = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention
        return lambda: attend(q, k, v, block_mask=mask, scale=scale).transpose(1, 2)

    flex_name = "FlexAttention" if device.type == "cuda" else "FlexAttention, not compiled"
    return Case(task, paged(reference)(), {OURS: partial(paged, ops), "SDPA": sdpa, flex_name: flex})


def beside_pytorch(task: Task, way: Callable[[Ops], Call], ops: Ops, oracle: Ops = reference) -> Case:
    """A case in which kernels.torch_ops is the rival: it is plain PyTorch and runs on any device."""
    return Case(task, way(oracle)(), {OURS: partial(way, ops), PYTORCH: partial(way, torch_ops)})


def kv_write(shapes: Shapes, ops: Ops, device: torch.device) -> Case:
    dim, tokens = shapes.head_dims[0], shapes.tokens
    heads, num_pages = shapes.width // dim, 2 * -(-tokens // PAGE_SIZE)
    k, v = torch.randn(tokens, 2, heads, dim, device=device).to(shapes.dtype).unbind(1)
    slots = torch.randperm(num_pages * PAGE_SIZE)[:tokens].to(device)

    def way(ops: Ops) -> Call:
        k_pages, v_pages = torch.zeros(2, num_pages, heads, PAGE_SIZE, dim, dtype=shapes.dtype, device=device)

        def call() -> Output:
            ops.kv_write(k, v, k_pages, v_pages, slots)
            return k_pages, v_pages

        return call

    task = Task(f"kv_write, {tokens} tokens, {heads} x {dim}", 4 * k.numel() * k.element_size(), "TB/s", 0.0)
    return beside_pytorch(task, way, ops)


def add_layernorm(shapes: Shapes, ops: Ops, device: torch.device) -> Case:
    x, residual = torch.randn(2, shapes.tokens, shapes.width, device=device).to(shapes.dtype)
    weight, bias = torch.randn(2, shapes.width, device=device).to(shapes.dtype)
    work = 4 * x.numel() * x.element_size()
    task = Task(f"add_layernorm, {shapes.tokens} x {shapes.width}", work, "TB/s", TOLERANCE[shapes.dtype])
    return beside_pytorch(task, lambda ops: lambda: ops.add_layernorm(x, residual, weight, bias, 1e-5), ops)


def bias_activation(shapes: Shapes, ops: Ops, device: torch.device) -> Case:
    x = torch.randn(shapes.tokens, 4 * shapes.width, device=device).to(shapes.dtype)
    bias = torch.randn(4 * shapes.width, device=device).to(shapes.dtype)

    def way(ops: Ops) -> Call:
        own = x.clone()  # ours works in place: only its first call sees x, and that result is checked
        return lambda: ops.bias_activation(own, bias, "gelu_new")

    name = f"bias_activation gelu_new, {shapes.tokens} x {4 * shapes.width}"
    return beside_pytorch(Task(name, 2 * x.numel() * x.element_size(), "TB/s", TOLERANCE[shapes.dtype]), way, ops)


def sampling(
    kind: str,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    adjusted: bool,
    shapes: Shapes,
    ops: Ops,
    device: torch.device,
) -> Case:
    """Checked against kernels.torch_ops: the reference would compare every two tokens of a vocabulary."""
    rows = shapes.sampled
    logits = 3 * torch.randn(rows, shapes.vocab, device=device)
    off, slots = torch.zeros(rows, device=device), torch.arange(rows, device=device)
    often = torch.randint(3, logits.shape, device=device)
    state = SamplingState(
        temperature=off + temperature,
        top_k=slots * 0 + top_k,
        top_p=off + top_p,
        min_p=off + min_p,
        repetition_penalty=off + 1.2,
        presence_penalty=off + 0.3,
        frequency_penalty=off + 0.2,
        adjusted=off.bool() | adjusted,
        seed=slots,
        choice=slots * 0,
        bias=torch.randn_like(logits),
        generated=often.int(),
        in_prompt=often == 2,
    )
    task = Task(f"sample {kind}, {rows} x {shapes.vocab}", 4 * logits.numel(), "TB/s", 0.0)
    return beside_pytorch(task, lambda ops: lambda: ops.sample(logits, state, slots, slots + 100), ops, oracle=torch_ops)


def cases(shapes: Shapes, ops: Ops, device: torch.device) -> list[partial[Case]]:
    """The table of all cases. Each is built when called, because a device could not hold all at once."""
    dense, banded = Pattern("dense"), Pattern("banded", shapes.band)
    strided, fixed = Pattern("strided", shapes.stride), Pattern("fixed", shapes.stride, shapes.summary)
    attentions: list[tuple[AttentionOp, Pattern]] = [
        ("decode_attention", dense),
        ("decode_attention", banded),
        ("decode_attention", strided),
        ("prefill_attention", dense),
        ("prefill_attention", banded),
        ("prefill_attention", strided),
        ("prefill_attention", fixed),
    ]
    samplers = [
        ("greedy", 0.0, 0, 1.0, 0.0, False),
        ("untruncated", 1.0, 0, 1.0, 0.0, False),
        ("top-p 0.9 + top-k 50", 1.0, 50, 0.9, 0.0, False),
        ("min-p 0.05, penalties and bias", 1.0, 0, 1.0, 0.05, True),
    ]
    return [
        *(
            partial(attention, op, pattern, dim, shapes, ops, device)
            for op, pattern in attentions
            for dim in shapes.head_dims
        ),
        *(partial(build, shapes, ops, device) for build in (kv_write, add_layernorm, bias_activation)),
        *(partial(sampling, *sampler, shapes, ops, device) for sampler in samplers),
    ]
