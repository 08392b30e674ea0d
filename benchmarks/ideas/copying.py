"""Stage 2: models learn to copy over a distance, with learned positions (stage 1) and with RoPE.

The texts are random letters. A digit k means that the next character is a copy of the one 2^k before it.
python -m benchmarks.ideas.copying measures how often models copy right, by distance and by position, also at
positions that training did not have. It writes results/ideas/copying.json and its picture.
"""

import random
import string
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks import ideas
from lab import atomic, cli, device
from lab.comparison import spread
from lab.storage import runs
from lab.training import run_plots

STAGES = {"learned": "stage1_rmsnorm", "RoPE": "stage2_rope"}
DIGITS = "12345"
DISTANCES = [2 ** int(digit) for digit in DIGITS]
LETTERS = string.ascii_lowercase[:16]
LENGTH = 500_000  # characters of the text
CONTEXT = 64  # tokens in training; the table of learned positions has twice as many
# Positions at which every distance reaches back within the text: those of training, and later ones.
PLACES = {"positions 32–63": slice(32, 64), "positions 96–127": slice(96, 128)}
SIZES = ["--model.n-layer", "2", "--model.n-embd", "64", "--model.block-size", str(2 * CONTEXT)]
SIZES += ["--context", str(CONTEXT), "--batch-size", "16"]


@dataclass
class Settings:
    """Measures how well models with learned positions and with RoPE learn to copy."""

    seeds: int = 3
    """Models of each kind."""
    steps: int = 1500
    """Optimizer steps of a model."""
    lr: float = 3e-3
    """Highest learning rate."""
    texts: int = 400
    """Texts in which copying is measured."""


def main():
    settings = cli.parse_benchmark_flags(Settings, sys.argv[1:])
    print("This takes about 5 minutes on one core.")
    device.prepare(ideas.CPU)
    text = runs.RUNS / "ideas" / "copying.txt"
    atomic.write(text, puzzle(random.Random(0), LENGTH).encode())
    shares, learning = {}, {}
    for name, stage in STAGES.items():
        trained = [train(text, stage, seed, settings) for seed in range(settings.seeds)]
        learning[name] = [
            [(r["step"], r["val_loss"]) for r in metrics if "val_loss" in r] for _, metrics in trained
        ]
        shares[name] = torch.stack([copied(folder, settings.texts) for folder, _ in trained])
    by_distance = {
        f"{name}, {place}": {
            distance: spread.summary(of[:, i, positions].nanmean(dim=1).tolist())
            for i, distance in enumerate(DISTANCES)
        }
        for name, of in shares.items()
        for place, positions in PLACES.items()
    }
    by_position = {name: of.nanmean(dim=1) for name, of in shares.items()}  # (seeds, positions)
    ideas.write(
        "copying",
        {
            "val_loss_by_step": learning,
            "share_right_by_distance": by_distance,
            "share_right_by_position": {name: of.tolist() for name, of in by_position.items()},
            "steps": settings.steps,
            "lr": settings.lr,
            "texts": settings.texts,
        },
        ["copied right", *(f"distance {distance}" for distance in DISTANCES)],
        [
            [name, *(f"{of[distance]['mean']:.0%}" for distance in DISTANCES)]
            for name, of in by_distance.items()
        ],
        lambda: picture(learning, by_distance, by_position),
        "Three panels for learned positions and RoPE: the validation loss by step of training; the share of "
        "letters copied right by distance, and by position. Training had the first 64 of 128 positions.",
    )


def puzzle(draw: random.Random, length: int) -> str:
    """A text of this length: letters, and now and then a digit with the letter to which it refers."""
    text = draw.choices(LETTERS, k=max(DISTANCES))
    while len(text) < length:
        digit = draw.choice(DIGITS)
        copy = text[len(text) + 1 - 2 ** int(digit)]
        is_copied = draw.random() < 0.3 and copy in LETTERS
        text += [digit, copy] if is_copied else [draw.choice(LETTERS)]
    return "".join(text[:length])


