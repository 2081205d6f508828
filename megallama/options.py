"""Options of a program from a tree of dataclasses: a YAML file and the command line in, typed values out.

The fields are the options, a field of a nested dataclass is `section.key`, and the `Args:` part of a class's docstring
is the help. Nothing here knows any section, so a new one is a new dataclass and no more.
"""

from __future__ import annotations

import difflib
import json
import re
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from inspect import cleandoc
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import yaml


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number, as YAML 1.2 does."""


class _Dumper(yaml.SafeDumper):
    """Quotes a string that `_Loader` would take for a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


class Option(NamedTuple):
    """One key: `hint` is its type, `default` is MISSING where a value is required and for sections."""

    key: str
    hint: Any
    default: Any
    help: str


def nested(hint: Any) -> Any:
    """The dataclass that a hint holds (X, X | None or tuple[X, ...]), else None."""
    return next((t for t in (hint, *get_args(hint)) if is_dataclass(t)), None)


def options(cls: Any, prefix: str = "") -> Iterator[Option]:
    """Every key below `cls`, in order. A section, an optional section or a list of sections comes before its keys."""
    hints, texts = get_type_hints(cls), _arguments(cls)
    for f in fields(cls):
        hint, key = hints[f.name], prefix + f.name
        yield Option(key, hint, f.default, texts.get(f.name, ""))
        if nested(hint):
            yield from options(nested(hint), key + ".")


def parse(cls: Any, argv: Sequence[str]) -> dict[str, Any]:
    """What `argv` sets, as nested dicts with typed leaves; keys that nobody gave are absent.

    Args:
        cls: root of the tree of dataclasses.
        argv: `--config FILE` (YAML) and `--section.key value` or `--section.key=value`; the command line wins.

    Raises:
        ValueError: unknown key (names the nearest one), wrong type, missing value, unreadable file. One line.
    """
    from jsonargparse import ArgumentParser  # slow to import: not before it is needed

    tree = {o.key: o for o in options(cls)}
    sections = {key for key, o in tree.items() if is_dataclass(o.hint)}
    files, rest = _split(argv)
    tokens = [token for file in files for token in _from_file(_read(file), tree, sections, f"{file}: ")]
    for key, value in _given(rest):
        _refuse_unknown({key: value}, tree)
        if key in sections:
            raise ValueError(
                f"{key} is a section; give its keys, such as --{next(k for k in tree if k.startswith(key + '.'))}"
            )

    parser = ArgumentParser(exit_on_error=False)
    for o in tree.values():
        # The keys of an optional section come with the type of the section itself.
        if o.key not in sections and o.key.rpartition(".")[0] in sections | {""}:
            parser.add_argument("--" + o.key, type=o.hint)
    try:
        return _plain(parser.parse_args([*tokens, *rest], defaults=False))
    except Exception as error:  # the parser raises several unrelated types; each is a user's error here
        raise ValueError(_one_line(str(error))) from None


