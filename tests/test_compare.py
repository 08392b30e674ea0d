"""compare.py: what is reused, resumed and missing, statistics, table, pictures, and a whole comparison."""

import contextlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, call
from rich.console import Console

import compare
import train
from lab import stages
from lab.comparison import diffs, interleaved, isolated, report, spread, wanted_runs
from lab.errors import UserError
from lab.storage import checkpoint, edits, runs

ROOT = Path(__file__).parent.parent
FLAGS = ["--data", "words.txt", *TINY_RUN, "--steps", "4", "--eval-every", "2", "--log-every", "2"]


@pytest.fixture
def run_compare(workshop, monkeypatch):
    """run_compare(*flags): calls compare.py on the tiny runs; returns the exit status."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return lambda *flags: call(monkeypatch, compare, *flags, *FLAGS)


@pytest.fixture
def in_this_process(monkeypatch):
    """compare.py trains and measures in this process: each process of its own imports torch for seconds."""

    def train_one(run, *_):
        assert call(monkeypatch, train, *run.command()[2:]) == 0

    def measured(command, **_):
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            status = call(monkeypatch, isolated, *command[3:])
        return subprocess.CompletedProcess(command, status, stdout.getvalue(), "")

    monkeypatch.setattr(compare, "train_one", train_one)
    monkeypatch.setattr(isolated, "subprocess", types.SimpleNamespace(run=measured))


def made_up(stage, seed, losses, steps=40, folder=None, **changes):
    """A finished run of the laptop preset as train.py would leave it, with these validation losses."""
    wanted, _ = wanted_runs.wanted_settings(
        stages.find(stage), seed, ["--steps", str(steps), *changes.get("flags", [])]
    )
    model = wanted.model
    model.vocab_size = 65
    model.__post_init__()
    folder = Path(folder or runs.RUNS / f"{stage}-{seed}")
    folder.mkdir(parents=True)
    config = {"stage": stages.find(stage), "dataset": "words", "dtype": "float32"}
    config["code"] = edits.code_hash(config["stage"])
    config |= {
        "settings": wanted_runs.settings.as_json(wanted),
        "model": vars(model),
        "machine": {"threads": 1},
    }
    runs.write_json(folder / "config.json", config | changes.get("config", {}))
    lines = []
    for i, loss in enumerate(losses, start=1):
        step = steps * i // len(losses)
        record = {"step": step, "tokens": 768 * step, "seconds": 0.1 * step, "loss": loss}
        lines.append(json.dumps(record | {"val_loss": loss, "bits_per_byte": loss / math.log(2)}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


DRAW = ("--only-draw", "--steps", "40")


@pytest.fixture
def only_draw(workshop, monkeypatch):
    return lambda *flags: call(monkeypatch, compare, *DRAW, *flags)


@pytest.fixture
def no_pictures(monkeypatch):
    """A comparison writes its figures and no pictures, which take seconds."""
    monkeypatch.setattr(report, "draw", lambda *arguments: [])


def results_folder():
    """The one that there is."""
    (folder,) = Path("runs/compare/laptop").glob("results*")
    return folder


def results_of(folder=None):
    return json.loads(Path(folder or results_folder(), "results.json").read_text())


# Drawing from made-up runs


def test_the_runs_at_hand_are_drawn_and_what_is_missing_is_said(only_draw, capsys):
    for seed, end in enumerate((1.9, 1.8, 2.0)):
        made_up("0", seed, [3.0, 2.0, end])
    made_up("4", 0, [2.9, 1.85, 1.6])
    assert only_draw() == 0
    out, err = capsys.readouterr()
    assert "missing: stage4_gqa seed 1, 2" in err and "missing: stage1_rmsnorm seed 0, 1, 2" in err
    assert "missing: speeds and memory" in err and "stage0" not in err
    folder = Path("runs/compare/laptop/results")
    for name in ("loss", "cost"):
        for look in ("", "-dark"):
            assert (folder / f"{name}{look}.png").stat().st_size > 5000
    assert "loss.png" in out
    row = results_of()["stages"]["stage0_gpt"]
    assert row["val_loss"]["mean"] == pytest.approx(1.9) and row["val_loss"]["std"] == pytest.approx(0.1)
    assert row["seeds"] == [0, 1, 2]
    assert "1.900 ± 0.100" in (folder / "ladder.md").read_text()


def test_one_point_is_enough(only_draw):
    made_up("3", 0, [2.5])
    assert only_draw("--stages", "3") == 0
    assert results_of()["stages"]["stage3_swiglu"]["val_loss"]["std"] is None


def test_some_stages_leave_the_figures_of_all_alone(only_draw, no_pictures, capsys):
    made_up("3", 0, [2.5])
    made_up("4", 0, [2.4])
    assert only_draw() == 0
    assert "missing: speeds" in capsys.readouterr().err
    speeds = {"training": {"stage3_swiglu": [5.0], "stage4_gqa": [7.0]}}
    speeds["code"] = {name: edits.code_hash(name) for name in speeds["training"]}
    Path("runs/compare/laptop/results/speeds.json").write_text(json.dumps(speeds))
    assert only_draw("--stages", "4") == 0
    out, err = capsys.readouterr()
    assert "runs/compare/laptop/results-4" in out and "missing: speeds" not in err
    row = results_of("runs/compare/laptop/results-4")["stages"]["stage4_gqa"]
    assert row["training_tokens_per_second"]["median"] == 7.0
    assert list(results_of("runs/compare/laptop/results")["stages"]) == ["stage3_swiglu", "stage4_gqa"]
    assert list(results_of("runs/compare/laptop/results-4")["stages"]) == ["stage4_gqa"]


def test_a_diverged_run_is_named_and_left_out(only_draw, no_pictures, capsys):
    made_up("0", 0, [3.0, 2.0])
    made_up("0", 1, [3.0, math.nan])
    assert only_draw("--stages", "0", "--seeds", "2") == 0
    assert "runs/0-1 diverged" in capsys.readouterr().err
    assert results_of()["stages"]["stage0_gpt"]["seeds"] == [0]


def test_a_stage_that_is_not_here_and_damaged_runs_are_named(only_draw, no_pictures, capsys):
    made_up("0", 0, [3.0, 2.0])
    made_up("0", 1, [3.0], folder="runs/strange", config={"stage": "stage9_magic"})
    made_up("1", 0, [3.0], folder="runs/torn")
    Path("runs/torn/metrics.jsonl").write_text('{"step": 40}\n')
    assert only_draw("--stages", "0", "--seeds", "1") == 0
    err = capsys.readouterr().err
    assert "'stage9_magic', a stage that does not exist" in err
    assert "runs/torn/metrics.jsonl is damaged" in err


def test_an_empty_folder_says_what_to_do(only_draw, capsys):
    assert only_draw() == 2
    err = capsys.readouterr().err
    assert "there is no finished run to draw" in err and "Traceback" not in err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--stages", "9"], "unknown stage '9'"),
        (["--stages", "0-9"], "unknown stage '9'"),
        (["--seeds", "0"], "seeds must be at least 1"),
        (["--seed", "3"], "--seed is a flag of train.py only"),
        (["--wrong", "3"], "wrong"),
        (["--contexts", "a"], "--contexts a"),
        (["--diff", "3", "9"], "unknown stage '9'"),
    ],
)
def test_wrong_flags_are_explained(only_draw, capsys, flags, message):
    made_up("0", 0, [3.0, 2.0])
    assert only_draw(*flags) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) <= 2


def test_unfinished_runs_are_said_with_their_step(only_draw, no_pictures, capsys):
    made_up("0", 0, [3.0, 2.0])
    made_up("0", 1, [3.0], steps=40)
    path = Path("runs/0-1/metrics.jsonl")
    path.write_text(path.read_text().replace('"step": 40', '"step": 20'))
    assert only_draw("--stages", "0", "--seeds", "2") == 0
    assert "missing: stage0_gpt seed 1 (runs/0-1 is at step 20 of 40)" in capsys.readouterr().err


# The statistics


def test_summaries_are_numpys():
    values = [1.9, 1.7, 2.2, 1.8]
    made = spread.summary(values)
    assert made["mean"] == pytest.approx(np.mean(values)) and made["std"] == pytest.approx(
        np.std(values, ddof=1)
    )
    assert spread.summary([2.0])["std"] is None


def test_a_difference_is_one_where_it_is_larger_than_the_spread():
    assert spread.means_differ([1.90, 1.91, 1.89], [1.70, 1.71, 1.69]) is True
    assert spread.means_differ([1.90, 1.95, 1.85], [1.91, 1.88, 1.93]) is False
    assert spread.means_differ([1.9], [1.7, 1.8]) is None
    assert spread.means_differ([1.9, 1.9], [1.9, 1.9]) is False


def test_chance_alone_looks_like_a_difference_in_one_case_of_twenty():
    draw = np.random.default_rng(0)
    false = [spread.means_differ(*draw.normal(size=(2, 3)).tolist()) for _ in range(600)]
    assert 0.01 < np.mean(false) < 0.08


def test_speeds_measured_in_turn_are_compared_as_pairs():
    slow, fast = [100.0, 50.0, 80.0, 60.0], [110.0, 55.2, 88.1, 66.0]  # a machine that changes its mood
    assert spread.means_differ(slow, fast) is False
    assert spread.rounds_differ(fast, slow) is True
    assert spread.rounds_differ([1.0], [2.0]) is None
    assert spread.rounds_differ([1.0, 1.0], [1.0, 1.0]) is False


def test_seconds_to_a_loss_lie_between_two_evaluations():
    metrics = [{"val_loss": 2.4, "seconds": 10.0}, {"seconds": 15.0}, {"val_loss": 1.8, "seconds": 20.0}]
    assert report.seconds_to(metrics, 1.9) == pytest.approx(10 + 10 * 5 / 6)
    assert report.seconds_to(metrics, 1.5) is None
    assert report.seconds_to(metrics, 2.5) == 10.0


def test_seconds_are_those_of_the_speed_that_was_measured_in_turn(only_draw, no_pictures):
    """A run's own clock also counts whatever else the machine did."""
    made_up("0", 0, [3.0, 1.5])  # 40 steps of 768 tokens, 0.1 s each by the run's clock
    made_up("3", 0, [3.0, 1.5])
    folder = runs.RUNS / "compare/laptop/results-0-3"
    codes = {"stage0_gpt": edits.code_hash("stage0_gpt")}
    runs.write_json(folder / "speeds.json", {"training": {"stage0_gpt": [768.0, 1.0, 1e9]}, "code": codes})
    assert only_draw("--stages", "0,3", "--seeds", "1") == 0
    rows = results_of()["stages"]
    assert rows["stage0_gpt"]["seconds"]["mean"] == pytest.approx(40)
    assert rows["stage0_gpt"]["seconds_to_loss"]["mean"] == pytest.approx(20 + 20 * 2 / 3)
    assert rows["stage3_swiglu"]["seconds"]["mean"] == pytest.approx(4)


