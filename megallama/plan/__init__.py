"""What a run costs before it runs: parameters, FLOPs, layers a stage and bytes a rank. Never imports torch.

`cost` counts work and fixes the conventions behind TFLOP/s and MFU, `memory` counts bytes, `report` words both for
`--dry-run`.
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
