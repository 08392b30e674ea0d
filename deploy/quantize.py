"""Quantizes a run's weights: python -m deploy.quantize --run runs/X --out runs/X-gptq4

The new run takes about a quarter of the space of 16-bit weights at 4 bits. sample.py, deploy.perplexity and
deploy.serve take it like any other; it cannot be trained. The methods are in deploy/quantization/, with a
lesson. They need some text of the kind that the model is for: --data, or else the run's own training data.

Every matrix of every layer is quantized, also those of experts and of MTP blocks. The embedding, the head,
norms, biases and routers stay as they are; --head int8 quantizes the head to 8 bits, too. The layers are done
one by one, and each is kept in OUT.unfinished: if interrupted, rerun the command, and it goes on from there.
"""

import sys
from pathlib import Path

from lab import terminal

if __name__ == "__main__":
    terminal.prepare()  # first, because importing torch takes seconds

import hashlib
import json
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import data
from deploy.output import new_folder, why_not
from deploy.quantization import awq, calibration, linear, storage
from deploy.quantization.gptq import gptq
from deploy.quantization.grid import Quantized, dequantize
from deploy.quantization.rtn import rtn
from lab import atomic, cli, device
from lab.errors import UserError, shown
from lab.storage import checkpoint, locks, runs
from lab.training import batches, run_plots

WINDOW = 256  # the longest sequence to calibrate with
SECONDS_BETWEEN_LINES = 10


@dataclass
class Settings:
    """Quantizes the weights of a run into a new run."""

    run: str
    """Folder of the run to quantize."""
    out: str
    """Folder of the quantized run to create."""
    method: Literal["rtn", "gptq", "awq"] = "gptq"
    """rtn: round to nearest; gptq: let later columns make up for errors; awq: scale important channels."""
    bits: Literal[2, 3, 4, 8] = 4
    """Bits of a weight."""
    group_size: Literal["32", "64", "128", "none"] = "64"
    """Weights of a row that share a scale; none: the whole row."""
    data: str | None = None
    """Text to calibrate with: a data set, a file or a folder, as in train.py. None: the run's own."""
    calibration_tokens: int = 16384
    """Tokens of the training split to calibrate with."""
    act_order: bool = True
    """gptq: the columns with the largest inputs come first."""
    clip: bool = True
    """awq: search for the range of each group."""
    head: Literal["keep", "int8"] = "keep"
    """int8: 8 bits, with a scale for each token, also for an embedding that shares the head's weights."""
    seed: int = 0
    """Seed of the choice of calibration windows."""
    device: str = "auto"
    """auto, cpu, cuda, mps: where to compute."""

    @property
    def group(self) -> int | None:
        return None if self.group_size == "none" else int(self.group_size)


@device.memory_errors(
    "quantization needs the memory of one layer in float32, and that of its activations on all calibration "
    "tokens: try fewer --calibration-tokens"
)
def main():
    quantize(cli.parse_flags(Settings, sys.argv[1:]))


@torch.no_grad()
def quantize(settings: Settings) -> None:
    """Writes the quantized run, and says where. Raises UserError for all that the user can fix."""
    check_flags(settings)
    run, out = Path(settings.run), Path(settings.out)
    config = runs.read_config(run)
    runs.refuse_quantized(run, config, "quantized again")
    if reason := why_not(out, run):
        raise UserError(f"{shown(out)} {reason}\nname another folder with --out")
    where = device.choose(settings.device)
    device.prepare(where)
    runs.warn_of_edits(run, config)
    model, _ = runs.load(run, "best", where)
    check_weights(run, model, settings.group)
    idx = calibration_windows(settings, run, config, model)
    unfinished = out.with_name(out.name + ".unfinished")
    with kept_layers(unfinished, describe(settings, run, idx)):
        try:
            records = quantize_layers(settings, model, idx.to(where), unfinished)
        except KeyboardInterrupt:
            n_done = len(list(unfinished.glob("layer-*")))
            print(
                f"\n{n_done} of {len(model.model.layers)} layers are kept in {shown(unfinished)}: "
                "rerun the command to go on",
                file=sys.stderr,
            )
            raise
        assemble(settings, run, out, unfinished, records)
    shutil.rmtree(unfinished)
    report(run, out)


