"""Many processes: the losses of one, one that writes, and an end without a hang; in real groups of two."""

import contextlib
import functools
import io
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import Counter
from multiprocessing import connection
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL, TINY_RUN, call
from safetensors.torch import load_file
from test_training import metrics, stop_at
from torch.utils._python_dispatch import TorchDispatchMode

import sample
import train
from deploy import export
from lab import cli, device, parallel, stages
from lab.interrupt import StopRequest
from lab.storage import checkpoint, runs
from lab.training import evaluation, optim
from lab.training import settings as command_line

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
FLOAT32 = device.autocast(CPU, torch.float32)
# A vocabulary that two processes cannot halve; a loss that falls in 12 steps.
FLAGS = ["--device", "cpu", "--dtype", "float32", "--model.vocab-size", "13", "--batch-size", "8"]
FLAGS += ["--steps", "12", "--eval-every", "6", "--log-every", "1", "--lr", "3e-3", "--warmup-steps", "2"]


# The group


class Group:
    """Two processes with what torchrun would tell them in their environment; they stay for all tests."""

    def __init__(self):
        spawn = torch.multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(2):
            ours, theirs = spawn.Pipe()
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
            environment = {name: str(number) for name, number in numbers.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            with mock.patch.dict(os.environ, environment):
                process = spawn.Process(target=live, args=(theirs,), daemon=True)
                process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def __call__(self, function, *arguments, timeout=120):
        """What function(*arguments) returns in each process, by rank; a failure after timeout seconds."""
        environment = {"MASTER_PORT": free_port(), "DATA_DIR": os.environ["DATA_DIR"]}
        for pipe in self.pipes:
            pipe.send((Path.cwd(), environment, function, arguments))
        deadline = time.monotonic() + timeout
        answers = {}
        while len(answers) < len(self.pipes):
            silent = [pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]
            ready = connection.wait(silent, max(0.0, deadline - time.monotonic()))
            answers |= {self.pipes.index(pipe): pipe.recv() for pipe in ready}
            if not ready or not all(worked for worked, _ in answers.values()):
                self.end()
                pytest.fail(f"a process failed or hangs; what they answered, by rank: {answers}")
        return [answers[rank][1] for rank in sorted(answers)]

    def end(self):
        for process in self.processes:
            process.kill()
            process.join()


def free_port():
    """The number of a port that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def live(pipe):
    """The life of a process of the group."""
    torch.set_num_threads(1)
    stdout = sys.stdout
    while True:
        folder, environment, function, arguments = pipe.recv()
        os.chdir(folder)
        os.environ.update(environment)
        torch.manual_seed(0)
        try:
            answer = True, function(*arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        parallel.stop()
        sys.stdout = stdout  # parallel.start silences all but the first
        pipe.send(answer)


@pytest.fixture(scope="module")
def shared_group():
    made = []

    def started():
        if not made or not all(process.is_alive() for process in made[-1].processes):
            made.append(Group())
        return made[-1]

    yield started
    for group in made:
        group.end()


@pytest.fixture
def group(shared_group, workshop):
    """group(function, *arguments): what it returns in each of two processes, in the test's folder."""
    return shared_group()


def together(function, *arguments):
    """function(*arguments), in the group and with its numbers, as a job for it."""
    parallel.start(CPU)
    return function(*arguments)


def run(*flags, stop=None):
    """train.py with these flags; the last process gets a signal in step stop. Status, stdout and stderr."""
    defaults = [] if "--resume" in flags else ["--data", "words.txt", *TINY_RUN, *FLAGS]
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as stdout,
        contextlib.redirect_stderr(io.StringIO()) as stderr,
    ):
        patch.setattr(cli, "SECONDS_FOR_THE_FIRST", 0)
        if stop and parallel.RANK == parallel.WORLD_SIZE - 1:
            stop_at(patch, stop)
        status = call(patch, train, *defaults, *flags)
    return status, stdout.getvalue(), stderr.getvalue()


