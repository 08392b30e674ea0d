"""gpt_neox and qwen3_moe in family/: each is that of transformers, both ways, and what it adds."""

import functools
import json
from pathlib import Path

import pytest
import test_deploy
import torch
from safetensors.torch import load_file
from test_deploy import (
    CPU,
    change_weights,
    edit_config,
    explained,
    llama,
    make_run,
    run_export,
    run_import,
    save_theirs,
)
from test_family_llama import assert_same_function, make, tokens
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lab import stages
from lab.storage import runs

__all__ = ["run_export", "run_import"]  # fixtures

STAGE0, STAGE6 = stages.load("stage0_gpt"), stages.load("stage6_moe")
NEOX, QWEN = stages.load("gpt_neox"), stages.load("qwen3_moe")

neox = functools.partial(llama, GPTNeoXForCausalLM, GPTNeoXConfig, intermediate_size=128)
QWEN_SIZES = {"num_key_value_heads": 2, "head_dim": 8, "norm_topk_prob": True, "num_experts_per_tok": 2}
QWEN_SIZES |= {"num_experts": 8, "moe_intermediate_size": 24}
qwen = functools.partial(llama, Qwen3MoeForCausalLM, Qwen3MoeConfig, **QWEN_SIZES)


def rotated(part, theta=10_000.0):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": part}}


THEIRS = [
    ("gpt_neox", neox, {}),
    ("gpt_neox", neox, {"num_hidden_layers": 3, "hidden_act": "gelu_fast", "layer_norm_eps": 1e-3}),
    ("gpt_neox", neox, {"use_parallel_residual": False, "hidden_dropout": 0.1, "attention_dropout": 0.1}),
    ("gpt_neox", neox, {"tie_word_embeddings": True, "num_attention_heads": 2} | rotated(1.0, 500.0)),
    ("gpt_neox", neox, {"hidden_size": 36, "intermediate_size": 144, "num_attention_heads": 3}),
    ("gpt_neox", neox, {"num_attention_heads": 1} | rotated(0.4, 100.0)),
    ("qwen3_moe", qwen, {}),
    ("qwen3_moe", qwen, {"tie_word_embeddings": True, "num_experts": 16, "num_experts_per_tok": 8}),
    ("qwen3_moe", qwen, {"num_experts_per_tok": 1, "norm_topk_prob": False, "head_dim": 14}),
    ("qwen3_moe", qwen, {"num_hidden_layers": 3, "mlp_only_layers": [0, 1], "num_key_value_heads": 4}),
    ("qwen3_moe", qwen, {"num_attention_heads": 3, "num_key_value_heads": 1, "rms_norm_eps": 1e-3}),
]


@pytest.mark.parametrize("stage, theirs, sizes", THEIRS)
def test_what_is_imported_is_the_same_function_and_exports_as_it_was(
    run_import, run_export, stage, theirs, sizes
):
    test_deploy.test_what_is_imported_has_their_logits_and_exports_as_it_was(
        run_import, run_export, stage, theirs, sizes
    )
    ours, _ = runs.load(Path("runs/imported"), "best", CPU)
    assert_same_function(ours, AutoModelForCausalLM.from_pretrained("theirs"))


OURS = [
    ("gpt_neox", {}),
    ("gpt_neox", {"n_layer": 3, "n_head": 2, "rotary_pct": 0.5, "rope_theta": 100.0, "norm_eps": 1e-3}),
    ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True, "rotary_pct": 1.0}),
    ("gpt_neox", {"bias": False, "hidden_act": "gelu_fast", "n_embd": 24}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"n_kv_head": 1, "head_dim": 12, "n_routed_experts": 5, "num_experts_per_tok": 3}),
    ("qwen3_moe", {"num_experts_per_tok": 1, "first_k_dense_replace": 1, "tie_word_embeddings": False}),
]
CLASSES = {"gpt_neox": GPTNeoXForCausalLM, "qwen3_moe": Qwen3MoeForCausalLM}


