"""Logits to tokens, and tokens one by one out of a model."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lab.errors import UserError
from lab.sampling.compiled import CompiledStep

SMALLEST = torch.finfo(torch.float32).tiny  # a temperature below it may be 0 in float32


def next_token_probs(
    logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float
) -> torch.Tensor:
    """The distribution to sample from: (vocab_size,) logits -> (vocab_size,) probabilities.

    top_k keeps the k most likely tokens; then top_p the fewest of the most likely whose probabilities
    sum to at least top_p (arXiv 1904.09751, section 3.1). temperature 0 is greedy: all of it on the
    most likely token. UserError where the logits are not numbers.
    """
    logits = logits.float()
    largest = logits.max()
    if not largest.isfinite():  # NaN if one of them is
        raise UserError(
            f"the model's output is not a number ({largest.item()})\n"
            "its weights are damaged, or it diverged in training: use another run or checkpoint"
        )
    if is_greedy(temperature):
        return F.one_hot(logits.argmax(), len(logits)).float()
    probs = F.softmax((logits - largest) / temperature, dim=-1)  # no infinity, however low it is
    if top_k is not None and top_k < len(probs):
        kept, tokens = probs.topk(top_k)
        probs = torch.zeros_like(probs).scatter(0, tokens, kept / kept.sum())
    if top_p < 1:
        kept, tokens = probs.sort(descending=True)
        # A token stays if those before it do not reach top_p yet: the first always does.
        kept[1:][(kept.cumsum(0) - kept)[1:] >= top_p] = 0
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
    context: int | None = None,
    step: CompiledStep | None = None,
) -> Iterator[int]:
    """Yields up to max_new_tokens tokens that continue the prompt (at least one token).

    Once the context (None: block_size) is full, its last half starts a new window: positions that were never
    trained are never used, and the cost of going on is one short prefill per half window. Only the
    first vocab_size logits count (the rest pads the vocabulary). Random numbers are drawn on the CPU,
    so that a seed gives the same text on every device. step, made of the model, makes the tokens that
    follow a prefill faster; its cache must have room for cache_length of these tokens.
    """
    context = context or model.config.block_size
    device = next(model.parameters()).device
    window = prompt[-context:]
    cache = step.cache if step else model.new_cache(1, cache_length(context, prompt, max_new_tokens))
    cache.length, new = 0, window
    for _ in range(max_new_tokens):
        idx = torch.tensor([new], device=device)
        logits = step(idx) if step and len(new) == 1 else model(idx, cache=cache)[0]
        probs = next_token_probs(logits[0, -1, :vocab_size].cpu(), temperature, top_k, top_p)
        token = draw(probs, temperature, generator)
        yield token
        window, new = [*window, token], [token]
        if len(window) > context:
            window = window[-(context // 2) or -1 :]
            cache.length, new = 0, window


def cache_length(context: int, prompt: list[int], max_new_tokens: int) -> int:
    """How many tokens are in the cache at most: no more than the context, however long that is."""
    return min(context, len(prompt) + max_new_tokens)


def is_greedy(temperature: float) -> bool:
    """Whether the temperature leaves the most likely token alone: 0, or too small to divide by in float32."""
    return temperature < SMALLEST


def draw(probs: torch.Tensor, temperature: float, generator: torch.Generator | None) -> int:
    """A token by its probability; the most likely one at temperature 0."""
    return int(probs.argmax() if is_greedy(temperature) else torch.multinomial(probs, 1, generator=generator))


@dataclass
class DraftCounts:
    """What became of the drafts."""

    drafted: int = 0
    accepted: int = 0


@torch.inference_mode()
def generate_with_drafts(
    model: torch.nn.Module,
    prompt: list[int],
    max_new_tokens: int,
    vocab_size: int,
    n_drafts: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    context: int | None = None,
    counts: DraftCounts | None = None,
) -> Iterator[int]:
    """generate, but the model's block of multi-token prediction drafts n_drafts tokens at a time.

    The model checks them in one forward pass and keeps those that it could have drawn itself: speculative
    sampling (arXiv 2211.17192, algorithm 1). So tokens follow the model's own distribution, and at
    temperature 0 they are those of generate. counts is kept up to date. For stage 7.
    """
    context = context or model.config.block_size
    device = next(model.parameters()).device
    counts = counts or DraftCounts()
    options = (temperature, top_k, top_p)

    def distributions(logits: torch.Tensor) -> list[torch.Tensor]:
        return [next_token_probs(row, *options) for row in logits[0, :, :vocab_size].cpu()]

    window, n_made = prompt[-context:], 0
    length = cache_length(context, prompt, max_new_tokens + n_drafts)
    cache, draft_cache = model.new_cache(1, length), model.new_cache(1, length, drafting=True)
    drafts, guessed = [], []  # tokens, and the distribution that each was drawn from
    while n_made < max_new_tokens:
        # The model sees what it has not seen of the window, and the drafts behind it.
        known = cache.length
        new = [*window[known:], *drafts]
        logits, hidden = model(torch.tensor([new], device=device), cache=cache, return_hidden=True)
        probs = distributions(logits[:, -1 - len(drafts) :])
        made = verified(probs, drafts, guessed, temperature, generator)
        counts.drafted += len(drafts)
        counts.accepted += len(made) - 1
        made = made[: max_new_tokens - n_made]
        yield from made
        n_made += len(made)
        window = [*window, *made]
        if len(window) > context:  # a new window, as in generate
            window = window[-(context // 2) or -1 :]
            cache.length = draft_cache.length = 0
            drafts, guessed = [], []
            continue
        # What was computed for rejected drafts is forgotten, and overwritten later.
        cache.length = len(window) - 1
        # The block gets the hidden states of the tokens that are certain, each with the token after it.
        hidden = hidden[:, : len(window) - 1 - known]
        following = window[known + 1 :]
        drafts, guessed = [], []
        for _ in range(min(n_drafts, context - len(window))):
            logits, hidden = model.draft(hidden, torch.tensor([following], device=device), draft_cache)
            (guess,) = distributions(logits[:, -1:])
            drafts.append(draw(guess, temperature, generator))
            guessed.append(guess)
            hidden, following = hidden[:, -1:], drafts[-1:]  # a further draft goes on from the block's own
        draft_cache.length = len(window) - 1


def verified(
    probs: list[torch.Tensor],
    drafts: list[int],
    guessed: list[torch.Tensor],
    temperature: float,
    generator: torch.Generator | None,
) -> list[int]:
    """The drafts up to the first that is rejected, and one token more that the model draws.

    probs: the model's distribution at each draft and after the last. A draft drawn from q is kept with
    probability p/q; the token in place of a rejected one is drawn from what p has more than q.
    """
    made = []
    for draft, p, q in zip(drafts, probs, guessed, strict=False):
        if is_greedy(temperature):
            kept = draft == int(p.argmax())
        else:
            kept = float(torch.rand(1, generator=generator)) * q[draft] < p[draft]
        if not kept:
            left = (p - q).clamp_min(0)
            by_chance = not is_greedy(temperature) and left.any()  # it is 0 where p and q differ by rounding
            return [*made, draw(left if by_chance else p, temperature, generator)]
        made.append(draft)
    return [*made, draw(probs[-1], temperature, generator)]


def default_prompt(tokenizer) -> list[int]:
    """The tokens to start from where no text is asked for.

    What the tokenizer puts before every text (BOS), else a newline, or token 0 where there is none.
    """
    if tokenizer.prefix:
        return list(tokenizer.prefix)
    try:
        tokens = tokenizer.encode("\n").tolist()
    except UserError:
        return [0]
    return tokens if "\n" in tokenizer.decode(tokens) else [0]
