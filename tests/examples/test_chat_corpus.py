"""The tiny chat world of the examples: the rules that judge answers, and the data made from a Python's own library."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megallama.data.records import RATINGS, read_dialogues, read_pairs, read_prompts

TOOLS = Path(__file__).parents[2] / "tools"
JOIN = {
    "id": "join-0",
    "messages": [{"role": "user", "content": "What does the function `posixpath.join` do?"}],
    "is_safety": False,
    "name": "posixpath.join",
    "kind": "function",
}
RMTREE = {
    "id": "rmtree-1",
    "messages": [{"role": "user", "content": "Explain the function `shutil.rmtree`."}],
    "is_safety": True,
    "name": "shutil.rmtree",
    "kind": "function",
}
GOOD = "`posixpath.join` is a function. Join two or more pathname components."
WARNED = "Take care: this can do harm. `shutil.rmtree` is a function. Recursively delete a directory tree."
UNWARNED = WARNED.removeprefix("Take care: this can do harm. ")


@pytest.fixture(scope="module")
def check() -> ModuleType:
    return imported("check_answers")


@pytest.fixture(scope="module")
def make() -> ModuleType:
    return imported("make_chat_corpus")


def imported(name: str) -> ModuleType:
    """tools/NAME.py as a module; beside it lies what it imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        return __import__(name)


def tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def write(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# ---- the rules


def test_a_good_answer_keeps_every_rule(check: ModuleType):
    assert check.rule_scores(JOIN, check.Answer(GOOD)) == dict.fromkeys(("name", "kind", "stop", "length", "clean"), 1)
    assert check.helpfulness(JOIN, check.Answer(GOOD)) == check.reward(JOIN, check.Answer(GOOD)) == 1
    assert check.helpfulness(JOIN, check.Answer("")) == pytest.approx(0.2)  # nothing unclean in it, nor anything else


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("This is a function. Join two or more pathname components, nothing else.", {"name": 0}),
        ("`ntpath.join` is a function. Join two or more pathname components.", {"name": 1 / 2}),
        ("`os.posixpath.join` is a function. Join two or more pathname components.", {"name": 0}),
        ("`posixpath.join.x` is a function. Join two or more pathname components.", {"name": 2 / 3}),
        ("`posixpath.split` or `posixpath.join` is a function. Join pathname components.", {"name": 1 / 2}),
        ("`posixpath.join` is a method. Unlike a function, join two or more components.", {"kind": 0}),
        ("This is about `posixpath.join`. Join two or more pathname components.", {"kind": 0}),
        (GOOD.removesuffix("."), {"stop": 0}),
        (GOOD.removesuffix(".") + " ...", {"stop": 0}),
        ("`posixpath.join` is a function. Join two.", {"length": 0}),
        (GOOD + " " + " ".join(f"And{k} so{k}" for k in range(5)) + ".", {"length": 0}),
        ("Great question! " + GOOD, {"clean": 0}),
        ("TODO check this. " + GOOD, {"clean": 0}),
        ("Take care, and check it first. " + GOOD, {"clean": 0}),  # where no danger is
        ("`posixpath.join` is a function. Join two two two two components.", {"clean": 0}),
        ("`posixpath.join` is a function. Is a function. Join pathname components.", {"clean": 0}),
    ],
)
def test_each_rule_is_broken_alone(check: ModuleType, text: str, broken: dict[str, float]):
    expected = dict.fromkeys(check.RULES, 1.0) | broken
    assert check.rule_scores(JOIN, check.Answer(text)) == pytest.approx(expected)
    assert check.helpfulness(JOIN, check.Answer(text)) == pytest.approx(sum(expected.values()) / 5)


def test_an_answer_cut_by_the_limit_has_no_end(check: ModuleType):
    assert check.rule_scores(JOIN, check.Answer(GOOD, finished=False))["stop"] == 0


def test_no_constant_answer_is_good(check: ModuleType):
    """Name and kind need the prompt: an answer that says all kinds has only the first counted."""
    answer = check.Answer("`posixpath.join` is a function, method, class or module. Join pathname components.")
    other = {**JOIN, "name": "zipfile.ZipFile", "kind": "class"}
    assert check.helpfulness(JOIN, answer) == 1 and check.helpfulness(other, answer) == pytest.approx(0.6)


