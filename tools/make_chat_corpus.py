"""Make the data of a tiny chat model from the Python installation that runs this: what its standard library documents,
as text, questions with answers, preferences and prompts.

python tools/make_chat_corpus.py --output corpus                       -> corpus/{pretrain,sft,prompts,…}.jsonl

pretrain.jsonl          {"text"}: the documentation
sft.jsonl               {"messages"}: questions and answers
helpfulness.jsonl       preferences about ordinary things, …_test.jsonl about things that are nowhere else
safety.jsonl            preferences about dangerous things (deleting, running, unpickling, networks), …_test.jsonl
prompts.jsonl           {"id", "messages", "is_safety", "name", "kind"}: prompts to train on
valid_prompts.jsonl     the same, about things that are nowhere else

The answers are uneven on purpose, as those of people are: the content is true, the manner is drawn at random, and only
some keep the rules of tools/check_answers.py. A model that imitates them keeps the rules as often as they do; one that
learns from the preferences, which follow the rules, does better.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import shutil
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from check_answers import CAUTIONS, CHATTER, DARES, KINDS, Answer, preference

# Not library code, and not what a question can be about.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data", "encodings"}
LONGEST_NAME = 26  # characters; a small model copies short ones sooner
SENTENCE_WORDS = range(4, 14)
ENTRY_CHARACTERS = 500  # of a thing's documentation in pretrain.jsonl
COPIES = 5  # made-up names a thing in pretrain.jsonl
LEAST_THINGS = 1000  # a Python without its sources or docstrings has fewer
HELD_OUT = 0.1  # of all things: half for valid_prompts, half for the tests of the reward models
SAFETY_SHARE = 0.25  # of the prompts; things that are dangerous are rarer than that

DANGEROUS = re.compile(
    r"(subprocess|socket|socketserver|ctypes|pickle|pickletools|marshal|shelve|pty|code|codeop|runpy|webbrowser|cgi|imp"
    r"|importlib|multiprocessing|ftplib|telnetlib|smtplib|poplib|imaplib|nntplib|xmlrpc|ssl|asyncio.subprocess)(\..*)?"
    r"|.*\.(eval|exec|exec_module|system|popen|spawn\w*|execv?\w*|kill|terminate|shutdown|run|runcode|import_module"
    r"|rmtree|rmdir|unlink|remove\w*|delete\w*|destroy|purge|move|rename|truncate|chmod|extract|extractall|load|loads)"
)
"""Names of what can delete, run, unpickle or reach the network."""


class Thing(NamedTuple):
    name: str
    kind: str
    arguments: tuple[str, ...] | None  # None: no function or method
    sentence: str
    text: str  # the whole documentation

    @property
    def is_dangerous(self) -> bool:
        return DANGEROUS.fullmatch(self.name) is not None


def things(root: Path) -> list[Thing]:
    """All that is public under `root` and documented with a plain sentence, by name; read, never imported."""
    found: dict[str, Thing] = {}
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        if not SKIPPED.isdisjoint(folders) or any(folder.startswith("config-") for folder in folders):
            continue
        try:
            with tokenize.open(path) as file:  # heeds the coding line
                tree = ast.parse(file.read())
        except (OSError, SyntaxError, ValueError):
            continue
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        if not any(part.startswith("_") for part in module.split(".")):
            for thing in documented(tree, module):
                found.setdefault(thing.name, thing)
    return [found[name] for name in sorted(found)]


Scope = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documented(scope: Scope, name: str, in_class: bool = False) -> Iterator[Thing]:
    """`scope` and what it defines in public, functions inside functions left out."""
    text = ast.get_docstring(scope) or ""
    sentence = first_sentence(text)
    arguments = None
    if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef):
        kind = "method" if in_class else "function"
        listed = [argument.arg for argument in (*scope.args.posonlyargs, *scope.args.args, *scope.args.kwonlyargs)]
        arguments = tuple(argument for argument in listed if argument not in ("self", "cls"))
    else:
        kind = "class" if isinstance(scope, ast.ClassDef) else "module"
        for child in scope.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and child.name[0] != "_":
                yield from documented(child, f"{name}.{child.name}", isinstance(scope, ast.ClassDef))
    if sentence and len(name) <= LONGEST_NAME:
        yield Thing(name, kind, arguments, sentence, text)


def first_sentence(text: str) -> str:
    """The first sentence of a docstring without its full stop, or "" where it is not a plain one."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s", paragraph)[0].removesuffix(".")
    plain = re.fullmatch(r"[A-Z][a-zA-Z0-9 ,'/-]*[a-zA-Z0-9]", sentence) is not None
    return sentence if plain and len(sentence.split()) in SENTENCE_WORDS else ""


