"""At every moment, not only at the end, a stream shows the same text as a slow, obvious reading of its bytes."""

import codecs
from itertools import accumulate, pairwise, product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.engine.text import StopMatcher, TextStream

# Every incomplete beginning of a character. The last byte takes 64 values, so every 64th character is enough.
# Surrogates are not characters, but Python's decoder also waits for all of their bytes before it replaces them.
UNFINISHED = {
    character[:length]
    for character in (chr(code).encode(errors="surrogatepass") for code in range(0x80, 0x110000, 64))
    for length in range(1, len(character))
}


def whole_characters(data: bytes) -> str:
    """The text of `data`, except for a last character whose bytes are still arriving."""
    longest = max((length for length in range(4) if data[len(data) - length :] in UNFINISHED), default=0)
    return data[: len(data) - longest].decode(errors="replace")


def cut_at_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text ahead of the stop string that completes first, and that stop string. Of several, the longest one counts."""
    for end in range(len(text) + 1):
        completed = [stop for stop in stops if text[:end].endswith(stop)]
        if completed:
            stop = max(completed, key=len)
            return text[: end - len(stop)], stop
    return text, None


def certain(text: str, stops: list[str]) -> str:
    """The part of `text` that no continuation can turn into part of a stop string."""
    before, stop = cut_at_stop(text, stops)
    if stop is not None:
        return before
    starts = {stop[:length] for stop in stops for length in range(1, len(stop))}
    return next(text[:end] for end in range(len(text) + 1) if text[end:] in starts or end == len(text))


def character_of_bytes(data: bytes) -> list[int]:
    """The index of each byte's character when `data` is decoded as a whole."""
    replaced: dict[int, int] = {}

    def replace(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeDecodeError)
        replaced[error.start] = error.end
        return "\ufffd", error.end

    codecs.register_error("tests.replace_and_remember", replace)
    text = data.decode(errors="tests.replace_and_remember")
    characters: list[int] = []
    for index, character in enumerate(text):
        place = len(characters)
        length = replaced[place] - place if place in replaced else len(character.encode())
        characters += [index] * length
    assert len(characters) == len(data)
    return characters


def offsets_of(tokens: list[bytes]) -> list[int]:
    """Where each token begins in the text of all of them."""
    characters = character_of_bytes(b"".join(tokens))
    starts = [end - len(token) for token, end in zip(tokens, accumulate(map(len, tokens)), strict=True)]
    return [
        characters[start] if token else max(characters[:start], default=-1) + 1
        for token, start in zip(tokens, starts, strict=True)
    ]


def shown_of(offsets: list[int], end: int) -> int:
    """How many tokens there are up to the last one that begins before `end`."""
    return max((count for count, offset in enumerate(offsets, 1) if offset < end), default=0)


def check_stream(
    tokens: list[bytes], stops: list[str], *, unsearched: int = 0, include_stop: bool = False, start: int = 0
) -> None:
    """Compares a stream over `tokens` with the oracles after each push and at the end."""
    stream = TextStream(stops, include_stop=include_stop, start=start)
    text, shown = "", 0
    offsets = [start + offset for offset in offsets_of(tokens)]
    whole = b"".join(tokens).decode(errors="replace")
    # No stop string begins before this character.
    free = max(character_of_bytes(b"".join(tokens))[: len(b"".join(tokens[:unsearched]))], default=-1) + 1
    before, stop = cut_at_stop(whole[free:], stops)
    end = whole[:free] + before + (stop if stop and include_stop else "")

    for count, data in enumerate(accumulate(tokens), 1):
        text += stream.push(tokens[count - 1], searched=count > unsearched)
        so_far = whole_characters(data)
        known = so_far[:free] + certain(so_far[free:], stops)
        assert text == (end if stream.stopped else known)
        assert stream.offsets == offsets[:count]
        assert stream.shown == shown_of(offsets[:count], start + len(text))
        assert stream.shown >= shown
        shown = stream.shown
        if stream.stopped:
            break
    text += stream.finish()
    assert (text, stream.stop) == (end, stop)
    assert stream.shown == (shown_of(stream.offsets, start + len(text)) if stop else len(tokens))
    assert stream.shown >= shown


ALPHABET = "abé🙂"
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=4)
# First, continuation and invalid bytes: characters of two to four bytes, surrogates, overlong forms.
BYTES = st.sampled_from(sorted(b"ab" + "é🙂€\ufffd".encode() + b"\xed\xa0\xc0\xf4\x90\xff\xe0")).map(lambda b: bytes([b]))


@st.composite
def cut_text(draw: st.DrawFn) -> list[bytes]:
    """The bytes of a text, cut into tokens anywhere."""
    data = draw(st.text(ALPHABET, max_size=30)).encode()
    cuts = sorted(draw(st.sets(st.integers(0, len(data)), max_size=20)) | {0, len(data)})
    return [data[start:end] for start, end in pairwise(cuts)]


