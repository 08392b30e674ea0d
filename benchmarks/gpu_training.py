"""Sections of gpu_check.py: training speed and losses, a whole training run, and nanoGPT's model."""

import inspect
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu_run import (
    LARGEST_DIFFERENCE,
    STEPS_COMPARED,
    Memory,
    Run,
    die_with_parent,
    in_turn,
    milliseconds,
    seconds_of,
)
from data import files, prepare
from lab import device, stages
from lab.storage import runs
from lab.training import batches, cost, log, optim

# 2: training


def made_up_text() -> np.ndarray:
    """Random tokens, for measurements that need no real text."""
    return np.random.default_rng(0).integers(65, size=100_000, dtype=np.uint16)


class Trainer:
    """A stage with its optimizer; each call runs a training step as in train.py."""

    def __init__(
        self,
        run: Run,
        name: str,
        target_device,
        dtype,
        compiled=False,
        graphs=True,
        batch_size=None,
        **fields,
    ):
        stage, preset = stages.load(name), run.sizes.preset
        torch.manual_seed(0)
        config = stage.GPTConfig(**preset["model"] | {"vocab_size": 65} | fields)
        self.model = stage.GPT(config).to(target_device).train()
        self.training_model = self.model
        if compiled:
            options = device.training_options(target_device, one_pass=graphs)
            self.training_model = torch.compile(self.model, options=options)
        self.optimizer = optim.make("adamw", self.model, preset["lr"], 0.1, (0.9, preset["beta2"]))
        self.batch_size, self.lr = batch_size or preset["batch_size"], preset["lr"]
        self.tokens_per_step = self.batch_size * config.block_size
        self.device, self.autocast = target_device, device.autocast(target_device, dtype)
        self.text, self.steps = made_up_text(), 0

    def __call__(self) -> tuple[dict, torch.Tensor]:
        """The losses and the gradient norm, still on the device."""
        self.steps += 1
        block_size = self.model.config.block_size
        idx, targets = batches.train_batch(self.text, 0, self.steps, self.batch_size, block_size)
        idx, targets = idx.to(self.device), targets.to(self.device)
        losses = optim.accumulate_gradients(self.training_model, idx, targets, self.batch_size, self.autocast)
        norm = optim.update(self.model, self.optimizer, self.lr, 1.0)
        if hasattr(self.model, "after_step"):
            self.model.after_step()
        return losses, norm

    def gradients(self) -> dict[str, torch.Tensor]:
        """The gradients of the first batch, on the CPU, for the weights as they are."""
        idx, targets = batches.train_batch(self.text, 0, 1, self.batch_size, self.model.config.block_size)
        idx, targets = idx.to(self.device), targets.to(self.device)
        optim.accumulate_gradients(self.training_model, idx, targets, self.batch_size, self.autocast)
        found = {name: p.grad.cpu() for name, p in self.model.named_parameters()}
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def speed(self, seconds: list[float]) -> dict:
        """The figures for steps that took these seconds each."""
        rate = self.tokens_per_step / statistics.median(seconds)
        figures = {"tokens_per_second": rate} | milliseconds(seconds)
        peak = device.peak_flops(self.device)
        if peak:
            figures["mfu"] = rate * self.flops() / peak
        return figures

    def flops(self) -> float:
        """FLOPs per token; counted once, then cached."""
        if not hasattr(self, "flops_per_token"):
            self.flops_per_token = cost.flops_per_token(self.model)
        return self.flops_per_token

    def must_learn(self) -> float:
        """The loss of one more step. Raises AssertionError if it is not finite."""
        loss = self()[0]["next_token"].item()
        assert np.isfinite(loss), f"the loss after {self.steps} steps is {loss}"
        return loss


