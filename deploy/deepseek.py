"""Converts between DeepSeek-V3 in our code and transformers' DeepseekV3ForCausalLM: configs and tensors.

Kimi-K2 is a DeepSeek-V3 under another model_type, and is exported as what it is.
Ours is family/deepseek_v3, or stage 7a or 7 without groups of experts, a latent for the queries, and YaRN.
Both sides use DeepSeek-V3's names, also for multi-token prediction (model.layers.{n_layer} and on), but its
files hold each expert's matrices separately. DeepSeek rotates neighbouring dimensions together
(rope_interleave), we rotate the two halves: so the rotated rows of queries and keys are reordered.
"""

import re

import torch

from deploy import fields
from deploy.mixtral import split_experts, stack_experts
from lab.errors import UserError

STAGE, FULL = "stage7_mla_mtp", "deepseek_v3"
# What only family/deepseek_v3 has, and the values that switch it off.
SWITCHED_OFF = {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "rope_scaling": None}
EMBEDDING = "model.embed_tokens.weight"
BUFFERS = r"rotary_emb\.inv_freq$"

COMMON = {  # of DeepSeek-V2 and V3
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "moe_layer_freq": (1,),
    "partial_rotary_factor": (1.0,),
    "sliding_window": (None,),
}
REPRESENTABLE = COMMON | {
    "norm_topk_prob": (True,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
}
YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
NAMES = "mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight", "mlp.experts.{}.down_proj.weight"
SIZES = {  # theirs: ours
    "vocab_size": "vocab_size",
    "max_position_embeddings": "block_size",
    "hidden_size": "n_embd",
    "intermediate_size": "intermediate_size",
    "moe_intermediate_size": "moe_intermediate_size",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "n_shared_experts": "n_shared_experts",
    "n_routed_experts": "n_routed_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "n_group": "n_group",
    "topk_group": "topk_group",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}


def to_config(sizes: dict) -> dict:
    """config.json for the sizes of stage 7a, 7 or deepseek_v3; UserError where they are no DeepSeek-V3's."""
    sizes = SWITCHED_OFF | {"num_nextn_predict_layers": 0} | sizes
    if sizes["router"] != "sigmoid" or sizes["n_shared_experts"] < 1 or sizes["num_experts_per_tok"] < 2:
        raise UserError(
            "latent attention has a counterpart in transformers, DeepseekV3ForCausalLM, only with router "
            "sigmoid, n_shared_experts of 1 or more and num_experts_per_tok of 2 or more"
        )
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **common_fields(sizes),
        "num_nextn_predict_layers": sizes["num_nextn_predict_layers"],
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_interleave": True,
    }


def common_fields(sizes: dict) -> dict:
    """The fields of config.json that DeepSeek-V2 and V3 share."""
    rope = {"rope_type": "default", "rope_theta": sizes["rope_theta"]}
    old_rope = {}  # what transformers 4 and other programs read besides rope_theta
    if sizes["rope_scaling"]:
        original = int(sizes["rope_scaling"]["original_max_position_embeddings"])
        scaling = {"rope_type": "yarn", **sizes["rope_scaling"], "original_max_position_embeddings": original}
        rope |= scaling
        old_rope = {"rope_scaling": {"type": "yarn", **scaling}}
    return {
        **{theirs: sizes[ours] for theirs, ours in SIZES.items()},
        "num_key_value_heads": sizes["n_head"],
        "q_lora_rank": sizes["q_lora_rank"],
        "first_k_dense_replace": sizes["first_k_dense_replace"],
        "routed_scaling_factor": sizes["routed_scaling_factor"],
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": sizes["norm_eps"],
        "rope_theta": sizes["rope_theta"],
        **old_rope,
        "rope_parameters": rope,
        "tie_word_embeddings": sizes["tie_word_embeddings"],
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
    }


def from_config(config: dict) -> tuple[str, dict]:
    """The stage and its sizes for a config.json; UserError for what deepseek_v3 cannot represent."""
    sizes = common_sizes(config, REPRESENTABLE, FULL)
    if sizes["num_experts_per_tok"] < 2:
        raise UserError(
            "config.json has num_experts_per_tok = 1: deepseek_v3 cannot represent that, only 2 or more"
        )
    sizes |= {
        "first_k_dense_replace": int(fields.real(config, "first_k_dense_replace", 3)),
        "routed_scaling_factor": fields.real(config, "routed_scaling_factor", 2.5),
        "num_nextn_predict_layers": int(fields.real(config, "num_nextn_predict_layers", 0)),
        "router": "sigmoid",
    }
    interleaved = fields.flag(config, "rope_interleave", True)
    read = {"num_nextn_predict_layers", "num_mtp_layers", "rope_interleave"}
    fields.say_what_is_unknown(config, {*READ, *REPRESENTABLE, *read})
    if all(sizes[name] == value for name, value in SWITCHED_OFF.items()):
        sizes = {name: value for name, value in sizes.items() if name not in SWITCHED_OFF}
        return STAGE, sizes | {"rope_interleave": interleaved}
    return FULL, sizes | {"rope_interleave": interleaved}


