"""Checkpoint formats: each is read as a source of canonical rectangles, and written from any source."""

from megallama.checkpoint.formats.hf import HFSource, check_export, write_hf
from megallama.checkpoint.formats.megatron import write_megatron
from megallama.checkpoint.formats.megatron_source import open_megatron
from megallama.checkpoint.formats.meta import open_meta, write_meta
from megallama.checkpoint.formats.native import StoreSource, write_store
from megallama.checkpoint.formats.source import Source, read_whole, require_model

__all__ = [
    "HFSource",
    "Source",
    "StoreSource",
    "check_export",
    "open_megatron",
    "open_meta",
    "read_whole",
    "require_model",
    "write_hf",
    "write_megatron",
    "write_meta",
    "write_store",
]
