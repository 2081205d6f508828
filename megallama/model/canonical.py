"""The canonical model: names and shapes of an HF Llama state dict."""

from __future__ import annotations

from megallama.config import SCALAR, ModelConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
SCORE = "score.weight"

TRAINING_ONLY = ("preset", "initializer_range", "max_position_embeddings")
"""Keys of ModelConfig that do not change what given weights compute."""


def block_name(layer: int) -> str:
    """Prefix of the tensors of one transformer block."""
    return f"model.layers.{layer}."


def canonical_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, in the order of the forward pass; a tied head is the embedding."""
    d, ffn, kv = model.hidden_size, model.intermediate_size, model.num_key_value_heads * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (model.vocab_size, d)}
    block: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (d, d),
        "self_attn.k_proj.weight": (kv, d),
        "self_attn.v_proj.weight": (kv, d),
        "self_attn.o_proj.weight": (d, d),
        "post_attention_layernorm.weight": (d,),
        "mlp.gate_proj.weight": (ffn, d),
        "mlp.up_proj.weight": (ffn, d),
        "mlp.down_proj.weight": (d, ffn),
    }
    for layer in range(model.num_hidden_layers):
        shapes |= {block_name(layer) + name: shape for name, shape in block.items()}
    shapes[FINAL_NORM] = (d,)
    if model.head == SCALAR:
        shapes[SCORE] = (1, d)
    elif not model.tie_word_embeddings:
        shapes[HEAD] = (model.vocab_size, d)
    return shapes
