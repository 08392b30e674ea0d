"""Configurations as published: each is imported as the function of transformers, or refused by a field.

They are those of the models' config.json, without fields that repeat what all have; sizes are shrunk below.
"""

import json
from pathlib import Path

import pytest
import test_deploy
import torch
from test_deploy import CPU, explained, run_export, run_import, save_theirs
from test_family_llama import assert_same_function
from transformers import AutoConfig, AutoModelForCausalLM

from deploy import fields, import_hf
from lab.errors import UserError
from lab.storage import runs

__all__ = ["run_export", "run_import"]  # fixtures

ALL = {
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "use_cache": True,
}
LLAMA = ALL | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "vocab_size": 128256, "pretraining_tp": 1,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3_POSITIONS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3_POSITIONS |= {"rope_type": "llama3"}
NO_BIASES = {"attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0}
SMOLLM2 = LLAMA | NO_BIASES | {
    "tie_word_embeddings": True, "is_llama_config": True, "rope_interleaved": False, "pad_token_id": 2,
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
}  # fmt: skip
MISTRAL = {key: value for key, value in LLAMA.items() if key != "pretraining_tp"}
MISTRAL |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN2 = MISTRAL | {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "attention_dropout": 0.0,
    "max_window_layers": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 131072,
    "use_sliding_window": False,
}  # fmt: skip
YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
DEEPSEEK = ALL | {
    "attention_bias": False, "attention_dropout": 0.0, "first_k_dense_replace": 1, "hidden_act": "silu",
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}, "aux_loss_alpha": 0.001,
    "bos_token_id": 0, "eos_token_id": 1, "hidden_size": 2048, "intermediate_size": 10944,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 1408,
    "moe_layer_freq": 1, "num_attention_heads": 16, "num_hidden_layers": 27, "num_key_value_heads": 16,
    "pretraining_tp": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6,
    "rope_theta": 10000, "seq_aux": True, "tie_word_embeddings": False, "v_head_dim": 128,
    "vocab_size": 102400,
}  # fmt: skip
V2_LITE = DEEPSEEK | {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "n_group": 1, "topk_group": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "norm_topk_prob": False,
    "q_lora_rank": None, "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0, "scoring_func": "softmax", "topk_method": "greedy",
}  # fmt: skip
V3 = DEEPSEEK | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "ep_size": 1, "n_group": 8,
    "topk_group": 4, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
    "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc",
}  # fmt: skip
WITHOUT_YARN = {key: value for key, value in V3.items() if key != "rope_scaling"}
KIMI = V3 | {
    "model_type": "kimi_k2", "n_group": 1, "topk_group": 1, "n_routed_experts": 384, "rope_theta": 50000.0,
    "num_nextn_predict_layers": 0, "routed_scaling_factor": 2.827,
    "rope_scaling": V3["rope_scaling"] | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
}  # fmt: skip
GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
    "bos_token_id": 1, "embd_pdrop": 0.1, "eos_token_id": 1, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12,
    "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None,
    "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
    "summary_use_proj": True, "vocab_size": 50257,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}  # fmt: skip
