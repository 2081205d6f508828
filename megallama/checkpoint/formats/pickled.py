"""Files of torch.save, read by byte ranges and written tensor by tensor; nothing in them is ever run.

torch.save's format is a zip archive without compression: NAME/data.pkl is the object with references in the place of
tensors, NAME/data/0 and so on are their bytes. torch.load reads the object alone, with weights_only, and tells where
the bytes lie; these are read when a rectangle is asked for, and compared with the archive's checksum before.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from encodings import normalize_encoding
from encodings.aliases import aliases
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megallama.checkpoint.tensors import WINDOW, Spec, as_bytes, read_at
from megallama.parallel.pieces import Rect, matrix

STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
}
ALIGN = 64
"""Bytes to which torch.save aligns tensors in the file."""

IGNORED = ("megatron.", "numpy.", "_io.BytesIO")
"""Megatron's settings, NumPy's random state, Transformer Engine's extra state: nothing of them is needed here, an inert
object takes its place, and their code is neither imported nor run."""

LOCAL_HEADER, ZIP64_EXTRA = 30, 20
"""Bytes before a file's data in a zip archive, beside its name and other extra fields."""

LARGEST_PICKLE, MOST_CALLS, LONGEST_KEY = 64 << 20, 200_000, 300
"""Bytes of a data.pkl without the tensors, its calls (two build a tensor), and letters of a tensor's joined keys: a
hundred times what checkpoints have, and little enough to be rebuilt in a few GB."""

SIZED = {"__builtin__ bytearray", "builtins bytearray"}
"""Allowed by torch, but sized by a number in the pickle, not by its bytes."""

GROWING = {"hex_codec", "base64_codec", "quopri_codec", "uu_codec"}
"""Codecs that make bytes of bytes, and more of them each time."""


class Member(NamedTuple):
    """A file in the archive: `size` bytes from `start`. `crc32` is 0 where torch.save was told to leave it out."""

    name: str
    start: int
    size: int
    crc32: int


