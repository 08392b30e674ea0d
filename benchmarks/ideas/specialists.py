"""Stage 6's experts: which of them take which characters, beside two controls.

In one, the choices are shuffled among the characters. In the other, nothing of the model was ever trained.

python -m benchmarks.ideas.specialists trains the missing runs in runs/ideas/: two layers of width 64, with 8
experts, on PyCode. It takes about 2 minutes of one core.
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
from benchmarks.ideas import experts
from lab import cli, device
from lab.comparison import report, spread
from lab.storage import runs
from lab.training import batches, run_plots

CPU = torch.device("cpu")
MODEL, RATE = "8 experts", 0.004  # of benchmarks.ideas.experts
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
LOYAL = 0.95  # a character is loyal if this share of its occurrences use one and the same expert
FAVOURITES = 5  # characters listed for each expert
SHUFFLES = 5


@dataclass
class Settings:
    """Counts which of 8 experts take which characters, on PyCode."""

    seeds: int = 3
    """Number of runs."""
    steps: int = 400
    """Optimizer steps of each run, of 2048 tokens."""
    characters: int = 200_000
    """Characters of the validation split to count, from its start."""


def main():
    settings = cli.parse_benchmark_flags(Settings, sys.argv[1:])
    device.prepare(CPU)
    folders = [experts.train(MODEL, seed, RATE, settings.steps)[0] for seed in range(settings.seeds)]
    taken = [routing(folder, settings.characters) for folder in folders]
    bits = [information(*of_seed) for of_seed in taken]
    never = [information(*routing(folder, settings.characters, trained=False)) for folder in folders]
    text, chosen = taken[0]
    classes = [shares_of_classes(text, layer) for layer in (*chosen, shuffled(chosen[-1], 0))]
    measured = {
        "bits": bits,
        "bits never trained": never,
        "classes": [shares.tolist() for shares in classes],
        "settings": vars(settings),
    }
    ideas.write(
        "specialists",
        measured,
        ["layer", "the character", "the one before", "the next one", "shuffled", "at most", "loyal"],
        rows_of_information(bits) + rows_of_information(never, ", never trained"),
        lambda: draw_classes(classes),
        f"How many of each class of characters use each of the {MODEL}, in both layers, and in the last "
        "layer with the choices shuffled among the characters",
    )
    favourites = rows_of_favourites(text, chosen)
    heads = ["layer", "expert", "all characters", "its favourite characters", "shuffled"]
    ideas.write("favourites", {"settings": vars(settings)}, heads, favourites)


def routing(folder: Path, n_characters: int, trained: bool = True) -> tuple[str, np.ndarray]:
    """The first characters of the validation split and one more, and the experts that each of them uses.

    The experts: (layers, characters, experts per token). If not trained, those of the run's model as it was
    before its first step.
    """
    model, config = runs.load(folder, "last", CPU)
    if not trained:
        torch.manual_seed(config["settings"]["seed"])
        model = type(model)(model.config).eval()
    chosen, real = [[] for _ in model.model.layers], []
    for layer, of_layer in zip(model.model.layers, chosen, strict=True):
        layer.mlp.gate.register_forward_hook(lambda _, x, output, to=of_layer: to.append(output[1]))
    tokens = data.load(experts.DATA).val
    size, context = config["settings"]["batch_size"], model.config.block_size
    n = min(n_characters, len(tokens) - 1)
    with torch.no_grad():
        for idx, targets in batches.eval_batches(tokens, n, size, context):
            model(idx)
            real.append((targets != -1).flatten())  # the rest fills up the last window
    text = runs.tokenizer(folder).decode(tokens[: n + 1])
    return text, np.stack([torch.cat(of_layer)[torch.cat(real)].numpy() for of_layer in chosen])


def shuffled(chosen: np.ndarray, seed: int) -> np.ndarray:
    """The control: the same choices of experts (characters, experts per token), by other characters."""
    return np.random.default_rng(seed).permutation(chosen)


def shuffled_among_equals(chosen: np.ndarray, characters: np.ndarray, seed: int) -> np.ndarray:
    """The same choices by other occurrences of the same character: a router that knows no context."""
    random = np.random.default_rng(seed)
    by_character = np.argsort(characters, kind="stable")
    mixed = np.lexsort((random.random(len(characters)), characters))
    control = np.empty_like(chosen)
    control[by_character] = chosen[mixed]
    return control


def information(text: str, chosen: np.ndarray) -> list[dict[str, float]]:
    """By layer, how many bits the choice of an expert tells about a character, and the other way round.

    "itself" is the character that the layer is at, "before" and "next" are its neighbours. A neighbour is
    related to the expert already because it is related to the character: "before alike" and "next alike" are
    the bits that are left if the choices are shuffled among equal characters. "shuffled" is what remains
    without any relation, since the sample is finite. "most" is the lower of two entropies: that of the
    characters; and that of the experts, less the bits that say which of a character's own experts it is.
    "loyal" and "loyal shuffled" are the shares of the frequent characters that are loyal to an expert.
    """
    codes = np.unique(list(text), return_inverse=True)[1]
    n = chosen.shape[1]
    characters, before, after = codes[:n], np.roll(codes[:n], 1), codes[1 : n + 1]
    layers = []
    for layer in chosen:
        alike = shuffled_among_equals(layer, characters, 0)
        controls = [shuffled(layer, seed) for seed in range(SHUFFLES)]
        of_experts = entropy(np.bincount(layer.ravel())) - np.log2(layer.shape[1])
        layers.append(
            {
                "itself": mutual_information(characters, layer),
                "before": mutual_information(before, layer),
                "before alike": mutual_information(before, alike),
                "next": mutual_information(after, layer),
                "next alike": mutual_information(after, alike),
                "shuffled": statistics.mean(mutual_information(characters, control) for control in controls),
                "most": float(min(entropy(np.bincount(characters)), of_experts)),
                "loyal": loyal(characters, layer),
                "loyal shuffled": statistics.mean(loyal(characters, control) for control in controls),
            }
        )
    return layers


def mutual_information(labels: np.ndarray, chosen: np.ndarray) -> float:
    """Bits of mutual information between labels (N,) and one of the experts (N, k) of each."""
    pairs = np.zeros((labels.max() + 1, chosen.max() + 1))
    np.add.at(pairs, (labels[:, None], chosen), 1)
    return float(entropy(pairs.sum(axis=0)) + entropy(pairs.sum(axis=1)) - entropy(pairs))


def loyal(characters: np.ndarray, layer: np.ndarray) -> float:
    """The share of the characters, of those that are not rare, that are loyal to one of the experts."""
    counts = np.bincount(characters)
    shares = users(characters, layer, len(counts))[counts >= RARE]
    return float(np.sum(shares.max(axis=1) >= LOYAL) / max(1, len(shares)))


def entropy(counts: np.ndarray) -> float:
    """The entropy, in bits, of a distribution given by counts."""
    shares = counts[counts > 0] / counts.sum()
    return -(shares * np.log2(shares)).sum()


def rows_of_information(seeds: list[list[dict[str, float]]], model: str = "") -> list[list]:
    """The table's rows, one for each layer: means over seeds ± their standard deviation.

    model: what the first column says of it behind the layer's number.
    """
    rows = []
    for i, layers in enumerate(zip(*seeds, strict=True)):
        found = {
            name: report.with_std(spread.summary([layer[name] for layer in layers]), 3) for name in layers[0]
        }
        neighbours = (f"{found[name]} ({found[f'{name} alike']})" for name in ("before", "next"))
        own, control = (
            statistics.mean(layer[key] for layer in layers) for key in ("loyal", "loyal shuffled")
        )
        bits = [found["itself"], *neighbours, found["shuffled"], found["most"]]
        rows.append([f"{i}{model}", *bits, f"{own:.0%} ({control:.0%})"])
    return rows


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
    figure, panels = run_plots.new_figure(10.5, 4, columns=len(classes))
    titles = [*(f"layer {i}" for i in range(len(classes) - 1)), f"layer {len(classes) - 2}, shuffled"]
    for panel, shares, title in zip(panels, classes, titles, strict=True):
        image = panel.imshow(100 * shares, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        for row, column in np.ndindex(shares.shape):
            share = 100 * shares[row, column]
            color = "black" if share > 60 else "white"
            panel.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=6.5, color=color)
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
