"""The unigram entropy that inspect_data prints, which the quickstart measures its loss against."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from megallama.data import IndexedWriter

TOOL = Path(__file__).parents[2] / "tools" / "inspect_data.py"


def test_entropy_of_known_frequencies(tmp_path: Path) -> None:
    documents = [[1, 1, 5], [300], [1, 5, 7, 7, 7, 1]]
    with IndexedWriter(tmp_path / "data", np.uint16) as writer:
        for ids in documents:
            writer.add_document(ids)
    counts = Counter(i for ids in documents for i in ids)
    total = counts.total()
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    done = subprocess.run(
        [sys.executable, str(TOOL), str(tmp_path / "data"), "--entropy"], capture_output=True, text=True, timeout=100
    )
    assert done.stdout == f"{entropy:.4f}\n"
