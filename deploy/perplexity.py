"""Compares what runs lose by quantization: python -m deploy.perplexity --runs runs/A runs/A-gptq4 --data …

All runs predict the same tokens of the validation split. The table has each run's loss, perplexity and bits
per byte, and how its loss differs from that of the first run. The ± is the standard error of the mean of the
*paired* differences, window by window: some windows are harder than others for all runs, and that cancels.
(The losses themselves are much less certain than their differences.) Then the size on disk and in memory, and
how fast the run decodes one token at a time. --out writes the table, a picture and the numbers into a folder.
"""

from lab import terminal

if __name__ == "__main__":
    terminal.prepare()  # first, because importing torch takes seconds

import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

import data
from deploy.output import new_folder
from deploy.quantization import linear
from lab import atomic, cli
from lab import device as devices
from lab.comparison import markdown
from lab.errors import UserError, shown
from lab.sampling import packed
from lab.storage import checkpoint, runs
from lab.training import batches, evaluation, run_plots

LOGITS = 2**26  # numbers in the logits of one batch, at most
PROMPT = 16  # tokens in the cache when decoding is timed


@dataclass
class Settings:
    """Compares the loss, size and speed of runs, quantized or not."""

    runs: tuple[str, ...]
    """Folders of the runs. The differences are those from the first."""
    data: str | None = None
    """Text whose validation split is predicted, as for train.py. None: what the first run was trained on."""
    tokens: int = 16_384
    """Tokens to predict."""
    context: int | None = None
    """Tokens in a window. None: 512, or fewer if a model has fewer positions."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format in which the loss is computed. float32: without rounding errors of its own."""
    rounds: int = 5
    """How often decoding is timed, with all runs in turn; the median counts. 0: not at all."""
    decode_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format in which decoding is timed; auto: that of sample.py."""
    checkpoint: Literal["best", "last"] = "best"
    """Checkpoint of the runs that have both: best (lowest validation loss) or last."""
    device: str = "auto"
    """cuda, mps or cpu; auto: the first of these that is available."""
    out: str | None = None
    """Folder to create for perplexity.md, perplexity.png and perplexity.json."""

    def __post_init__(self):
        for name, lowest in (("tokens", 1), ("context", 1), ("rounds", 0)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"{name} must be at least {lowest}, not {value}")
        if not self.runs:
            raise ValueError("--runs needs the folder of a run, or of several")


@devices.memory_errors("try a lower --context, or fewer runs at once")
def main():
    settings = cli.parse_flags(Settings, sys.argv[1:])
    device = devices.choose(settings.device)
    devices.prepare(device)
    folders = [Path(name) for name in settings.runs]
    if settings.out is None:
        report(measure(settings, folders, device), None)
        return
    with new_folder(Path(settings.out), folders[0]) as out:
        report(measure(settings, folders, device), out)
    print(f"written to {shown(Path(settings.out))}", file=sys.stderr)


def measure(settings: Settings, folders: list[Path], device: torch.device) -> list[dict]:
    """What the table says about each run."""
    tokens, meta = same_tokens(settings, folders)
    context, windows = settings.context, None
    results = []
    for folder in folders:
        model, config = runs.load(folder, settings.checkpoint, device, getattr(torch, settings.dtype))
        if windows is None:
            shortest = min(runs.read_config(each)["model"]["block_size"] for each in folders)
            context = context or min(512, shortest)
            if context > shortest:
                raise UserError(f"--context {context} is too long: a model has {shortest} positions")
            windows = whole_windows(tokens, settings.tokens, context)
        losses = window_losses(model, windows, device)
        loss = statistics.mean(losses)
        results.append(
            {
                "run": shown(folder),
                "weights": in_words(config),
                "loss": loss,
                "perplexity": math.exp(min(loss, 700)),
                "bits_per_byte": evaluation.bits_per_byte(loss, meta),
                "tokens": len(windows) * context,
                "losses": losses,
                "bytes_on_disk": on_disk(folder, settings.checkpoint),
            }
        )
        mean, error = paired(losses, results[0]["losses"])
        results[-1] |= {"difference": mean, "standard_error": error}
        print(f"{shown(folder)}: loss {loss:.4f}", file=sys.stderr)
        del model
    if settings.rounds:
        add_speeds(settings, folders, device, results)
    return results


def same_tokens(settings: Settings, folders: list[Path]) -> tuple:
    """The tokens to predict, and the data's meta. UserError if a run has another tokenizer than the first."""
    found = None
    for folder in folders:
        config, meta = runs.read_config(folder), runs.read_meta(folder)
        name = settings.data
        if name is None:
            first = runs.read_config(folders[0])
            if "imported_from" in first:
                raise UserError(
                    f"{shown(folders[0])} was imported, so the text it was trained on is not known\n"
                    "name a text: --data tinyshakespeare, or a file or folder"
                )
            name = first["settings"]["data"]
        tokenizer = runs.tokenizer(folder) if meta["tokenizer"] == "hf" else meta["tokenizer"]
        dataset = data.recode(data.load(name, tokenizer), meta)
        tokens = dataset.val[: settings.tokens + 1]
        if found is None:
            found = tokens, dataset.meta
        elif len(tokens) != len(found[0]) or (tokens != found[0]).any():
            raise UserError(
                f"{shown(folder)} has another tokenizer than {shown(folders[0])}: losses cannot be paired\n"
                "compare runs with the same tokenizer"
            )
        runs.warn_of_edits(folder, config)
    return found


