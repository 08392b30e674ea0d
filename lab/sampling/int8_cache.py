"""A cache in 8 bits: half of the memory of one in bfloat16, for any stage.

Each token's key, value or latent is stored per head as int8 codes and one scale: code * scale, with the
largest number at ±127. Fewer bits save more and cost more: 4 bits were measured to hurt.
"""

import torch

LARGEST = 127


class Int8Cache:
    """Stands in for a stage's KVCache, of which it keeps one layer and the logic.

    Before a layer's update, the stage's cache gets that layer's earlier tokens, dequantized. The new tokens
    are rounded too before they are used, so that a token gives the same result at once and later.
    """

    def __init__(self, cache):
        self.cache = cache
        self.scales = {}
        for name, stored in list(vars(cache).items()):
            if isinstance(stored, torch.Tensor):  # (n_layer, B, heads, slots, width)
                setattr(self, name, torch.zeros_like(stored, dtype=torch.int8))
                self.scales[name] = torch.zeros_like(stored[..., :1])
                setattr(cache, name, torch.zeros_like(stored[:1]))

    @property
    def length(self):
        return self.cache.length

    @length.setter
    def length(self, length):
        self.cache.length = length

    @property
    def max_length(self):
        return self.cache.max_length

    @property
    def nbytes(self):
        codes = sum(getattr(self, name).nbytes + scale.nbytes for name, scale in self.scales.items())
        return codes + self.cache.nbytes

    def positions(self, n_new):
        """Positions of the next n_new tokens: (n_new,) int64."""
        return self.cache.positions(n_new)

    def mask(self, n_new):
        """The mask of the stage's cache."""
        return self.cache.mask(n_new)

    def update(self, layer_idx, *new):
        """Stores the new tokens' tensors (B, heads, n_new, width); returns those of all tokens so far."""
        start, n_new = self.length, new[0].size(2)
        rounded = []
        for (name, all_scales), tensor in zip(self.scales.items(), new, strict=True):
            codes, scales = getattr(self, name)[layer_idx], all_scales[layer_idx]  # (B, heads, slots, …)
            n_slots = codes.size(2)
            used = min(start, n_slots)
            earlier = codes[:, :, :used].to(scales.dtype) * scales[:, :, :used]
            getattr(self.cache, name)[0, :, :, :used] = earlier
            scale = (tensor.abs().amax(-1, keepdim=True) / LARGEST).to(scales.dtype)
            scale = scale.where(scale > 0, 1)  # a token whose numbers are all zero
            code = (tensor.float() / scale).round().clamp(-LARGEST, LARGEST)
            rounded.append((code * scale).to(tensor.dtype))
            n_kept = min(n_new, n_slots)  # a ring keeps the last ones only
            slots = torch.arange(start + n_new - n_kept, start + n_new, device=codes.device) % n_slots
            codes[:, :, slots] = code[:, :, n_new - n_kept :].to(torch.int8)
            scales[:, :, slots] = scale[:, :, n_new - n_kept :]
        return self.cache.update(0, *rounded)

    def advance(self, n_new):
        """Counts n_new more tokens, once every layer has stored them."""
        self.cache.advance(n_new)


def use(model: torch.nn.Module) -> None:
    """Lets a model make caches in 8 bits."""
    new_cache = model.new_cache
    model.new_cache = lambda *sizes, **options: Int8Cache(new_cache(*sizes, **options))
