"""The configuration that users type: frozen dataclasses whose defaults are the Llama 2 paper's.

`model.*` uses the names of HF's LlamaConfig. Nothing here imports torch, so `--help` and the planner start at once.
A new section is a dataclass whose docstring has an `Args:` part, a field of `Config`, and its rules in checks.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megallama import checks, options
from megallama.presets import PRESETS


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
        stop_after: end this process after that step; the schedule is unchanged. null = run to the end.
        micro_batch_size: samples in one forward pass of one data-parallel replica.
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
        betas: AdamW's decay rates.
        eps: AdamW's epsilon.
        weight_decay: decoupled decay; norms and biases are excluded.
        clip_grad: largest global gradient norm; 0 = no clipping.
        schedule: cosine or constant, after the warm-up.
    """

    lr: float = 3e-4
    min_lr_ratio: float = 0.1
    warmup_steps: int = 2000
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
        load: where to start while output_dir has no checkpoint: auto or none = anew, a checkpoint's folder (of another
            run, or converted), hf:FOLDER.
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
    """Greedy continuations by the run's newest checkpoint (stage `generate`).

    Args:
        prompts: texts to continue.
        max_new_tokens: most tokens added to each.
    """

    prompts: tuple[str, ...] = ("The",)
    max_new_tokens: int = 48


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
        generate: continuations of prompts.
        output_dir: folder of the run: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, logs/.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
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


def load(argv: Sequence[str]) -> Config:
    """The configuration that a command line describes: `--config FILE` and `--section.key value` over it.

    `model.preset` supplies the shape; keys of the model given explicitly override it.

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
    return options.build(Config, given)


def dump(config: Config) -> str:
    """The resolved configuration as YAML; `load` reads it back equal."""
    return options.dump(config)
