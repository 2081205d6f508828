"""HF Llama folders: read by rectangles, refused with the key or tensor that is wrong, written from checkpoints."""

from __future__ import annotations

import json
import resource
import struct
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from megallama.checkpoint import Checkpointer
from megallama.checkpoint.formats import HFSource, StoreSource, check_export, read_whole, require_model, write_hf
from megallama.checkpoint.formats.hf import model_config
from megallama.checkpoint.store import Stored, write_manifest, write_rectangles
from megallama.config import Config, ModelConfig, TrainConfig
from megallama.data.batch import Batch
from megallama.data.tokenizer import load_tokenizer, wrap_tokenizer
from megallama.model.canonical import EMBEDDING, HEAD, canonical_shapes
from megallama.parallel.pieces import Rect, matrix
from megallama.runtime.mesh import Mesh
from megallama.train.trainer import build_trainer

MODEL = ModelConfig(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    vocab_size=50,
    max_position_embeddings=64,
    rms_norm_eps=1e-4,
    rope_theta=123.0,
)
TIED = replace(MODEL, tie_word_embeddings=True)
NORM, QUERY = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-4,
    "rope_theta": 123.0,
    "hidden_act": "silu",
    "attention_bias": False,
}


def random_tensors(model: ModelConfig = MODEL) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=random) for name, shape in canonical_shapes(model).items()}


