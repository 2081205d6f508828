"""Resuming: the same bits in the same layout, the same run in another, and the newest valid checkpoint after damage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from small_runs import (
    MODEL,
    ROWS,
    TIED,
    Layout,
    canonical,
    config_of,
    flip_last_bit,
    go,
    new_processes,
    open_run,
    run_alone,
    same,
    save,
    states,
)
from torch import Tensor

from distributed import run_ranks
from megallama.checkpoint import Checkpointer, checkpoint_folders
from megallama.checkpoint.store import Stored, write_manifest, write_rectangles
from megallama.config import CheckpointConfig, Config, ModelConfig, OptimConfig
from megallama.model.canonical import canonical_shapes
from megallama.parallel.pieces import matrix
from megallama.train.run import resume


class Outcome(NamedTuple):
    """What a rank ends with."""

    steps: list[tuple[float, float]]
    states: list[Tensor]


def straight(rank: int, world: int, config: Config) -> Outcome:
    """Ten steps; after the fifth a checkpoint in the foreground, and one in the background of the next five steps."""
    trainer, foreground = open_run(config)
    folder = Path(config.output_dir) / "background"
    background = Checkpointer(folder, trainer.mesh, config.model, 0, True)
    seen = go(trainer, 5)
    save(trainer, foreground)
    save(trainer, background)
    seen += go(trainer, 5)
    background.wait()
    assert not background.failed()
    return Outcome(seen, states(trainer))


def resumed(rank: int, world: int, config: Config) -> Outcome:
    """Five steps from the checkpoint of the fifth."""
    trainer, where = open_run(config)
    assert resume(trainer, where, {}, lambda note: None) == 5 * ROWS
    assert trainer.done == 5
    return Outcome(go(trainer, 5), states(trainer))


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(tp=2), Layout(pp=2), Layout(dp=2), Layout(tp=2, pp=2), Layout(pp=2, vpp=2)],
    ids=str,
)
def test_resuming_continues_bitwise(tmp_path: Path, layout: Layout) -> None:
    """Losses, norms, weights and moments; and saving in the background stores the same bytes."""
    config = config_of(layout, tmp_path, model=replace(MODEL, num_hidden_layers=4))
    whole = new_processes(layout.world, straight, config)
    later = new_processes(layout.world, resumed, config)
    for one, other in zip(whole, later, strict=True):
        assert other.steps == one.steps[5:]
        assert all(torch.equal(a, b) for a, b in zip(one.states, other.states, strict=True))
    assert whole[0].steps[0][0] != whole[0].steps[-1][0]
    one, other = (next((tmp_path / name).iterdir()) for name in ("checkpoints", "background"))
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
    assert all((other / p.name).read_bytes() == p.read_bytes() for p in one.iterdir())


def leg(rank: int, world: int, config: Config, steps: int) -> list[tuple[float, float]]:
    """Resume if there is something, save at once what was loaded, go on, and save that too."""
    trainer, where = open_run(config)
    if resume(trainer, where, {}, lambda note: None):
        save(trainer, Checkpointer(Path(config.output_dir) / "again", trainer.mesh, config.model, 0, False))
    seen = go(trainer, steps)
    save(trainer, where)
    return seen


@pytest.mark.parametrize("model", [MODEL, TIED], ids=["untied", "tied"])
def test_any_layout_resumes_any_layout(tmp_path: Path, model: ModelConfig) -> None:
    """tp 2 -> pp 2 -> dp 2 -> tp 4 with copied K/V heads, two steps each: the run of one process, up to rounding."""
    expected = leg(0, 1, config_of(Layout(), tmp_path / "one", "float64", model, 8), 8)
    folder, seen = tmp_path / "many", []
    for layout in (Layout(tp=2), Layout(pp=2), Layout(dp=2), Layout(tp=4)):
        seen += run_ranks(layout.world, leg, config_of(layout, folder, "float64", model, 8), 2)[0]
        written = checkpoint_folders(folder / "checkpoints")
        again = checkpoint_folders(folder / "again")
        if again:
            step = again[0].name
            before = canonical(folder / "checkpoints" / step, model)
            assert same(before, canonical(again[0], model)), f"{layout} loaded and saved other bits"
    assert [p.name for p in written] == [f"step_{n:08d}" for n in (8, 6, 4)], "keep is 3"
    assert len(again) == 3
    assert torch.tensor(seen).sub(torch.tensor(expected)).abs().max() < 1e-10
    true = canonical(checkpoint_folders(tmp_path / "one" / "checkpoints")[0], model)
    assert same(canonical(written[0], model), true, 1e-10)


def damaged(rank: int, world: int, config: Config) -> tuple[int, int, list[str], list[Tensor], list[Tensor]]:
    """Two checkpoints; damage in the newer one that rank 1 alone reads; then resume."""
    trainer, where = open_run(config)
    go(trainer, 1)
    save(trainer, where)
    older = states(trainer)
    go(trainer, 1)
    save(trainer, where)
    if rank == 0:
        flip_last_bit(checkpoint_folders(where.root)[0] / "rank_00001.safetensors")
    where._gather(None)
    notes: list[str] = []
    again, there = open_run(config)
    consumed = resume(again, there, {}, notes.append)
    return again.done, consumed, notes, older, states(again)


def test_all_ranks_fall_back_together(tmp_path: Path) -> None:
    results = run_ranks(2, damaged, config_of(Layout(dp=2), tmp_path))
    for done, consumed, _, older, loaded in results:
        assert (done, consumed) == (1, ROWS)
        assert all(torch.equal(a, b) for a, b in zip(older, loaded, strict=True))
    assert "rank_00001.safetensors: tensor" in results[1][2][0] and "is corrupt" in results[1][2][0]
    assert results[0][2][0] == "skipped checkpoint step_00000002: another rank could not read it"


def test_another_model_is_named(tmp_path: Path) -> None:
    _, where = run_alone(tmp_path, 1)
    config = config_of(Layout(), tmp_path, model=replace(MODEL, intermediate_size=28))
    config = replace(config, checkpoint=CheckpointConfig(load=str(where.root / "step_00000001")))
    with pytest.raises(ValueError, match="another model: intermediate_size is 24 there, 28 here"):
        resume(*open_run(config), {}, print)


def test_bf16_masters_survive(tmp_path: Path) -> None:
    """Steps far below one bf16 ulp: masters rebuilt from the weights would lose them."""
    optim = OptimConfig(lr=1e-6, warmup_steps=1)
    trainer, where = open_run(config_of(Layout(), tmp_path, "bfloat16", optim=optim))
    assert trainer.optimizer is not None
    (bucket,) = trainer.optimizer.buckets[0]
    weights, masters = bucket.weights.clone(), bucket.master.clone()
    go(trainer, 2)
    save(trainer, where)
    moved = masters != bucket.master
    assert moved.sum() > 0.9 * sum(weight.numel() for weight, _ in bucket.held)
    assert (weights == bucket.weights)[moved].double().mean() > 0.9, "few weights cross a rounding boundary"
    other, there = open_run(config_of(Layout(), tmp_path, "bfloat16", optim=optim))
    resume(other, there, {}, lambda note: None)
    assert all(torch.equal(a, b) for a, b in zip(states(trainer), states(other), strict=True))
    assert go(trainer, 1) == go(other, 1)


def test_a_checkpoint_of_weights_alone_starts_a_run(tmp_path: Path) -> None:
    """What a conversion writes: step 0, no moments."""
    trainer, _ = run_alone(tmp_path / "trained", 3)
    assert trainer.optimizer is not None
    converted = tmp_path / "converted"
    converted.mkdir()
    parts = [
        Stored("weight", slot.name, slot.rect, values["weight"].dtype, values["weight"].clone)
        for slot, values in trainer.optimizer.slots()
    ]
    meta = {"step": 0, "consumed_samples": 0, "updates": 0, "model": vars(MODEL), "fingerprints": {}}
    write_manifest(converted, [write_rectangles(converted, "a.safetensors", parts)], canonical_shapes(MODEL), meta)
    load = CheckpointConfig(load=str(converted), async_save=False)
    again, where = open_run(config_of(Layout(), tmp_path / "new", checkpoint=load))
    assert resume(again, where, {}, lambda note: None) == again.done == 0
    assert again.optimizer is not None and again.optimizer.updates == 0
    for (_, old), (_, new) in zip(trainer.optimizer.slots(), again.optimizer.slots(), strict=True):
        assert torch.equal(old["weight"], new["weight"])
        assert bool(old["exp_avg"].any()) and not new["exp_avg"].any() and not new["exp_avg_sq"].any()
    go(again, 1)
    save(again, where)
    assert resume(*open_run(config_of(Layout(), tmp_path / "new", checkpoint=load)), {}, lambda note: None) == ROWS


def test_the_documented_script_reads_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/formats.md: ten lines and the safetensors package."""
    where = run_alone(tmp_path, 1)[1]
    text = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    script = text.split("```python\n")[1].split("```")[0]
    assert len(script.splitlines()) <= 13 and "megallama" not in script
    monkeypatch.setattr("sys.argv", ["read.py", str(where.folder(1))])
    found: dict[str, Any] = {}
    exec(script, found)
    assert {name: array.shape for name, array in found["weights"].items()} == {
        name: matrix(shape) for name, shape in canonical_shapes(MODEL).items()
    }
    for (state, name), values in canonical(where.folder(1), MODEL).items():
        if state == "weight":
            assert torch.equal(torch.from_numpy(found["weights"][name]).double(), values)
