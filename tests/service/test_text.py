"""What a stream shows equals a slow, obvious reading of all its bytes, at every moment and not only at the end."""

from itertools import accumulate, pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.text import StopMatcher, TextStream

# Every start of a character's bytes. The last byte takes 64 values, so one character in 64 has all the starts.
# Surrogates are no characters, but Python's decoder, too, waits for all of their bytes before it replaces them.
UNFINISHED = {
    character[:length]
    for character in (chr(code).encode(errors="surrogatepass") for code in range(0x80, 0x110000, 64))
    for length in range(1, len(character))
}


def whole_characters(data: bytes) -> str:
    """`data` without a last character whose bytes are still arriving."""
    longest = max((length for length in range(4) if data[len(data) - length :] in UNFINISHED), default=0)
    return data[: len(data) - longest].decode(errors="replace")


def cut_at_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """`text` before the stop string that completes first, the longest of those; and that stop string."""
    for end in range(len(text) + 1):
        completed = [stop for stop in stops if text[:end].endswith(stop)]
        if completed:
            stop = max(completed, key=len)
            return text[: end - len(stop)], stop
    return text, None


def certain(text: str, stops: list[str]) -> str:
    """What of `text` no continuation can turn into part of a stop string."""
    before, stop = cut_at_stop(text, stops)
    if stop is not None:
        return before
    starts = {stop[:length] for stop in stops for length in range(1, len(stop))}
    return next(text[:end] for end in range(len(text) + 1) if text[end:] in starts or end == len(text))


def check_stream(tokens: list[bytes], stops: list[str]) -> None:
    """Compares a stream over `tokens` with the oracles after each push and at the end."""
    stream = TextStream(tokens.__getitem__, stops)
    shown = ""
    for token, data in enumerate(accumulate(tokens)):
        shown += stream.push(token)
        assert shown == certain(whole_characters(data), stops)
        if stream.stopped:
            break
    shown += stream.finish()
    assert (shown, stream.stop) == cut_at_stop(b"".join(tokens).decode(errors="replace"), stops)


ALPHABET = "abé🙂"
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=4)
# Starts, continuations and strangers: four-byte, three-byte and two-byte characters, surrogates, overlong forms.
BYTES = st.sampled_from(sorted(b"ab" + "é🙂€\ufffd".encode() + b"\xed\xa0\xc0\xf4\x90\xff\xe0")).map(lambda b: bytes([b]))


@st.composite
def cut_text(draw: st.DrawFn) -> list[bytes]:
    """The bytes of a text, cut into tokens anywhere."""
    data = draw(st.text(ALPHABET, max_size=30)).encode()
    cuts = sorted(draw(st.sets(st.integers(0, len(data)), max_size=20)) | {0, len(data)})
    return [data[start:end] for start, end in pairwise(cuts)]


@settings(max_examples=1000, deadline=None)
@given(tokens=cut_text(), stops=STOPS)
@example(tokens=[b"xabcy"], stops=["ab", "abc"])
@example(tokens=[b"xabcdy"], stops=["abcd", "bc"])
@example(tokens=[b"a", b"a", b"b"], stops=["aab", "ab"])
@example(tokens=[b"\xc3", b"\xa9\xf0\x9f", b"\x99\x82"], stops=["é🙂"])
@example(tokens=[b"ababab", b"c"], stops=["ababc", "babd"])
def test_text(tokens: list[bytes], stops: list[str]) -> None:
    check_stream(tokens, stops)


@settings(max_examples=1000, deadline=None)
@given(
    tokens=st.lists(st.lists(BYTES, max_size=4).map(b"".join), max_size=20),
    stops=st.lists(st.text("ab\ufffd", min_size=1, max_size=3), max_size=2),
)
@example(tokens=[b"\xe2\x80"], stops=["\ufffd"])
@example(tokens=[b"a\xed", b"\xa0\x80"], stops=[])
@example(tokens=[b"\xf0\x9f", b"a"], stops=["\ufffda"])
def test_bytes_that_are_no_text(tokens: list[bytes], stops: list[str]) -> None:
    check_stream(tokens, stops)


@settings(max_examples=300, deadline=None)
@given(tokens=st.lists(st.binary(max_size=5), max_size=20))
def test_any_bytes(tokens: list[bytes]) -> None:
    check_stream(tokens, [])


def pieces(tokens: list[bytes], stops: list[str]) -> list[str]:
    stream = TextStream(tokens.__getitem__, stops)
    shown = [stream.push(token) for token in range(len(tokens))]
    return [*shown, stream.finish()]


@pytest.mark.parametrize(
    ("tokens", "stops", "shown"),
    [
        ([b"caf", b"\xc3", b"\xa9\n#", b"##"], ["\n###"], ["caf", "", "é", "", ""]),
        ([b"one", b"\ntwo"], ["\n"], ["one", "", ""]),
        ([b"one\n", b"two"], ["\n###"], ["one", "\ntwo", ""]),
        ([b"one", b"\n#"], ["\n###"], ["one", "", "\n#"]),
        ([b"a\xe2\x80"], [], ["a", "\ufffd"]),
        ([b"stop at once, more behind"], ["stop"], ["", ""]),
    ],
)
def test_pieces(tokens: list[bytes], stops: list[str], shown: list[str]) -> None:
    assert pieces(tokens, stops) == shown


def test_overlapping_stops() -> None:
    """The first to complete wins, though another began earlier; of those that complete together, the longest."""
    matcher = StopMatcher(["abcd", "bc"])
    assert (matcher.push("xab"), matcher.push("cd"), matcher.found) == ("x", "a", "bc")
    matcher = StopMatcher(["bc", "abc"])
    assert (matcher.push("xab"), matcher.push("cd"), matcher.found) == ("x", "", "abc")


def test_nothing_is_held_without_stops() -> None:
    assert pieces([b"a", b"b"], []) == ["a", "b", ""]


def test_long_output_that_is_always_about_to_stop() -> None:
    stop = "a" * 200 + "b"
    shown = pieces([b"aaaa"] * 20_000, [stop])
    assert "".join(shown) == "a" * 80_000
    assert shown[-1] == "a" * 200


def test_text_after_a_stop_is_an_error() -> None:
    stream = TextStream([b"ab", b"c"].__getitem__, ["b"])
    assert stream.push(0) == "a"
    assert stream.stopped
    with pytest.raises(AssertionError, match="text after the stop string 'b'"):
        stream.push(1)


def test_empty_stop_string_is_an_error() -> None:
    with pytest.raises(AssertionError, match="empty stop string"):
        StopMatcher(["a", ""])
