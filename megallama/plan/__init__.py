"""What a run costs before it runs: parameters, FLOPs, bytes a rank, seconds a step, days, carbon. Never imports torch.

`cost` counts work and fixes the conventions behind TFLOP/s and MFU; `job` says what is planned. `memory` (with
`activations`) counts bytes. Time: `cluster` is data, `machine` times kernels and collectives on it with a few fitted
constants, `work` the blocks of a stage, `step` the engine's own program made of them. `search` ranks layouts, `advice`
words them, `outlook` plans the whole run, `pictures` (with `timeline`) draws, `emit` writes files to start from,
`table` predicts whole tables, and `command` is `megallama plan`. `report` is what `--dry-run` prints.
"""

from megallama.plan.cost import (
    block_flops,
    block_parameters,
    head_flops,
    parameters,
    peak_tflops,
    stage_layers,
    train_flops_per_token,
)
from megallama.plan.memory import RankMemory, rank_memory
from megallama.plan.report import describe

__all__ = [
    "RankMemory",
    "block_flops",
    "block_parameters",
    "describe",
    "head_flops",
    "parameters",
    "peak_tflops",
    "rank_memory",
    "stage_layers",
    "train_flops_per_token",
]
