"""Reads the fields of a Hugging Face config.json, none of them in silence."""

import json
import math
import sys

from lab.errors import UserError

# They say nothing about the function that the weights compute, or only what the tensors' shapes say too.
WITHOUT_EFFECT = {
    "_attn_implementation_autoset", "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id",
    "initializer_range", "model_type", "pad_token_id", "return_dict", "task_specific_params",
    "tokenizer_class", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


def size(config: dict, key: str, default: int | None = None) -> int:
    """A whole number of at least 1; UserError where it is missing, without a default, or anything else."""
    value = default if config.get(key) is None else config[key]
    if value is None:
        raise UserError(f"config.json has no {key}")
    if type(value) is not int or value < 1:
        raise UserError(f"config.json has {key} = {json.dumps(value)}: it must be a whole number above 0")
    return value


def real(config: dict, key: str, default: float) -> float:
    """A finite number of at least 0."""
    value = default if config.get(key) is None else config[key]
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise UserError(f"config.json has {key} = {json.dumps(value)}: it must be a number of 0 or more")
    return float(value)


def flag(config: dict, key: str, default: bool) -> bool:
    """true or false."""
    value = default if config.get(key) is None else config[key]
    if type(value) is not bool:
        raise UserError(f"config.json has {key} = {json.dumps(value)}: it must be true or false")
    return value


def refuse_others(config: dict, representable: dict[str, tuple], stages: str) -> None:
    """UserError for the first field with a value that our stages cannot represent.

    representable: by field its possible values; a field that is missing or null has the first.
    """
    for key, possible in representable.items():
        value = possible[0] if config.get(key) is None else config[key]
        if value not in possible:
            raise UserError(
                f"config.json has {key} = {json.dumps(value)}: {stages} cannot represent that, "
                f"only {' or '.join(map(json.dumps, possible))}"
            )


def say_what_is_unknown(config: dict, known: set[str]) -> None:
    """Names on stderr the fields that were not looked at."""
    unknown = {
        key: value
        for key, value in config.items()
        if key not in known | WITHOUT_EFFECT and value not in (None, False, [], {})
    }
    if unknown:
        listing = ", ".join(f"{key} = {json.dumps(value)}" for key, value in unknown.items())
        print(f"left out, as nothing here knows them: {listing}", file=sys.stderr)
