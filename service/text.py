"""From a choice's tokens to the text a client may see: whole characters only, and nothing of a stop string."""

import codecs
from collections.abc import Callable, Sequence


class TextStream:
    """Turns one choice's tokens into text, piece by piece.

    The pieces together are all tokens' bytes decoded at once, with U+FFFD for what is no UTF-8, up to the first stop
    string (see StopMatcher). A piece may be empty: bytes of an unfinished character, and text that may still become a
    stop string, wait for what follows. So call `finish` when generation ends otherwise than by a stop string, or the
    end of the text is lost.

    >>> stream = TextStream({1: b"caf", 2: b"\\xc3", 3: b"\\xa9\\n#", 4: b"##"}.__getitem__, ["\\n###"])
    >>> [stream.push(token) for token in (1, 2, 3, 4)], stream.stop
    (['caf', '', 'é', ''], '\\n###')
    """

    def __init__(self, token_bytes: Callable[[int], bytes], stops: Sequence[str]):
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._matcher = StopMatcher(stops)

    @property
    def stop(self) -> str | None:
        """The stop string before which the text ended, if one has been found."""
        return self._matcher.found

    @property
    def stopped(self) -> bool:
        return self.stop is not None

    def push(self, token: int) -> str:
        """The text that this token makes certain. Not to be called once `stopped`."""
        return self._matcher.push(self._decoder.decode(self._token_bytes(token)))

    def finish(self) -> str:
        """The rest, when no more tokens come: an unfinished character becomes U+FFFD. Empty if `stopped`."""
        if self.stopped:
            return ""
        return self._matcher.push(self._decoder.decode(b"", final=True)) + self._matcher.finish()


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
