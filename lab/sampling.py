"""Logits to tokens, and tokens one by one out of a model."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from lab.errors import UserError


def next_token_probs(
    logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float
) -> torch.Tensor:
    """The distribution to sample from: (vocab_size,) logits -> (vocab_size,) probabilities.

    top_k keeps the k most likely tokens; then top_p the fewest of the most likely whose probabilities
    sum to at least top_p (arXiv 1904.09751, section 3.1). temperature 0 is greedy: all of it on the
    most likely token.
    """
    if temperature == 0:
        return F.one_hot(logits.argmax(), len(logits)).float()
    probs = F.softmax(logits.float() / temperature, dim=-1)
    if top_k is not None and top_k < len(probs):
        kept, tokens = probs.topk(top_k)
        probs = torch.zeros_like(probs).scatter(0, tokens, kept / kept.sum())
    if top_p < 1:
        kept, tokens = probs.sort(descending=True)
        # A token stays if those before it do not reach top_p yet: the first always does.
        kept[kept.cumsum(0) - kept >= top_p] = 0
        probs = torch.zeros_like(probs).scatter(0, tokens, kept / kept.sum())
    return probs


@torch.inference_mode()
def generate(
    model: torch.nn.Module,
    prompt: list[int],
    max_new_tokens: int,
    vocab_size: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yields up to max_new_tokens tokens that continue the prompt (at least one token).

    Once the context (block_size) is full, its last half starts a new window: positions that were never
    trained are never used, and the cost of going on is one short prefill per half window. Only the
    first vocab_size logits count (the rest pads the vocabulary). Random numbers are drawn on the CPU,
    so that a seed gives the same text on every device.
    """
    context = model.config.block_size
    device = next(model.parameters()).device
    window = prompt[-context:]
    cache, new = model.new_cache(1, context), window
    for _ in range(max_new_tokens):
        logits, _ = model(torch.tensor([new], device=device), cache=cache)
        probs = next_token_probs(logits[0, -1, :vocab_size].cpu(), temperature, top_k, top_p)
        token = int(probs.argmax() if temperature == 0 else torch.multinomial(probs, 1, generator=generator))
        yield token
        window, new = [*window, token], [token]
        if len(window) > context:
            window = window[-(context // 2) or -1 :]
            cache, new = model.new_cache(1, context), window


def default_prompt(tokenizer) -> list[int]:
    """The token to start from where nothing is asked: a newline, or the first token without one."""
    try:
        return tokenizer.encode("\n").tolist()
    except UserError:
        return [0]