def test_the_seconds_of_a_compiled_run_stay_those_of_its_clock(only_draw, no_pictures):
    """Speeds are measured without compiling."""
    folder = made_up("0", 0, [3.0, 1.5])
    config = runs.read_config(folder)
    config["settings"]["compile"] = True
    found = {"stage0_gpt": wanted_runs.StageRuns(config, folder, {0: wanted_runs.read_metrics(folder)}, [])}
    timed = report.at_measured_speeds(found, {"training": {"stage0_gpt": [768.0]}})
    assert timed["stage0_gpt"].history[0][-1]["seconds"] == pytest.approx(4)


def test_curves_are_means_over_the_seeds(only_draw, no_pictures):
    for seed, end in enumerate((1.9, 1.8, 2.0)):
        made_up("0", seed, [3.0, end])
    made_up("3", 0, [3.0, 2.5])
    assert only_draw("--stages", "0,3") == 0
    curves = json.loads((results_folder() / "curves.json").read_text())["stages"]
    assert curves["stage0_gpt"]["val_loss"] == {"mean": [3.0, 1.9], "std": [0.0, 0.1]}
    assert curves["stage0_gpt"]["tokens"] == [20 * 768, 40 * 768]
    assert curves["stage0_gpt"]["train"] == {"tokens": [20 * 768, 40 * 768], "loss": [3.0, 1.9]}
    assert curves["stage0_gpt"]["tokens_per_second"] == 7680  # by the runs' clocks: no speed was measured
    assert curves["stage3_swiglu"]["val_loss"]["std"] == [None, None]


