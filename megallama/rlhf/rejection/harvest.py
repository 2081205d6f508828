"""What comes of a finished run of rejection sampling: the bag, the dialogues to fine-tune on, curves and a summary."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from megallama.alignment import RejectionConfig
from megallama.data import ChatFormat, Prompt
from megallama.files import write_whole
from megallama.rlhf.parts import Parts
from megallama.rlhf.rejection.candidates import BAG, CUT, Candidate, bagged, best, dialogue
from megallama.rlhf.rejection.curves import Curves

SFT, TABLE, PICTURE, SUMMARY = "sft.jsonl", "curves.csv", "curves.png", "summary.json"
NAMED = 8
"""Prompts without an answer that are named on the terminal; the summary names all."""


class Harvest:
    """Picks, counts and curves, gathered prompt by prompt."""

    def __init__(self, section: RejectionConfig, form: ChatFormat):
        self.section, self.form = section, form
        self.curves = Curves(section.temperatures, section.samples)
        self.bag: list[dict[str, Any]] = []
        self.picks: list[dict[str, Any]] = []
        self.without: list[str] = []
        self.empty, self.finished = 0, np.zeros(len(section.temperatures), np.int64)

    def add(self, prompt: Prompt, candidates: Sequence[Candidate]) -> None:
        """All candidates of one prompt, in the order of a part."""
        own = [candidate for candidate in candidates if candidate.bag is None]
        shape = len(self.section.temperatures), self.section.samples
        self.curves.add(np.array([c.combined for c in own]).reshape(shape))
        self.finished += np.array([c.finish != CUT for c in own]).reshape(shape).sum(1)
        self.empty += sum(not c.text for c in own)
        if (top := best(own, self.form)) is not None:
            self.bag.append(bagged(prompt, top))
        if (pick := best(candidates, self.form)) is not None:
            self.picks.append(dialogue(prompt, pick))
        else:
            self.without.append(prompt.key)

    def summary(self, prompts: int) -> dict[str, Any]:
        """Numbers of the run, none of which depends on when or where it ran."""
        section, (largest, middle) = self.section, self.curves.means
        answers = prompts * section.samples
        return {
            "prompts": prompts,
            "samples": section.samples,
            "best_temperature": section.temperatures[self.curves.best()],
            "temperatures": {
                str(temperature): {
                    "reward_mean": float(largest[t, 0]),
                    "reward_max": float(largest[t, -1]),
                    "reward_median": float(middle[t, -1]),
                    "finished": int(self.finished[t]) / answers,
                }
                for t, temperature in enumerate(section.temperatures)
            },
            "picked": len(self.picks),
            "picked_by_version": dict(sorted(Counter(pick["model_version"] for pick in self.picks).items())),
            "picked_cut_off": sum(pick["finish"] == CUT for pick in self.picks),
            "empty_answers": self.empty,
            "prompts_without_answer": self.without,
        }


def grouped(parts: Parts, prompts: Sequence[Prompt], own: int) -> Iterator[tuple[Prompt, list[Candidate]]]:
    """Each prompt with its candidates, out of complete parts.

    Raises:
        ValueError: the parts were tampered with.
    """
    groups = groupby(_candidates(parts), key=lambda candidate: candidate.key)
    for prompt in prompts:
        key, candidates = next(groups, ("", iter(())))
        found = list(candidates)
        if key != prompt.key or sum(candidate.bag is None for candidate in found) != own:
            raise ValueError(
                f"{parts.folder / 'parts'} holds {len(found)} answers to {key!r} where {own} to {prompt.key!r} are "
                f"due: its files were changed; remove them and sample again"
            )
        yield prompt, found


def _candidates(parts: Parts) -> Iterator[Candidate]:
    try:
        for line in parts.records():
            yield Candidate(**line | {"ids": tuple(line["ids"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{parts.folder / 'parts'} has a line that is no answer ({error}): its files were changed; remove them and "
            f"sample again"
        ) from None


def harvest(parts: Parts, prompts: Sequence[Prompt], section: RejectionConfig, form: ChatFormat) -> list[str]:
    """Write all files; what to tell the user."""
    found = Harvest(section, form)
    for prompt, candidates in grouped(parts, prompts, len(section.temperatures) * section.samples):
        found.add(prompt, candidates)
    summary, folder = found.summary(len(prompts)), parts.folder
    write_whole(folder / BAG, _lines(found.bag))
    write_whole(folder / SFT, _lines(found.picks))
    write_whole(folder / TABLE, found.curves.table())
    write_whole(folder / PICTURE, found.curves.picture())
    write_whole(folder / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return told(summary, folder)


def told(summary: dict[str, Any], folder: Path) -> list[str]:
    """A summary in words."""
    rewards = ", ".join(f"{name}: {row['reward_max']:.4g}" for name, row in summary["temperatures"].items())
    by_version = ", ".join(f"{count} of {name}" for name, count in summary["picked_by_version"].items())
    lines = [
        f"best temperature for {summary['samples']} samples: {summary['best_temperature']} (best reward by "
        f"temperature: {rewards}); {folder / PICTURE}",
        f"{summary['picked']} dialogues ({by_version}) in {folder / SFT}",
    ]
    if summary["picked_cut_off"]:
        lines.append(
            f"{summary['picked_cut_off']} of them cut off: no usable answer to those prompts ended by itself within "
            f"rejection.max_new_tokens"
        )
    if without := summary["prompts_without_answer"]:
        more = f", … (all in {folder / SUMMARY})" if len(without) > NAMED else ""
        lines.append(f"{len(without)} prompts without a usable answer: {', '.join(without[:NAMED])}{more}")
    return lines


def _lines(records: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
