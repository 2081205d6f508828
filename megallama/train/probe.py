"""The outputs of every module of a model on the mesh, as rectangles of what one process would compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from torch import Tensor, nn

from megallama.data.batch import Batch
from megallama.model.canonical import HEAD, block_name
from megallama.model.llama import Block, Stage
from megallama.parallel.layers import vocab_piece
from megallama.parallel.pieces import Piece, Rect
from megallama.runtime.mesh import Axis
from megallama.train.trainer import Trainer


class Part(NamedTuple):
    """Rectangle `rect` of tensor `name` as one rank holds it.

    Attributes:
        values: (height, width), on the CPU.
        owner: the rank that counts; others hold replicas.
    """

    name: str
    rect: Rect
    values: Tensor
    owner: bool = True


Read = Callable[[Tensor, Tensor], Iterator[Part]]
"""(input, output) of one call of a module -> rectangles."""


class _Reader(NamedTuple):
    """How the tensors of one tp rank lie in those of one process."""

    tp: Axis
    kv: Axis

    def tokens(self, name: str) -> Read:
        """Output (T/tp, width): this rank's tokens."""

        def read(x: Tensor, y: Tensor) -> Iterator[Part]:
            rows, first = y.shape[0], y.shape[0] * self.tp.rank
            yield Part(name, Rect(first, first + rows, 0, y.shape[1]), y)

        return read

    def columns(self, held: Sequence[Piece], names: Sequence[str]) -> Read:
        """Output (T, out/tp) of a column-parallel layer: output columns are rows of the weight's pieces."""

        def read(x: Tensor, y: Tensor) -> Iterator[Part]:
            for piece, name in zip(held, names, strict=True):
                owner = piece.replicas != "kv" or self.kv.rank == 0
                values = y[:, piece.local.r0 : piece.local.r1]
                yield Part(name, Rect(0, y.shape[0], piece.rect.r0, piece.rect.r1), values, owner)

        return read

    def row_parallel(self, piece: Piece, inside: str) -> Read:
        """Input (T, in/tp), columns of the weight's piece, is the output of `inside`; then the output's tokens."""
        output = self.tokens(_module(piece))

        def read(x: Tensor, y: Tensor) -> Iterator[Part]:
            yield Part(inside, Rect(0, x.shape[0], piece.rect.c0, piece.rect.c1), x)
            yield from output(x, y)

        return read


def _module(piece: Piece) -> str:
    return piece.name.removesuffix(".weight")


def _readers(stage: Stage, kv: Axis) -> Iterator[tuple[nn.Module, Read]]:
    """The modules to listen to and what to read there, in the order of the forward pass."""
    reader, model = _Reader(stage.tp, kv), stage.model
    if stage.embed is not None:
        yield stage.embed, reader.tokens(_module(stage.embed.pieces["weight"][0]))
    for number, block in enumerate(stage.blocks, stage.span.first):
        assert isinstance(block, Block), f"stage holds a {type(block).__name__} among its blocks"
        name = block_name(number)
        for norm, linear, inside, row in (
            (block.input_norm, block.qkv, "self_attn (rotary embedding and attention)", block.o),
            (block.post_norm, block.gate_up, "mlp (SwiGLU)", block.down),
        ):
            yield norm, reader.tokens(_module(norm.pieces["weight"][0]))
            held = linear.pieces["weight"]
            yield linear, reader.columns(held, [_module(piece) for piece in held])
            yield row, reader.row_parallel(row.pieces["weight"][0], name + inside)
        yield block, reader.tokens(name.removesuffix("."))
    if stage.norm is not None and stage.head is not None:
        yield stage.norm, reader.tokens(_module(stage.norm.pieces["weight"][0]))
        head = vocab_piece(HEAD, model.vocab_size, model.hidden_size, stage.tp, tied=False)
        yield stage.head, reader.columns([head], [_module(head)])


def forward_outputs(trainer: Trainer, micros: Sequence[Batch]) -> dict[int, list[Part]]:
    """Module outputs of one forward pass, by number of the micro-batch in the global batch. Collective.

    The global batch is the replicas' micro-batches one after another. Rows beyond a micro-batch's tokens are padding.
    """
    mesh = trainer.mesh
    outputs: dict[int, list[Part]] = {}

    def listen(read: Read) -> Callable:
        calls = iter(range(mesh.dp.rank * len(micros), (mesh.dp.rank + 1) * len(micros)))

        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            parts = outputs.setdefault(next(calls), [])
            for part in read(inputs[0], output):
                parts.append(part._replace(values=part.values.detach().to("cpu", copy=True)))

        return hook

    with ExitStack() as stack:
        for stage in trainer.stages.values():
            for module, read in _readers(stage, mesh.kv):
                stack.callback(module.register_forward_hook(listen(read)).remove)
        trainer.infer(micros, lambda output, batch: output.new_zeros(1))
    return outputs
