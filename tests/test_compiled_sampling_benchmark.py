"""benchmarks.compiled_sampling: what is measured of sample.py's calls, and the table made of it."""

import json
from pathlib import Path

from conftest import call

from benchmarks import compiled_sampling
from lab.pages import lessons


def test_whole_calls_are_compared_in_turn(workshop, run_train, monkeypatch):
    assert run_train("--stage", "4", "--steps", "1", "--out", "runs/it") == 0
    monkeypatch.setattr(lessons, "RESULTS", Path("results.json"))
    Path("results.json").write_text('{"kept": 1}')
    calls, seconds = [], {(): 4.0, ("--compile",): 6.0, "later": 3.0, ("--compile-first",): 30.0}

    def pretended(run, n_tokens, flags, folder):
        later = flags == ["--compile"] and folder == calls[0][1]
        calls.append((flags, folder))
        return compiled_sampling.Measured(seconds["later" if later else tuple(flags)], 2.5, b"text")

    monkeypatch.setattr(compiled_sampling, "call", pretended)
    flags = ("--runs", "runs/it", "--tokens", "7", "--rounds", "2")
    assert call(monkeypatch, compiled_sampling, *flags) == 0
    assert [flags for flags, _ in calls] == [["--compile-first"]] + 2 * [[], ["--compile"], ["--compile"]]
    assert len({folder for _, folder in calls}) == 5  # a first start never finds what another one compiled
    results = json.loads(Path("results.json").read_text())
    (row,) = results["compiled_sampling"]["calls"]
    assert results["kept"] == 1 and row["stage"] == "stage4_gqa" and row["same_text"] is True
    assert row["of_the_time_without"] == {"without": 1.0, "first start": 1.5, "later start": 0.75}
    table = lessons.compiled_sampling(results["compiled_sampling"])
    assert "| stage4_gqa | 7 | 4.0 | 6.0 | 3.0 | 1.50 | 0.75 | 2.5 |" in table
