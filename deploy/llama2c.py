"""Stages 3 and 4 with a character vocabulary as the two files of karpathy/llama2.c (format version 0).

`./run model.bin -z tokenizer.bin -t 0 -n 0 -i PROMPT` prints the text of `sample.py --temperature 0 --prompt
PROMPT`, and without -i that of sample.py without a prompt, up to the context (less one, BOS's place). Three
habits of run.c stand in the way:

- It puts BOS (token 1) and a space before a prompt. Its encoder merges tokens whose spellings together are a
  token: here the two become "<s> ", the last token, which no other token ever attends to.
- It counts unknown characters by their bytes, from token 3 on. So Llama's 259 first tokens come before ours.
  sample.py refuses such a prompt; here its bytes mean nothing. They and BOS are never made.
- It drops a space that it makes right after BOS (when there is no prompt, where BOS is the newline that
  sample.py starts from), unless the space is spelt "<0x20>". So it is; in a prompt it is byte token 0x20.

"Never" takes a constant in the residual stream, and Llama has no biases. So the file's model is twice as wide
as ours, in n_embd and in each head: `widened` says how the additional numbers leave the function as it is.
What run.c does not print: control characters, whitespace excepted.
"""

import math
import struct
from pathlib import Path

import torch
import torch.nn.functional as F

from data.tokenizers import CharTokenizer
from lab.errors import UserError
from lab.sampling import generation

STAGES = ("stage3_swiglu", "stage4_gqa", "stage5_flash")
BOS = 1  # run.c's number for it
FIRST_BYTE = 3  # after <unk>, <s> and </s>
SPACE = FIRST_BYTE + ord(" ")
FIRST_CHARACTER = FIRST_BYTE + 256
ROPE_THETA, NORM_EPS = 10_000.0, 1e-5  # run.c has no others
TINY = 2.0**-20  # its square is lost beside NORM_EPS
FAR = 1e12  # a score or logit of -FAR, divided by any two norms, is a probability of 0


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
            raise UserError(f"the run has {name} {sizes[name]}; llama2.c's run computes with {needed} alone")
    head_dim = sizes["n_embd"] // sizes["n_head"]
    longest = int(1.5 * ROPE_THETA ** (1 - 1 / head_dim))  # within a quarter turn of the slowest pair
    if sizes["block_size"] > longest:
        raise UserError(
            f"the run has block_size {sizes['block_size']}; llama2.c's run can have {longest} where heads "
            f"(n_embd / n_head) are {head_dim} wide"
        )
    tokenizer = CharTokenizer(meta["characters"])
    pieces = vocabulary(tokenizer)
    n_kv_head = sizes.get("n_kv_head", sizes["n_head"])
    for what, count in (
        ("2 × vocab_size × n_embd", 2 * len(pieces) * sizes["n_embd"]),
        (
            "2 × n_layer × block_size × width of k",
            2 * sizes["n_layer"] * sizes["block_size"] * n_kv_head * head_dim,
        ),
    ):
        if count >= 2**31:
            raise UserError(f"{what} is {count:,}; llama2.c's run counts to {2**31 - 1:,} alone")
    write_tokenizer(folder / "tokenizer.bin", pieces)
    tensors = tensors | token_tables(tensors, tokenizer)
    write_model(folder / "model.bin", widened(tensors, sizes["n_head"], n_kv_head), sizes, n_kv_head)


def vocabulary(tokenizer: CharTokenizer) -> list[bytes]:
    """How each token is spelt: run.c's own, the characters, what stands before a prompt."""
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


def token_tables(tensors: dict[str, torch.Tensor], tokenizer: CharTokenizer) -> dict[str, torch.Tensor]:
    """Embedding and head for the tokens of `vocabulary`: (tokens, n_embd + 2).

    The last two columns are for `widened`: a constant, and what only the token before a prompt has.
    """
    known = tensors["model.embed_tokens.weight"][: tokenizer.vocab_size]  # the rest pads the vocabulary
    known_head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])[: tokenizer.vocab_size]
    n_embd, ours = known.size(1), slice(FIRST_CHARACTER, FIRST_CHARACTER + len(known))
    embedding, head = known.new_zeros(2, ours.stop + 1, n_embd + 2)
    embedding[ours, :n_embd] = known
    embedding[BOS, :n_embd] = known[generation.default_prompt(tokenizer)[0]]
    if " " in tokenizer.characters:
        embedding[SPACE, :n_embd] = known[tokenizer.characters.index(" ")]
    embedding[:, n_embd] = TINY
    embedding[-1, n_embd + 1] = TINY
    head[:, n_embd] = -FAR
    head[ours] = F.pad(known_head, (0, 2))
    return {"model.embed_tokens.weight": embedding, "lm_head.weight": head}


