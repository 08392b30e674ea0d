"""The exercises of stage 4: grouped-query attention, its cache, and the conversion of a trained model."""

import torch

from exercises import properties
from exercises.measured import CHANGES, loss_change, parameters_saved
from exercises.probe import in_steps, random, small_model, tokens
from exercises.units import Chapter, Exercise, Mistake, Question, Rewrite

# ---- 4.1 attention

REPEAT = "k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)"
SCORES = "(q * q.size(3) ** -0.5) @ k.transpose(2, 3) + mask"


def grouped_attention(m):
    """Three sizes of groups; more keys than queries; a dropout that drops everything."""
    q, mask, found = random(2, 6, 5, 8, seed=1, scale=1.5), m.causal_mask(5, 9, "cpu"), {}
    for n_kv_head in (3, 2, 1):
        k, v = random(2, n_kv_head, 9, 8, seed=2, scale=1.5), random(2, n_kv_head, 9, 8, seed=3)
        name = f"attention with {n_kv_head} key/value heads [batch, head, position, dimension]"
        found[name] = m.attention(q, k, v, mask, 0.0)
    found["attention when every weight is dropped"] = m.attention(q, k, v, mask, 1.0)
    return found


def sixteen_bits(m):
    """As when training with autocast: q, k and v in 16 bits, and the mask in 32."""
    q, k, v = (random(2, 4, 5, 8, seed=i).bfloat16() for i in (1, 2, 3))
    y = m.attention(q, k, v, m.causal_mask(5, 5, "cpu"), 0.0)
    return {"dtype of attention for bfloat16": str(y.dtype)}


def sees_no_later_key(m):
    q, k, v = (random(1, 4, 6, 8, seed=i) for i in (1, 2, 3))
    mask, first = m.causal_mask(6, 6, "cpu"), []
    for change in (0.0, 1.0):
        k[:, :, 3:] += change
        v[:, :, 3:] += change
        first.append(m.attention(q, k, v, mask, 0.0)[:, :, :3])
    return properties.close(*first)


