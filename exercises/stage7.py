"""The exercises of stage 7: latent attention, multi-token prediction, and the choice among drafts.

Latent attention comes from mla.py, which is stage 7a: it can be written and trained without the block that
predicts further ahead. That block comes from model.py, and the choice from the sampler that all stages share.
"""

from itertools import islice
from types import SimpleNamespace
from unittest import mock

import torch

from exercises import properties
from exercises.measured import CHANGES, loss_change
from exercises.probe import in_steps, random, randomize, small_model, tokens
from exercises.units import Chapter, Exercise, Mistake, Question, Rewrite

SIZES = {"kv_lora_rank": 24, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
MLA = "stage7_mla_mtp/mla.py"

# ---- 7.1 latent attention


def attention_of(m, **sizes):
    """An attention layer with 6 heads and, in evaluation mode, weights on which mistakes matter."""
    layer = m.Attention(
        m.GPTConfig(vocab_size=29, n_layer=1, n_head=6, n_embd=48, **SIZES, **sizes), 0
    ).eval()
    randomize(layer)
    return layer


def latent_attention(m):
    """Positions that do not begin at 0; a mask of its own; one dropout that drops everything."""
    layer, x = attention_of(m), random(2, 7, 48, seed=1)
    rope = m.rotation(torch.arange(7) + 2, 4, 100.0)
    found = {"attention [batch, position, dimension]": layer(x, rope, None, None)}
    near = m.causal_mask(7, 7, "cpu") + m.causal_mask(7, 7, "cpu").T.tril(-3).nan_to_num(
        0.0, neginf=-torch.inf
    )
    found["attention with a mask of its own"] = layer(x, rope, near, None)
    dropping = attention_of(m, dropout=0.999999)
    found["attention with dropout, in evaluation"] = dropping(x, rope, None, None)
    found["attention with dropout, in training"] = dropping.train()(x, rope, None, None)
    return found


def no_later_token(m):
    layer, x = attention_of(m), random(2, 7, 48, seed=1)
    rope, changed = m.rotation(torch.arange(7), 4, 100.0), x.clone()
    changed[:, 4:] += 1
    return properties.close(layer(changed, rope, None, None)[:, :4], layer(x, rope, None, None)[:, :4])


def shift_is_no_matter(m):
    """Shifting all positions changes nothing, since only the rotated parts know them."""
    layer, x = attention_of(m), random(2, 7, 48, seed=1)
    y = [layer(x, m.rotation(torch.arange(7) + shift, 4, 100.0), None, None) for shift in (0, 9)]
    return properties.close(*y)


def scale_of_the_input(m):
    """The latent is normed, so with equal scores ten times the input gives the same output."""
    layer, x = attention_of(m), random(2, 7, 48, seed=1)
    with torch.no_grad():
        layer.q_proj.weight.zero_()  # then all scores are 0, and y is a mean of the values
    rope = m.rotation(torch.arange(7), 4, 100.0)
    return properties.close(layer(10 * x, rope, None, None), layer(x, rope, None, None))


SPLIT_Q = "q_nope, q_rope = q.split((nope_dim, rope_dim), dim=-1)"
SPLIT_DOWN = "latent, k_rope = latent_and_key.split((self.config.kv_lora_rank, rope_dim), dim=-1)"
NORM = "        latent = self.kv_a_layernorm(latent)\n"
ROTATED = "q_rope, k_rope = rotate(q_rope, rope), rotate(k_rope, rope)"
QUERY = "q = torch.cat((q_nope, q_rope), dim=-1)"
UP = "kv = self.kv_b_proj(latent).view(B, latent.size(2), -1, nope_dim + self.config.v_head_dim)"
SPLIT_UP = "k_nope, v = kv.transpose(1, 2).split((nope_dim, self.config.v_head_dim), dim=-1)"
KEY = "k = torch.cat((k_nope, k_rope.expand(-1, k_nope.size(1), -1, -1)), dim=-1)"
CALL = "y = attention(q, k, v, mask, self.dropout if self.training else 0.0)"

LATENT = Exercise(
    number="7.1",
    title="Latent attention",
    minutes=45,
    functions=("Attention.forward",),
    source=MLA,
    question="Each token keeps one narrow vector, from which the keys and values of all heads can be "
    "computed. A rotated key cannot be among them, as exercise 7.2 shows. Which two vectors does a token "
    "need, then, and which of them must every head share?",
    shapes="q_proj: each head has nope_dim + rope_dim numbers, the last of which are rotated. "
    "kv_a_proj_with_mqa: x -> latent (kv_lora_rank), then k_rope (rope_dim), one for all heads. The latent "
    "is normed by kv_a_layernorm, k_rope is rotated. kv_b_proj: latent -> for each head k_nope (nope_dim), "
    "then v (v_head_dim). A head's key: k_nope, k_rope. attention scales by 1/√(nope_dim + rope_dim).",
    steps="1. Project x to queries, cut them into heads (B, n_head, T, …), and split each into its two "
    "parts.\n"
    "2. Project x down, with a dimension for heads of size 1, and split it into latent and k_rope.\n"
    "3. Norm the latent; rotate the second part of the queries, and k_rope.\n"
    "4. Join the queries' parts.\n"
    "5. With a cache, which 7.2 checks: hand k_rope and the latent to it, and get those of all tokens; call "
    "absorbed_attention if absorbing_is_cheaper says so, and project its result.\n"
    "6. Else project the latent up, cut it into heads, and split each into k_nope and v.\n"
    "7. Give k_rope to all heads, and join it to k_nope.\n"
    "8. Call attention, put the heads side by side, and project.",
    probes=(latent_attention,),
    properties={
        "no position sees a later one": no_later_token,
        "shifting all positions changes nothing": shift_is_no_matter,
        "the values do not depend on the scale of the input": scale_of_the_input,
    },
    mistakes=(
        Mistake(
            "scale of the part without positions",
            ((CALL, CALL.replace("attention(q,", "attention(q * (self.head_dim / nope_dim) ** 0.5,")),),
            "The scores are divided by √nope_dim, not by √(nope_dim + rope_dim).",
            "a score is a sum over both parts of a key. Divided by less, the softmax is sharper than that of "
            "the same model elsewhere.",
            "the numbers that scale the scores.",
        ),
        Mistake(
            "scaled twice",
            ((CALL, CALL.replace("attention(q,", "attention(q * self.head_dim**-0.5,")),),
            "The scores are scaled twice.",
            "the function attention divides by the root of the queries' width already.",
            "what happens to the queries before they are handed to attention.",
        ),
        Mistake(
            "latent not normed",
            ((NORM, ""),),
            "The latent is not normed.",
            "the keys and values of all heads are products with it, so its scale would become theirs. Other "
            "people's weights expect the norm.",
            "what happens to the latent between the two projections.",
        ),
        Mistake(
            "key not rotated",
            ((ROTATED, "q_rope = rotate(q_rope, rope)"),),
            "The queries' second part is rotated, and k_rope is not.",
            "only if both are rotated does a score depend on the distance. Here it depends on the query's "
            "position alone.",
            "what is rotated.",
        ),
        Mistake(
            "query not rotated",
            ((ROTATED, "k_rope = rotate(k_rope, rope)"),),
            "k_rope is rotated, and the queries' second part is not.",
            "only if both are rotated does a score depend on the distance.",
            "what is rotated.",
        ),
        Mistake(
            "key normed",
            (
                (
                    NORM,
                    f"{NORM}        k_rope = F.rms_norm(k_rope, k_rope.shape[-1:], eps=1e-6)\n",
                ),
            ),
            "k_rope is normed too.",
            "DeepSeek norms the latent only. The key's length is part of what it says.",
            "what the norm is applied to.",
        ),
        Mistake(
            "values first",
            (
                (
                    SPLIT_UP,
                    "v, k_nope = kv.transpose(1, 2).split((self.config.v_head_dim, nope_dim), dim=-1)",
                ),
            ),
            "The first numbers of each head in kv_b_proj are taken as its values, the last as its key.",
            "training would work as well. Weights that were trained elsewhere have the key first, and would "
            "give nonsense without an error.",
            "the order in which a head of kv_b_proj is split.",
        ),
        Mistake(
            "key first",
            (
                (
                    SPLIT_DOWN,
                    "k_rope, latent = latent_and_key.split((rope_dim, self.config.kv_lora_rank), dim=-1)",
                ),
            ),
            "The first numbers of kv_a_proj_with_mqa are taken as k_rope, the rest as the latent.",
            "training would work as well. Weights that were trained elsewhere have the latent first.",
            "the order in which the result of the first projection is split.",
        ),
        Mistake(
            "parts of the query exchanged",
            ((SPLIT_Q, "q_rope, q_nope = q.split((rope_dim, nope_dim), dim=-1)"),),
            "The first numbers of each query are rotated, not the last.",
            "training would work as well. Weights that were trained elsewhere have the rotated part last.",
            "the order in which the queries are split.",
        ),
        Mistake(
            "rotated part lost",
            ((QUERY, "q = torch.cat((q_nope, 0 * q_rope), dim=-1)"),),
            "The rotated part has no effect on the scores.",
            "then nothing tells attention the order of the tokens: this stage has no other positions.",
            "how the queries' parts are joined.",
        ),
        Mistake(
            "key and query joined differently",
            ((QUERY, "q = torch.cat((q_rope, q_nope), dim=-1)"),),
            "The queries' rotated part comes first, the keys' last.",
            "the scores then multiply numbers that have nothing to do with each other. The shapes agree, "
            "since both are equally wide.",
            "the order in which the two parts are joined, in queries and in keys.",
        ),
        Mistake(
            "heads of kv interleaved",
            (
                (
                    UP,
                    UP.replace(
                        "latent.size(2), -1, nope_dim + self.config.v_head_dim",
                        "latent.size(2), nope_dim + self.config.v_head_dim, -1",
                    )
                    + ".mT",
                ),
            ),
            "In kv_b_proj, the numbers of a head are taken from all over the vector, not from one piece.",
            "training would work as well. In weights that were trained elsewhere, a head's numbers are "
            "neighbours.",
            "the order of the two dimensions into which the vector is cut.",
        ),
        Mistake(
            "heads not put back",
            (
                (
                    "return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  #",
                    "return self.o_proj(y.reshape(B, T, -1))  #",
                ),
            ),
            "The heads are not put back beside each other: each row mixes several positions.",
            "the shapes agree, and a position reads later ones: the text leaks.",
            "what comes between attention's output (B, n_head, T, v_head_dim) and o_proj.",
        ),
        Mistake(
            "mask not handed on",
            ((CALL, CALL.replace("mask,", "None,")),),
            "The mask has no effect: attention is always causal, and nothing else.",
            "a cache can ask for another mask, for instance where sequences of different lengths share a "
            "batch.",
            "what attention is given.",
        ),
        Mistake(
            "no dropout",
            ((CALL, CALL.replace("self.dropout if self.training else 0.0", "0.0")),),
            "The dropout probability has no effect in training.",
            "a model trained with it would overfit sooner than expected.",
            "what attention is given.",
        ),
        Mistake(
            "dropout in evaluation",
            ((CALL, CALL.replace("self.dropout if self.training else 0.0", "self.dropout")),),
            "Weights are dropped in evaluation too.",
            "the model would answer differently each time, and worse.",
            "what attention is given.",
        ),
    ),
    rewrites=(
        Rewrite(
            "einops-like cuts, both parts joined in the other order",
            """
class Attention:
    def forward(self, x, rope, mask, cache):
        c = self.config
        q = self.q_proj(x).unflatten(-1, (c.n_head, self.head_dim)).swapaxes(1, 2)
        down = self.kv_a_proj_with_mqa(x)[:, None]
        latent = self.kv_a_layernorm(down[..., : c.kv_lora_rank])
        k_rope = rotate(down[..., c.kv_lora_rank :], rope)
        q = torch.cat([rotate(q[..., c.qk_nope_head_dim :], rope), q[..., : c.qk_nope_head_dim]], -1)
        up = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (c.n_head, -1)).swapaxes(1, 2)
        k_nope, v = up[..., : c.qk_nope_head_dim], up[..., c.qk_nope_head_dim :]
        k = torch.cat([k_rope.repeat(1, c.n_head, 1, 1), k_nope], -1)
        y = attention(q, k, v, mask, self.dropout * self.training)
        return self.o_proj(y.swapaxes(1, 2).flatten(2))
""",
        ),
        Rewrite(
            "one score matrix from two einsums",
            """
class Attention:
    def forward(self, x, rope, mask, cache):
        n, r, rank = self.config.qk_nope_head_dim, self.config.qk_rope_head_dim, self.config.kv_lora_rank
        T = x.shape[1]
        q_n, q_r = self.q_proj(x).unflatten(-1, (-1, n + r)).transpose(1, 2).split([n, r], -1)
        c, k_r = self.kv_a_proj_with_mqa(x).split([rank, r], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(c)).unflatten(-1, (self.config.n_head, -1))
        k_r = rotate(k_r[:, None], rope)[:, 0]
        scores = torch.einsum("bhtd,bshd->bhts", q_n, kv[..., :n])
        scores = scores + torch.einsum("bhtd,bsd->bhts", rotate(q_r, rope), k_r)
        mask = causal_mask(T, T, x.device) if mask is None else mask
        w = F.dropout((scores / math.sqrt(n + r) + mask).softmax(-1), self.dropout, self.training)
        return self.o_proj(torch.einsum("bhts,bshd->bthd", w, kv[..., n:]).flatten(2))
""",
        ),
        Rewrite(
            "torch's attention",
            (
                (
                    CALL,
                    "y = F.scaled_dot_product_attention(q, k, v, causal_mask(T, T, x.device) if mask is None "
                    "else mask, self.dropout if self.training else 0.0)",
                ),
            ),
        ),
        Rewrite(
            "absorbed in training too",
            ((CALL, f"{CALL} if self.training else self.absorbed_attention(q, k_rope, latent, mask)"),),
        ),
        Rewrite(
            "one score matrix from two einsums, scaled by the first",
            """
class Attention:
    def forward(self, x, rope, mask, cache):
        n, r, rank = self.config.qk_nope_head_dim, self.config.qk_rope_head_dim, self.config.kv_lora_rank
        T = x.shape[1]
        q_n, q_r = self.q_proj(x).unflatten(-1, (-1, n + r)).transpose(1, 2).split([n, r], -1)
        c, k_r = self.kv_a_proj_with_mqa(x).split([rank, r], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(c)).unflatten(-1, (self.config.n_head, -1))
        k_r = rotate(k_r[:, None], rope)[:, 0]
        scores = torch.einsum("bhtd,bshd->bhts", q_n, kv[..., :n])
        scores = scores + torch.einsum("bhtd,bsd->bhts", rotate(q_r, rope), k_r)
        mask = causal_mask(T, T, x.device) if mask is None else mask
        w = F.dropout((scores / math.sqrt(n) + mask).softmax(-1), self.dropout, self.training)
        return self.o_proj(torch.einsum("bhts,bshd->bthd", w, kv[..., n:]).flatten(2))
""",
            mistake="scale of the part without positions",
        ),
    ),
    afterwards="Keys and values of all heads are functions of one latent. So far they are computed for each "
    "token; 7.2 shows that they need not be, and what the cache is left with.",
)

# ---- 7.2 the cache, and absorbing


def cached_latents(m):
    """A model with a cache, a few tokens at a time: its logits, and what the cache holds."""
    model, idx = small_model(m, **SIZES), tokens(2, 11)
    found = {"logits without a cache [batch, position, token]": model(idx)[0]}
    found["logits with a cache, a few tokens at a time"], cache = in_steps(model, idx, (4, 1, 1, 2, 3))
    found["shape of the cache's keys"] = tuple(cache.keys.shape)
    found["shape of the cache's latents"] = tuple(cache.latents.shape)
    found["bytes of the cache"] = cache.nbytes
    found["latents in the cache [layer, batch, 1, position, dimension]"] = cache.latents[..., :11, :]
    found["keys in the cache [layer, batch, 1, position, dimension]"] = cache.keys[..., :11, :]
    return found


def absorbed(m):
    """absorbed_attention by itself: several queries, a single one, and a mask."""
    layer, found = attention_of(m), {}
    k_rope, latent = random(2, 1, 9, 4, seed=2), random(2, 1, 9, 24, seed=3)
    for T in (5, 1):
        y = layer.absorbed_attention(random(2, 6, T, 10, seed=1), k_rope, latent, None)
        found[f"absorbed attention of {T} queries [batch, head, position, dimension]"] = y
    mask = torch.where(random(5, 9, seed=4) > 0.7, -torch.inf, 0.0)
    mask[:, 0] = 0
    y = layer.absorbed_attention(random(2, 6, 5, 10, seed=1), k_rope, latent, mask)
    found["absorbed attention with a mask of its own"] = y
    return found


def same_as_expanded(m):
    """absorbed_attention gives what attention gives with the keys and values computed."""
    layer = attention_of(m)
    q, k_rope, latent = random(2, 6, 5, 10, seed=1), random(2, 1, 9, 4, seed=2), random(2, 1, 9, 24, seed=3)
    kv = layer.kv_b_proj(latent.squeeze(1)).unflatten(-1, (6, 11)).transpose(1, 2)
    k = torch.cat((kv[..., :6], k_rope.expand(-1, 6, -1, -1)), -1)
    return properties.close(
        layer.absorbed_attention(q, k_rope, latent, None), m.attention(q, k, kv[..., 6:], None, 0.0)
    )


SCORES = 'scores = torch.einsum("bhtr,bsr->bhts", q * self.head_dim**-0.5, k) + mask'
BY_HEAD = "self.kv_b_proj.weight.view(self.config.n_head, -1, rank)"
W_SPLIT = "w_k, w_v = by_head.split((nope_dim, self.config.v_head_dim), dim=1)"
SHAPE = "shape = (config.n_layer, batch_size, 1, max_length)"
K_ALL = "k = torch.cat((latent, k_rope), dim=-1).squeeze(1)"

ABSORB = Exercise(
    number="7.2",
    title="The cache, and absorbing",
    minutes=45,
    functions=("KVCache.__init__", "KVCache.nbytes", "Attention.forward", "Attention.absorbed_attention"),
    source=MLA,
    question="A score is q · (W_k c), with c the latent of an earlier token. How must this product be "
    "bracketed so that W_k is applied once per query, not once for every earlier token? And why would that "
    "fail if W_k c were rotated by its position?",
    shapes="q · (W_k c) = (W_kᵀ q) · c. kv_b_proj.weight: for each head nope_dim rows W_k, then v_head_dim "
    "rows W_v, (n_head, …, kv_lora_rank). Query: (q_nope W_k, q_rope), and key: (latent, k_rope), both "
    "kv_lora_rank + rope_dim wide; scores are still scaled by 1/√(nope_dim + rope_dim). The weighted mean "
    "of latents (B, n_head, T, kv_lora_rank), then W_v. Cache: keys (n_layer, B, 1, max_length, rope_dim), "
    "latents likewise.",
    steps="1. Give the cache zeros for rotated keys and for latents, its length 0 and its max_length. Its "
    "bytes are those of both.\n"
    "2. In forward, store the rotated k_rope and the normed latent, and use what the cache returns.\n"
    "3. If absorbing_is_cheaper, call absorbed_attention, put its heads side by side, and project.\n"
    "4. In absorbed_attention, cut kv_b_proj's weight into heads, and each into W_k and W_v.\n"
    "5. Multiply the first part of each query by W_k, and join the second part to it.\n"
    "6. Compute scores with latent and k_rope, scaled as before, and add the mask; without one, the causal "
    "mask.\n"
    "7. Average the latents with the softmax's weights, and multiply by W_v.",
    probes=(cached_latents, absorbed),
    properties={
        "absorbed or not, attention is the same": same_as_expanded,
        "with a cache the logits are the same": properties.cache_equals_no_cache,
        "no position sees a later one": properties.no_leak,
    },
    mistakes=(
        Mistake(
            "scale of the latent's width",
            ((SCORES, SCORES.replace("self.head_dim**-0.5", "q.size(-1) ** -0.5")),),
            "The absorbed scores are divided by the root of the absorbed query's width.",
            "the score is the same number as before, only bracketed differently. So its scale is the same "
            "too: 1/√(nope_dim + rope_dim).",
            "the factor that scales the scores in absorbed_attention.",
        ),
        Mistake(
            "no scale",
            ((SCORES, SCORES.replace("q * self.head_dim**-0.5", "q")),),
            "The absorbed scores are not scaled.",
            "the function attention scales by itself, and here nothing else does. The score must be the same "
            "number as before.",
            "the line that computes the scores in absorbed_attention.",
        ),
        Mistake(
            "raw latent cached",
            (
                (NORM, ""),
                (
                    "            if self.absorbing_is_cheaper(",
                    f"    {NORM}            if self.absorbing_is_cheaper(",
                ),
                ("        kv = self.", f"        if cache is None:\n    {NORM}        kv = self."),
            ),
            "The logits are right, and the cache holds latents that are not normed.",
            "then all earlier latents must be normed again for every new token.",
            "the order of norming and storing.",
        ),
        Mistake(
            "unrotated key cached",
            ((ROTATED, "q_rope, k_rope = rotate(q_rope, rope), k_rope if cache else rotate(k_rope, rope)"),),
            "The cache holds keys that are not rotated.",
            "a key's position never changes, so it is rotated once, before it is stored. What comes out of "
            "the cache is used as it is.",
            "the order of rotating and storing.",
        ),
        Mistake(
            "keys' matrix for the values",
            (("return y @ w_v.mT", "return y @ w_k[:, : w_v.size(1)].mT"),),
            "The mean of the latents is multiplied by W_k.",
            "the output consists of values: W_k belongs to the scores, and W_v to what is read.",
            "the last line of absorbed_attention.",
        ),
        Mistake(
            "heads interleaved",
            ((BY_HEAD, "self.kv_b_proj.weight.view(-1, self.config.n_head, rank).transpose(0, 1)"),),
            "The rows of a head are taken from all over kv_b_proj's weight, not from one piece.",
            "the expanded form cuts the vector into heads first. Both forms must agree, or the model changes "
            "when it begins to generate.",
            "the order of the dimensions into which the weight is cut.",
        ),
        Mistake(
            "values' rows first",
            ((W_SPLIT, "w_v, w_k = by_head.split((self.config.v_head_dim, nope_dim), dim=1)"),),
            "The first rows of each head are taken as W_v, the last as W_k.",
            "in kv_b_proj a head's key comes first. Both forms must agree, or the model changes when it "
            "begins to generate.",
            "the order in which a head of the weight is split.",
        ),
        Mistake(
            "mask forgotten",
            ((SCORES, SCORES.replace(" + mask", "")),),
            "In absorbed_attention, every query sees all keys, also later ones.",
            "a single query may see them all, so generating token by token hides it. With several queries, "
            "as when drafts are verified, the text leaks.",
            "the line that computes the scores.",
        ),
        Mistake(
            "mask of its own ignored",
            (("if mask is None:", "if True:"),),
            "absorbed_attention is causal, whatever mask it is given.",
            "a cache can ask for another mask, for instance where sequences of different lengths share a "
            "batch.",
            "where the mask comes from.",
        ),
        Mistake(
            "first query at the first key",
            (
                (
                    "causal_mask(q.size(2), k.size(1), q.device)",
                    "torch.full((q.size(2), k.size(1)), -torch.inf).triu(1)",
                ),
            ),
            "The causal mask begins at the upper left: the first query sees the first key only.",
            "the cache holds earlier tokens, so the last query belongs to the last key.",
            "how the mask is aligned if there are more keys than queries.",
        ),
        Mistake(
            "parts joined differently",
            ((K_ALL, "k = torch.cat((k_rope, latent), dim=-1).squeeze(1)"),),
            "In the absorbed form, the keys begin with the rotated part, and the queries end with it.",
            "the shapes agree, and the scores multiply numbers that have nothing to do with each other.",
            "the order in which the two parts are joined, in queries and in keys.",
        ),
        Mistake(
            "positions lost",
            (("q[..., nope_dim:]), dim=-1)", "0 * q[..., nope_dim:]), dim=-1)"),),
            "The rotated part has no effect on the absorbed scores.",
            "then nothing tells attention the order of the tokens.",
            "how the absorbed query is put together.",
        ),
        Mistake(
            "normed again",
            (
                (
                    "y = self.absorbed_attention(q, k_rope, latent, mask)",
                    "y = self.absorbed_attention(q, k_rope, self.kv_a_layernorm(latent), mask)",
                ),
            ),
            "The latents of the cache are normed once more before they are absorbed.",
            "the cache holds normed latents. A norm with a weight changes a vector that is normed already.",
            "what is handed to absorbed_attention.",
        ),
        Mistake(
            "absorbed output not projected",
            (
                (
                    "return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))\n",
                    "return self.o_proj(y.reshape(B, T, -1))\n",
                ),
            ),
            "After absorbed_attention, the heads are not put back beside each other.",
            "each row mixes several positions. With a single query this cannot be seen.",
            "what comes between absorbed_attention's result and o_proj.",
        ),
        Mistake(
            "a latent for every head",
            ((SHAPE, "shape = (config.n_layer, batch_size, config.n_head, max_length)"),),
            "The cache has room for a latent and a key per head.",
            "all heads share one latent and one rotated key: that is what makes the cache small. (Stored "
            "vectors are copied to all heads, so this may even work.)",
            "the shape of the cache's tensors.",
        ),
        Mistake(
            "bytes of the latents only",
            (("self.keys.nbytes + self.latents.nbytes", "self.latents.nbytes"),),
            "The number of bytes is that of the latents alone.",
            "the size of the cache decides how many conversations fit into memory.",
            "what the cache stores besides the latents.",
        ),
    ),
    rewrites=(
        Rewrite("never absorbs", (("if self.absorbing_is_cheaper(T, latent.size(2)):", "if False:"),)),
        Rewrite("always absorbs", (("if self.absorbing_is_cheaper(T, latent.size(2)):", "if True:"),)),
        Rewrite(
            "two scores added up, by einsum",
            """
class Attention:
    def absorbed_attention(self, q, k_rope, latent, mask):
        n = self.config.qk_nope_head_dim
        w = self.kv_b_proj.weight.unflatten(0, (self.config.n_head, -1))
        c, k_rope = latent[:, 0], k_rope[:, 0]
        scores = torch.einsum("bhtn,hnr,bsr->bhts", q[..., :n], w[:, :n], c)
        scores += torch.einsum("bhtp,bsp->bhts", q[..., n:], k_rope)
        scores /= math.sqrt(self.head_dim)
        if mask is None:
            mask = causal_mask(q.shape[2], c.shape[1], q.device)
        w_mean = (scores + mask).softmax(-1) @ latent
        return torch.einsum("bhtr,hvr->bhtv", w_mean, w[:, n:])
""",
        ),
        Rewrite(
            "torch's attention on latents",
            (
                (
                    SCORES,
                    "k = k[:, None].expand(-1, q.size(1), -1, -1)\n"
                    "        v, scale = latent.expand(-1, q.size(1), -1, -1), self.head_dim**-0.5\n"
                    "        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale) @ w_v.mT\n"
                    "        scores = 0",
                ),
            ),
        ),
        Rewrite(
            "two scores added up, by einsum, the scale of both widths",
            """
class Attention:
    def absorbed_attention(self, q, k_rope, latent, mask):
        n = self.config.qk_nope_head_dim
        w = self.kv_b_proj.weight.unflatten(0, (self.config.n_head, -1))
        c, k_rope = latent[:, 0], k_rope[:, 0]
        scores = torch.einsum("bhtn,hnr,bsr->bhts", q[..., :n], w[:, :n], c)
        scores += torch.einsum("bhtp,bsp->bhts", q[..., n:], k_rope)
        scores /= math.sqrt(c.shape[-1] + k_rope.shape[-1])
        if mask is None:
            mask = causal_mask(q.shape[2], c.shape[1], q.device)
        w_mean = (scores + mask).softmax(-1) @ latent
        return torch.einsum("bhtr,hvr->bhtv", w_mean, w[:, n:])
""",
            mistake="scale of the latent's width",
        ),
    ),
    afterwards="The two forms compute the same numbers. Which one is cheaper depends on how many queries "
    "there are: many share the work of expanding the latents, and a single one does not.",
)

# ---- 7.3 multi-token prediction


def further_tokens(m):
    """One block and two, with targets to ignore; the gradient that reaches the model; a block by itself."""
    found, idx, targets = {}, tokens(2, 9), tokens(2, 9, seed=4)
    targets[0, 2:4] = -1
    for n in (2, 1):
        model = small_model(m, n_layer=1, num_nextn_predict_layers=n, **SIZES)
        loss = model(idx, targets)[1]["mtp"]
        found[f"mtp loss of {n} block{'s' * (n > 1)}"] = loss
    weight = model.model.layers[0].input_layernorm.weight
    found["gradient of the loss in the first layer [dimension]"] = torch.autograd.grad(loss, weight)[0]
    rope = m.rotation(torch.arange(7), 4, 100.0)
    y = model.model.layers[1](random(2, 7, 48, seed=1), random(2, 7, 48, seed=2), rope, None, None)
    found["output of a block [batch, position, dimension]"] = y
    return found


def last_target_ignored(m):
    """The last target is ignored, and a single token, after which no block has a target."""
    model, targets = small_model(m, n_layer=1, **SIZES), tokens(2, 9, seed=4)
    targets[:, -1] = -1
    found = {"mtp loss if the last target is ignored": model(tokens(2, 9), targets)[1]["mtp"]}
    found["mtp loss of sequences of one token"] = model(tokens(2, 1), targets[:, :1])[1]["mtp"]
    return found


def next_target_is_no_matter(m):
    """The first target is the next token of position 0, which no block predicts."""
    model, idx, targets = small_model(m, n_layer=1, **SIZES), tokens(2, 9), tokens(2, 9, seed=4)
    changed = targets.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 29
    return properties.close(model(idx, targets)[1]["mtp"], model(idx, changed)[1]["mtp"])


def third_token_is_predicted(m):
    """With a single target, that of position 1, the loss is the same as with this token's cross-entropy."""
    model, idx, targets = small_model(m, n_layer=1, **SIZES), tokens(1, 9), tokens(1, 9, seed=4)
    targets[:, :1] = targets[:, 2:] = -1
    return bool(model(idx, targets)[1]["mtp"] > 0)


FOLLOWING = "following = torch.cat((idx[:, 1:], targets[:, -1:].clamp_min(0)), dim=1)"
SHIFTED = "targets = F.pad(targets[:, 1:], (0, 1), value=-1)"
JOINED = "torch.cat((self.enorm(embedding), self.hnorm(hidden)), dim=-1)"
SHARE = "loss = loss + total / (targets != -1).sum().clamp_min(1)"

MTP = Exercise(
    number="7.3",
    title="The token after the next",
    minutes=40,
    functions=("MTPBlock.forward", "GPT.mtp_loss"),
    question="At position i the model has read tokens 0 to i, and predicts token i + 1. A block that "
    "predicts token i + 2 may also see token i + 1. Where do this token and the target come from, and which "
    "positions at the end have none?",
    shapes="Block: x = eh_proj([enorm(embedding); hnorm(hidden)]), (B, T, 2 · n_embd) -> (B, T, n_embd); "
    "then what any Block does, then shared_head.norm. Block 1 reads the model's hidden state at i and token "
    "i + 1, and predicts token i + 2; block 2 reads block 1's output and token i + 2, and predicts token i "
    "+ 3. Loss: for each block the mean over the positions with a target, 0 if there are none; then the "
    "mean over blocks.",
    steps="1. In MTPBlock.forward, norm both inputs, join them with the embedding first, and project.\n"
    "2. Pass the result through the block (super().forward), and norm it with the norm of shared_head.\n"
    "3. In mtp_loss, take the tokens that follow: idx shifted by one. What stands at the end does not "
    "matter, but it must be a token, and -1 is none.\n"
    "4. For each block, embed these tokens (with the model's dropout), and compute the new hidden state.\n"
    "5. Shift the targets by one, and mark the last position as without a target: -1.\n"
    "6. Compute the cross-entropy with the model's lm_head, and its mean over the positions with a target.\n"
    "7. Shift the following tokens for the next block. Return the mean over blocks.",
    probes=(further_tokens, last_target_ignored),
    properties={
        "a block does not predict the next token": next_target_is_no_matter,
        "a block predicts the token after the next": third_token_is_predicted,
    },
    mistakes=(
        Mistake(
            "embeds the token itself",
            ((FOLLOWING, "following = idx"),),
            "The block gets the embedding of token i, not of token i + 1.",
            "the hidden state knows token i already. Without token i + 1, the block has to guess two tokens "
            "at once; and when it drafts, token i + 1 is known.",
            "the tokens that are embedded for the first block.",
        ),
        Mistake(
            "predicts the next token",
            ((SHIFTED, "pass"),),
            "The targets are not shifted: the block predicts token i + 1, whose embedding it gets.",
            "it only has to copy its input. The loss falls to nearly 0, and nothing is learned.",
            "the targets of the first block.",
        ),
        Mistake(
            "shifted twice",
            ((SHIFTED, "targets = F.pad(targets[:, 2:], (0, 2), value=-1)"),),
            "The targets are shifted by two: the block predicts token i + 3.",
            "targets hold the token after each position already, so one more step gives token i + 2.",
            "the targets of the first block.",
        ),
        Mistake(
            "rolled",
            ((SHIFTED, "targets = targets.roll(-1, 1)"),),
            "The targets are rolled: the last position should predict the first target.",
            "the last position has no target. Rolled around, it learns a relation that does not exist.",
            "what stands at the end of the shifted targets.",
        ),
        Mistake(
            "hidden first",
            ((JOINED, "torch.cat((self.hnorm(hidden), self.enorm(embedding)), dim=-1)"),),
            "The hidden state comes first, then the embedding.",
            "that is the order in the paper's formula; DeepSeek's published weights have the embedding "
            "first.",
            "the order in which both are joined.",
        ),
        Mistake(
            "norms exchanged",
            ((JOINED, "torch.cat((self.hnorm(embedding), self.enorm(hidden)), dim=-1)"),),
            "enorm is applied to the hidden state, and hnorm to the embedding.",
            "training would work as well. In weights that were trained elsewhere, e stands for the "
            "embedding.",
            "which norm each of the two inputs gets.",
        ),
        Mistake(
            "inputs not normed",
            ((JOINED, "torch.cat((embedding, hidden), dim=-1)"),),
            "The two inputs are joined without their norms.",
            "the two differ in scale, and the larger one would drown the smaller one.",
            "what happens to both inputs before they are joined.",
        ),
        Mistake(
            "own norm missing",
            (
                (
                    "return self.shared_head.norm(super().forward(x, rope, mask, cache))",
                    "return super().forward(x, rope, mask, cache)",
                ),
            ),
            "The block's output is not normed.",
            "the head is the model's, and it expects normed vectors. The next block expects them too.",
            "what the block returns.",
        ),
        Mistake(
            "mean over all positions",
            ((SHARE, "loss = loss + total / targets.numel()"),),
            "The sum of the losses is divided by the number of all positions.",
            "positions without a target would count as perfect predictions.",
            "what the sum is divided by.",
        ),
        Mistake(
            "mean of nothing",
            ((SHARE, SHARE.replace(".clamp_min(1)", "")),),
            "If no position has a target, the loss is NaN.",
            "0 / 0 is not a number, and one such batch would spoil all weights.",
            "what the sum is divided by.",
        ),
        Mistake(
            "blocks added up",
            (("return loss / self.config.num_nextn_predict_layers", "return loss"),),
            "The losses of the blocks are added up, not averaged.",
            "mtp_loss_weight is the weight of the mean. With more blocks, they would outweigh the next "
            "token.",
            "what mtp_loss returns.",
        ),
        Mistake(
            "every block on the model's hidden state",
            (
                ("hidden = block(hidden,", "own = block(hidden,"),
                ("self.lm_head(hidden).flatten", "self.lm_head(own).flatten"),
            ),
            "The second block reads the model's hidden state, not the first block's output.",
            "DeepSeek chains the blocks: each knows what the one before has made of its token.",
            "what the second block is given.",
        ),
        Mistake(
            "same tokens for every block",
            (("following = F.pad(following[:, 1:], (0, 1))", "pass"),),
            "All blocks get the embedding of token i + 1.",
            "block 2 predicts token i + 3, and may see token i + 2.",
            "the tokens that are embedded for the second block.",
        ),
        Mistake(
            "gradient stopped",
            (("block(hidden, embedding,", "block(hidden.detach(), embedding,"),),
            "The loss is right, and its gradient does not reach the model.",
            "the model is meant to learn from this loss: its hidden states should know more of what comes.",
            "detach, no_grad, data or item around the hidden state.",
        ),
        Mistake(
            "ignored target embedded",
            (("targets[:, -1:].clamp_min(0)", "targets[:, -1:]"),),
            "If the last target is ignored, -1 is looked up in the embedding.",
            "-1 marks a position to ignore, and is no token.",
            "what stands at the end of the tokens that are embedded.",
        ),
    ),
    rewrites=(
        Rewrite(
            "padded with 0",
            ((FOLLOWING, "following = F.pad(idx[:, 1:], (0, 1))"),),
        ),
        Rewrite(
            "shorter sequences in place of ignored positions",
            """
class GPT:
    def mtp_loss(self, hidden, idx, targets, rope):
        cos, sin = rope
        losses = []
        for block in list(self.model.layers)[self.config.n_layer :]:
            if hidden.size(1) < 2:
                losses.append(hidden.sum() * 0)
                continue
            idx, targets, hidden = idx[:, 1:], targets[:, 1:], hidden[:, :-1]
            cos, sin = cos[..., :-1, :], sin[..., :-1, :]
            embedding = self.model.dropout(self.model.embed_tokens(idx))
            hidden = block(hidden, embedding, (cos, sin), None, None)
            log_probs = self.lm_head(hidden).log_softmax(-1)
            each = -log_probs.gather(-1, targets.clamp_min(0)[..., None])[..., 0]
            losses.append(each[targets >= 0].mean())
        return torch.stack(losses).mean()
""",
        ),
        Rewrite(
            "two matrices in place of one",
            """
class MTPBlock:
    def forward(self, hidden, embedding, rope, mask, cache):
        e, h = self.eh_proj.weight.chunk(2, dim=1)
        x = self.enorm(embedding) @ e.T + self.hnorm(hidden) @ h.T
        return self.shared_head["norm"](Block.forward(self, x, rope, mask, cache))
""",
        ),
        Rewrite(
            "two matrices, the wrong one first",
            """
class MTPBlock:
    def forward(self, hidden, embedding, rope, mask, cache):
        h, e = self.eh_proj.weight.chunk(2, dim=1)
        x = self.enorm(embedding) @ e.T + self.hnorm(hidden) @ h.T
        return self.shared_head["norm"](Block.forward(self, x, rope, mask, cache))
""",
            mistake="hidden first",
        ),
    ),
    afterwards="Each position now gives several gradients. When the model generates, the same block guesses "
    "the tokens to come: exercise 7.4.",
)

# ---- 7.4 drafting


def drafting(m):
    """Two blocks, of which drafting uses the first; three calls, of which the last continues from a draft."""
    model, idx = small_model(m, num_nextn_predict_layers=2, **SIZES), tokens(2, 11)
    _, hidden = model(idx, return_hidden=True)
    cache, found = model.new_cache(2, 12, drafting=True), {}
    for name, first, end in (("6 tokens", 0, 6), ("3 more", 6, 9)):
        logits, drafted = model.draft(hidden[:, first:end], idx[:, first + 1 : end + 1], cache)
        found[f"logits after {name} [batch, position, token]"] = logits
        found[f"hidden states after {name} [batch, position, dimension]"] = drafted
        found[f"length of the cache after {name}"] = cache.length
    logits, drafted = model.draft(drafted[:, -1:], tokens(2, 1, seed=8), cache)
    found["logits of a second draft [batch, 1, token]"] = logits
    return found


def in_one_or_in_steps(m):
    """Drafting from six tokens at once or one by one gives the same logits."""
    model, idx = small_model(m, **SIZES), tokens(2, 7)
    _, hidden = model(idx, return_hidden=True)
    once = model.draft(hidden[:, :6], idx[:, 1:], model.new_cache(2, 12, drafting=True))[0]
    cache = model.new_cache(2, 12, drafting=True)
    steps = [model.draft(hidden[:, i : i + 1], idx[:, i + 1 : i + 2], cache)[0] for i in range(6)]
    return properties.close(torch.cat(steps, 1), once)


def as_in_training(m):
    """The cross-entropy of the drafted logits is the loss of training."""
    model, idx = small_model(m, mtp_loss_weight=1.0, **SIZES), tokens(2, 7)
    _, hidden = model(idx, return_hidden=True)
    logits = model.draft(hidden[:, :5], idx[:, 1:6], model.new_cache(2, 12, drafting=True))[0]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), idx[:, 2:].flatten())
    return properties.close(loss, model(idx[:, :6], idx[:, 1:])[1]["mtp"])


