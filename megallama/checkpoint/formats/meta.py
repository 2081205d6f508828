"""Meta's folders: params.json and consolidated.NN.pth, one file a model-parallel rank.

Queries and keys are stored with rotary pairs side by side. Files hold shards of the matrices and copies of the norms.
`rope.freqs`, which some of Meta's files carry, follows from the configuration: it is neither read nor written (Meta's
own loaders do not ask for it).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megallama.checkpoint.formats.pickled import PickledFile, PickledWriter
from megallama.checkpoint.formats.placement import (
    Composite,
    Layout,
    PlacedSource,
    cut,
    heads,
    new_folder,
    refuse_unknown,
    whole,
    write_layout,
)
from megallama.checkpoint.formats.source import Source, checked_model, refuse_layers
from megallama.checkpoint.formats.tokenizer_files import copy_along
from megallama.checkpoint.tensors import Spec
from megallama.config import ModelConfig
from megallama.model.canonical import EMBEDDING, FINAL_NORM, HEAD, block_name, canonical_shapes
from megallama.presets import PRESETS

PARAMS = "params.json"
OUTPUT, EMBED, FIRST_GATE = "output.weight", "tok_embeddings.weight", "layers.0.feed_forward.w1.weight"

BLOCK: dict[str, tuple[str, int | None]] = {
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
}
"""Meta's tensor of a block -> the canonical one, and the dim along which files hold shards; None = a copy each."""

NAMES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
}
"""Key of the model -> key of params.json."""

FFN = {"multiple_of", "ffn_dim_multiplier"}
FFN_CHOICES = ((256, None), (4096, 1.3), (1024, 1.3), (256, 1.5))
"""(multiple_of, ffn_dim_multiplier) of published models."""

SHARDS = {"llama2-7b": 1, "llama2-13b": 2, "llama2-34b": 4, "llama2-70b": 8}
"""How many files Meta published a size in."""

_FILE = re.compile(r"consolidated\.(\d\d)\.pth")
_DROPPED = re.compile(r"rope\.freqs|.*\.inner_attention\.rope\.freqs")