@pytest.mark.parametrize("stage, sizes", OURS)
def test_what_is_exported_is_the_same_function_in_stock_transformers(run_export, stage, sizes):
    ours = make_run("run", stage, "".join(map(chr, range(97, 158))), **sizes)
    assert run_export("--run", "run", "--to", "hf", "--out", "out") == 0
    theirs, report = AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    assert type(theirs) is CLASSES[stage] and not any(report.values()), report
    assert_same_function(ours, theirs)


def assert_refused(run_import, capsys, theirs, changes, message):
    save_theirs(theirs, "theirs")
    edit_config("theirs", **changes)
    assert run_import("theirs", "--out", "out") == 2
    explained(capsys, message)


def with_published_fields(name, small):
    """The config.json of theirs, saved by transformers 5, as a published one has it, with small sizes."""
    path = Path("theirs/config.json")
    saved = json.loads(path.read_text())
    sizes = {key: saved[key] for key in (*SIZES, *small)}
    path.write_text(json.dumps(PUBLISHED[name] | sizes))


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("max_position_embeddings",)
PUBLISHED = {  # the fields of the published config.json that are no sizes
    "Pythia-70m": {
        "architectures": ["GPTNeoXForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-05,
        "model_type": "gpt_neox",
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "use_parallel_residual": True,
    },
    "GPT-NeoX-20B": {
        "architectures": ["GPTNeoXForCausalLM"],
        "attention_probs_dropout_prob": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu_fast",
        "hidden_dropout_prob": 0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-05,
        "model_type": "gpt_neox",
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.19.0.dev0",
        "use_cache": True,
    },
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "norm_topk_prob": True,
        "num_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
    },
}
SMALL = ("num_key_value_heads", "head_dim", "moe_intermediate_size", "num_experts_per_tok")


@pytest.mark.parametrize(
    "name, theirs, small",
    [("Pythia-70m", neox, ()), ("GPT-NeoX-20B", neox, ()), ("Qwen3-30B-A3B", qwen, SMALL)],
)
def test_a_published_config_is_read_without_a_word(run_import, capsys, name, theirs, small):
    save_theirs(theirs(), "theirs")
    with_published_fields(name, small)
    assert run_import("theirs", "--out", "run") == 0
    assert capsys.readouterr().err == ""
    ours, _ = runs.load(Path("run"), "best", CPU)
    assert_same_function(ours, AutoModelForCausalLM.from_pretrained("theirs", dtype=torch.float32))


# gpt_neox


def test_the_fields_of_transformers_4_say_the_same_and_are_written(run_import, run_export):
    theirs = neox(**rotated(0.5, 300.0))
    save_theirs(theirs, "theirs")
    edit_config("theirs", rope_parameters=None, rotary_pct=0.5, rotary_emb_base=300)
    assert run_import("theirs", "--out", "run") == 0
    model = runs.read_config(Path("run"))["model"]
    assert (model["rotary_pct"], model["rope_theta"]) == (0.5, 300.0)
    assert_same_function(runs.load(Path("run"), "best", CPU)[0], theirs)
    assert run_export("--run", "run", "--to", "hf", "--out", "out") == 0
    written = json.loads(Path("out/config.json").read_text())
    assert (written["rotary_pct"], written["rotary_emb_base"]) == (0.5, 300.0)


def test_missing_fields_are_those_of_transformers(run_import):
    """GPT-NeoX-20B leaves out use_parallel_residual."""
    save_theirs(neox(), "theirs")
    edit_config("theirs", rope_parameters=None, use_parallel_residual=None, hidden_act=None)
    assert run_import("theirs", "--out", "run") == 0
    model = runs.read_config(Path("run"))["model"]
    names = ("rotary_pct", "rope_theta", "use_parallel_residual", "hidden_act")
    assert [model[name] for name in names] == [0.25, 10_000.0, True, "gelu"]