BLOCK = "hidden = block(hidden, self.model.embed_tokens(idx), rope, cache.mask(T), cache)"
DRAFTED = "return self.lm_head(hidden), hidden"

DRAFT = Exercise(
    number="7.4",
    title="Drafting",
    minutes=20,
    functions=("GPT.draft",),
    question="In training, a block sees a whole sequence. When it drafts, it gets a few positions at a time, "
    "and must remember the earlier ones. What has to be the same, so that it predicts what it would have in "
    "training?",
    shapes="hidden (B, T, n_embd), idx (B, T): the tokens that follow -> logits (B, T, vocab_size), hidden "
    "states (B, T, n_embd). The block is the first one after the n_layer layers. Its positions begin at "
    "cache.length; cache.positions(T), cache.mask(T) and cache.advance(T) work as for the model.",
    steps="1. Take the first MTP block.\n"
    "2. Compute the rotation for the cache's next T positions, as GPT.forward does.\n"
    "3. Call the block with the hidden states, the embeddings of idx, the rotation, and the cache's mask.\n"
    "4. Advance the cache by T.\n"
    "5. Return the logits, and the block's own hidden states, from which the next draft continues.",
    probes=(drafting,),
    properties={
        "all at once or one by one, the logits are the same": in_one_or_in_steps,
        "the drafts are what the block has learned in training": as_in_training,
    },
    mistakes=(
        Mistake(
            "positions from 0",
            (("rotation(cache.positions(T),", "rotation(torch.arange(T, device=idx.device),"),),
            "At each call, the positions begin at 0 again.",
            "keys in the cache were rotated by other positions, so the distances are wrong from the second "
            "call on.",
            "the positions for the rotation.",
        ),
        Mistake(
            "never advances",
            (("        cache.advance(T)\n", ""),),
            "The cache does not advance.",
            "the next call overwrites what this one has stored: the block forgets everything before.",
            "what happens to the cache after the block.",
        ),
        Mistake(
            "advances first",
            (
                ("        cache.advance(T)\n", ""),
                ("        hidden = block(", "        cache.advance(T)\n        hidden = block("),
            ),
            "The cache advances before the block has stored its keys.",
            "the keys go to later places, and the block attends to zeros before them.",
            "the order of the block and of advancing.",
        ),
        Mistake(
            "the model's hidden state again",
            (
                (BLOCK, BLOCK.replace("hidden = ", "drafted = ")),
                (DRAFTED, "return self.lm_head(drafted), hidden"),
            ),
            "The logits are right, and the hidden states returned are those that were given.",
            "the second draft would continue from a state that does not know the first one.",
            "what is returned besides the logits.",
        ),
        Mistake(
            "logits of the hidden state given",
            ((BLOCK, f"logits = self.lm_head(hidden)\n        {BLOCK}"), (DRAFTED, "return logits, hidden")),
            "The logits come from the hidden states that were given, not from the block's.",
            "these predict the token that is known already: the draft would repeat it.",
            "the hidden states from which the logits are computed.",
        ),
        Mistake(
            "the last block",
            (("self.model.layers[self.config.n_layer]", "self.model.layers[-1]"),),
            "Drafts come from the last block, not from the first.",
            "with two blocks, the last one predicts a token too far ahead. With one, it is the same.",
            "which block is used.",
        ),
        Mistake(
            "normed again",
            ((DRAFTED, "return self.lm_head(self.model.norm(hidden)), hidden"),),
            "The block's output is normed once more before the head, with the model's norm.",
            "the block has a norm of its own for that.",
            "what comes between the block and lm_head.",
        ),
        Mistake(
            "cache not used",
            ((BLOCK, BLOCK.replace("cache.mask(T), cache)", "None, None)")),),
            "The block does not get the cache: it sees the new positions only.",
            "drafts would be made from a single token and its hidden state, as if nothing came before.",
            "what the block is given.",
        ),
        Mistake(
            "embeddings of other tokens",
            ((BLOCK, BLOCK.replace("embed_tokens(idx)", "embed_tokens(self.lm_head(hidden).argmax(-1))")),),
            "The block gets the embeddings of the model's most likely tokens, not of those that follow.",
            "the tokens were drawn, and need not be the most likely ones. idx holds them.",
            "what is embedded.",
        ),
    ),
    rewrites=(
        Rewrite(
            "positions from the cache's length",
            (
                (
                    "rotation(cache.positions(T),",
                    "rotation(cache.length + torch.arange(idx.shape[1], device=idx.device),",
                ),
            ),
        ),
        Rewrite(
            "one expression after another",
            """
class GPT:
    def draft(self, hidden, idx, cache):
        c, n = self.config, hidden.shape[1]
        mtp = [layer for layer in self.model.layers if isinstance(layer, MTPBlock)]
        angles = rotation(cache.positions(n), c.qk_rope_head_dim, c.rope_theta)
        out = mtp[0].forward(hidden=hidden, embedding=F.embedding(idx, self.model.embed_tokens.weight),
                             rope=angles, mask=cache.mask(n), cache=cache)
        cache.advance(n)
        return out @ self.lm_head.weight.T, out
""",
        ),
        Rewrite(
            "positions that restart, written out",
            """
class GPT:
    def draft(self, hidden, idx, cache):
        c, n = self.config, hidden.shape[1]
        mtp = [layer for layer in self.model.layers if isinstance(layer, MTPBlock)]
        angles = rotation(torch.arange(n), c.qk_rope_head_dim, c.rope_theta)
        out = mtp[0](hidden, self.model.embed_tokens(idx), angles, cache.mask(n), cache)
        cache.advance(n)
        return out @ self.lm_head.weight.T, out
""",
            mistake="positions from 0",
        ),
    ),
    afterwards="A draft is only a guess. What makes the text the model's own all the same is how drafts are "
    "accepted: exercise 7.5.",
)