def test_the_best_rate_has_the_best_mean_over_two_seeds(only_draw, no_pictures):
    """A lucky seed does not make a rate the best, and a third seed does not count."""
    losses = {"0.001": [1.90, 1.92, 1.0], "0.002": [1.70, 2.30], "0.004": [1.89, 1.91]}
    for rate, by_seed in losses.items():
        for seed, loss in enumerate(by_seed):
            flags = ["--lr", rate, "--min-lr", str(float(rate) / 10)]
            made_up("0", seed, [3.0, loss], folder=runs.RUNS / f"0-{rate}-{seed}", flags=flags)
    assert only_draw("--stages", "0", "--tune") == 0
    tuned = results_of()["stages"]["stage0_gpt"]["tuned"]
    assert tuned["lr"] == 0.004 and tuned["val_loss"]["mean"] == pytest.approx(1.90)
    assert tuned["tried"]["0.001"]["values"] == [1.90, 1.92] and set(tuned["tried"]) == set(losses)


def test_how_long_the_runs_take_is_said_beforehand(run_compare, monkeypatch, capsys):
    monkeypatch.setattr(compare, "train", lambda needed, console: sys.exit(7))
    assert run_compare("--stages", "0,3", "--seeds", "2", "--tune") == 7
    assert re.search(r"20 runs to train: about \d+ min on this machine", capsys.readouterr().out)


