"""Where the weight gradients of one stage go: straight into accumulation buffers, now or at the schedule's W action.

Parallel layers hand over (dy, x) instead of letting autograd form dW = dyᵀ x and add it later. That saves a copy of
every weight gradient, accumulates in full precision, and lets a zero-bubble schedule run the products when it likes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Target:
    """The accumulation buffer of one weight.

    Attributes:
        buffer: of the weight's shape, in the accumulation dtype.
        uses: contributions a micro-batch makes (2 for an embedding that is also the head of the same stage).
        left: contributions still to come in this step.
        fresh: nothing has been added in this step, so the next contribution overwrites.
    """

    buffer: Tensor
    uses: int = 1
    left: int = 0
    fresh: bool = True


class WeightGrads:
    """The weight gradients of one stage.

    A weight that was never attached collects an ordinary `.grad`. After the last contribution of a step to a weight,
    `arrived(weight)` is called.
    """

    def __init__(self) -> None:
        self.targets: dict[Tensor, Target] = {}
        self.arrived: Callable[[Tensor], None] = lambda weight: None
        self.deferred = False
        self._queue: list[Callable[[], None]] = []

    def attach(self, weight: nn.Parameter, buffer: Tensor, uses: int) -> None:
        """Accumulate the gradient of `weight` into `buffer`, also where autograd itself forms it (norms)."""
        self.targets[weight] = Target(buffer, uses)

        def collect(parameter: Tensor) -> None:
            if parameter.grad is not None:  # it is None behind a layer that hands its product over itself
                self.add(weight, parameter.grad)
                parameter.grad = None

        weight.register_post_accumulate_grad_hook(collect)

    def begin(self, micros: int) -> None:
        """Start a step of `micros` micro-batches."""
        for target in self.targets.values():
            target.left, target.fresh = target.uses * micros, True

    def product(self, weight: nn.Parameter, operands: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Add dyᵀ x for `operands() -> (dy (T, out), x (T, in))`: at once, or later where `deferred`."""
        if self.deferred:
            self._queue.append(lambda: self._add_product(weight, *operands()))
        else:
            self._add_product(weight, *operands())

    def add(self, weight: nn.Parameter, grad: Tensor) -> None:
        """Add a gradient of the weight's own shape."""
        target = self._target(weight)
        if target.fresh:
            target.buffer.copy_(grad)
        else:
            target.buffer.add_(grad)
        self._count(weight, target)

    def add_rows(self, weight: nn.Parameter, rows: Tensor, grad: Tensor) -> None:
        """Add `grad` (T, width) to the rows `rows` (T,) of the weight's gradient."""
        target = self._target(weight)
        if target.fresh:
            target.buffer.zero_()
        grad = grad.to(target.buffer.dtype)
        if grad.is_cuda:  # sorts the rows: deterministic, where index_add_ adds in the order that threads come
            target.buffer.index_put_((rows,), grad, accumulate=True)
        else:
            target.buffer.index_add_(0, rows, grad)
        self._count(weight, target)

    def take_queue(self) -> list[Callable[[], None]]:
        """The products deferred since the last call; the schedule's W action runs them."""
        taken, self._queue = self._queue, []
        return taken

    def _add_product(self, weight: nn.Parameter, dy: Tensor, x: Tensor) -> None:
        target = self._target(weight)
        buffer, beta = target.buffer, 0 if target.fresh else 1
        if buffer.dtype == x.dtype:
            buffer.addmm_(dy.t(), x, beta=beta)
        elif x.is_cuda:  # bf16 operands, fp32 sum: the product must not be rounded to bf16 on its way
            product = torch.mm(dy.t(), x, out_dtype=buffer.dtype)
            buffer.copy_(product) if target.fresh else buffer.add_(product)
        else:
            buffer.addmm_(dy.t().to(buffer.dtype), x.to(buffer.dtype), beta=beta)
        self._count(weight, target)

    def _target(self, weight: nn.Parameter) -> Target:
        if weight in self.targets:
            return self.targets[weight]
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        return Target(weight.grad, fresh=False)

    def _count(self, weight: Tensor, target: Target) -> None:
        target.fresh = False
        target.left -= 1
        if target.left == 0:
            self.arrived(weight)


class PipelineStage(nn.Module, ABC):
    """What the engine and the optimizer ask of a stage: forward maps (hidden states or None, Batch) to hidden states,
    or to the last stage's output.

    Attributes:
        grads: where the stage's weight gradients go.
    """

    grads: WeightGrads

    @abstractmethod
    def units(self) -> list[nn.Module]:
        """The modules that own parameters, in the order of the forward pass: a bucket holds whole units."""
