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
        trainer: the model, with its optimizer if it has one.
        idle: whether an idle model leaves its device; None = where the device is not the host itself.
    """

    def __init__(self, trainer: Trainer, idle: bool | None = None):
        self._moves = trainer.mesh.device.type != "cpu" if idle is None else idle
        self._optimizer = trainer.optimizer
        lasting, passing = _tensors(trainer)
        self._lasting = _storages(lasting)
        self._passing = [(storage, storage.nbytes()) for storage in _storages(passing)]
        self._host: list[torch.UntypedStorage] = []
        self._present = True
        self.leave()

    def leave(self) -> None:
        """Copy to the host what has changed, and free the device."""
        if not self._moves or not self._present:
            return
        if self._optimizer is not None:  # the gather of the last update may still be writing
            self._optimizer.ready()
        if not self._host:
            pin = self._lasting[0].device.type == "cuda"
            empty = (torch.UntypedStorage(storage.nbytes(), device="cpu") for storage in self._lasting)
            self._host = [storage.pin_memory() if pin else storage for storage in empty]
            self._copy(self._lasting, self._host)
        elif self._optimizer is not None:
            self._copy(self._lasting, self._host)
        for storage in (*self._lasting, *(storage for storage, _ in self._passing)):
            storage.resize_(0)
        self._present = False

    def enter(self) -> None:
        """Back to the device."""
        if self._present:
            return
        for storage, host in zip(self._lasting, self._host, strict=True):
            storage.resize_(host.nbytes())
        for storage, size in self._passing:
            storage.resize_(size)
        self._copy(self._host, self._lasting)
        self._present = True

    @staticmethod
    def _copy(sources: list[torch.UntypedStorage], targets: list[torch.UntypedStorage]) -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The model is on its device inside."""
        self.enter()
        try:
            yield
        finally:
            self.leave()


def _tensors(trainer: Trainer) -> tuple[list[Tensor], list[Tensor]]:
    """What must survive, and what each step makes anew (gradients)."""
    if trainer.optimizer is None:
        return [parameter.data for stage in trainer.stages.values() for parameter in stage.parameters()], []
    buckets = [bucket for held in trainer.optimizer.buckets.values() for bucket in held]
    lasting = [t for bucket in buckets for t in (bucket.weights, bucket.master, bucket.exp_avg, bucket.exp_avg_sq)]
    return lasting, [bucket.grads for bucket in buckets]


def _storages(tensors: list[Tensor]) -> list[torch.UntypedStorage]:
    """Each storage once, though several tensors be views of it."""
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors if tensor.numel()}
    return list(found.values())
