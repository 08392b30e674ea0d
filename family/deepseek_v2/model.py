"""DeepSeek-V2: stage 7a with a latent for the queries, groups of experts and YaRN.

Idea: a softmax router whose weights are not scaled to sum to 1; groups of experts limit network traffic.
Papers: DeepSeek-V2, arXiv 2405.04434, sections 2.1 and 2.2; YaRN, arXiv 2309.00071.
Changed: the router, q_lora_rank in attention, rope_scaling in the rotation.
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
    n_embd: int = 768
    """Width of the residual stream."""
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
    n_shared_experts: int = 1
    """Number of experts that every token uses."""
    moe_intermediate_size: int | None = None
    """Width of an expert. None: a token's experts together are about as wide as the MLP."""
    first_k_dense_replace: int = 0
    """How many of the first layers keep a dense MLP."""
    router: str = "softmax"
    """softmax (balanced by a loss, as in DeepSeek-V2) or sigmoid (balanced by a bias, as in DeepSeek-V3)."""
    norm_topk_prob: bool = False
    """Whether the weights of a token's routed experts are divided by their sum."""
    routed_scaling_factor: float = 1.0
    """Multiplies the routed experts' output."""
    router_aux_loss_coef: float = 0.01
    """Weight of the softmax router's balance loss."""
    bias_update_speed: float = 0.001
    """How far a bias of the sigmoid router moves at each optimizer step."""
    n_group: int = 1
    """Groups of experts. The softmax router chooses groups first, then experts in them."""
    topk_group: int = 1
    """Number of groups that a token chooses."""
    q_lora_rank: int | None = None
    """Width of the latent of the queries. None: queries are projected directly."""
    kv_lora_rank: int | None = None
    """Width of the latent of keys and values. None: 3/8 of n_embd, rounded up to a multiple of 8."""
    qk_nope_head_dim: int | None = None
    """Width of the part of a head's queries and keys without positions. None: the rest of n_embd / n_head."""
    qk_rope_head_dim: int | None = None
    """Width of the rotated part; its key is the same for all heads. None: half of n_embd / n_head."""
    v_head_dim: int | None = None
    """Width of a head's values. None: n_embd / n_head."""
    rope_scaling: dict[str, float] | None = None
    """YaRN: factor and original_max_position_embeddings; beta_fast, beta_slow, mscale and mscale_all_dim."""

    def __post_init__(self):
        if self.kv_lora_rank is None:
            self.kv_lora_rank = math.ceil(self.n_embd * 3 / 8 / 8) * 8
        head_dim = self.n_embd // max(1, self.n_head)
        if self.qk_rope_head_dim is None:
            self.qk_rope_head_dim = max(2, head_dim // 4 * 2)  # half of it, made even
        if self.qk_nope_head_dim is None:
            self.qk_nope_head_dim = max(1, head_dim - self.qk_rope_head_dim)
        if self.v_head_dim is None:
            self.v_head_dim = max(1, head_dim)
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
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim ({self.qk_rope_head_dim}) must be even, for pairs")
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
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError(f"q_lora_rank must be at least 1 or None, not {self.q_lora_rank}")
        if not 1 <= self.topk_group <= self.n_group:
            raise ValueError(f"topk_group ({self.topk_group}) must be from 1 to n_group ({self.n_group})")
        group_size, remainder = divmod(self.n_routed_experts, self.n_group)
        if remainder:
            raise ValueError(
                f"n_group ({self.n_group}) must divide n_routed_experts ({self.n_routed_experts})"
            )
        if self.topk_group * group_size < self.num_experts_per_tok:
            raise ValueError(
                f"topk_group ({self.topk_group}) groups of {group_size} experts are too few for "
                f"num_experts_per_tok ({self.num_experts_per_tok})"
            )
        if self.n_group > 1 and self.router == "sigmoid":
            raise ValueError(f"n_group ({self.n_group}) needs the softmax router")
        for name in ("factor", "original_max_position_embeddings"):
            if self.rope_scaling and self.rope_scaling.get(name, 0) <= 0:
                raise ValueError(f"rope_scaling needs {name} above 0, not {self.rope_scaling.get(name)}")


class KVCache:
    """Rotated keys and latents of all tokens so far, so that a new token need not compute them again.

    The model asks the cache for the new tokens' positions and mask. Each layer passes its new keys and
    latents to `update` and gets those of all tokens back. How it stores them is not the model's concern.
    """

    def __init__(self, config, batch_size, max_length, device, dtype):
        shape = (config.n_layer, batch_size, 1, max_length)
        self.keys = torch.zeros(*shape, config.qk_rope_head_dim, device=device, dtype=dtype)
        self.latents = torch.zeros(*shape, config.kv_lora_rank, device=device, dtype=dtype)
        self.max_length = max_length
        self.length = 0

    @property
    def nbytes(self):
        return self.keys.nbytes + self.latents.nbytes

    def positions(self, n_new):
        """Positions of the next n_new tokens: (n_new,) int64."""
        if self.length + n_new > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens, not {self.length + n_new}")
        return torch.arange(self.length, self.length + n_new, device=self.keys.device)

    def mask(self, n_new):
        """Mask of the next n_new queries against all keys. None: causal, all that this cache needs."""
        return None

    def update(self, layer_idx, k, latent):
        """Stores k (B, 1, n_new, rope_dim) and latent (B, 1, n_new, rank); returns those of all tokens."""
        end = self.length + k.size(2)
        keys, latents = self.keys[layer_idx, :, :, :end], self.latents[layer_idx, :, :, :end]
        keys[:, :, self.length :] = k
        latents[:, :, self.length :] = latent
        return keys, latents  # (B, 1, length + n_new, …)

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


def yarn_frequencies(frequencies, config):
    """Frequencies for a context `factor` times as long (arXiv 2309.00071): slow pairs turn more slowly."""
    scaling, rope_dim = config.rope_scaling, config.qk_rope_head_dim

    def pair_that_turns(n_times):  # within the original context: theta^(-2 pair / rope_dim), solved for pair
        inverse_frequency = scaling["original_max_position_embeddings"] / (n_times * 2 * math.pi)
        return rope_dim * math.log(inverse_frequency) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_that_turns(scaling.get("beta_fast") or 32)), 0)
    high = min(
        math.ceil(pair_that_turns(scaling.get("beta_slow") or 1)), rope_dim - 1
    )  # as in DeepSeek's code
    ramp = torch.arange(len(frequencies), device=frequencies.device) - low
    ramp = (ramp / max(high - low, 0.001)).clamp(0, 1)  # 0: unchanged, 1: slower by the factor
    return frequencies * (1 - ramp) + frequencies / scaling["factor"] * ramp