def run_all(group, *flags, status=0, **options):
    """run(*flags) in both processes, which must end with the status; what each said on stdout and stderr."""
    outcomes = group(functools.partial(run, *flags, **options))
    assert [outcome[0] for outcome in outcomes] == [status] * 2, outcomes
    return [said for _, *said in outcomes]


def assert_equal_runs(ours, theirs, tolerance=1e-5):
    """That two runs had the same losses and other metrics at every step, but for the tolerance."""
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            wanted = pytest.approx(np.array(other[name]), abs=tolerance, rel=tolerance)
            assert np.array(value) == wanted, (mine["step"], name)


def tiny(name, **sizes):
    """A tiny model of a stage, the same everywhere."""
    stage = stages.load(name)
    torch.manual_seed(0)
    return stage.GPT(stage.GPTConfig(**TINY_MODEL | {"vocab_size": 13} | sizes))


# Equal results

VARIANTS = [(name, []) for name in stages.course()]
VARIANTS += [(name, ["--model.router", "softmax"]) for name in ("stage6_moe", "stage7_mla_mtp")]


@pytest.mark.parametrize(
    "name, sizes", VARIANTS, ids=[" ".join([name, *sizes[1:]]) for name, sizes in VARIANTS]
)
def test_two_processes_have_the_losses_of_one(name, sizes, group):
    flags = ("--stage", name, *sizes)
    assert run(*flags, "--out", "one")[0] == 0
    assert run(*flags, "--micro-batch-size", "4", "--out", "one-in-parts")[0] == 0
    one, one_in_parts = metrics("one"), metrics("one-in-parts")
    assert one[-1]["loss"] < one[0]["loss"] - 0.05
    run_all(group, *flags, "--out", "ddp")
    assert_equal_runs(metrics("ddp"), one)
    for how in ("ddp", "fsdp"):  # (fsdp with whole batches: see the test that moves a run)
        run_all(group, *flags, "--parallel", how, "--micro-batch-size", "2", "--out", f"{how}-in-parts")
        assert_equal_runs(metrics(f"{how}-in-parts"), one_in_parts)


def test_fsdp_computes_in_bfloat16_what_ddp_does(group):
    for how in ("ddp", "fsdp"):
        run_all(group, "--stage", "7", "--dtype", "bfloat16", "--parallel", how, "--out", how)
    assert_equal_runs(
        [{"loss": line["loss"], "step": line["step"]} for line in metrics("fsdp")],
        [{"loss": line["loss"], "step": line["step"]} for line in metrics("ddp")],
        tolerance=0.01,
    )


