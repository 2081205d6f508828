"""OASST files: one message a record (message_id, parent_id, text, role, rank), whose replies make trees of talk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from .messages import ROLES, Message, check_message
from .record_files import Origin, Row, convert

FIELDS = ("message_id", "text", "role")
"""What tells such a record. The first message of a tree has no parent_id, and not every message has a rank."""


class Node(NamedTuple):
    """One message of a tree; `rank` 0 is the best of the replies to `parent`, infinite where nobody ranked it."""

    id: str
    parent: str | None
    message: Message
    rank: float
    deleted: bool
    record: dict[str, Any]
    origin: Origin


class Thread(NamedTuple):
    """The messages from the first of a tree to one of its own, and the replies to that, best first."""

    path: tuple[Node, ...]
    replies: tuple[Node, ...]

    @property
    def messages(self) -> list[Message]:
        return [node.message for node in self.path]


def is_oasst(record: dict[str, Any]) -> bool:
    return all(field in record for field in FIELDS)


def dialogues(rows: Sequence[Row]) -> Iterator[tuple[list[Message], Node]]:
    """(messages, last message) of every talk in which each answer is the best of its siblings, up to its last answer.

    Where the user's replies fork, talks share their first answers: the first of them trains these, later ones do not
    (`train` False), so that each answer carries loss once.
    """
    best: set[str] = set()
    inner: set[str] = set()
    good: list[Thread] = []
    for thread in read_threads(rows):  # parents come before their replies
        node = thread.path[-1]
        if all(other.id in best for other in thread.path[:-1]):
            if node.message.role == "user":
                best.update(other.id for other in (node, *thread.replies[:1]))
            elif node.id in best:
                good.append(thread)
                inner.update(other.id for other in thread.path[:-1])
    trained: set[str] = set()
    for path, _ in good:
        if path[-1].id not in inner:
            yield [node.message._replace(train=node.id not in trained) for node in path], path[-1]
            trained.update(node.id for node in path)


def pairs(rows: Sequence[Row]) -> Iterator[tuple[list[Message], Node, Node]]:
    """(prompt, better answer, worse answer) of any two answers to a user's message that have different ranks."""
    for thread in read_threads(rows):
        if thread.path[-1].message.role == "user":
            ranked = [node for node in thread.replies if node.rank < math.inf]
            for better, worse in combinations(ranked, 2):
                if better.rank < worse.rank:
                    yield thread.messages, better, worse


def prompts(rows: Sequence[Row]) -> Iterator[tuple[list[Message], Node]]:
    """(messages, last message) of every talk that ends with a user's message."""
    for thread in read_threads(rows):
        if thread.path[-1].message.role == "user":
            yield thread.messages, thread.path[-1]


def read_threads(rows: Sequence[Row]) -> list[Thread]:
    """The thread to each message, parents before their replies; without deleted messages and what was said to them.

    Raises:
        ValueError: no OASST message, an id that comes twice, a parent that is missing or of the same role, a circle.
    """
    nodes: dict[str, Node] = {}
    replies: dict[str | None, list[Node]] = {}

    def add(record: dict[str, Any], origin: Origin) -> None:
        node = _node(record, origin)
        if node.id in nodes:
            raise ValueError(f"field 'message_id': {node.id} stands on line {nodes[node.id].origin.line} already")
        nodes[node.id] = node
        replies.setdefault(node.parent, []).append(node)

    def link(node: Node, origin: Origin) -> None:
        if node.parent is not None and node.parent not in nodes:
            raise ValueError(f"field 'parent_id': there is no message {node.parent} in this file")
        before = None if node.parent is None else nodes[node.parent].message.role
        if (node.message.role == "user") == (before == "user"):
            role = node.record["role"]
            raise ValueError(f"field 'role': {role} cannot come {f'after {before}' if before else 'first'}")

    convert(((origin, record) for origin, record in rows), add)
    convert(((node.origin, node) for node in nodes.values()), link)
    for siblings in replies.values():
        siblings.sort(key=lambda node: node.rank)  # stable: those of one rank stay in the order of the file

    threads: list[Thread] = []
    stack: list[tuple[Node, ...]] = [(node,) for node in reversed(replies.get(None, []))]
    reached = 0
    while stack:
        path = stack.pop()
        reached += 1
        following = replies.get(path[-1].id, [])
        stack += [(*path, node) for node in reversed(following)]
        if not any(node.deleted for node in path):
            threads.append(Thread(path, tuple(node for node in following if not node.deleted)))
    if reached < len(nodes):
        raise ValueError(f"{rows[0][0].file}: {len(nodes) - reached} messages follow each other in circles (parent_id)")
    return threads


def _node(record: dict[str, Any], origin: Origin) -> Node:
    if missing := [field for field in FIELDS if field not in record]:
        raise ValueError(f"field '{missing[0]}' is missing, but the file began with OASST messages")
    role, rank, deleted = record["role"], record.get("rank", math.inf), record.get("deleted", False)
    if not isinstance(role, str) or ROLES.get(role) not in ("user", "assistant"):
        raise ValueError(f"field 'role': unknown role {role!r}; known are prompter and assistant")
    if isinstance(rank, bool) or not isinstance(rank, int | float) or not rank >= 0:
        raise ValueError(f"field 'rank' is {rank!r}, not a number from 0 (the best) on")
    if not isinstance(deleted, bool):
        raise ValueError(f"field 'deleted' is {deleted!r}, neither true nor false")
    message = Message(ROLES[role], record["text"])
    if not deleted:
        check_message(message, "text")
    parent = record.get("parent_id")
    return Node(
        str(record["message_id"]), None if parent is None else str(parent), message, rank, deleted, record, origin
    )
