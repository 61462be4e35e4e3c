"""Weights in huge pages are the same weights."""

import gc
import mmap
import weakref

import pytest
import torch

from kernels.cpu import memory
from kernels.cpu.memory import ALIGNMENT, HUGE_PAGE, HugePages, mapped


def test_tensors_are_copied_side_by_side_and_large_ones_get_room_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CHUNK", 4096)
    monkeypatch.setattr(memory, "SMALL", 0)
    pages, originals = HugePages(), [torch.randn(size).bfloat16() for size in (3, 100, 1000, 1000, 5000, 1)]
    copies = [pages.copy(each) for each in originals]
    for copy, original in zip(copies, originals, strict=True):
        assert torch.equal(copy, original)
        assert copy.data_ptr() % ALIGNMENT == 0
    assert copies[1].data_ptr() - copies[0].data_ptr() == ALIGNMENT
    assert copies[4].data_ptr() % HUGE_PAGE == 0


def test_small_tensors_take_no_room_of_a_chunk() -> None:
    pages, small, large = HugePages(), torch.randn(100, 3).T, torch.randn(memory.SMALL // 4)
    pages.copy(large)
    left = len(pages._rest)
    copy = pages.copy(small)
    assert torch.equal(copy, small)
    assert copy.is_contiguous()
    assert copy.data_ptr() != small.data_ptr()
    assert copy.data_ptr() % ALIGNMENT == 0
    assert len(pages._rest) == left


def test_bytes_begin_with_a_huge_page_and_are_freed_with_the_last_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[object]] = []
    new = mmap.mmap

    class Mapping(new):  # type: ignore[misc, valid-type]
        def __init__(self, *_: object) -> None:
            made.append(weakref.ref(self))

    monkeypatch.setattr(mmap, "mmap", Mapping)
    room = mapped(10_000)
    assert (room.data_ptr() % HUGE_PAGE, len(room), int(room.sum())) == (0, 10_000, 0)
    part = room[5:10]
    del room
    gc.collect()
    assert made[0]()
    del part
    gc.collect()
    assert made[0]() is None


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="Linux has them")
def test_a_system_without_huge_pages_has_others(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Mapping(mmap.mmap):
        def madvise(self, advice: int, *_: int) -> None:
            asked.append(advice)
            raise OSError

    monkeypatch.setattr(mmap, "mmap", Mapping)
    assert len(mapped(10)) == 10
    assert asked == [mmap.MADV_HUGEPAGE]
