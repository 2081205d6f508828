"""megallama: a tensor x pipeline x data parallel training engine for Llama-2-shaped models."""

__version__ = "0.1.0"
