"""Default sizes and schedules for different machines; every number is also a flag of train.py."""

from dataclasses import fields

# model: fields of GPTConfig; the rest: fields of lab.training.settings.Settings.
PRESETS = {
    # nanoGPT's settings for a CPU, so that results can be compared directly; takes minutes on a laptop.
    "laptop": {
        "model": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64},
        "batch_size": 12,
        "steps": 2000,
        "lr": 1e-3,
        "min_lr": 1e-4,
        "warmup_steps": 100,
        "beta2": 0.99,
    },
    # nanoGPT's settings for one GPU and TinyShakespeare.
    "baby": {
        "model": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "dropout": 0.2},
        "batch_size": 64,
        "steps": 5000,
        "lr": 1e-3,
        "min_lr": 1e-4,
        "warmup_steps": 100,
        "beta2": 0.99,
    },
    # GPT-2's 124 M for OpenWebText: 480 × 1024 = 0.49 M tokens a step, 300 B in all.
    "gpt2": {
        "model": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024},
        "batch_size": 480,
        "micro_batch_size": 12,
        "steps": 600_000,
        "lr": 6e-4,
        "min_lr": 6e-5,
        "warmup_steps": 2000,
        "beta2": 0.95,
        "eval_every": 1000,
    },
}

# What replaces the schedule of a preset when --init-from names an imported model. A preset's learning rate
# suits a new model: in a few steps it would destroy what a pretrained one has learned. The windows are short
# because the positions of a pretrained model, often 8,192 or more, would take hours on a CPU.
FINE_TUNING = {
    "context": 256,
    "batch_size": 4,
    "micro_batch_size": None,
    "steps": 200,
    "lr": 2e-5,
    "min_lr": 2e-6,
    "warmup_steps": 10,
    "beta2": 0.99,
    "eval_every": 50,
    "eval_tokens": 5_120,
}


def choose(data: str, device_type: str) -> str:
    """The name of the preset that --preset auto selects."""
    if data == "openwebtext":
        return "gpt2"
    return "baby" if device_type == "cuda" else "laptop"


def model_defaults(config_class: type, sizes: dict):
    """The defaults of the --model flags: a config_class with these sizes, which derives nothing yet.

    Sizes that are derived from others (such as a width from n_embd) must wait for the command line: after
    `--model.n-embd 256` the width is derived from 256.
    """

    class Defaults(config_class):
        def __post_init__(self):
            """Derives and validates nothing."""

    names = {field.name for field in fields(config_class)}
    return Defaults(**{name: size for name, size in sizes.items() if name in names})
