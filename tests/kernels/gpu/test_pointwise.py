"""kv_write, add_layernorm and bias_activation: CPU and Triton (interpreted) against the reference."""

from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference, torch_ops
from kernels.band import PAGE_SIZE
from kernels.gpu.add_layernorm import add_layernorm
from kernels.gpu.bias_activation import bias_activation
from kernels.gpu.kv_write import kv_write
from kernels.names import Activation
from tests.kernels.compiled import compiled_ops
from tests.kernels.interpreter import Work, exact_bf16


def compiled_kv_write(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slot_mapping: Tensor) -> None:
    compiled_ops(k.shape[-1], k.dtype).kv_write(k, v, k_pages, v_pages, slot_mapping)


def compiled_add_layernorm(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return compiled_ops(64, x.dtype).add_layernorm(x, *rest)


KV_WRITE = {"cpu": torch_ops.kv_write, "compiled": compiled_kv_write, "triton": kv_write}
ADD_LAYERNORM = {"cpu": torch_ops.add_layernorm, "compiled": compiled_add_layernorm, "triton": add_layernorm}
BIAS_ACTIVATION = {"cpu": torch_ops.bias_activation, "triton": bias_activation}

# One rounding of the result to the dtype; the CPU's bias_activation also rounds x + bias.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

paths = pytest.mark.parametrize("path", ["cpu", "triton"])
all_paths = pytest.mark.parametrize("path", ["cpu", "compiled", "triton"])
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE))
activations = pytest.mark.parametrize("activation", get_args(Activation))
ragged = pytest.mark.parametrize(("rows", "width"), [(1, 768), (3, 80), (63, 16), (3, 100), (2, 2560), (2, 1)])


@pytest.fixture(autouse=True)
def bf16_is_right() -> Iterator[None]:
    torch.manual_seed(0)
    with exact_bf16():
        yield


def island(rows: int, width: int, dtype: torch.dtype, shore: int = 8) -> Tensor:
    """Random (rows, width) in a sea of NaN."""
    sea = torch.full((rows + 2, width + 2 * shore), float("nan"), dtype=dtype)
    view = sea[1:-1, shore:-shore]
    view.copy_(torch.randn(rows, width))
    return view


def assert_close(ours: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)


def sea_of(view: Tensor) -> Tensor:
    """The whole memory around an island, with the island itself blanked."""
    sea = torch.as_strided(view, (view.shape[0] + 2, view.stride(0)), (view.stride(0), 1), 0).clone()
    sea[1:-1, 8:-8] = float("nan")
    return sea


