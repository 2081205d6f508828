"""Prompts as ids, for the stages that answer them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megallama.data import ChatFormat, Prompt
from megallama.train.sources import named


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt as ids, up to where the answer begins."""

    record: Prompt
    ids: tuple[int, ...]


def tokenise(prompts: Sequence[Prompt], form: ChatFormat, longest: int) -> list[TokenPrompt]:
    """Prompts as ids.

    Raises:
        ValueError: one leaves no room for an answer within `longest` tokens; names file and line.
    """
    found = []
    for record in prompts:
        with named(record.origin):
            found.append(TokenPrompt(record, tuple(form.prompt(record.messages))))
    for prompt in found:
        if len(prompt.ids) >= longest:
            raise ValueError(
                f"{prompt.record.origin}: the prompt has {len(prompt.ids)} tokens, which leaves no room for an answer "
                f"within data.seq_length={longest}; raise it, or remove the record"
            )
    return found
