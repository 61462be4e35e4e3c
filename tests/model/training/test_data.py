"""Corpus files, shards and windows."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from model.checkpoint.tokenizer import r50k_base
from model.training.data import Windows, documents, open_shard, read_tokens, write_shard


def windows(sizes: list[int], length: int, seed: int = 0) -> Windows:
    """Over shards that together count from 0."""
    ends = np.cumsum(sizes)
    shards = [np.arange(end - size, end, dtype=np.uint16) for size, end in zip(sizes, ends, strict=True)]
    return Windows(shards, length, seed)


@pytest.mark.parametrize("sizes", [[100], [3, 50, 1, 46], [11], [19], [20], [21]])
def test_windows_are_pieces_of_the_text_and_an_epoch_sees_no_token_twice(sizes: list[int]) -> None:
    all_windows, total = windows(sizes, 10), sum(sizes)
    offsets = set()
    for epoch in range(30):
        starts = []
        for place in range(all_windows.per_epoch):
            window = all_windows[epoch * all_windows.per_epoch + place]
            assert torch.equal(window, torch.arange(int(window[0]), int(window[0]) + 11))
            assert 0 <= window[0] <= window[-1] < total
            starts.append(int(window[0]))
        starts.sort()
        assert all(later - earlier == 10 for earlier, later in pairwise(starts))
        assert total - len(starts) * 10 < 20, "what an epoch leaves out is at its ends"
        offsets.add(starts[0])
    assert len(offsets) >= min(5, total - 10), "windows slide from epoch to epoch"


def test_a_window_depends_on_its_number_and_the_seed_only() -> None:
    forwards, backwards = windows([500], 10), windows([500], 10)
    numbers = range(3 * forwards.per_epoch)
    found = {number: forwards[number] for number in numbers}
    assert all(torch.equal(backwards[number], found[number]) for number in reversed(numbers))
    other = windows([500], 10, seed=1)
    assert any(not torch.equal(other[number], found[number]) for number in numbers)


def test_batches_are_inputs_and_the_tokens_after_them() -> None:
    inputs, targets = windows([300], 10).batch(7, 5)
    assert inputs.shape == targets.shape == (5, 10)
    assert torch.equal(inputs + 1, targets)


def test_a_corpus_shorter_than_a_window_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match="the corpus has 10 tokens; at least 11 are needed"):
        windows([4, 6], 10)


def test_documents_end_in_end_of_text_in_memory_and_in_a_shard(tmp_path: Path) -> None:
    path = tmp_path / "tales.txt"
    path.write_text("Once upon a time\n\n<|endoftext|>\n<|endoftext|>\nThe end", encoding="utf-8")
    assert list(documents(path)) == ["Once upon a time", "The end"]
    tokenizer = r50k_base()
    eos = [tokenizer.eos_id]
    expected = tokenizer.encode("Once upon a time") + eos + tokenizer.encode("The end") + eos
    assert read_tokens([path], tokenizer).tolist() == expected
    shard = write_shard(path, tokenizer, tmp_path / "tokens")
    assert open_shard(shard).tolist() == expected
    assert shard.suffix == ".uint16"


def test_a_shard_is_written_once_for_a_content(tmp_path: Path) -> None:
    path = tmp_path / "tales.txt"
    path.write_text("one", encoding="utf-8")
    first = write_shard(path, r50k_base(), tmp_path / "tokens")
    written = first.stat().st_mtime_ns
    assert write_shard(path, r50k_base(), tmp_path / "tokens") == first
    assert first.stat().st_mtime_ns == written
    path.write_text("two", encoding="utf-8")
    assert write_shard(path, r50k_base(), tmp_path / "tokens") != first


def test_another_tokenizer_makes_another_shard(tmp_path: Path) -> None:
    path = tmp_path / "tales.txt"
    path.write_text("one", encoding="utf-8")
    first, second = (write_shard(path, r50k_base(eos_ids), tmp_path / "tokens") for eos_ids in ((), [0]))
    assert open_shard(first)[-1] == 50256
    assert open_shard(second)[-1] == 0


def test_a_corpus_without_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text("\n\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"empty\.txt holds no text to train on"):
        read_tokens([path], r50k_base())


def test_a_corpus_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("Märchen".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8: .* position 1"):
        read_tokens([path], r50k_base())
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8"):
        write_shard(path, r50k_base(), tmp_path)
    assert [found.name for found in tmp_path.iterdir() if found.suffix == ".uint16"] == []


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    plain, marked = tmp_path / "plain.txt", tmp_path / "marked.txt"
    plain.write_bytes(b"<|endoftext|>\na tale\n")
    marked.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    assert list(documents(marked)) == list(documents(plain)) == ["a tale"]
    assert read_tokens([marked], r50k_base()).tolist() == read_tokens([plain], r50k_base()).tolist()
