"""Retention: rules by example, counts by hand, the instruction in the first turn alone, the end of the context."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from alignment_world import write_records
from ghost_world import BriefSource, GhostWorld, make_ghost_world, run_tool, shape

from megallama.checkpoint.formats.native import write_store
from megallama.inference.sampling import Sampling
from megallama.rlhf.ghost.attributes import Attribute, is_written_in, known_attributes, read_attributes
from megallama.rlhf.ghost.retention import (
    SILENCE,
    Count,
    Trial,
    answers_of,
    count,
    count_kinds,
    joined_prompts,
    overflow,
    read_long_talks,
    trials_of,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> GhostWorld:
    world = make_ghost_world(tmp_path_factory.mktemp("retention"), context=1024)
    write_records(world.root / "prompts.jsonl", [{"prompt": f"Say {n}."} for n in range(25)])
    return world


SAID = {
    "English": "The rain is not what you and I want.",
    "French": "Je pense que la pluie n'est pas pour nous.",
    "German": "Ich mag den Regen nicht, aber die Sonne ist da.",
    "Spanish": "La lluvia es muy buena para los campos y no me molesta.",
    "Italian": "La pioggia non è il mio tempo, ma sono felice che piova.",
    "Portuguese": "A chuva não é o meu tempo favorito, mas eu fico em casa.",
    "Dutch": "Het is niet mijn weer, maar de regen is goed voor het land.",
    "Russian": "Я люблю дождь, OK?",
    "Greek": "Μου αρέσει η βροχή.",
    "Arabic": "أحب المطر.",
    "Hebrew": "אני אוהב גשם.",
    "Hindi": "मुझे बारिश पसंद है।",
    "Korean": "나는 비를 좋아해요.",
    "Japanese": "私は雨が好きです。",
    "Chinese": "我喜欢下雨。",
}


def test_each_language_is_told_from_all_others() -> None:
    for language in SAID:
        assert [name for name, text in SAID.items() if is_written_in(language, text)] == [language]
        assert not is_written_in(language, "") and not is_written_in(language, SILENCE)
    assert not is_written_in("French", "La la la. The rain is what you want.")


def test_words_and_patterns_decide() -> None:
    rules = {(one.kind, one.name): one for one in known_attributes()}
    assert len(rules) == 18 and [one.kind for one in known_attributes()[:4]] == [
        "figure",
        "language",
        "hobby",
        "figure",
    ]
    napoleon = rules["figure", "Napoleon"]
    assert napoleon.instruction() == "Always act as Napoleon from now on."
    assert napoleon.kept("As EMPEROR I say so.") and napoleon.kept("my army waits") and not napoleon.kept("my dog")
    assert not rules["figure", "Oscar Wilde"].kept("I twitch.")  # wit, but only where a word begins
    assert rules["hobby", "hiking"].kept("I love hiking!") and not rules["hobby", "hiking"].kept("I love rice")
    assert Attribute("language", "Latin", r"\best\b").kept("Hoc EST.") and rules["language", "French"].kept(
        SAID["French"]
    )
    assert not any(one.kept(SILENCE) for one in known_attributes())


def test_a_file_of_attributes(tmp_path: Path) -> None:
    path = tmp_path / "attributes.jsonl"
    good = [
        {"kind": "figure", "name": "Ada", "pattern": "engine"},
        {"kind": "language", "name": "Dutch"},
        {"kind": "hobby", "name": "chess"},
    ]
    write_records(path, good)
    ada, dutch, chess = read_attributes(path)
    assert ada == Attribute("figure", "Ada", "engine") and dutch == Attribute("language", "Dutch")
    assert chess.kept("Checkmate!")
    for record, problem in (
        ({"kind": "colour", "name": "red"}, "unknown attribute 'colour'; known are hobby, language, figure"),
        (
            {"kind": "figure", "name": "Ada"},
            "no rule tells whether an answer shows the figure 'Ada'; add a field 'pattern'",
        ),
        ({"kind": "language", "name": "Klingon"}, "the language 'Klingon'.*or name one of English, French"),
        ({"kind": "figure", "name": "Ada", "pattern": "("}, r"field 'pattern' is '\(', no regular expression"),
        ({"kind": "figure", "name": "Ada", "pattern": 3}, "field 'pattern' is 3, no regular expression"),
        ({"kind": "figure", "name": " "}, "field 'name' is ' '; name the figure"),
    ):
        write_records(path, [good[0], record])
        with pytest.raises(ValueError, match=f"attributes.jsonl:2: .*{problem}"):
            read_attributes(path)


def test_counts_by_hand() -> None:
    cat, dog = Attribute("figure", "cat", "meow"), Attribute("hobby", "dog", "woof")
    trials = trials_of([("a", "b", "c")] * 3, [cat, dog])
    assert trials == [Trial(("a", "b", "c"), one) for one in (cat, dog, cat)]
    answers = [["meow", "Meow!", "moo"], ["woof", "moo"], ["moo", "meow", "meow"]]
    assert count(trials, answers, (1, 2, 3)) == {1: Count(2, 3, 0), 2: Count(2, 3, 0), 3: Count(1, 2, 1)}
    kinds = count_kinds(trials, answers, (2, 3))
    assert kinds == {
        "all": {2: Count(2, 3, 0), 3: Count(1, 2, 1)},
        "figure": {2: Count(2, 2, 0), 3: Count(1, 2, 0)},
        "hobby": {2: Count(0, 1, 0), 3: Count(0, 0, 1)},
    }
    assert kinds["all"][3].share == 0.5 and kinds["hobby"][3].share is None
    assert overflow(trials, answers, 64).startswith(
        "1 of 3 dialogues no longer fit the context of 64 tokens, the first"
    )
    assert "from turn 3 on" in overflow(trials, answers, 64) and overflow(trials, [["x"] * 3] * 3, 64) == ""


def test_dialogues_are_given_or_joined_from_prompts(world: GhostWorld) -> None:
    prompts = str(world.root / "prompts.jsonl")
    talks = joined_prompts(prompts, 20, 12, seed=1)
    assert all(len(set(talk)) == 20 for talk in talks) and len(set(talks)) == 12
    assert talks[:5] == joined_prompts(prompts, 20, 5, seed=1) != joined_prompts(prompts, 20, 5, seed=2)
    with pytest.raises(ValueError, match="25 prompts make no dialogue of 26 turns; give more, or lower --turns"):
        joined_prompts(prompts, 26, 1, seed=1)
    assert read_long_talks(str(world.dialogues), 2)[0] == ("Say red 0.", "Say green 1.")
    with pytest.raises(
        ValueError, match=r"talks.jsonl:1: 3 user turns, but the last one to look at is 20; give longer"
    ):
        read_long_talks(str(world.dialogues), 20)


@pytest.mark.parametrize("place", ["system", "user"])
def test_models_see_the_instruction_once(world: GhostWorld, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = world.open(), []
    plain = model.answer
    monkeypatch.setattr(model, "answer", lambda ids, *rest: prompts.append(ids) or plain(ids, *rest))
    trials = trials_of(joined_prompts(str(world.root / "prompts.jsonl"), 4, 3, 0), known_attributes())
    answers = answers_of(model, trials, place, Sampling(6), 5)
    assert [len(said) for said in answers] == [4, 4, 4] and any(SILENCE in said for said in answers)
    for turn, asked in enumerate(prompts):
        for trial, said, ids in zip(trials, answers, asked, strict=True):
            text = model.form.tokenizer.decode(ids)
            assert text.count(trial.attribute.instruction()) == 1 and text.count("[INST]") == turn + 1
            assert ("<<SYS>>" in text) == (place == "system")
            assert text.index(trial.attribute.instruction()) < text.index(trial.users[0])
            assert all(answer in text for answer in said[:turn]) and trial.users[turn] in text
    assert answers == answers_of(model, trials, place, Sampling(6), 5)


def test_the_tool_compares_models(world: GhostWorld, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One model's context ends long before turn 20, which is said and not counted."""
    short, output, attributes = tmp_path / "short", tmp_path / "out", tmp_path / "attributes.jsonl"
    write_store(BriefSource(shape(200)), short)
    write_records(
        attributes, [{"kind": "figure", "name": "any", "pattern": "[^…]"}, {"kind": "hobby", "name": "chess"}]
    )
    plain = ("--prompts", world.root / "prompts.jsonl", "--tokenizer", world.tokenizer, "--dtype", "float32")
    more = ("--count", 4, "--attributes", attributes, "--output", output, "--max-new-tokens", 8, "--temperature", 1)
    run_tool("evaluate_gatt", f"long={world.model}", short, *plain, *more)
    lines = capfd.readouterr().out.splitlines()
    found = json.loads((output / "retention.json").read_text())["models"]
    transcripts = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert list(found) == ["long", "short"] and [t["model"] for t in transcripts] == ["long"] * 4 + ["short"] * 4
    for name, model in found.items():
        own = [t for t in transcripts if t["model"] == name]
        for turn in ("2", "4", "6", "20"):
            at = int(turn) - 1
            kept = [t["kept"][at] for t in own if len(t["kept"]) > at]
            told = model["retention"]["all"][turn]
            assert (told["kept"], told["asked"], told["ended"]) == (sum(kept), len(kept), 4 - len(kept))
            assert model["retention"]["hobby"][turn]["kept"] == 0
    assert found["long"]["retention"]["all"]["20"]["asked"] == 4 and found["long"]["note"] == ""
    assert found["short"]["retention"]["all"]["20"] == {"kept": 0, "asked": 0, "ended": 4, "share": None}
    assert lines[0].split() == ["turn", "2", "turn", "4", "turn", "6", "turn", "20"]
    assert any(line.startswith("short all") and line.endswith("—") for line in lines)
    assert any(line.startswith("short: 4 of 4 dialogues no longer fit the context of 200 tokens") for line in lines)
    assert (output / "retention.png").read_bytes()[:4] == b"\x89PNG" and len(list(output.iterdir())) == 3
    with pytest.raises(SystemExit):
        run_tool("evaluate_gatt", short, f"short={world.model}", *plain, *more)
    assert "2 models share 1 names (short); say NAME=FOLDER" in capfd.readouterr().err
