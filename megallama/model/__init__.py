"""Llama 2 as pipeline stages over the parallel layers, its canonical names and shapes, and its initial weights."""

from megallama.model.canonical import canonical_shapes
from megallama.model.initial import RandomWeights
from megallama.model.llama import Span, Stage, stage_spans

__all__ = ["RandomWeights", "Span", "Stage", "canonical_shapes", "stage_spans"]