def check_flags(settings: Settings) -> None:
    """Raises UserError for a flag that would have no effect, or an impossible value."""
    if settings.calibration_tokens < 1:
        raise UserError(f"--calibration-tokens must be at least 1, not {settings.calibration_tokens}")
    if not settings.act_order and settings.method != "gptq":
        raise UserError(f"--no-act-order is for --method gptq, not {settings.method}: leave it out")
    if not settings.clip and settings.method != "awq":
        raise UserError(f"--no-clip is for --method awq, not {settings.method}: leave it out")


def check_weights(run: Path, model: torch.nn.Module, group_size: int | None) -> None:
    """Raises UserError if weights are not finite, or if no matrix has rows as long as a group."""
    if not isinstance(getattr(model.model, "layers", None), torch.nn.ModuleList):
        raise UserError(f"{shown(run)}: its model has no model.layers, which are quantized one by one")
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(f"{shown(run)}: {name} has NaN or infinite numbers: it cannot be quantized")
    widths = {}
    for layer in model.model.layers:
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                widths[name] = module.in_features
            elif calibration.is_experts(module):
                widths |= {f"{name}.gate_up_proj": module.gate_up_proj.size(2)}
                widths |= {f"{name}.down_proj": module.down_proj.size(2)}
    if group_size and group_size > max(widths.values()):
        raise UserError(
            f"--group-size {group_size} is larger than any row: the widest has {max(widths.values())} "
            "weights\nuse a smaller group, or none"
        )
    narrow = [f"{name} ({width})" for name, width in widths.items() if group_size and width < group_size]
    if narrow:
        print(
            f"rows shorter than a group of {group_size} share one scale: {', '.join(narrow)}", file=sys.stderr
        )


