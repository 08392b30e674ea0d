"""Stages 3 and 4 with a character vocabulary as the two files of karpathy/llama2.c (format version 0).

What holds, up to the context: `./run model.bin -z tokenizer.bin -t 0 -n 0 -i PROMPT` prints the text of
`sample.py --temperature 0` for a newline and the PROMPT, without that newline; without -i, that of sample.py
without a prompt. The newline is there because run.c puts a token 1 (BOS) before every prompt and never prints
the first token: here BOS *is* a newline, what sample.py too starts from where nothing is asked.

- run.c puts a space behind BOS as well. The last token, "<s> ", is what its encoder merges the two into: a
  second BOS. So no prompt begins with a space that is not its own.
- Our tokens follow Llama's 3 special and 256 byte ones. A character that the model does not know, for which
  sample.py has an error, becomes byte tokens, whose embedding is zero.
- run.c would drop a space that it generates right after BOS, unless it is spelt "<0x20>": so ours is spelt,
  and a prompt's spaces are byte token 0x20, with the same embedding.
- The head of all these additional tokens is the mean of ours, so one of them is never the most likely. With
  -t above 0 and -p 1 each is drawn with the geometric mean of the probabilities.
- run.c prints no control characters but whitespace.
"""

import struct
from pathlib import Path

import torch

from data.tokenizers import CharTokenizer
from lab import sampling
from lab.errors import UserError

STAGES = ("stage3_swiglu", "stage4_gqa")
BOS = 1  # run.c's number for it
FIRST_BYTE = 3  # after <unk>, <s> and </s>
SPACE = FIRST_BYTE + ord(" ")
FIRST_CHARACTER = FIRST_BYTE + 256


def write(folder: Path, stage: str, tensors: dict[str, torch.Tensor], sizes: dict, meta: dict) -> None:
    """Writes model.bin and tokenizer.bin; UserError for what run.c does not compute."""
    if stage not in STAGES:
        raise UserError(f"llama2.c has no counterpart of {stage}: it runs stages 3 and 4, which are Llama")
    if meta["tokenizer"] != "char":
        raise UserError(
            f"the run has the tokenizer {meta['tokenizer']!r}, but llama2.c's run splits a prompt by other "
            "rules\nexport a run trained with --tokenizer char"
        )
    for name, needed in (("rope_theta", 10_000.0), ("norm_eps", 1e-5)):
        if sizes[name] != needed:
            raise UserError(f"the run has {name} {sizes[name]}; llama2.c's run computes with {needed} alone")
    tokenizer = CharTokenizer(meta["characters"])
    pieces = vocabulary(tokenizer)
    kv_dim = sizes["n_embd"] // sizes["n_head"] * sizes.get("n_kv_head", sizes["n_head"])
    for what, count in (
        ("vocab_size × n_embd", len(pieces) * sizes["n_embd"]),
        ("n_layer × block_size × width of the keys", sizes["n_layer"] * sizes["block_size"] * kv_dim),
    ):
        if count >= 2**31:
            raise UserError(f"{what} is {count:,}; llama2.c's run counts to {2**31 - 1:,} alone")
    write_tokenizer(folder / "tokenizer.bin", pieces)
    write_model(folder / "model.bin", tensors, sizes, tokenizer)


def vocabulary(tokenizer: CharTokenizer) -> list[bytes]:
    """What each token is spelt: run.c's own, the characters, the second BOS."""
    pieces = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % byte for byte in range(256))]
    pieces[SPACE] = b" "
    characters = ("<0x20>" if character == " " else character for character in tokenizer.characters)
    return [*pieces, *(character.encode("utf-8", "surrogatepass") for character in characters), b"<s> "]


def write_tokenizer(path: Path, pieces: list[bytes]) -> None:
    """int32 length of the longest piece; for each its float32 score, int32 length and bytes."""
    with open(path, "wb") as file:
        file.write(struct.pack("<i", max(map(len, pieces))))
        for piece in pieces:
            file.write(struct.pack("<fi", 0.0, len(piece)) + piece)


def write_model(path: Path, tensors: dict[str, torch.Tensor], sizes: dict, tokenizer: CharTokenizer) -> None:
    """Seven int32 sizes, then float32 tensors, each kind over all layers (memory_map_weights in run.c)."""
    n_layer, n_head, block_size = sizes["n_layer"], sizes["n_head"], sizes["block_size"]
    n_kv_head, head_dim = sizes.get("n_kv_head", n_head), sizes["n_embd"] // n_head
    embedding, head = token_tables(tensors, tokenizer)

    def layers(name: str) -> list[torch.Tensor]:
        return [tensors[f"model.layers.{i}.{name}.weight"] for i in range(n_layer)]

    positions = torch.arange(block_size)[:, None]
    angles = positions / 10_000.0 ** (torch.arange(0, head_dim, 2) / head_dim)  # (block_size, head_dim/2)
    parts = [
        embedding,
        *layers("input_layernorm"),
        *(adjacent_pairs(weight, n_head) for weight in layers("self_attn.q_proj")),
        *(adjacent_pairs(weight, n_kv_head) for weight in layers("self_attn.k_proj")),
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
    header = [sizes["n_embd"], sizes["intermediate_size"], n_layer, n_head, n_kv_head, -len(head), block_size]
    with open(path, "wb") as file:
        file.write(struct.pack("<7i", *header))  # a vocab_size below zero: the head is a matrix of its own
        for part in parts:
            file.write(part.float().numpy().astype("<f4").tobytes())


def token_tables(tensors: dict, tokenizer: CharTokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """The embedding and the head for the tokens of `vocabulary`: two of (tokens, n_embd)."""
    known = tensors["model.embed_tokens.weight"][: tokenizer.vocab_size]  # the rest pads the vocabulary
    known_head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])[: tokenizer.vocab_size]
    ours = slice(FIRST_CHARACTER, FIRST_CHARACTER + len(known))
    embedding = known.new_zeros(ours.stop + 1, known.size(1))
    embedding[ours] = known
    embedding[[BOS, -1]] = known[sampling.default_prompt(tokenizer)[0]]
    if " " in tokenizer.characters:
        embedding[SPACE] = known[tokenizer.characters.index(" ")]
    head = known_head.mean(0).repeat(len(embedding), 1)
    head[ours] = known_head
    return embedding, head


def adjacent_pairs(weight: torch.Tensor, n_head: int) -> torch.Tensor:
    """The rows of a q or k projection (n_head · head_dim, n_embd), reordered within each head.

    Ours turn the pairs (i, i + head_dim/2), llama2.c's the pairs (2i, 2i + 1), by the same angles.
    """
    return weight.view(n_head, 2, -1, weight.size(1)).transpose(1, 2).reshape_as(weight)
