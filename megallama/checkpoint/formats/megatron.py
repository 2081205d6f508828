"""Megatron checkpoints: what lies where in them, and how they are written.

    latest_checkpointed_iteration.txt       the tracker: release, or a number N
    release/ or iter_N/mp_rank_TT[_PPP]/model_optim_rng.pt      tensor-parallel rank TT of pipeline rank PPP

Three dialects name and order the same matrices differently: megatron-core's, that of Megatron-LM before it, and that of
EPFL's Megatron-LLM. A dialect is a row of `DIALECTS`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from megallama.checkpoint.formats.pickled import PickledWriter
from megallama.checkpoint.formats.placement import (
    Composite,
    Layout,
    cut,
    heads,
    new_folder,
    stack,
    whole,
    write_layout,
)
from megallama.checkpoint.formats.source import Source
from megallama.checkpoint.formats.tokenizer_files import copy_along
from megallama.config import ModelConfig
from megallama.model.canonical import EMBEDDING, FINAL_NORM, HEAD, block_name, canonical_shapes

TRACKER, RELEASE = "latest_checkpointed_iteration.txt", "release"
WEIGHTS = ("model_optim_rng.pt", "model_rng.pt")
"""The file of a rank; the second where the optimizer's state is in files of its own."""

DIVISOR = 128
"""Megatron pads the vocabulary to a multiple of this and of the tensor-parallel ranks."""


class Dialect(NamedTuple):
    """Where a dialect keeps the tensors; "/" leads into a dictionary.

    Attributes:
        copied_head: key of the embedding's copy on the last pipeline rank of a tied model.
        up_first: the feed-forward's first matrix is [up; gate], not [gate; up].
        interleaved: rotary pairs of queries and keys are neighbours.
    """

    embedding: str
    layers: str
    final_norm: str
    head: str
    copied_head: str
    input_norm: str
    qkv: str
    out: str
    post_norm: str
    fc1: str
    fc2: str
    up_first: bool = False
    interleaved: bool = False


CORE = Dialect(
    embedding="embedding.word_embeddings.weight",
    layers="decoder.layers.",
    final_norm="decoder.final_layernorm.weight",
    head="output_layer.weight",
    copied_head="output_layer.weight",
    input_norm="self_attention.linear_qkv.layer_norm_weight",  # as Transformer Engine, Megatron's default, fuses it
    qkv="self_attention.linear_qkv.weight",
    out="self_attention.linear_proj.weight",
    post_norm="mlp.linear_fc1.layer_norm_weight",
    fc1="mlp.linear_fc1.weight",
    fc2="mlp.linear_fc2.weight",
)
LEGACY = Dialect(
    embedding="language_model/embedding/word_embeddings/weight",
    layers="language_model/encoder/layers.",
    final_norm="language_model/encoder/final_norm.weight",
    head="language_model/output_layer/weight",
    copied_head="word_embeddings_for_head/weight",
    input_norm="input_norm.weight",
    qkv="self_attention.query_key_value.weight",
    out="self_attention.dense.weight",
    post_norm="post_attention_norm.weight",
    fc1="mlp.dense_h_to_4h.weight",
    fc2="mlp.dense_4h_to_h.weight",
)
DIALECTS = {
    "core": CORE,
    "local": CORE._replace(input_norm="input_layernorm.weight", post_norm="pre_mlp_layernorm.weight"),
    "legacy": LEGACY,
    "epfl": LEGACY._replace(
        final_norm="language_model/encoder/final_layernorm.weight",
        head="language_model/lm_head",
        input_norm="input_layernorm.weight",
        post_norm="post_attention_layernorm.weight",
        up_first=True,
        interleaved=True,
    ),
}
"""Names of --megatron-order. local is core without Transformer Engine (--transformer-impl local)."""

ARGS: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size",),
    "intermediate_size": ("ffn_hidden_size",),
    "num_hidden_layers": ("num_layers", "encoder_num_layers"),
    "num_attention_heads": ("num_attention_heads",),
    "max_position_embeddings": ("max_position_embeddings",),
    "rms_norm_eps": ("norm_epsilon", "layernorm_epsilon"),
    "rope_theta": ("rotary_base", "rope_theta"),
    "initializer_range": ("init_method_std",),
}
"""Key of the model -> Megatron's settings that say it; the first that is there counts."""


