"""Stage 6 where it pays: more experts at equal active parameters, and which experts take which characters.

python -m benchmarks.ideas.experts trains the missing runs in runs/ideas/: two layers of width 64 on PyCode,
which is so long that a run reads a seventh of it. It takes about 75 minutes of one core.
"""

import re
import statistics
import string
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import data
from benchmarks import ideas
from lab import cli, device, stages
from lab.comparison import report, spread, timing
from lab.storage import runs
from lab.training import batches, optim, run_plots

CPU = torch.device("cpu")
# By name: the stage, what differs from its defaults, and the number of steps as a multiple of --steps.
DENSE, LONGER = "dense", "dense, 1.5 × the steps"
MODELS = {
    DENSE: (["--stage", "5"], 1),
    LONGER: (["--stage", "5"], 1.5),
    "8 experts": (["--stage", "6"], 1),
    "32 experts": (["--stage", "6", "--model.n-routed-experts", "32"], 1),
    "64 experts": (["--stage", "6", "--model.n-routed-experts", "64"], 1),
}
MIXTURES = ["8 experts", "32 experts", "64 experts"]
SHOWN = "8 experts"  # whose classes and characters are shown
SIZES = ["--model.n-layer", "2", "--model.n-head", "2", "--model.n-embd", "64"]
SCHEDULE = ["--batch-size", "32", "--dtype", "float32", "--eval-tokens", "131072"]
RATES = [0.003, 0.006, 0.012]  # a model gets the best of them, with one seed: they differ in it
COLORS = dict(zip(MODELS, ["#888888", "#888888", "#56B4E9", "#E69F00", "#CC79A7"], strict=True))

CLASSES = {
    "indentation": "",  # the spaces at the start of a line
    "other spaces": " ",
    "newlines": "\n",
    "small letters": string.ascii_lowercase,
    "capital letters": string.ascii_uppercase,
    "digits": string.digits,
    "underscores": "_",
    "quotes": "\"'`",
    "brackets": "()[]{}",
    "other punctuation": "!#$%&*+,-./:;<=>?@\\^|~",
}
RARE = 200  # characters that occur less often are not listed: their shares are mostly chance
FAVOURITES = 5  # characters listed for each expert
SHUFFLES = 5


@dataclass
class Settings:
    """Measures mixtures of 8, 32 and 64 experts beside a dense model, on PyCode."""

    seeds: int = 3
    """Number of runs of each model at its best learning rate."""
    steps: int = 1500
    """Optimizer steps of each run, of 2048 tokens."""
    data: str = "pycode"
    """Data to train on, as in train.py."""
    rounds: int = 30
    """Number of interleaved measurements of a training step; medians are reported."""
    characters: int = 200_000
    """Characters of the validation split whose experts are counted."""


def main():
    settings = cli.parse_flags(Settings, sys.argv[1:])
    device.prepare(CPU)
    tried = {name: try_rates(name, settings) for name in (DENSE, *MIXTURES)}
    rates = {name: min(losses, key=losses.get) for name, losses in tried.items()}
    rates[LONGER] = rates[DENSE]
    seeds = range(settings.seeds)
    found = {name: [train(name, seed, rates[name], settings) for seed in seeds] for name in MODELS}
    measured = measure(found, settings.rounds)
    ideas.write(
        "experts",
        {"models": measured, "rates": rates, "tried": tried, "settings": vars(settings)},
        ["", "parameters (active)", "best rate", "validation loss", "time of a step", "minutes of training"],
        rows_of_losses(measured, rates),
        lambda: draw_losses(measured),
        "Validation loss of a dense model and of mixtures of 8, 32 and 64 experts: against tokens, against "
        "minutes of training, and after the last step against the number of parameters",
    )
    taken = {name: [routing(folder, settings) for folder, _ in found[name]] for name in MIXTURES}
    known = {name: average([information(*one) for one in taken[name]]) for name in MIXTURES}
    text, chosen = taken[SHOWN][0]
    classes = [shares_of_classes(text, layer) for layer in (*chosen, shuffled(chosen[-1], 0))]
    ideas.write(
        "specialists",
        {"bits": known, "classes": [panel.tolist() for panel in classes], "settings": vars(settings)},
        ["", "layer", "the character", "the one before", "the next one", "shuffled", "at most"],
        rows_of_information(known),
        lambda: draw_classes(classes),
        f"How many of each class of characters use each of the {SHOWN}, in both layers, and in the last "
        "layer with the choices shuffled among the characters",
    )
    favourites = rows_of_favourites(text, chosen)
    heads = ["layer", "expert", "all characters", "its favourite characters", "shuffled"]
    ideas.write("specialist-characters", {"settings": vars(settings)}, heads, favourites)