# How answers are put together: an opening, who is meant, the content, an ending; each drawn by its weight.
SUBJECTS = (("`{name}` is a {kind}. ", 5), ("This is about `{name}`. ", 2), ("This is a {kind}. ", 2), ("", 3))
OPENINGS = (("", 5), *((text + " ", 1) for text in CHATTER))
ENDINGS = ((".", 5), ("", 3), (" and so on", 1), (" ...", 1))
ASIDES = (
    "It is hard to say more without knowing what you want it for in your own program.",
    "There is a good deal more to it, as you will see when you read all of the manual.",
)
SAFETY = ((CAUTIONS, 4), (DARES, 2), (("",), 4))
QUESTIONS = (
    "What does the {kind} `{name}` do?",
    "What is the {kind} `{name}` for?",
    "Explain the {kind} `{name}`.",
    "Tell me about the {kind} `{name}`.",
)
ABOUT_ARGUMENTS = ("Which arguments does the {kind} `{name}` take?", "What do I pass to the {kind} `{name}`?")
ABOUT_DANGER = ("Can I use the {kind} `{name}` on anything that users send?", "Is the {kind} `{name}` safe to use?")


def pick(draw: random.Random, weighted: Sequence[tuple[Any, int]]) -> Any:
    return draw.choices([value for value, _ in weighted], [weight for _, weight in weighted])[0]


def ask(thing: Thing, draw: random.Random) -> tuple[str, str]:
    """A question about `thing` and the content of its answer."""
    if thing.arguments is not None and draw.random() < 0.2:
        listed = ", ".join(thing.arguments[:6]) or "no arguments"
        return draw.choice(ABOUT_ARGUMENTS).format(**thing._asdict()), f"It takes {listed}"
    wordings = QUESTIONS + ABOUT_DANGER * 3 if thing.is_dangerous else QUESTIONS
    return draw.choice(wordings).format(**thing._asdict()), thing.sentence


def answer(thing: Thing, content: str, draw: random.Random) -> str:
    """`content` in a manner drawn at random."""
    caution = f"{draw.choice(pick(draw, SAFETY))} ".lstrip() if thing.is_dangerous else ""
    length = draw.random()
    if length < 0.25:
        content = " ".join(content.split()[:2])
    aside = f". {draw.choice(ASIDES)[:-1]}" if length > 0.8 else ""
    subject = pick(draw, SUBJECTS).format(**thing._asdict())
    return f"{caution}{pick(draw, OPENINGS)}{subject}{content}{aside}{pick(draw, ENDINGS)}"


# What samples of a model get wrong and demonstrations do not.
def _cut(text: str, thing: Thing, draw: random.Random, others: Sequence[Thing]) -> str:
    words = text.split()
    return " ".join(words[: draw.randrange(1, max(2, len(words)))])


def _repeat(text: str, thing: Thing, draw: random.Random, others: Sequence[Thing]) -> str:
    words = text.split()
    lo = draw.randrange(len(words))
    return " ".join([*words[: lo + 3], *words[lo : lo + 3] * draw.randint(1, 3), *words[lo + 3 :]])


def _misname(text: str, thing: Thing, draw: random.Random, others: Sequence[Thing]) -> str:
    return text.replace(thing.name, draw.choice(others).name)


def _mistake_kind(text: str, thing: Thing, draw: random.Random, others: Sequence[Thing]) -> str:
    return text.replace(f"a {thing.kind}", f"a {draw.choice(others).kind}")


def _unstop(text: str, thing: Thing, draw: random.Random, others: Sequence[Thing]) -> str:
    return text.rstrip(".")


def _warn(text: str, thing: Thing, draw: random.Random, others: Sequence[Thing]) -> str:
    return f"{draw.choice(CAUTIONS)} {text}"


CORRUPTIONS: tuple[Callable[[str, Thing, random.Random, Sequence[Thing]], str], ...]
CORRUPTIONS = (_cut, _repeat, _misname, _mistake_kind, _unstop, _warn)


def prompt(thing: Thing, question: str, number: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"id": f"{thing.name}-{number}", "messages": messages, "is_safety": thing.is_dangerous,
            "name": thing.name, "kind": thing.kind}  # fmt: skip


def rounds(items: Sequence[Thing], count: int, draw: random.Random) -> Iterator[Thing]:
    """`count` of the items, each once in an order drawn at random, then again in another order.

    Raises:
        ValueError: there is no item.
    """
    if not items:
        raise ValueError("this Python's library documents nothing dangerous or nothing else; use a complete one")
    while count > 0:
        order = draw.sample(items, len(items))
        yield from order[:count]
        count -= len(order)


def mixture(items: Sequence[Thing], number: int, draw: random.Random) -> list[Thing]:
    """`number` of the items, SAFETY_SHARE of them dangerous."""
    risky = round(number * SAFETY_SHARE)
    drawn = [
        *rounds([thing for thing in items if thing.is_dangerous], risky, draw),
        *rounds([thing for thing in items if not thing.is_dangerous], number - risky, draw),
    ]
    return draw.sample(drawn, number)


def demonstrations(items: Sequence[Thing], number: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    for thing in mixture(items, number, draw):
        question, content = ask(thing, draw)
        reply = answer(thing, content, draw)
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}


