"""The notebooks are up to date, run, and begin and end alike. `make notebooks` runs them at full length."""

import random
import re
import runpy
import string
import subprocess
import sys
from types import ModuleType

import matplotlib
import pytest

import train
from lab.errors import UserError
from lab.pages import notebooks
from lab.storage import runs

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from notebooks import helpers


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A reader in a hurry, with a small text: models are trained for a few steps, once for all notebooks."""
    folder = tmp_path_factory.mktemp("reader")
    draw = random.Random(0)
    words = re.findall(
        r"\w+", "But soft what light through yonder window breaks It is the east and Juliet is the sun"
    )
    lines = (f"ROMEO:\n{' '.join(draw.choices(words, k=7))}!\n" for _ in range(2600))
    (folder / "plays.txt").write_text(string.ascii_letters + string.punctuation + "\n" + "".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA_DIR", str(folder / "data"))
        patch.setattr(runs, "RUNS", folder / "runs")
        patch.setattr(helpers, "DATA", str(folder / "plays.txt"))
        patch.setattr(helpers, "QUICK", True)
        patch.setattr(train, "report", lambda *arguments: None)
        patch.setattr(plt, "show", lambda: plt.close("all"))
        yield


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of NumPy, when matplotlib gets a tensor
@pytest.mark.parametrize("source", notebooks.sources(), ids=lambda source: source.stem)
def test_a_notebook_runs_and_its_claims_hold(source, reader, monkeypatch):
    monkeypatch.chdir(notebooks.FOLDER)
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_path(str(source))


def test_a_model_is_trained_once_and_then_loaded(reader, monkeypatch):
    arguments = list(sys.argv)
    first, _ = helpers.trained("4", 600)
    assert sys.argv == arguments, "train.py's arguments are gone again"
    monkeypatch.setattr(train, "main", lambda: pytest.fail("it was trained again"))
    again, tokenizer = helpers.trained("4", 600)
    assert again.lm_head.weight.equal(first.lm_head.weight)
    assert tokenizer.vocab_size == again.config.vocab_size


def test_every_notebook_is_the_one_that_its_python_file_makes():
    made = {path.with_suffix(".ipynb"): notebooks.notebook(path.read_text()) for path in notebooks.sources()}
    assert sorted(made) == sorted(notebooks.FOLDER.glob("*.ipynb"))
    stale = [path.name for path, text in made.items() if path.read_text() != text]
    assert not stale, "python -m lab.pages.notebooks"


def test_make_notebooks_keeps_outputs_and_names_what_failed(tmp_path, monkeypatch, capsys):
    for name, code in (("1_right", "print(6 * 7)"), ("2_wrong", "assert 1 == 2, 'one is not two'")):
        (tmp_path / f"{name}.ipynb").write_text(notebooks.notebook(f"# %%\n{code}\n"))
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
    with pytest.raises(UserError, match=r"^failed: 2_wrong.ipynb$"):
        notebooks.run_all(tmp_path / "done")
    assert "one is not two" in capsys.readouterr().out
    assert "42" in (tmp_path / "done" / "1_right.ipynb").read_text()


def first_cell(source):
    return next(text for kind, text in notebooks.cells(source.read_text()) if kind == "code")


def test_all_notebooks_have_the_same_first_cell():
    assert len({first_cell(source) for source in notebooks.sources()}) == 1


def test_every_notebook_ends_with_two_questions_and_their_folded_answers():
    for source in notebooks.sources():
        kind, text = notebooks.cells(source.read_text())[-1]
        assert kind == "markdown" and text.count("<details><summary>Answer</summary>\n\n") == 2, source.name
        assert text.count("\n\n</details>") == 2 and text.endswith("</details>"), source.name


@pytest.mark.parametrize("missing", [(), ("typeguard", "tyro")])
def test_on_colab_the_first_cell_clones_the_course_and_installs_only_what_is_missing(
    missing, tmp_path, monkeypatch
):
    ran = []

    def run(command, **options):
        ran.append(command)
        if command[:2] == ["git", "clone"]:
            (tmp_path / "course").mkdir()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("builtins.input", lambda prompt: "https://example.com/course.git")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in missing else name)
    exec(first_cell(notebooks.sources()[0]), {})
    clone, *install = ran
    assert clone[-2:] == ["https://example.com/course.git", str(tmp_path / "course")]
    assert [command[-len(missing) - 1 :] for command in install] == [["--no-deps", *missing]] * bool(missing)
    assert sys.path[0] == str(tmp_path / "course")


def test_on_colab_a_wrong_address_is_explained_by_git(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    monkeypatch.setattr("builtins.input", lambda prompt: str(tmp_path / "nowhere"))
    with pytest.raises(AssertionError, match=r"nowhere.* does not exist"):
        exec(first_cell(notebooks.sources()[0]), {})


def test_the_first_cell_knows_every_package_that_the_course_needs():
    """Colab has torch, numpy and matplotlib; they must never be replaced."""
    import lab

    named = re.search(r"modules = \((.*)\)", first_cell(notebooks.sources()[0]))[1]
    assert {*lab.NEEDED} - {"torch", "numpy", "matplotlib"} <= {*re.findall(r'"(\w+)"', named)}
    assert not re.search("torch|numpy|matplotlib", named)
