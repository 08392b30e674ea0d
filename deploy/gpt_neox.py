"""Converts configs and tensors between family/gpt_neox and transformers' GPTNeoXForCausalLM.

Their query_key_value is one matrix: for each head the rows of its query, then of its key, then of its value.
Ours has a matrix each.
"""

from collections.abc import Iterator

import torch

from deploy import fields, llama

STAGE = "gpt_neox"
EMBEDDING = "gpt_neox.embed_in.weight"
# The causal mask and RoPE's frequencies, which old versions of transformers saved.
BUFFERS = r"\.attention\.((masked_)?bias|rotary_emb\.inv_freq)$"

GELUS = {  # transformers' names of the two functions, and ours
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_fast": "gelu_fast",
    "gelu_new": "gelu_fast",
    "gelu_pytorch_tanh": "gelu_fast",
}
REPRESENTABLE = {
    "hidden_act": tuple(GELUS),
    "attention_bias": (True,),
    "pruned_heads": ({},),
    "quantization_config": (None,),
}
DEFAULTS = {"intermediate_size": 24576, "attention_dropout": 0.0}  # of transformers, for missing fields


def to_config(sizes: dict) -> dict:
    """config.json for a model of gpt_neox."""
    theta, rotary_pct = sizes["rope_theta"], sizes["rotary_pct"]
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": sizes["vocab_size"],
        "max_position_embeddings": sizes["block_size"],
        "hidden_size": sizes["n_embd"],
        "intermediate_size": 4 * sizes["n_embd"],
        "num_hidden_layers": sizes["n_layer"],
        "num_attention_heads": sizes["n_head"],
        "hidden_act": sizes["hidden_act"],
        "attention_bias": True,
        "attention_dropout": sizes["dropout"],
        "hidden_dropout": sizes["dropout"],
        "layer_norm_eps": sizes["norm_eps"],
        "use_parallel_residual": sizes["use_parallel_residual"],
        "rotary_pct": rotary_pct,  # transformers 4 and other programs read these two
        "rotary_emb_base": theta,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": theta,
            "partial_rotary_factor": rotary_pct,
        },
        "tie_word_embeddings": sizes["tie_word_embeddings"],
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
    }


def from_config(config: dict) -> tuple[str, dict]:
    """The stage and its sizes for a config.json. Raises UserError for anything gpt_neox cannot represent."""
    config = DEFAULTS | config
    n_embd = fields.size(config, "hidden_size")
    dropout = fields.real(config, "hidden_dropout", 0.0)  # gpt_neox has one rate for all
    own = rotary(config)
    representable = REPRESENTABLE | {
        "intermediate_size": (4 * n_embd,),
        "attention_dropout": (dropout,),
        # transformers ignores these two, but some versions saved them
        "rope_theta": (own["rope_theta"],),
        "partial_rotary_factor": (own["rotary_pct"],),
    }
    fields.refuse_others(config, representable, STAGE)
    sizes = {
        "vocab_size": fields.size(config, "vocab_size"),
        "block_size": fields.size(config, "max_position_embeddings"),
        "n_layer": fields.size(config, "num_hidden_layers"),
        "n_head": fields.size(config, "num_attention_heads"),
        "n_embd": n_embd,
        "dropout": dropout,
        "norm_eps": fields.real(config, "layer_norm_eps", 1e-5),
        "tie_word_embeddings": fields.flag(config, "tie_word_embeddings", False),
        "bias": True,
        "use_parallel_residual": fields.flag(config, "use_parallel_residual", True),
        "hidden_act": GELUS[config.get("hidden_act") or "gelu"],
        **own,
    }
    read = {"vocab_size", "max_position_embeddings", "num_hidden_layers", "num_attention_heads"}
    read |= {"hidden_size", "layer_norm_eps", "tie_word_embeddings", "use_parallel_residual"}
    read |= {"hidden_dropout", "rotary_pct", "rotary_emb_base", "rope_parameters", "rope_scaling"}
    fields.say_what_is_unknown(config, {*read, *representable, "classifier_dropout", "is_decoder"})
    return STAGE, sizes


