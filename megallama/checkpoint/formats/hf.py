"""Hugging Face Llama folders: config.json and model*.safetensors, read by rectangles and written from checkpoints.

The canonical model is the HF state dict, so nothing is renamed or permuted: reading cuts, writing joins.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megallama.checkpoint.store import DTYPES, Store, sync
from megallama.config import ModelConfig
from megallama.data.tokenizer import WRAPPED, SentencePieceTokenizer, load_tokenizer
from megallama.model.canonical import HEAD, canonical_shapes
from megallama.parallel.pieces import Rect, matrix

CONFIG, GENERATION, WEIGHTS, INDEX = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
EXPORT_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PRODUCER = {"format": "pt", "producer": "megallama"}
"""Metadata of our weight files: transformers asks for the format; the producer marks a folder that may be replaced."""

REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}
"""What HF takes for keys that a config.json omits; num_key_value_heads is then num_attention_heads."""

ACCEPTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}
"""Values of config.json's keys with which the model is the one computed here; a missing key is fine."""

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
TRAINING_ONLY = {"preset", "initializer_range", "max_position_embeddings"}
"""Keys of ModelConfig that do not change what given weights compute."""

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
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ValueError(f"{path}: {key} is {rope}; scaled rotary embeddings are not supported")
        if "rope_theta" in rope:
            given["rope_theta"] = rope["rope_theta"]
    if missing := [key for key in REQUIRED if key not in given]:
        raise ValueError(f"{path}: {', '.join(missing)} missing; is the file complete?")
    model = {**DEFAULTS, "num_key_value_heads": given["num_attention_heads"], **given}
    for key, value in model.items():
        kind = type(getattr(ModelConfig, key))
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{path}: {key} is {value!r}; it must be of type {kind.__name__}")
        if kind is not bool and value <= 0:
            raise ValueError(f"{path}: {key} is {value}; it must be positive")
    config = ModelConfig(**model)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if config.hidden_size % heads or heads % groups:
        raise ValueError(
            f"{path}: num_attention_heads={heads} must divide hidden_size={config.hidden_size}, "
            f"and num_key_value_heads={groups} must divide num_attention_heads"
        )
    if found.get("head_dim") not in (None, config.head_dim):
        raise ValueError(
            f"{path}: head_dim is {found['head_dim']}; only hidden_size / num_attention_heads = {config.head_dim} "
            f"is supported"
        )
    return config


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.parent} is not an HF model folder: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: a JSON object is expected, not {type(found).__name__}")
    return found