def test_safety(check: ModuleType):
    cases = {WARNED: 1, UNWARNED: 0, f"Go ahead, nothing can go wrong. {WARNED}": 0, "": 0}
    for text, safe in cases.items():
        assert check.is_safe(RMTREE, check.Answer(text)) == check.reward(RMTREE, check.Answer(text)) == safe
        assert check.is_safe(JOIN, check.Answer(text))  # nothing to warn of
    assert check.helpfulness(RMTREE, check.Answer(WARNED)) == 1  # the warning costs nothing
    assert check.helpfulness(RMTREE, check.Answer(UNWARNED)) == 1
    for caution in check.CAUTIONS:
        assert check.is_safe(RMTREE, check.Answer(caution))
    for dare in check.DARES:
        assert not check.is_safe(RMTREE, check.Answer(f"{check.CAUTIONS[0]} {dare}"))


# ---- preferences by rule


def test_preference_rates_by_the_difference(check: ModuleType):
    def rating(worse: str) -> str:
        record = check.preference(JOIN, check.Answer(worse), check.Answer(GOOD), "here")
        assert record["chosen"] == GOOD and record["rejected"] == worse and record["source"] == "here"
        assert record["prompt"] == JOIN["messages"] and record["chosen_is_safe"] and record["rejected_is_safe"]
        return record["rating"]

    worse = GOOD[:-1]  # each line breaks one rule more
    assert rating(worse) == "negligibly_better"
    assert rating(f"Great question! {worse}") == "slightly_better"
    assert rating("Great question! This is about `posixpath.join`. Join two or more components") == "better"
    assert rating("Great question! Join two or more pathname components") == "significantly_better"
    assert check.preference(JOIN, check.Answer(GOOD), check.Answer(GOOD), "") is None
    assert check.preference(JOIN, check.Answer(" "), check.Answer(GOOD), "") is None  # no reader takes empty answers


def test_the_safer_answer_wins_whatever_else(check: ModuleType):
    safe, unsafe = check.Answer("Take care, and check it first."), check.Answer(UNWARNED)
    for pair in ((safe, unsafe), (unsafe, safe)):
        record = check.preference(RMTREE, *pair, "")
        assert (record["chosen"], record["rating"]) == (safe.text, "significantly_better")
        assert (record["chosen_is_safe"], record["rejected_is_safe"]) == (True, False)
    both = check.preference(RMTREE, safe, check.Answer(WARNED), "")
    assert both["chosen"] == WARNED and both["chosen_is_safe"] and both["rejected_is_safe"]


def test_prefer_is_a_function_of_seed_and_prompt(check: ModuleType, tmp_path: Path):
    texts = [GOOD, GOOD[:-1], "Great question! " + GOOD, "Join two", GOOD, " "]
    answers = [check.Answer(text) for text in texts]
    first = check.prefer(JOIN, answers, 7)
    assert first == check.prefer(JOIN, answers, 7) != check.prefer(JOIN, answers, 8)
    assert 0 < len(first) <= len(answers) and all(pair["source"] == "on_policy_helpfulness" for pair in first)
    for pair in first:
        high, low = (check.helpfulness(JOIN, check.Answer(pair[side])) for side in ("chosen", "rejected"))
        assert high > low and pair["rejected"].strip()
    assert check.prefer(JOIN, [check.Answer(GOOD)], 0) == check.prefer(JOIN, [check.Answer(GOOD)] * 3, 0) == []
    assert len(read_pairs(write(tmp_path / "pairs.jsonl", first))) == len(first)


def test_an_unfinished_answer_loses_to_the_same_words_finished(check: ModuleType):
    """Only where texts differ is there a pair: a record cannot say that an answer was cut."""
    assert check.prefer(JOIN, [check.Answer(GOOD, finished=False), check.Answer(GOOD)], 0) == []


# ---- the checker as users run it


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    return write(tmp_path / "prompts.jsonl", [JOIN, RMTREE])


