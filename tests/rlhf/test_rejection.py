"""Rejection sampling: who wins, what is written, and that neither layout, batch, part nor a kill changes it."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from alignment_world import LAYOUTS, MODEL, RandomSource, World, config_of, make_world, write_records

from distributed import Ranks, forkserver
from megallama.alignment import JudgesConfig, RejectionConfig
from megallama.checkpoint.formats.native import write_store
from megallama.config import SCALAR, Config, GenerateConfig, ModelConfig
from megallama.data import load_tokenizer, read_dialogues, read_prompts
from megallama.model.canonical import HEAD, SCORE
from megallama.parallel.pieces import Rect
from megallama.rlhf.judges import SAFETY_LOGIT
from megallama.rlhf.rejection.candidates import Candidate, best, text_of
from megallama.rlhf.rejection.run import RejectionRun, run, score, seeds_of
from megallama.runtime.mesh import Mesh, build_mesh
from megallama.train.models import frozen, open_weights
from megallama.train.run import run_folder
from megallama.train.scoring import scores
from megallama.train.sources import chat_format

EOS = 2
FILES = ("bag.jsonl", "sft.jsonl", "curves.csv", "curves.png", "summary.json", "settings.json")
SMALL = replace(MODEL, hidden_size=16, num_key_value_heads=4, head=SCALAR)
"""A judge of another shape than the policy."""


class Ending(RandomSource):
    """A policy whose EOS has large logits, of either sign, so that many of its answers end soon."""

    factor = 9.0

    def read(self, name: str, rect: Rect, out: torch.Tensor) -> None:
        super().read(name, rect, out)
        if name == HEAD and rect.r0 <= EOS < rect.r1:
            out[EOS - rect.r0] *= self.factor


class Constant(RandomSource):
    """A judge that gives every answer the same score, which is 0."""

    value = 0.0

    def read(self, name: str, rect: Rect, out: torch.Tensor) -> None:
        super().read(name, rect, out)
        if name == SCORE:
            out.fill_(self.value)


class Broken(Constant):
    value = math.nan


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("rejection")
    world = make_world(root)
    write_store(Ending(MODEL, 8), root / "chatty")
    write_store(RandomSource(SMALL, 4), root / "small")
    write_store(Constant(replace(MODEL, head=SCALAR)), root / "constant")
    write_store(Broken(replace(MODEL, head=SCALAR)), root / "broken")
    records = [json.loads(line) for line in world.prompts.read_text().splitlines()[:10]]
    turns = [("user", "Say the word red."), ("assistant", "red."), ("user", "Again.")]
    records.append({"id": "turns", "messages": [{"role": r, "content": c} for r, c in turns], "source": "people"})
    return world._replace(prompts=write_prompts(root / "prompts.jsonl", records), policy=root / "chatty")


def write_prompts(path: Path, records: list[dict[str, Any]]) -> Path:
    write_records(path, records)
    return path


def rejection_config(world: World, name: str, layout: tuple[int, int, int] = (1, 1, 1), **section) -> Config:
    given = {
        "model": str(world.policy),
        "prompts": str(world.prompts),
        "samples": 3,
        "temperatures": (0.7, 1.3),
        "max_new_tokens": 6,
        "part": 4,
        "version": "v1",
    }
    config = config_of(world, name, layout)
    judges = JudgesConfig(str(world.judges[0]), str(world.root / "small"), threshold=0.45)
    # The shapes come from the weights.
    return replace(config, model=ModelConfig(), judges=judges, rejection=RejectionConfig(**given | section))


def sample(config: Config) -> Path:
    """A whole run in this process, as the stage does it; its folder."""
    with run_folder(config, Mesh()):
        RejectionRun(config, Mesh()).run()
    return Path(config.output_dir)


def in_the_running(world: World, found: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Of the answers to one prompt, those of which the best must win."""
    form = chat_format(replace(rejection_config(world, "any"), model=MODEL))
    usable = [x for x in found if x["key"] == key and form.answer(x["text"])]
    return [x for x in usable if x["finish"] == "eos"] or usable


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sampled(folder: Path) -> list[dict[str, Any]]:
    return [line for part in sorted((folder / "parts").iterdir()) for line in lines(part)]


@pytest.fixture(scope="module")
def first(world: World) -> Path:
    """The run that others are compared with."""
    return sample(rejection_config(world, "first"))


