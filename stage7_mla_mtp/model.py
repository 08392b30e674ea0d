"""Stage 7: multi-head latent attention and multi-token prediction. With them: a small DeepSeek-V3.

Idea: keys and values come from one narrow latent; it and a small key are cached. One more block predicts the
token after the next, which trains the model on more than the next token, and drafts when sampling.
Papers: DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3, arXiv 2412.19437, sections 2.1.1 and 2.2.
Changed: attention, the cache, the extra block and its loss; YaRN; groups of experts, a sigmoid by default.
It should buy a cache of half of GQA's or less, and several tokens a step when sampling.
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
    """Sizes of the model; an impossible combination is a ValueError."""

    vocab_size: int = 50304
    """Number of different tokens."""
    block_size: int = 1024
    """Context: the number of positions trained on."""
    n_layer: int = 12
    """Number of blocks."""
    n_head: int = 12
    """Number of query heads."""
    n_embd: int = 768
    """Width of the residual stream."""
    dropout: float = 0.0
    """Probability of dropping an activation in training."""
    norm_eps: float = 1e-5
    """Added under the root of a norm, against division by zero."""
    tie_word_embeddings: bool = True
    """Whether the head shares its weights with the token embedding."""
    intermediate_size: int | None = None
    """Width of the MLP. None: 8/3 of n_embd, rounded up to a multiple of 8."""
    rope_theta: float = 10000.0
    """Base of the frequencies: pairs turn fully every 2π to almost 2π · rope_theta tokens."""
    attention: str = "auto"
    """What computes attention: auto, flash_attn, sdpa, explicit or triton."""
    n_routed_experts: int = 8
    """Number of experts to choose from, in each layer."""
    num_experts_per_tok: int = 2
    """Number of routed experts that a token uses."""
    n_shared_experts: int = 1
    """Number of experts that every token uses."""
    moe_intermediate_size: int | None = None
    """Width of an expert. None: such that those of a token are together as wide as intermediate_size."""
    first_k_dense_replace: int = 0
    """Number of layers, from the first, that keep a dense MLP."""
    router: str = "sigmoid"
    """softmax (balanced by a loss) or sigmoid (balanced by a bias)."""
    routed_scaling_factor: float = 1.0
    """Factor of what the routed experts answer."""
    router_aux_loss_coef: float = 0.01
    """Weight of the softmax router's balance loss."""
    bias_update_speed: float = 0.001
    """Step of the sigmoid router's biases, taken once an optimizer step."""
    n_group: int = 1
    """Groups of experts; the sigmoid router chooses groups first, then experts in them."""
    topk_group: int = 1
    """Number of groups that a token chooses."""
    q_lora_rank: int | None = None
    """Width of the queries' latent. None: queries are made without one."""
    kv_lora_rank: int | None = None
    """Width of the latent of keys and values. None: 3/8 of n_embd, rounded up to a multiple of 8."""
    qk_nope_head_dim: int | None = None
    """Width of the part of a head's queries and keys without positions. None: the rest of n_embd / n_head."""
    qk_rope_head_dim: int | None = None
    """Width of the part with positions, rotated; one key for all heads. None: half of n_embd / n_head."""
    v_head_dim: int | None = None
    """Width of a head's values. None: n_embd / n_head."""
    rope_scaling: dict[str, float] | None = None
    """YaRN: factor, original_max_position_embeddings; beta_fast, beta_slow, mscale, mscale_all_dim."""
    num_nextn_predict_layers: int = 1
    """Number of blocks that each predict one token further ahead."""
    mtp_loss_weight: float = 0.3
    """Weight of the mean loss of multi-token prediction."""

    def __post_init__(self):
        if self.kv_lora_rank is None:
            self.kv_lora_rank = math.ceil(self.n_embd * 3 / 64) * 8
        head_dim = self.n_embd // max(1, self.n_head)
        if self.qk_rope_head_dim is None:
            self.qk_rope_head_dim = max(2, head_dim // 4 * 2)
        if self.qk_nope_head_dim is None:
            self.qk_nope_head_dim = max(1, head_dim - self.qk_rope_head_dim)
        if self.v_head_dim is None:
            self.v_head_dim = max(1, head_dim)
        if self.intermediate_size is None:
            self.intermediate_size = math.ceil(self.n_embd / 3) * 8
        if self.moe_intermediate_size is None:
            n_active = max(1, self.num_experts_per_tok + self.n_shared_experts)
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
        implementations = ("auto", "flash_attn", "sdpa", "explicit", "triton")
        if self.attention not in implementations:
            raise ValueError(f"attention must be one of {', '.join(implementations)}, not {self.attention!r}")
        for name in ("num_experts_per_tok", "moe_intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"):
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
        group_size, left_over = divmod(self.n_routed_experts, self.n_group)
        if left_over or (self.n_group > 1 and group_size < 2):
            raise ValueError(
                f"n_group ({self.n_group}) must divide n_routed_experts into groups of at least 2"
            )
        if self.topk_group * group_size < self.num_experts_per_tok:
            raise ValueError(f"topk_group ({self.topk_group}) groups have too few experts for a token")


class KVCache:
    """Latents and rotated keys of the tokens so far: what attention needs of the past to go on.

    The model asks it for the new tokens' positions and mask, gives each layer's new latents and keys
    to `update` and gets all of them back; how they are stored is the cache's business.
    """

    def __init__(self, config, n_layer, batch_size, max_length, device, dtype):
        shape = (n_layer, batch_size, 1, max_length)
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
        """Additive mask of the next n_new queries against all keys; None: what causal_mask makes."""
        return None

    def update(self, layer_idx, k, latent):
        """Stores k and latent (B, 1, n_new, their width); returns those of all tokens so far."""
        end = self.length + k.size(2)
        keys, latents = self.keys[layer_idx, :, :, :end], self.latents[layer_idx, :, :, :end]
        keys[:, :, self.length :] = k
        latents[:, :, self.length :] = latent
        return keys, latents  # (B, 1, length + n_new, their width)

    def advance(self, n_new):
        """Counts the n_new tokens that every layer has stored."""
        self.length += n_new


def causal_mask(n_query, n_key, device):
    """(n_query, n_key) to add to scores: 0 for keys up to the query's own, -inf for later ones.

    The last query sees every key (lower-right alignment), also when the cache holds earlier tokens.
    """
    return torch.full((n_query, n_key), -torch.inf, device=device).triu(n_key - n_query + 1)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight, over the last dimension."""

    def __init__(self, n_embd, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.eps = eps

    def forward(self, x):
        x32 = x.float()  # squares overflow and lose digits in 16 bits
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.type_as(x)


def yarn_mscale(scaling, weight):
    """YaRN's growth of attention with the factor: 1 without a weight."""
    return 0.1 * weight * math.log(scaling["factor"]) + 1 if scaling["factor"] > 1 else 1.0


def yarn(frequencies, config):
    """Frequencies for a context `factor` times as long (arXiv 2309.00071): the slow pairs turn slower."""
    scaling = config.rope_scaling

    def pair(turns):  # the pair, not a whole number, that turns so often within the original context
        period = scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)
        return config.qk_rope_head_dim * math.log(period) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair(scaling.get("beta_fast") or 32)), 0)
    high = min(math.ceil(pair(scaling.get("beta_slow") or 1)), config.qk_rope_head_dim - 1)
    ramp = torch.arange(len(frequencies), device=frequencies.device) - low
    ramp = (ramp / max(high - low, 0.001)).clamp(0, 1)  # 0: as it was, 1: slower by the factor
    return frequencies * (1 - ramp) + frequencies / scaling["factor"] * ramp