def without_groups(m):
    """With as many key/value heads as query heads, it is torch's attention."""
    q, k, v = (random(1, 4, 6, 8, seed=i) for i in (1, 2, 3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return properties.close(m.attention(q, k, v, m.causal_mask(6, 6, "cpu"), 0.0), expected)


def one_key_head(m):
    """With one key/value head, it is torch's attention with that head for all."""
    q, k, v = random(1, 4, 6, 8, seed=1), random(1, 1, 6, 8, seed=2), random(1, 1, 6, 8, seed=3)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return properties.close(m.attention(q, k, v, m.causal_mask(6, 6, "cpu"), 0.0), expected)


ATTENTION = Exercise(
    number="4.1",
    title="Attention in groups",
    minutes=20,
    functions=("attention",),
    question="There are 6 query heads and 3 key/value heads. With which key head does each query head "
    "compute its scores, and in which order must the copies of the key heads stand so that a single matrix "
    "product pairs them up?",
    shapes="q (B, n_head, T, head_dim); k and v (B, n_kv_head, S, head_dim). Query head h belongs to "
    "key/value head h · n_kv_head // n_head. After that: softmax(q kᵀ / √head_dim + mask) v, with scores (B, "
    "n_head, T, S).",
    steps="1. Divide the number of query heads by that of key heads.\n"
    "2. Lengthen dimension 1 of k and v by this factor; copies of one head are neighbours: k0, k0, k1, k1.\n"
    "3. Compute the scores, scaled by the root of head_dim, and add the mask.\n"
    "4. Take the softmax over keys, drop some of the weights, and convert them to v's dtype.\n"
    "5. Average v with these weights.",
    afterwards="Only the order of the copies was at stake. It decides which query heads share a key, and "
    "every checkpoint relies on it.",
    probes=(grouped_attention, sixteen_bits),
    properties={
        "no position sees a later key": sees_no_later_key,
        "with as many key/value heads as query heads, it is ordinary attention": without_groups,
        "with a single key/value head, all query heads use it": one_key_head,
    },
    mistakes=(
        Mistake(
            "repeat",
            ((REPEAT, "k.repeat(1, repeats, 1, 1), v.repeat(1, repeats, 1, 1)"),),
            "The numbers are exactly those of heads in the order k0, k1, k2, k0, k1, k2.",
            "query heads 0 and 1 must share k0. The shapes agree and training works; only weights that "
            "were trained elsewhere, such as a Llama's, would reveal it.",
            "the call that lengthens dimension 1, and whether it copies single heads or the whole list.",
        ),
        Mistake(
            "values in the other order",
            (("v.repeat_interleave(repeats, dim=1)", "v.repeat(1, repeats, 1, 1)"),),
            "The keys are in the order k0, k0, k1, k1. The values are in the order v0, v1, v0, v1.",
            "a query finds a token by a key of one head and reads the value of another, so the two no "
            "longer describe the same thing.",
            "the line that lengthens v, beside the one that lengthens k.",
        ),
        Mistake(
            "keys in the other order",
            (("k.repeat_interleave(repeats, dim=1)", "k.repeat(1, repeats, 1, 1)"),),
            "The values are in the order v0, v0, v1, v1. The keys are in the order k0, k1, k0, k1.",
            "a query is compared with a key of one head and reads the value of another, so the two no "
            "longer describe the same thing.",
            "the line that lengthens k, beside the one that lengthens v.",
        ),
        Mistake(
            "positions repeated",
            ((REPEAT, "k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)"),),
            "Positions are repeated, not heads: there are more keys than the sequence has tokens.",
            "a group shares a head. Each token still has one key per head.",
            "the dimension that is lengthened, in (B, n_kv_head, S, head_dim).",
        ),
        Mistake(
            "first head for all",
            ((REPEAT, "k[:, :1].expand_as(q[:, :, :1].expand(-1, -1, k.size(2), -1)), v[:, :1]"),),
            "All query heads use the first key/value head; the others change nothing.",
            "that is multi-query attention. The other heads are computed and stored in vain.",
            "how the heads of k and v are chosen for each query head.",
        ),
        Mistake(
            "group of queries averaged",
            (
                (
                    "# Scaling q",
                    "q = q.unflatten(1, (-1, repeats)).mean(2).repeat_interleave(repeats, 1)\n    # S",
                ),
            ),
            "The query heads of a group give equal outputs: their queries are averaged.",
            "a group shares keys and values, but each query head asks a question of its own. Averaging them "
            "gives up what the additional query heads are for.",
            "what happens to q before the scores. It needs no change for groups.",
        ),
        Mistake(
            "scale by the group",
            (("q.size(3) ** -0.5", "(q.size(3) * repeats) ** -0.5"),),
            "The scores are divided by a root that is too large: the width of a whole group of heads.",
            "a score is a sum over head_dim products, whatever the number of heads that share the key. With "
            "a larger divisor, the softmax is flatter than that of the same model elsewhere.",
            "the factor that scales the scores.",
        ),
        Mistake(
            "no scale",
            (("(q * q.size(3) ** -0.5)", "q"),),
            "The scores are not divided by the root of head_dim.",
            "a sum of head_dim products grows with that root. Unscaled, the softmax saturates, and its "
            "gradients vanish in wide heads.",
            "the line that computes the scores.",
        ),
        Mistake(
            "scale without root",
            (("q.size(3) ** -0.5", "q.size(3) ** -1"),),
            "The scores are divided by head_dim, not by its root.",
            "the standard deviation of a sum of head_dim products grows with the root. Divided by more, the "
            "scores are nearly equal, and every token gets nearly the same weight.",
            "the exponent in the factor that scales the scores.",
        ),
        Mistake(
            "mask forgotten",
            ((" + mask", ""),),
            "Every position sees all keys, also later ones: the mask has no effect.",
            "in training, the next token is among the inputs, so the loss falls quickly towards 0; and the "
            "model has learned to copy, which does not help when it generates.",
            "the line that computes the scores.",
        ),
        Mistake(
            "upper-left corner",
            ((" + mask", " + torch.full((q.size(2), k.size(2)), -torch.inf).triu(1)"),),
            "Query i sees the keys up to i, counted from the first key. With more keys than queries, the "
            "queries are the last tokens and should see the earlier ones, too.",
            "without a cache both are the same. With one, a new token would see the beginning of the text "
            "and not itself. (torch's is_causal counts from the first key.)",
            "how the mask gets into the scores: the argument mask knows where the queries stand.",
        ),
        Mistake(
            "keys read instead of values",
            (("weights.type_as(v) @ v", "weights.type_as(k) @ k"),),
            "The output is a mean of the keys, not of the values.",
            "a key says what a token can be found by, and a value what it has to say. They have separate "
            "projections so that they can differ.",
            "the last product.",
        ),
        Mistake(
            "weights stay in 32 bits",
            (("weights.type_as(v) @ v", "weights @ v"),),
            "In float32 all is right. In bfloat16, the weights are float32 and the values are not.",
            "the mask is float32, and so is everything it is added to. A matrix product needs one dtype.",
            "the last product, and the dtype of both of its factors.",
        ),
        Mistake(
            "softmax over queries",
            (("F.softmax(scores, dim=-1)", "F.softmax(scores, dim=-2)"),),
            "The weights add up to 1 over the queries of each key, not over the keys of each query.",
            "each query should get a mean of the values. This also leaks: the weight of an earlier position "
            "now depends on later ones.",
            "the dimension of the softmax, in scores (B, n_head, T, S).",
        ),
        Mistake(
            "dropout forgotten",
            (("F.dropout(F.softmax(scores, dim=-1), dropout)", "F.softmax(scores, dim=-1)"),),
            "The dropout probability has no effect.",
            "without dropout all is right here, and a model trained with it would overfit sooner than "
            "expected.",
            "the weights, between the softmax and their product with v.",
        ),
    ),
    rewrites=(
        Rewrite(
            "expand and flatten",
            ((REPEAT, "*[t[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2) for t in (k, v)],"),),
        ),
        Rewrite(
            "index by head",
            ((REPEAT, "*[t[:, torch.arange(q.size(1)) // repeats] for t in (k, v)],"),),
        ),
        Rewrite(
            "einsum over groups, nothing repeated",
            """
def attention(q, k, v, mask, dropout):
    grouped = q.unflatten(1, (k.size(1), -1))
    scores = torch.einsum("bgrtd,bgsd->bgrts", grouped, k) / math.sqrt(q.size(3)) + mask
    weights = F.dropout(scores.softmax(-1), dropout).to(v.dtype)
    return torch.einsum("bgrts,bgsd->bgrtd", weights, v).flatten(1, 2)
""",
        ),
        Rewrite(
            "torch's attention with groups",
            """
def attention(q, k, v, mask, dropout):
    mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, enable_gqa=True)
""",
        ),
        Rewrite(
            "masked_fill with the lowest number, a loop over heads",
            """
def attention(q, k, v, mask, dropout):
    group, heads = q.shape[1] // k.shape[1], []
    for h in range(q.shape[1]):
        s = q[:, h] @ k[:, h // group].mT / q.shape[-1] ** 0.5
        s = s.masked_fill(mask < 0, torch.finfo(s.dtype).min)
        heads.append(F.dropout(torch.softmax(s, -1), dropout) @ v[:, h // group])
    return torch.stack(heads, 1)
""",
        ),
        Rewrite(
            "scores in float32, scaled afterwards",
            ((SCORES, "q.float() @ k.float().mT * q.size(3) ** -0.5 + mask"),),
        ),
        Rewrite(
            "groups the wrong way round, by einsum",
            """
def attention(q, k, v, mask, dropout):
    grouped = q.unflatten(1, (-1, k.size(1)))
    scores = torch.einsum("brgtd,bgsd->brgts", grouped, k) / math.sqrt(q.size(3)) + mask
    weights = F.dropout(scores.softmax(-1), dropout).to(v.dtype)
    return torch.einsum("brgts,bgsd->brgtd", weights, v).flatten(1, 2)
""",
            mistake="repeat",
        ),
        Rewrite(
            "a loop over heads, modulo instead of division",
            """
def attention(q, k, v, mask, dropout):
    heads = []
    for h in range(q.shape[1]):
        s = q[:, h] @ k[:, h % k.shape[1]].mT / q.shape[-1] ** 0.5 + mask
        heads.append(F.dropout(torch.softmax(s, -1), dropout).type_as(v) @ v[:, h % k.shape[1]])
    return torch.stack(heads, 1)
""",
            mistake="repeat",
        ),
    ),
)

# ---- 4.2 the cache

SHAPE = "config.n_kv_head, max_length, config.n_embd // config.n_head"


def cached_model(m):
    """A model with 2 key/value heads: its weights' shapes, its logits, and its cache."""
    model, idx = small_model(m, n_kv_head=2), tokens(2, 11)
    attention = model.model.layers[0].self_attn
    found = {f"shape of {name}": tuple(weight.shape) for name, weight in attention.named_parameters()}
    found["logits without a cache [batch, position, token]"] = model(idx)[0]
    found["logits with a cache, a few tokens at a time [batch, position, token]"], cache = in_steps(
        model, idx, (4, 1, 1, 5)
    )
    found["shape of the cache's keys"] = tuple(cache.keys.shape)
    found["shape of the cache's values"] = tuple(cache.values.shape)
    found["bytes of the cache"] = cache.nbytes
    found["keys in the cache [layer, batch, head, position, dimension]"] = cache.keys[..., :11, :]
    return found


HEADS_OF_K = "k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)"

CACHE = Exercise(
    number="4.2",
    title="Narrower keys and values, a smaller cache",
    minutes=15,
    functions=("KVCache.__init__", "KVCache.nbytes", "Attention.__init__", "Attention.forward"),
    question="Which of the four projections become narrower? And at which moment should a key be copied for "
    "the query heads of its group, so that the cache holds each key once?",
    shapes="k_proj and v_proj: n_embd -> n_kv_head · head_dim, where head_dim = n_embd / n_head as before. "
    "The cache: (n_layer, B, n_kv_head, max_length, head_dim), for keys and for values. `attention` takes k "
    "and v with n_kv_head heads, and repeats them itself.",
    steps="1. Make k_proj and v_proj as wide as all key/value heads together; q_proj and o_proj stay.\n"
    "2. Give the cache n_kv_head heads of width head_dim; its bytes are those of keys and values.\n"
    "3. In forward, cut q, k and v into heads of head_dim, rotate q and k, and hand k and v to the cache.\n"
    "4. Call attention with what the cache returns, put the heads side by side, and project.",
    afterwards="The cache shrinks by the size of a group. The scores take as many multiplications as before, "
    "since every query head still computes its own.",
    probes=(cached_model,),
    properties={
        "no position sees a later one": properties.no_leak,
        "with a cache the logits are the same": properties.cache_equals_no_cache,
    },
    mistakes=(
        Mistake(
            "repeated before storing",
            (
                (SHAPE, SHAPE.replace("n_kv_head", "n_head")),
                (
                    "k, v = cache.update(self.layer_idx, k, v)",
                    "k, v = (t.repeat_interleave(q.size(1) // k.size(1), dim=1) for t in (k, v))\n"
                    "            k, v = cache.update(self.layer_idx, k, v)",
                ),
            ),
            "The logits are right, and the cache is as large as without groups: it holds each key once for "
            "every query head.",
            "a smaller cache is what grouped-query attention is for.",
            "the order of repeating and storing, and the number of heads in the cache's shape.",
        ),
        Mistake(
            "cache of n_head",
            ((SHAPE, SHAPE.replace("n_kv_head", "n_head")),),
            "The cache has room for n_head heads, and n_kv_head heads arrive.",
            "a smaller cache is what grouped-query attention is for. (With a single key/value head this even "
            "works, since it is broadcast to all, and nothing is saved.)",
            "the shape of the cache's tensors.",
        ),
        Mistake(
            "one tensor for both",
            (("self.values = torch.zeros(shape, device=device, dtype=dtype)", "self.values = self.keys"),),
            "Keys and values share one tensor: the values overwrite the keys.",
            "the new tokens are right until the cache is read again: then scores are computed with values.",
            "the two tensors that the cache makes.",
        ),
        Mistake(
            "wide heads in the cache",
            ((SHAPE, SHAPE.replace("// config.n_head", "// config.n_kv_head")),),
            "The cache's heads are wider than the keys.",
            "there are fewer key heads, and each is as wide as a query head: otherwise no product of the two "
            "would exist.",
            "the last number of the cache's shape.",
        ),
        Mistake(
            "wide heads",
            (
                (
                    "self.head_dim = config.n_embd // config.n_head",
                    "self.head_dim = config.n_embd // config.n_kv_head",
                ),
            ),
            "The heads are as wide as if there were only n_kv_head of them.",
            "the number of query heads does not change, and neither does their width. Only keys and values "
            "get fewer heads.",
            "head_dim in Attention.",
        ),
        Mistake(
            "bytes of the keys only",
            (("self.keys.nbytes + self.values.nbytes", "self.keys.nbytes"),),
            "The number of bytes is that of the keys alone.",
            "the size of the cache decides how many conversations fit into memory; half of it is missing "
            "here.",
            "what the cache stores besides the keys.",
        ),
        Mistake(
            "bytes are a count",
            (
                (
                    "self.keys.nbytes + self.values.nbytes",
                    "self.keys.numel() + self.values.numel()",
                ),
            ),
            "The number is that of the elements, not of the bytes.",
            "in float32 an element has four bytes, in bfloat16 two.",
            "the attribute that is summed.",
        ),
        Mistake(
            "projections keep their width",
            (
                (
                    "k_proj = nn.Linear(config.n_embd, config.n_kv_head * self.head_dim",
                    "k_proj = nn.Linear(config.n_embd, config.n_embd",
                ),
                (
                    "v_proj = nn.Linear(config.n_embd, config.n_kv_head * self.head_dim",
                    "v_proj = nn.Linear(config.n_embd, config.n_embd",
                ),
                (SHAPE, SHAPE.replace("n_kv_head", "n_head")),
            ),
            "k_proj and v_proj are as wide as q_proj, so there is one key/value head for each query head.",
            "this is stage 3: it works, and saves neither weights nor cache.",
            "the output widths of k_proj and v_proj.",
        ),
        Mistake(
            "rotated after storing",
            (
                ("q, k = rotate(q, rope), rotate(k, rope)", "q = rotate(q, rope)"),
                (
                    "k, v = cache.update(self.layer_idx, k, v)",
                    "k, v = cache.update(self.layer_idx, k, v)\n"
                    "        S = k.size(2)\n"
                    "        k = rotate(k, rotation(torch.arange(S), self.head_dim, 10000.0))\n"
                    "        if cache is not None:\n            pass",
                ),
            ),
            "The logits are right, and the cache holds keys that are not rotated yet.",
            "then all earlier keys must be rotated again for every new token. A key's position never "
            "changes, so one rotation is enough.",
            "the order of rotating and storing.",
        ),
        Mistake(
            "keys not rotated",
            (("q, k = rotate(q, rope), rotate(k, rope)", "q = rotate(q, rope)"),),
            "The queries are rotated, and the keys are not.",
            "only if both are rotated does a score depend on the distance. Here it depends on the query's "
            "position alone.",
            "what is rotated before the keys are stored.",
        ),
        Mistake(
            "nothing rotated",
            (("q, k = rotate(q, rope), rotate(k, rope)", "pass"),),
            "Neither queries nor keys are rotated.",
            "then nothing tells attention the order of the tokens: this stage has no other positions.",
            "the argument rope, and where it is used.",
        ),
        Mistake(
            "values rotated",
            (
                (
                    "q, k = rotate(q, rope), rotate(k, rope)",
                    "q, k, v = rotate(q, rope), rotate(k, rope), rotate(v, rope)",
                ),
            ),
            "The values are rotated too.",
            "positions should decide which tokens are read, not what is read. Rotated values depend on "
            "absolute positions, so shifting the text would change the output.",
            "the line that rotates.",
        ),
        Mistake(
            "heads not put back",
            (("y.transpose(1, 2).reshape(B, T, -1)", "y.reshape(B, T, -1)"),),
            "The heads are not put back beside each other: each row mixes several positions.",
            "the shapes agree, and a position reads later ones: the text leaks.",
            "what comes between attention's output (B, n_head, T, head_dim) and o_proj.",
        ),
        Mistake(
            "keys cut without transpose",
            ((HEADS_OF_K, "k = self.k_proj(x).view(B, -1, T, self.head_dim)"),),
            "The keys are cut into heads without moving the dimension of heads: a head holds pieces of "
            "several positions.",
            "the shapes agree, and the key of one position contains later tokens: the text leaks.",
            "the line that cuts k into heads.",
        ),
        Mistake(
            "output projection forgotten",
            (("self.o_proj(y.transpose(1, 2).reshape(B, T, -1))", "y.transpose(1, 2).reshape(B, T, -1)"),),
            "The output projection is not applied.",
            "it is what mixes the heads; without it each head writes to its own slice of the residual "
            "stream.",
            "the last line of forward.",
        ),
    ),
    rewrites=(
        Rewrite(
            "reshape and permute",
            ((HEADS_OF_K, "k = self.k_proj(x).reshape(B, T, -1, self.head_dim).permute(0, 2, 1, 3)"),),
        ),
        Rewrite(
            "unflatten and swapaxes",
            ((HEADS_OF_K, "k = self.k_proj(x).unflatten(-1, (-1, self.head_dim)).swapaxes(1, 2)"),),
        ),
        Rewrite(
            "bytes from the elements",
            (
                (
                    "self.keys.nbytes + self.values.nbytes",
                    "2 * self.keys.numel() * self.keys.element_size()",
                ),
            ),
        ),
        Rewrite(
            "both caches from one tensor",
            """
class KVCache:
    def __init__(self, config, batch_size, max_length, device, dtype):
        head_dim = config.n_embd // config.n_head
        size = (2, config.n_layer, batch_size, config.n_kv_head, max_length, head_dim)
        self.keys, self.values = torch.zeros(size, device=device, dtype=dtype)
        self.length, self.max_length = 0, max_length
""",
        ),
        Rewrite(
            "repeated for the cache, by expand",
            """
class KVCache:
    def __init__(self, config, batch_size, max_length, device, dtype):
        head_dim = config.n_embd // config.n_head
        shape = (config.n_layer, batch_size, config.n_head, max_length, head_dim)
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.length, self.max_length = 0, max_length

class Attention:
    def forward(self, x, rope, mask, cache):
        B, T, C = x.shape
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).mT.mT.transpose(1, 2)
                   for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            n = q.shape[1] // k.shape[1]
            k, v = [t.unsqueeze(2).expand(-1, -1, n, -1, -1).reshape(B, -1, T, self.head_dim) for t in (k, v)]
            k, v = cache.update(self.layer_idx, k, v)
        y = attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))
""",
            mistake="repeated before storing",
        ),
    ),
)

# ---- 4.3 a trained model in groups


def averaged(m):
    """The weights of a layer with 6 heads of width 4, in 3 groups and in 1."""
    weights = {}
    for i, name in enumerate(("q_proj", "k_proj", "v_proj", "o_proj")):
        weights[f"model.layers.0.self_attn.{name}.weight"] = random(24, 10, seed=i)
    weights["model.norm.weight"] = random(10, seed=9)
    found, before = {}, {name: weight.clone() for name, weight in weights.items()}
    for n_kv_head in (3, 1):
        for name, weight in m.average_heads(weights, n_kv_head, 4).items():
            found[f"{name.removeprefix('model.layers.0.self_attn.')} for {n_kv_head} heads [row, column]"] = (
                weight
            )
    changed = [name for name, weight in weights.items() if not torch.equal(weight, before[name])]
    found["weights given that were changed"] = ", ".join(changed) or "none"
    return found


def equal_heads_stay(m):
    """If the heads of a group are equal, the group's head is what each of them was."""
    head = random(2, 1, 4, 10).expand(-1, 3, -1, -1)
    y = m.average_heads({"k_proj.weight": head.reshape(24, 10)}, 2, 4)["k_proj.weight"]
    return properties.close(y, head[:, 0].reshape(8, 10))


MEAN = "grouped[name] = heads.mean(1).flatten(0, 1)"
CUT = "heads = weight.unflatten(0, (n_kv_head, -1, head_dim))  # (n_kv_head, group, head_dim, n_embd)"

CONVERSION = Exercise(
    number="4.3",
    title="A trained model becomes a grouped one",
    minutes=25,
    functions=("average_heads",),
    question="A model was trained with one key/value head per query head. Which rows of k_proj belong to one "
    "head, and which heads will share one afterwards?",
    shapes="k_proj.weight and v_proj.weight: (n_head · head_dim, n_embd) -> (n_kv_head · head_dim, n_embd). "
    "The new head g is the mean of the heads g · group to (g + 1) · group − 1, where group = n_head / "
    "n_kv_head.",
    steps="1. Copy the dict, so that the caller's stays as it was.\n"
    "2. For the weights of k_proj and v_proj: split the rows into (n_kv_head, group, head_dim).\n"
    "3. Take the mean over the group, and join the heads' rows again.",
    afterwards="The mean is a start, not the end: the paper then trains for 5 % of the original steps. "
    "deploy/import_hf.py loads models that were trained in groups from the beginning.",
    probes=(averaged,),
    properties={"a group of equal heads becomes that head": equal_heads_stay},
    mistakes=(
        Mistake(
            "sum",
            (("heads.mean(1)", "heads.sum(1)"),),
            "The heads of a group are added up, not averaged.",
            "summed keys make the scores as many times larger as there are heads in a group, and summed "
            "values the outputs.",
            "what joins the heads of a group.",
        ),
        Mistake(
            "first head",
            (("heads.mean(1)", "heads[:, 0]"),),
            "Of each group, the first head is kept and the others are dropped.",
            "the paper compares both: the mean keeps more of the trained model, and recovers its quality "
            "with less further training (arXiv 2305.13245, figure 4).",
            "what joins the heads of a group.",
        ),
        Mistake(
            "strided groups",
            ((CUT, "heads = weight.unflatten(0, (-1, n_kv_head, head_dim)).transpose(0, 1)"),),
            "The heads 0, 3, … are averaged, where the neighbours 0, 1, … share a head.",
            "attention lets neighbouring query heads share a key head. Here, query head 1 would use a "
            "mean that its own key had no part in.",
            "the order of the two factors into which the number of heads is split.",
        ),
        Mistake(
            "rows averaged",
            ((CUT, "heads = weight.unflatten(0, (n_kv_head, head_dim, -1)).transpose(1, 2)"),),
            "Neighbouring rows are averaged, and these belong to the same head.",
            "a head's rows are its dimensions. They must stay apart: the mean runs over heads, and dimension "
            "i of one head meets dimension i of the other.",
            "the order of group and head_dim where the rows are split.",
        ),
        Mistake(
            "queries too",
            (('("k_proj.weight", "v_proj.weight")', '("q_proj.weight", "k_proj.weight", "v_proj.weight")'),),
            "q_proj is averaged too.",
            "each query head keeps its own query. Only keys and values are shared.",
            "the names of the weights that are changed.",
        ),
        Mistake(
            "keys only",
            (('("k_proj.weight", "v_proj.weight")', '"k_proj.weight"'),),
            "v_proj still has all its heads.",
            "a group shares its keys and its values.",
            "the names of the weights that are changed.",
        ),
        Mistake(
            "in place",
            (("grouped = dict(weights)", "grouped = weights"),),
            "The dict that was given is changed too.",
            "the caller still needs its own weights, for instance to compare both models.",
            "the object that the function writes to and returns.",
        ),
    ),
    rewrites=(
        Rewrite(
            "a loop over groups",
            """
def average_heads(weights, n_kv_head, head_dim):
    out = {}
    for name, w in weights.items():
        if "k_proj" in name or "v_proj" in name:
            heads = w.split(head_dim)
            size = len(heads) // n_kv_head
            w = torch.cat([sum(heads[g * size : (g + 1) * size]) / size for g in range(n_kv_head)])
        out[name] = w
    return out
""",
        ),
        Rewrite("view and permute", ((CUT, "heads = weight.view(n_kv_head, -1, head_dim, weight.size(1))"),)),
        Rewrite(
            "a loop over groups with a step",
            """
def average_heads(weights, n_kv_head, head_dim):
    out = {}
    for name, w in weights.items():
        if "k_proj" in name or "v_proj" in name:
            heads = w.split(head_dim)
            w = torch.cat([torch.stack(heads[g::n_kv_head]).mean(0) for g in range(n_kv_head)])
        out[name] = w
    return out
""",
            mistake="strided groups",
        ),
    ),
)


# ---- the whole file


def whole_model(m):
    """Logits, loss, bytes of the cache, defaults, and impossible sizes."""
    found, idx = {}, tokens(2, 11)
    for n_kv_head in (None, 1, 6):
        model = small_model(m, n_kv_head=n_kv_head)
        of = f"with n_kv_head {n_kv_head}"
        logits, losses = model(idx, tokens(2, 11, seed=4))
        found[f"logits {of} [batch, position, token]"] = logits
        found[f"loss {of}"] = losses["next_token"]
        found[f"bytes of the cache {of}"] = model.new_cache(3, 10).nbytes
    found["n_kv_head by default, for 6 heads"] = m.GPTConfig(n_head=6, n_embd=48).n_kv_head
    found["n_kv_head by default, for 3 heads"] = m.GPTConfig(n_head=3, n_embd=48).n_kv_head
    for n_kv_head in (4, 0, 12):
        try:
            m.GPTConfig(n_head=6, n_embd=48, n_kv_head=n_kv_head)
            found[f"n_kv_head {n_kv_head} of 6 heads"] = "accepted"
        except ValueError:
            found[f"n_kv_head {n_kv_head} of 6 heads"] = "refused"
    return found


CHECK = "if self.n_kv_head < 1 or self.n_head % self.n_kv_head:"

WHOLE = Exercise(
    number="4",
    title="The whole stage",
    minutes=30,
    functions=(),
    question="Which tensors get fewer heads, and where does their number appear: in the config, the "
    "projections, the cache, the attention?",
    shapes="n_kv_head divides n_head; by default it is half of n_head, or n_head if that is odd. k_proj and "
    "v_proj: (n_kv_head · head_dim, n_embd). Cache: (n_layer, B, n_kv_head, max_length, head_dim), twice.",
    steps="1. Add n_kv_head to the config, with its default and its check.\n"
    "2. Narrow k_proj and v_proj.\n"
    "3. Give the cache n_kv_head heads.\n"
    "4. Repeat keys and values in attention, after the cache.",
    probes=(whole_model,),
    properties={
        "no position sees a later one": properties.no_leak,
        "with a cache the logits are the same": properties.cache_equals_no_cache,
    },
    mistakes=(
        Mistake(
            "unchecked",
            ((CHECK, "if False:"),),
            "A number of key/value heads that does not divide the number of query heads is accepted.",
            "the groups would not come out even: the error appears later and elsewhere, or not at all.",
            "GPTConfig.__post_init__, and what it refuses.",
        ),
        Mistake(
            "zero accepted",
            ((CHECK, "if self.n_kv_head and self.n_head % self.n_kv_head:"),),
            "0 key/value heads are accepted.",
            "without keys there is nothing to attend to: the error appears later and elsewhere.",
            "GPTConfig.__post_init__, and what it refuses.",
        ),
        Mistake(
            "division the other way round",
            (
                (
                    CHECK,
                    "if self.n_kv_head < 1 or self.n_kv_head % self.n_head and self.n_head % self.n_kv_head:",
                ),
            ),
            "12 key/value heads for 6 query heads are accepted.",
            "several query heads share a key head, not the other way round.",
            "GPTConfig.__post_init__, and which number must divide which.",
        ),
        Mistake(
            "no groups by default",
            (("self.n_head if self.n_head % 2 else self.n_head // 2", "self.n_head"),),
            "By default there are as many key/value heads as query heads.",
            "then nothing is shared unless it is asked for. The stage halves them, where the number is even.",
            "the default of n_kv_head.",
        ),
    ),
    rewrites=(),
)


# ---- predictions


def cache_of(stage: str, **sizes) -> int:
    """Bytes of a cache for one sequence of 1,024 tokens, in GPT-2's size, with 16 bits a number."""
    from lab import stages

    module = stages.load(stage)
    config = module.GPTConfig(**sizes)
    return module.KVCache(config, 1, 1024, "meta", torch.bfloat16).nbytes


QUESTIONS = (
    Question(
        "GPT-2's size: 12 layers, 12 heads of width 64. How many bytes has stage 3's cache for 1,024 tokens, "
        "with 2 bytes a number?",
        lambda: cache_of("stage3_swiglu"),
        "2 (keys and values) · 12 layers · 12 heads · 1,024 tokens · 64 · 2 bytes = {answer} bytes.",
    ),
    Question(
        "And stage 4's, with 4 key/value heads?",
        lambda: cache_of("stage4_gqa", n_kv_head=4),
        "A third of it, since 4 of 12 heads remain: {answer} bytes.",
    ),
    Question(
        "In the same size and with 6 key/value heads (the default), how many parameters has stage 4 fewer "
        "than stage 3?",
        lambda: parameters_saved("stage3_swiglu", "stage4_gqa"),
        "k_proj and v_proj lose half of their 768 rows in each of 12 layers: 12 · 2 · 384 · 768 = {answer}.",
    ),
    Question(
        "Half of the key and value heads are gone. Which way does the validation loss go, against stage 3?",
        lambda: loss_change("stage4_gqa"),
        "Measured over three seeds: {answer}. docs/benchmarks.md has the numbers.",
        choices=CHANGES,
    ),
)

CHAPTER = Chapter(
    number="4",
    name="stage4",
    title="grouped-query attention",
    source="stage4_gqa/model.py",
    before="stage3_swiglu/model.py",
    beyond="exercises/beyond/stage4.py",
    exercises=(ATTENTION, CACHE, CONVERSION),
    questions=QUESTIONS,
    whole=WHOLE,
)