def write_folder(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None, files: int = 1
) -> Path:
    """An HF folder of `files` weight files, neighbouring tensors in different ones."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    placed = {name: f"model-{n % files + 1:05d}-of-{files:05d}.safetensors" for n, name in enumerate(tensors)}
    for file in set(placed.values()):
        save_file({name: t for name, t in tensors.items() if placed[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], model: ModelConfig = MODEL) -> StoreSource:
    """A checkpoint of two ranks that hold the upper and the lower half of every matrix's columns."""
    records = []
    for rank in range(2):
        parts = []
        for name, tensor in tensors.items():
            rows, cols = matrix(tuple(tensor.shape))
            lo, hi = (0, cols // 2) if rank == 0 else (cols // 2, cols)
            half = tensor.view(rows, cols)[:, lo:hi]
            parts.append(Stored("weight", name, Rect(0, rows, lo, hi), tensor.dtype, partial(Tensor.contiguous, half)))
        folder.mkdir(exist_ok=True)
        records.append(write_rectangles(folder, f"rank_{rank:05d}.safetensors", parts))
    section = {key: value for key, value in vars(model).items() if key != "preset"}
    meta = {"step": 1, "consumed_samples": 8, "updates": 1, "model": section, "fingerprints": {}}
    write_manifest(folder, records, {name: tuple(t.shape) for name, t in tensors.items()}, meta)
    return StoreSource(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> HFSource:
    return HFSource(write_folder(tmp_path_factory.mktemp("hf"), random_tensors(), files=3))


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    return pytest.importorskip("transformers", reason="needs pip install megallama[hf]")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> StoreSource:
    return write_checkpoint(tmp_path_factory.mktemp("step"), random_tensors())


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sentencepiece

    prefix = tmp_path_factory.mktemp("tokenizer") / "own"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the llama and the alpaca ate 12 apples", "then the llama slept"]),
        model_prefix=str(prefix),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An HF tokenizer folder whose special tokens are named beside it and are not the first ids."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs pip install megallama[hf]")
    folder = tmp_path_factory.mktemp("fast")
    words = {word: n for n, word in enumerate(["the", "llama", "ate", "<end>", "<start>", "?"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<start>", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "pytorch_model.bin").write_text("not a tokenizer's file")
    return folder


class TestReading:
    def test_model(self, source: HFSource) -> None:
        assert source.model == MODEL
        assert source.shapes == canonical_shapes(MODEL)

    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_any_rectangle(self, source: HFSource, data: st.DataObject) -> None:
        tensors = random_tensors()
        name = data.draw(st.sampled_from(sorted(tensors)))
        rows, cols = matrix(tuple(tensors[name].shape))
        r0, c0 = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1))
        rect = Rect(r0, data.draw(st.integers(r0 + 1, rows)), c0, data.draw(st.integers(c0 + 1, cols)))
        flat = torch.full(
            (rect.height, 2 * rect.width), torch.nan, dtype=torch.float64
        )  # a strided view, as in a bucket
        source.read(name, rect, flat[:, : rect.width])
        expected = tensors[name].view(rows, cols)[rect.r0 : rect.r1, rect.c0 : rect.c1]
        assert torch.equal(flat[:, : rect.width], expected.double())
        assert flat[:, rect.width :].isnan().all()

    def test_bfloat16_is_widened(self, tmp_path: Path) -> None:
        tensors = {name: tensor.bfloat16() for name, tensor in random_tensors().items()}
        out = torch.empty(1, 24)
        HFSource(write_folder(tmp_path, tensors)).read(NORM, Rect(0, 1, 0, 24), out)
        assert torch.equal(out[0], tensors[NORM].float())

    def test_reads_only_what_is_asked_for(self, tmp_path: Path) -> None:
        """A rectangle of a 16 GiB embedding (a sparse file) is a matter of bytes."""
        model = {**CONFIG, "vocab_size": 16 * 2**30 // (24 * 4)}
        header, end = {}, 0
        for name, shape in canonical_shapes(replace(MODEL, vocab_size=model["vocab_size"])).items():
            if name == HEAD:
                continue
            size = 4 * matrix(shape)[0] * matrix(shape)[1]
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        with open(tmp_path / "model.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        (tmp_path / "config.json").write_text(json.dumps({**model, "tie_word_embeddings": True}))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        out = torch.ones(3, 2)
        HFSource(tmp_path).read(EMBEDDING, Rect(10**8, 10**8 + 3, 5, 7), out)
        assert not out.any()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB

    def test_tied_head_is_not_needed_and_not_minded(self, tmp_path: Path) -> None:
        tied = {**CONFIG, "tie_word_embeddings": True}
        tensors = random_tensors(TIED)
        assert HFSource(write_folder(tmp_path / "without", tensors, tied)).model == TIED
        tensors[HEAD] = tensors[EMBEDDING].clone()
        source = HFSource(write_folder(tmp_path / "with", tensors, tied, files=2))
        assert HEAD not in source.shapes and torch.equal(read_whole(source, EMBEDDING), tensors[EMBEDDING])
        tensors[HEAD][7] += 1
        source = HFSource(write_folder(tmp_path / "other", tensors, tied, files=2))
        with pytest.raises(ValueError, match=rf"{EMBEDDING} has copies that differ: {EMBEDDING} in .*, {HEAD} in"):
            read_whole(source, EMBEDDING)

    @pytest.mark.parametrize("rect", [Rect(0, 51, 0, 24), Rect(0, 1, 20, 25)])
    def test_rectangle_outside(self, source: HFSource, rect: Rect) -> None:
        with pytest.raises(ValueError, match=r"embed_tokens.*\(50, 24\)"):
            source.read(EMBEDDING, rect, torch.empty(rect.height, rect.width))

    def test_require(self, source: HFSource) -> None:
        require_model(source, replace(MODEL, preset="llama2-7b", initializer_range=0.5, max_position_embeddings=7))
        with pytest.raises(ValueError, match=r"model\.hidden_size=48 \(there 24\), model\.rope_theta=9\.0 \(there 123"):
            require_model(source, replace(MODEL, hidden_size=48, rope_theta=9.0))


class TestConfig:
    def of(self, folder: Path, **changes: Any) -> ModelConfig:
        """The shape read from CONFIG with changes; ... removes a key."""
        content = {key: value for key, value in {**CONFIG, **changes}.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(content))
        return model_config(folder / "config.json")

    def test_keys_of_other_versions(self, tmp_path: Path) -> None:
        nested = {"rope_theta": 77.0, "rope_type": "default"}
        assert self.of(tmp_path, rope_theta=..., rope_parameters=nested).rope_theta == 77.0
        old = self.of(tmp_path, rope_theta=..., num_key_value_heads=..., rms_norm_eps=..., hidden_act=...)
        assert (old.rope_theta, old.num_key_value_heads, old.rms_norm_eps) == (10000.0, 6, 1e-6)
        assert self.of(tmp_path, rope_theta=500000, head_dim=4, rope_scaling=None).rope_theta == 500000

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("model_type", "mistral"),
            ("model_type", ...),
            ("attention_bias", True),
            ("mlp_bias", True),
            ("rope_scaling", {"type": "linear", "factor": 2.0}),
            ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}),
            ("rope_scaling", {"rope_type": "default", "type": "linear", "factor": 4}),
            ("rope_scaling", {"rope_type": "linear", "type": "default", "factor": 4}),
            ("rope_theta", 10**400),
            ("rope_theta", float("inf")),
            ("max_position_embeddings", 10**30),
            ("max_position_embeddings", 1e30),
            ("hidden_act", "gelu"),
            ("head_dim", 8),
            ("partial_rotary_factor", 0.5),
            ("quantization_config", {"bits": 4}),
            ("hidden_size", ...),
            ("hidden_size", "24"),
            ("num_hidden_layers", 0),
            ("num_attention_heads", 5),
            ("num_key_value_heads", 4),
            ("tie_word_embeddings", 1),
        ],
    )
    def test_refused_by_name(self, tmp_path: Path, key: str, value: Any) -> None:
        with pytest.raises(ValueError, match=key):
            self.of(tmp_path, **{key: value})

    @pytest.mark.parametrize("text", ["{", "[]", ""])
    def test_no_config(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=str(tmp_path)):
            model_config(tmp_path / "config.json")
        with pytest.raises(ValueError, match="not an HF model folder"):
            model_config(tmp_path / "absent" / "config.json")


