"""What goes wrong on a command line: a line or two on stderr, status 2, nothing half-written."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import call

import sample
import train
from benchmarks import gpt2_preset
from benchmarks.ideas import shared_heads
from data import sources, tokenizers
from lab import cli
from lab.comparison import spread
from lab.errors import UserError
from lab.training import optim

ROOT = Path(__file__).parent.parent

BAD_TRAINING = {
    "no stage": ([], "--stage is missing; use one of"),
    "a misspelt stage flag": (["--stag", "4"], "--stage is missing (--stag is no flag); use one of"),
    "no stage, but steps": (["--steps", "4"], "--stage is missing; use one of"),
    "unknown stage": (["--stage", "99"], "0 (stage0_gpt)"),
    "unknown stage by name": (["--stage", "gtp"], "did you mean gpt?"),
    "unknown flag": (["--stage", "0", "--stepz", "5"], "--stepz"),
    "word for a number": (["--stage", "0", "--steps", "many"], "'many'"),
    "unknown choice": (["--stage", "0", "--preset", "huge"], "'huge'"),
    "heads that do not divide the width": (["--stage", "0", "--model.n-embd", "31"], "n_embd (31)"),
    "context longer than the data": (["--stage", "0", "--model.block-size", "5000"], "2000 tokens"),
    "batch of none": (["--stage", "0", "--batch-size", "0"], "batch_size must be at least 1, not 0"),
    "no steps": (["--stage", "0", "--steps", "0"], "steps"),
    "negative learning rate": (["--stage", "0", "--lr", "-1"], "lr must be 0 or more"),
    "parts that do not divide it": (["--stage", "0", "--micro-batch-size", "3"], "micro_batch_size (3)"),
    "small vocabulary": (["--stage", "0", "--model.vocab-size", "5"], "--model.vocab-size 5"),
    "missing text": (["--stage", "0", "--data", "missing.txt"], "'missing.txt'"),
    "unknown device": (["--stage", "0", "--device", "tpu"], "unknown device 'tpu'"),
    "nothing to resume there": (["--stage", "0", "--resume", "--out", "nowhere"], "nowhere is not a run"),
    "no run to resume": (["--stage", "0", "--resume"], "no unfinished run of stage0_gpt"),
}  # fmt: skip


@pytest.mark.parametrize("flags, message", BAD_TRAINING.values(), ids=BAD_TRAINING.keys())
def test_bad_training_flags_are_explained(run_train, workshop, capsys, flags, message):
    assert run_train(*flags) == 2
    explained(capsys, message)
    assert not (workshop / "runs").exists()


def explained(capsys, message):
    """stderr is an error of one or two lines that says this."""
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and len(err.splitlines()) <= 2, err
    assert message in err
    assert "Traceback" not in out + err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_an_absent_device_is_explained(run_train, capsys):
    assert run_train("--stage", "0", "--device", "cuda") == 2
    explained(capsys, "device 'cuda' is not available (available: ")


OUT_OF_MEMORY = {
    "CUDA": (
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity …"
        ),
        "1.50 GiB more",
    ),
    "CPU": (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3221225472 bytes. …"),
        "3221225472 bytes more",
    ),
    "MPS": (
        RuntimeError(
            "MPS backend out of memory (MPS allocated: 1.00 GiB …). Tried to allocate 384.00 MiB on …"
        ),
        "384.00 MiB more",
    ),
}


@pytest.mark.parametrize("error, message", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY.keys())
def test_too_little_memory_is_explained(run_train, workshop, monkeypatch, capsys, error, message):
    def accumulate_gradients(*_):
        raise error

    monkeypatch.setattr(optim, "accumulate_gradients", accumulate_gradients)
    assert run_train("--stage", "0") == 2
    explained(capsys, message)


def test_an_empty_text_is_explained(run_train, workshop, capsys):
    (workshop / "empty.txt").write_text("")
    assert run_train("--stage", "0", "--data", "empty.txt") == 2
    explained(capsys, "empty.txt")


def test_an_occupied_folder_is_not_overwritten(run_train, workshop, capsys):
    assert run_train("--stage", "0", "--steps", "1", "--out", "run") == 0
    before = Path("run/metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert run_train("--stage", "0", "--steps", "1", "--out", "run") == 2
    explained(capsys, "run already holds a run")
    assert Path("run/metrics.jsonl").read_bytes() == before


def test_a_package_that_is_not_installed_is_named(run_train, workshop, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert run_train("--stage", "0", "--steps", "1", "--wandb") == 2
    explained(capsys, "pip install -e '.[wandb]'")
    assert not (workshop / "runs").exists()


OPTIONAL = {  # who needs the package, and the extra that has it
    "scipy": (spread.scipy_stats, "compare"),
    "datasets": (sources.import_datasets, "owt"),
    "tokenizers": (tokenizers.import_tokenizers, "deploy"),
    "pyarrow": (lambda: gpt2_preset.write_parquet(Path(), ""), "owt"),
}


@pytest.mark.parametrize("package", OPTIONAL)
def test_a_missing_package_is_named_with_the_command_that_installs_it(package, monkeypatch):
    call, extra = OPTIONAL[package]
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"package {package}: pip install -e '\.\[{extra}\]'"):
        call()


@pytest.fixture
def trained(run_train, capsys):
    assert run_train("--stage", "0", "--steps", "1", "--out", "run") == 0
    capsys.readouterr()
    return Path("run")


def test_a_run_without_a_checkpoint_cannot_be_resumed(run_train, trained, capsys):
    shutil.rmtree(trained / "last")
    assert run_train("--resume", "--out", "run") == 2
    explained(capsys, "run stopped before its first checkpoint")


@pytest.mark.parametrize("flags", [("--optimizer", "muon"), ("--preset", "baby")])
def test_what_a_run_cannot_change_is_refused_on_resume(run_train, trained, capsys, flags):
    assert run_train("--resume", "--out", "run", "--steps", "2", *flags) == 2
    explained(capsys, f"which cannot change: leave {flags[0]} out")


def test_a_run_goes_on_with_its_own_text_alone(run_train, trained, workshop, capsys):
    text = (workshop / "words.txt").read_text()
    (workshop / "words.txt").write_text(text[::-1])  # the same characters
    assert run_train("--resume", "--out", "run", "--steps", "2") == 2
    explained(capsys, "is not the text that the run was trained on")
    assert run_train("--stage", "0", "--init-from", "run", "--steps", "1", "--out", "tuned") == 0


@pytest.mark.parametrize("config", ['{"model_type": "gpt2"}', "[]"])
def test_the_folder_of_another_program_is_no_run(run_train, run_sample, workshop, capsys, config):
    (workshop / "theirs").mkdir()
    (workshop / "theirs" / "config.json").write_text(config)
    assert run_sample("--run", "theirs", "--prompt", "a") == 2
    explained(capsys, "python -m deploy.import_hf theirs --out runs/NAME")
    assert run_train("--resume", "--out", "theirs") == 2
    explained(capsys, "theirs is not a run")


def test_a_file_in_the_place_of_a_folder_is_named(run_train, run_sample, workshop, capsys):
    (workshop / "notes.txt").write_text("mine")
    assert run_train("--stage", "0", "--steps", "1", "--out", "notes.txt") == 2
    explained(capsys, "notes.txt")
    assert run_sample("--run", "notes.txt", "--prompt", "a") == 2
    explained(capsys, "notes.txt")
    assert (workshop / "notes.txt").read_text() == "mine"


BAD_SAMPLING = {
    "unknown character": (["--prompt", "Z"], "'Z'"),
    "prompt twice": (["--prompt", "a", "--prompt-file", "words.txt"], "not both"),
    "missing prompt file": (["--prompt-file", "gone.txt"], "cannot read gone.txt"),
    "temperature below zero": (["--prompt", "a", "--temperature", "-1"], "temperature must be 0 or more"),
    "top-p of nothing": (["--prompt", "a", "--top-p", "0"], "top_p"),
    "no such checkpoint": (["--prompt", "a", "--checkpoint", "first"], "best"),
    "a misspelt flag with two like it": (["--compil"], "Did you mean --compile? See"),
    "unknown stage": (["--prompt", "a", "--stage", "99"], "unknown stage '99'"),
}


@pytest.mark.parametrize("flags, message", BAD_SAMPLING.values(), ids=BAD_SAMPLING.keys())
def test_bad_sampling_flags_are_explained(trained, run_sample, capsys, flags, message):
    assert run_sample("--run", trained, *flags) == 2
    explained(capsys, message)


def test_a_run_that_does_not_exist_is_explained(run_sample, workshop, capsys):
    assert run_sample("--run", "nowhere", "--prompt", "a") == 2
    explained(capsys, "nowhere is not a run")
    assert run_sample("--stage", "0", "--prompt", "a") == 2
    explained(capsys, "python train.py --stage 0")


def test_a_truncated_checkpoint_is_explained(trained, run_train, run_sample, capsys):
    for path in trained.glob("*/*"):
        path.write_bytes(path.read_bytes()[:-100])
    assert run_sample("--run", trained, "--prompt", "a") == 2
    explained(capsys, "model.safetensors is damaged or incomplete")
    assert run_train("--resume", "--out", trained, "--steps", "2") == 2
    explained(capsys, "model.safetensors is damaged or incomplete")


def test_a_truncated_state_is_explained(trained, run_train, capsys):
    path = trained / "last" / "state.pt"
    path.write_bytes(path.read_bytes()[:-100])
    assert run_train("--resume", "--out", trained, "--steps", "2") == 2
    explained(capsys, "state.pt is damaged or incomplete")


def test_a_checkpoint_of_other_sizes_is_explained(trained, run_train, capsys):
    assert run_train("--resume", "--out", trained, "--steps", "2", "--model.n-layer", "3") == 2
    explained(capsys, "does not fit this model: model.layers.2")


def test_a_damaged_config_is_explained(trained, run_sample, capsys):
    (trained / "config.json").write_text('{"stage": ')
    assert run_sample("--run", trained, "--prompt", "a") == 2
    explained(capsys, "config.json is damaged")


@pytest.mark.parametrize("driver", ["train.py", "sample.py"])
def test_a_wrong_flag_ends_the_process_with_status_2(driver, tmp_path):
    command = [sys.executable, ROOT / driver, "--stage", "0", "--wrong", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert "--wrong" in done.stderr and len(done.stderr.splitlines()) <= 2


@pytest.mark.parametrize("driver", [train, sample], ids=["train.py", "sample.py"])
def test_help_explains_every_flag(driver, monkeypatch, capsys):
    assert call(monkeypatch, driver, "--help") == 0
    out, err = capsys.readouterr()
    flags = [line for line in out.splitlines() if "--" in line]
    assert err == "" and len(flags) >= 10


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("ideas.drafts", ["--seeds", "0"], "--seeds must be above 0, not 0"),
        ("ideas.rates", ["--steps", "-1"], "--steps must be above 0, not -1"),
        ("ideas.latents", ["--contexts", "256", "0"], "--contexts must be above 0, not 0"),
        ("ideas.latents", ["--contexts"], "--contexts needs at least one value"),
        ("ideas.long_contexts", ["--largest", "nan"], "--largest must be above 0, not nan"),
        ("ideas.shared_heads", ["--seeds", "-1"], "--seeds must be above 0, not -1"),
        ("quantization", [], "name runs to quantize"),  # its default is no run
        ("serving", ["--rounds", "0"], "--rounds must be above 0, not 0"),
    ],
)
def test_a_benchmark_refuses_to_measure_nothing(monkeypatch, capsys, name, flags, message):
    benchmark = importlib.import_module(f"benchmarks.{name}")
    assert call(monkeypatch, benchmark, *flags) == 2
    assert message in capsys.readouterr().err


def test_a_benchmark_may_leave_out_a_part():
    settings = cli.parse_benchmark_flags(shared_heads.Settings, ["--seeds", "0"], may_be_0=("seeds",))
    assert settings.seeds == 0
