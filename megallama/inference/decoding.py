"""Generated ids as text, while they come and when they are all there."""

from __future__ import annotations

from collections.abc import Sequence

from megallama.data import Tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes the bytes of an unfinished character to."""


class TextStream:
    """The text of ids that come one by one; only what later ids cannot change any more.

    A character may be split over several tokens, and SentencePiece drops the blank before the first piece of what it
    decodes: so each new piece is decoded together with the one before it, and the difference is what it added.

    Attributes:
        text: of the ids so far, without an unfinished character at its end.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.text = tokenizer, ""
        self._ids: list[int] = []
        self._before, self._read = 0, 0  # ids from `before` are decoded; the text holds those up to `read`

    def add(self, token: int) -> str:
        """What the text has grown by."""
        self._ids.append(token)
        known = self.tokenizer.decode(self._ids[self._before : self._read])
        now = self.tokenizer.decode(self._ids[self._before :])
        if len(now) <= len(known) or now.endswith(BROKEN):
            return ""
        return self._grow(now[len(known) :])

    def end(self) -> str:
        """What is left of an unfinished character."""
        known = self.tokenizer.decode(self._ids[self._before : self._read])
        return self._grow(self.tokenizer.decode(self._ids[self._before :])[len(known) :])

    def _grow(self, piece: str) -> str:
        self.text += piece
        self._before, self._read = self._read, len(self._ids)
        return piece


class StopWatch:
    """Looks for stop texts in an answer while its tokens come.

    Args:
        stops: none of them empty; without any, nothing is decoded.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self.stops, self._stream = stops, TextStream(tokenizer)
        self._longest = max(map(len, stops), default=0)

    def __call__(self, token: int) -> bool:
        """Whether a stop text has appeared with this token."""
        if not self.stops:
            return False
        fresh = len(self._stream.add(token))
        tail = self._stream.text[-(self._longest - 1 + fresh) :] if fresh else ""
        return any(stop in tail for stop in self.stops)


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text up to where the first of the stop texts begins in it."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def answer_text(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str] = ()) -> str:
    """The text of an answer's ids: without the end-of-text token, cut before the first stop text in it."""
    return before_stop(tokenizer.decode(ids[:-1] if ids and ids[-1] == tokenizer.eos else ids), stops)
