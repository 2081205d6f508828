"""Supervised fine-tuning: what is learnt, in every layout; packing that leaks nothing; what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from alignment_world import LAYOUTS, MODEL, World, config_of, differences, make_world, train_on_rank, write_records

from distributed import Ranks
from megallama.alignment import RecordsConfig, SftConfig
from megallama.config import ChatConfig, Config
from megallama.data import Message, load_tokenizer
from megallama.data.batch import IGNORE
from megallama.data.rows import DialogueLoader
from megallama.runtime.mesh import Mesh
from megallama.runtime.metrics import read_metrics
from megallama.train import sft
from megallama.train.run import load_weights
from megallama.train.sources import chat_format
from megallama.train.trainer import NextToken, Trainer, empty_trainer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("sft"))


def sft_config(world: World, name: str, layout: tuple[int, int, int] = (1, 1, 1), **sections) -> Config:
    config = config_of(world, name, layout)
    section = SftConfig(sources=(RecordsConfig(str(world.dialogues)),), epochs=2)
    train = replace(config.train, steps=0)
    return replace(config, **{"sft": section, "train": train} | sections)


def trainer_of(config: Config) -> Trainer:
    trainer = empty_trainer(replace(config, train=replace(config.train, steps=9)), Mesh())
    load_weights(trainer, config.checkpoint.load.removeprefix("weights:"))
    return trainer


def test_every_layout_sees_the_same_run(world):
    runs = {}
    for layout in LAYOUTS:
        config = sft_config(world, "layouts", layout)
        with Ranks(layout[0] * layout[1] * layout[2]) as ranks:
            runs[layout] = ranks.run(train_on_rank, config, sft.sft_task, empty_trainer)[0]
    alone = runs.pop((1, 1, 1))
    assert alone[-1]["loss"] < 0.9 * alone[0]["loss"], "nothing was learnt"
    assert "valid_loss" in alone[-1]
    for layout, run in runs.items():
        assert differences(alone, run) < 1e-9, layout


def test_the_last_step_takes_what_is_left_and_the_loss_is_a_mean_over_answer_tokens(world):
    config, task = sft.sft_task(sft_config(world, "tokens"), Mesh())
    loader = task.train
    assert config.train.steps == -(-len(loader) // 8) and len(loader) % 8
    trainer = trainer_of(config)
    first = 8 * (config.train.steps - 1)
    stats = trainer.step(loader.micros(first, 0, 1, 2, 4), NextToken(MODEL.vocab_size, Mesh().tp))
    tokens = [n for sequence in loader.sequences[first:] for n in sequence]
    assert stats.valid == sum(int(loader.dialogues[n].train.sum()) for n in tokens)
    again = trainer_of(config)
    each = [
        again.step(
            DialogueLoader([loader.dialogues[n]], [[0]]).micros(0, 0, 1, 1, 1), NextToken(MODEL.vocab_size, Mesh().tp)
        )
        for n in tokens[:1]
    ]
    assert each[0].valid == int(loader.dialogues[tokens[0]].train.sum())


def test_labels_are_the_answers_and_their_eos_alone(world):
    config = sft_config(world, "labels")
    form = chat_format(config)
    messages = (Message("user", "Say the word red."), Message("assistant", "red red."),
                Message("user", "Say the word blue."), Message("assistant", "blue."))  # fmt: skip
    dialogue = form.dialogue(messages)
    (batch,) = DialogueLoader([dialogue], [[0]]).micros(0, 0, 1, 1, 1)
    learnt = batch.labels[batch.labels != IGNORE].tolist()
    eos = load_tokenizer(world.tokenizer).eos
    assert learnt == [*form.answer("red red."), eos, *form.answer("blue."), eos]
    at = (batch.labels != IGNORE).nonzero()[:, 0]
    assert batch.tokens[1:][at[:-1]].tolist() == learnt[:-1]  # each label is the token that follows
    assert batch.count == len(learnt)


def test_speed_is_counted_in_tokens_without_padding(world):
    config, task = sft.sft_task(sft_config(world, "volume"), Mesh())
    lengths = [[len(task.train.dialogues[n].ids) - 1 for n in sequence] for sequence in task.train.sequences]
    assert task.train.volume(1, 2) == (sum(lengths[1]) + sum(lengths[2]), len(lengths[1]) + len(lengths[2]))
    assert task.train.volume(0, 10**6).tokens == sum(map(sum, lengths))
    assert task.train.volume(len(lengths), 3) == (0, 0)
    batch = task.train.micros(1, 0, 1, 2, 1)[0]
    assert batch.length == task.train.volume(1, 2).tokens and len(batch.bounds) - 1 == task.train.volume(1, 2).rows
    records = train_on_rank(0, 1, sft_config(world, "volume"), sft.sft_task, empty_trainer)
    assert records[-1]["consumed_tokens"] == sum(map(sum, lengths))
    for record, first in zip(records, range(0, len(lengths), config.train.global_batch_size), strict=True):
        tokens = task.train.volume(first, config.train.global_batch_size).tokens
        assert record["tokens_per_second"] * record["step_seconds"] == pytest.approx(tokens)


def test_a_separator_stands_between_prompt_and_answer(world):
    config = sft_config(world, "separator", chat=ChatConfig(separator="<ans>"))
    separator = load_tokenizer(world.tokenizer).token_id("<ans>")
    dialogue = chat_format(config).dialogue((Message("user", "Say it."), Message("assistant", "red.")))
    first = int(np.flatnonzero(dialogue.train)[0])
    assert dialogue.ids[first - 1] == separator and not dialogue.train[first - 1]
    with pytest.raises(ValueError, match="'<no>' is no single token"):
        chat_format(replace(config, chat=ChatConfig(separator="<no>")))


def logits_and_gradients(config: Config, loader: DialogueLoader, rows: int) -> tuple[list, list, float]:
    trainer = trainer_of(config)
    micros = loader.micros(0, 0, 1, rows, 1)
    (logits,) = trainer.infer(micros, lambda output, batch: output[batch.labels != IGNORE])
    stats = trainer.step(micros, NextToken(MODEL.vocab_size, Mesh().tp))
    buckets = [bucket for held in trainer.optimizer.buckets.values() for bucket in held]
    return (
        logits,
        [bucket.exp_avg.clone() for bucket in buckets],
        stats.loss,
    )  # the first moment is the gradient's share


def test_packed_equals_unpacked(world):
    """Neither attention nor positions nor loss leak from one dialogue of a sequence to another."""
    config, task = sft.sft_task(sft_config(world, "packing"), Mesh())
    dialogues = task.train.dialogues[:6]
    packed = logits_and_gradients(config, DialogueLoader(dialogues, [[0, 1, 2], [3, 4, 5]]), 2)
    apart = logits_and_gradients(config, DialogueLoader(dialogues, [[n] for n in range(6)]), 6)
    assert torch.allclose(packed[0], apart[0], atol=1e-12)
    for a, b in zip(packed[1], apart[1], strict=True):
        assert float(b.abs().max()) > 1e-4 and torch.allclose(a, b, atol=1e-13)
    leaking = logits_and_gradients(config, DialogueLoader(dialogues, [[0, 1, 2], [3, 4, 5]], isolate=False), 2)
    assert not torch.allclose(leaking[0], apart[0], atol=1e-4)


def test_turns_without_weight_carry_no_loss(world):
    """GAtt's earlier turns (weight 0): the loss is that of the last answer alone, computed here by hand."""
    config = sft_config(world, "weights")
    form = chat_format(config)
    turns = (Message("user", "Say the word red."), Message("assistant", "red.", train=False),
             Message("user", "Say the word blue."), Message("assistant", "blue."))  # fmt: skip
    dialogue, learnt = form.dialogue(turns), len(form.answer("blue.")) + 1
    micros = DialogueLoader([dialogue], [[0]]).micros(0, 0, 1, 1, 1)
    trainer = trainer_of(config)
    (logits,) = trainer.infer(micros, lambda output, batch: output[:, : MODEL.vocab_size])
    ids = torch.from_numpy(dialogue.ids)
    chances = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    stats = trainer.step(micros, NextToken(MODEL.vocab_size, Mesh().tp))
    assert stats.valid == learnt
    assert stats.loss == pytest.approx(-float(chances[-learnt:].mean()), abs=1e-12)