def rotation(positions, config):
    """cos and sin, in float32, at positions (T,) or (B, T): (1, T, head_dim/2) or (B, 1, T, head_dim/2)."""
    head_dim, scaling, growth = config.qk_rope_head_dim, config.rope_scaling, 1.0
    pairs = torch.arange(0, head_dim, 2, device=positions.device)
    frequencies = 1 / config.rope_theta ** (pairs.float() / head_dim)
    if scaling:
        frequencies = yarn(frequencies, config)
        weight, weight_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        both = weight and weight_all
        growth = yarn_mscale(scaling, weight if both else 1) / yarn_mscale(scaling, weight_all if both else 0)
    angles = (positions[..., None] * frequencies).unsqueeze(-3)  # the same for all heads
    return angles.cos() * growth, angles.sin() * growth


def rotate(x, rope):
    """Turns the pairs (i, i + head_dim/2) of x (B, heads, T, head_dim) by the angles of rope."""
    cos, sin = rope
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).type_as(x)


def choose_attention(name, q, k, mask, dropout):
    """The implementation of attention for q and k: the requested one if available, otherwise the fastest."""
    if name in ("sdpa", "explicit") or (name == "triton" and q.is_cuda and mask is None and not dropout):
        return name
    if flash_attn_func and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and mask is None:
        return "flash_attn"
    # On a CPU the backward of SDPA is slower than that of written-out attention at short contexts.
    short = q.device.type == "cpu" and torch.is_grad_enabled() and k.size(2) <= 512
    return "explicit" if short else "sdpa"


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
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, 1e-6)  # whatever norm_eps is, as DeepSeek
            self.q_b_proj = nn.Linear(config.q_lora_rank, config.n_head * self.head_dim, bias=False)
        width = config.kv_lora_rank + config.qk_rope_head_dim
        self.kv_a_proj_with_mqa = nn.Linear(config.n_embd, width, bias=False)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, 1e-6)
        width = config.n_head * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, width, bias=False)
        self.o_proj = nn.Linear(config.n_head * config.v_head_dim, config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.attention = config.attention
        scaling = config.rope_scaling or {"factor": 1.0}
        self.growth = yarn_mscale(scaling, scaling.get("mscale_all_dim") or 0) ** 2  # of the scores

    def forward(self, x, rope, mask, cache):
        B, T, _ = x.shape
        nope, turned = self.config.qk_nope_head_dim, self.config.qk_rope_head_dim
        if self.config.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_head, T, head_dim)
        q_nope, q_rope = q.split((nope, turned), dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).unsqueeze(1).split((self.config.kv_lora_rank, turned), -1)
        latent = self.kv_a_layernorm(latent)  # (B, 1, T, kv_lora_rank)
        q_rope, k_rope = rotate(q_rope, rope), rotate(k_rope, rope)  # one key for all heads
        q = torch.cat((q_nope, q_rope), dim=-1) * self.growth
        if cache is not None:
            k_rope, latent = cache.update(self.layer_idx, k_rope, latent)  # (B, 1, S, …), S tokens so far
            if self.absorbing_is_cheaper(T, latent.size(2)):
                y = self.attend_absorbed(q, k_rope, latent, mask)
                return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))
        kv = self.kv_b_proj(latent).view(B, latent.size(2), -1, nope + self.config.v_head_dim)
        k_nope, v = kv.transpose(1, 2).split((nope, self.config.v_head_dim), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, k_nope.size(1), -1, -1)), dim=-1)
        return self.o_proj(self.attend(q, k, v, mask).transpose(1, 2).reshape(B, T, -1))

    def absorbing_is_cheaper(self, T, S):
        """Whether T queries against S latents need fewer multiplications than against expanded heads."""
        rank, expanded = self.config.kv_lora_rank, self.config.qk_nope_head_dim + self.config.v_head_dim
        return T * (rank * expanded + S * (2 * rank - expanded)) < S * rank * expanded

    def attend_absorbed(self, q, k_rope, latent, mask):
        """As attend, on latent and k_rope (B, 1, S, …) themselves: q · (W_k latent) = (q W_k) · latent."""
        nope, rank = self.config.qk_nope_head_dim, self.config.kv_lora_rank
        by_head = self.kv_b_proj.weight.view(self.config.n_head, -1, rank)
        w_k, w_v = by_head.split((nope, self.config.v_head_dim), dim=1)  # (n_head, …, kv_lora_rank)
        q = torch.cat((q[..., :nope] @ w_k, q[..., nope:]), dim=-1)  # (B, n_head, T, rank + rope)
        k = torch.cat((latent, k_rope), dim=-1).squeeze(1)  # (B, S, rank + rope)
        scores = torch.einsum("bhtr,bsr->bhts", q * self.head_dim**-0.5, k)
        scores = scores + (causal_mask(*scores.shape[2:], q.device) if mask is None else mask)
        y = torch.einsum("bhts,bsr->bhtr", F.softmax(scores, dim=-1).type_as(latent), latent.squeeze(1))
        return y @ w_v.mT  # W_v after the mean: (B, n_head, T, v_head_dim)

    def attend(self, q, k, v, mask):
        """q (B, n_head, T, head_dim), k, v (B, n_head, S, …) -> (B, n_head, T, v_head_dim)."""
        p = self.dropout.p if self.training else 0.0
        name = choose_attention(self.attention, q, k, mask, p)
        if name in ("flash_attn", "triton") and q.size(3) != v.size(3):  # they know a single width
            name = "sdpa"
        if name == "flash_attn":  # causal means lower-right here; heads come after positions
            return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), p, causal=True).transpose(1, 2)
        if name == "triton":
            from stage5_flash.kernel import triton_attention

            return triton_attention(q, k, v)
        T, S = q.size(2), k.size(2)
        if name == "sdpa" and mask is None and T in (1, S):  # its is_causal means upper-left
            return F.scaled_dot_product_attention(q, k, v, None, p, is_causal=T > 1, enable_gqa=True)
        mask = causal_mask(T, S, q.device) if mask is None else mask
        if name == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, mask.to(q.dtype), p, enable_gqa=True)
        # Scaling q instead of the scores gives the same numbers for fewer multiplications.
        scores = (q * self.head_dim**-0.5) @ k.transpose(2, 3) + mask  # (B, n_head, T, S)
        weights = self.dropout(F.softmax(scores, dim=-1))
        return weights @ v


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
    """Chooses the experts of each token and weighs them; `watched` counts tokens and sums the entropy."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.n_embd))
        if config.router == "sigmoid":  # part of the model: with other biases it chooses other experts
            self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
        self.register_buffer("watched", torch.zeros(config.n_routed_experts + 1), persistent=False)

    def forward(self, x):
        """x (N, n_embd) -> weights and numbers of the chosen experts, both (N, num_experts_per_tok)."""
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):  # rounding could reroute
            logits = F.linear(x.float(), self.weight.float())  # (N, n_routed_experts)
        if self.config.router == "softmax":
            scores = probs = F.softmax(logits, dim=-1)
            weights, chosen = scores.topk(self.config.num_experts_per_tok, dim=-1)
        else:
            scores = logits.sigmoid()
            probs = scores / scores.sum(-1, keepdim=True)
            biased = scores + self.e_score_correction_bias  # chooses, but does not weigh
            if self.config.n_group > 1:
                biased = self.limit_to_groups(biased)
            chosen = biased.topk(self.config.num_experts_per_tok, dim=-1).indices
            weights = scores.gather(1, chosen)
        if self.config.num_experts_per_tok > 1:  # a lone weight of 1 would teach the router nothing
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if self.training:
            self.watch(probs, chosen)
        return weights * self.config.routed_scaling_factor, chosen

    def limit_to_groups(self, biased):
        """-inf for the experts outside the topk_group groups whose best two experts add up to most."""
        groups = biased.unflatten(1, (self.config.n_group, -1))  # (N, n_group, experts of a group)
        best = groups.topk(2, dim=-1).values.sum(-1).topk(self.config.topk_group, dim=-1).indices
        closed = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(1, best, False)
        return groups.masked_fill(closed.unsqueeze(-1), -torch.inf).flatten(1)

    def watch(self, probs, chosen):
        """Counts the tokens of each expert, of all processes; prepares Switch's balance loss (eq. 4 – 6)."""
        seen = torch.zeros_like(self.watched)
        seen.scatter_add_(0, chosen.flatten(), seen.new_ones(()).expand(chosen.numel()))
        seen[-1] = -(probs * probs.clamp_min(1e-20).log()).sum().detach()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(seen)
        self.watched += seen
        load = seen[:-1] / seen[:-1].sum()  # each expert's share; a count carries no gradient
        self.balance_loss = len(load) * (load * probs.mean(0)).sum()  # 1 when all are equally busy


