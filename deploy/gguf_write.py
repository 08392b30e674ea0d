"""Writes a run as one GGUF file for llama.cpp: metadata, the tokenizer, and the tensors one by one.

Matrices get the requested type. Norms, biases, the router and learned positions stay float32, as in
llama.cpp's own converter. Q8_0 and Q4_0 store blocks of 32 numbers: matrices whose rows are not divisible by
32 become F16. With q4_0, the embedding and the head become Q8_0. Rows of the embedding that only pad the
vocabulary, and blocks of multi-token prediction, are left out. A quantized run's matrices keep their own
codes and scales, as Q4_1, or as Q4_0 or Q8_0 where all zeros are in the middle.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import torch

from deploy import deepseek, gguf_file, gguf_names, gguf_tokenizer, llama, mixtral
from deploy.quantization import export as quantized
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
) -> str:
    """Writes the file; `counterpart` is a module such as llama. UserError for what llama.cpp cannot run.

    Returns the type of most matrices.

    Tensors of a quantized run are words (see deploy/quantization/export.py), and keep their own grid.
    """
    gguf = gguf_file.package()
    config, theirs = converted(counterpart, tensors, sizes)
    tokenizer = gguf_tokenizer.to_metadata(run, meta)
    n_tokens = len(tokenizer["tokenizer.ggml.tokens"])
    if n_tokens > config["vocab_size"]:
        raise UserError(f"the tokenizer has {n_tokens:,} tokens, but the model has {config['vocab_size']:,}")
    made = gguf_names.tensors_out(theirs, config, n_tokens)
    metadata = gguf_names.to_metadata(config | {"vocab_size": n_tokens}) | tokenizer
    types, dense = {}, []
    for name, (parts, make) in made.items():
        shape = make([part.to("meta") for part in parts]).shape
        types[name] = type_of(name, shape, kind)
        if quantized.is_words(parts[0]):
            own = quantized.block_type(make(parts))
            dense += [] if own else [name]
            types[name] = own or types[name]
    quantized.say_what_is_dense(dense, "no blocks of 32 with one scale each can hold them", kind)
    own = Counter(types[name] for name, (parts, _) in made.items() if quantized.is_words(parts[0]))
    if own:
        kind = own.most_common(1)[0][0].lower()
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
    for name, (parts, make) in made.items():
        shape = make([part.to("meta") for part in parts]).shape
        types[name] = gguf.GGMLQuantizationType[types[name]]
        block, n_bytes = gguf.GGML_QUANT_SIZES[types[name]]
        size = shape.numel() // block * n_bytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (parts, make) in made.items():
        if quantized.is_words(parts[0]) and name not in dense:
            writer.write_tensor_data(quantized.blocks(make(parts), types[name].name))
            continue
        array = quantized.dense(make(parts), torch.float32).float().contiguous().numpy()
        if types[name].name == "F16" and np.abs(array).max() > np.finfo(np.float16).max:
            raise UserError(f"{name} has values too large for float16\nexport with --outtype bf16 or f32")
        writer.write_tensor_data(gguf.quants.quantize(array, types[name]))
    writer.close()
    return kind


def converted(counterpart, tensors: dict[str, torch.Tensor], sizes: dict) -> tuple[dict, dict]:
    """The model's config.json and tensors in the format of Hugging Face.

    Stage 6 that is no Mixtral becomes a GLM-4.5: llama.cpp has no other architecture that has a sigmoid
    router and shared experts and leaves the rest of a Llama as it is.
    """
    is_mixtral = counterpart is mixtral and sizes["num_experts_per_tok"] > 1
    is_mixtral &= all(sizes.get(name) == needed for name, needed in mixtral.NEEDED.items())
    if counterpart is not mixtral or is_mixtral:
        try:
            return counterpart.to_config(sizes), counterpart.to_tensors(tensors, sizes)
        except UserError as error:
            raise UserError(f"llama.cpp cannot run this model, and nor can transformers: {error}") from None
    if sizes["n_shared_experts"] < 1:
        raise UserError(
            "llama.cpp runs stage 6 without shared experts only with router = softmax, num_experts_per_tok "
            "of 2 or more, first_k_dense_replace = 0 and routed_scaling_factor = 1"
        )
    same = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size")
    same += ("first_k_dense_replace", "routed_scaling_factor")
    config = llama.to_config(sizes) | {name: sizes[name] for name in same} | {"model_type": "glm4_moe"}
    config |= {"scoring_func": sizes["router"], "norm_topk_prob": sizes["num_experts_per_tok"] > 1}
    theirs = mixtral.split_experts(tensors, deepseek.NAMES)
    for i in range(sizes["first_k_dense_replace"], sizes["n_layer"]):  # a softmax router has no biases
        bias = f"model.layers.{i}.mlp.gate.e_score_correction_bias"
        theirs.setdefault(bias, torch.zeros(sizes["n_routed_experts"]))
    return config, theirs


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
