"""Trains one stage of the course: python train.py --stage 0

It writes a folder in runs/: config.json (all that is needed to repeat the run), metrics.jsonl, the
checkpoints last/ and best/, loss.png and sample.txt. Ctrl-C saves the run; --resume continues it bit for bit.
--init-from RUN starts from the weights of another run, trained here or imported (fine-tuning).
torchrun --nproc-per-node N train.py … does the same with N processes, on one machine or several.
"""

from lab import terminal

if __name__ == "__main__":
    terminal.prepare()  # first, since importing torch takes seconds

import math
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import data
from data.tokenizers import HF_CONFIG, copy_side_files
from lab import attention, cli, formats, parallel, stages
from lab import device as devices
from lab.errors import UserError, shown
from lab.interrupt import StopRequest
from lab.sampling import generation
from lab.storage import checkpoint, edits, runs
from lab.training import batches, cost, evaluation, log, optim, run_plots
from lab.training import settings as command_line


@dataclass
class Training:
    """The objects that all steps of a run use."""

    settings: command_line.Settings
    dataset: data.Dataset
    device: torch.device
    dtype: torch.dtype
    model: torch.nn.Module
    """The stage's own model."""
    trained: torch.nn.Module
    """The same model as it is trained: compiled if requested, and set up for several processes."""
    optimizer: torch.optim.Optimizer
    folder: Path
    progress: dict
    """The last step that was logged, the tokens and seconds up to it, and the lowest validation loss."""

    @property
    def micro_batch(self) -> int:
        """Sequences that this process computes at once."""
        return parallel.micro_batch(self.settings.batch_size, self.settings.micro_batch_size)

    @property
    def tokens_per_step(self) -> int:
        return self.settings.batch_size * self.settings.sequence_length


@devices.memory_errors("try a lower --micro-batch-size, --activation-checkpointing, or a smaller model")
def main():
    settings = command_line.parse(sys.argv[1:])
    parallel.micro_batch(settings.batch_size, settings.micro_batch_size)  # raises an error early
    if settings.wandb:
        log.log_in_to_wandb()  # likewise, before the run starts
    device = parallel.start(devices.choose(settings.device))
    if settings.compile:
        devices.require_compiler(device)
    dataset = load_data(settings)
    settings.model = command_line.fit_to_data(settings.model, dataset, settings.context)
    dtype = devices.choose_dtype(settings.dtype, device)
    devices.prepare(device)

    torch.manual_seed(settings.seed)
    stage = stages.load(settings.stage)
    attention.use(settings.attention_kernel, stage, settings.model, device)
    model = stage.GPT(settings.model).to(device)
    if settings.init_from and not settings.resume:
        runs.load_weights(Path(settings.init_from), "best", model)
    trained, optimizer = prepare_training(settings, model, dtype)

    config = describe(settings, dataset, model, device, dtype)
    folder = Path(settings.out) if settings.resume else new_folder(settings, dataset, config)
    with runs.locked(folder):
        progress = {"step": 0, "tokens": 0, "seconds": 0.0, "best_val_loss": math.inf}
        if settings.resume:
            progress = resume(settings, folder, model, optimizer, device, config)
        counted = f"{config['parameters']:,} parameters"
        kernel = settings.attention_kernel
        computed = f", attention: {kernel}" if kernel != "auto" else ""
        processes = f", {parallel.WORLD_SIZE} processes" if parallel.WORLD_SIZE > 1 else ""
        print(
            f"{settings.stage} on {dataset.name}: {counted}, {device}, {config['dtype']}{computed}{processes}"
        )
        print(f"the run is in {shown(folder)}")

        run = Training(settings, dataset, device, dtype, model, trained, optimizer, folder, progress)
        with runs.nothing_left_without_a_checkpoint(folder):
            if settings.init_from and not settings.resume:
                before_fine_tuning(run)
            stopped_by = train(run)
        parallel.stop()
        if stopped_by:
            print(f"stopped after step {progress['step']}; resume with: {checkpoint.resume_command(folder)}")
            sys.exit(128 + stopped_by)
        if parallel.RANK == 0:
            report(folder, dataset, device)