# ---- 7.5 accepting drafts

P = torch.tensor([0.5, 0.2, 0.3])  # the model's distribution
Q = torch.tensor([0.2, 0.5, 0.3])  # the block's
ZERO = torch.tensor([0.0, 0.6, 0.4])  # the model rules token 0 out
ALMOST_1 = 1 - 2.0**-24  # the largest number that torch.rand can give


class Recorder:
    """In place of a Sampler: notes what it should draw from, and draws a token that no draft is."""

    DRAWN = 9

    def __init__(self):
        self.generator, self.noted = torch.Generator(), []

    def draw(self, probs):
        self.noted.append(probs / probs.sum())
        return self.DRAWN


def verify(m, probs, drafts, guessed, numbers):
    """The tokens that `verified` makes of these random numbers; what it draws from; its generators."""
    sampler, left, generators = Recorder(), iter([*numbers, *numbers[-1:] * 9]), []

    def rand(*size, generator=None, **kwargs):
        generators.append(generator is sampler.generator)
        size = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        return torch.tensor([next(left) for _ in range(size.numel())]).view(size)

    def bernoulli(p, *, generator=None):
        return (rand(p.shape, generator=generator) < p).float()

    def multinomial(probs, n, *, generator=None):
        generators.append(generator is sampler.generator)
        return torch.tensor([sampler.draw(probs)])

    ours = {"rand": rand, "bernoulli": bernoulli, "multinomial": multinomial}
    with mock.patch.multiple(torch, **ours), mock.patch("random.random", lambda: float(rand(1))):
        return m.verified(list(probs), list(drafts), list(guessed), sampler), sampler.noted, generators