PUBLISHED = {  # name: the stage, and config.json
    "GPT-2": ("stage0_gpt", GPT2),
    "Llama-2-7b": ("stage5_flash", LLAMA | {"num_key_value_heads": 32, "rope_scaling": None}),
    "TinyLlama-1.1B": ("stage5_flash", LLAMA | {"attention_bias": False, "rope_theta": 10000.0}),
    "Llama-3.1-8B-Instruct": ("llama3", LLAMA | NO_BIASES | {
        "rope_theta": 500000.0, "rope_scaling": LLAMA3_POSITIONS | {"factor": 8.0}, "eos_token_id": [3, 4, 5],
    }),
    "Llama-3.2-1B": ("llama3", LLAMA | NO_BIASES | {
        "rope_theta": 500000.0, "rope_scaling": LLAMA3_POSITIONS | {"factor": 32.0}, "head_dim": 128,
        "tie_word_embeddings": True,
    }),
    "SmolLM2-135M": ("stage5_flash", SMOLLM2 | {"rope_scaling": None, "rope_theta": 100000}),
    "SmolLM2-135M by transformers 5": ("stage5_flash", SMOLLM2 | {
        "dtype": "bfloat16", "head_dim": 128, "pad_token_id": None,
        "rope_parameters": {"rope_theta": 100000, "rope_type": "default"},
    }),
    "Mistral-7B-v0.1": ("mistral", MISTRAL | {"rope_theta": 10000.0, "sliding_window": 4096}),
    "Mistral-Nemo-12B": ("mistral", MISTRAL | {
        "head_dim": 96, "rope_theta": 1e6, "sliding_window": None, "attention_dropout": 0.0,
    }),
    "Mixtral-8x7B-v0.1": ("stage6_moe", MISTRAL | {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_experts_per_tok": 2,
        "num_local_experts": 8, "output_router_logits": False, "router_aux_loss_coef": 0.02,
        "rope_theta": 1e6, "sliding_window": None, "attention_dropout": 0.0,
    }),
    "Qwen2-0.5B": ("qwen2", QWEN2 | {"tie_word_embeddings": True}),
    "Qwen2.5-7B": ("qwen2", QWEN2 | {"use_mrope": False}),
    "Qwen3-0.6B": ("qwen3", QWEN2 | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
        "head_dim": 256, "rope_scaling": None, "sliding_window": None, "tie_word_embeddings": True,
    }),
    "DeepSeek-V2-Lite": ("deepseek_v2", V2_LITE),
    "DeepSeek-V2": ("deepseek_v2", V2_LITE | {
        "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy", "n_routed_experts": 160,
        "q_lora_rank": 1536, "routed_scaling_factor": 16.0,
    }),
    "DeepSeek-V3 in bfloat16": ("deepseek_v3", V3),
    "Moonlight-16B-A3B": ("stage7_mla_mtp", WITHOUT_YARN | {
        "n_group": 1, "topk_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "q_lora_rank": None,
        "num_experts_per_tok": 6, "rms_norm_eps": 1e-5, "rope_theta": 50000.0, "routed_scaling_factor": 2.446,
        "num_nextn_predict_layers": 0,
    }),
    "Kimi-K2": ("deepseek_v3", KIMI),
    "Kimi-K2-0905": ("deepseek_v3", KIMI | {"rope_scaling": KIMI["rope_scaling"] | {"factor": 64.0}}),
}  # fmt: skip
SHRUNK = {
    "vocab_size": 61, "hidden_size": 32, "n_embd": 32, "intermediate_size": 48, "moe_intermediate_size": 24,
    "num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 4, "n_head": 4, "n_routed_experts": 16,
    "max_position_embeddings": 24, "n_positions": 64, "n_ctx": 64, "kv_lora_rank": 20, "q_lora_rank": 12,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 12, "sliding_window": 8,
}  # fmt: skip


def shrunk(config):
    """The config with small sizes, in the same relations; GPT-2's context holds the tests' tokens."""
    small = {key: SHRUNK[key] for key, value in config.items() if key in SHRUNK and value is not None}
    if "num_key_value_heads" in config:
        small["num_key_value_heads"] = (
            4 if config["num_key_value_heads"] == config["num_attention_heads"] else 2
        )
    if "head_dim" in config:
        small["head_dim"] = config["head_dim"] // 16
    if (config.get("rope_scaling") or {}).get("original_max_position_embeddings"):
        small["rope_scaling"] = config["rope_scaling"] | {"original_max_position_embeddings": 16}
    return config | small


def published(config, folder="theirs"):
    """A folder with random weights and config.json as published; returns their model."""
    known = {key: value for key, value in config.items() if key != "auto_map"}
    if config["model_type"] == "kimi_k2":  # which transformers does not know
        known["model_type"] = "deepseek_v3"
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**known), dtype=torch.float32)
    model = test_deploy.shake(made)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.3)
    save_theirs(model, folder)
    Path(folder, "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("stage, config", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_a_published_config_is_read_without_a_word_as_the_function_of_transformers(
    run_import, run_export, capsys, stage, config
):
    theirs = published(shrunk(config))
    capsys.readouterr()
    assert run_import("theirs", "--out", "run") == 0
    assert capsys.readouterr().err == ""
    ours, of_run = runs.load(Path("run"), "best", CPU)
    assert of_run["stage"] == stage
    assert_same_function(ours, theirs)
    assert run_export("--run", "run", "--to", "hf", "--out", "back") == 0
    back = AutoModelForCausalLM.from_pretrained("back")
    assert type(back) is type(theirs)
    assert_same_function(ours, back)
    assert back.config.eos_token_id == theirs.config.eos_token_id