def train(text: Path, stage: str, seed: int, settings: Settings) -> tuple[Path, list[dict]]:
    """The folder and the metrics of a model that was trained to copy."""
    flags = ["--stage", stage, "--data", str(text), "--seed", str(seed), *SIZES]
    flags += ["--lr", f"{settings.lr:g}", "--steps", str(settings.steps)]
    flags += ["--eval-every", str(max(1, settings.steps // 20)), "--eval-tokens", "20000"]
    return ideas.trained(f"copying-{stage}-{settings.steps}-steps-lr{settings.lr:g}-seed{seed}", flags)


@torch.no_grad()
def copied(folder: Path, n_texts: int) -> torch.Tensor:
    """The share of right copies (distances, positions) in new texts; NaN where a distance reaches too far."""
    model, _ = runs.load(folder, "last", ideas.CPU)
    tokenizer, length = runs.tokenizer(folder), 2 * CONTEXT
    tokens = tokenizer.encode(puzzle(random.Random(1), n_texts * (length + 1))).astype(np.int64)
    texts = torch.from_numpy(tokens).view(n_texts, length + 1)
    idx, targets = texts[:, :-1], texts[:, 1:]
    right = model(idx)[0].argmax(-1) == targets  # (n_texts, length)
    shares = []
    for digit, distance in zip(tokenizer.encode(DIGITS).tolist(), DISTANCES, strict=True):
        asked = (idx == digit) & (torch.arange(length) + 1 >= distance)
        shares.append((right & asked).sum(dim=0) / asked.sum(dim=0))
    return torch.stack(shares)


def picture(learning: dict[str, list], by_distance: dict, by_position: dict[str, torch.Tensor]):
    """The loss while the models learned, and the share of right copies by distance and by position."""
    figure, (loss, near, far) = run_plots.new_figure(13.5, 4.2, columns=3)
    for name, seeds in learning.items():
        for seed, points in enumerate(seeds):
            color, label = run_plots.stage_color(STAGES[name]), None if seed else name
            loss.plot(*zip(*points, strict=True), color=color, linewidth=1.3, label=label)
    loss.set_xlabel("step")
    loss.set_ylabel("validation loss (nats per token)")
    for (name, of), dash in zip(by_distance.items(), ("-", ":") * len(by_position), strict=True):
        color = run_plots.stage_color(STAGES[name.partition(",")[0]])
        means = [100 * summary["mean"] for summary in of.values()]
        near.plot(DISTANCES, means, dash, color=color, marker="o", markersize=4, label=name)
        lowest, highest = ([100 * end(summary["values"]) for summary in of.values()] for end in (min, max))
        near.fill_between(DISTANCES, lowest, highest, color=color, alpha=0.2, linewidth=0)
    near.set_xscale("log", base=2)
    near.set_xticks(DISTANCES, DISTANCES)
    near.set_xlabel("distance (tokens)")
    for name, of in by_position.items():
        color, smooth = run_plots.stage_color(STAGES[name]), 100 * of.unfold(1, 4, 4).nanmean(dim=2)
        middles = torch.arange(smooth.size(1)) * 4 + 2
        far.plot(middles, smooth.mean(dim=0), color=color, linewidth=1.6, label=name)
        far.fill_between(middles, smooth.amin(dim=0), smooth.amax(dim=0), color=color, alpha=0.2, linewidth=0)
    far.axvline(CONTEXT, color="#888888", linewidth=1)
    far.annotate(" end of the context in training", (CONTEXT, 103), va="top", fontsize=8)
    far.set_xlabel("position in the context")
    near.set_ylabel("copied right (%)")
    for axes in (near, far):
        axes.axhline(100 / len(LETTERS), color="#888888", linestyle="--", linewidth=1, label="chance")
        axes.set_ylim(0, 104)
    for axes in (loss, near, far):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    cli.run(main)
