"""The measurements of where RMSNorm, RoPE and SwiGLU pay."""

import json
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_MODEL, TINY_RUN, call
from PIL import Image

import train
from benchmarks import ideas
from benchmarks.ideas import copying, gates, norms, positions
from data.tokenizers import CharTokenizer
from lab import stages
from lab.pages import lessons
from lab.storage import runs
from lab.training import cost, log


@pytest.fixture
def measure(workshop, monkeypatch):
    """measure(script, *flags): runs a script with tiny models, in this process; returns what it wrote."""

    def trained(name, flags):
        folder = runs.RUNS / "ideas" / name
        if not folder.exists():
            options = ["--data", "words.txt", "--steps", "4", *flags, *TINY_RUN, "--device", "cpu"]
            options += ["--out", folder]
            assert call(monkeypatch, train, *options) == 0
        return folder, log.read_metrics(folder / "metrics.jsonl")

    monkeypatch.setattr(ideas, "trained", trained)
    monkeypatch.setattr(lessons, "IDEAS", workshop / "ideas")

    def run(script, *flags):
        name = script.__name__.rpartition(".")[2]
        monkeypatch.setattr(sys, "argv", [name, *flags])
        script.main()
        for picture in (f"{name}.png", f"{name}-dark.png"):
            assert Image.open(lessons.IDEAS / picture).mode == "P"  # few colours, few bytes
        return json.loads((lessons.IDEAS / f"{name}.json").read_text())

    return run


def test_norms_are_measured_with_and_without_the_backward_pass(measure, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda norm, **options: norm)  # it would take seconds
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(norms.device, "require_compiler", lambda device: None)
    flags = ["--widths", "8", "16", "--tokens", "4", "--rounds", "2", "--dtypes", "bfloat16"]
    made = measure(norms, *flags)
    for width in (8, 16):
        forward, both = made["norms"]["bfloat16"][str(width)].values()
        numbers = 4 * width
        assert forward["least_bytes"] == 2 * (2 * numbers)  # reads x, writes y
        assert both["least_bytes"] == 2 * (5 * numbers)  # also reads x and y's gradient, writes x's
        assert both["milliseconds"].keys() == norms.LOOKS.keys() - {"copy"}
        for name, milliseconds in forward["milliseconds"].items():
            gb_per_second = forward["effective_gb_per_second"][name]
            assert gb_per_second == pytest.approx(forward["least_bytes"] / 1e6 / milliseconds)
    assert [row[1] for row in made["table"]["rows"]] == ["8", "16"]


