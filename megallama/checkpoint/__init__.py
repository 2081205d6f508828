"""Layout-free checkpoints: rectangles of canonical tensors in safetensors with a JSON manifest."""

from megallama.checkpoint.checkpointer import Checkpointer, checkpoint_folders
from megallama.checkpoint.store import Store

__all__ = ["Checkpointer", "Store", "checkpoint_folders"]
