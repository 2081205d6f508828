"""All formats together: there and back, failures, our own checkpoints, and the proof by logits."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from contextlib import nullcontext
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
from megallama.checkpoint.formats.placement import (
    Composite,
    Part,
    cut,
    heads,
    new_folder,
    replaced_folder,
    unfinished,
)
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


@pytest.mark.parametrize("form", WRITERS)
def test_values_that_a_dtype_does_not_hold(tmp_path: Path, form: str) -> None:
    """A finite value stays finite, or nothing is written; what is infinite already stays so."""
    writers: dict[str, Callable[[Source, torch.dtype], None]] = {
        "hf": lambda source, dtype: write_hf(source, tmp_path / "out", dtype),
        "meta": lambda source, dtype: write_meta(source, tmp_path / "out", 2, dtype),
        "megatron": lambda source, dtype: write_megatron(source, tmp_path / "out", (2, 1, 1), "epfl", dtype),
        "megallama": lambda source, dtype: write_store(source, tmp_path / "out", (2, 1), dtype),
    }
    name = block_name(1) + "self_attn.k_proj.weight"
    for value, dtype, most in ((-7e4, torch.float16, "65504"), (3.4e38, torch.bfloat16, "3.38953e+38")):
        given = RandomSource(GQA)
        given.tensors[name][9, 3], given.tensors[name][9, 4] = value, torch.inf
        message = f"memory: {name} has a value of {value:g}, but {dtype} ends at {most}; choose a wider dtype"
        with pytest.raises(ValueError, match=re.escape(message)):
            writers[form](given, dtype)
        assert not list(tmp_path.iterdir())
    given.tensors[name][9, 3] = 1.0
    writers[form](given, torch.float16)
    path = tmp_path / "out"
    source = open_megatron(path, True) if form == "megatron" else READERS[form](path)
    assert_same(source, {name: tensor.half() for name, tensor in given.tensors.items()})


class TestFolders:
    """A work folder of one's own, and one rename: nobody's data is lost, whatever happens meanwhile."""

    def test_appears_complete(self, tmp_path: Path) -> None:
        mask = os.umask(0o027)
        try:
            with new_folder(tmp_path / "out") as work:
                (work / "whole").write_text("x")
                assert work.parent == tmp_path and not (tmp_path / "out").exists()
        finally:
            os.umask(mask)
        assert [p.name for p in tmp_path.rglob("*")] == ["out", "whole"]
        assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750

    def test_what_came_meanwhile_stays(self, tmp_path: Path) -> None:
        told = pytest.raises(ValueError, match=r"out: the finished work could not take this name .*not empty")
        with told as error, new_folder(tmp_path / "out") as work:
            (work / "whole").write_text("mine")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "other").write_text("theirs")
        assert (tmp_path / "out" / "other").read_text() == "theirs"
        assert (work / "whole").read_text() == "mine" and str(work) in str(error.value)

    def test_two_attempts_do_not_mix(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="could not take this name"), new_folder(tmp_path / "out") as slow:
            (slow / "a").write_text("slow")
            with new_folder(tmp_path / "out") as fast:
                (fast / "b").write_text("fast")
            (slow / "c").write_text("slow")
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["b"]
        assert sorted(p.name for p in slow.iterdir()) == ["a", "c"] and unfinished(tmp_path / "out") == [slow]

    def test_the_unfinished_are_named(self, tmp_path: Path) -> None:
        for name in (".out.0123abcd.tmp", ".out.0123abcd.old", ".out2.0123abcd.tmp", ".out.tmp", "out.0123abcd.tmp"):
            (tmp_path / name).mkdir()
        found = [path.name for path in unfinished(tmp_path / "out")]
        assert found == [".out.0123abcd.old", ".out.0123abcd.tmp"]
        assert unfinished(tmp_path / "none" / "out") == []

    def test_places_that_cannot_be_replaced(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for folder, kind in ((Path("."), "the current directory"), (Path("/"), "a mount point")):
            with pytest.raises(ValueError, match=rf"is {kind}, .*; name a folder inside it"), new_folder(folder):
                pytest.fail("before any work")

    @pytest.mark.parametrize("interrupted", [False, True])
    def test_replacing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool) -> None:
        """The earlier content exists until the new one has its name; an interrupt there puts it back."""
        out, rename = tmp_path / "out", Path.rename
        out.mkdir()
        (out / "content").write_text("earlier")

        def watched(path: Path, target: Path) -> Path:
            assert sorted(p.read_text() for p in tmp_path.glob("*out*/content")) == ["earlier", "later"]
            if interrupted and path.suffix == ".tmp":
                raise KeyboardInterrupt
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", watched)
        stops = pytest.raises(KeyboardInterrupt) if interrupted else nullcontext()
        with stops, replaced_folder(out, lambda _: None) as work:
            (work / "content").write_text("later")
        assert (out / "content").read_text() == ("earlier" if interrupted else "later")
        assert unfinished(out) == ([work] if interrupted else [])

    def test_an_export_that_somebody_adds_to(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        write_hf(RandomSource(GQA), out)

        class Adding(RandomSource):
            def read(self, name: str, rect: Rect, to: Tensor) -> None:
                (out / "notes").write_text("mine")
                super().read(name, rect, to)

        with pytest.raises(ValueError, match=r"holds notes, which is not from an earlier export.*it is complete in"):
            write_hf(Adding(GQA), out)
        assert (out / "notes").read_text() == "mine"
        (work,) = unfinished(out)
        assert_same(HFSource(work), RandomSource(GQA).tensors)


class TestStore:
    def test_the_newest_of_a_run(self, tmp_path: Path) -> None:
        for step in (3, 20):
            write_store(RandomSource(GQA), tmp_path / "checkpoints" / f"step_{step:08d}")
        assert StoreSource(tmp_path).folder.name == "step_00000020"
        assert StoreSource(tmp_path / "checkpoints").folder.name == "step_00000020"
        manifest = tmp_path / "checkpoints" / "step_00000020" / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"step": 0', '"step": 1'))
        notes: list[str] = []
        assert StoreSource(tmp_path, notes.append).folder.name == "step_00000003"
        assert notes == [f"{manifest} is corrupt (its checksum); taking the older step_00000003"]
        with pytest.raises(ValueError, match=r"holds no manifest\.json and no step_… folder"):
            StoreSource(tmp_path / "checkpoints" / "step_00000003" / "none")

    def test_more_files_than_any_run_has(self, tmp_path: Path) -> None:
        for layout in ((17, 1), (1, 5), (4096, 4096)):
            with pytest.raises(
                ValueError, match=r"--tp \d+ x --pp \d+ is more than the model's 16 attention heads and 4"
            ):
                write_store(RandomSource(GQA), tmp_path / "out", layout)
        assert not list(tmp_path.iterdir())

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
            ({"num_hidden_layers": 10**9}, "makes 1000000000 layers, but there are only 39 tensors"),
            (
                {"num_hidden_layers": 3},
                r"model\.layers\.3\.\S+ has shape .*, but its model section makes it None",
            ),
            ({"hidden_size": 32}, r"lm_head\.weight has shape \(40, 64\), but its model section makes it \(40, 32\)"),
            ({"num_attention_heads": "16"}, "num_attention_heads is '16'; it must be of type int"),
            ({"rope_theta": -1.0}, r"rope_theta is -1\.0; it must be positive"),
            ({"rope_theta": 10**400}, r"rope_theta is 10{79}; it must be positive, and below 1\.797693135e\+308"),
            ({"max_position_embeddings": 2**31}, "max_position_embeddings is 2147483648; .* below 2147483648"),
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
