"""Sampling: the distributions, the cache, and sample.py."""

import sys

import pytest
import torch
from conftest import TINY_MODEL

import data
from lab.sampling import generation
from lab.sampling.compiled import CompiledStep


def plain(logits, temperature, top_k, top_p):
    """The definitions read aloud, one token after the other, in Python floats."""
    weights = [float(torch.tensor(x, dtype=torch.float64).div(temperature).exp()) for x in logits.tolist()]
    ranking = sorted(range(len(weights)), key=lambda token: -weights[token])
    if top_k is not None:
        ranking = ranking[:top_k]
    total = sum(weights[token] for token in ranking)
    kept, mass = [], 0.0
    for token in ranking:
        if mass >= top_p:
            break
        kept.append(token)
        mass += weights[token] / total
    probs = torch.zeros(len(weights))
    for token in kept:
        probs[token] = weights[token] / sum(weights[other] for other in kept)
    return probs


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [None, 1, 5, 20, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
def test_top_k_and_top_p_follow_their_definition(temperature, top_k, top_p):
    for seed in range(5):
        logits = 3 * torch.randn(20, generator=torch.Generator().manual_seed(seed))
        probs = generation.next_token_probs(logits, temperature, top_k, top_p)
        torch.testing.assert_close(probs, plain(logits, temperature, top_k, top_p), atol=1e-6, rtol=1e-5)


def test_top_p_keeps_the_token_that_crosses_the_line_and_no_more():
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    kept = {
        p: (generation.next_token_probs(logits, 1.0, None, p) > 0).sum().item()
        for p in (0.1, 0.49, 0.6, 0.79, 0.9)
    }
    assert kept == {0.1: 1, 0.49: 1, 0.6: 2, 0.79: 2, 0.9: 3}


def test_temperature_zero_is_greedy():
    logits = torch.tensor([0.1, 5.0, 4.9])
    assert generation.next_token_probs(logits, 0.0, None, 1.0).tolist() == [0, 1, 0]


def uncached(model, prompt, n, context):
    """Text by the full forward of a window that starts anew with its last half whenever it is full."""
    window, made, generator = prompt[-context:], [], torch.Generator().manual_seed(3)
    for _ in range(n):
        with torch.no_grad():
            probs = model(torch.tensor([window]))[0][0, -1].softmax(-1)
        made.append(torch.multinomial(probs, 1, generator=generator).item())
        window = [*window, made[-1]]
        if len(window) > context:
            window = window[-(context // 2) :]
    return made


@pytest.mark.parametrize("prompt_length", [1, 9, 16, 40])
def test_cached_text_equals_uncached_text_within_the_context_and_past_it(make_model, prompt_length):
    model = make_model()
    for parameter in model.parameters():
        parameter.data.mul_(2)  # further from uniform, so that what came before matters
    prompt = torch.randint(65, (prompt_length,), generator=torch.Generator().manual_seed(2)).tolist()
    generator = torch.Generator().manual_seed(3)
    made = list(generation.generate(model, prompt, 60, 65, temperature=1.0, generator=generator))
    assert made == uncached(model, prompt, 60, TINY_MODEL["block_size"])
    assert len(set(made)) > 10


@pytest.mark.parametrize("prompt_length", [1, 9, 40])
def test_shapes_that_never_change_make_the_same_text(make_model, prompt_length, monkeypatch):
    """Without the compiler, which changes the speed alone; a test below compiles for real."""
    monkeypatch.setattr(torch, "compile", lambda **_: lambda function: function)
    model = make_model()
    for parameter in model.parameters():
        parameter.data.mul_(2)
    prompt = torch.randint(65, (prompt_length,), generator=torch.Generator().manual_seed(2)).tolist()
    step = CompiledStep(model)
    for _ in range(2):  # the second time there is something in the cache
        generator = torch.Generator().manual_seed(3)
        made = list(generation.generate(model, prompt, 60, 65, 1.0, generator=generator, step=step))
        assert made == uncached(model, prompt, 60, TINY_MODEL["block_size"])


def test_a_seed_gives_the_same_text_and_another_seed_another(make_model):
    model = make_model()
    texts = [
        list(generation.generate(model, [1], 30, 65, generator=torch.Generator().manual_seed(seed)))
        for seed in (5, 5, 6)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_tokens_that_only_pad_the_vocabulary_are_never_made(make_model):
    model = make_model()
    assert max(generation.generate(model, [1], 200, 3, temperature=5.0)) == 2


@pytest.fixture
def trained(run_train, capsys):
    assert run_train("--stage", "0", "--steps", "3") == 0
    capsys.readouterr()


@pytest.mark.usefixtures("trained")
def test_the_prompt_comes_from_flag_file_or_pipe(run_sample, workshop, monkeypatch, capsys):
    (workshop / "prompt.txt").write_text("abc")
    assert run_sample("--stage", "0", "--prompt", "abc", "--max-new-tokens", "20") == 0
    by_flag, err = capsys.readouterr()
    assert by_flag.startswith("abc") and len(by_flag) == 3 + 20 + 1
    assert "tokens/s" in err and "stage0_gpt" in err
    assert run_sample("--prompt-file", "prompt.txt", "--max-new-tokens", "20") == 0
    assert capsys.readouterr().out == by_flag
    with open("prompt.txt") as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        assert run_sample("--max-new-tokens", "20") == 0
    assert capsys.readouterr().out == by_flag


@pytest.mark.usefixtures("trained")
def test_several_samples_differ(run_sample, capsys):
    assert run_sample("--prompt", "a", "--num-samples", "3", "--max-new-tokens", "30") == 0
    samples = capsys.readouterr().out.split("\n---------------\n")
    assert len(set(samples)) == 3


@pytest.mark.usefixtures("trained")
def test_sampling_defaults_to_the_newest_run_of_the_stage(run_train, run_sample, workshop, capsys):
    assert run_train("--stage", "0", "--steps", "1") == 0
    assert run_sample("--stage", "0", "--prompt", "a", "--max-new-tokens", "1") == 0
    assert "seed0-2" in capsys.readouterr().err


def test_a_character_of_several_tokens_is_shown_whole(run_train, run_sample, workshop, monkeypatch, capsys):
    """GPT-2's tokens are bytes: one alone may be half a character."""

    class Bytes(data.GPT2Tokenizer):
        vocab_size = 256
        encode = staticmethod(lambda text: torch.tensor(list(text.encode())))
        decode_bytes = staticmethod(bytes)

    assert run_train("--stage", "0", "--steps", "1", "--model.vocab-size", "256") == 0
    capsys.readouterr()
    monkeypatch.setattr("lab.storage.runs.tokenizer", lambda folder: Bytes.__new__(Bytes))
    monkeypatch.setattr(generation, "generate", lambda *arguments, **options: iter("né€".encode()))
    assert run_sample("--prompt", "a") == 0
    assert capsys.readouterr().out == "ané€\n"


def test_compiling_and_drafting_are_not_for_the_same_run(run_sample, capsys):
    assert run_sample("--stage", "7", "--compile", "--draft") == 2
    assert "leave one of them out" in capsys.readouterr().err