def load_data(settings) -> data.Dataset:
    """The data set, tokenized like that of the run that is resumed or fine-tuned, if there is one."""
    earlier = settings.out if settings.resume else settings.init_from
    tokenizer = settings.tokenizer
    if tokenizer == "hf":
        if not earlier or runs.read_meta(Path(earlier))["tokenizer"] != "hf":
            raise UserError(
                "--tokenizer hf is the tokenizer of an imported run that has one of its own\n"
                "name such a run with --init-from, or choose another --tokenizer"
            )
        tokenizer = runs.tokenizer(Path(earlier))
    dataset = parallel.in_turn(lambda: data.load(settings.data, tokenizer))
    if earlier:
        runs.warn_of_edits(Path(earlier), runs.read_config(Path(earlier)))
        dataset = data.recode(dataset, runs.read_meta(Path(earlier)), same_text=settings.resume)
    return dataset


def prepare_training(settings, model, dtype) -> tuple:
    """The model as it is trained (see Training.trained), and the optimizer."""
    if settings.activation_checkpointing:
        parallel.recompute_blocks(model)
    trained = parallel.join(model, settings.parallel, dtype)
    if settings.optimizer == "muon" and parallel.is_sharded(model):
        raise UserError("--optimizer muon needs whole matrices, but fsdp divides them: use --parallel ddp")
    betas = (settings.beta1, settings.beta2)
    optimizer = optim.make(settings.optimizer, model, settings.lr, settings.weight_decay, betas)
    if parallel.RANK:  # the weights are equal in all processes; from here on dropout differs
        torch.manual_seed(parallel.my_seed(settings.seed))
    if settings.compile:
        micro_batch = parallel.micro_batch(settings.batch_size, settings.micro_batch_size)
        one_pass = micro_batch == settings.batch_size
        options = devices.training_options(next(model.parameters()).device, one_pass)
        trained = torch.compile(trained, options=options)
    return trained, optimizer


def describe(settings, dataset, model, device, dtype) -> dict:
    """The content of config.json: all that is needed to repeat the run, and the machine it ran on."""
    return {
        "format": formats.RUN,
        "stage": settings.stage,
        "code": edits.code_hash(settings.stage),
        "dataset": dataset.name,
        "settings": command_line.as_json(settings),
        "model": asdict(settings.model),
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": cost.parameters(model),
        "active_parameters": cost.active_parameters(model),
        "processes": parallel.WORLD_SIZE,
        "machine": runs.machine(device),
    }


def new_folder(settings, dataset, config: dict) -> Path:
    """Makes the folder of a new run."""
    folder = parallel.from_first(
        lambda: runs.create(settings.out, settings.stage, dataset, settings.seed, config)
    )
    if settings.init_from and parallel.RANK == 0:
        copy_side_files(Path(settings.init_from), folder, HF_CONFIG)
    return folder


def resume(settings, folder: Path, model, optimizer, device: torch.device, config: dict) -> dict:
    """Restores the last checkpoint; returns the run's progress."""
    state = checkpoint.load_last(folder, model, optimizer)
    for part in ("rngs", "progress"):
        if part not in state:
            raise checkpoint.not_resumable(folder, part)
    if len(state["rngs"]) > parallel.RANK:
        devices.set_rng_state(state["rngs"][parallel.RANK], device)
    progress = state["progress"]
    if settings.steps < progress["step"]:
        raise UserError(f"{shown(folder)} is at step {progress['step']}, past --steps {settings.steps}")
    if settings.steps > progress["step"]:  # else nothing is trained, so nothing is recorded
        parallel.from_first(lambda: runs.note_resumed(folder, config, progress["step"]))
    tokens_per_step = settings.batch_size * settings.sequence_length
    progress.setdefault("tokens", progress["step"] * tokens_per_step)  # format 1 lacks it
    return progress


