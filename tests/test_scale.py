"""What is said about sizes: the gpt2 preset, FLOPs, and the figures of docs/scale.md."""

import pytest
import torch

from lab import cost, presets, stages

NAMES = stages.names()


def bare(number, **sizes):
    """A model of the stage without memory."""
    stage = stages.load(NAMES[number])
    with torch.device("meta"):
        return stage.GPT(stage.GPTConfig(**sizes))


def test_stage_0_at_the_gpt2_preset_is_gpt2_with_a_padded_vocabulary():
    """GPT-2 small has 124,439,808 parameters with its 50257 tokens, biases and tied head included."""
    model = bare(0, **presets.PRESETS["gpt2"]["model"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.config.vocab_size, model.config.bias) == (50304, True)
    assert cost.parameters(model) == 124_439_808 + (50304 - 50257) * 768


@pytest.mark.parametrize("attention", ["auto", "sdpa", "explicit"])
def test_flops_are_those_of_the_formula_whatever_computes_attention(attention):
    """Also beyond 512 tokens, where a CPU computes SDPA in a kernel that FlopCounterMode does not know."""
    sizes = {"vocab_size": 65, "block_size": 1024, "n_layer": 1, "n_head": 2, "n_embd": 32}
    stage4, stage5 = (stages.load(NAMES[number]) for number in (4, 5))
    written_out = cost.flops_per_token(stage4.GPT(stage4.GPTConfig(**sizes)))
    model = stage5.GPT(stage5.GPTConfig(**sizes, attention=attention))
    assert cost.flops_per_token(model) == written_out
    scores = 2 * 2 * 3 * 1024 * 32  # two products, forward and twice that backward, by tokens and width
    matrices = [p for p in model.parameters() if p.dim() == 2]  # the tied one as the head alone
    assert written_out == scores + 6 * sum(p.numel() for p in matrices)
