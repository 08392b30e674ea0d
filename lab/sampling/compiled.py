"""Decoding with shapes that never change, so that one compiled step makes every token (as gpt-fast does)."""

import itertools
import time

import torch

from lab import device
from lab.errors import UserError


class StaticCache:
    """What a stage asks of its KVCache for the next token, with shapes that do not depend on its length.

    It shares the tensors of a plain cache of one sequence, hands out all of their slots, and masks
    those that hold no token yet. Where the next token goes is a tensor, so that compiled code need
    not know it.
    """

    length = 0  # stage 0 adds it to the new tokens, to see that there are positions for all

    def __init__(self, cache):
        stored = [value for value in vars(cache).values() if isinstance(value, torch.Tensor)]
        # A tensor a layer: compiled code copies the whole of a tensor that it stores a part of.
        self.layers = list(zip(*(tensor.unbind() for tensor in stored), strict=True))
        self.slots = torch.arange(cache.max_length, device=stored[0].device)
        self.position = torch.zeros(1, dtype=torch.int64, device=stored[0].device)

    def positions(self, n_new):
        """The position of the new token: (1,) int64."""
        return self.position

    def mask(self, n_new):
        """Additive mask of the new token against all slots: (1, max_length)."""
        return torch.where(self.slots <= self.position, 0.0, -torch.inf).unsqueeze(0)

    def update(self, layer_idx, *new):
        """Stores the token's (B, heads, 1, width); returns all of it, (B, heads, max_length, width)."""
        for stored, value in zip(self.layers[layer_idx], new, strict=True):
            stored.index_copy_(2, self.position, value.type_as(stored))
        return self.layers[layer_idx]

    def advance(self, n_new):
        """Whoever sets the position counts."""


class CompiledStep:
    """One token further with a compiled model: logits (1, 1, vocab_size) = step(idx (1, 1)).

    `cache` is the plain cache that the model fills with a prompt; step goes on from it and counts. It holds
    `length` tokens (None: block_size).
    Compiling happens here, at once, and takes seconds to minutes; `seconds` tells how many.
    """

    @torch.inference_mode()  # as generate does: code is compiled for one mode of autograd
    def __init__(self, model, length=None):
        started = time.perf_counter()
        self.cache = model.new_cache(1, model.config.block_size if length is None else length)
        static = StaticCache(self.cache)
        where = static.position.device
        for tensor in (*itertools.chain(*static.layers), static.position):
            torch._dynamo.mark_static_address(tensor)  # or CUDA makes no graph of what writes to it

        @torch.compile(dynamic=False, options=device.step_options(where))
        def forward(idx):
            return model(idx, cache=static)[0]

        self.static, self.forward = static, forward
        try:
            for _ in range(3):  # a CUDA graph is recorded in the second call
                self.cache.length = 0
                self(torch.zeros(1, 1, dtype=torch.int64, device=where))
        except Exception as error:
            # inductor has an exception of its own for each way to fail, most of them wrapped in another
            message = str(error).strip() or type(error).__name__
            raise UserError(f"--compile failed ({message.splitlines()[0][:200]}); leave it out") from error
        self.cache.length = 0
        self.seconds = time.perf_counter() - started

    def __call__(self, idx):
        self.static.position.fill_(self.cache.length)
        self.cache.length += 1
        return self.forward(idx)
