"""All formats together: there and back, failures, our own checkpoints, and the proof by logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from weights import DTYPES, GQA, RandomSource, assert_same

from megallama.checkpoint import store
from megallama.checkpoint.formats import (
    HFSource,
    Source,
    StoreSource,
    open_megatron,
    open_meta,
    write_hf,
    write_megatron,
    write_meta,
    write_store,
)
from megallama.checkpoint.formats.placement import Composite, Part, cut, heads, new_folder
from megallama.model.canonical import FINAL_NORM, block_name
from megallama.parallel.pieces import Rect
from megallama.train.prove import BOUND, prove


class TestParts:
    @pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 12])
    def test_cutting_rows_of_interleaved_heads(self, count: int) -> None:
        """Also inside a head, where a shard holds every other row of either half."""
        stored = torch.zeros(12, 5)
        tensor = torch.arange(60.0).view(12, 5)
        composite = heads("w", 0, 3, 4, 5, True)
        for n in range(count):
            shard = cut(composite, 0, n, count)
            for part in shard.parts:
                rows = stored[n * 12 // count : (n + 1) * 12 // count]
                part.view(rows).copy_(tensor[part.rect.r0 : part.rect.r1])
        assert torch.equal(stored, tensor.view(3, 2, 2, 5).transpose(1, 2).reshape(12, 5))

    def test_cutting_columns(self) -> None:
        part = Part("w", Rect(3, 5, 10, 20), first=1, step=3, col=2)
        assert cut(Composite((7, 15), ("w",), (part,)), 1, 1, 3) == Composite(
            (7, 5), ("w",), (Part("w", Rect(3, 5, 13, 18), 1, 3, 0),)
        )
        assert part.columns(12, 15) is None and part.rows(2, 4) is None and part.rows(5, 9) is None
        assert part.rows(4, 5) == Part("w", Rect(4, 5, 10, 20), 0, 3, 2)


WRITERS: dict[str, Callable[[Source, Path], None]] = {
    "hf": lambda source, folder: write_hf(source, folder, max_shard_bytes=20_000),
    "meta": lambda source, folder: write_meta(source, folder, 8),
    "megatron": lambda source, folder: write_megatron(source, folder, (2, 2, 1)),
    "megallama": lambda source, folder: write_store(source, folder, (2, 3)),
}
READERS: dict[str, Callable[[Path], Source]] = {
    "hf": HFSource,
    "meta": open_meta,
    "megatron": open_megatron,
    "megallama": StoreSource,
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_once_round_all_formats(tmp_path: Path, dtype: torch.dtype) -> None:
    """hf -> megallama -> meta -> megatron -> megallama -> hf: the last files are the first ones, byte by byte."""
    given = RandomSource(GQA, dtype)
    write_hf(given, tmp_path / "0", max_shard_bytes=20_000)
    source: Source = HFSource(tmp_path / "0")
    for n, form in enumerate(("megallama", "meta", "megatron", "megallama", "hf"), 1):
        WRITERS[form](source, tmp_path / str(n))
        source = READERS[form](tmp_path / str(n))
        assert_same(source, given.tensors)
    first, last = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in "05")
    assert len(first) > 4
    changed = {name for name in first if first[name] != last[name]}
    assert first.keys() == last.keys() and changed == {"config.json"}  # Meta does not store the longest sequence
    assert replace(source.model, max_position_embeddings=96) == GQA


@pytest.mark.parametrize("form", WRITERS)
def test_a_failure_leaves_nothing(tmp_path: Path, form: str) -> None:
    class Failing(RandomSource):
        def read(self, name: str, rect: Rect, out: Tensor) -> None:
            if name == FINAL_NORM:
                raise ValueError("damaged")
            super().read(name, rect, out)

    with pytest.raises(ValueError, match="damaged"):
        WRITERS[form](Failing(GQA), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(ValueError, match=r"out exists already|notes, which is not from an earlier export"):
        WRITERS[form](RandomSource(GQA), tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "notes"]


def test_a_killed_attempt_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "half").write_text("")
    with new_folder(tmp_path / "out") as work:
        (work / "whole").write_text("x")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "whole"]


class TestStore:
    def test_the_newest_of_a_run(self, tmp_path: Path) -> None:
        for step in (3, 20):
            write_store(RandomSource(GQA), tmp_path / "checkpoints" / f"step_{step:08d}")
        assert StoreSource(tmp_path).folder.name == "step_00000020"
        assert StoreSource(tmp_path / "checkpoints").folder.name == "step_00000020"
        manifest = tmp_path / "checkpoints" / "step_00000020" / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"step": 0', '"step": 1'))
        assert StoreSource(tmp_path).folder.name == "step_00000003"
        with pytest.raises(ValueError, match=r"holds no manifest\.json and no step_… folder"):
            StoreSource(tmp_path / "checkpoints" / "step_00000003" / "none")

    def test_files_and_manifest(self, tmp_path: Path) -> None:
        given = RandomSource(GQA, torch.bfloat16)
        write_store(given, tmp_path / "out", (2, 3), torch.float32)
        source = StoreSource(tmp_path / "out")
        assert source.model == GQA
        assert_same(source, {name: tensor.float() for name, tensor in given.tensors.items()})
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        assert len(manifest["files"]) == 6
        assert {key: manifest[key] for key in ("step", "updates", "consumed_samples", "fingerprints")} == {
            "step": 0, "updates": 0, "consumed_samples": 0, "fingerprints": {},
        }  # fmt: skip
        assert manifest["model"]["initializer_range"] == 0.02 and "preset" not in manifest["model"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num_hidden_layers": 10**12}, "makes 1000000000000 layers, but there are only 39 tensors"),
            (
                {"num_hidden_layers": 3},
                r"model\.layers\.3\.\S+ has shape .*, but its model section makes it None",
            ),
            ({"hidden_size": 32}, r"lm_head\.weight has shape \(40, 64\), but its model section makes it \(40, 32\)"),
            ({"num_attention_heads": "16"}, "num_attention_heads is '16'; it must be of type int"),
            ({"rope_theta": -1.0}, r"rope_theta is -1\.0; it must be positive"),
            ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
            ({"window": 5}, "model has window, which this version does not know"),
        ],
    )
    def test_hostile_models(self, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        write_store(RandomSource(GQA), tmp_path / "out")
        path = tmp_path / "out" / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["model"] |= change
        del manifest["crc32"]
        path.write_text(store.sealed(manifest))
        with pytest.raises(ValueError, match=message):
            StoreSource(tmp_path / "out")


class TestProof:
    def test_agrees_and_notices(self, tmp_path: Path) -> None:
        pytest.importorskip("transformers", reason="needs pip install megallama[hf]")
        given = RandomSource(GQA)
        write_hf(given, tmp_path / "hf")
        write_megatron(given, tmp_path / "mg", (2, 2, 1), "epfl")
        found = prove(HFSource(tmp_path / "hf"), open_megatron(tmp_path / "mg", True), None)
        assert found.where == ("transformers", "megallama") and found.holds
        assert 0 < found.difference < 1e-5 < found.scale * BOUND
        given.tensors[block_name(2) + "self_attn.q_proj.weight"][0] += 0.5
        assert not prove(HFSource(tmp_path / "hf"), given, None).holds

    def test_rounding_is_no_difference(self, tmp_path: Path) -> None:
        given = RandomSource(GQA)
        write_store(given, tmp_path / "out", dtype=torch.bfloat16)
        assert prove(given, StoreSource(tmp_path / "out"), torch.bfloat16).difference == 0
        assert not prove(given, StoreSource(tmp_path / "out"), None).holds
