"""The relatives of the stages: each with its additions switched off is its stage, and what they add."""

import pytest
import torch

from lab import stages

STAGE7, V3 = stages.load("stage7_mla_mtp"), stages.load("deepseek_v3")
SIZES = {"vocab_size": 65, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 32}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.8}
FULL = {"q_lora_rank": 12, "rope_scaling": YARN, "n_group": 4, "topk_group": 2}


def config(**sizes):
    return V3.GPTConfig(**SIZES | sizes)


def make(stage=V3, **sizes):
    """A tiny model with large random weights and biases that change the experts' choice."""
    torch.manual_seed(0)
    model = stage.GPT(stage.GPTConfig(**SIZES | sizes)).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    for router in model.routers():
        router.e_score_correction_bias.normal_(std=0.2)
    return model


def tokens(batch_size=2, length=24):
    return torch.randint(65, (batch_size, length), generator=torch.Generator().manual_seed(1))


# deepseek_v3


def test_without_its_additions_deepseek_v3_is_stage_7():
    one, other = make(STAGE7), make()
    assert one.state_dict().keys() == other.state_dict().keys()
    idx = tokens()
    results = [(*model(idx, idx), model.after_step()) for model in (one.train(), other.train())]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", FULL)
def test_each_addition_changes_the_model(name):
    sizes = {"n_group": 4, "topk_group": 2} if "group" in name else {name: FULL[name]}
    assert not torch.allclose(make(**sizes)(tokens())[0], make()(tokens())[0], atol=1e-3)


@pytest.mark.parametrize("sizes", [{"q_lora_rank": 12}, {"rope_scaling": YARN}, FULL], ids=str)
def test_absorbed_is_expanded(sizes, monkeypatch):
    model, idx = make(**sizes), tokens()
    full = model(idx)[0]
    for absorbs in (True, False):
        monkeypatch.setattr(V3.Attention, "absorbing_is_cheaper", lambda self, T, S, a=absorbs: a)
        cache = model.new_cache(2, 24)
        parts = [model(part, cache=cache)[0] for part in idx.split([9, 6, 1, 1, 4, 3], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=1e-5 * full.abs().max().item(), rtol=0)


@pytest.mark.parametrize("scaling", [YARN, {"factor": 40.0, "original_max_position_embeddings": 64}], ids=str)
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_yarn_is_that_of_transformers(scaling, theta):
    from transformers import DeepseekV3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = DeepseekV3Config(
        qk_rope_head_dim=16, rope_parameters={"rope_type": "yarn", "rope_theta": theta, **scaling}
    )
    frequencies, mscale = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    ours = config(qk_rope_head_dim=16, rope_theta=theta, rope_scaling=scaling)
    positions = torch.arange(50)
    angles = positions[:, None] * frequencies
    cos, sin = V3.rotation(positions, ours)
    torch.testing.assert_close(cos[0], angles.cos() * mscale, atol=1e-5, rtol=0)
    torch.testing.assert_close(sin[0], angles.sin() * mscale, atol=1e-5, rtol=0)


def test_without_scaling_positions_are_those_of_stage_2():
    positions = torch.arange(9)
    two = stages.load("stage2_rope").rotation(positions, 8, 10_000.0)
    torch.testing.assert_close(V3.rotation(positions, config(qk_rope_head_dim=8)), two)


def test_a_factor_of_1_scales_nothing():
    scaling = {"factor": 1.0, "original_max_position_embeddings": 32}
    positions = torch.arange(9)
    plain = V3.rotation(positions, config(qk_rope_head_dim=8))
    torch.testing.assert_close(
        V3.rotation(positions, config(qk_rope_head_dim=8, rope_scaling=scaling)), plain
    )


# Groups of experts


def test_experts_outside_the_best_groups_are_not_chosen():
    router = make(n_group=4, topk_group=2).routers()[0]
    x = torch.randn(300, 32)
    biased = (x @ router.weight.T).sigmoid() + router.e_score_correction_bias
    by_group = biased.view(300, 4, 2).sum(-1)  # groups of two: both are the best two
    best = by_group.topk(2).indices
    weights, indices = router(x)
    assert all(
        set((row // 2).tolist()) <= set(groups.tolist()) for row, groups in zip(indices, best, strict=True)
    )
    free = make().routers()[0]
    assert not torch.equal(free(x)[1], indices)  # the limit mattered
    assert weights.isfinite().all()


def test_a_closed_group_stays_closed_when_all_scores_are_negative():
    """Minus infinity, not 0: a bias can make every open expert's score negative."""
    router = make(n_group=2, topk_group=1).routers()[0]
    router.e_score_correction_bias.fill_(-5.0)
    _, indices = router(torch.randn(100, 32))
    assert all(len(set((row // 4).tolist())) == 1 for row in indices)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"n_group": 3}, "n_group \\(3\\) must divide n_routed_experts"),
        ({"n_group": 8}, "n_group \\(8\\)"),
        ({"n_group": 4, "num_experts_per_tok": 3}, "topk_group \\(1\\)"),
        ({"n_group": 2, "topk_group": 3}, "topk_group \\(3\\)"),
        ({"n_group": 0}, "n_group \\(0\\)"),
        ({"n_group": 2, "topk_group": 2, "router": "softmax"}, "n_group \\(2\\) needs the sigmoid router"),
        ({"rope_scaling": {"factor": 4.0}}, "original_max_position_embeddings above 0, not None"),
        ({"rope_scaling": YARN | {"factor": -1.0}}, "factor above 0, not -1.0"),
        ({"q_lora_rank": 0}, "q_lora_rank must be at least 1 or None, not 0"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        config(**sizes)
