"""GPT-NeoX and Pythia: stage 0 with rotary positions on a part of each head, and a parallel residual.

Idea: attention and MLP read the same input, so they can be computed at the same time.
Papers: GPT-NeoX-20B, arXiv 2204.06745, section 2.1; Pythia, arXiv 2304.01373, section 2.
Changed: rotation instead of the table of positions; the residual; the head is not tied; GELU may be exact.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


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
    n_embd: int = 768
    """Width of the residual stream."""
    dropout: float = 0.0
    """Probability of dropping an activation in training."""
    norm_eps: float = 1e-5
    """Added under a norm's square root, against division by zero."""
    tie_word_embeddings: bool = False
    """Whether the head shares its weights with the token embedding."""
    bias: bool = True
    """Whether linear layers and norms have biases, as in GPT-2."""
    rope_theta: float = 10000.0
    """Base of the frequencies: the periods of the pairs range from 2π to almost 2π · rope_theta tokens."""
    rotary_pct: float = 0.25
    """Part of a head's dimensions that is rotated."""
    use_parallel_residual: bool = True
    """Whether the MLP reads the same input as the attention, instead of the attention's result."""
    hidden_act: str = "gelu"
    """gelu (exact) or gelu_fast (approximated with tanh, as in GPT-2)."""

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")
        if self.n_embd // self.n_head % 2:
            raise ValueError(f"n_embd / n_head ({self.n_embd} / {self.n_head}) must be even, for pairs")
        if not (self.rotary_pct <= 1 and self.n_embd // self.n_head * self.rotary_pct >= 1):
            raise ValueError(
                f"rotary_pct must be from n_head / n_embd ({self.n_head} / {self.n_embd}) to 1, "
                f"not {self.rotary_pct}"
            )
        if self.hidden_act not in ("gelu", "gelu_fast"):
            raise ValueError(f"hidden_act must be gelu or gelu_fast, not {self.hidden_act!r}")


class KVCache:
    """Keys and values of all tokens so far, so that a new token need not compute them again.

    The model asks the cache for the new tokens' positions and mask. Each layer passes its new keys and
    values to `update` and gets those of all tokens back. How it stores them is not the model's concern.
    """

    def __init__(self, config, batch_size, max_length, device, dtype):
        shape = (config.n_layer, batch_size, config.n_head, max_length, config.n_embd // config.n_head)
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
        """Additive mask of the next n_new queries against all keys: (n_new, length + n_new)."""
        return causal_mask(n_new, self.length + n_new, self.keys.device)

    def update(self, layer_idx, k, v):
        """Stores k and v (B, n_head, n_new, head_dim); returns those of all tokens so far."""
        end = self.length + k.size(2)
        keys, values = self.keys[layer_idx, :, :, :end], self.values[layer_idx, :, :, :end]
        keys[:, :, self.length :] = k
        values[:, :, self.length :] = v
        return keys, values  # (B, n_head, length + n_new, head_dim)

    def advance(self, n_new):
        """Counts n_new more tokens, once every layer has stored them."""
        self.length += n_new


def causal_mask(n_query, n_key, device):
    """Mask (n_query, n_key) to add to the scores: 0 up to the query's own position, -inf after it.

    The last query sees every key, even if the cache holds earlier tokens (lower-right alignment).
    """
    return torch.full((n_query, n_key), -torch.inf, device=device).triu(n_key - n_query + 1)


def rotation(positions, head_dim, theta):
    """cos and sin, in float32, at positions (T,) or (B, T): (1, T, head_dim/2) or (B, 1, T, head_dim/2)."""
    pairs = torch.arange(0, head_dim, 2, device=positions.device)
    frequencies = 1 / theta ** (pairs.float() / head_dim)
    angles = (positions[..., None] * frequencies).unsqueeze(-3)  # the same for all heads
    return angles.cos(), angles.sin()


def rotate(x, rope):
    """Rotates the pairs (i, i + n/2) of x (B, heads, T, head_dim) by the angles of rope, for i below n/2."""
    cos, sin = rope
    n = 2 * cos.size(-1)  # the dimensions from n on stay as they are
    x1, x2 = x[..., :n].float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, x[..., n:]), dim=-1).type_as(x)


def attention(q, k, v, mask, dropout):
    """q (B, n_head, T, head_dim), k and v (B, n_head, S, head_dim) -> (B, n_head, T, head_dim).

    mask (T, S) is added to the scores; dropout is the probability of dropping an attention weight.
    """
    # Scaling q gives the same result as scaling the scores, with fewer multiplications.
    scores = (q * q.size(3) ** -0.5) @ k.transpose(2, 3) + mask  # (B, n_head, T, S)
    weights = F.dropout(F.softmax(scores, dim=-1), dropout)
    return weights.type_as(v) @ v  # in 16 bits, the mask has made the scores float32


class Attention(nn.Module):
    """Multi-head causal self-attention (arXiv 1706.03762, section 3.2)."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.q_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.k_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.v_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x, rope, mask, cache):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_head, T, head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.update(self.layer_idx, k, v)  # (B, n_head, S, head_dim), S = T + cached tokens
        y = attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, n_embd)


class MLP(nn.Module):
    """Two layers with GELU between, four times as wide as the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.down_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.approximate = "tanh" if config.hidden_act == "gelu_fast" else "none"

    def forward(self, x):
        return self.down_proj(F.gelu(self.up_proj(x), approximate=self.approximate))


class Block(nn.Module):
    """Attention and the MLP. Each reads the normed residual stream and adds its output to it."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)
        self.self_attn = Attention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)
        self.parallel = config.use_parallel_residual

    def forward(self, x, rope, mask, cache):
        before = x
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope, mask, cache))
        x = x + self.dropout(self.mlp(self.post_attention_layernorm(before if self.parallel else x)))
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
                "norm": nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias),
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
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
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
            positions, mask = torch.arange(T, device=idx.device), causal_mask(T, T, idx.device)
        else:
            positions, mask = cache.positions(T), cache.mask(T)
        n_rotated = int(self.config.n_embd // self.config.n_head * self.config.rotary_pct)
        rope = rotation(positions, n_rotated, self.config.rope_theta)
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