def rotary(config: dict) -> dict:
    """rope_theta and rotary_pct, from rope_parameters (transformers 5) or the fields of transformers 4."""
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope, factor = config.get(name) or {}, None
    if isinstance(rope, dict):  # llama.positions refuses anything else
        factor = rope.get("partial_rotary_factor")
        rope = {key: value for key, value in rope.items() if key != "partial_rotary_factor"}
    positions = {"rope_theta": fields.real(config, "rotary_emb_base", 10_000.0), name: rope}
    part = {"partial_rotary_factor": factor}
    default = fields.real(config, "rotary_pct", 0.25)
    return llama.positions(positions, STAGE, 10_000.0, {}) | {
        "rotary_pct": fields.real(part, "partial_rotary_factor", default)
    }


def modules(n_layer: int) -> Iterator[tuple[list[str], str]]:
    """Pairs of our modules and theirs. Theirs joins the weights and biases of ours, head by head."""
    for i in range(n_layer):
        ours, theirs = f"model.layers.{i}", f"gpt_neox.layers.{i}"
        yield [f"{ours}.input_layernorm"], f"{theirs}.input_layernorm"
        yield [f"{ours}.self_attn.{name}_proj" for name in "qkv"], f"{theirs}.attention.query_key_value"
        yield [f"{ours}.self_attn.o_proj"], f"{theirs}.attention.dense"
        yield [f"{ours}.post_attention_layernorm"], f"{theirs}.post_attention_layernorm"
        yield [f"{ours}.mlp.up_proj"], f"{theirs}.mlp.dense_h_to_4h"
        yield [f"{ours}.mlp.down_proj"], f"{theirs}.mlp.dense_4h_to_h"
    yield ["model.norm"], "gpt_neox.final_layer_norm"


EMBEDDINGS = {
    "model.embed_tokens.weight": EMBEDDING,
    "lm_head.weight": "embed_out.weight",  # if it is not tied
}


def to_tensors(ours: dict[str, torch.Tensor], sizes: dict) -> dict[str, torch.Tensor]:
    """Converts our tensors to theirs. Biases that the run lacks become zero."""
    theirs = {their_name: ours[name] for name, their_name in EMBEDDINGS.items() if name in ours}
    for names, their_name in modules(sizes["n_layer"]):
        weights = [ours[f"{name}.weight"] for name in names]
        biases = [
            ours.get(f"{name}.bias", w.new_zeros(w.size(0))) for name, w in zip(names, weights, strict=True)
        ]
        theirs[f"{their_name}.weight"] = joined(weights, sizes["n_head"])
        theirs[f"{their_name}.bias"] = joined(biases, sizes["n_head"])
    return theirs


def from_tensors(theirs: dict[str, torch.Tensor], sizes: dict) -> dict[str, torch.Tensor]:
    """Converts their tensors to ours: the inverse of to_tensors."""
    ours = {name: theirs[their_name] for name, their_name in EMBEDDINGS.items() if their_name in theirs}
    for names, their_name in modules(sizes["n_layer"]):
        for kind in ("weight", "bias"):
            parts = split(theirs[f"{their_name}.{kind}"], len(names), sizes["n_head"])
            ours |= {f"{name}.{kind}": part for name, part in zip(names, parts, strict=True)}
    return ours


def joined(parts: list[torch.Tensor], n_head: int) -> torch.Tensor:
    """The rows of q, k and v, head by head: (n_head · 3 · head_dim, …). A single part stays as it is."""
    if len(parts) == 1:
        return parts[0]
    return torch.stack([part.unflatten(0, (n_head, -1)) for part in parts], 1).flatten(0, 2)


def split(tensor: torch.Tensor, n_parts: int, n_head: int) -> list[torch.Tensor]:
    """The parts of a tensor, each (n_head · head_dim, …): the inverse of joined."""
    if n_parts == 1:
        return [tensor]
    return [part.flatten(0, 1) for part in tensor.unflatten(0, (n_head, n_parts, -1)).unbind(1)]


def full_names(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Their tensors under the names of the published files, even if the head has transformers 5's name."""
    return {
        "embed_out.weight" if name == "lm_head.weight" else name: tensor for name, tensor in theirs.items()
    }
