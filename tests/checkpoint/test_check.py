"""The checker: every kind of damage named, sums against NumPy, and drift between any two layouts and formats."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from weights import GQA, RandomSource

from megallama.checkpoint import check
from megallama.checkpoint import store as stores
from megallama.checkpoint.check import Survey, recognise, survey
from megallama.checkpoint.drift import Comparison, Drift, open_side, relative
from megallama.checkpoint.formats import StoreSource, write_hf, write_megatron, write_meta, write_store
from megallama.checkpoint.store import MANIFEST, Stored, write_manifest, write_rectangles
from megallama.config import ModelConfig
from megallama.model.canonical import EMBEDDING, FINAL_NORM, HEAD, canonical_shapes
from megallama.parallel.pieces import matrix, shard

TOOL = Path(__file__).parent.parent.parent / "tools" / "check_checkpoint.py"
MODEL = ModelConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=37,
)
SHAPES = canonical_shapes(MODEL)
STATES = ("weight", "exp_avg", "exp_avg_sq")
QUERY = "model.layers.0.self_attn.q_proj.weight"
Values = dict[tuple[str, str], Tensor]


def some_values(states: tuple[str, ...] = STATES, dtype: torch.dtype = torch.float32) -> Values:
    """Every state of every tensor as a matrix."""
    random = torch.Generator().manual_seed(5)
    return {
        (state, name): torch.randn(matrix(shape), generator=random).to(dtype)
        for state in states
        for name, shape in SHAPES.items()
    }


def write(folder: Path, values: Values, ranks: int = 2, dim: int = 0, step: int = 500) -> Path:
    """A checkpoint as a run of `ranks` would store it that cuts all tensors along `dim`."""
    folder.mkdir(parents=True)
    records = []
    for n in range(ranks):
        parts = []
        for (state, name), tensor in values.items():
            rows, cols = tensor.shape
            rect = shard(name, (rows, cols), dim if rows > 1 else 1, n, ranks).rect
            part = tensor[rect.r0 : rect.r1, rect.c0 : rect.c1].clone()
            parts.append(Stored(state, name, rect, tensor.dtype, partial(Tensor.clone, part)))
        records.append(write_rectangles(folder, f"rank_{n:05d}.safetensors", parts))
    model = {key: value for key, value in vars(MODEL).items() if key != "preset"}
    meta = {"step": step, "consumed_samples": step * 8, "updates": step, "model": model, "fingerprints": {}}
    write_manifest(folder, records, SHAPES, meta)
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return write(tmp_path / "step_00000500", some_values())


def read(folder: Path, form: str | None = None) -> Survey:
    """A survey with everything read, and as many bytes reported as announced."""
    found, done = survey(folder, form), []
    found.read(done.append)
    if not found.damage:
        assert sum(done) == found.nbytes
    return found


def rank(folder: Path, n: int = 0) -> Path:
    return folder / f"rank_{n:05d}.safetensors"


def flip(folder: Path, key: str, n: int = 0, at: int = 0) -> None:
    """Flip a bit of byte `at` of a tensor."""
    data = bytearray(rank(folder, n).read_bytes())
    size = int.from_bytes(data[:8], "little")
    data[8 + size + json.loads(data[8 : 8 + size])[key]["data_offsets"][0] + at] ^= 1
    rank(folder, n).write_bytes(data)


def forge(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest and sign it anew."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    del manifest["crc32"]
    (folder / MANIFEST).write_text(stores.sealed(manifest))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of the first file; the manifest is told its new size."""
    tensors = load_file(rank(folder))
    change(tensors)
    save_file(tensors, rank(folder))
    forge(folder, lambda m: m["files"][rank(folder).name].update(size=rank(folder).stat().st_size))


