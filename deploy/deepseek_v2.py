"""Converts configs between family/deepseek_v2 and transformers' DeepseekV2ForCausalLM.

The tensors are converted as for DeepSeek-V3. DeepSeek-V2 has no multi-token prediction, and it always rotates
neighbouring dimensions together.
"""

from deploy import deepseek, fields
from deploy.deepseek import BUFFERS, EMBEDDING, from_tensors, full_names, to_tensors
from lab.errors import UserError

__all__ = ["BUFFERS", "EMBEDDING", "from_config", "from_tensors", "full_names", "to_config", "to_tensors"]

STAGE = "deepseek_v2"
REPRESENTABLE = deepseek.COMMON | {
    "norm_topk_prob": (False,),
    "scoring_func": ("softmax",),
    "topk_method": ("greedy", "group_limited_greedy"),
    "rope_interleave": (True,),
}


def to_config(sizes: dict) -> dict:
    """config.json for a model of family/deepseek_v2; UserError if it is not a DeepSeek-V2."""
    if sizes["router"] != "softmax" or sizes["norm_topk_prob"] or sizes["n_shared_experts"] < 1:
        raise UserError(
            f"{STAGE} has a counterpart in transformers, DeepseekV2ForCausalLM, only with router softmax, "
            "norm_topk_prob False and n_shared_experts of 1 or more"
        )
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": STAGE,
        **deepseek.common_fields(sizes),
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "topk_method": "greedy" if sizes["n_group"] == 1 else "group_limited_greedy",
        "mlp_bias": False,
    }


def from_config(config: dict) -> tuple[str, dict]:
    """The stage and its sizes for a config.json. Raises UserError for anything it cannot represent."""
    if config.get("topk_method") != "group_limited_greedy":  # then the groups have no effect
        config = config | {"n_group": 1, "topk_group": 1}
    sizes = deepseek.common_sizes(config, REPRESENTABLE, STAGE)
    sizes |= {
        "first_k_dense_replace": int(fields.real(config, "first_k_dense_replace", 0)),
        "routed_scaling_factor": fields.real(config, "routed_scaling_factor", 1.0),
        "router": "softmax",
        "norm_topk_prob": False,
    }
    fields.say_what_is_unknown(config, {*deepseek.READ, *REPRESENTABLE})
    return STAGE, sizes
