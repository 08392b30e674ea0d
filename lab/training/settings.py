"""The settings of a training run: from the command line, a preset, or the run to resume."""

import difflib
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar

import tyro

from data import Dataset
from data.tokenizers import HF_CONFIG
from lab import device, stages
from lab.cli import parse_flags, program
from lab.errors import UserError, shown
from lab.storage import checkpoint, runs
from lab.training import presets

ModelConfig = TypeVar("ModelConfig")


@dataclass
class Settings(Generic[ModelConfig]):
    """Trains one stage of the course and saves the run in runs/."""

    model: ModelConfig
    """Sizes of the model; those left out are derived from the others."""
    stage: str
    """Stage to train: its number or name. Default with --resume or --init-from: the run's."""
    data: str = "tinyshakespeare"
    """tinyshakespeare, openshakespeare, pycode, openwebtext, or a path: a file of UTF-8 text, .jsonl or
    .parquet, or a folder of such files."""
    tokenizer: Literal["char", "gpt2", "hf"] = "char"
    """char: tokens are characters; gpt2: GPT-2's 50257 word pieces (the only choice for openwebtext); hf: the
    tokenizer of the imported run that --init-from names. Default with --init-from: the run's."""
    preset: Literal["auto", "laptop", "baby", "gpt2"] = "auto"
    """Default sizes and schedule; auto: baby on CUDA, else laptop (gpt2 for openwebtext)."""
    seed: int = 0
    """Seed of the weights, the batches and dropout."""
    device: str = "auto"
    """cuda, mps or cpu; auto: the first of these that is available."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matrix products; auto: bfloat16 if the hardware supports it, else float32."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """For torchrun's processes. ddp: each one holds the whole model; fsdp: each holds a part of it."""
    activation_checkpointing: bool = False
    """Keep only the inputs of blocks and recompute the rest: less memory, a third more arithmetic."""
    compile: bool = False
    """Compile the model with torch.compile. Default: only on CUDA."""
    attention_kernel: Literal["auto", "explicit", "sdpa", "tiled", "triton"] = "auto"
    """What computes attention, from stage 5 on. auto: what the stage's code chooses; tiled and triton are
    tiled.py and kernel.py in stage5_flash/."""
    context: int | None = None
    """Tokens per sequence in training and evaluation. None: all of --model.block-size. If --init-from names
    an imported model, the default is 256; the model keeps all of its positions."""
    steps: int = 2000
    """Optimizer steps."""
    batch_size: int = 12
    """Sequences per optimizer step."""
    micro_batch_size: int | None = None
    """Sequences that a process computes at once (gradient accumulation). None: its share of the batch."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw; or muon: Muon for the matrices of the blocks and AdamW for the rest."""
    lr: float = 1e-3
    """Highest learning rate, reached after the warm-up."""
    min_lr: float = 1e-4
    """Learning rate at the last step of the cosine. Default: the preset's, or lr/10 if lr is below that."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0. Default: the preset's, or steps/10 if there are fewer
    steps than that."""
    weight_decay: float = 0.1
    """Weight decay of matrices and embeddings; norms and biases have none."""
    beta1: float = 0.9
    """AdamW's decay rate for the running mean of gradients."""
    beta2: float = 0.99
    """AdamW's decay rate for the running mean of squared gradients."""
    grad_clip: float = 1.0
    """Gradients with a larger norm are scaled down to it; 0: no limit."""
    eval_every: int = 250
    """Steps between evaluations on the validation split; each is followed by a checkpoint."""
    eval_tokens: int = 1_000_000
    """Validation tokens to evaluate on, from the start of the split; all of it if it is shorter."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
    out: str | None = None
    """Folder of the run. None: a new one, runs/<stage>-<data>-seed<k>."""
    init_from: str | None = None
    """Folder of a run to fine-tune, starting from its best weights; its sizes become the defaults."""
    resume: bool = False
    """Continue the run in --out, or else the newest unfinished run of this stage, data and seed."""
    wandb: bool = False
    """Also send the metrics to Weights & Biases; needs pip install -e '.[wandb]'."""

    def __post_init__(self):
        counts = ("steps", "batch_size", "micro_batch_size", "context")
        counts += ("eval_every", "eval_tokens", "log_every")
        for name in counts:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("seed", "lr", "min_lr", "warmup_steps", "weight_decay", "grad_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more and finite, not {getattr(self, name)}")
        for name, value in vars(self.model).items():
            for number in value.values() if isinstance(value, dict) else [value]:
                if isinstance(number, float) and not math.isfinite(number):
                    raise ValueError(f"model.{name} must be a finite number, not {number}")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, not {self.seed}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of "
                f"micro_batch_size ({self.micro_batch_size})"
            )

    @property
    def sequence_length(self) -> int:
        """Tokens per sequence in training and evaluation."""
        return self.context or self.model.block_size


@dataclass
class Choice:
    """The flags that determine the defaults of the other flags, so they are parsed first."""

    stage: str | None = None
    data: str = "tinyshakespeare"
    preset: Literal["auto", "laptop", "baby", "gpt2"] = "auto"
    device: str = "auto"
    seed: int = 0
    out: str | None = None
    init_from: str | None = None
    resume: bool = False
    lr: float | None = None
    steps: int | None = None


def parse(argv: list[str]) -> Settings:
    """The settings of a command line; its flags override a preset, or the resumed run's own settings.

    Raises UserError for an unknown flag, an invalid value, or a run that does not exist.
    """
    wants_help = "-h" in argv or "--help" in argv
    choice, _ = parse_flags(Choice, argv, return_unknown_args=True, add_help=False)
    if choice.resume and choice.init_from:
        raise UserError("--resume continues from the run's own weights: leave out --init-from")
    if choice.resume and not wants_help:
        default = resumed_settings(choice)
    elif choice.init_from and not wants_help:
        default = fine_tuning_settings(choice)
    else:
        if not choice.stage and not wants_help:
            flags = [each.partition("=")[0] for each in argv if each.startswith("--")]
            misspelt = "".join(difflib.get_close_matches("--stage", flags, n=1, cutoff=0.8))
            found = f" ({misspelt} is no flag)" if misspelt else ""
            raise UserError(f"--stage is missing{found}; use one of: {stages.listing()}")
        default = preset_settings(choice, stages.find(choice.stage or "0"))
    stage = default.stage
    if wants_help:
        default.stage = tyro.MISSING  # it has no default
    settings = parse_flags(Settings[type(default.model)], argv, default=default)
    settings.stage = stage
    try:
        settings.model = stages.load(stage).GPTConfig(**asdict(settings.model))  # derives what is left out
    except ValueError as error:
        raise UserError(f"--model: {error}. See {program()} --help") from None
    fit_context(settings, default)
    if choice.resume and not wants_help:
        for name in ("optimizer", "preset"):
            before = getattr(default, name)
            if getattr(settings, name) != before:
                raise UserError(f"the run has --{name} {before}, which cannot change: leave --{name} out")
    if schedule(settings) != schedule(default) or not choice.resume:  # older code did not check it
        check_schedule(settings)
    return settings


def fit_context(settings: Settings, default: Settings) -> None:
    """Lowers a default --context to the model's positions.

    Raises UserError if the user's own --context exceeds them.
    """
    positions = settings.model.block_size
    if settings.context is None or settings.context <= positions:
        return
    if settings.context != default.context:
        raise UserError(f"--context {settings.context} is too long: the model has {positions} positions")
    settings.context = positions


def schedule(settings: Settings) -> tuple:
    """The settings that determine the learning rate of each step."""
    return settings.steps, settings.warmup_steps, settings.lr, settings.min_lr


def check_schedule(settings: Settings) -> None:
    """Raises UserError if the warm-up is longer than the run, or the lowest rate is above the highest."""
    steps, warmup_steps, lr, min_lr = schedule(settings)
    if warmup_steps > steps:
        raise UserError(f"--warmup-steps {warmup_steps} is more than --steps {steps}: change one of them")
    if min_lr > lr:
        raise UserError(f"--min-lr {min_lr:g} is above --lr {lr:g}, the highest rate: change one of them")


def preset_settings(choice: Choice, stage: str) -> Settings:
    """Default settings of a new run."""
    device_type = device.choose(choice.device).type
    name = presets.choose(choice.data, device_type) if choice.preset == "auto" else choice.preset
    preset = dict(presets.PRESETS[name])
    if choice.preset == "auto" and choice.init_from and (Path(choice.init_from) / HF_CONFIG).exists():
        preset |= presets.FINE_TUNING
    if choice.lr is not None and 0 <= choice.lr < preset["min_lr"]:
        preset["min_lr"] = choice.lr / 10  # as in the presets
    if choice.steps is not None and 0 < choice.steps < preset["warmup_steps"]:
        preset["warmup_steps"] = choice.steps // 10
    model = presets.model_defaults(stages.load(stage).GPTConfig, preset.pop("model"))
    tokenizer = "gpt2" if choice.data == "openwebtext" else "char"
    compiles = device_type == "cuda"
    return Settings(model=model, stage=stage, tokenizer=tokenizer, preset=name, compile=compiles, **preset)


def fine_tuning_settings(choice: Choice) -> Settings:
    """Default settings of a run that starts from another run's weights: a preset's, with that run's sizes."""
    run = Path(choice.init_from)
    config, tokenizer = runs.read_config(run), runs.read_meta(run)["tokenizer"]
    runs.refuse_quantized(run, config, "trained")
    settings = preset_settings(choice, stages.find(choice.stage or config["stage"]))
    settings.model = presets.model_defaults(stages.load(settings.stage).GPTConfig, config["model"])
    settings.tokenizer = tokenizer
    return settings


