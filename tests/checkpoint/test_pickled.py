"""Files of torch.save: read without running anything in them, written so that torch.load opens them."""

from __future__ import annotations

import argparse
import enum
import io
import os
import pickle
import re
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megallama.checkpoint.formats import pickled
from megallama.checkpoint.formats.pickled import Inert, PickledFile, PickledWriter
from megallama.checkpoint.tensors import Spec
from megallama.parallel.pieces import Rect

TENSORS: dict[str, Tensor] = {
    "model/a": torch.arange(35.0).view(7, 5),
    "model/part/b.c": torch.randn(9, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "model/part/d": torch.ones(3, 2, dtype=torch.float16) / 3,
    "e": torch.full((2, 2), 0.1, dtype=torch.float64),
}


def write(path: Path, tensors: dict[str, Tensor] = TENSORS, content: dict[str, Any] | None = None) -> Path:
    """Through our writer, the tensors in another order than announced."""
    specs = {key: Spec(t.dtype, tuple(t.shape)) for key, t in tensors.items()}
    with PickledWriter(path, specs, content) as writer:
        for key in reversed(tensors):
            writer.write(key, tensors[key])
    return path


def read(file: PickledFile, key: str) -> Tensor:
    shape = file.specs[key].shape
    rows, cols = (1, *shape) if len(shape) == 1 else shape
    out = torch.empty(rows, cols, dtype=file.specs[key].dtype)
    file.read(key, Rect(0, rows, 0, cols), out)
    return out.view(shape)


class TestWriting:
    @pytest.mark.parametrize("mmap", [False, True])
    def test_torch_loads_it(self, tmp_path: Path, mmap: bool) -> None:
        settings = argparse.Namespace(layers=3, params_dtype=torch.bfloat16, name="x")
        path = write(tmp_path / "w.pt", content={"args": settings, "iteration": 7})
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, weights_only=True, mmap=mmap)
        assert found.keys() == {"model", "e", "args", "iteration"}
        assert found["args"] == settings and found["iteration"] == 7
        assert found["model"].keys() == {"a", "part"}
        assert torch.equal(found["model"]["a"], TENSORS["model/a"])
        assert torch.equal(found["model"]["part"]["b.c"], TENSORS["model/part/b.c"])
        assert torch.equal(found["e"], TENSORS["e"])
        assert found["model"]["a"].is_contiguous() and not found["model"]["a"].requires_grad
        found["model"]["a"].add_(1)  # memory of its own

    def test_checksums_and_alignment(self, tmp_path: Path) -> None:
        path = write(tmp_path / "w.pt")
        assert subprocess.run([sys.executable, "-m", "zipfile", "-t", str(path)], timeout=60).returncode == 0
        reader = torch._C.PyTorchFileReader(str(path))
        offsets = [reader.get_record_offset(f"data/{n}") for n in range(len(TENSORS))]
        assert len(set(offsets)) == len(TENSORS) and not any(offset % 64 for offset in offsets)

    def test_the_same_bytes_each_time(self, tmp_path: Path) -> None:
        assert write(tmp_path / "a.pt").read_bytes() == write(tmp_path / "b.pt").read_bytes()

    def test_what_stops_the_writing_is_what_one_hears(self, tmp_path: Path) -> None:
        specs = {"a": Spec(torch.float32, (2,))}
        with pytest.raises(OSError, match="full"), PickledWriter(tmp_path / "w.pt", specs):
            raise OSError("full")
        with pytest.raises(AssertionError, match=r"'a'.*not written"), PickledWriter(tmp_path / "w.pt", specs):
            pass

    def test_one_tensor_is_not_held_twice(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What goes to the file is the tensor's own memory."""
        seen: list[int] = []
        given = TENSORS["model/a"]

        def watched(tensor: Tensor) -> memoryview:
            seen.append(tensor.data_ptr())
            return pickled_bytes(tensor)

        pickled_bytes = pickled.as_bytes
        monkeypatch.setattr(pickled, "as_bytes", watched)
        write(tmp_path / "w.pt", {"a": given})
        assert seen == [given.data_ptr()]


class TestReading:
    def test_comes_back(self, tmp_path: Path) -> None:
        file = PickledFile(write(tmp_path / "w.pt"))
        assert file.specs == {key: Spec(t.dtype, tuple(t.shape)) for key, t in TENSORS.items()}
        for key, tensor in TENSORS.items():
            assert torch.equal(read(file, key), tensor), key

    def test_rectangles_and_windows(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Read two rows at a time, into memory with a stride, of another precision."""
        monkeypatch.setattr(pickled, "WINDOW", 2 * 5 * 4)
        file = PickledFile(write(tmp_path / "w.pt"))
        out = torch.full((5, 4), -1.0, dtype=torch.float64)
        file.read("model/a", Rect(1, 6, 2, 4), out[:, 1:3])
        assert torch.equal(out[:, 1:3], TENSORS["model/a"][1:6, 2:4].double())
        assert bool((out[:, 0] == -1).all() and (out[:, 3] == -1).all())

    def test_what_torch_saves(self, tmp_path: Path) -> None:
        """Views of one storage (as Meta's files have), parameters, and things that are no tensors."""
        flat = torch.arange(40.0)
        content = {"a": flat[:12].view(3, 4), "b": flat[12:32].view(5, 4), "p": torch.nn.Parameter(flat[32:])}
        torch.save({**content, "step": 3, "list": [torch.ones(2)]}, tmp_path / "w.pt")
        file = PickledFile(tmp_path / "w.pt")
        assert set(file.specs) == {"a", "b", "p"} and file.content["step"] == 3
        for key, tensor in content.items():
            assert torch.equal(read(file, key), tensor), key

    def test_tensors_saved_on_a_gpu(self, tmp_path: Path) -> None:
        """Where there is none."""
        source, target = write(tmp_path / "cpu.pt"), tmp_path / "gpu.pt"
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
            for entry in old.infolist():
                data = old.read(entry).replace(b"\x03\0\0\0cpu", b"\x06\0\0\0cuda:0")
                assert (b"cuda:0" in data) == entry.filename.endswith("data.pkl")
                new.writestr(entry.filename, data)
        assert torch.equal(read(PickledFile(target), "model/a"), TENSORS["model/a"])

    def test_without_checksums(self, tmp_path: Path) -> None:
        """As torch.save writes where it is told to; a name in a folder's place is of any length."""
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            torch.save({"a": torch.arange(4.0)}, tmp_path / "w.pt")
        finally:
            torch.serialization.set_crc32_options(before)
        assert torch.equal(read(PickledFile(tmp_path / "w.pt"), "a"), torch.arange(4.0))

    def test_transposed_is_refused(self, tmp_path: Path) -> None:
        torch.save({"a": torch.arange(6.0).view(2, 3).T}, tmp_path / "w.pt")
        with pytest.raises(ValueError, match="the bytes of a do not lie"):
            read(PickledFile(tmp_path / "w.pt"), "a")

    def test_a_dictionary_that_holds_itself(self, tmp_path: Path) -> None:
        content: dict[str, Any] = {"a": torch.ones(2)}
        content["again"] = content
        torch.save(content, tmp_path / "w.pt")
        assert set(PickledFile(tmp_path / "w.pt").specs) == {"a"}

    def test_inert_stand_ins(self, tmp_path: Path) -> None:
        """NumPy's random state and Megatron's enums, as in every checkpoint of a training run."""
        settings = argparse.Namespace(kind=MegatronKind.second, layers=2)
        state = {"args": settings, "rng": [{"np": np.random.default_rng(0).random(3)}], "extra": io.BytesIO(b"x")}
        torch.save({**state, "a": torch.ones(2)}, tmp_path / "w.pt")
        with torch.serialization.safe_globals([MegatronKind]):  # as megatron-core does on import
            file = PickledFile(tmp_path / "w.pt")
            assert MegatronKind in torch.serialization.get_safe_globals(), "what was allowed still is"
        assert file.content["args"].layers == 2 and isinstance(file.content["args"].kind, Inert)
        assert torch.equal(read(file, "a"), torch.ones(2))


class MegatronKind(enum.Enum):
    first = 1
    second = 2


MegatronKind.__module__ = "megatron.model.enums"
MegatronKind.__qualname__ = "PositionEmbeddingType"


@pytest.fixture(autouse=True)
def megatron_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that pickle finds the class under the name that it says; reading must not need it."""
    import types

    module = types.ModuleType("megatron.model.enums")
    module.PositionEmbeddingType = MegatronKind  # type: ignore[attr-defined]
    for name in ("megatron", "megatron.model"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "megatron.model.enums", module)


class Attack:
    """Unpickled by pickle, it would make a file."""

    def __init__(self, target: Path, call: Callable[..., Any]):
        self.target, self.call = target, call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, (f"touch {self.target}",)


class Opener:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.target), "w")


def with_pickle(path: Path, body: bytes, **others: bytes) -> Path:
    """An archive with a data.pkl made by hand, and one tensor's bytes."""
    files = {"data.pkl": b"\x80\x02" + body + b".", "byteorder": b"little", "version": b"3\n", "data/0": bytes(64)}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (files | others).items():
            archive.writestr(f"archive/{name}", data)
    return path


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def rebuilt_tensor() -> bytes:
    """Pickle of a tensor over the archive's data/0."""
    body = io.BytesIO()
    pickled._Pickler(body, protocol=2).dump(pickled._Tensor(pickled._Storage("0", Spec(torch.float32, (4, 4)))))
    return body.getvalue()[2:-1]


class TestDamage:
    """No byte of a file is believed before the archive's checksum of it holds."""

    @pytest.mark.parametrize("window", [pickled.WINDOW, 16])
    def test_any_bit_of_a_tensor(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
        monkeypatch.setattr(pickled, "WINDOW", window)
        path = write(tmp_path / "w.pt")
        content = bytearray(path.read_bytes())
        at = content.index(TENSORS["model/a"].numpy().tobytes()) + 4 * 34
        content[at] ^= 1
        path.write_bytes(content)
        file = PickledFile(path)
        for _ in range(2):  # also where only other rows are read, and again
            with pytest.raises(ValueError, match=r"w\.pt is corrupt: archive/data/0 in it has another checksum"):
                file.read("model/a", Rect(0, 1, 0, 5), torch.empty(1, 5))
        assert torch.equal(read(file, "e"), TENSORS["e"])

    def test_of_the_structure(self, tmp_path: Path) -> None:
        path = write(tmp_path / "w.pt")
        content = path.read_bytes()
        path.write_bytes(content.replace(b"part", b"pert", 1))
        with pytest.raises(ValueError, match=r"w\.pt is corrupt: archive/data\.pkl in it has another checksum"):
            PickledFile(path)

    def test_another_byte_order(self, tmp_path: Path) -> None:
        path = with_pickle(tmp_path / "w.pt", b"}", byteorder=b"big")
        with pytest.raises(ValueError, match=r"w\.pt holds numbers in byte order b'big'; only little-endian"):
            PickledFile(path)

    def test_a_second_structure(self, tmp_path: Path) -> None:
        """What is looked at must be what torch then reads."""
        path = with_pickle(tmp_path / "w.pt", b"}")
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("other/data.pkl", b"\x80\x02}.")
        with pytest.raises(ValueError, match=r"data\.pkl is there twice"):
            PickledFile(path)


class TestBombs:
    """Small files that ask for much memory are refused before anything of it is taken."""

    def refused(self, path: Path, message: str) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ValueError, match=rf"w\.pt is not read: {message}|w\.pt: {message}"):
            PickledFile(path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10  # KiB; torch itself has to load

    @pytest.mark.parametrize("module", ["__builtin__", "builtins"])
    def test_sized_by_a_number(self, tmp_path: Path, module: str) -> None:
        body = f"c{module}\nbytearray\n".encode() + b"\x8a\x05" + (4 * 10**8).to_bytes(5, "little") + b"\x85R"
        path = with_pickle(tmp_path / "w.pt", body)
        self.refused(path, f"its data.pkl asks for {module} bytearray, which no checkpoint needs")

    @pytest.mark.parametrize("codec", ["hex", "HEX                      codec", "base.64", "quoted-printable", "uu"])
    def test_doubled_by_a_codec(self, tmp_path: Path, codec: str) -> None:
        encode = b"c_codecs\nencode\n"
        body = encode + text("x" * 99) + text("latin1") + b"\x86R"
        for _ in range(22):  # 400 MB
            body = encode + body + text(codec) + b"\x86R"
        self.refused(with_pickle(tmp_path / "w.pt", body), r"its data.pkl asks for \w+_codec, which no")

    def test_bytes_as_others_pickle_them(self, tmp_path: Path) -> None:
        torch.save({"state": b"\0\xff", "a": torch.ones(2), "hexagon": 1}, tmp_path / "w.pt")
        assert PickledFile(tmp_path / "w.pt").content["state"] == b"\0\xff"

    def test_keys_that_add_up(self, tmp_path: Path) -> None:
        """Twenty thousand dictionaries in each other, a tensor in each; and a long key above many tensors."""
        first = b"}" + text("t") + rebuilt_tensor() + b"r@B\x0f\0s"
        inner = text("a") + b"}" + text("t") + b"j@B\x0f\0s"
        message = "no model has more than 200000 tensors, or keys of more than 300 letters"
        self.refused(with_pickle(tmp_path / "w.pt", first + inner * 20_000 + b"s" * 20_000), message)
        tensors = b"".join(text(str(n)) + b"j@B\x0f\0s" for n in range(2000))
        body = first + text("k" * 10**6) + b"}" + tensors + b"s"
        self.refused(with_pickle(tmp_path / "w.pt", body), message)

    def test_keys_that_are_not_written_out(self, tmp_path: Path) -> None:
        """A tuple of pairs of pairs: short as a pickle, endless as text."""
        key = b"K\x01" + b"q\x00h\x00\x86" * 20
        file = PickledFile(with_pickle(tmp_path / "w.pt", b"}" + key + rebuilt_tensor() + b"s"))
        assert not file.specs

    def test_counted_calls_and_bytes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pickled, "MOST_CALLS", 5)
        self.refused(write(tmp_path / "w.pt"), "its data.pkl asks for 8 objects, which no checkpoint needs")
        monkeypatch.setattr(pickled, "LARGEST_PICKLE", 100)
        self.refused(tmp_path / "w.pt", r"data\.pkl is there twice, or larger than 0 MiB")


class TestHostile:
    @pytest.mark.parametrize(("call", "name"), [(os.system, "posix.system"), (eval, "eval"), (os.popen, "os.popen")])
    def test_nothing_is_run(self, tmp_path: Path, call: Callable[..., Any], name: str) -> None:
        torch.save({"a": torch.ones(2), "b": Attack(tmp_path / "made", call)}, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=rf"w\.pt is not read: it holds .*{re.escape(name)}, which only running"):
            PickledFile(tmp_path / "w.pt")
        assert not (tmp_path / "made").exists()

    def test_no_file_is_opened(self, tmp_path: Path) -> None:
        torch.save({"args": argparse.Namespace(x=Opener(tmp_path / "made"))}, tmp_path / "w.pt")
        with pytest.raises(ValueError, match="only running code could rebuild"):
            PickledFile(tmp_path / "w.pt")
        assert not (tmp_path / "made").exists()

    def test_offsets_outside_the_file(self, tmp_path: Path) -> None:
        """A storage said to be larger than its bytes."""
        path = write(tmp_path / "w.pt", {"a": torch.ones(4, 4)})
        small = path.read_bytes()
        forged = tmp_path / "forged.pt"
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(forged, "w") as new:
            for entry in old.infolist():
                data = old.read(entry)
                if entry.filename.endswith("data.pkl"):
                    data = data.replace(b"K\x10", b"J\0\0\1\0").replace(b"K\x04K\x04\x86", b"M\0\1M\0\1\x86")
                    data = data.replace(b"K\x04K\x01\x86", b"M\0\1K\x01\x86")
                new.writestr(entry.filename, data)
        file = PickledFile(forged)
        assert file.specs["a"].shape == (256, 256) and len(small) < 256 * 256 * 4
        with pytest.raises(ValueError, match="the bytes of a do not lie in the file"):
            read(file, "a")

    @pytest.mark.parametrize("cut", [0, 1, 100, -1, -30])
    def test_damaged(self, tmp_path: Path, cut: int) -> None:
        path = write(tmp_path / "w.pt")
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(ValueError, match=r"w\.pt is damaged, or older"):
            PickledFile(path)

    def test_the_old_format(self, tmp_path: Path) -> None:
        torch.save({"a": torch.ones(2)}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
        with pytest.raises(ValueError, match=r"older than torch\.save's zip format"):
            PickledFile(tmp_path / "w.pt")

    def test_compressed(self, tmp_path: Path) -> None:
        path = write(tmp_path / "w.pt")
        with (
            zipfile.ZipFile(path) as old,
            zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as new,
        ):
            for entry in old.infolist():
                new.writestr(entry.filename, old.read(entry))
        with pytest.raises(ValueError, match="damaged, or older"):
            PickledFile(tmp_path / "z.pt")

    def test_no_pickle_inside(self, tmp_path: Path) -> None:
        for name, data in (("data.pkl", b"not a pickle"), ("other", b"x")):
            with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
                archive.writestr(f"archive/{name}", data)
                archive.writestr("archive/version", b"3\n")
            with pytest.raises(ValueError, match=r"w\.pt is not read: [^\n]*$") as told:
                PickledFile(tmp_path / "w.pt")

            assert "False" not in str(told.value), "torch advises weights_only=False"

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"w\.pt is missing"):
            PickledFile(tmp_path / "w.pt")

    def test_plain_pickle_is_never_used(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever torch.load is asked, it is with weights_only."""
        path, asked = write(tmp_path / "w.pt"), []
        load = torch.load

        def watched(*args: Any, **kwargs: Any) -> Any:
            asked.append(kwargs)
            return load(*args, **kwargs)

        monkeypatch.setattr(torch, "load", watched)
        monkeypatch.setattr(pickle, "load", None)
        monkeypatch.setattr(pickle, "loads", None)
        PickledFile(path)
        assert [call["weights_only"] for call in asked] == [True]
