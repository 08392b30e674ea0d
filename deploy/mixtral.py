"""Converts configs and tensors between stage 6 and transformers' MixtralForCausalLM.

Mixtral is stage 6 with the softmax router and no shared experts. Its files store each expert's matrices
separately, under block_sparse_moe; stage 6 stacks them, as transformers 5 does in memory.
"""

import re

import torch

from deploy import fields, llama
from lab.errors import UserError

STAGE = "stage6_moe"
EMBEDDING = llama.EMBEDDING
BUFFERS = llama.BUFFERS

REPRESENTABLE = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "sliding_window": (None,),
    "attention_dropout": (0.0,),
    "partial_rotary_factor": (1.0,),
    "router_jitter_noise": (0.0,),
}
# Only with these values does stage 6 compute the same function as Mixtral.
NEEDED = {
    "router": "softmax",
    "n_shared_experts": 0,
    "first_k_dense_replace": 0,
    "routed_scaling_factor": 1.0,
}
# Names of an expert's gate, up and down matrices.
NAMES = "block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight"
NAMES += ("block_sparse_moe.experts.{}.w2.weight",)


def to_config(sizes: dict) -> dict:
    """config.json for a stage-6 model of these sizes. Raises UserError if it is not a Mixtral."""
    require(sizes, NEEDED, STAGE, "MixtralForCausalLM")
    if sizes["num_experts_per_tok"] == 1:
        raise UserError(
            f"{STAGE} with num_experts_per_tok = 1 has no counterpart in transformers: MixtralForCausalLM "
            "does not weight the output of a single expert"
        )
    config = llama.to_config(sizes)
    del config["attention_bias"], config["mlp_bias"]  # Mixtral has neither
    return config | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "intermediate_size": sizes["moe_intermediate_size"],
        "num_local_experts": sizes["n_routed_experts"],
        "num_experts_per_tok": sizes["num_experts_per_tok"],
        "router_aux_loss_coef": sizes["router_aux_loss_coef"],
        "router_jitter_noise": 0.0,
        "sliding_window": None,
    }


def require(sizes: dict, needed: dict, ours: str, theirs: str) -> None:
    """Raises UserError unless the sizes are those that our model must have to be theirs."""
    for name, value in needed.items():
        if sizes[name] != value:
            raise UserError(
                f"{ours} with {name} = {sizes[name]} has no counterpart in transformers: {theirs} "
                f"requires {name} = {value}"
            )


def from_config(config: dict) -> tuple[str, dict]:
    """The stage and its sizes for a config.json. Raises UserError for anything stage 6 cannot represent."""
    config = {"num_key_value_heads": 8} | config  # transformers' default
    sizes = llama.common_sizes(config, REPRESENTABLE, "stage 6", theta=1e6, eps=1e-5)
    sizes |= NEEDED | {
        "moe_intermediate_size": sizes["intermediate_size"],
        "n_routed_experts": fields.size(config, "num_local_experts", 8),
        "num_experts_per_tok": fields.size(config, "num_experts_per_tok", 2),
        "router_aux_loss_coef": fields.real(config, "router_aux_loss_coef", 0.001),
    }
    if sizes["num_experts_per_tok"] == 1:
        raise UserError(
            "config.json has num_experts_per_tok = 1: stage 6 cannot represent that, only 2 or more"
        )
    read = {"num_local_experts", "num_experts_per_tok", "router_aux_loss_coef", "output_router_logits"}
    fields.say_what_is_unknown(config, {*llama.READ, *REPRESENTABLE, *read, "head_dim"})
    return STAGE, sizes


def to_tensors(ours: dict[str, torch.Tensor], sizes: dict) -> dict[str, torch.Tensor]:
    """Converts our tensors to theirs."""
    return rename_gates(split_experts(ours, NAMES), ".mlp.gate.", ".block_sparse_moe.gate.")


def from_tensors(theirs: dict[str, torch.Tensor], sizes: dict) -> dict[str, torch.Tensor]:
    """Converts their tensors to ours."""
    return rename_gates(
        stack_experts(theirs, NAMES, sizes["n_routed_experts"]), ".block_sparse_moe.gate.", ".mlp.gate."
    )


def full_names(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Their tensors under the names of the published files, even if transformers 5 has stacked them."""
    return to_tensors(theirs, {})


def rename_gates(tensors: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    """The tensors with `old` replaced by `new` in their names."""
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


def split_experts(tensors: dict[str, torch.Tensor], names: tuple[str, str, str]) -> dict[str, torch.Tensor]:
    """Splits gate_up_proj (E, 2 · width, n_embd) and down_proj (E, n_embd, width) by expert."""
    split = {}
    for name, tensor in tensors.items():
        prefix, _, kind = name.partition("mlp.experts.")
        if kind == "gate_up_proj":
            for expert, (gate, up) in enumerate(matrix.chunk(2) for matrix in tensor):
                split[prefix + names[0].format(expert)] = gate
                split[prefix + names[1].format(expert)] = up
        elif kind == "down_proj":
            split |= {prefix + names[2].format(expert): down for expert, down in enumerate(tensor)}
        else:
            split[name] = tensor
    return split


def stack_experts(
    tensors: dict[str, torch.Tensor], names: tuple[str, str, str], n_experts: int
) -> dict[str, torch.Tensor]:
    """Stacks the experts' matrices: the inverse of split_experts."""
    pattern = re.compile(
        "(.*)(?:" + "|".join(re.escape(name).replace(r"\{\}", r"\d+") for name in names) + ")"
    )
    stacked = {}
    for name, tensor in tensors.items():
        match = pattern.fullmatch(name)
        if not match:
            stacked[name] = tensor
            continue
        prefix = match.group(1)
        if prefix + "mlp.experts.down_proj" in stacked:
            continue  # stacked when the first matrix of this layer came
        gates, ups, downs = (
            torch.stack([tensors[prefix + kind.format(expert)] for expert in range(n_experts)])
            for kind in names
        )
        stacked[prefix + "mlp.experts.gate_up_proj"] = torch.cat((gates, ups), 1)
        stacked[prefix + "mlp.experts.down_proj"] = downs
    return stacked
