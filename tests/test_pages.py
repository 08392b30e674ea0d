"""The pages are true: their generated parts, links and commands."""

import math
import re
import shlex

import pytest

from lab import parallel, stages
from lab.comparison import markdown
from lab.pages import lessons, scale
from lab.training import settings

PAGES = {str(path.relative_to(stages.ROOT)): (path, name) for path, name in lessons.pages().items()}
TEXTS = [path for path, _ in PAGES.values()]
TEXTS += [stages.ROOT / "CONTRIBUTING.md", stages.ROOT / "family" / "deepseek_v3" / "README.md"]
TEXTS += [stages.ROOT / "docs" / f"{name}.md" for name in ("many-devices", "learning-path", "glossary")]


# By page and part of results.json: the tables made of it.
MEASURED = {
    ("front", "stages"): {"rates", "ladder"},
    ("benchmarks", "against_nanogpt"): {"nanogpt"},
    ("benchmarks", "against_transformers"): {"transformers"},
    ("benchmarks", "pretrained"): {"pretrained", "programs"},
    ("benchmarks", "step_profile"): {"step_profile"},
    ("benchmarks", "compiled_sampling"): {"compiled_sampling"},
    ("serving", "serving"): {"throughput", "waste"},
    ("stage5_flash", "attention"): {"crossover"},
    ("stage6_moe", "moe"): {"balancing", "speeds"},
    ("stage7_mla_mtp", "mla"): {"training", "caches"},
}


@pytest.mark.parametrize("path, name", PAGES.values(), ids=PAGES.keys())
def test_tables_and_diffs_are_those_of_the_code_and_the_measurements(path, name):
    """If this fails: python -m lab.pages.lessons."""
    page = path.read_text()
    results = lessons.read_results()
    assert lessons.filled(page, name, results) == page
    parts = set(re.findall(r"<!-- (\w+) -->\n[^<]", page)) - {"end"}
    expected = {"table", "diff"}
    if name == "scale":
        expected = set(scale.tables(results))
    elif name in ("front", "serving"):
        expected = set()
    elif name in ("benchmarks", "stage0_gpt"):
        expected = {"table"}
    elif name == "quantization":
        expected = {"quantization"}
    elif name == "stage7_mla_mtp":
        expected |= {"table7a", "diff7a"}
    elif name in stages.relatives():
        expected = {"diff"}
    if name in (*stages.COURSE, "quantization", "serving"):
        expected.add("exercises")
    for (page_name, part_of), names in MEASURED.items():
        if page_name == name and part_of in results:
            expected |= names
    assert parts == expected


@pytest.mark.parametrize("path", TEXTS, ids=str)
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)  # code is full of ](
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", TEXTS, ids=str)
def test_commands_have_flags_that_exist(path, monkeypatch):
    text = path.read_text().replace("\\\n", " ")  # a command over several lines
    for starter, flags in re.findall(r"(python|torchrun [^`\n|]*) train\.py ([^`\n|]*)", text):
        if "--stage" in flags and "--help" not in flags:
            # A reader's own text, variant and solution.
            flags = re.sub(r"my_\w+|my/stage\d\.py", "3", flags.replace("my.txt", __file__))
            parsed = settings.parse([*shlex.split(flags), "--device", "cpu"])
            processes = re.findall(r"--(?:nnodes|nproc-per-node) (\d+)", starter)
            monkeypatch.setattr(parallel, "WORLD_SIZE", math.prod(map(int, processes)))
            parallel.micro_batch(parsed.batch_size, parsed.micro_batch_size)


def test_all_results_are_small_enough_to_carry():
    sizes = [file.stat().st_size for file in (stages.ROOT / "results").rglob("*") if file.is_file()]
    assert sum(sizes) < 3 * 2**20


def test_the_machine_stands_beside_the_numbers():
    results = lessons.read_results()
    for measured in (results, results["against_nanogpt"]):
        assert measured["machine"]["processor"] and measured["machine"]["versions"]["torch"]
    assert results["dataset"] == results["against_nanogpt"]["dataset"] == "tinyshakespeare"


def test_every_cell_of_a_table_stays_one_cell():
    """An empty one, one without a value, one with a bar, one that is a number."""
    assert markdown.table(["", "b"], [["", None], ["x|y", 1]]) == "| | b |\n|---|---|\n| | – |\n| x\\|y | 1 |"
