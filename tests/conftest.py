"""Shared by the tests: a tiny model of every stage, a tiny text, and the commands called in this process."""

import random
import signal
import sys

import pytest
import torch

import sample
import train
from lab import stages
from lab.sampling import ahead
from lab.storage import runs

# A shell starts `make test &` with Ctrl-C ignored, and nohup ignores a closed terminal. So would every
# process that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

torch.set_num_threads(1)  # with tiny tensors, a second thread only slows things down

TINY_MODEL = {"vocab_size": 65, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}
TINY_RUN = ["--model.n-layer", "2", "--model.n-head", "2", "--model.n-embd", "16", "--model.block-size", "8"]
TINY_RUN += ["--batch-size", "4", "--eval-tokens", "200"]


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same random numbers each time."""
    torch.manual_seed(0)


@pytest.fixture(params=[*stages.course(), *stages.relatives()])
def stage(request):
    """The module of a stage; a test that uses this fixture runs once for each stage."""
    return stages.load(request.param)


@pytest.fixture
def make_model(stage):
    """make_model(**sizes): a tiny, seeded model of the stage in evaluation mode."""

    def make(**sizes):
        torch.manual_seed(0)
        return stage.GPT(stage.GPTConfig(**TINY_MODEL | sizes)).eval()

    return make


@pytest.fixture(scope="session")
def text():
    """20,000 characters of made-up words, with a newline here and there."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(1, 7))) for _ in range(50)]
    return "".join(draw.choice(words) + draw.choice("  \n") for _ in range(6000))[:20_000]


@pytest.fixture
def workshop(tmp_path, monkeypatch, text):
    """An empty working directory with its own data and runs folders, and the text as words.txt."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setattr(ahead, "folder", lambda: tmp_path / "cache" / "compiled")
    monkeypatch.setattr(runs, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(stages, "MY", tmp_path / "my")
    (tmp_path / "words.txt").write_text(text)
    return tmp_path


def call(monkeypatch, driver, *arguments, report=False) -> int:
    """Runs a command as from the command line; returns the exit status.

    Training ends without its report (pictures and a sample, which take longer than a tiny run) unless asked.
    """
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [f"{driver.__name__}.py", *map(str, arguments)])
        if not report:
            patch.setattr(train, "report", lambda *arguments: None)
        try:
            driver.cli.run(driver.main)
        except SystemExit as stop:
            return stop.code or 0
    return 0


@pytest.fixture
def run_train(workshop, monkeypatch):
    """run_train(*flags): trains a tiny model on words.txt; returns the exit status.

    With --resume, the run's own sizes count: a flag would override them.
    """

    def run(*flags, **options):
        sizes = [] if "--resume" in flags else TINY_RUN
        return call(monkeypatch, train, "--data", "words.txt", *sizes, *flags, **options)

    return run


@pytest.fixture
def run_sample(workshop, monkeypatch):
    """run_sample(*flags): calls sample.py; returns the exit status."""
    return lambda *flags: call(monkeypatch, sample, *flags)
