"""Files of torch.save, read by byte ranges and written tensor by tensor; nothing in them is ever run.

torch.save's format is a zip archive without compression: NAME/data.pkl is the object with references in the place of
tensors, NAME/data/0 and so on are their bytes. torch.load reads the object alone, with weights_only, and tells where
the bytes lie; these are read when a rectangle is asked for.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from megallama.checkpoint.tensors import WINDOW, Spec, as_bytes
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
        self._size = path.stat().st_size
        try:
            plain = zipfile.is_zipfile(path) and _is_plain(path)
        except zipfile.BadZipFile:
            plain = False
        if not plain:
            raise ValueError(
                f"{path} is damaged, or older than torch.save's zip format (PyTorch 1.6): "
                f"load it in a PyTorch that reads it, and torch.save it again"
            )
        self.content = _load(path)
        self.specs: dict[str, Spec] = {}
        self._tensors: dict[str, Tensor] = {}
        self._find(self.content)

    def _find(self, content: Any) -> None:
        left, seen = [("", content)], set()
        while left:
            key, value = left.pop()
            if isinstance(value, Tensor) and value.layout is torch.strided:
                self.specs[key], self._tensors[key] = Spec(value.dtype, tuple(value.shape)), value
            elif isinstance(value, dict) and id(value) not in seen:  # or a file of bytes could grow to any size here
                seen.add(id(value))
                left += [(f"{key}/{name}" if key else str(name), inner) for name, inner in value.items()]

    def read(self, key: str, rect: Rect, out: Tensor) -> None:
        """Write rectangle `rect` of a tensor to `out` (height, width), cast to its dtype.

        Raises:
            ValueError: the bytes are not where the file says.
        """
        dtype, shape = self.specs[key]
        tensor, cols, size = self._tensors[key], matrix(shape)[1], dtype.itemsize
        base = tensor.untyped_storage()._checkpoint_offset
        assert base is not None, f"torch.load did not say where {key} lies"
        start = base + int(tensor.storage_offset()) * size
        if not tensor.is_contiguous() or start + tensor.numel() * size > self._size:
            raise ValueError(f"{self.path}: the bytes of {key} do not lie in the file one after another")
        handle, step = os.open(self.path, os.O_RDONLY), max(1, WINDOW // (cols * size))
        try:
            for r0 in range(rect.r0, rect.r1, step):
                r1 = min(rect.r1, r0 + step)
                window = torch.empty(r1 - r0, cols, dtype=dtype)
                self._fill(handle, start + r0 * cols * size, as_bytes(window))
                out[r0 - rect.r0 : r1 - rect.r0].copy_(window[:, rect.c0 : rect.c1])
        finally:
            os.close(handle)

    def _fill(self, handle: int, at: int, into: memoryview) -> None:
        while into:
            count = os.preadv(handle, [into], at)
            if not count:
                raise ValueError(f"{self.path} ends at byte {at}; it has been truncated")
            into, at = into[count:], at + count


def _is_plain(path: Path) -> bool:
    """Whether nothing is compressed or encrypted, as torch.save never does."""
    with zipfile.ZipFile(path) as archive:
        return all(
            entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1 for entry in archive.infolist()
        )


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
