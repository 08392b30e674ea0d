"""benchmarks.gpu_check, as --smoke runs it on the CPU: every section, and what happens when one fails."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
from conftest import call

import benchmarks.gpu_check
import lab
from lab import stages

PROGRAM = [sys.executable, "-m", "benchmarks.gpu_check"]
PICTURES = {"training.png", "attention.png", "mixture.png", "decoding.png", "loss.png"}
STAND_IN = """
from dataclasses import dataclass
import torch
@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.head = torch.nn.Linear(config.n_embd, config.vocab_size, bias=config.bias)
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.SGD(self.parameters(), lr=learning_rate, weight_decay=weight_decay)
    def forward(self, idx, targets=None):
        logits = self.head(self.embedding(idx))
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


@pytest.fixture(scope="module")
def nanogpt(tmp_path_factory):
    """A checkout whose model.py has nanoGPT's interface."""
    folder = tmp_path_factory.mktemp("nanogpt")
    (folder / "model.py").write_text(STAND_IN)
    return folder


def environment(**more):
    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | more


def gpu_check(*flags, **more) -> subprocess.CompletedProcess:
    options = {"cwd": stages.ROOT, "env": environment(**more), "timeout": 300}
    return subprocess.run([*PROGRAM, *map(str, flags)], capture_output=True, text=True, **options)


def report_of(out: Path) -> dict:
    return json.loads((out / "gpu.json").read_text())


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, nanogpt):
    """What a whole run wrote: the folder, and gpu.json."""
    out = tmp_path_factory.mktemp("smoke")
    done = gpu_check("--smoke", "--minutes", 5, "--out", out, "--nanogpt", nanogpt)
    assert done.returncode == 0, done.stderr
    assert "## 7 nanogpt – ok" in done.stdout
    return out, report_of(out)


def test_every_section_is_run_and_nothing_fails(smoke):
    _, report = smoke
    assert report["failed"] == [] and report["finished"] and report["smoke"]
    statuses = {name: section["status"] for name, section in report["sections"].items()}
    assert statuses == dict.fromkeys(statuses, "ok")
    assert {section["number"] for section in report["sections"].values()} == set(range(9))
    assert report["machine"]["versions"]["torch"] and report["machine"]["processor"]


def test_every_figure_is_there(smoke):
    _, report = smoke
    figures = {name: section["figures"] for name, section in report["sections"].items()}
    names = stages.course()
    for section in ("eager", "compiled", "float32"):
        assert list(figures[section]) == names
    for of in (*figures["eager"].values(), *figures["compiled"].values()):
        assert of["tokens_per_second"] > 0 and of["times"] > 1 and 3 < of["loss"] < 6
    assert all(of["largest_difference"] == 0 for of in figures["float32"].values())  # the CPU against itself
    assert all(len(of["cpu"]) == 5 for of in figures["float32"].values())
    assert all(list(of["worst_gradients"].values()) == [0, 0, 0] for of in figures["float32"].values())
    assert all(
        of["without_graphs"]["speed_up"] > 0 and of["without_graphs"]["loss"] > 3
        for of in figures["compiled"].values()
    )
    for of in figures["attention"].values():
        assert of["explicit"]["forward"]["median_ms"] > 0 and of["sdpa"]["backward"]["median_ms"] > 0
        assert of["explicit"]["differences"].keys() == {"out", "dq", "dk", "dv"}
        assert {"triton", "flash_attn"} <= of.keys()  # measured, or skipped with the reason
    for of in figures["mixture"].values():
        for way in ("grouped_mm", "loop", "every expert for every token"):
            assert of[way]["tokens_per_second"] > 0
    for batch in (1, 2):
        of = figures["decoding"][f"MLA, batch {batch}"]
        assert of["absorbed"]["tokens_per_second"] > 0 and of["expanded"]["tokens_per_second"] > 0
    for name in ("stage0_gpt", "stage4_gqa", "stage6_moe", "stage7_mla_mtp"):
        for batch in (1, 3):
            of = figures["decoding"][f"{name}, batch {batch}"]
            assert of["eager"]["tokens_per_second"] > 0 and of["graph"]["speed_up"] > 0
    assert len(figures["serving"]) == 12
    for of in figures["serving"].values():
        assert of["graph"]["tokens_per_second"] > 0 and of["texts_that_differ"] == 0
    trained = figures["training"]["stage 4"]
    assert trained["finished"] and trained["step"] == trained["steps"] == 6 and len(trained["curve"]) == 2
    assert figures["nanogpt"]["eager"]["ratio"] > 0 and figures["nanogpt"]["compiled"]["ratio"] > 0


def test_the_pictures_and_the_summary_are_written_and_fit_in_eight_files(smoke):
    out, report = smoke
    assert {path.name for path in out.iterdir()} == PICTURES | {"gpu.json", "summary.md"}
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in PICTURES)
    summary = (out / "summary.md").read_text()
    for name, section in report["sections"].items():
        assert name == "machine" or f"## {section['number']} {name} – ok" in summary