class Experts(nn.Module):
    """The routed experts' weights, one matrix above the other; each expert is a SwiGLU as in MLP."""

    def __init__(self, config):
        super().__init__()
        E, d, width = config.n_routed_experts, config.n_embd, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, d))
        self.down_proj = nn.Parameter(torch.empty(E, d, width))

    def forward(self, x, weights, chosen):
        """x (N, n_embd), weights and chosen (N, k) -> (N, n_embd): the experts' answers, weighted."""
        N, k = chosen.shape
        if x.is_cuda and torch.is_autocast_enabled("cuda"):  # it leaves grouped_mm alone; on a CPU so do we
            x = x.to(torch.get_autocast_dtype("cuda"))
        gate_up, down = self.gate_up_proj.mT.to(x.dtype), self.down_proj.mT.to(x.dtype)
        if not grouped_mm_takes(x, down):  # every expert for every token, and 0 for those not chosen
            gate, up = (x @ gate_up).chunk(2, dim=-1)  # (E, N, width)
            all_weights = weights.new_zeros(N, len(down)).scatter(1, chosen, weights)
            y = (F.silu(gate) * up @ down) * all_weights.T.unsqueeze(-1)  # (E, N, n_embd)
            return y.sum(0).type_as(x)
        chosen, order = chosen.flatten().sort(stable=True)  # the N · k choices, expert by expert
        ends = torch.bucketize(torch.arange(len(down), device=x.device), chosen, right=True, out_int32=True)
        x = x.repeat_interleave(k, dim=0).index_select(0, order)  # (N · k, n_embd)
        gate, up = F.grouped_mm(x, gate_up, offs=ends).chunk(2, dim=-1)  # offs: where each expert's rows end
        y = F.grouped_mm(F.silu(gate) * up, down, offs=ends)  # (N · k, n_embd)
        y = y.index_select(0, order.argsort()).view(N, k, -1)  # back in the order of the tokens
        return (y * weights.unsqueeze(-1)).sum(1).type_as(x)