class Messages(TorchDispatchMode):
    """Counts what the processes say to each other, by operation."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        if operation.namespace == "c10d":
            self.counts[operation.name()] += 1
        return operation(*arguments, **options or {})


def messages_of_a_step(how):
    """What is said while three micro-batches add up."""
    model = tiny("stage4_gqa")
    joined = parallel.join(model, how, torch.float32)
    idx, targets = torch.randint(13, (2, 6, 16))
    with Messages() as messages:
        optim.accumulate_gradients(joined, idx, targets, 2, FLOAT32)
    return messages.counts


def test_gradients_travel_once_a_step(group):
    for counts in group(together, messages_of_a_step, "ddp"):
        assert counts == {"c10d::allreduce_": 1}
    for counts in group(together, messages_of_a_step, "fsdp"):
        assert counts["c10d::_reduce_scatter_base_"] == 3  # of the two blocks and the rest


def storages_of_gradients():
    """How many pieces of memory the gradients lie in, and how many gradients there are."""
    model = tiny("stage4_gqa")
    joined = parallel.join(model, "ddp", torch.float32)
    optimizer = optim.make("adamw", model, 1e-3, 0.1, (0.9, 0.99))
    for _ in range(2):  # DDP sorts its buckets after the first step
        idx, targets = torch.randint(13, (2, 4, 16))
        optim.accumulate_gradients(joined, idx, targets, 2, FLOAT32)
        pieces = {p.grad.untyped_storage().data_ptr() for p in model.parameters()}
        n_gradients = len(list(model.parameters()))
        optim.update(model, optimizer, 1e-3, 1.0)
    return len(pieces), n_gradients


def test_ddp_holds_no_second_copy_of_the_gradients(group):
    for pieces, n_gradients in group(together, storages_of_gradients):
        assert pieces == 1 < n_gradients


def test_every_process_drops_out_other_activations(monkeypatch):
    settings = command_line.parse(["--stage", "0", "--device", "cpu"])
    dropped = set()
    for rank in range(4):
        monkeypatch.setattr(parallel, "RANK", rank)
        train.prepare_training(settings, tiny("stage0_gpt"), torch.float32)
        dropped.add(tuple(torch.nn.functional.dropout(torch.ones(64)).tolist()))
    assert len(dropped) == 4


def validation_loss(how, length):
    """The loss over a made-up text of that many tokens, three windows at a time."""
    model = tiny("stage4_gqa")
    if how:
        parallel.join(model, how, torch.float32)
    tokens = np.random.default_rng(0).integers(13, size=length).astype(np.uint16)
    return evaluation.next_token_loss(model, tokens, 10**6, 3, FLOAT32, CPU)


@pytest.mark.parametrize("length", [20, 49, 3 * 48, 200])  # 1, 1, 3 and 5 batches, the last one not full
def test_evaluation_in_two_processes_gives_the_number_of_one(length, group):
    expected = validation_loss(None, length)
    for how in ("ddp", "fsdp"):
        losses = group(together, validation_loss, how, length)
        assert losses[0] == losses[1] == pytest.approx(expected, abs=1e-6)


# Activation checkpointing and compiling


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_recomputed_activations_give_the_same_gradients(router, stage, make_model):
    if router == "sigmoid" and not hasattr(stage.GPTConfig, "router"):
        pytest.skip("has no router")
    idx, targets = torch.randint(65, (2, 4, 16))
    sizes = {"router": router} if hasattr(stage.GPTConfig, "router") else {}
    outcomes = []
    for recomputes in (False, True):
        model = make_model(dropout=0.1, **sizes).train()
        calls = Counter()
        model.model.layers[0].self_attn.register_forward_hook(
            lambda *_, calls=calls: calls.update(["attention"])
        )
        if recomputes:
            parallel.recompute_blocks(model)
        torch.manual_seed(1)
        losses = optim.accumulate_gradients(model, idx, targets, 2, FLOAT32)
        assert calls["attention"] == (4 if recomputes else 2)
        statistics = model.after_step() if hasattr(model, "after_step") else {}
        outcomes.append((losses, statistics, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=0, atol=0)


@pytest.mark.parametrize("number, how", [("4", "ddp"), ("6", "ddp"), ("6", "fsdp"), ("7", "fsdp")])
def test_recomputed_activations_in_two_processes(number, how, group):
    for flag in ("--activation-checkpointing", "--no-activation-checkpointing"):
        run_all(group, "--stage", number, "--parallel", how, flag, "--out", flag.strip("-"))
    assert_equal_runs(metrics("activation-checkpointing"), metrics("no-activation-checkpointing"), 1e-6)


def compiled_without_cpp(*flags):
    """run(*flags) --compile without generated C++, which takes most of a minute and is PyTorch's own."""
    real, calls = torch.compile, []

    def by_aot_eager(model, options):
        calls.append(model)
        return real(model, backend="aot_eager")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", by_aot_eager)
        patch.setattr(device, "require_compiler", lambda device: None)
        status, *said = run(*flags, "--compile")
    return status, len(calls), said


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_compiled_training_in_two_processes(how, group):
    flags = ("--stage", "4", "--parallel", how, "--steps", "4", "--model.n-layer", "1")
    outcomes = group(compiled_without_cpp, *flags, "--out", "compile")
    assert [outcome[:2] for outcome in outcomes] == [(0, 1)] * 2, outcomes
    run_all(group, *flags, "--no-compile", "--out", "no-compile")
    assert_equal_runs(metrics("compile"), metrics("no-compile"))


