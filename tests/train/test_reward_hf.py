"""A reward model in transformers' hands: exported, scored there alike, and read back bit by bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from alignment_world import MODEL, RandomSource

from megallama.checkpoint.formats import HFSource
from megallama.checkpoint.formats.convert import Target, convert
from megallama.checkpoint.formats.hf import write_hf
from megallama.checkpoint.formats.native import StoreSource, write_store
from megallama.config import SCALAR, Config, DataConfig, TrainConfig
from megallama.parallel.pieces import Rect, matrix
from megallama.runtime.mesh import Mesh
from megallama.train.models import frozen
from megallama.train.scoring import scores

JUDGE = replace(MODEL, head=SCALAR)
CONFIG = Config(data=DataConfig(seq_length=64), train=TrainConfig(dtype="float32"))


@pytest.mark.slow
@pytest.mark.parametrize("tied", (False, True))  # a tied chat model's reward model has a head of its own
def test_transformers_gives_the_same_scores(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForSequenceClassification

    source = RandomSource(replace(JUDGE, tie_word_embeddings=tied))
    write_hf(source, tmp_path / "hf")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf", local_files_only=True)
    assert type(theirs).__name__ == "LlamaForSequenceClassification" and theirs.num_labels == 1
    draw = np.random.default_rng(0)
    rows = [draw.integers(3, 300, size=n) for n in (5, 17, 2)]
    ours = scores(frozen(CONFIG, Mesh(), HFSource(tmp_path / "hf")), rows)
    with torch.no_grad():
        expected = [float(theirs(torch.from_numpy(row)[None]).logits) for row in rows]
    assert ours.tolist() == pytest.approx(expected, abs=1e-5)


def test_it_goes_through_formats_bit_by_bit(tmp_path: Path) -> None:
    source = RandomSource(JUDGE)
    write_store(source, tmp_path / "ours")
    convert(StoreSource(tmp_path / "ours"), "hf", tmp_path / "hf", Target(), lambda more: None)
    back = HFSource(tmp_path / "hf")
    assert back.model.head == SCALAR and list(back.shapes) == list(source.shapes)
    for name, shape in source.shapes.items():
        rows, cols = matrix(shape)
        a, b = (torch.empty(rows, cols) for _ in range(2))
        source.read(name, Rect(0, rows, 0, cols), a)
        back.read(name, Rect(0, rows, 0, cols), b)
        assert torch.equal(a, b), name


@pytest.mark.parametrize("form", ("meta", "megatron"))
def test_formats_without_a_place_for_the_score_refuse_it(tmp_path: Path, form: str) -> None:
    with pytest.raises(ValueError, match="is a reward model; its scalar head has a place in megallama and hf only"):
        convert(RandomSource(JUDGE), form, tmp_path / form, Target(), lambda more: None)
    assert not (tmp_path / form).exists()
