"""Supervised fine-tuning (Llama 2 paper, section 3.1): packed dialogues, loss on the answers' tokens alone."""

from __future__ import annotations

from collections.abc import Sequence

from megallama.config import Config
from megallama.data import ChatFormat, Dialogue, Encoded, pack, read_dialogues
from megallama.data.rows import DialogueLoader
from megallama.runtime.mesh import Mesh
from megallama.train.loop import Task
from megallama.train.run import of_weights, run_stage
from megallama.train.sources import chat_format, dialogue_ids, epoch_order, open_sources, tokenised, with_steps
from megallama.train.trainer import NextToken, empty_trainer


def run(config: Config) -> int:
    """Fine-tune as `config` says; returns the exit code. Every rank of the launch calls it."""
    return run_stage(of_weights(config, "sft"), sft_task, empty_trainer)


def sft_task(config: Config, mesh: Mesh) -> tuple[Config, Task]:
    """Read, tokenise and pack the dialogues of all epochs. Collective.

    Raises:
        ValueError: a record is not valid, its prompt alone is as long as data.seq_length, or the tokenizer is wrong.
    """
    form, sft, data = chat_format(config), config.sft, config.data
    sources = open_sources(sft.sources, sft.valid, read_dialogues, config, "sft")
    coded = tokenised(sources.records, lambda part: encode(form, part, data.seq_length), mesh)
    dialogues, cut = [dialogue for dialogue, _ in coded], sum(is_cut for _, is_cut in coded)
    shares = [source.share for source in sft.sources]
    sequences: list[list[int]] = []
    for epoch in range(sft.epochs):
        order = epoch_order(sources.sizes, shares, config.train.seed, epoch)
        packed = pack([len(dialogues[n].ids) for n in order], data.seq_length)
        sequences += [[order[place] for place in sequence] for sequence in packed]
    config = with_steps(config, len(sequences), "sft")

    def loader(dialogues: Sequence[Encoded], sequences: Sequence[Sequence[int]]) -> DialogueLoader:
        return DialogueLoader(dialogues, sequences, data.mask_documents, mesh.tp.size)

    valid = None
    if held := [record for records in sources.valid.values() for record in records]:
        encoded = [dialogue for dialogue, _ in tokenised(held, lambda part: encode(form, part, data.seq_length), mesh)]
        valid = loader(encoded, pack([len(dialogue.ids) for dialogue in encoded], data.seq_length))
    tokens = sum(len(dialogues[n].ids) for sequence in sequences for n in sequence)
    notes = [
        f"{len(dialogues)} dialogues in {len(sequences)} sequences over {sft.epochs} epochs, "
        f"{tokens / (len(sequences) * data.seq_length):.1%} full"
    ]
    if cut:
        notes.append(f"{cut} of {len(dialogues)} dialogues are longer than data.seq_length={data.seq_length}: cut off")
    fingerprints = {"format": form.fingerprint(), **sources.files}
    loss = NextToken(config.model.vocab_size, mesh.tp)
    validates = valid if config.train.valid_interval else None
    return config, Task(loss, loader(dialogues, sequences), validates, fingerprints, "sft", tuple(notes))


def encode(form: ChatFormat, dialogues: Sequence[Dialogue], longest: int) -> list[tuple[Encoded, bool]]:
    """Dialogues as ids, and whether what is beyond `longest` was cut off.

    Raises:
        ValueError: nothing of an answer would be left; names file, line and both lengths.
    """
    found = []
    whole = dialogue_ids(form, [(dialogue.origin, dialogue.messages) for dialogue in dialogues])
    for dialogue, (ids, train) in zip(dialogues, whole, strict=True):
        if not train[1:longest].any():
            raise ValueError(
                f"{dialogue.origin}: no token of an answer is left to learn of {len(ids)} tokens within "
                f"data.seq_length={longest}; raise it, or remove the record"
            )
        found.append((Encoded(ids[:longest], train[:longest]), len(ids) > longest))
    return found
