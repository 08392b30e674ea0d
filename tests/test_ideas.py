"""What the scripts in benchmarks/ideas/ share: runs that are reused, results that become a lesson's table."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import call
from PIL import Image
from test_compare import made_up

from benchmarks import ideas
from benchmarks.ideas import rates
from lab import formats
from lab.errors import UserError
from lab.pages import lessons
from lab.training import run_plots

FLAGS = ["--stage", "0", "--data", "words.txt", "--steps", "40", "--seed", "1"]


@pytest.fixture
def commands(workshop, monkeypatch):
    """The commands that would train a run; each leaves a finished run instead."""
    commands = []

    def pretend(command, **_):
        commands.append(command)
        made_up("0", 1, [3.0, 1.5], folder=command[-1])
        Path(command[-1], "sample.txt").touch()

    monkeypatch.setattr(ideas.subprocess, "run", pretend)
    return commands


def test_a_finished_run_with_the_same_settings_is_reused(commands):
    flags = ["--data", "words.txt"]
    made_up("0", 0, [3.0, 1.1], folder="runs/other-seed", flags=flags)
    made_up("0", 1, [3.0, 1.2], folder="runs/other-rate", flags=[*flags, "--lr", "0.5"])
    made_up("0", 1, [3.0, 1.3], folder="runs/compare/laptop/right", flags=flags)
    folder, metrics = ideas.trained("mine", FLAGS)
    assert folder.name == "right" and metrics[-1]["val_loss"] == 1.3 and commands == []


def test_a_missing_run_is_trained_once(commands):
    for _ in range(2):
        folder, metrics = ideas.trained("mine", FLAGS)
        assert folder == ideas.runs.RUNS / "ideas" / "mine" and metrics[-1]["val_loss"] == 1.5
    assert len(commands) == 1 and commands[0][2:-2] == ["--preset", "laptop", "--device", "cpu", *FLAGS]


def test_an_interrupted_run_is_resumed(commands):
    (ideas.runs.RUNS / "ideas" / "mine" / "last").mkdir(parents=True)
    with pytest.raises(FileExistsError):  # where train.py would resume, this pretence makes a new folder
        ideas.trained("mine", FLAGS)
    assert commands[0][2:-2] == ["--resume"]


def test_a_run_of_other_code_is_refused(commands, monkeypatch):
    ideas.trained("mine", FLAGS)
    monkeypatch.setattr(ideas.edits, "difference", lambda config: "its code has changed")
    with pytest.raises(UserError, match="mine cannot be used: its code has changed; delete it"):
        ideas.trained("mine", FLAGS)


def test_results_become_the_table_and_the_picture_of_a_lesson(tmp_path, monkeypatch):
    monkeypatch.setattr(lessons, "IDEAS", tmp_path)
    shades = []

    def draw():
        figure, axes = run_plots.new_figure(2, 1)
        shades.append(axes.get_facecolor())
        return figure

    ideas.write("widths", {"ms": [1.5]}, ["width", "ms"], [["128", "1.5"]], draw, "A line.")
    made = json.loads((tmp_path / "widths.json").read_text())
    assert made["ms"] == [1.5] and "commit" in made["machine"]
    assert shades[0] != shades[1] and (tmp_path / "widths-dark.png").stat().st_size > 500
    page = lessons.filled("a\n<!-- pays widths -->\n<!-- end -->\nb\n", "stage0_gpt", lessons.read_results())
    assert "| 128 | 1.5 |" in page and '<img alt="A line." src="../results/ideas/widths.png">' in page
    ideas.write("widths", {}, ["width"], [["128"]])
    again = lessons.filled(page, "stage0_gpt", lessons.read_results())
    assert "<img" not in again and re.search(r"-->\n\| width \|\n", again) and again.endswith("-->\nb\n")


@pytest.mark.parametrize(
    ("best", "tried"),
    [(1, [0.5, 1, 2]), (2, [1, 2, 4]), (4, [1, 2, 4, 8]), (0.25, [0.125, 0.25, 0.5, 1, 2])],
)
def test_rates_are_tried_until_the_best_lies_between_two(best, tried):
    asked = []
    losses = ideas.rates_around_the_best(lambda rate: asked.append(rate) or abs(math.log(rate / best)), 1)
    assert list(losses) == sorted(asked) == tried and min(losses, key=losses.get) == best


def test_a_gain_that_rounds_to_0_has_no_minus_sign():
    assert [rates.gain(1.5, now) for now in (1.5001, 1.5, 1.6, 1.4)] == [
        "+0.000",
        "+0.000",
        "-0.100",
        "+0.100",
    ]


@pytest.fixture
def rates_written(monkeypatch, tmp_path):
    """The folder of the results; results/ideas/rates.json in it has stage 0, and training would give 1.7."""
    one = {"mean": 1.9, "std": 0.0, "values": [1.9, 1.9]}
    losses = {"adamw": {"stage0_gpt": {"0.001": one}}, "muon": {}}
    sources = {"adamw": {"stage0_gpt": {"commit": "before"}}, "muon": {}}
    kept = {"format": formats.RESULTS, "losses": losses, "sources": sources, "seeds": 2, "steps": 2000}
    (tmp_path / "rates.json").write_text(json.dumps(kept))
    monkeypatch.setattr(lessons, "IDEAS", tmp_path)
    monkeypatch.setattr(
        rates, "by_rate", lambda *_: {"0.001": {"mean": 1.7, "std": 0.0, "values": [1.7, 1.7]}}
    )
    return tmp_path


@pytest.mark.parametrize(("flags", "stage_0"), [(["--keep"], 1.9), ([], 1.7)])
def test_rates_that_are_kept_are_not_measured_again(monkeypatch, rates_written, flags, stage_0):
    monkeypatch.setattr(rates.runs, "commit", lambda: "now")
    assert call(monkeypatch, rates, "--stages", "0,3", *flags) == 0
    measured = json.loads((rates_written / "rates.json").read_text())
    losses = {
        optimizer: {stage: of["0.001"]["mean"] for stage, of in by_stage.items()}
        for optimizer, by_stage in measured["losses"].items()
    }
    assert losses == {
        "adamw": {"stage0_gpt": stage_0, "stage3_swiglu": 1.7},
        "muon": {"stage0_gpt": 1.7, "stage3_swiglu": 1.7},
    }
    commit = "before" if flags else "now"
    assert measured["sources"]["adamw"] == {
        "stage0_gpt": {"commit": commit},
        "stage3_swiglu": {"commit": "now"},
    }


def test_rates_that_were_never_measured_are_measured(monkeypatch, rates_written):
    (rates_written / "rates.json").unlink()
    assert call(monkeypatch, rates, "--stages", "0", "--keep") == 0
    measured = json.loads((rates_written / "rates.json").read_text())
    assert measured["losses"]["adamw"]["stage0_gpt"]["0.001"]["mean"] == 1.7


def test_rates_of_other_seeds_are_not_kept(monkeypatch, rates_written, capsys):
    assert call(monkeypatch, rates, "--keep", "--seeds", "3") == 2
    assert "other --seeds or --steps" in capsys.readouterr().err


def test_a_gain_is_measured_from_the_row_above_at_its_best_mean(monkeypatch):
    """Of two seeds: one lucky loss does not make a rate the best."""
    losses = {
        "stage0_gpt": {5e-4: [2.5, 2.5], 1e-3: [2.0, 2.0], 2e-3: [1.8, 1.9], 4e-3: [1.0, 3.0], 8e-3: [3, 3]}
    }
    losses["stage3_swiglu"] = {rate: [1.7, 1.7] for rate in losses["stage0_gpt"]} | {5e-4: [1.6, 1.6]}
    losses["stage3_swiglu"][2.5e-4] = [1.9, 1.9]
    muon = {
        "stage0_gpt": {2e-3: [1.7, 1.7], 4e-3: [1.6, 1.6], 8e-3: [1.7, 1.7]},
        "stage3_swiglu": {4e-3: [1.6, 1.6], 8e-3: [1.5, 1.5], 16e-3: [1.6, 1.6]},
    }
    asked = []

    def trained(name, flags):
        stage, optimizer, rate, seed = (
            flags[flags.index(f"--{x}") + 1] for x in ("stage", "optimizer", "lr", "seed")
        )
        asked.append((stage, optimizer, float(rate), int(seed)))
        values = losses if optimizer == "adamw" else muon
        return None, [{"val_loss": values[stage][float(rate)][int(seed)]}]

    monkeypatch.setattr(ideas, "trained", trained)
    written = {}
    monkeypatch.setattr(
        ideas, "write", lambda idea, measured, heads, rows, draw, alt: written.update(locals())
    )
    assert call(monkeypatch, rates, "--stages", "0,3") == 0
    assert len(asked) == len(set(asked)) == (3 + 4 + 3 + 3) * 2  # two stages and optimizers, with two seeds
    assert written["rows"][0] == ["0 gpt", "2.000", "", "1.850 at 0.002", "", "1.600 at 0.004", ""]
    assert written["rows"][1] == [
        "3 swiglu",
        "1.700",
        "+0.300",
        "1.600 at 0.0005",
        "+0.250",
        "1.500 at 0.008",
        "+0.100",
    ]
    assert "with AdamW between 1.60 and 1.85 and with Muon between 1.50 and 1.60" in written["alt"]
    panels = written["draw"]().axes
    assert len(panels) == 2 and panels[0].get_ylim() == panels[1].get_ylim()
    lowest, highest = panels[0].get_ylim()
    assert lowest < 1.5 < 3 < highest  # the best loss with Muon, and the worst one with AdamW


def test_pictures_are_small_and_look_the_same(tmp_path):
    figure, axes = run_plots.new_figure(6, 4)
    for i, color in enumerate(run_plots.RUN_COLORS):
        axes.plot([0, 1], [i, i + 1], color=color, label=f"line {i}")
    axes.legend()
    figure.savefig(tmp_path / "whole.png")
    run_plots.save(figure, tmp_path / "small.png")
    whole, small = (Image.open(tmp_path / f"{name}.png").convert("RGB") for name in ("whole", "small"))
    assert np.abs(np.asarray(whole, dtype=int) - np.asarray(small)).mean() < 0.5  # of 255
    assert (tmp_path / "small.png").stat().st_size < 0.6 * (tmp_path / "whole.png").stat().st_size