def test_the_expected_time_counts_what_is_left(workshop, monkeypatch):
    monkeypatch.setattr(interleaved, "seconds_per_token", lambda chosen, vocab_size, device: 1.0)
    sizes = [
        "--steps",
        "30",
        "--batch-size",
        "2",
        "--model.block-size",
        "8",
        "--eval-every",
        "10",
        "--data",
        "words.txt",
    ]
    needed = wanted_runs.plan(["stage0_gpt"], 1, [*sizes, "--eval-tokens", "9"], [], "words")
    per_run = 30 * 2 * 8 + 9 * 3 / 3
    assert interleaved.seconds_of_runs(needed, torch.device("cpu")) == pytest.approx(per_run)
    monkeypatch.setattr(wanted_runs.Run, "step", lambda self: 20)
    assert interleaved.seconds_of_runs(needed, torch.device("cpu")) == pytest.approx(per_run / 3)


def test_noise_is_marked(only_draw, no_pictures):
    for seed, (one, other) in enumerate([(1.90, 1.91), (1.95, 1.89), (1.85, 1.93)]):
        made_up("3", seed, [3.0, one])
        made_up("4", seed, [3.0, other])
        made_up("5", seed, [3.0, other - 0.5])
    assert only_draw("--stages", "3-5") == 0
    rows = (results_folder() / "ladder.md").read_text().splitlines()[2:]
    assert ["≈" in row for row in rows] == [False, True, False]
    assert results_of()["stages"]["stage4_gqa"]["differs"]["val_loss"] is False


# What is reused


def test_finished_runs_are_reused_wherever_they_are(workshop):
    made_up("0", 0, [3.0, 2.0], folder="runs/mine")
    made_up("0", 1, [3.0, 2.0], folder="runs/other-rate", flags=["--lr", "0.5"])
    known, _ = wanted_runs.at_hand([])
    needed = wanted_runs.plan(["stage0_gpt"], 2, ["--steps", "40"], known, "words")
    assert [run.folder.name for run in needed] == ["mine", "stage0_gpt-words-seed1"]
    assert [run.finished() for run in needed] == [True, False]


def test_a_run_that_is_planned_already_is_not_planned_again(workshop):
    """As with --tune, one of whose rates is the preset's."""
    stages_ = ["stage0_gpt", "stage4_gqa"]
    planned = wanted_runs.plan(stages_, 2, ["--steps", "40"], [], "words")
    again = ["--steps", "40", "--lr", "1e-3", "--min-lr", "1e-4"]
    assert wanted_runs.plan(stages_, 1, again, [], "words", planned) == []
    other = wanted_runs.plan(stages_, 1, ["--steps", "40", "--lr", "2e-3"], [], "words", planned)
    assert [run.folder.name for run in other] == [f"{stage}-words-seed0-2" for stage in stages_]


