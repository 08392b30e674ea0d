"""Large models on a CPU multiply by weights in oneDNN's own layout."""

import pytest
import torch
from conftest import TINY_MODEL

from deploy import perplexity
from lab import stages
from lab.sampling import packed
from lab.storage import runs

pytestmark = pytest.mark.skipif(
    not packed.can_pack(torch.zeros(1)), reason="this PyTorch cannot pack weights with oneDNN"
)


@pytest.fixture
def any_size(monkeypatch):
    monkeypatch.setattr(packed, "SMALLEST", 0)


DTYPES = [torch.float32]
if packed.can_pack(torch.zeros(1, dtype=torch.bfloat16)):
    DTYPES.append(torch.bfloat16)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(1, 1, 33), (2, 7, 33), (3, 33)])
def test_a_packed_layer_is_the_layer(shape, bias):
    for dtype in DTYPES:
        linear, x = torch.nn.Linear(33, 50, bias=bias).to(dtype), torch.randn(shape).to(dtype)
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        with torch.inference_mode():
            torch.testing.assert_close(packed.PackedLinear(linear)(x), linear(x), atol=tolerance, rtol=0.01)


def test_a_packed_model_has_the_same_logits_with_and_without_a_cache(stage, any_size):
    torch.manual_seed(0)
    model = stage.GPT(stage.GPTConfig(**TINY_MODEL)).eval()
    idx = torch.randint(TINY_MODEL["vocab_size"], (2, 9))
    with torch.inference_mode():
        expected = model(idx)[0]
        assert packed.pack(model)
        assert type(model.lm_head) is type(model.model.layers[0].self_attn.o_proj) is packed.PackedLinear
        torch.testing.assert_close(model(idx)[0], expected, atol=1e-5, rtol=0)
        cache = model.new_cache(2, 9)
        cached = [model(part, cache=cache)[0] for part in idx.split([4, 1, 1, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(cached, dim=1), expected, atol=1e-5, rtol=0)


def test_small_models_stay_as_they_are():
    stage = stages.load("stage5_flash")
    model = stage.GPT(stage.GPTConfig(**TINY_MODEL))
    assert not packed.pack(model)
    assert type(model.lm_head) is torch.nn.Linear


def test_what_cannot_be_packed_stays_as_it_is(any_size, monkeypatch):
    def refuse(weight, rows):
        raise RuntimeError("this processor does not support it")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    stage = stages.load("stage5_flash")
    model = stage.GPT(stage.GPTConfig(**TINY_MODEL))
    assert not packed.pack(model)
    assert type(model.lm_head) is torch.nn.Linear


def test_sample_packs_what_it_loads(run_train, run_sample, workshop, any_size, monkeypatch):
    assert run_train("--stage", "5", "--steps", "2", "--out", "run") == 0
    models, real = [], runs.load
    monkeypatch.setattr(runs, "load", lambda *inputs: models.append(real(*inputs)) or models[-1])
    assert run_sample("--run", "run", "--prompt", "a", "--max-new-tokens", "4", "--device", "cpu") == 0
    assert [type(model.lm_head) for model, _ in models] == [packed.PackedLinear]


def test_the_memory_of_a_packed_model_is_that_of_its_weights(any_size):
    stage = stages.load("stage5_flash")
    model = stage.GPT(stage.GPTConfig(**TINY_MODEL, tie_word_embeddings=False))
    expected = perplexity.in_memory(model)
    assert packed.pack(model)
    assert expected <= perplexity.in_memory(model) <= 1.5 * expected  # the layout may fill up blocks