def resumed_settings(choice: Choice) -> Settings:
    """Settings of the run that --resume continues, from its config.json."""
    folder = (
        Path(choice.out) if choice.out else runs.newest_unfinished(choice.stage, choice.data, choice.seed)
    )
    config = runs.check_stage(folder, choice.stage)
    runs.refuse_quantized(folder, config, "trained")
    if "imported_from" in config:
        raise UserError(
            f"{shown(folder)} was imported, not trained: there is nothing to resume\n"
            f"to train it: python train.py --init-from {shown(folder)}"
        )
    if not checkpoint.exists(folder):
        with runs.locked(folder):  # a UserError of its own if the run is being trained now
            pass
        raise UserError(f"{shown(folder)} stopped before its first checkpoint: delete it and start again")
    unknown = config["settings"].keys() - {field.name for field in fields(Settings)}
    if unknown:
        raise UserError(
            f"{shown(folder)} was made by another version of train.py, with {', '.join(sorted(unknown))}, "
            "which this one does not have\nresume it with that version, or train a new run"
        )
    model = runs.model_config(folder, config)
    return Settings(**config["settings"] | {"model": model, "out": str(folder)})


def fit_to_data(config, dataset: Dataset, context: int | None = None):
    """The model's sizes with the vocabulary of the data. Raises UserError if the data does not suit them.

    context: tokens per sequence; None: block_size.
    """
    needed = dataset.tokenizer.vocab_size
    if config.vocab_size == type(config).vocab_size and needed < 50257:
        config = replace(config, vocab_size=needed)  # only GPT-2's vocabulary is padded, to 50304
    if config.vocab_size < needed:
        raise UserError(
            f"--model.vocab-size {config.vocab_size} is less than the {needed} tokens of {dataset.name}"
        )
    shortest = min(len(dataset.train), len(dataset.val))
    if shortest <= (context or config.block_size):
        flag = f"--context {context}" if context else f"--model.block-size {config.block_size}"
        raise UserError(
            f"{flag} is too long for {dataset.name}: its shorter split has "
            f"{shortest} tokens; use {max(1, shortest - 1)} or less, or more text"
        )
    return config


def as_json(settings: Settings) -> dict:
    """The settings, except the model's sizes and what only concerns one invocation."""
    return {key: value for key, value in asdict(settings).items() if key not in ("model", "resume", "out")}
