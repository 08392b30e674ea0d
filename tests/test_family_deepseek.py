"""DeepSeek's relatives and others of their architecture are those of transformers, both ways."""

import json
from pathlib import Path

import pytest
import test_deploy
import test_family
import torch
from test_deploy import CPU, edit_config, explained, make_run, run_export, run_import, save_theirs
from test_family_llama import assert_same_function
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV2ForCausalLM

from lab import stages
from lab.storage import runs

__all__ = ["run_export", "run_import"]  # fixtures

STAGE7A, V2 = stages.load("stage7a_mla"), stages.load("deepseek_v2")
YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.707, "mscale_all_dim": 0.707}
LIMIT = {"n_group": 4, "topk_group": 2}
GROUPS = LIMIT | {"num_experts_per_tok": 3}  # the best two experts are in the best two groups anyway


def make(stage=V2, **sizes):
    """A tiny model with large random weights."""
    torch.manual_seed(0)
    return test_deploy.shake(stage.GPT(stage.GPTConfig(**test_family.SIZES | sizes)))


def deepseek_v2(**sizes):
    """A tiny random DeepSeek-V2."""
    defaults = {"kv_lora_rank": 20, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
    defaults |= {"v_head_dim": 12, "n_routed_experts": 8, "num_experts_per_tok": 3}
    defaults |= {"moe_intermediate_size": 20, "n_group": 1, "topk_group": 1}
    return test_deploy.llama(DeepseekV2ForCausalLM, DeepseekV2Config, **defaults | sizes)


def yarn(theta=10_000.0, **numbers):
    return {"rope_parameters": {"rope_type": "yarn", "rope_theta": theta, **YARN, **numbers}}


LIMITED = GROUPS | {"topk_method": "group_limited_greedy"}
THEIRS = [
    {"num_hidden_layers": 1, "tie_word_embeddings": True},
    {"first_k_dense_replace": 1, "n_shared_experts": 1, "num_experts_per_tok": 1, "rms_norm_eps": 1e-3},
    {"q_lora_rank": 12, "routed_scaling_factor": 16.0},
    yarn(),
    yarn(500.0, mscale=1.0, mscale_all_dim=0.8, beta_fast=1.0) | {"q_lora_rank": 10, "v_head_dim": 6},
    LIMITED,
    LIMITED | {"n_group": 8, "topk_group": 3, "routed_scaling_factor": 1.5},
    LIMITED | yarn(factor=40.0) | {"q_lora_rank": 12, "first_k_dense_replace": 1, "num_hidden_layers": 3},
]


@pytest.mark.parametrize("sizes", THEIRS, ids=str)
def test_a_deepseek_v2_is_imported_as_the_same_function_and_exports_as_it_was(run_import, run_export, sizes):
    test_deploy.test_what_is_imported_has_their_logits_and_exports_as_it_was(
        run_import, run_export, "deepseek_v2", deepseek_v2, sizes
    )
    ours, _ = runs.load(Path("runs/imported"), "best", CPU)
    assert_same_function(ours, AutoModelForCausalLM.from_pretrained("theirs"))
    exported, original = (json.loads(Path(name, "config.json").read_text()) for name in ("back", "theirs"))
    assert exported["topk_method"] == original["topk_method"]


OURS = [
    {},
    {"q_lora_rank": 12, "first_k_dense_replace": 1, "tie_word_embeddings": False},
    GROUPS | {"n_shared_experts": 3, "routed_scaling_factor": 16.0, "norm_eps": 1e-6},
    {"rope_scaling": YARN, "num_experts_per_tok": 1},
    GROUPS | {"rope_scaling": YARN | {"beta_fast": 4.0}, "q_lora_rank": 12, "v_head_dim": 12, "n_layer": 3},
]


@pytest.mark.parametrize("sizes", OURS, ids=str)
def test_a_deepseek_v2_of_ours_is_the_same_function_in_stock_transformers(run_export, sizes):
    ours = make_run("run", "deepseek_v2", "".join(map(chr, range(97, 158))), **sizes)
    assert run_export("--run", "run", "--to", "hf", "--out", "out") == 0
    theirs, report = AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    assert type(theirs) is DeepseekV2ForCausalLM and not any(report.values()), report
    assert_same_function(ours, theirs)


def test_with_greedy_choice_groups_have_no_effect(run_import):
    theirs = deepseek_v2(**GROUPS, topk_method="greedy")
    save_theirs(theirs, "theirs")
    assert run_import("theirs", "--out", "run") == 0
    ours, config = runs.load(Path("run"), "best", CPU)
    assert config["model"]["n_group"] == 1
    assert_same_function(ours, theirs)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"norm_topk_prob": True}, "norm_topk_prob = true"),
        ({"scoring_func": "sigmoid"}, 'scoring_func = "sigmoid"'),
        ({"topk_method": "noaux_tc"}, 'topk_method = "noaux_tc"'),
        ({"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 3}, "n_group (3)"),
        ({"topk_method": "group_limited_greedy", "n_group": None}, "config.json has no n_group"),
        ({"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ({"attention_bias": True}, "attention_bias = true"),
        ({"mlp_bias": True}, "mlp_bias = true"),
        ({"rope_interleave": False}, "rope_interleave = false"),
        ({"num_key_value_heads": 2}, "num_key_value_heads = 2"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "deepseek_v2 cannot represent that, only"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, 'rope_scaling = {"type": "yarn"'),
        ({"rope_scaling": {"type": "yarn", **YARN, "factor": "4"}}, 'factor = "4": it must be a number'),
        ({"rope_scaling": {"type": "yarn", **YARN, "factor": 0}}, "factor above 0, not 0.0"),
        ({"rope_scaling": [4.0]}, "rope_scaling = [4.0]: it must be an object"),
    ],
)
def test_a_deepseek_v2_that_cannot_be_represented_is_refused_by_name(run_import, capsys, changes, message):
    save_theirs(deepseek_v2(), "theirs")
    edit_config("theirs", **changes)
    assert run_import("theirs", "--out", "out") == 2
    explained(capsys, message)


@pytest.mark.parametrize(
    "sizes", [{"router": "sigmoid"}, {"norm_topk_prob": True}, {"n_shared_experts": 0}], ids=str
)
def test_what_is_no_deepseek_v2_is_not_exported_as_one(run_export, capsys, sizes):
    make_run("run", "deepseek_v2", **sizes)
    assert run_export("--run", "run", "--to", "hf", "--out", "out") == 2
    explained(capsys, "router softmax, norm_topk_prob False and n_shared_experts of 1 or more")


@pytest.mark.parametrize("stage", ["deepseek_v2", "deepseek_v3"])
def test_an_export_says_how_positions_are_scaled_where_other_programs_look(run_export, stage):
    make_run("run", stage, rope_scaling=YARN, rope_theta=500.0)
    assert run_export("--run", "run", "--to", "hf", "--out", "out") == 0
    written = json.loads(Path("out/config.json").read_text())
    assert written["rope_scaling"] == {"type": "yarn", "rope_type": "yarn", **YARN}
    assert type(written["rope_scaling"]["original_max_position_embeddings"]) is int
    assert written["rope_theta"] == 500.0


# The code


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_without_its_additions_deepseek_v2_is_stage_7a(router):
    one, other = make(STAGE7A, router=router), make(router=router, norm_topk_prob=True)
    assert one.state_dict().keys() == other.state_dict().keys()
    idx = test_family.tokens()
    results = [(*model(idx, idx), model.after_step()) for model in (one.train(), other.train())]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    "sizes", [{"norm_topk_prob": True}, GROUPS, {"q_lora_rank": 12}, {"rope_scaling": YARN}], ids=str
)
def test_each_addition_changes_the_model(sizes):
    idx = test_family.tokens()
    plain = make(num_experts_per_tok=sizes.get("num_experts_per_tok", 2))
    assert not torch.allclose(make(**sizes)(idx)[0], plain(idx)[0], atol=1e-3)


def test_weights_are_the_probabilities_themselves():
    router = make(routed_scaling_factor=2.0).routers()[0]
    x = torch.randn(100, 32)
    weights, indices = router(x)
    probs = (x @ router.weight.T).softmax(-1)
    torch.testing.assert_close(weights, 2 * probs.gather(1, indices))
    assert (weights.sum(-1) < 2).all()


def test_experts_are_chosen_in_the_groups_that_have_the_best_ones():
    router, free = (make(num_experts_per_tok=3, **groups).routers()[0] for groups in (LIMIT, {}))
    x = torch.randn(300, 32)
    groups = (x @ router.weight.T).softmax(-1).view(300, 4, 2)  # (N, n_group, experts of a group)
    best = groups.amax(-1).topk(2).indices.sort(-1).values
    _, indices = router(x)
    for chosen, allowed in zip(indices // 2, best, strict=True):
        assert set(chosen.tolist()) == set(allowed.tolist())
    assert not torch.equal(free(x)[1].sort().values, indices.sort().values)  # the limit mattered
    by_sum = groups.sum(-1).topk(2).indices.sort(-1).values  # as DeepSeek-V3 chooses
    assert not torch.equal(best, by_sum)


@pytest.mark.parametrize(
    "sizes", [{"q_lora_rank": 12}, {"rope_scaling": YARN}, {"q_lora_rank": 12, "rope_scaling": YARN}], ids=str
)
def test_absorbed_is_expanded(sizes, monkeypatch):
    model, idx = make(**sizes), test_family.tokens()
    full = model(idx)[0]
    for absorbs in (True, False):
        monkeypatch.setattr(V2.Attention, "absorbing_is_cheaper", lambda self, T, S, a=absorbs: a)
        cache = model.new_cache(2, 24)
        parts = [model(part, cache=cache)[0] for part in idx.split([9, 6, 1, 1, 4, 3], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=1e-5 * full.abs().max().item(), rtol=0)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"n_group": 3, "topk_group": 3}, "n_group \\(3\\) must divide n_routed_experts"),
        ({"n_group": 8}, "topk_group \\(1\\) groups of 1 experts are too few"),
        ({"n_group": 2, "topk_group": 3}, "topk_group \\(3\\)"),
        ({"n_group": 0}, "n_group \\(0\\)"),
        ({"n_group": 2, "router": "sigmoid"}, "n_group \\(2\\) needs the softmax router"),
        ({"rope_scaling": {"factor": 4.0}}, "original_max_position_embeddings above 0, not None"),
        ({"q_lora_rank": 0}, "q_lora_rank must be at least 1 or None, not 0"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        V2.GPTConfig(**test_family.SIZES | sizes)
