"""Where shared key/value heads pay: the measurement, at tiny sizes."""

import json

import pytest
import torch

from benchmarks import ideas
from benchmarks.ideas import shared_heads
from lab import stages
from lab.comparison import timing
from lab.pages import lessons

SIZES = {"vocab_size": 50, "n_layer": 2, "n_head": 9, "n_embd": 36, "intermediate_size": 16}
HEAD = 2 * 2 * 4 * 2  # bytes that a key/value head takes for a token: k and v, layers, width, bfloat16


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(shared_heads, "SMOLLM2", SIZES)
    monkeypatch.setattr(shared_heads, "LAYER", (2, 8))
    monkeypatch.setattr(lessons, "IDEAS", tmp_path)


@pytest.mark.parametrize("n_kv_head", [9, 3, 1])
def test_a_step_attends_to_a_whole_context_of_its_own_for_each_text(n_kv_head):
    """As with a cache that the model itself has made, which holds the same keys and values."""
    model = shared_heads.smollm2(n_kv_head)
    memory = torch.randn(2 * 2 * 3 * n_kv_head * 5 * 4).bfloat16()
    cache = model.new_cache(3, 5)
    cache.keys, cache.values = memory.clone().view(2, *cache.keys.shape)
    cache.length = 4
    with torch.inference_mode():
        expected, _ = model(torch.zeros(3, 1, dtype=torch.int64), cache=cache)
    found = shared_heads.step(model, memory, 3, 5)
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found[0], found[1])  # their caches differ


def test_the_bytes_of_a_token_are_those_of_the_cache():
    model = shared_heads.smollm2(3)
    assert shared_heads.bytes_per_token(model.config, 2) == model.new_cache(1, 1).nbytes == 3 * HEAD


def test_the_bound_is_reading_the_weights_and_the_cache_once_as_fast_as_memory_was_ever_read(monkeypatch):
    def seconds(calls, rounds, device, warm_ups, clock):
        return {name: [4.0, 2.0, 2.0] for name in calls} | {"read": [1.0, 0.5, 2.0]}

    monkeypatch.setattr(timing, "in_turn", seconds)
    settings = shared_heads.Settings(rounds=3, batch_sizes=(2,), contexts=(8,))
    measured = shared_heads.decoding(settings)
    assert measured["bytes_read_per_second"] == 4 * 2**26 / 0.5
    row = measured["decoding"][-1]
    assert (row["batch_size"], row["context"], row["n_kv_head"]) == (2, 8, 1)
    weights = 2 * sum(parameter.numel() for parameter in shared_heads.smollm2(1).parameters())
    assert (row["weight_bytes"], row["cache_bytes"]) == (weights, 2 * 8 * HEAD)
    assert row["memory_bound"] == pytest.approx((weights + 2 * 8 * HEAD) / (4 * 2**26 / 0.5))
    assert (row["seconds"], row["tokens_per_second"]) == (2.0, 1.0)  # the median


def test_a_batch_whose_cache_is_too_large_is_not_measured_and_the_table_says_so():
    largest = 4 * 8 * 3 * HEAD  # what four texts take with 3 heads
    settings = shared_heads.Settings(
        rounds=1, batch_sizes=(1, 4), contexts=(8,), largest_cache=largest / 2**30
    )
    measured = shared_heads.decoding(settings)
    assert [(row["batch_size"], row["n_kv_head"]) for row in measured["left_out"]] == [(4, 9)]
    shared_heads.write_speeds(measured, settings)
    table = lessons.where_it_pays("shared_heads")
    (four,) = [line for line in table.splitlines() if line.startswith("| 8 | 4 |")]
    assert four.count("does not fit") == 1 and "%" in four
    assert table.count("does not fit") == 1 and "shared_heads-dark.png" in table
    assert (lessons.IDEAS / "shared_heads.png").exists() and (
        lessons.IDEAS / "shared_heads-dark.png"
    ).exists()


def test_as_many_texts_fit_as_their_caches_have_room():
    settings = shared_heads.Settings(rounds=1, contexts=(8, 16))
    shared_heads.write_layers(shared_heads.one_layer(1), settings)
    rows = json.loads((lessons.IDEAS / "shared_heads_layer.json").read_text())["table"]["rows"]
    for n, row in zip(shared_heads.HEADS, rows, strict=True):
        assert row[:4] == [n, f"{n * HEAD:,}", *(f"{2**31 // (c * n * HEAD):,}" for c in (8, 16))]
        assert all(cell.endswith("GB/s)") for cell in row[4:])


def test_seeds_are_trained_for_each_number_of_heads_and_only_significant_differences_are_stated(monkeypatch):
    asked, losses = [], {4: [1.0, 1.1, 1.2], 2: [1.01, 1.1, 1.21], 1: [2.0, 2.1, 2.2]}

    def trained(name, flags):
        asked.append(name)
        n, seed = int(flags[flags.index("--model.n-kv-head") + 1]), int(flags[flags.index("--seed") + 1])
        return None, [{"val_loss": 9.0}, {"val_loss": losses[n][seed]}]

    monkeypatch.setattr(ideas, "trained", trained)
    found = {n: shared_heads.trained_losses(n, 3) for n in shared_heads.HEADS_TRAINED}
    assert found == losses and len(set(asked)) == 9
    shared_heads.write_losses(found)
    table = lessons.where_it_pays("shared_heads_loss")
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert [row[2] for row in rows] == ["1.100 ± 0.100", "≈ 1.107 ± 0.100", "2.100 ± 0.100"]
    model = stages.load("stage4_gqa")
    sizes = shared_heads.presets.PRESETS["laptop"]["model"]
    for n, row in zip((4, 2, 1), rows, strict=True):
        cache = model.GPT(model.GPTConfig(vocab_size=65, n_kv_head=n, **sizes)).new_cache(1, 1)
        assert row[:2] == [str(n), f"{cache.nbytes:,}"]
