"""Stage 6: mixture of experts: many small MLPs instead of one, and each token uses a few of them.

Idea: a router scores the experts for each token; the best few answer, weighted, and the shared ones always.
Papers: Switch, arXiv 2101.03961; Mixtral, 2401.04088; DeepSeekMoE, 2401.06066; DeepSeek-V3, 2412.19437.
Changed: the MLP, and what keeps the experts equally busy: a loss (softmax router) or a bias (sigmoid router).
It should buy a lower loss for the same arithmetic a token, paid with memory: most parameters sit idle.
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
    n_kv_head: int | None = None
    """Number of key/value heads. None: half of n_head, or all of an odd number."""
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
    router: str = "softmax"
    """softmax (balanced by a loss) or sigmoid (balanced by a bias)."""
    routed_scaling_factor: float = 1.0
    """Factor of what the routed experts answer."""
    router_aux_loss_coef: float = 0.01
    """Weight of the softmax router's balance loss."""
    bias_update_speed: float = 0.001
    """Step of the sigmoid router's biases, taken once an optimizer step."""

    def __post_init__(self):
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head if self.n_head % 2 else self.n_head // 2
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
        if self.n_kv_head < 1 or self.n_head % self.n_kv_head:
            raise ValueError(f"n_head ({self.n_head}) must be divisible by n_kv_head ({self.n_kv_head})")
        if self.n_embd // self.n_head % 2:
            raise ValueError(f"n_embd / n_head ({self.n_embd} / {self.n_head}) must be even, for pairs")
        implementations = ("auto", "flash_attn", "sdpa", "explicit", "triton")
        if self.attention not in implementations:
            raise ValueError(f"attention must be one of {', '.join(implementations)}, not {self.attention!r}")
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
    """Keys and values of the tokens so far: what attention needs of the past to go on.

    The model asks it for the new tokens' positions and mask, gives each layer's new keys and values
    to `update` and gets all of them back; how they are stored is the cache's business.
    """

    def __init__(self, config, batch_size, max_length, device, dtype):
        shape = (config.n_layer, batch_size, config.n_kv_head, max_length, config.n_embd // config.n_head)
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
        """Additive mask of the next n_new queries against all keys; None: what causal_mask makes."""
        return None

    def update(self, layer_idx, k, v):
        """Stores k and v (B, n_kv_head, n_new, head_dim); returns those of all tokens so far."""
        end = self.length + k.size(2)
        keys, values = self.keys[layer_idx, :, :, :end], self.values[layer_idx, :, :, :end]
        keys[:, :, self.length :] = k
        values[:, :, self.length :] = v
        return keys, values  # (B, n_kv_head, length + n_new, head_dim)

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


def rotation(positions, head_dim, theta):
    """cos and sin, in float32, at positions (T,) or (B, T): (1, T, head_dim/2) or (B, 1, T, head_dim/2)."""
    pairs = torch.arange(0, head_dim, 2, device=positions.device)
    frequencies = 1 / theta ** (pairs.float() / head_dim)
    angles = (positions[..., None] * frequencies).unsqueeze(-3)  # the same for all heads
    return angles.cos(), angles.sin()


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
    """Grouped-query causal self-attention (arXiv 2305.13245)."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.q_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.k_proj = nn.Linear(config.n_embd, config.n_kv_head * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.n_embd, config.n_kv_head * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.attention = config.attention

    def forward(self, x, rope, mask, cache):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_head, T, head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_head, T, head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.update(self.layer_idx, k, v)  # (B, n_kv_head, S, head_dim), S = T + tokens before
        return self.o_proj(self.attend(q, k, v, mask).transpose(1, 2).reshape(B, T, -1))

    def attend(self, q, k, v, mask):
        """q (B, n_head, T, head_dim), k and v (B, n_kv_head, S, head_dim) -> (B, n_head, T, head_dim)."""
        p = self.dropout.p if self.training else 0.0
        name = choose_attention(self.attention, q, k, mask, p)
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
        repeats = q.size(1) // k.size(1)  # query heads to a key/value head
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)  # k0, k0, k1, k1
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
            chosen = biased.topk(self.config.num_experts_per_tok, dim=-1).indices
            weights = scores.gather(1, chosen)
        if self.config.num_experts_per_tok > 1:  # a lone weight of 1 would teach the router nothing
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if self.training:
            self.watch(probs, chosen)
        return weights * self.config.routed_scaling_factor, chosen

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

    def new_cache(self, batch_size, max_length):
        """An empty KVCache for batch_size sequences of up to max_length tokens."""
        weight = self.lm_head.weight
        return KVCache(self.config, batch_size, max_length, weight.device, weight.dtype)

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) int64 -> logits (B, T, vocab_size) and a dict of scalar losses.

        targets (B, T) hold the token after each of idx, -1 where there is none to learn; without
        them the dict is empty. With a cache, idx are the tokens that follow those it holds.
        """
        T = idx.size(1)
        if cache is None:
            positions, mask = torch.arange(T, device=idx.device), None
        else:
            positions, mask = cache.positions(T), cache.mask(T)
        rope = rotation(positions, self.config.n_embd // self.config.n_head, self.config.rope_theta)
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
                balance = torch.stack([router.balance_loss for router in self.routers()]).mean()
                losses["balance"] = self.config.router_aux_loss_coef * balance
        for router in self.routers():
            router.balance_loss = None  # or it would keep the step's graph
        return logits, losses

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
