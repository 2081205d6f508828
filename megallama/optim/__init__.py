"""AdamW over ZeRO-1 shards: flat buckets, clipping by the global norm, the learning-rate schedule."""

from megallama.optim.schedule import learning_rate
from megallama.optim.zero1 import Zero1

__all__ = ["Zero1", "learning_rate"]
