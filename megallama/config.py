"""The configuration that users type: frozen dataclasses whose defaults are the Llama 2 paper's.

`model.*` uses the names of HF's LlamaConfig. Nothing here imports torch, so `--help` and the planner start at once.
A new section is a dataclass whose docstring has an `Args:` part, a field of `Config`, and its rules in checks.py. Those
of the stages that come after pretraining are in alignment.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megallama import checks, options
from megallama.alignment import (
    ChatConfig,
    JudgesConfig,
    PpoConfig,
    RejectionConfig,
    RewardConfig,
    SftConfig,
)
from megallama.presets import PRESETS, RECIPES

LM, SCALAR = "lm", "scalar"
"""The heads that a model may have."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model, in HF LlamaConfig's names.

    Args:
        preset: start from a published shape: llama2-7b, llama2-13b, llama2-34b or llama2-70b.
        hidden_size: width of the residual stream.
        intermediate_size: width of the SwiGLU feed-forward.
        num_hidden_layers: transformer blocks.
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads (grouped-query attention).
        vocab_size: true vocabulary size; it is padded to a multiple of parallel.tp in memory only.
        max_position_embeddings: longest sequence, in tokens.
        rms_norm_eps: epsilon inside RMSNorm.
        rope_theta: base of the rotary embedding's wavelengths.
        initializer_range: standard deviation of the initial weights.
        tie_word_embeddings: share one matrix between the token embedding and the LM head.
        head: lm, or scalar: one number a token (reward models and critics; their stages set it themselves).
    """

    preset: str | None = None
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    vocab_size: int = 32000
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    head: str = LM

    @property
    def tied(self) -> bool:
        """Whether the first and the last stage share a matrix; a scalar head shares nothing."""
        return self.tie_word_embeddings and self.head == LM

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class ParallelConfig:
    """How ranks are laid out; data parallelism is what is left of the world: dp = world / (tp * pp).

    Args:
        tp: tensor-parallel ranks.
        pp: pipeline ranks.
        vpp: model chunks per pipeline rank (interleaved schedule).
        layers_per_stage: transformer blocks of each of the pp * vpp stages; empty = balanced by cost.
        schedule: gpipe, 1f1b, interleaved or zero-bubble.
        recompute: none, selective (attention core) or full (whole block).
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    layers_per_stage: tuple[int, ...] = ()
    schedule: str = "1f1b"
    recompute: str = "none"

    @property
    def stages(self) -> int:
        """Pipeline stages of the whole model; chunk c of pipeline rank r is stage c * pp + r."""
        return self.pp * self.vpp


@dataclass(frozen=True)
class SourceConfig:
    """One tokenised corpus, drawn in proportion to its weight.

    Args:
        prefix: the corpus is the files prefix.bin and prefix.idx.
        weight: its share of the samples, relative to the other sources.
    """

    prefix: str
    weight: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    """Training data.

    Args:
        sources: tokenised corpora and their weights.
        split: share of each corpus held out for validation, in [0, 1).
        seq_length: tokens a sample.
        tokenizer: tokenizer model whose vocabulary must fit model.vocab_size; null = not checked.
        mask_documents: keep attention and positions inside documents.
    """

    sources: tuple[SourceConfig, ...] = ()
    split: float = 0.01
    seq_length: int = 4096
    tokenizer: str | None = None
    mask_documents: bool = False


@dataclass(frozen=True)
class RampConfig:
    """Batch-size ramp: grows from `start` to train.global_batch_size in equal steps over the first `samples` samples.

    Args:
        start: samples in the first step.
        increment: samples that each rise adds.
        samples: samples over which the rises are spread evenly.
    """

    start: int
    increment: int
    samples: int


@dataclass(frozen=True)
class ProfileConfig:
    """Write a profiler trace per rank for steps start <= step < stop.

    Args:
        start: first profiled step.
        stop: first step that is not profiled any more.
    """

    start: int
    stop: int


@dataclass(frozen=True)
class TrainConfig:
    """The training loop.

    Args:
        steps: optimizer steps of the whole run; the learning-rate schedule spans them (the paper: 2T tokens).
            0 = as many as the epochs of sft or reward take. ppo: iterations.
        stop_after: end this process after that step; the schedule is unchanged. null = run to the end.
        micro_batch_size: samples in one forward pass of one data-parallel replica. A sample of sft is a packed
            sequence, of reward a pair, of ppo a dialogue.
        global_batch_size: samples a step over all replicas (the paper: 4M tokens = 1024 x 4096).
        ramp: batch-size ramp; null = none.
        seed: seeds weights and sample order.
        dtype: bfloat16 (fp32 masters and accumulation), float32 or float64.
        compile: compile the segments of each block with torch.compile.
        valid_interval: steps between validations; 0 = never.
        valid_steps: global batches a validation.
        max_bad_steps: consecutive steps with non-finite gradients before the run stops.
        profile: profiler window; null = off.
    """

    steps: int = 476_837
    stop_after: int | None = None
    micro_batch_size: int = 1
    global_batch_size: int = 1024
    ramp: RampConfig | None = None
    seed: int = 1234
    dtype: str = "bfloat16"
    compile: bool = False
    valid_interval: int = 1000
    valid_steps: int = 8
    max_bad_steps: int = 10
    profile: ProfileConfig | None = None


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule; defaults from the Llama 2 paper, section 2.2.

    Args:
        lr: peak learning rate.
        min_lr_ratio: the cosine ends at lr * min_lr_ratio.
        warmup_steps: steps of linear warm-up.
        warmup_share: share of all steps that the warm-up takes, if that is more than warmup_steps.
        betas: AdamW's decay rates.
        eps: AdamW's epsilon.
        weight_decay: decoupled decay; norms and biases are excluded.
        clip_grad: largest global gradient norm; 0 = no clipping.
        schedule: cosine or constant, after the warm-up.
    """

    lr: float = 3e-4
    min_lr_ratio: float = 0.1
    warmup_steps: int = 2000
    warmup_share: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    schedule: str = "cosine"


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints under output_dir/checkpoints.

    Args:
        interval: steps between checkpoints; 0 = only at the end.
        keep: newest checkpoints kept; 0 = all.
        async_save: write in the background; steps wait only for the copy to host memory, which takes 12 bytes a
            parameter, shared by the ranks.
        load: where to start while output_dir has no checkpoint: auto or none = anew, a checkpoint's folder = go on
            from it with its step and optimizer, weights:FOLDER = step 0 with the weights of a run, a checkpoint or a
            Hugging Face model (hf:FOLDER: the last only).
        export_hf: folder for an HF export at the end; null = none.
    """

    interval: int = 1000
    keep: int = 3
    async_save: bool = True
    load: str = "auto"
    export_hf: str | None = None


