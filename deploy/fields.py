"""Reads and checks the fields of a Hugging Face config.json, and reports those that are ignored."""

import json
import math
import sys

from lab.errors import UserError

# Fields that do not affect the function, or repeat what the tensors' shapes say.
WITHOUT_EFFECT = {
    "_attn_implementation_autoset", "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id",
    "initializer_range", "model_type", "pad_token_id", "return_dict", "task_specific_params",
    "tokenizer_class", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


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
    """
    for key, possible in representable.items():
        value = possible[0] if config.get(key) is None else config[key]
        if value not in possible:
            raise UserError(
                f"config.json has {key} = {json.dumps(value)}: {stages} cannot represent that, "
                f"only {' or '.join(map(json.dumps, possible))}"
            )


def say_what_is_unknown(config: dict, known: set[str]) -> None:
    """Lists the ignored fields on stderr."""
    unknown = {
        key: value
        for key, value in config.items()
        if key not in known | WITHOUT_EFFECT and value not in (None, False, [], {})
    }
    if unknown:
        listing = ", ".join(f"{key} = {json.dumps(value)}" for key, value in unknown.items())
        print(f"ignored unknown fields in config.json: {listing}", file=sys.stderr)
