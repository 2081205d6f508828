"""What the planner plans: a model's shape, a layout, a batch, and the traits of the software that runs it.

A `Config` describes a run of this engine; a `Job` also describes the runs of others that were measured and published,
so that one model of time and memory answers for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megallama.config import SCALAR, Config, ModelConfig
from megallama.plan.cost import stage_layers

WIDTH = {"bfloat16": 2, "float32": 4, "float64": 8}
"""Bytes of one number of each train.dtype."""


class Shape(NamedTuple):
    """A transformer. Llama is gated (SwiGLU: three matrices of the feed-forward); GPT-2's kin is not (two)."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    gated: bool = True
    tied: bool = False
    scalar: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def feed_forwards(self) -> int:
        """Matrices of the feed-forward."""
        return 3 if self.gated else 2


class Layout(NamedTuple):
    """How ranks share the model and the batch; as in ParallelConfig and TrainConfig."""

    tp: int
    pp: int
    dp: int
    micro_batch: int
    vpp: int = 1
    schedule: str = "1f1b"
    recompute: str = "none"
    sequence_parallel: bool = True
    layers_per_stage: tuple[int, ...] = ()

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def stages(self) -> int:
        """Chunk c of pipeline rank r is stage c * pp + r."""
        return self.pp * self.vpp

    def stages_of(self, rank: int) -> range:
        """The chunks of a pipeline rank."""
        return range(rank, self.stages, self.pp)


class Engine(NamedTuple):
    """What of the software a step's time and memory depend on.

    Attributes:
        fused_attention: scores stay on the chip; otherwise they are written and read.
        sharded_optimizer: fp32 masters and moments are split over dp (ZeRO-1), else whole on every rank.
        gradient_bytes: of each number that replicas sum.
        overlap: hops and the replicas' communication run beside compute where they can.
        fused_kernels: what lies between matrix products takes one kernel, which reads and writes once; otherwise every
            step of it does.
        fused_accumulation: products add to the gradients of earlier micro-batches; otherwise a kernel of its own does.
    """

    fused_attention: bool
    sharded_optimizer: bool
    gradient_bytes: int
    overlap: bool
    fused_kernels: bool
    fused_accumulation: bool


MEGALLAMA = Engine(
    fused_attention=True,
    sharded_optimizer=True,
    gradient_bytes=4,
    overlap=True,
    fused_kernels=False,
    fused_accumulation=False,
)
COMPILED = MEGALLAMA._replace(fused_kernels=True)
"""With train.compile."""
MEGATRON_2021 = Engine(
    fused_attention=False,
    sharded_optimizer=False,
    gradient_bytes=2,
    overlap=False,
    fused_kernels=True,
    fused_accumulation=True,
)
"""As in the published measurements: Narayanan et al. 2021, Korthikanti et al. 2022, vTrain."""


@dataclass(frozen=True)
class Job:
    """A training step to be predicted.

    Args:
        global_batch: samples of a step; a multiple of micro_batch * dp.
        dtype: train.dtype.
    """

    shape: Shape
    seq_length: int
    global_batch: int
    layout: Layout
    dtype: str = "bfloat16"
    engine: Engine = MEGALLAMA

    @property
    def micros(self) -> int:
        """Micro-batches that one replica runs in a step."""
        return self.global_batch // (self.layout.micro_batch * self.layout.dp)

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks of each stage; evenly, the earlier ones more, where the layout does not say."""
        if self.layout.layers_per_stage:
            return self.layout.layers_per_stage
        each, more = divmod(self.shape.layers, self.layout.stages)
        return tuple(each + (stage < more) for stage in range(self.layout.stages))

    @property
    def tokens(self) -> int:
        """Of one micro-batch."""
        return self.layout.micro_batch * self.seq_length


def shape_of(model: ModelConfig) -> Shape:
    """The shape of a configured model."""
    return Shape(
        model.num_hidden_layers,
        model.hidden_size,
        model.num_attention_heads,
        model.num_key_value_heads,
        model.intermediate_size,
        model.vocab_size,
        gated=True,
        tied=model.tied,
        scalar=model.head == SCALAR,
    )


def job_of(config: Config, world_size: int) -> Job:
    """The step of a valid configuration on `world_size` ranks."""
    parallel, train = config.parallel, config.train
    layout = Layout(
        parallel.tp,
        parallel.pp,
        config.data_parallel(world_size),
        train.micro_batch_size,
        parallel.vpp,
        parallel.schedule,
        parallel.recompute,
        True,
        stage_layers(config.model, parallel, config.data.seq_length),
    )
    engine = COMPILED if train.compile else MEGALLAMA
    return Job(shape_of(config.model), config.data.seq_length, train.global_batch_size, layout, train.dtype, engine)
