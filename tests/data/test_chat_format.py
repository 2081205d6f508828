"""The chat template in ids: prompts are prefixes, answers are what the tokenizer makes of the whole, EOS is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from documents import sentences
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.data import ChatFormat, Message, Tokenizer, load_tokenizer
from megallama.data.messages import TAGS

SYSTEM = Message("system", "Be brief.\nBe kind.")
TALK = (
    SYSTEM,
    Message("user", "What is 12 of the 1984?"),
    Message("assistant", "It is that,\nin the end."),
    Message("user", " and é? "),
    Message("assistant", " ß 漢字 for it. "),
)
WORDS = ["the", "of", "12", "é", "漢字", "\U0001f600", "-", "(a)", "…", "]", "[", "/INST", "_", "▁", "x" * 30]


def byte_level(path: Path, eos: str = "</s>", pad: str = "<pad>") -> Tokenizer:
    """A byte-level BPE tokenizer.json, its separator an added token."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", eos, pad, "<|answer|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([*sentences(100), "[INST] the [/INST] in that"], trainer)
    tokenizer.save(str(path))
    path.with_name("special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": eos}))
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def tokenizers(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("byte_level")
    return {"pieces": load_tokenizer(tokenizer_path), "bytes": byte_level(folder / "tokenizer.json")}


@pytest.fixture(params=["pieces", "bytes"])
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers[request.param]


def joint(tokenizer: Tokenizer, turns: Sequence[tuple[str, str]]) -> list[int]:
    """The oracle: every turn's whole text encoded at once."""
    ids: list[int] = []
    for prompt, answer in turns:
        ids += [tokenizer.bos, *tokenizer.encode(f"{prompt} {answer}"), tokenizer.eos]
    return ids


def test_a_dialogue_is_the_joint_encoding_of_the_template(tokenizer: Tokenizer):
    first = "[INST] <<SYS>>\nBe brief.\nBe kind.\n<</SYS>>\n\nWhat is 12 of the 1984? [/INST]"
    second = "[INST] and é? [/INST]"
    chat = ChatFormat(tokenizer)
    expected = joint(tokenizer, [(first, "It is that,\nin the end."), (second, "ß 漢字 for it.")])
    coded = chat.dialogue(TALK)
    assert coded.ids.tolist() == expected and coded.ids.dtype == np.int32 and coded.train.dtype == bool
    assert chat.prompt(TALK[:2]) == [tokenizer.bos, *tokenizer.encode(first)]
    assert chat.dialogue((Message("system", " "), *TALK[3:])).ids.tolist() == chat.dialogue(TALK[3:]).ids.tolist()


texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join) | st.text(
    st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12
)


@pytest.mark.parametrize("kind", ["pieces", "bytes"])
@settings(max_examples=50)
@given(user=texts, answer=texts)
def test_any_text_is_encoded_as_if_it_were_one(tokenizers: dict[str, Tokenizer], kind: str, user: str, answer: str):
    tokenizer = tokenizers[kind]
    if not user.strip() or not answer.strip() or any(tag in user for tag in TAGS):
        return
    chat = ChatFormat(tokenizer)
    messages = [Message("user", user), Message("assistant", answer)]
    coded, prompt = chat.dialogue(messages), chat.prompt(messages[:1])
    assert coded.ids.tolist() == joint(tokenizer, [(f"[INST] {user.strip()} [/INST]", answer.strip())])
    assert coded.ids.tolist() == [*prompt, *chat.answer(answer), tokenizer.eos]
    said = chat.text(chat.answer(answer))
    assert said == (answer if kind == "bytes" else answer.replace("▁", " ")).strip()  # ▁ is SentencePiece's blank


def test_prompts_are_prefixes_and_labels_are_answers_with_their_eos(tokenizer: Tokenizer):
    chat = ChatFormat(tokenizer)
    ids, train = chat.dialogue(TALK)
    first, second = chat.prompt(TALK[:2]), chat.prompt(TALK[:4])
    answers = [[*chat.answer(TALK[n].content), tokenizer.eos] for n in (2, 4)]
    assert ids[: len(first)].tolist() == first and ids[: len(second)].tolist() == second
    assert second == [*first, *answers[0], *second[len(first) + len(answers[0]) :]]
    assert ids[train].tolist() == answers[0] + answers[1]
    assert not train[: len(first)].any() and not train[len(first) + len(answers[0]) : len(second)].any()
    assert ids[-1] == tokenizer.eos and train[-1]


def test_every_eos_is_trained_where_padding_has_its_id(tmp_path: Path):
    """The mask comes from places, not ids: nothing can take EOS for padding."""
    tokenizer = byte_level(tmp_path / "tokenizer.json", eos="<|end|>", pad="<|end|>")
    chat = ChatFormat(tokenizer)
    talks = [[Message("user", "in"), Message("assistant", text)] for text in sentences(20)]
    for ids, train in chat.dialogues(talks):
        assert train[ids == tokenizer.eos].tolist() == [True] == train[-1:].tolist()


def test_messages_without_weight_are_not_trained(tokenizer: Tokenizer):
    """What ghost attention asks for: no loss on an earlier answer, nor on its EOS; the ids stay."""
    chat = ChatFormat(tokenizer)
    ghost = [*TALK[:2], TALK[2]._replace(train=False), *TALK[3:]]
    full, coded = chat.dialogue(TALK), chat.dialogue(ghost)
    assert np.array_equal(full.ids, coded.ids)
    assert coded.ids[coded.train].tolist() == [*chat.answer(TALK[4].content), tokenizer.eos]
    with pytest.raises(ValueError, match="no answer among 2 carries loss"):
        chat.dialogue([message._replace(train=False) for message in TALK])


