"""Converts configs and tensors between family/qwen3_moe and transformers' Qwen3MoeForCausalLM.

Attention is that of Qwen3. The published files store each expert's matrices separately; qwen3_moe stacks
them, as transformers 5 does in memory.
"""

import json

import torch

from deploy import fields, llama, qwen
from deploy.deepseek import NAMES
from deploy.llama import BUFFERS, EMBEDDING
from deploy.mixtral import require, split_experts, stack_experts
from lab.errors import UserError

__all__ = ["BUFFERS", "EMBEDDING", "from_config", "from_tensors", "full_names", "to_config", "to_tensors"]

STAGE = "qwen3_moe"
REPRESENTABLE = qwen.REPRESENTABLE | {"attention_bias": (False,), "decoder_sparse_step": (1,)}
# Only with these values does qwen3_moe compute the same function as Qwen3-MoE.
NEEDED = {"router": "softmax", "n_shared_experts": 0, "routed_scaling_factor": 1.0}


def to_config(sizes: dict) -> dict:
    """config.json for a model of qwen3_moe. Raises UserError if it is not a Qwen3-MoE."""
    require(sizes, NEEDED, STAGE, "Qwen3MoeForCausalLM")
    return qwen.to_config(sizes) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": sizes["n_routed_experts"],
        "num_experts_per_tok": sizes["num_experts_per_tok"],
        "norm_topk_prob": sizes["num_experts_per_tok"] > 1,
        "moe_intermediate_size": sizes["moe_intermediate_size"],
        "mlp_only_layers": list(range(sizes["first_k_dense_replace"])),
        "decoder_sparse_step": 1,
        "router_aux_loss_coef": sizes["router_aux_loss_coef"],
    }


def from_config(config: dict) -> tuple[str, dict]:
    """The stage and its sizes for a config.json. Raises UserError for anything qwen3_moe cannot represent."""
    config = {"num_key_value_heads": 4} | config  # transformers' default
    sizes = llama.common_sizes(config, REPRESENTABLE, STAGE, any_head_dim=True)
    n_experts = fields.size(config, "num_local_experts", 128)  # transformers 5 writes this name
    sizes |= NEEDED | {
        "n_routed_experts": fields.size(config, "num_experts", n_experts),
        "num_experts_per_tok": fields.size(config, "num_experts_per_tok", 8),
        "moe_intermediate_size": fields.size(config, "moe_intermediate_size", 768),
        "first_k_dense_replace": n_dense_layers(config),
        "router_aux_loss_coef": fields.real(config, "router_aux_loss_coef", 0.001),
    }
    # A single expert's weight is its probability: divided by itself it would have no gradient.
    normed = sizes["num_experts_per_tok"] > 1
    if fields.flag(config, "norm_topk_prob", False) != normed:
        raise UserError(
            f"config.json has norm_topk_prob = {json.dumps(not normed)}: with num_experts_per_tok = "
            f"{sizes['num_experts_per_tok']}, {STAGE} cannot represent that, only {json.dumps(normed)}"
        )
    read = {"num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob", "mlp_only_layers"}
    read |= {"moe_intermediate_size", "router_aux_loss_coef", "output_router_logits"}
    ignored = {"sliding_window", "max_window_layers"}
    fields.say_what_is_unknown(config, {*llama.READ, *REPRESENTABLE, *read, *ignored})
    return STAGE, sizes


def n_dense_layers(config: dict) -> int:
    """How many of the first layers have no experts. Raises UserError if mlp_only_layers lists others."""
    layers = config.get("mlp_only_layers") or []
    if layers != list(range(len(layers))):
        raise UserError(
            f"config.json has mlp_only_layers = {json.dumps(layers)}: {STAGE} cannot represent that, "
            "only the first layers, such as [] or [0, 1]"
        )
    return len(layers)


def to_tensors(ours: dict[str, torch.Tensor], sizes: dict) -> dict[str, torch.Tensor]:
    """Converts our tensors to theirs."""
    return split_experts(ours, NAMES)


def from_tensors(theirs: dict[str, torch.Tensor], sizes: dict) -> dict[str, torch.Tensor]:
    """Converts their tensors to ours."""
    return stack_experts(theirs, NAMES, sizes["n_routed_experts"])


def full_names(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Their tensors under the names of the published files, even if transformers 5 has stacked them."""
    return split_experts(theirs, NAMES)