# Each head size costs the compiled path a library in each dtype, of seconds. The last of each dtype are those of
# tests/kernels/test_attention.py.
@all_paths
@pytest.mark.parametrize(
    ("dtype", "rows", "heads", "dim"),
    [
        *((dtype, rows, heads, dim) for dtype in TOLERANCE for rows, heads, dim in ((1, 2, 16), (3, 4, 64), (33, 2, 16))),
        (torch.float32, 33, 3, 80),
        (torch.float16, 33, 2, 96),
        (torch.bfloat16, 33, 1, 128),
    ],
)
def test_kv_write_moves_bits_and_touches_nothing_else(
    path: str, dtype: torch.dtype, rows: int, heads: int, dim: int
) -> None:
    qkv = torch.full((rows, 3, heads, dim), float("nan"), dtype=dtype)
    qkv[:, 1:] = torch.randn(rows, 2, heads, dim)
    k, v = qkv[:, 1], qkv[:, 2]
    slots = torch.randperm(4 * PAGE_SIZE)[:rows]
    pools = [torch.full((4, heads, PAGE_SIZE, dim), float("nan"), dtype=dtype) for _ in range(4)]
    reference.kv_write(k, v, pools[2], pools[3], slots)
    with Work(k=k, v=v, k_pages=pools[0], v_pages=pools[1]) as work:
        KV_WRITE[path](k, v, pools[0], pools[1], slots)
    for ours, expected in zip(pools[:2], pools[2:], strict=True):
        torch.testing.assert_close(ours, expected, equal_nan=True, rtol=0, atol=0)
    assert not work.out_of_bounds
    if path == "triton":
        assert work.stored["k_pages"] == work.stored["v_pages"] == work.loaded["k"] == rows * heads * dim * dtype.itemsize
        assert work.pages("k_pages") == work.pages("v_pages") == set((slots // PAGE_SIZE).tolist())


@all_paths
def test_rows_of_k_and_v_may_lie_differently_far_apart(path: str) -> None:
    k, v = torch.randn(5, 3, 2, 16)[:, 1], torch.randn(5, 2, 16)
    pools = [torch.zeros(2, 2, PAGE_SIZE, 16) for _ in range(4)]
    slots = torch.tensor([0, 63, 64, 100, 127])
    KV_WRITE[path](k, v, pools[0], pools[1], slots)
    reference.kv_write(k, v, pools[2], pools[3], slots)
    assert torch.equal(pools[0], pools[2])
    assert torch.equal(pools[1], pools[3])


@paths
def test_no_rows_are_no_work(path: str) -> None:
    x, pages = torch.zeros(0, 16), torch.zeros(1, 1, PAGE_SIZE, 16)
    KV_WRITE[path](x[:, None], x[:, None], pages, pages, torch.zeros(0, dtype=torch.int64))
    assert ADD_LAYERNORM[path](x, x, None, None, 1e-5)[0].shape == (0, 16)
    assert BIAS_ACTIVATION[path](x, None, "relu").shape == (0, 16)


def test_kv_write_reaches_pages_beyond_32_bits() -> None:
    """Page 2**26 begins at element 2**37. In 32 bits, that would wrap into the only page there is."""
    k, page = torch.ones(1, 2, 16), torch.zeros(1, 2, PAGE_SIZE, 16)
    with Work() as work:
        kv_write(k, k, page, page.clone(), torch.tensor([2**26 * PAGE_SIZE]))
    assert work.out_of_bounds == {"store": 2 * 2 * 16}


@all_paths
@dtypes
@ragged
@pytest.mark.parametrize("given", ["residual weight bias", "weight bias", "residual weight", "residual", "bias"])
def test_add_layernorm(path: str, dtype: torch.dtype, rows: int, width: int, given: str) -> None:
    x = island(rows, width, dtype)
    residual = island(rows, width, dtype, shore=24) if "residual" in given else None
    weight, bias = (torch.randn(width).to(dtype) if name in given else None for name in ("weight", "bias"))
    before = x.clone()
    with Work() as work:
        normed, total = ADD_LAYERNORM[path](x, residual, weight, bias, 1e-5)
    expected, expected_total = reference.add_layernorm(x, residual, weight, bias, 1e-5)
    assert_close(normed, expected)
    assert torch.equal(total, expected_total)
    assert torch.equal(x, before)
    if residual is None:
        assert total is x
    assert not work.out_of_bounds
    if path == "triton":
        size = rows * width * dtype.itemsize
        assert sum(work.loaded.values()) == (1 + len(given.split())) * size
        assert sum(work.stored.values()) == (1 if residual is None else 2) * size


@all_paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_add_layernorm_takes_its_statistics_from_the_rounded_sum(path: str, dtype: torch.dtype) -> None:
    # 2048 + 1 is not an fp16 number: without rounding, the sums differ; rounded, they are all 2048.
    x, residual = torch.full((1, 64), 2048.0, dtype=dtype), torch.zeros(1, 64, dtype=dtype)
    residual[0, ::2] = 1.0
    normed, _ = ADD_LAYERNORM[path](x, residual, None, None, 1e-5)
    assert normed.eq(0).all() == (dtype is torch.float16)


@all_paths
def test_add_layernorm_of_values_far_from_zero(path: str) -> None:
    # Rounding would swallow the variance in the mean of squares minus the square of the mean.
    x = torch.randn(3, 768) + 10_000
    normed, _ = ADD_LAYERNORM[path](x, None, None, None, 1e-5)
    torch.testing.assert_close(normed, reference.add_layernorm(x, None, None, None, 1e-5)[0], atol=1e-3, rtol=1e-3)


@all_paths
def test_add_layernorm_of_a_constant_row_is_the_bias(path: str) -> None:
    bias = torch.randn(100)
    normed, _ = ADD_LAYERNORM[path](torch.full((2, 100), 3.0), None, torch.ones(100), bias, 1e-5)
    assert torch.equal(normed, bias.expand(2, 100))


@all_paths
def test_add_layernorm_of_the_widest_rows(path: str) -> None:
    x, residual = torch.randn(2, 12288).half(), torch.randn(2, 12288).half()
    normed, _ = ADD_LAYERNORM[path](x, residual, None, None, 1e-5)
    assert_close(normed, reference.add_layernorm(x, residual, None, None, 1e-5)[0])


@paths
def test_a_row_has_the_same_bits_in_any_batch(path: str) -> None:
    x, residual, bias = torch.randn(63, 768), torch.randn(63, 768), torch.randn(768)
    together, _ = ADD_LAYERNORM[path](x, residual, None, bias, 1e-5)
    activated = BIAS_ACTIVATION[path](x.clone(), bias, "gelu_new")
    for row in (0, 40, 62):
        one = slice(row, row + 1)
        assert torch.equal(ADD_LAYERNORM[path](x[one], residual[one], None, bias, 1e-5)[0], together[one])
        assert torch.equal(BIAS_ACTIVATION[path](x[one].clone(), bias, "gelu_new"), activated[one])


@paths
@dtypes
@ragged
@activations
@pytest.mark.parametrize("with_bias", [True, False])
def test_bias_activation(
    path: str, dtype: torch.dtype, rows: int, width: int, activation: Activation, with_bias: bool
) -> None:
    x = island(rows, width, dtype)
    bias = torch.randn(width).to(dtype) if with_bias else None
    expected = reference.bias_activation(x, bias, activation)
    with Work() as work:
        out = BIAS_ACTIVATION[path](x, bias, activation)
    assert_close(out, expected)
    assert sea_of(x).isnan().all()
    assert not work.out_of_bounds
    if path == "triton":
        size = rows * width * dtype.itemsize
        assert sum(work.stored.values()) == size
        assert sum(work.loaded.values()) == (1 + with_bias) * size


@paths
@dtypes
@activations
def test_bias_activation_saturates(path: str, dtype: torch.dtype, activation: Activation) -> None:
    largest = min(torch.finfo(dtype).max, 1e38)  # torch's own gelu doubles its argument
    x = torch.tensor([[-largest, -1e4, -100.0, -20.0, -5.0, -0.0, 0.0, 5.0, 20.0, 100.0, 1e4, largest]]).to(dtype)
    with np.errstate(over="ignore"):  # the cube of `largest`
        out = BIAS_ACTIVATION[path](x.clone(), None, activation)
    assert out.isfinite().all()
    # For large negative x, 1 + tanh loses digits in the reference too, though in fp64.
    torch.testing.assert_close(out, reference.bias_activation(x, None, activation), atol=1e-5, rtol=TOLERANCE[dtype])
    assert torch.equal(out[0, -3:], x[0, -3:])
    assert torch.equal(out[0, :3], torch.zeros(3, dtype=dtype))


@paths
@activations
def test_a_nan_stays_a_nan(path: str, activation: Activation) -> None:
    x = torch.tensor([[1.0, float("nan"), 2.0]])
    assert BIAS_ACTIVATION[path](x.clone(), None, activation).isnan().tolist() == [[False, True, False]]
    normed, _ = ADD_LAYERNORM[path](x, None, None, None, 1e-5)
    assert normed.isnan().all()


def test_the_cpu_path_is_differentiable() -> None:
    x, residual = (torch.randn(3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def block(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        normed, total = torch_ops.add_layernorm(x, residual, weight, bias, 1e-5)
        return torch_ops.bias_activation(normed, bias, "gelu_new") + torch_ops.bias_activation(total, None, "gelu")

    assert torch.autograd.gradcheck(block, (x, residual, weight, bias))


def test_the_gelus_differ_and_are_torchs() -> None:
    x = torch.linspace(-4, 4, 64)[None]
    for path in BIAS_ACTIVATION:
        tanh, erf = (BIAS_ACTIVATION[path](x.clone(), None, activation) for activation in ("gelu_new", "gelu"))
        assert_close(tanh, F.gelu(x, approximate="tanh"))
        assert_close(erf, F.gelu(x))
        assert (tanh - erf).abs().max() > 1e-4


def refused(message: str) -> "pytest.RaisesExc[AssertionError]":
    return pytest.raises(AssertionError, match=message)


def test_kv_write_refuses_what_it_would_scatter_wrongly() -> None:
    k, pages, slots = torch.zeros(3, 2, 16), torch.zeros(4, 2, PAGE_SIZE, 16), torch.arange(3)
    with refused(r"v has shape \(2, 2, 16\), not \(3, 2, 16\)"):
        kv_write(k, k[:2], pages, pages, slots)
    with refused(r"rows of k must be contiguous, strides are \(32, 1, 2\)"):
        kv_write(torch.zeros(3, 16, 2).transpose(1, 2), k, pages, pages, slots)
    with refused(r"rows of v must be contiguous, strides are \(64, 32, 1\)"):
        kv_write(k, torch.zeros(3, 2, 32)[..., :16], pages, pages, slots)
    with refused(r"k_pages has shape \(4, 3, 64, 16\), not \(4, 2, 64, 16\)"):
        kv_write(k, k, torch.zeros(4, 3, PAGE_SIZE, 16), pages, slots)
    with refused(r"^v_pages must be contiguous, strides are \(2048, 16, 32, 1\)"):
        kv_write(k, k, pages, torch.zeros(4, PAGE_SIZE, 2, 16).transpose(1, 2), slots)
    with refused("k_pages is torch.float16, not torch.float32"):
        kv_write(k, k, pages.half(), pages, slots)
    with refused("k_pages is on cpu, not on meta"):
        kv_write(k.to("meta"), k.to("meta"), pages, pages, slots)
    with refused(r"slot_mapping has shape \(4,\), not \(3,\)"):
        kv_write(k, k, pages, pages, torch.arange(4))
    with refused("slot_mapping is torch.int32, not torch.int64"):
        kv_write(k, k, pages, pages, slots.int())
    with refused(r"^slot_mapping must be contiguous, strides are \(2,\)"):
        kv_write(k, k, pages, pages, torch.arange(6)[::2])
    with refused("slot_mapping is on meta, not on cpu"):
        kv_write(k, k, pages, pages, slots.to("meta"))


def test_add_layernorm_refuses_what_it_would_compute_wrongly() -> None:
    x, weight = torch.zeros(3, 16), torch.zeros(16)
    with refused(r"rows of x must be contiguous, strides are \(1, 3\)"):
        add_layernorm(torch.zeros(16, 3).t(), None, None, None, 1e-5)
    with refused(r"residual has shape \(1, 16\), not \(3, 16\)"):
        add_layernorm(x, x[:1], None, None, 1e-5)
    with refused(r"rows of residual must be contiguous, strides are \(1, 3\)"):
        add_layernorm(x, torch.zeros(16, 3).t(), None, None, 1e-5)
    with refused(r"weight has shape \(15,\), not \(16,\)"):
        add_layernorm(x, None, weight[:15], None, 1e-5)
    with refused(r"^bias must be contiguous, strides are \(2,\)"):
        add_layernorm(x, None, weight, torch.zeros(32)[::2], 1e-5)
    with refused("residual is torch.float16, not torch.float32"):
        add_layernorm(x, x.half(), None, None, 1e-5)
    with refused("weight is on meta, not on cpu"):
        add_layernorm(x, None, weight.to("meta"), None, 1e-5)
    with refused("keeps no gradient"):
        add_layernorm(x.clone().requires_grad_(), None, None, None, 1e-5)


def test_bias_activation_refuses_what_it_would_compute_wrongly() -> None:
    x, bias = torch.zeros(3, 16), torch.zeros(16)
    with refused("unknown activation 'silu'"):
        bias_activation(x, None, "silu")  # type: ignore[arg-type]
    with refused(r"rows of x must be contiguous, strides are \(1, 3\)"):
        bias_activation(torch.zeros(16, 3).t(), None, "relu")
    with refused(r"bias has shape \(3, 16\), not \(16,\)"):
        bias_activation(x, x, "relu")
    with refused(r"^bias must be contiguous, strides are \(2,\)"):
        bias_activation(x, torch.zeros(32)[::2], "relu")
    with refused("bias is torch.bfloat16, not torch.float32"):
        bias_activation(x, bias.bfloat16(), "relu")
    with refused("bias is on meta, not on cpu"):
        bias_activation(x, bias.to("meta"), "relu")
    with refused("keeps no gradient"):
        bias_activation(x.clone().requires_grad_(), None, "relu")
