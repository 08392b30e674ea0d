"""The cache in 8 bits, for every stage."""

import pytest
import torch
from conftest import call

import sample
from lab import stages
from lab.sampling import chat, int8_cache


def near(a, b, tolerance):
    """Whether two tensors differ by at most this part of the larger one's norm."""
    return (a.float() - b.float()).norm() <= tolerance * b.float().norm()


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_in_8_bits_gives_nearly_the_same_logits_in_half_the_memory(make_model, dtype):
    """Also when the prompt comes in pieces: a token is the same for those beside it and those after it."""
    model, idx = make_model().to(dtype), torch.randint(0, 65, (2, 12))
    plain = model.new_cache(2, 16)
    expected = model(idx, cache=plain)[0]
    int8_cache.use(model)
    whole, pieces = model.new_cache(2, 16), model.new_cache(2, 16)
    at_once = model(idx, cache=whole)[0]
    steps = torch.cat([model(part, cache=pieces)[0] for part in idx.split([4, 1, 1, 3, 1, 2], dim=1)], dim=1)
    assert near(at_once, expected, 0.02) and not torch.equal(at_once, expected)
    assert near(steps, at_once, 1e-5 if dtype == torch.float32 else 0.03)
    assert whole.length == 12 and whole.max_length == 16
    # A code and a scale for each key of 8 numbers or fewer; one of the two layers in the model's own dtype.
    assert whole.nbytes < plain.nbytes * (0.5 + (1 / 4 if dtype == torch.float32 else 1 / 2) + 1 / 4)


@torch.inference_mode()
def test_a_cache_in_8_bits_goes_back(make_model):
    """length may be set to a smaller number, as drafting and chat do, if the cache is no ring."""
    model, idx = make_model(), torch.randint(0, 65, (1, 9))
    int8_cache.use(model)
    cache = model.new_cache(1, 9)
    model(torch.randint(0, 65, (1, 9)), cache=cache)
    cache.length = 0
    first = model(idx[:, :6], cache=cache)[0]
    model(torch.randint(0, 65, (1, 3)), cache=cache)
    if chat.has_forgotten(cache):
        pytest.skip("a ring")
    cache.length = 6
    last = model(idx[:, 6:], cache=cache)[0]
    expected = model(idx, cache=model.new_cache(1, 9))[0]
    assert near(torch.cat((first, last), 1), expected, 1e-5)


@torch.inference_mode()
def test_a_ring_in_8_bits_gives_what_a_plain_ring_gives():
    mistral = stages.load("mistral")
    torch.manual_seed(0)
    sizes = {"vocab_size": 65, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 32, "sliding_window": 5}
    model = mistral.GPT(mistral.GPTConfig(**sizes)).eval()
    idx = torch.randint(0, 65, (1, 20))
    expected = model(idx)[0]
    int8_cache.use(model)
    cache = model.new_cache(1, 20)
    got = torch.cat([model(part, cache=cache)[0] for part in idx.split([3, 1, 1, 4, 7, 1, 1, 2], dim=1)], 1)
    assert near(got, expected, 0.02)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_rounded_by_token_and_head_to_1_part_in_254(dtype):
    class Plain:
        def __init__(self):
            self.keys, self.length, self.max_length = torch.zeros(1, 2, 3, 500, 8, dtype=dtype), 0, 500

        def update(self, layer, k):
            self.keys[layer, :, :, self.length : self.length + k.size(2)] = k
            return self.keys[layer, :, :, : self.length + k.size(2)]

    keys = (torch.randn(2, 3, 500, 8) * 10 ** torch.randn(2, 3, 500, 1)).to(dtype)
    cache = int8_cache.Int8Cache(Plain())
    keys[0, 0, 0] = 0
    got = cache.update(0, keys)
    assert torch.equal(got, cache.keys[0] * cache.scales["keys"][0])
    stored = cache.keys[0].float() * cache.scales["keys"][0].float()
    largest = keys.float().abs().amax(-1, keepdim=True)
    scale_error = torch.finfo(dtype).eps / 2
    assert ((stored - keys.float()).abs() <= largest / 254 * (1 + scale_error) * 1.001).all()
    assert not got[0, 0, 0].any()


def test_sample_takes_the_cache_in_8_bits(run_train, workshop, monkeypatch):
    assert run_train("--stage", 7, "--steps", 1, "--out", "runs/x") == 0
    lengths, make = [], int8_cache.Int8Cache
    monkeypatch.setattr(
        int8_cache, "Int8Cache", lambda cache: lengths.append(cache.max_length) or make(cache)
    )
    for flags in ([], ["--draft"]):
        options = ["--cache-dtype", "int8", "--max-new-tokens", 12, "--prompt", "a", *flags]
        assert call(monkeypatch, sample, "--run", "runs/x", *options) == 0
    assert len(lengths) == 3  # with drafts there are two caches


def test_compile_and_the_cache_in_8_bits_do_not_go_together(monkeypatch, capsys):
    assert call(monkeypatch, sample, "--compile", "--cache-dtype", "int8") == 2
    assert "--compile and --cache-dtype int8 do not go together" in capsys.readouterr().err