@pytest.mark.parametrize(
    "fault, said",
    [
        ("raise RuntimeError('made to fail')", "RuntimeError: made to fail"),
        ("import os; os.kill(os.getpid(), 9)", "its process exited with status -9"),
    ],
    ids=["exception", "crash"],
)
def test_a_section_that_fails_is_listed_and_the_next_one_runs(fault, said, tmp_path, nanogpt):
    """The loop over experts, which the section compares with, is replaced before Python reads any of ours."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, types\nmoe = sys.modules['benchmarks.moe'] = types.ModuleType('moe')\n"
        f"def fault(made):\n    {fault}\nmoe.loop_over_experts = fault\n"
    )
    out = tmp_path / "out"
    flags = ("--smoke", "--minutes", 2, "--only", "4,7", "--out", out, "--nanogpt", nanogpt)
    assert gpu_check(*flags, PYTHONPATH=str(tmp_path)).returncode == 0
    report = report_of(out)
    sections = {name: section["status"] for name, section in report["sections"].items()}
    assert sections == {"machine": "ok", "mixture": "failed", "nanogpt": "ok"}
    failures = [(of["section"], of["error"]) for of in report["failed"]]
    assert failures == [("mixture", said)]
    if "raise" in fault:
        assert "in fault" in report["failed"][0]["traceback"]
        assert "- mixture 4 experts, 2 a token, width 32: RuntimeError" in (out / "summary.md").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_check_that_is_killed_leaves_what_it_found_and_no_process(tmp_path):
    mark = uuid.uuid4().hex
    command = [*PROGRAM, "--smoke", "--only", "2,5", "--minutes", "5", "--out", tmp_path]
    options = {"cwd": stages.ROOT, "env": environment(MARK=mark), "stdout": subprocess.DEVNULL}
    with subprocess.Popen(command, **options) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            path = tmp_path / "gpu.json"
            if path.exists() and report_of(tmp_path)["sections"]["eager"]["figures"]:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    sections = report_of(tmp_path)["sections"]
    assert sections["machine"]["status"] == "ok" and sections["decoding"]["status"] == "not reached"
    assert sections["eager"]["figures"]["stage0_gpt"]["tokens_per_second"] > 0
    time.sleep(0.5)
    assert not [pid for pid in Path("/proc").iterdir() if pid.name.isdecimal() and mark in environ_of(pid)]


def environ_of(process: Path) -> str:
    try:
        return (process / "environ").read_text(errors="replace")
    except OSError:  # it has just ended, or is another user's
        return ""


def test_the_time_is_kept_and_what_was_not_reached_is_listed(tmp_path):
    began = time.monotonic()
    assert gpu_check("--smoke", "--minutes", "0.05", "--out", tmp_path).returncode == 0
    assert time.monotonic() - began < 30  # most of it Python's start on a busy machine
    report = report_of(tmp_path)
    assert not report["finished"] and report["seconds"] < 15
    assert report["sections"]["decoding"]["status"] == "not reached"
    assert "decoding – not reached" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "this program measures a CUDA device, but this machine has none\nuse --smoke to run everything"),
        (["--only", "1,9"], "--only 1,9: use numbers from 1 to 8 separated by commas, such as 1,3"),
        (["--minutes", "0"], "minutes must be above 0, not 0.0"),
        (["--nanogpt", "nowhere"], "nowhere is not a checkout of nanoGPT: it has no model.py"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_two_lines_at_most(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert call(monkeypatch, benchmarks.gpu_check, "--out", tmp_path / "out", *flags) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) <= 2
    assert not (tmp_path / "out").exists()


def test_the_figures_of_an_earlier_check_are_kept(tmp_path, monkeypatch, capsys):
    (tmp_path / "gpu.json").write_text("{}")
    assert call(monkeypatch, benchmarks.gpu_check, "--smoke", "--out", tmp_path) == 2
    assert "has the gpu.json of an earlier check" in capsys.readouterr().err
    assert (tmp_path / "gpu.json").read_text() == "{}"


def test_missing_packages_are_named_in_a_line():
    code = "import sys; sys.modules |= {'tyro': None, 'rich': None}; import lab.cli"
    done = subprocess.run([sys.executable, "-c", code], cwd=stages.ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: this Python lacks tyro, rich: pip install tyro rich\n"


def test_the_packages_that_are_looked_for_are_those_of_pyproject():
    project = (stages.ROOT / "pyproject.toml").read_text()
    needed = re.search(r"\ndependencies = \[\n(.*?)\]", project, re.DOTALL)[1]
    assert set(re.findall(r'"([a-z][a-z\d]*)>=', needed)) == set(lab.NEEDED)


def test_every_dependency_has_its_exact_version_among_the_constraints():
    project = (stages.ROOT / "pyproject.toml").read_text()
    listed = re.search(r"\ndependencies = .*?\n\[tool", project, re.DOTALL)[0]
    names = set(re.findall(r'"([a-z][a-z\d-]*)(?:[>;"])', listed)) - {"eight-small-diffs"}
    pinned = re.findall(
        r"^([a-z\d-]+)==[\d.]+(?:;.*)?$", (stages.ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
    assert names == set(pinned)