def test_steps_beyond_the_epochs_and_folders_of_other_stages_are_refused(world):
    config = sft_config(world, "beyond")
    with pytest.raises(
        ValueError, match=r"train\.steps=99, but the epochs of sft have \d+ samples, which are \d steps"
    ):
        sft.sft_task(replace(config, train=replace(config.train, steps=99)), Mesh())
    train_on_rank(0, 1, replace(config, train=replace(config.train, stop_after=1)), sft.sft_task, empty_trainer)

    def other(config, mesh):
        config, task = sft.sft_task(config, mesh)
        task.stage = "reward"
        return config, task

    with pytest.raises(ValueError, match="holds a run of stage sft, not of reward; set another output_dir"):
        train_on_rank(0, 1, config, other, empty_trainer)


def test_it_resumes_bitwise(world):
    whole, halves = sft_config(world, "whole"), sft_config(world, "halves")
    expected = train_on_rank(0, 1, whole, sft.sft_task, empty_trainer)
    half = replace(halves, train=replace(halves.train, stop_after=2))
    train_on_rank(0, 1, half, sft.sft_task, empty_trainer)
    assert len(read_metrics(halves.output_dir)) == 2
    assert differences(expected, train_on_rank(0, 1, halves, sft.sft_task, empty_trainer)) == 0.0


