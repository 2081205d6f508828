"""Megatron checkpoints against merges by hand, against megatron-core itself, and back again."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from weights import DTYPES, GQA, GROUPS, HEADS, HIDDEN, WIDTH, RandomSource, assert_same, block, interleave, load

from distributed import run_ranks
from megallama.checkpoint.formats import StoreSource, open_megatron, read_whole, write_megatron, write_store
from megallama.model.canonical import EMBEDDING, FINAL_NORM, HEAD
from megallama.train.prove import our_logits


def padded(tensor: Tensor, rows: int) -> Tensor:
    return torch.cat((tensor, torch.zeros(rows - len(tensor), HIDDEN, dtype=tensor.dtype)))


def fused_qkv(b: dict[str, Tensor], interleaved: bool) -> Tensor:
    """For each K/V group the rows of its two queries, its key, its value."""
    q, k = (
        (interleave(b["q_proj"], HEADS), interleave(b["k_proj"], GROUPS)) if interleaved else (b["q_proj"], b["k_proj"])
    )
    q, k, v = q.view(GROUPS, 2 * WIDTH, HIDDEN), k.view(GROUPS, WIDTH, HIDDEN), b["v_proj"].view(GROUPS, WIDTH, HIDDEN)
    return torch.cat((q, k, v), 1).reshape(-1, HIDDEN)


def megatron_file(
    source: RandomSource, rank: tuple[int, int], layout: tuple[int, int], order: str
) -> dict[str, Tensor]:
    """The weights of one rank by hand; keys are the paths through the dictionaries, joined by "/"."""
    (t, p), (tp, pp) = rank, layout
    legacy, epfl = order in ("legacy", "epfl"), order == "epfl"
    rows = -(-source.model.vocab_size // (128 * tp)) * 128 * tp
    norm = "layernorm" if epfl or not legacy else "norm"
    tensors: dict[str, Tensor] = {}
    if p == 0:
        key = "language_model/embedding/word_embeddings/weight" if legacy else "embedding.word_embeddings.weight"
        tensors[key] = padded(source.tensors[EMBEDDING], rows).chunk(tp)[t]
    each = source.model.num_hidden_layers // pp
    for local in range(each):
        b = block(source, p * each + local)
        gate, up = b["gate_proj"].chunk(tp)[t], b["up_proj"].chunk(tp)[t]
        names = (
            (f"input_{norm}", f"post_attention_{norm}", "self_attention.query_key_value", "self_attention.dense")
            if legacy
            else ("self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_")
            + tuple(f"self_attention.linear_{kind}" for kind in ("qkv", "proj"))
        )
        up_name, down_name = ("dense_h_to_4h", "dense_4h_to_h") if legacy else ("linear_fc1", "linear_fc2")
        prefix = f"language_model/encoder/layers.{local}." if legacy else f"decoder.layers.{local}."
        values = (
            (names[0], b["input_layernorm"]),
            (names[1], b["post_attention_layernorm"]),
            (names[2], fused_qkv(b, epfl).chunk(tp)[t]),
            (names[3], b["o_proj"].chunk(tp, 1)[t]),
            (f"mlp.{up_name}", torch.cat((up, gate) if epfl else (gate, up))),
            (f"mlp.{down_name}", b["down_proj"].chunk(tp, 1)[t]),
        )
        tensors |= {prefix + (f"{n}weight" if n.endswith("_") else f"{n}.weight"): value for n, value in values}
    if p == pp - 1:
        tensors[f"language_model/encoder/final_{norm}.weight" if legacy else "decoder.final_layernorm.weight"] = (
            source.tensors[FINAL_NORM]
        )
        head = (
            "language_model/lm_head"
            if epfl
            else "language_model/output_layer/weight"
            if legacy
            else "output_layer.weight"
        )
        if source.model.tie_word_embeddings:
            head = "word_embeddings_for_head/weight" if legacy else head
        if not source.model.tie_word_embeddings or pp > 1:
            tensors[head] = padded(source.tensors.get(HEAD, source.tensors[EMBEDDING]), rows).chunk(tp)[t]
    return tensors


def flat(content: Any, path: str = "") -> dict[str, Tensor]:
    if isinstance(content, Tensor):
        return {path: content}
    return {k: t for key, inner in content.items() for k, t in flat(inner, f"{path}/{key}" if path else key).items()}


class TestMegatron:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
    @pytest.mark.parametrize("order", ["core", "legacy", "epfl"])
    @pytest.mark.parametrize("vocabulary", [37, 300])
    def test_writes_the_described_files(
        self, tmp_path: Path, order: str, tied: bool, dtype: torch.dtype, vocabulary: int
    ) -> None:
        """megatron -> megallama -> megatron on tp 2 x pp 2: every tensor of every rank, padding included."""
        given = RandomSource(replace(GQA, tie_word_embeddings=tied, vocab_size=vocabulary), dtype)
        write_megatron(given, tmp_path / "in", (2, 2, 1), order)
        source = open_megatron(tmp_path / "in", order == "epfl", note=pytest.fail)
        assert source.model == given.model
        assert_same(source, given.tensors)
        write_store(source, tmp_path / "store", (3, 2))
        write_megatron(StoreSource(tmp_path / "store"), tmp_path / "out", (2, 2, 1), order)
        assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "release"
        for t in range(2):
            for p in range(2):
                path = f"release/mp_rank_{t:02d}_{p:03d}/model_optim_rng.pt"
                assert (tmp_path / "out" / path).read_bytes() == (tmp_path / "in" / path).read_bytes()
                written, expected = load(tmp_path / "out" / path), megatron_file(given, (t, p), (2, 2), order)
                found = flat(written["model"])
                assert found.keys() == expected.keys()
                for key, tensor in expected.items():
                    assert found[key].dtype == dtype and torch.equal(found[key], tensor), key
                assert written["checkpoint_version"] == 3.0 and written["iteration"] == 0

    @pytest.mark.parametrize("layout", [(1, 1, 1), (4, 1, 1), (1, 4, 1), (8, 2, 1), (2, 2, 2), (1, 2, 2)])
    @pytest.mark.parametrize("order", ["core", "local", "legacy", "epfl"])
    def test_any_layout_comes_back(self, tmp_path: Path, layout: tuple[int, int, int], order: str) -> None:
        given = RandomSource(replace(GQA, vocab_size=37))
        write_megatron(given, tmp_path / "out", layout, order)
        source = open_megatron(tmp_path / "out", order == "epfl", note=pytest.fail)
        assert source.model == given.model
        assert_same(source, given.tensors)

    def test_chunks_of_a_pipeline_rank(self, tmp_path: Path) -> None:
        """Chunk c of rank r is stage c * pp + r, in model0 and model1 of a file."""
        given = RandomSource(GQA)
        write_megatron(given, tmp_path / "out", (1, 2, 2))
        for rank in range(2):
            content = load(tmp_path / "out" / "release" / f"mp_rank_00_{rank:03d}" / "model_optim_rng.pt")
            for chunk in range(2):
                found = content[f"model{chunk}"]["decoder.layers.0.mlp.linear_fc2.weight"]
                assert torch.equal(found, block(given, chunk * 2 + rank)["down_proj"])
        assert content["args"].virtual_pipeline_model_parallel_size == 2

    def test_more_ranks_than_groups(self, tmp_path: Path) -> None:
        """Core cuts the fused rows straight through the groups; models before it cannot."""
        given = RandomSource(replace(GQA, num_key_value_heads=2))
        write_megatron(given, tmp_path / "out", (8, 1, 1))
        assert_same(open_megatron(tmp_path / "out"), given.tensors)
        key = "decoder.layers.0.self_attention.linear_qkv.weight"
        files = [tmp_path / "out" / "release" / f"mp_rank_{t:02d}" / "model_optim_rng.pt" for t in range(8)]
        rows = torch.cat([load(file)["model"][key] for file in files])
        b = block(given, 0)
        groups = [
            (b["q_proj"][g * 32 : g * 32 + 32], *(b[k][g * 4 : g * 4 + 4] for k in ("k_proj", "v_proj")))
            for g in range(2)
        ]
        assert torch.equal(rows, torch.cat([part for group in groups for part in group]))
        with pytest.raises(ValueError, match="num_key_value_heads=2 cannot be cut over --tp 8 by Megatron's legacy"):
            write_megatron(given, tmp_path / "other", (8, 1, 1), "legacy")

    def test_args(self, tmp_path: Path) -> None:
        """What --use-checkpoint-args takes over."""
        write_megatron(RandomSource(GQA, torch.bfloat16), tmp_path / "out", (2, 1, 1))
        args = load(tmp_path / "out" / "release" / "mp_rank_01" / "model_optim_rng.pt")["args"]
        assert vars(args).items() >= {
            "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 48, "num_attention_heads": 16, "num_query_groups": 8,
            "group_query_attention": True, "padded_vocab_size": 256, "vocab_size": 40, "norm_epsilon": 1e-4,
            "make_vocab_size_divisible_by": 128, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1,
            "rotary_base": 123.0, "swiglu": True, "normalization": "RMSNorm", "position_embedding_type": "rope",
            "untie_embeddings_and_output_weights": True, "params_dtype": torch.bfloat16, "bf16": True, "seq_length": 96,
        }.items()  # fmt: skip


def release(folder: Path, source: RandomSource, args: dict[str, Any], order: str = "core") -> Path:
    """A checkpoint of one rank, by torch.save."""
    content: dict[str, Any] = {}
    for key, tensor in megatron_file(source, (0, 0), (1, 1), order).items():
        *above, last = key.split("/")
        inner = content
        for name in above:
            inner = inner.setdefault(name, {})
        inner[last] = tensor
    return save(folder, content, args)


def save(folder: Path, model: dict[str, Any], args: dict[str, Any] | None) -> Path:
    path = folder / "iter_0000012" / "mp_rank_00" / "model_optim_rng.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}}
    settings = {"args": argparse.Namespace(**args)} if args is not None else {}
    torch.save({"model": model, **settings, "iteration": 12, "optimizer": optimizer}, path)
    (folder / "latest_checkpointed_iteration.txt").write_text("12\n")
    return folder


ARGS: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 48,
    "num_attention_heads": 16,
    "group_query_attention": True,
    "num_query_groups": 8,
    "norm_epsilon": 1e-4,
    "rotary_base": 123,
    "max_position_embeddings": 96,
    "untie_embeddings_and_output_weights": True,
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "num_experts": None,
}
EPFL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 48,
    "num_attention_heads": 16,
    "num_attention_heads_kv": 8,
    "layernorm_epsilon": 1e-4,
    "rope_theta": 123.0,
    "max_position_embeddings": 96,
    "tie_embed_logits": False,
    "glu_activation": "swiglu",
    "use_rms_norm": True,
    "position_embedding_type": "rotary",
}


class TestForeignMegatron:
    """Checkpoints that others wrote: other spellings, no word of the true vocabulary, other models."""

    def test_the_true_vocabulary(self, tmp_path: Path) -> None:
        given, notes = RandomSource(GQA), []
        folder = release(tmp_path, given, ARGS)
        source = open_megatron(folder, note=notes.append)
        assert source.model == replace(GQA, vocab_size=128)
        assert len(notes) == 1 and "does not say its true vocabulary size; all 128 rows are kept" in notes[0]
        assert torch.equal(read_whole(source, HEAD), padded(given.tensors[HEAD], 128))
        assert_same(open_megatron(folder, vocab_size=40, note=pytest.fail), given.tensors)
        with pytest.raises(ValueError, match="vocabulary size 129, but the embedding has 128 rows"):
            open_megatron(folder, vocab_size=129)
        release(tmp_path, given, {**ARGS, "vocab_size": 40, "tokenizer_type": "Llama2Tokenizer"})
        assert open_megatron(folder, note=pytest.fail).model == GQA
        release(tmp_path, given, {**ARGS, "vocab_size": 39, "tokenizer_type": "NullTokenizer"})
        assert open_megatron(folder, note=notes.append).model.vocab_size == 128 and len(notes) == 2

    def test_spellings(self, tmp_path: Path) -> None:
        """Norms as modules of their own, and Transformer Engine's extra states beside the weights."""
        given = RandomSource(GQA)
        tensors: dict[str, Any] = {
            key.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.").replace(
                "mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."
            ): tensor
            for key, tensor in megatron_file(given, (0, 0), (1, 1), "core").items()
        }
        assert "decoder.layers.3.pre_mlp_layernorm.weight" in tensors
        tensors["decoder.layers.0.mlp.linear_fc1._extra_state"] = None
        tensors["decoder.layers.0.self_attention.core_attention._extra_state"] = torch.zeros(5, dtype=torch.uint8)
        assert_same(open_megatron(save(tmp_path, tensors, {**ARGS, "vocab_size": 40})), given.tensors)

    def test_epfl_as_its_converter_writes_it(self, tmp_path: Path) -> None:
        """transformer instead of encoder, attention instead of self_attention, the embedding one level higher."""
        given = RandomSource(GQA)
        hand = megatron_file(given, (0, 0), (1, 1), "epfl")
        encoder = {
            key.removeprefix("language_model/encoder/").replace(".self_attention.", ".attention."): tensor
            for key, tensor in hand.items()
            if key.startswith("language_model/encoder/")
        }
        model = {
            "language_model": {
                "embedding": {"word_embeddings.weight": hand["language_model/embedding/word_embeddings/weight"]},
                "transformer": encoder,
                "lm_head": hand["language_model/lm_head"],
            }
        }
        folder = save(tmp_path, model, EPFL)
        assert_same(open_megatron(folder, True, 40), given.tensors)
        with pytest.raises(ValueError, match=r"is of EPFL's Megatron-LLM.*use --from epfl"):
            open_megatron(folder)
        save(tmp_path, model, {**EPFL, "rope_scaling_factor": 2.0})
        with pytest.raises(ValueError, match=r"rope_scaling_factor is 2\.0"):
            open_megatron(folder, True)

    def test_old_megatron_lm(self, tmp_path: Path) -> None:
        given = RandomSource(GQA)
        folder = release(tmp_path, given, {**ARGS, "vocab_size": 40}, "legacy")
        assert_same(open_megatron(folder), given.tensors)
        with pytest.raises(ValueError, match=r"is not of EPFL's Megatron-LLM; use --from megatron"):
            open_megatron(folder, True)

    def test_interleaved_core(self, tmp_path: Path) -> None:
        """--rotary-interleaved."""
        given = RandomSource(GQA)
        tensors = megatron_file(given, (0, 0), (1, 1), "core")
        for layer in range(4):
            tensors[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"] = fused_qkv(block(given, layer), True)
        folder = save(tmp_path, tensors, {**ARGS, "vocab_size": 40, "rotary_interleaved": True})
        assert_same(open_megatron(folder), given.tensors)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_layers": 5}, r"args say 5 layers, but 1 pipeline ranks hold \[\[4\]\]"),
            ({"num_layers": 10**9}, r"makes 1000000000 layers, but there are only 27 tensors"),
            ({"hidden_size": None}, r"args\.hidden_size missing"),
            ({"hidden_size": 128}, r"shape \(128, 64\), but args with 1 tensor-parallel ranks makes it \(128, 128\)"),
            ({"num_query_groups": 4}, r"linear_qkv\.weight has shape \(128, 64\).*\(96, 64\)"),
            ({"num_query_groups": 5}, r"args\.num_query_groups=5 must divide args\.num_attention_heads"),
            ({"ffn_hidden_size": 50}, r"linear_fc1\.weight has shape \(96, 64\).*\(100, 64\)"),
            ({"norm_epsilon": "small"}, r"args\.norm_epsilon is 'small'; it must be of type float"),
            ({"normalization": "LayerNorm"}, r"args\.normalization is 'LayerNorm'; only a plain Llama"),
            ({"swiglu": False}, r"args\.swiglu is False"),
            ({"num_experts": 8}, r"args\.num_experts is 8"),
            ({"kv_channels": 8}, r"args\.kv_channels is 8; only 4"),
            ({"untie_embeddings_and_output_weights": False}, r"output_layer\.weight is not part of the Llama"),
        ],
    )
    def test_wrong_args(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        folder = release(tmp_path, RandomSource(GQA), {**ARGS, "vocab_size": 40, **changes})
        with pytest.raises(ValueError, match=message):
            open_megatron(folder)

    def test_wrong_tensors(self, tmp_path: Path) -> None:
        tensors = megatron_file(RandomSource(GQA), (0, 0), (1, 1), "core")
        key = "decoder.layers.2.mlp.linear_fc2.weight"
        for change, message in (
            ({key: None}, rf"model_optim_rng\.pt: tensor model/{re.escape(key)} is missing"),
            ({key.replace("weight", "bias"): torch.ones(64)}, r"tensor model/\S+fc2\.bias is not part of the Llama"),
            ({key: torch.ones(64, 40)}, rf"model/{re.escape(key)} has shape \(64, 40\).*\(64, 48\)"),
        ):
            changed = {k: t for k, t in {**tensors, **change}.items() if t is not None}
            with pytest.raises(ValueError, match=message):
                open_megatron(save(tmp_path, changed, ARGS), note=lambda _: None)
        with pytest.raises(ValueError, match="has no args"):
            open_megatron(save(tmp_path, dict(tensors), None))

    def test_shards_of_unlike_precision(self, tmp_path: Path) -> None:
        """A tensor is what holds all its shards exactly, whichever comes first."""
        given = RandomSource(GQA, torch.float32)
        for t in range(2):  # the fp32 one comes second, then first
            write_megatron(given, tmp_path / f"{t}", (2, 1, 1))
            write_megatron(RandomSource(GQA, torch.bfloat16), tmp_path / f"{t}_low", (2, 1, 1))
            path = Path("release") / f"mp_rank_{t:02d}" / "model_optim_rng.pt"
            (tmp_path / f"{t}_low" / path).rename(tmp_path / f"{t}" / path)
            source = open_megatron(tmp_path / f"{t}")
            name = "model.layers.1.self_attn.o_proj.weight"
            assert source.dtypes[name] == torch.float32
            low, high = slice(t * 32, t * 32 + 32), slice(32 - t * 32, 64 - t * 32)
            found = read_whole(source, name)
            assert torch.equal(found[:, high], given.tensors[name][:, high])
            assert torch.equal(found[:, low], given.tensors[name][:, low].bfloat16().float())

    @pytest.mark.parametrize("tied", [False, True])
    def test_copies_that_differ(self, tmp_path: Path, tied: bool) -> None:
        """The norms of tensor-parallel ranks, and the embedding on the first and the last pipeline rank."""
        given = RandomSource(replace(GQA, tie_word_embeddings=tied))
        write_megatron(given, tmp_path / "out", (2, 2, 1))
        rank = "mp_rank_00_001" if tied else "mp_rank_01_001"
        path = tmp_path / "out" / "release" / rank / "model_optim_rng.pt"
        content = load(path)
        key, name = ("output_layer.weight", EMBEDDING) if tied else ("decoder.final_layernorm.weight", FINAL_NORM)
        content["model"][key].view(-1)[3] += 1
        torch.save(content, path)
        source = open_megatron(tmp_path / "out")
        with pytest.raises(
            ValueError, match=rf"{re.escape(name)} has copies .* model/{re.escape(key)} in {path}; where"
        ):
            read_whole(source, name)
        assert torch.equal(read_whole(source, "model.layers.3.mlp.down_proj.weight"), block(given, 3)["down_proj"])

    def test_missing_ranks(self, tmp_path: Path) -> None:
        write_megatron(RandomSource(GQA), tmp_path / "out", (2, 2, 1))
        inner = tmp_path / "out" / "release"
        assert open_megatron(inner).model == GQA
        (inner / "mp_rank_01_000" / "model_optim_rng.pt").unlink()
        with pytest.raises(ValueError, match=r"mp_rank_01_000/model_optim_rng\.pt is missing"):
            open_megatron(tmp_path / "out")
        (inner / "mp_rank_01_000").rmdir()
        with pytest.raises(ValueError, match=r"mp_rank_01_000 is missing; the others make tp=2 and pp=2"):
            open_megatron(tmp_path / "out")
        for text, message in (
            ("latest", "neither an iteration nor release"),
            ("7", "iter_0000007 holds no mp_rank_00"),
        ):
            (tmp_path / "out" / "latest_checkpointed_iteration.txt").write_text(text)
            with pytest.raises(ValueError, match=message):
                open_megatron(tmp_path / "out")
        with pytest.raises(ValueError, match="it is not a Megatron checkpoint"):
            open_megatron(tmp_path)

    def test_layouts_that_do_not_fit(self, tmp_path: Path) -> None:
        for layout, message in (
            ((1, 3, 1), "num_hidden_layers=4 cannot be cut into --pp 3 x --vpp 1 equal stages"),
            ((1, 1, 2), "--vpp needs --pp of at least 2"),
            ((3, 1, 1), "num_attention_heads=16 is not divisible by --tp 3"),
        ):
            with pytest.raises(ValueError, match=message):
                write_megatron(RandomSource(GQA), tmp_path / "out", layout)
        assert not list(tmp_path.iterdir())


def core_model(args: argparse.Namespace, tp: int) -> torch.nn.Module:
    """megatron-core's own model of a checkpoint's args, on the CPU."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import initialize_rng_tracker
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]  # it asks where to put a buffer
    parallel_state.initialize_model_parallel(tp, 1)
    initialize_rng_tracker(inference_rng_tracker=True)
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        layernorm_epsilon=args.norm_epsilon,
        normalization=args.normalization,
        gated_linear_unit=args.swiglu,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=args.add_bias_linear,
        tensor_model_parallel_size=tp,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        perform_initialization=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=args.normalization),
        args.padded_vocab_size,
        args.max_position_embeddings,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        parallel_output=False,
    )


@torch.no_grad()
def core_logits(rank: int, world: int, tp: int, folder: Path, tokens: Tensor, saved: Path) -> Tensor:
    """Logits of megatron-core's model from our file, nothing missing or left over; saves its own state as Megatron."""
    path = Path("release") / f"mp_rank_{rank % tp:02d}" / "model_optim_rng.pt"
    content = load(folder / path)
    model = core_model(content["args"], tp).eval()
    model.load_state_dict(content["model"], strict=True)
    if rank < tp:
        (saved / path).parent.mkdir(parents=True)
        torch.save({"model": model.state_dict(), "args": content["args"], "iteration": 5}, saved / path)
    size = len(tokens)
    mask = torch.ones(1, 1, size, size, dtype=torch.bool).triu(1)
    return model(tokens[None], torch.arange(size)[None], mask)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "groups"), [(1, 8), (2, 8), (2, 1)], ids=["tp1", "tp2", "tp2 of one group"])
def test_megatron_core_computes_the_same(tmp_path: Path, tp: int, groups: int) -> None:
    """Its model takes our files strictly, gives our logits, and its own state comes back as the weights we gave."""
    if find_spec("megatron") is None:
        pytest.skip("needs pip install megallama[bench]")
    given = RandomSource(replace(GQA, num_key_value_heads=groups))
    write_megatron(given, tmp_path / "out", (tp, 1, 1), "local")
    tokens = torch.arange(30) % 40
    ours = our_logits(given, tokens)
    for answer in run_ranks(2, core_logits, tp, tmp_path / "out", tokens, tmp_path / "theirs"):
        torch.testing.assert_close(answer[:, :40], ours, rtol=1e-5, atol=1e-5)
        assert not answer[:, 40:].any()
    (tmp_path / "theirs" / "latest_checkpointed_iteration.txt").write_text("release")
    assert_same(open_megatron(tmp_path / "theirs"), given.tensors)
