"""The shapes and recipes of the Llama 2 paper (arXiv 2307.09288, section 2.2 and table 1), as data.

34B was never released: its shape is Code Llama's. What all four share (vocabulary 32,000, context 4096, RMSNorm epsilon
1e-5, RoPE base 10,000, untied embeddings, AdamW and its schedule) are the defaults in config.py; what a later stage
does otherwise is its recipe.
"""

from __future__ import annotations

from typing import Any

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

RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "sft": {
        "data": {"mask_documents": True},
        "train": {"steps": 0, "global_batch_size": 64, "valid_interval": 50},
        "optim": {"lr": 2e-5, "warmup_steps": 0},
        "checkpoint": {"interval": 100},
    },
    "reward": {
        "train": {"steps": 0, "global_batch_size": 512, "valid_interval": 50},
        "optim": {"lr": 1e-5, "warmup_steps": 5, "warmup_share": 0.03},
        "checkpoint": {"interval": 100},
    },
    "ppo": {
        "train": {"steps": 400, "global_batch_size": 64, "valid_interval": 10},
        "optim": {"lr": 1e-6, "warmup_steps": 0, "schedule": "constant"},
        "checkpoint": {"interval": 10},
    },
}
"""What a stage's defaults are where they are not those of pretraining (the paper, sections 3.1, 3.2.2 and 3.2.3); it
leaves open the warm-up of fine-tuning, and how often to look and to save."""