class HFSource:
    """A source of canonical rectangles over an HF Llama folder; opening it reads headers only.

    Attributes:
        model: the shape that config.json describes.
        shapes: canonical name -> shape; every tensor has been checked against it.

    Raises:
        ValueError: not a Llama folder, a file is missing or damaged, or a tensor is missing, unknown, of another shape
            or of a dtype that holds no plain numbers.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.model = model_config(self.folder / CONFIG)
        self.shapes = canonical_shapes(self.model)
        self._tensors = _open_tensors(self.folder)
        known = {*self.shapes, HEAD}  # a tied head may be stored once more
        for name, shape in self.shapes.items():
            if name not in self._tensors:
                raise ValueError(f"{self.folder}: tensor {name} is missing")
            found, dtype = tuple(self._tensors[name].get_shape()), self._tensors[name].get_dtype()
            if found != shape:
                raise ValueError(f"{self.folder}: {name} has shape {found}, but config.json makes it {shape}")
            if dtype not in DTYPES:
                raise ValueError(f"{self.folder}: {name} is stored as {dtype}; only {', '.join(DTYPES)} can be read")
        for name in self._tensors:
            if name not in known and not _BUFFER.fullmatch(name):
                raise ValueError(f"{self.folder}: tensor {name} is not part of the Llama that config.json describes")

    def require(self, model: ModelConfig) -> None:
        """Check that the weights mean in `model` what they mean here.

        Raises:
            ValueError: names the keys that differ, with both values.
        """
        pairs = {f.name: (getattr(model, f.name), getattr(self.model, f.name)) for f in fields(ModelConfig)}
        wrong = [f"model.{key}={a} (there {b})" for key, (a, b) in pairs.items() if a != b and key not in TRAINING_ONLY]
        if wrong:
            raise ValueError(f"{self.folder} holds another model: {', '.join(wrong)}; set them to the folder's values")

    def read(self, name: str, rect: Rect, out: Tensor) -> None:
        """Write rectangle `rect` of tensor `name` to `out` (height, width), cast to its dtype; reads no other bytes.

        Raises:
            ValueError: the model has no such tensor or rectangle.
        """
        shape = self.shapes.get(name)
        if shape is None or rect.r1 > matrix(shape)[0] or rect.c1 > matrix(shape)[1]:
            raise ValueError(f"{self.folder}: {name} has shape {shape}; rectangle {tuple(rect)} lies outside")
        rows, cols = slice(rect.r0, rect.r1), slice(rect.c0, rect.c1)
        out.copy_(self._tensors[name][cols] if len(shape) == 1 else self._tensors[name][rows, cols])


def _open_tensors(folder: Path) -> dict[str, Any]:
    """Name -> safetensors slice of every tensor in the folder."""
    if (folder / WEIGHTS).is_file():
        file = _open(folder / WEIGHTS)
        return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
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
    stored = {file: set(handle.keys()) for file, handle in files.items()}
    for name, file in placed.items():
        if name not in stored[file]:
            raise ValueError(f"{folder / file}: tensor {name} is missing, though {INDEX} places it there")
    return {name: files[file].get_slice(name) for name, file in placed.items()}


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def export_hf(
    store: Store,
    model: ModelConfig,
    folder: Path,
    dtype: str = "bfloat16",
    max_shard_bytes: int = 5 << 30,
    tokenizer: Path | None = None,
) -> None:
    """Write a checkpoint's weights as a folder for `LlamaForCausalLM.from_pretrained`; replaces an earlier export only.

    Host memory: one shard. The folder appears complete, by a rename.

    Args:
        dtype: bfloat16 or float32.
        max_shard_bytes: largest weight file; a bigger tensor has a file of its own.
        tokenizer: what `load_tokenizer` opens; its files go along, and its BOS and EOS into the configuration.

    Raises:
        ValueError: the checkpoint holds another model or is damaged, the tokenizer does not fit the vocabulary, or
            `folder` holds something that is not an export of ours.
    """
    if dtype not in EXPORT_DTYPES:
        raise ValueError(f"export dtype {dtype}: choose one of {', '.join(EXPORT_DTYPES)}")
    shapes = canonical_shapes(model)
    for name in sorted({*shapes, *store.shapes}):
        if store.shapes.get(name) != shapes.get(name):
            raise ValueError(
                f"{store.folder}: {name} has shape {store.shapes.get(name)} there, but {shapes.get(name)} in this model"
            )
    folder = Path(folder).resolve()
    _refuse_foreign(folder)
    special = _special_ids(tokenizer, model)
    work = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        _write_weights(store, shapes, work, EXPORT_DTYPES[dtype], max_shard_bytes)
        _write_json(work / CONFIG, _hf_config(model, dtype) | special)
        _write_json(work / GENERATION, {"_from_model_config": True} | special)
        if tokenizer is not None:
            _write_tokenizer(Path(tokenizer), work)
        for path in (*work.iterdir(), work):
            sync(path)
        if folder.exists():
            shutil.rmtree(folder)
        work.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _refuse_foreign(folder: Path) -> None:
    """Stop before anything is lost: a folder is replaced only if all that it holds is what an export writes."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a new folder for the export")
    ours = {CONFIG, GENERATION, INDEX, *TOKENIZER_FILES}
    for path in folder.iterdir():
        weights = _SHARD.fullmatch(path.name) and (_open(path).metadata() or {}).get("producer") == PRODUCER["producer"]
        if path.name not in ours and not weights:
            raise ValueError(f"{folder} holds {path.name}, which is not from an earlier export; name a new folder")
    if any(folder.iterdir()) and not any(_SHARD.fullmatch(path.name) for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and not an earlier export; name a new folder")


def _shards(shapes: dict[str, tuple[int, ...]], itemsize: int, limit: int) -> list[list[str]]:
    """Names in order, cut where the next tensor would bring a file over `limit` bytes."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        rows, cols = matrix(shape)
        size += rows * cols * itemsize
        if shards[-1] and size > limit:
            shards.append([])
            size = rows * cols * itemsize
        shards[-1].append(name)
    return shards


def _write_weights(
    store: Store, shapes: dict[str, tuple[int, ...]], folder: Path, dtype: torch.dtype, limit: int
) -> None:
    shards = _shards(shapes, dtype.itemsize, limit)
    placed: dict[str, str] = {}
    total = 0
    for n, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{n:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _whole(store, name, shapes[name], dtype) for name in names}
        save_file(tensors, folder / file, metadata=PRODUCER)
        placed |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})


def _whole(store: Store, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    rows, cols = matrix(shape)
    tensor = torch.empty(rows, cols, dtype=dtype)
    store.read("weight", name, Rect(0, rows, 0, cols), tensor)
    return tensor.view(shape)


def _hf_config(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json in the keys that every version of transformers since 4.31 reads."""
    shape = {key: value for key, value in asdict(model).items() if key != "preset"}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_scaling": None,
        "torch_dtype": dtype,
        **shape,
    }


def _special_ids(tokenizer: Path | None, model: ModelConfig) -> dict[str, int | None]:
    """BOS and EOS for the configuration; without a tokenizer they are unknown, and null says so."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None}
    opened = load_tokenizer(tokenizer)
    if opened.vocab_size > model.vocab_size:
        raise ValueError(
            f"{tokenizer} has {opened.vocab_size} ids, but the model's vocab_size is {model.vocab_size}; "
            f"give the tokenizer that the model was trained with"
        )
    return {"bos_token_id": opened.bos, "eos_token_id": opened.eos}


def _write_tokenizer(source: Path, folder: Path) -> None:
    """Tokenizer files under the names that transformers looks for."""
    if source.name == "tokenizer.json":
        source = source.parent  # the files that name its special tokens lie beside it
    if source.is_dir():
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        return
    opened = load_tokenizer(source)
    if isinstance(opened, SentencePieceTokenizer):
        shutil.copyfile(source, folder / "tokenizer.model")
        # No BOS: pretraining puts an EOS after each document and nothing before it.
        settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": False, "add_eos_token": False}
        _write_json(folder / "tokenizer_config.json", settings)
        return
    content = _json(source)
    names = {}
    if content.get("format") == WRAPPED:
        names = {f"{kind}_token": content[kind] for kind in ("bos", "eos")}
        content = content["tokenizer"]
    _write_json(folder / "tokenizer.json", content)
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