# The fields that both models' from_config read, and those of training and serving.
READ = {*SIZES, "num_key_value_heads", "q_lora_rank", "first_k_dense_replace", "routed_scaling_factor"}
READ |= {"rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_parameters", "rope_scaling"}
READ |= {
    "head_dim",
    "qk_head_dim",
    "pretraining_tp",
    "output_router_logits",
    "ep_size",
    "aux_loss_alpha",
    "seq_aux",
}


def common_sizes(config: dict, representable: dict, ours: str) -> dict:
    """Our sizes from the fields that DeepSeek-V2 and V3 share; UserError for what `ours` cannot represent."""
    n_head = fields.size(config, "num_attention_heads")
    fields.refuse_others(config, representable | {"num_key_value_heads": (n_head,)}, ours)
    return {
        **{own: fields.size(config, theirs) for theirs, own in SIZES.items()},
        "q_lora_rank": fields.size(config, "q_lora_rank") if config.get("q_lora_rank") else None,
        "norm_eps": fields.real(config, "rms_norm_eps", 1e-6),
        "tie_word_embeddings": fields.flag(config, "tie_word_embeddings", False),
        **positions(config, ours),
    }


def positions(config: dict, ours: str) -> dict:
    """rope_theta and rope_scaling, from rope_parameters (transformers 5) or rope_scaling (4 and before)."""
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(name) or {}
    if not isinstance(rope, dict):
        raise UserError(f"config.json has {name} = {fields.shortened(rope)}: it must be an object")
    theta = fields.real(config | rope, "rope_theta", 10_000.0)
    rope = dict(rope)
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    given = {key: value for key, value in rope.items() if value is not None}
    given.pop("rope_theta", None), given.pop("type", None)
    scaling = {key: given.pop(key) for key in YARN if key in given}
    plain = kind == "default" and not scaling
    yarn = kind == "yarn" and {"factor", "original_max_position_embeddings"} <= scaling.keys()
    if (
        not (plain or yarn)
        or given.pop("truncate", True) is not True
        or given.pop("partial_rotary_factor", 1) != 1
        or given
    ):
        raise UserError(
            f"config.json has {name} = {fields.shortened(config[name])}: {ours} cannot represent that, only "
            f'rope_type "default", or "yarn" with {", ".join(YARN)}'
        )
    return {
        "rope_theta": theta,
        "rope_scaling": {key: fields.real(scaling, key, 0.0) for key in scaling} or None,
    }


def fit_to_tensors(sizes: dict, names: list[str]) -> dict:
    """The sizes with as many blocks of multi-token prediction as the files have: most have none."""
    found = len({int(n) for name in names for n in re.findall(r"^model\.layers\.(\d+)\.eh_proj\.", name)})
    return sizes | {"num_nextn_predict_layers": found}


def to_tensors(ours: dict[str, torch.Tensor], sizes: dict) -> dict[str, torch.Tensor]:
    """Their tensors."""
    paired = pair_rows(ours, sizes, to_neighbours=True) if sizes.get("rope_interleave", True) else ours
    return split_experts(paired, NAMES)


def from_tensors(theirs: dict[str, torch.Tensor], sizes: dict) -> dict[str, torch.Tensor]:
    """Our tensors."""
    stacked = stack_experts(theirs, NAMES, sizes["n_routed_experts"])
    return pair_rows(stacked, sizes, to_neighbours=False) if sizes.get("rope_interleave", True) else stacked


def full_names(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Their tensors as published, also where transformers 5 stacked the experts; without the copies of the
    embedding and the head that the blocks of multi-token prediction come with."""
    copies = {"embed_tokens.weight": EMBEDDING, "shared_head.head.weight": "lm_head.weight"}
    kept = {}
    for name, tensor in split_experts(theirs, NAMES).items():
        match = re.fullmatch(r"model\.layers\.\d+\.(embed_tokens\.weight|shared_head\.head\.weight)", name)
        if match:
            tied = theirs.get(EMBEDDING, theirs.get("lm_head.weight"))  # saved under either name
            shared = theirs.get(copies[match.group(1)], tied)
            if shared is None or not torch.equal(shared, tensor):
                raise UserError(f"{name} differs from the model's own: deepseek_v3 cannot represent that")
            continue
        kept[name] = tensor
    return kept


def pair_rows(tensors: dict[str, torch.Tensor], sizes: dict, to_neighbours: bool) -> dict[str, torch.Tensor]:
    """The tensors with the rotated rows of queries and keys in the other order: halves or neighbours."""
    rope, nope, rank = (sizes[name] for name in ("qk_rope_head_dim", "qk_nope_head_dim", "kv_lora_rank"))
    order = torch.arange(rope).view(2, -1).T if to_neighbours else torch.arange(rope).view(-1, 2).T
    of_head = torch.cat((torch.arange(nope), nope + order.flatten()))
    of_query = (torch.arange(sizes["n_head"])[:, None] * (nope + rope) + of_head).flatten()
    of_key = torch.cat((torch.arange(rank), rank + order.flatten()))
    orders = {
        "self_attn.q_proj.weight": of_query,
        "self_attn.q_b_proj.weight": of_query,
        "self_attn.kv_a_proj_with_mqa.weight": of_key,
    }
    reordered = {}
    for name, tensor in tensors.items():
        rows = next((rows for end, rows in orders.items() if name.endswith(end)), None)
        reordered[name] = tensor if rows is None else tensor[rows.to(tensor.device)]
    return reordered
