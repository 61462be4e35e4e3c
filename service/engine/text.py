"""From a choice's tokens to the text a client may see: whole characters only, and nothing of a stop string."""

import codecs
import copy
from collections.abc import Sequence


class TextStream:
    """Turns one choice's tokens into text, piece by piece, and knows where in the text each token begins.

    Joined, the pieces are the bytes of all tokens decoded at once, up to the first stop string (see StopMatcher), which
    is included if `include_stop`. Bytes that are not UTF-8 become U+FFFD. A piece may be empty: an unfinished character,
    or text that may still become a stop string, waits for more. So call `finish` if generation ends without a stop
    string, or the end of the text is lost.

    `offsets` holds a number for every token: how many characters, counted from `start`, precede the character that holds
    its first byte. A token without bytes has the offset of the next character.

    >>> stream = TextStream(["\\n###"])
    >>> [stream.push(token) for token in (b"caf", b"\\xc3", b"\\xa9\\n#", b"##")], stream.stop
    (['caf', '', 'é', ''], '\\n###')
    >>> stream.offsets, stream.shown
    ([0, 3, 3, 6], 3)
    """

    def __init__(self, stops: "Sequence[str] | StopMatcher", *, include_stop: bool = False, start: int = 0):
        self.offsets: list[int] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_whole = True  # the decoder holds no bytes of an unfinished character
        self._matcher = stops.fresh() if isinstance(stops, StopMatcher) else StopMatcher(stops)
        self._include_stop = include_stop
        self._finished = False
        # Places in the text: the end of the decoded text, of the text passed on, and of the text in which no stop begins.
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
        """How many of the tokens a client may see: those that begin in the text passed on so far. It never falls.

        Once the text has ended without a stop string, all tokens are visible.
        """
        if self._finished:
            return len(self.offsets)
        held = (count for count in range(len(self.offsets), 0, -1) if self.offsets[count - 1] < self._passed_end)
        return next(held, 0)

    def push(self, data: bytes, *, searched: bool = True) -> str:
        """The text that a token of these bytes makes certain. Do not call it once `stopped`.

        No stop string begins in a token that is not `searched`. Such tokens must come first.
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
        """Where the next character will begin.

        Pending bytes count as the characters that they become if nothing completes them. Python's decoder also holds back
        the bytes of a surrogate.
        """
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
    """Passes text on up to the first stop string, and holds back an end of the text that may be the start of one.

    The first stop string is the one that completes first, character by character. If several complete with the same
    character, it is the longest of them. Time is linear in the text. Less is held back than the longest stop string.

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

    def fresh(self) -> "StopMatcher":
        """One for another text. They share what has been computed about the stop strings."""
        other = copy.copy(self)
        other.found, other._held = None, ""
        other._progress = [copy.copy(progress) for progress in self._progress]
        for progress in other._progress:
            progress.matched = 0
        return other

    def push(self, text: str) -> str:
        """The text that has become certain with this call."""
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
        """The text that is still held back; call it when no more text comes."""
        return "" if self.found else self._held

    def _release(self, text: str, end: int) -> str:
        certain, self._held = (self._held + text)[:end], (self._held + text)[end:]
        return certain


class StopProgress:
    """How much of one stop string the text ends with (Knuth, Morris and Pratt's automaton)."""

    def __init__(self, stop: str):
        self.stop = stop
        self.matched = 0
        # For each prefix of `stop`: the length of its longest proper suffix that is a prefix as well.
        self._borders = [0]
        for character in stop[1:]:
            self._borders.append(self._matched_after(self._borders[-1], character))

    def push(self, character: str) -> bool:
        """Whether the text now ends with the whole stop string. If so, do not call it again."""
        self.matched = self._matched_after(self.matched, character)
        return self.matched == len(self.stop)

    def _matched_after(self, matched: int, character: str) -> int:
        while matched and self.stop[matched] != character:
            matched = self._borders[matched - 1]
        return matched + (self.stop[matched] == character)
