"""Parameters and floating-point operations of a model, and the layers of each stage that follow from them.

Conventions, so that TFLOP/s and MFU can be compared: a multiply-add counts as 2; only matrix products count; attention
counts in full, as if not causal (a causal kernel does half of that part); a step is three forwards (backward is two);
recomputation is work of the layout, not of the model, and is not counted.
"""

from __future__ import annotations

from functools import cache

from megallama.config import SCALAR, ModelConfig, ParallelConfig
from megallama.pipeline import balance

PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("H100 PCIe", 756.5),
    ("H100 NVL", 835.5),
    ("H100", 989.4),
    ("A100", 312.0),
    ("A40", 149.7),
    ("L40S", 362.1),
)
"""Dense bfloat16 peaks in TFLOP/s, from NVIDIA's data sheets; the first name that a device's name contains counts."""


def peak_tflops(device_name: str, dtype: str) -> float | None:
    """Dense peak of one device in TFLOP/s, or None where it is not known (other devices, other types than bfloat16).

    Args:
        device_name: as the driver spells it, such as "NVIDIA H100 80GB HBM3".
        dtype: train.dtype.
    """
    if dtype != "bfloat16":
        return None
    return next((peak for name, peak in PEAK_TFLOPS if name in device_name), None)


def block_parameters(model: ModelConfig, tp: int = 1) -> int:
    """Parameters of one transformer block that one of `tp` tensor-parallel ranks holds.

    The matrices are split; K/V heads are copied where tp > num_key_value_heads; the two norms are whole on every rank.
    """
    hidden, width = model.hidden_size, model.intermediate_size
    query = hidden // tp
    kv = max(model.num_key_value_heads // tp, 1) * model.head_dim
    return hidden * (2 * query + 2 * kv + 3 * (width // tp)) + 2 * hidden


def vocabulary_parameters(model: ModelConfig, tp: int = 1) -> int:
    """Parameters of the embedding, or of the LM head, on one of `tp` ranks, padding to a multiple of tp included."""
    return -(-model.vocab_size // tp) * model.hidden_size


def head_parameters(model: ModelConfig, tp: int = 1) -> int:
    """Parameters of the head on one of `tp` ranks; a scalar head is whole on each."""
    return model.hidden_size if model.head == SCALAR else vocabulary_parameters(model, tp)


def parameters(model: ModelConfig) -> int:
    """Parameters of the whole model; a tied embedding counts once."""
    blocks = model.num_hidden_layers * block_parameters(model)
    head = 0 if model.tied else head_parameters(model)
    return vocabulary_parameters(model) + blocks + model.hidden_size + head


def block_flops(model: ModelConfig, seq_length: int) -> int:
    """Forward FLOPs of one block for one token of a sequence of `seq_length` tokens: 2 * weights + 4 * seq * hidden."""
    weights = block_parameters(model) - 2 * model.hidden_size  # norms multiply no matrices
    scores_and_values = 2 * 2 * seq_length * model.num_attention_heads * model.head_dim
    return 2 * weights + scores_and_values


def head_flops(model: ModelConfig) -> int:
    """Forward FLOPs of the head for one token: 2 * vocabulary * hidden, or 2 * hidden of a scalar head."""
    return 2 * head_parameters(model)


def train_flops_per_token(model: ModelConfig, seq_length: int) -> int:
    """Model FLOPs of forward and backward for one trained token (see the conventions above)."""
    return 3 * (model.num_hidden_layers * block_flops(model, seq_length) + head_flops(model))


def stage_layers(model: ModelConfig, parallel: ParallelConfig, seq_length: int) -> tuple[int, ...]:
    """Blocks on each of the pp * vpp stages: `parallel.layers_per_stage`, or balanced by the time of a training step.

    A block costs three forwards, four with full recomputation; the LM head three; the embedding's lookup moves `hidden`
    numbers and is counted as as many multiply-adds.
    """
    if parallel.layers_per_stage:
        return parallel.layers_per_stage
    return _balanced(model, parallel.stages, 3 + (parallel.recompute == "full"), seq_length)


@cache
def _balanced(model: ModelConfig, stages: int, passes: int, seq_length: int) -> tuple[int, ...]:
    return balance(
        layers=model.num_hidden_layers,
        stages=stages,
        layer_cost=float(passes * block_flops(model, seq_length)),
        first_cost=float(3 * 2 * model.hidden_size),
        last_cost=float(3 * head_flops(model)),
    )
