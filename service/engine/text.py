"""From a choice's tokens to the text a client may see: whole characters only, and nothing of a stop string."""

import codecs
from collections.abc import Sequence


class TextStream:
    """Turns one choice's tokens into text, piece by piece, and knows where in the text each token begins.

    The pieces together are all tokens' bytes decoded at once, with U+FFFD for what is no UTF-8, up to the first stop
    string (see StopMatcher), and with it if `include_stop`. A piece may be empty: bytes of an unfinished character, and
    text that may still become a stop string, wait for what follows. So call `finish` when generation ends otherwise than
    by a stop string, or the end of the text is lost.

    `offsets` holds for every token the number of characters before the one in which its first byte lies, counted from
    `start`; a token without bytes stands before the next character to begin.

    >>> stream = TextStream(["\\n###"])
    >>> [stream.push(token) for token in (b"caf", b"\\xc3", b"\\xa9\\n#", b"##")], stream.stop
    (['caf', '', 'é', ''], '\\n###')
    >>> stream.offsets, stream.shown
    ([0, 3, 3, 6], 3)
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False, start: int = 0):
        self.offsets: list[int] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_whole = True  # the decoder holds no bytes of an unfinished character
        self._matcher = StopMatcher(stops)
        self._include_stop = include_stop
        self._finished = False
        # Places in the text: the end of what is decoded, of what is passed on, and of what no stop string begins in.
        self._decoded_end = start
        self._passed_end = start
        self._unsearched_end = start

    @property
    def stop(self) -> str | None:
        """The stop string at which the text ended, if one has been found."""
        return self._matcher.found

    @property
    def stopped(self) -> bool:
        return self.stop is not None

    @property
    def shown(self) -> int:
        """How many of the tokens a client may see: up to the last that begins in the text passed on so far, and all of
        them once the text has ended without a stop string. It never falls."""
        if self._finished:
            return len(self.offsets)
        held = (count for count in range(len(self.offsets), 0, -1) if self.offsets[count - 1] < self._passed_end)
        return next(held, 0)

    def push(self, data: bytes, *, searched: bool = True) -> str:
        """The text that a token of these bytes makes certain. Not to be called once `stopped`.

        No stop string begins in a token that is not `searched`; those come first.
        """
        assert searched or self._unsearched_end == self._begun_end(), "unsearched text after searched text"
        if self._is_whole and data.isascii():  # most tokens
            text = data.decode("ascii")
            self.offsets.append(self._decoded_end)
            self._decoded_end += len(text)
        else:
            first, rest = data[:1], data[1:]
            text = self._decode(first)
            self.offsets.append(self._begun_end() - len(first))
            text += self._decode(rest)
            self._is_whole = not self._decoder.getstate()[0]
        if not searched:
            self._unsearched_end = self._begun_end()
        return self._pass_on(text)

    def finish(self) -> str:
        """The rest, when no more tokens come: an unfinished character becomes U+FFFD. Empty if `stopped`."""
        if self.stopped:
            return ""
        rest = self._pass_on(self._decode(b"", final=True)) + self._matcher.finish()
        self._finished = not self.stopped
        return rest

    def _decode(self, data: bytes, *, final: bool = False) -> str:
        text = self._decoder.decode(data, final)
        self._decoded_end += len(text)
        return text

    def _begun_end(self) -> int:
        """Where the next character will begin. Bytes of an unfinished one, and of a surrogate, which Python takes for
        unfinished, become as many characters now as they do in any text in which they stay what they are."""
        unfinished, _ = self._decoder.getstate()
        return self._decoded_end + len(unfinished.decode(errors="replace"))

    def _pass_on(self, text: str) -> str:
        unsearched = max(self._unsearched_end - (self._decoded_end - len(text)), 0)
        certain = text[:unsearched] + self._matcher.push(text[unsearched:])
        if self.stop is not None and self._include_stop:
            certain += self.stop
        self._passed_end += len(certain)
        return certain


class StopMatcher:
    """Passes text on up to the first stop string, and holds back any end of it that may be the start of one.

    The first is the one that completes first, reading character by character; of several that complete with the same
    character, the longest. Time is linear in the text, and what is held is shorter than the longest stop string.

    >>> matcher = StopMatcher(["abcd", "bc"])
    >>> matcher.push("xab"), matcher.push("cd"), matcher.found
    ('x', 'a', 'bc')
    """

    def __init__(self, stops: Sequence[str]):
        assert all(stops), "an empty stop string would end every text at once"
        self.found: str | None = None
        self._progress = [StopProgress(stop) for stop in stops]
        self._first_characters = frozenset(stop[0] for stop in stops)
        self._held = ""

    def push(self, text: str) -> str:
        """What of the text so far is certain now and was not before."""
        assert self.found is None, f"text after the stop string {self.found!r}"
        if not self._held and self._first_characters.isdisjoint(text):
            return text
        for place, character in enumerate(text, len(self._held) + 1):
            completed = [progress.stop for progress in self._progress if progress.push(character)]
            if completed:
                self.found = max(completed, key=len)
                return self._release(text, place - len(self.found))
        return self._release(text, len(self._held) + len(text) - max(progress.matched for progress in self._progress))

    def finish(self) -> str:
        """What is held back, when no more text comes."""
        return "" if self.found else self._held

    def _release(self, text: str, end: int) -> str:
        certain, self._held = (self._held + text)[:end], (self._held + text)[end:]
        return certain


class StopProgress:
    """How much of one stop string the text ends with: Knuth, Morris and Pratt's automaton."""

    def __init__(self, stop: str):
        self.stop = stop
        self.matched = 0
        # For each prefix of `stop`: the length of its longest proper suffix that is a prefix as well.
        self._borders = [0]
        for character in stop[1:]:
            self._borders.append(self._matched_after(self._borders[-1], character))

    def push(self, character: str) -> bool:
        """Whether the text now ends with the whole stop string, which must be the last call then."""
        self.matched = self._matched_after(self.matched, character)
        return self.matched == len(self.stop)

    def _matched_after(self, matched: int, character: str) -> int:
        while matched and self.stop[matched] != character:
            matched = self._borders[matched - 1]
        return matched + (self.stop[matched] == character)
