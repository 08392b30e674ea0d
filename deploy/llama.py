"""Converts configs between stages 3 to 5 and transformers' LlamaForCausalLM.

The tensors have the same names, shapes and meaning in both. Mistral without its sliding window is the same
architecture.
"""

import json

import torch

from deploy import fields
from lab.errors import UserError

EMBEDDING = "model.embed_tokens.weight"
BUFFERS = r"rotary_emb\.inv_freq$"  # RoPE's frequencies, which old versions of transformers saved

REPRESENTABLE = {
    "hidden_act": ("silu", "swish"),  # two names for one function
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (None,),
    "attention_dropout": (0.0,),  # our dropout applies to more than the attention weights
    "partial_rotary_factor": (1.0,),
    "pruned_heads": ({},),
    "quantization_config": (None,),
}
# transformers' defaults for missing fields.
MISTRAL = {"num_key_value_heads": 8, "sliding_window": 4096}


def to_config(sizes: dict) -> dict:
    """config.json for a model of stages 3 to 5. Omits dropout: Llama has none in the residual stream."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sizes["vocab_size"],
        "max_position_embeddings": sizes["block_size"],
        "hidden_size": sizes["n_embd"],
        "intermediate_size": sizes["intermediate_size"],
        "num_hidden_layers": sizes["n_layer"],
        "num_attention_heads": sizes["n_head"],
        "num_key_value_heads": sizes.get("n_kv_head", sizes["n_head"]),
        "head_dim": sizes["n_embd"] // sizes["n_head"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": sizes["norm_eps"],
        "rope_theta": sizes["rope_theta"],  # transformers 4 and other programs read it here
        "rope_parameters": {"rope_type": "default", "rope_theta": sizes["rope_theta"]},  # transformers 5
        "tie_word_embeddings": sizes["tie_word_embeddings"],
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
    }


def from_config(config: dict) -> tuple[str, dict]:
    """The stage and its sizes for a config.json. Raises UserError for anything the stage cannot represent."""
    if config["model_type"] == "mistral":
        config = MISTRAL | config
    sizes = common_sizes(config, REPRESENTABLE, "stages 3 and 4")
    # pretraining_tp has no effect on the result: it splits the matrix products into parts.
    fields.say_what_is_unknown(config, {*READ, *REPRESENTABLE, "head_dim", "pretraining_tp"})
    if sizes["n_kv_head"] == sizes["n_head"]:
        del sizes["n_kv_head"]
        return "stage3_swiglu", sizes
    return "stage4_gqa", sizes


# The fields that common_sizes reads.
READ = {"vocab_size", "max_position_embeddings", "num_hidden_layers", "num_attention_heads", "hidden_size"}
READ |= {"num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "intermediate_size"}
READ |= {"rope_theta", "rope_parameters", "rope_scaling", "layer_types"}


def common_sizes(
    config: dict, representable: dict, ours: str, theta: float = 10_000.0, eps: float = 1e-6
) -> dict:
    """Our sizes from the fields that Llama-like models share.

    Raises UserError for anything that `ours`, the stages to name in the message, cannot represent. theta and
    eps are transformers' defaults for missing fields.
    """
    n_embd, n_head = fields.size(config, "hidden_size"), fields.size(config, "num_attention_heads")
    fields.refuse_others(config, representable | {"head_dim": (n_embd // n_head,)}, ours)
    if any(kind != "full_attention" for kind in config.get("layer_types") or []):
        raise UserError(
            f"config.json has layer_types = {json.dumps(config['layer_types'])}: {ours} cannot "
            'represent that, only "full_attention"'
        )
    return {
        "vocab_size": fields.size(config, "vocab_size"),
        "block_size": fields.size(config, "max_position_embeddings"),
        "n_layer": fields.size(config, "num_hidden_layers"),
        "n_head": n_head,
        "n_kv_head": fields.size(config, "num_key_value_heads", n_head),
        "n_embd": n_embd,
        "norm_eps": fields.real(config, "rms_norm_eps", eps),
        "tie_word_embeddings": fields.flag(config, "tie_word_embeddings", False),
        "intermediate_size": fields.size(config, "intermediate_size"),
        "rope_theta": rope_theta(config, ours, theta),
    }


def rope_theta(config: dict, ours: str, default: float) -> float:
    """RoPE's base, from rope_parameters (transformers 5) or rope_theta (transformers 4 and older)."""
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(name) or {}
    plain = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0, "rope_theta": None}
    if not isinstance(rope, dict) or any(
        value not in (None, plain.get(key)) for key, value in rope.items() if key != "rope_theta"
    ):
        raise UserError(
            f"config.json has {name} = {json.dumps(rope)}: {ours} cannot represent that, "
            'only rope_type "default", without scaling'
        )
    return fields.real(config | rope, "rope_theta", default)


def to_tensors(ours: dict[str, torch.Tensor], sizes: dict) -> dict[str, torch.Tensor]:
    """Converts our tensors to theirs; they are the same."""
    return ours


def from_tensors(theirs: dict[str, torch.Tensor], sizes: dict) -> dict[str, torch.Tensor]:
    """Converts their tensors to ours; they are the same."""
    return theirs


def full_names(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Their tensors under LlamaForCausalLM's names, which they already have."""
    return theirs
