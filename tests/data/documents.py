"""Made-up documents, always the same, and where the tools are."""

from __future__ import annotations

import os
import random
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOL_ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
WORDS = ["the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "12", "1984", "é", "ß", "漢字", " ", "\t"]


def sentences(count: int, seed: int = 0) -> list[str]:
    """Documents of 1 to 60 words."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 60))) + f" n{i}.\n" for i in range(count)]
