"""Tensor and sequence parallelism: collectives over one axis, parallel layers, vocabulary-parallel loss, and pieces.

A piece says what rectangle of which canonical tensor lies in a local parameter. Nothing here knows configuration or
models.
"""

from megallama.parallel.grads import PipelineStage, WeightGrads
from megallama.parallel.layers import ColumnLinear, Part, RowLinear, VocabEmbedding, VocabHead
from megallama.parallel.loss import cross_entropy_sum, log_probs
from megallama.parallel.pieces import Index, Piece, Rect, Slot, pieces

__all__ = [
    "ColumnLinear",
    "Index",
    "Part",
    "Piece",
    "PipelineStage",
    "Rect",
    "RowLinear",
    "Slot",
    "VocabEmbedding",
    "VocabHead",
    "WeightGrads",
    "cross_entropy_sum",
    "log_probs",
    "pieces",
]