# Checkpoints and resuming


@pytest.mark.parametrize("number", ["4", "6", "7"])
def test_any_number_of_processes_goes_on_with_a_run(number, group):
    assert run("--stage", number, "--out", "whole")[0] == 0
    out = ("--stage", number, "--out", "moved")
    steps = iter(range(2, 12))
    assert run(*out, stop=next(steps))[0] == 128 + signal.SIGTERM
    resume = ("--resume", "--out", "moved")
    for how in ("ddp", "one", "fsdp", "one", "fsdp", "ddp", "fsdp", "fsdp"):  # from each to each
        if how == "one":
            assert run(*resume, stop=next(steps))[0] == 128 + signal.SIGTERM
        else:
            run_all(group, *resume, "--parallel", how, stop=next(steps), status=128 + signal.SIGTERM)
        assert checkpoint.is_in_parts(Path("moved/last")) == (how == "fsdp")
    assert run(*resume)[0] == 0
    assert_equal_runs(metrics("moved"), metrics("whole"))


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_resumed_group_equals_one_never_stopped_bit_for_bit(how, group):
    flags = ("--stage", "7", "--parallel", how, "--model.dropout", "0.1")
    run_all(group, *flags, "--out", "whole")
    (said, _), _ = run_all(group, *flags, "--out", "stopped", stop=8, status=128 + signal.SIGTERM)
    assert "resume with: torchrun --nproc-per-node 2 train.py --resume --out stopped" in said
    run_all(group, "--resume", "--out", "stopped")
    assert metrics("stopped") == metrics("whole")


