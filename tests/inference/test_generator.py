"""Generated ids and log-probabilities: those of full forward passes, whatever runs beside them and in every layout."""

from __future__ import annotations

import gc
import math
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_llama import EOS, MODEL, Letters, RandomSource, frozen, requests, trainer_log_probs, uncached

from distributed import Ranks
from megallama.checkpoint.formats import StoreSource, write_hf
from megallama.checkpoint.formats.native import write_store
from megallama.config import ModelConfig
from megallama.inference import generator
from megallama.inference.batching import Lane, Row
from megallama.inference.cache import KVCache
from megallama.inference.decoding import answer_text
from megallama.inference.generator import Generator
from megallama.inference.sampling import Answer, Request, Sampling

GREEDY = Sampling(max_new_tokens=9, temperature=0)
RANDOM = Sampling(max_new_tokens=12, temperature=0.8, top_p=0.95)
MIXED = (GREEDY, RANDOM, Sampling(7, 1.3, top_k=5), Sampling(12, 1.0, stop=("AA", "Q")))


def mixed(count: int) -> list[Request]:
    """Requests of unlike sampling side by side."""
    return [r._replace(sampling=MIXED[n % len(MIXED)]) for n, r in enumerate(requests(count, GREEDY))]


def same(ours: list[Answer], theirs: list[Answer]) -> None:
    assert [(a.ids, a.finish) for a in ours] == [(a.ids, a.finish) for a in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.log_probs == pytest.approx(b.log_probs, abs=1e-11)


def test_greedy_ids_are_those_of_full_forward_passes() -> None:
    trainer = frozen()
    asked = requests(11, GREEDY)
    answers = Generator(trainer, Letters(), rows=3).run(asked)
    for request, answer in zip(asked, answers, strict=True):
        assert list(answer.ids) == uncached(trainer, request)
        ended = answer.ids[-1] == EOS
        assert answer.finish == ("eos" if ended else "length")
        assert ended or len(answer.ids) == request.sampling.max_new_tokens
    assert {answer.finish for answer in answers} == {"eos", "length"}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_log_probabilities_are_the_trainers(dtype: str) -> None:
    trainer = frozen(dtype=dtype)
    asked = mixed(12)
    for request, answer in zip(asked, Generator(trainer, Letters(), rows=5).run(asked), strict=True):
        assert len(answer.log_probs) == len(answer.ids)
        assert answer.log_probs == pytest.approx(trainer_log_probs(trainer, request, answer), abs=1e-5)


def test_answers_do_not_depend_on_their_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of rows, any order of the requests, prompts that enter one by one or together."""
    trainer, asked = frozen(), mixed(13)
    alone = [Generator(trainer, Letters()).run([request])[0] for request in asked]
    for rows in (1, 2, 5, 64):
        same(Generator(trainer, Letters(), rows).run(asked), alone)
    same(Generator(trainer, Letters(), 4).run(asked[::-1]), alone[::-1])
    monkeypatch.setattr(generator, "PROMPT_TOKENS", 3)
    same(Generator(trainer, Letters(), 4).run(asked), alone)


def test_equal_prompts_are_computed_once() -> None:
    """Ten answers to one prompt take as many prompt tokens as one, and differ by their seeds alone."""
    trainer, tokens = frozen(), []
    infer = trainer.infer
    trainer.infer = lambda micros, read: (tokens.append(micros[0].length), infer(micros, read))[1]  # type: ignore
    asked = [Request((5, 6, 7, 8, 9), seed, RANDOM) for seed in range(10)]
    seen = Generator(trainer, Letters()).run(asked)
    assert tokens[0] == 5 and tokens[1] <= 10
    assert len({answer.ids for answer in seen}) > 5
    same([Generator(frozen(), Letters()).run([request])[0] for request in asked], seen)


def answers_of(rank: int, world: int, tp: int, pp: int, rows: int, model: ModelConfig = MODEL) -> list[Answer]:
    return Generator(frozen(tp, pp, model), Letters(), rows).run(mixed(9))


LAYOUTS = [(2, 1), (1, 2), (1, 1)]
"""(tp, pp) on two ranks; the last is two replicas."""


def test_two_ranks_give_the_answers_of_one() -> None:
    alone = answers_of(0, 1, 1, 1, 4)
    with Ranks(2) as ranks:
        for tp, pp in LAYOUTS:
            for found in ranks.run(answers_of, tp, pp, 3):
                same(found, alone)
        one_head = replace(MODEL, num_key_value_heads=1)  # two ranks hold copies of it
        for found in ranks.run(answers_of, 2, 1, 64, one_head):
            same(found, answers_of(0, 1, 1, 1, 64, one_head))


@pytest.mark.slow
def test_four_ranks_give_the_answers_of_one() -> None:
    alone = answers_of(0, 1, 1, 1, 4)
    with Ranks(4) as ranks:
        for tp, pp in ((2, 2), (4, 1), (2, 1), (1, 2)):  # 4 > num_key_value_heads
            for found in ranks.run(answers_of, tp, pp, 3):
                same(found, alone)


def test_rows_are_as_many_as_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = frozen()
    asked = requests(9, GREEDY)
    length = max(len(request.prompt) for request in asked) + GREEDY.max_new_tokens - 1
    row = KVCache(trainer.stages.values(), 1, length).store.nbytes
    assert row == KVCache.row_bytes(trainer.stages.values(), length)
    made: list[int] = []

    class Counted(KVCache):
        def __init__(self, stages: Any, rows: int, length: int):
            super().__init__(stages, rows, length)
            made.append(rows)

    monkeypatch.setattr(generator, "KVCache", Counted)
    unbounded = Generator(trainer, Letters(), rows=6).run(asked)
    monkeypatch.setattr(generator, "free_memory", lambda device: 3.5 * row / generator.CACHE_SHARE)
    same(Generator(trainer, Letters(), rows=6).run(asked), unbounded)
    assert made == [6, 3]
    monkeypatch.setattr(generator, "free_memory", lambda device: row / 2)
    with pytest.raises(ValueError, match=r"one sequence of \d+ tokens need .* GiB, but the device has .* GiB left"):
        Generator(trainer, Letters()).run(asked)


def shares_of(rank: int, world: int, prompts: list[tuple[int, ...]]) -> list[int]:
    seen: list[int] = []
    asked = [Request(prompt, n, Sampling(1)) for n, prompt in enumerate(prompts)]
    Generator(frozen(), Letters()).run(asked, on_token=lambda number, token: seen.append(number))
    return seen


def test_a_prompts_answers_stay_on_one_replica() -> None:
    with Ranks(2) as ranks:
        a, b, c = (5, 4), (6, 4), (7, 4)
        assert [sorted(seen) for seen in ranks.run(shares_of, [a, b, a, b, c, a])] == [[0, 2, 5], [1, 3, 4]]
        assert ranks.run(shares_of, [a]) == [[0], []]  # the first rank sees its tokens: `chat` prints them


def broken(rank: int, world: int, tp: int, pp: int) -> str:
    """The error of a model whose logits are not finite where token 7 has been read; request 3 has it."""
    trainer = frozen(tp, pp)
    for stage in trainer.stages.values():
        if stage.embed is not None and 0 <= 7 - stage.embed.first < len(stage.embed.weight):
            stage.embed.weight.data[7 - stage.embed.first] = math.nan
    asked = [Request((5, 4, 20 + n), n, replace(GREEDY, max_new_tokens=1, top_k=1)) for n in range(6)]
    asked[3] = asked[3]._replace(prompt=(5, 7, 9))
    with pytest.raises(ValueError) as caught:
        Generator(trainer, Letters()).run(asked)
    return str(caught.value)


def test_logits_that_are_not_finite_end_all_ranks_together() -> None:
    words = "request 3: the logits of token 0 of the answer are not finite"
    assert words in broken(0, 1, 1, 1)
    with Ranks(2) as ranks:
        for tp, pp in LAYOUTS:
            assert all(words in text for text in ranks.run(broken, tp, pp, timeout=30))


def test_an_answer_ends_at_a_stop_text() -> None:
    """With the token that completes it, which may begin several tokens before; the text is cut before it."""
    trainer, prompt = frozen(), (9, 8, 7)
    free = Generator(trainer, Letters(None)).run([Request(prompt, 4, Sampling(20))])[0]
    text = Letters().decode(free.ids)
    stop = text[4:7]
    place = text.index(stop)
    sampling = Sampling(20, stop=("no such text", stop))
    found = Generator(trainer, Letters(None)).run([Request(prompt, 4, sampling)])[0]
    assert (found.finish, found.ids) == ("stop", free.ids[: place + 3])
    assert answer_text(Letters(), found.ids, sampling.stop) == text[:place]


def test_an_answer_ends_with_the_models_context() -> None:
    longest = MODEL.max_position_embeddings
    prompt = tuple(3 + n % 40 for n in range(longest - 4))
    (answer,) = Generator(frozen(), Letters(None)).run([Request(prompt, 0, Sampling(100))])
    assert (len(answer.ids), answer.finish) == (4, "length")


def test_no_requests_have_no_answers() -> None:
    assert Generator(frozen(), Letters()).run([]) == []


def fewer_requests_than_replicas(rank: int, world: int) -> list[Answer]:
    return Generator(frozen(), Letters()).run(mixed(1))


def test_a_replica_may_have_nothing_to_do() -> None:
    with Ranks(2) as ranks:
        for found in ranks.run(fewer_requests_than_replicas):
            same(found, answers_of(0, 1, 1, 1, 4)[:1])


@pytest.mark.parametrize(
    ("prompt", "seed", "words"),
    [
        ((), 0, ["request 1 has an empty prompt"]),
        (tuple([3] * 40), 0, ["request 1", "40 tokens", "max_position_embeddings is 40", "shorten it to 39"]),
        ((3, 51), 0, ["request 1", "ids from 3 to 51", "ends at 50"]),
        ((3, -1), 0, ["ids from -1 to 3"]),
        ((3,), 2**63, ["request 1", "9223372036854775808", "64 bits"]),
    ],
)
def test_bad_requests_are_refused(prompt: tuple[int, ...], seed: int, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        Generator(frozen(), Letters()).run([Request((3,), 0), Request(prompt, seed)])
    assert all(word in str(caught.value) for word in words)


def test_rows_must_be_positive() -> None:
    with pytest.raises(ValueError, match="rows=0 must be at least 1"):
        Generator(frozen(), Letters(), 0)


def test_tokens_and_answers_are_told_as_they_come() -> None:
    told: list[tuple[int, int]] = []
    shown: list[Any] = []

    @contextmanager
    def watch(label: str, total: int) -> Iterator[Callable[[int], None]]:
        shown.append((label, total))
        yield shown.append

    answers = Generator(frozen(), Letters(), rows=2).run(mixed(7), lambda n, token: told.append((n, token)), watch)
    for n, answer in enumerate(answers):
        assert [token for number, token in told if number == n] == list(answer.ids)
    assert shown == [("answers", 7), *[1] * 7]


def test_memory_is_what_is_needed_and_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[torch.Size, weakref.ref]] = []

    class Watched(KVCache):
        def __init__(self, *args: Any):
            super().__init__(*args)
            made.append((self.store.shape, weakref.ref(self.store)))

    monkeypatch.setattr(generator, "KVCache", Watched)
    answer = Generator(frozen(), Letters(), rows=3).run([Request((3, 4), n, Sampling(20)) for n in range(5)])
    assert len(answer) == 5
    gc.collect()
    (shape, kept), *others = made
    # 2 + 20 - 1 tokens, rounded up to 32; as many heads as there are for keys, not for queries
    assert not others and shape == (MODEL.num_hidden_layers, 2, 3, MODEL.num_key_value_heads, 32, MODEL.head_dim)
    assert kept() is None


def test_a_row_that_moves_takes_its_keys_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of three rows ends first, so the last one moves: what it left is spoilt, and nobody notices."""
    moved = []

    class Spoilt(KVCache):
        def move(self, source: int, target: int, tokens: int) -> None:
            super().move(source, target, tokens)
            self.store[:, :, source] = 1e3
            moved.append((source, target))

    monkeypatch.setattr(generator, "KVCache", Spoilt)
    trainer = frozen()
    asked = [Request((3 + n, 4), n, replace(GREEDY, max_new_tokens=2 + 3 * n)) for n in range(3)]
    for request, answer in zip(asked, Generator(trainer, Letters(None)).run(asked), strict=True):
        assert list(answer.ids) == uncached(trainer, request, None)
    assert moved[0] == (2, 0)


def test_a_pass_lets_in_no_more_than_its_tokens() -> None:
    """Prompts up to the limit together; a longer one alone."""
    waiting = deque(Row(n, Request((3,) * size, 0), 40, Letters()) for n, size in enumerate((2, 2, 9, 1)))
    lane = Lane(KVCache(frozen().stages.values(), 4, 32), 4, 4, 1)
    entered = []
    while waiting:
        before = len(lane.rows)
        lane.admit(waiting)
        entered.append([len(row.request.prompt) for row in lane.rows[before:]])
    assert entered == [[2, 2], [9], [1]]


WIDE = replace(MODEL, num_attention_heads=8, num_hidden_layers=3, vocab_size=60)


@pytest.fixture(scope="session")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """transformers with our weights, in fp64, from an export."""
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers: pip install megallama[hf]")
    folder = tmp_path_factory.mktemp("export")
    write_store(RandomSource(WIDE), folder / "store")
    write_hf(StoreSource(folder / "store"), folder / "hf")
    yield transformers.LlamaForCausalLM.from_pretrained(folder / "hf", dtype=torch.float64, local_files_only=True)


def test_transformers_generates_the_same_ids(theirs: Any) -> None:
    asked = requests(7, replace(GREEDY, max_new_tokens=15), WIDE)
    for request, answer in zip(asked, Generator(frozen(model=WIDE), Letters(), 4).run(asked), strict=True):
        prompt = torch.tensor(request.prompt)[None]
        found = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=request.sampling.max_new_tokens,
            eos_token_id=EOS,
            pad_token_id=0,
        )
        assert list(answer.ids) == found[0, len(request.prompt) :].tolist()


def test_transformers_gives_the_same_log_probabilities(theirs: Any) -> None:
    asked = [r._replace(sampling=Sampling(10, 0.7)) for r in requests(5, GREEDY, WIDE)]
    for request, answer in zip(asked, Generator(frozen(model=WIDE), Letters(), 4).run(asked), strict=True):
        ids = torch.tensor(request.prompt + answer.ids)
        with torch.no_grad():
            logits = theirs(ids[None]).logits[0] / 0.7
        expected = logits.log_softmax(1)[torch.arange(len(ids) - 1), ids[1:]]
        # transformers turns by angles in fp32, even in an fp64 model
        assert answer.log_probs == pytest.approx(expected[len(request.prompt) - 1 :].tolist(), abs=1e-5)
