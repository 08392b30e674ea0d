"""What only a CUDA device can show: make test-gpu."""

import signal

import pytest
import torch
from test_training import metrics, stop_at

from lab import device, stages

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = ["--device", "cuda", "--steps", "14", "--eval-every", "5", "--log-every", "1", "--no-compile"]


@pytest.mark.parametrize("name", stages.names().values())
def test_a_resumed_run_equals_one_never_stopped_on_cuda(name, run_train, workshop, monkeypatch):
    flags = ("--stage", name, *CUDA, "--model.dropout", "0.1")
    assert run_train(*flags, "--out", "whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        assert run_train(*flags, "--out", "stopped") == 128 + signal.SIGTERM
    assert run_train("--resume", "--out", "stopped") == 0
    assert metrics("stopped") == metrics("whole")


@pytest.mark.parametrize("name", stages.names().values())
def test_compiled_training_on_cuda_agrees_with_eager(name, run_train, workshop):
    assert run_train("--stage", name, *CUDA, "--out", "eager") == 0
    assert run_train("--stage", name, *CUDA, "--compile", "--out", "compiled") == 0
    losses = [[line["loss"] for line in metrics(folder)] for folder in ("eager", "compiled")]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


def test_a_seed_gives_the_same_text_on_cuda_and_cpu(run_train, run_sample, workshop, capsys):
    assert run_train("--stage", "0", *CUDA, "--out", "run") == 0
    texts = []
    for where in ("cuda", "cpu"):
        capsys.readouterr()
        assert run_sample("--run", "run", "--device", where, "--prompt", "a", "--temperature", "0") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", stages.names().values())
def test_compiled_sampling_on_cuda_prints_the_same_text(name, run_train, run_sample, workshop, capsys):
    assert run_train("--stage", name, *CUDA, "--out", "run") == 0
    texts = []
    for more in ([], ["--compile"]):
        capsys.readouterr()
        flags = ("--device", "cuda", "--prompt", "a", "--temperature", "0", "--max-new-tokens", "40")
        assert run_sample("--run", "run", *flags, *more) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_bfloat16_is_chosen_where_the_hardware_has_it():
    major, _ = torch.cuda.get_device_capability()
    chosen = device.choose_dtype("auto", torch.device("cuda"))
    assert chosen == (torch.bfloat16 if major >= 8 else torch.float32)
