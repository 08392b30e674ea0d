"""Qwen3-MoE: stage 6 with an RMSNorm on each head of queries and keys, as in Qwen3.

Idea: q_norm and k_norm bound the scores; the experts are many and small, and no token shares one with all.
Paper: Qwen3, arXiv 2505.09388, section 2.
Changed: q_norm, k_norm and head_dim, as in family/qwen3; the defaults of the router and of shared experts.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None


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
    n_routed_experts: int = 8
    """Number of experts to choose from, in each layer."""
    num_experts_per_tok: int = 2
    """Number of routed experts that a token uses."""
    n_shared_experts: int = 0
    """Number of experts that every token uses."""
    moe_intermediate_size: int | None = None
    """Width of an expert. None: a token's experts together are about as wide as the MLP."""
    first_k_dense_replace: int = 0
    """How many of the first layers keep a dense MLP."""
    router: str = "softmax"
    """sigmoid (balanced by a bias, as in DeepSeek-V3) or softmax (balanced by a loss, as in Mixtral)."""
    routed_scaling_factor: float = 1.0
    """Multiplies the routed experts' output."""
    router_aux_loss_coef: float = 0.01
    """Weight of the softmax router's balance loss."""
    bias_update_speed: float = 0.001
    """How far a bias of the sigmoid router moves at each optimizer step."""

    def __post_init__(self):
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head if self.n_head % 2 else self.n_head // 2
        if self.intermediate_size is None:
            self.intermediate_size = math.ceil(self.n_embd / 3) * 8
        if self.moe_intermediate_size is None:
            n_active = max(1, self.num_experts_per_tok + self.n_shared_experts)  # invalid sizes: see below
            self.moe_intermediate_size = max(8, round(self.intermediate_size / n_active / 8) * 8)
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")
        if self.n_kv_head < 1 or self.n_head % self.n_kv_head:
            raise ValueError(f"n_head ({self.n_head}) must be divisible by n_kv_head ({self.n_kv_head})")
        if self.head_dim is None:
            self.head_dim = self.n_embd // self.n_head
        if self.head_dim < 1 or self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even, for pairs")
        for name in ("num_experts_per_tok", "moe_intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("n_shared_experts", "first_k_dense_replace"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must be at most "
                f"n_routed_experts ({self.n_routed_experts})"
            )
        if self.first_k_dense_replace >= self.n_layer:
            raise ValueError(
                f"first_k_dense_replace ({self.first_k_dense_replace}) must be below n_layer ({self.n_layer})"
            )
        if self.router not in ("softmax", "sigmoid"):
            raise ValueError(f"router must be softmax or sigmoid, not {self.router!r}")


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


def rotation(positions, head_dim, theta):
    """cos and sin, in float32, at positions (T,) or (B, T): (1, T, head_dim/2) or (B, 1, T, head_dim/2)."""
    pairs = torch.arange(0, head_dim, 2, device=positions.device)
    frequencies = 1 / theta ** (pairs.float() / head_dim)
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
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps)  # one weight for all heads
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps)
        self.dropout = config.dropout

    def forward(self, x, rope, mask, cache):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_head, T, head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_head, T, head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = self.q_norm(q).type_as(v), self.k_norm(k).type_as(v)  # under autocast, norms return float32
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


class Router(nn.Module):
    """Scores the experts for each token and chooses the best few."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.n_embd))
        if config.router == "sigmoid":  # saved with the model: other biases would choose other experts
            self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
        # Statistics since the last optimizer step.
        self.register_buffer("tokens_per_expert", torch.zeros(config.n_routed_experts), persistent=False)
        self.register_buffer("entropy", torch.zeros(()), persistent=False)  # sum over this process's tokens

    def forward(self, x):
        """x (N, n_embd) -> weights and indices of the chosen experts, both (N, num_experts_per_tok)."""
        k = self.config.num_experts_per_tok
        device_type = "cpu" if x.is_meta else x.device.type  # autocast does not know the meta device
        with torch.autocast(device_type, enabled=False):  # rounding could change the choice
            logits = F.linear(x.float(), self.weight.float())  # (N, n_routed_experts)
        if self.config.router == "softmax":
            probs = F.softmax(logits, dim=-1)
            weights, indices = probs.topk(k, dim=-1)
        else:
            scores = logits.sigmoid()
            probs = scores / scores.sum(-1, keepdim=True)  # for the statistics only
            indices = (scores + self.e_score_correction_bias).topk(k, dim=-1).indices
            weights = scores.gather(1, indices)  # without the bias, which only takes part in the choice
        if k > 1:  # for k = 1 the weight would always be 1, without a gradient
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if self.training:
            counts = self.count(probs, indices)
            if self.config.router == "softmax":
                self.balance_loss = balance_loss(probs, counts)  # for GPT.forward to collect
        return weights * self.config.routed_scaling_factor, indices

    @torch.no_grad()
    def count(self, probs, indices):
        """Adds to the statistics; returns how many tokens chose each expert: (n_routed_experts,)."""
        chosen = indices.flatten()  # (N · k,)
        counts = torch.zeros_like(self.tokens_per_expert)
        counts.scatter_add_(
            0, chosen, torch.ones_like(chosen, dtype=counts.dtype)
        )  # on a GPU without waiting
        counts = sum_over_processes(counts)
        self.tokens_per_expert += counts
        self.entropy -= (probs * probs.clamp_min(1e-20).log()).sum()
        return counts


def sum_over_processes(x):
    """Adds up x over the processes that train together, in place; returns x."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
    return x


