"""Translates models between GGUF and the format of Hugging Face: metadata and config.json, tensors by name.

llama.cpp has an architecture of its own for most of transformers' classes. Two layouts differ:
- RoPE rotates neighbouring dimensions in llama and deepseek2, and the two halves of a head elsewhere. For
  llama, the rows of q and k are reordered (deepseek2's are neighbours in Hugging Face's files, too).
- The matrices of all experts of a layer are one tensor (n_experts, out, in).
"""

import re
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from deploy.gguf_file import GGUFFile
from deploy.llama2c import neighbouring_pairs
from lab.errors import UserError, shown

# Names outside of the blocks, of a block, and inside of it: those of GGUF on the left.
LLAMA = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LLAMA |= {
    "blk": "model.layers",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
EXPERTS = {ours: f"mlp.experts.{{}}.{theirs}" for ours, theirs in EXPERTS.items()}
MIXTRAL = {key: value for key, value in LLAMA.items() if not value.startswith("mlp.")}
MIXTRAL |= {"ffn_gate_inp": "block_sparse_moe.gate"}
MIXTRAL |= {
    f"ffn_{ours}_exps": f"block_sparse_moe.experts.{{}}.{theirs}"
    for ours, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
}
QWEN3 = LLAMA | {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
QWEN3_MOE = QWEN3 | EXPERTS | {"ffn_gate_inp": "mlp.gate"}
DEEPSEEK = {key: value for key, value in LLAMA.items() if key not in ("attn_k", "attn_v")}
DEEPSEEK |= EXPERTS | {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",  # newer files have attn_k_b and attn_v_b instead
    "ffn_gate_inp": "mlp.gate",
    "exp_probs_b": "mlp.gate.e_score_correction",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
GLM4_MOE = {**LLAMA, **{part: name for part, name in DEEPSEEK.items() if "exp" in part or "gate" in part}}
GLM4_MOE["post_attention_norm"] = GLM4_MOE.pop("ffn_norm")
GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "blk": "transformer.h",
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
GPT_NEOX = {
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
    "blk": "gpt_neox.layers",
    "attn_norm": "input_layernorm",
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
# By model_type of config.json: the architecture of GGUF and the names of its tensors.
ARCHITECTURES = {
    "llama": ("llama", LLAMA),
    "mistral": ("llama", LLAMA),
    "mixtral": ("llama", MIXTRAL),
    "qwen2": ("qwen2", LLAMA),
    "qwen3": ("qwen3", QWEN3),
    "qwen3_moe": ("qwen3moe", QWEN3_MOE),
    "gpt2": ("gpt2", GPT2),
    "gpt_neox": ("gptneox", GPT_NEOX),
    "deepseek_v2": ("deepseek2", DEEPSEEK),
    "deepseek_v3": ("deepseek2", DEEPSEEK),
}
READ = tuple(dict.fromkeys(architecture for architecture, _ in ARCHITECTURES.values()))
ARCHITECTURES["glm4_moe"] = ("glm4moe", GLM4_MOE)  # what stage 6 is written as if it is no Mixtral

# Metadata whose names begin with the architecture's: sizes and other numbers, by architecture.
SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
RMS_SIZES = SIZES | {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
MOE_SIZES = {
    "leading_dense_block_count": "first_k_dense_replace",
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_shared_count": "n_shared_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_weights_scale": "routed_scaling_factor",
}
FIELDS = {
    "llama": RMS_SIZES,
    "qwen2": RMS_SIZES,
    "qwen3": RMS_SIZES | {"attention.key_length": "head_dim"},
    "qwen3moe": RMS_SIZES
    | {
        "attention.key_length": "head_dim",
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
    },
    "gpt2": {
        "context_length": "n_positions",
        "embedding_length": "n_embd",
        "block_count": "n_layer",
        "feed_forward_length": "n_inner",
        "attention.head_count": "n_head",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
    },
    "gptneox": SIZES
    | {
        "attention.layer_norm_epsilon": "layer_norm_eps",
        "rope.freq_base": "rotary_emb_base",
        "use_parallel_residual": "use_parallel_residual",
    },
    "deepseek2": {key: value for key, value in RMS_SIZES.items() if key != "attention.head_count_kv"}
    | MOE_SIZES
    | {"attention.kv_lora_rank": "kv_lora_rank", "rope.dimension_count": "qk_rope_head_dim"},
    "glm4moe": RMS_SIZES | MOE_SIZES,
}
# Which of these are no whole numbers, by Hugging Face's names.
FLOATS = {
    "rms_norm_eps",
    "rope_theta",
    "rotary_emb_base",
    "layer_norm_epsilon",
    "layer_norm_eps",
    "routed_scaling_factor",
}
# What else the readers below look at, or what repeats a shape.
OTHERS = {"vocab_size", "rope.dimension_count", "attention.key_length", "attention.value_length"}
OTHERS |= {"rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"}
OTHERS |= {"rope.scaling.low_freq_factor", "rope.scaling.high_freq_factor", "rope.scaling.finetuned"}
OTHERS |= {"expert_count", "expert_used_count", "rope.scale_linear", "hidden_activation"}
DEEPSEEK_OTHERS = {"attention.head_count_kv", "attention.q_lora_rank", "attention.key_length_mla"}
DEEPSEEK_OTHERS |= {"attention.value_length_mla", "expert_weights_norm", "expert_gating_func"}
DEEPSEEK_OTHERS |= {"expert_group_count", "expert_group_used_count", "nextn_predict_layers"}
DEEPSEEK_OTHERS |= {"rope.scaling.yarn_log_multiplier"}
DEEPSEEK_OTHERS |= {"rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"}
SOFTMAX, SIGMOID = 1, 2  # values of expert_gating_func


class Metadata:
    """The numbers of a GGUF file whose names begin with its architecture. UserError where one is wrong."""

    def __init__(self, file: GGUFFile):
        self.file, self.architecture = file, file.metadata["general.architecture"]

    def name(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def get(self, key: str, default=None):
        """The value as Python writes it: a float32 as the shortest decimal that rounds to it."""
        value = self.file.metadata.get(self.name(key), default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # one value per layer, all alike
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def number(self, key: str, default=None, lowest: float = 1, whole: bool = True):
        """A number, `lowest` or more; a whole one unless whole is False."""
        value = self.get(key, default)
        if value is None:
            raise UserError(f"{shown(self.file.path)} has no {self.name(key)} in its metadata")
        if type(value) not in ((int,) if whole else (int, float)) or not lowest <= value < 2**62:
            raise UserError(
                f"{shown(self.file.path)} has {self.name(key)} = {short(value)}: it must be a "
                f"{'whole ' if whole else ''}number, {lowest:g} or more"
            )
        return value if whole else float(value)

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number, 0 or more."""
        return self.number(key, default, lowest=0, whole=False)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.get(key, default)
        if type(value) is not bool:
            raise UserError(
                f"{shown(self.file.path)} has {self.name(key)} = {short(value)}: it must be true or false"
            )
        return value


def short(value) -> str:
    """A value of the metadata for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def to_config(file: GGUFFile) -> dict:
    """The config.json for a GGUF file. Raises UserError for an architecture that we do not know."""
    architecture, kind = file.metadata.get("general.architecture"), file.metadata.get("general.type", "model")
    if architecture not in READ or kind != "model":
        what = "general.architecture" if kind == "model" else "general.type"
        raise UserError(
            f"{shown(file.path)} has {what} = {short(file.metadata.get(what))}: that is not supported\n"
            f"supported are models of the architectures {', '.join(READ)}"
        )
    meta = Metadata(file)
    config = {}
    for key, theirs in FIELDS[architecture].items():
        default = DEFAULTS.get(key)
        if key == "attention.head_count_kv":
            default = config["num_attention_heads"]
        if theirs in FLOATS:
            config[theirs] = meta.real(key, default)
        elif theirs == "use_parallel_residual":
            config[theirs] = meta.flag(key, default)
        else:
            config[theirs] = meta.number(key, default, lowest=0 if key in MAY_BE_ZERO else 1)
    n_blocks = meta.number("block_count")
    blocks = {int(n) for n in re.findall(r"^blk\.(\d+)\.", "\n".join(file.tensors), re.MULTILINE)}
    if len(blocks) != n_blocks or max(blocks) + 1 != n_blocks:
        raise UserError(
            f"{shown(file.path)} has {meta.name('block_count')} = {n_blocks}, "
            f"but tensors of {len(blocks)} blocks"
        )
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{shown(file.path)} has no tensor token_embd.weight")
    n_experts = meta.get("expert_count", 0)
    for name, info in file.tensors.items():
        if "_exps." in name and (len(info.shape) != 3 or info.shape[0] != n_experts):
            raise UserError(
                f"{shown(file.path)}: {name} is {info.shape}, but {meta.name('expert_count')} is "
                f"{short(n_experts)}"
            )
    config["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors or file.are_equal(
        "output.weight",
        "token_embd.weight",  # a copy, as older converters of GPT-2 wrote it
    )
    config["dtype"] = "float32"
    config |= {
        "gpt2": gpt2_config,
        "gptneox": gpt_neox_config,
        "deepseek2": deepseek_config,
    }.get(architecture, llama_config)(meta, config)
    say_what_is_unknown(meta)
    return config


DEFAULTS = {  # of llama.cpp, for missing metadata
    "rope.freq_base": 10_000.0,
    "use_parallel_residual": True,
    "leading_dense_block_count": 0,
    "expert_weights_scale": 1.0,
    "expert_shared_count": 0,
}
MAY_BE_ZERO = {"leading_dense_block_count", "expert_shared_count"}


def llama_config(meta: Metadata, config: dict) -> dict:
    """The rest of config.json for llama, qwen2, qwen3 and qwen3moe."""
    architecture, tensors = meta.architecture, meta.file.tensors
    more = {"hidden_act": "silu", "rope_parameters": rope_parameters(meta, config)}
    more["model_type"] = {"qwen3moe": "qwen3_moe"}.get(architecture, architecture)
    per_head = max(1, config["hidden_size"] // config["num_attention_heads"])
    head_dim = meta.number("attention.key_length", meta.get("rope.dimension_count", per_head))
    rotated = meta.number("rope.dimension_count", head_dim)
    if architecture in ("qwen2", "qwen3", "qwen3moe"):
        more["use_sliding_window"] = False
    if architecture != "qwen2" or head_dim != per_head:
        more["head_dim"] = head_dim
    if rotated != head_dim:
        more["partial_rotary_factor"] = rotated / head_dim
    if architecture == "llama":
        more["attention_bias"] = "blk.0.attn_q.bias" in tensors
        more["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
        if meta.number("expert_count", 0, lowest=0):
            more |= {"model_type": "mixtral", "num_local_experts": meta.number("expert_count")}
            more["num_experts_per_tok"] = meta.number("expert_used_count")
            more["sliding_window"] = None
            del more["mlp_bias"]
    if architecture == "qwen3moe":
        more |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    return more


def gpt2_config(meta: Metadata, config: dict) -> dict:
    """The rest of config.json for GPT-2. GGUF knows no dropout; 0 is what fine-tuning starts from."""
    return {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def gpt_neox_config(meta: Metadata, config: dict) -> dict:
    """The rest of config.json for GPT-NeoX."""
    per_head = max(1, config["hidden_size"] // config["num_attention_heads"])
    share = meta.number("rope.dimension_count", per_head) / per_head
    rope = {"rope_type": "default", "rope_theta": config["rotary_emb_base"]}
    return {
        "model_type": "gpt_neox",
        "hidden_act": meta.get("hidden_activation", "gelu"),
        "use_parallel_residual": config["use_parallel_residual"],
        "rotary_pct": share,
        "rope_parameters": rope | {"partial_rotary_factor": share},
        "attention_bias": "blk.0.attn_qkv.bias" in meta.file.tensors,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


def deepseek_config(meta: Metadata, config: dict) -> dict:
    """The rest of config.json for DeepSeek-V2 and V3."""
    rope_dim = config["qk_rope_head_dim"]
    # Older files have the sizes of the heads as they are without absorbed matrices.
    absorbed = meta.get("attention.key_length_mla") is not None
    end = "_mla" if absorbed else ""
    sigmoid = meta.number("expert_gating_func", SOFTMAX) == SIGMOID
    n_group = meta.number("expert_group_count", 1)
    n_nextn = meta.number("nextn_predict_layers", 0, lowest=0)
    more = {
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        "hidden_act": "silu",
        "attention_bias": False,
        "num_hidden_layers": config["num_hidden_layers"] - n_nextn,
        "num_key_value_heads": config["num_attention_heads"],
        "v_head_dim": meta.number(f"attention.value_length{end}"),
        "qk_nope_head_dim": meta.number(f"attention.key_length{end}", lowest=rope_dim + 1) - rope_dim,
        "q_lora_rank": meta.number("attention.q_lora_rank", 0, lowest=0) or None,
        "n_group": n_group,
        "topk_group": meta.number("expert_group_used_count", n_group),
        "norm_topk_prob": meta.flag("expert_weights_norm", False),
        "scoring_func": "sigmoid" if sigmoid else "softmax",
        "topk_method": "noaux_tc" if sigmoid else "greedy",
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
        "rope_interleave": True,
    }
    if not sigmoid and n_group > 1:
        raise UserError(
            f"{shown(meta.file.path)} has {meta.name('expert_group_count')} = {n_group} with a softmax "
            "router: llama.cpp and DeepSeek-V2 choose the groups differently"
        )
    if n_nextn:
        print(f"left out: {n_nextn} blocks of multi-token prediction", file=sys.stderr)
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    if meta.get("rope.scaling.type", "none") == "yarn":
        mscale = round(10 * meta.real("rope.scaling.yarn_log_multiplier", 0.0), 6)
        rope |= {"rope_type": "yarn", "factor": meta.real("rope.scaling.factor")}
        original = meta.number("rope.scaling.original_context_length")
        rope |= {"original_max_position_embeddings": original, "mscale": mscale, "mscale_all_dim": mscale}
        rope["beta_fast"] = meta.real("rope.scaling.yarn_beta_fast", 32.0)
        rope["beta_slow"] = meta.real("rope.scaling.yarn_beta_slow", 1.0)
        more["rope_scaling"] = {("type" if k == "rope_type" else k): v for k, v in rope.items()}
        del more["rope_scaling"]["rope_theta"]
    elif meta.get("rope.scaling.type", "none") != "none":
        refuse_scaling(meta)
    return more | {"rope_parameters": rope}


def rope_parameters(meta: Metadata, config: dict) -> dict:
    """rope_parameters for llama, qwen2, qwen3 and qwen3moe: no scaling, linear, or Llama 3.1's."""
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    kind = meta.get("rope.scaling.type", "linear")  # llama.cpp's default
    factor = meta.real("rope.scaling.factor", meta.get("rope.scale_linear", 1.0)) if kind != "none" else 1.0
    if kind not in ("none", "linear"):
        refuse_scaling(meta)
    is_scaled = factor not in (0, 1)  # both mean: not scaled
    if "rope_freqs.weight" in meta.file.tensors:
        if is_scaled:
            refuse_scaling(meta)
        return rope | llama3_scaling(meta, config)
    return rope | {"rope_type": "linear", "factor": factor} if is_scaled else rope


def refuse_scaling(meta: Metadata):
    """Raises UserError for a way to scale positions that no stage has."""
    scaling = {
        key: value for key, value in meta.file.metadata.items() if key.startswith(meta.name("rope.scaling."))
    }
    listing = ", ".join(f"{key} = {short(value)}" for key, value in scaling.items())
    with_tensor = " and rope_freqs.weight" if "rope_freqs.weight" in meta.file.tensors else ""
    raise UserError(f"{shown(meta.file.path)} has {listing}{with_tensor}: no stage can represent that")


def llama3_frequencies(rope: dict, head_dim: int) -> np.ndarray:
    """What Llama 3.1 divides each of RoPE's frequencies by: 1 for short waves, factor for long ones."""
    waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = (rope["original_max_position_embeddings"] / waves - low) / (high - low)
    share = share.clip(0, 1)  # 0 for long waves, 1 for short ones
    return (1 / ((1 - share) / rope["factor"] + share)).astype(np.float32)


def llama3_scaling(meta: Metadata, config: dict) -> dict:
    """The four numbers behind rope_freqs.weight. UserError if that tensor is not what Llama 3.1 computes.

    The file has the tensor, and the numbers only if we wrote it: else Llama 3.1's are tried.
    """
    found = meta.file.tensor("rope_freqs.weight").double().numpy()
    rope = {
        "rope_theta": config["rope_theta"],
        "rope_type": "llama3",
        "factor": float(str(np.float32(found.max()))),
        "low_freq_factor": meta.real("rope.scaling.low_freq_factor", 1.0),
        "high_freq_factor": meta.real("rope.scaling.high_freq_factor", 4.0),
        "original_max_position_embeddings": meta.number("rope.scaling.original_context_length", 8192),
    }
    usable = (
        rope["high_freq_factor"] > rope["low_freq_factor"] and min(rope["factor"], rope["rope_theta"]) > 0
    )
    if usable and found.ndim == 1:
        expected = llama3_frequencies(rope, 2 * len(found))
        if np.allclose(found, expected, rtol=1e-3):
            return rope
    raise UserError(
        f"{shown(meta.file.path)}: rope_freqs.weight is not what Llama 3.1 scales its positions with\n"
        "no stage can represent other frequencies"
    )


def say_what_is_unknown(meta: Metadata) -> None:
    """Lists metadata about the architecture that is ignored, on stderr."""
    known = {*FIELDS[meta.architecture], *OTHERS}
    if meta.architecture == "deepseek2":
        known |= DEEPSEEK_OTHERS
    unknown = [
        f"{key} = {short(value)}"
        for key, value in meta.file.metadata.items()
        if key.startswith(f"{meta.architecture}.") and key.partition(".")[2] not in known
    ]
    if unknown:
        print(f"ignored unknown metadata: {', '.join(unknown)}", file=sys.stderr)


def tensors_in(file: GGUFFile, config: dict) -> dict[str, Callable[[], torch.Tensor]]:
    """A function that reads each tensor under Hugging Face's names. UserError for an unknown tensor."""
    _, names = ARCHITECTURES[config["model_type"]]
    readers = {}
    for name, info in file.tensors.items():
        block, part, kind = split_name(name)
        if block is None:
            if part == "rope_freqs" or (part == "output" and config["tie_word_embeddings"]):
                continue  # it is in config.json; it is a copy of the embedding
            prefix = ""
        else:
            if block >= config.get("num_hidden_layers", config.get("n_layer")):
                continue  # multi-token prediction
            prefix = f"{names['blk']}.{block}."
        if part == "attn_v_b":
            continue  # attn_k_b reads it, too
        if part == "attn_k_b":
            readers[f"{prefix}self_attn.kv_b_proj.weight"] = partial(joined_kv_b, file, block)
            continue
        if part not in names or kind is None or part == "blk":
            raise UserError(f"{shown(file.path)} has a tensor that its architecture does not have: {name}")
        theirs = prefix + names[part]
        if "{}" in theirs:
            for expert in range(info.shape[0]):
                readers[f"{theirs.format(expert)}.{kind}"] = partial(file.tensor, name, expert)
            continue
        joint = "_" if part == "exp_probs_b" else "."
        readers[f"{theirs}{joint}{kind}"] = partial(tensor_in, file, name, part, config)
    return readers


def split_name(name: str) -> tuple[int | None, str, str | None]:
    """A name of GGUF as block, part and kind: blk.3.attn_q.weight is (3, "attn_q", "weight")."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if not match:
        return None, name, None
    block, part, kind = match.groups()
    return (None if block is None else int(block)), part, kind


def tensor_in(file: GGUFFile, name: str, part: str, config: dict) -> torch.Tensor:
    """Reads a tensor and changes it to Hugging Face's layout."""
    tensor, model_type = file.tensor(name), config["model_type"]
    if model_type in ("llama", "mixtral") and part in ("attn_q", "attn_k") and tensor.dim() == 2:
        heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
        return halves(tensor, heads) if tensor.size(0) % (2 * heads) == 0 else tensor
    if model_type == "gpt2" and tensor.dim() == 2 and name.startswith("blk."):
        return tensor.t()  # Conv1D: (in, out)
    heads = config.get("num_attention_heads")
    if model_type == "gpt_neox" and part == "attn_qkv" and tensor.size(0) % (3 * heads) == 0:
        by_kind = tensor.view(3, heads, -1, *tensor.shape[1:])  # (q k v, n_head, head_dim, …)
        return by_kind.transpose(0, 1).reshape(tensor.shape)
    return tensor


def halves(weight: torch.Tensor, n_head: int) -> torch.Tensor:
    """The rows of a q or k projection in the order of Hugging Face: the inverse of neighbouring_pairs."""
    pairs = weight.view(n_head, -1, 2, weight.size(1))  # (n_head, head_dim/2, 2, n_embd)
    return pairs.transpose(1, 2).reshape(weight.shape)


def joined_kv_b(file: GGUFFile, block: int) -> torch.Tensor:
    """kv_b_proj from the two matrices that llama.cpp absorbs into others."""
    names = [f"blk.{block}.attn_{part}_b.weight" for part in "kv"]
    shapes = [file.tensors[name].shape if name in file.tensors else () for name in names]
    k, v = shapes
    if not len(k) == len(v) == 3 or k[:2] != (v[0], v[2]):
        raise UserError(f"{shown(file.path)}: {names[0]} and {names[1]} do not fit together: {shapes}")
    keys, values = map(file.tensor, names)  # (n_head, rank, nope), (n_head, v_head_dim, rank)
    return torch.cat((keys.transpose(1, 2), values), 1).flatten(0, 1)


def to_metadata(config: dict) -> dict:
    """The metadata about the architecture for a config.json that one of our counterparts wrote."""
    architecture, _ = ARCHITECTURES[config["model_type"]]
    values = {key: config[theirs] for key, theirs in FIELDS[architecture].items()}
    values = {
        key: float(value) if FIELDS[architecture][key] in FLOATS else value for key, value in values.items()
    }
    values["vocab_size"] = config["vocab_size"]
    more = {"gpt2": lambda _: {}, "gptneox": gpt_neox_metadata, "deepseek2": deepseek_metadata}
    values |= more.get(architecture, llama_metadata)(config)
    return {"general.architecture": architecture} | {f"{architecture}.{k}": v for k, v in values.items()}


def llama_metadata(config: dict) -> dict:
    """The rest for the architectures like llama. UserError for positions scaled as llama.cpp cannot."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    values = {"rope.dimension_count": head_dim}
    values |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if config["model_type"] == "mixtral":
        values["expert_count"] = config["num_local_experts"]
        values["expert_used_count"] = config["num_experts_per_tok"]
    if config["model_type"] == "glm4_moe":
        values["expert_weights_norm"] = config["norm_topk_prob"]
        values["expert_gating_func"] = SIGMOID if config["scoring_func"] == "sigmoid" else SOFTMAX
    window = config.get("sliding_window")
    if window and window < config["max_position_embeddings"]:
        print(
            "llama.cpp has no sliding window for this architecture: context_length becomes the window, "
            f"{window:,} instead of {config['max_position_embeddings']:,}",
            file=sys.stderr,
        )
        values["context_length"] = window
    rope = config["rope_parameters"]
    if rope["rope_type"] == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    elif rope["rope_type"] == "llama3":  # llama.cpp reads the tensor rope_freqs; our importer, these
        values["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
        for key in ("low_freq_factor", "high_freq_factor"):
            values[f"rope.scaling.{key}"] = float(rope[key])
    elif rope["rope_type"] != "default":
        raise UserError(f"the run has rope_type = {rope['rope_type']}, which llama.cpp does not have")
    return values


def gpt_neox_metadata(config: dict) -> dict:
    """The rest for GPT-NeoX."""
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    return {
        "rope.dimension_count": int(head_dim * config["rotary_pct"]),
        "hidden_activation": config["hidden_act"],  # for our importer: llama.cpp has one GELU for both
    }


def deepseek_metadata(config: dict) -> dict:
    """The rest for DeepSeek-V2 and V3. UserError for what llama.cpp computes otherwise."""
    rope, nope = config["qk_rope_head_dim"], config["qk_nope_head_dim"]
    rank, sigmoid = config["kv_lora_rank"], config["scoring_func"] == "sigmoid"
    values = {
        "attention.head_count_kv": 1,  # keys and values are absorbed: all heads share the latent
        "attention.key_length": rank + rope,
        "attention.value_length": rank,
        "attention.key_length_mla": nope + rope,
        "attention.value_length_mla": config["v_head_dim"],
        "expert_weights_norm": config["norm_topk_prob"],
        "expert_gating_func": SIGMOID if sigmoid else SOFTMAX,
    }
    if config["q_lora_rank"]:
        values["attention.q_lora_rank"] = config["q_lora_rank"]
    elif config["num_hidden_layers"] not in (26, 27):  # as in DeepSeek-V2-Lite: llama.cpp knows it by that
        raise UserError(
            "llama.cpp runs latent attention without a latent for the queries (q_lora_rank) only with 26 or "
            f"27 layers; the run has {config['num_hidden_layers']}\n"
            "export to hf, or train --stage deepseek_v3 with --model.q-lora-rank"
        )
    if (config.get("n_group") or 1) > 1:
        if not sigmoid:
            raise UserError(
                f"the run has n_group = {config['n_group']} with a softmax router: llama.cpp chooses the "
                "groups differently"
            )
        values["expert_group_count"] = config["n_group"]
        values["expert_group_used_count"] = config["topk_group"]
    positions = config["rope_parameters"]
    if positions["rope_type"] == "yarn":
        mscale, of_all = positions.get("mscale") or 0.0, positions.get("mscale_all_dim") or 0.0
        if mscale != of_all or not mscale:
            raise UserError(
                f"the run has YaRN with mscale {mscale} and mscale_all_dim {of_all}: llama.cpp requires that "
                "they are equal and not 0"
            )
        values |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(positions["factor"]),
            "rope.scaling.original_context_length": int(positions["original_max_position_embeddings"]),
            "rope.scaling.yarn_log_multiplier": 0.1 * of_all,
            "rope.scaling.yarn_beta_fast": float(positions.get("beta_fast") or 32.0),
            "rope.scaling.yarn_beta_slow": float(positions.get("beta_slow") or 1.0),
        }
    return values


def tensors_out(
    theirs: dict[str, torch.Tensor], config: dict, n_tokens: int
) -> dict[str, tuple[list[torch.Tensor], Callable]]:
    """Hugging Face's tensors by their names in GGUF: the tensors that each is made of, and how.

    Rows of the embedding and the head that only pad the vocabulary are left out, and so are blocks of
    multi-token prediction.
    """
    _, names = ARCHITECTURES[config["model_type"]]
    ours = {their_name: part for part, their_name in names.items()}
    made, left_out = {}, set()
    n_layer = config.get("num_hidden_layers", config.get("n_layer"))
    for name, tensor in theirs.items():
        module, kind = re.fullmatch(r"(.*)[._](weight|bias)", name).groups()
        prefix = ""
        match = re.match(re.escape(names["blk"]) + r"\.(\d+)\.", module)
        if match:
            if int(match.group(1)) >= n_layer:
                left_out.add(match.group(1))  # multi-token prediction
                continue
            module, prefix = module[match.end() :], f"blk.{match.group(1)}."
        part = ours[re.sub(r"experts\.\d+\.", "experts.{}.", module)]
        if part == "attn_kv_b":
            heads = tensor.view(config["num_attention_heads"], -1, tensor.size(1))
            keys, values = heads.split((config["qk_nope_head_dim"], config["v_head_dim"]), 1)
            made[f"{prefix}attn_k_b.weight"] = [keys.transpose(1, 2)], first  # (n_head, rank, nope)
            made[f"{prefix}attn_v_b.weight"] = [values], first  # (n_head, v_head_dim, rank)
        elif "_exps" in part:
            made.setdefault(f"{prefix}{part}.weight", ([], stacked))[0].append(tensor)
        else:
            made[f"{prefix}{part}.{kind}"] = [tensor], partial(layout_out, part, config, n_tokens)
    if left_out:
        print(f"left out: {len(left_out)} blocks of multi-token prediction", file=sys.stderr)
    rope = config.get("rope_parameters", {})
    if rope.get("rope_type") == "llama3":
        frequencies = torch.from_numpy(llama3_frequencies(rope, config["head_dim"]))
        made["rope_freqs.weight"] = [frequencies], first
    return made


def first(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0]


def stacked(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(tensors)


def layout_out(part: str, config: dict, n_tokens: int, tensors: list[torch.Tensor]) -> torch.Tensor:
    """A tensor in llama.cpp's layout: the inverse of tensor_in."""
    [tensor], model_type = tensors, config["model_type"]
    if part in ("token_embd", "output"):
        return tensor[:n_tokens]
    if model_type in ("llama", "mistral", "mixtral") and part in ("attn_q", "attn_k"):
        heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
        return neighbouring_pairs(tensor, heads)
    if model_type == "gpt2" and tensor.dim() == 2 and part != "position_embd":
        return tensor.t()
    if model_type == "gpt_neox" and part == "attn_qkv":
        by_head = tensor.view(config["num_attention_heads"], 3, -1, *tensor.shape[1:])
        return by_head.transpose(0, 1).reshape(tensor.shape)
    return tensor