@dataclass(frozen=True)
class LogConfig:
    """Logging.

    Args:
        interval: steps between lines of progress; metrics.jsonl has every step.
        peak_tflops: peak TFLOP/s of one device for MFU; null = looked up by the device's name.
    """

    interval: int = 1
    peak_tflops: float | None = None


@dataclass(frozen=True)
class GenerateConfig:
    """Answers of a model (stages `generate` and `chat`). dp = world / tp replicas answer side by side.

    Args:
        prompts: texts to answer or to continue.
        file: the same from a file: .txt (one a line), or records (.jsonl, .json, .parquet) with a prompt or messages.
        chat: put prompts into the chat template; else their text is continued.
        start: token before a text that is continued: eos (as between the documents of pretraining), bos or none.
        model: a run, a checkpoint or a Hugging Face model; null = output_dir's newest checkpoint.
        tp: tensor-parallel ranks; null = parallel.tp.
        rows: most sequences that a replica decodes together.
        max_new_tokens: most tokens of an answer.
        temperature: divides the logits; 0 = always the most probable token.
        top_k: choose among so many most probable tokens; 0 = all.
        top_p: choose among the fewest most probable tokens whose probabilities reach this sum (after top_k).
        stop: texts that end an answer, and are cut off.
        seed: of the answers; the n-th prompt's is the same in every layout.
        output: JSON lines of answers; null = print them.
    """

    prompts: tuple[str, ...] = ()
    file: str | None = None
    chat: bool = False
    start: str = "eos"
    model: str | None = None
    tp: int | None = None
    rows: int = 64
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 1234
    output: str | None = None


@dataclass(frozen=True)
class Config:
    """A run. Every key can be set in YAML and on the command line as --section.key value.

    Args:
        model: shape of the model.
        parallel: layout of the ranks.
        data: training data.
        train: the training loop.
        optim: optimizer and schedule.
        checkpoint: saving and loading.
        log: logging.
        chat: how dialogues become tokens.
        sft: supervised fine-tuning.
        reward: reward models.
        judges: the reward models that score answers.
        rejection: rejection sampling.
        ppo: proximal policy optimisation.
        generate: answers to prompts, and chat.
        output_dir: folder of the run: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, logs/.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    judges: JudgesConfig = field(default_factory=JudgesConfig)
    rejection: RejectionConfig = field(default_factory=RejectionConfig)
    ppo: PpoConfig = field(default_factory=PpoConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    output_dir: str = "runs/default"

    def data_parallel(self, world_size: int) -> int:
        """dp: what tp and pp leave of the world."""
        return world_size // (self.parallel.tp * self.parallel.pp)

    def micro_batches(self, world_size: int, global_batch_size: int | None = None) -> int:
        """Micro-batches that one data-parallel replica runs in a step (of `global_batch_size` samples in a ramp)."""
        samples = global_batch_size or self.train.global_batch_size
        return samples // (self.train.micro_batch_size * self.data_parallel(world_size))

    def validate(self, world_size: int) -> None:
        """Check every value, alone and against the others and the number of ranks.

        Raises:
            ValueError: the first thing that is wrong, with the numbers and the option to change.
        """
        for ok, message in checks.rules(self, world_size):
            if not ok:
                raise ValueError(message)


def load(argv: Sequence[str], stage: str = "pretrain") -> Config:
    """The configuration that a command line describes: `--config FILE` and `--section.key value` over it.

    `model.preset` supplies the shape; keys of the model given explicitly override it. The paper's recipe of the stage
    supplies what is not given.

    Raises:
        ValueError: unknown key (names the nearest one), wrong type, unreadable file, unknown preset.
    """
    given = options.parse(Config, argv)
    model = given.get("model", {})
    preset = model.get("preset")
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(f"unknown model.preset {preset}; choose one of {', '.join(PRESETS)}")
        given["model"] = {**PRESETS[preset], **model}
    return options.build(Config, options.merge(RECIPES.get(stage, {}), given))


def dump(config: Config) -> str:
    """The resolved configuration as YAML; `load` reads it back equal."""
    return options.dump(config)