def megatron_layout(model: ModelConfig, tp: int, stages: list[list[int]], dialect: Dialect, vocabulary: int) -> Layout:
    """What lies where in Megatron's files.

    Args:
        stages: for each pipeline rank, how many layers each of its chunks holds; chunk c of rank r is stage c * pp + r.
        vocabulary: rows of the embedding over all tensor-parallel ranks, padding included.
    """
    pp, vpp = len(stages), len(stages[0])
    files: dict[str, dict[str, Composite]] = {}
    first = 0
    for stage in range(pp * vpp):
        chunk, rank = divmod(stage, pp)
        layers = range(first, first + stages[rank][chunk])
        first = layers.stop
        prefix = "model" if vpp == 1 else f"model{chunk}"
        ends = stage == 0, stage == pp * vpp - 1
        for key, (composite, dim) in _stage(model, tp, layers, ends, dialect, vocabulary):
            for t in range(tp):
                files.setdefault(rank_folder(t, rank, pp), {})[f"{prefix}/{key}"] = cut(composite, dim, t, tp)
    return files


def rank_folder(tensor: int, pipeline: int, pp: int) -> str:
    """Where a rank's file lies."""
    return f"mp_rank_{tensor:02d}" + (f"_{pipeline:03d}" if pp > 1 else "")


Cut = tuple[Composite, int | None]
"""A tensor of all tensor-parallel ranks, and the dim along which they share it."""


def _stage(
    model: ModelConfig, tp: int, layers: range, ends: tuple[bool, bool], dialect: Dialect, vocabulary: int
) -> Iterator[tuple[str, Cut]]:
    """Key -> tensor of one stage; `ends`: whether it is the first, whether it is the last."""
    shapes, (first, last) = canonical_shapes(model), ends
    if first:
        yield dialect.embedding, (whole(EMBEDDING, shapes[EMBEDDING], vocabulary), 0)
    for local, layer in enumerate(layers):
        for key, tensor in _block(model, tp, layer, dialect, shapes).items():
            yield f"{dialect.layers}{local}.{key}", tensor
    if last:
        yield dialect.final_norm, (whole(FINAL_NORM, shapes[FINAL_NORM]), None)
        if not model.tie_word_embeddings:
            yield dialect.head, (whole(HEAD, shapes[HEAD], vocabulary), 0)
        elif not first:
            yield dialect.copied_head, (whole(EMBEDDING, shapes[EMBEDDING], vocabulary), 0)


def _block(
    model: ModelConfig, tp: int, layer: int, dialect: Dialect, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Cut]:
    """The tensors of one layer: a K/V group and its queries are one block of rows, a rank's gate and up another."""
    prefix, d, hd, turned = block_name(layer), model.hidden_size, model.head_dim, dialect.interleaved

    def matrix(name: str) -> Composite:
        return whole(f"{prefix}{name}.weight", shapes[f"{prefix}{name}.weight"])

    query, key, value = (f"{prefix}self_attn.{kind}_proj.weight" for kind in "qkv")
    group = model.num_attention_heads // model.num_key_value_heads
    qkv = stack(
        block
        for g in range(model.num_key_value_heads)
        for block in (
            heads(query, g * group, group, hd, d, turned),
            heads(key, g, 1, hd, d, turned),
            heads(value, g, 1, hd, d, False),
        )
    )
    pair = ["mlp.gate_proj", "mlp.up_proj"]
    fc1 = stack(
        cut(matrix(name), 0, t, tp) for t in range(tp) for name in (reversed(pair) if dialect.up_first else pair)
    )
    return {
        dialect.input_norm: (matrix("input_layernorm"), None),
        dialect.qkv: (qkv, 0),
        dialect.out: (matrix("self_attn.o_proj"), 1),
        dialect.post_norm: (matrix("post_attention_layernorm"), None),
        dialect.fc1: (fc1, 0),
        dialect.fc2: (matrix("mlp.down_proj"), 1),
    }