def widened(tensors: dict[str, torch.Tensor], n_head: int, n_kv_head: int) -> dict[str, torch.Tensor]:
    """The same function, twice as wide. The token tables come with the constant and the mark appended.

    The residual stream is ours times √2, then the constant TINY, the mark (TINY at the token before a prompt,
    else 0) and zeros. Its mean square is that of ours. So, with weights of ours/√2 and 1/TINY, a norm gives
    what ours gives, then 1/norm and mark/norm. Every other pair of a head is ours and turns by our angles;
    the slowest of the new ones holds the constant in q and -FAR times the mark in k, the others zeros.
    """
    wide, root = {}, math.sqrt(2)
    n_embd = tensors["model.norm.weight"].size(0)
    for name, weight in tensors.items():
        kind = name.split(".")[-2]
        if kind.endswith("norm"):
            extra = weight.new_tensor([1 / TINY, 1 / TINY])
            weight = F.pad(torch.cat((weight / root, extra)), (0, n_embd - 2))
        elif kind in ("embed_tokens", "lm_head"):
            weight = F.pad(weight, (0, n_embd - 2))
            if kind == "embed_tokens":
                weight[:, :n_embd] *= root
        elif kind == "q_proj":
            weight = every_other_pair(weight * root, n_head)  # root: scores are divided by √(2 head_dim)
            weight[:, -1, 1, 0, n_embd] = 1
        elif kind == "k_proj":
            weight = every_other_pair(weight, n_kv_head)
            weight[:, -1, 1, 0, n_embd + 1] = -FAR
        elif kind == "v_proj":
            weight = weight.view(n_kv_head, -1, n_embd)  # (n_kv_head, head_dim, n_embd)
            weight = F.pad(weight, (0, n_embd, 0, weight.size(1)))
        elif kind == "o_proj":
            weight = root * weight.view(n_embd, n_head, -1)  # (n_embd, n_head, head_dim)
            weight = F.pad(weight, (0, weight.size(2), 0, 0, 0, n_embd))
        elif kind == "down_proj":
            weight = F.pad(root * weight, (0, 0, 0, n_embd))
        else:  # gate_proj, up_proj
            weight = F.pad(weight, (0, n_embd))
        wide[name] = weight
    return wide


def every_other_pair(weight: torch.Tensor, n_head: int) -> torch.Tensor:
    """The rows of a q or k projection (n_head · head_dim, n_embd) as rows of heads twice as wide.

    Ours turn the pairs (i, i + head_dim/2), llama2.c's the pairs (2i, 2i + 1): rows are reordered. Returns
    (n_head, head_dim/2, 2, 2, 2 n_embd): pair, ours or new, first or second of the pair.
    """
    pairs = weight.view(n_head, 2, -1, weight.size(1)).transpose(1, 2)  # (n_head, head_dim/2, 2, n_embd)
    return F.pad(pairs.unsqueeze(2), (0, weight.size(1), 0, 0, 0, 1))


def write_model(path: Path, tensors: dict[str, torch.Tensor], sizes: dict, n_kv_head: int) -> None:
    """Seven int32 sizes, then float32 tensors, each kind over all layers (memory_map_weights in run.c)."""
    n_layer, n_head, block_size = sizes["n_layer"], sizes["n_head"], sizes["block_size"]
    head = tensors["lm_head.weight"]
    n_embd = head.size(1)

    def layers(name: str) -> list[torch.Tensor]:
        return [tensors[f"model.layers.{i}.{name}.weight"] for i in range(n_layer)]

    fractions = torch.arange(0, n_embd // n_head, 2) / (n_embd // n_head)
    angles = torch.arange(block_size)[:, None] / ROPE_THETA**fractions  # (block_size, head_dim/2)
    parts = [
        tensors["model.embed_tokens.weight"],
        *layers("input_layernorm"),
        *layers("self_attn.q_proj"),
        *layers("self_attn.k_proj"),
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