def test_every_prompt_has_its_answers_in_order(world, first):
    found = sampled(first)
    keys = [prompt.key for prompt in read_prompts(world.prompts)]
    assert [(x["key"], x["temperature"], x["sample"]) for x in found] == [
        (key, temperature, n) for key in keys for temperature in (0.7, 1.3) for n in range(3)
    ]
    assert [len(lines(part)) for part in sorted((first / "parts").iterdir())] == [24, 24, 18]
    seeds = [seed for place in range(11) for row in seeds_of(7, place, 2, 3) for seed in row]
    assert [x["seed"] for x in found] == seeds and len(set(seeds)) == len(seeds) and max(seeds) < 2**53
    assert {x["finish"] for x in found} == {"eos", "length"}
    for x in found:
        assert (x["ids"][-1] == EOS) == (x["finish"] == "eos") and EOS not in x["ids"][:-1]
        assert x["log_prob"] < 0 and x["bag"] is None and x["version"] == "v1"


def test_scores_are_those_of_the_judges_alone_and_the_rule_chooses(world, first):
    config = rejection_config(world, "first")
    form = chat_format(replace(config, model=MODEL))
    prompts = {prompt.key: prompt for prompt in read_prompts(world.prompts)}
    found = sampled(first)
    judged = {}
    for name, path in (("helpfulness", config.judges.helpfulness), ("safety", config.judges.safety)):
        judge = frozen(config, Mesh(), open_weights(path))
        judged[name] = [
            scores(judge, [np.array(form.prompt(prompts[x["key"]].messages) + x["ids"])]).item() for x in found
        ]
    assert [x["helpfulness"] for x in found] == pytest.approx(judged["helpfulness"], abs=1e-12)
    assert [x["safety"] for x in found] == pytest.approx(judged["safety"], abs=1e-12)
    limit = math.log(0.45 / 0.55)
    by_safety = [prompts[x["key"]].is_safety or x["safety"] < limit for x in found]
    assert {True, False} == set(by_safety) and limit > SAFETY_LOGIT
    decides = ["safety" if safe else "helpfulness" for safe in by_safety]
    assert [x["combined"] for x in found] == [x[name] for x, name in zip(found, decides, strict=True)]


def test_the_best_finished_answer_becomes_a_dialogue(world, first):
    prompts = {prompt.key: prompt for prompt in read_prompts(world.prompts)}
    found, picks = sampled(first), {line["id"]: line for line in lines(first / "sft.jsonl")}
    for key, prompt in prompts.items():
        top = max(in_the_running(world, found, key), key=lambda x: x["combined"])
        pick = picks[key]
        *asked, answer = pick["messages"]
        assert answer == {"role": "assistant", "content": top["text"]}
        assert [(m["role"], m["content"]) for m in asked] == [(m.role, m.content) for m in prompt.messages]
        assert pick["scores"] == {name: top[name] for name in ("helpfulness", "safety", "combined")}
        assert (pick["temperature"], pick["sample"], pick["seed"]) == (top["temperature"], top["sample"], top["seed"])
        assert pick["model_version"] == "v1"
    (dialogue,) = [d for d in read_dialogues(first / "sft.jsonl") if len(d.messages) == 4]
    assert [m.train for m in dialogue.messages if m.role == "assistant"] == [False, True]
    assert dialogue.source == "people" and picks["p0"]["source"] == "prompts"
    assert len(read_dialogues(first / "bag.jsonl")) == len(prompts)


def test_curves_and_summary_are_of_the_sampled_answers(first):
    found, summary = sampled(first), json.loads((first / "summary.json").read_text())
    hot = np.array([x["combined"] for x in found if x["temperature"] == 1.3]).reshape(-1, 3)
    told = summary["temperatures"]["1.3"]
    expected = [hot.mean(), hot.max(1).mean(), np.median(hot, 1).mean()]
    assert [told["reward_mean"], told["reward_max"], told["reward_median"]] == pytest.approx(expected)
    rewards = {t: row["reward_max"] for t, row in summary["temperatures"].items()}
    assert summary["best_temperature"] == float(max(rewards, key=rewards.__getitem__))
    ended = [x["finish"] == "eos" for x in found if x["temperature"] == 0.7]
    assert summary["temperatures"]["0.7"]["finished"] == pytest.approx(np.mean(ended))
    assert summary["picked_by_version"] == {"v1": 11} and summary["prompts_without_answer"] == []
    assert (first / "curves.csv").read_text().count("\n") == 7
    assert (first / "curves.png").read_bytes().startswith(b"\x89PNG")


