"""Ghost attention's records: what is sampled, what is shown, what is trained; parts, layouts and errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from alignment_world import RandomSource, write_records
from ghost_world import EOS, ROOT, TOOLS, TURNS, GhostWorld, make_ghost_world, run_tool, shape

from distributed import Ranks
from megallama.checkpoint.formats.native import write_store
from megallama.config import SCALAR
from megallama.data import Message, read_dialogues
from megallama.data.batch import IGNORE
from megallama.data.rows import DialogueLoader
from megallama.inference.sampling import Sampling
from megallama.rlhf.chat_model import Said, Script, converse
from megallama.rlhf.ghost.constraints import Instruction, answer_seed, ask, draw, is_short, listed, read_list
from megallama.rlhf.ghost.records import (
    PLACES,
    Recipe,
    at_first,
    everywhere,
    read_talks,
    sample,
    settled,
    training_messages,
)
from megallama.train.sft import encode
from megallama.train.trainer import NextToken

LISTS = {"hobby": ["tennis", "chess"], "language": ["French"], "figure": ["Napoleon", "Cleopatra", "Oscar Wilde"]}
RECIPE = Recipe(Sampling(max_new_tokens=16), seed=3, part=4)
USERS = ("Say red.", "Say green.", "Say blue.")
ANSWERS = ("red", "green indeed", "it is blue")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> GhostWorld:
    return make_ghost_world(tmp_path_factory.mktemp("ghost"))


def test_every_combination_of_constraints_is_drawn_and_half_are_shortened() -> None:
    drawn = [draw(LISTS, 7, n) for n in range(1400)]
    combinations = Counter(tuple(kind for kind, _ in one.constraints) for one in drawn)
    assert len(combinations) == 7 and all(150 < count < 250 for count in combinations.values())
    assert Counter(dict(one.constraints).get("figure") for one in drawn).keys() == {None, *LISTS["figure"]}
    short = [is_short(7, n) for n in range(1400)]
    assert sum(short) == 700 and short[:40] != [is_short(8, n) for n in range(40)]
    assert all(short[n] != short[n + 1] for n in range(0, 1400, 2)) and len(set(short[::2])) == 2
    assert drawn[:50] == [draw(LISTS, 7, n) for n in range(50)] != [draw(LISTS, 8, n) for n in range(50)]
    assert {one.constraints for one in (draw({"figure": ["X"]}, 1, n) for n in range(9))} == {(("figure", "X"),)}


def test_an_instruction_in_full_and_shortened() -> None:
    both = Instruction((("language", "French"), ("figure", "Napoleon")))
    assert both.full() == "Always answer in French. Always act as Napoleon from now on."
    assert both.short() == "Language: French. Figure: Napoleon."


def test_lists_are_read_out_of_answers() -> None:
    text = (
        "Sure!\n1. Tennis\n2) **Chess** - a board game\n 3. tennis\n* Oscar Wilde (1854-1900)\n- Hiking: walking far\n"
    )
    text += "12. \n• rock-climbing, indoors\n4. " + "x" * 61 + "\n3.5 is no entry\n5. [INST] no\n6. cut o"
    assert listed(text, False) == ["Tennis", "Chess", "Oscar Wilde", "Hiking", "rock-climbing"]
    assert listed(text)[-1] == "cut o"
    assert listed("I have no hobbies.") == []


def test_the_instruction_is_everywhere_when_sampled_and_at_first_when_trained(world: GhostWorld) -> None:
    form = world.open().form
    sampled = everywhere("Act as X.", USERS).messages(ANSWERS[:2])
    assert [m.content for m in sampled if m.role == "user"] == [f"Act as X.\n\n{user}" for user in USERS]
    for place in PLACES:
        messages = training_messages("Act as X.", USERS, ANSWERS, place)
        prompt = form.tokenizer.decode(form.prompt(messages[:-1]))
        assert prompt.count("Act as X.") == 1 and prompt.index("Act as X.") < prompt.index("Say red.")
        assert all(user in prompt for user in USERS) and "it is blue" not in prompt
    assert at_first("Act as X.", USERS, "system").messages([])[0] == Message("system", "Act as X.")
    assert at_first("Act as X.", USERS, "user").messages([]) == [Message("user", "Act as X.\n\nSay red.")]
    assert [m.train for m in messages if m.role == "assistant"] == [False, False, True]


@pytest.mark.parametrize("place", PLACES)
def test_only_the_last_answer_is_trained(world: GhostWorld, tmp_path: Path, place: str) -> None:
    """Through the files and loaders of sft: earlier labels are gone, and perturbing the model there changes nothing."""
    model = world.open(dtype="float64")
    talks, _ = read_talks(str(world.dialogues), 8)
    (record, *_) = sample(model, talks, LISTS, replace(RECIPE, place=place))
    path = tmp_path / "gatt.jsonl"
    write_records(path, [record])
    dialogues = read_dialogues(path)
    ((encoded, cut),) = encode(model.form, dialogues, 400)
    (batch,) = DialogueLoader([encoded], [[0]]).micros(0, 0, 1, 1, 1)
    answer = [*model.form.answer(record["messages"][-1]["content"]), EOS]
    assert not cut and batch.labels[batch.labels != IGNORE].tolist() == answer == batch.labels[-len(answer) :].tolist()
    assert batch.count == len(answer) > 1
    (logits,) = model.trainer.infer([batch], lambda logits, batch: logits.clone())
    loss = NextToken(model.trainer.config.model.vocab_size, model.mesh.tp)
    before = loss(logits.clone(), batch)[0]
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=logits.dtype)
    first = len(batch.labels) - len(answer)
    earlier, last = noise.clone(), noise.clone()
    earlier[first:], last[:first] = 0, 0
    assert torch.equal(loss(logits + earlier, batch)[0], before)
    assert not torch.equal(loss(logits + last, batch)[0], before)


def test_answers_are_sampled_turn_by_turn_under_the_instruction(world: GhostWorld) -> None:
    """Against a loop that spells the template out, one dialogue at a time."""
    model = world.open(dtype="float64")
    talks, _ = read_talks(str(world.dialogues), 8)
    found = {record["id"]: record for record in sample(model, talks, LISTS, RECIPE)}
    tokenizer, finished = model.form.tokenizer, 0
    for talk in talks:
        instruction, ids, answers = draw(LISTS, RECIPE.seed, talk.place), [], []
        for turn, user in enumerate(talk.users):
            ids += [tokenizer.bos, *tokenizer.encode(f"[INST] {instruction.full()}\n\n{user} [/INST]")]
            (said,) = model.answer([ids], RECIPE.sampling, [answer_seed(RECIPE.seed, talk.place, turn)])
            if not (said.finished and said.text):
                break
            answers.append(said.text)
            ids += [*model.form.answer(said.text), EOS]
        assert (talk.key in found) == (len(answers) >= 2)
        if talk.key in found:
            record = found[talk.key]
            finished += len(answers) == TURNS
            spoken = [m for m in record["messages"] if m["role"] == "assistant"]
            assert [m["content"] for m in spoken] == answers
            assert [m["weight"] for m in spoken] == [0] * (len(answers) - 1) + [1]
            assert record["turns"] == len(answers) and record["asked"] == TURNS
            shown = instruction.short() if record["short"] else instruction.full()
            assert record["messages"][0] == {"role": "system", "content": shown}
            assert record["instruction"] == instruction.full() and record["seed"] == 3 and record["temperature"] == 1.0
            assert record["constraints"] == dict(instruction.constraints) and record["model"] == str(world.model)
    assert len(found) >= 3 and finished >= 1 and len(found) < len(talks)


def test_a_dialogue_ends_where_there_is_no_room(world: GhostWorld) -> None:
    model = world.open()
    script = Script("", tuple(f"Say {n}." for n in range(40)))
    asked = len(model.form.prompt(script.messages([])))
    answer = len(model.form.answer("red")) + 1
    (answers,) = converse(model, [script], Sampling(8, 0), lambda n, turn: 0, lambda said: "red")
    lengths = [len(model.form.prompt(script.messages(["red"] * n))) for n in (len(answers) - 1, len(answers))]
    assert 10 < len(answers) < 40 and lengths[0] + 8 <= 512 < lengths[1] + 8
    assert asked + answer < 512
    assert converse(model, [script], Sampling(8, 0), lambda n, turn: 0, lambda said: "") == [[]]
    assert converse(model, [], Sampling(8, 0), lambda n, turn: 0, lambda said: "red") == []
    assert settled(Said("cut o", False)) == "" and settled(Said("whole", True)) == "whole"


def same_everywhere(rank: int, size: int, world: GhostWorld, tp: int, pp: int) -> list[dict]:
    talks, _ = read_talks(str(world.dialogues), 8)
    return sample(world.open(tp, pp, "float64"), talks[:9], LISTS, RECIPE)


@pytest.mark.parametrize(
    "size, layouts", [(2, [(2, 1), (1, 2), (1, 1)]), pytest.param(4, [(2, 1), (1, 2), (4, 1)], marks=pytest.mark.slow)]
)
def test_every_layout_makes_the_same_records(world: GhostWorld, size: int, layouts: list[tuple[int, int]]) -> None:
    alone = same_everywhere(0, 1, world, 1, 1)
    assert alone
    with Ranks(size) as ranks:
        for tp, pp in layouts:
            assert ranks.run(same_everywhere, world, tp, pp) == [alone] * size, (tp, pp)


def arguments(world: GhostWorld, output: Path, *more: object) -> list[object]:
    lists = ("--hobbies", world.lists["hobby"], "--figures", world.lists["figure"])
    plain = ("--model", world.model, "--tokenizer", world.tokenizer, "--dtype", "float32", "--max-new-tokens", 16)
    return ["dialogues", *plain, "--dialogues", world.dialogues, *lists, "--output", output, "--part", 2, *more]


def test_parts_that_are_there_are_kept_and_other_settings_refused(
    world: GhostWorld, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    run_tool("build_gatt_data", *arguments(world, whole))
    output = capfd.readouterr().out
    lines = (whole / "gatt.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert f"{whole}/gatt.jsonl: {len(records)} records, {sum(r['short'] for r in records)} with a shortened" in output
    assert f"{14 - len(records)} dialogues ended before their second answer: no record" in output
    assert len(read_dialogues(whole / "gatt.jsonl")) == len(records)
    assert sorted(p.name for p in (whole / "parts").iterdir()) == [f"part_{n:05d}.jsonl" for n in range(7)]
    expected = (whole / "gatt.jsonl").read_bytes()
    for name in ("gatt.jsonl", "parts/part_00003.jsonl", "parts/part_00006.jsonl"):
        (whole / name).unlink()
    kept = (whole / "parts/part_00001.jsonl").stat().st_mtime_ns
    run_tool("build_gatt_data", *arguments(world, whole))
    assert (whole / "gatt.jsonl").read_bytes() == expected
    assert (whole / "parts/part_00001.jsonl").stat().st_mtime_ns == kept
    capfd.readouterr()
    for more, name, then, now in (
        (("--seed", 1), "seed", "0", "1"),
        (("--temperature", 0.5), "temperature", "1.0", "0.5"),
    ):
        with pytest.raises(SystemExit):
            run_tool("build_gatt_data", *arguments(world, whole, *more))
        error = capfd.readouterr().err
        assert f"{whole} was begun with {name}={then}, now it is {now}; give what it was begun with" in error
        assert error.count("\n") == 1 and (whole / "gatt.jsonl").read_bytes() == expected


def wait_for(path: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, process.returncode
        time.sleep(0.002)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(world: GhostWorld, tmp_path: Path) -> None:
    """SIGKILL in a process of its own; then the same under torchrun with two ranks, then alone to compare with."""
    tool, environment = str(TOOLS / "build_gatt_data.py"), {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [tool, *map(str, arguments(world, tmp_path / "killed", "--dtype", "float64", "--part", 1))]
    process = subprocess.Popen([sys.executable, *line], env=environment)
    wait_for(tmp_path / "killed" / "parts" / "part_00002.jsonl", process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = len(list((tmp_path / "killed" / "parts").glob("*.jsonl")))
    assert 3 <= done < 14 and not (tmp_path / "killed" / "gatt.jsonl").exists()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *line]
    again = subprocess.run(torchrun, env=environment, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    run_tool("build_gatt_data", *arguments(world, tmp_path / "whole", "--dtype", "float64", "--part", 1))
    files = [sorted(p for p in (tmp_path / name).rglob("*.json*")) for name in ("killed", "whole")]
    assert len(files[0]) == len(files[1]) == 16
    for one, other in zip(*files, strict=True):
        assert one.read_bytes() == other.read_bytes(), one


def test_a_model_is_asked_for_lists(world: GhostWorld, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = world.open()
    said = [Said("1. Tennis\n2. chess", True), Said("- Chess\n- Golf\n- Sail", False), Said("none", True)]
    prompts: list[list[int]] = []

    def answer(given: list, sampling: Sampling, seeds: list[int]) -> list[Said]:
        prompts.extend(given)
        assert len(set(seeds)) == len(seeds)
        return said[: len(seeds)]

    model.answer = answer  # type: ignore[method-assign]
    assert ask(model, "hobby", 50, 3, Sampling(), 0) == ["Tennis", "chess", "Golf"]
    assert ask(model, "hobby", 2, 3, Sampling(), 0) == ["Tennis", "chess"]
    assert model.form.tokenizer.decode(prompts[0]) == "[INST] List 50 hobbies, one a line, numbered. [/INST]"
    with pytest.raises(ValueError, match=r"a list of up to 500 tokens behind a prompt of \d+ goes beyond the 512 of"):
        ask(model, "hobby", 2, 3, Sampling(500), 0)
    plain = ("--model", world.model, "--tokenizer", world.tokenizer, "--max-new-tokens", 16, "--output", tmp_path / "l")
    with pytest.raises(SystemExit):
        run_tool("build_gatt_data", "lists", *plain)
    error = capfd.readouterr().err
    assert "was asked for hobbies and gave no numbered or bulleted list but" in error and error.count("\n") == 1
    assert not list((tmp_path / "l").iterdir())


def refused(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which build_gatt_data refuses."""
    with pytest.raises(SystemExit) as end:
        run_tool("build_gatt_data", *arguments)
    error = capfd.readouterr().err + (f"{end.value.code}\n" if isinstance(end.value.code, str) else "")
    assert end.value.code and error.count("\n") == 1 and "Traceback" not in error
    return error


