"""The shapes and recipes of the Llama 2 paper (arXiv 2307.09288, section 2.2 and table 1), as data.

34B was never released: its shape is Code Llama's. What all four share (vocabulary 32,000, context 4096, RMSNorm epsilon
1e-5, RoPE base 10,000, untied embeddings, AdamW and its schedule) are the defaults in config.py.
"""

from __future__ import annotations

PRESETS: dict[str, dict[str, int]] = {
    "llama2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama2-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
    "llama2-34b": {
        "hidden_size": 8192,
        "intermediate_size": 22016,
        "num_hidden_layers": 48,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "llama2-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
"""Shapes by name: what `model.preset` stands for. Keys given beside it override it."""