@pytest.fixture
def rope_model():
    stage = stages.load("stage2_rope")
    model = stage.GPT(stage.GPTConfig(**TINY_MODEL)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # so that positions matter
    return model


def test_the_loss_by_position_is_that_of_the_token_after_it(rope_model):
    tokens = torch.randint(65, (50,))
    of = positions.losses([rope_model], tokens, torch.tensor([20, 49]), 6)
    logits, _ = rope_model(torch.stack([tokens[14:20], tokens[43:49]]))
    expected = -logits.log_softmax(-1)[[0, 1], -1, tokens[[20, 49]]].mean()
    torch.testing.assert_close(of[0, -1], expected)
    assert of.shape == (1, 6)


def test_scaled_angles_are_the_plain_ones_at_the_length_of_training():
    plain = stages.load("stage2_rope").rotation(torch.arange(64), 32, 10000.0)
    for rotation in positions.rotations(64, 64).values():
        torch.testing.assert_close(rotation(torch.arange(64), 32, 10000.0), plain)


def test_scaling_slows_the_slowest_pair_by_the_factor_and_linear_scaling_every_pair():
    at = torch.tensor([1])
    plain, larger_theta, linear, yarn = (
        torch.atan2(*reversed(rotation(at, 32, 10000.0))).flatten()
        for rotation in positions.rotations(64, 512).values()
    )
    torch.testing.assert_close(linear, plain / 8)
    for scaled in (larger_theta, yarn):
        torch.testing.assert_close(scaled[[0, -1]], torch.stack([plain[0], plain[-1] / 8]))


def test_positions_are_measured_at_every_length_that_a_model_can_read(measure, monkeypatch, workshop):
    prepared = positions.data.load(str(workshop / "words.txt"))
    monkeypatch.setattr(positions, "data", SimpleNamespace(load=lambda name: prepared))
    plain = stages.load("stage2_rope").rotation
    made = measure(positions, "--seeds", "2", "--lengths", "8", "32", "--windows", "20")
    assert stages.load("stage2_rope").rotation is plain
    assert {name: list(of) for name, of in made["loss_of_the_last_tokens"].items()} == {
        "learned": ["8"],
        **{name: ["8", "32"] for name in positions.COLORS},
    }
    rope = {name: of for name, of in made["loss_of_the_last_tokens"].items() if name != "learned"}
    assert len({of["8"]["mean"] for of in rope.values()}) == 1
    assert len({of["32"]["mean"] for of in rope.values()}) == len(rope)
    assert len(made["loss_by_position"]["RoPE"]) == 8
    assert made["table"]["rows"][0][-1] is None


def test_a_digit_is_followed_by_the_letter_to_which_it_refers():
    text = copying.puzzle(random.Random(0), 5000)
    digits = [i for i in range(len(text) - 1) if text[i].isdigit()]
    assert {text[i] for i in digits} == set(copying.DIGITS)
    for i in digits:
        assert text[i + 1] == text[i + 1 - 2 ** int(text[i])] in copying.LETTERS


def test_a_model_that_obeys_the_digits_copies_everything_right(monkeypatch):
    tokenizer = CharTokenizer(copying.puzzle(random.Random(0), 500))
    distances = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    distances[torch.from_numpy(tokenizer.encode(copying.DIGITS)).long()] = torch.tensor(copying.DISTANCES)

    def model(idx, mistaken_by=0):
        sources = torch.arange(idx.size(1)) + 1 - distances[idx] - mistaken_by
        copies = idx.gather(1, sources.clamp(0, idx.size(1) - 1))
        return torch.nn.functional.one_hot(copies, tokenizer.vocab_size), {}

    monkeypatch.setattr(runs, "tokenizer", lambda folder: tokenizer)
    monkeypatch.setattr(runs, "load", lambda *arguments: (model, {}))
    right = copying.copied(None, 200)
    assert right.shape == (len(copying.DISTANCES), 128)
    for distance, of in zip(copying.DISTANCES, right, strict=True):
        assert of[: distance - 1].isnan().all() and (of[distance - 1 :] == 1).all()
    monkeypatch.setattr(runs, "load", lambda *arguments: (lambda idx: model(idx, mistaken_by=1), {}))
    assert copying.copied(None, 200).nanmean() < 0.2


def test_copying_is_measured_by_distance_and_by_position(measure, monkeypatch):
    monkeypatch.setattr(copying, "SIZES", [])
    monkeypatch.setattr(copying, "LENGTH", 5000)
    monkeypatch.setattr(copying, "STAGES", {"RoPE": "stage2_rope"})  # a tiny stage 1 has too few positions
    made = measure(copying, "--seeds", "2", "--steps", "4", "--texts", "40")
    assert made["share_right_by_distance"].keys() == {f"RoPE, {place}" for place in copying.PLACES}
    for of in made["share_right_by_distance"].values():
        assert list(of) == [str(distance) for distance in copying.DISTANCES]
        assert all(0 <= value <= 1 for summary in of.values() for value in summary["values"])
    assert [len(of) for of in made["share_right_by_position"]["RoPE"]] == [128, 128]
    assert [[step for step, _ in of] for of in made["val_loss_by_step"]["RoPE"]] == [[1, 2, 3, 4]] * 2


def test_the_mlps_that_are_compared_have_equally_many_parameters_and_flops(workshop):
    sizes = TINY_MODEL | {"n_embd": 128}
    models = []
    for name in ("stage3_swiglu", *map(gates.write_variant, gates.ACTIVATIONS)):
        stage = stages.load(name)
        models.append(stage.GPT(stage.GPTConfig(**sizes)))
    assert len({cost.parameters(model) for model in models}) == 1
    assert len({cost.flops_per_token(model) for model in models}) == 1
    x, gelu, relu2 = torch.randn(3, 128), models[1].model.layers[0].mlp, models[2].model.layers[0].mlp
    torch.testing.assert_close(relu2(x), relu2.down_proj(relu2.up_proj(x).clamp(min=0) ** 2))
    torch.testing.assert_close(
        gelu(x), gelu.down_proj(torch.nn.functional.gelu(gelu.up_proj(x), approximate="tanh"))
    )


def test_each_mlp_is_measured_with_all_seeds_at_its_best_rate(measure, monkeypatch):
    monkeypatch.setattr(gates.moe, "training_step", lambda stage, dtype: lambda: None)
    monkeypatch.setattr(ideas, "rates_around_the_best", lambda loss, rate: {r: loss(r) for r in (rate, 1e-2)})
    flags = ["--steps", "3", "--choosing-seeds", "1", "--seeds", "2", "--rounds", "2"]
    made = measure(gates, *flags)
    for of in made["mlps"].values():
        tried = {rate: each["values"] for rate, each in of["tried"].items()}
        assert of["best_rate"] == min(tried, key=lambda rate: tried[rate][0])
        assert of["at_best"]["values"][:1] == tried[of["best_rate"]]
        assert len(of["at_best"]["values"]) == 2
    assert len({of["parameters"] for of in made["mlps"].values()}) == 1