def test_masks_and_frequencies_that_old_files_hold_are_ignored_and_biases_are_not(run_import, capsys):
    save_theirs(neox(), "theirs")
    prefix = "gpt_neox.layers.0.attention."
    saved = {"bias": torch.ones(1, 1, 24, 24, dtype=torch.bool), "masked_bias": torch.tensor(-1e9)}
    saved["rotary_emb.inv_freq"] = torch.ones(1)
    change_weights("theirs", lambda t: t.update({prefix + name: tensor for name, tensor in saved.items()}))
    assert run_import("theirs", "--out", "run") == 0
    assert capsys.readouterr().err.count(prefix) == 3
    change_weights("theirs", lambda t: t.pop(prefix + "dense.bias"))
    assert run_import("theirs", "--out", "out") == 2
    assert f"error: theirs: {prefix}dense.bias is missing" in capsys.readouterr().err


def test_a_head_under_the_name_of_transformers_5_is_read(run_import):
    theirs = neox()
    save_theirs(theirs, "theirs")
    change_weights("theirs", lambda t: t.update({"lm_head.weight": t.pop("embed_out.weight")}))
    assert run_import("theirs", "--out", "run") == 0
    assert_same_function(runs.load(Path("run"), "best", CPU)[0], theirs)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_act": "relu"}, 'hidden_act = "relu"'),
        ({"attention_bias": False}, "attention_bias = false"),
        ({"intermediate_size": 64}, "intermediate_size = 64"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"use_parallel_residual": "yes"}, 'use_parallel_residual = "yes"'),
        (
            {"rope_parameters": None, "rotary_pct": 0.0},
            "rotary_pct must be from n_head / n_embd (4 / 32) to 1",
        ),
        (
            {"rope_parameters": None, "rotary_pct": 1.5},
            "rotary_pct must be from n_head / n_embd (4 / 32) to 1",
        ),
        ({"rope_parameters": None, "rotary_pct": "all"}, 'rotary_pct = "all"'),
        (rotated("all"), 'partial_rotary_factor = "all"'),
        ({"rope_parameters": [1]}, "rope_parameters = [1]"),
        ({"rope_theta": 500.0}, "rope_theta = 500.0"),
        ({"partial_rotary_factor": 1.0}, "partial_rotary_factor = 1.0"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'only rope_type "default"'),
    ],
)
def test_a_gpt_neox_that_cannot_be_represented_is_refused_by_name(run_import, capsys, changes, message):
    assert_refused(run_import, capsys, neox(), changes, message)


def test_without_rotation_and_positions_gpt_neox_is_stage_0():
    sizes = {"tie_word_embeddings": False}
    zero, ours = make(STAGE0, **sizes), make(NEOX, use_parallel_residual=False, hidden_act="gelu_fast")
    table = zero.state_dict()["model.embed_positions.weight"]
    table.zero_()
    weights = {name: t for name, t in zero.state_dict().items() if "embed_positions" not in name}
    for model in (zero, ours):  # without queries, all scores are 0, and a rotation changes nothing
        for layer in model.model.layers:
            torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
            torch.nn.init.zeros_(layer.self_attn.q_proj.bias)
    ours.load_state_dict(weights)
    idx = tokens(24)
    assert torch.equal(ours(idx)[0], zero(idx)[0])


@pytest.mark.parametrize("rotary_pct, n_rotated", [(0.25, 2), (0.5, 4), (0.9, 8), (1.0, 8)])
def test_only_the_first_part_of_a_head_is_rotated(monkeypatch, rotary_pct, n_rotated):
    seen = []
    monkeypatch.setattr(NEOX, "attention", lambda q, k, v, *rest: (seen.append(q), q)[1])
    model = make(NEOX, n_layer=1, rotary_pct=rotary_pct)
    model(torch.full((1, 24), 7))  # the same token everywhere
    q = seen[0][0]  # (n_head, T, head_dim)
    changes = (q[:, 1:] != q[:, :1]).any(0).any(0)  # by dimension
    assert changes.tolist() == [i < n_rotated for i in range(8)]


