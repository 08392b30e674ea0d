"""The trainer: batches, schedule, optimizer, checkpoints, resuming, and what it leaves behind."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN
from safetensors.torch import load_file

import train
from lab import atomic, device, parallel, stages
from lab.errors import UserError
from lab.storage import checkpoint
from lab.training import batches, cost, evaluation, log, optim, presets, settings
from lab.training import settings as command_line

ROOT = Path(__file__).parent.parent


def metrics(folder):
    """The lines of metrics.jsonl without the clock's."""
    lines = log.read_metrics(Path(folder) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """Sends this process a signal in the middle of a step, once."""
    real, sent = batches.train_batch, []

    def train_batch(tokens, seed, at, *sizes):
        if at == step and not sent:
            sent.append(signal.raise_signal(number))
        return real(tokens, seed, at, *sizes)

    monkeypatch.setattr(batches, "train_batch", train_batch)


# Muon


def muon_models(stage):
    """Two equal models with equal gradients."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        model = stage.GPT(stage.GPTConfig(vocab_size=65, block_size=16, n_layer=2, n_head=4, n_embd=32))
        idx = torch.arange(64).view(4, 16)
        sum(model(idx, targets=idx)[1].values()).backward()
        made.append(model)
    return made


def test_muon_in_batches_is_torchs_muon():
    ours, theirs = muon_models(stages.load("stage4_gqa"))
    options = (1e-2, 0.1, (0.9, 0.99))
    both = optim.make("muon", ours, *options)
    matrices = [p for p in theirs.model.layers.parameters() if p.dim() == 2]
    muon = torch.optim.Muon(
        matrices, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        both.step()
        muon.step()
    names = [name for name, p in theirs.named_parameters() if any(p is matrix for matrix in matrices)]
    assert len(names) == 14
    for name, parameter in ours.named_parameters():
        moved = parameter - muon_models(stages.load("stage4_gqa"))[0].state_dict()[name]
        assert moved.abs().max() > 1e-4, name  # AdamW moves the rest
        if name in names:
            torch.testing.assert_close(parameter, theirs.state_dict()[name], atol=2e-3, rtol=0)


def test_muon_takes_every_expert_as_a_matrix_of_its_own():
    ours, theirs = muon_models(stages.load("stage6_moe"))
    optim.make("muon", ours, 1e-2, 0.1, (0.9, 0.99)).step()
    for stack, moved in zip(
        theirs.model.layers[0].mlp.experts.parameters(),
        ours.model.layers[0].mlp.experts.parameters(),
        strict=True,
    ):
        for expert, gradient, after in zip(stack.detach(), stack.grad, moved, strict=True):
            alone = torch.nn.Parameter(expert.clone())
            alone.grad = gradient
            torch.optim.Muon([alone], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
            torch.testing.assert_close(after, alone, atol=2e-3, rtol=0)
            assert (after - expert).abs().max() > 2.5e-3  # it moved by more than the two may differ


def test_muon_resumes_bit_for_bit(run_train, workshop, monkeypatch):
    flags = ("--stage", "4", "--optimizer", "muon", "--steps", "10", "--eval-every", "4", "--log-every", "1")
    assert run_train(*flags, "--out", "whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        assert run_train(*flags, "--out", "stopped") == 128 + signal.SIGTERM
    assert run_train("--resume", "--out", "stopped") == 0
    assert metrics("stopped") == metrics("whole")


# Batches


def test_a_batch_depends_on_seed_and_step_alone():
    tokens = np.arange(1000, dtype=np.uint16)
    idx, targets = batches.train_batch(tokens, 3, 7, 5, 11)
    assert idx.shape == targets.shape == (5, 11) and idx.dtype == torch.int64
    assert torch.equal(targets, idx + 1)
    batches.train_batch(tokens, 3, 8, 5, 11)
    torch.rand(1), np.random.rand()
    assert torch.equal(batches.train_batch(tokens, 3, 7, 5, 11)[0], idx)
    for seed, step in ((4, 7), (3, 8), (7, 3)):
        assert not torch.equal(batches.train_batch(tokens, seed, step, 5, 11)[0], idx)


def test_every_window_of_the_text_can_be_drawn():
    tokens = np.arange(12, dtype=np.uint16)
    starts = {batches.train_batch(tokens, 0, step, 4, 8)[0][:, 0].tolist()[0] for step in range(200)}
    assert starts == {0, 1, 2, 3}


@pytest.mark.parametrize("length, limit", [(50, 1000), (49, 1000), (1000, 100), (9, 1000), (257, 256)])
def test_evaluation_reads_every_token_once(length, limit):
    tokens = np.arange(length, dtype=np.uint16)
    seen = []
    for idx, targets in batches.eval_batches(tokens, limit, 4, 8):
        assert idx.shape == targets.shape and idx.shape[1] == 8
        real = targets != -1
        assert torch.equal(targets[real], idx[real] + 1)
        seen += targets[real].tolist()
    assert seen == list(range(1, min(length, limit + 1)))


def test_the_evaluation_loss_weighs_every_token_alike(make_model):
    model = make_model()
    tokens = np.random.default_rng(0).integers(65, size=100).astype(np.uint16)
    losses = []
    for start in range(0, 99, 16):
        idx = torch.from_numpy(tokens[start : start + 17].astype(np.int64))[None]
        logits, _ = model(idx[:, :-1])
        losses += torch.nn.functional.cross_entropy(logits[0], idx[0, 1:], reduction="none").tolist()
    cpu = torch.device("cpu")
    loss = evaluation.next_token_loss(model, tokens, 10**6, 3, device.autocast(cpu, torch.float32), cpu)
    assert loss == pytest.approx(np.mean(losses), abs=1e-5)


def test_bits_per_byte_is_the_information_in_the_text():
    meta = {"tokens": {"val": 50}, "bytes": {"val": 200}}
    assert evaluation.bits_per_byte(math.log(16), meta) == pytest.approx(1.0)


# Optimizer


def test_the_learning_rate_warms_up_and_follows_a_cosine_as_in_nanogpt():
    def nanogpt(iteration, warmup=10, decay=100, high=1e-3, low=1e-4):
        if iteration < warmup:
            return high * (iteration + 1) / (warmup + 1)
        ratio = (iteration - warmup) / (decay - warmup)
        return low + 0.5 * (1 + math.cos(math.pi * ratio)) * (high - low)

    ours = [optim.cosine_lr(step, 101, 10, 1e-3, 1e-4) for step in range(1, 102)]
    assert ours == pytest.approx([nanogpt(iteration) for iteration in range(101)])
    assert ours[-1] == pytest.approx(1e-4) and max(ours) == pytest.approx(1e-3)


def test_only_matrices_decay_and_a_tied_one_once(make_model):
    model = make_model()
    decaying, constant = optim.adamw(model, 1e-3, 0.1, (0.9, 0.99)).param_groups
    assert decaying["weight_decay"] == 0.1 and constant["weight_decay"] == 0.0
    assert all(p.dim() >= 2 for p in decaying["params"]) and all(p.dim() < 2 for p in constant["params"])
    ids = [id(p) for group in (decaying, constant) for p in group["params"]]
    assert len(ids) == len(set(ids)) == len(list(model.parameters()))


def test_accumulated_gradients_and_losses_are_those_of_the_whole_batch(make_model):
    model = make_model().train()
    if hasattr(model.config, "router_aux_loss_coef"):  # counts the tokens of what is done at once: not a mean
        model.config.router_aux_loss_coef = 0.0
    idx, targets = torch.randint(65, (2, 12, 16), generator=torch.Generator().manual_seed(0))
    autocast = device.autocast(torch.device("cpu"), torch.float32)
    whole = optim.accumulate_gradients(model, idx, targets, 12, autocast)
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    parts = optim.accumulate_gradients(model, idx, targets, 3, autocast)
    torch.testing.assert_close(parts["next_token"], whole["next_token"])
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


# Whole runs


def test_a_run_leaves_all_that_is_promised(run_train, workshop, capsys):
    flags = ("--stage", "0", "--steps", "20", "--eval-every", "10", "--log-every", "5")
    assert run_train(*flags, report=True) == 0
    folder = workshop / "runs" / "stage0_gpt-words-seed0"
    out = capsys.readouterr().out
    assert (folder / "sample.txt").read_text() in out
    assert "runs/stage0_gpt-words-seed0" in out
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    lines = log.read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert [line["tokens"] for line in lines] == [160, 320, 480, 640]
    assert [("val_loss" in line, "bits_per_byte" in line) for line in lines] == [
        (False,) * 2,
        (True,) * 2,
    ] * 2
    for key in ("seconds", "loss", "lr", "grad_norm", "tokens_per_second"):
        assert all(line[key] > 0 for line in lines)
    config = json.loads((folder / "config.json").read_text())
    assert config["machine"]["versions"]["torch"] == torch.__version__
    assert config["settings"]["steps"] == 20 and config["model"]["n_layer"] == 2
    weights = load_file(folder / "last" / "model.safetensors")
    assert "model.layers.1.self_attn.q_proj.weight" in weights and "lm_head.weight" not in weights
    assert config["parameters"] == sum(tensor.numel() for tensor in weights.values())


def test_a_second_run_never_touches_the_first(run_train, workshop):
    for _ in range(2):
        assert run_train("--stage", "0", "--steps", "2") == 0
    assert sorted(path.name for path in (workshop / "runs").iterdir()) == [
        "stage0_gpt-words-seed0",
        "stage0_gpt-words-seed0-2",
    ]


@pytest.mark.parametrize("name", stages.course())
def test_a_resumed_run_equals_one_never_stopped_bit_for_bit(name, run_train, workshop, monkeypatch, capsys):
    flags = (
        "--stage",
        name,
        "--steps",
        "14",
        "--eval-every",
        "5",
        "--log-every",
        "1",
        "--model.dropout",
        "0.1",
    )
    assert run_train(*flags, "--out", "whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        assert run_train(*flags, "--out", "stopped") == 128 + signal.SIGTERM
    assert "python train.py --resume --out stopped" in capsys.readouterr().out
    # What a kill leaves: lines after the last checkpoint, the last of them cut short.
    with open("stopped/metrics.jsonl", "a") as file:
        file.write('{"step": 9, "loss": 0.0}\n{"step": 10, "lo')
    assert run_train("--resume", "--out", "stopped") == 0
    assert metrics("stopped") == metrics("whole")
    for checkpoint_name in ("best", "last"):
        whole, stopped = (
            load_file(f"{folder}/{checkpoint_name}/model.safetensors") for folder in ("whole", "stopped")
        )
        assert whole.keys() == stopped.keys()
        assert all(torch.equal(whole[key], stopped[key]) for key in whole)
    assert json.loads(Path("stopped/config.json").read_text())["resumed"][0]["step"] == 8


def test_resume_finds_the_unfinished_run(run_train, workshop, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, 3, signal.SIGINT)
        assert run_train("--stage", "0", "--steps", "6") == 128 + signal.SIGINT
    assert run_train("--stage", "0", "--steps", "2") == 0  # a newer, finished run
    assert run_train("--stage", "0", "--resume") == 0
    assert metrics("runs/stage0_gpt-words-seed0")[-1]["step"] == 6
    assert run_train("--stage", "0", "--resume") == 2
    assert "no unfinished run" in capsys.readouterr().err


def test_a_finished_run_can_be_trained_on(run_train, workshop):
    assert run_train("--stage", "0", "--steps", "4", "--out", "run") == 0
    assert run_train("--resume", "--out", "run", "--steps", "6") == 0
    assert metrics("run")[-1]["step"] == 6
    assert json.loads(Path("run/config.json").read_text())["resumed"][0]["changed"] == {"steps": 6}


def test_flags_of_a_resumed_run_count_and_are_written_down(run_train, workshop):
    assert run_train("--stage", "2", "--steps", "2", "--out", "run") == 0
    flags = ("--steps", "3", "--weight-decay", "0", "--beta1", "0.5", "--model.rope-theta", "500")
    assert run_train("--resume", "--out", "run", *flags) == 0
    config = json.loads(Path("run/config.json").read_text())
    assert config["model"]["rope_theta"] == 500 and config["settings"]["beta1"] == 0.5
    assert config["resumed"][0]["changed"].keys() == {"steps", "weight_decay", "beta1", "rope_theta"}
    groups = checkpoint.load_state(Path("run"))["optimizer"]["param_groups"]
    assert {(group["weight_decay"], group["betas"][0]) for group in groups} == {(0.0, 0.5)}


def test_a_validation_loss_that_is_not_finite_stops_the_run_and_keeps_the_good_checkpoint(
    run_train, workshop, monkeypatch, capsys
):
    values = iter([3.0, math.nan])
    monkeypatch.setattr(evaluation, "next_token_loss", lambda *arguments: next(values))
    assert run_train("--stage", "0", "--steps", "4", "--eval-every", "2", "--out", "run") == 2
    err = capsys.readouterr().err
    assert "validation loss is not finite at step 4" in err and "step 2 in run is kept" in err
    assert checkpoint.step(Path("run")) == 2 and "NaN" not in Path("run/metrics.jsonl").read_text()


def test_resuming_a_finished_run_leaves_its_settings_alone(run_train, workshop, capsys):
    assert run_train("--stage", "0", "--steps", "4", "--out", "run") == 0
    before = Path("run/config.json").read_text()
    assert run_train("--resume", "--out", "run", "--lr", "0.5") == 0
    assert run_train("--resume", "--out", "run", "--steps", "3", "--lr", "0.5") == 2
    assert "run is at step 4, past --steps 3" in capsys.readouterr().err
    assert Path("run/config.json").read_text() == before


def test_tokens_add_up_where_the_batch_size_changes(run_train, workshop):
    assert run_train("--stage", "0", "--steps", "2", "--out", "run") == 0
    assert run_train("--resume", "--out", "run", "--steps", "4", "--batch-size", "1") == 0
    step_4 = metrics("run")[-1]
    batch, context = (int(TINY_RUN[TINY_RUN.index(f) + 1]) for f in ("--batch-size", "--model.block-size"))
    assert step_4["step"] == 4 and step_4["tokens"] == 2 * batch * context + 2 * context


def test_best_is_never_overwritten_by_worse(run_train, workshop, monkeypatch):
    values = iter([3.0, 2.0, 2.5, 2.2])
    monkeypatch.setattr(evaluation, "next_token_loss", lambda *arguments: next(values))
    assert run_train("--stage", "0", "--steps", "4", "--eval-every", "1", "--out", "run") == 0
    assert checkpoint.metadata(Path("run/best"))["step"] == "2"
    assert checkpoint.metadata(Path("run/last"))["step"] == "4"


def test_a_compiled_run_saves_plain_names(run_train, workshop, monkeypatch):
    compile = torch.compile

    def checked(model, options):
        compile(model, options=options)  # refuses options that do not exist, and compiles only when called
        return compile(model, backend="eager")

    monkeypatch.setattr(torch, "compile", checked)
    monkeypatch.setattr(device, "require_compiler", lambda device: None)
    assert run_train("--stage", "0", "--steps", "2", "--compile", "--out", "compiled") == 0
    assert run_train("--stage", "0", "--steps", "2", "--no-compile", "--out", "plain") == 0
    assert (
        load_file("compiled/last/model.safetensors").keys()
        == load_file("plain/last/model.safetensors").keys()
    )


@pytest.mark.parametrize(
    "flags, world_size, replayed",
    [([], 1, True), (["--micro-batch-size", "6"], 1, False), (["--batch-size", "24"], 2, False)],
)
def test_a_step_is_replayed_on_cuda_only_if_it_is_a_single_pass(flags, world_size, replayed, monkeypatch):
    """Each replay overwrites the gradients of the one before, so those of two could not be added up."""
    monkeypatch.setattr(parallel, "WORLD_SIZE", world_size)
    asked = []
    monkeypatch.setattr(device, "training_options", lambda where, one_pass: asked.append(one_pass))
    monkeypatch.setattr(torch, "compile", lambda model, options: model)
    monkeypatch.setattr(parallel, "join", lambda model, *_: model)
    settings = command_line.parse(["--stage", "0", "--device", "cpu", "--compile", *flags])
    train.prepare_training(settings, torch.nn.Linear(2, 2), torch.float32)
    assert asked == [replayed]
    monkeypatch.undo()
    options = device.training_options(torch.device("cuda"), replayed)
    assert ("triton.cudagraphs" in options) == replayed


def test_without_a_compiler_for_cpp_a_compiled_run_is_refused_before_it_begins(workshop):
    """In a process of its own: inductor reads CXX when it is imported."""
    flags = ["--stage", "0", "--device", "cpu", "--data", "words.txt", "--compile"]
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    child = subprocess.run(command, env={**os.environ, "CXX": "/nowhere/g++"}, capture_output=True, text=True)
    assert child.returncode == 2 and "apt install g++" in child.stderr, child.stderr
    assert len(child.stderr.splitlines()) == 1 and not Path("runs").exists()


def test_wandb_mirrors_every_line(run_train, workshop, monkeypatch):
    class Wandb:
        def __init__(self):
            self.logged = []

        def login(self):
            pass

        def init(self, **options):
            assert options["config"]["stage"] == "stage0_gpt"
            return self

        def log(self, record, step):
            self.logged.append((step, record["loss"]))

        def finish(self):
            self.logged.append("finished")

    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert run_train("--stage", "0", "--steps", "3", "--log-every", "1", "--wandb", "--out", "run") == 0
    assert wandb.logged == [(line["step"], line["loss"]) for line in metrics("run")] + ["finished"]


def test_a_loss_that_is_not_a_number_stops_the_run_at_its_step(run_train, workshop, monkeypatch, capsys):
    flags = ("--stage", "0", "--out", "run", "--eval-every", "4", "--log-every", "4")
    assert run_train(*flags, "--steps", "4") == 0
    before = Path("run/last/model.safetensors").read_bytes()
    real = optim.accumulate_gradients

    def broken(*arguments):
        losses = real(*arguments)
        calls.append(1)
        return {"next_token": losses["next_token"] * (math.nan if len(calls) == 3 else 1)}

    calls = []
    monkeypatch.setattr(optim, "accumulate_gradients", broken)
    assert run_train("--resume", "--out", "run", "--steps", "12") == 2
    err = capsys.readouterr().err
    assert "not finite at step 7" in err and "step 4 in run is kept" in err and "Traceback" not in err
    assert Path("run/last/model.safetensors").read_bytes() == before


# Checkpoints


def save(folder, model, number):
    """Saves a checkpoint whose every weight and state is a number."""
    for parameter in model.parameters():
        parameter.data.fill_(number)
    checkpoint.save(folder, "last", model, {"stage": "s", "step": str(number)}, {"number": number})


def loaded(folder, model):
    """The number of the checkpoint that is found, the same in all its parts."""
    found = checkpoint.load_weights(folder, "last", model)
    numbers = {float(parameter.detach().unique()) for parameter in model.parameters()}
    assert numbers == {float(found["step"])} == {float(checkpoint.load_state(folder)["number"])}
    return int(found["step"])


def test_a_save_killed_at_any_moment_leaves_a_checkpoint_whole(make_model, tmp_path, monkeypatch):
    """Every call that touches the disk is the last one in turn."""
    model = make_model()

    class Killed(BaseException):
        pass

    def limited(function):
        def call(*arguments, **options):
            if not left:
                raise Killed
            left.pop()
            return function(*arguments, **options)

        return call

    outcomes = set()
    for survived in range(20):
        folder = tmp_path / str(survived)
        folder.mkdir()
        left = [None] * 100
        save(folder, model, 1)
        left = [None] * survived
        with monkeypatch.context() as patch:
            for owner, name in (
                (Path, "mkdir"),
                (Path, "rename"),
                (os, "fsync"),
                (checkpoint.shutil, "rmtree"),
                (atomic, "write_synced"),
            ):
                patch.setattr(owner, name, limited(getattr(owner, name)))
            try:
                save(folder, model, 2)
            except Killed:
                outcomes.add(loaded(folder, model))
            else:
                break
        left = [None] * 100
        save(folder, model, 3)  # what the kill left is no obstacle
        assert loaded(folder, model) == 3
        assert [path.name for path in folder.iterdir()] == ["last"]
    assert survived > 8 and outcomes == {1, 2}


def test_a_full_disk_keeps_the_checkpoint_before(make_model, tmp_path, monkeypatch):
    model = make_model()
    save(tmp_path, model, 1)
    real = atomic.write_synced
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_synced", lambda path, content: real(Path("/dev/full"), content))
        with pytest.raises(UserError, match="No space left"):
            save(tmp_path, model, 2)
    assert loaded(tmp_path, model) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_state_file_cannot_run_code(make_model, tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.system, ("touch touched",)

    save(tmp_path, make_model(), 1)
    torch.save({"number": Malicious()}, tmp_path / "last" / "state.pt")
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load_state(tmp_path)


def test_a_run_killed_again_and_again_ends_as_if_it_never_had_been(run_train, workshop):
    """A real process that saves all the time and gets kill -9 three times."""
    flags = ("--stage", "0", "--steps", "200", "--eval-every", "2", "--eval-tokens", "8", "--log-every", "1")
    command = [sys.executable, ROOT / "train.py", "--out", "killed"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    saved = 0
    for attempt in range(3):
        how = ("--resume",) if attempt else ("--data", "words.txt", *TINY_RUN, *flags)
        process = subprocess.Popen([*command, *how], env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while (reached := len(metrics("killed"))) < saved + 30 and time.monotonic() < deadline:
            time.sleep(0.001)
        process.kill()
        process.wait()
        saved = checkpoint.step(Path("killed"))
        assert reached >= 30 and reached - 4 <= saved < 200
    assert run_train("--resume", "--out", "killed") == 0
    assert run_train(*flags, "--out", "whole") == 0
    assert metrics("killed") == metrics("whole")


# Devices and costs


def test_asking_for_the_cpu_never_wakes_cuda():
    cpu = device.choose("cpu")
    device.choose_dtype("auto", cpu)
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize(
    "capabilities, expected",
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx2": True}, torch.float32),
    ],
)
def test_the_cpu_gets_bfloat16_where_it_has_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert device.choose_dtype("auto", torch.device("cpu")) == expected
    assert device.choose_dtype("float32", torch.device("cpu")) == torch.float32


def test_the_cpu_gets_float32_where_pytorch_cannot_tell(monkeypatch):
    """As PyTorch 2.9."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert device.choose_dtype("auto", torch.device("cpu")) == torch.float32


@pytest.mark.parametrize(
    "name, expected",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),  # not an SXM
        ("NVIDIA L40", 181e12),  # not an L4
        ("NVIDIA L4", 121e12),
        ("NVIDIA H900", None),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_its_exact_name(monkeypatch, name, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: name)
    assert device.peak_flops(torch.device("cuda")) == expected


def test_flops_are_those_of_the_matrix_products():
    stage = stages.load("stage0_gpt")
    config = stage.GPTConfig(vocab_size=65, block_size=16, n_layer=2, n_head=4, n_embd=32)
    forward = 2 * (2 * 12 * 32**2 + 65 * 32) + 2 * 2 * (2 * 16 * 32)  # weights; scores and values
    model = stage.GPT(config)
    assert cost.flops_per_token(model) == 3 * forward
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_the_gpt2_preset_is_gpt2():
    stage = stages.load("stage0_gpt")
    with torch.device("meta"):
        model = stage.GPT(stage.GPTConfig())
    padding = 50304 - 50257
    assert cost.parameters(model) == 124_439_808 + padding * 768


@pytest.mark.parametrize("number", [*stages.course(), *stages.relatives()])
def test_what_a_model_derives_follows_from_the_sizes_on_the_command_line(number):
    """And not from the preset's width, nor from the class's."""
    config_class = stages.load(stages.find(str(number))).GPTConfig
    flags = ["--stage", str(number), "--device", "cpu", "--preset", "laptop", "--model.n-embd", "256"]
    model = settings.parse(flags).model
    assert type(model) is config_class
    assert model == config_class(**presets.PRESETS["laptop"]["model"] | {"n_embd": 256})
    assert model != config_class(**presets.PRESETS["laptop"]["model"])


def test_help_shows_the_sizes_of_the_preset(capsys):
    with pytest.raises(SystemExit):
        settings.parse(["--stage", "4", "--preset", "baby", "--help"])
    shown = " ".join(word for word in capsys.readouterr().out.split() if word not in "│─")
    assert "Width of the residual stream. (default: 384)" in shown
    assert "rounded up to a multiple of 8. (default: None)" in shown  # derived, but not yet