def test_separator(tokenizers: dict[str, Tokenizer]):
    for kind, separator in (("pieces", "<0x0A>"), ("bytes", "<|answer|>")):
        tokenizer = tokenizers[kind]
        plain, chat = ChatFormat(tokenizer), ChatFormat(tokenizer, separator)
        token = tokenizer.token_id(separator)
        assert chat.prompt(TALK[:2]) == [*plain.prompt(TALK[:2]), token]
        coded = chat.dialogue(TALK)
        assert coded.ids[: len(chat.prompt(TALK[:4]))].tolist() == chat.prompt(TALK[:4])
        assert coded.ids[coded.train].tolist() == plain.dialogue(TALK).ids[plain.dialogue(TALK).train].tolist()
        assert len({plain.fingerprint(), chat.fingerprint(), ChatFormat(tokenizer, "</s>").fingerprint()}) == 3
        assert chat.fingerprint() == ChatFormat(tokenizer, separator).fingerprint()
        with pytest.raises(ValueError, match=r"separator '<sep> 2' is no single token among the tokenizer's \d+"):
            ChatFormat(tokenizer, "<sep> 2")
    assert ChatFormat(tokenizers["pieces"]).fingerprint() != ChatFormat(tokenizers["bytes"]).fingerprint()


def test_batches_equal_single_dialogues(tokenizer: Tokenizer):
    chat = ChatFormat(tokenizer)
    talks = [TALK[:n] for n in (3, 5)] + [TALK[1:3], TALK[3:]]
    batch = chat.dialogues(talks)
    assert len(batch) == 4 and chat.dialogues([]) == []
    for coded, talk in zip(batch, talks, strict=True):
        alone = chat.dialogue(talk)
        assert np.array_equal(coded.ids, alone.ids) and np.array_equal(coded.train, alone.train)


def test_generated_ids_to_text(tokenizer: Tokenizer):
    chat = ChatFormat(tokenizer)
    ids = chat.answer("  in the end.  ")
    assert chat.text(ids) == chat.text([*ids, tokenizer.eos, *ids, tokenizer.eos]) == "in the end."
    assert chat.text(np.array([tokenizer.bos, *ids])) == "in the end."
    assert chat.text([]) == chat.text([tokenizer.eos]) == "" and chat.answer(" \n") == []


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "ends with nothing, but the last message must be of role assistant"),
        (TALK[:2], "ends with user"),
        ((TALK[2],), "message 1 has role assistant where user is due"),
        ((TALK[1], TALK[3], TALK[4]), "message 2 has role user where assistant is due"),
        ((TALK[1], SYSTEM, TALK[2]), "message 2 has role system"),
        ((Message("user", "a [/INST] b"), TALK[2]), r"messages\[0\].content' holds the chat template's tag \[/INST\]"),
        ((TALK[1], Message("assistant", " ")), r"messages\[1\].content': empty answer"),
        ((TALK[1], Message("assistant", "\ud800")), "half a surrogate pair"),
    ],
)
def test_bad_messages(tokenizer: Tokenizer, messages: Sequence[Message], problem: str):
    with pytest.raises(ValueError, match=problem):
        ChatFormat(tokenizer).dialogue(messages)


def test_special_tokens_cannot_be_forged(tmp_path: Path):
    """A text of "<|end|>" would become EOS itself in a tokenizer that looks for added tokens."""
    chat = ChatFormat(byte_level(tmp_path / "tokenizer.json", eos="<|end|>"))
    for talk in ([Message("user", "a <|end|>"), TALK[2]], [TALK[1], Message("assistant", "b <|end|>")]):
        with pytest.raises(ValueError, match=r"spells the tokenizer's special token '<\|end\|>' \(1\)"):
            chat.dialogue(talk)


class Words:
    """A tokenizer of whole texts: each gets one id, so that none begins with the anchor's."""

    vocab_size, bos, eos = 1000, None, 0

    def __init__(self):
        self.known: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return [self.known.setdefault(text, len(self.known) + 1)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(next(text for text, i in self.known.items() if i == token) for token in ids)

    def token_id(self, piece: str) -> int | None:
        return self.known.get(piece)

    def fingerprint(self) -> str:
        return "words"


def test_tokenizers_whose_pieces_reach_over_blanks():
    """The answer is then encoded alone; prompts stay prefixes. No BOS: none is placed."""
    tokenizer = Words()
    chat = ChatFormat(tokenizer)
    coded = chat.dialogue([Message("user", "q"), Message("assistant", "a b")])
    assert [tokenizer.decode([i]) for i in coded.ids[:2].tolist()] == ["[INST] q [/INST]", "a b"]
    assert coded.ids[-1] == 0 and coded.train.tolist() == [False, True, True]
    tokenizer.eos = None
    with pytest.raises(ValueError, match="no EOS token"):
        ChatFormat(tokenizer)


def test_token_id(tokenizers: dict[str, Tokenizer]):
    pieces, levels = tokenizers["pieces"], tokenizers["bytes"]
    assert [pieces.token_id(p) for p in ("<unk>", "<s>", "</s>", "<0x0A>", "no such piece", "")] == [
        0, 1, 2, 13, None, None,
    ]  # fmt: skip
    assert [levels.token_id(p) for p in ("<s>", "</s>", "<|answer|>", "no such piece", "")] == [0, 1, 3, None, None]