def yarn_mscale(scaling, weight):
    """YaRN's scale for attention: 0.1 · weight · ln(factor) + 1, or 1 without stretching."""
    return 0.1 * weight * math.log(scaling["factor"]) + 1 if scaling["factor"] > 1 else 1.0


def rotation(positions, config):
    """cos and sin, in float32, at positions (T,) or (B, T): (1, T, head_dim/2) or (B, 1, T, head_dim/2)."""
    head_dim, scaling, mscale = config.qk_rope_head_dim, config.rope_scaling, 1.0
    pairs = torch.arange(0, head_dim, 2, device=positions.device)
    frequencies = 1 / config.rope_theta ** (pairs.float() / head_dim)
    if scaling:
        frequencies = yarn_frequencies(frequencies, config)
        if scaling.get("mscale") and scaling.get("mscale_all_dim"):  # the scores are scaled by the latter
            mscale = yarn_mscale(scaling, scaling["mscale"]) / yarn_mscale(scaling, scaling["mscale_all_dim"])
        else:
            mscale = yarn_mscale(scaling, 1)
    angles = (positions[..., None] * frequencies).unsqueeze(-3)  # the same for all heads
    return angles.cos() * mscale, angles.sin() * mscale


def rotate(x, rope):
    """Rotates the pairs (i, i + head_dim/2) of x (B, heads, T, head_dim) by the angles of rope."""
    cos, sin = rope
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).type_as(x)


def attention(q, k, v, mask, dropout):
    """q and k (B, n_head, T or S, head_dim), v (B, n_head, S, v_head_dim) -> (B, n_head, T, v_head_dim).

    mask (T, S) is added to the scores, None: causal; dropout: the probability to drop an attention weight.
    """
    T, S = q.size(2), k.size(2)
    flash = flash_attn_func and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and mask is None
    if flash and q.size(3) == v.size(3):  # it knows one width only
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
    # Scaling q gives the same result as scaling the scores, with fewer multiplications.
    scores = (q * q.size(3) ** -0.5) @ k.transpose(2, 3) + mask  # (B, n_head, T, S)
    weights = F.dropout(F.softmax(scores, dim=-1), dropout)
    return weights.type_as(v) @ v  # in 16 bits, the mask has made the scores float32


