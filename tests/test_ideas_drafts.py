"""Where multi-token prediction pays: what is compared is what the page says."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call

import data
from benchmarks import ideas
from benchmarks.ideas import drafts
from lab import stages
from lab.pages import lessons
from lab.sampling import generation
from lab.storage import runs

SIZES = {"vocab_size": 5, "block_size": 24, "n_layer": 2, "n_head": 2, "n_embd": 32}  # chance accepts a fifth
PROMPTS = [[0, 1, 2, 3, 4, 0, 2, 4], [3] * 12]


@pytest.fixture(scope="module")
def model():
    """A tiny model of stage 7, with weights large enough that its text is no repetition."""
    torch.manual_seed(0)
    stage = stages.load("stage7_mla_mtp")
    model = stage.GPT(stage.GPTConfig(**SIZES)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def passes(model, monkeypatch):
    """The passes over few tokens, which only a test does not compile; `sizes` counts their tokens."""
    sizes = []

    def compile(**options):
        assert options["dynamic"] is False
        return lambda function: lambda *given: sizes.append(given[0].size(1)) or function(*given)

    monkeypatch.setattr(torch, "compile", compile)
    made = drafts.CompiledPasses(model, 4)
    made.sizes = sizes
    return made


@pytest.mark.parametrize("n_drafts", [0, 1, 3])
def test_compiled_passes_write_the_same_text_beyond_the_context(model, passes, n_drafts):
    expected = drafts.decode(model, PROMPTS, 0.0, 30, 0, None)
    assert len(set(expected[0])) > 1
    assert drafts.decode(passes, PROMPTS, 0.0, 30, n_drafts, generation.DraftCounts()) == expected
    assert max(passes.sizes) == n_drafts + 1  # longer passes are not compiled


def test_compiled_passes_draw_the_same_tokens_by_chance(model, passes):
    counts, counts_of_passes = generation.DraftCounts(), generation.DraftCounts()
    expected = drafts.decode(model, PROMPTS, 0.8, 20, 2, counts)
    assert drafts.decode(passes, PROMPTS, 0.8, 20, 2, counts_of_passes) == expected
    assert counts == counts_of_passes
    assert counts.accepted > 10


def test_without_mtp_a_run_gets_as_many_steps_as_the_flops_allow(monkeypatch, tmp_path):
    asked = {}

    def trained(name, flags):
        asked[name] = flags
        steps = int(flags[flags.index("--steps") + 1]) if "--steps" in flags else 2000
        return None, [{"tokens": steps * 768, "val_loss": 1.7, "seconds": 100.0}]

    monkeypatch.setattr(ideas, "trained", trained)
    monkeypatch.setattr(lessons, "IDEAS", tmp_path)
    assert call(monkeypatch, drafts, "--only", "loss", "--seeds", "1") == 0
    ways = json.loads((tmp_path / "drafts-loss.json").read_text())["ways"]
    flops = {name: way["flops"] for name, way in ways.items()}
    assert flops["without, equal FLOPs"] == pytest.approx(flops["with MTP"], rel=1e-3)
    assert flops["without, equal steps"] < 0.8 * flops["with MTP"]
    assert asked["stage7-seed0"][:2] == ["--stage", "7"]
    assert asked["stage7a-seed0"] == ["--stage", "7a", "--seed", "0"]  # as in benchmarks/ideas/latents.py
    assert "../results/ideas/drafts-loss.png" in lessons.where_it_pays("drafts-loss")


def test_one_command_measures_each_model_with_prompts_of_its_own_text(model, passes, monkeypatch, tmp_path):
    asked, prompted = [], []
    monkeypatch.setattr(
        ideas, "trained", lambda name, flags: asked.append((name, flags)) or (name, [{"val_loss": 1.7}])
    )
    monkeypatch.setattr(runs, "load", lambda *_: (model, {}))
    texts = {"tinyshakespeare": np.arange(60, dtype=np.uint16) % 5, "pycode": np.full(60, 3, np.uint16)}
    monkeypatch.setattr(data, "load", lambda text: prompted.append(text) or SimpleNamespace(val=texts[text]))
    monkeypatch.setattr(drafts, "PROMPTS", 2)
    monkeypatch.setattr(drafts, "PROMPT_TOKENS", 9)
    monkeypatch.setattr(lessons, "IDEAS", tmp_path)
    names = ["n_embd 128", "n_embd 128, Python code"]
    flags = ["--only", "drafts", "--seeds", "2", "--rounds", "1", "--tokens", "4", "--models", *names]
    assert call(monkeypatch, drafts, *flags) == 0
    assert prompted == ["tinyshakespeare", "tinyshakespeare", "pycode", "pycode"]
    name, flags = asked[3]
    assert name == "drafts-pycode-seed1" and flags[:4] == ["--stage", "7", "--data", "pycode"]
    assert flags[-2:] == ["--seed", "1"]
    measured = json.loads((tmp_path / "drafts.json").read_text())
    assert list(measured["models"]) == names
    assert len(measured["table"]["rows"]) == len(names) * len(drafts.TEMPERATURES)
    rows = measured["models"]["n_embd 128"]["by_temperature"]["0.8"]["drafts"]
    assert rows.keys() == {"1", "2", "3"}
    assert all(0 <= row["accepted"]["mean"] <= 1 for row in rows.values())
    assert all(len(row["compiled_speed_up"]["values"]) == 2 for row in rows.values())
    assert "../results/ideas/drafts-dark.png" in lessons.where_it_pays("drafts")


def test_a_value_over_seeds_is_the_mean_of_its_own_kind():
    made = [{"tokens_per_second": 4.0, "drafts": {1: {"accepted": share}}} for share in (0.5, 0.7)]
    over = drafts.over_seeds(made)
    assert over["tokens_per_second"] == {"mean": 4.0, "std": 0.0, "values": [4.0, 4.0]}
    assert over["drafts"][1]["accepted"]["mean"] == pytest.approx(0.6)
    assert over["drafts"][1]["accepted"]["values"] == [0.5, 0.7]


def test_an_unknown_model_is_named(monkeypatch, capsys):
    assert call(monkeypatch, drafts, "--only", "drafts", "--models", "n_embd 512") == 2
    assert "n_embd 512" in capsys.readouterr().err