def accepts(m, p, q, draft, number) -> bool:
    return verify(m, [p, p], [draft], [q], [number])[0][:1] == [draft]


def chance(m, p, q, draft) -> float:
    """The probability that a draft is accepted: the share of the random numbers that accept it, bisected."""
    at_0, at_1 = accepts(m, p, q, draft, 0.0), accepts(m, p, q, draft, ALMOST_1)
    if at_0 == at_1:
        return float(at_0)
    low, high = 0.0, 1.0
    for _ in range(22):
        middle = (low + high) / 2
        low, high = (middle, high) if accepts(m, p, q, draft, middle) == at_0 else (low, middle)
    return high if at_0 else 1 - high


def after_rejection(m, p, q, draft):
    """The distribution of the token in a rejected draft's place; zeros if it is not rejected or replaced."""
    for number in (ALMOST_1, 0.0):
        if not accepts(m, p, q, draft, number):
            noted = verify(m, [p, p], [draft], [q], [number])[1]
            return noted[0] if noted else torch.zeros(3)
    return torch.zeros(3)


def chances(m, p, q):
    """The probabilities that the drafts 0, 1 and 2 are accepted."""
    return torch.tensor([chance(m, p, q, draft) for draft in range(3)])


def in_the_end(m, p, q, accepted):
    """The exact distribution of the first token: of all ways in which it can come about."""
    replaced = [q[draft] * (1 - accepted[draft]) * after_rejection(m, p, q, draft) for draft in range(3)]
    return q * accepted + sum(replaced)


