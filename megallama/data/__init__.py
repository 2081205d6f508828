"""The data room: from text to the i-th sample of a run.

`text` finds documents in files, `tokenizer` turns them into ids, `preprocess` writes them into the indexed dataset
(`indexed`), `order` says which sample comes i-th, `samples` where its tokens lie. For what follows pretraining,
`records` reads dialogues, preference pairs and prompts, `chat` puts them into the chat template's ids, `mixing` and
`packing` make epochs and sequences of them. These need numpy only. The micro-batches of a training step are in
`data.batch` and `data.loader`, which need torch and are imported from there.
"""

from .chat import ChatFormat, Encoded
from .indexed import IndexedDataset, IndexedWriter, best_dtype
from .messages import Message
from .mixing import mix
from .order import Blend, Order, key, permute
from .packing import pack
from .provenance import check_vocabulary
from .record_files import Origin
from .records import RATINGS, Dialogue, Pair, Prompt, read_dialogues, read_pairs, read_prompts
from .samples import Corpus, Location, Mixture, Sample, open_mixture
from .text import Reading, find_files
from .tokenizer import Tokenizer, load_tokenizer, wrap_tokenizer

__all__ = [
    "RATINGS",
    "Blend",
    "ChatFormat",
    "Corpus",
    "Dialogue",
    "Encoded",
    "IndexedDataset",
    "IndexedWriter",
    "Location",
    "Message",
    "Mixture",
    "Order",
    "Origin",
    "Pair",
    "Prompt",
    "Reading",
    "Sample",
    "Tokenizer",
    "best_dtype",
    "check_vocabulary",
    "find_files",
    "key",
    "load_tokenizer",
    "mix",
    "open_mixture",
    "pack",
    "permute",
    "read_dialogues",
    "read_pairs",
    "read_prompts",
    "wrap_tokenizer",
]
