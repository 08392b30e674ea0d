"""Every setting of a training run: from the command line, a preset, or the run that is resumed."""

import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar

import tyro

from data import Dataset
from lab import device, stages
from lab.cli import parse_flags, program
from lab.errors import UserError, shown
from lab.storage import checkpoint, runs
from lab.training import presets

ModelConfig = TypeVar("ModelConfig")


@dataclass
class Settings(Generic[ModelConfig]):
    """Trains one stage of the course and leaves the run in runs/."""

    model: ModelConfig
    """Sizes of the model; what is left out follows from the rest."""
    stage: str
    """Stage to train: its number or name. With --resume or --init-from that of the run."""
    data: str = "tinyshakespeare"
    """tinyshakespeare, openshakespeare, openwebtext, or a path: a file of UTF-8 text, .jsonl or .parquet, or
    a folder of them."""
    tokenizer: Literal["char", "gpt2"] = "char"
    """What a token is: a character, or one of GPT-2's 50257 pieces of words (openwebtext knows no other)."""
    preset: Literal["auto", "laptop", "baby", "gpt2"] = "auto"
    """Sizes and schedule to start from; auto: baby on CUDA, else laptop (gpt2 for openwebtext)."""
    seed: int = 0
    """Seed of the weights, the batches and the dropout."""
    device: str = "auto"
    """cuda, mps or cpu; auto: the first of these that is present."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matrix products; auto: bfloat16 where the hardware has it, else float32."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """What torchrun's processes share: ddp: gradients; fsdp: weights and the optimizer's state, too."""
    activation_checkpointing: bool = False
    """Keep only the inputs of blocks for the backward pass: less memory, a third more arithmetic."""
    compile: bool = False
    """Compile the model with torch.compile; by default on CUDA only."""
    attention_kernel: Literal["auto", "explicit", "sdpa", "tiled", "triton"] = "auto"
    """What computes attention from stage 5 on. auto: what the stage's own code chooses; tiled and triton:
    stage5_flash/tiled.py and kernel.py."""
    steps: int = 2000
    """Optimizer steps."""
    batch_size: int = 12
    """Sequences in an optimizer step."""
    micro_batch_size: int | None = None
    """Sequences that a process computes at once; gradients add up to batch_size. None: all of its share."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon for the matrices of the blocks and adamw for the rest."""
    lr: float = 1e-3
    """Highest learning rate, reached after the warm-up."""
    min_lr: float = 1e-4
    """Learning rate at the last step, along a cosine. Default: the preset's; of a lower --lr a tenth."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0. Default: the preset's; of fewer --steps a tenth."""
    weight_decay: float = 0.1
    """Weight decay of matrices and embeddings; norms and biases have none."""
    beta1: float = 0.9
    """AdamW's decay of the average gradient."""
    beta2: float = 0.99
    """AdamW's decay of the average squared gradient."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0: no limit."""
    eval_every: int = 250
    """Steps between evaluations on the validation split, each followed by a checkpoint."""
    eval_tokens: int = 1_000_000
    """Validation tokens to evaluate on, from the start of the split; all of it where it is shorter."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
    out: str | None = None
    """Folder of the run. None: a new one, runs/<stage>-<data>-seed<k>."""
    init_from: str | None = None
    """Folder of a run whose best weights to start from (fine-tuning); its sizes become the defaults."""
    resume: bool = False
    """Continue the run in --out, or else the newest unfinished one of this stage, data and seed."""
    wandb: bool = False
    """Mirror the metrics to Weights & Biases: pip install -e '.[wandb]'."""

    def __post_init__(self):
        for name in ("steps", "batch_size", "micro_batch_size", "eval_every", "eval_tokens", "log_every"):
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


@dataclass
class Choice:
    """The flags that decide the defaults of the others, read before them."""

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
    """What a command line asks for: its flags over a preset, or over the resumed run's own settings.

    Raises UserError for an unknown flag, an impossible value, or a run that is not there.
    """
    wants_help = "-h" in argv or "--help" in argv
    choice, _ = parse_flags(Choice, argv, return_unknown_args=True, add_help=False)
    if choice.resume and choice.init_from:
        raise UserError("--resume goes on with a run's own weights: leave out --init-from")
    if choice.resume and not wants_help:
        default = resumed_settings(choice)
    elif choice.init_from and not wants_help:
        default = fine_tuning_settings(choice)
    else:
        if not choice.stage and not wants_help:
            raise UserError(f"which stage? --stage N, one of: {stages.listing()}")
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
    if choice.resume and not wants_help:
        for name in ("optimizer", "preset"):
            before = getattr(default, name)
            if getattr(settings, name) != before:
                raise UserError(f"the run has --{name} {before}, which cannot change: leave --{name} out")
    if schedule(settings) != schedule(default) or not choice.resume:  # runs of older code may have any
        check_schedule(settings)
    return settings


def schedule(settings: Settings) -> tuple:
    """What the learning rate of each step follows from."""
    return settings.steps, settings.warmup_steps, settings.lr, settings.min_lr


def check_schedule(settings: Settings) -> None:
    """A UserError where the learning rate could not go up to its highest and then down to its lowest."""
    steps, warmup_steps, lr, min_lr = schedule(settings)
    if warmup_steps > steps:
        raise UserError(f"--warmup-steps {warmup_steps} is more than --steps {steps}: change one of them")
    if min_lr > lr:
        raise UserError(f"--min-lr {min_lr:g} is above --lr {lr:g}, which is the highest: change one of them")


def preset_settings(choice: Choice, stage: str) -> Settings:
    """Settings of a new run."""
    device_type = device.choose(choice.device).type
    name = presets.choose(choice.data, device_type) if choice.preset == "auto" else choice.preset
    preset = dict(presets.PRESETS[name])
    if choice.lr is not None and 0 <= choice.lr < preset["min_lr"]:
        preset["min_lr"] = choice.lr / 10  # as in the presets
    if choice.steps is not None and 0 < choice.steps < preset["warmup_steps"]:
        preset["warmup_steps"] = choice.steps // 10
    model = presets.model_defaults(stages.load(stage).GPTConfig, preset.pop("model"))
    tokenizer = "gpt2" if choice.data == "openwebtext" else "char"
    compiles = device_type == "cuda"
    return Settings(model=model, stage=stage, tokenizer=tokenizer, preset=name, compile=compiles, **preset)


def fine_tuning_settings(choice: Choice) -> Settings:
    """Settings of a new run that starts from another's weights: a preset's, with that run's sizes."""
    run = Path(choice.init_from)
    config, tokenizer = runs.read_config(run), runs.read_meta(run)["tokenizer"]
    if tokenizer == "hf":
        raise UserError(f"{choice.init_from} has a tokenizer.json that only sample.py can use, not train.py")
    settings = preset_settings(choice, stages.find(choice.stage or config["stage"]))
    settings.model = presets.model_defaults(stages.load(settings.stage).GPTConfig, config["model"])
    settings.tokenizer = tokenizer
    return settings


