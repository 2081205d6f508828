"""Parameters and FLOPs against counts that are made in another way: shape by shape."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megallama.config import ModelConfig, ParallelConfig, load
from megallama.plan import block_flops, block_parameters, head_flops, parameters, stage_layers, train_flops_per_token
from megallama.plan.cost import peak_tflops, vocabulary_parameters


def block_shapes(m: ModelConfig) -> dict[str, tuple[int, int]]:
    """Every matrix of a block, (out, in), under its checkpoint name."""
    h, f, kv = m.hidden_size, m.intermediate_size, m.num_key_value_heads * m.head_dim
    return {"q": (h, h), "k": (kv, h), "v": (kv, h), "o": (h, h), "gate": (f, h), "up": (f, h), "down": (h, f)}


MODELS = st.builds(
    lambda groups, kv, half, width, layers, vocab, tied: ModelConfig(
        hidden_size=groups * kv * 2 * half,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=groups * kv,
        num_key_value_heads=kv,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    ),
    *(st.integers(1, n) for n in (4, 4, 8, 99, 12, 999)),
    st.booleans(),
)


@given(MODELS, st.integers(1, 64))
def test_counts_equal_the_sum_over_the_shapes(m: ModelConfig, seq: int) -> None:
    matrices = sum(a * b for a, b in block_shapes(m).values())
    table = m.vocab_size * m.hidden_size
    expected = (
        m.num_hidden_layers * (matrices + 2 * m.hidden_size) + m.hidden_size + table * (2 - m.tie_word_embeddings)
    )
    assert parameters(m) == expected
    products = 2 * matrices  # one token through every matrix
    products += 2 * m.num_attention_heads * (m.head_dim * seq + seq * m.head_dim)  # its scores, then its values
    assert block_flops(m, seq) == products
    assert train_flops_per_token(m, seq) == 3 * (m.num_hidden_layers * products + head_flops(m))
    assert head_flops(m) == 2 * table


def test_llama2_7b_forward_flops_by_hand() -> None:
    model = load(["--model.preset", "llama2-7b"]).model
    assert block_flops(model, 4096) == 2 * (4 * 4096**2 + 3 * 4096 * 11008) + 4 * 4096 * 4096
    assert train_flops_per_token(model, 4096) == pytest.approx(6 * 6.607e9 + 12 * 32 * 4096 * 4096, rel=1e-3)


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16])
def test_tensor_parallel_shards_add_up(tp: int) -> None:
    m = ModelConfig(
        hidden_size=256, intermediate_size=352, num_attention_heads=16, num_key_value_heads=4, vocab_size=999
    )
    copies = max(tp // m.num_key_value_heads, 1)
    extra_kv = (copies - 1) * sum(a * b for k, (a, b) in block_shapes(m).items() if k in "kv")
    extra_norms = (tp - 1) * 2 * m.hidden_size
    assert tp * block_parameters(m, tp) == block_parameters(m) + extra_kv + extra_norms
    assert vocabulary_parameters(m, tp) * tp == -(-999 // tp) * tp * m.hidden_size


def test_stages_count_the_head_and_recomputation() -> None:
    shape = "--model.hidden_size 512 --model.intermediate_size 1408 --model.num_hidden_layers 8 "
    shape += "--model.num_attention_heads 8 --model.num_key_value_heads 4"
    model = load(shape.split()).model  # its head weighs as much as five layers
    assert head_flops(model) / block_flops(model, 512) == pytest.approx(5, abs=0.5)
    assert stage_layers(model, ParallelConfig(pp=2), 512) in {(6, 2), (7, 1)}
    full = stage_layers(model, ParallelConfig(pp=2, recompute="full"), 512)
    assert full[1] >= stage_layers(model, ParallelConfig(pp=2), 512)[1]
    assert stage_layers(model, ParallelConfig(pp=2, layers_per_stage=(8, 0)), 512) == (8, 0)
    assert stage_layers(model, ParallelConfig(), 512) == (8,)
    assert sum(stage_layers(model, ParallelConfig(pp=2, vpp=2, schedule="interleaved"), 512)) == 8


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("some processor", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_tflops(name, "bfloat16") == peak
    assert peak_tflops(name, "float32") is None
