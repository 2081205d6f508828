"""The engine against transformers: same weights, same batches, ten AdamW steps, on five layouts and more.

The oracle knows nothing of the engine: rows go through LlamaForCausalLM one by one, without padding or packing, and
torch.optim.AdamW updates with the paper's constants written out here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from trajectory import Part, assemble, run_config

from distributed import Ranks
from megallama.checkpoint.formats.hf import HFSource
from megallama.config import Config, ModelConfig
from megallama.data.batch import IGNORE, Batch
from megallama.runtime.mesh import Mesh, build_mesh
from megallama.train.trainer import NextToken, Stats, Trainer, build_trainer

STEPS, ROWS, LENGTH, VOCAB = 10, 8, 20, 101
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2)]
WIDE = (4, 1, 1)
"""More tensor-parallel ranks than K/V heads: a source must serve replicas."""

DOCUMENTS = [[7, 12], [], [1]]
"""Where new documents begin inside the rows of the document-masked batch."""


class Run(NamedTuple):
    """What a run reports: a step's loss and gradient norm before clipping, and the weights after the last step."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Oracle:
    """A folder that transformers saved, with what transformers computes from it."""

    folder: Path
    run: Run
    logits: list[Tensor]
    documents: list[Tensor]


def rows_of(step: int) -> list[tuple[Tensor, Tensor]]:
    """The global batch of a step: rows (tokens, labels) of unequal length, some labels masked."""
    random = torch.Generator().manual_seed(step)
    rows = []
    for n in range(ROWS):
        tokens = torch.empty(LENGTH - n % 3 + 1, dtype=torch.int64)
        tokens[0] = torch.randint(VOCAB, (1,), generator=random)
        for t in range(1, len(tokens)):
            tokens[t] = (5 * tokens[t - 1] + 3) % 13  # a few short cycles: learnable within ten steps
        labels = tokens[1:].clone()
        labels[torch.rand(len(labels), generator=random) < n / ROWS] = IGNORE
        rows.append((tokens[:-1], labels))
    return rows


