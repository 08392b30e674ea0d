"""Trains one stage of the course: python train.py --stage 0

Leaves a folder in runs/: config.json (all that is needed to repeat the run), metrics.jsonl, the
checkpoints last/ and best/, loss.png and sample.txt. Ctrl-C saves; --resume goes on bit for bit.
--init-from RUN starts from the weights of another run, trained here or imported (fine-tuning).
torchrun --nproc-per-node N train.py … does the same with N processes, on one machine or many.
"""

from lab import terminal

if __name__ == "__main__":
    terminal.prepare()  # before the seconds that importing torch takes

import math
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

import data
from data.tokenizers import HF_CONFIG, copy_side_files
from lab import cli, formats, parallel, stages
from lab import device as devices
from lab.errors import UserError, shown
from lab.interrupt import StopRequest
from lab.sampling import generation
from lab.storage import checkpoint, edits, runs
from lab.training import batches, cost, evaluation, log, optim, run_plots
from lab.training import settings as command_line


@devices.memory_errors("try a lower --micro-batch-size, --activation-checkpointing, or a smaller model")
def main():
    settings = command_line.parse(sys.argv[1:])
    parallel.micro_batch(settings.batch_size, settings.micro_batch_size)  # or an error, before all else
    if settings.wandb:
        log.log_in_to_wandb()  # what is wrong is better known before the run than after it began
    device = parallel.start(devices.choose(settings.device))
    if settings.compile:
        devices.require_compiler(device)
    dataset = parallel.in_turn(lambda: data.load(settings.data, settings.tokenizer))
    known = settings.out if settings.resume else settings.init_from  # a run whose weights know their tokens
    if known:
        dataset = data.recode(dataset, runs.read_meta(Path(known)), same_text=settings.resume)
    settings.model = command_line.fit_to_data(settings.model, dataset)
    dtype = devices.choose_dtype(settings.dtype, device)
    devices.prepare(device)

    torch.manual_seed(settings.seed)
    stage = stages.load(settings.stage)
    attention = stages.attention(stage, settings.model, device, dtype)
    model = stage.GPT(settings.model).to(device)

    config = {
        "format": formats.RUN,
        "stage": settings.stage,
        "code": edits.code_hash(settings.stage),
        "dataset": dataset.name,
        "settings": command_line.as_json(settings),
        "model": asdict(settings.model),
        "dtype": str(dtype).removeprefix("torch."),
        "attention": attention,
        "parameters": cost.parameters(model),
        "active_parameters": cost.active_parameters(model),
        "processes": parallel.WORLD_SIZE,
        "machine": runs.machine(device),
    }
    if known:
        runs.warn_of_edits(Path(known), runs.read_config(Path(known)))
    if settings.init_from and not settings.resume:
        runs.load_weights(Path(settings.init_from), "best", model)
    joined, optimizer = prepare_training(settings, model, dtype)
    if settings.resume:
        folder = Path(settings.out)
    else:
        folder = parallel.from_first(
            lambda: runs.create(settings.out, settings.stage, dataset, settings.seed, config)
        )
        if settings.init_from and parallel.RANK == 0:
            copy_side_files(Path(settings.init_from), folder, HF_CONFIG)
    with runs.locked(folder):
        progress = {"step": 0, "tokens": 0, "seconds": 0.0, "best_val_loss": math.inf}
        if settings.resume:
            progress = restore(folder, model, optimizer, device)
            if settings.steps < progress["step"]:
                raise UserError(
                    f"{shown(folder)} is at step {progress['step']}, past --steps {settings.steps}"
                )
            if settings.steps > progress["step"]:  # else nothing is trained: the settings stay as they were
                parallel.from_first(lambda: runs.note_resumed(folder, config, progress["step"]))
        counted = f"{config['parameters']:,} parameters"
        computed = f", attention: {attention}" if attention else ""
        processes = f", {parallel.WORLD_SIZE} processes" if parallel.WORLD_SIZE > 1 else ""
        print(
            f"{settings.stage} on {dataset.name}: {counted}, {device}, {config['dtype']}{computed}{processes}"
        )
        print(f"the run is in {shown(folder)}")

        with runs.nothing_left_without_a_checkpoint(folder):
            stopped_by = train(settings, model, joined, optimizer, dataset, device, dtype, folder, progress)
        parallel.stop()
        if stopped_by:
            print(f"stopped after step {progress['step']}; go on with: {checkpoint.resume_command(folder)}")
            sys.exit(128 + stopped_by)
        if parallel.RANK == 0:
            report(folder, dataset, device)


def prepare_training(settings, model, dtype) -> tuple:
    """The model to train with, on its own or with other processes, and the optimizer."""
    if settings.activation_checkpointing:
        parallel.recompute_blocks(model)
    joined = parallel.join(model, settings.parallel, dtype)
    if settings.optimizer == "muon" and parallel.is_sharded(model):
        raise UserError("--optimizer muon needs whole matrices, and fsdp has parts: use --parallel ddp")
    betas = (settings.beta1, settings.beta2)
    optimizer = optim.make(settings.optimizer, model, settings.lr, settings.weight_decay, betas)
    if parallel.RANK:  # the same weights everywhere, from here on another dropout
        torch.manual_seed(parallel.my_seed(settings.seed))
    if settings.compile:
        joined = torch.compile(joined, options=devices.compile_options(next(model.parameters()).device))
    return joined, optimizer


