"""Several models take turns on one device: whoever is idle waits in host memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megallama.train.trainer import Trainer


class Residence:
    """Where a model's memory is. Its storages are emptied and filled in place, so that every view of them stays valid.

    Args:
        trainer: the model, with its optimizer if it has one; complete, as it leaves at once.
        moves: whether an idle model leaves its device; None = where the device is not the host itself.
    """

    def __init__(self, trainer: Trainer, moves: bool | None = None):
        self._moves = trainer.mesh.device.type != "cpu" if moves is None else moves
        self._optimizer = trainer.optimizer
        weights, states, grads = _tensors(trainer)
        self._weights = _storages(weights)
        self._states = [s for s in _storages(states) if s._cdata not in {w._cdata for w in self._weights}]
        self._grads = [(storage, storage.nbytes()) for storage in _storages(grads)]
        self._host: dict[int, torch.UntypedStorage] = {}
        if self._moves:
            for storage in (*self._weights, *self._states):
                host = torch.UntypedStorage(storage.nbytes(), device="cpu")
                self._host[storage._cdata] = host.pin_memory() if storage.device.type == "cuda" else host
            self._leave()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """The weights are on the device inside; nobody changes them."""
        if not self._moves:
            yield
            return
        self._fill(self._weights)
        try:
            yield
        finally:
            _empty(self._weights)

    @contextmanager
    def training(self) -> Iterator[None]:
        """All of the model is on the device inside; what it has become goes to the host."""
        if not self._moves:
            yield
            return
        self._fill([*self._weights, *self._states])
        for storage, size in self._grads:
            storage.resize_(size)
        try:
            yield
        finally:
            self._leave()

    def at_rest(self, view: Tensor) -> Tensor:
        """A view of the idle model's memory, where that now lies."""
        if not self._moves:
            return view
        host = self._host[view.untyped_storage()._cdata]
        return torch.empty(0, dtype=view.dtype).set_(host, view.storage_offset(), view.size(), view.stride())

    def _fill(self, storages: list[torch.UntypedStorage]) -> None:
        for storage in storages:
            storage.resize_(self._host[storage._cdata].nbytes())
            storage.copy_(self._host[storage._cdata], non_blocking=True)
        _finish_copies()

    def _leave(self) -> None:
        if self._optimizer is not None:  # the gather of the last update may still be writing
            self._optimizer.ready()
        lasting = [*self._weights, *self._states]
        for storage in lasting:
            self._host[storage._cdata].copy_(storage, non_blocking=True)
        _finish_copies()
        _empty([*lasting, *(storage for storage, _ in self._grads)])


def _finish_copies() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _empty(storages: list[torch.UntypedStorage]) -> None:
    for storage in storages:
        storage.resize_(0)


def _tensors(trainer: Trainer) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What a forward pass reads, what else must survive, and what each step makes anew (gradients)."""
    if trainer.optimizer is None:
        return [parameter.data for stage in trainer.stages.values() for parameter in stage.parameters()], [], []
    buckets = [bucket for held in trainer.optimizer.buckets.values() for bucket in held]
    states = [state for bucket in buckets for state in (bucket.master, bucket.exp_avg, bucket.exp_avg_sq)]
    return [bucket.weights for bucket in buckets], states, [bucket.grads for bucket in buckets]


def _storages(tensors: list[Tensor]) -> list[torch.UntypedStorage]:
    """Each storage once, though several tensors be views of it."""
    found = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors if tensor.numel()}
    return list(found.values())
