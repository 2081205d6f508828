"""Dialogues, pairs and prompts out of records of every shape, and every way in which a record can be bad."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megallama.data import RATINGS, Message, Origin, read_dialogues, read_pairs, read_prompts

Records = list[dict[str, Any]]
Write = Callable[..., Path]

ASK, SAY = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
QUESTION, ANSWER = Message("user", "Why?"), Message("assistant", "Because.")
SYSTEM = Message("system", "Be kind.")
HH = "\n\nHuman: Hi\n\nAssistant: Hello.\nYes?\n\nHuman: Why?\n\nAssistant:"
HH_PROMPT = (Message("user", "Hi"), Message("assistant", "Hello.\nYes?"), QUESTION)
LONG = "Why is the sky blue today?"
PAIR = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}

OASST: Records = [
    {"message_id": "q", "parent_id": None, "text": "Why?", "role": "prompter", "rank": None},
    {"message_id": "c", "parent_id": "q", "text": "Worst.", "role": "assistant", "rank": 2},
    {"message_id": "a", "parent_id": "q", "text": "Because.", "role": "assistant", "rank": 0},
    {"message_id": "b", "parent_id": "q", "text": "Middling.", "role": "assistant", "rank": 1},
    {"message_id": "u", "parent_id": "q", "text": "Unranked.", "role": "assistant"},
    {"message_id": "a1", "parent_id": "a", "text": "And?", "role": "prompter"},
    {"message_id": "a2", "parent_id": "a", "text": "Really?", "role": "prompter"},
    {"message_id": "a3", "parent_id": "a", "text": "Nobody answers.", "role": "prompter"},
    {"message_id": "b1", "parent_id": "b", "text": "What?", "role": "prompter"},
    {"message_id": "b1a", "parent_id": "b1", "text": "Off the best path.", "role": "assistant", "rank": 0},
    {"message_id": "a1a", "parent_id": "a1", "text": "So.", "role": "assistant", "rank": 0.0},
    {"message_id": "a1b", "parent_id": "a1", "text": "Tie.", "role": "assistant", "rank": 0},
    {"message_id": "a2a", "parent_id": "a2", "text": "Yes.", "role": "assistant"},
    {"message_id": "d", "parent_id": "q", "text": "<s>", "role": "assistant", "rank": 0, "deleted": True},
    {"message_id": "d1", "parent_id": "d", "text": "Below a deleted one.", "role": "prompter"},
    {"message_id": "other", "text": "Another tree.", "role": "prompter"},
]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to(records: Records, name: str = "talks.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return to


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": [ASK, SAY]}, (QUESTION, ANSWER)),
        ({"messages": [{"role": "system", "content": "Be kind."}, ASK, SAY]}, (SYSTEM, QUESTION, ANSWER)),
        ({"messages": [{"role": "system", "content": " "}, ASK, SAY]}, (QUESTION, ANSWER)),
        ({"messages": [ASK, {**SAY, "weight": 0}, ASK, {**SAY, "weight": 1}]},
         (QUESTION, ANSWER._replace(train=False), QUESTION, ANSWER)),
        ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
         (QUESTION, ANSWER)),
        ({"prompt": "Why?", "completion": "Because."}, (QUESTION, ANSWER)),
        ({"prompt": "Why?", "response": "Because.", "completion": None}, (QUESTION, ANSWER)),
        ({"prompt": [{"role": "system", "content": "Be kind."}, ASK], "completion": [SAY]},
         (SYSTEM, QUESTION, ANSWER)),
        ({"prompt": HH, "response": " Because."}, (*HH_PROMPT, Message("assistant", " Because."))),
        ({"instruction": "Why?", "input": "", "output": "Because."}, (QUESTION, ANSWER)),
        ({"instruction": "Say it.", "input": "Why?", "output": "Because."},
         (Message("user", "Say it.\n\nWhy?"), ANSWER)),
        ({"system_prompt": "Be kind.", "question": "Why?", "response": "Because."}, (SYSTEM, QUESTION, ANSWER)),
        ({"system_prompt": "", "question": "Why?", "response": "Because."}, (QUESTION, ANSWER)),
        # UltraFeedback: the messages are the demonstration, whatever else the record holds.
        ({"prompt": "Why?", "chosen": [ASK, SAY], "rejected": [ASK, SAY], "messages": [ASK, SAY]}, (QUESTION, ANSWER)),
    ],
)  # fmt: skip
def test_dialogues_of_every_shape(write: Write, record: dict[str, Any], messages: tuple[Message, ...]):
    path = write([record])
    (dialogue,) = read_dialogues(path)
    assert dialogue.messages == messages and dialogue.source == "talks"
    assert dialogue.origin == Origin(str(path), 1) and str(dialogue.origin) == f"{path}:1"
    (prompt,) = read_prompts(path)  # the same without its answer
    assert prompt.messages == messages[:-1] and not prompt.is_safety
    assert prompt.record == {field: value for field, value in record.items() if value is not None}


@pytest.mark.parametrize(
    ("record", "prompt", "chosen"),
    [
        (PAIR, (QUESTION,), "So."),
        ({"prompt": [ASK], "chosen": [{"role": "assistant", "content": "So."}],
          "rejected": [{"role": "assistant", "content": "No."}]}, (QUESTION,), "So."),
        ({"chosen": [ASK, {**SAY, "content": "So."}], "rejected": [ASK, SAY]}, (QUESTION,), "So."),
        # UltraFeedback-binarized: both sides include the prompt, with or without a system message.
        ({"prompt": "Why?", "chosen": [ASK, {**SAY, "content": "So."}], "rejected": [ASK, SAY]}, (QUESTION,), "So."),
        ({"prompt": " Why?", "chosen": [{"role": "system", "content": "Be kind."}, ASK, {**SAY, "content": "So."}],
          "rejected": [{"role": "system", "content": "Be kind."}, ASK, SAY]}, (SYSTEM, QUESTION), "So."),
        ({"prompt": [{"role": "system", "content": "Be kind."}, ASK], "chosen": [ASK, {**SAY, "content": "So."}],
          "rejected": [ASK, SAY]}, (SYSTEM, QUESTION), "So."),
        # The same as text: long enough to be no chance, or with a line break behind it.
        ({"prompt": LONG, "chosen": f"{LONG} So.", "rejected": f"{LONG} No."}, (Message("user", LONG),), "So."),
        ({"prompt": "Hi", "chosen": "Hi\nSo.", "rejected": "Hi\n\nNo."}, (Message("user", "Hi"),), "So."),
        ({"prompt": "Hi", "chosen": "Hi there.", "rejected": "Hi."}, (Message("user", "Hi"),), "Hi there."),
        ({"prompt": LONG, "chosen": f"{LONG} So.", "rejected": "No."}, (Message("user", LONG),), f"{LONG} So."),
        # hh-rlhf: whole transcripts, or a prompt that ends where the answer is due.
        ({"chosen": f"{HH} So.", "rejected": f"{HH} No."}, HH_PROMPT, "So."),
        ({"prompt": HH, "chosen": "So.", "rejected": "No."}, HH_PROMPT, "So."),
        ({"prompt": HH, "chosen": f"{HH} So.", "rejected": f"{HH} No."}, HH_PROMPT, "So."),
    ],
)  # fmt: skip
def test_pairs_of_every_shape(write: Write, record: dict[str, Any], prompt: tuple[Message, ...], chosen: str):
    path = write([record])
    (pair,) = read_pairs(path)
    assert (pair.prompt, pair.chosen) == (prompt, chosen) and pair.rejected not in ("", chosen)
    assert pair[3:7] == (None, None, None, None) and pair.source == "talks" and str(pair.origin) == f"{path}:1"
    assert [p.messages for p in read_prompts(path)] == [prompt]


def test_ratings_margins_and_safety(write: Write):
    fields: Records = [
        *({"rating": rating} for rating in RATINGS),
        *({"rating": number} for number in (3, 2, 1, 0)),
        {"rating": 0.0, "margin": 0, "chosen_is_safe": False, "rejected_is_safe": False},
        {"margin": 0.0, "chosen_is_safe": True, "rejected_is_safe": False, "source": "set"},
        {"margin": -1.5, "rejected_is_safe": True, "rating": None},
    ]
    pairs = read_pairs(write([{**PAIR, **more} for more in fields]))
    assert [pair.rating for pair in pairs[:8]] == [*RATINGS, *RATINGS]
    assert pairs[0].margin is None
    assert pairs[8][3:7] == ("negligibly_better", 0.0, False, False)  # zeros are numbers, not missing
    assert pairs[9][3:8] == (None, 0.0, True, False, "set")
    assert pairs[10][3:7] == (None, -1.5, None, True)


def test_oasst_dialogues_follow_the_best_answers(write: Write):
    path = write(OASST)
    dialogues = read_dialogues(path)
    assert [[m.content for m in d.messages] for d in dialogues] == [
        ["Why?", "Because.", "And?", "So."],
        ["Why?", "Because.", "Really?", "Yes."],
    ]
    # "Because." belongs to both, but carries loss once.
    assert [[m.train for m in d.messages if m.role == "assistant"] for d in dialogues] == [[True, True], [False, True]]
    assert [d.origin.line for d in dialogues] == [11, 13] and {d.source for d in dialogues} == {"talks"}


def test_oasst_pairs_are_ranked_siblings(write: Write):
    pairs = read_pairs(write(OASST))
    assert [(p.chosen, p.rejected) for p in pairs] == [
        ("Because.", "Middling."), ("Because.", "Worst."), ("Middling.", "Worst."),
    ]  # fmt: skip
    assert all(p.prompt == (QUESTION,) and p.rating is None for p in pairs)
    assert [p.origin.line for p in pairs] == [3, 3, 4]


def test_oasst_prompts_are_all_messages_of_users(write: Write):
    prompts = read_prompts(write([*OASST, {**OASST[0], "message_id": 0, "is_safety": True}]))
    assert {p.key: p.messages[-1].content for p in prompts} == {
        "q": "Why?", "a1": "And?", "a2": "Really?", "a3": "Nobody answers.", "b1": "What?", "other": "Another tree.",
        "0": "Why?",
    }  # fmt: skip
    by_key = {p.key: p for p in prompts}
    assert [m.content for m in by_key["b1"].messages] == ["Why?", "Middling.", "What?"]
    assert by_key["0"].is_safety and not by_key["q"].is_safety and by_key["a1"].origin.line == 6


def test_oasst_in_any_order_of_its_lines(write: Write):
    def sets(records: Records) -> tuple[set[Any], ...]:
        path = write(records)
        dialogues = {tuple(m.content for m in d.messages) for d in read_dialogues(path)}
        return dialogues, {(p.chosen, p.rejected) for p in read_pairs(path)}, {p.key for p in read_prompts(path)}

    rows = [record for record in OASST if record["text"] != "Tie."]
    assert sets(rows) == sets(rows[::-1])


@pytest.mark.parametrize(
    ("change", "line", "problem"),
    [
        ({"message_id": "q"}, 2, "field 'message_id': q stands on line 1 already"),
        ({"parent_id": "gone"}, 2, "field 'parent_id': there is no message gone"),
        ({"parent_id": None}, 2, "field 'role': assistant cannot come first"),
        ({"role": "prompter"}, 2, "field 'role': prompter cannot come after user"),
        ({"role": "narrator"}, 2, "field 'role': unknown role 'narrator'"),
        ({"rank": "first"}, 2, "field 'rank' is 'first'"),
        ({"text": " "}, 2, "field 'text': empty answer"),
        ({"text": None}, 2, "field 'text' is missing, but the file began with OASST messages"),
        ({"deleted": 1}, 2, "field 'deleted' is 1"),
    ],
)
def test_bad_oasst(write: Write, change: dict[str, Any], line: int, problem: str):
    path = write([OASST[0], {**OASST[1], **change}])
    for read in (read_dialogues, read_pairs, read_prompts):
        with pytest.raises(ValueError) as error:
            read(path)
        assert str(error.value).startswith(f"{path}:{line}: {problem}")


def test_oasst_circles_equal_siblings_and_nothing_to_read(write: Write):
    circle = [{**OASST[0], "parent_id": "c"}, OASST[1]]
    with pytest.raises(ValueError, match=r"talks.jsonl: 2 messages follow each other in circles \(parent_id\)"):
        read_dialogues(write(circle))
    with pytest.raises(ValueError, match=r"jsonl:3: fields 'chosen' and 'rejected' are equal"):
        read_pairs(write([OASST[0], OASST[1], {**OASST[2], "text": "Worst. "}]))
    path = write(OASST[:1])
    with pytest.raises(ValueError, match=r"holds no dialogue"):
        read_dialogues(path)
    with pytest.raises(ValueError, match=r"holds no pair of ranked answers"):
        read_pairs(path)
    with pytest.raises(ValueError, match=r"holds no prompt"):
        read_prompts(write([{**OASST[0], "deleted": True}]))


def test_prompts_alone_and_their_fields(write: Write):
    records: Records = [
        {"prompt": "Why?", "is_safety": True, "name": "x", "reward": 0.0},
        {"messages": [ASK], "is_safety": False},
        {"messages": [ASK, SAY]},
        {"instruction": "Why?"},
        {"question": "Why?", "system_prompt": "Be kind."},
        {"prompt": HH},
    ]
    prompts = read_prompts(write(records))
    assert [p.messages for p in prompts] == [*[(QUESTION,)] * 4, (SYSTEM, QUESTION), HH_PROMPT]
    assert [p.is_safety for p in prompts] == [True, *[False] * 5]
    assert prompts[0].record == records[0] and prompts[0].record["reward"] == 0.0


def test_equal_prompts_keep_keys_of_their_own(write: Write):
    prompts = read_prompts(write([{"prompt": "Why?"}] * 3 + [{"prompt": "Why ?"}]))
    first = prompts[0].key
    assert [p.key for p in prompts[:3]] == [first, f"{first}#2", f"{first}#3"] and len({p.key for p in prompts}) == 4
    assert prompts[0].key == read_prompts(write([{"prompt": "Why?", "is_safety": True}], "other.jsonl"))[0].key
    named = read_prompts(write([{"prompt": "Why?", "id": name} for name in (0, "a", "a", "a#2", "a", 0)]))
    assert [p.key for p in named] == ["0", "a", "a#2", "a#2#2", "a#3", "0#2"]
    many = read_prompts(write([{"prompt": "Why?"}] * 3000))
    assert len({p.key for p in many}) == 3000


BAD: list[tuple[Callable[[Path], Any], dict[str, Any], str]] = [
    (read_dialogues, {"messages": [{"role": "bot", "content": "a"}]},
     "field 'messages[0].role': unknown role 'bot'; known are system, user"),
    (read_dialogues, {"conversations": [{"from": "bing", "value": "a"}]},
     "field 'conversations[0].from': unknown role 'bing'"),
    (read_dialogues, {"messages": [ASK, ASK, SAY]},
     "field 'messages': message 2 has role user where assistant is due"),
    (read_dialogues, {"messages": [SAY]}, "field 'messages': message 1 has role assistant where user is due"),
    (read_dialogues, {"messages": [ASK, SAY, {"role": "system", "content": "a"}]},
     "field 'messages': message 3 has role system"),
    (read_dialogues, {"messages": [ASK]},
     "field 'messages' ends with user, but the last message must be of role assistant"),
    (read_dialogues, {"messages": []}, "field 'messages' ends with nothing"),
    (read_dialogues, {"messages": [ASK, {**SAY, "content": " \n"}]},
     "field 'messages[1].content': empty answer"),
    (read_dialogues, {"messages": [{**ASK, "content": ""}, SAY]},
     "field 'messages[0].content': empty user message"),
    (read_dialogues, {"messages": [ASK, {**SAY, "content": 3}]},
     "field 'messages[1].content' holds int, not text"),
    (read_dialogues, {"messages": [ASK, {"role": "assistant"}]},
     "field 'messages[1]' has no content or value; found 'role'"),
    (read_dialogues, {"messages": [ASK, {"content": "a"}]}, "field 'messages[1]' has no role or from"),
    (read_dialogues, {"messages": [ASK, "Because."]}, "field 'messages[1]' holds str, not a message"),
    (read_dialogues, {"messages": {"role": "user"}}, "field 'messages' holds dict, neither text nor a list"),
    (read_dialogues, {"messages": [ASK, {**SAY, "weight": 0.5}]}, "field 'messages[1].weight' is 0.5"),
    (read_dialogues, {"messages": [ASK, {**SAY, "weight": 0}]},
     "field 'messages': every answer has weight 0"),
    (read_dialogues, {"messages": [{**ASK, "content": "\ud800"}, SAY]},
     "field 'messages[0].content' holds half a surrogate pair"),
    (read_dialogues, {"prompt": "Why?", "completion": ""}, "field 'completion': empty answer"),
    (read_dialogues, {"prompt": ["a"], "completion": "b"}, "field 'prompt[0]' holds str"),
    (read_dialogues, {"prompt": [ASK, SAY], "completion": "b"},
     "field 'prompt' ends with assistant, but the last message must be of role user"),
    (read_dialogues, {"instruction": "", "input": "", "output": "b"},
     "field 'instruction': empty user message"),
    (read_dialogues, {"instruction": "a", "input": 3, "output": "b"}, "field 'input' holds int"),
    (read_dialogues, {"system_prompt": "[INST]", "question": "a", "response": "b"},
     "field 'system_prompt' holds the chat template's tag [INST]"),
    (read_dialogues, {"system_prompt": 5, "question": "a", "response": "b"},
     "field 'system_prompt' holds int"),
    (read_dialogues, {"prompt": "a", "completion": "b", "source": 5}, "field 'source' holds int"),
    (read_dialogues, {"query": "a", "reply": "b"},
     "unknown shape: the record has 'query', 'reply'; known are chat (messages); ShareGPT (conversations); "
     "prompt-completion (prompt, completion);"),
    (read_dialogues, PAIR, "unknown shape: the record has 'prompt', 'chosen', 'rejected'"),
    (read_dialogues, {}, "unknown shape: the record has no field"),
    (read_pairs, {"messages": [ASK, SAY]},
     "unknown shape: the record has 'messages'; known are preference (chosen, rejected); OASST (message_id, "
     "text, role)"),
    (read_pairs, {**PAIR, "rejected": "So. "}, "fields 'chosen' and 'rejected' are equal"),
    (read_pairs, {**PAIR, "rejected": ""}, "field 'rejected': empty answer"),
    (read_pairs, {**PAIR, "chosen": 0}, "field 'chosen' holds int"),
    (read_pairs, {**PAIR, "chosen_is_safe": False, "rejected_is_safe": True},
     "field 'chosen_is_safe' is false while 'rejected_is_safe' is true"),
    (read_pairs, {**PAIR, "chosen_is_safe": 1}, "field 'chosen_is_safe' is 1, neither true nor false"),
    (read_pairs, {**PAIR, "margin": float("nan")}, "field 'margin' is nan, not a finite number"),
    (read_pairs, {**PAIR, "margin": float("inf")}, "field 'margin' is inf"),
    (read_pairs, {**PAIR, "margin": 10**400}, "field 'margin' is 1000"),
    (read_pairs, {**PAIR, "margin": "1"}, "field 'margin' is '1'"),
    (read_pairs, {**PAIR, "margin": True}, "field 'margin' is True"),
    (read_pairs, {**PAIR, "rating": "best"},
     "field 'rating' is 'best'; known are significantly_better, better, slightly_better, negligibly_better, "
     "or 3 to 0"),
    (read_pairs, {**PAIR, "rating": 4}, "field 'rating' is 4"),
    (read_pairs, {**PAIR, "rating": 1.5}, "field 'rating' is 1.5"),
    (read_pairs, {**PAIR, "rating": float("nan")}, "field 'rating' is nan"),
    (read_pairs, {**PAIR, "rating": True}, "field 'rating' is True"),
    (read_pairs, {**PAIR, "prompt": "a <</SYS>> b"}, "field 'prompt' holds the chat template's tag <</SYS>>"),
    (read_pairs, {**PAIR, "prompt": [ASK, SAY]}, "field 'prompt' ends with assistant"),
    (read_pairs, {"chosen": "a", "rejected": "b"},
     "field 'prompt' is missing, and 'chosen' does not include it"),
    (read_pairs, {"chosen": [ASK, SAY], "rejected": [{**ASK, "content": "What?"}, {**SAY, "content": "a"}]},
     "fields 'chosen' and 'rejected' differ before their last message"),
    (read_pairs, {**PAIR, "prompt": "What?", "chosen": [ASK, SAY]},
     "field 'chosen' has several messages, but does not begin with those of field 'prompt'"),
    (read_pairs, {"chosen": HH, "rejected": f"{HH} a"}, "field 'chosen': empty answer"),
    (read_pairs, {"chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "rejected": f"{HH} a"},
     "field 'chosen': message 2 has role user"),
    (read_prompts, {"messages": [SAY]}, "field 'messages' ends with nothing"),
    (read_prompts, {"prompt": "Why?", "is_safety": "yes"}, "field 'is_safety' is 'yes'"),
    (read_prompts, {"prompt": "Why?", "id": 1.5}, "field 'id' holds float"),
    (read_prompts, {"prompt": None}, "unknown shape: the record has no field"),
    (read_prompts, {"text": "Why?"},
     "unknown shape: the record has 'text'; known are chat (messages); ShareGPT (conversations); "
     "prompt-completion (prompt);"),
]  # fmt: skip


@pytest.mark.parametrize(("read", "record", "problem"), BAD)
def test_bad_records(write: Write, read: Callable[[Path], Any], record: dict[str, Any], problem: str):
    good = PAIR if read is read_pairs else {"prompt": "Why?", "completion": "Because."}
    path = write([good, record, good])
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:2: {problem}") and "\n" not in str(error.value)


def test_fields_may_be_read_under_other_names(write: Write):
    path = write([{"query": "Why?", "reply": "Because."}, {"query": "When?", "reply": "Now.", "is_safety": True}])
    first, second = read_dialogues(f"{path}?query=prompt&reply=completion")
    assert first.messages == (QUESTION, ANSWER) and second.messages[1].content == "Now."
    assert first.source == "talks" and first.origin == Origin(str(path), 1)
    assert [p.is_safety for p in read_prompts(f"{path}?query=prompt")] == [False, True]
    swapped = write([{**PAIR, "chosen": "worse", "rejected": "better"}], "swapped.jsonl")
    (pair,) = read_pairs(f"{swapped}?chosen=rejected&rejected=chosen")
    assert (pair.chosen, pair.rejected) == ("better", "worse")


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("query", "behind ? stand names of fields as THEIRS=OURS, joined by &, not 'query'"),
        ("query=", "behind ? stand names of fields"),
        ("ask=prompt", "no record has a field 'ask'; the first has query, reply"),
        ("query=reply", "1: field 'query' is to be read as 'reply', but the record has one of that name too"),
    ],
)
def test_other_names_that_fit_no_record(write: Write, query: str, problem: str):
    path = write([{"query": "Why?", "reply": "Because."}])
    with pytest.raises(ValueError) as error:
        read_dialogues(f"{path}?{query}")
    assert str(error.value).startswith(str(path)) and problem in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>"])
def test_template_tags_belong_to_the_template(write: Write, tag: str):
    for role, field in (("user", 1), ("system", 0)):
        messages = [{"role": "system", "content": "a"}, ASK, SAY]
        messages[field] = {"role": role, "content": f"a{tag}b"}
        path = write([{"messages": messages}])
        for read in (read_dialogues, read_prompts):
            with pytest.raises(ValueError) as error:
                read(path)
            assert f"{path}:1: field 'messages[{field}].content' holds the chat template's tag {tag};" in str(
                error.value
            )
    assert read_dialogues(write([{"messages": [ASK, {**SAY, "content": tag}]}]))  # an answer may speak of tags


def test_other_bad_lines_are_counted(write: Write):
    path = write([PAIR, {**PAIR, "rating": 9}, *[{**PAIR, "chosen": ""}] * 7])
    with pytest.raises(ValueError, match=r"jsonl:2: field 'rating' is 9.* \(7 more bad, at 3, 4, 5, 6, 7 …\)$"):
        read_pairs(path)


def lines(records: Records) -> bytes:
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode()


def test_files_of_every_kind(tmp_path: Path):
    zstandard = pytest.importorskip("zstandard")
    records: Records = [{"prompt": f"Why {n}? é", "completion": "Because.", "margin": None} for n in range(3)]
    listed = json.dumps(records, indent=1).encode()
    contents = {
        "a.jsonl": b"\xef\xbb\xbf" + lines(records[:1]) + b"\r\n\n  \n" + lines(records[1:]),
        "a.jsonl.gz": gzip.compress(lines(records)),
        "a.jsonl.zst": zstandard.compress(lines(records)),
        "a.json": b"\n " + listed,
        "a.json.gz": gzip.compress(listed),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        dialogues = read_dialogues(tmp_path / name)
        assert [d.messages[0].content for d in dialogues] == ["Why 0? é", "Why 1? é", "Why 2? é"], name
        assert [d.origin.line for d in dialogues] == ([1, 4, 5] if name == "a.jsonl" else [1, 2, 3])
        assert dialogues[0].source == "a"


def test_parquet(tmp_path: Path):
    """A column that other rows fill is null where a row lacks the field: as if it were missing."""
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    records: Records = [
        {"messages": [{**ASK, "weight": None}, {**SAY, "weight": 1}], "prompt": None, "completion": None},
        {"messages": None, "prompt": "Why?", "completion": "Because."},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    dialogues = read_dialogues(str(tmp_path / "a.parquet"))
    assert [d.messages for d in dialogues] == [(QUESTION, ANSWER)] * 2 and dialogues[1].origin.line == 2
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"b.parquet: no parquet file"):
        read_pairs(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", lines([PAIR]) + b'\n{"prompt": "\xff"}', "a.jsonl:2: not UTF-8: invalid start byte"),
        ("a.jsonl", lines([PAIR]) + b'\n{"prompt": "a"', "a.jsonl:2: not JSON: "),
        ("a.jsonl", b'"text"', "a.jsonl:1: no JSON object but str"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000, "a.jsonl:1: not JSON: nested too deeply"),
        ("a.jsonl", b"", "a.jsonl: holds no record"),
        ("a.json", b"[]", "a.json: holds no record"),
        ("a.json", b'[\n{"a": 1},\n{"a": }]', "a.json:3: not JSON: "),
        ("a.json", b'[\n{"a": "\xff"}]', "a.json:2: not UTF-8"),
        ("a.json", b'[{"prompt": "a"}, 5]', "a.json:2: no JSON object but int"),
        ("a.jsonl.gz", b"not compressed", "a.jsonl.gz: the compressed data is damaged"),
        ("a.jsonl.gz", gzip.compress(lines([PAIR] * 9))[:-12], "a.jsonl.gz: the compressed data is damaged"),
        ("a.txt", b"text", "a.txt: plain text holds no records"),
        ("a.csv", b"text", "a.csv: unknown kind of file; known are .jsonl"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, problem: str):
    (tmp_path / name).write_bytes(content)
    for read in (read_dialogues, read_pairs, read_prompts):
        with pytest.raises(ValueError) as error:
            read(tmp_path / name)
        assert problem in str(error.value)


def test_missing_files(tmp_path: Path):
    for path in (tmp_path / "gone.jsonl", tmp_path):
        with pytest.raises(ValueError, match="no such file of records"):
            read_pairs(path)