def one_draft(m):
    found = {}
    for name, p in (("", P), (" if the model rules token 0 out", ZERO)):
        accepted = chances(m, p, Q)
        found[f"chances that the drafts 0, 1, 2 are accepted{name} [draft]"] = accepted
        found[f"distribution after draft 1 is rejected{name} [token]"] = after_rejection(m, p, Q, 1)
        found[f"distribution of the token in the end{name} [token]"] = in_the_end(m, p, Q, accepted)
    rounded = Q * torch.tensor([1.0, 1 + 2**-20, 1.0])
    found["distribution after a rejection by rounding [token]"] = after_rejection(m, Q, rounded, 1)
    return found


def two_drafts(m):
    """The drafts 1 and 2, each of which may be rejected; what comes after them; and no drafts."""
    probs = [P, torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.1, 0.1, 0.8])]
    guessed, found = [Q, torch.tensor([0.1, 0.5, 0.4])], {}
    yes, no = (0.0, ALMOST_1) if accepts(m, P, Q, 1, 0.0) else (ALMOST_1, 0.0)
    for name, numbers in {
        "both drafts are accepted": [yes, yes],
        "the first is rejected": [no, yes],
        "the second is rejected": [yes, no],
    }.items():
        made, noted, generators = verify(m, probs, [1, 2], guessed, numbers)
        found[f"tokens if {name} ({Recorder.DRAWN}: drawn)"] = str([int(token) for token in made])
        found[f"the last is drawn from, if {name} [token]"] = noted[-1] if noted else None
        found[f"the generator is the sampler's, if {name}"] = all(generators)
    made, noted, _ = verify(m, probs[2:], [], [], [])
    found["tokens without drafts"] = str([int(token) for token in made])
    found["drawn from without drafts [token]"] = noted[-1] if noted else None
    return found


def the_model_s_own(m):
    """The first token has the model's distribution."""
    return all(properties.close(in_the_end(m, p, Q, chances(m, p, Q)), p) for p in (P, ZERO))


def never_what_is_ruled_out(m):
    return bool(in_the_end(m, ZERO, Q, chances(m, ZERO, Q))[0] < 1e-6)


ACCEPT = "if float(torch.rand(1, generator=sampler.generator)) * q[draft] < p[draft]:"
LEFT = "left = (p - q).clamp_min(0)"
REJECTED = "return [*made, sampler.draw(left)]"
LAST = "return [*made, sampler.draw(probs[-1])]"

