"""The memory of all blocks, and the view of it that stands in for a model's cache.

A model asks its cache for positions and a mask, and every layer passes its new keys and values to `update`
and gets back those of all tokens. Batch answers the same questions for rows of different lengths, whose
tokens lie in blocks anywhere in the pool. So all stages can be served, and none of them knows of it.
"""

import torch
import torch.nn.functional as F

from deploy.serving.blocks import NULL

TINY = 1e-6  # instead of 0, which has no scale


class Pool:
    """One tensor (n_layer, n_blocks, heads, block_size, width) for each thing that the model's cache stores.

    These are keys and values, or in stage 7 rotated keys and latents. A head's part of a block is one piece
    of memory. Copied piece by piece, the blocks of a row are its keys (heads, S, width) in their usual order.

    drafting: with one more layer, the MTP block's, and a hidden state for each block (see drafting.py).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        n_blocks: int,
        block_size: int,
        int8: bool = False,
        drafting: bool = False,
    ):
        self.block_size, self.n_blocks = block_size, n_blocks
        # Zeros, because a NaN in the null block would survive the mask.
        self.tensors, self.scales = [], []
        for t in stored(model, drafting):
            shape = (t.size(0), n_blocks, t.size(2), block_size)
            self.tensors.append(t.new_zeros(*shape, t.size(4), dtype=torch.int8 if int8 else None))
            self.scales.append(t.new_zeros(*shape, 1) if int8 else None)
            self.dtype = t.dtype
        self.hidden = t.new_zeros(1, n_blocks, model.config.n_embd) if drafting else None
        # A stage whose own cache has no mask for a first prefill lets SDPA mask, which is faster.
        self.causal_by_default = model.new_cache(1, 2).mask(2) is None
        self.window = getattr(model.config, "sliding_window", None)  # Mistral's

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.everything())

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def everything(self) -> list[torch.Tensor]:
        """All that a block stores."""
        return [t for t in (*self.tensors, *self.scales, self.hidden) if t is not None]

    def copy(self, source: int, target: int) -> None:
        """Copies the content of a block."""
        for t in self.everything():
            t[:, target] = t[:, source]


class HostMemory:
    """Copies of blocks in the memory of the CPU."""

    def __init__(self, pool: Pool, n_places: int):
        self.pool = pool
        pinned = pool.tensors[0].is_cuda
        shapes = [(t.size(0), n_places, *t.shape[2:]) for t in pool.everything()]
        self.tensors = [
            torch.zeros(shape, dtype=t.dtype, pin_memory=pinned)
            for shape, t in zip(shapes, pool.everything(), strict=True)
        ]

    def save(self, block: int, place: int) -> None:
        for here, there in zip(self.tensors, self.pool.everything(), strict=True):
            here[:, place].copy_(there[:, block])

    def load(self, place: int, block: int) -> None:
        for here, there in zip(self.tensors, self.pool.everything(), strict=True):
            there[:, block].copy_(here[:, place])


def stored(model: torch.nn.Module, drafting: bool = False) -> list[torch.Tensor]:
    """What the model's cache stores of a token: tensors (n_layer, 1, heads, 1, width).

    drafting: n_layer is one more, for the MTP block.
    """
    caches = [model.new_cache(1, 1)] + ([model.new_cache(1, 1, drafting=True)] if drafting else [])
    each = [[value for value in vars(cache).values() if isinstance(value, torch.Tensor)] for cache in caches]
    return [torch.cat(tensors) for tensors in zip(*each, strict=True)]


def block_bytes(model: torch.nn.Module, block_size: int, int8: bool = False, drafting: bool = False) -> int:
    """The size of a block."""
    tensors = stored(model, drafting)
    hidden = model.config.n_embd * tensors[0].element_size() if drafting else 0
    if int8:  # and a scale for each token and head
        return sum(t.numel() + t[..., 0].nbytes for t in tensors) * block_size + hidden
    return sum(t.nbytes for t in tensors) * block_size + hidden


class Batch:
    """Stands in for a cache while the model computes n_new more tokens of every row.

    tables: the blocks of each row, with room for the new tokens; starts: how many tokens they hold already.
    n_blocks: how many blocks of each row to read; None: as many as the longest has.
    """

    length = 0  # stage 0 adds it to n_new to check its positions; the scheduler checks them here

    def __init__(
        self,
        pool: Pool,
        tables: list[list[int]],
        starts: list[int],
        n_new: int,
        n_blocks: int | None = None,
    ):
        self.pool, self.size, device = pool, pool.block_size, pool.device
        # All keys are new, so none need to be read from the pool.
        self.is_first = n_blocks is None and not any(starts)
        n_blocks = n_blocks or -(-(max(starts) + n_new) // self.size)
        filled = [(table + [NULL] * n_blocks)[:n_blocks] for table in tables]
        table = torch.tensor(filled)  # (B, n_blocks)
        positions = torch.tensor(starts)[:, None] + torch.arange(n_new)  # (B, n_new)
        written = table.gather(1, positions // self.size)  # (B, n_new): the blocks of the new tokens
        self.pieces, self.slots = {}, {}  # by the number of heads
        for heads in {tensor.size(2) for tensor in pool.tensors}:
            head = torch.arange(heads)[:, None]
            pieces = table[:, None] * heads + head  # (B, heads, n_blocks)
            slots = (written[:, None] * heads + head) * self.size + positions[:, None] % self.size
            self.pieces[heads], self.slots[heads] = pieces.to(device), slots.flatten().to(device)
        self._positions = positions.to(device)
        self._mask = self._make_mask(n_new if self.is_first else n_blocks * self.size)

    def _make_mask(self, n_keys: int) -> torch.Tensor | None:
        """(B, 1, n_new, n_keys) in the pool's dtype, or None: causal."""
        window, positions = self.pool.window, self._positions[:, None, :, None]
        if self.is_first and self.pool.causal_by_default and not (window and window < n_keys):
            return None
        keys = torch.arange(n_keys, device=positions.device)
        hidden = keys > positions
        if window:
            hidden |= keys <= positions - window
        mask = torch.zeros(hidden.shape, dtype=self.pool.dtype, device=positions.device)
        return mask.masked_fill_(hidden, -torch.inf)

    def copy(self, other: "Batch") -> None:
        """Takes over the rows of a batch of the same shape, into this one's tensors."""
        for heads in self.pieces:
            self.pieces[heads].copy_(other.pieces[heads])
            self.slots[heads].copy_(other.slots[heads])
        self._positions.copy_(other._positions)
        self._mask.copy_(other._mask)

    def positions(self, n_new: int) -> torch.Tensor:
        """(B, n_new)"""
        return self._positions

    def mask(self, n_new: int) -> torch.Tensor | None:
        return self._mask

    def update(self, layer_idx: int, *new: torch.Tensor) -> list[torch.Tensor]:
        """Stores what is new (B, heads, n_new, width); returns that of all tokens (B, heads, S, width)."""
        everything = []
        for tensor, scales, x in zip(self.pool.tensors, self.pool.scales, new, strict=True):
            if scales is None:
                everything.append(self._store(tensor[layer_idx], x))
                continue
            # The largest number of each token and head becomes 127. In bfloat16 its quotient could be 127.5,
            # which would become 128, and as int8 -128.
            scale = x.abs().amax(-1, keepdim=True).clamp_min(TINY) / 127
            code = (x.float() / scale).round().clamp(-127, 127).to(torch.int8)
            codes = self._store(tensor[layer_idx], code)
            everything.append(codes * self._store(scales[layer_idx], scale))
        return everything

    def _store(self, layer: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Stores x (B, heads, n_new, width) in a layer's blocks; returns all tokens (B, heads, S, width)."""
        _, heads, _, width = layer.shape
        slots = layer.view(-1, width)
        slots.index_copy_(0, self.slots[heads], x.reshape(-1, width).to(slots.dtype))
        if self.is_first:
            return x
        pieces = slots.view(-1, self.size * width)
        found = F.embedding(self.pieces[heads], pieces)  # the fastest way to copy rows, which it looks up
        return found.view(x.size(0), heads, -1, width)

    def advance(self, n_new: int) -> None:
        """Nothing: the tables count the tokens."""