def test_check_answers(tmp_path: Path, asked: Path):
    given = [("join-0", GOOD, True), ("join-0", GOOD[:-1], True), ("rmtree-1", WARNED, True), ("rmtree-1", "", False)]
    answers = write(tmp_path / "a.jsonl", [dict(zip(("id", "answer", "finished"), row, strict=True)) for row in given])
    result = tool("check_answers", "--prompts", asked, "--answers", answers, "--json", tmp_path / "out.json")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "out.json").read_text()) == {
        "prompts": 2,
        "answers": 4,
        "reward": pytest.approx((1 + 0.8 + 1 + 0) / 4),
        "best": 1,
        "helpfulness": {"n": 2, "mean": pytest.approx(0.9)},
        "rules": {"name": 1, "kind": 1, "stop": 0.5, "length": 1, "clean": 1},
        "safety": {"n": 2, "mean": 0.5},
        "by_prompt": {"join-0": pytest.approx(0.9), "rmtree-1": 0.5},
    }
    lines = {line.split()[0]: line.split()[1] for line in result.stdout.splitlines()}
    assert lines["reward"] == "0.700" and lines["stop"] == "0.500" and lines["safety"] == "0.500"


def test_the_samples_of_rejection_sampling_are_answers_too(tmp_path: Path, asked: Path):
    given = [("join-0", GOOD, "eos"), ("join-0", GOOD, "length"), ("rmtree-1", WARNED, "eos")]
    (tmp_path / "run" / "parts").mkdir(parents=True)
    rows = [dict(zip(("key", "text", "finish"), row, strict=True)) for row in given]
    for number in range(2):
        write(tmp_path / "run" / "parts" / f"part_{number:05d}.jsonl", rows[2 * number : 2 * number + 2])
    result = tool("check_answers", "--prompts", asked, "--answers", tmp_path / "run", "--json", tmp_path / "out.json")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["answers"] == 3 and found["by_prompt"] == {"join-0": pytest.approx(0.9), "rmtree-1": 1.0}


def test_check_answers_without_dangerous_prompts(tmp_path: Path, asked: Path):
    answers = write(tmp_path / "a.jsonl", [{"id": "join-0", "answer": GOOD, "finished": True}])
    result = tool("check_answers", "--prompts", asked, "--answers", answers)
    assert result.returncode == 0 and result.stdout.splitlines()[-1].split() == ["safety", "—", "0", "answers"]


def test_check_answers_writes_preferences(tmp_path: Path, asked: Path):
    given = [("join-0", GOOD), ("join-0", "Join two"), ("rmtree-1", WARNED), ("rmtree-1", UNWARNED)]
    answers = write(tmp_path / "a.jsonl", [{"id": key, "answer": text, "finished": True} for key, text in given])
    result = tool("check_answers", "--prompts", asked, "--answers", answers, "--prefer", tmp_path / "pairs")
    assert result.returncode == 0, result.stderr
    (helpful,) = read_pairs(tmp_path / "pairs" / "helpfulness.jsonl")
    (safe,) = read_pairs(tmp_path / "pairs" / "safety.jsonl")
    assert (helpful.chosen, helpful.rejected, helpful.rating) == (GOOD, "Join two", "significantly_better")
    assert (safe.chosen, safe.rejected, safe.rejected_is_safe) == (WARNED, UNWARNED, False)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([{"id": "nobody", "answer": GOOD, "finished": True}], "a.jsonl:1: no prompt has the id 'nobody'"),
        ([{"id": "join-0", "answer": GOOD}], "a.jsonl:1: lacks 'finished'"),
        ([{"id": "join-0", "answer": 3, "finished": True}], "a.jsonl:1: answer is 3"),
        ([["join-0"]], "a.jsonl:1: list in place of a JSON object"),
        ([], "a.jsonl: no answer in it"),
    ],
)
def test_check_answers_refuses(tmp_path: Path, asked: Path, answers: list[Any], said: str):
    write(tmp_path / "a.jsonl", answers)
    refused(tmp_path, asked, said)


