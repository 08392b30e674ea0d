"""Edited code, copied stages, two processes at one run: nothing goes stale or is overwritten in silence."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, call
from test_training import metrics, stop_at

import compare
import runs as list_runs
import train
from deploy import architectures, export
from lab import formats, stages
from lab.comparison import wanted_runs
from lab.errors import UserError
from lab.storage import checkpoint, edits, locks, runs

ROOT = Path(__file__).parent.parent
SHORT = ["--data", "words.txt", *TINY_RUN, "--steps", "2", "--eval-every", "1", "--log-every", "1"]


@pytest.fixture
def copied(workshop, monkeypatch):
    """The stages' folders copied into the workshop, where a test may edit them and add others."""
    for folder in {stages.path(name).parent for name in stages.COURSE}:
        shutil.copytree(folder, workshop / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(stages, "ROOT", workshop)
    loaded = {name: sys.modules.pop(name) for name in list(sys.modules) if name.endswith(".model")}
    yield workshop
    for name in [name for name in sys.modules if name.endswith(".model")]:
        del sys.modules[name]
    sys.modules.update(loaded)  # the other tests of this process go on with the unedited code


def edit(path, old, new):
    """Replaces code in a file, which must have it."""
    source = path.read_text()
    assert old in source
    path.write_text(source.replace(old, new))
    stamp = path.stat().st_mtime_ns + 1_000_000  # a clock may be coarser than two edits are apart
    os.utime(path, ns=(stamp, stamp))


# The hash


@pytest.mark.parametrize(
    "old, new",
    [
        ('"""SwiGLU: down(silu(gate(x)) * up(x))."""', '"""Other words."""'),
        ("        return self.down_proj(", "        # a comment\n\n        return self.down_proj("),
        ("F.silu(self.gate_proj(x)) * self.up_proj(x)", "(F.silu( self.gate_proj(x) )\n * self.up_proj(x))"),
        ('"""Number of blocks."""', ""),
    ],
)  # fmt: skip
def test_comments_docstrings_and_formatting_are_no_edit(copied, old, new):
    before = edits.code_hash("stage3_swiglu")
    edit(copied / "stage3_swiglu" / "model.py", old, new)
    assert edits.code_hash("stage3_swiglu") == before


@pytest.mark.parametrize(
    "old, new",
    [
        ("F.silu", "F.relu"),
        ("std=0.02", "std=0.03"),
        ("dropout: float = 0.0", "dropout: float = 0.1"),
        ("x1 * cos - x2 * sin", "x2 * sin - x1 * cos"),
    ],
)
def test_what_changes_the_function_is_an_edit(copied, old, new):
    before = edits.code_hash("stage3_swiglu")
    edit(copied / "stage3_swiglu" / "model.py", old, new)
    assert edits.code_hash("stage3_swiglu") != before


def test_an_imported_file_of_ours_is_part_of_the_code(copied):
    edit(copied / "stage4_gqa" / "model.py", "import math", "import math\n\nimport stage5_flash.tiled")
    before = {name: edits.code_hash(name) for name in stages.COURSE}
    edit(copied / "stage5_flash" / "tiled.py", "import torch", "import torch\n\nEXTRA = 1")
    assert [name for name in stages.COURSE if edits.code_hash(name) != before[name]] == ["stage4_gqa"]


def test_all_versions_of_python_make_the_same_hash():
    """Such as an interpreter of another version on this machine; without one nothing is compared."""
    script = """
import sys, types, pathlib
for name in ("lab", "lab.stages"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["lab"].__path__ = ["lab"]
sys.modules["lab.stages"].ROOT = pathlib.Path.cwd()
sys.modules["lab.stages"].path = lambda name: pathlib.Path(sys.argv[1], name)
sys.modules["lab"].stages = sys.modules["lab.stages"]
from lab.storage import edits
print(*(edits.code_hash(file) for file in sys.argv[2:]))
"""
    found = filter(None, (shutil.which(f"python3.{minor}") for minor in range(10, 16)))
    expected = " ".join(edits.code_hash(name) for name in stages.COURSE)
    for python in [sys.executable, *found]:
        made = subprocess.run(
            [python, "-c", script, ROOT, *stages.COURSE.values()], cwd=ROOT, capture_output=True, text=True
        )
        if made.returncode == 0 or python == sys.executable:
            assert made.stdout.strip() == expected, (python, made.stderr)


def test_code_that_is_no_python_is_named(copied):
    edit(copied / "stage3_swiglu" / "model.py", "class MLP(", "class MLP((")
    with pytest.raises(UserError, match=r"stage3_swiglu/model.py, line \d+"):
        edits.code_hash("stage3_swiglu")


# Runs of edited code


def trained(monkeypatch, *flags):
    assert call(monkeypatch, train, *SHORT, *flags) == 0


def test_a_run_of_other_code_does_not_count_in_a_comparison(copied, monkeypatch, capsys):
    for stage in ("stage3_swiglu", "stage4_gqa"):
        trained(monkeypatch, "--stage", stage)
    edit(copied / "stage4_gqa" / "model.py", "F.silu", "F.relu")
    capsys.readouterr()
    flags = ("--only-draw", "--stages", "3,4", "--seeds", "1", "--rounds", "0")
    assert call(monkeypatch, compare, *flags, *SHORT) == 0
    err = capsys.readouterr().err
    assert "left out of stage4_gqa: runs/stage4_gqa-words-seed0: stage4_gqa/model.py has changed since" in err
    assert "missing: stage4_gqa seed 0" in err
    results = json.loads(Path("runs/compare/laptop/results-3-4/results.json").read_text())
    assert list(results["stages"]) == ["stage3_swiglu"]
    known, _ = wanted_runs.at_hand([])
    needed = wanted_runs.plan(["stage3_swiglu", "stage4_gqa"], 1, SHORT, known, "words")
    assert [run.finished() for run in needed] == [True, False]


def test_speeds_of_other_code_are_left_out(copied, monkeypatch, capsys):
    for stage in ("stage3_swiglu", "stage4_gqa"):
        trained(monkeypatch, "--stage", stage)
    folder = copied / "runs/compare/laptop/results-3-4"
    folder.mkdir(parents=True)
    names = ("stage3_swiglu", "stage4_gqa")
    speeds = {
        "training": {name: [5.0] for name in names},
        "code": {name: edits.code_hash(name) for name in names},
    }
    runs.write_json(folder / "speeds.json", speeds | {"code": speeds["code"] | {"stage4_gqa": "of another"}})
    flags = ("--only-draw", "--stages", "3,4", "--seeds", "1")
    assert call(monkeypatch, compare, *flags, *SHORT) == 0
    assert "the speeds of stage4_gqa" in capsys.readouterr().err
    rows = json.loads((folder / "results.json").read_text())["stages"]
    assert ["training_tokens_per_second" in rows[name] for name in names] == [True, False]


def test_sampling_resuming_and_fine_tuning_warn_of_an_edit(copied, monkeypatch, run_sample, capsys):
    trained(monkeypatch, "--stage", "3", "--out", "run")
    assert run_sample("--run", "run", "--prompt", "a", "--max-new-tokens", "1") == 0
    assert "warning" not in capsys.readouterr().err
    edit(copied / "stage3_swiglu" / "model.py", "F.silu", "F.relu")
    warning = "warning: run: stage3_swiglu/model.py has changed since training\n"
    assert run_sample("--run", "run", "--prompt", "a", "--max-new-tokens", "1") == 0
    assert capsys.readouterr().err.count(warning) == 1
    trained(monkeypatch, "--stage", "3", "--init-from", "run", "--out", "tuned")
    assert capsys.readouterr().err.count(warning) == 1
    trained(monkeypatch, "--resume", "--out", "run", "--steps", "3")
    assert capsys.readouterr().err.count(warning) == 1
    assert "changed during training" in edits.difference(runs.read_config(Path("run")))


def test_a_run_without_a_hash_does_not_count_and_says_so(copied, monkeypatch):
    trained(monkeypatch, "--stage", "3", "--out", "runs/old")
    config = runs.read_config(Path("runs/old"))
    del config["code"]
    runs.write_json(Path("runs/old/config.json"), config)
    assert wanted_runs.at_hand([])[0] == []
    assert edits.difference(config) == "it was made before runs recorded their code"


def test_sizes_that_the_edited_code_does_not_have_are_named(copied, monkeypatch, run_sample, capsys):
    trained(monkeypatch, "--stage", "3", "--out", "run")
    config = runs.read_config(Path("run"))
    config["model"]["n_banana"] = 3
    runs.write_json(Path("run/config.json"), config)
    capsys.readouterr()
    assert run_sample("--run", "run", "--prompt", "a") == 2
    assert (
        "run has n_banana, which GPTConfig in stage3_swiglu/model.py does not have" in capsys.readouterr().err
    )


@pytest.fixture
def run_export(monkeypatch):
    return lambda *flags: call(monkeypatch, export, *flags)


def test_edited_code_is_not_exported_under_another_name(copied, monkeypatch, run_export, capsys):
    shutil.copytree("stage3_swiglu", "my_copy")
    shutil.copytree("stage3_swiglu", "my_relu")
    edit(copied / "my_relu" / "model.py", "F.silu", "F.relu")
    for name in ("my_copy", "my_relu"):
        trained(monkeypatch, "--stage", name, "--out", name + "-run")
    capsys.readouterr()
    assert run_export("--run", "my_copy-run", "--to", "hf", "--out", "copy") == 0
    assert json.loads(Path("copy/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    for to in ("hf", "llama2c"):
        assert run_export("--run", "my_relu-run", "--to", to, "--out", "relu") == 2
        assert "my_relu-run was trained with an edited my_relu/model.py" in capsys.readouterr().err
    assert not Path("relu").exists()
    # the weights of edited code, when the edit has been undone
    shutil.copy("stage3_swiglu/model.py", "my_relu/model.py")
    assert run_export("--run", "my_relu-run", "--to", "hf", "--out", "relu") == 2


def test_the_code_of_every_stage_is_the_tested_one():
    """If this fails and tests/test_deploy.py passes, append the new hash in deploy/architectures.py."""
    assert {name: hashes[-1] for name, hashes in architectures.TESTED.items()} == {
        name: edits.code_hash(name) for name in [*stages.COURSE, *stages.relatives()]
    }


def test_code_that_does_not_compile_is_named_and_blocks_nothing_else(copied, monkeypatch, run_sample, capsys):
    shutil.copytree("stage3_swiglu", "my_relu")
    trained(monkeypatch, "--stage", "my_relu")
    trained(monkeypatch, "--stage", "3")
    del sys.modules["my_relu.model"]
    edit(copied / "my_relu" / "model.py", "class MLP(", "class MLP((")
    capsys.readouterr()
    for driver in (train, compare):
        assert call(monkeypatch, driver, "--stage" if driver is train else "--stages", "my_relu", *SHORT) == 2
        err = capsys.readouterr().err
        assert "my_relu/model.py, line" in err and len(err.splitlines()) <= 2
    assert call(monkeypatch, list_runs) == 0
    assert "3 swiglu" in capsys.readouterr().out
    assert run_sample("--stage", "3", "--prompt", "a", "--max-new-tokens", "1") == 0
    assert call(monkeypatch, compare, "--only-draw", "--stages", "3", "--seeds", "1", *SHORT) == 0


def test_an_edit_that_renames_weights_is_named_first(copied, monkeypatch, run_sample, capsys):
    trained(monkeypatch, "--stage", "3", "--out", "run")
    edit(copied / "stage3_swiglu" / "model.py", "gate_proj", "gatex_proj")
    del sys.modules["stage3_swiglu.model"]
    capsys.readouterr()
    assert run_sample("--run", "run", "--prompt", "a") == 2
    err = capsys.readouterr().err
    assert err.index("has changed since training") < err.index("does not fit this model")


def test_the_commit_is_dirty_by_code_but_not_by_results(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    assert runs.commit() is None
    (tmp_path / "results").mkdir()
    for name in ("code.py", "results/results.json"):
        (tmp_path / name).write_text("before")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "one"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    clean = runs.commit()
    (tmp_path / "results/results.json").write_text("after")
    assert runs.commit() == clean and "dirty" not in clean
    (tmp_path / "code.py").write_text("after")
    assert runs.commit() == f"{clean}-dirty"


# Variants


@pytest.mark.parametrize("name", ["my_relu", "my-relu.v2", "test"])
def test_a_copied_folder_is_a_stage_whatever_its_name(copied, monkeypatch, run_sample, capsys, name):
    shutil.copytree("stage3_swiglu", name)
    edit(copied / name / "model.py", "F.silu", "F.relu")
    trained(monkeypatch, "--stage", name)
    assert run_sample("--stage", name, "--prompt", "a", "--max-new-tokens", "1") == 0
    trained(monkeypatch, "--stage", "3")
    capsys.readouterr()
    flags = ("--stages", f"3, {name}", "--seeds", "1", "--only-draw", "--rounds", "0")
    assert call(monkeypatch, compare, *flags, *SHORT) == 0
    folder = Path(f"runs/compare/laptop/results-3-{name}")
    rows = json.loads((folder / "results.json").read_text())["stages"]
    assert list(rows) == ["stage3_swiglu", name] and rows[name]["from"] == "stage3_swiglu"
    assert rows[name]["lines_changed"] == 2
    assert f"| {name} | variant of 3 swiglu | 2 |" in (folder / "ladder.md").read_text()
    capsys.readouterr()
    assert call(monkeypatch, compare, "--diff", "3", name) == 0
    assert "1 line added, 1 removed" in capsys.readouterr().err


def test_a_number_that_two_folders_claim_is_refused_with_both(copied, capsys):
    shutil.copytree("stage3_swiglu", "stage3_swiglu_backup")
    assert stages.find("stage3_swiglu_backup") == "stage3_swiglu_backup"
    assert stages.find("stage3_swiglu") == stages.find("swiglu") == "stage3_swiglu"
    with pytest.raises(UserError, match="'3' could be stage3_swiglu or stage3_swiglu_backup"):
        stages.find("3")
    assert wanted_runs.chosen_stages(None) == list(stages.COURSE)


@pytest.mark.parametrize(
    "given", ["4", " 4", "stage4", "gqa", "GQA", "stage4_gqa", "stage4_gqa/", "./stage4_gqa"]
)
def test_a_stage_is_understood_in_several_ways(given):
    assert stages.find(given) == "stage4_gqa"


def test_the_path_of_a_stage_is_understood():
    assert stages.find(f"{stages.ROOT}/stage4_gqa/") == "stage4_gqa"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("3, 4", ["3", "4"]),
        ("0 - 2", ["0", "1", "2"]),
        ("gqa,stage3_swiglu/", ["3", "4"]),
        ("2,,1,", ["1", "2"]),
        ("6-7", ["6", "7a", "7"]),
        ("5-7a", ["5", "6", "7a"]),
        ("deepseek_v3, mla", ["7a", "deepseek_v3"]),
    ],
)
def test_lists_of_stages_are_understood(text, expected):
    assert wanted_runs.chosen_stages(text) == [stages.find(stage) for stage in expected]


@pytest.mark.parametrize(
    "flags, guess",
    [
        (["--stage", "swigly"], "did you mean swiglu?"),
        (["--stage", "stage4_gqq"], "did you mean stage4_gqa?"),
        (["--stage", "0", "--lrr", "1"], "Did you mean --lr?"),
        (["--stage", "0", "--preset", "lptop"], "Did you mean laptop?"),
        (["--stage", "0", "--model.n-hed", "2"], "Did you mean --model.n-head?"),
    ],
)
def test_a_misspelt_name_flag_or_value_gets_a_guess(run_train, capsys, flags, guess):
    assert run_train(*flags) == 2
    err = capsys.readouterr().err
    assert guess in err and len(err.splitlines()) == 1


def test_a_misspelt_flag_of_a_comparison_gets_a_guess(workshop, monkeypatch, capsys):
    assert call(monkeypatch, compare, "--seedz", "3") == 2
    assert "Did you mean --seeds?" in capsys.readouterr().err


def test_a_model_without_its_classes_is_named(copied):
    Path("empty").mkdir()
    Path("empty/model.py").write_text("x = 1\n")
    with pytest.raises(UserError, match=r"empty/model.py has no GPTConfig"):
        stages.load("empty")


# The lists of runs


def test_runs_are_listed_with_what_differs_from_their_preset(copied, monkeypatch, capsys):
    trained(monkeypatch, "--stage", "3", "--lr", "0.002")
    trained(monkeypatch, "--stage", "0", "--seed", "4")
    edit(copied / "stage0_gpt" / "model.py", "std=0.02", "std=0.03")
    (copied / "runs/torn").mkdir()
    (copied / "runs/torn/config.json").write_text("{")
    capsys.readouterr()
    assert call(monkeypatch, list_runs) == 0
    out, err = capsys.readouterr()
    head, newest, oldest = (line.split("\t") for line in out.splitlines())
    assert newest[:3] == ["runs/stage0_gpt-words-seed4", "0 gpt", "words"] and newest[-1] == "changed"
    assert "seed 4" in newest[3] and "lr" not in newest[3]
    assert oldest[1] == "3 swiglu" and "lr 0.002" in oldest[3] and "model.n-layer 2" in oldest[3]
    assert "intermediate-size" not in oldest[3]  # it follows from the width
    assert oldest[4] == "2 of 2" and oldest[-1] == "same" and re.fullmatch(r"\d\.\d{4}", oldest[5])
    assert "runs/torn" in err and len(head) == len(newest) == len(oldest)
    assert call(monkeypatch, list_runs, "--stage", "swiglu") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_no_runs_are_no_error(workshop, monkeypatch, capsys):
    assert call(monkeypatch, list_runs) == 0
    assert "python train.py --stage 0" in capsys.readouterr().out


def test_any_runs_are_compared_with_the_settings_in_which_they_differ(copied, monkeypatch, capsys):
    trained(monkeypatch, "--stage", "3", "--lr", "0.002", "--out", "one")
    trained(monkeypatch, "--stage", "4", "--out", "other")
    capsys.readouterr()
    assert call(monkeypatch, compare, "--runs", "one", "other") == 0
    out = capsys.readouterr().out
    assert "run 1: one" in out and "run 2: other" in out
    table = Path("runs/compare/runs/runs.md").read_text().splitlines()
    heads, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    made = [dict(zip(heads, row, strict=True)) for row in rows]
    assert [row["stage"] for row in made] == ["3 swiglu", "4 gqa"]
    assert [row["lr"] for row in made] == ["0.002", "0.001"]
    assert made[0]["model.n-kv-head"] == "–" and "steps" not in heads
    assert Path("runs/compare/runs/runs.png").stat().st_size > 5000
    assert call(monkeypatch, compare, "--runs", "one", "nowhere") == 2
    assert "nowhere is not a run" in capsys.readouterr().err


def test_one_damaged_run_does_not_block_the_others(run_train, run_sample, capsys):
    assert run_train("--stage", "0", "--steps", "2") == 0
    shutil.copytree("runs/stage0_gpt-words-seed0", "runs/torn")
    Path("runs/torn/config.json").write_text("{")
    capsys.readouterr()
    assert run_sample("--stage", "0", "--prompt", "a", "--max-new-tokens", "1") == 0
    assert "left out: runs/torn/config.json is damaged" in capsys.readouterr().err


# Two at once


HOLD = "import sys, time; from lab.storage import locks\n"
HOLD += "with locks.held(sys.argv[1]): print(flush=True); time.sleep(60)"


@pytest.fixture
def holder():
    """holder(path): another process that holds the lock; returns it."""
    with contextlib.ExitStack() as started:

        def start(path):
            command = [sys.executable, "-c", HOLD, Path(path).resolve()]
            process = started.enter_context(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE))
            started.callback(process.kill)
            assert process.stdout.readline() == b"\n"
            return process

        yield start


def test_a_run_that_is_being_trained_is_not_trained_twice(run_train, holder, capsys):
    assert run_train("--stage", "0", "--steps", "2", "--out", "run") == 0
    before = Path("run/metrics.jsonl").read_bytes()
    process = holder(runs.lock_file(Path("run")))
    capsys.readouterr()
    assert run_train("--resume", "--out", "run", "--steps", "4") == 2
    err = capsys.readouterr().err
    assert f"run is being trained by process {process.pid}" in err and len(err.splitlines()) == 2
    assert Path("run/metrics.jsonl").read_bytes() == before
    process.kill()
    process.wait()
    assert run_train("--resume", "--out", "run", "--steps", "4") == 0  # the lock ended with the process


def test_a_run_without_a_checkpoint_yet_is_not_called_dead(run_train, holder, capsys):
    assert run_train("--stage", "0", "--steps", "2", "--out", "run") == 0
    shutil.rmtree("run/best")
    shutil.rmtree("run/last")
    process = holder(runs.lock_file(Path("run")))
    for flags in (("--resume",), ("--stage", "0")):
        capsys.readouterr()
        assert run_train(*flags, "--out", "run") == 2
        assert f"run is being trained by process {process.pid}" in capsys.readouterr().err


def test_training_holds_the_lock_until_its_end(run_train, monkeypatch):
    """Another process would be refused in the middle of it."""
    seen = []

    def evaluate(*_):
        script = "import sys; from lab.storage import locks\nwith locks.held(sys.argv[1]): pass"
        command = [sys.executable, "-c", script, Path("run/.lock").resolve()]
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        seen.append(second.stderr.splitlines()[-1])
        return 1.0

    monkeypatch.setattr(train.evaluation, "next_token_loss", evaluate)
    assert run_train("--stage", "0", "--steps", "1", "--out", "run") == 0
    assert seen == [f"lab.storage.locks.Taken: process {os.getpid()} holds the lock"]


def planned(workshop, *flags):
    wanted, all_flags = wanted_runs.wanted_settings("stage0_gpt", 0, [*SHORT, *flags])
    folder = runs.RUNS / "compare/laptop/stage0_gpt-words-seed0"
    return wanted_runs.Run(wanted, all_flags, "words", folder)


def test_a_comparison_does_not_clear_a_run_that_another_one_has_begun(workshop, holder):
    run = planned(workshop)
    run.folder.mkdir(parents=True)
    (run.folder / "config.json").write_text("{}")
    process = holder(runs.lock_file(run.folder))
    with pytest.raises(locks.Taken, match=str(process.pid)), run.claimed():
        pass
    assert (run.folder / "config.json").exists()
    process.kill()
    process.wait()
    with run.claimed():
        assert not run.folder.exists()  # what a killed run leaves is cleared


def test_a_comparison_leaves_a_folder_that_got_other_settings_alone(workshop, run_train):
    """Two comparisons that begin together plan the same name for runs of different settings."""
    run = planned(workshop, "--lr", "0.5")
    trained_elsewhere = ["--stage", "0", "--steps", "2", "--out", str(run.folder)]
    assert run_train(*trained_elsewhere) == 0
    with run.claimed():
        assert run.folder.name == "stage0_gpt-words-seed0-2" and not run.folder.exists()


def test_two_comparisons_at_once_train_each_run_once(workshop):
    flags = [
        "--stages",
        "0,1",
        "--seeds",
        "1",
        "--rounds",
        "0",
        *SHORT,
        "--steps",
        "40",
        "--eval-every",
        "20",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "compare.py"), *flags]
    options = {"cwd": workshop, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    both = [subprocess.Popen(command, text=True, **options) for _ in range(2)]
    ended = [(process.communicate(timeout=240), process.returncode) for process in both]
    assert [status for _, status in ended] == [0, 0], ended
    made = sorted(path.parent.name for path in workshop.glob("runs/compare/laptop/*/config.json"))
    assert made == ["stage0_gpt-words-seed0", "stage1_rmsnorm-words-seed0"]
    for folder in workshop.glob("runs/compare/laptop/*/metrics.jsonl"):
        steps = [json.loads(line)["step"] for line in folder.read_text().splitlines()]
        assert steps == sorted(set(steps)) and steps[-1] == 40
        assert "resumed" not in runs.read_config(folder.parent)


def test_a_signal_to_a_comparison_alone_reaches_its_run(workshop):
    flags = ["--stages", "0", "--seeds", "1", "--rounds", "0", *SHORT, "--steps", "100000"]
    flags += ["--eval-every", "50"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen(
        [sys.executable, str(ROOT / "compare.py"), *flags], cwd=workshop, env=environment
    )
    folder = workshop / "runs/compare/laptop/stage0_gpt-words-seed0"
    deadline = time.monotonic() + 120
    while not checkpoint.exists(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    parent.send_signal(signal.SIGINT)
    assert parent.wait(timeout=120) == 130
    with locks.held(runs.lock_file(folder)):  # nobody is training it any more
        assert 0 < checkpoint.step(folder) < 100000


def test_a_closed_terminal_stops_a_run_after_a_save(run_train, monkeypatch):
    stop_at(monkeypatch, 5, signal.SIGHUP)
    assert run_train("--stage", "0", "--steps", "8", "--out", "run") == 128 + signal.SIGHUP
    assert checkpoint.step(Path("run")) == 5


def test_a_run_under_nohup_does_not_heed_a_closed_terminal(run_train, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop_at(monkeypatch, 5, signal.SIGHUP)
        assert run_train("--stage", "0", "--steps", "8", "--out", "run") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


# Files of other versions


def change(path, **changes):
    """Sets fields of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_a_run_of_a_newer_version_is_refused_in_a_sentence(run_train, run_sample, capsys):
    assert run_train("--stage", "0", "--steps", "2", "--out", "run") == 0
    change(Path("run/config.json"), format=99)
    capsys.readouterr()
    assert run_sample("--run", "run", "--prompt", "a") == 2
    err = capsys.readouterr().err
    assert "run/config.json has format 99" in err and len(err.splitlines()) == 2
    assert run_train("--resume", "--out", "run", "--steps", "3") == 2
    assert "run/config.json has format 99" in capsys.readouterr().err


def rewrite_state(change):
    path = Path("run/last/state.pt")
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def test_a_run_of_the_first_format_is_resumed_bit_for_bit(run_train, workshop, monkeypatch):
    """config.json without a number and a hash, state.pt with one process's generator under another name."""
    flags = (
        "--stage",
        "0",
        "--model.dropout",
        "0.1",
        "--steps",
        "8",
        "--eval-every",
        "4",
        "--log-every",
        "1",
    )
    assert run_train(*flags, "--out", "whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        assert run_train(*flags, "--out", "run") == 128 + signal.SIGTERM
    change(Path("run/config.json"), format=None, code=None)

    def older(state):
        del state["format"]
        state["rng"] = state.pop("rngs")[0]
        del state["progress"]["tokens"]

    rewrite_state(older)
    assert run_train("--resume", "--out", "run") == 0
    assert metrics("run") == metrics("whole")


def test_a_state_without_what_resuming_needs_is_refused_in_a_sentence(run_train, capsys):
    assert run_train("--stage", "0", "--steps", "2", "--out", "run") == 0
    rewrite_state(lambda state: state.pop("rngs"))
    capsys.readouterr()
    assert run_train("--resume", "--out", "run", "--steps", "3") == 2
    err = capsys.readouterr().err
    assert "without rngs: it cannot be resumed" in err and "--init-from run" in err
    assert run_train("--stage", "0", "--init-from", "run", "--steps", "1") == 0


def test_settings_of_another_version_are_named(run_train, capsys):
    assert run_train("--stage", "0", "--steps", "2", "--out", "run") == 0
    config = runs.read_config(Path("run"))
    change(Path("run/config.json"), settings=config["settings"] | {"momentum": 0.9})
    capsys.readouterr()
    assert run_train("--resume", "--out", "run", "--steps", "3") == 2
    assert "with momentum, which this one does not have" in capsys.readouterr().err


def test_every_file_of_a_run_has_a_format_number(run_train):
    assert run_train("--stage", "0", "--steps", "2", "--out", "run") == 0
    assert json.loads(Path("run/config.json").read_text())["format"] == formats.RUN
    assert torch.load("run/last/state.pt", weights_only=True)["format"] == formats.RUN
    for name in ("best", "last"):
        assert checkpoint.metadata(Path("run", name))["run_format"] == str(formats.RUN)


def test_results_of_a_newer_version_are_not_overwritten(copied, monkeypatch, capsys):
    trained(monkeypatch, "--stage", "3")
    folder = copied / "out"
    folder.mkdir()
    runs.write_json(folder / "results.json", {"format": 99})
    flags = ("--only-draw", "--stages", "3", "--seeds", "1", "--out", "out")
    assert call(monkeypatch, compare, *flags, *SHORT) == 2
    assert "out/results.json has format 99" in capsys.readouterr().err
    assert json.loads((folder / "results.json").read_text()) == {"format": 99}


def test_prepared_data_of_a_newer_version_is_refused_in_a_sentence(run_train, workshop, capsys):
    assert run_train("--stage", "0", "--steps", "1") == 0
    (meta,) = workshop.glob("data/tokens/*/meta.json")
    assert json.loads(meta.read_text())["format"] == formats.DATA
    change(meta, format=99)
    capsys.readouterr()
    assert run_train("--stage", "0", "--steps", "1") == 2
    assert "meta.json has format 99" in capsys.readouterr().err
    change(meta, format=None)  # of the first version
    assert run_train("--stage", "0", "--steps", "1") == 0


def test_a_misspelt_data_set_gets_a_guess(run_train, capsys):
    assert run_train("--stage", "0", "--data", "tinyshakespear") == 2
    assert "did you mean tinyshakespeare?" in capsys.readouterr().err
