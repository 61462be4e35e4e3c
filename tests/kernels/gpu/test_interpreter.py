"""Counts of toy kernels are right, and the interpreter computes bf16 as the hardware does."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.kernels.interpreter import Work, exact_bf16


@triton.jit
def _matmul(a, b, out, K, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """out (M, N) = a (M, K) @ b (K, N), K in tiles of BLOCK."""
    m, n = tl.arange(0, M)[:, None], tl.arange(0, N)[None]
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        left = tl.load(a + m * K + k[None], mask=k[None] < K, other=0.0)
        right = tl.load(b + k[:, None] * N + n, mask=k[:, None] < K, other=0.0)
        total = tl.dot(left, right, total)
    tl.store(out + m * N + n, total)


@triton.jit
def _copy_row(pages, out, page, first, stop, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Elements [first, stop) of a page of SIZE elements."""
    i = first + tl.arange(0, BLOCK)
    tl.store(out + i - first, tl.load(pages + page * SIZE + i, mask=i < stop), mask=i < stop)


@triton.jit
def _round(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i))


@triton.jit
def _double(x, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i) + tl.load(x + i))


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = torch.empty(a.shape[0], b.shape[1])
    _matmul[(1,)](a, b, out, a.shape[1], M=a.shape[0], N=b.shape[1], BLOCK=32)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bytes_flops_and_tiles_of_a_product(dtype: torch.dtype) -> None:
    a, b = torch.randn(16, 80).to(dtype), torch.randn(80, 64).to(dtype)
    with Work(a=a) as work:
        out = matmul(a, b)
    torch.testing.assert_close(out, a.float() @ b.float(), atol=1e-4, rtol=1e-4)
    # 80 is 2.5 tiles: masked lanes are multiplied, but not loaded.
    assert work.loaded == {"a": 16 * 80 * dtype.itemsize, "_matmul.b": 80 * 64 * dtype.itemsize}
    assert work.stored == {"_matmul.out": 16 * 64 * 4}
    assert work.dots == {(16, 64, 32): 3}
    assert work.flops == 3 * 2 * 16 * 64 * 32
    assert not work.out_of_bounds


def test_counts_add_up_over_launches_and_stop_with_the_context() -> None:
    a, b = torch.randn(16, 32), torch.randn(32, 16)
    with Work() as work:
        for _ in range(3):
            matmul(a, b)
    matmul(a, b)
    assert work.loaded == {"_matmul.a": 3 * 16 * 32 * 4, "_matmul.b": 3 * 32 * 16 * 4}
    assert work.dots == {(16, 16, 32): 3}


def test_pages_that_are_read_are_named() -> None:
    pages, out = torch.randn(8, 4, 16), torch.empty(64)
    with Work(k=pages, unused=torch.empty(3)) as work:
        for page in (2, 5):
            _copy_row[(1,)](pages, out, page, 16, 64, SIZE=64, BLOCK=64)
    assert work.pages("k") == {2, 5}
    assert work.pages("unused") == set()
    assert work.loaded == {"k": 2 * 48 * 4}
    assert not work.out_of_bounds


def test_a_read_past_the_end_is_found_and_not_done() -> None:
    storage = torch.full((9, 64), float("nan"))
    pages, out = storage[:8].normal_(), torch.empty(64)
    with Work(k=pages) as work:
        _copy_row[(1,)](pages, out, 7, 16, 70, SIZE=64, BLOCK=64)
    assert work.out_of_bounds == {"load": 6}  # not the store: `out` has room for all 54
    assert work.loaded == {"k": 48 * 4}
    assert not out[:54].isnan().any()


def test_a_write_before_the_start_is_found_and_not_done() -> None:
    storage = torch.zeros(80)
    pages = torch.ones(1, 64)
    with Work() as work:
        _copy_row[(1,)](pages, storage[16:], 0, 0, 64, SIZE=64, BLOCK=64)
        assert not work.out_of_bounds
        _copy_row[(1,)](pages, storage[17:], 0, 0, 64, SIZE=64, BLOCK=64)
    assert work.out_of_bounds == {"store": 1}
    assert torch.equal(storage, torch.cat((torch.zeros(16), torch.ones(64))))


def test_what_lies_between_the_rows_of_a_view_is_out_of_bounds() -> None:
    qkv = torch.randn(4, 3, 16)
    q, k = qkv[:, 0], qkv[:, 1]
    with Work(q=q, k=k) as work:
        _copy_row[(1,)](q, torch.empty(64), 0, 0, 64, SIZE=64, BLOCK=64)
    # 64 elements from q on: its row, k's row, v's row, and q's second row.
    assert work.loaded == {"q": 2 * 16 * 4, "k": 16 * 4}
    assert work.out_of_bounds == {"load": 16}


def test_a_bf16_product_is_wrong_without_the_fix_and_right_with_it() -> None:
    a, b = torch.randn(16, 64).bfloat16(), torch.randn(64, 16).bfloat16()
    expected = a.float() @ b.float()
    assert (matmul(a, b) - expected).abs().max() > 1000
    with exact_bf16():
        torch.testing.assert_close(matmul(a, b), expected, atol=1e-4, rtol=1e-4)
    with exact_bf16(), Work() as work:
        torch.testing.assert_close(matmul(a, b), expected, atol=1e-4, rtol=1e-4)
    assert work.loaded["_matmul.a"] == 16 * 64 * 2


def test_bf16_is_rounded_to_nearest_even() -> None:
    ulp = 2.0**-7
    special = [
        0.0,
        -0.0,
        float("inf"),
        float("-inf"),
        float("nan"),
        1e-40,
        3.4e38,
        1 + ulp / 2,
        1 + 3 * ulp / 2,
        2 - ulp / 4,
    ]
    x = torch.cat((torch.tensor(special), torch.randn(1014) * 2.0 ** torch.randint(-130, 100, (1014,))))
    out, back = torch.empty(1024, dtype=torch.bfloat16), torch.empty(1024)
    _round[(1,)](x, out, BLOCK=1024)
    assert not torch.equal(out.nan_to_num(), x.bfloat16().nan_to_num())  # the interpreter truncates
    with exact_bf16():
        _round[(1,)](x, out, BLOCK=1024)
        _round[(1,)](out, back, BLOCK=1024)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32])
def test_bf16_to_and_from_other_types(dtype: torch.dtype) -> None:
    x = torch.randn(64).mul(1000).bfloat16()
    there, back = torch.empty(64, dtype=dtype), torch.empty(64, dtype=torch.bfloat16)
    with exact_bf16():
        _round[(1,)](x, there, BLOCK=64)
        _round[(1,)](there + 1, back, BLOCK=64)
    assert torch.equal(there, x.to(dtype))
    assert torch.equal(back, (x.to(dtype) + 1).bfloat16())


def test_arithmetic_on_bf16_is_refused() -> None:
    with exact_bf16(), pytest.raises(InterpreterError, match="widen it to fp32 first"):
        _double[(1,)](torch.ones(16, dtype=torch.bfloat16), BLOCK=16)
