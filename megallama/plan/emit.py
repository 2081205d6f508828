"""A chosen layout as files to start from: the training configuration and the script that submits it."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

from megallama.config import Config, dump
from megallama.files import make_folder, write_whole
from megallama.plan.cluster import Cluster

CONFIG, SCRIPT = "train.yaml", "train.sbatch"

TEMPLATE = """#!/usr/bin/env bash
# {title}
# From the repository's root, with its environment activated: sbatch {script}
# Submitted again it goes on from the newest valid checkpoint; what follows the script's name is handed to the run.
#SBATCH --job-name=megallama
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={per_node}
#SBATCH --gpus-per-node={per_node}
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --output={log}
#SBATCH --open-mode=append
set -euo pipefail
export NCCL_IB_TIMEOUT=${{NCCL_IB_TIMEOUT:-22}}
export OMP_NUM_THREADS=${{SLURM_CPUS_PER_TASK:-8}}
srun --kill-on-bad-exit=1 --cpus-per-task="${{SLURM_CPUS_PER_TASK:-1}}" \\
    python -u -m megallama pretrain --config {settings} "$@"
"""


def emit(config: Config, gpus: int, cluster: Cluster, folder: Path, title: str) -> tuple[Path, Path]:
    """Write the configuration and the script; (configuration, script).

    Args:
        title: what stands first in the script, one line.

    Raises:
        ValueError: the configuration is not valid on `gpus` ranks, they are no whole nodes, or the folder cannot be
            written.
    """
    per_node = min(gpus, cluster.gpus_per_node)
    if gpus % per_node:
        raise ValueError(
            f"{gpus} GPUs are no whole nodes of {cluster.gpus_per_node}; a job takes nodes, so plan for a multiple"
        )
    if config.output_dir == Config().output_dir:
        config = replace(config, output_dir=str(folder / "run"))
    config.validate(gpus)
    make_folder(folder)
    settings, script, title = folder / CONFIG, folder / SCRIPT, " ".join(title.split())  # a comment is one line
    write_whole(settings, f"# {title}\n{dump(config)}")
    text = TEMPLATE.format(
        title=title,
        script=shlex.quote(str(script)),
        log=shlex.quote(str(folder / "slurm-%j.log")),
        settings=shlex.quote(str(settings)),
        nodes=gpus // per_node,
        per_node=per_node,
    )
    write_whole(script, text)
    return settings, script