def grouped_mm_takes(x, weight):
    """Whether torch.nn.functional.grouped_mm, which PyTorch 2.9 has not, takes x and weight (E, in, out)."""
    aligned = hasattr(F, "grouped_mm") and all(n * x.element_size() % 16 == 0 for n in weight.shape[1:])
    eager = x.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling()
    return aligned and x.device.type != "mps" and (x.dtype == torch.bfloat16 or eager)


class MoE(nn.Module):
    """Mixture of experts in the place of an MLP."""

    def __init__(self, config):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        width = config.n_shared_experts * config.moe_intermediate_size  # together one MLP
        self.shared_experts = MLP(replace(config, intermediate_size=width)) if width else None

    def forward(self, x):
        tokens = x.flatten(0, 1)  # (N, n_embd), N = B · T
        y = self.experts(tokens, *self.gate(tokens)).view_as(x)
        return y if self.shared_experts is None else y + self.shared_experts(x)


class Block(nn.Module):
    """Attention, then the MLP; each reads the normed residual stream and adds to it."""

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


class MTPBlock(Block):
    """One more block, which predicts a token further (arXiv 2412.19437, eq. 21 – 23)."""

    def __init__(self, config, depth):
        super().__init__(config, config.n_layer + depth)
        self.self_attn.layer_idx = depth  # of the cache for drafting
        self.enorm = RMSNorm(config.n_embd, config.norm_eps)
        self.hnorm = RMSNorm(config.n_embd, config.norm_eps)
        self.eh_proj = nn.Linear(2 * config.n_embd, config.n_embd, bias=False)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.n_embd, config.norm_eps)})

    def forward(self, hidden, embedding, rope, mask, cache):
        """hidden states and the embeddings of the tokens that follow what they saw, both (B, T, n_embd)."""
        x = self.eh_proj(torch.cat((self.enorm(embedding), self.hnorm(hidden)), dim=-1))
        return self.shared_head.norm(super().forward(x, rope, mask, cache))