def eager(run: Run) -> None:
    """Measures speed and memory of every stage's training step, not compiled, in two interleaved rounds."""
    device.prepare(run.device)
    names = list(run.parts(stages.course()))
    trainers, seconds, kept = {}, {name: [] for name in names}, {}
    for number in range(2):
        for place, name in enumerate(names):
            if number and name not in trainers:
                continue
            share = run.left() * 0.9 / (2 * len(names) - place - number * len(names))
            with run.attempt(name):
                if number == 0:
                    with Memory(run.device) as memory:
                        trainer = Trainer(run, name, run.device, run.dtype)
                        seconds_of(trainer, max(2, run.sizes.steps // 20), run.device, share / 3)
                    kept[name] = {"peak_memory": memory.bytes}
                    kept[name] |= {"parameters": cost.parameters(trainer.model)}
                    kept[name] |= {"flops_per_token": trainer.flops()}
                    trainers[name] = trainer
                trainer = trainers[name]
                seconds[name] += seconds_of(trainer, max(1, run.sizes.steps // 2), run.device, share / 2)
                loss = trainer.must_learn()
                run.record(name, **kept[name], loss=loss, **trainer.speed(seconds[name]))


def compiled(run: Run) -> None:
    """Measures speed and memory of every stage's compiled training step, interleaved with the eager one."""
    device.prepare(run.device)
    names = list(run.parts(stages.course()))
    for place, name in enumerate(names):
        share = run.left() * 0.9 / (len(names) - place)
        with run.attempt(name):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            started = time.perf_counter()
            with Memory(run.device) as memory:
                trainer = Trainer(run, name, run.device, run.dtype, compiled=True)
                trainer.must_learn()
                compile_seconds = time.perf_counter() - started
                memory.forget_peak()
                seconds_of(trainer, 3, run.device)
            breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
            figures = {
                "peak_memory": memory.bytes,
                "compile_seconds": compile_seconds,
                "graph_breaks": breaks,
            }
            plain = Trainer(run, name, run.device, run.dtype)
            seconds_of(plain, 3, run.device)
            seconds = {"eager": [], "compiled": []}
            block = max(1, run.sizes.steps // 5)
            for _ in range(5):
                seconds["compiled"] += seconds_of(trainer, block, run.device, share / 10)
                seconds["eager"] += seconds_of(plain, max(1, block // 2), run.device, share / 10)
                speed_up = statistics.median(seconds["eager"]) / statistics.median(seconds["compiled"])
                speeds = trainer.speed(seconds["compiled"])
                run.record(name, **figures, **speeds, speed_up=speed_up)
            run.record(name, loss=trainer.must_learn())
        with run.attempt(f"{name}: without CUDA graphs"):
            run.record(name, without_graphs=without_graphs(run, name, trainer, share))


def without_graphs(run: Run, name: str, trainer: Trainer, share: float) -> dict:
    """The speed of the compiled step without CUDA graphs, interleaved with that with them, and its loss."""
    plain = Trainer(run, name, run.device, run.dtype, compiled=True, graphs=False)
    seconds_of(plain, 3, run.device)  # compiles
    seconds = {"plain": [], "graphs": []}
    for _ in range(3):
        for which, one in (("plain", plain), ("graphs", trainer)):
            seconds[which] += seconds_of(one, max(1, run.sizes.steps // 5), run.device, share / 20)
    speed_up = statistics.median(seconds["plain"]) / statistics.median(seconds["graphs"])
    return plain.speed(seconds["plain"]) | {"speed_up": speed_up, "loss": plain.must_learn()}


def float32(run: Run) -> None:
    """Compares the losses of the first steps in float32 on the device and on the CPU for the same batches."""
    torch.set_float32_matmul_precision("highest")  # no TF32
    cpu = torch.device("cpu")
    options = {"dtype": torch.float32, "batch_size": run.sizes.float32_batch, "dropout": 0.0}
    for name in run.parts(stages.course()):
        with run.attempt(name):
            losses, gradients = [], []
            for target_device in (cpu, run.device):
                trainer = Trainer(run, name, target_device, **options)
                gradients.append(trainer.gradients())
                steps = [trainer() for _ in range(STEPS_COMPARED)]
                losses.append([sum(loss.values()).item() for loss, _ in steps])
            largest = max(abs(a - b) for a, b in zip(*losses, strict=True))
            apart = {
                parameter: ((found - exact).norm() / exact.norm().clamp_min(1e-12)).item()
                for (parameter, exact), found in zip(gradients[0].items(), gradients[1].values(), strict=True)
            }
            worst = dict(sorted(apart.items(), key=lambda item: -item[1])[:3])
            run.record(
                name, cpu=losses[0], device=losses[1], largest_difference=largest, worst_gradients=worst
            )
            assert largest <= LARGEST_DIFFERENCE["float32"], (
                f"the loss differs from the CPU's by {largest:.3g} nats"
            )


# 6: a whole training run


def text_without_network(run: Run) -> str | None:
    """A value for --data that needs no download, or None."""
    if run.smoke:
        path = run.scratch / "made-up.txt"
        draw = np.random.default_rng(0).choice(list("abcdefgh \n"), size=2000)
        path.write_text("".join(draw))
        return str(path)
    if os.environ.get("TINYSHAKESPEARE"):
        return "tinyshakespeare"
    for name in ("tinyshakespeare", "openshakespeare"):
        kept = files.root() / "cache" / f"{name}.txt"
        if prepare.tokens_folder(name, "char").exists() or kept.exists():
            return name
    return None


def training(run: Run) -> None:
    """Runs train.py --stage 4 to its end, and records its metrics every few seconds."""
    part = "stage 4"
    text = text_without_network(run)
    if text is None:
        run.skip(part, "no text on this machine: set TINYSHAKESPEARE to the path of its input.txt")
        return
    with run.attempt(part):
        folder, output = run.scratch / f"run-{os.getpid()}", run.scratch / "train.log"
        command = [sys.executable, "train.py", "--stage", "4", "--data", text, "--out", str(folder)]
        command += ["--device", run.device.type, "--preset", "baby"]
        if run.smoke:
            model = run.sizes.preset["model"]
            command += [f"--model.{name.replace('_', '-')}={value}" for name, value in model.items()]
            command += ["--steps=6", "--eval-every=3", "--batch-size=4"]
        started = time.monotonic()
        with open(output, "w") as file:
            process = subprocess.Popen(
                command, cwd=stages.ROOT, stdout=file, stderr=subprocess.STDOUT, preexec_fn=die_with_parent
            )
        while process.poll() is None:
            time.sleep(0.1 if run.smoke else 1.0)
            record_training(run, part, folder, text, started)
        record_training(run, part, folder, text, started)
        if process.returncode:
            raise RuntimeError(
                f"{' '.join(command)} exited with status {process.returncode}:\n{output.read_text()[-3000:]}"
            )
        run.record(part, finished=True)


def record_training(run: Run, part: str, folder: Path, text: str, started: float) -> None:
    metrics = log.read_metrics(folder / "metrics.jsonl")
    if not metrics:
        return
    evaluated = [line for line in metrics if "val_loss" in line]
    curve = [[line["step"], line["seconds"], line["val_loss"]] for line in evaluated]
    run.record(
        part,
        data=text if not run.smoke else "made up",
        dataset=runs.read_config(folder)["dataset"],
        step=metrics[-1]["step"],
        steps=runs.read_config(folder)["settings"]["steps"],
        training_seconds=metrics[-1]["seconds"],
        whole_seconds=time.monotonic() - started,
        tokens_per_second=statistics.median(line["tokens_per_second"] for line in metrics),
        loss=metrics[-1]["loss"],
        best_val_loss=min((loss for _, _, loss in curve), default=None),
        last_val_loss=curve[-1][2] if curve else None,
        curve=curve,
        finished=False,
    )


# 7: nanoGPT


def nanogpt(run: Run) -> None:
    """Times training steps of nanoGPT's own model and of our stage 0, interleaved, eager and compiled."""
    from benchmarks.against_nanogpt import load_nanogpt

    device.prepare(run.device)
    for part in run.parts(("eager", "compiled")):
        with run.attempt(part):
            torch._dynamo.reset()
            ours = Trainer(run, "stage0_gpt", run.device, run.dtype, compiled=part == "compiled")
            module = load_nanogpt(Path(run.nanogpt))
            known = inspect.signature(module.GPTConfig).parameters
            sizes = run.sizes.preset["model"] | {"vocab_size": 65, "bias": False}
            model = module.GPT(module.GPTConfig(**{k: v for k, v in sizes.items() if k in known}))
            model = model.to(run.device).train()
            optimizer = model.configure_optimizers(0.1, ours.lr, (0.9, 0.99), run.device.type)
            training_model = torch.compile(model) if part == "compiled" else model

            def theirs(ours=ours, training_model=training_model, model=model, optimizer=optimizer):
                ours.steps += 1
                block_size = ours.model.config.block_size
                idx, targets = batches.train_batch(ours.text, 0, ours.steps, ours.batch_size, block_size)
                with ours.autocast:
                    _, loss = training_model(idx.to(run.device), targets.to(run.device))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            calls = {"nanogpt": theirs, "ours": ours}
            in_turn(calls, 3, run.device)
            seconds = {name: [] for name in calls}
            for _ in range(5):
                for name, call in calls.items():
                    seconds[name] += seconds_of(
                        call, max(1, run.sizes.steps // 5), run.device, run.left() / 20
                    )
            rates = {name: ours.tokens_per_step / statistics.median(times) for name, times in seconds.items()}
            run.record(part, **rates, ratio=rates["ours"] / rates["nanogpt"])