ACCEPTANCE = Exercise(
    number="7.5",
    title="Accepting drafts",
    minutes=30,
    functions=("verified",),
    source="lab/sampling/generation.py",
    question="The block drafts token 1 with probability 0.5, and the model would choose it with 0.2. How "
    "often may the draft be accepted, so that token 1 does not become more frequent than 0.2? And which "
    "tokens have to become more frequent where it is rejected?",
    shapes="probs: the model's distributions p at each draft and after the last, (vocab_size,) each; "
    "guessed: the drafts' distributions q. A draft x is accepted with probability min(1, p(x) / q(x)). A "
    "rejected one is replaced by a token from max(0, p − q), scaled to sum to 1. If all are accepted, one "
    "more token is drawn from the last p.",
    steps="1. For each draft, draw a random number with torch.rand and sampler.generator.\n"
    "2. Accept the draft if the number times q of it is less than p of it, without dividing by 0.\n"
    "3. At the first rejected draft, draw a token from max(0, p − q) with sampler.draw, which needs no "
    "scaling, and return: the drafts after it continued a text that is not there.\n"
    "4. If p and q differ only by rounding, nothing may be left: draw from p.\n"
    "5. If all are accepted, draw one more token from the last distribution.",
    probes=(one_draft, two_drafts),
    properties={
        "the token has exactly the model's distribution": the_model_s_own,
        "a token that the model rules out never appears": never_what_is_ruled_out,
    },
    mistakes=(
        Mistake(
            "always",
            ((ACCEPT, "if True:"),),
            "Every draft is accepted.",
            "the text would be the small block's, not the model's.",
            "the condition under which a draft is kept.",
        ),
        Mistake(
            "only if the model prefers it",
            ((ACCEPT, "if torch.rand(1, generator=sampler.generator) < 1 and p[draft] >= q[draft]:"),),
            "A draft is accepted if the model's probability is at least the block's, and never otherwise.",
            "the tokens that the block overrates would never be accepted, and would become too rare. Chance "
            "must decide about them.",
            "the condition under which a draft is kept.",
        ),
        Mistake(
            "the model's probability alone",
            ((ACCEPT, ACCEPT.replace(" * q[draft]", "")),),
            "A draft is accepted with the model's probability, whatever the block's.",
            "the draft was already drawn with probability q, so a token would appear with q · p, and too "
            "many good drafts are thrown away.",
            "what the random number is compared with.",
        ),
        Mistake(
            "ratio inverted",
            ((ACCEPT, ACCEPT.replace("q[draft] < p[draft]", "p[draft] < q[draft]")),),
            "A draft is accepted with probability q / p, not p / q.",
            "the tokens that the block overrates are then always accepted.",
            "which probability is divided by which.",
        ),
        Mistake(
            "resampled from p",
            ((LEFT, "left = p"),),
            "After a rejection, the token is drawn from the model's distribution p.",
            "a part of p was served by the accepted drafts already. Only what is left of it, max(0, p − q), "
            "gives p in total.",
            "the distribution from which a rejected draft is replaced.",
        ),
        Mistake(
            "resampled from q − p",
            ((LEFT, "left = (q - p).clamp_min(0)"),),
            "After a rejection, the token is drawn from max(0, q − p).",
            "these are the tokens that the block overrates: one of them has just been rejected.",
            "the order of the difference.",
        ),
        Mistake(
            "negative parts turned round",
            ((LEFT, "left = (p - q).abs()"),),
            "After a rejection, the token is drawn from |p − q|.",
            "the tokens that the block overrates would come back this way.",
            "what happens to the negative part of the difference.",
        ),
        Mistake(
            "nothing left",
            (("if not left.any():", "if False:"),),
            "If p and q differ by rounding only, there is nothing to draw from.",
            "it happens rarely, and then generating ends with an error from the random draw.",
            "the case in which the difference is nowhere positive.",
        ),
        Mistake(
            "goes on after a rejection",
            ((REJECTED, "made.append(sampler.draw(left))"),),
            "After a rejected draft, the drafts after it are still examined.",
            "they were guessed as the continuation of the rejected token, and so were the model's "
            "distributions there. With another token in its place, both are void.",
            "what happens after a rejection.",
        ),
        Mistake(
            "rejected draft kept",
            ((REJECTED, "return [*made, draft]"),),
            "The rejected draft is in the text.",
            "rejecting would then only end the round.",
            "the token that is added after a rejection.",
        ),
        Mistake(
            "nothing in its place",
            ((REJECTED, "return made"),),
            "After a rejection, no token is drawn.",
            "if the first draft is rejected, nothing is gained, and generating may never end. The missing "
            "tokens are also those that the block underrates.",
            "what is returned after a rejection.",
        ),
        Mistake(
            "no token after the drafts",
            ((LAST, "return made"),),
            "If all drafts are accepted, there is no further token; without drafts there is none at all.",
            "the model has computed one distribution more than there are drafts. The next token costs "
            "nothing.",
            "what is returned at the end.",
        ),
        Mistake(
            "first distribution at the end",
            ((LAST, "return [*made, sampler.draw(probs[0])]"),),
            "The token after the drafts is drawn from the distribution at the first draft.",
            "the distributions are in the order of the positions, and the last one comes after all drafts.",
            "the distribution for the last token.",
        ),
        Mistake(
            "one random number for all",
            (
                ("made = []\n", "made, number = [], float(torch.rand(1, generator=sampler.generator))\n"),
                ("if float(torch.rand(1, generator=sampler.generator)) *", "if number *"),
            ),
            "One random number decides about all drafts.",
            "the decisions must be independent: else a lucky number accepts everything, and the text does "
            "not have the model's distribution.",
            "where the random number is drawn.",
        ),
        Mistake(
            "another generator",
            (("generator=sampler.generator", "generator=None"),),
            "The random numbers do not come from the sampler's generator.",
            "the same seed would give another text each time.",
            "the call that draws a random number.",
        ),
    ),
    rewrites=(
        Rewrite(
            "accepted above a limit",
            ((ACCEPT, "if float(torch.rand(1, generator=sampler.generator)) > 1 - p[draft] / q[draft]:"),),
        ),
        Rewrite(
            "bernoulli",
            (
                (
                    ACCEPT,
                    "if torch.bernoulli((p[draft] / q[draft]).clamp_max(1), generator=sampler.generator):",
                ),
            ),
        ),
        Rewrite(
            "all random numbers at once, a scaled remainder",
            """
def verified(probs, drafts, guessed, sampler):
    numbers = torch.rand(len(drafts), generator=sampler.generator)
    for i, draft in enumerate(drafts):
        p, q = probs[i], guessed[i]
        if numbers[i] < min(1.0, float(p[draft] / q[draft])):
            continue
        rest = torch.relu(p - q)
        total = rest.sum()
        return [*drafts[:i], sampler.draw(rest / total if total > 0 else p)]
    return [*drafts, sampler.draw(probs[len(drafts)])]
""",
        ),
        Rewrite(
            "drawn by torch.multinomial",
            (
                (
                    REJECTED,
                    "return [*made, int(torch.multinomial(left, 1, generator=sampler.generator))]",
                ),
            ),
        ),
        Rewrite(
            "minimum subtracted",
            ((LEFT, "left = p - torch.minimum(p, q)"),),
        ),
        Rewrite(
            "all random numbers at once, and the model's distribution after a rejection",
            """
def verified(probs, drafts, guessed, sampler):
    numbers = torch.rand(len(drafts), generator=sampler.generator)
    for i, draft in enumerate(drafts):
        if numbers[i] >= min(1.0, float(probs[i][draft] / guessed[i][draft])):
            return [*drafts[:i], sampler.draw(probs[i])]
    return [*drafts, sampler.draw(probs[len(drafts)])]
""",
            mistake="resampled from p",
        ),
        Rewrite(
            "Python's random numbers",
            """
import random

def verified(probs, drafts, guessed, sampler):
    out = []
    for d, p, q in zip(drafts, probs, guessed):
        if random.random() >= p[d] / q[d]:
            r = torch.clamp(p - q, min=0)
            return out + [sampler.draw(r / r.sum() if r.sum() > 0 else p)]
        out.append(d)
    return out + [sampler.draw(probs[-1])]
""",
            mistake="another generator",
        ),
    ),
    afterwards="The check has computed the distribution exactly, over all ways in which the first token can "
    "come about: it is the model's, whatever the block guesses. Good guesses only make it faster.",
)

# ---- 7.6 the loop around


class Rehearsed(torch.nn.Module):
    """A model whose next token depends on all tokens before it, and whose block is right 3 times of 4.

    Hidden states are the position and a number that sums up the tokens so far. The block's guesses are right
    only if it gets the hidden state of the position that its cache expects, and the token after it.
    """

    def __init__(self, counts):
        super().__init__()
        self.counts, self.counted = counts, []  # drafted and accepted before each pass
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(block_size=64)
        self.passes = []  # the tokens of each
        self.beyond = 0  # the most tokens that a cache did not have room for

    def new_cache(self, batch_size, max_length, drafting=False):
        return SimpleNamespace(length=0, max_length=max_length, states=[])

    def advance(self, cache, state):
        cache.states[cache.length :] = [state]
        cache.length += 1
        self.beyond = max(self.beyond, cache.length - cache.max_length)

    def forward(self, idx, cache, return_hidden):
        self.passes.append(idx[0].tolist())
        self.counted.append((self.counts.drafted, self.counts.accepted))
        hidden = []
        for token in idx[0].tolist():
            state = after(cache.states[cache.length - 1] if cache.length else 1, token)
            hidden.append([cache.length, state])
            self.advance(cache, state)
        states = torch.tensor([state for _, state in hidden])
        return torch.nn.functional.one_hot(states % 11, 11)[None] * 9.0, torch.tensor([hidden])

    def draft(self, hidden, idx, cache):
        if hidden.shape[:2] != idx.shape:
            raise ValueError(f"{hidden.shape[1]} hidden states do not fit {idx.shape[1]} tokens")
        guesses, states = [], []
        for (position, state), token in zip(hidden[0].tolist(), idx[0].tolist(), strict=True):
            state = after(state, token)
            wrong = 3 * (position != cache.length) + (state % 4 == 0)
            guesses.append((state + wrong) % 11)
            states.append([position + 1, state])
            self.advance(cache, state)
        return torch.nn.functional.one_hot(torch.tensor(guesses), 11)[None] * 9.0, torch.tensor([states])


def after(state: int, token: int) -> int:
    return (3 * state + token + 1) % 997


PROMPT = [3, 1, 4, 1, 5]


def drafted_text(m, n_drafts, taken, max_new_tokens=40, **options):
    """The first tokens of a greedy text, and the model that wrote it."""
    counts = m.DraftCounts()
    model = Rehearsed(counts)
    text = m.generate_with_drafts(
        model, PROMPT, max_new_tokens, 11, n_drafts, temperature=0.0, counts=counts, **options
    )
    return list(islice(text, taken)), model


def right_text(n: int) -> list[int]:
    state, text = 1, []
    for token in PROMPT:
        state = after(state, token)
    for _ in range(n):
        text.append(state % 11)
        state = after(state, text[-1])
    return text