def ffn_size(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Width of the feed-forward as Meta's code works it out."""
    size = int(8 * dim / 3)
    size = size if multiplier is None else int(multiplier * size)
    return multiple_of * -(-size // multiple_of)


def ffn_params(dim: int, size: int) -> tuple[int, float | None]:
    """(multiple_of, ffn_dim_multiplier) that give `size`, the published ones where they do."""
    for multiple_of, multiplier in FFN_CHOICES:
        if ffn_size(dim, multiple_of, multiplier) == size:
            return multiple_of, multiplier
    return 1, (size + 0.5) / int(8 * dim / 3)


def meta_layout(model: ModelConfig, shards: int, embed_dim: int = 1) -> Layout:
    """What lies where in Meta's files.

    Args:
        embed_dim: along which the embedding is cut: 1 in Llama 2, 0 in Llama 3.
    """
    shapes, d = canonical_shapes(model), model.hidden_size
    tied = EMBEDDING if model.tie_word_embeddings else HEAD
    tensors: dict[str, tuple[Composite, int | None]] = {
        EMBED: (whole(EMBEDDING, shapes[EMBEDDING]), embed_dim),
        "norm.weight": (whole(FINAL_NORM, shapes[FINAL_NORM]), None),
        OUTPUT: (whole(tied, shapes[tied]), 0),
    }
    turned = {"attention.wq": model.num_attention_heads, "attention.wk": model.num_key_value_heads}
    for layer in range(model.num_hidden_layers):
        for key, (name, dim) in BLOCK.items():
            name = f"{block_name(layer)}{name}.weight"
            count = turned.get(key)
            composite = heads(name, 0, count, model.head_dim, d, True) if count else whole(name, shapes[name])
            tensors[f"layers.{layer}.{key}.weight"] = (composite, dim)
    return {
        f"consolidated.{n:02d}.pth": {key: cut(composite, dim, n, shards) for key, (composite, dim) in tensors.items()}
        for n in range(shards)
    }


def open_meta(folder: Path) -> PlacedSource:
    """Meta's folder as a source; a file without output.weight makes the embeddings tied.

    Raises:
        ValueError: a file is missing or damaged, a key of params.json is wrong or not a plain Llama's, or a tensor is
            missing, unknown, of another shape or of a dtype that holds no plain numbers.
    """
    folder = Path(folder)
    files = _open_files(folder)
    first = next(iter(files.values()))
    model = _model(folder / PARAMS, first.specs, len(files))
    shape = first.specs[EMBED].shape
    embed_dim = 0 if len(files) > 1 and shape[1] == model.hidden_size else 1
    layout = {
        file: {key: composite for key, composite in tensors.items() if key != OUTPUT or OUTPUT in first.specs}
        for file, tensors in meta_layout(model, len(files), embed_dim).items()
    }
    for name, file in files.items():
        stored = (key for key in file.specs if not _DROPPED.fullmatch(key))
        refuse_unknown(file, stored, layout[name], PARAMS)
    return PlacedSource(folder, model, layout, files, f"{PARAMS} with {len(files)} files")


def _open_files(folder: Path) -> dict[str, PickledFile]:
    numbers = sorted(int(found[1]) for path in folder.glob("*") if (found := _FILE.fullmatch(path.name)))
    if not numbers:
        raise ValueError(f"{folder} holds no consolidated.00.pth; it is not a folder of Meta's")
    if missing := sorted(set(range(numbers[-1] + 1)) - set(numbers)):
        raise ValueError(f"{folder}: consolidated.{missing[0]:02d}.pth is missing; there are {len(numbers)} files")
    names = [f"consolidated.{n:02d}.pth" for n in numbers]
    return {name: PickledFile(folder / name) for name in names}


def _model(path: Path, specs: Mapping[str, Spec], shards: int) -> ModelConfig:
    """The model of a params.json and of the shapes in the first file."""
    params = _params(path)
    for key in (EMBED, FIRST_GATE, *({OUTPUT} & set(specs))):
        if len(specs[key].shape if key in specs else ()) != 2:
            raise ValueError(f"{path.parent / 'consolidated.00.pth'}: {key} is missing, or no matrix")
    given = {key: params[name] for key, name in NAMES.items() if params.get(name) is not None}
    if given.get("vocab_size", -1) == -1:  # published so: Meta's code asks the tokenizer
        rows, cols = specs.get(OUTPUT, specs[EMBED]).shape
        given["vocab_size"] = rows * shards if cols == params.get("dim") else rows
    given.setdefault("num_key_value_heads", given.get("num_attention_heads"))
    if missing := [name for key, name in NAMES.items() if key not in given and key != "rope_theta"]:
        raise ValueError(f"{path}: {', '.join(missing)} missing; is the file complete?")
    given["intermediate_size"] = specs[FIRST_GATE].shape[0] * shards
    given["tie_word_embeddings"] = OUTPUT not in specs
    model = checked_model(path, given, NAMES)
    refuse_layers(path, model, len(specs))
    multiple_of, multiplier = params.get("multiple_of"), params.get("ffn_dim_multiplier")
    if multiple_of is not None:
        size = ffn_size(model.hidden_size, multiple_of, multiplier)
        if size != model.intermediate_size:
            raise ValueError(
                f"{path}: multiple_of={multiple_of} and ffn_dim_multiplier={multiplier} make the feed-forward {size} "
                f"wide, but {shards} files hold {model.intermediate_size} rows of it; are files missing?"
            )
    return model


def _params(path: Path) -> dict[str, Any]:
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.parent} is not a folder of Meta's: {error}") from error
    if not isinstance(params, dict):
        raise ValueError(f"{path}: a JSON object is expected, not {type(params).__name__}")
    for key, value in params.items():
        if key not in {*NAMES.values(), *FFN} and value:
            raise ValueError(f"{path}: {key} is {value!r}; only a plain Llama without it can be read")
    multiple_of, multiplier = params.get("multiple_of"), params.get("ffn_dim_multiplier")
    if multiple_of is not None and not (type(multiple_of) is int and multiple_of > 0):
        raise ValueError(f"{path}: multiple_of is {multiple_of!r}; it must be a positive integer")
    if multiplier is not None and not (type(multiplier) in (int, float) and 0 < multiplier < 1e6):
        raise ValueError(f"{path}: ffn_dim_multiplier is {multiplier!r}; it must be a positive number")
    return params


def published_shards(model: ModelConfig) -> int:
    """In how many files Meta published this size; 1 for others."""
    sizes = ((name, all(getattr(model, k) == v for k, v in shape.items())) for name, shape in PRESETS.items())
    return next((SHARDS[name] for name, same in sizes if same), 1)


def write_meta(
    source: Source, folder: Path, shards: int, dtype: torch.dtype | None = None, tokenizer: Path | None = None
) -> None:
    """Write Meta's files in Llama 2's form; a tied head is written out, since the format knows no tying.

    Args:
        dtype: None = each tensor's own.
        tokenizer: its files go along.

    Raises:
        ValueError: the model cannot be cut into so many shards, or the folder holds something.
    """
    model = source.model
    for key in ("num_key_value_heads", "intermediate_size", "vocab_size", "hidden_size"):
        if getattr(model, key) % shards:
            raise ValueError(
                f"{key}={getattr(model, key)} cannot be cut into {shards} shards of Meta's format, which pads nothing; "
                f"choose another number of shards, such as 1"
            )
    with new_folder(folder) as work:
        write_layout(source, meta_layout(model, shards), dtype, lambda file, specs: PickledWriter(work / file, specs))
        copy_along(tokenizer, work)
        (work / PARAMS).write_text(json.dumps(_written_params(model)) + "\n")


def _written_params(model: ModelConfig) -> dict[str, Any]:
    multiple_of, multiplier = ffn_params(model.hidden_size, model.intermediate_size)
    params: dict[str, Any] = {name: getattr(model, key) for key, name in NAMES.items()}
    if model.rope_theta == ModelConfig.rope_theta:
        del params["rope_theta"]  # Llama 2's own code does not know the key
    params["multiple_of"] = multiple_of
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    return params