def documents_of(rows: list[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """The documents of the document-masked batch, one by one."""
    for (tokens, _), starts in zip(rows, DOCUMENTS, strict=True):
        yield from torch.tensor_split(tokens, starts)


def reference(model: Any) -> Run:
    """Ten steps in transformers: losses are sums over the batch's valid tokens, divided by their number."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-5)
    losses, norms = [], []
    for step in range(STEPS):
        rows = rows_of(step)
        count = sum(int((labels != IGNORE).sum()) for _, labels in rows)
        loss = torch.zeros(())
        for tokens, labels in rows:
            logits = model(input_ids=tokens[None]).logits[0]
            loss = loss + F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / count
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        for group in optimizer.param_groups:  # warm-up is over at step 1; the cosine ends at a tenth
            group["lr"] = 1e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / (STEPS - 1))))
        optimizer.step()
        losses.append(loss.item())
    return Run(losses, norms, {name: value.detach().clone() for name, value in model.state_dict().items()})


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers: pip install megallama[hf]")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,  # two stages cannot be even
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        rms_norm_eps=1e-4,
        rope_theta=500.0,
        initializer_range=0.1,
    )
    model = transformers.LlamaForCausalLM(shape)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:  # norms all of ones would hide swapped ones
                p.add_(0.2 * torch.randn(p.shape))
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder)
    rows = rows_of(0)
    with torch.no_grad():
        logits = [model(input_ids=tokens[None]).logits[0] for tokens, _ in rows]
        documents = [model(input_ids=tokens[None]).logits[0] for tokens in documents_of(rows[: len(DOCUMENTS)])]
    return Oracle(folder, reference(model), logits, documents)


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[int, Ranks]]:
    """Process groups by size, each started once."""
    with ExitStack() as stack:
        yield {size: stack.enter_context(Ranks(size)) for size in (1, 2, 4, 8)}


def config_of(model: ModelConfig, tp: int, pp: int, dp: int = 1, dtype: str = "float32") -> Config:
    """Two micro-batches a step in every layout, so that their size differs."""
    config = run_config(STEPS, dtype, ROWS // dp // 2, model, tp=tp, pp=pp)
    return replace(config, train=replace(config.train, global_batch_size=ROWS))


def load(config: Config, folder: Path) -> tuple[Mesh, Trainer]:
    """A trainer on the default process group with the folder's weights."""
    parallel, model = config.parallel, config.model
    mesh = build_mesh(
        parallel.tp, parallel.pp, model.num_key_value_heads, model.tie_word_embeddings, torch.device("cpu")
    )
    trainer = build_trainer(config, mesh)
    assert trainer.optimizer is not None
    trainer.optimizer.load_weights(HFSource(folder).read)
    return mesh, trainer


def train(rank: int, world: int, config: Config, folder: Path) -> tuple[list[Stats], list[Part]]:
    mesh, trainer = load(config, folder)
    size, loss = config.train.micro_batch_size, NextToken(config.model.vocab_size, mesh.tp)
    stats = []
    for step in range(STEPS):
        rows = rows_of(step)[mesh.dp.rank :: mesh.dp.size]
        micros = [Batch.pack(rows[at : at + size], mesh.tp.size) for at in range(0, len(rows), size)]
        stats.append(trainer.step(micros, loss))
    assert trainer.optimizer is not None
    return stats, [Part(s.name, s.rect, v["weight"].clone(), s.owner) for s, v in trainer.optimizer.slots()]


def forward(rank: int, world: int, config: Config, folder: Path, rows: int, masked: bool) -> Tensor:
    """Logits (T, vocabulary / tp) of the first `rows` rows of step 0, packed into one micro-batch."""
    mesh, trainer = load(config, folder)
    batch = Batch.pack(rows_of(0)[:rows], mesh.tp.size, DOCUMENTS if masked else None)
    return trainer.infer([batch, batch], lambda logits, _: logits)[1]


def run(groups: dict[int, Ranks], oracle: Oracle, layout: tuple[int, int, int], dtype: str = "float32") -> Run:
    tp, pp, dp = layout
    config = config_of(HFSource(oracle.folder).model, tp, pp, dp, dtype)
    answers = groups[tp * pp * dp].run(train, config, oracle.folder)
    stats = answers[0][0]
    assert all(answer[0] == stats for answer in answers), "ranks disagree"
    weights = assemble([part for answer in answers for part in answer[1]], config.model)
    return Run([s.loss for s in stats], [s.grad_norm for s in stats], weights)


def joined_logits(groups: dict[int, Ranks], oracle: Oracle, tp: int, pp: int, rows: int, masked: bool) -> Tensor:
    """Logits (T, vocabulary) from a tp x pp layout, its shards joined and the padded vocabulary cut off."""
    config = config_of(HFSource(oracle.folder).model, tp, pp)
    shards = groups[tp * pp].run(forward, config, oracle.folder, rows, masked)
    for n, shard in enumerate(shards):
        assert torch.equal(shard, shards[n % tp]), "the output must reach all pipeline ranks"
    return torch.cat(shards[:tp], 1)[:, :VOCAB]


def worst(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def test_the_data_can_be_learnt(oracle: Oracle) -> None:
    """Else equal losses would say nothing about the updates; and gradients must be long enough to be clipped."""
    assert oracle.run.losses[-1] < 0.95 * oracle.run.losses[0]
    assert max(oracle.run.norms) > 1.0


@pytest.mark.parametrize("layout", [*LAYOUTS, WIDE], ids=lambda layout: "tp{}-pp{}-dp{}".format(*layout))
def test_ten_steps_equal_transformers(groups: dict[int, Ranks], oracle: Oracle, layout: tuple[int, int, int]) -> None:
    ours = run(groups, oracle, layout)
    assert worst(ours.losses, oracle.run.losses) < 5e-6
    assert all(abs(a - b) < 1e-5 * b for a, b in zip(ours.norms, oracle.run.norms, strict=True))
    for name, weight in oracle.run.weights.items():
        assert float((ours.weights[name].view(weight.shape) - weight).abs().max()) < 5e-6, name


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (1, 2)])
def test_logits_equal_transformers(groups: dict[int, Ranks], oracle: Oracle, tp: int, pp: int) -> None:
    """Rows packed back to back, with padding where tp asks for it, give what each row gives alone."""
    logits = joined_logits(groups, oracle, tp, pp, ROWS, masked=False)
    expected = torch.cat(oracle.logits)
    torch.testing.assert_close(logits[: len(expected)], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1)])
def test_masked_documents_equal_separate_passes(groups: dict[int, Ranks], oracle: Oracle, tp: int, pp: int) -> None:
    """Documents inside a row neither see each other nor shift each other's positions."""
    logits = joined_logits(groups, oracle, tp, pp, len(DOCUMENTS), masked=True)
    expected = torch.cat(oracle.documents)
    torch.testing.assert_close(logits[: len(expected)], expected, rtol=1e-5, atol=1e-5)
    apart = torch.cat(oracle.logits[: len(DOCUMENTS)])
    assert float((expected - apart).abs().max()) > 0.1, "masking must matter in this batch"


def test_bfloat16_stays_close(groups: dict[int, Ranks], oracle: Oracle) -> None:
    """bf16 compute with fp32 masters against transformers in fp32."""
    ours = run(groups, oracle, (2, 1, 1), "bfloat16")
    assert all(abs(a - b) < 0.01 * b for a, b in zip(ours.losses, oracle.run.losses, strict=True))
    assert all(abs(a - b) < 0.03 * b for a, b in zip(ours.norms, oracle.run.norms, strict=True))