def write_megatron(
    source: Source,
    folder: Path,
    layout: tuple[int, int, int],
    order: str = "core",
    dtype: torch.dtype | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Write a Megatron release of weights, for --ckpt-format torch.

    Args:
        layout: tensor-parallel ranks, pipeline ranks, chunks of each.
        order: a key of DIALECTS.
        dtype: None = each tensor's own.
        tokenizer: its files go along.

    Raises:
        ValueError: the model cannot be laid out so, or the folder holds something.
    """
    model, (tp, pp, vpp) = source.model, layout
    _refuse_layout(model, layout, order)
    vocabulary = -(-model.vocab_size // (DIVISOR * tp)) * DIVISOR * tp
    each = model.num_hidden_layers // (pp * vpp)
    tables = megatron_layout(model, tp, [[each] * vpp] * pp, DIALECTS[order], vocabulary)
    args = _args(source, layout, order, vocabulary, dtype)
    content = {"args": args, "checkpoint_version": 3.0, "iteration": 0}
    with new_folder(folder) as work:
        for name in tables:
            (work / RELEASE / name).mkdir(parents=True)
        write_layout(
            source,
            tables,
            dtype,
            lambda name, specs: PickledWriter(work / RELEASE / name / WEIGHTS[0], specs, content),
        )
        copy_along(tokenizer, work)
        (work / TRACKER).write_text(RELEASE)


def _refuse_layout(model: ModelConfig, layout: tuple[int, int, int], order: str) -> None:
    tp, pp, vpp = layout
    if vpp > 1 and pp == 1:
        raise ValueError("--vpp needs --pp of at least 2: Megatron gives chunks to pipeline ranks only")
    if model.num_hidden_layers % (pp * vpp):
        raise ValueError(
            f"num_hidden_layers={model.num_hidden_layers} cannot be cut into --pp {pp} x --vpp {vpp} equal stages; "
            f"choose other numbers, such as 1"
        )
    for key in ("num_attention_heads", "intermediate_size"):
        if getattr(model, key) % tp:
            raise ValueError(f"{key}={getattr(model, key)} is not divisible by --tp {tp}; choose another --tp")
    groups = model.num_key_value_heads
    if groups % tp and (order in ("legacy", "epfl") or tp % groups):
        raise ValueError(
            f"num_key_value_heads={groups} cannot be cut over --tp {tp} by Megatron's {order} models; "
            f"choose a --tp that divides it"
        )


def _args(
    source: Source, layout: tuple[int, int, int], order: str, vocabulary: int, dtype: torch.dtype | None
) -> argparse.Namespace:
    """What Megatron takes from a checkpoint with --use-checkpoint-args, and we to read it again."""
    model, (tp, pp, vpp) = source.model, layout
    precision = dtype or source.dtypes[EMBEDDING]
    common = {
        **{names[0]: getattr(model, key) for key, names in ARGS.items()},
        "seq_length": model.max_position_embeddings,
        "kv_channels": model.head_dim,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp if vpp > 1 else None,
        "num_layers_per_virtual_pipeline_stage": model.num_hidden_layers // (pp * vpp) if vpp > 1 else None,
        "padded_vocab_size": vocabulary,
        "true_vocab_size": model.vocab_size,
        "make_vocab_size_divisible_by": DIVISOR,
        "params_dtype": precision,
        "bf16": precision == torch.bfloat16,
        "fp16": precision == torch.float16,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }
    if order == "epfl":
        return argparse.Namespace(
            **common,
            layernorm_epsilon=model.rms_norm_eps,
            rope_theta=model.rope_theta,
            rope_scaling_factor=1.0,
            num_attention_heads_kv=model.num_key_value_heads,
            glu_activation="swiglu",
            use_rms_norm=True,
            use_bias=False,
            tie_embed_logits=model.tie_word_embeddings,
            parallel_attn=False,
            parallel_layernorm=False,
            position_embedding_type="rotary",
        )
    return argparse.Namespace(
        **common,
        vocab_size=model.vocab_size,
        group_query_attention=model.num_key_value_heads != model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        swiglu=True,
        normalization="RMSNorm",
        add_bias_linear=False,
        add_qkv_bias=False,
        position_embedding_type="rope",
        rotary_percent=1.0,
        rotary_interleaved=False,
        untie_embeddings_and_output_weights=not model.tie_word_embeddings,
        transformer_impl="local" if order == "local" else "transformer_engine",
        use_legacy_models=order == "legacy",
    )