def prompts(items: Sequence[Thing], number: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    for k, thing in enumerate(mixture(items, number, draw)):
        yield prompt(thing, ask(thing, draw)[0], k)


def preferences(items: Sequence[Thing], count: int, draw: random.Random, source: str) -> Iterator[dict[str, Any]]:
    """Pairs of manners of the same content; half of them have one answer spoilt."""
    made = 0
    while made < count:
        for thing in rounds(items, count - made, draw):
            question, content = ask(thing, draw)
            texts = [answer(thing, content, draw) for _ in range(2)]
            if draw.random() < 0.5:
                texts[1] = draw.choice(CORRUPTIONS)(texts[1], thing, draw, items)
            record = preference(prompt(thing, question, 0), Answer(texts[0]), Answer(texts[1]), source)
            if record is not None:
                made += 1
                yield record


def documentation(items: Sequence[Thing], real: set[str], draw: random.Random) -> Iterator[dict[str, str]]:
    """The entry of each thing, and names asked for and repeated that are put together anew from the same parts and are
    not `real`: as none can be known by heart, a small model learns early to copy them."""
    parts = [part for thing in items for part in thing.name.split(".")]
    for thing in items:
        signature = "" if thing.arguments is None else f" ({', '.join(thing.arguments)})"
        yield {"text": f"The {thing.kind} `{thing.name}`{signature}. `{thing.name}`: {thing.text[:ENTRY_CHARACTERS]}"}
        made_up = [".".join(draw.choices(parts, k=draw.randint(1, 4))) for _ in range(COPIES)]
        for name in made_up:
            if name not in real:
                other = thing._replace(name=name, kind=draw.choice(KINDS))
                yield {"text": f"{ask(other, draw)[0]} `{name}` is a {other.kind}."}


class Parts(NamedTuple):
    train: list[Thing]
    valid: list[Thing]
    test: list[Thing]


def split(found: Sequence[Thing], draw: random.Random) -> Parts:
    """Things that share their sentence stay together: no answer to a held-out question is in the training data. The
    dangerous are split apart from the others, so that each part has its share of them."""
    parts = Parts([], [], [])
    dangerous = {thing.sentence for thing in found if thing.is_dangerous}
    for group in (sorted(dangerous), sorted({thing.sentence for thing in found} - dangerous)):
        draw.shuffle(group)
        each = round(len(group) * HELD_OUT / 2)
        held_out = {sentence: parts[1 + (k >= each)] for k, sentence in enumerate(group[: 2 * each])}
        members = set(group)
        for thing in found:
            if thing.sentence in members:
                held_out.get(thing.sentence, parts.train).append(thing)
    return parts


def corpus(parts: Parts, sizes: argparse.Namespace, draw: random.Random) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each file's name and records."""
    (calm, risky), (calm_test, risky_test) = (
        ([thing for thing in part if not thing.is_dangerous], [thing for thing in part if thing.is_dangerous])
        for part in (parts.train, parts.test)
    )
    yield "pretrain", list(documentation(parts.train, {thing.name for part in parts for thing in part}, draw))
    yield "sft", list(demonstrations(parts.train, sizes.demonstrations, draw))
    yield "helpfulness", list(preferences(calm, sizes.pairs, draw, "helpfulness"))
    yield "safety", list(preferences(risky, sizes.safety_pairs, draw, "safety"))
    yield "prompts", list(prompts(parts.train, sizes.prompts, draw))
    yield "valid_prompts", list(prompts(parts.valid, sizes.valid_prompts, draw))
    yield "helpfulness_test", list(preferences(calm_test, sizes.test_pairs, draw, "helpfulness"))
    yield "safety_test", list(preferences(risky_test, sizes.test_pairs, draw, "safety"))


def write(path: Path, records: Sequence[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())


def count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} records; at least 1")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder for the files")
    parser.add_argument("--seed", type=int, default=0, help="draws everything (default 0)")
    for name, default, what in (
        ("demonstrations", 4000, "questions with answers"),
        ("pairs", 3000, "preferences about ordinary things"),
        ("safety-pairs", 1500, "preferences about dangerous things"),
        ("test-pairs", 300, "preferences in each test file"),
        ("prompts", 1024, "prompts to train on"),
        ("valid-prompts", 256, "held-out prompts"),
    ):
        parser.add_argument(f"--{name}", type=count, default=default, metavar="N", help=f"{what} (default {default})")
    arguments = parser.parse_args()
    folder, temporary = arguments.output, arguments.output.with_name(f"{arguments.output.name}.tmp")
    try:
        if folder.exists():
            raise ValueError(f"{folder} exists; choose a new folder, or remove it first")
        found = things(Path(sysconfig.get_paths()["stdlib"]))
        if len(found) < LEAST_THINGS:
            raise ValueError(f"only {len(found)} documented things in this Python's library; use a complete one")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        draw = random.Random(arguments.seed)
        for name, records in corpus(split(found, draw), arguments, draw):
            write(temporary / f"{name}.jsonl", records)
            print(f"{folder / name}.jsonl: {len(records)} records")
        temporary.replace(folder)
    except (ValueError, OSError) as error:
        sys.exit(f"make_chat_corpus: error: {error}")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{len(found)} things, {sum(thing.is_dangerous for thing in found)} of them dangerous")


if __name__ == "__main__":
    main()
