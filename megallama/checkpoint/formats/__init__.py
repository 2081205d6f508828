"""Foreign checkpoint formats, read as sources of canonical rectangles and written from checkpoints."""

from megallama.checkpoint.formats.hf import HFSource, export_hf

__all__ = ["HFSource", "export_hf"]
