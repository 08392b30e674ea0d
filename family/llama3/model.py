"""Llama 3.1 and its relatives: stage 5 with rotary positions that reach further than the training did.

Idea: pairs of dimensions turn more slowly, so that later positions have angles that the model knows.
Papers: Llama 3, arXiv 2407.21783, section 3.4.2; linear scaling, arXiv 2306.15595; dynamic, arXiv 2309.00071.
Changed: rope_type and rope_scaling in the rotation; head_dim may differ from n_embd / n_head.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None


SCALING = {  # the numbers that each rope_type needs in rope_scaling
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


@dataclass
class GPTConfig:
    """Sizes of the model. Raises ValueError for an impossible combination."""

    vocab_size: int = 50304
    """Number of different tokens."""
    block_size: int = 1024
    """Context length: the number of positions to train on."""
    n_layer: int = 12
    """Number of blocks."""
    n_head: int = 12
    """Number of query heads."""
    n_kv_head: int | None = None
    """Number of key/value heads. None: half of n_head, or n_head if that is odd."""
    n_embd: int = 768
    """Width of the residual stream."""
    head_dim: int | None = None
    """Width of a head. None: n_embd / n_head."""
    dropout: float = 0.0
    """Probability of dropping an activation in training."""
    norm_eps: float = 1e-5
    """Added under a norm's square root, against division by zero."""
    tie_word_embeddings: bool = True
    """Whether the head shares its weights with the token embedding."""
    intermediate_size: int | None = None
    """Width of the MLP. None: 8/3 of n_embd, rounded up to a multiple of 8."""
    rope_theta: float = 10000.0
    """Base of the frequencies: the periods of the pairs range from 2π to almost 2π · rope_theta tokens."""
    rope_type: str = "default"
    """How positions are scaled: default (not at all), linear, dynamic or llama3."""
    rope_scaling: dict[str, float] | None = None
    """factor; for llama3 also low_freq_factor, high_freq_factor and original_max_position_embeddings."""

    def __post_init__(self):
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head if self.n_head % 2 else self.n_head // 2
        if self.intermediate_size is None:
            self.intermediate_size = math.ceil(self.n_embd / 3) * 8
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")
        if self.n_kv_head < 1 or self.n_head % self.n_kv_head:
            raise ValueError(f"n_head ({self.n_head}) must be divisible by n_kv_head ({self.n_kv_head})")
        if self.head_dim is None:
            self.head_dim = self.n_embd // self.n_head
        if self.head_dim < 1 or self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even, for pairs")
        if self.rope_type not in SCALING:
            raise ValueError(f"rope_type must be one of {', '.join(SCALING)}, not {self.rope_type!r}")
        scaling, needed = self.rope_scaling or {}, SCALING[self.rope_type]
        if scaling.keys() != needed or not all(0 < value < math.inf for value in scaling.values()):
            wanted = f"have {', '.join(sorted(needed))} above 0" if needed else "be None"
            raise ValueError(
                f"rope_scaling must {wanted} for rope_type {self.rope_type}, not {self.rope_scaling}"
            )
        if self.rope_type == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise ValueError(
                f"low_freq_factor ({scaling['low_freq_factor']}) must be less than "
                f"high_freq_factor ({scaling['high_freq_factor']})"
            )
        if self.rope_type == "dynamic" and self.head_dim == 2:
            raise ValueError("head_dim (2) must be at least 4 for rope_type dynamic")


class KVCache:
    """Keys and values of all tokens so far, so that a new token need not compute them again.

    The model asks the cache for the new tokens' positions and mask. Each layer passes its new keys and
    values to `update` and gets those of all tokens back. How it stores them is not the model's concern.
    """

    def __init__(self, config, batch_size, max_length, device, dtype):
        shape = (config.n_layer, batch_size, config.n_kv_head, max_length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.max_length = max_length
        self.length = 0

    @property
    def nbytes(self):
        return self.keys.nbytes + self.values.nbytes

    def positions(self, n_new):
        """Positions of the next n_new tokens: (n_new,) int64."""
        if self.length + n_new > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens, not {self.length + n_new}")
        return torch.arange(self.length, self.length + n_new, device=self.keys.device)

    def mask(self, n_new):
        """Mask of the next n_new queries against all keys. None: causal, all that this cache needs."""
        return None

    def update(self, layer_idx, k, v):
        """Stores k and v (B, n_kv_head, n_new, head_dim); returns those of all tokens so far."""
        end = self.length + k.size(2)
        keys, values = self.keys[layer_idx, :, :, :end], self.values[layer_idx, :, :, :end]
        keys[:, :, self.length :] = k
        values[:, :, self.length :] = v
        return keys, values  # (B, n_kv_head, length + n_new, head_dim)

    def advance(self, n_new):
        """Counts n_new more tokens, once every layer has stored them."""
        self.length += n_new


def causal_mask(n_query, n_key, device):
    """Mask (n_query, n_key) to add to the scores: 0 up to the query's own position, -inf after it.

    The last query sees every key, even if the cache holds earlier tokens (lower-right alignment).
    """
    return torch.full((n_query, n_key), -torch.inf, device=device).triu(n_key - n_query + 1)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight, over the last dimension."""

    def __init__(self, n_embd, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.eps = eps

    def forward(self, x):
        x32 = x.float()  # in 16 bits, squares overflow and lose digits
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.type_as(x)


def llama3_frequencies(frequencies, scaling):
    """Frequencies for a context `factor` times as long: pairs that turn rarely turn more slowly."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in that context
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: unchanged, 0: slower by the factor
    return frequencies * kept + frequencies / scaling["factor"] * (1 - kept)


def rotation(positions, config):
    """cos and sin, in float32, at positions (T,) or (B, T): (1, T, head_dim/2) or (B, 1, T, head_dim/2)."""
    head_dim, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    if config.rope_type == "dynamic":  # the base grows once the text is longer than the context
        stretch = ((positions.max() + 1) / config.block_size).clamp(min=1)
        stretch = scaling["factor"] * stretch - (scaling["factor"] - 1)
        theta = theta * stretch ** (head_dim / (head_dim - 2))
    pairs = torch.arange(0, head_dim, 2, device=positions.device)
    frequencies = 1 / theta ** (pairs.float() / head_dim)
    if config.rope_type == "linear":
        frequencies = frequencies / scaling["factor"]
    elif config.rope_type == "llama3":
        frequencies = llama3_frequencies(frequencies, scaling)
    angles = (positions[..., None] * frequencies).unsqueeze(-3)  # the same for all heads
    return angles.cos(), angles.sin()


def rotate(x, rope):
    """Rotates the pairs (i, i + head_dim/2) of x (B, heads, T, head_dim) by the angles of rope."""
    cos, sin = rope
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).type_as(x)