def restore(folder: Path, model, optimizer, device: torch.device) -> dict:
    """Puts everything back to where the last checkpoint was; returns the run's progress."""
    state = checkpoint.load_last(folder, model, optimizer)
    for part in ("rngs", "progress"):
        if part not in state:
            raise checkpoint.not_resumable(folder, part)
    if len(state["rngs"]) > parallel.RANK:
        devices.set_rng_state(state["rngs"][parallel.RANK], device)
    return state["progress"]


def train(settings, model, joined, optimizer, dataset, device, dtype, folder, progress) -> int | None:
    """Runs the remaining steps, updating progress; returns the signal that stopped it early, or None.

    joined is the model as it trains: compiled, and with the other processes.
    """
    autocast = devices.autocast(device, dtype)
    micro_batch = parallel.micro_batch(settings.batch_size, settings.micro_batch_size)
    rows = parallel.my_rows(settings.batch_size, micro_batch)
    tokens_per_step = settings.batch_size * settings.model.block_size
    progress.setdefault("tokens", progress["step"] * tokens_per_step)  # a checkpoint of older code lacks it
    peak_flops = (devices.peak_flops(device) or 0) * parallel.WORLD_SIZE
    flops = cost.flops_per_token(model) if peak_flops else 0
    wandb_config = runs.read_config(folder) if settings.wandb and parallel.RANK == 0 else None
    recent = []  # losses and gradient norms since the last look at them, still on the device

    model.train()
    with (
        StopRequest() as request,
        log.RunLog(folder, settings.steps, progress["step"], wandb_config) as run_log,
    ):
        started = time.perf_counter()
        for step in range(progress["step"] + 1, settings.steps + 1):
            lr = optim.cosine_lr(step, settings.steps, settings.warmup_steps, settings.lr, settings.min_lr)
            idx, targets = batches.train_batch(
                dataset.train, settings.seed, step, settings.batch_size, settings.model.block_size, rows
            )
            idx, targets = idx.to(device), targets.to(device)
            losses = optim.accumulate_gradients(joined, idx, targets, micro_batch, autocast)
            grad_norm = optim.update(model, optimizer, lr, settings.grad_clip)
            recent.append((losses, grad_norm))
            # A mixture of experts (stage 6 on) balances itself after a step, and says how busy each was.
            watched = model.after_step() if hasattr(model, "after_step") else {}

            last_step = step == settings.steps
            evaluates = step % settings.eval_every == 0 or last_step
            stop_signal = parallel.largest(request.signal)
            if not (step % settings.log_every == 0 or evaluates or stop_signal):
                continue
            devices.synchronize(device)
            seconds = time.perf_counter() - started
            stop_if_not_finite(recent, step, folder)
            losses = {name: parallel.total(loss / parallel.WORLD_SIZE) for name, loss in losses.items()}
            progress["step"] = step
            progress["tokens"] += len(recent) * tokens_per_step
            progress["seconds"] += seconds
            record = {
                "step": step,
                "tokens": progress["tokens"],
                "seconds": progress["seconds"],
                "loss": losses.pop("next_token").item(),
                **{name: loss.item() for name, loss in losses.items()},
                "lr": lr,
                "grad_norm": grad_norm.item(),
                "tokens_per_second": len(recent) * tokens_per_step / seconds,
                **log.expert_load(watched),
            }
            if evaluates:
                val_loss = evaluation.next_token_loss(
                    model, dataset.val, settings.eval_tokens, micro_batch, autocast, device
                )
                if not math.isfinite(val_loss):
                    raise not_finite("validation loss", step, folder)
                record |= {
                    "val_loss": val_loss,
                    "bits_per_byte": evaluation.bits_per_byte(val_loss, dataset.meta),
                }
            run_log.write(record, flops * record["tokens_per_second"] / peak_flops if peak_flops else None)

            metadata = {"stage": settings.stage, "step": str(step)}
            if evaluates:
                metadata["val_loss"] = str(val_loss)
                if val_loss < progress["best_val_loss"]:
                    progress["best_val_loss"] = val_loss
                    checkpoint.save(folder, "best", model, metadata, state=None)
            if evaluates or stop_signal:
                state = {
                    "format": formats.RUN,
                    "rngs": parallel.of_all(devices.rng_state(device)),
                    "progress": progress,
                }
                if not parallel.is_sharded(model):
                    state["optimizer"] = optimizer.state_dict()
                checkpoint.save(folder, "last", model, metadata, state, optimizer)
            if stop_signal and not last_step:
                request.signal = stop_signal  # this process may have to learn of it yet
                return stop_signal
            recent.clear()
            started = time.perf_counter()
    return None


def stop_if_not_finite(recent: list, step: int, folder: Path) -> None:
    """Ends the run if a loss or gradient norm since the last look was NaN or infinite."""
    numbers = torch.stack([torch.stack([sum(losses.values()), norm]) for losses, norm in recent])
    bad = (~numbers.isfinite()).any(dim=1).tolist()
    if any(bad):
        raise not_finite("loss or its gradient", step - len(recent) + 1 + bad.index(True), folder)


def not_finite(what: str, step: int, folder: Path) -> UserError:
    """The error for a number that is NaN or infinite at a step; it says what is kept."""
    kept = "no checkpoint was written yet"
    if checkpoint.exists(folder):
        kept = f"the checkpoint of step {checkpoint.step(folder)} in {shown(folder)} is kept"
    return UserError(
        f"the {what} is not finite at step {step}; {kept}\n"
        "try a lower --lr, a longer --warmup-steps, or --dtype float32"
    )


def report(folder: Path, dataset: data.Dataset, device: torch.device) -> None:
    """Draws the loss curves, samples from the best checkpoint, and says where everything is."""
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
