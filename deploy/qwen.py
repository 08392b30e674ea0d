"""Converts configs between family/qwen2 and qwen3, and transformers' Qwen2ForCausalLM and Qwen3ForCausalLM.

The tensors have the same names, shapes and meaning in both. Qwen2's config.json states neither its biases nor
a width of heads. Those of both often have a sliding_window that use_sliding_window = false switches off.
"""

from deploy import fields, llama
from deploy.llama import BUFFERS, EMBEDDING, from_tensors, full_names, to_tensors

__all__ = ["BUFFERS", "EMBEDDING", "from_config", "from_tensors", "full_names", "to_config", "to_tensors"]

REPRESENTABLE = {
    "hidden_act": ("silu", "swish"),
    "use_sliding_window": (False,),
    "use_mrope": (False,),
    "attention_dropout": (0.0,),
    "partial_rotary_factor": (1.0,),
    "pruned_heads": ({},),
}
DEFAULTS = {  # of transformers, for missing fields
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}


def to_config(sizes: dict) -> dict:
    """config.json for a model of qwen2 or, if the sizes have a head_dim, of qwen3."""
    config = llama.to_config(sizes)
    if "head_dim" in sizes:
        del config["mlp_bias"]
        return config | {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "use_sliding_window": False,
        }
    for name in ("attention_bias", "mlp_bias", "head_dim"):
        del config[name]
    return config | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": False,
    }


def from_config(config: dict) -> tuple[str, dict]:
    """The stage and its sizes for a config.json. Raises UserError for anything it cannot represent."""
    stage = config["model_type"]
    config = DEFAULTS[stage] | config
    representable = REPRESENTABLE
    if stage == "qwen3":  # for Qwen2, transformers ignores this field
        representable = representable | {"attention_bias": (False,)}
    sizes = llama.common_sizes(config, representable, stage, any_head_dim=stage == "qwen3")
    ignored = {"sliding_window", "max_window_layers", "attention_bias"}
    fields.say_what_is_unknown(config, {*llama.READ, *REPRESENTABLE, *ignored})
    return stage, sizes
