"""One process on a GPU: what no CPU test can see (the fused kernels, bf16 products with fp32 sums, flash attention)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megallama.checkpoint import Checkpointer
from megallama.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from megallama.runtime.mesh import build_mesh
from megallama.train.run import resume
from megallama.train.shrink import replica_batches
from megallama.train.trainer import NextToken, Stats, Trainer, build_trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

MODEL = ModelConfig(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=97,
    max_position_embeddings=64,
    initializer_range=0.05,
)


def settings(dtype: str, **train: bool) -> Config:
    return Config(
        model=MODEL,
        data=DataConfig(seq_length=64, mask_documents=True),
        train=TrainConfig(steps=10, micro_batch_size=2, global_batch_size=8, dtype=dtype, **train),
        optim=OptimConfig(lr=1e-3, warmup_steps=1),
        checkpoint=CheckpointConfig(async_save=False),
    )


def start(config: Config, device: str) -> Trainer:
    return build_trainer(config, build_mesh(1, 1, 2, False, torch.device(device)))


def go(trainer: Trainer, steps: int) -> list[Stats]:
    loss = NextToken(MODEL.vocab_size, trainer.mesh.tp)
    return [trainer.step(replica_batches(trainer.config, 1, trainer.done, 1)[0], loss) for _ in range(steps)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4), ("bfloat16", 2e-2)], ids=lambda value: str(value)
)
def test_a_gpu_follows_the_cpu(dtype: str, tolerance: float) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    ours, theirs = go(start(settings(dtype), "cuda"), 5), go(start(settings("float64"), "cpu"), 5)
    for a, b in zip(ours, theirs, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=tolerance)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=10 * tolerance)


def test_compiled_segments_follow_the_plain_ones() -> None:
    plain, compiled = go(start(settings("float32"), "cuda"), 3), go(start(settings("float32", compile=True), "cuda"), 3)
    for a, b in zip(plain, compiled, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-4)


def test_a_gpu_run_resumes(tmp_path: Path) -> None:
    config = settings("bfloat16")
    whole = go(start(config, "cuda"), 4)
    first = start(config, "cuda")
    go(first, 2)
    saved = Checkpointer(tmp_path, first.mesh, MODEL)
    assert first.optimizer is not None
    saved.save(2, first.optimizer.slots(), {"consumed_samples": 16, "updates": 2, "fingerprints": {}})
    second = start(config, "cuda")
    assert resume(second, Checkpointer(tmp_path, second.mesh, MODEL), {}, print) == 16
    for a, b in zip(go(second, 2), whole[2:], strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-3)
