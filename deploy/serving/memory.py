"""How much of the cache's memory holds tokens: measured after each step, and drawn."""

from pathlib import Path

from deploy.serving.engine import Engine
from lab.errors import UserError, shown
from lab.training.run_plots import new_figure

NAMES = {
    "contiguous": "reserved without pages: room for the longest answer",
    "paged": "held in blocks",
    "stored": "tokens stored",
}
COLORS = ("#C8C8C8", "#8FB8DE", "#1F5F99")


def usage(engine: Engine, longest_answer: int | None = None) -> dict[str, int]:
    """How many tokens' room is used, held in blocks, and would be reserved without pages.

    longest_answer: the tokens that a cache without pages reserves for each answer; None: its max_tokens.
    """
    running, size = engine.scheduler.running, engine.pool.block_size
    last = {s.table.blocks[-1]: s.table.length for s in running}  # shared blocks count once
    held = len({block for s in running for block in s.table.blocks}) * size
    answers = [longest_answer or s.params.max_tokens for s in running]
    return {
        "stored": held - sum(-length % size for length in last.values()),
        "paged": held,
        "contiguous": sum(
            min(len(s.prompt) + n, engine.longest) for s, n in zip(running, answers, strict=True)
        ),
    }


def waste(history: list[dict[str, int]], held: str = "paged") -> float:
    """The share of the memory held over all steps that stores no token."""
    return 1 - sum(each["stored"] for each in history) / sum(each[held] for each in history)


def draw(history: list[dict[str, int]], block_size: int, path: Path) -> None:
    """Draws what each step held in memory, and what a cache without pages would have reserved.

    Raises UserError if the file cannot be written.
    """
    figure, axes = new_figure(7, 3.5)
    steps = range(1, len(history) + 1)
    for (name, text), color in zip(NAMES.items(), COLORS, strict=True):
        axes.fill_between(steps, [each[name] for each in history], color=color, label=text, step="mid")
    axes.set(xlabel="step", ylabel="tokens", title=f"Blocks of {block_size} tokens")
    axes.legend(loc="upper right", fontsize=8)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot draw {shown(path)}: {error}\ngive the picture another file") from None
