"""The largest attention over heads and layers, against transformers' eager attention on the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from alignment_world import RandomSource, write_records
from ghost_world import BriefSource, GhostWorld, make_ghost_world, run_tool, shape
from torch import Tensor

from distributed import Ranks
from megallama.checkpoint.formats import write_hf
from megallama.data import Message
from megallama.rlhf.chat_model import Setup, open_chat_model
from megallama.rlhf.ghost import attention_map
from megallama.rlhf.ghost.attention_map import look, sections

IDS = [(7 * n * n + 3 * n) % 300 for n in range(41)]
WATCHED = (3, 9)
EAGER = 2e-7
"""Its rotations and softmax are in fp32, in a model in fp64 too."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> GhostWorld:
    world = make_ghost_world(tmp_path_factory.mktemp("attention"))
    write_hf(RandomSource(shape(512)), world.root / "hf", torch.float32)
    return world


@pytest.fixture(scope="module")
def eager(world: GhostWorld) -> Tensor:
    """(T, T) the largest attention of IDS over heads and layers, by transformers."""
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers: pip install megallama[hf]")
    model: Any = transformers.LlamaForCausalLM.from_pretrained(
        world.root / "hf", attn_implementation="eager", dtype=torch.float64
    )
    with torch.no_grad():
        found = model(torch.tensor([IDS]), output_attentions=True).attentions
    assert len(found) == 2 and found[0].shape == (1, 4, len(IDS), len(IDS))
    return torch.cat(found).amax((0, 1))


def seen(rank: int, size: int, world: GhostWorld, tp: int, pp: int, width: int) -> tuple[Tensor, Tensor]:
    setup = Setup(str(world.tokenizer), tp=tp, pp=pp, dtype="float64")
    model = open_chat_model(str(world.root / "hf"), setup, torch.device("cpu"))
    return tuple(look(model.trainer, IDS, WATCHED, width))  # type: ignore[return-value]


@pytest.mark.parametrize("scores", [1 << 24, 700])
def test_maxima_are_those_of_eager_attention(
    world: GhostWorld, eager: Tensor, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_map, "SCORES", scores)  # 700: a few queries at a time
    peaks, whole = seen(0, 1, world, 1, 1, 1)
    torch.testing.assert_close(whole, eager, atol=EAGER, rtol=0)
    torch.testing.assert_close(peaks, eager[:, slice(*WATCHED)].amax(1), atol=EAGER, rtol=0)
    assert not peaks[:3].any() and (peaks[3:] > 0).all() and not whole.triu(1).any()
    same, places = seen(0, 1, world, 1, 1, 6)
    padded = torch.nn.functional.pad(eager, (0, 1, 0, 1)).view(7, 6, 7, 6).amax((1, 3))
    torch.testing.assert_close(places, padded, atol=EAGER, rtol=0)
    assert torch.equal(same, peaks)


@pytest.mark.parametrize(
    "size, layouts", [(2, [(2, 1), (1, 2), (1, 1)]), pytest.param(4, [(2, 2), (4, 1)], marks=pytest.mark.slow)]
)
def test_every_layout_sees_the_same(world: GhostWorld, size: int, layouts: list[tuple[int, int]]) -> None:
    """41 tokens: tp 2 and 4 pad them; with tp 4, K/V heads have copies."""
    alone = seen(0, 1, world, 1, 1, 4)
    with Ranks(size) as ranks:
        for tp, pp in layouts:
            for found in ranks.run(seen, world, tp, pp, 4):
                torch.testing.assert_close(found, alone, atol=1e-12, rtol=0)


def test_looking_changes_nothing_of_what_the_model_computes(world: GhostWorld) -> None:
    """The values that attention returns are those of the kernel: the same logits in the end."""
    from megallama.data.batch import Batch

    model = world.open(dtype="float64")
    tokens = torch.tensor(IDS)
    bounds = (0, len(IDS))
    peaks = attention_map.Peaks(len(IDS), WATCHED, 1, torch.device("cpu"))
    peaks.wanted = torch.arange(len(IDS))
    plain = Batch(tokens, tokens, torch.arange(len(IDS)), bounds, 0)
    noted = Batch(tokens, tokens, torch.arange(len(IDS)), bounds, 0, cache=peaks)
    (one,), (other,) = (model.trainer.infer([batch], lambda logits, _: logits.clone()) for batch in (plain, noted))
    torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


def test_sections_are_the_messages_and_the_instruction_s_own_words(world: GhostWorld) -> None:
    form = world.open().form
    talk = [Message("user", "Say red."), Message("assistant", "red", False), Message("user", "Say blue."),
            Message("assistant", "blue"), Message("user", "Unanswered.")]  # fmt: skip
    for before, messages in (("system", [Message("system", "Always act as X."), *talk]),
                             ("user", [Message("user", "Always act as X.\n\nSay red."), *talk[1:]])):  # fmt: skip
        ids, parts = sections(form, messages, "Always act as X.")
        texts = [form.tokenizer.decode(ids[part.first : part.last]).strip() for part in parts]
        assert [part.name for part in parts] == ["instruction", "user", "assistant", "user", "assistant"]
        assert texts[0] == "Always act as X." and texts[1].endswith("Say red. [/INST]")
        assert texts[1].startswith("<</SYS>>" if before == "system" else "Say red.")
        assert texts[2:] == ["red", "[INST] Say blue. [/INST]", "blue"] and parts[-1].last == len(ids)
        assert ids == form.dialogue(messages[:-1]).ids.tolist()


def test_the_tool_draws_two_models(world: GhostWorld, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    talks, output, told = tmp_path / "talks.jsonl", tmp_path / "new" / "map.png", tmp_path / "map.json"
    answered = [{"role": role, "content": f"Say {n}."} for n in range(6) for role in ("user", "assistant")]
    write_records(talks, [{"messages": answered}, {"messages": [{"role": "system", "content": "Be X."}, *answered]}])
    write_hf(BriefSource(shape(64)), tmp_path / "small", torch.float32)
    models = (f"without={world.model}", f"with={world.root / 'hf'}")
    plain = ("--tokenizer", world.tokenizer, "--dialogues", talks, "--dtype", "float32", "--output", output)
    run_tool("plot_gatt_attention", *models, *plain, "--record", 2, "--turns", 4, "--json", told)
    lines = capfd.readouterr().out.splitlines()
    found = json.loads(told.read_text())
    answers = [part for part in found["sections"] if part["name"] == "assistant"]
    assert len(answers) == 4 and output.read_bytes()[:4] == b"\x89PNG" and list(output.parent.iterdir()) == [output]
    assert list(found["models"]) == ["without", "with"] and lines[-1] == f"wrote {output}"
    for line, (name, model) in zip(lines, found["models"].items(), strict=False):
        means = [sum(model["tokens"][p["first"] : p["last"]]) / (p["last"] - p["first"]) for p in answers]
        assert means == pytest.approx(model["answers"]) and line.startswith(f"{name}: attention to the instruction")
        assert len(model["tokens"]) == found["sections"][-1]["last"]
    for arguments, problem in (
        ((*models, *plain), f"{talks}:1: no system message; choose another --record, or give an --instruction"),
        ((*models, *plain, "--record", 3), "--record 3, but"),
        ((*models, *plain, "--output", tmp_path / "map.txt"), "end its name in .png, .pdf or .svg"),
        ((tmp_path / "small", *plain, "--record", 2), "but the model's max_position_embeddings is 64; give a shorter"),
    ):
        with pytest.raises(SystemExit):
            run_tool("plot_gatt_attention", *arguments)
        error = capfd.readouterr().err
        assert problem in error and error.count("\n") == 1, error