def resumed_settings(choice: Choice) -> Settings:
    """Settings of the run that --resume continues, as its config.json has them."""
    folder = (
        Path(choice.out) if choice.out else runs.newest_unfinished(choice.stage, choice.data, choice.seed)
    )
    config = runs.check_stage(folder, choice.stage)
    if "imported_from" in config:
        raise UserError(
            f"{shown(folder)} was imported, not trained: there is nothing to resume\n"
            f"to train it: python train.py --init-from {shown(folder)}"
        )
    if not checkpoint.exists(folder):
        with runs.locked(folder):  # or it is being trained just now
            pass
        raise UserError(f"{shown(folder)} stopped before its first checkpoint: delete it and start anew")
    unknown = config["settings"].keys() - {field.name for field in fields(Settings)}
    if unknown:
        raise UserError(
            f"{shown(folder)} was made by another version of train.py: it has {', '.join(sorted(unknown))}, "
            "which this one does not know\nresume it with that version, or train a new run"
        )
    model = runs.model_config(folder, config)
    return Settings(**config["settings"] | {"model": model, "out": str(folder)})


def fit_to_data(config, dataset: Dataset):
    """The model's sizes with the vocabulary of the data; a UserError where they do not go together."""
    needed = dataset.tokenizer.vocab_size
    if config.vocab_size == type(config).vocab_size and needed < 50257:
        config = replace(config, vocab_size=needed)  # only GPT-2's vocabulary is padded, to 50304
    if config.vocab_size < needed:
        raise UserError(
            f"--model.vocab-size {config.vocab_size} is less than the {needed} tokens of {dataset.name}"
        )
    shortest = min(len(dataset.train), len(dataset.val))
    if shortest <= config.block_size:
        raise UserError(
            f"--model.block-size {config.block_size} is too long for {dataset.name}: its shorter split has "
            f"{shortest} tokens; use {max(1, shortest - 1)} or less, or more text"
        )
    return config


def as_json(settings: Settings) -> dict:
    """The settings without the model's sizes and what belongs to one invocation alone."""
    return {key: value for key, value in asdict(settings).items() if key not in ("model", "resume", "out")}