# Refused

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
LONGROPE = {"long_factor": [1.07] * 48, "short_factor": [1.1] * 48, "type": "longrope"}
OTHERS = {  # name: config.json, and what the message says
    "Gemma-2-2b": (
        LLAMA | {
            "model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
            "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
        },
        "model_type 'gemma2' with attn_logit_softcapping = 50.0 and final_logit_softcapping = 30.0",
    ),
    "Falcon-7b-instruct": (
        ALL | {
            "model_type": "falcon", "alibi": False, "bias": False, "hidden_size": 4544, "multi_query": True,
            "new_decoder_architecture": False, "num_attention_heads": 71, "num_kv_heads": 71,
            "parallel_attn": True,
        },
        "model_type 'falcon' with multi_query = true and parallel_attn = true",
    ),
    "Phi-3-mini-128k-instruct": (
        LLAMA | {"model_type": "phi3", "rope_scaling": LONGROPE, "sliding_window": 262144},
        "[1.1, 1.1, …], \"type\": \"longrope\"}: no stage can represent that",
    ),
    "DeepSeek-MoE-16b": (
        LLAMA | {
            "model_type": "deepseek", "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
            "norm_topk_prob": False, "scoring_func": "softmax", "first_k_dense_replace": 1,
        },
        "model_type 'deepseek' with norm_topk_prob = false",
    ),
    "an unknown one": (LLAMA | {"model_type": "my_llama"}, "model_type 'my_llama': no stage can"),
    "none": ({"hidden_size": 4096}, "model_type None: no stage can"),
}  # fmt: skip


@pytest.mark.parametrize("config, message", OTHERS.values(), ids=OTHERS.keys())
def test_another_architecture_is_refused_by_model_type_and_field(run_import, capsys, config, message):
    Path("theirs").mkdir()
    Path("theirs/config.json").write_text(json.dumps(config))
    assert run_import("theirs", "--out", "out") == 2
    explained(capsys, message, "supported are the model_types gpt2, llama,")


def test_fp8_weights_are_refused_by_the_field_before_they_are_read(run_import, capsys):
    config = shrunk(V3)
    published(config)
    Path("theirs/config.json").write_text(json.dumps(config | {"quantization_config": FP8}))
    assert run_import("theirs", "--out", "out") == 2
    explained(capsys, 'quantization_config = {"activation_scheme": "dynamic", "fmt": "e4m3"', "to bfloat16")


# Fields that a class of transformers ignores or reads, and that no stage has.
EVERYWHERE = {
    "quantization_config": [FP8, *({"quant_method": method} for method in ("gptq", "awq", "bitsandbytes"))],
    "attn_logit_softcapping": [50.0],
    "final_logit_softcapping": [30.0],
    "mlp_bias": [True],
    "alibi": [True],
    "is_causal": [False],
    "layer_types": [["full_attention", "sliding_attention"]],
}
WITH_ROPE = {
    "partial_rotary_factor": [0.5],
    "rope_scaling": [LONGROPE, {"type": "su", "factor": 4.0}, {"rope_type": "ntk", "factor": 4.0}],
    "rope_parameters": [LONGROPE | {"rope_theta": 1e4}, {"rope_theta": 1e4, "partial_rotary_factor": 0.5}],
}


@pytest.mark.parametrize("config", [config for _, config in PUBLISHED.values()], ids=PUBLISHED.keys())
def test_what_no_stage_has_is_refused_by_the_fields_name_whatever_the_model(config):
    kind = config["model_type"]
    refused = EVERYWHERE | ({} if kind == "gpt2" else WITH_ROPE)
    if kind not in ("gpt2", "qwen2"):  # which have these biases
        refused = refused | {"attention_bias": [True]}
    if kind not in ("gpt2", "mistral", "qwen2", "qwen3"):  # mistral has windows; Qwen switches them elsewhere
        refused = refused | {"sliding_window": [8]}
    for name, values in refused.items():
        for value in values:
            changed = shrunk(config) | {name: value}
            if name == "rope_parameters":
                changed["rope_scaling"] = None
            with pytest.raises(UserError, match=f"config.json has {name} = ") as error:
                import_hf.COUNTERPARTS[kind].from_config(changed)
            assert len(str(error.value)) < 400


def test_values_that_switch_a_field_off_are_read_without_a_word(capsys):
    off = {name: possible[0] for name, possible in fields.SWITCHED_OFF.items()}
    for _, config in PUBLISHED.values():
        import_hf.COUNTERPARTS[config["model_type"]].from_config(shrunk(config) | off)
    assert capsys.readouterr().err == ""