def close(a: list[dict], b: list[dict], tolerance: float = 1e-9) -> None:
    """Records are equal, their measured numbers up to rounding."""
    measured = ("log_prob", "helpfulness", "safety", "combined")
    assert [{k: v for k, v in x.items() if k not in measured} for x in a] == [
        {k: v for k, v in x.items() if k not in measured} for x in b
    ]
    for name in measured:
        assert [x[name] for x in a] == pytest.approx([x[name] for x in b], abs=tolerance)


def test_parts_and_rows_change_nothing(world, first):
    config = rejection_config(world, "one-part", part=64)
    folder = sample(replace(config, generate=GenerateConfig(rows=5)))
    close(sampled(folder), sampled(first))
    assert len(list((folder / "parts").iterdir())) == 1


def sample_on_rank(rank: int, size: int, config: Config) -> None:
    mesh = build_mesh(config.parallel.tp, config.parallel.pp, MODEL.num_key_value_heads, False, torch.device("cpu"))
    with run_folder(config, mesh):
        RejectionRun(config, mesh).run()


@pytest.mark.parametrize(
    "layout", [pytest.param(x, marks=[pytest.mark.slow] * (x[0] * x[1] * x[2] > 2)) for x in LAYOUTS[1:]], ids=str
)
def test_every_layout_writes_the_same_records(world, first, layout):
    config = rejection_config(world, "layouts", layout)
    with Ranks(math.prod(layout)) as ranks:
        ranks.run(sample_on_rank, config)
    folder = Path(config.output_dir)
    close(sampled(folder), sampled(first))
    for name in ("bag.jsonl", "sft.jsonl"):
        mine, theirs = (
            [{k: v for k, v in x.items() if k not in ("scores", "log_prob")} for x in lines(f / name)]
            for f in (folder, first)
        )
        assert mine == theirs


def test_a_killed_run_goes_on_to_the_same_bytes(world, tmp_path):
    many = rejection_config(world, "killed", part=1, samples=8)
    whole = sample(replace(many, output_dir=str(tmp_path / "whole")))
    config = replace(many, output_dir=str(tmp_path / "killed"))
    process = forkserver().Process(target=run, args=(config,))
    process.start()
    parts = tmp_path / "killed" / "parts"
    end = time.monotonic() + 100
    while len(list(parts.glob("*.jsonl"))) < 3 and time.monotonic() < end:
        time.sleep(0.002)
    process.kill()
    process.join()
    done = sorted(parts.glob("*.jsonl"))
    assert process.exitcode == -9 and 3 <= len(done) < 11, "it was to be killed in the middle"
    assert not (tmp_path / "killed" / "sft.jsonl").exists()
    (parts / f"part_{len(done):05d}.jsonl.tmp").write_text('{"key": "half a')
    times = [path.stat().st_mtime_ns for path in done]
    assert run(config) == 0
    assert [path.stat().st_mtime_ns for path in done] == times, "what was there is not sampled again"
    names = [*FILES, *(f"parts/{path.name}" for path in sorted((whole / "parts").iterdir()))]
    assert len(names) == 6 + 11
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_finished_run_is_only_summed_up_again(world, tmp_path, capsys):
    config = replace(rejection_config(world, "again"), output_dir=str(tmp_path))
    sample(config)
    before = {name: (tmp_path / name).read_bytes() for name in FILES}
    (tmp_path / "sft.jsonl").unlink()
    start = capsys.readouterr()
    sample(config)
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == before
    told = capsys.readouterr().out
    assert "prompts 4/11" in start.out and "reward mean" in start.out and "prompts" not in told.splitlines()[0]
    assert "best temperature for 3 samples: " in told and "11 dialogues (11 of v1)" in told


