"""Decoding with static shapes, so that one compiled step generates every token (as in gpt-fast)."""

import itertools
import time

import torch

from lab import device as devices
from lab.errors import UserError


class StaticCache:
    """What decoding one token needs of a stage's KVCache, with shapes that do not depend on its length.

    It shares the tensors of a plain cache of one sequence (see `by_layer`), returns all of their slots, and
    masks the slots that hold no token yet. A token that finds no free slot takes that of the oldest, as in a
    cache that is a ring. The position of the next token is a tensor (1,), so it is not a constant in compiled
    code.
    """

    length = 0  # stage 0 adds it to the number of new tokens, to check that there are enough positions

    def __init__(self, layers, position):
        self.layers, self.position = layers, position
        self.slots = torch.arange(layers[0][0].size(2), device=position.device)

    def positions(self, n_new):
        """The position of the new token: (1,) int64."""
        return self.position

    def mask(self, n_new):
        """Additive mask of the new token over all slots: (1, slots)."""
        return torch.where(self.slots <= self.position, 0.0, -torch.inf).unsqueeze(0)

    def update(self, layer_idx, *new):
        """Stores the new token's tensors (B, heads, 1, width); returns all (B, heads, slots, width)."""
        slot = self.position % len(self.slots)
        for stored, value in zip(self.layers[layer_idx], new, strict=True):
            stored.index_copy_(2, slot, value.type_as(stored))
        return self.layers[layer_idx]

    def advance(self, n_new):
        """Does nothing: CompiledStep sets the position."""


def by_layer(cache) -> list[tuple[torch.Tensor, ...]]:
    """The tensors (B, heads, slots, width) of each layer of a plain cache. They share its memory.

    One tensor per layer, because compiled code copies a whole tensor to store a part of it.
    """
    stored = [value for value in vars(cache).values() if isinstance(value, torch.Tensor)]
    return list(zip(*(tensor.unbind() for tensor in stored), strict=True))


class CompiledStep:
    """Decodes one token with a compiled model: logits (1, 1, vocab_size) = step(idx (1, 1)).

    `cache` is a plain cache for `length` tokens (None: block_size), which the model fills with a prompt. Each
    step continues from it and increases its length. The constructor compiles the model, which takes seconds
    to minutes; `seconds` is the time it took.
    """

    @torch.inference_mode()  # as in generate: code is compiled for one autograd mode
    def __init__(self, model, length=None):
        started = time.perf_counter()
        self.cache = model.new_cache(1, model.config.block_size if length is None else length)
        layers = by_layer(self.cache)
        device = layers[0][0].device
        static = StaticCache(layers, torch.zeros(1, dtype=torch.int64, device=device))
        for tensor in (*itertools.chain(*static.layers), static.position):
            torch._dynamo.mark_static_address(tensor)  # else writing to it prevents CUDA graphs

        @torch.compile(dynamic=False, options=devices.step_options(device))
        def forward(idx):
            return model(idx, cache=static)[0]

        self.static, self.forward = static, forward
        try:
            for _ in range(3):  # a CUDA graph is recorded in the second call
                self.cache.length = 0
                self(torch.zeros(1, 1, dtype=torch.int64, device=device))
        except Exception as error:
            # inductor has many types of exceptions, and most are wrapped in others
            message = str(error).strip() or type(error).__name__
            raise UserError(f"--compile failed ({message.splitlines()[0][:200]}); leave it out") from error
        self.cache.length = 0
        self.seconds = time.perf_counter() - started

    def __call__(self, idx):
        self.static.position.fill_(self.cache.length)
        self.cache.length += 1
        return self.forward(idx)
