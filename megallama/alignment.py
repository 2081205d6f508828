"""The sections of the configuration for the stages after pretraining; defaults from the Llama 2 paper."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ChatConfig:
    """How dialogues become tokens: the Llama 2 template, [INST] <<SYS>> … <</SYS>> … [/INST] ….

    Args:
        separator: token between prompt and answer (the paper, section 3.1); one id of the tokenizer. null = the
            template's [/INST] alone.
    """

    separator: str | None = None


@dataclass(frozen=True)
class RecordsConfig:
    """One file of chat or preference records (docs/formats.md); its format is found out.

    Args:
        path: .jsonl (also .gz, .zst), .json or .parquet; FILE?theirs=ours&… reads its fields under other names.
        share: its part of an epoch, between 0 and 1; null = all its records once.
    """

    path: str
    share: float | None = None


@dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning (stage `sft`; the paper, section 3.1). Dialogues are packed into data.seq_length tokens.

    Args:
        sources: files of dialogues.
        valid: files of held-out dialogues; empty = data.split of the sources.
        epochs: times through the sources.
    """

    sources: tuple[RecordsConfig, ...] = ()
    valid: tuple[str, ...] = ()
    epochs: int = 2


@dataclass(frozen=True)
class RewardConfig:
    """Reward models (stage `reward`; the paper, section 3.2.2). Pairs longer than data.seq_length are cut.

    Args:
        sources: files of preference records.
        valid: files of held-out pairs, each reported by itself; empty = data.split of the sources.
        epochs: times through the sources.
        margin: none, small (1, 2/3, 1/3, 0 from significantly to negligibly better) or large (3, 2, 1, 0).
        safety_weight: weight of the auxiliary loss that tells safe from unsafe answers; 0 = none.
        models: reward-eval compares these reward models (runs or folders), each on every file of valid.
    """

    sources: tuple[RecordsConfig, ...] = ()
    valid: tuple[str, ...] = ()
    epochs: int = 1
    margin: str = "small"
    safety_weight: float = 0.0
    models: tuple[str, ...] = ()


@dataclass(frozen=True)
class JudgesConfig:
    """The reward models that score answers in rejection sampling and PPO (a run, a checkpoint or an HF folder each).

    Args:
        helpfulness: scores every answer.
        safety: decides where a prompt is tagged as a matter of safety, or where its score is below the threshold;
            null = none.
        threshold: of the safety model's probability (the paper: 0.15).
        watch: a further model that scores held-out answers and trains nobody: it shows over-optimisation.
    """

    helpfulness: str | None = None
    safety: str | None = None
    threshold: float = 0.15
    watch: str | None = None


@dataclass(frozen=True)
class RejectionConfig:
    """Rejection sampling (stage `rejection-sample`; the paper, section 3.2.3).

    Args:
        model: what samples; a run, a checkpoint or an HF folder.
        prompts: file of prompts.
        samples: K, answers a prompt at each temperature.
        temperatures: the curves show which is best.
        max_new_tokens: longest answer.
        bags: output folders of earlier iterations whose best answers compete too.
        version: name of the model in the records; null = the name of its folder.
        part: prompts between two saves; a killed run goes on from the last.
    """

    model: str | None = None
    prompts: str | None = None
    samples: int = 10
    temperatures: tuple[float, ...] = (0.8, 1.0, 1.2)
    max_new_tokens: int = 1024
    bags: tuple[str, ...] = ()
    version: str | None = None
    part: int = 256


@dataclass(frozen=True)
class PpoConfig:
    """Proximal policy optimisation (stage `ppo`; the paper, section 3.2.3). train.steps are iterations, and
    train.global_batch_size is the mini-batch.

    Args:
        prompts: file of prompts.
        valid_prompts: file of held-out prompts, answered at each validation.
        critic: where the critic starts; null = the helpfulness model.
        rollouts: answers an iteration; rollouts / train.global_batch_size gradient steps follow.
        max_new_tokens: longest answer.
        temperature: of the policy, in sampling and in every log-probability.
        beta: weight of the KL penalty (the paper: 0.01 for 7B and 13B, 0.005 for 34B and 70B).
        clip: of the probability ratio.
        value_clip: of the critic's change; 0 = none.
        discount: gamma, for each token.
        gae_lambda: bias against variance in the advantages.
        critic_lr: peak learning rate of the critic; null = optim.lr.
        patience: validations without a better held-out reward before the run stops; 0 = never.
    """

    prompts: str | None = None
    valid_prompts: str | None = None
    critic: str | None = None
    rollouts: int = 512
    max_new_tokens: int = 1024
    temperature: float = 1.0
    beta: float = 0.01
    clip: float = 0.2
    value_clip: float = 0.2
    discount: float = 1.0
    gae_lambda: float = 0.95
    critic_lr: float | None = None
    patience: int = 0