def build(cls: Any, given: dict[str, Any]) -> Any:
    """An instance of `cls` from nested dicts; absent keys take their defaults."""
    hints = get_type_hints(cls)

    def value(hint: Any, x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(value(hint, y) for y in x)
        return build(nested(hint), x) if isinstance(x, dict) else x

    return cls(**{k: value(hints[k], x) for k, x in given.items()})


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts, key by key; `above` wins."""
    merged = dict(below) | dict(above)
    for key in set(below) & set(above):
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            merged[key] = merge(below[key], above[key])
    return merged


def dump(instance: Any) -> str:
    """An instance of a dataclass as YAML, every key spelled out; `parse` and `build` read it back equal."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    return yaml.dump(plain(asdict(instance)), Dumper=_Dumper, sort_keys=False)


def describe(cls: Any, recipe: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """The keys below `cls` with their types, help and defaults, one section after the other: the text of `--help`.

    Args:
        recipe: section -> key -> default, where it is another than the class's.
    """
    special = {f"{section}.{key}": value for section, keys in (recipe or {}).items() for key, value in keys.items()}
    lines: list[str] = []
    lists: set[str] = set()  # sections of which there are several: their keys are not options by themselves
    for o in options(cls):
        if is_dataclass(o.hint):
            lines += ["", f"{o.key}: {o.help}"]
            continue
        if nested(o.hint) and get_origin(o.hint) is tuple:
            lists.add(o.key)
        dashes = "  " if o.key.rpartition(".")[0] in lists else "--"
        given = special.get(o.key, o.default)
        default = "(required)" if given is MISSING else f"[{_spell(given)}]"
        left = f"  {dashes}{o.key} {_type_name(o.hint)}"
        first, *more = textwrap.wrap(f"{o.help} {default}", 73)
        lines += [f"{left:<46} {first}", *(" " * 47 + line for line in more)]
    return "\n".join(lines)


def _arguments(cls: Any) -> dict[str, str]:
    """Name -> text of the `Args:` part of a class's docstring."""
    _, _, block = cleandoc(cls.__doc__ or "").partition("Args:\n")
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", block, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(files given by --config, the other tokens)."""
    files, rest, tokens = [], [], iter(argv)
    for token in tokens:
        name, equals, value = token.partition("=")
        if name != "--config":
            rest.append(token)
            continue
        file = value if equals else next(tokens, "")
        if not file or file.startswith("--"):
            raise ValueError("--config needs the name of a YAML file")
        files.append(file)
    return files, rest


def _read(file: str) -> dict[str, Any]:
    try:
        tree = yaml.load(Path(file).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ValueError(f"cannot read the configuration {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict | None):
        raise ValueError(f"{file} holds a {type(tree).__name__}; a configuration is a mapping of sections")
    return tree or {}


def _from_file(
    mapping: dict[str, Any], known: Collection[str], sections: Collection[str], where: str, prefix: str = ""
) -> Iterator[str]:
    """The command-line tokens that say what a mapping from a YAML file says."""
    _refuse_unknown(mapping, known, where, prefix)
    for name, value in mapping.items():
        key = f"{prefix}{name}"
        if key not in sections:
            text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
            yield f"--{key}={text}"
        elif isinstance(value, dict):
            yield from _from_file(value, known, sections, where, key + ".")
        elif value is not None:  # a section whose keys are all commented out is empty
            raise ValueError(f"{where}{key} is a section, a mapping of keys, and not {value!r}")


def _given(tokens: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(key, value) of every option among the tokens; values only as far as they are YAML."""
    for token, following in zip(tokens, [*tokens[1:], ""], strict=False):
        if not token.startswith("--"):
            continue
        name, equals, text = token[2:].partition("=")
        try:
            value = yaml.safe_load(text if equals else following)
        except yaml.YAMLError:
            value = None
        yield name, value


def _refuse_unknown(mapping: dict[str, Any], known: Collection[str], where: str = "", prefix: str = "") -> None:
    for name, value in mapping.items():
        key = f"{prefix}{name}"
        if key not in known:
            raise ValueError(f"{where}unknown key {key}; did you mean {_nearest(key, known)}?")
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, dict):
                _refuse_unknown(child, known, where, key + ".")


def _nearest(key: str, known: Collection[str]) -> str:
    """The known key that looks most like `key`; initials count as a likeness (learning_rate, lr)."""
    section, _, leaf = key.rpartition(".")
    initials = "".join(word[:1] for word in leaf.split("_"))

    def likeness(candidate: str) -> float:
        home, _, other = candidate.rpartition(".")
        whole, last = (difflib.SequenceMatcher(None, a, b).ratio() for a, b in ((key, candidate), (leaf, other)))
        return whole + last + (home == section) / 2 + initials.startswith(other)

    return max(known, key=likeness)


def _one_line(text: str) -> str:
    """The parser's message without its internals."""
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    key = re.search(r'(?:Parser key "|argument --)([\w.]+)', text)
    name = key[1] if key else None
    if missing := re.search(r"arguments are required: (.*)", text):
        return f"{name} also needs {missing[1]}"
    text = re.sub(r'^Parser key "[\w.]+":|^argument --[\w.]+:', "", text)
    text = " ".join(text.split()).replace("Expected a tuple", "expected a list").replace("Expected a ", "expected ")
    text = re.sub(r"expected dot import path string: (.*)", r"expected a mapping of keys, got \1", text)
    text = text.replace(". Got value: ", ", got ").replace("got None", "got null")
    return f"{name}: {text}" if name else text


def _plain(value: Any) -> Any:
    """Namespaces (also those inside tuples) to dicts."""
    if isinstance(value, tuple | list):
        return tuple(_plain(v) for v in value)
    if hasattr(value, "as_dict"):
        return {k: _plain(v) for k, v in vars(value).items()}
    return value


def _type_name(hint: Any) -> str:
    if nested(hint):
        names = ", ".join(f.name for f in fields(nested(hint)))
        return f"[{{{names}}}, ...]" if get_origin(hint) is tuple else f"{{{names}}}"
    if get_origin(hint) is tuple:
        inner = [_type_name(t) for t in get_args(hint) if t is not Ellipsis]
        return f"[{', '.join(inner)}{', ...' if Ellipsis in get_args(hint) else ''}]"
    return next((t.__name__ for t in (*get_args(hint), hint) if isinstance(t, type)), str(hint)).upper()


def _spell(default: Any) -> str:
    """A default as one types it."""
    if isinstance(default, tuple):
        return ", ".join(map(_spell, default)) or "empty"
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