def test_the_checkpoints_of_fsdp_are_read_by_one_process(group, monkeypatch, capsys):
    flags = ("--stage", "4", "--steps", "5", "--eval-every", "5")
    assert run(*flags, "--out", "one")[0] == 0
    run_all(group, *flags, "--parallel", "fsdp", "--out", "parts")
    assert sorted(path.name for path in Path("parts/last").iterdir()) == [
        "metadata.json",
        "shard-00001-model-00001-of-00001.safetensors",
        "shard-00002-model-00001-of-00001.safetensors",
        "state.pt",
    ]
    expected = load_file("one/last/model.safetensors")
    torch.testing.assert_close(load_file("parts/best/model.safetensors"), expected, atol=1e-5, rtol=0)
    model, _ = runs.load(Path("parts"), "last", CPU)
    torch.testing.assert_close(checkpoint.weights(model), expected, atol=1e-5, rtol=0)
    for name in ("best", "last"):
        texts = []
        for folder in ("one", "parts"):
            capsys.readouterr()
            sampled = call(
                monkeypatch,
                sample,
                "--run",
                folder,
                "--checkpoint",
                name,
                "--prompt",
                "a",
                "--temperature",
                "0",
            )
            assert sampled == 0
            texts.append(capsys.readouterr().out)
        assert texts[0] == texts[1]
    out = call(monkeypatch, export, "--run", "parts", "--checkpoint", "last", "--to", "hf", "--out", "hf")
    assert out == 0
    torch.testing.assert_close(load_file("hf/model.safetensors"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("broken", ["missing", "cut short"])
def test_a_broken_part_is_named(broken, number, group):
    run_all(group, "--stage", "4", "--steps", "2", "--parallel", "fsdp", "--out", "run")
    part = Path(f"run/last/shard-0000{number}-model-00001-of-00001.safetensors")
    if broken == "missing":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[:-100])
    before = metrics("run")
    for said in [run("--resume", "--out", "run", "--steps", "4")[2]] + [
        said for _, said in run_all(group, "--resume", "--out", "run", "--steps", "4", status=2)
    ]:
        assert "is damaged or incomplete" in said and len(said.splitlines()) == 1
        assert (
            ("run/last is" in said and "1 of 2 parts" in said) if broken == "missing" else str(part) in said
        )
    assert metrics("run") == before


def full_disk(*flags):
    """run(*flags) where the last process finds no room for its part."""

    def no_room(*arguments):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if parallel.RANK == 1:
            import torch.distributed.checkpoint as dcp

            patch.setattr(dcp.HuggingFaceStorageWriter, "write_data", no_room)
        return run(*flags)


def test_a_full_disk_keeps_the_parts_before(group):
    run_all(group, "--stage", "4", "--steps", "2", "--parallel", "fsdp", "--out", "run")
    for status, _, said in group(full_disk, "--resume", "--out", "run", "--steps", "4"):
        assert status == 2 and "No space left" in said and "the previous checkpoint is intact" in said
    assert checkpoint.step(Path("run")) == 2
    run_all(group, "--resume", "--out", "run", "--steps", "4")
    assert checkpoint.step(Path("run")) == 4


def written_by(*flags):
    """What this process wrote, made or moved in the test's folder while it trained."""
    written, here = set(), os.getcwd()

    def watch(event, arguments):
        writes = event in ("os.mkdir", "os.rename") or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if writes and here and isinstance(arguments[0], (str, os.PathLike)):
            written.add(os.path.relpath(os.path.join(here, arguments[0]), here))

    sys.addaudithook(watch)
    run(*flags)
    here = None  # a hook can't be taken away
    return {path for path in written if not path.startswith("..")}


def test_the_first_process_alone_writes(group):
    flags = ("--stage", "4", "--steps", "2", "--data", "words.txt", "--out", "run")
    first, second = group(written_by, *flags)
    assert {"run/metrics.jsonl", "run/last.tmp/state.pt"} <= first
    assert second == set()
    _, second = group(written_by, *flags, "--parallel", "fsdp", "--out", "parts")
    assert second == {"parts/last.tmp", "parts/last.tmp/shard-00002-model-00001-of-00001.safetensors"}


# What a user gets wrong


def test_a_batch_that_cannot_be_shared_is_refused(group):
    for number, (_, said) in enumerate(
        run_all(group, "--stage", "4", "--batch-size", "7", "--out", "run", status=2)
    ):
        assert said.splitlines() == [
            f"error: process {number}: --batch-size 7 cannot be divided among 2 processes",
            "use a multiple of 2",
        ]
    said = run_all(group, "--stage", "4", "--micro-batch-size", "8", "--out", "run", status=2)[0][1]
    assert "--batch-size 8" in said and "--micro-batch-size 8" in said and "use a multiple of 16" in said
    assert not Path("run").exists()


def test_muon_is_refused_with_fsdp(group):
    for _, said in run_all(
        group, "--stage", "4", "--optimizer", "muon", "--parallel", "fsdp", "--out", "run", status=2
    ):
        assert "--optimizer muon" in said and "use --parallel ddp" in said and len(said.splitlines()) == 1
    assert not Path("run").exists()


# torchrun itself


@pytest.fixture
def torchrun(workshop):
    """torchrun(*flags): starts train.py in two processes, which write into run/."""
    started = []

    def start(*flags, how=("--nproc-per-node", "2"), script=ROOT / "train.py"):
        command = [sys.executable, "-m", "torch.distributed.run", *how, script]
        command += ["--data", "words.txt", *TINY_RUN, *FLAGS, "--stage", "4", "--out", "run", *flags]
        process = subprocess.Popen(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a terminal's foreground
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


ENDLESS = ("--steps", "1000000", "--eval-every", "1000000")


@pytest.mark.parametrize("number, how", [(signal.SIGINT, "ddp"), (signal.SIGTERM, "fsdp")])
def test_a_signal_to_torchrun_saves_once_and_says_how_to_go_on(number, how, torchrun, group):
    process = torchrun(*ENDLESS, "--parallel", how)
    deadline = time.monotonic() + 60
    while len(metrics("run")) < 3:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    if number == signal.SIGINT:  # what Ctrl-C in a terminal does; torchrun passes it on once more
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    step = checkpoint.step(Path("run"))
    stopped = (
        f"stopped after step {step}; resume with: torchrun --nproc-per-node 2 train.py --resume --out run"
    )
    assert [line for line in said.splitlines() if "stopped" in line] == [stopped]
    assert metrics("run")[-1]["step"] == step and process.returncode != 0
    run_all(group, "--resume", "--out", "run", "--steps", str(step + 2))
    assert [line["step"] for line in metrics("run")] == list(range(1, step + 3))


def test_what_torchrun_passes_on_is_no_second_ctrl_c(monkeypatch):
    monkeypatch.setattr(parallel, "WORLD_SIZE", 2)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        with StopRequest() as request:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the run is saved, but has not said so yet
        assert request.signal == signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


DYING = """
import os, signal, sys
import train
from lab import cli, parallel
from lab.training import batches

real = batches.train_batch

def train_batch(tokens, seed, step, *rest):
    if step == 3 and parallel.RANK == 1:
        {end}
    return real(tokens, seed, step, *rest)

batches.train_batch = train_batch
cli.run(train.main)
"""


@pytest.mark.parametrize(
    "end, message",
    [
        ("raise ValueError('one is enough')", "ValueError: one is enough"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "Signal 9 (SIGKILL)"),
    ],
)
def test_a_process_that_dies_ends_the_run_with_its_error(end, message, torchrun):
    Path("dying.py").write_text(DYING.format(end=end))
    process = torchrun(*ENDLESS, script="dying.py")
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0 and message in said
    with pytest.raises(ProcessLookupError):  # nothing is left of it
        os.killpg(process.pid, 0)


def test_torchruns_processes_say_once_what_is_wrong(torchrun):
    process = torchrun("--batch-size", "7")
    _, said = process.communicate(timeout=60)
    assert [line for line in said.splitlines() if "error: " in line.split("]:")[-1]] == [
        "error: process 0: --batch-size 7 cannot be divided among 2 processes"
    ]
    assert process.returncode != 0 and "exitcode  : 2" in said


def test_two_machines_have_the_losses_of_one(torchrun):
    assert run("--stage", "4", "--out", "one")[0] == 0
    how = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "1", "--rdzv-backend", "c10d")
    how += ("--rdzv-endpoint", f"localhost:{free_port()}")
    machines = [torchrun(how=how) for _ in range(2)]
    late = 0
    for machine in machines:
        try:
            _, said = machine.communicate(timeout=60)
            assert machine.returncode == 0, said
        except subprocess.TimeoutExpired:
            late += 1
    assert late < 2  # one torchrun may wait for another that has ended, for minutes (pytorch issue 69520)
    assert_equal_runs(metrics("run"), metrics("one"))


# On GPUs

TWO_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.mark.parametrize("how", [pytest.param(how, marks=TWO_GPUS) for how in ("ddp", "fsdp")])
@pytest.mark.parametrize("number", map(stages.number, stages.course()))
def test_two_gpus_have_the_losses_of_one(number, how, torchrun):
    flags = ("--stage", number, "--device", "cuda", "--no-compile")
    assert run(*flags, "--out", "one")[0] == 0
    process = torchrun(*flags, "--parallel", how)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    losses = [[line["loss"] for line in metrics(folder)] for folder in ("one", "run")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)  # TF32 sums in another order


@pytest.mark.parametrize("how", [pytest.param(how, marks=TWO_GPUS) for how in ("ddp", "fsdp")])
def test_two_gpus_train_compiled_and_in_bfloat16(how, torchrun):
    flags = ("--stage", "7", "--device", "cuda", "--dtype", "bfloat16", "--activation-checkpointing")
    assert run(*flags, "--no-compile", "--out", "one")[0] == 0
    process = torchrun(*flags, "--parallel", how, "--compile")
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    losses = [[line["loss"] for line in metrics(folder)] for folder in ("one", "run")]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)