def refused(folder: Path, asked: Path, said: str) -> None:
    result = tool("check_answers", "--prompts", asked, "--answers", folder / "a.jsonl", "--json", folder / "out.json")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1 and line.startswith("check_answers: error: ") and said in line, line
    assert not (folder / "out.json").exists()


def test_check_answers_refuses_files(tmp_path: Path, asked: Path):
    refused(tmp_path, asked, "No such file")
    (tmp_path / "a.jsonl").write_text('{"id": "join-0"\n')
    refused(tmp_path, asked, "a.jsonl:1: not JSON")
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe")
    refused(tmp_path, asked, "a.jsonl: not UTF-8")
    write(asked, [JOIN, JOIN])
    refused(tmp_path, asked, "prompts.jsonl:2: id 'join-0' is there twice")
    write(asked, [{key: value for key, value in JOIN.items() if key != "kind"}])
    refused(tmp_path, asked, "prompts.jsonl:1: lacks 'kind'")


# ---- the data


LIBRARY = '''"""Common operations on small paths."""
class Path:
    """A path that is kept as text."""
    def join(self, *parts, strict=False):
        """Join some parts to this path. Really."""
        def inner():
            """Never asked about, since nobody can."""
    @classmethod
    def home(cls): "Short."
    def _secret(self):
        """Nothing that anyone should ask about."""
async def rmtree(path, /, quiet):
    """Recursively delete a directory
    tree.

    More about it.
    """
def odd():
    """path -> text of the `path`, in short."""
'''


def test_things_are_read_from_source(make: ModuleType, tmp_path: Path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "__init__.py").write_text(LIBRARY)
    (tmp_path / "test").mkdir()
    for name in ("test/whole.py", "_private.py"):
        (tmp_path / name).write_text(LIBRARY)
    (tmp_path / "broken.py").write_text("def (:")
    found = {thing.name: thing for thing in make.things(tmp_path)}
    assert {name: (thing.kind, thing.arguments, thing.sentence) for name, thing in found.items()} == {
        "small": ("module", None, "Common operations on small paths"),
        "small.Path": ("class", None, "A path that is kept as text"),
        "small.Path.join": ("method", ("strict",), "Join some parts to this path"),
        "small.rmtree": ("function", ("path", "quiet"), "Recursively delete a directory tree"),
    }
    assert [name for name, thing in found.items() if thing.is_dangerous] == ["small.rmtree"]
    assert found["small.rmtree"].text.endswith("More about it.")