class Attention(nn.Module):
    """Multi-head latent attention (arXiv 2405.04434, section 2.1)."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.config = config
        self.head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.n_embd, config.n_head * self.head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.n_embd, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, 1e-6)
            self.q_b_proj = nn.Linear(config.q_lora_rank, config.n_head * self.head_dim, bias=False)
        # DeepSeek's names: kv_a projects down to the latent and the shared rotated key, kv_b up to all heads.
        down_width = config.kv_lora_rank + config.qk_rope_head_dim
        self.kv_a_proj_with_mqa = nn.Linear(config.n_embd, down_width, bias=False)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, 1e-6)  # 1e-6 whatever norm_eps is, as in DeepSeek
        up_width = config.n_head * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, up_width, bias=False)
        self.o_proj = nn.Linear(config.n_head * config.v_head_dim, config.n_embd, bias=False)
        self.dropout = config.dropout
        scaling = config.rope_scaling or {"factor": 1.0}
        self.mscale = yarn_mscale(scaling, scaling.get("mscale_all_dim") or 0) ** 2  # of the scores

    def forward(self, x, rope, mask, cache):
        B, T, _ = x.shape
        nope_dim, rope_dim = self.config.qk_nope_head_dim, self.config.qk_rope_head_dim
        if self.config.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_head, T, head_dim)
        q_nope, q_rope = q.split((nope_dim, rope_dim), dim=-1)
        latent_and_key = self.kv_a_proj_with_mqa(x).unsqueeze(1)  # (B, 1, T, kv_lora_rank + rope_dim)
        latent, k_rope = latent_and_key.split((self.config.kv_lora_rank, rope_dim), dim=-1)
        latent = self.kv_a_layernorm(latent)
        q_rope, k_rope = rotate(q_rope, rope), rotate(k_rope, rope)
        q = torch.cat((q_nope, q_rope), dim=-1) * self.mscale
        if cache is not None:
            k_rope, latent = cache.update(self.layer_idx, k_rope, latent)  # (B, 1, S, …), S tokens so far
            if self.absorbing_is_cheaper(T, latent.size(2)):  # never in training, which has no cache
                y = self.absorbed_attention(q, k_rope, latent, mask)
                return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))
        kv = self.kv_b_proj(latent).view(B, latent.size(2), -1, nope_dim + self.config.v_head_dim)
        k_nope, v = kv.transpose(1, 2).split((nope_dim, self.config.v_head_dim), dim=-1)  # (B, n_head, S, …)
        k = torch.cat((k_nope, k_rope.expand(-1, k_nope.size(1), -1, -1)), dim=-1)
        y = attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, n_embd)

    def absorbing_is_cheaper(self, T, S):
        """Whether T queries against S latents need fewer multiplications than against keys and values."""
        rank, rope_dim = self.config.kv_lora_rank, self.config.qk_rope_head_dim
        nope_dim, v_dim = self.config.qk_nope_head_dim, self.config.v_head_dim
        expanded = S * rank * (nope_dim + v_dim) + T * S * (nope_dim + rope_dim + v_dim)
        absorbed = T * rank * (nope_dim + v_dim) + T * S * (rank + rope_dim + rank)
        return absorbed < expanded

    def absorbed_attention(self, q, k_rope, latent, mask):
        """Attention on k_rope and latent (B, 1, S, …) themselves: q · (W_k latent) = (q W_k) · latent."""
        nope_dim, rank = self.config.qk_nope_head_dim, self.config.kv_lora_rank
        by_head = self.kv_b_proj.weight.view(self.config.n_head, -1, rank)
        w_k, w_v = by_head.split((nope_dim, self.config.v_head_dim), dim=1)  # (n_head, …, kv_lora_rank)
        q = torch.cat((q[..., :nope_dim] @ w_k, q[..., nope_dim:]), dim=-1)  # (B, n_head, T, rank + rope_dim)
        k = torch.cat((latent, k_rope), dim=-1).squeeze(1)  # (B, S, rank + rope_dim)
        if mask is None:
            mask = causal_mask(q.size(2), k.size(1), q.device)
        scores = torch.einsum("bhtr,bsr->bhts", q * self.head_dim**-0.5, k) + mask  # scaled as if expanded
        weights = F.softmax(scores, dim=-1).type_as(latent)  # the mask is in float32
        y = torch.einsum("bhts,bsr->bhtr", weights, latent.squeeze(1))
        return y @ w_v.mT  # (B, n_head, T, v_head_dim): W_v after the weighted mean


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
            possible = self.limit_to_groups(probs) if self.config.n_group > 1 else probs
            weights, indices = possible.topk(k, dim=-1)
        else:
            scores = logits.sigmoid()
            probs = scores / scores.sum(-1, keepdim=True)  # for the statistics only
            indices = (scores + self.e_score_correction_bias).topk(k, dim=-1).indices
            weights = scores.gather(1, indices)  # without the bias, which only takes part in the choice
        if self.config.norm_topk_prob and k > 1:  # for k = 1 the weight would always be 1, without a gradient
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if self.training:
            counts = self.count(probs, indices)
            if self.config.router == "softmax":
                self.balance_loss = balance_loss(probs, counts)  # for GPT.forward to collect
        return weights * self.config.routed_scaling_factor, indices

    def limit_to_groups(self, probs):
        """probs (N, n_routed_experts), with 0 outside the topk_group groups that have the best experts."""
        groups = probs.unflatten(1, (self.config.n_group, -1))  # (N, n_group, experts of a group)
        best = groups.amax(-1).topk(self.config.topk_group, dim=-1).indices  # by the best expert of each
        excluded = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(1, best, False)  # (N, n_group)
        return groups.masked_fill(excluded.unsqueeze(-1), 0.0).flatten(1)

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
