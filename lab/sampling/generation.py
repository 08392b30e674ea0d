"""Turns logits into tokens, and generates text token by token."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lab.errors import UserError
from lab.sampling.ahead import BackgroundStep
from lab.sampling.compiled import CompiledStep

SMALLEST = torch.finfo(torch.float32).tiny  # temperatures below it may be 0 in float32


def next_token_probs(
    logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float
) -> torch.Tensor:
    """The distribution to sample from: (vocab_size,) logits -> (vocab_size,) probabilities.

    top_k keeps the k most likely tokens. Then top_p keeps the smallest set of most likely tokens whose
    probabilities sum to at least top_p (arXiv 1904.09751, section 3.1). At temperature 0, the most likely
    token has all of the probability (greedy). Raises UserError if the logits are not finite numbers.
    """
    logits = logits.float()
    largest = logits.max()
    check_finite(largest)
    if is_greedy(temperature):
        return F.one_hot(logits.argmax(), len(logits)).float()
    probs = F.softmax((logits - largest) / temperature, dim=-1)  # never infinite, however low the temperature
    if top_k is not None and top_k < len(probs):
        kept, tokens = probs.topk(top_k)
        probs = torch.zeros_like(probs).scatter(0, tokens, kept / kept.sum())
    if top_p < 1:
        kept, tokens = probs.sort(descending=True)
        more_likely = kept.cumsum(0) - kept  # total probability of the more likely tokens
        dropped = more_likely >= top_p
        dropped[0] = False
        kept[dropped] = 0
        probs = torch.zeros_like(probs).scatter(0, tokens, kept / kept.sum())
    return probs


def check_finite(largest: torch.Tensor) -> None:
    """Raises UserError if the largest logit is not a finite number. It is NaN if any logit is."""
    if not largest.isfinite():
        raise UserError(
            f"the model's output is not a number ({largest.item()})\n"
            "its weights are damaged, or it diverged in training: use another run or checkpoint"
        )


def is_greedy(temperature: float) -> bool:
    """Whether only the most likely token can be drawn: at 0, or a value too small to divide by in float32."""
    return temperature < SMALLEST


@dataclass
class Sampler:
    """Draws tokens from logits; `next_token_probs` explains the options."""

    vocab_size: int
    """Only the first vocab_size logits count (the others pad the vocabulary)."""
    temperature: float
    top_k: int | None
    top_p: float
    generator: torch.Generator | None
    """Random numbers are drawn on the CPU, so that a seed gives the same text on every device."""

    def distributions(self, logits: torch.Tensor) -> list[torch.Tensor]:
        """(1, T, vocab_size or more) logits -> T distributions (vocab_size,) to draw from, on the CPU."""
        rows = logits[0, :, : self.vocab_size].cpu()
        return [next_token_probs(row, self.temperature, self.top_k, self.top_p) for row in rows]

    def draw(self, probs: torch.Tensor) -> int:
        """Draws a token by its probability; at temperature 0, returns the most likely one."""
        if is_greedy(self.temperature):
            return int(probs.argmax())
        return int(torch.multinomial(probs, 1, generator=self.generator))


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
    step: CompiledStep | BackgroundStep | None = None,
    stop: Collection[int] = (),
    cache=None,
) -> Iterator[int]:
    """Yields max_new_tokens tokens that continue the prompt, which has at least one token.

    The model sees at most `context` tokens (None: block_size); `last_half` explains what happens after that.
    `Sampler` explains the options from vocab_size to generator. step, compiled from the model, generates the
    tokens after a prefill faster; its cache needs room for `cache_length` of these arguments. A token in
    `stop` ends the text, and is not yielded. cache: one that already holds the first cache.length tokens of
    the prompt, fewer than all, with room for `cache_length`; step's own if there is a step.
    """
    if context is None:
        context = model.config.block_size
    device = next(model.parameters()).device
    sampler = Sampler(vocab_size, temperature, top_k, top_p, generator)
    if cache is None:
        cache = step.cache if step else model.new_cache(1, cache_length(context, prompt, max_new_tokens))
        cache.length = 0
    window = prompt[-context:]
    new = window[cache.length :]  # what the model has not seen yet
    for _ in range(max_new_tokens):
        idx = torch.tensor([new], device=device)
        logits = step(idx) if step and len(new) == 1 else model(idx, cache=cache)[0]
        (probs,) = sampler.distributions(logits[:, -1:])
        token = sampler.draw(probs)
        if token in stop:
            return
        yield token
        window, new = [*window, token], [token]
        if len(window) > context:
            window = new = last_half(window, context)
            cache.length = 0


def cache_length(context: int, prompt: list[int], max_new_tokens: int) -> int:
    """The largest number of tokens in the cache, which is never more than the context."""
    return min(context, len(prompt) + max_new_tokens)


def last_half(window: list[int], context: int) -> list[int]:
    """The tokens to continue from, with an empty cache, once the window exceeds the context: its last half.

    So untrained positions are never used, and the cost is one short prefill per half context.
    """
    return window[-max(1, context // 2) :]  # at least one token, from which the next one is predicted


@dataclass
class DraftCounts:
    """How many tokens were drafted, and how many of them accepted."""

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
    stop: Collection[int] = (),
) -> Iterator[int]:
    """Like generate, but the model's MTP block drafts n_drafts tokens at a time (stage 7).

    The model verifies the drafts in one forward pass: speculative sampling (arXiv 2211.17192, algorithm 1).
    So the tokens follow the model's own distribution, and at temperature 0 they equal those of generate.
    counts is updated after every pass. A token in `stop` ends the text, and is not yielded.
    """
    if context is None:
        context = model.config.block_size
    if counts is None:
        counts = DraftCounts()
    device = next(model.parameters()).device
    sampler = Sampler(vocab_size, temperature, top_k, top_p, generator)
    length = cache_length(context, prompt, max_new_tokens + n_drafts)
    cache, draft_cache = model.new_cache(1, length), model.new_cache(1, length, drafting=True)
    window = prompt[-context:]
    drafts, guessed = [], []  # tokens, and the distributions that they were drawn from
    n_made = 0
    while n_made < max_new_tokens:
        # The model gets the tokens of the window that it has not seen, and the drafts after them.
        n_seen = cache.length
        new = torch.tensor([[*window[n_seen:], *drafts]], device=device)
        logits, hidden = model(new, cache=cache, return_hidden=True)
        probs = sampler.distributions(logits[:, -1 - len(drafts) :])
        made = verified(probs, drafts, guessed, sampler)
        counts.drafted += len(drafts)
        counts.accepted += len(made) - 1
        made = made[: max_new_tokens - n_made]
        for token in made:
            if token in stop:
                return
            yield token
        n_made += len(made)
        window = [*window, *made]
        if len(window) > context:
            window = last_half(window, context)
            drafts, guessed = [], []
            cache.length = draft_cache.length = 0
            continue
        # The MTP block gets the hidden states of the tokens that are certain, each with its following token.
        n_certain = len(window) - 1
        following = torch.tensor([window[n_seen + 1 :]], device=device)
        room = context - len(window)
        drafts, guessed = draft_tokens(
            model, hidden[:, : n_certain - n_seen], following, draft_cache, min(n_drafts, room), sampler
        )
        # Drop the cache entries of uncertain tokens; they are overwritten later.
        cache.length = draft_cache.length = n_certain


def draft_tokens(
    model: torch.nn.Module, hidden: torch.Tensor, idx: torch.Tensor, cache, n_drafts: int, sampler: Sampler
) -> tuple[list[int], list[torch.Tensor]]:
    """Drafts n_drafts tokens with the MTP block; returns them and the distribution of each.

    hidden (1, T, n_embd) are the hidden states that are new to the block; idx (1, T) are the tokens that
    follow them.
    """
    drafts, guessed = [], []
    for _ in range(n_drafts):
        logits, hidden = model.draft(hidden, idx, cache)
        (probs,) = sampler.distributions(logits[:, -1:])
        drafts.append(sampler.draw(probs))
        guessed.append(probs)
        # The next draft continues from the block's own hidden state and token.
        hidden, idx = hidden[:, -1:], idx.new_tensor([drafts[-1:]])
    return drafts, guessed


def verified(
    probs: list[torch.Tensor], drafts: list[int], guessed: list[torch.Tensor], sampler: Sampler
) -> list[int]:
    """The drafts before the first rejected one, and one more token, drawn by the model.

    probs: the model's distributions p at each draft and after the last; guessed: the drafts' distributions q.
    A draft is accepted with probability min(1, p/q). A rejected one is replaced by a token drawn from
    max(0, p - q), normalized.
    """
    made = []
    for draft, p, q in zip(drafts, probs, guessed, strict=False):
        if float(torch.rand(1, generator=sampler.generator)) * q[draft] < p[draft]:
            made.append(draft)
            continue
        left = (p - q).clamp_min(0)
        if not left.any():  # p and q differ only by rounding
            left = p
        return [*made, sampler.draw(left)]
    return [*made, sampler.draw(probs[-1])]


def default_prompt(tokenizer) -> list[int]:
    """The tokens to start from if no prompt is given.

    They are the tokenizer's prefix (BOS), else a newline, else token 0.
    """
    if tokenizer.prefix:
        return list(tokenizer.prefix)
    try:
        tokens = tokenizer.encode("\n").tolist()
    except UserError:
        return [0]
    return tokens if "\n" in tokenizer.decode(tokens) else [0]