def balance_loss(probs, counts):
    """1 if all experts are equally busy, more if the busy ones score higher (arXiv 2101.03961, eqs. 4 to 6).

    probs (N, n_routed_experts) carry the gradient; counts (n_routed_experts,), of tokens, carry none.
    """
    return len(counts) * (counts / counts.sum() * probs.mean(0)).sum()


class Experts(nn.Module):
    """The routed experts, each a SwiGLU as in MLP. Their matrices are stacked."""

    def __init__(self, config):
        super().__init__()
        E, d, width = config.n_routed_experts, config.n_embd, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, d))  # gate above up
        self.down_proj = nn.Parameter(torch.empty(E, d, width))

    def forward(self, x, weights, indices):
        """x (N, n_embd), weights and indices (N, k) -> (N, n_embd): the sum of the weighted outputs."""
        if x.is_cuda and torch.is_autocast_enabled("cuda"):  # autocast does not cover grouped_mm
            x = x.to(torch.get_autocast_dtype("cuda"))
        gate_up, down = self.gate_up_proj.mT.to(x.dtype), self.down_proj.mT.to(x.dtype)  # (E, in, out)
        if can_use_grouped_mm(x, down):
            return grouped_experts(x, weights, indices, gate_up, down)
        return dense_experts(x, weights, indices, gate_up, down)


def can_use_grouped_mm(x, weight):
    """Whether F.grouped_mm can multiply x by weight (E, in, out). PyTorch 2.9 does not have it."""
    if not hasattr(F, "grouped_mm") or x.device.type == "mps":
        return False
    if any(n * x.element_size() % 16 for n in weight.shape[1:]):  # rows must be multiples of 16 bytes
        return False
    if x.dtype == torch.bfloat16:
        return True
    return x.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling()


def grouped_experts(x, weights, indices, gate_up, down):
    """Each expert computes its own tokens: one product over all rows, grouped by expert.

    gate_up (E, n_embd, 2 width) and down (E, width, n_embd); the rest and the result as in Experts.forward.
    """
    N, k = indices.shape
    experts, order = indices.flatten().sort(stable=True)  # the N · k choices, expert by expert
    x = x.repeat_interleave(k, dim=0).index_select(0, order)  # (N · k, n_embd)
    all_experts = torch.arange(len(down), device=x.device)
    ends = torch.searchsorted(
        experts, all_experts, right=True, out_int32=True
    )  # ends[e]: where expert e's rows end
    gate, up = F.grouped_mm(x, gate_up, offs=ends).chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, down, offs=ends)  # (N · k, n_embd)
    y = y.index_select(0, order.argsort()).view(N, k, -1)  # back in the order of the tokens
    return (y * weights.unsqueeze(-1)).sum(1).type_as(x)


def dense_experts(x, weights, indices, gate_up, down):
    """Every expert computes every token, with a weight of 0 where it was not chosen."""
    all_weights = weights.new_zeros(len(x), len(down)).scatter(1, indices, weights)  # (N, E)
    gate, up = (x @ gate_up).chunk(2, dim=-1)  # (E, N, width)
    y = (F.silu(gate) * up) @ down  # (E, N, n_embd)
    return (y * all_weights.T.unsqueeze(-1)).sum(0).type_as(x)


class MoE(nn.Module):
    """Mixture of experts in place of an MLP: the chosen experts, and the shared ones."""

    def __init__(self, config):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = None
        if config.n_shared_experts:  # together one wider MLP
            width = config.n_shared_experts * config.moe_intermediate_size
            self.shared_experts = MLP(replace(config, intermediate_size=width))

    def forward(self, x):
        tokens = x.flatten(0, 1)  # (N, n_embd), N = B · T
        weights, indices = self.gate(tokens)
        y = self.experts(tokens, weights, indices).view_as(x)
        return y if self.shared_experts is None else y + self.shared_experts(x)


class Block(nn.Module):
    """Attention, then the MLP. Each reads the normed residual stream and adds its output to it."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config) if layer_idx < config.first_k_dense_replace else MoE(config)
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
            if isinstance(module, (nn.Linear, nn.Embedding, Router)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, Experts):
                nn.init.normal_(module.gate_up_proj, std=0.02)
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
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
        rope = rotation(positions, self.config.head_dim, self.config.rope_theta)
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
            if self.training and self.config.router == "softmax":
                balance = torch.stack([router.balance_loss for router in self.routers()])
                balance = balance.mean()  # over layers; Switch adds them up
                losses["balance"] = self.config.router_aux_loss_coef * balance
        for router in self.routers():
            router.balance_loss = None  # it would keep the step's graph alive
        return logits, losses

    def routers(self):
        """The routers, in the order of the layers that have one."""
        return [layer.mlp.gate for layer in self.model.layers if isinstance(layer.mlp, MoE)]

    @torch.no_grad()
    def after_step(self):
        """Call it after each optimizer step: moves the biases of sigmoid routers towards balance.

        Returns, for each router, the tokens of each expert since the last call and the mean entropy of its
        probabilities.
        """
        tokens = torch.stack([router.tokens_per_expert for router in self.routers()])
        # The tokens are those of all processes already.
        entropy = sum_over_processes(torch.stack([router.entropy for router in self.routers()]))
        for router, n in zip(self.routers(), tokens, strict=True):
            if self.config.router == "sigmoid":
                router.e_score_correction_bias += self.config.bias_update_speed * (n.mean() - n).sign()
            router.tokens_per_expert.zero_()
            router.entropy.zero_()
        n_tokens = tokens.sum(1) / self.config.num_experts_per_tok  # each token chose several experts
        return {"expert_tokens": tokens, "router_entropy": entropy / n_tokens}
