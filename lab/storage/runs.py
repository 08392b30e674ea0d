"""Run folders: how they are named, found, locked and read."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from data import Dataset, from_meta
from data.tokenizers import HF_CONFIG, SIDE_FILES
from lab import atomic, formats, parallel, stages
from lab.errors import UserError, shown
from lab.storage import checkpoint, edits, locks, tensors

RUNS = Path(os.environ.get("RUNS_DIR", stages.ROOT / "runs")).expanduser()


def create(out: str | None, stage: str, dataset: Dataset, seed: int, config: dict) -> Path:
    """Makes the folder of a new run, with its config.json and the meta.json of its data.

    It is `out`, or else runs/<stage>-<dataset>-seed<k>, with -2, -3 … appended if that exists.
    """
    if out and (Path(out) / "config.json").exists():
        with locked(Path(out)):  # a UserError of its own if the run is being trained now
            pass
        raise UserError(f"{out} already holds a run; continue it with --resume, or choose another --out")
    folder, number = Path(out) if out else RUNS / f"{stage}-{dataset.name}-seed{seed}", 1
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=bool(out))
            break
        except FileExistsError:  # perhaps made by a run that started at the same moment
            if out:
                raise
            number += 1
            folder = RUNS / f"{stage}-{dataset.name}-seed{seed}-{number}"
    with locked(folder):
        if (folder / "config.json").exists():  # made by another process in the meantime
            raise UserError(f"{shown(folder)} already holds a run; use another --out")
        write_json(folder / "meta.json", dataset.meta)
        write_json(folder / "config.json", config)
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from training the run; raises UserError if one already is.

    Under torchrun, the first process holds the lock for all.
    """
    if parallel.RANK:
        yield
        return
    try:
        with locks.held(lock_file(folder)):
            yield
    except locks.Taken as taken:
        raise UserError(
            f"{shown(folder)} is being trained by process {taken.pid}\n"
            "wait until it is done, or train into another folder with --out"
        ) from None


@contextmanager
def nothing_left_without_a_checkpoint(folder: Path) -> Iterator[None]:
    """Removes a run that an error or Ctrl-C ends within the block, before its first checkpoint.

    Such a run could not be resumed. If its folder holds other files, they and the folder stay.
    """
    try:
        yield
    except BaseException:
        if parallel.RANK == 0 and not any(checkpoint.find(folder, name) for name in ("best", "last")):
            ours = ("config.json", "meta.json", "metrics.jsonl", "best.tmp", "last.tmp", ".lock")
            for path in (folder / name for name in (*ours, *SIDE_FILES, HF_CONFIG)):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            with suppress(OSError):  # it holds something else
                folder.rmdir()
            print(f"nothing was saved: {shown(folder)} had no checkpoint yet")
        raise


def lock_file(folder: Path) -> Path:
    """The file that is locked while the run is trained."""
    return folder / ".lock"


def note_resumed(folder: Path, config: dict, step: int) -> None:
    """Records in config.json where a run was resumed: the step, changed settings, the code, the machine."""
    before = read_config(folder)
    changed = {
        key: value
        for part in ("settings", "model")
        for key, value in config[part].items()
        if before[part].get(key) != value
    }
    resumed = [
        *before.get("resumed", []),
        {"step": step, "changed": changed, "code": config["code"], "machine": config["machine"]},
    ]
    now = {key: config[key] for key in ("format", "settings", "model", "dtype")}
    write_json(folder / "config.json", before | now | {"resumed": resumed})


def folders() -> list[Path]:
    """The folders of all runs: those of train.py and, one level deeper, those of compare.py."""
    return sorted(path.parent for at in ("*", "compare/*/*") for path in RUNS.glob(f"{at}/config.json"))


def all_configs() -> list[tuple[Path, dict]]:
    """The runs that have a checkpoint, newest first, each with its config.

    A run whose config.json cannot be read is left out, and a line on stderr says so.
    """
    found = [folder for folder in folders() if checkpoint.exists(folder)]
    found.sort(key=checkpoint.written_at, reverse=True)
    readable = []
    for folder in found:
        try:
            readable.append((folder, read_config(folder)))
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
    return readable


