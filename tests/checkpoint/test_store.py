"""The store: any rectangles back from any others, and every kind of damage noticed and named."""

from __future__ import annotations

import errno
import json
import os
import resource
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from megallama.checkpoint import store as module
from megallama.checkpoint import tensors
from megallama.checkpoint.store import MANIFEST, Store, Stored, write_manifest, write_rectangles
from megallama.checkpoint.tensors import CHUNK
from megallama.parallel.pieces import Rect

SHAPES: dict[str, tuple[int, ...]] = {"w": (20, 30), "norm": (17,)}
WHOLE = {"w": Rect(0, 20, 0, 30), "norm": Rect(0, 1, 0, 17)}
META = {"step": 3, "consumed_samples": 48, "updates": 3, "model": {}, "fingerprints": {}}


def values(name: str, rect: Rect, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers that tell name, row and column."""
    rows = torch.arange(rect.r0, rect.r1, dtype=dtype)[:, None]
    return rows * 100 + torch.arange(rect.c0, rect.c1, dtype=dtype) + (0.5 if name == "norm" else 0)


def part(name: str, *sides: int, state: str = "weight") -> Stored:
    rect = Rect(*sides)
    return Stored(state, name, rect, torch.float64, lambda: values(name, rect))


def write(folder: Path, *files: list[Stored]) -> Path:
    """The manifest has the shapes of what is there."""
    folder.mkdir(exist_ok=True)
    records = [write_rectangles(folder, f"rank_{n:05d}.safetensors", parts) for n, parts in enumerate(files)]
    shapes = {name: shape for name, shape in SHAPES.items() if any(p.name == name for parts in files for p in parts)}
    write_manifest(folder, records, shapes, META)
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Two files: w in a left and a right half, the norm in the second."""
    return write(tmp_path / "c", [part("w", 0, 20, 0, 11)], [part("w", 0, 20, 11, 30), part("norm", 0, 1, 0, 17)])


def read(folder: Path, name: str, rect: Rect | None = None, state: str = "weight") -> Tensor:
    rect = rect or WHOLE[name]
    out = torch.full((rect.height, rect.width), float("nan"), dtype=torch.float64)
    Store(folder).read(state, name, rect, out)
    return out


def split(rect: Rect, data: st.DataObject) -> Iterator[Rect]:
    """A random cut into rectangles, as a guillotine makes them."""
    ways = ["stop", *(["rows"] if rect.height > 1 else []), *(["columns"] if rect.width > 1 else [])]
    way = data.draw(st.sampled_from(ways))
    r0, r1, c0, c1 = rect
    if way == "rows":
        at = data.draw(st.integers(r0 + 1, r1 - 1))
        halves = [Rect(r0, at, c0, c1), Rect(at, r1, c0, c1)]
    elif way == "columns":
        at = data.draw(st.integers(c0 + 1, c1 - 1))
        halves = [Rect(r0, r1, c0, at), Rect(r0, r1, at, c1)]
    else:
        yield rect
        return
    for half in halves:
        yield from split(half, data)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_rectangles_from_any_others(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Written in one random cut over three files, read in another; fp32, fp64 and bf16."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    files: list[list[Stored]] = [[], [], []]
    for name, whole in WHOLE.items():
        for rect in split(whole, data):
            stored = Stored("weight", name, rect, dtype, partial(values, name, rect, dtype))
            files[data.draw(st.integers(0, 2))].append(stored)
    folder = write(tmp_path_factory.mktemp("store"), *files)
    store = Store(folder)
    assert store.shapes == SHAPES and store.manifest["step"] == 3
    for name, whole in WHOLE.items():
        for rect in split(whole, data):
            out = torch.empty(rect.height, rect.width, dtype=dtype)
            store.read("weight", name, rect, out)
            assert torch.equal(out, values(name, rect, dtype))


def test_reads_into_strided_memory(saved: Path) -> None:
    """A slot of a shard is a view with a stride; what lies beside it stays."""
    flat = torch.zeros(20, 40, dtype=torch.float64)
    Store(saved).read("weight", "w", Rect(5, 15, 3, 20), flat[5:15, 3:20])
    assert torch.equal(flat[5:15, 3:20], values("w", Rect(5, 15, 3, 20)))
    assert flat.count_nonzero() == 10 * 17


def test_files_are_plain_safetensors(saved: Path) -> None:
    """Any safetensors reader opens them; the key names state, tensor and first element."""
    tensors = load_file(saved / "rank_00001.safetensors")
    assert torch.equal(tensors["weight/w/0_11"], values("w", Rect(0, 20, 11, 30)))


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def data_start(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("place", [0, 777, -1], ids=["first byte", "middle", "last byte"])
def test_a_flipped_bit_is_found_and_named(saved: Path, place: int) -> None:
    path = saved / "rank_00000.safetensors"
    flip(path, place if place < 0 else data_start(path) + place)
    with pytest.raises(ValueError, match=r"rank_00000\.safetensors: tensor weight/w/0_0 is corrupt"):
        read(saved, "w")
    assert torch.equal(read(saved, "norm"), values("norm", WHOLE["norm"])), "the other file is whole"


def test_only_touched_chunks_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With chunks of two rows: damage in row 19 is no matter to who reads rows 0 to 17."""
    monkeypatch.setattr(tensors, "CHUNK", 2 * 30 * 8)
    folder = write(tmp_path / "c", [part("w", *WHOLE["w"])])
    flip(folder / "rank_00000.safetensors", -1)
    top = Rect(0, 18, 0, 30)
    assert torch.equal(read(folder, "w", top), values("w", top))
    with pytest.raises(ValueError, match=r"weight/w/0_0 is corrupt .*chunk 9"):
        read(folder, "w", Rect(17, 19, 4, 5))
    assert CHUNK == 4 << 20


def test_only_the_bytes_needed_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank reads the chunks that its rectangle touches; of those it has verified before, just the bytes it needs."""
    chunk, row = 100, 30 * 8
    monkeypatch.setattr(tensors, "CHUNK", chunk)
    store = Store(write(tmp_path / "c", [part("w", *WHOLE["w"])]))
    read_bytes, preadv = [], os.preadv

    def counting(handle: int, buffers: list, at: int) -> int:
        read_bytes.append(preadv(handle, buffers, at))
        return read_bytes[-1]

    monkeypatch.setattr(os, "preadv", counting)
    for rect in (Rect(3, 4, 0, 30), Rect(0, 20, 0, 30), Rect(7, 9, 10, 11)):
        seen = read_bytes.copy()
        out = torch.empty(rect.height, rect.width, dtype=torch.float64)
        store.read("weight", "w", rect, out)
        assert torch.equal(out, values("w", rect))
        touched = -(-rect.r1 * row // chunk) * chunk - rect.r0 * row // chunk * chunk
        assert rect.height * row <= sum(read_bytes) - sum(seen) <= touched


def test_bytes_that_the_disk_lost_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux tells of a failed write-back once; where the flush during writing hears of it, later ones succeed."""
    seen = threading.Event()

    def lost(handle: int) -> None:
        seen.set()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(tensors, "start_writing", lost)
    specs = {"a": tensors.Spec(torch.float32, (2, 3))}
    with pytest.raises(OSError, match="Input/output error"), tensors.TensorWriter(tmp_path / "f", specs) as writer:
        assert seen.wait(10)
        writer.write("a", torch.ones(2, 3))


@pytest.mark.parametrize(
    ("offsets", "message"),
    [([0, 24.0], "at 0:24.0"), ([True, 24], "at True:24"), ([4, 28], "lies at byte 4"), ([-4, 20], "at -4:20")],
)
def test_hostile_headers(tmp_path: Path, offsets: list, message: str) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": offsets}}).encode()
    (tmp_path / "f").write_bytes(len(header).to_bytes(8, "little") + header + bytes(28))
    with pytest.raises(ValueError, match=f"header is corrupt.*{message}"):
        tensors.TensorFile(tmp_path / "f")


def test_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    folder = write(tmp_path / "c", *([part("w", row, row + 1, 0, 30)] for row in range(20)))
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 10, hard))
    try:
        assert torch.equal(read(folder, "w"), values("w", WHOLE["w"]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def test_every_flipped_bit_of_a_header_is_an_error_or_no_matter(saved: Path) -> None:
    """Never another exception, which would end the run instead of falling back; never wrong numbers."""
    path = saved / "rank_00001.safetensors"
    good, expected = path.read_bytes(), values("w", WHOLE["w"])
    noticed = 0
    for at in range(data_start(path)):
        for bit in (0, 3, 7):
            path.write_bytes(good)
            flip(path, at, bit)
            try:
                assert torch.equal(read(saved, "w"), expected)
            except ValueError as error:
                assert "rank_00001" in str(error)
                noticed += 1
    assert noticed > 100


def test_every_flipped_bit_of_the_manifest_is_found(saved: Path) -> None:
    """Also in the numbers that no tensor shows: step, updates, consumed samples."""
    path = saved / MANIFEST
    good = path.read_bytes()
    for at in range(len(good)):
        path.write_bytes(good)
        flip(path, at, at % 7)
        with pytest.raises(ValueError, match=r"checkpoint|manifest"):
            Store(saved)


@pytest.mark.parametrize("size", [0, 5, 40, -1])
def test_a_truncated_file_is_named(saved: Path, size: int) -> None:
    path = saved / "rank_00001.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"rank_00001\.safetensors: \d+ bytes, the manifest says \d+"):
        read(saved, "norm")


def test_a_missing_file_is_named(saved: Path) -> None:
    (saved / "rank_00000.safetensors").unlink()
    with pytest.raises(ValueError, match=r"rank_00000\.safetensors: missing"):
        read(saved, "w")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"format": "other"}', b"[" * 100_000])
def test_what_is_no_manifest_is_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(ValueError, match=r"not a checkpoint|format"):
        Store(tmp_path)


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a checkpoint"):
        Store(tmp_path)


def forge(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest and sign it anew, as an attacker would."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    del manifest["crc32"]
    path.write_text(module.sealed(manifest))


def first(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["files"]["rank_00000.safetensors"]


def rename(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda m: m["files"].update({name: m["files"].pop("rank_00000.safetensors")})


def sides(*new: Any) -> Callable[[dict[str, Any]], None]:
    """Another rectangle for the left half of w."""

    def change(manifest: dict[str, Any]) -> None:
        entry = first(manifest)["tensors"]["weight/w/0_0"]
        first(manifest)["tensors"]["weight/w/0_0"] = [*entry[:2], *new, entry[-1]]

    return change


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "file above the folder": (rename("../rank_00000.safetensors"), "outside"),
    "absolute file": (rename("/etc/passwd"), "outside"),
    "file in a folder": (rename("a/b.safetensors"), "outside"),
    "no file name": (rename(""), "."),
    "the folder above as a file": (rename(".."), "."),
    "no files": (lambda m: m.pop("files"), "damaged"),
    "files in a list": (lambda m: m.update(files=[1]), "damaged"),
    "no shapes": (lambda m: m.pop("shapes"), "damaged"),
    "a number as a shape": (lambda m: m["shapes"].update(w=5), "damaged"),
    "a shape of exabytes": (lambda m: m["shapes"].update(w=[10**9, 10**9]), "elements are missing"),
    "a shape without end": (lambda m: m["shapes"].update(w=[20, 30, 1]), r"w has shape \[20, 30, 1\]"),
    "a negative shape": (lambda m: m["shapes"].update(w=[-20, -30]), "w has shape"),
    "a shape that nothing fills": (lambda m: m["shapes"].update(other=[10**12]), "weight of other: 10{12} of"),
    "a step before the first": (lambda m: m.update(step=-1), "step is -1"),
    "no updates": (lambda m: m.pop("updates"), "updates is None"),
    "samples in words": (lambda m: m.update(consumed_samples="many"), "consumed_samples is 'many'"),
    "a model of odd type": (lambda m: m.update(model=[1]), r"model is \[1\]"),
    "no size": (lambda m: first(m).pop("size"), "damaged"),
    "size in words": (lambda m: first(m).update(size="big"), "damaged"),
    "size of a petabyte": (lambda m: first(m).update(size=10**15), "the manifest says"),
    "no tensors": (lambda m: first(m).pop("tensors"), "damaged"),
    "tensor without entry": (lambda m: first(m)["tensors"].update({"weight/w/0_0": []}), "damaged"),
    "checksums missing": (lambda m: first(m)["tensors"]["weight/w/0_0"][-1].clear(), "0 checksums"),
    "checksums a number": (lambda m: first(m)["tensors"]["weight/w/0_0"].__setitem__(-1, 7), "damaged"),
    "three sides": (sides(0, 20, 0), "damaged"),
    "sides with fractions": (sides(0, 20.0, 0, 11), "no rectangle"),
    "sides in words": (sides("0", "20", "0", "11"), "no rectangle"),
    "negative sides": (sides(-9, 11, 0, 11), "no rectangle"),
    "empty": (sides(5, 5, 0, 11), "no rectangle"),
    "inside out": (sides(20, 0, 11, 0), "no rectangle"),
    "absurdly high": (sides(0, 10**15, 0, 11), "outside of shape"),
    "taller, so overlapping nothing": (sides(0, 21, 0, 11), "outside of shape"),
    "too short": (sides(0, 19, 0, 11), "weight of w: 11 of 600 elements are missing"),
    "elsewhere": (sides(0, 20, 30, 41), "outside of shape"),
    "wider, over the right half": (sides(0, 20, 0, 12), "stored twice"),
    "shifted to the right": (sides(0, 20, 1, 12), "stored twice"),
    "transposed": (sides(0, 11, 0, 20), "stored twice"),
    "unknown tensor in the header": (
        lambda m: first(m)["tensors"].update(other=first(m)["tensors"].pop("weight/w/0_0")),
        "tensor other is missing",
    ),
}


@pytest.mark.parametrize(("change", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_manifests(saved: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    """Always an OSError or a ValueError, which make a run fall back; never another file's bytes."""
    forge(saved, change)
    with pytest.raises((ValueError, OSError), match=message):
        read(saved, "w")


def test_stored_twice_here_and_missing_there_is_noticed(tmp_path: Path) -> None:
    """The numbers of elements add up; only comparing the rectangles shows it."""
    folder = write(tmp_path / "c", [part("w", 0, 10, 0, 30), part("w", 5, 15, 0, 30)])
    with pytest.raises(ValueError, match="weight of w is stored twice"):
        Store(folder)


def test_missing_elements_are_counted(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", [part("w", 0, 20, 0, 29)])
    with pytest.raises(ValueError, match="weight of w: 20 of 600 elements are missing"):
        Store(folder)


def test_moments_of_some_tensors_only_are_noticed(tmp_path: Path) -> None:
    whole = [part("w", *WHOLE["w"]), part("norm", *WHOLE["norm"]), part("norm", *WHOLE["norm"], state="exp_avg")]
    with pytest.raises(ValueError, match="exp_avg of w: 600 of 600 elements are missing"):
        Store(write(tmp_path / "c", whole))


def test_a_missing_state_is_named(saved: Path) -> None:
    with pytest.raises(ValueError, match="holds no exp_avg: it has weight"):
        read(saved, "w", state="exp_avg")
