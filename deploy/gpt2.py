"""Converts configs and tensors between stage 0 and transformers' GPT2LMHeadModel."""

from collections.abc import Iterator

import torch

from deploy import fields

STAGE = "stage0_gpt"
EMBEDDING = "transformer.wte.weight"
BUFFERS = r"\.attn\.(masked_)?bias$"  # the causal mask, which old versions of transformers saved

REPRESENTABLE = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names for one function
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "pruned_heads": ({},),
}
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
# Fields without effect on the next token: n_ctx repeats n_positions, and the summary is for classifiers.
OTHERS = {"n_ctx", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"}
OTHERS |= {"summary_first_dropout"}


def to_config(sizes: dict) -> dict:
    """config.json for a stage-0 model of these sizes."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": sizes["vocab_size"],
        "n_positions": sizes["block_size"],
        "n_embd": sizes["n_embd"],
        "n_layer": sizes["n_layer"],
        "n_head": sizes["n_head"],
        "n_inner": 4 * sizes["n_embd"],
        "activation_function": "gelu_new",
        **dict.fromkeys(DROPOUTS, sizes["dropout"]),
        "layer_norm_epsilon": sizes["norm_eps"],
        "scale_attn_weights": True,
        "tie_word_embeddings": sizes["tie_word_embeddings"],
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
    }


def from_config(config: dict) -> tuple[str, dict]:
    """The stage and its sizes for a config.json. Raises UserError for anything stage 0 cannot represent."""
    config = dict.fromkeys(DROPOUTS, 0.1) | config  # transformers' default
    n_embd = fields.size(config, "n_embd")
    dropout = fields.real(config, DROPOUTS[0], 0.1)  # stage 0 has one rate for all three
    representable = REPRESENTABLE | {"n_inner": (4 * n_embd,)} | dict.fromkeys(DROPOUTS[1:], (dropout,))
    fields.refuse_others(config, representable, "stage 0")
    sizes = {
        "vocab_size": fields.size(config, "vocab_size"),
        "block_size": fields.size(config, "n_positions"),
        "n_layer": fields.size(config, "n_layer"),
        "n_head": fields.size(config, "n_head"),
        "n_embd": n_embd,
        "dropout": dropout,
        "norm_eps": fields.real(config, "layer_norm_epsilon", 1e-5),
        "tie_word_embeddings": fields.flag(config, "tie_word_embeddings", True),
        "bias": True,
    }
    read = {"vocab_size", "n_positions", "n_layer", "n_head", "n_embd", "layer_norm_epsilon"}
    read |= {"tie_word_embeddings", *DROPOUTS, *representable}
    fields.say_what_is_unknown(config, read | OTHERS)
    return STAGE, sizes


def modules(n_layer: int) -> Iterator[tuple[list[str], str]]:
    """Pairs of our modules and theirs. Theirs stacks the weights and biases of ours along the output."""
    for i in range(n_layer):
        ours, theirs = f"model.layers.{i}", f"transformer.h.{i}"
        yield [f"{ours}.input_layernorm"], f"{theirs}.ln_1"
        yield [f"{ours}.self_attn.{name}_proj" for name in "qkv"], f"{theirs}.attn.c_attn"
        yield [f"{ours}.self_attn.o_proj"], f"{theirs}.attn.c_proj"
        yield [f"{ours}.post_attention_layernorm"], f"{theirs}.ln_2"
        yield [f"{ours}.mlp.up_proj"], f"{theirs}.mlp.c_fc"
        yield [f"{ours}.mlp.down_proj"], f"{theirs}.mlp.c_proj"
    yield ["model.norm"], "transformer.ln_f"


EMBEDDINGS = {
    "model.embed_tokens.weight": EMBEDDING,
    "model.embed_positions.weight": "transformer.wpe.weight",
    "lm_head.weight": "lm_head.weight",  # if it is not tied
}


def to_tensors(ours: dict[str, torch.Tensor], sizes: dict) -> dict[str, torch.Tensor]:
    """Converts our tensors to theirs. Biases that the run lacks become zero."""
    theirs = {their_name: ours[name] for name, their_name in EMBEDDINGS.items() if name in ours}
    for names, their_name in modules(sizes["n_layer"]):
        weights = [ours[f"{name}.weight"] for name in names]
        biases = [
            ours.get(f"{name}.bias", w.new_zeros(w.size(0))) for name, w in zip(names, weights, strict=True)
        ]
        weight = torch.cat(weights)
        theirs[f"{their_name}.weight"] = weight.t() if weight.dim() == 2 else weight  # Conv1D: (in, out)
        theirs[f"{their_name}.bias"] = torch.cat(biases)
    return theirs


def from_tensors(theirs: dict[str, torch.Tensor], sizes: dict) -> dict[str, torch.Tensor]:
    """Converts their tensors to ours: the inverse of to_tensors."""
    ours = {name: theirs[their_name] for name, their_name in EMBEDDINGS.items() if their_name in theirs}
    for names, their_name in modules(sizes["n_layer"]):
        weight = theirs[f"{their_name}.weight"]
        weights = (weight.t() if weight.dim() == 2 else weight).chunk(len(names))
        biases = theirs[f"{their_name}.bias"].chunk(len(names))
        for name, part, bias in zip(names, weights, biases, strict=True):
            ours[f"{name}.weight"], ours[f"{name}.bias"] = part, bias
    return ours


def full_names(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Their tensors under GPT2LMHeadModel's names, even if a GPT2Model was saved (as OpenAI's files were)."""
    if any(name.startswith("transformer.") for name in theirs):
        return theirs
    renamed = {f"transformer.{name}": t for name, t in theirs.items() if name != "lm_head.weight"}
    if "lm_head.weight" in theirs:
        renamed["lm_head.weight"] = theirs["lm_head.weight"]
    return renamed
