"""Meta's folders against files written by hand from their description, and back again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from weights import DTYPES, GQA, GROUPS, HEADS, WIDTH, RandomSource, assert_same, block, interleave, load

from megallama.checkpoint.formats import StoreSource, open_meta, read_whole, write_meta, write_store
from megallama.checkpoint.formats.meta import ffn_params, ffn_size, published_shards
from megallama.config import ModelConfig
from megallama.model.canonical import EMBEDDING, FINAL_NORM, HEAD
from megallama.presets import PRESETS
from megallama.train.prove import our_logits

TIED = replace(GQA, tie_word_embeddings=True)


def meta_file(source: RandomSource, n: int, shards: int, embed_dim: int = 1) -> dict[str, Tensor]:
    """consolidated.n.pth by the table of names and dims."""

    def part(tensor: Tensor, dim: int) -> Tensor:
        return tensor.chunk(shards, dim)[n].contiguous()

    head = source.tensors.get(HEAD, source.tensors[EMBEDDING])
    tensors = {
        "tok_embeddings.weight": part(source.tensors[EMBEDDING], embed_dim),
        "norm.weight": source.tensors[FINAL_NORM],
        "output.weight": part(head, 0),
    }
    for layer in range(source.model.num_hidden_layers):
        b = block(source, layer)
        matrices = {
            "attention.wq": part(interleave(b["q_proj"], HEADS), 0),
            "attention.wk": part(interleave(b["k_proj"], GROUPS), 0),
            "attention.wv": part(b["v_proj"], 0),
            "attention.wo": part(b["o_proj"], 1),
            "feed_forward.w1": part(b["gate_proj"], 0),
            "feed_forward.w3": part(b["up_proj"], 0),
            "feed_forward.w2": part(b["down_proj"], 1),
            "attention_norm": b["input_layernorm"],
            "ffn_norm": b["post_attention_layernorm"],
        }
        tensors |= {f"layers.{layer}.{name}.weight": t for name, t in matrices.items()}
    return tensors


PARAMS: dict[str, Any] = {
    "dim": 64,
    "n_layers": 4,
    "n_heads": 16,
    "n_kv_heads": 8,
    "norm_eps": 1e-4,
    "vocab_size": -1,
    "rope_theta": 123.0,
}


def meta_folder(folder: Path, source: RandomSource, shards: int, **changes: Any) -> Path:
    """A folder as Meta's: views of shared storage, and rope.freqs."""
    folder.mkdir()
    for n in range(shards):
        tensors = meta_file(source, n, shards)
        flat = torch.cat([t.flatten() for t in tensors.values()])
        views, at = {}, 0
        for key, t in tensors.items():
            views[key] = flat[at : at + t.numel()].view(t.shape)
            at += t.numel()
        torch.save({**views, "rope.freqs": torch.ones(WIDTH // 2)}, folder / f"consolidated.{n:02d}.pth")
    (folder / "params.json").write_text(json.dumps({**PARAMS, **changes}))
    return folder


def meta_logits(tensors: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """(T,) -> (T, vocabulary) by the paper's formulas; rotary pairs are complex numbers, side by side."""
    size = len(tokens)
    angles = torch.outer(torch.arange(size), 123.0 ** (-torch.arange(0, WIDTH, 2) / WIDTH))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x: Tensor, key: str) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-4).rsqrt() * tensors[f"{key}.weight"]

    def rotated(x: Tensor, count: int) -> Tensor:
        pairs = torch.view_as_complex(x.view(size, count, WIDTH // 2, 2))
        return torch.view_as_real(pairs * turn).reshape(size, count, WIDTH)

    h = tensors["tok_embeddings.weight"][tokens]
    for layer in range(4):
        w = {key: tensors[f"layers.{layer}.attention.{key}.weight"] for key in ("wq", "wk", "wv", "wo")}
        x = norm(h, f"layers.{layer}.attention_norm")
        q, k = rotated(x @ w["wq"].T, HEADS), rotated(x @ w["wk"].T, GROUPS)
        k, v = (t.repeat_interleave(HEADS // GROUPS, 1) for t in (k, (x @ w["wv"].T).view(size, GROUPS, WIDTH)))
        scores = torch.einsum("ihd,jhd->hij", q, k) / WIDTH**0.5 + torch.full((size, size), -torch.inf).triu(1)
        h = h + torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(size, -1) @ w["wo"].T
        x = norm(h, f"layers.{layer}.ffn_norm")
        w1, w2, w3 = (tensors[f"layers.{layer}.feed_forward.w{n}.weight"] for n in (1, 2, 3))
        h = h + (torch.nn.functional.silu(x @ w1.T) * (x @ w3.T)) @ w2.T
    return norm(h, "norm") @ tensors["output.weight"].T


class TestMeta:
    def test_the_written_file_computes_the_same(self, tmp_path: Path) -> None:
        """By Meta's formulas, what our model computes by ours."""
        given, tokens = RandomSource(GQA), torch.arange(30) % 40
        write_meta(given, tmp_path / "out", 1)
        theirs = meta_logits(load(tmp_path / "out" / "consolidated.00.pth"), tokens)
        torch.testing.assert_close(our_logits(given, tokens), theirs, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shards", [1, 2, 8])
    def test_reads_and_writes_the_described_files(self, tmp_path: Path, shards: int, dtype: torch.dtype) -> None:
        """meta -> megallama -> meta: every tensor bit by bit, but rope.freqs, which is dropped."""
        given = RandomSource(GQA, dtype)
        source = open_meta(meta_folder(tmp_path / "in", given, shards))
        assert source.model == replace(GQA, max_position_embeddings=4096)
        assert_same(source, given.tensors)
        write_store(source, tmp_path / "step_00000000", (2, 2))
        write_meta(StoreSource(tmp_path / "step_00000000"), tmp_path / "out", shards)
        names = {f"consolidated.{n:02d}.pth" for n in range(shards)}
        assert {path.name for path in (tmp_path / "out").iterdir()} == {*names, "params.json"}
        for n in range(shards):
            written, expected = load(tmp_path / "out" / f"consolidated.{n:02d}.pth"), meta_file(given, n, shards)
            assert written.keys() == expected.keys()
            for key, tensor in expected.items():
                assert written[key].dtype == dtype and torch.equal(written[key], tensor), key
        assert_same(open_meta(tmp_path / "out"), given.tensors)

    def test_params(self, tmp_path: Path) -> None:
        """Only keys that Llama 2's own code takes; the feed-forward's width follows from them."""
        write_meta(RandomSource(replace(GQA, rope_theta=10000.0)), tmp_path / "a", 1)
        params = json.loads((tmp_path / "a" / "params.json").read_text())
        multiplier = params.pop("ffn_dim_multiplier")
        assert int(multiplier * int(8 * 64 / 3)) == 48
        expected = {"dim": 64, "n_layers": 4, "n_heads": 16, "n_kv_heads": 8, "norm_eps": 1e-4, "vocab_size": 40}
        assert params == {**expected, "multiple_of": 1}

    @pytest.mark.parametrize(
        ("preset", "params", "shards"),
        [
            ("llama2-7b", (256, None), 1),
            ("llama2-13b", (256, None), 2),
            ("llama2-34b", (256, None), 4),
            ("llama2-70b", (4096, 1.3), 8),
        ],
    )
    def test_published_sizes(self, preset: str, params: tuple[int, float | None], shards: int) -> None:
        model = replace(ModelConfig(), **PRESETS[preset])  # type: ignore[arg-type]
        assert ffn_params(model.hidden_size, model.intermediate_size) == params
        assert published_shards(model) == shards
        assert published_shards(GQA) == 1

    def test_any_width(self) -> None:
        for dim in (8, 64, 100, 4096):
            for size in (1, 2, 7, 170, 171, 5000, 14336):
                assert ffn_size(dim, *ffn_params(dim, size)) == size

    def test_llama_3_cuts_the_embedding_by_rows(self, tmp_path: Path) -> None:
        given = RandomSource(GQA)
        folder = tmp_path / "in"
        folder.mkdir()
        for n in range(2):
            torch.save(meta_file(given, n, 2, embed_dim=0), folder / f"consolidated.{n:02d}.pth")
        for vocabulary in (-1, 40):
            (folder / "params.json").write_text(json.dumps({**PARAMS, "vocab_size": vocabulary}))
            assert_same(open_meta(folder), given.tensors)

    def test_tied_is_written_out(self, tmp_path: Path) -> None:
        given = RandomSource(TIED)
        write_meta(given, tmp_path / "out", 2)
        source = open_meta(tmp_path / "out")
        assert not source.model.tie_word_embeddings
        assert torch.equal(read_whole(source, HEAD), given.tensors[EMBEDDING])

    @pytest.mark.parametrize("shards", [1, 2])
    def test_without_a_head_it_is_tied(self, tmp_path: Path, shards: int) -> None:
        given = RandomSource(TIED)
        (tmp_path / "in").mkdir()
        for n in range(shards):
            tensors = meta_file(given, n, shards)
            del tensors["output.weight"]
            torch.save(tensors, tmp_path / "in" / f"consolidated.{n:02d}.pth")
        (tmp_path / "in" / "params.json").write_text(json.dumps(PARAMS))
        source = open_meta(tmp_path / "in")
        assert source.model.tie_word_embeddings
        assert_same(source, given.tensors)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"n_layers": 5}, r"consolidated\.00\.pth: tensor layers\.4\.attention\.wq\.weight is missing"),
            ({"n_layers": 3}, r"tensor layers\.3\.\S+ is not part of the Llama that params\.json describes"),
            ({"n_layers": 10**9}, r"params\.json makes 1000000000 layers, but there are only 40 tensors"),
            (
                {"vocab_size": 10**12},
                r"params\.json: vocab_size is 1000000000000; it must be positive, and below 2147483648",
            ),
            ({"n_heads": "16"}, r"params\.json: n_heads is '16'; it must be of type int"),
            ({"n_heads": 5}, r"n_heads=5 must divide dim=64"),
            ({"dim": 32}, r"tok_embeddings\.weight has shape \(40, 32\), but params\.json with 2 files makes it"),
            ({"n_kv_heads": 4}, r"attention\.wk\.weight has shape \(16, 64\).*makes it \(8, 64\)"),
            ({"vocab_size": 41}, r"tok_embeddings\.weight has shape \(40, 32\).* \(41, 32\)"),
            ({"norm_eps": None}, r"params\.json: norm_eps missing"),
            ({"multiple_of": 256}, r"multiple_of=256 .* make the feed-forward 256 wide, but 2 files hold 48 rows"),
            ({"multiple_of": 0}, r"multiple_of is 0; it must be a positive integer"),
            ({"use_scaled_rope": True}, r"use_scaled_rope is True; only a plain Llama"),
        ],
    )
    def test_wrong_params(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        folder = meta_folder(tmp_path / "in", RandomSource(GQA), 2, **changes)
        with pytest.raises(ValueError, match=message):
            open_meta(folder)

    def test_damaged_folders(self, tmp_path: Path) -> None:
        folder = meta_folder(tmp_path / "in", RandomSource(GQA), 2)
        (folder / "consolidated.01.pth").rename(folder / "consolidated.02.pth")
        with pytest.raises(ValueError, match=r"consolidated\.01\.pth is missing; there are 2 files"):
            open_meta(folder)
        (folder / "consolidated.02.pth").unlink()
        with pytest.raises(ValueError, match=r"\S+weight has shape .* but params\.json with 1 files makes it"):
            open_meta(folder)
        (folder / "params.json").write_text("{")
        with pytest.raises(ValueError, match="not a folder of Meta's"):
            open_meta(folder)
        with pytest.raises(ValueError, match=r"holds no consolidated\.00\.pth"):
            open_meta(tmp_path)

    def test_copies_that_differ(self, tmp_path: Path) -> None:
        """Every file has the norms; nothing says whose is the right one."""
        folder = meta_folder(tmp_path / "in", RandomSource(GQA), 2)
        tensors = meta_file(RandomSource(GQA), 1, 2)
        tensors["layers.2.ffn_norm.weight"][5] += 1
        torch.save(tensors, folder / "consolidated.01.pth")
        source = open_meta(folder)
        assert torch.equal(read_whole(source, FINAL_NORM), RandomSource(GQA).tensors[FINAL_NORM])
        name, key = "model.layers.2.post_attention_layernorm.weight", r"layers\.2\.ffn_norm\.weight"
        for _ in range(2):
            with pytest.raises(
                ValueError, match=rf"{name} .*: {key} in \S+/consolidated\.00\.pth, {key} in \S+01\.pth"
            ):
                read_whole(source, name)

    def test_integer_weights(self, tmp_path: Path) -> None:
        folder = meta_folder(tmp_path / "in", RandomSource(GQA), 1)
        tensors = meta_file(RandomSource(GQA), 0, 1)
        tensors["layers.1.attention.wv.weight"] = torch.ones(32, 64, dtype=torch.int8)
        torch.save(tensors, folder / "consolidated.00.pth")
        with pytest.raises(ValueError, match=r"layers\.1\.attention\.wv\.weight is stored as torch\.int8"):
            open_meta(folder)

    def test_shards_that_do_not_fit(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="num_key_value_heads=8 cannot be cut into 16 shards"):
            write_meta(RandomSource(GQA), tmp_path / "out", 16)
        with pytest.raises(ValueError, match="vocab_size=37 cannot be cut into 2 shards of Meta's format, which pads"):
            write_meta(RandomSource(replace(GQA, vocab_size=37)), tmp_path / "out", 2)
        assert not list(tmp_path.iterdir())