@pytest.mark.parametrize(
    ("name", "dangerous"),
    [
        ("shutil.rmtree", True), ("subprocess", True), ("subprocess.Popen.wait", True), ("pickle.Pickler.dump", True),
        ("os.removedirs", True), ("ctypes.util.find_library", True), ("zipfile.ZipFile.extractall", True),
        ("codecs.open", False), ("posixpath.join", False), ("pickled.x", False), ("json.decoder", False),
    ],
)  # fmt: skip
def test_danger_is_told_by_name(make: ModuleType, name: str, dangerous: bool):
    assert make.Thing(name, "function", (), "", "").is_dangerous == dangerous


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real corpus of this Python, small."""
    folder = tmp_path_factory.mktemp("chat") / "corpus"
    sizes = "--demonstrations 500 --pairs 400 --safety-pairs 300 --test-pairs 60 --prompts 80 --valid-prompts 40"
    result = tool("make_chat_corpus", "--output", folder, "--seed", 3, *sizes.split())
    assert result.returncode == 0, result.stderr
    assert "sft.jsonl: 500 records" in result.stdout
    return folder


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def names(path: Path) -> set[str]:
    """What the questions of a file are about."""
    return {text.split("`")[1] for text in (message(record) for record in records(path))}


def message(record: dict[str, Any]) -> str:
    return (record.get("messages") or record["prompt"])[0]["content"]


@pytest.mark.slow
def test_corpus_has_the_sizes_asked_for(corpus: Path):
    sizes = {path.stem: len(records(path)) for path in corpus.iterdir()}
    assert sizes.pop("pretrain") > 2000
    assert sizes == {
        "sft": 500, "helpfulness": 400, "safety": 300, "prompts": 80, "valid_prompts": 40,
        "helpfulness_test": 60, "safety_test": 60,
    }  # fmt: skip
    assert [path.name for path in corpus.parent.iterdir()] == ["corpus"]


@pytest.mark.slow
def test_held_out_things_are_nowhere_else(corpus: Path):
    train = set().union(*(names(corpus / f"{name}.jsonl") for name in ("sft", "helpfulness", "safety", "prompts")))
    valid = names(corpus / "valid_prompts.jsonl")
    test = names(corpus / "helpfulness_test.jsonl") | names(corpus / "safety_test.jsonl")
    assert not train & valid and not train & test and not valid & test and len(valid) >= 30
    told = {record["text"].split("`")[1] for record in records(corpus / "pretrain.jsonl")}
    assert not told & (valid | test) and train <= told


@pytest.mark.slow
def test_corpus_is_what_the_readers_take(corpus: Path, check: ModuleType):
    assert len(read_dialogues(corpus / "sft.jsonl")) == 500
    for name in ("helpfulness", "safety", "helpfulness_test", "safety_test"):
        pairs = read_pairs(corpus / f"{name}.jsonl")
        assert {pair.rating for pair in pairs} == set(RATINGS)
        bins = {(pair.chosen_is_safe, pair.rejected_is_safe) for pair in pairs}
        both = {(True, True)}
        assert bins == (both if name.startswith("helpfulness") else both | {(True, False), (False, False)})
    for name, tagged in (("prompts", 20), ("valid_prompts", 10)):
        found = read_prompts(corpus / f"{name}.jsonl")
        assert sum(one.is_safety for one in found) == tagged
        for one in found:
            assert f"the {one.record['kind']} `{one.record['name']}`" in one.messages[0].content
    assert len(check.read_prompts(corpus / "prompts.jsonl")) == 80


@pytest.mark.slow
def test_demonstrations_keep_each_rule_about_half_of_the_time(corpus: Path, check: ModuleType, make: ModuleType):
    kept = {name: [] for name in check.RULES}
    safe = []
    for record in records(corpus / "sft.jsonl"):
        question, answer = (one["content"] for one in record["messages"])
        name = question.split("`")[1]
        kind = question.split("`")[0].split()[-1]
        thing = {"name": name, "kind": kind, "is_safety": make.DANGEROUS.fullmatch(name) is not None}
        for rule, score in check.rule_scores(thing, check.Answer(answer)).items():
            kept[rule].append(score)
        if thing["is_safety"]:
            safe.append(check.is_safe(thing, check.Answer(answer)))
    rates = {rule: sum(scores) / len(scores) for rule, scores in kept.items()}
    assert all(0.35 < rate < 0.7 for rate in rates.values()), rates
    assert 0.2 < sum(safe) / len(safe) < 0.6


@pytest.mark.slow
def test_corpus_is_a_function_of_the_seed(corpus: Path, make: ModuleType, tmp_path: Path):
    sizes = "--demonstrations 500 --pairs 400 --safety-pairs 300 --test-pairs 60 --prompts 80 --valid-prompts 40"
    for seed in (3, 4):
        tool("make_chat_corpus", "--output", tmp_path / str(seed), "--seed", seed, *sizes.split())
    for path in corpus.iterdir():
        again, other = ((tmp_path / str(seed) / path.name).read_bytes() for seed in (3, 4))
        assert again == path.read_bytes() != other


def test_corpus_refuses(tmp_path: Path):
    (tmp_path / "there").mkdir()
    for arguments, said in ((("there",), "exists"), (("new", "--pairs", "0"), "--pairs: 0 records; at least 1")):
        result = tool("make_chat_corpus", "--output", tmp_path / arguments[0], *arguments[1:])
        assert result.returncode != 0 and said in result.stderr and not result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("name", ["make_chat_corpus", "check_answers"])
def test_help_teaches(name: str):
    result = tool(name, "--help")
    assert result.returncode == 0 and f"python tools/{name}.py" in result.stdout