class TestDamage:
    """Every fault is found when the folder is opened, before a weight is touched."""

    @pytest.mark.parametrize("files", [1, 2])
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({QUERY: None}, f"{QUERY} is missing"),
            ({HEAD: None}, f"{HEAD} is missing"),
            ({QUERY: torch.zeros(24, 20)}, rf"{QUERY} has shape \(24, 20\).*\(24, 24\)"),
            ({NORM: torch.zeros(24, dtype=torch.int8)}, f"{NORM} is stored as I8"),
            ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(24)}, r"q_proj\.bias is not part"),
        ],
    )
    def test_tensors(self, tmp_path: Path, files: int, change: dict[str, Tensor | None], message: str) -> None:
        tensors = {name: t for name, t in {**random_tensors(), **change}.items() if t is not None}
        with pytest.raises(ValueError, match=message):
            HFSource(write_folder(tmp_path, tensors, files=files))

    def test_old_rotary_buffers_are_ignored(self, tmp_path: Path) -> None:
        buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}
        assert HFSource(write_folder(tmp_path, {**random_tensors(), **buffers})).model == MODEL

    def test_files(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path, random_tensors(), files=2)
        second = folder / "model-00002-of-00002.safetensors"
        content = second.read_bytes()
        second.write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=second.name):
            HFSource(folder)
        second.unlink()
        with pytest.raises(ValueError, match=second.name):
            HFSource(folder)
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {NORM: "../model.safetensors"}}))
        with pytest.raises(ValueError, match="outside the folder"):
            HFSource(folder)
        index.write_text(json.dumps({"weight_map": {NORM: "model-00001-of-00002.safetensors", "x": "y.safetensors"}}))
        with pytest.raises(ValueError, match=r"y\.safetensors"):
            HFSource(folder)
        index.unlink()
        with pytest.raises(ValueError, match="pickled weights are not read"):
            HFSource(folder)


