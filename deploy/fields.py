"""Reads and checks the fields of a Hugging Face config.json, and reports those that are ignored."""

import json
import math
import sys

from lab.errors import UserError

# Fields that do not affect the function, or repeat what the tensors' shapes say.
WITHOUT_EFFECT = {
    "_attn_implementation_autoset", "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype",
    "eos_token_id", "initializer_range", "is_llama_config", "model_type", "pad_token_id", "return_dict",
    "task_specific_params", "tokenizer_class", "torch_dtype", "transformers.js_config",
    "transformers_version", "use_cache",
}  # fmt: skip

# Fields that change what a model computes and that no stage has, whatever the model_type: the values that
# switch each off, as in refuse_others.
SWITCHED_OFF = {
    "quantization_config": (None,),
    "compression_config": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "attention_multiplier": (None,),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "logits_scaling": (1.0,),
    "logit_scale": (1.0,),
    "clip_qkv": (None,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "mlp_bias": (False,),
    "alibi": (False,),
    "multi_query": (False,),
    "parallel_attn": (False,),
    "new_decoder_architecture": (False,),
    "attention_chunk_size": (None,),
    "index_topk": (None,),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
}
# How positions can be scaled, each type by some stage.
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


def shortened(value) -> str:
    """A value as in config.json, with long lists and objects cut."""
    if isinstance(value, dict):
        text = ", ".join(f"{json.dumps(key)}: {shortened(item)}" for key, item in value.items())
        return f"{{{text}}}" if len(text) <= 160 else f"{{{text[:160]} …}}"
    if isinstance(value, list) and len(value) > 4:
        return f"[{', '.join(map(shortened, value[:2]))}, …]"
    return json.dumps(value)


def obstacles(config: dict) -> str:
    """The fields of a model of unknown model_type that no stage can represent: "alibi = true and …" or ""."""
    possible = SWITCHED_OFF | {"norm_topk_prob": (True,)}
    found = {key: config[key] for key in possible if config.get(key) not in (None, *possible[key])}
    for name in ("rope_scaling", "rope_parameters"):
        rope = config.get(name)
        if (
            isinstance(rope, dict)
            and (rope.get("rope_type") or rope.get("type", "default")) not in ROPE_TYPES
        ):
            found[name] = rope
    return " and ".join(f"{key} = {shortened(value)}" for key, value in found.items())


def size(config: dict, key: str, default: int | None = None) -> int:
    """A positive integer. Raises UserError for any other value, or if it is missing and has no default."""
    value = default if config.get(key) is None else config[key]
    if value is None:
        raise UserError(f"config.json has no {key}")
    if type(value) is not int or value < 1:
        raise UserError(f"config.json has {key} = {json.dumps(value)}: it must be a positive integer")
    return value


def real(config: dict, key: str, default: float) -> float:
    """A finite number, 0 or more. Raises UserError for any other value."""
    value = default if config.get(key) is None else config[key]
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise UserError(f"config.json has {key} = {json.dumps(value)}: it must be a number, 0 or more")
    return float(value)


def flag(config: dict, key: str, default: bool) -> bool:
    """A boolean. Raises UserError for any other value."""
    value = default if config.get(key) is None else config[key]
    if type(value) is not bool:
        raise UserError(f"config.json has {key} = {json.dumps(value)}: it must be true or false")
    return value


def refuse_others(config: dict, representable: dict[str, tuple], stages: str) -> None:
    """Raises UserError for the first field whose value our stages cannot represent.

    representable: the allowed values of each field. The first is the default, for a missing or null field.
    Those in SWITCHED_OFF are added, and layers must have full attention.
    """
    if any(kind != "full_attention" for kind in config.get("layer_types") or []):
        raise UserError(
            f"config.json has layer_types = {shortened(config['layer_types'])}: {stages} cannot "
            'represent that, only "full_attention"'
        )
    for key, possible in (SWITCHED_OFF | representable).items():
        value = possible[0] if config.get(key) is None else config[key]
        if value not in possible:
            raise UserError(
                f"config.json has {key} = {shortened(value)}: {stages} cannot represent that, "
                f"only {' or '.join(map(json.dumps, possible))}"
            )


def say_what_is_unknown(config: dict, known: set[str]) -> None:
    """Lists the ignored fields on stderr."""
    known = {*known, *WITHOUT_EFFECT, *SWITCHED_OFF, "layer_types"}
    unknown = {
        key: value for key, value in config.items() if key not in known and value not in (None, False, [], {})
    }
    if unknown:
        listing = ", ".join(f"{key} = {json.dumps(value)}" for key, value in unknown.items())
        print(f"ignored unknown fields in config.json: {listing}", file=sys.stderr)