def test_shares_mix_sources_and_held_out_files_are_reported(world):
    config = sft_config(world, "mix")
    section = SftConfig(
        sources=(RecordsConfig(str(world.dialogues)), RecordsConfig(str(world.prompts.with_name("more.jsonl")), 0.25)),
        valid=(str(world.dialogues),),
        epochs=1,
    )
    write_records(world.prompts.with_name("more.jsonl"), [{"prompt": "Say it.", "response": "teal."}] * 8)
    _, task = sft.sft_task(replace(config, sft=section), Mesh())
    taken = [n for sequence in task.train.sequences for n in sequence]
    assert len(taken) == 64 and sum(n >= 48 for n in taken) == 16  # 48 once, a quarter of 64 from the eight others
    assert len(task.valid) > 0 and set(task.fingerprints) == {
        "format", *(f"data {path}" for path in (*(s.path for s in section.sources), str(world.dialogues)))
    }  # fmt: skip


BAD = {
    "unknown role": ({"messages": [{"role": "judge", "content": "x"}]}, ["judge", ":1"]),
    "empty answer": ({"prompt": "Say it.", "response": "  "}, ["empty answer", ":1"]),
    "tags": ({"prompt": "[INST] hi", "response": "x"}, ["[INST]", ":1"]),
    "nothing left of the answer": (
        {"prompt": "Say the word " + "red " * 80, "response": "red."},
        [":1", "data.seq_length=64"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records_are_named(world, tmp_path, case):
    record, words = BAD[case]
    write_records(tmp_path / "bad.jsonl", [record])
    config = sft_config(world, "bad", sft=SftConfig(sources=(RecordsConfig(str(tmp_path / "bad.jsonl")),)))
    with pytest.raises(ValueError) as caught:
        sft.sft_task(config, Mesh())
    for word in [*words, "bad.jsonl"]:
        assert word in str(caught.value)


def test_the_command_line(world, tmp_path, capfd):
    """As a user types it: the shape comes from the weights, the recipe from the paper."""
    from megallama.cli import main

    line = [
        "sft", "--checkpoint.load", f"weights:{world.policy}", "--data.tokenizer", str(world.tokenizer),
        "--data.seq_length", "64", "--sft.sources", json.dumps([{"path": str(world.dialogues)}]), "--train.dtype",
        "float32", "--train.global_batch_size", "4", "--output_dir", str(tmp_path / "run"),
    ]  # fmt: skip
    assert main(line) == 0
    records = read_metrics(tmp_path / "run")
    text = (Path(tmp_path) / "run" / "config.yaml").read_text()
    assert "hidden_size: 32" in text and "mask_documents: true" in text
    assert max(record["lr"] for record in records) <= 2e-5
    assert main([*line[:1], *line[3:], "--output_dir", str(tmp_path / "other")]) == 2
    assert "set it to weights:FOLDER" in capfd.readouterr().err
    follow = ["sft", "--checkpoint.load", f"weights:{tmp_path / 'run'}", *line[7:]]
    assert follow[3] == "--sft.sources" and main([*follow, "--output_dir", str(tmp_path / "next")]) == 0
    text = (tmp_path / "next" / "config.yaml").read_text()  # tokenizer and longest sequence came along
    assert f"tokenizer: {world.tokenizer}" in text and "seq_length: 96" in text
    assert main([*line, "--model.hidden_size", "64", "--output_dir", str(tmp_path / "other")]) == 2
    assert "hidden_size is 32 there, 64 here" in capfd.readouterr().err
