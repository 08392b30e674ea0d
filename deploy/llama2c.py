"""Stages 3 to 5 with a character vocabulary as the two files of karpathy/llama2.c (format version 0).

run.c puts two tokens before every prompt: BOS, which stands for the newline here, and a space. So `./run
model.bin -z tokenizer.bin -t 0 -n 0 -i PROMPT` continues a newline, a space and PROMPT as `sample.py
--temperature 0` does, up to the end of the context. It prints neither the newline nor the space. Without a
prompt it starts from the newline alone, like sample.py, and does not print a space that follows it. It never
prints control characters. `before_prompt` covers models that know no newline or no space.

run.c stops when it samples BOS. The head's row for BOS is the mean of our rows, so its logit is the mean of
our logits and never the largest. With a temperature, BOS is at most as likely as the average token.

run.c encodes a character that it does not know as the tokens 3 + byte, up to 258, and does not check that the
vocabulary has them. So each character has several copies, equally many for all: sampling with a temperature
follows the model's distribution, and with -t 0 the first copy is chosen. sample.py refuses a prompt with an
unknown character; run.c reads and prints arbitrary known ones in its place.
"""

import math
import struct
from pathlib import Path

import torch

from data.tokenizers import CharTokenizer
from lab.errors import UserError
from lab.sampling import generation

STAGES = ("stage3_swiglu", "stage4_gqa", "stage5_flash")
BOS = 1  # run.c's number for it
LAST_BYTE = 3 + 255  # run.c's token for the byte 255
ROPE_THETA, NORM_EPS = 10_000.0, 1e-5  # constants in run.c


def write(folder: Path, stage: str, tensors: dict[str, torch.Tensor], sizes: dict, meta: dict) -> None:
    """Writes model.bin and tokenizer.bin; UserError for what run.c does not compute."""
    if stage not in STAGES:
        raise UserError(f"llama2.c has no counterpart of {stage}: it runs stages 3 to 5, which are Llama")
    if meta["tokenizer"] != "char":
        raise UserError(
            f"the run has the tokenizer {meta['tokenizer']!r}, but llama2.c's run splits a prompt by other "
            "rules\nexport a run trained with --tokenizer char"
        )
    for name, needed in (("rope_theta", ROPE_THETA), ("norm_eps", NORM_EPS)):
        if sizes[name] != needed:
            raise UserError(f"the run has {name} {sizes[name]}; llama2.c's run computes only with {needed}")
    tokenizer = CharTokenizer(meta["characters"])
    pieces, tokens = vocabulary(tokenizer)
    n_kv_head = sizes.get("n_kv_head", sizes["n_head"])
    kv_width = n_kv_head * (sizes["n_embd"] // sizes["n_head"])
    for what, count in (
        ("vocab_size × n_embd", len(pieces) * sizes["n_embd"]),
        ("n_layer × block_size × width of k", sizes["n_layer"] * sizes["block_size"] * kv_width),
    ):
        if count >= 2**31:
            raise UserError(f"{what} is {count:,}; llama2.c's run counts only to {2**31 - 1:,}")
    embedding = tensors["model.embed_tokens.weight"][: tokenizer.vocab_size]  # the rest pads the vocabulary
    head = tensors.get("lm_head.weight", embedding)[: tokenizer.vocab_size]
    start = embedding[generation.default_prompt(tokenizer)]  # (1, n_embd)
    tensors = tensors | {
        "model.embed_tokens.weight": torch.cat((embedding, start))[tokens],
        "lm_head.weight": torch.cat((head, head.mean(0, keepdim=True)))[tokens],
    }
    write_tokenizer(folder / "tokenizer.bin", pieces)
    write_model(folder / "model.bin", tensors, sizes, n_kv_head)


def before_prompt(tokenizer: CharTokenizer) -> str:
    """What the model sees before a prompt: BOS is what sample.py starts a new text from, usually a newline.

    It also takes the place of the space if the model knows none.
    """
    start = tokenizer.decode(generation.default_prompt(tokenizer))
    return start + (" " if " " in tokenizer.characters else start)


def vocabulary(tokenizer: CharTokenizer) -> tuple[list[bytes], list[int]]:
    """How each of run.c's tokens is spelt, and which of ours it is (vocab_size: none, it is run.c's own)."""
    tokens = list(range(tokenizer.vocab_size)) * math.ceil(LAST_BYTE / tokenizer.vocab_size)
    pieces = [tokenizer.characters[token].encode("utf-8", "surrogatepass") for token in tokens]
    # run.c looks up the space before a prompt by its spelling and does not check that it was found.
    own = [b"<s>"] if " " in tokenizer.characters else [b"<s>", b" "]
    pieces[BOS:BOS] = own
    tokens[BOS:BOS] = [tokenizer.vocab_size] * len(own)
    return pieces, tokens


def write_tokenizer(path: Path, pieces: list[bytes]) -> None:
    """int32 length of the longest piece; for each its float32 score, int32 length and bytes."""
    with open(path, "wb") as file:
        file.write(struct.pack("<i", max(map(len, pieces))))
        for piece in pieces:
            file.write(struct.pack("<fi", 0.0, len(piece)) + piece)


def neighbouring_pairs(weight: torch.Tensor, n_head: int) -> torch.Tensor:
    """The rows of a q or k projection (n_head · head_dim, n_embd) in the order of llama2.c.

    RoPE rotates the pairs (i, i + head_dim/2) of a head here, and the pairs (2i, 2i + 1) in llama2.c.
    """
    halves = weight.view(n_head, 2, -1, weight.size(1))  # (n_head, 2, head_dim/2, n_embd)
    return halves.transpose(1, 2).reshape(weight.shape)


def write_model(path: Path, tensors: dict[str, torch.Tensor], sizes: dict, n_kv_head: int) -> None:
    """Seven int32 sizes, then float32 tensors, each kind over all layers (memory_map_weights in run.c)."""
    n_embd, n_layer, n_head = sizes["n_embd"], sizes["n_layer"], sizes["n_head"]
    block_size, head_dim = sizes["block_size"], n_embd // n_head
    head = tensors["lm_head.weight"]

    def layers(name: str) -> list[torch.Tensor]:
        return [tensors[f"model.layers.{i}.{name}.weight"] for i in range(n_layer)]

    fractions = torch.arange(0, head_dim, 2) / head_dim
    angles = torch.arange(block_size)[:, None] / ROPE_THETA**fractions  # (block_size, head_dim/2)
    parts = [
        tensors["model.embed_tokens.weight"],
        *layers("input_layernorm"),
        *(neighbouring_pairs(weight, n_head) for weight in layers("self_attn.q_proj")),
        *(neighbouring_pairs(weight, n_kv_head) for weight in layers("self_attn.k_proj")),
        *layers("self_attn.v_proj"),
        *layers("self_attn.o_proj"),
        *layers("post_attention_layernorm"),
        *layers("mlp.gate_proj"),
        *layers("mlp.down_proj"),
        *layers("mlp.up_proj"),
        tensors["model.norm.weight"],
        angles.cos(),  # run.c skips these two; older readers need them
        angles.sin(),
        head,
    ]
    # A vocab_size below zero says that the head is a matrix of its own.
    header = [n_embd, sizes["intermediate_size"], n_layer, n_head, n_kv_head, -len(head), block_size]
    with open(path, "wb") as file:
        file.write(struct.pack("<7i", *header))
        for part in parts:
            file.write(part.float().numpy().astype("<f4").tobytes())