@pytest.mark.parametrize("parallel", [True, False])
def test_the_mlp_reads_the_input_of_the_attention_only_if_parallel(parallel):
    block = make(NEOX, n_layer=1, use_parallel_residual=parallel).model.layers[0]
    read = []
    block.post_attention_layernorm.register_forward_pre_hook(lambda _, x: read.append(x[0]))
    x = torch.randn(1, 5, 32)
    block(x, NEOX.rotation(torch.arange(5), 2, 10_000.0), NEOX.causal_mask(5, 5, "cpu"), None)
    assert torch.equal(read[0], x) is parallel


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"rotary_pct": 0.1}, "rotary_pct must be from n_head / n_embd \\(4 / 32\\) to 1, not 0.1"),
        ({"rotary_pct": float("nan")}, "not nan"),
        ({"rotary_pct": float("inf")}, "not inf"),
        ({"n_head": 32}, "must be even, for pairs"),
        ({"hidden_act": "relu"}, "hidden_act must be gelu or gelu_fast, not 'relu'"),
    ],
)
def test_impossible_sizes_of_gpt_neox_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        NEOX.GPTConfig(**{"n_head": 4, "n_embd": 32} | sizes)


# qwen3_moe


def test_stacked_experts_and_those_of_separate_files_are_the_same(run_import):
    theirs = qwen()
    save_theirs(theirs, "theirs")
    state = {name: t.contiguous().clone() for name, t in theirs.state_dict().items()}
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in state)
    names = load_file("theirs/model.safetensors").keys()
    assert any(name.endswith("mlp.experts.7.gate_proj.weight") for name in names)
    change_weights("theirs", lambda t: (t.clear(), t.update(state)))
    assert run_import("theirs", "--out", "run") == 0
    assert_same_function(runs.load(Path("run"), "best", CPU)[0], theirs)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"norm_topk_prob": False}, "norm_topk_prob = false: with num_experts_per_tok = 2"),
        ({"norm_topk_prob": None}, "norm_topk_prob = false"),  # the default of transformers
        ({"num_experts_per_tok": 1}, "norm_topk_prob = true: with num_experts_per_tok = 1"),
        ({"mlp_only_layers": [1]}, "mlp_only_layers = [1]"),
        ({"mlp_only_layers": "all"}, 'mlp_only_layers = "all"'),
        ({"mlp_only_layers": [0, 1]}, "first_k_dense_replace (2) must be below n_layer (2)"),
        ({"mlp_only_layers": [0]}, "model.layers.0.mlp."),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ({"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window = true"),
        ({"attention_bias": True}, "attention_bias = true"),
        ({"hidden_act": "gelu"}, 'hidden_act = "gelu"'),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "qwen3_moe cannot represent that"),
        ({"num_local_experts": 9}, "experts.8.down_proj.weight is missing"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)
def test_a_qwen3_moe_that_cannot_be_represented_is_refused_by_name(run_import, capsys, changes, message):
    assert_refused(run_import, capsys, qwen(), changes, message)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"router": "sigmoid"}, "qwen3_moe with router = sigmoid"),
        ({"n_shared_experts": 1}, "Qwen3MoeForCausalLM requires n_shared_experts = 0"),
        ({"routed_scaling_factor": 2.0}, "routed_scaling_factor = 2.0"),
    ],
)
def test_a_mixture_that_is_no_qwen3_moe_is_not_exported_as_one(run_export, capsys, sizes, message):
    make_run("run", "qwen3_moe", **sizes)
    assert run_export("--run", "run", "--to", "hf", "--out", "out") == 2
    explained(capsys, message)


def test_without_its_norms_qwen3_moe_is_stage_6(monkeypatch):
    sizes = {"router": "softmax", "n_shared_experts": 0}
    six, ours = make(STAGE6, **sizes), make(QWEN)
    norms = {name: t for name, t in ours.state_dict().items() if "q_norm" in name or "k_norm" in name}
    assert len(norms) == 4
    ours.load_state_dict(six.state_dict() | norms)
    for layer in ours.model.layers:
        layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()
    idx = tokens()
    results = [(*model(idx, idx), model.after_step()) for model in (six.train(), ours.train())]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_a_head_has_its_own_width_and_its_norms_have_one_weight_for_all_heads():
    attention = make(QWEN, head_dim=10).model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (40, 32) and attention.o_proj.weight.shape == (32, 40)
    assert attention.q_norm.weight.shape == attention.k_norm.weight.shape == (10,)
