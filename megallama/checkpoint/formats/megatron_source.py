"""Megatron checkpoints of any dialect and layout, read as a source; `megatron` has the tables."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from megallama.checkpoint.formats.megatron import (
    ARGS,
    DIALECTS,
    RELEASE,
    TRACKER,
    WEIGHTS,
    Dialect,
    megatron_layout,
    rank_folder,
)
from megallama.checkpoint.formats.pickled import Inert, PickledFile
from megallama.checkpoint.formats.placement import PlacedSource, refuse_unknown
from megallama.checkpoint.formats.source import checked_model, refuse_layers
from megallama.config import ModelConfig

SPELLINGS = (
    (re.compile("/"), "."),
    (re.compile(r"^language_model\.transformer\."), "language_model.encoder."),
    (re.compile(r"\.attention\."), ".self_attention."),
    (re.compile(r"\bself_attention\.linear_qkv\.layer_norm_weight$"), "input_norm.weight"),
    (re.compile(r"\bmlp\.linear_fc1\.layer_norm_weight$"), "post_attention_norm.weight"),
    (re.compile(r"\bpre_mlp_layernorm\."), "post_attention_norm."),
    (re.compile(r"\b(input|post_attention|final)_layernorm\."), r"\1_norm."),
)
"""What years of Megatron spelled differently, made one in this order; only for looking keys up."""

REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")
ACCEPTED: dict[str, tuple[Any, ...]] = {
    "swiglu": (True,),
    "glu_activation": ("swiglu",),
    "normalization": ("RMSNorm",),
    "use_rms_norm": (True,),
    "position_embedding_type": ("rope", "rotary"),
    "rotary_percent": (1.0,),
    "use_rope_scaling": (False,),
    "rotary_seq_len_interpolation_factor": (1,),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "use_post_ln": (False,),
    "parallel_attn": (False,),
    "num_experts": (0,),
    "window_size": (),
    "sliding_window_size": (),
}
"""Values of Megatron's settings with which the model is a plain Llama; a missing one or None is fine."""

_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_LAYER = re.compile(r"\blayers\.(\d+)\.")
_MODEL = re.compile(r"model\d*")
_UNUSED = re.compile(r".*(_extra_state|rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|core_attention\..*)")


def open_megatron(
    folder: Path, epfl: bool = False, vocab_size: int | None = None, note: Callable[[str], None] = print
) -> PlacedSource:
    """A Megatron checkpoint as a source, in whatever dialect it is.

    Args:
        folder: with the tracker, or one of its iterations.
        epfl: of EPFL's Megatron-LLM, whose rows are in another order.
        vocab_size: the true one, where the checkpoint does not say it.
        note: told what the checkpoint does not say.

    Raises:
        ValueError: a rank's file is missing or damaged, a setting is missing or not a plain Llama's, or a tensor is
            missing, unknown, of another shape or of a dtype that holds no plain numbers.
    """
    folder = _iteration(Path(folder))
    files, pp = _open_files(folder)
    tp = len(files) // pp
    first = next(iter(files.values()))
    settings = _settings(first)
    stages = _stages([files[rank_folder(0, rank, pp)] for rank in range(pp)])
    found = {name: _found(file) for name, file in files.items()}
    dialect = _dialect(first.path, settings, {key for keys in found.values() for key in keys}, epfl)
    model, vocabulary = _model(first, settings, sum(map(len, found.values())), tp)
    if model.num_hidden_layers != sum(map(sum, stages)):
        raise ValueError(
            f"{folder}: args say {model.num_hidden_layers} layers, but {pp} pipeline ranks hold {stages} of them"
        )
    model = replace(model, vocab_size=_vocabulary(first.path, settings, vocabulary, vocab_size, note))
    layout = {
        name: {found[name].get(_spelled(key), key): composite for key, composite in tensors.items()}
        for name, tensors in megatron_layout(model, tp, stages, dialect, vocabulary).items()
    }
    for name, file in files.items():
        refuse_unknown(file, found[name].values(), layout[name], "args")
    return PlacedSource(folder, model, layout, files, f"args with {tp} tensor-parallel ranks")


