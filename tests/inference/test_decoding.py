"""Text while its tokens come: the same as the whole, never half a character; and stop texts, however they are cut."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.data.tokenizer import SentencePieceTokenizer
from megallama.inference.decoding import BROKEN, StopWatch, TextStream, answer_text

TEXTS = ["Hello  there", " a blank first", "naïve café, 12 €", "日本語 and 🦙🦙 llamas\n\nnew", "", "tab\tand\n"]


def pieces(tokenizer: SentencePieceTokenizer, ids: Sequence[int]) -> list[str]:
    stream = TextStream(tokenizer)
    found = [stream.add(token) for token in ids]
    assert stream.text == "".join(found)
    return [*found, stream.end()]


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_adds_up_to_the_text(tokenizer: SentencePieceTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    found = pieces(tokenizer, ids)
    assert "".join(found) == tokenizer.decode(ids)
    assert BROKEN not in "".join(found)


def test_a_character_of_several_tokens_appears_at_once(tokenizer: SentencePieceTokenizer) -> None:
    found = pieces(tokenizer, tokenizer.encode("a🦙b"))
    assert len(found) > 5  # four of them bytes
    assert [piece for piece in found if piece] == ["a", "🦙", "b"]


def test_what_stays_broken_comes_at_the_end(tokenizer: SentencePieceTokenizer) -> None:
    ids = tokenizer.encode("ab🦙")[:-2]
    *before, last = pieces(tokenizer, ids)
    assert "".join(before) == "ab"
    assert set(last) == {BROKEN}
    assert "".join(before) + last == tokenizer.decode(ids)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(3, 290), max_size=25))
def test_any_ids_stream_to_what_they_decode_to(tokenizer: SentencePieceTokenizer, ids: list[int]) -> None:
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_stop_text_is_seen_with_the_token_that_completes_it(tokenizer: SentencePieceTokenizer) -> None:
    ids = tokenizer.encode("the mat and 🦙 there was")
    for stop in ("mat", "t and", "🦙", " th", "the mat"):
        watch, seen = StopWatch(tokenizer, ("nowhere", stop)), []
        for n, token in enumerate(ids, 1):
            if watch(token):
                seen.append(n)
                break
        assert seen == [next(n for n in range(len(ids) + 1) if stop in tokenizer.decode(ids[:n]))]


def test_without_stop_texts_nothing_is_decoded() -> None:
    watch = StopWatch(None, ())  # type: ignore[arg-type]
    assert not watch(3)


def test_an_answers_text_ends_before_its_end_and_its_stops(tokenizer: SentencePieceTokenizer) -> None:
    ids = tokenizer.encode("the llama sat on the mat")
    assert tokenizer.eos is not None
    assert answer_text(tokenizer, [*ids, tokenizer.eos]) == "the llama sat on the mat"
    assert answer_text(tokenizer, ids, ("mat", "sat", "nowhere")) == "the llama "
    assert answer_text(tokenizer, []) == ""