def before_fine_tuning(run: Training) -> None:
    """Prints the settings that suit a pretrained model, if it is one, and the loss to start from."""
    settings = run.settings
    if settings.context:
        print(
            f"fine-tuning with --context {settings.context} (the model has {settings.model.block_size:,} "
            f"positions), --batch-size {settings.batch_size} and --lr {settings.lr:g}"
        )
    before = evaluate(run, 0, devices.autocast(run.device, run.dtype))
    print(f"validation loss before fine-tuning: {before['val_loss']:.4f}", flush=True)


def train(run: Training) -> int | None:
    """Runs the remaining steps and updates run.progress; returns the signal that stopped it, or None."""
    settings, model, progress = run.settings, run.model, run.progress
    autocast = devices.autocast(run.device, run.dtype)
    rows = parallel.my_rows(settings.batch_size, run.micro_batch)
    wandb_config = runs.read_config(run.folder) if settings.wandb and parallel.RANK == 0 else None
    peak_flops = (devices.peak_flops(run.device) or 0) * parallel.WORLD_SIZE
    flops = cost.flops_per_token(model, settings.context) if peak_flops else 0
    recent = []  # losses and gradient norms since the last record, still on the device

    model.train()
    with (
        StopRequest() as request,
        log.RunLog(run.folder, settings.steps, progress["step"], wandb_config) as run_log,
    ):
        started = time.perf_counter()
        for step in range(progress["step"] + 1, settings.steps + 1):
            lr = optim.cosine_lr(step, settings.steps, settings.warmup_steps, settings.lr, settings.min_lr)
            idx, targets = batches.train_batch(
                run.dataset.train, settings.seed, step, settings.batch_size, settings.sequence_length, rows
            )
            idx, targets = idx.to(run.device), targets.to(run.device)
            losses = optim.accumulate_gradients(run.trained, idx, targets, run.micro_batch, autocast)
            grad_norm = optim.update(model, run.optimizer, lr, settings.grad_clip)
            # From stage 6 on, the model balances its experts after each step and returns statistics of them.
            statistics = model.after_step() if hasattr(model, "after_step") else {}
            recent.append((losses, grad_norm))

            last_step = step == settings.steps
            evaluates = step % settings.eval_every == 0 or last_step
            stop_signal = parallel.largest(request.signal)
            if not (step % settings.log_every == 0 or evaluates or stop_signal):
                continue
            record = make_record(run, step, lr, recent, statistics, started)
            if evaluates:
                record |= evaluate(run, step, autocast)
            mfu = flops * record["tokens_per_second"] / peak_flops if peak_flops else None
            run_log.write(record, mfu)
            if evaluates or stop_signal:
                save(run, record)
            if stop_signal and not last_step:
                request.signal = stop_signal  # another process may have received it
                return stop_signal
            recent.clear()
            started = time.perf_counter()
    return None


def make_record(run: Training, step: int, lr: float, recent: list, statistics: dict, started: float) -> dict:
    """The record of a step for metrics.jsonl; updates run.progress to that step."""
    devices.synchronize(run.device)
    seconds = time.perf_counter() - started
    stop_if_not_finite(recent, step, run.folder)
    losses, grad_norm = recent[-1]
    losses = {name: parallel.total(loss / parallel.WORLD_SIZE).item() for name, loss in losses.items()}
    tokens = len(recent) * run.tokens_per_step
    run.progress["step"] = step
    run.progress["tokens"] += tokens
    run.progress["seconds"] += seconds
    return {
        "step": step,
        "tokens": run.progress["tokens"],
        "seconds": run.progress["seconds"],
        "loss": losses.pop("next_token"),
        **losses,
        "lr": lr,
        "grad_norm": grad_norm.item(),
        "tokens_per_second": tokens / seconds,
        **log.expert_load(statistics),
    }


