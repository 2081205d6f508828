"""Hugging Face Llama folders: config.json and model*.safetensors.

The canonical model is the HF state dict, so nothing is renamed or permuted: reading cuts, writing joins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megallama.checkpoint.formats.placement import (
    Layout,
    PlacedSource,
    full_name,
    is_empty,
    new_folder,
    refuse_unknown,
    replaced_folder,
    specs,
    whole,
    write_layout,
)
from megallama.checkpoint.formats.source import Source, checked_model, refuse_layers
from megallama.checkpoint.formats.tokenizer_files import (
    GENERATION,
    TOKENIZER_FILES,
    fitting_tokenizer,
    write_for_transformers,
    write_json,
)
from megallama.checkpoint.tensors import DTYPES, Spec, TensorFile, TensorWriter
from megallama.config import LM, SCALAR, ModelConfig
from megallama.model.canonical import EMBEDDING, HEAD, canonical_shapes

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PRODUCER = {"format": "pt", "producer": "megallama"}
"""Metadata of our weight files: transformers asks for the format; the producer marks a folder that may be replaced."""

SHARD_BYTES = 5_000_000_000
"""Largest weight file, as transformers writes them."""

REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}
"""What HF takes for keys that a config.json omits; num_key_value_heads is then num_attention_heads."""

HEADED = {LM: "LlamaForCausalLM", SCALAR: "LlamaForSequenceClassification"}
"""What transformers calls a model with each head."""

ACCEPTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}
"""Values of config.json's keys with which the model is the one computed here; a missing key is fine."""

SPECIAL = ("bos_token_id", "eos_token_id")
_BUFFER = re.compile(r".*\.rotary_emb\.inv_freq")
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def model_config(path: Path) -> ModelConfig:
    """The shape that a config.json of HF describes.

    Raises:
        ValueError: unreadable, a key is missing or of the wrong type, or the model is not a plain Llama; names the key.
    """
    found = _json(path)
    if found.get("model_type") != "llama":
        raise ValueError(f"{path}: model_type is {found.get('model_type')!r}; only 'llama' can be read")
    for key, accepted in ACCEPTED.items():
        if key in found and found[key] not in accepted:
            raise ValueError(f"{path}: {key} is {found[key]!r}; only {accepted[0]!r} is supported")
    given = {key: found[key] for key in (*REQUIRED, *DEFAULTS, "num_key_value_heads") if found.get(key) is not None}
    for key in ("rope_scaling", "rope_parameters"):  # the second since transformers 5, with the base inside
        rope = found.get(key) or {}
        if not isinstance(rope, dict) or any(rope.get(kind, "default") != "default" for kind in ("rope_type", "type")):
            raise ValueError(f"{path}: {key} is {rope}; scaled rotary embeddings are not supported")
        if "rope_theta" in rope:
            given["rope_theta"] = rope["rope_theta"]
    if missing := [key for key in REQUIRED if key not in given]:
        raise ValueError(f"{path}: {', '.join(missing)} missing; is the file complete?")
    config = checked_model(path, {**DEFAULTS, "num_key_value_heads": given["num_attention_heads"], **given}, {})
    if HEADED[SCALAR] in (found.get("architectures") or []):
        if found.get("num_labels", len(found.get("id2label") or [0])) != 1:
            raise ValueError(f"{path}: a classifier of several labels; only one score (num_labels 1) can be read")
        config = replace(config, head=SCALAR)
    if found.get("head_dim") not in (None, config.head_dim):
        raise ValueError(
            f"{path}: head_dim is {found['head_dim']}; only hidden_size / num_attention_heads = {config.head_dim} "
            f"is supported"
        )
    return config


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.parent} is not an HF model folder: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: a JSON object is expected, not {type(found).__name__}")
    return found


class HFSource(PlacedSource):
    """A source of canonical rectangles over an HF Llama folder; opening it reads headers only.

    Raises:
        ValueError: not a Llama folder, a file is missing or damaged, or a tensor is missing, unknown, of another shape
            or of a dtype that holds no plain numbers.
    """

    def __init__(self, folder: Path):
        folder = Path(folder)
        model = model_config(folder / CONFIG)
        placed, files = _open_tensors(folder)
        refuse_layers(folder / CONFIG, model, len(placed))
        layout: dict[str, dict[str, Any]] = {file: {} for file in files}
        shapes = canonical_shapes(model)
        for name, shape in shapes.items():
            if name not in placed:
                raise ValueError(f"{folder}: tensor {name} is missing")
            layout[placed[name]][name] = whole(name, shape)
        if model.tied and HEAD in placed:  # stored once more
            layout[placed[HEAD]][HEAD] = whole(EMBEDDING, shapes[EMBEDDING])
        for file, opened in files.items():
            stored = {name for name, place in placed.items() if place == file and not _BUFFER.fullmatch(name)}
            refuse_unknown(opened, stored, layout[file], CONFIG)
        super().__init__(folder, model, layout, files, CONFIG)


def _open_tensors(folder: Path) -> tuple[dict[str, str], dict[str, TensorFile]]:
    """Name -> file of every tensor in the folder, and the files."""
    if (folder / WEIGHTS).is_file():
        opened = _open(folder / WEIGHTS)
        return dict.fromkeys(opened.specs, WEIGHTS), {WEIGHTS: opened}
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}; pickled weights are not read: "
            f"load them in transformers and save_pretrained them as safetensors"
        )
    placed = _json(folder / INDEX).get("weight_map")
    if not isinstance(placed, dict):
        raise ValueError(f"{folder / INDEX}: weight_map is missing")
    if outside := [file for file in placed.values() if Path(str(file)).name != file]:
        raise ValueError(f"{folder / INDEX}: file {outside[0]!r} lies outside the folder")
    files = {file: _open(folder / file) for file in sorted(set(placed.values()))}
    for name, file in placed.items():
        if name not in files[file].specs:
            raise ValueError(f"{folder / file}: tensor {name} is missing, though {INDEX} places it there")
    return placed, files