class Inert:
    """Stands for an object that is not wanted."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class PickledFile:
    """A file of torch.save opened for reading: its structure only. It is never mapped or loaded.

    Attributes:
        content: the object, with tensors that have no memory.
        specs: "/"-joined keys of nested dictionaries -> what that tensor is.

    Raises:
        ValueError: there is no such file, it is damaged, or it holds what only code of its own could rebuild.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        try:
            self._members = {member.start: member for member in _members(path)}
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
            raise ValueError(
                f"{path} is damaged, or older than torch.save's zip format (PyTorch 1.6): "
                f"load it in a PyTorch that reads it, and torch.save it again"
            ) from error
        self._verified: set[int] = set()
        if (order := self._small("byteorder")) not in (b"", b"little"):
            raise ValueError(f"{path} holds numbers in byte order {order!r:.20}; only little-endian can be read")
        _require_modest(path, self._small("data.pkl"))
        self.content = _load(path)
        self.specs: dict[str, Spec] = {}
        self._tensors: dict[str, Tensor] = {}
        self._find(self.content)

    def _small(self, name: str) -> bytes:
        """What the archive holds as NAME/`name`; nothing where there is no such file."""
        found = [member for member in self._members.values() if member.name.partition("/")[2] == name]
        if len(found) > 1 or any(member.size > LARGEST_PICKLE for member in found):
            raise ValueError(f"{self.path}: {name} is there twice, or larger than {LARGEST_PICKLE >> 20} MiB")
        data = bytearray(found[0].size if found else 0)
        with open(self.path, "rb") as file:
            for member in found:
                self._verify(file.fileno(), member)
                read_at(self.path, file.fileno(), member.start, memoryview(data))
        return bytes(data)

    def _find(self, content: Any) -> None:
        left, seen = [("", content)], set()
        while left:
            key, value = left.pop()
            if len(key) > LONGEST_KEY or len(self.specs) > MOST_CALLS:
                raise ValueError(
                    f"{self.path} is not read: no model has more than {MOST_CALLS} tensors, or keys of more than "
                    f"{LONGEST_KEY} letters, as this file has"
                )
            if isinstance(value, Tensor) and value.layout is torch.strided:
                self.specs[key], self._tensors[key] = Spec(value.dtype, tuple(value.shape)), value
            elif isinstance(value, dict) and id(value) not in seen:
                seen.add(id(value))  # or a file of bytes could grow to any size here
                above = f"{key}/" if key else ""
                for name, inner in value.items():
                    if isinstance(name, str | int) and isinstance(inner, dict | Tensor):
                        left.append((f"{above}{name}"[: LONGEST_KEY + 1], inner))

    def read(self, key: str, rect: Rect, out: Tensor) -> None:
        """Write rectangle `rect` of a tensor to `out` (height, width), cast to its dtype.

        Raises:
            ValueError: the bytes are not where the file says, or corrupt.
        """
        dtype, shape = self.specs[key]
        tensor, cols, size = self._tensors[key], matrix(shape)[1], dtype.itemsize
        base = tensor.untyped_storage()._checkpoint_offset
        member = None if base is None else self._members.get(base)
        first = int(tensor.storage_offset()) * size
        if member is None or not tensor.is_contiguous() or first + tensor.numel() * size > member.size:
            raise ValueError(f"{self.path}: the bytes of {key} do not lie in the file one after another")
        start = member.start + first
        handle, step = os.open(self.path, os.O_RDONLY), max(1, WINDOW // (cols * size))
        try:
            self._verify(handle, member)
            for r0 in range(rect.r0, rect.r1, step):
                r1 = min(rect.r1, r0 + step)
                window = torch.empty(r1 - r0, cols, dtype=dtype)
                read_at(self.path, handle, start + r0 * cols * size, as_bytes(window))
                out[r0 - rect.r0 : r1 - rect.r0].copy_(window[:, rect.c0 : rect.c1])
        finally:
            os.close(handle)

    def _verify(self, handle: int, member: Member) -> None:
        """Compare all bytes of a member with its checksum, when it is touched first: the second reading that this
        costs comes from the system's cache."""
        if not member.crc32 or member.start in self._verified:
            return
        crc32, window = 0, memoryview(bytearray(min(WINDOW, member.size)))
        for at in range(0, member.size, WINDOW):
            part = window[: min(WINDOW, member.size - at)]
            read_at(self.path, handle, member.start + at, part)
            crc32 = zlib.crc32(part, crc32)
        if crc32 != member.crc32:
            raise ValueError(f"{self.path} is corrupt: {member.name} in it has another checksum than it says")
        self._verified.add(member.start)


def _members(path: Path) -> Iterator[Member]:
    """The files in an archive that is as torch.save writes it: nothing compressed, nothing encrypted.

    Raises:
        BadZipFile, NotImplementedError, ValueError or struct.error: it is not.
    """
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        size = os.fstat(file.fileno()).st_size
        if len({entry.header_offset for entry in archive.infolist()}) < len(archive.infolist()):
            raise zipfile.BadZipFile("two names for the same bytes")
        for entry in archive.infolist():
            file.seek(entry.header_offset + LOCAL_HEADER - 4)  # the local header has its own lengths, with the padding
            name, extra = struct.unpack("<HH", file.read(4))
            start = entry.header_offset + LOCAL_HEADER + name + extra
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or start + entry.file_size > size:
                raise zipfile.BadZipFile(f"{entry.filename} is compressed, encrypted or cut off")
            yield Member(entry.filename, start, entry.file_size, entry.CRC)


def _require_modest(path: Path, pickled: bytes) -> None:
    """Refuse a pickle that would take far more memory than it has bytes, before anything is rebuilt."""
    calls = 0
    names: set[str] = set()
    codecs: set[str] = set()
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            calls += opcode.name in ("REDUCE", "NEWOBJ")
            if not isinstance(argument, str):
                continue
            if opcode.name == "GLOBAL":
                names.add(argument)
                continue
            said = normalize_encoding(argument).lower().replace(".", "_")  # as Python looks codecs up
            codecs |= {aliases.get(said, said)} & GROWING
    except ValueError as error:
        raise ValueError(f"{path} is not read: its data.pkl is no pickle ({error})") from error
    fault = ""
    if calls > MOST_CALLS:
        fault = f"{calls} objects"
    elif sized := names & SIZED:
        fault = " and ".join(sized)
    elif codecs and "_codecs encode" in names:
        fault = " and ".join(codecs)
    if fault:
        raise ValueError(f"{path} is not read: its data.pkl asks for {fault}, which no checkpoint needs")


def _load(path: Path) -> Any:
    """The object of a file; its tensors know where their bytes lie (`_checkpoint_offset`) and have none themselves."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # two seconds: only where pickles are read

    try:
        with _nothing_allowed():
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            inert = [name for name in unsafe if name.startswith(IGNORED)]
            if refused := sorted(set(unsafe) - {*inert, "argparse.Namespace"}):
                raise ValueError(f"it holds {', '.join(refused)}, which only running code could rebuild")
            torch.serialization.add_safe_globals([argparse.Namespace, *((Inert, name) for name in inert)])
            with FakeTensorMode():
                return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile pickle leads to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # torch's own text advises to run the code
            reason = "torch.load with weights_only refuses its pickle"
        raise ValueError(
            f"{path} is not read: {reason}; where you trust it, load it in torch yourself and save only its tensors "
            f"and settings"
        ) from error


@contextmanager
def _nothing_allowed() -> Iterator[None]:
    """torch.load as it is at the start, whatever libraries have allowed since."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)


class _Storage:
    """What the pickle holds in the place of a tensor's memory."""

    def __init__(self, key: str, spec: Spec):
        self.key, self.spec = key, spec


class _Tensor:
    """Pickles as a tensor does."""

    def __init__(self, storage: _Storage):
        self.storage = storage

    def __reduce__(self) -> tuple[Any, ...]:
        shape = self.storage.spec.shape
        strides = torch.empty(shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, shape, strides, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        if not isinstance(value, _Storage):
            return None
        dtype = value.spec.dtype
        return "storage", STORAGES[dtype], value.key, "cpu", value.spec.nbytes // dtype.itemsize


class PickledWriter:
    """Writes a file that torch.load opens; a context manager, whose end without an error means all is on the disk.

    Args:
        specs: "/"-joined keys of nested dictionaries -> the tensors that will be written, in any order.
        content: what else the dictionaries hold; tensors are put into a copy of it.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], content: Mapping[str, Any] | None = None):
        self.path, self.specs = path, dict(specs)
        self._keys = {key: str(n) for n, key in enumerate(specs)}
        self._left = set(specs)
        tree: dict[str, Any] = dict(content or {})
        for key, spec in specs.items():
            *above, last = key.split("/")
            inner = tree
            for name in above:
                inner = inner.setdefault(name, {})
            inner[last] = _Tensor(_Storage(self._keys[key], spec))
        pickled = io.BytesIO()
        _Pickler(pickled, protocol=2).dump(tree)
        self._file = open(path, "wb")  # noqa: SIM115 (closed by __exit__)
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        for name, data in (("data.pkl", pickled.getvalue()), ("byteorder", b"little"), ("version", b"3\n")):
            self._zip.writestr(zipfile.ZipInfo(f"archive/{name}"), data)

    def write(self, key: str, tensor: Tensor) -> None:
        """Write one announced tensor."""
        spec = self.specs[key]
        assert (tensor.dtype, tuple(tensor.shape)) == spec, f"{key}: {tensor.dtype} {tensor.shape} is not {spec}"
        entry = zipfile.ZipInfo(f"archive/data/{self._keys[key]}")
        before = self._file.tell() + LOCAL_HEADER + len(entry.filename) + 4 + ZIP64_EXTRA
        pad = -before % ALIGN
        entry.extra = b"FB" + pad.to_bytes(2, "little") + bytes(pad)
        with self._zip.open(entry, "w", force_zip64=True) as data:
            data.write(as_bytes(tensor.cpu().contiguous()))
        self._left.remove(key)

    def __enter__(self) -> PickledWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            with suppress(OSError, ValueError):  # what stopped the writing is what the user is told
                self._zip.close()
                self._file.close()
            return
        assert not self._left, f"{self.path}: {sorted(self._left)} were announced, but not written"
        with self._file:
            self._zip.close()
            self._file.flush()
            os.fsync(self._file.fileno())
