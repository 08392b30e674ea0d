"""Stage 2: the loss by position for learned positions (stage 1) and for RoPE, and RoPE in longer texts.

python -m benchmarks.ideas.positions reads texts up to eight times as long as those in training, with RoPE as
it was trained and with its angles scaled in three ways. It writes results/ideas/positions.json and a picture.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import data
from benchmarks import ideas
from lab import cli, device, stages
from lab.comparison import report, spread
from lab.storage import edits, runs
from lab.training import run_plots

STAGES = {"learned": "stage1_rmsnorm", "RoPE": "stage2_rope"}
PLAIN = "RoPE as trained"
COLORS = {
    PLAIN: run_plots.stage_color("stage2_rope"),
    "larger theta": "#009E73",
    "linear": "#D55E00",
    "YaRN": "#CC79A7",
}


@dataclass
class Settings:
    """Measures the loss by position, and in texts longer than those in training."""

    seeds: int = 3
    """Models of each kind."""
    lengths: tuple[int, ...] = (64, 128, 256, 512)
    """Tokens to read at once, in ascending order. The first is the length in training."""
    windows: int = 128
    """Places in the validation text up to which they are read."""


def main():
    settings = cli.parse_benchmark_flags(Settings, sys.argv[1:])
    print("This takes about 15 minutes on one core, or 2 if compare.py has trained stages 1 and 2.")
    device.prepare(ideas.CPU)
    models = {
        name: [runs.load(laptop_run(stage, seed), "best", ideas.CPU)[0] for seed in range(settings.seeds)]
        for name, stage in STAGES.items()
    }
    val = torch.from_numpy(data.load("tinyshakespeare").val[:].astype(np.int64))
    trained, longest = settings.lengths[0], settings.lengths[-1]

    every_token = torch.arange(trained, len(val), trained)
    by_position = {name: losses(of, val, every_token, trained) for name, of in models.items()}
    places = torch.linspace(longest, len(val) - 1, settings.windows).long()
    read = {"learned": {trained: losses(models["learned"], val, places, trained)}}  # it has no more positions
    for length in settings.lengths:
        for name, rotation in rotations(trained, length).items():
            with mock.patch.object(stages.load("stage2_rope"), "rotation", rotation):
                read.setdefault(name, {})[length] = losses(models["RoPE"], val, places, length)
    at_the_end = {name: last_tokens(of, trained // 2) for name, of in read.items()}
    farthest = {name: of[longest].mean(dim=0).tolist() for name, of in read.items() if longest in of}
    ideas.write(
        "positions",
        {
            "loss_by_position": {name: of.mean(dim=0).tolist() for name, of in by_position.items()},
            "loss_of_the_last_tokens": at_the_end,
            "loss_by_position_in_the_longest": farthest,
            "windows": settings.windows,
            "seeds": settings.seeds,
        },
        ["positions", *(f"reading {length} tokens" for length in settings.lengths)],
        [row(name, of, settings.lengths) for name, of in at_the_end.items()],
        lambda: picture(by_position, farthest, trained),
        f"Left, the loss by position in {trained} tokens, for learned positions and RoPE. Right, the loss by "
        f"position in {longest} tokens of models trained with {trained}, for RoPE as trained and scaled.",
    )


def laptop_run(stage: str, seed: int) -> Path:
    """A run of the laptop preset: that of compare.py, or else one of our own."""
    folder = runs.RUNS / "compare" / "laptop" / f"{stage}-tinyshakespeare-seed{seed}"
    if (folder / "sample.txt").exists() and not edits.difference(runs.read_config(folder)):
        return folder
    return ideas.trained(f"{stage}-seed{seed}", ["--stage", stage, "--seed", str(seed)])[0]


def rotations(trained: int, length: int) -> dict[str, Callable]:
    """What takes the place of stage 2's `rotation` to read `length` tokens, by name."""
    factor, plain = length / trained, stages.load("stage2_rope").rotation

    def larger_theta(positions, head_dim, theta):
        # "NTK-aware": slows the slowest pair by the factor, and the fastest not at all.
        return plain(positions, head_dim, theta * factor ** (head_dim / (head_dim - 2)))

    def linear(positions, head_dim, theta):
        return plain(positions / factor, head_dim, theta)  # arXiv 2306.15595

    def yarn(positions, head_dim, theta):
        scaling = {"factor": factor, "original_max_position_embeddings": trained}
        config = SimpleNamespace(qk_rope_head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)
        return stages.load("deepseek_v3").rotation(positions, config)

    return {PLAIN: plain, "larger theta": larger_theta, "linear": linear, "YaRN": yarn}


@torch.no_grad()
def losses(models: list, tokens: torch.Tensor, places: torch.Tensor, length: int) -> torch.Tensor:
    """The mean loss by position, (models, length), in windows of `length` tokens.

    places: of the target of each window's last position.
    """
    windows = tokens[places[:, None] + torch.arange(-length, 1)]  # (places, length + 1)
    means = []
    for model in models:
        of_windows = []
        for part in windows.split(max(1, 4096 // length)):
            logits, _ = model(part[:, :-1])  # (B, length, vocab_size)
            of_windows.append(F.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none"))
        means.append(torch.cat(of_windows).mean(dim=0))
    return torch.stack(means)


def last_tokens(by_length: dict[int, torch.Tensor], n_last: int) -> dict[int, dict]:
    """The loss of the last tokens of each window, over the models: the same tokens at every length."""
    return {length: spread.summary(of[:, -n_last:].mean(dim=1).tolist()) for length, of in by_length.items()}


def row(name: str, by_length: dict, lengths: tuple[int, ...]) -> list:
    """A line of the table; a dash where there are no positions to read so many tokens."""
    summaries = (by_length.get(length) for length in lengths)
    return [name, *(summary and report.with_std(summary, 3) for summary in summaries)]


def picture(by_position: dict[str, torch.Tensor], farthest: dict[str, list], trained: int):
    """The loss by position, at the length of training and at the longest one."""
    figure, (near, far) = run_plots.new_figure(11, 4.2, columns=2)
    for name, of in by_position.items():
        color = run_plots.stage_color(STAGES[name])
        near.plot(range(trained), of.mean(dim=0), color=color, linewidth=1.6, label=name)
        near.fill_between(range(trained), of.amin(dim=0), of.amax(dim=0), color=color, alpha=0.2, linewidth=0)
    for name, of in farthest.items():
        smooth = np.mean(np.reshape(of, (-1, trained // 4)), axis=1)
        middles = (np.arange(len(smooth)) + 0.5) * (trained // 4)
        far.plot(middles, smooth, color=COLORS[name], linewidth=1.6, marker="o", markersize=3, label=name)
    far.axvline(trained, color="#888888", linewidth=1)
    far.annotate(" end of the context in training", (trained, far.get_ylim()[1]), va="top", fontsize=8)
    near.set_ylabel("validation loss (nats per token)")
    for axes, place in ((near, "upper right"), (far, (0.2, 0.56))):  # where no line is
        axes.set_xlabel("position in the context")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9, loc=place)
    return figure


if __name__ == "__main__":
    cli.run(main)
