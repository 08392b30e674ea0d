"""Compiling beside the text: the same text, one package for all later starts, and nothing left behind."""

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from conftest import TINY_MODEL

from lab import stages
from lab.sampling import ahead, generation, packed
from lab.sampling.ahead import BackgroundStep

COMPILER = shutil.which(os.environ.get("CXX", "g++"))


class Uncompiled:
    """What a package does, without the compiler."""

    def __init__(self, task):
        stage = stages.load(task["stage"])
        model = stage.GPT(stage.GPTConfig(**task["sizes"])).eval()
        if task["packed"]:
            packed.replace_linears(model)
        self.step = ahead.Step(model, [name for name, *_ in task["weights"]])
        self.n_weights, self.n_stored = len(task["weights"]), len(task["layers"][0])
        self.calls = 0

    def boxed_run(self, inputs):
        self.calls += 1
        idx, position, *rest = inputs
        stored = iter(rest[self.n_weights :])
        layers = list(zip(*[stored] * self.n_stored, strict=True))
        return [self.step(idx, position, rest[: self.n_weights], layers)]


@pytest.fixture
def step_for(workshop, monkeypatch):
    """step_for(model, stage): a BackgroundStep that starts no process."""
    monkeypatch.setattr(BackgroundStep, "start", lambda *arguments: None)
    return lambda model, name, **options: BackgroundStep(
        model, name, "hash", TINY_MODEL["block_size"], **options
    )


def louder(model):
    for parameter in model.parameters():
        parameter.data.mul_(2)
    return model


def test_a_text_goes_on_as_it_was_when_the_code_is_ready(stage, make_model, step_for, monkeypatch):
    model = louder(make_model())
    if stage.__name__ in ("stage5_flash.model", "stage7_mla_mtp.model"):
        monkeypatch.setattr(packed, "SMALLEST", 0)
        assert packed.pack(model)

    def text(**options):
        generator = torch.Generator().manual_seed(3)
        return generation.generate(model, [1, 2], 40, 65, generator=generator, **options)

    expected = list(text())
    step = step_for(model, stage.__name__.removesuffix(".model"))
    made = []
    for token in text(step=step):
        made.append(token)
        if len(made) == 6:  # also with what the plain steps have left in the cache
            step.compiled = Uncompiled(json.loads(json.dumps(step.task)))
    assert made == expected and len(set(made)) > 9
    assert step.compiled.calls > 20


def test_another_package_is_used_if_anything_that_it_depends_on_differs(step_for, monkeypatch):
    stage = stages.load("stage4_gqa")

    def name(code="a", length=16, dtype=torch.float32, **sizes):
        model = stage.GPT(stage.GPTConfig(**TINY_MODEL | sizes)).to(dtype)
        return BackgroundStep(model, "stage4_gqa", code, length).package.name

    names = [name(), name(code="b"), name(length=8), name(dtype=torch.bfloat16), name(norm_eps=1e-6)]
    assert names[0] == name()  # of another run
    for where, what in ((torch, "__version__"), (ahead, "processor"), (ahead, "ours")):
        with monkeypatch.context() as patch:
            patch.setattr(where, what, "other" if what == "__version__" else lambda: "other")
            names.append(name())
    assert len(set(names)) == len(names)


@pytest.fixture
def trained(run_train):
    assert run_train("--stage", "4", "--steps", "2", "--device", "cpu", "--out", "run") == 0


FLAGS = ("--run", "run", "--device", "cpu", "--prompt", "a", "--max-new-tokens", "30", "--temperature", "0")


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
@pytest.mark.usefixtures("trained")
def test_a_second_start_uses_the_code_of_the_first_and_prints_the_same_text(run_sample, monkeypatch, capsys):
    capsys.readouterr()
    assert run_sample(*FLAGS) == 0
    plain_text = capsys.readouterr().out
    assert run_sample(*FLAGS, "--compile-first") == 0
    out, err = capsys.readouterr()
    assert out == plain_text and "compiled in" in err
    ran, load = [], ahead.load

    class Counted:
        def __init__(self, package):
            self.compiled = load(package)

        def boxed_run(self, inputs):
            ran.append(inputs)
            return self.compiled.boxed_run(inputs)

    monkeypatch.setattr(ahead, "load", Counted)
    monkeypatch.setattr(ahead.subprocess, "Popen", None)
    assert run_sample(*FLAGS, "--compile") == 0
    assert capsys.readouterr().out == plain_text and len(ran) > 20
    (package,) = ahead.folder().iterdir()  # and nothing half-written beside it
    package.write_bytes(package.read_bytes()[:-1000])
    assert load(package) is None


@pytest.mark.usefixtures("trained")
def test_compiling_ends_with_the_text_and_leaves_nothing(run_sample, monkeypatch, capsys):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        ahead.subprocess, "Popen", lambda *a, **options: started.append(popen(*a, **options)) or started[-1]
    )
    assert run_sample(*FLAGS, "--compile") == 0
    assert "not compiled: the text ended first" in capsys.readouterr().err
    assert started[0].wait(timeout=60) != 0
    assert list(ahead.folder().iterdir()) == []


@pytest.mark.usefixtures("trained")
def test_without_a_compiler_the_text_still_comes(run_sample, monkeypatch, capsys):
    capsys.readouterr()
    assert run_sample(*FLAGS) == 0
    plain_text = capsys.readouterr().out
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert run_sample(*FLAGS, "--compile-first") == 0
    out, err = capsys.readouterr()
    assert out == plain_text and "apt install g++" in err.splitlines()[-1]
    assert list(ahead.folder().iterdir()) == []


@pytest.mark.usefixtures("trained")
def test_without_a_folder_for_the_code_the_text_still_comes(run_sample, workshop, monkeypatch, capsys):
    capsys.readouterr()
    assert run_sample(*FLAGS) == 0
    plain_text = capsys.readouterr().out
    monkeypatch.setattr(ahead.subprocess, "Popen", None)
    (workshop / "cache").write_text("a file in its place")
    assert run_sample(*FLAGS, "--compile") == 0
    out, err = capsys.readouterr()
    assert out == plain_text and f"cannot make {workshop}/cache/compiled" in err.splitlines()[-1]


def test_a_damaged_package_and_one_that_another_user_may_have_written_are_not_loaded(workshop, monkeypatch):
    loaded = []
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", lambda *inputs: loaded.append(inputs))
    folder = ahead.folder()
    assert ahead.unusable(folder) is None
    package = folder / "package.pt2"
    with zipfile.ZipFile(package, "w") as parts:
        parts.writestr("code", bytes(1000))
    content = package.read_bytes()
    ahead.load(package)
    assert len(loaded) == 1
    for damaged in (b"", content[:500], content.replace(bytes(8), bytes(7) + b"\x01", 1)):
        package.write_bytes(damaged)
        assert ahead.load(package) is None and len(loaded) == 1
    package.write_bytes(content)
    folder.chmod(0o777)
    assert ahead.load(package) is None and len(loaded) == 1
    assert ahead.unusable(folder).endswith(f"chmod go-w {folder}")


def test_a_process_in_the_background_ends_with_its_pipe_and_takes_its_children_along():
    """The pipe closes when the process that holds it ends, also if it is killed."""
    child = "subprocess.run(['sh', '-c', 'echo started; sleep 99'])"
    code = f"from lab import background; background.prepare(1); import subprocess; {child}"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=stages.ROOT
    )
    process.stdin.write(b"a line\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"started\n"
    process.stdin.close()
    closed = time.monotonic()
    assert process.stdout.read() == b""  # returns when no process has it open: also `sleep` is gone
    assert time.monotonic() - closed < 60