def whole_windows(tokens, limit: int, context: int) -> list[tuple]:
    """idx and targets (context,) of adjacent windows over the first tokens. UserError if there is none."""
    found = [
        (idx[0], targets[0])
        for idx, targets in batches.eval_batches(tokens, limit, 1, context)
        if (targets != -1).all()  # the last window may be shorter
    ]
    if not found:
        raise UserError(
            f"the validation split has {len(tokens):,} tokens within --tokens, which is no whole window of "
            f"{context}\nuse a longer text, more --tokens, or a lower --context"
        )
    return found


@torch.inference_mode()
def window_losses(model: torch.nn.Module, windows: list[tuple], device: torch.device) -> list[float]:
    """The mean loss of each window, in nats per token."""
    size = max(1, LOGITS // (len(windows[0][0]) * model.config.vocab_size))
    losses = []
    for start in range(0, len(windows), size):
        idx, targets = (
            torch.stack(part).to(device) for part in zip(*windows[start : start + size], strict=True)
        )
        logits = model(idx)[0].float()
        losses += F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").double().mean(1).tolist()
    return losses


def paired(losses: list[float], others: list[float]) -> tuple[float, float | None]:
    """The mean difference of two runs' losses, and its standard error; None for a single window."""
    differences = [a - b for a, b in zip(losses, others, strict=True)]
    if len(differences) < 2:
        return differences[0], None
    return statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def on_disk(folder: Path, name: str) -> int:
    """Bytes of a run's weights on disk."""
    found = checkpoint.find(folder, runs.existing(folder, name))
    return sum(path.stat().st_size for path in found.glob("*.safetensors"))


def in_memory(model: torch.nn.Module) -> int:
    """Bytes of a model's weights: each storage once, with the copies that kernels read."""
    held, blocks = [each for each in (*model.parameters(), *model.buffers()) if not each.is_mkldnn], 0
    for module in model.modules():
        if isinstance(module, packed.PackedLinear):  # in oneDNN's layout, which has no storage to ask
            blocks += module.packed.numel() * module.packed.element_size()
        if isinstance(module, linear.QuantizedLinear):
            held += [each for each in (*(module.kernel or ()), module.kept_weight) if torch.is_tensor(each)]
    return blocks + sum(
        {each.untyped_storage().data_ptr(): each.nbytes for each in held if each.numel()}.values()
    )


def in_words(config: dict) -> str:
    """How a run's weights are stored."""
    if "quantization" not in config:
        return config.get("weights_dtype", "float32")
    grids = config["quantization"]["grids"]
    kinds = [
        f"{grid['bits']} bits" + (f", groups of {grid['group_size']}" if grid["group_size"] else "")
        for grid in grids
    ]
    return f"{config['quantization'].get('method', 'unknown')}: {'; '.join(kinds)}"


def add_speeds(settings: Settings, folders: list[Path], device: torch.device, results: list[dict]) -> None:
    """Adds tokens per second and bytes in memory. Each round decodes some tokens with every run in turn."""
    models = []
    for folder in folders:
        stored = runs.weights_dtype(folder, runs.read_config(folder))
        dtype = devices.sampling_dtype(settings.decode_dtype, stored, device)
        models.append(runs.load(folder, settings.checkpoint, device, dtype)[0])
        packed.pack(models[-1])  # as sample.py
    speeds = [[] for _ in models]
    for _ in range(settings.rounds):
        for model, of in zip(models, speeds, strict=True):
            of.append(decoding_speed(model, device))
    for model, of, result in zip(models, speeds, results, strict=True):
        dtype = str(model.model.norm.weight.dtype).removeprefix("torch.")
        result |= {"tokens_per_second": statistics.median(of), "speeds": of, "decode_dtype": dtype}
        result["bytes_in_memory"] = in_memory(model)


@torch.inference_mode()
def decoding_speed(model: torch.nn.Module, device: torch.device, n_tokens: int = 16) -> float:
    """Tokens per second when they come one at a time, after a short prompt."""
    length = min(model.config.block_size, PROMPT + n_tokens + 1)
    n_prompt = max(1, length - n_tokens - 1)
    cache = model.new_cache(1, length)
    idx = torch.zeros(1, n_prompt, dtype=torch.int64, device=device)
    model(idx, cache=cache)
    model(idx[:, :1], cache=cache)  # the first step is slower
    devices.synchronize(device)
    n_tokens, started = length - n_prompt - 1, time.perf_counter()
    for _ in range(n_tokens):
        model(idx[:, :1], cache=cache)
    devices.synchronize(device)
    return n_tokens / (time.perf_counter() - started)


def report(results: list[dict], out: Path | None) -> None:
    """Prints the table; writes it with the picture and the numbers into a folder, unless that is None."""
    text = table(results)
    print(text)
    if out is None:
        return
    atomic.write(out / "perplexity.md", (text + "\n").encode())
    runs.write_json(out / "perplexity.json", results)
    plot(results, out / "perplexity.png")


def table(results: list[dict]) -> str:
    """The results as a table in Markdown."""
    heads = ["run", "weights", "loss", "perplexity", "bits/byte", "Δ loss", "on disk"]
    timed = "tokens_per_second" in results[0]
    rows = []
    for i, result in enumerate(results):
        row = [result["run"], result["weights"], f"{result['loss']:.4f}", f"{result['perplexity']:.2f}"]
        row += [f"{result['bits_per_byte']:.4f}", difference(result) if i else None]
        row.append(megabytes(result["bytes_on_disk"]))
        if timed:
            speed = f"{result['tokens_per_second']:.1f} ({result['decode_dtype']})"
            row += [megabytes(result["bytes_in_memory"]), speed]
        rows.append(row)
    return markdown.table([*heads, *(["in memory", "tokens/s"] if timed else [])], rows)


def difference(result: dict) -> str:
    """The difference from the first run, with its standard error."""
    error = result["standard_error"]
    return f"{result['difference']:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def megabytes(n_bytes: int) -> str:
    """A size in MB of 10⁶ bytes."""
    return f"{n_bytes / 1e6:,.1f} MB"


def plot(results: list[dict], path: Path) -> None:
    """Plots the differences with their standard errors, and the loss against the size on disk, as a PNG."""
    height = 1.4 + 0.35 * len(results)
    figure, (left, right) = run_plots.new_figure(11, max(3.2, height), columns=2)
    names = [f"{Path(result['run']).name}\n{result['weights']}" for result in results]
    for i, result in enumerate(results):
        color = run_plots.RUN_COLORS[i % len(run_plots.RUN_COLORS)]
        left.errorbar(
            result["difference"], -i, xerr=result["standard_error"] or 0, fmt="o", color=color, capsize=3
        )
        right.plot(
            result["bytes_on_disk"] / 1e6, result["loss"], "o", color=color, label=names[i].split("\n")[0]
        )
    left.axvline(0, color="#888888", linewidth=1)
    left.set_yticks([-i for i in range(len(results))], names, fontsize=8)
    left.set_xlabel(f"loss − that of {Path(results[0]['run']).name} (nats per token, ± standard error)")
    right.set_xlabel("weights on disk (MB)")
    right.set_ylabel("loss (nats per token)")
    right.set_xlim(left=0)
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path)


if __name__ == "__main__":
    cli.run(main)