@settings(max_examples=1000, deadline=None)
@given(tokens=cut_text(), stops=STOPS, unsearched=st.integers(0, 5), include_stop=st.booleans())
@example(tokens=[b"xabcy"], stops=["ab", "abc"], unsearched=0, include_stop=False)
@example(tokens=[b"xabcdy"], stops=["abcd", "bc"], unsearched=0, include_stop=True)
@example(tokens=[b"a", b"a", b"b"], stops=["aab", "ab"], unsearched=1, include_stop=False)
@example(tokens=[b"\xc3", b"\xa9\xf0\x9f", b"\x99\x82"], stops=["é🙂"], unsearched=0, include_stop=False)
@example(tokens=[b"\xc3", b"\xa9\xf0\x9f", b"\x99\x82"], stops=["é", "🙂"], unsearched=1, include_stop=True)
@example(tokens=[b"ababab", b"c"], stops=["ababc", "babd"], unsearched=0, include_stop=False)
def test_text(tokens: list[bytes], stops: list[str], unsearched: int, include_stop: bool) -> None:
    check_stream(tokens, stops, unsearched=unsearched, include_stop=include_stop, start=7)


@settings(max_examples=1000, deadline=None)
@given(
    tokens=st.lists(st.lists(BYTES, max_size=4).map(b"".join), max_size=20),
    stops=st.lists(st.text("ab\ufffd", min_size=1, max_size=3), max_size=2),
    unsearched=st.integers(0, 5),
)
@example(tokens=[b"\xe2\x80"], stops=["\ufffd"], unsearched=0)
@example(tokens=[b"a\xed", b"\xa0\x80"], stops=[], unsearched=0)
@example(tokens=[b"\xed", b"\xa0", b"\x80"], stops=["\ufffd"], unsearched=2)
@example(tokens=[b"\xf0\x9f", b"a"], stops=["\ufffda"], unsearched=0)
@example(tokens=[b"\xf0\x9f", b"a"], stops=["\ufffda"], unsearched=1)
def test_bytes_that_are_no_text(tokens: list[bytes], stops: list[str], unsearched: int) -> None:
    check_stream(tokens, stops, unsearched=unsearched)


@settings(max_examples=300, deadline=None)
@given(tokens=st.lists(st.binary(max_size=5), max_size=20))
def test_any_bytes(tokens: list[bytes]) -> None:
    check_stream(tokens, [])


def test_every_order_of_bytes_that_mean_something_else() -> None:
    """First bytes of characters of 1 to 4 bytes, those with special rules for the next byte, and the limits of the rules."""
    for data in product(b"a\x80\x90\xa0\xbf\xc1\xc3\xe0\xe2\xed\xf0\xf4\xf5", repeat=4):
        check_stream([bytes([byte]) for byte in data], [])


def pieces(tokens: list[bytes], stops: list[str]) -> list[str]:
    stream = TextStream(stops)
    shown = [stream.push(token) for token in tokens]
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
    """The first to complete wins, even if another began earlier. If several complete together, the longest wins."""
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
    stream = TextStream(["b"])
    assert stream.push(b"ab") == "a"
    assert stream.stopped
    with pytest.raises(AssertionError, match="text after the stop string 'b'"):
        stream.push(b"c")


def test_unsearched_text_comes_first() -> None:
    stream = TextStream(["b"])
    assert [stream.push(data, searched=False) for data in (b"ab", b"", b"\xc3")] == ["ab", "", ""]
    assert stream.push(b"\xa9c") == "éc"
    with pytest.raises(AssertionError, match="unsearched text after searched text"):
        stream.push(b"b", searched=False)


def test_stop_string_across_the_border_of_unsearched_text() -> None:
    """It is not found: no stop string may begin in unsearched text."""
    stream = TextStream(["##"])
    assert [stream.push(b"a#", searched=False), stream.push(b"#b"), stream.push(b"##")] == ["a#", "#b", ""]
    assert (stream.stop, stream.offsets, stream.shown) == ("##", [0, 2, 4], 2)


def test_stop_string_in_the_text() -> None:
    stream = TextStream(["##"], include_stop=True)
    assert [stream.push(b"a#"), stream.shown, stream.push(b"#b"), stream.shown] == ["a", 1, "##", 2]
    assert stream.finish() == ""


def test_tokens_without_text() -> None:
    """They begin with the next new character. They are shown together with a later token, or at the end."""
    stream = TextStream([], start=10)
    seen = []
    for token in (b"", b"\xc3", b"", b"\xa9", b"a", b""):
        stream.push(token)
        seen.append(stream.shown)
    assert stream.offsets == [10, 10, 11, 10, 11, 12]
    assert seen == [0, 0, 0, 4, 5, 5]
    assert stream.finish() == ""
    assert stream.shown == 6


def test_empty_stop_string_is_an_error() -> None:
    with pytest.raises(AssertionError, match="empty stop string"):
        StopMatcher(["a", ""])