def evaluate(run: Training, step: int, autocast) -> dict:
    """The validation loss at a step, in nats per token and in bits per byte."""
    val_loss = evaluation.next_token_loss(
        run.model,
        run.dataset.val,
        run.settings.eval_tokens,
        run.micro_batch,
        autocast,
        run.device,
        run.settings.context,
    )
    if not math.isfinite(val_loss):
        raise not_finite("validation loss", step, run.folder)
    return {"val_loss": val_loss, "bits_per_byte": evaluation.bits_per_byte(val_loss, run.dataset.meta)}


def save(run: Training, record: dict) -> None:
    """Saves the last checkpoint, and the best one if this is the lowest validation loss so far."""
    metadata = {"stage": run.settings.stage, "step": str(record["step"])}
    if "val_loss" in record:
        metadata["val_loss"] = str(record["val_loss"])
        if record["val_loss"] < run.progress["best_val_loss"]:
            run.progress["best_val_loss"] = record["val_loss"]
            checkpoint.save(run.folder, "best", run.model, metadata)
    rngs = parallel.of_all(devices.rng_state(run.device))
    state = {"format": formats.RUN, "rngs": rngs, "progress": run.progress}
    checkpoint.save(run.folder, "last", run.model, metadata, state, run.optimizer)


def stop_if_not_finite(recent: list, step: int, folder: Path) -> None:
    """Raises UserError if a loss or gradient norm since the last record is NaN or infinite."""
    numbers = torch.stack([torch.stack([sum(losses.values()), norm]) for losses, norm in recent])
    bad = (~numbers.isfinite()).any(dim=1).tolist()
    if any(bad):
        raise not_finite("loss or its gradient", step - len(recent) + 1 + bad.index(True), folder)


def not_finite(what: str, step: int, folder: Path) -> UserError:
    """The error for a number that is NaN or infinite at a step; it says which checkpoint is kept."""
    kept = "no checkpoint was written yet"
    if checkpoint.exists(folder):
        kept = f"the checkpoint of step {checkpoint.step(folder)} in {shown(folder)} is kept"
    return UserError(
        f"the {what} is not finite at step {step}; {kept}\n"
        "try a lower --lr, a longer --warmup-steps, or --dtype float32"
    )


def report(folder: Path, dataset: data.Dataset, device: torch.device) -> None:
    """Plots the loss curves, samples from the best checkpoint, and prints where everything is."""
    metrics = log.read_metrics(folder / "metrics.jsonl")
    model, config = runs.load(folder, "best", device)
    run_plots.loss_curves(metrics, f"{config['stage']} on {config['dataset']}", folder / "loss.png")
    pictures = "loss.png"
    if "expert_tokens" in metrics[-1]:
        run_plots.expert_load(metrics, folder / "experts.png")
        pictures += ", experts.png"
    tokenizer = dataset.tokenizer
    prompt = generation.default_prompt(tokenizer)
    generator = torch.Generator().manual_seed(config["settings"]["seed"])
    tokens = list(generation.generate(model, prompt, 500, tokenizer.vocab_size, generator=generator))
    text = tokenizer.decode(tokens)
    (folder / "sample.txt").write_text(text, encoding="utf-8")

    best = min(metrics, key=lambda record: record.get("val_loss", math.inf))
    print(f"\n{text}\n")
    print(
        f"best validation loss {best['val_loss']:.4f} ({best['bits_per_byte']:.4f} bits per byte) "
        f"at step {best['step']}, {metrics[-1]['seconds']:.0f} s of training"
    )
    print(f"{shown(folder)}: {pictures}, sample.txt, metrics.jsonl, and the checkpoints best/ and last/")
    print(f"more text: python sample.py --run {shlex.quote(shown(folder))}")


if __name__ == "__main__":
    cli.run(main)