def calibration_windows(settings: Settings, run: Path, config: dict, model) -> torch.Tensor:
    """Windows (n, T + 1) of the training split; the last token of each is only for MTP blocks."""
    name, meta = settings.data, runs.read_meta(run)
    if name is None:
        if "imported_from" in config:
            raise UserError(
                f"{shown(run)} was imported, so its training text is not known\n"
                "name a text to calibrate with: --data tinyshakespeare, or a file or folder"
            )
        name = config["settings"]["data"]
    tokenizer = runs.tokenizer(run) if meta["tokenizer"] == "hf" else meta["tokenizer"]
    dataset = data.recode(data.load(name, tokenizer), meta)
    length = min(model.config.block_size, WINDOW, len(dataset.train) - 1)
    n_windows = max(1, settings.calibration_tokens // length)
    if n_windows * length > len(dataset.train):
        print(
            f"warning: {dataset.name} has only {len(dataset.train):,} tokens to train on: calibration "
            "windows overlap",
            file=sys.stderr,
        )
    idx, targets = batches.train_batch(dataset.train, settings.seed, 0, n_windows, length)
    return torch.cat((idx, targets[:, -1:]), dim=1)


def describe(settings: Settings, run: Path, idx: torch.Tensor) -> dict:
    """All that the result depends on: two quantizations with the same description are the same."""
    file = checkpoint.find(run, runs.existing(run, "best"))
    weights = max(path.stat().st_mtime_ns for path in file.iterdir())
    about = {key: value for key, value in asdict(settings).items() if key not in ("out", "device", "data")}
    return about | {
        "run": str(run.resolve()),
        "weights": weights,
        "windows": idx.shape[0],
        "text": digest(idx),
    }


def digest(idx: torch.Tensor) -> str:
    """A hash of the calibration tokens."""
    return hashlib.sha256(idx.numpy().tobytes()).hexdigest()[:16]


@contextmanager
def kept_layers(folder: Path, description: dict) -> Iterator[None]:
    """Makes the folder of finished layers, or checks that those in it belong to the same quantization.

    Raises UserError if they do not, or if another process is writing them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    try:
        with locks.held(folder / ".lock"):
            before = runs.read_json(path) if path.exists() else description
            differing = [key for key in description if before.get(key) != description[key]]
            if differing:
                key = differing[0]
                raise UserError(
                    f"{shown(folder)} holds layers of another quantization: {key} {before.get(key)}, not "
                    f"{description[key]}\ndelete that folder, or choose another --out"
                )
            runs.write_json(path, description)
            yield
    except locks.Taken as taken:
        raise UserError(
            f"process {taken.pid} is writing {shown(folder)}\nwait until it is done, or choose another --out"
        ) from None


def quantize_layers(settings: Settings, model, idx: torch.Tensor, folder: Path) -> list[dict]:
    """Quantizes layer by layer, in float32, and keeps each in the folder. Returns a record of each."""
    args = calibration.first_inputs(model, idx[:, :-1])
    x, rest = args[0].float(), args[1:]
    layers, n_layer = model.model.layers, model.config.n_layer
    norm_dtype = model.model.norm.weight.dtype
    following = idx[:, 1:]  # the tokens after those of x, for MTP blocks
    records = []
    with progress(len(layers)) as tick:
        for number, layer in enumerate(layers):
            layer.to(x.device, torch.float32)
            if number >= n_layer:  # an MTP block
                x = model.model.norm.float()(x) if number == n_layer else x
                embedding = model.model.embed_tokens(following).float()
                args = (x, embedding, *rest)
                following = F.pad(following[:, 1:], (0, 1))
            else:
                args = (x, *rest)
            path = folder / f"layer-{number:03}.safetensors"
            if path.exists():
                record = restore(path, layer, settings)
                x = layer(*args)
            else:
                x, record = quantize_layer(settings, layer, args, norm_dtype, path, number)
            records.append(record)
            layer.to("meta")  # frees its memory
            tick(record)
    return records


def quantize_layer(
    settings: Settings, layer: torch.nn.Module, args: tuple, norm_dtype: torch.dtype, path: Path, number: int
) -> tuple[torch.Tensor, dict]:
    """Quantizes one layer and writes its file; returns its output and its record."""
    alphas, started = {}, time.perf_counter()
    if settings.method == "awq":
        alphas = awq.fold_layer(layer, args, settings.bits, settings.group, norm_dtype)
    output, done = calibration.quantize_layer(layer, args, method(settings))
    record = {
        "layer": number,
        "error": sum(done.errors.values()) / len(done.errors),
        "errors": done.errors,
        "seconds": time.perf_counter() - started,
        **({"alphas": alphas} if alphas else {}),
        **({"rare_experts": done.rare} if done.rare else {}),
    }
    write_layer(path, layer, done.quantized, record)
    for name, experts in done.rare.items():
        print(
            f"layer {number}: {name}: experts {', '.join(map(str, experts))} got fewer than "
            f"{calibration.RARE} calibration tokens: they are rounded to nearest",
            file=sys.stderr,
        )
    return output, record


def method(settings: Settings) -> calibration.Method:
    """The function that quantizes one matrix."""
    bits, group = settings.bits, settings.group

    def quantize(name, weight, hessian, mean_diagonal):
        if settings.method == "gptq" and hessian is not None:
            return gptq(weight, hessian, bits, group, settings.act_order, mean_diagonal=mean_diagonal)
        if settings.method == "awq" and hessian is not None and settings.clip and awq.may_clip(name):
            return awq.clip(weight, hessian, bits, group)
        return rtn(weight, bits, group)

    return quantize


def write_layer(path: Path, layer: torch.nn.Module, quantized: dict, record: dict) -> None:
    """Writes a finished layer: codes and grids, and all its other tensors, which folding may have changed."""
    tensors = {}
    for name, found in quantized.items():
        parts = found if isinstance(found, list) else [found]
        for what in ("codes", "scale", "zero"):
            stacked = torch.stack([getattr(q, what) for q in parts])
            tensors[f"{what}.{name}"] = (stacked if isinstance(found, list) else stacked[0]).cpu()
    for name, tensor in layer.state_dict().items():
        if name.removesuffix(".weight") not in quantized:
            tensors[f"kept.{name}"] = tensor.cpu().contiguous()
    atomic.write(path, safetensors.torch.save(tensors, {"record": json.dumps(record)}))


def read_layer(path: Path, settings: Settings) -> tuple[dict, dict[str, torch.Tensor], dict]:
    """What `write_layer` has written: the quantized matrices, the other tensors, and the record."""
    with safetensors.safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["record"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    quantized = {}
    for name in (key.removeprefix("codes.") for key in tensors if key.startswith("codes.")):
        parts = (tensors[f"{what}.{name}"] for what in ("codes", "scale", "zero"))
        grid = settings.bits, settings.group
        codes, scale, zero = parts
        if codes.dim() == 3:
            quantized[name] = [Quantized(*one, *grid) for one in zip(codes, scale, zero, strict=True)]
        else:
            quantized[name] = Quantized(codes, scale, zero, *grid)
    kept = {name.removeprefix("kept."): t for name, t in tensors.items() if name.startswith("kept.")}
    return quantized, kept, record


def restore(path: Path, layer: torch.nn.Module, settings: Settings) -> dict:
    """Gives a layer the dequantized weights that an interrupted quantization has kept; returns its record."""
    quantized, kept, record = read_layer(path, settings)
    device = next(layer.parameters()).device
    for name, found in quantized.items():
        if isinstance(found, list):
            layer.get_parameter(name).data = torch.stack([dequantize(q) for q in found]).to(device)
        else:
            layer.get_submodule(name).weight.data = dequantize(found).to(device)
    layer.load_state_dict({name: tensor.to(device) for name, tensor in kept.items()}, False, assign=True)
    return record


def assemble(settings: Settings, run: Path, out: Path, unfinished: Path, records: list[dict]) -> None:
    """Writes the quantized run from its finished layers."""
    model, _ = runs.load(run, "best", torch.device("cpu"))
    quantized = {}
    for number, layer in enumerate(model.model.layers):
        found, kept, _ = read_layer(unfinished / f"layer-{number:03}.safetensors", settings)
        quantized |= {f"model.layers.{number}.{name}": q for name, q in found.items()}
        dtypes = {name: tensor.dtype for name, tensor in layer.state_dict().items()}
        kept = {name: tensor.to(dtypes[name]) for name, tensor in kept.items()}
        layer.load_state_dict(kept, strict=False, assign=True)
    if settings.head == "int8":
        quantized["lm_head"] = rtn(model.lm_head.weight, 8, None)
    linear.replace(model, quantized)
    about = {"method": settings.method, "calibration_tokens": settings.calibration_tokens}
    about |= {"data": settings.data, "seed": settings.seed}
    about |= {"act_order": settings.act_order} if settings.method == "gptq" else {}
    about |= {"clip": settings.clip} if settings.method == "awq" else {}
    with new_folder(out, run) as folder:
        storage.save(folder, run, model, about)
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "quantization.jsonl").write_text(lines, encoding="utf-8")
        plot_errors(
            records, f"{run.name}: {settings.method}, {settings.bits} bits", folder / "quantization.png"
        )


def plot_errors(records: list[dict], title: str, path: Path) -> None:
    """Plots the error of every matrix by layer, as a PNG."""
    figure, axes = run_plots.new_figure(7, 4.3)
    names = list(dict.fromkeys(name for record in records for name in record["errors"]))
    for i, name in enumerate(names):
        having = [record for record in records if name in record["errors"]]
        axes.plot(
            [record["layer"] for record in having],
            [max(record["errors"][name], 1e-12) for record in having],
            color=run_plots.RUN_COLORS[i % len(run_plots.RUN_COLORS)],
            linestyle=["-", "--", ":"][i // len(run_plots.RUN_COLORS) % 3],
            marker="o",
            markersize=3,
            label=name.rsplit(".", 1)[-1] if "mlp." not in name else name.removeprefix("mlp."),
        )
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel("squared error of the outputs, relative")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=8, ncols=4)
    figure.savefig(path)


@contextmanager
def progress(n_layers: int) -> Iterator:
    """A progress bar by layer, or a line every few seconds where there is no terminal."""
    console = Console(highlight=False)
    columns = TextColumn("layer"), MofNCompleteColumn(), BarColumn(bar_width=None)
    columns += TextColumn("{task.fields[report]}"), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task, printed_at = bar.add_task("", total=n_layers, report=""), [time.monotonic()]

        def tick(record: dict) -> None:
            n_done, error = record["layer"] + 1, f"error {record['error']:.5f}"
            bar.update(task, completed=n_done, report=error)
            due = time.monotonic() - printed_at[0] > SECONDS_BETWEEN_LINES or n_done == n_layers
            if not console.is_terminal and due:
                printed_at[0] = time.monotonic()
                console.print(f"layer {n_done}/{n_layers}  {error}", soft_wrap=True)

        yield tick


def report(run: Path, out: Path) -> None:
    """Prints how large both runs are, and how to use the new one."""
    before, after = size_of(run, runs.existing(run, "best")), size_of(out, "last")
    print(f"{before / 1e6:,.2f} MB became {after / 1e6:,.2f} MB ({after / before:.0%})")
    print(f"{shown(out)}: quantization.png and quantization.jsonl have the error by layer")
    print(f"to use it: python sample.py --run {shlex.quote(shown(out))}")


def size_of(run: Path, name: str) -> int:
    """The size in bytes of a checkpoint's weights."""
    return sum(file.stat().st_size for file in checkpoint.find(run, name).glob("*.safetensors"))


if __name__ == "__main__":
    cli.run(main)
