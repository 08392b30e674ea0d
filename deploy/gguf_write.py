"""Writes a run as one GGUF file for llama.cpp: metadata, the tokenizer, and the tensors one by one.

Matrices get the requested type. Norms, biases, the router and learned positions stay float32, as in
llama.cpp's own converter. Q8_0 and Q4_0 store blocks of 32 numbers: matrices whose rows are not divisible by
32 become F16. With q4_0, the embedding and the head become Q8_0. Rows of the embedding that only pad the
vocabulary, and blocks of multi-token prediction, are left out.
"""

from pathlib import Path

import numpy as np
import torch

from deploy import gguf_file, gguf_names, gguf_tokenizer
from lab.errors import UserError

OUTTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
FILE_TYPES = {"f32": "ALL_F32"}  # the others are MOSTLY_F16 and so on
FLOAT32 = ("ffn_gate_inp", "position_embd")  # and everything with one dimension
NO_COUNTERPART = {
    "stage1_rmsnorm": "RMSNorm together with learned positions",
    "stage2_rope": "RMSNorm and RoPE together with an MLP without a gate",
}


def write(
    path: Path, counterpart, tensors: dict[str, torch.Tensor], sizes: dict, meta: dict, run: Path, kind: str
) -> None:
    """Writes the file; `counterpart` is a module such as llama. UserError for what llama.cpp cannot run."""
    gguf = gguf_file.package()
    config = config_of(counterpart, sizes)
    tokenizer = gguf_tokenizer.to_metadata(run, meta)
    n_tokens = len(tokenizer["tokenizer.ggml.tokens"])
    if n_tokens > config["vocab_size"]:
        raise UserError(f"the tokenizer has {n_tokens:,} tokens, but the model has {config['vocab_size']:,}")
    theirs = counterpart.to_tensors(tensors, sizes)
    made = gguf_names.tensors_out(theirs, config, n_tokens)
    metadata = gguf_names.to_metadata(config | {"vocab_size": n_tokens}) | tokenizer
    metadata |= {
        "general.type": "model",
        "general.name": run.resolve().name,
        "general.file_type": int(gguf.LlamaFileType[FILE_TYPES.get(kind, f"MOSTLY_{kind.upper()}")]),
        "general.quantization_version": int(gguf.GGML_QUANT_VERSION),
    }
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture":  # the writer has written it
            add(writer, gguf, key, value)
    types = {}
    for name, (parts, make) in made.items():
        shape = make([part.to("meta") for part in parts]).shape
        types[name] = gguf.GGMLQuantizationType[type_of(name, shape, kind)]
        block, n_bytes = gguf.GGML_QUANT_SIZES[types[name]]
        size = shape.numel() // block * n_bytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (parts, make) in made.items():
        array = make(parts).float().contiguous().numpy()
        if types[name].name == "F16" and np.abs(array).max() > np.finfo(np.float16).max:
            raise UserError(f"{name} has values too large for float16\nexport with --outtype bf16 or f32")
        writer.write_tensor_data(gguf.quants.quantize(array, types[name]))
    writer.close()


def config_of(counterpart, sizes: dict) -> dict:
    """The model's config.json. UserError for what neither transformers nor llama.cpp can represent."""
    try:
        return counterpart.to_config(sizes)
    except UserError as error:
        raise UserError(f"llama.cpp cannot run this model, as transformers cannot: {error}") from None


def type_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    """The type of a tensor in the file."""
    _, part, _ = gguf_names.split_name(name)
    if len(shape) == 1 or part in FLOAT32:
        return "F32"
    if kind in ("q8_0", "q4_0") and shape[-1] % 32:
        return "F16"
    if kind == "q4_0" and part in ("token_embd", "output"):
        return "Q8_0"
    return kind.upper()


def add(writer, gguf, key: str, value) -> None:
    """Adds a value to the metadata under the type that llama.cpp expects."""
    kinds = gguf.GGUFValueType
    scalars = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}
    if not isinstance(value, list):
        writer.add_key_value(key, value, scalars[type(value)])
        return
    items = {int: kinds.INT32, float: kinds.FLOAT32, str: kinds.STRING}
    writer.add_key_value(key, value, kinds.ARRAY, sub_type=items[type(value[0])] if value else kinds.STRING)