def test_errors_are_one_line_and_nothing_is_written(
    world: GhostWorld, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output, one, silent = tmp_path / "out", tmp_path / "one.jsonl", tmp_path / "silent.jsonl"
    write_records(one, [{"messages": [{"role": "user", "content": "Hello."}]}])
    write_records(silent, [{"messages": [{"role": "assistant", "content": "Hello."}]}])
    empty, reward = tmp_path / "empty.txt", tmp_path / "reward"
    empty.write_text("\n \n")
    write_store(RandomSource(replace(shape(64), head=SCALAR)), reward)
    good = arguments(world, output)
    assert "none of its 1 dialogues has 2 user turns or more" in refused(capfd, *good, "--dialogues", one)
    assert f"{silent}:1: field 'messages'" in refused(capfd, *good, "--dialogues", silent)
    assert f"{empty}: no entry of at most 60 characters" in refused(capfd, *good, "--figures", empty)
    assert "cannot be read (No such file" in refused(capfd, *good, "--figures", tmp_path / "no.txt")
    assert "is a reward model, which answers nothing" in refused(capfd, *good, "--model", reward)
    assert "has no tokenizer; give the one" in refused(
        capfd, *good[: good.index("--tokenizer")], *good[good.index("--dtype") :]
    )
    assert "parallel.tp=3" in refused(capfd, *good, "--tp", 3)
    room = refused(capfd, *good, "--max-new-tokens", 200)
    assert f"{world.dialogues}:1: 3 user turns with the instruction have" in room
    assert "answers of up to 200 do not fit beside them in the model's 512; lower --max-new-tokens or --turns" in room
    assert "temperature=-1.0" in refused(capfd, *good, "--temperature", -1)
    assert "no list of constraints; give at least one of --hobbies" in refused(
        capfd, *good[: good.index("--hobbies")], "--output", output
    )
    assert not output.exists()
    assert "all 14 dialogues ended before their second answer" in refused(capfd, *good, "--max-new-tokens", 1)
    assert not (output / "gatt.jsonl").exists()
    assert read_list(world.lists["hobby"]) == ["Tennis", "Chess"]