def attention(q, k, v, mask, dropout):
    """q (B, n_head, T, head_dim), k and v (B, n_kv_head, S, head_dim) -> (B, n_head, T, head_dim).

    mask (T, S) is added to the scores, None: causal; dropout: the probability to drop an attention weight.
    """
    T, S = q.size(2), k.size(2)
    if flash_attn_func and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and mask is None:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, T or S, heads, width)
        return flash_attn_func(q, k, v, dropout_p=dropout, causal=True).transpose(1, 2)
    if q.device.type == "cpu" and torch.is_grad_enabled() and S <= 512:
        return explicit_attention(q, k, v, mask, dropout)  # in bfloat16, SDPA's backward is slower
    if T == 1:  # a group's queries become rows of one product: on a CPU, up to ten times faster in bfloat16
        q = q.reshape(q.size(0), k.size(1), -1, q.size(3))  # (B, n_kv_head, group, head_dim)
    if mask is None and 1 < T < S:  # SDPA's is_causal would align the first query with the first key
        mask = causal_mask(T, S, q.device)
    if mask is not None:
        y = F.scaled_dot_product_attention(q, k, v, mask.to(q.dtype), dropout, enable_gqa=True)
    else:  # T = S, or a single query, which sees every key
        y = F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=T > 1, enable_gqa=True)
    return y.reshape(y.size(0), -1, T, y.size(3))  # (B, n_head, T, head_dim)


def explicit_attention(q, k, v, mask, dropout):
    """The same function, with the score matrix stored, as in stage 4."""
    if mask is None:
        mask = causal_mask(q.size(2), k.size(2), q.device)
    repeats = q.size(1) // k.size(1)  # query heads per key/value head
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)  # k0, k0, k1, k1
    # Scaling q gives the same result as scaling the scores, with fewer multiplications.
    scores = (q * q.size(3) ** -0.5) @ k.transpose(2, 3) + mask  # (B, n_head, T, S)
    weights = F.dropout(F.softmax(scores, dim=-1), dropout)
    return weights.type_as(v) @ v  # in 16 bits, the mask has made the scores float32


class Attention(nn.Module):
    """Grouped-query causal self-attention (arXiv 2305.13245)."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.n_embd, config.n_head * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.n_embd, config.n_kv_head * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.n_embd, config.n_kv_head * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.n_head * self.head_dim, config.n_embd, bias=False)
        self.dropout = config.dropout

    def forward(self, x, rope, mask, cache):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_head, T, head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_head, T, head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.update(self.layer_idx, k, v)  # (B, n_kv_head, S, head_dim), S = T + cached tokens
        y = attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, n_embd)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then the MLP. Each reads the normed residual stream and adds its output to it."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope, mask, cache):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope, mask, cache))
        x = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        return x


class GPT(nn.Module):
    """The language model: logits, losses = model(idx, targets, cache)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.n_embd),
                "dropout": nn.Dropout(config.dropout),
                "layers": nn.ModuleList(Block(config, i) for i in range(config.n_layer)),
                "norm": RMSNorm(config.n_embd, config.norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.init_weights()

    def init_weights(self):
        """As GPT-2: std 0.02, but 0.02 / sqrt(2 n_layer) for projections into the residual stream."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def new_cache(self, batch_size, max_length):
        """An empty KVCache for batch_size sequences of up to max_length tokens."""
        weight = self.lm_head.weight
        return KVCache(self.config, batch_size, max_length, weight.device, weight.dtype)

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) int64 -> logits (B, T, vocab_size) and a dict of scalar losses.

        targets (B, T) hold the token that follows each of idx, or -1 to ignore a position. Without targets,
        the dict is empty. With a cache, idx are the tokens that follow the cached ones.
        """
        T = idx.size(1)
        if cache is None:
            positions, mask = torch.arange(T, device=idx.device), None
        else:
            positions, mask = cache.positions(T), cache.mask(T)
        rope = rotation(positions, self.config)
        x = self.model.embed_tokens(idx)  # (B, T, n_embd)
        x = self.model.dropout(x)
        for layer in self.model.layers:
            x = layer(x, rope, mask, cache)
        if cache is not None:
            cache.advance(T)
        logits = self.lm_head(self.model.norm(x))  # (B, T, vocab_size)
        losses = {}
        if targets is not None:
            losses["next_token"] = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, losses