def _open(path: Path) -> TensorFile:
    """The file, once the safetensors package itself has found its header in order."""
    try:
        with safe_open(path, framework="pt") as file:
            dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            raise ValueError(f"{path}: {name} is stored as {dtype}; only {', '.join(DTYPES)} can be read")
    return TensorFile(path)


def write_hf(
    source: Source,
    folder: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    tokenizer: Path | None = None,
    like: Path | None = None,
) -> None:
    """Write weights as a folder for `from_pretrained` of transformers' Llama; replaces an earlier export only.

    Host memory: one tensor. The folder appears complete, by a rename.

    Args:
        dtype: None = each tensor's own.
        max_shard_bytes: largest weight file; a bigger tensor has a file of its own.
        tokenizer: what `load_tokenizer` opens; its files go along, and its BOS and EOS into the configuration.
        like: a folder whose generation_config.json and special tokens are kept, where it has them.

    Raises:
        ValueError: the source is damaged, the tokenizer does not fit the vocabulary, or `folder` holds something that
            is not an export of ours.
    """
    if dtype not in (None, *DTYPES.values()):
        raise ValueError(f"export dtype {dtype}: choose one of {', '.join(str(d) for d in DTYPES.values())}")
    folder = Path(folder)
    check_export(folder, tokenizer, source.model)
    special, generation = _generation(source.model, tokenizer, like)
    layout, index = _files(source, dtype, max_shard_bytes)
    earlier = folder.exists() and not is_empty(folder)
    with replaced_folder(folder, _refuse_foreign) if earlier else new_folder(folder) as work:
        write_layout(source, layout, dtype, lambda file, stored: TensorWriter(work / file, stored, PRODUCER))
        if len(layout) > 1:
            write_json(work / INDEX, index)
        write_json(work / CONFIG, _config(source.model, dtype or source.dtypes[EMBEDDING]) | special)
        write_json(work / GENERATION, generation)
        if tokenizer is not None:
            write_for_transformers(Path(tokenizer), work)


def check_export(folder: Path, tokenizer: Path | None, model: ModelConfig) -> None:
    """What `write_hf` asks of its folder and tokenizer; for a run to know at its start.

    Raises:
        ValueError: `folder` holds something that is not an export of ours or cannot be replaced, or the tokenizer does
            not open or has more ids than the vocabulary.
    """
    _refuse_foreign(full_name(folder))
    if tokenizer is not None:
        fitting_tokenizer(tokenizer, model)


def _refuse_foreign(folder: Path) -> None:
    """Stop before anything is lost: a folder is replaced only if all that it holds is what an export writes."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a new folder for the export")
    ours = {CONFIG, GENERATION, INDEX, *TOKENIZER_FILES}
    for path in folder.iterdir():
        weights = _SHARD.fullmatch(path.name) and _open(path).metadata.get("producer") == PRODUCER["producer"]
        if path.name not in ours and not weights:
            raise ValueError(f"{folder} holds {path.name}, which is not from an earlier export; name a new folder")
    if any(folder.iterdir()) and not any(_SHARD.fullmatch(path.name) for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and not an earlier export; name a new folder")


def _files(source: Source, dtype: torch.dtype | None, limit: int) -> tuple[Layout, dict[str, Any]]:
    """The tensors in order, a new file where the next one would bring a file over `limit` bytes; and the index."""
    tensors = {name: whole(name, shape) for name, shape in source.shapes.items()}
    stored: Mapping[str, Spec] = specs(source, tensors, dtype)
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in stored.items():
        size += spec.nbytes
        if shards[-1] and size > limit:
            shards.append([])
            size = spec.nbytes
        shards[-1].append(name)
    count = len(shards)
    files = [WEIGHTS] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    placed = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    layout = {file: {name: tensors[name] for name in names} for file, names in zip(files, shards, strict=True)}
    return layout, {"metadata": {"total_size": sum(s.nbytes for s in stored.values())}, "weight_map": placed}


def _config(model: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json in the keys that every version of transformers since 4.31 reads."""
    shape = {key: value for key, value in asdict(model).items() if key not in ("preset", "head")}
    labels = {"id2label": {"0": "reward"}, "label2id": {"reward": 0}} if model.head == SCALAR else {}
    return {
        "architectures": [HEADED[model.head]],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_scaling": None,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **shape,
        **labels,
    }


def _generation(model: ModelConfig, tokenizer: Path | None, like: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Special tokens for the configuration, and generation_config.json; what nobody knows is null there."""
    special: dict[str, Any] = dict.fromkeys(SPECIAL)
    if tokenizer is not None:
        opened = fitting_tokenizer(tokenizer, model)
        special = {"bos_token_id": opened.bos, "eos_token_id": opened.eos}
    kept = _json(like / GENERATION) if like is not None and (like / GENERATION).is_file() else {}
    theirs = _json(like / CONFIG) if like is not None and (like / CONFIG).is_file() else kept
    special |= {key: theirs[key] for key in (*SPECIAL, "pad_token_id") if theirs.get(key) is not None}
    return special, kept or {"_from_model_config": True} | special