def loop(m):
    """Texts with one and three drafts at a time: tokens, what each pass gets, and the counts."""
    found = {}
    for n_drafts in (1, 3):
        of = f"with {n_drafts} draft{'s' * (n_drafts > 1)} at a time"
        text, model = drafted_text(m, n_drafts, 16)
        found[f"text {of}"] = str(text)
        found[f"what the model gets in each pass {of}"] = str(model.passes)
        found[f"tokens drafted and accepted before each pass {of}"] = str(model.counted)
    return found


def end_of_the_text(m):
    """All tokens of a short text, and one that stops."""
    found = {}
    for n in (1, 6, 7):
        text, model = drafted_text(m, 3, 99, max_new_tokens=n)
        found[f"text of {n} tokens"] = str(text)
        found[f"tokens beyond the end of a cache, for {n} tokens"] = model.beyond
    found["text with a stop token"] = str(drafted_text(m, 3, 99, stop=[right_text(4)[3]])[0])
    return found


def small_context(m):
    """A context of 12 tokens, after which the last half goes on."""
    text, model = drafted_text(m, 3, 30, context=12)
    found = {"text in a context of 12": str(text), "passes in a context of 12": str(model.passes)}
    return found | {"tokens beyond the end of a cache, in a context of 12": model.beyond}


def same_text_as_without(m):
    """At temperature 0, the text is what the model would write by itself."""
    return all(drafted_text(m, n, 16)[0] == right_text(16) for n in (1, 2, 3))


def fewer_passes(m):
    """With three drafts at a time, 16 tokens take fewer than 10 passes."""
    _, model = drafted_text(m, 3, 16)
    return len(model.passes) < 10


ROLLBACK = "cache.length = draft_cache.length = n_certain"
CERTAIN = "model, hidden[:, : n_certain - n_seen], following, draft_cache, min(n_drafts, room), sampler"

LOOP = Exercise(
    number="7.6",
    title="The loop around the drafts",
    minutes=45,
    functions=("generate_with_drafts",),
    source="lab/sampling/generation.py",
    question="In one pass the model reads some tokens that are certain and some that are drafts. Afterwards, "
    "which of its hidden states belong to tokens that have stayed, and how far may its cache count?",
    shapes="A pass reads the window's tokens that the cache does not hold, then the drafts. Its last 1 + "
    "len(drafts) distributions are for verified. Of the window's n tokens, the model has read all but the "
    "last: both caches end at n − 1. The block gets the hidden states of positions n_seen to n − 2, each "
    "with the token after it.",
    steps="1. Make a Sampler and both caches, with the length that cache_length gives for max_new_tokens + "
    "n_drafts. The window is the end of the prompt, at most context tokens.\n"
    "2. Call the model on the new tokens and the drafts, with return_hidden.\n"
    "3. Let verified choose, count the drafts and those accepted, and keep no more tokens than are wanted.\n"
    "4. Yield the tokens; end at one that stops, without yielding it.\n"
    "5. If the window exceeds the context, go on with last_half of it, no drafts and empty caches.\n"
    "6. Else call draft_tokens on the hidden states of certain tokens and the tokens that follow them. There "
    "may be no more drafts than the context has room for.\n"
    "7. Set both caches back to the certain tokens: what was stored after them is overwritten.",
    probes=(loop, end_of_the_text, small_context),
    properties={
        "at temperature 0, the text is what the model would write by itself": same_text_as_without,
        "the drafts save passes": fewer_passes,
    },
    mistakes=(
        Mistake(
            "model's cache not set back",
            ((ROLLBACK, "draft_cache.length = n_certain"),),
            "The model's cache still counts rejected drafts.",
            "the model would attend to tokens that are not in the text, and the tokens that replace them "
            "would never be read.",
            "the lengths of both caches at the end of a round.",
        ),
        Mistake(
            "block's cache not set back",
            ((ROLLBACK, "cache.length = n_certain"),),
            "The text is right, and fewer drafts are accepted: the block's cache still counts its own "
            "drafts.",
            "the block drafts at wrong positions, after tokens that are not in the text. Nothing shows but "
            "the lower speed.",
            "the lengths of both caches at the end of a round.",
        ),
        Mistake(
            "hidden states of drafts",
            ((CERTAIN, CERTAIN.replace(": n_certain - n_seen]", "-(n_certain - n_seen) :]")),),
            "The block gets the last hidden states of the pass, also those of rejected drafts.",
            "after a rejection, the certain tokens are at the beginning of the pass, and the rejected ones "
            "at the end.",
            "which hidden states are handed to draft_tokens.",
        ),
        Mistake(
            "tokens not shifted",
            (
                (
                    "following = torch.tensor([window[n_seen + 1 :]]",
                    "following = torch.tensor([window[n_seen:-1]]",
                ),
            ),
            "Each hidden state comes with its own token, not with the one that follows.",
            "the block has learned to predict from the hidden state at i and token i + 1.",
            "the tokens that are handed to draft_tokens.",
        ),
        Mistake(
            "distributions from the beginning",
            (("logits[:, -1 - len(drafts) :]", "logits[:, : len(drafts) + 1]"),),
            "The first distributions of the pass are examined, not the last.",
            "in the first pass, these belong to the beginning of the prompt. The text continues its last "
            "token.",
            "which of the logits become distributions.",
        ),
        Mistake(
            "one draft unverified",
            (("logits[:, -1 - len(drafts) :]", "logits[:, -max(1, len(drafts)) :]"),),
            "There are as many distributions as drafts, and one more is needed.",
            "the distributions are shifted by one: each draft is compared with what should come after it.",
            "which of the logits become distributions.",
        ),
        Mistake(
            "additional token counted",
            (("counts.accepted += len(made) - 1", "counts.accepted += len(made)"),),
            "The number of accepted drafts contains the token that the model adds in each round.",
            "the share of accepted drafts would look better than it is, even with a useless block.",
            "what is added to the counts.",
        ),
        Mistake(
            "more tokens than wanted",
            (("        made = made[: max_new_tokens - n_made]\n", ""),),
            "The text is longer than max_new_tokens.",
            "the last round can accept more drafts than there is room for.",
            "what happens to the tokens of the last round.",
        ),
        Mistake(
            "stop token in the text",
            (
                (
                    "            if token in stop:\n                return\n            yield token\n",
                    "            yield token\n            if token in stop:\n                return\n",
                ),
            ),
            "The token that ends the text is part of it.",
            "it is a sign for the program, such as the end of an answer in a chat, and would be shown.",
            "the order of yielding and stopping.",
        ),
        Mistake(
            "stops after the round",
            (
                (
                    "            if token in stop:\n                return\n            yield token\n",
                    "            if token not in stop:\n                yield token\n"
                    "        if any(token in stop for token in made):\n            return\n",
                ),
            ),
            "Tokens of the same round that come after the stop token are in the text.",
            "drafts may run past the end of an answer. What is after the stop token must go.",
            "what happens to the rest of a round after a stop token.",
        ),
        Mistake(
            "room ignored",
            ((CERTAIN, CERTAIN.replace("min(n_drafts, room)", "n_drafts")),),
            "Near the end of the context, more tokens are drafted than there is room for.",
            "the model has not been trained on positions beyond its context, and the cache does not have "
            "them.",
            "the number of drafts that are asked for.",
        ),
        Mistake(
            "cache without room for drafts",
            (("max_new_tokens + n_drafts)", "max_new_tokens)"),),
            "The caches have no room for the drafts of the last round.",
            "the last drafts can go beyond max_new_tokens, and are read before they are cut off.",
            "the length of the caches.",
        ),
        Mistake(
            "drafts kept after the cut",
            (
                (
                    "            drafts, guessed = [], []\n            cache.length = draft_cache.length = "
                    "0\n",
                    "            cache.length = draft_cache.length = 0\n",
                ),
            ),
            "When the window is cut, the drafts of the round before are used again.",
            "they were examined already, and what follows them is in the text.",
            "what happens when the window exceeds the context.",
        ),
        Mistake(
            "block's cache kept after the cut",
            (("cache.length = draft_cache.length = 0", "cache.length = 0"),),
            "When the window is cut, the block's cache keeps its length.",
            "the window begins anew at position 0, for the block too.",
            "what happens when the window exceeds the context.",
        ),
    ),
    rewrites=(
        Rewrite(
            "tokens by the piece, one return",
            """
@torch.inference_mode()
def generate_with_drafts(model, prompt, max_new_tokens, vocab_size, n_drafts, temperature=0.8, top_k=None,
                         top_p=1.0, generator=None, context=None, counts=None, stop=()):
    context = context or model.config.block_size
    counts = counts if counts is not None else DraftCounts()
    device = next(model.parameters()).device
    sampler = Sampler(vocab_size, temperature, top_k, top_p, generator)
    room = cache_length(context, prompt, max_new_tokens + n_drafts)
    caches = model.new_cache(1, room), model.new_cache(1, room, drafting=True)
    text, drafts, guessed = prompt[-context:], [], []
    while max_new_tokens > 0:
        seen = caches[0].length
        logits, hidden = model(
            torch.tensor([text[seen:] + drafts], device=device), cache=caches[0], return_hidden=True
        )
        made = verified(sampler.distributions(logits)[len(text) - seen - 1 :], drafts, guessed, sampler)
        counts.drafted, counts.accepted = counts.drafted + len(drafts), counts.accepted + len(made) - 1
        for token in made:
            if token in stop or not max_new_tokens:
                return
            yield token
            max_new_tokens -= 1
            text = text + [token]
        drafts, guessed = [], []
        if len(text) > context:
            text = last_half(text, context)
            for cache in caches:
                cache.length = 0
        else:
            for cache in caches:
                cache.length = min(cache.length, len(text) - 1)
            known = torch.tensor([text[seen + 1 :]], device=device)
            n = min(n_drafts, context - len(text))
            drafts, guessed = draft_tokens(model, hidden[:, : known.size(1)], known, caches[1], n, sampler)
            caches[1].length = len(text) - 1
""",
        ),
        Rewrite(
            "counted at the end of a round",
            (
                (
                    "        counts.drafted += len(drafts)\n        counts.accepted += len(made) - 1\n",
                    "        right = len(drafts), len(made) - 1\n",
                ),
                (
                    "        n_made += len(made)\n",
                    "        n_made += len(made)\n"
                    "        counts.drafted += right[0]\n        counts.accepted += right[1]\n",
                ),
            ),
        ),
        Rewrite(
            "set back to the window",
            (
                (
                    "n_certain = len(window) - 1",
                    "n_certain = n_seen + new.size(1) - len(drafts) + len(made) - 1",
                ),
            ),
        ),
        Rewrite(
            "tokens by the piece, one cache set back",
            """
@torch.inference_mode()
def generate_with_drafts(model, prompt, max_new_tokens, vocab_size, n_drafts, temperature=0.8, top_k=None,
                         top_p=1.0, generator=None, context=None, counts=None, stop=()):
    context = context or model.config.block_size
    counts = counts if counts is not None else DraftCounts()
    device = next(model.parameters()).device
    sampler = Sampler(vocab_size, temperature, top_k, top_p, generator)
    room = cache_length(context, prompt, max_new_tokens + n_drafts)
    cache, drafting = model.new_cache(1, room), model.new_cache(1, room, drafting=True)
    text, drafts, guessed = prompt[-context:], [], []
    while max_new_tokens > 0:
        seen = cache.length
        logits, hidden = model(
            torch.tensor([text[seen:] + drafts], device=device), cache=cache, return_hidden=True
        )
        made = verified(sampler.distributions(logits)[len(text) - seen - 1 :], drafts, guessed, sampler)
        counts.drafted, counts.accepted = counts.drafted + len(drafts), counts.accepted + len(made) - 1
        for token in made:
            if token in stop or not max_new_tokens:
                return
            yield token
            max_new_tokens -= 1
            text = text + [token]
        drafts, guessed = [], []
        if len(text) > context:
            text = last_half(text, context)
            cache.length = drafting.length = 0
        else:
            cache.length = len(text) - 1
            known = torch.tensor([text[seen + 1 :]], device=device)
            n = min(n_drafts, context - len(text))
            drafts, guessed = draft_tokens(model, hidden[:, : known.size(1)], known, drafting, n, sampler)
""",
            mistake="block's cache not set back",
        ),
    ),
    afterwards="The same loop, with a small model in the place of the block, is how large models are served. "
    "python sample.py --stage 7 --draft shows the share of accepted drafts.",
)