def _iteration(folder: Path) -> Path:
    """The folder of ranks that a tracker names, or `folder` itself."""
    tracker = folder / TRACKER
    if not tracker.is_file():
        if any(_RANK.fullmatch(path.name) for path in folder.glob("*")):
            return folder
        raise ValueError(f"{folder} holds neither {TRACKER} nor mp_rank_00; it is not a Megatron checkpoint")
    said = tracker.read_text(errors="replace").strip()
    if said != RELEASE and not (said.isdecimal() and len(said) < 10):
        raise ValueError(f"{tracker}: {said[:40]!r} is neither an iteration nor {RELEASE}")
    return folder / (RELEASE if said == RELEASE else f"iter_{int(said):07d}")


def _open_files(folder: Path) -> tuple[dict[str, PickledFile], int]:
    """Layout's name of a rank -> its file, tensor-parallel ranks of a pipeline rank after another; and pp."""
    paths: dict[tuple[int, int], Path] = {}
    for path in sorted(folder.glob("mp_rank_*")):
        if not (rank := _RANK.fullmatch(path.name)):
            raise ValueError(f"{path}: expert-parallel checkpoints are of no plain Llama")
        paths[int(rank[1]), int(rank[2] or 0)] = path
    if not paths:
        raise ValueError(f"{folder} holds no mp_rank_00; only checkpoints of --ckpt-format torch can be read")
    tp, pp = (max(place[n] for place in paths) + 1 for n in range(2))
    files = {}
    for p, t in product(range(pp), range(tp)):
        if (t, p) not in paths:
            raise ValueError(f"{folder}: {rank_folder(t, p, pp)} is missing; the others make tp={tp} and pp={pp}")
        names = [paths[t, p] / name for name in WEIGHTS]
        files[rank_folder(t, p, pp)] = PickledFile(next((path for path in names if path.is_file()), names[0]))
    return files, pp


def _settings(file: PickledFile) -> dict[str, Any]:
    """Megatron's args without those that are not set."""
    args = file.content.get("args") if isinstance(file.content, dict) else None
    if not isinstance(args, argparse.Namespace):
        raise ValueError(f"{file.path} has no args, which say what the model is")
    settings = {key: value for key, value in vars(args).items() if value is not None and not isinstance(value, Inert)}
    for key, accepted in ACCEPTED.items():
        if key in settings and settings[key] not in accepted:
            raise ValueError(f"{file.path}: args.{key} is {settings[key]!r}; only a plain Llama can be read")
    return settings


def _stages(files: list[PickledFile]) -> list[list[int]]:
    """Layers in each chunk of each pipeline rank, as the first tensor-parallel rank holds them."""
    stages = []
    for file in files:
        chunks = sorted(key for key in file.content if isinstance(key, str) and _MODEL.fullmatch(key))
        if chunks not in (["model"], [f"model{n}" for n in range(len(chunks))]) or not chunks:
            raise ValueError(
                f"{file.path} has {', '.join(chunks) or 'no model'}; model, or model0, model1 … are expected"
            )
        numbers: list[set[str]] = [set() for _ in chunks]
        for key in file.specs:
            chunk, _, inner = key.partition("/")
            if chunk in chunks and (layer := _LAYER.search(inner)):
                numbers[chunks.index(chunk)].add(layer[1])
        stages.append([len(held) for held in numbers])
    if len({len(chunks) for chunks in stages}) > 1:
        raise ValueError(f"{files[0].path}: pipeline ranks have different numbers of chunks: {stages}")
    return stages


def _spelled(key: str) -> str:
    """A key in the one spelling in which keys are compared; its chunk stays."""
    chunk, _, inner = key.partition("/")
    for pattern, ours in SPELLINGS:
        inner = pattern.sub(ours, inner)
    return f"{chunk}/{inner}"