class TestExport:
    @pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
    def test_comes_back(self, store: StoreSource, tmp_path: Path, dtype: torch.dtype | None) -> None:
        write_hf(store, tmp_path / "out", dtype)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
        written = load_file(tmp_path / "out" / "model.safetensors")
        assert written.keys() == canonical_shapes(MODEL).keys()
        for name, tensor in random_tensors().items():
            assert torch.equal(written[name], tensor.to(dtype or torch.float32)), name
        assert HFSource(tmp_path / "out").model == MODEL
        said = json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"]
        assert said == str(dtype or torch.float32).removeprefix("torch.")

    def test_each_tensor_keeps_its_own_dtype(self, tmp_path: Path) -> None:
        tensors = {name: t if "norm" in name else t.bfloat16() for name, t in random_tensors().items()}
        write_hf(HFSource(write_folder(tmp_path / "in", tensors)), tmp_path / "out")
        written = load_file(tmp_path / "out" / "model.safetensors")
        assert {name: t.dtype for name, t in written.items()} == {name: t.dtype for name, t in tensors.items()}
        assert all(torch.equal(written[name], t) for name, t in tensors.items())
        assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"

    def test_generation_settings_are_kept(self, store: StoreSource, tmp_path: Path) -> None:
        like = write_folder(tmp_path / "in", random_tensors(), {**CONFIG, "bos_token_id": 7, "eos_token_id": [8, 9]})
        settings = {"eos_token_id": [8, 9], "temperature": 0.6, "do_sample": True}
        (like / "generation_config.json").write_text(json.dumps(settings))
        write_hf(store, tmp_path / "out", like=like)
        written = json.loads((tmp_path / "out" / "config.json").read_text())
        assert (written["bos_token_id"], written["eos_token_id"]) == (7, [8, 9])
        assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == settings

    def test_shards(self, store: StoreSource, tmp_path: Path) -> None:
        limit = 5000
        write_hf(store, tmp_path / "out", torch.float32, limit)
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        tensors = random_tensors()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
        assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
        assert len(files) > 2
        for file in files:
            held = load_file(tmp_path / "out" / file)
            assert len(held) > 0
            assert sum(t.nbytes for t in held.values()) <= limit or len(held) == 1
            assert held.keys() == {name for name, place in index["weight_map"].items() if place == file}
        source = HFSource(tmp_path / "out")
        for name, tensor in tensors.items():
            assert torch.equal(read_whole(source, name), tensor), name

    def test_replaces_an_earlier_export_only(self, store: StoreSource, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        write_hf(store, out, max_shard_bytes=5000)  # an empty folder is fine
        write_hf(store, out)
        assert {p.name for p in out.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
        (out / "notes.txt").write_text("mine")
        with pytest.raises(ValueError, match=r"notes\.txt"):
            write_hf(store, out)
        assert (out / "notes.txt").read_text() == "mine"
        foreign = write_folder(tmp_path / "foreign", random_tensors())
        with pytest.raises(ValueError, match=r"model\.safetensors, which is not from an earlier export"):
            write_hf(store, foreign)
        bare = tmp_path / "bare"
        bare.mkdir()
        (bare / "config.json").write_text("{}")
        with pytest.raises(ValueError, match="not an earlier export"):
            write_hf(store, bare)
        with pytest.raises(ValueError, match="is a file"):
            write_hf(store, bare / "config.json")

    def test_known_before_the_run(
        self, store: StoreSource, sentencepiece: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What an export would stop at, a run can ask for at its start."""
        write_hf(store, tmp_path / "out")
        for folder in (tmp_path / "out", tmp_path / "new"):
            check_export(folder, None, MODEL)
        check_export(tmp_path / "new", sentencepiece, replace(MODEL, vocab_size=300))
        with pytest.raises(ValueError, match=r"300 ids, but the model's vocab_size is 50"):
            check_export(tmp_path / "new", sentencepiece, MODEL)
        with pytest.raises(ValueError, match=r"config\.json: .*tokenizer"):
            check_export(tmp_path / "new", tmp_path / "out" / "config.json", MODEL)
        (tmp_path / "out" / "notes.txt").write_text("mine")
        with pytest.raises(ValueError, match=r"notes\.txt, which is not from an earlier export"):
            check_export(tmp_path / "out", None, MODEL)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match="is the current directory"):
            check_export(Path("."), None, MODEL)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]

    def test_failure_leaves_the_earlier_export(self, tmp_path: Path) -> None:
        store = write_checkpoint(tmp_path / "step", random_tensors())
        write_hf(store, tmp_path / "out")
        before = (tmp_path / "out" / "model.safetensors").read_bytes()
        damaged = tmp_path / "step" / "rank_00001.safetensors"
        content = damaged.read_bytes()
        damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ValueError, match="corrupt"):
            write_hf(StoreSource(tmp_path / "step"), tmp_path / "out")
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "step"]

    def test_wrong_arguments(self, store: StoreSource, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"int8: choose one of .*bfloat16"):
            write_hf(store, tmp_path / "out", torch.int8)
        assert not list(tmp_path.iterdir())


class TestTokenizer:
    """The tokenizer goes along: transformers opens it from the exported folder and encodes as ours does."""

    def export(self, work: Path, tokenizer: Path, vocab: int) -> tuple[Path, dict[str, Any]]:
        model = replace(MODEL, vocab_size=vocab)
        source = write_checkpoint(work / "step", random_tensors(model), model)
        write_hf(source, work / "out", torch.bfloat16, tokenizer=tokenizer)
        config = json.loads((work / "out" / "config.json").read_text())
        generation = json.loads((work / "out" / "generation_config.json").read_text())
        special = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
        assert special.items() <= generation.items()
        return work / "out", special

    def test_sentencepiece(self, transformers: ModuleType, sentencepiece: Path, tmp_path: Path) -> None:
        folder, special = self.export(tmp_path, sentencepiece, 304)
        assert special == {"bos_token_id": 1, "eos_token_id": 2}
        theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(sentencepiece)
        for text in ("the llama ate 2026 apples", "Größe 日本\n\tthen  two spaces "):
            assert theirs.encode(text) == ours.encode(text)
            assert theirs.decode(ours.encode(text)) == text
        assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
        write_hf(StoreSource(tmp_path / "step"), folder)  # and is known as our own
        assert not (folder / "tokenizer.model").exists()

    @pytest.mark.parametrize("form", ["folder", "tokenizer.json", "wrapped"])
    def test_fast(self, transformers: ModuleType, fast: Path, tmp_path: Path, form: str) -> None:
        path = {"folder": fast, "tokenizer.json": fast / "tokenizer.json", "wrapped": tmp_path / "wrapped.model"}[form]
        if form == "wrapped":
            wrap_tokenizer(fast, path)
        folder, special = self.export(tmp_path, path, 6)
        assert special == {"bos_token_id": 4, "eos_token_id": 3}
        assert not (folder / "pytorch_model.bin").exists()
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert theirs.encode("the llama ate") == load_tokenizer(path).encode("the llama ate") == [0, 1, 2]
        assert (theirs.bos_token_id, theirs.eos_token_id) == (4, 3)

    def test_too_big_for_the_model(self, sentencepiece: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"300 ids, but the model's vocab_size is 50"):
            self.export(tmp_path, sentencepiece, 50)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tie", [False, True])
def test_exported_run_computes_the_same_in_transformers(transformers: ModuleType, tmp_path: Path, tie: bool) -> None:
    """From our trainer through a checkpoint to `from_pretrained`: equal logits."""
    model = replace(MODEL, tie_word_embeddings=tie, initializer_range=0.2)
    trainer = build_trainer(Config(model=model, train=TrainConfig(dtype="float32")), Mesh())
    assert trainer.optimizer is not None
    checkpointer = Checkpointer(tmp_path / "run", Mesh(), model, 0, False)
    counts = {"consumed_samples": 0, "updates": 0, "fingerprints": {}}
    checkpointer.save(1, trainer.optimizer.slots(), counts)
    write_hf(StoreSource(tmp_path / "run"), tmp_path / "out", torch.float32, 5000)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.float32
    assert (theirs.config.rope_parameters["rope_theta"], theirs.config.rms_norm_eps) == (123.0, 1e-4)
    tokens = torch.arange(40) % 50
    ours = trainer.infer([Batch.pack([(tokens, tokens)])], lambda logits, _: logits)[0]
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens[None]).logits[0], ours, rtol=1e-5, atol=1e-5)