# ---- the whole file


def whole_model(m):
    """Logits, losses and parameters, with a dense first layer and other numbers of blocks."""
    found, idx, targets = {}, tokens(2, 9), tokens(2, 9, seed=4)
    model = small_model(m, first_k_dense_replace=1, **SIZES)
    found["logits [batch, position, token]"], losses = model(idx, targets)
    found |= {f"{name} loss": loss for name, loss in losses.items()}
    block = [(name, p) for name, p in model.named_parameters() if ".layers.2." in name]
    found |= {f"parameter {name}": tuple(parameter.shape) for name, parameter in block}
    found["number of routers"] = len(model.routers())
    for n in (0, 2):
        losses = small_model(m, num_nextn_predict_layers=n)(idx, targets)[1]
        found[f"losses with {n} blocks"] = ", ".join(losses)
    try:
        m.GPTConfig(num_nextn_predict_layers=-1)
        found["-1 blocks"] = "accepted"
    except ValueError:
        found["-1 blocks"] = "refused"
    return found


def whole_hidden(m):
    model = small_model(m, **SIZES)
    return {"hidden states [batch, position, dimension]": model(tokens(2, 9), return_hidden=True)[1]}


def whole_drafts(m):
    model, idx = small_model(m, **SIZES), tokens(2, 9)
    cache, (_, hidden) = model.new_cache(2, 12, drafting=True), model(idx, return_hidden=True)
    found = {"bytes of the model's cache": model.new_cache(2, 12).nbytes}
    found["bytes of the cache for drafting"] = cache.nbytes
    found["drafted logits [batch, position, token]"] = model.draft(hidden[:, :8], idx[:, 1:], cache)[0]
    return found


WHOLE = Exercise(
    number="7",
    title="The whole stage",
    minutes=40,
    functions=(),
    question="The additional block is one of the model's layers, and yet the model does not pass through it. "
    "Which places have to tell it from the others?",
    shapes="model.layers: n_layer blocks, then num_nextn_predict_layers MTP blocks, each with enorm, hnorm, "
    "eh_proj (n_embd, 2 · n_embd) and shared_head.norm, and with experts whatever first_k_dense_replace is. "
    "Losses: mtp is mtp_loss_weight times the mean of the blocks. forward(…, return_hidden=True) returns the "
    "logits and the hidden states after the last norm. new_cache(…, drafting=True) has one layer.",
    steps="1. Add the two sizes to the config, and check that the number of blocks is not negative.\n"
    "2. Write MTPBlock, whose attention stores its keys in layer 0 of its own cache.\n"
    "3. Append the blocks to the layers, and leave them out when the model computes its logits.\n"
    "4. Keep the hidden state after the last norm: for the blocks' loss, and to return it.\n"
    "5. Write mtp_loss and draft, and let the cache have as many layers as it is told.",
    probes=(whole_model, whole_hidden, whole_drafts),
    properties={
        "no position sees a later one": properties.no_leak,
        "with a cache the logits are the same": properties.cache_equals_no_cache,
    },
    mistakes=(
        Mistake(
            "hidden before the last norm",
            (
                (
                    "hidden = self.model.norm(x)\n        logits = self.lm_head(hidden)",
                    "hidden = x\n        logits = self.lm_head(self.model.norm(x))",
                ),
            ),
            "The blocks get the hidden states before the model's last norm.",
            "what a block gets from another block is normed. DeepSeek's weights expect the same from the "
            "model.",
            "where GPT.forward takes the hidden states for the blocks.",
        ),
        Mistake(
            "weight missing",
            (("self.config.mtp_loss_weight * self.mtp_loss(", "self.mtp_loss("),),
            "The blocks' loss has no weight.",
            "a guess two tokens ahead would count as much as the next token, which the model is for.",
            "what GPT.forward does with the blocks' loss.",
        ),
        Mistake(
            "through all layers",
            (("self.model.layers[: self.config.n_layer]:", "self.model.layers:"),),
            "The model passes through the additional block too, which is called with other arguments.",
            "the block predicts another token. The model's own logits come from its n_layer layers.",
            "the loop over the layers in GPT.forward.",
        ),
        Mistake(
            "drafting cache of all layers",
            (("1 if drafting else self.config.n_layer", "self.config.n_layer"),),
            "The cache for drafting is as large as the model's.",
            "drafting uses one block, so one layer is enough.",
            "GPT.new_cache.",
        ),
        Mistake(
            "place in the cache",
            (("        self.self_attn.layer_idx = depth  #", "        #"),),
            "The block stores its keys in a layer that the cache for drafting does not have.",
            "that cache has a single layer: the block's own, whose number is 0.",
            "the number of the layer that the block's attention has.",
        ),
        Mistake(
            "dense block",
            (("super().__init__(config, config.n_layer + depth)", "super().__init__(config, depth)"),),
            "With dense first layers, the additional block is dense too.",
            "first_k_dense_replace counts the model's layers, and the block comes after these.",
            "the number of the layer that the block is made with.",
        ),
        Mistake(
            "routers of the model only",
            (
                (
                    "for layer in self.model.layers if isinstance(layer.mlp, MoE)",
                    "for layer in self.model.layers[: self.config.n_layer] if isinstance(layer.mlp, MoE)",
                ),
            ),
            "The additional block's router is not among the routers.",
            "its experts would never be balanced.",
            "GPT.routers.",
        ),
        Mistake(
            "negative number accepted",
            (
                (
                    '("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers")',
                    '("n_shared_experts", "first_k_dense_replace")',
                ),
            ),
            "A negative number of blocks is accepted.",
            "the error would appear later and elsewhere, or not at all.",
            "GPTConfig.__post_init__, and what it refuses.",
        ),
    ),
    rewrites=(),
)


# ---- predictions


def stage(name: str):
    from lab import stages

    return stages.load(name)


def cache_bytes() -> int:
    m = stage("stage7a_mla")
    return m.KVCache(m.GPTConfig(), 1, 1024, "meta", torch.bfloat16).nbytes


def heads_for_this_cache() -> float:
    """How many key/value heads of stage 5 need as many bytes as the latent cache, in GPT-2's size."""
    m = stage("stage5_flash")
    one_head = m.KVCache(m.GPTConfig(n_kv_head=1), 1, 1024, "meta", torch.bfloat16).nbytes
    return cache_bytes() / one_head


def first_target() -> str:
    """Which token block 1 predicts at position 0: the only one whose target gives a loss there."""
    m = stage("stage7_mla_mtp")
    model, idx = small_model(m, n_layer=1, **SIZES), tokens(1, 4)
    for position in range(4):
        targets = torch.full((1, 4), -1)
        targets[0, position] = 5  # the token after this position
        if model(idx, targets)[1]["mtp"] > 0:
            return f"token i + {position + 1}"
    raise AssertionError("no target has an effect")


def accepted_share() -> float:
    """The probability that a draft from Q is accepted."""
    from lab.sampling import generation

    return (Q * chances(generation, P, Q)).sum().item()


QUESTIONS = (
    Question(
        "GPT-2's size: 12 layers, a latent of 288 numbers and a rotated key of 32. How many bytes has the "
        "cache for 1,024 tokens, with 2 bytes a number?",
        cache_bytes,
        "12 layers · 1,024 tokens · (288 + 32) · 2 bytes = {answer} bytes, whatever the number of heads.",
    ),
    Question(
        "With how many key/value heads of width 64 would grouped-query attention need the same number of "
        "bytes?",
        heads_for_this_cache,
        "A head needs 2 · 64 numbers for each token, so it is 320 / 128 = {answer} heads. All 12 heads of "
        "MLA have keys and values of their own.",
        tolerance=0.01,
    ),
    Question(
        "Which token does the first block of multi-token prediction learn to predict at position i?",
        first_target,
        "The hidden state has read token i, the embedding is token i + 1, and the target is {answer}.",
        choices=("token i + 1", "token i + 2", "token i + 3"),
    ),
    Question(
        "The model's distribution over three tokens is (0.5, 0.2, 0.3), the block's (0.2, 0.5, 0.3). What is "
        "the probability that a draft is accepted?",
        accepted_share,
        "Each token is accepted with min(p, q) in total: 0.2 + 0.2 + 0.3 = {answer}.",
        tolerance=0.01,
    ),
    Question(
        "A block of multi-token prediction is trained along with the model. Which way does the validation "
        "loss of the next token go, against stage 7a?",
        lambda: loss_change("stage7_mla_mtp"),
        "Measured over three seeds: {answer}. docs/benchmarks.md has the numbers.",
        choices=CHANGES,
    ),
)

CHAPTER = Chapter(
    number="7",
    name="stage7",
    title="latent attention, multi-token prediction, drafts",
    source="stage7_mla_mtp/model.py",
    before=MLA,
    exercises=(LATENT, ABSORB, MTP, DRAFT, ACCEPTANCE, LOOP),
    questions=QUESTIONS,
    whole=WHOLE,
)