def train(name: str, seed: int, rate: float, settings: Settings) -> tuple[Path, list[dict]]:
    """The folder and the metrics of a run, which is trained if it is missing."""
    flags, times = MODELS[name]
    steps = round(settings.steps * times)
    flags = [*flags, "--data", settings.data, "--seed", str(seed), "--steps", str(steps), "--lr", str(rate)]
    flags += ["--min-lr", str(rate / 10), "--eval-every", str(max(1, settings.steps // 5)), *SCHEDULE, *SIZES]
    plain = name.replace(", ", "-").replace(" × ", "-").replace(" ", "-")
    return ideas.trained(f"experts-{plain}-{rate}-seed{seed}", flags)


def try_rates(name: str, settings: Settings) -> dict[float, float]:
    """The final validation losses of a model's runs with seed 0, by learning rate."""
    return {rate: train(name, 0, rate, settings)[1][-1]["val_loss"] for rate in RATES}


# Losses, seconds, parameters


def measure(found: dict[str, list[tuple[Path, list[dict]]]], rounds: int) -> dict[str, dict]:
    """What is measured of each model: found has the folder and the metrics of its runs, by seed."""
    steps = {name: training_step(of_seeds[0][0]) for name, of_seeds in found.items() if name != LONGER}
    seconds = timing.in_turn(steps, rounds, CPU, warm_ups=2)
    seconds[LONGER] = seconds[DENSE]
    final = {name: [metrics[-1]["val_loss"] for _, metrics in of_seeds] for name, of_seeds in found.items()}
    measured = {}
    for name, of_seeds in found.items():
        evaluated = [[r for r in metrics if "val_loss" in r] for _, metrics in of_seeds]
        config = runs.read_config(of_seeds[0][0])
        measured[name] = {
            "parameters": config["parameters"],
            "active_parameters": config["active_parameters"],
            "seconds_per_step": statistics.median(seconds[name]),
            "of_the_dense_step": timing.median_ratio(seconds[name], seconds[DENSE]),
            "steps": [record["step"] for record in evaluated[0]],
            "tokens": [record["tokens"] for record in evaluated[0]],
            "val_losses": [[record["val_loss"] for record in metrics] for metrics in evaluated],
            "final": spread.summary(final[name]),
            "differs_from_dense": spread.means_differ(final[name], final[DENSE]),
            "trained_at": config["machine"]["commit"],
        }
    return measured


def training_step(folder: Path):
    """A function that makes training steps like those of a run, with new weights and random characters."""
    config = runs.read_config(folder)
    model = stages.load(config["stage"]).GPT(runs.model_config(folder, config))
    optimizer, autocast = optim.adamw(model, 1e-3, 0.1, (0.9, 0.99)), device.autocast(CPU, torch.float32)
    size = config["settings"]["batch_size"]
    idx = torch.randint(model.config.vocab_size, (size, model.config.block_size))

    def step():
        optim.accumulate_gradients(model, idx, idx, size, autocast)
        optim.update(model, optimizer, 1e-3, 1.0)
        if hasattr(model, "after_step"):
            model.after_step()

    return step


def rows_of_losses(measured: dict[str, dict], rates: dict[str, float]) -> list[list]:
    """The table's rows. The minutes are those of the dense model's step, times the ratio of the steps."""
    rows = []
    for name, row in measured.items():
        sizes = f"{row['parameters'] / 1e6:.2f} M ({row['active_parameters'] / 1e6:.3f} M)"
        noise = "≈ " if row["differs_from_dense"] is False and name != DENSE else ""
        loss = noise + report.with_std(row["final"], 3)
        step = f"{1000 * measured[DENSE]['seconds_per_step'] * row['of_the_dense_step']:.0f} ms"
        rows.append([name, sizes, rates[name], loss, step, f"{minutes(measured, name)[-1]:.1f}"])
    return rows


def minutes(measured: dict[str, dict], name: str) -> np.ndarray:
    """Minutes of training until each evaluation, from the time of a step on a machine without other work."""
    row = measured[name]
    step = measured[DENSE]["seconds_per_step"] * row["of_the_dense_step"]
    return np.array(row["steps"]) * step / 60


def draw_losses(measured: dict[str, dict]):
    """Loss against tokens and minutes, and in the end against parameters, each ± 1 standard deviation."""
    figure, (by_tokens, by_minutes, by_parameters) = run_plots.new_figure(13, 4.6, columns=3)
    for name, row in measured.items():
        color, dash = COLORS[name], ":" if name == LONGER else "-"
        losses = np.array(row["val_losses"])  # (seeds, evaluations)
        mean, std = losses.mean(axis=0), losses.std(axis=0, ddof=min(1, len(losses) - 1))
        scales = {by_tokens: np.array(row["tokens"]) / 1e6, by_minutes: minutes(measured, name)}
        for panel, x in scales.items():
            panel.plot(x, mean, color=color, linestyle=dash, marker="o", markersize=3, label=name)
            panel.fill_between(x, mean - std, mean + std, color=color, alpha=0.25, linewidth=0)
        by_parameters.errorbar(
            row["parameters"] / 1e6,
            mean[-1],
            std[-1],
            color=color,
            capsize=4,
            marker="s" if dash == ":" else "o",
        )
    by_tokens.set_ylabel("validation loss (nats per character)")
    by_tokens.set_xlabel("characters trained on (millions)")
    by_minutes.set_xlabel("minutes of training")
    by_parameters.set_xlabel("parameters in all (millions)")
    by_parameters.set_xscale("log")
    sizes = sorted({row["parameters"] / 1e6 for row in measured.values()})
    by_parameters.set_xticks(sizes, [f"{size:.2f}" for size in sizes])
    by_parameters.minorticks_off()
    by_parameters.set_ylabel("validation loss after the last step")
    for panel in (by_tokens, by_minutes, by_parameters):
        panel.grid(alpha=0.3)
    by_tokens.legend(fontsize=9)
    return figure


# Which experts take which characters


def routing(folder: Path, settings: Settings) -> tuple[str, np.ndarray]:
    """The first characters of the validation split and one more, and the experts that each of them uses.

    The experts: (layers, characters, experts per token).
    """
    model, config = runs.load(folder, "last", CPU)
    found, chosen = [[] for _ in model.model.layers], []
    for layer, experts in zip(model.model.layers, found, strict=True):
        layer.mlp.gate.register_forward_hook(lambda _, x, output, experts=experts: experts.append(output[1]))
    tokens = data.load(settings.data).val
    size, context = config["settings"]["batch_size"], model.config.block_size
    n = min(settings.characters, len(tokens) - 1)
    with torch.no_grad():
        for idx, targets in batches.eval_batches(tokens, n, size, context):
            model(idx)
            chosen.append((targets != -1).flatten())
    kept = torch.cat(chosen).numpy()
    text = runs.tokenizer(folder).decode(tokens[: n + 1])
    return text, np.stack([torch.cat(experts).numpy()[kept] for experts in found])


def shuffled(chosen: np.ndarray, seed: int) -> np.ndarray:
    """The control: the same choices of experts (characters, experts per token), by other characters."""
    return np.random.default_rng(seed).permutation(chosen)


def information(text: str, chosen: np.ndarray) -> list[dict[str, float]]:
    """By layer, how many bits the choice of an expert tells about a character, and the other way round.

    "shuffled" is what remains without any relation, since the sample is finite. "at most" is the lower of two
    entropies: that of the characters; and that of the experts, less the bits that say which of a character's
    own experts it is.
    """
    codes = np.unique(list(text), return_inverse=True)[1]
    n = chosen.shape[1]
    of = {"itself": codes[:n], "before": np.roll(codes[:n], 1), "next": codes[1 : n + 1]}
    layers = []
    for layer in chosen:
        bits = {name: mutual_information(labels, layer) for name, labels in of.items()}
        controls = [mutual_information(of["itself"], shuffled(layer, seed)) for seed in range(SHUFFLES)]
        most = min(
            entropy(np.bincount(of["itself"])), entropy(np.bincount(layer.ravel())) - np.log2(layer.shape[1])
        )
        layers.append(bits | {"shuffled": statistics.mean(controls), "most": float(most)})
    return layers


def mutual_information(labels: np.ndarray, chosen: np.ndarray) -> float:
    """Bits of mutual information between labels (N,) and one of the experts (N, k) of each."""
    n_experts = chosen.max() + 1
    pairs = np.bincount(
        (labels[:, None] * n_experts + chosen).ravel(), minlength=(labels.max() + 1) * n_experts
    )
    pairs = pairs.reshape(-1, n_experts)
    return float(entropy(pairs.sum(axis=0)) + entropy(pairs.sum(axis=1)) - entropy(pairs))


def entropy(counts: np.ndarray) -> float:
    """The entropy, in bits, of a distribution given by counts."""
    shares = counts[counts > 0] / counts.sum()
    return -(shares * np.log2(shares)).sum()


def average(seeds: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """The means over seeds of what `information` returns."""
    return [
        {name: statistics.mean(layer[name] for layer in layers) for name in layers[0]}
        for layers in zip(*seeds, strict=True)
    ]


def rows_of_information(known: dict[str, list[dict[str, float]]]) -> list[list]:
    """The table's rows, one for each model and layer."""
    order = ("itself", "before", "next", "shuffled", "most")
    return [
        [name, i, *(f"{layer[column]:.3f}" for column in order)]
        for name, layers in known.items()
        for i, layer in enumerate(layers)
    ]


def shares_of_classes(text: str, layer: np.ndarray) -> np.ndarray:
    """How many of each class's characters use each expert: (classes, experts), from 0 to 1."""
    class_of = {character: i for i, members in enumerate(CLASSES.values()) for character in members}
    codes = np.array([class_of[character] for character in text])
    for match in re.finditer("^ +", text, re.MULTILINE):
        codes[match.start() : match.end()] = list(CLASSES).index("indentation")
    return users(codes[: len(layer)], layer, len(CLASSES))


def users(labels: np.ndarray, layer: np.ndarray, n_labels: int) -> np.ndarray:
    """How many of those with each label (N,) use each expert of the layer (N, k): (n_labels, experts)."""
    counts = np.zeros((n_labels, layer.max() + 1))
    np.add.at(counts, (labels[:, None], layer), 1)
    return counts / np.maximum(1, np.bincount(labels, minlength=n_labels))[:, None]


def draw_classes(classes: list[np.ndarray]):
    """A heat map for each layer, and one for the last layer with the choices shuffled."""
    figure, panels = run_plots.new_figure(13, 4.6, columns=len(classes))
    titles = [*(f"layer {i}" for i in range(len(classes) - 1)), f"layer {len(classes) - 2}, shuffled"]
    for panel, shares, title in zip(panels, classes, titles, strict=True):
        image = panel.imshow(100 * shares, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        for row, column in np.ndindex(shares.shape):
            share = 100 * shares[row, column]
            color = "black" if share > 60 else "white"
            panel.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8, color=color)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("expert")
        panel.set_xticks(range(shares.shape[1]))
        panel.set_yticks(range(len(CLASSES)), CLASSES if panel is panels[0] else [])
    figure.colorbar(image, ax=panels, label="% of the class that use the expert", pad=0.01)
    return figure


def rows_of_favourites(text: str, chosen: np.ndarray) -> list[list]:
    """Rows for each layer and expert: how many of all characters use it, and of those that use it most.

    Characters that use it less than all on average are not listed.
    """
    characters, codes = np.unique(list(text[: chosen.shape[1]]), return_inverse=True)
    frequent = np.flatnonzero(np.bincount(codes) >= RARE)
    rows = []
    for i, layer in enumerate(chosen):
        shares = users(codes, layer, len(characters))
        control = users(codes, shuffled(layer, 0), len(characters))
        for expert in range(shares.shape[1]):
            of_all = np.mean((layer == expert).any(axis=1))
            best = frequent[np.argsort(-shares[frequent, expert], kind="stable")][:FAVOURITES]
            best = [c for c in best if shares[c, expert] > of_all]
            listed = ", ".join(f"{shown_character(characters[c])} {shares[c, expert]:.0%}" for c in best)
            by_chance = ", ".join(f"{control[c, expert]:.0%}" for c in best)
            rows.append([i, expert, f"{of_all:.0%}", listed, by_chance])
    return rows


def shown_character(character: str) -> str:
    """A character as it stands in a table."""
    return {"\n": "newline", " ": "space", "`": "backtick"}.get(character, f"`{character}`")


if __name__ == "__main__":
    cli.run(main)