class GPT(nn.Module):
    """The language model: logits, losses = model(idx, targets, cache)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.n_embd),
                "dropout": nn.Dropout(config.dropout),
                "layers": nn.ModuleList(
                    [Block(config, i) for i in range(config.n_layer)]
                    + [MTPBlock(config, i) for i in range(config.num_nextn_predict_layers)]
                ),
                "norm": RMSNorm(config.n_embd, config.norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.init_weights()

    def init_weights(self):
        """GPT-2's: normal with std 0.02; what adds to the residual stream 1/sqrt(2 n_layer) of it."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, Router)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, Experts):
                nn.init.normal_(module.gate_up_proj, std=0.02)
        for layer in self.model.layers:
            mlps = [module for module in layer.modules() if isinstance(module, (MLP, Experts))]
            for projection in (layer.self_attn.o_proj, *(mlp.down_proj for mlp in mlps)):
                matrix = getattr(projection, "weight", projection)
                nn.init.normal_(matrix, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def new_cache(self, batch_size, max_length, drafting=False):
        """An empty KVCache for batch_size sequences of up to max_length tokens; or one for `draft`."""
        weight, n_layer = self.lm_head.weight, 1 if drafting else self.config.n_layer
        return KVCache(self.config, n_layer, batch_size, max_length, weight.device, weight.dtype)

    def forward(self, idx, targets=None, cache=None, return_hidden=False):
        """idx (B, T) int64 -> logits (B, T, vocab_size) and a dict of scalar losses.

        targets (B, T) hold the token after each of idx, -1 where there is none to learn; without
        them the dict is empty. With a cache, idx are the tokens that follow those it holds.
        """
        T = idx.size(1)
        if cache is None:
            positions, mask = torch.arange(T, device=idx.device), None
        else:
            positions, mask = cache.positions(T), cache.mask(T)
        rope = rotation(positions, self.config)
        x = self.model.embed_tokens(idx)  # (B, T, n_embd)
        x = self.model.dropout(x)
        for layer in self.model.layers[: self.config.n_layer]:
            x = layer(x, rope, mask, cache)
        if cache is not None:
            cache.advance(T)
        hidden = self.model.norm(x)
        logits = self.lm_head(hidden)  # (B, T, vocab_size)
        if return_hidden:  # what `draft` goes on from
            return logits, hidden
        losses = {}
        if targets is not None:
            losses["next_token"] = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
            if self.config.num_nextn_predict_layers:
                losses["mtp"] = self.config.mtp_loss_weight * self.mtp_loss(hidden, idx, targets, rope)
            if self.training and self.config.router == "softmax":
                balance = torch.stack([router.balance_loss for router in self.routers()]).mean()
                losses["balance"] = self.config.router_aux_loss_coef * balance
        for router in self.routers():
            router.balance_loss = None  # or it would keep the step's graph
        return logits, losses

    def mtp_loss(self, hidden, idx, targets, rope):
        """Mean over depths k of the cross-entropy of the token k + 1 ahead, where there is one."""
        following, loss = torch.cat((idx[:, 1:], targets[:, -1:].clamp_min(0)), dim=1), 0.0
        for block in self.model.layers[self.config.n_layer :]:
            embedding = self.model.dropout(self.model.embed_tokens(following))
            hidden = block(hidden, embedding, rope, None, None)
            following, targets = F.pad(following[:, 1:], (0, 1)), F.pad(targets[:, 1:], (0, 1), value=-1)
            logits = self.lm_head(hidden).flatten(0, 1)
            total = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum")
            loss = loss + total / (targets != -1).sum().clamp_min(1)
        return loss / self.config.num_nextn_predict_layers

    def draft(self, hidden, idx, cache):
        """Guesses the token after next: logits (B, T, vocab_size), and the block's own hidden states.

        hidden (B, T, n_embd) of the model, or of the draft before; idx (B, T) is the token after each of
        those that hidden saw; cache = new_cache(…, drafting=True) holds the same positions before them.
        """
        embedding = self.model.embed_tokens(idx)
        rope, mask = rotation(cache.positions(idx.size(1)), self.config), cache.mask(idx.size(1))
        hidden = self.model.layers[self.config.n_layer](hidden, embedding, rope, mask, cache)
        cache.advance(idx.size(1))
        return self.lm_head(hidden), hidden

    def routers(self):
        """The routers, in the order of the layers that have one."""
        return [layer.mlp.gate for layer in self.model.layers if isinstance(layer.mlp, MoE)]

    @torch.no_grad()
    def after_step(self):
        """Call it after each optimizer step: moves the biases of sigmoid routers towards balance.

        Returns, for each router, the tokens of each expert since then and the mean entropy of its scores.
        """
        tokens, entropy = torch.stack([router.watched for router in self.routers()]).tensor_split([-1], dim=1)
        for router, n in zip(self.routers(), tokens, strict=True):
            if self.config.router == "sigmoid":
                router.e_score_correction_bias += self.config.bias_update_speed * (n.mean() - n).sign()
            router.watched.zero_()
        entropy = entropy.squeeze(1) / tokens.sum(1) * self.config.num_experts_per_tok
        return {"expert_tokens": tokens, "router_entropy": entropy}
