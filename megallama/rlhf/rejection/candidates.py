"""Answers that compete for a prompt: sampled in this run, or the best of earlier runs; and which of them is learnt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megallama.data import ChatFormat, Origin, Prompt
from megallama.data.provenance import read_json
from megallama.data.record_files import convert, read_rows
from megallama.rlhf.parts import SETTINGS
from megallama.rlhf.prompts import TokenPrompt

BAG = "bag.jsonl"
"""In a run's folder: the best of its own answers to each prompt, for later runs."""
FORMAT = "format"
"""Key of a run's settings: tokenizer and template."""
CUT = "length"
"""Finish of an answer that did not end by itself."""


class Candidate(NamedTuple):
    """An answer and its scores, a line of a part.

    Attributes:
        key: of its prompt.
        bag: number of the entry of rejection.bags that it comes from; None = sampled in this run.
        version: name of the model that wrote it.
        temperature, sample, seed: how it was drawn; `sample` counts from 0 at each temperature.
        finish: eos, or length where it was cut off.
        text: without EOS and outer blanks.
        ids: EOS included.
        log_prob: of the whole answer at its temperature.
        helpfulness, safety, combined: logits, by this run's judges.
    """

    key: str
    bag: int | None
    version: str
    temperature: float
    sample: int
    seed: int
    finish: str
    text: str
    ids: tuple[int, ...]
    log_prob: float
    helpfulness: float = 0.0
    safety: float | None = None
    combined: float = 0.0


def text_of(form: ChatFormat, ids: Sequence[int]) -> str:
    """The text of an answer's ids; "" where one lies behind the tokenizer's last (a padded vocabulary has such)."""
    return form.text(ids) if max(ids) < form.tokenizer.vocab_size else ""


def learnable(form: ChatFormat, text: str) -> bool:
    """Whether fine-tuning would take the text as an answer: it has ids, and spells no special token."""
    try:
        return bool(text.encode() and form.answer(text))
    except ValueError:
        return False


def best(candidates: Iterable[Candidate], form: ChatFormat) -> Candidate | None:
    """The candidate to learn from; None where none is learnable.

    Answers that ended by themselves come before those that were cut off, whose end would be learnt as an end; then the
    higher combined score decides. Of equal ones the first of `candidates` wins. A part has those of rejection.bags
    first, in their order, then the run's own by temperature and number.
    """
    ranked = sorted(candidates, key=lambda c: (c.finish == CUT, -c.combined))
    return next((c for c in ranked if learnable(form, c.text)), None)


def dialogue(prompt: Prompt, candidate: Candidate) -> dict[str, Any]:
    """The candidate as a chat record; answers inside the prompt are not its model's and carry no loss."""
    messages = [
        {"role": m.role, "content": m.content} | ({"weight": 0} if m.role == "assistant" else {})
        for m in prompt.messages
    ]
    source = prompt.record.get("source")
    return {
        "id": prompt.key,
        "messages": [*messages, {"role": "assistant", "content": candidate.text}],
        "source": source if isinstance(source, str) else Path(prompt.origin.file).name.split(".")[0],
        "is_safety": prompt.is_safety,
        "model_version": candidate.version,
        "temperature": candidate.temperature,
        "sample": candidate.sample,
        "seed": candidate.seed,
        "finish": candidate.finish,
        "scores": {name: getattr(candidate, name) for name in ("helpfulness", "safety", "combined")},
    }


def bagged(prompt: Prompt, candidate: Candidate) -> dict[str, Any]:
    """A line of a bag: what `read_bag` reads."""
    return dialogue(prompt, candidate) | {"ids": candidate.ids, "log_prob": candidate.log_prob}


def read_bag(
    folder: str, number: int, form: ChatFormat, prompts: Mapping[str, TokenPrompt], longest: int
) -> dict[str, Candidate]:
    """Prompt key -> the best answer of an earlier run; its scores there do not count.

    Raises:
        ValueError: no finished run, one with another tokenizer or template, without any of the prompts, a key that
            names another prompt there, or a bad or too long record.
    """
    path = Path(folder) / BAG
    if not path.is_file():
        raise ValueError(
            f"rejection.bags: {folder} has no {BAG}; name output folders of finished rejection-sample runs"
        )
    if (read_json(Path(folder) / SETTINGS) or {}).get(FORMAT) != form.fingerprint():
        raise ValueError(
            f"rejection.bags: {folder} was made with another tokenizer or chat template, so its ids mean other texts; "
            f"leave it out, or set data.tokenizer and chat.separator as there"
        )

    def read(record: dict[str, Any], origin: Origin) -> Candidate:
        try:
            *asked, answer = record["messages"]
            found = Candidate(
                record["id"],
                number,
                record["model_version"],
                record["temperature"],
                record["sample"],
                record["seed"],
                record["finish"],
                answer["content"],
                tuple(int(token) for token in record["ids"]),
                record["log_prob"],
            )
            said = [(m["role"], m["content"]) for m in asked]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no record of a bag ({type(error).__name__}: {error})") from None
        if (prompt := prompts.get(found.key)) is None:
            return found
        if said != [(m.role, m.content) for m in prompt.record.messages]:
            raise ValueError(f"id {found.key!r} names another prompt than at {prompt.record.origin}; give each its own")
        if (tokens := len(prompt.ids) + len(found.ids)) > longest:
            raise ValueError(f"prompt and answer have {tokens} tokens, but data.seq_length={longest}; raise it")
        return found

    found = {candidate.key: candidate for candidate in convert(read_rows(path), read)}
    if not found.keys() & prompts.keys():
        raise ValueError(
            f"rejection.bags: {path} has answers to none of the {len(prompts)} prompts (the first there is "
            f"{next(iter(found))!r}); runs of one series need prompts with the same ids"
        )
    return found