def test_an_imported_run_is_no_part_of_it(workshop):
    made_up("0", 0, [3.0, 2.0], config={"imported_from": "elsewhere"})
    assert wanted_runs.at_hand([]) == ([], [])


# Whole comparisons


def test_a_failed_run_is_reported_and_does_not_stop_the_others(run_compare, capfd):
    """Stage 4 cannot share 2 heads among 3; stage 0 can be trained."""
    assert run_compare("--stages", "0,4", "--seeds", "1", "--rounds", "0", "--model.n-kv-head", "2") in (1, 2)
    # a flag that a stage does not know is an error before any run
    assert "n-kv-head" in capfd.readouterr().err


def test_a_run_that_breaks_is_reported_and_the_rest_is_drawn(run_compare, monkeypatch, capfd):
    real = wanted_runs.Run.command

    def command(self):
        made = real(self)
        failing = [sys.executable, "-c", "raise SystemExit('error: out of luck\\ntry again')"]
        return failing if "stage1" in self.name else made

    monkeypatch.setattr(wanted_runs.Run, "command", command)
    assert run_compare("--stages", "0-1", "--seeds", "1", "--rounds", "0") == 1
    err = capfd.readouterr().err
    assert "failed: stage1_rmsnorm seed 0: out of luck" in err
    assert "missing: stage1_rmsnorm seed 0" in err
    assert list(results_of()["stages"]) == ["stage0_gpt"]