def newest(stage: str | None) -> Path:
    """The newest run of a stage (its number or name), or of any stage if None."""
    name = stages.find(stage) if stage else None
    for folder, config in all_configs():
        if name in (None, config["stage"]):
            return folder
    of_stage = f" of {name}" if name else ""
    raise UserError(f"no run{of_stage} in {shown(RUNS)}; train one: python train.py --stage {stage or 0}")


def newest_unfinished(stage: str | None, data: str, seed: int) -> Path:
    """The newest run of this stage, data and seed that has not reached its last step."""
    name = stages.find(stage) if stage else None
    for folder, config in all_configs():
        same = (config["settings"]["data"], config["settings"]["seed"]) == (data, seed)
        if same and name in (None, config["stage"]) and checkpoint.step(folder) < config["settings"]["steps"]:
            return folder
    raise UserError(
        f"no unfinished run of {name or 'any stage'} on {data} with seed {seed} in {shown(RUNS)} to resume\n"
        "name one with --out FOLDER, or start a new run without --resume"
    )


def read_config(folder: Path) -> dict:
    """The config.json of a run. Raises UserError if another program wrote it."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or not {"stage", "model"} <= config.keys():
        raise UserError(
            f"{shown(folder)} is not a run: train.py did not write its config.json\n"
            f"if it is a Hugging Face folder: python -m deploy.import_hf {shown(folder)} --out runs/NAME"
        )
    formats.check(config, formats.RUN, shown(folder / "config.json"))
    return config


def tokenizer(folder: Path):
    """The tokenizer that the run was trained with."""
    return from_meta(read_meta(folder), folder)


def read_meta(folder: Path) -> dict:
    """The meta.json of a run: its tokenizer, and the data it was trained on."""
    return read_json(folder / "meta.json")


def read_json(path: Path) -> dict:
    """A JSON file of a run. Raises UserError if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problem = f"it has no {path.name}" if path.parent.exists() else "there is no such folder"
        raise UserError(f"{shown(path.parent)} is not a run: {problem}") from None
    except ValueError as error:
        raise UserError(f"{shown(path)} is damaged: {error}") from None


def check_stage(folder: Path, stage: str | None) -> dict:
    """The run's config. Raises UserError if a stage is given and the run is of another stage."""
    config = read_config(folder)
    if stage and stages.find(stage) != config["stage"]:
        raise UserError(f"{shown(folder)} is a run of {config['stage']}, not of {stages.find(stage)}")
    return config


def write_json(path: Path, content: dict) -> None:
    """Writes content to path, or leaves path as it was."""
    atomic.write(path, (json.dumps(content, indent=2) + "\n").encode())


