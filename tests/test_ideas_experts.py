"""benchmarks/ideas/experts.py and specialists.py, both at a tiny size, and what their figures mean."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import call

import train
from benchmarks import ideas
from benchmarks.ideas import experts, specialists
from lab.pages import lessons
from lab.training import log

TINY = ["--model.n-layer", "2", "--model.n-head", "2", "--model.n-embd", "16", "--model.block-size", "8"]


@pytest.fixture(scope="module")
def written(tmp_path_factory, text):
    """The folder of what both scripts write at a tiny size. train.py runs in this process."""
    folder = tmp_path_factory.mktemp("experts")
    (folder / "code.txt").write_text(text[:6000].replace("a", "  [A]_").replace("b", "'7', 1\n    "))
    with pytest.MonkeyPatch.context() as patch:

        def trained(name, flags):
            if not (folder / name).exists():
                assert call(patch, train, "--device", "cpu", *flags, "--out", folder / name) == 0
            return folder / name, log.read_metrics(folder / name / "metrics.jsonl")

        patch.setenv("DATA_DIR", str(folder / "data"))
        patch.setattr(ideas, "trained", trained)
        patch.setattr(lessons, "IDEAS", folder / "ideas")
        patch.setattr(experts, "SIZES", TINY)
        patch.setattr(experts, "DATA", str(folder / "code.txt"))
        patch.setattr(specialists, "RARE", 1)
        patch.setattr(ideas, "rates_around_the_best", lambda loss, _: {r: loss(r) for r in (0.0001, 0.01)})
        small = ["--seeds", "2", "--steps", "4"]
        assert call(patch, experts, *small, "--rounds", "1") == 0
        assert call(patch, specialists, *small, "--characters", "500") == 0
        tables = {idea: lessons.where_it_pays(idea) for idea in ("experts", "specialists", "favourites")}
        assert "| 64 experts |" in tables["experts"] and "| 1 | 7 |" in tables["favourites"]
        assert all(tables[idea].startswith("<picture>") for idea in ("experts", "specialists"))
    return folder / "ideas"


def read(folder, idea):
    return json.loads((folder / f"{idea}.json").read_text())


def test_losses_are_measured_at_equal_active_parameters_for_every_seed(written):
    models = read(written, "experts")["models"]
    assert list(models) == list(experts.MODELS)
    dense = models["dense"]
    for name, row in models.items():
        assert len(row["val_losses"]) == len(row["final"]["values"]) == 2
        assert row["steps"][-1] == 4 * experts.MODELS[name][1]
        assert row["active_parameters"] == pytest.approx(dense["active_parameters"], rel=0.5)
    totals = [models[name]["parameters"] for name in experts.MIXTURES]
    assert dense["parameters"] < totals[0] < totals[1] < totals[2]


def test_every_model_is_trained_at_the_best_of_the_rates_tried(written):
    results = read(written, "experts")
    assert list(results["tried"]) == ["dense", *experts.MIXTURES]
    for name, losses in results["tried"].items():
        assert list(losses) == ["0.0001", "0.01"]
        assert results["models"][name]["final"]["values"][0] == losses[str(results["rates"][name])]
        assert losses[str(results["rates"][name])] == min(losses.values())
    assert all(results["rates"][name] == results["rates"]["dense"] for name in experts.LONGER)


def test_pictures_are_drawn_for_light_and_dark_pages(written):
    pictures = {path.name for path in written.glob("*.png")}
    assert pictures == {"experts.png", "experts-dark.png", "specialists.png", "specialists-dark.png"}


def test_seconds_are_steps_times_a_step_of_the_dense_model_times_the_ratio():
    rows = {
        "dense": {"seconds_per_step": 0.5, "of_the_dense_step": 1.0, "steps": [60, 120]},
        "8 experts": {"seconds_per_step": 9.0, "of_the_dense_step": 1.5, "steps": [60, 120]},
    }
    assert experts.minutes(rows, "dense").tolist() == [0.5, 1.0]
    assert experts.minutes(rows, "8 experts").tolist() == [0.75, 1.5]


def test_information_is_measured_in_every_layer_of_every_seed(written):
    bits = read(written, "specialists")["bits"]
    assert len(bits) == 2 and all(len(layers) == 2 for layers in bits)
    for layer in (*bits[0], *bits[1]):
        assert 0 <= layer["shuffled"] < layer["most"] and 0 < layer["itself"] <= layer["most"]


def test_the_second_control_was_never_trained_and_has_the_seeds_of_the_runs(written):
    trained, never = (read(written, "specialists")[key] for key in ("bits", "bits never trained"))
    assert [len(layers) for layers in never] == [2, 2] and never[0] != never[1]
    for layer in (*never[0], *never[1]):
        assert layer["shuffled"] < layer["itself"] <= layer["most"]
        assert layer not in (*trained[0], *trained[1])


def test_the_untrained_model_is_the_runs_own_before_its_first_step(run_train, workshop, monkeypatch):
    monkeypatch.setattr(experts, "DATA", "words.txt")
    still = ["--lr", "1e-12", "--min-lr", "0", "--model.bias-update-speed", "0", "--seed", "3"]
    assert run_train("--stage", "6", *TINY, "--steps", "1", *still, "--out", "run") == 0
    (_, before), (_, after) = (specialists.routing(Path("run"), 100, trained) for trained in (False, True))
    assert (before == after).all()


def test_a_router_that_reads_the_character_knows_it_and_one_that_reads_the_next_knows_that():
    codes = np.random.default_rng(0).integers(8, size=8001)
    text = "".join("abcdefgh"[code] for code in codes)
    pairs = np.stack([codes // 2, codes // 2 + 4], axis=1)  # two experts for every two characters
    first, second = specialists.information(text, np.stack([pairs[:-1], pairs[1:]]))
    assert first["itself"] == pytest.approx(first["most"]) == pytest.approx(2, abs=0.01)
    assert second["next"] == pytest.approx(2, abs=0.01)
    for nothing in (first["shuffled"], first["before"], first["next"], second["itself"]):
        assert 0 < nothing < 0.01
    (third,) = specialists.information("ab" * 50, np.random.default_rng(0).integers(8, size=(1, 99, 2)))
    assert third["most"] == pytest.approx(1, abs=0.01)  # all that there is to know about two characters


def test_information_is_that_of_the_definition():
    labels = np.array([0, 0, 0, 1])
    chosen = np.array([[0], [0], [1], [1]])
    joint = {(0, 0): 2, (0, 1): 1, (1, 1): 1}
    of_label, of_expert = {0: 3, 1: 1}, {0: 2, 1: 2}
    bits = sum(
        n / 4 * math.log2(n / 4 / (of_label[label] / 4 * of_expert[expert] / 4))
        for (label, expert), n in joint.items()
    )
    assert specialists.mutual_information(labels, chosen) == pytest.approx(bits)


def test_the_control_has_the_same_choices_by_other_characters():
    chosen = np.stack([np.arange(100), np.arange(100) + 100], axis=1)
    control = specialists.shuffled(chosen, 0)
    assert (control != chosen).any() and sorted(control.tolist()) == chosen.tolist()


def test_a_router_without_context_knows_no_more_of_the_neighbours_than_the_character_does():
    codes = np.random.default_rng(0).integers(2, size=4001)
    codes[2::2] = codes[1:-1:2]  # in every second place the character before is repeated
    text = "".join("ab"[code] for code in codes)
    blind, seeing = (
        codes[:-1, None],
        (2 * codes[1:] + codes[:-1])[:, None],
    )  # the second one also sees the next
    first, second = specialists.information(text, np.stack([blind, seeing]))
    for neighbour in ("before", "next"):
        assert first[neighbour] == first[f"{neighbour} alike"] > 0.1
    assert second["next alike"] < 0.3 < 0.9 < second["next"]
    assert second["itself"] > 0.9  # shuffling among equals keeps what is known of the character


def test_a_character_is_loyal_if_nearly_all_of_it_uses_one_expert(monkeypatch):
    monkeypatch.setattr(specialists, "RARE", 20)
    characters = np.repeat([0, 1, 2], [20, 20, 19])  # the last one is rare
    layer = np.stack([np.zeros(59, int), np.arange(59) % 9 + 1], axis=1)
    assert specialists.loyal(characters, layer) == 1
    layer[:2, 0] = 10  # 90 % of the first character are left
    assert specialists.loyal(characters, layer) == 0.5


def test_spaces_at_the_start_of_a_line_are_a_class_of_their_own():
    text = "a  b\n  c"
    layer = np.array([[0, 1], [2, 1], [2, 1], [0, 1], [3, 1], [4, 1], [4, 0]])  # of all but the last
    shares = dict(zip(specialists.CLASSES, specialists.shares_of_classes(text, layer).tolist(), strict=True))
    assert shares["small letters"] == [1, 1, 0, 0, 0]
    assert shares["other spaces"] == [0, 1, 1, 0, 0]
    assert shares["indentation"] == [0.5, 0.5, 0, 0, 1]
    assert shares["digits"] == [0] * 5


def test_every_character_of_pycode_has_one_class():
    members = "".join(specialists.CLASSES.values())
    assert sorted(members) == [*"\n", *map(chr, range(32, 127))]


def test_favourites_are_listed_with_their_control(monkeypatch):
    monkeypatch.setattr(specialists, "RARE", 2)
    chosen = np.array([[[0, 1], [0, 1], [1, 2], [1, 2], [0, 2]]])
    rows = specialists.rows_of_favourites("aa``|x", chosen)
    assert [row[:4] for row in rows] == [
        [0, 0, "60%", "`a` 100%"],
        [0, 1, "80%", "backtick 100%, `a` 100%"],
        [0, 2, "60%", "backtick 100%"],
    ]
