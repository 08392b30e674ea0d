"""Terminals and interrupts: any encoding, closed streams, Ctrl-C at any moment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab.training import optim

ROOT = Path(__file__).parent.parent
DRIVERS = {path: [str(ROOT / path)] for path in ("train.py", "sample.py", "compare.py", "runs.py")}
MODULES = ("deploy.export", "deploy.import_hf", "deploy.pretrained", "data.openwebtext")
MODULES += ("lab.comparison.isolated",)
DRIVERS |= {name: ["-m", name] for name in MODULES}


@pytest.fixture(params=DRIVERS)
def start(request, tmp_path):
    """start(code, **options): starts a driver; the first large package that it imports is this code."""

    def start(code, **options):
        for package in ("torch", "numpy"):  # data.openwebtext needs no torch
            (tmp_path / f"{package}.py").write_text(code)
        env = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONIOENCODING": "ascii"}
        command = [sys.executable, *DRIVERS[request.param]]
        return subprocess.run(command, cwd=ROOT, env=env, timeout=60, **options)

    return start


def test_ctrl_c_while_torch_is_imported_ends_every_driver_without_a_traceback(start):
    code = "import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
    code += "except BaseException:\n    pass\n"  # some packages swallow what is raised in their import
    done = start(code, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted\n")


def test_no_driver_stops_at_a_character_that_the_terminal_does_not_have(start):
    code = "import sys\nprint('é→\\udc80')\nprint('é→', file=sys.stderr)\nsys.exit(3)"
    done = start(code, capture_output=True, text=True)
    said = (done.returncode, done.stdout, done.stderr)
    assert said == (3, "\\xe9\\u2192\\udc80\n", "\\xe9\\u2192\n")


def test_every_driver_takes_closed_streams_and_gives_their_numbers_to_no_file(start, tmp_path):
    log = tmp_path / "log"
    code = f"import os, sys\nprint('out')\nprint('err', file=sys.stderr)\nfile = open({str(log)!r}, 'w')\n"
    code += "os.write(1, b'more')\nos.write(2, b'more')\nsys.exit(3 if file.fileno() > 2 else 4)"
    done = start(code, preexec_fn=lambda: os.closerange(0, 3))
    assert done.returncode == 3
    assert log.read_text() == ""


def test_a_run_in_ascii_is_trained_sampled_and_reported(workshop):
    (workshop / "words.txt").write_text("été → là\n" * 300)
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    options = {"env": environment, "stderr": subprocess.PIPE, "text": True}
    sizes = ["--model.n-layer", "1", "--model.n-head", "1", "--model.n-embd", "8", "--model.block-size", "8"]
    flags = ["--stage", "0", "--data", "words.txt", "--steps", "1", *sizes, "--out", "run"]
    trained = subprocess.run([sys.executable, ROOT / "train.py", *flags], stdout=subprocess.PIPE, **options)
    assert trained.returncode == 0 and trained.stderr == ""
    assert "more text: python sample.py --run run" in trained.stdout and "\\xe9" in trained.stdout
    sampled = subprocess.run(
        [sys.executable, ROOT / "sample.py", "--run", "run", "--max-new-tokens", "9"],
        preexec_fn=lambda: os.close(1),
        **options,
    )
    assert sampled.returncode == 0 and "9 tokens in" in sampled.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_what_is_printed_last_and_does_not_fit_on_the_disk_is_an_error():
    command = [sys.executable, "-c", "from lab import cli; cli.run(lambda: print('text'))"]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=full, stderr=subprocess.PIPE, text=True)
    assert "error: No space left on device" in done.stderr and "Traceback" not in done.stderr


ENDS = {"Ctrl-C": (KeyboardInterrupt(), 130), "memory": (RuntimeError("DefaultCPUAllocator: …"), 2)}


@pytest.mark.parametrize("end, status", ENDS.values(), ids=ENDS.keys())
def test_a_run_that_ends_before_its_first_checkpoint_leaves_nothing_and_says_so(
    run_train, workshop, monkeypatch, capsys, end, status
):
    def interrupted(*_):
        raise end

    monkeypatch.setattr(optim, "accumulate_gradients", interrupted)
    (workshop / "mine").mkdir()
    (workshop / "mine" / "notes.txt").write_text("mine")
    for flags in ([], ["--out", "mine"]):
        assert run_train("--stage", "0", *flags) == status
        out, err = capsys.readouterr()
        assert out.splitlines()[-1].startswith("nothing was saved: ") and "Traceback" not in err
        assert [path.name for path in (workshop / "mine").iterdir()] == ["notes.txt"]
        assert [path.name for path in workshop.glob("runs/*")] == []


def test_a_run_that_ends_after_its_first_checkpoint_stays(run_train, workshop, monkeypatch, capsys):
    calls, real = [], optim.accumulate_gradients

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(optim, "accumulate_gradients", interrupted)
    assert run_train("--stage", "0", "--steps", "9", "--eval-every", "2", "--out", "run") == 130
    assert "nothing was saved" not in capsys.readouterr().out
    assert run_train("--resume", "--out", "run") == 0
