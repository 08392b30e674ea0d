"""Converts configs between family/mistral and transformers' MistralForCausalLM.

The tensors have the same names, shapes and meaning in both. Without a sliding window and with heads of n_embd
/ n_head dimensions, Mistral is stage 5, like Llama.
"""

from deploy import fields, llama
from deploy.llama import BUFFERS, EMBEDDING, from_tensors, full_names, to_tensors

__all__ = ["BUFFERS", "EMBEDDING", "from_config", "from_tensors", "full_names", "to_config", "to_tensors"]

REPRESENTABLE = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "partial_rotary_factor": (1.0,),
    "pruned_heads": ({},),
}
DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096}  # of transformers, for missing fields


def to_config(sizes: dict) -> dict:
    """config.json for a model of family/mistral."""
    config = llama.to_config(sizes)
    del config["attention_bias"], config["mlp_bias"]  # Mistral has neither
    return config | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": sizes["sliding_window"],
    }


def from_config(config: dict) -> tuple[str, dict]:
    """The stage and its sizes for a config.json. Raises UserError for anything mistral cannot represent."""
    config = DEFAULTS | config
    sizes = llama.common_sizes(config, REPRESENTABLE, "mistral", any_head_dim=True)
    fields.say_what_is_unknown(config, {*llama.READ, *REPRESENTABLE, "sliding_window"})
    if config["sliding_window"] is not None:
        sizes["sliding_window"] = fields.size(config, "sliding_window")
    elif sizes["n_head"] * sizes["head_dim"] == sizes["n_embd"]:
        return llama.plain_stage(sizes)
    return "mistral", sizes
