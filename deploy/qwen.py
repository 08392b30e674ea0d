"""Converts configs between family/qwen2 and transformers' Qwen2ForCausalLM.

The tensors have the same names, shapes and meaning in both. Qwen2's config.json states neither its biases nor
a width of heads, and it often has a sliding_window that use_sliding_window = false switches off.
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
    "quantization_config": (None,),
}
DEFAULTS = {"num_key_value_heads": 32}  # of transformers, for missing fields


def to_config(sizes: dict) -> dict:
    """config.json for a model of qwen2."""
    config = llama.to_config(sizes)
    for name in ("attention_bias", "mlp_bias", "head_dim"):
        del config[name]
    return config | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": False,
    }


def from_config(config: dict) -> tuple[str, dict]:
    """The stage and its sizes for a config.json. Raises UserError for anything it cannot represent."""
    config = DEFAULTS | config
    sizes = llama.common_sizes(config, REPRESENTABLE, "qwen2")
    ignored = {"sliding_window", "max_window_layers", "attention_bias"}  # the biases are always there
    fields.say_what_is_unknown(config, {*llama.READ, *REPRESENTABLE, *ignored})
    return "qwen2", sizes
