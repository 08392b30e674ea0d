"""Reports the metrics of a run during training: to metrics.jsonl, the terminal and wandb."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lab import atomic, optional, parallel
from lab.errors import UserError

SECONDS_BETWEEN_LINES = 10


class RunLog:
    """The metrics of one run; a context manager around the training loop. Only the first process writes."""

    def __init__(self, folder: Path, steps: int, first_step: int, wandb_config: dict | None):
        self.path = folder / "metrics.jsonl" if parallel.RANK == 0 else Path(os.devnull)
        if parallel.RANK == 0:
            keep_until(self.path, first_step)
        self.console = Console(highlight=False)
        self.live = self.console.is_terminal
        self.steps = steps
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[report]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.live,
        )
        self.task = self.progress.add_task("", total=steps, completed=first_step, report="")
        self.val_loss = None
        self.printed_at = 0.0
        self.wandb = None
        if wandb_config is not None and parallel.RANK == 0:
            with wandb_errors() as wandb:
                self.wandb = wandb.init(
                    project="eight-small-diffs", name=folder.name, dir=folder, config=wandb_config
                )

    def __enter__(self):
        self.file = open(self.path, "a", buffering=1)
        self.progress.start()
        return self

    def __exit__(self, *exception):
        self.progress.stop()
        self.file.close()
        if self.wandb:
            self.wandb.finish()

    def write(self, record: dict, mfu: float | None) -> None:
        """Writes one record to all outputs. mfu: model FLOPs utilisation, or None if unknown."""
        self.file.write(json.dumps(record) + "\n")
        if self.wandb:
            self.wandb.log(record, step=record["step"])
        self.val_loss = record.get("val_loss", self.val_loss)
        report = f"loss {record['loss']:.4f}"
        if self.val_loss is not None and (self.live or "val_loss" in record):  # plain lines repeat no value
            report += f"  val {self.val_loss:.4f}"
        report += f"  {record['tokens_per_second']:,.0f} tokens/s"
        if mfu is not None:
            report += f"  mfu {mfu:.0%}"
        self.progress.update(self.task, completed=record["step"], report=report)
        now = time.monotonic()
        due = "val_loss" in record or now - self.printed_at > SECONDS_BETWEEN_LINES
        if not self.live and due:
            self.printed_at = now
            self.console.print(f"step {record['step']}/{self.steps}  {report}", soft_wrap=True)


def expert_load(statistics: dict) -> dict:
    """A step's statistics of a mixture of experts, ready for metrics.jsonl; empty for other models.

    expert_tokens: tokens per expert, one list per layer; router_entropy: mean entropy of a token's scores
    (nats), by layer; busiest_expert: the largest share of a layer's tokens that went to one expert.
    """
    if not statistics:
        return {}
    tokens = statistics["expert_tokens"]
    shares = tokens / tokens.sum(1, keepdim=True)
    return {name: t.tolist() for name, t in statistics.items()} | {"busiest_expert": shares.max().item()}


def keep_until(path: Path, step: int) -> None:
    """Drops the lines after a step: those that a killed run wrote after its last checkpoint."""
    kept = [json.dumps(record) + "\n" for record in read_metrics(path) if record["step"] <= step]
    atomic.write(path, "".join(kept).encode())


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl, without a last line that a kill cut short."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def log_in_to_wandb() -> None:
    """Lets wandb ask for its key if it has none. Raises UserError if it cannot ask, or is not installed."""
    with wandb_errors() as wandb:
        if parallel.RANK == 0:
            wandb.login()


@contextmanager
def wandb_errors() -> Iterator[ModuleType]:
    """Yields the module wandb, and turns its errors into UserErrors."""
    wandb = optional.load("wandb", extra="wandb", needed_for="--wandb")
    try:
        yield wandb
    except wandb.errors.Error as error:
        raise UserError(
            f"--wandb: {(str(error).strip() or type(error).__name__).splitlines()[0]}\n"
            "log in with `wandb login`, or set WANDB_MODE=offline to keep the metrics here for `wandb sync`"
        ) from error
