"""What the notebooks share: small trained models, a text in coloured cells, and moving pictures."""

import os
import shlex
import sys
from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import torch

import data
import train
from lab.errors import shown
from lab.storage import checkpoint, locks, runs

QUICK = bool(os.environ.get("QUICK"))  # the tests' way: a few steps of tiny models, which learn nothing
DATA = "tinyshakespeare"
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A", "#7B61C9"]
LAPTOP = ["--preset", "laptop", "--device", "cpu", "--dtype", "float32"]
LAPTOP += ["--lr", "3e-3", "--eval-tokens", "20000"]
TINY = ["--model.n-layer", "2", "--model.n-embd", "32", "--batch-size", "4"]

plt.rcParams |= {
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.prop_cycle": plt.cycler(color=COLORS),
    "legend.frameon": False,
}


def trained(stage: str, steps: int, *flags: str) -> tuple[torch.nn.Module, data.CharTokenizer]:
    """A model of a stage, in evaluation mode, and its tokenizer.

    train.py trains it on TinyShakespeare, with the laptop preset, unless these flags say otherwise. The run
    is kept in runs/notebooks, so the next notebook that wants the same model only has to load it.
    """
    steps = 10 if QUICK else steps
    wanted = ["--stage", stage, "--steps", str(steps), *flags, *(TINY if QUICK else [])]
    name = "".join(wanted).strip("-").replace("--", "-").replace("model.", "")
    folder = runs.RUNS / "notebooks" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locks.waited_for(folder.with_name(f".{name}.lock")):
        if not (checkpoint.exists(folder) and checkpoint.step(folder) == steps):
            begun = ["--resume"] if checkpoint.exists(folder) else []
            call = ["train.py", "--data", DATA, *LAPTOP, *wanted, *begun, "--out", shown(folder)]
            print("$ python", shlex.join(call))
            before, sys.argv = sys.argv, call
            try:
                train.main()
            finally:
                sys.argv = before
    model, _ = runs.load(folder, "last", torch.device("cpu"))
    torch.manual_seed(0)  # what comes next is the same whether or not the model had to be trained
    return model, runs.tokenizer(folder)


def show_text(text: Sequence[str], colors: Sequence, title: str = "", columns: int = 64) -> None:
    """Draws one cell per character (or other short token), each in its colour."""
    rows = -(-len(text) // columns)
    _, axes = plt.subplots(figsize=(0.155 * columns + 0.2, 0.27 * rows + 0.4))
    for i, (token, color) in enumerate(zip(text, colors, strict=True)):
        x, y = i % columns, -(i // columns)
        axes.add_patch(plt.Rectangle((x, y), 1, 1, color=color, linewidth=0))
        visible = {"\n": "↵", " ": "·"}.get(token, token)
        axes.text(x + 0.5, y + 0.45, visible, ha="center", va="center", family="monospace", fontsize=10)
    axes.set(xlim=(0, columns), ylim=(1 - rows, 1))
    axes.set_title(title, loc="left")
    axes.axis("off")
    plt.show()


def pale(color, strength: float = 0.5) -> tuple:
    """The colour mixed with white: a background on which black text can be read."""
    rgb = plt.matplotlib.colors.to_rgb(color)
    return tuple(1 - strength * (1 - part) for part in rgb)


def animate(figure, draw: Callable[[int], None], n_frames: int, milliseconds: int = 500) -> None:
    """Plays frames: draw(i) draws the i-th into the figure. In a script, only the last one is drawn."""
    ipython = sys.modules.get("IPython")
    if ipython is None or ipython.get_ipython() is None:
        draw(n_frames - 1)
        plt.show()
        return
    from matplotlib.animation import FuncAnimation

    animation = FuncAnimation(figure, draw, frames=n_frames, interval=milliseconds, init_func=lambda: None)
    ipython.display.display(ipython.display.HTML(animation.to_jshtml(default_mode="once")))
    plt.close(figure)