class TestVerification:
    def test_a_good_one(self, saved: Path) -> None:
        for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
            (saved / name).touch()  # a converted checkpoint has its tokenizer with it
        found = read(saved)
        assert found.valid and not found.notes and found.resumable
        assert found.about == {"version": 1, "step": 500, "consumed_samples": 4000, "updates": 500}
        assert (found.form, found.model, found.states) == ("megallama", MODEL, list(STATES))
        assert (found.files, found.size) == (2, sum(rank(saved, n).stat().st_size for n in range(2)))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("block", [7, check.BLOCK])
    def test_root_mean_squares(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block: int
    ) -> None:
        """Of every state against NumPy, whatever the cut."""
        monkeypatch.setattr(check, "BLOCK", block)
        values = some_values(dtype=dtype)
        found = read(write(tmp_path / "c", values, ranks=3, dim=1))
        for (state, name), tensor in values.items():
            expected = np.sqrt(np.mean(np.square(tensor.double().numpy())))
            assert found.rows[name].rms[state] == pytest.approx(expected, rel=1e-12)
            assert found.rows[name].dtype == str(dtype).removeprefix("torch.")

    def test_every_corrupt_chunk_is_told(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """In several tensors, states and files; the others are read on."""
        key = f"weight/{EMBEDDING}"
        monkeypatch.setattr("megallama.checkpoint.tensors.CHUNK", 64)  # a row of the embedding
        shutil.rmtree(saved)
        write(saved, some_values())
        for chunk in (2, 5, 18):
            flip(saved, f"{key}/0_0", at=64 * chunk + 9)
        flip(saved, f"exp_avg/{FINAL_NORM}/0_8", n=1)
        found = read(saved)
        assert found.damage == [
            f"rank_00000.safetensors: tensor {key}/0_0 is corrupt (checksum of its 4 MiB chunks 2, 5, 18)",
            f"rank_00001.safetensors: tensor exp_avg/{FINAL_NORM}/0_8 is corrupt (checksum of its 4 MiB chunk 0)",
        ]
        assert found.rows[EMBEDDING].rms["weight"] is None and found.rows[FINAL_NORM].rms["exp_avg"] is None
        assert found.rows[EMBEDDING].rms["exp_avg"] is not None
        assert not found.resumable

    def test_corrupt_values_do_not_count(self, saved: Path) -> None:
        """Whatever they look like, they were not saved so."""
        data = rank(saved).read_bytes()
        one = load_file(rank(saved))[f"weight/{QUERY}/0_0"].numpy().tobytes()
        assert data.count(one) == 1
        rank(saved).write_bytes(data.replace(one, b"\xff" * len(one)))
        found = read(saved)
        assert len(found.damage) == 1 and not found.faults, "NaN, but damaged"

    def test_many_corrupt_chunks_are_counted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("megallama.checkpoint.tensors.CHUNK", 64)
        folder = write(tmp_path / "c", some_values())
        for chunk in range(11):
            flip(folder, f"weight/{EMBEDDING}/0_0", at=64 * chunk)
        (fault,) = read(folder).damage
        assert fault.endswith("(checksum of its 4 MiB chunks 0, 1, 2, 3, 4, 5, 6, 7 … (11 in all))")

    def test_files(self, saved: Path) -> None:
        """Truncated, missing and strange ones, all at once."""
        size = rank(saved).stat().st_size
        rank(saved).write_bytes(rank(saved).read_bytes()[:-5])
        rank(saved, 1).rename(rank(saved, 7))
        (saved / "thoughts.txt").touch()
        found = read(saved)
        tensors = len(STATES) * len(SHAPES)
        assert found.damage == [
            f"rank_00000.safetensors: {size - 5} bytes, the manifest says {size} bytes; "
            f"its {tensors} tensors cannot be read",
            f"rank_00001.safetensors: missing, the manifest says {rank(saved, 7).stat().st_size} bytes; "
            f"its {tensors} tensors cannot be read",
        ]
        assert found.faults == ["rank_00007.safetensors is not in the manifest"]
        assert found.notes == ["thoughts.txt is not in the manifest"]

    def test_a_file_of_notes_is_no_fault(self, saved: Path) -> None:
        (saved / "thoughts.txt").touch()
        assert read(saved).valid

    def test_tensors_of_a_file(self, saved: Path) -> None:
        """One that the manifest does not know, one that is gone, one of another shape."""

        def change(tensors: dict[str, Tensor]) -> None:
            tensors["extra"] = torch.ones(3)
            del tensors[f"weight/{QUERY}/0_0"]
            tensors[f"exp_avg/{QUERY}/0_0"] = torch.ones(4, 32)

        rewrite(saved, change)
        found, file = read(saved), "rank_00000.safetensors"
        assert found.faults == [f"{file}: tensor extra is not in the manifest"]
        assert found.damage == [
            f"{file}: tensor weight/{QUERY}/0_0 is missing",
            f"{file}: tensor exp_avg/{QUERY}/0_0 has shape (4, 32), the manifest says (8, 16)",
        ]
        assert found.rows[QUERY].rms.keys() == {"weight", "exp_avg", "exp_avg_sq"}
        assert found.rows[QUERY].rms["weight"] is None, "a half is missing"

    def test_an_extra_tensor_alone_does_not_stop_a_run(self, saved: Path) -> None:
        rewrite(saved, lambda tensors: tensors.update(extra=torch.ones(3)))
        found = read(saved)
        assert not found.valid and found.resumable

    def test_values_that_are_no_numbers(self, tmp_path: Path) -> None:
        values = some_values()
        values["weight", QUERY][3, 4] = float("nan")
        values["weight", QUERY][5, 6] = -float("inf")
        values["exp_avg_sq", FINAL_NORM][0, 15] = float("inf")
        found = read(write(tmp_path / "c", values))
        assert not found.valid and not found.damage and found.resumable
        assert found.faults == [
            f"rank_00000.safetensors: tensor weight/{QUERY}/0_0: 2 of 128 values are NaN or infinite",
            f"rank_00001.safetensors: tensor exp_avg_sq/{FINAL_NORM}/0_8: 1 of 8 values are NaN or infinite",
        ]
        finite = values["weight", QUERY].double().numpy()
        finite = finite[np.isfinite(finite)]
        assert found.rows[QUERY].rms["weight"] == pytest.approx(np.sqrt(np.mean(finite**2)), rel=1e-12)

    def test_forged_manifests(self, saved: Path) -> None:
        """Overlaps, gaps, false rectangles and paths: all of them, and only these."""

        def change(manifest: dict[str, Any]) -> None:
            one, two = (record["tensors"] for record in manifest["files"].values())
            one[f"weight/{QUERY}/0_0"][3] = 9  # over the second file's first row
            one[f"exp_avg/{QUERY}/0_0"][3] = 7
            two[f"exp_avg_sq/{FINAL_NORM}/0_8"][5] = 17
            one["other"] = ["weight", "other", 0, 1, 0, 1, [0]]
            manifest["files"]["../away"] = manifest["files"]["rank_00001.safetensors"]

        forge(saved, change)
        found = read(saved)
        of = f"{MANIFEST} is damaged: "
        assert found.damage == [
            f"{of}other in rank_00000.safetensors: other has no shape",
            f"{of}exp_avg_sq/{FINAL_NORM}/0_8 in rank_00001.safetensors: [0, 1, 8, 17] lies outside of shape (16,)",
            f"{of}../away: it lies outside the checkpoint",
            f"{of}weight of {QUERY} is stored twice: (0, 9, 0, 16), (8, 16, 0, 16)",
            f"{of}exp_avg of {QUERY}: 16 of 256 elements are missing",
            f"{of}exp_avg_sq of {FINAL_NORM}: 8 of 16 elements are missing",
            f"rank_00000.safetensors: tensor weight/{QUERY}/0_0 has shape (8, 16), the manifest says (9, 16)",
            f"rank_00000.safetensors: tensor exp_avg/{QUERY}/0_0 has shape (8, 16), the manifest says (7, 16)",
        ]

    def test_a_corrupt_manifest_ends_it(self, saved: Path) -> None:
        text = (saved / MANIFEST).read_text()
        (saved / MANIFEST).write_text(text.replace('"step": 500', '"step": 501'))
        assert read(saved).damage == [f"{MANIFEST} is corrupt (its checksum)"]
        forge(saved, lambda m: m.update(updates=-1))
        (fault,) = read(saved).damage
        assert fault.startswith(f"{MANIFEST} is damaged: updates is -1")

    def test_a_model_section_that_does_not_fit(self, saved: Path) -> None:
        forge(saved, lambda m: m["model"].update(vocab_size=40))
        (fault,) = read(saved).damage
        assert "has shape (37, 16), but its model section makes it (40, 16)" in fault

    def test_weights_alone_are_valid_but_nothing_to_resume(self, tmp_path: Path) -> None:
        found = read(write(tmp_path / "c", some_values(("weight",))))
        assert found.valid and not found.resumable and found.states == ["weight"]


FOREIGN: dict[str, Callable[[RandomSource, Path], None]] = {
    "hf": write_hf,
    "meta": lambda source, folder: write_meta(source, folder, 2),
    "megatron": lambda source, folder: write_megatron(source, folder, (2, 2, 1)),
    "epfl": lambda source, folder: write_megatron(source, folder, (2, 1, 1), "epfl"),
}


class TestForeignFormats:
    @pytest.mark.parametrize("form", FOREIGN)
    def test_recognised_and_read(self, tmp_path: Path, form: str) -> None:
        source = RandomSource(GQA, torch.bfloat16)
        source.tensors[FINAL_NORM][3] = float("nan")
        FOREIGN[form](source, tmp_path / "there")
        found = read(tmp_path / "there")
        assert (found.form, found.model.hidden_size if found.model else 0) == (form, 64)
        assert found.faults == [f"tensor {FINAL_NORM}: 1 of 64 values are NaN or infinite"] and not found.damage
        assert found.files == (1 if form == "hf" else 4 if form == "megatron" else 2) and found.size > 91_712 * 2
        assert not found.resumable
        for name, tensor in source.tensors.items():
            expected = tensor.double().numpy()
            expected = np.sqrt(np.mean(expected[np.isfinite(expected)] ** 2))
            assert found.rows[name].rms == {"weight": pytest.approx(expected, rel=1e-12)}

    def test_a_missing_tensor_is_named(self, tmp_path: Path) -> None:
        write_hf(RandomSource(GQA), tmp_path / "hf")
        tensors = load_file(tmp_path / "hf" / "model.safetensors")
        del tensors[HEAD]
        save_file(tensors, tmp_path / "hf" / "model.safetensors")
        found = read(tmp_path / "hf")
        assert len(found.damage) == 1 and f"tensor {HEAD} is missing" in found.damage[0]

    def test_damaged_ones_of_either_megatron(self, tmp_path: Path) -> None:
        """What it is cannot be told then: both readings are."""
        FOREIGN["epfl"](RandomSource(GQA), tmp_path / "there")
        shutil.rmtree(tmp_path / "there" / "release" / "mp_rank_00")
        (fault,) = read(tmp_path / "there").damage
        assert "mp_rank_00 is missing" in fault and "as epfl" not in fault, "both say the same"

    def test_what_is_no_checkpoint(self, tmp_path: Path) -> None:
        (tmp_path / "photo.jpg").touch()
        with pytest.raises(ValueError, match=r"holds no checkpoint: there is no manifest\.json, .*config\.json"):
            survey(tmp_path)

    def test_marks(self, tmp_path: Path) -> None:
        """Some HF folders have Meta's params.json as well."""
        (tmp_path / "params.json").touch()
        assert recognise(tmp_path) == "meta"
        (tmp_path / "config.json").touch()
        assert recognise(tmp_path) == "hf"
        (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
        assert recognise(tmp_path) == "megallama"


def drifts(a: Path, b: Path) -> dict[tuple[str, str], Drift]:
    pair, done = Comparison(*(open_side(folder, None, print) for folder in (a, b))), []
    found = pair.read(done.append)
    assert sum(done) == pair.nbytes and not pair.unlike
    assert [relative(d) for d in found] == sorted((relative(d) for d in found), reverse=True)
    return {(drift.state, drift.name): drift for drift in found}


class TestDrift:
    @pytest.mark.parametrize("block", [7, 50, check.BLOCK])
    def test_against_numpy_across_layouts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
        """Rows of two ranks against columns of three, every state; some elements are equal."""
        monkeypatch.setattr(check, "BLOCK", block)
        before, random = some_values(), torch.Generator().manual_seed(8)
        after = {}
        for key, tensor in before.items():
            moved = torch.rand(tensor.shape, generator=random) < 0.3
            after[key] = tensor + moved * torch.randn(tensor.shape, generator=random) * 1e-3
        found = drifts(write(tmp_path / "a", before, 2, 0), write(tmp_path / "b", after, 3, 1))
        assert found.keys() == before.keys()
        for (state, name), drift in found.items():
            a, b = (values[state, name].double().numpy() for values in (before, after))
            gap = np.abs(a - b)
            place = np.unravel_index(gap.argmax(), gap.shape)
            assert drift.largest == gap.max() and drift.differing == np.count_nonzero(a != b)
            assert drift.at == (tuple(map(int, place)) if len(SHAPES[name]) == 2 else (int(place[1]),))
            assert relative(drift) == pytest.approx(np.sqrt(np.mean(gap**2) / np.mean(a**2)), rel=1e-12)
        a, b = (
            np.concatenate([v.double().numpy().ravel() for (s, _), v in values.items() if s == "weight"])
            for values in (before, after)
        )
        together = relative(*(drift for (state, _), drift in found.items() if state == "weight"))
        assert together == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-12)

    def test_equal_in_other_layouts(self, tmp_path: Path) -> None:
        values = some_values()
        values["weight", QUERY][0, 0] = float("nan")
        found = drifts(write(tmp_path / "a", values, 1), write(tmp_path / "b", values, 4, 1))
        assert {(d.differing, d.largest, relative(d)) for d in found.values()} == {(0, 0.0, 0.0)}

    def test_bits_and_numbers(self, tmp_path: Path) -> None:
        """Signs of zeros differ without being apart; what is no number on one side is infinitely far."""
        a, b = some_values(("weight",)), some_values(("weight",))
        a["weight", QUERY][1, 1], b["weight", QUERY][1, 1] = 0.0, -0.0
        b["weight", FINAL_NORM][0, 9] = float("nan")
        a["weight", QUERY][2, 2] = b["weight", QUERY][2, 2] = float("inf")
        a["weight", EMBEDDING].zero_()
        found = drifts(write(tmp_path / "a", a), write(tmp_path / "b", b))
        zero, nan, empty = (found["weight", name] for name in (QUERY, FINAL_NORM, EMBEDDING))
        assert (zero.differing, zero.largest, relative(zero)) == (1, 0.0, 0.0)
        assert (nan.differing, nan.largest, nan.at, relative(nan)) == (1, float("inf"), (9,), float("inf"))
        assert relative(empty) == float("inf") and empty.largest == float(b["weight", EMBEDDING].abs().max())

    def test_weights_alone_where_one_has_no_moments(self, tmp_path: Path) -> None:
        a, b = write(tmp_path / "a", some_values()), write(tmp_path / "b", some_values(("weight",)))
        assert {state for state, _ in drifts(a, b)} == {"weight"}

    @pytest.mark.parametrize("form", FOREIGN)
    def test_any_format_against_ours(self, tmp_path: Path, form: str) -> None:
        source = RandomSource(GQA)
        write_store(source, tmp_path / "ours", (2, 2))
        FOREIGN[form](source, tmp_path / "theirs")
        found = drifts(tmp_path / "theirs", tmp_path / "ours")
        assert len(found) == len(source.shapes) and not any(drift.differing for drift in found.values())

    def test_unlike_models(self, tmp_path: Path) -> None:
        """The difference of each key and tensor; the rest is compared."""
        write_store(RandomSource(GQA), tmp_path / "a")
        write_store(RandomSource(replace(GQA, vocab_size=41, tie_word_embeddings=True, rope_theta=5.0)), tmp_path / "b")
        pair = Comparison(*(open_side(tmp_path / name, None, print) for name in "ab"))
        assert pair.unlike == [
            "model.vocab_size is 40 in A, 41 in B",
            "model.rope_theta is 123.0 in A, 5.0 in B",
            "model.tie_word_embeddings is False in A, True in B",
            f"{EMBEDDING} is (40, 64) in A, (41, 64) in B",
            f"{HEAD} is (40, 64) in A, missing in B",
        ]
        assert len(pair.read(lambda more: None)) == len(canonical_shapes(GQA)) - 2

    def test_damage_is_an_error(self, saved: Path, tmp_path: Path) -> None:
        other = write(tmp_path / "b", some_values())
        flip(other, f"exp_avg/{QUERY}/0_0")
        pair = Comparison(*(open_side(folder, None, print) for folder in (saved, other)))
        with pytest.raises(ValueError, match=rf"b/rank_00000\.safetensors: tensor exp_avg/{QUERY}/0_0 is corrupt"):
            pair.read(lambda more: None)


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("check_checkpoint", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module


@pytest.fixture
def cli(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """The tool in this process."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        code: Any = 0
        try:
            tool.main()
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return Outcome(1, out, f"{err}{code}\n") if isinstance(code, str) else Outcome(code, out, err)

    return run


def process(*arguments: object) -> Outcome:
    """The tool as users run it."""
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return Outcome(done.returncode, done.stdout, done.stderr)


class TestTool:
    def test_all_well(self, saved: Path) -> None:
        code, out, err = process(saved, "--list")
        assert (code, err) == (0, "")
        lines = out.splitlines()
        head, embedding = " ".join(lines[0].split()), lines[1].split()
        assert head == "name shape dtype elements rms of weight rms of exp_avg rms of exp_avg_sq"
        assert embedding[:6] == [EMBEDDING, "37", "x", "16", "float32", "592"] and len(embedding) == 9
        expected = float(np.sqrt(np.mean(np.square(some_values()["exp_avg_sq", EMBEDDING].double().numpy()))))
        assert embedding[-1] == f"{expected:.4e}"
        assert lines[-3] == f"{saved}: valid"
        parameters = sum(int(np.prod(shape)) for shape in SHAPES.values())
        assert lines[-2] == (
            "  megallama checkpoint, version 1, step 500, 4,000 consumed samples; 1 layer, hidden size 16, "
            f"feed-forward 24, 4 heads, 2 K/V heads, vocabulary 37; {parameters:,} parameters"
        )
        assert lines[-1].startswith("  weight, exp_avg, exp_avg_sq in 2 files, ") and lines[-1].endswith(" GB/s")

    def test_a_flipped_bit(self, saved: Path) -> None:
        key = f"exp_avg/{QUERY}/8_0"
        flip(saved, key, n=1, at=100)
        code, out, err = process(saved)
        assert code == 1 and err == "check_checkpoint: error: faults in step_00000500\n"
        fault = f"rank_00001.safetensors: tensor {key} is corrupt (checksum of its 4 MiB chunk 0)"
        assert out.startswith(f"{saved}: 1 fault\n  damaged: {fault}\n  megallama checkpoint, version 1, step 500, ")

    @pytest.mark.parametrize("inside", ["", "checkpoints"])
    def test_a_run_with_a_damaged_newest(self, tmp_path: Path, cli: Callable[..., Outcome], inside: str) -> None:
        root = tmp_path / "checkpoints"
        for step in (100, 200, 300, 400):
            write(root / f"step_{step:08d}", some_values(STATES if step != 300 else ("weight",)), step=step)
        flip(root / "step_00000400", f"weight/{FINAL_NORM}/0_0")
        for name in ("step_00000500.tmp", "step_00000050.old.tmp"):
            (root / name).mkdir()
        code, out, err = cli(tmp_path / inside)
        assert code == 1 and err == "check_checkpoint: error: faults in step_00000400\n"
        heads = [line for line in out.splitlines() if not line.startswith("  ")]
        unfinished = "that goes on right now, or was cut off (the run's next start then removes it)"
        assert heads == [
            f"{root}/step_00000400: 1 fault",
            *(f"{root}/step_{step:08d}: valid" for step in (300, 200, 100)),
            f"{root}/step_00000050.old.tmp: a removal {unfinished}",
            f"{root}/step_00000500.tmp: a save {unfinished}",
            "the run resumes from step_00000200",
        ]

    def test_a_run_for_machines(self, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
        root, values = tmp_path / "checkpoints", some_values()
        values["weight", QUERY].fill_(float("nan"))
        for step in (100, 200):
            write(root / f"step_{step:08d}", values, step=step)
        rank(root / "step_00000200").unlink()
        (root / "step_00000300.tmp").mkdir()
        code, out, _ = cli(tmp_path, "--json")
        found = json.loads(out)
        assert code == 1 and found["resumes_from"] == "step_00000100" and found["leftovers"] == ["step_00000300.tmp"]
        newest, oldest = found["checkpoints"]
        assert newest["step"] == 200 and not newest["valid"] and "missing" in newest["damage"][0]
        assert oldest["damage"] == [] and len(oldest["faults"]) == 2 and oldest["model"]["vocab_size"] == 37
        query = next(row for row in oldest["tensors"] if row["name"] == QUERY)
        assert query["shape"] == [16, 16] and query["rms"].keys() == set(STATES) and query["rms"]["weight"] is None

    def test_nothing_to_resume_from(self, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
        write(tmp_path / "step_00000100", some_values(("weight",)))
        code, out, _ = cli(tmp_path)
        assert code == 0 and out.endswith("\nthe run has nothing that it could resume from\n")

    def test_only_beginnings(self, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
        (tmp_path / "checkpoints" / "step_00000100.tmp").mkdir(parents=True)
        code, out, err = cli(tmp_path)
        assert (code, out) == (1, "") and "holds no checkpoint: step_00000100.tmp is a save that goes on" in err

    def test_foreign(self, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
        write_hf(RandomSource(GQA), tmp_path / "hf")
        code, out, err = cli(tmp_path / "hf")
        assert (code, err) == (0, "")
        assert "  hf checkpoint; 4 layers, hidden size 64" in out and "the format has no checksums to verify" in out

    def test_diff_across_layouts(self, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
        before, after = some_values(), some_values()
        after["weight", QUERY][9, 3] += 0.5
        after["exp_avg", FINAL_NORM][0, 11] -= 0.25
        a, b = write(tmp_path / "a", before, 2, 0), write(tmp_path / "b", after, 3, 1)
        code, out, err = cli("--diff", a, b)
        assert (code, err) == (0, "")
        lines = out.splitlines()
        assert lines[0] == f"A  {a}  (megallama, float32; weight, exp_avg, exp_avg_sq)"
        rows = [line.split() for line in lines[3:5]]
        assert [row[1:] for row in rows] == [
            f"2.500e-01 (11) 1 of 16 exp_avg of {FINAL_NORM}".split(),
            f"5.000e-01 (9, 3) 1 of 256 weight of {QUERY}".split(),
        ]
        total = len(STATES) * len(SHAPES)
        assert lines[5] == f"2 of {total} differ, {total - 2} equal bitwise"
        assert cli("--diff", a, b, "--tolerance", 0.51).code == 0
        code, _, err = cli("--diff", a, b, "--tolerance", 0.3)
        assert code == 1 and f"max |a-b| is 5.000e-01 in weight of {QUERY}, over --tolerance 0.3" in err
        top = cli("--diff", a, b, "--top", 1).out.splitlines()
        assert len(top) == len(lines) and top[4] == "… and 1 more that differ (--top 2 shows all)"

    def test_diff_of_equal_ones(self, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
        a, b = (write(tmp_path / name, some_values(), ranks) for name, ranks in (("a", 1), ("b", 3)))
        code, out, _ = cli("--diff", a, b, "--tolerance", 0)
        assert code == 0 and out.splitlines()[-1] == f"all {len(STATES) * len(SHAPES)} tensors equal bitwise"

    def test_diff_of_formats(self, tmp_path: Path) -> None:
        """A run's newest against its export in bf16."""
        write(tmp_path / "run" / "checkpoints" / "step_00000007", some_values(), step=7)
        write_hf(StoreSource(tmp_path / "run"), tmp_path / "hf", torch.bfloat16)
        code, out, err = process("--diff", tmp_path / "run", tmp_path / "hf", "--json")
        assert (code, err) == (0, "")
        found = json.loads(out)
        assert found["a"].endswith("step_00000007") and found["unlike"] == [] and len(found["tensors"]) == len(SHAPES)
        for row in found["tensors"]:
            a = some_values()["weight", row["name"]].double().numpy()
            gap = a - some_values()["weight", row["name"]].bfloat16().double().numpy()
            assert row["state"] == "weight" and row["max"] == np.abs(gap).max()
            assert row["relative"] == pytest.approx(np.linalg.norm(gap) / np.linalg.norm(a), rel=1e-12)
            assert row["differing"] == np.count_nonzero(gap)

    def test_diff_of_unlike_models(self, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
        write_store(RandomSource(GQA), tmp_path / "a")
        write_store(RandomSource(replace(GQA, num_hidden_layers=3)), tmp_path / "b")
        code, out, err = cli("--diff", tmp_path / "a", tmp_path / "b")
        assert code == 1 and "different models: model.num_hidden_layers is 4 in A, 3 in B" in err
        assert "unlike: model.layers.3.mlp.up_proj.weight is (48, 64) in A, missing in B\n" in out

    def test_diff_with_a_damaged_one(self, saved: Path, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
        write_store(StoreSource(saved), tmp_path / "b")
        flip(saved, f"weight/{QUERY}/0_0")
        code, out, err = cli("--diff", saved, tmp_path / "b")
        assert (code, out) == (1, "") and f"tensor weight/{QUERY}/0_0 is corrupt" in err and err.count("\n") == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((), "give a CHECKPOINT, or --diff A B"),
            ((".", "--diff", ".", "."), "give a CHECKPOINT, or --diff A B"),
            ((".", "--top", "3"), "--top means nothing without --diff"),
            ((".", "--tolerance", "0"), "--tolerance means nothing without --diff"),
            (("--diff", ".", ".", "--tolerance", "nan"), "--tolerance nan must not be negative"),
            (("--diff", ".", ".", "--list"), "--list means nothing with --diff"),
            ((".", "--format", "hf", "--format", "hf"), "--format is given 2 times for 1 checkpoint"),
            ((".", "--format", "gguf"), "invalid choice: 'gguf'"),
        ],
    )
    def test_usage(self, cli: Callable[..., Outcome], arguments: tuple[str, ...], message: str) -> None:
        code, out, err = cli(*arguments)
        assert code == 2 and out == "" and message in err

    def test_no_such_folder(self, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
        assert cli(tmp_path / "gone") == (1, "", f"check_checkpoint: error: {tmp_path}/gone: no such folder\n")

    def test_help_teaches(self, cli: Callable[..., Outcome]) -> None:
        code, out, _ = cli("--help")
        assert code == 0 and "python tools/check_checkpoint.py" in out and "Exit status" in out
