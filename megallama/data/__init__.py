"""The data room: from text to the i-th sample of a run.

`text` finds documents in files, `tokenizer` turns them into ids, `preprocess` writes them into the indexed dataset
(`indexed`), `order` says which sample comes i-th, `samples` where its tokens lie. These need numpy only. The
micro-batches of a training step are in `data.batch` and `data.loader`, which need torch and are imported from there.
"""

from .indexed import IndexedDataset, IndexedWriter, best_dtype
from .order import Blend, Order, key, permute
from .provenance import check_vocabulary
from .samples import Corpus, Location, Mixture, Sample, open_mixture
from .text import Reading, find_files
from .tokenizer import Tokenizer, load_tokenizer, wrap_tokenizer

__all__ = [
    "Blend",
    "Corpus",
    "IndexedDataset",
    "IndexedWriter",
    "Location",
    "Mixture",
    "Order",
    "Reading",
    "Sample",
    "Tokenizer",
    "best_dtype",
    "check_vocabulary",
    "find_files",
    "key",
    "load_tokenizer",
    "open_mixture",
    "permute",
    "wrap_tokenizer",
]