def load(
    run: Path, name: str, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[torch.nn.Module, dict]:
    """The trained model of a run, in evaluation mode, and the run's config.

    name is "best" or "last"; if there is no best checkpoint yet, the last one is loaded. dtype is that of the
    parameters (None: as they are stored). On a CPU, those that need no conversion are memory-mapped.
    """
    config = read_config(run)
    sizes = model_config(run, config)
    name = existing(run, name)
    in_parts = checkpoint.is_in_parts(checkpoint.find(run, name))
    stage = stages.load(config["stage"])
    with nullcontext() if in_parts else tensors.WithoutMemory():
        model = stage.GPT(sizes)
    if any(buffer.is_meta for buffer in model.buffers()):  # a variant's own, made with torch.empty
        model = stage.GPT(sizes)
    if "quantization" in config:
        # Imported here: only these runs need it, and it is otherwise rooms that import lab/storage.
        from deploy.quantization import linear, storage

        storage.make_room(run, config, model)
        dtype = dtype or weights_dtype(run, config)  # their scales are stored in bfloat16
    checkpoint.load_weights(run, name, model)
    for key, parameter in model.named_parameters():  # one by one: few are in memory twice
        before = parameter.data
        # A copy, if quantized: the file need not stay in memory beside the kernels' form of its codes.
        parameter.data = before.to(device, dtype, copy="quantization" in config)
        if dtype == torch.float16 != before.dtype and not parameter.isfinite().all():
            largest = before.abs().max().item()
            raise UserError(
                f"{shown(run)}: {key} has numbers up to {largest:.4g}, which float16 cannot hold\n"
                "use --dtype bfloat16 or float32"
            )
    model = model.to(device).eval()
    if "quantization" in config:
        linear.prepare(model)
    return model, config


def weights_dtype(run: Path, config: dict) -> torch.dtype:
    """The dtype in which a run's weights are stored; config is its config.json."""
    name = config.get("weights_dtype", "float32")  # older runs, and those of train.py, do not say it
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(
            f"{shown(run / 'config.json')} has weights_dtype {name!r}: not one that this version knows"
        )
    return getattr(torch, name)


def refuse_quantized(run: Path, config: dict, what: str) -> None:
    """Raises UserError if the run is quantized; `what` it cannot be, such as "trained"."""
    if "quantization" in config:
        source = config["quantization"].get("source")
        raise UserError(
            f"{shown(run)} is quantized: it cannot be {what}\n"
            f"use the run that it was made from{f': {source}' if source else ''}"
        )


def model_config(run: Path, config: dict):
    """The GPTConfig of a run. Raises UserError if its stage does not exist, or no longer has these fields."""
    if config["stage"] not in stages.names():
        raise UserError(f"{shown(run)} is a run of {config['stage']}, but there is no stage of that name")
    known = stages.load(config["stage"]).GPTConfig
    sizes = {name: value for name, value in config["model"].items() if not is_former(name, value)}
    unknown = sizes.keys() - {field.name for field in fields(known)}
    if unknown:
        raise UserError(
            f"{shown(run)} has {', '.join(sorted(unknown))}, which GPTConfig in "
            f"{shown(stages.path(config['stage']))} does not have\nundo that edit, or train a new run"
        )
    return known(**sizes)


def is_former(name: str, value) -> bool:
    """Whether a field of an older run no longer exists, and its value changed nothing."""
    switched_off = {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "rope_scaling": None}  # of stage 7
    return name == "attention" or (name in switched_off and value == switched_off[name])


def warn_of_edits(run: Path, config: dict) -> None:
    """Warns on stderr if the code that a run was trained with has changed."""
    difference = edits.difference(config)
    if difference and parallel.RANK == 0:
        print(f"warning: {shown(run)}: {difference}", file=sys.stderr)


def load_weights(run: Path, name: str, model: torch.nn.Module) -> None:
    """Fills the model from a run's checkpoint "best" or "last"; from the last if there is no best."""
    checkpoint.load_weights(run, existing(run, name), model)


def existing(run: Path, name: str) -> str:
    """The name of the checkpoint to load: "last" if there is no best. Raises UserError if there is none."""
    if not any(checkpoint.find(run, kind) for kind in ("best", "last")):
        raise UserError(f"{shown(run)} has no checkpoint yet: train it further")
    return name if checkpoint.find(run, name) else "last"


def machine(device: torch.device) -> dict:
    """What a measurement depends on: the hardware, the versions, the commit."""
    packages = ("numpy", "tiktoken", "safetensors")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}  # with its CUDA version
        | {name: installed(name) for name in packages},
        "commit": commit(),
    }


def processor() -> str:
    """The processor's name, with the SIMD extensions that torch uses."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else (platform.processor() or platform.machine())
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def installed(package: str) -> str | None:
    """The version of a package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


UNCOUNTED = [f":(exclude){pattern}" for pattern in ("results", "*.md", "*.png", "*.svg")]


def commit() -> str | None:
    """The commit of the code, with -dirty if files differ from it; None outside a repository.

    results/, pages and pictures do not count: measurements write them.
    """
    name = ["git", "describe", "--always", "--abbrev=12"]
    differing = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", *UNCOUNTED]
    options = {"cwd": stages.ROOT, "capture_output": True, "text": True, "check": True}
    try:
        head = subprocess.run(name, **options).stdout.strip()
        dirty = subprocess.run(differing, **options).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if dirty else head