def test_parts_of_other_settings_are_refused(world, tmp_path):
    config = replace(rejection_config(world, "settings"), output_dir=str(tmp_path))
    sample(config)
    changes = {
        "train.seed=7, now it is 8": replace(config, train=replace(config.train, seed=8)),
        "rejection.samples=3, now it is 4": replace(config, rejection=replace(config.rejection, samples=4)),
        "rejection.model='": replace(config, rejection=replace(config.rejection, model=str(world.root / "policy"))),
        "judges.safety='": replace(config, judges=replace(config.judges, safety=None)),
    }
    for words, changed in changes.items():
        with pytest.raises(ValueError, match="was begun with") as error:
            sample(changed)
        assert words in str(error.value)
    prompts = write_prompts(tmp_path / "more.jsonl", [{"prompt": "Say the word red."}])
    with pytest.raises(ValueError, match=r"rejection\.prompts='[0-9a-f]{64}'"):
        sample(replace(config, rejection=replace(config.rejection, prompts=str(prompts))))


def test_changed_parts_are_noticed(world, tmp_path):
    config = replace(rejection_config(world, "changed"), output_dir=str(tmp_path))
    part = sample(config) / "parts" / "part_00001.jsonl"
    part.write_text("".join(part.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match="holds 5 answers to 'p4' where 6 to 'p4' are due"):
        sample(config)
    for line in ("half a line", '{"key": "p4"}'):
        part.write_text(line)
        with pytest.raises(ValueError, match="has a line that is no answer"):
            sample(config)


def test_duplicates_keep_their_own_groups(world, tmp_path):
    prompts = write_prompts(tmp_path / "twice.jsonl", [{"prompt": "Say the word red."}] * 3)
    config = rejection_config(world, "twice", prompts=str(prompts))
    folder = sample(replace(config, output_dir=str(tmp_path / "run")))
    picks, found = lines(folder / "sft.jsonl"), sampled(folder)
    assert len(picks) == 3 and len({pick["id"] for pick in picks}) == 3
    assert picks[1]["id"] == picks[0]["id"] + "#2"
    groups = [[x for x in found if x["key"] == pick["id"]] for pick in picks]
    assert [len(group) for group in groups] == [6, 6, 6]
    assert groups[0] != groups[1] and len({x["seed"] for x in found}) == 18
    assert all(pick["seed"] in {x["seed"] for x in group} for pick, group in zip(picks, groups, strict=True))


def candidate(text: str, combined: float, finish: str = "eos", **more) -> Candidate:
    fields = {"bag": None, "version": "v2", "temperature": 1.0, "sample": 0} | more
    return Candidate("p", seed=1, finish=finish, text=text, ids=(5, EOS), log_prob=-1.0, combined=combined, **fields)


def test_who_wins(world):
    form = chat_format(config_of(world, "wins"))
    low, high, cut = candidate("red", -1.0), candidate("blue", 0.0), candidate("green", 9.0, "length")
    assert best([low, high, cut], form) == high, "a score of 0 is a score"
    assert best([cut, candidate("pink", 3.0, "length")], form) == cut
    assert best([candidate("", 5.0), low, cut], form) == low
    assert best([candidate("", 5.0), cut], form) == cut, "nothing that has ended can be learnt"
    assert best([candidate("", 5.0), candidate(" ", 6.0, "length")], form) is None
    equals = [candidate("a", 1.0, bag=0), candidate("b", 1.0, bag=1), candidate("c", 1.0), candidate("d", 1.0)]
    for n in range(4):
        assert best([low, *equals[n:]], form) == equals[n], "of equals the first"


def test_text_that_fine_tuning_would_refuse_does_not_win(world):
    form = chat_format(config_of(world, "refused"))
    refused = candidate("Say \ud800", 5.0)
    assert best([refused, candidate("red", 1.0)], form).text == "red"
    tokenizer = load_tokenizer(world.tokenizer)
    assert text_of(form, [5, tokenizer.vocab_size]) == "", "no such token"
    assert text_of(form, [*form.answer("red blue"), EOS]) == "red blue"


def test_equal_scores_and_zero_give_the_first_answer_at_the_first_temperature(world, tmp_path):
    config = replace(rejection_config(world, "zero"), output_dir=str(tmp_path))
    config = replace(config, judges=JudgesConfig(str(world.root / "constant")))
    folder = sample(config)
    assert {(x["helpfulness"], x["safety"], x["combined"]) for x in sampled(folder)} == {(0.0, None, 0.0)}
    for pick in lines(folder / "sft.jsonl"):
        assert pick["seed"] == in_the_running(world, sampled(folder), pick["id"])[0]["seed"]
        assert pick["scores"]["combined"] == 0.0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["best_temperature"] == 0.7


def test_bags_compete_with_their_scores_by_this_runs_judges(world, first, tmp_path):
    base = rejection_config(world, "later", bags=(str(first),), version="v2")
    config = replace(base, train=replace(base.train, seed=8), output_dir=str(tmp_path / "later"))
    config = replace(config, judges=replace(config.judges, helpfulness=str(world.judges[1])))
    folder = sample(config)
    found, earlier = sampled(folder), {line["id"]: line for line in lines(first / "bag.jsonl")}
    old, own = [x for x in found if x["bag"] == 0], [x for x in found if x["bag"] is None]
    assert len(own) == 66 and [x["key"] for x in old] == list(earlier)
    assert all(x["version"] == "v1" and x["ids"] == earlier[x["key"]]["ids"] for x in old)
    assert any(x["helpfulness"] != earlier[x["key"]]["scores"]["helpfulness"] for x in old)
    picks = {line["id"]: line for line in lines(folder / "sft.jsonl")}
    for key in earlier:
        top = max(x["combined"] for x in in_the_running(world, found, key))
        assert picks[key]["scores"]["combined"] == top
    versions = {pick["model_version"] for pick in picks.values()}
    summary = json.loads((folder / "summary.json").read_text())
    assert versions == {"v1", "v2"} == set(summary["picked_by_version"])
    assert {line["model_version"] for line in lines(folder / "bag.jsonl")} == {"v2"}, "a bag is of own answers"
    hot = [x["combined"] for x in own if x["temperature"] == 1.3]
    assert summary["temperatures"]["1.3"]["reward_mean"] == pytest.approx(np.mean(hot)), "curves are of own answers"


def test_the_same_answers_tie_and_the_earlier_version_wins(world, first, tmp_path):
    """Same model, seed and judges: each answer of the bag is sampled again, and must not score otherwise."""
    base = rejection_config(world, "tie", bags=(str(first),), version="v2")
    folder = sample(replace(base, output_dir=str(tmp_path)))
    picks = lines(folder / "sft.jsonl")
    assert {pick["model_version"] for pick in picks} == {"v1"}
    for x in (x for x in sampled(folder) if x["bag"] == 0):
        twins = [y for y in sampled(folder) if y["bag"] is None and (y["key"], y["ids"]) == (x["key"], x["ids"])]
        assert twins and all(y["combined"] == x["combined"] for y in twins)


def test_bags_that_do_not_fit_are_refused(world, first, tmp_path):
    def refused(words: str, bag: Path, **section) -> None:
        base = rejection_config(world, "bags", bags=(str(bag),), **section)
        with pytest.raises(ValueError, match=words):
            RejectionRun(replace(base, output_dir=str(tmp_path / "run")), Mesh())

    def copy(name: str, change) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        write_records(folder / "bag.jsonl", [change(line) for line in lines(first / "bag.jsonl")])
        (folder / "settings.json").write_bytes((first / "settings.json").read_bytes())
        return folder

    refused("has no bag.jsonl", tmp_path)
    refused("names output_dir", tmp_path / "run")
    refused("answers to none of the 11 prompts", copy("strange", lambda line: line | {"id": line["id"] + "x"}))
    other = copy("other", lambda line: line | {"messages": [{"role": "user", "content": "No."}, line["messages"][-1]]})
    refused(r"bag.jsonl:1: id 'p0' names another prompt than at .*prompts.jsonl:1", other)
    refused(r"bag.jsonl:1: prompt and answer have \d+ tokens, but data.seq_length=64",
            copy("long", lambda line: line | {"ids": [5] * 60}))  # fmt: skip
    refused(r"bag.jsonl:1: no record of a bag \(KeyError: 'ids'\)",
            copy("bad", lambda line: {k: v for k, v in line.items() if k != "ids"}))  # fmt: skip
    (other / "settings.json").write_text('{"format": "other"}')
    refused("another tokenizer or chat template", other)


def test_answers_that_end_at_once_are_scored_but_not_learnt(world, tmp_path, capsys):
    write_store(Always(MODEL), tmp_path / "silent")
    config = rejection_config(world, "silent", model=str(tmp_path / "silent"), part=64)
    folder = sample(replace(config, output_dir=str(tmp_path / "run")))
    found = sampled(folder)
    assert {tuple(x["ids"]) for x in found} == {(EOS,)} and {x["text"] for x in found} == {""}
    assert all(math.isfinite(x["combined"]) for x in found)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["empty_answers"] == 66 and summary["picked"] == 0
    assert summary["prompts_without_answer"] == [prompt.key for prompt in read_prompts(world.prompts)]
    assert (folder / "sft.jsonl").read_text() == (folder / "bag.jsonl").read_text() == ""
    assert "11 prompts without a usable answer: p0, p1, p2, p3, p4, p5, p6, p7, …" in capsys.readouterr().out


class Always(RandomSource):
    """EOS at once: the embedding of a prompt's last token alone counts, and only EOS has a logit."""

    def read(self, name: str, rect: Rect, out: torch.Tensor) -> None:
        super().read(name, rect, out)
        if name == HEAD:
            out.zero_()
            if rect.r0 <= EOS < rect.r1:
                out[EOS - rect.r0] = 1e3
        elif name.endswith("embed_tokens.weight"):
            out.fill_(1.0)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            out.zero_()


def test_answers_that_never_end_win_only_among_themselves(world, tmp_path, capsys):
    config = rejection_config(world, "cut", model=str(world.root / "policy"), max_new_tokens=2, temperatures=(1.0,))
    folder = sample(replace(config, output_dir=str(tmp_path)))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["picked_cut_off"] > 0
    assert f"{summary['picked_cut_off']} of them cut off: " in capsys.readouterr().out


def test_a_score_that_is_no_number_names_the_prompt_and_leaves_no_part(world, tmp_path, capfd):
    config = replace(rejection_config(world, "nan"), output_dir=str(tmp_path))
    broken = replace(config, judges=replace(config.judges, safety=str(world.root / "broken")))
    with pytest.raises(SystemExit):
        run(broken)
    error = capfd.readouterr().err
    assert "part 0): ValueError: 24 of 24 safety scores are not finite, the first that of an answer to prompt" in error
    assert f"'p0' ({world.prompts}:1)" in error and error.count("\n") == 1
    assert list((tmp_path / "parts").iterdir()) == []
    sample(config)  # nothing of the failed run binds it
    assert (tmp_path / "sft.jsonl").exists()


def test_equal_rows_are_scored_once(world):
    prompts = RejectionRun(rejection_config(world, "once"), Mesh()).prompts

    class Judge:
        threshold, safety, seen = 0.15, None, 0

        def helpfulness(self, rows):
            self.seen = len(rows)
            return torch.arange(len(rows), dtype=torch.float64)

    judges = Judge()
    three = [candidate("a", 0.0), candidate("b", 0.0)._replace(ids=(7, EOS)), candidate("a", 0.0, sample=4)]
    found = score(judges, [(prompts[0], one) for one in three])
    assert judges.seen == 2 and [x.combined for x in found] == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rejection": {"model": None}}, "rejection.model is empty"),
        ({"rejection": {"prompts": None}}, "rejection.prompts is empty"),
        ({"judges": {"helpfulness": None}}, "judges.helpfulness is empty"),
        ({"rejection": {"model": "small"}}, "is a reward model, which writes no answers"),
        ({"judges": {"safety": "policy"}}, "judges.safety=.*policy is a language model"),
        ({"data": {"seq_length": 12}}, r"prompts.jsonl:\d+: the prompt has \d+ tokens.* within data.seq_length=12"),
        ({"data": {"tokenizer": None}}, "data.tokenizer is empty"),
        ({"data": {"seq_length": 200}}, "data.seq_length=200 is longer than model.max_position_embeddings=96"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_said(world, tmp_path, change, words):
    config = replace(rejection_config(world, "wrong"), output_dir=str(tmp_path / "run"))
    for section, values in change.items():
        where = {k: str(world.root / v) if v in ("small", "policy") else v for k, v in values.items()}
        config = replace(config, **{section: replace(getattr(config, section), **where)})
    with pytest.raises(ValueError, match=words):
        RejectionRun(config, Mesh())
    assert not (tmp_path / "run").exists()


def test_a_judge_must_know_the_policys_tokens(world, tmp_path):
    write_store(RandomSource(replace(SMALL, vocab_size=300)), tmp_path / "few")
    config = rejection_config(world, "few")
    with pytest.raises(ValueError, match=r"judges.safety=.* has a vocabulary of 300, the policy one of 320"):
        RejectionRun(replace(config, judges=replace(config.judges, safety=str(tmp_path / "few"))), Mesh())