def test_metrics_are_read_again_only_if_they_have_changed(tmp_path, monkeypatch):
    assert wanted_runs.read_metrics(tmp_path) == []
    record = {"step": 1, "tokens": 8, "loss": 2.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert wanted_runs.read_metrics(tmp_path) == [record]
    with monkeypatch.context() as patch:
        patch.setattr(wanted_runs.log, "read_metrics", None)
        assert wanted_runs.read_metrics(tmp_path) == [record]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record | {"step": 2}) + "\n")
    assert [record["step"] for record in wanted_runs.read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("reaches", ["both", "the run alone"])
def test_an_interrupted_comparison_goes_on_where_it_was(workshop, no_pictures, monkeypatch, reaches):
    """The first run is stopped in its middle, by the signal that Ctrl-C gives to compare.py and its child.

    To the child alone is what remains of it where Python drops the exception of compare.py's own.
    """
    flags = [
        "--stages",
        "0",
        "--seeds",
        "1",
        "--rounds",
        "0",
        *FLAGS,
        "--steps",
        "500",
        "--eval-every",
        "50",
    ]
    script = [sys.executable, str(ROOT / "compare.py"), *flags]
    environment = os.environ | {"RUNS_DIR": str(workshop / "runs"), "OMP_NUM_THREADS": "1"}
    options = {"env": environment, "cwd": workshop, "start_new_session": True}
    parent = subprocess.Popen(script, stderr=subprocess.PIPE, **options)
    folder = workshop / "runs/compare/laptop/stage0_gpt-words-seed0"
    deadline = time.monotonic() + 180
    while not checkpoint.exists(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    if reaches == "both":
        os.killpg(parent.pid, signal.SIGINT)
    else:
        subprocess.run(["pkill", "-INT", "-P", str(parent.pid)], check=True)  # its children
    _, err = parent.communicate(timeout=180)
    assert parent.returncode == 130 and b"to resume, rerun the same command" in err, err
    stopped = checkpoint.step(folder)
    assert 0 < stopped < 500
    if reaches == "both":
        assert call(monkeypatch, compare, *flags) == 0
        resumed = json.loads((folder / "config.json").read_text())["resumed"]
        assert resumed[0]["step"] == stopped


def test_all_stages_are_compared_and_drawn(run_compare, in_this_process, monkeypatch, capfd):
    assert run_compare("--seeds", "1", "--rounds", "1", "--contexts", "") == 0
    assert "missing" not in capfd.readouterr().err
    folder = Path("runs/compare/laptop/results")
    for name in ("loss", "bars", "cost"):
        assert (folder / f"{name}.png").stat().st_size > 5000, name
    results = results_of()
    assert list(results["stages"]) == stages.course()
    for row in results["stages"].values():
        assert row["training_tokens_per_second"]["median"] > 0 and row["peak_memory"] > 2**20
        assert len(row["decoding_tokens_per_second"]["values"]) == 1
    assert results["machine"]["versions"]["torch"]
    monkeypatch.setattr(compare, "train_one", None)  # nothing is trained again
    assert run_compare("--seeds", "1", "--only-draw") == 0
    assert (
        results_of()["stages"]["stage7_mla_mtp"]["val_loss"]
        == results["stages"]["stage7_mla_mtp"]["val_loss"]
    )
    assert run_compare("--stages", "0,7", "--seeds", "1", "--rounds", "1", "--contexts", "16") == 0
    folder = Path("runs/compare/laptop/results-0-7")
    for name in ("training_context", "decoding_context"):
        assert (folder / f"{name}.png").stat().st_size > 5000, name
    by_context = json.loads((folder / "results.json").read_text())["speeds"]["training_by_context"]
    assert by_context["stage0_gpt"]["16"] and by_context["stage7_mla_mtp"]["16"]


def test_speed_against_the_context_is_the_median_of_rounds_in_turn(monkeypatch):
    asked, speeds = [], iter([10, 20, 50, 60, 30, 40])

    def measure(stage, context, **_):
        asked.append((stage, context))
        return {"tokens_per_second": next(speeds), "peak_memory": context}

    monkeypatch.setattr(interleaved.isolated, "measure", measure)
    config = {"model": {}, "dtype": "float32", "settings": {"optimizer": "adamw"}}
    configs = {name: config | {"stage": name} for name in ("one", "other")}
    made = interleaved.by_context(configs, "training", torch.device("cpu"), 3, [16], Console())
    assert asked == 3 * [("one", 16), ("other", 16)]
    assert made["one"]["16"] == {"tokens_per_second": 30, "memory": 16}
    assert made["other"]["16"] == {"tokens_per_second": 40, "memory": 16}


def test_the_memory_of_a_measurement_is_its_own():
    """Not that of the process that started it."""
    ballast = np.ones(2**26)  # 512 MiB
    made = interleaved.isolated.measure(stage="stage0_gpt", context=8, steps=1, dtype="float32")
    assert made["peak_memory"] < 500 * 2**20 < ballast.nbytes


# The diff


def test_the_diff_counts_lines_and_names(capsys, monkeypatch):
    assert call(monkeypatch, compare, "--diff", "3", "4") == 0
    said = capsys.readouterr().err
    added, removed = diffs.changed_lines("stage3_swiglu", "stage4_gqa")
    assert f"{added} lines added, {removed} removed" in said
    assert "n_kv_head" in said.split("added names: ")[1] and "repeats" in said.split("added names: ")[1]


def test_a_diff_in_a_pipe_is_a_patch():
    """Whose lines are whole, whatever the width of the terminal."""
    command = [sys.executable, "compare.py", "--diff", "3", "4"]
    patch = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    by_git = ["git", "diff", "--no-index", "stage3_swiglu/model.py", "stage4_gqa/model.py"]
    expected = subprocess.run(by_git, cwd=ROOT, capture_output=True).stdout
    assert patch.splitlines()[2:] == expected.splitlines()[2:] != []  # after the header, whose hashes vary


@pytest.mark.parametrize("width, side_by_side", [(119, False), (120, True)])
def test_a_narrow_terminal_gets_a_unified_diff(width, side_by_side):
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=True)
    diffs.show("stage3_swiglu", "stage4_gqa", console)
    text = console.export_text()
    assert ("+    n_kv_head: int | None = None" in text) is not side_by_side
    assert "names added" in text and max(map(len, text.splitlines())) <= width


def test_names_are_those_of_the_code_alone():
    assert diffs.names(["def f(x):", "    return y  # z", '"""w"""']) == {"f", "x", "y"}


def test_an_unknown_range_of_stages_is_refused():
    with pytest.raises(UserError, match="unknown stage 'x'"):
        wanted_runs.chosen_stages("x")
    assert wanted_runs.chosen_stages("2,0-1") == ["stage0_gpt", "stage1_rmsnorm", "stage2_rope"]
