"""Converts configs between our code and transformers' LlamaForCausalLM.

Ours is stage 3, 4 or 5 or, with scaled positions or heads of another width, family/llama3. The tensors have
the same names, shapes and meaning in both.
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
    "sliding_window": (None,),
    "attention_dropout": (0.0,),  # our dropout applies to more than the attention weights
    "partial_rotary_factor": (1.0,),
    "pruned_heads": ({},),
}
# llama3's ways to scale positions, and the fields that each requires.
SCALING = {"linear": {"factor"}, "dynamic": {"factor"}}
SCALING["llama3"] = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


def to_config(sizes: dict) -> dict:
    """config.json for stages 3 to 5 and llama3. Omits dropout: Llama has none in the residual stream."""
    rope = {"rope_type": "default", "rope_theta": sizes["rope_theta"]}
    old_rope = {}  # what transformers 4 and other programs read besides rope_theta
    if sizes.get("rope_scaling"):
        rope |= {"rope_type": sizes["rope_type"], **sizes["rope_scaling"]}
        if "original_max_position_embeddings" in rope:
            rope["original_max_position_embeddings"] = int(rope["original_max_position_embeddings"])
        old_rope = {"rope_scaling": {key: value for key, value in rope.items() if key != "rope_theta"}}
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
        "head_dim": sizes.get("head_dim", sizes["n_embd"] // sizes["n_head"]),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": sizes["norm_eps"],
        "rope_theta": sizes["rope_theta"],  # transformers 4 and other programs read it here
        **old_rope,
        "rope_parameters": rope,  # transformers 5
        "tie_word_embeddings": sizes["tie_word_embeddings"],
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
    }


def from_config(config: dict) -> tuple[str, dict]:
    """The stage and its sizes for a config.json. Raises UserError for anything llama3 cannot represent."""
    sizes = common_sizes(config, REPRESENTABLE, "llama3", scaling=SCALING, any_head_dim=True)
    # pretraining_tp has no effect on the result: it splits the matrix products into parts.
    fields.say_what_is_unknown(config, {*READ, *REPRESENTABLE, "pretraining_tp"})
    if sizes["rope_type"] != "default" or sizes["n_head"] * sizes["head_dim"] != sizes["n_embd"]:
        return "llama3", sizes
    return plain_stage(sizes)


def plain_stage(sizes: dict) -> tuple[str, dict]:
    """Stage 5 and its sizes, without those that only the relatives have.

    Stages 3 and 4 are the same function. Stage 5 needs no memory for scores, and is faster.
    """
    own = ("head_dim", "rope_type", "rope_scaling")
    return "stage5_flash", {name: value for name, value in sizes.items() if name not in own}


# The fields that common_sizes reads.
READ = {"vocab_size", "max_position_embeddings", "num_hidden_layers", "num_attention_heads", "hidden_size"}
READ |= {"num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "intermediate_size"}
READ |= {"rope_theta", "rope_parameters", "rope_scaling", "layer_types", "head_dim"}


def common_sizes(
    config: dict,
    representable: dict,
    ours: str,
    theta: float = 10_000.0,
    eps: float = 1e-6,
    scaling: dict[str, set] | None = None,
    any_head_dim: bool = False,
) -> dict:
    """Our sizes from the fields that Llama-like models share.

    Raises UserError for anything that `ours`, the stages to name in the message, cannot represent. theta and
    eps are transformers' defaults for missing fields. scaling: the fields of each rope_type that ours has
    besides "default"; the sizes then include rope_type and rope_scaling. any_head_dim: they include head_dim,
    which otherwise must be n_embd / n_head.
    """
    n_embd, n_head = fields.size(config, "hidden_size"), fields.size(config, "num_attention_heads")
    own = positions(config, ours, theta, scaling or {})
    if any_head_dim:
        given = config.get("head_dim") is not None
        own["head_dim"] = fields.size(config, "head_dim") if given else n_embd // n_head
    else:
        representable = representable | {"head_dim": (n_embd // n_head,)}
    fields.refuse_others(config, representable, ours)
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
        **own,
    }


def positions(config: dict, ours: str, theta: float, scaling: dict[str, set]) -> dict:
    """rope_theta, from rope_parameters (transformers 5) or rope_theta (transformers 4 and older).

    If scaling is not empty also rope_type and rope_scaling. UserError for anything else than "default" and
    the types in scaling.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(name) or {}
    if not isinstance(rope, dict):
        raise UserError(f"config.json has {name} = {json.dumps(rope)}: it must be an object")
    given = {key: value for key, value in rope.items() if value is not None}
    kind, old_kind = given.pop("rope_type", None), given.pop("type", None)
    kind = kind or old_kind or "default"
    base = fields.real(config | given, "rope_theta", theta)
    given.pop("rope_theta", None)
    if given.get("partial_rotary_factor") == 1.0:
        del given["partial_rotary_factor"]
    required = ({"default": set()} | scaling).get(str(kind))
    if kind == "llama3" and "original_max_position_embeddings" not in given:  # as transformers 5
        given["original_max_position_embeddings"] = fields.size(config, "max_position_embeddings")
    if given.keys() != required:
        types = [f'"{kind}" with {", ".join(sorted(needed))}' for kind, needed in scaling.items()]
        possible = " or ".join(['"default", without scaling', *types])
        raise UserError(
            f"config.json has {name} = {fields.shortened(rope)}: {ours} cannot represent that, "
            f"only rope_type {possible}"
        )
    if not scaling:
        return {"rope_theta": base}
    numbers = {key: fields.real(given, key, 0.0) for key in given}
    return {"rope_theta": base, "rope_type": kind, "rope_scaling": numbers or None}


def to_tensors(ours: dict[str, torch.Tensor], sizes: dict) -> dict[str, torch.Tensor]:
    """Converts our tensors to theirs; they are the same."""
    return ours


def from_tensors(theirs: dict[str, torch.Tensor], sizes: dict) -> dict[str, torch.Tensor]:
    """Converts their tensors to ours; they are the same."""
    return theirs


def full_names(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Their tensors under LlamaForCausalLM's names, which they already have."""
    return theirs