def _found(file: PickledFile) -> dict[str, str]:
    """The model's tensors in a file: key in the one spelling -> its own."""
    weights = (key for key in file.specs if _MODEL.fullmatch(key.partition("/")[0]) and not _UNUSED.fullmatch(key))
    return {_spelled(key): key for key in weights}


def _dialect(path: Path, settings: Mapping[str, Any], keys: set[str], epfl: bool) -> Dialect:
    """How the rows lie. Shapes do not tell EPFL's from Megatron-LM's, so the user's word must fit what is there."""
    legacy = any("/language_model." in key for key in keys)
    theirs = "glu_activation" in settings or any(key.endswith("language_model.lm_head") for key in keys)
    if epfl and not (legacy and theirs):
        raise ValueError(f"{path} is not of EPFL's Megatron-LLM; use --from megatron")
    if legacy and theirs and not epfl:
        raise ValueError(f"{path} is of EPFL's Megatron-LLM, whose rows are in another order; use --from epfl")
    if epfl and settings.get("rope_scaling_factor", 1) != 1:
        raise ValueError(f"{path}: args.rope_scaling_factor is {settings['rope_scaling_factor']!r}; only 1 can be read")
    dialect = DIALECTS["epfl" if epfl else "legacy" if legacy else "core"]
    return dialect._replace(interleaved=True) if settings.get("rotary_interleaved") else dialect


def _model(file: PickledFile, settings: Mapping[str, Any], tensors: int, tp: int) -> tuple[ModelConfig, int]:
    """The model, its vocabulary padded, and that number of rows."""
    given = {key: settings[name] for key, names in ARGS.items() for name in names[::-1] if name in settings}
    if missing := [ARGS[key][0] for key in REQUIRED if key not in given]:
        raise ValueError(f"{file.path}: args.{', args.'.join(missing)} missing")
    groups = settings.get("num_query_groups") if settings.get("group_query_attention", True) else None
    given["num_key_value_heads"] = settings.get("num_attention_heads_kv", groups) or given["num_attention_heads"]
    tied = settings.get("tie_embed_logits", not settings.get("untie_embeddings_and_output_weights", False))
    given["tie_word_embeddings"] = bool(tied)
    embeddings = [spec.shape for key, spec in file.specs.items() if _spelled(key).endswith("word_embeddings.weight")]
    if not embeddings:
        raise ValueError(f"{file.path}: tensor word_embeddings.weight is missing")
    vocabulary = embeddings[0][0] * tp
    names = {key: f"args.{next((n for n in said if n in settings), said[0])}" for key, said in ARGS.items()}
    names["num_key_value_heads"] = "args.num_query_groups"
    model = checked_model(file.path, {**given, "vocab_size": vocabulary}, names)
    refuse_layers(file.path, model, tensors)
    if settings.get("kv_channels", model.head_dim) != model.head_dim:
        raise ValueError(
            f"{file.path}: args.kv_channels is {settings['kv_channels']}; only {model.head_dim} can be read"
        )
    return model, vocabulary


def _vocabulary(
    path: Path, settings: Mapping[str, Any], padded: int, given: int | None, note: Callable[[str], None]
) -> int:
    """The true vocabulary size: ours or Megatron's word for it, or the user's."""
    # A NullTokenizer's vocab_size lacks its end-of-document token.
    megatrons = settings.get("vocab_size") if settings.get("tokenizer_type") != "NullTokenizer" else None
    size = next((n for n in (given, settings.get("true_vocab_size"), megatrons) if n is not None), None)
    if size is None:
        note(
            f"{path} does not say its true vocabulary size; all {padded} rows are kept (--vocab-size cuts the padding)"
        )
        return padded
    if type(size) is not int or not 0 < size <= padded:
        raise ValueError(f"{path}: vocabulary size {size!r}, but the embedding has {padded} rows; give --vocab-size")
    return size
