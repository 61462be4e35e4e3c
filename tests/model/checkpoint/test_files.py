"""Files are replaced as a whole or not at all."""

import io
import os
from pathlib import Path

import pytest

from model.checkpoint.files import decoded, few, json_lines, write_atomically


@pytest.mark.parametrize("options", [{}, {"durable": True}, {"shared": True}])
def test_a_file_has_its_old_content_until_the_block_ends(options: dict[str, bool], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with write_atomically(path, **options) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_after_an_error_the_old_content_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with write_atomically(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"], "half of a file may be what fills the disk"


def test_a_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    """safetensors makes files that only their owner reads, and a killed process may have left one."""
    plain, path = tmp_path / "plain", tmp_path / "file"
    plain.touch()
    left = tmp_path / "file.tmp"
    left.touch(mode=0o600)
    with write_atomically(path) as temporary:
        temporary.chmod(0o600)
    assert path.stat().st_mode == plain.stat().st_mode


def test_processes_that_share_a_file_write_to_temporary_files_of_their_own(tmp_path: Path) -> None:
    with write_atomically(tmp_path / "file", shared=True) as temporary:
        assert str(os.getpid()) in temporary.name


def test_five_names_are_shown_and_the_others_counted() -> None:
    assert few(["a", "b"]) == "a, b"
    assert few(list("abcde")) == "a, b, c, d, e"
    assert few(range(1, 8)) == "1, 2, 3, 4, 5 and 2 more"


def test_lines_of_json_have_the_numbers_of_the_file() -> None:
    """A mark that an editor put ahead of them, blank lines and either line end change nothing."""
    data = b'\xef\xbb\xbf1\r\n\r\n \t\n"\xe2\x80\xa8"\n\n4'
    assert list(json_lines(io.BytesIO(data), "x.jsonl")) == [(1, "1"), (4, '"\u2028"'), (6, "4")]
    assert decoded(data[:5], "x.jsonl") == "1\n"
    with pytest.raises(ValueError, match=r"^x\.jsonl is not UTF-8: .*0xff"):
        list(json_lines(io.BytesIO(b"1\n\xff"), "x.jsonl"))
