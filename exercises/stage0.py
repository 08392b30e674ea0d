"""The exercises of stage 0: GPT-2 from its mask to its loss."""

import math

import torch

from exercises import properties
from exercises.probe import in_steps, random, randomize, small_model, tokens
from exercises.units import Chapter, Exercise, Mistake, Question, Rewrite

# ---- 0.1 the mask


def masks(m):
    """What a softmax makes of scores to which the mask is added; more keys than queries; the device."""
    found = {}
    for n_query, n_key in ((4, 4), (3, 7), (1, 5)):
        mask = m.causal_mask(n_query, n_key, "cpu")
        of = f"with {n_query} queries and {n_key} keys"
        found[f"shape of the mask {of}"] = tuple(mask.shape)
        scores = random(n_query, n_key, seed=1)
        found[f"weights of equal scores {of} [query, key]"] = (0 * scores + mask).softmax(-1)
        found[f"weights of random scores {of} [query, key]"] = (scores + mask).softmax(-1)
    found["device of a mask made for the device meta"] = str(m.causal_mask(3, 7, "meta").device)
    return found


def mask_hides_later_keys(m):
    hidden = (random(5, 5, seed=1) + m.causal_mask(5, 5, "cpu")).softmax(-1)
    return bool((hidden.triu(1) == 0).all())


def mask_shows_own_key(m):
    shown = (random(5, 5, seed=1) + m.causal_mask(5, 5, "cpu")).softmax(-1)
    return bool((shown.diagonal() > 0).all())


def last_query_sees_all(m):
    return bool((m.causal_mask(3, 7, "cpu")[-1] == 0).all())


FULL = "torch.full((n_query, n_key), -torch.inf, device=device)"
CORNER = "triu(n_key - n_query + 1)"

MASK = Exercise(
    number="0.1",
    title="The causal mask",
    minutes=10,
    functions=("causal_mask",),
    question="A number is added to each score before the softmax. Which number makes the weight exactly 0, "
    "and which leaves it as it is? And if a cache holds 4 earlier tokens, which keys does the first of 3 new "
    "queries see?",
    shapes="(n_query, n_key), float32. Query i is the token at position n_key − n_query + i. It sees the "
    "keys at positions up to its own: 0 there, −∞ at all later ones.",
    steps="1. Make a matrix of −∞ on the given device.\n"
    "2. Keep the −∞ above a diagonal, and put 0 elsewhere.\n"
    "3. Choose the diagonal so that the last query sees every key, whatever the two numbers are.",
    afterwards="These few numbers are all that keeps a language model from reading the answer. Every later "
    "stage has the same mask, or a kernel that behaves as if it did.",
    probes=(masks,),
    properties={
        "no query sees a later key": mask_hides_later_keys,
        "each query sees its own key": mask_shows_own_key,
        "the last query sees all keys, also those of a cache": last_query_sees_all,
    },
    mistakes=(
        Mistake(
            "ones",
            ((FULL, "torch.ones((n_query, n_key), device=device)"),),
            "Later keys get 1 added to their scores: they are not hidden, but preferred.",
            "the mask is added, and the softmax turns −∞ into exactly 0. Any finite number that is not far "
            "below the scores leaves some weight.",
            "the number that the hidden places hold.",
        ),
        Mistake(
            "zeros and ones",
            (
                (
                    f"{FULL}.{CORNER}",
                    "torch.ones((n_query, n_key), device=device).tril(n_key - n_query)",
                ),
            ),
            "Visible keys get 1 added to their scores, and hidden ones 0.",
            "that is a mask to multiply by. This one is added to the scores: hidden keys need −∞, and "
            "visible ones 0.",
            "the two numbers that the mask consists of, and what the docstring says is done with it.",
        ),
        Mistake(
            "plus infinity",
            (("-torch.inf", "torch.inf"),),
            "Adding the mask makes the scores of later keys +∞, and the softmax of that is NaN.",
            "the exponential of −∞ is 0; that of +∞ is infinite, and ∞ / ∞ has no value.",
            "the sign of the hidden places.",
        ),
        Mistake(
            "upper-left corner",
            ((CORNER, "triu(1)"),),
            "Query i sees the keys up to i, counted from the first key, also when there are more keys than "
            "queries.",
            "the queries are the last tokens. With a cache, a new token would see the beginning of the text "
            "and not itself; without one, nothing shows.",
            "how the diagonal depends on the two sizes.",
        ),
        Mistake(
            "own token hidden",
            ((CORNER, "triu(n_key - n_query)"),),
            "No query sees its own key.",
            "the token itself is the best hint at the next one. And the first token sees nothing at all, "
            "so its softmax is NaN.",
            "the diagonal at which the hidden part begins.",
        ),
        Mistake(
            "one token ahead",
            ((CORNER, "triu(n_key - n_query + 2)"),),
            "Each query sees one token beyond its own.",
            "that token is the answer. The loss falls to nearly 0, and generated text is noise.",
            "the diagonal at which the hidden part begins.",
        ),
        Mistake(
            "only the future",
            ((CORNER, "tril(n_key - n_query - 1)"),),
            "Earlier keys are hidden, and later ones are visible.",
            "it is the wrong half of the matrix: a model would learn from the future, which it does not have "
            "when it generates.",
            "the triangle that is kept.",
        ),
        Mistake(
            "rows and columns exchanged",
            ((f"{FULL}.{CORNER}", f"{FULL.replace('n_query, n_key', 'n_key, n_query')}.{CORNER}"),),
            "The mask has a row for each key and a column for each query.",
            "for as many keys as queries nothing shows. With a cache, it does not fit the scores.",
            "the order of the two sizes.",
        ),
        Mistake(
            "device forgotten",
            ((", device=device)", ")"),),
            "The mask is right, but always on the CPU.",
            "scores on a GPU cannot be added to it.",
            "the argument device, and where it is used.",
        ),
    ),
    rewrites=(
        Rewrite(
            "positions compared",
            """
def causal_mask(n_query, n_key, device):
    query = torch.arange(n_key - n_query, n_key, device=device)[:, None]
    key = torch.arange(n_key, device=device)[None, :]
    return torch.where(key > query, -torch.inf, 0.0)
""",
        ),
        Rewrite(
            "logarithm of ones and zeros",
            ((f"{FULL}.{CORNER}", "torch.ones(n_query, n_key, device=device).tril(n_key - n_query).log()"),),
        ),
        Rewrite(
            "a large number for infinity",
            """
def causal_mask(n_query, n_key, device):
    mask = torch.zeros(n_query, n_key, device=device)
    later = torch.ones_like(mask).triu(diagonal=1 + n_key - n_query).bool()
    return mask.masked_fill(later, torch.finfo(mask.dtype).min)
""",
        ),
        Rewrite(
            "the last rows of a square",
            """
def causal_mask(n_query, n_key, device):
    square = torch.nn.Transformer.generate_square_subsequent_mask(n_key, device=device)
    return square[-n_query:]
""",
        ),
        Rewrite(
            "a loop that counts from the first key",
            """
def causal_mask(n_query, n_key, device):
    mask = torch.zeros(n_query, n_key, device=device)
    for i in range(n_query):
        mask[i, i + 1 :] = float("-inf")
    return mask
""",
            mistake="upper-left corner",
        ),
        Rewrite(
            "the first rows of a square",
            """
def causal_mask(n_query, n_key, device):
    allowed = torch.tril(torch.ones(n_key, n_key, device=device))[:n_query]
    return torch.zeros_like(allowed).masked_fill(allowed == 0, float("-inf"))
""",
            mistake="upper-left corner",
        ),
        Rewrite(
            "strictly earlier positions",
            """
def causal_mask(n_query, n_key, device):
    query = torch.arange(n_key - n_query, n_key, device=device)[:, None]
    allowed = torch.arange(n_key, device=device) < query
    return torch.zeros(allowed.shape, device=device).masked_fill_(~allowed, -math.inf)
""",
            mistake="own token hidden",
        ),
    ),
)

# ---- 0.2 MLP and block


DROPPED = 0.999999
"""A probability of dropping at which nothing is left of a few hundred numbers; 1 is not allowed."""


def mlp_of(m):
    """An MLP whose hidden numbers are of about the size at which the two forms of GELU differ most."""
    mlp = m.MLP(m.GPTConfig(n_head=6, n_embd=48)).eval()
    randomize(mlp)
    return mlp


def mlps(m):
    return {"mlp [batch, position, dimension]": mlp_of(m)(random(2, 5, 48, seed=1))}


def block_of(m, dropout=0.0):
    sizes = {"vocab_size": 29, "block_size": 12, "n_layer": 1, "n_head": 6, "n_embd": 48, "norm_eps": 0.1}
    config = m.GPTConfig(**sizes, dropout=dropout)
    block = m.Block(config, 0).eval()
    randomize(block)
    return block, config


def blocks(m):
    """A block on an input whose mean is not 0; with a cache; and with a dropout that drops everything."""
    block, config = block_of(m)
    x, mask = random(2, 7, 48, seed=1, mean=0.5), m.causal_mask(7, 7, "cpu")
    given = x.clone()
    found = {"block [batch, position, dimension]": block(given, mask, None), "the input afterwards": given}
    cache = m.KVCache(config, 2, 7, "cpu", torch.float32)
    block(x, mask, cache)
    found["keys in the cache [layer, batch, head, position, dimension]"] = cache.keys
    dropping = block_of(m, DROPPED)[0].train()
    found["block when every output is dropped [batch, position, dimension]"] = dropping(x, mask, None)
    return found


def zero_outputs_change_nothing(m):
    """If attention and MLP add 0, the block returns its input."""
    block, _ = block_of(m)
    for layer in (block.self_attn.o_proj, block.mlp.down_proj):
        layer.weight.data.zero_()
        layer.bias.data.zero_()
    x = random(2, 7, 48, seed=1)
    return properties.close(block(x, m.causal_mask(7, 7, "cpu"), None), x)


def block_has_no_leak(m):
    block, _ = block_of(m)
    x, mask = random(2, 7, 48, seed=1), m.causal_mask(7, 7, "cpu")
    changed = x.clone()
    changed[:, 4:] += 1
    return properties.close(block(x, mask, None)[:, :4], block(changed, mask, None)[:, :4])


def scale_is_read_through_norms(m):
    """What a block adds hardly changes when a large input is doubled, since it reads a normed copy."""
    block, _ = block_of(m)
    x, mask = random(2, 7, 48, seed=1, scale=1000.0), m.causal_mask(7, 7, "cpu")
    block.mlp.down_proj.weight.data.zero_()  # its input contains what attention has added
    return bool((block(x, mask, None) - x - (block(2 * x, mask, None) - 2 * x)).abs().max() < 0.1)


GELU = 'F.gelu(self.up_proj(x), approximate="tanh")'
FIRST = "x = x + self.dropout(self.self_attn(self.input_layernorm(x), mask, cache))"
SECOND = "x = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))"

BLOCK = Exercise(
    number="0.2",
    title="MLP and block",
    minutes=20,
    functions=("MLP.forward", "Block.forward"),
    question="A block adds to the residual stream twice. What does each of the two parts read, and to "
    "what is its output added? And what would two linear layers be worth without anything between them?",
    shapes="x (B, T, n_embd) -> the same shape. MLP: W₂ gelu(W₁ x + b₁) + b₂, with GELU in its tanh form, "
    "as in GPT-2. Block: x + attention(norm₁(x)), then x + mlp(norm₂(x)), where the second x contains the "
    "first sum.",
    steps="1. MLP: project up, apply GELU (in the form with tanh), project down.\n"
    "2. Block: norm x with input_layernorm, call self_attn with mask and cache, apply dropout, and add the "
    "result to x itself.\n"
    "3. Norm the sum with post_attention_layernorm, call mlp, apply dropout, and add again.",
    afterwards="The input reaches the end of the model through additions only, so gradients reach the first "
    "layer through a sum. That is why a hundred layers can be trained.",
    probes=(mlps, blocks),
    properties={
        "if attention and MLP give 0, the block returns its input": zero_outputs_change_nothing,
        "no position sees a later one": block_has_no_leak,
        "attention does not notice the scale of a large input": scale_is_read_through_norms,
    },
    mistakes=(
        Mistake(
            "exact gelu",
            ((', approximate="tanh"', ""),),
            "The nonlinearity is the exact GELU. GPT-2 uses the form with tanh.",
            "they differ by less than 0.0005, so a model trained from scratch does not care. Weights trained "
            "with one give slightly other numbers with the other.",
            "the arguments of GELU.",
        ),
        Mistake(
            "relu",
            ((GELU, "F.relu(self.up_proj(x))"),),
            "The nonlinearity is ReLU.",
            "its gradient is exactly 0 for negative inputs. GPT-2 uses GELU, which is smooth there.",
            "the function between the two layers.",
        ),
        Mistake(
            "silu",
            ((GELU, "F.silu(self.up_proj(x))"),),
            "The nonlinearity is SiLU.",
            "stage 3 will use it, with a gate. GPT-2 uses GELU.",
            "the function between the two layers.",
        ),
        Mistake(
            "no nonlinearity",
            ((GELU, "self.up_proj(x)"),),
            "There is no nonlinearity between the two layers.",
            "two matrices in a row are one matrix: the additional width would be wasted.",
            "what happens between the two layers of the MLP.",
        ),
        Mistake(
            "nonlinearity at the end",
            ((f"self.down_proj({GELU})", 'F.gelu(self.down_proj(self.up_proj(x)), approximate="tanh")'),),
            "GELU comes after the second layer, not between the two.",
            "two matrices in a row are one, and almost nothing negative could be added to the residual "
            "stream.",
            "the order of the three operations.",
        ),
        Mistake(
            "post-norm",
            (
                (FIRST, "x = self.input_layernorm(x + self.dropout(self.self_attn(x, mask, cache)))"),
                (SECOND, "x = self.post_attention_layernorm(x + self.dropout(self.mlp(x)))"),
            ),
            "The sums are normed, not the inputs of attention and MLP.",
            "that is the first transformer of 2017. Every norm is then in the way of the residual stream, "
            "and deep models need a slow start to train at all.",
            "what each norm is applied to.",
        ),
        Mistake(
            "norm of the outputs",
            (
                (FIRST, "x = x + self.dropout(self.input_layernorm(self.self_attn(x, mask, cache)))"),
                (SECOND, "x = x + self.dropout(self.post_attention_layernorm(self.mlp(x)))"),
            ),
            "The outputs of attention and MLP are normed, not their inputs.",
            "the residual stream grows from layer to layer, and each layer would read it at another scale.",
            "what each norm is applied to.",
        ),
        Mistake(
            "attention's residual missing",
            ((FIRST, FIRST.replace("x = x + ", "x = ")),),
            "After attention, only its output is left: x is not added.",
            "a token would forget itself unless attention happens to copy it, and gradients would have to "
            "pass through every layer's attention.",
            "what the output of attention is added to.",
        ),
        Mistake(
            "mlp's residual missing",
            ((SECOND, SECOND.replace("x = x + ", "x = ")),),
            "After the MLP, only its output is left: x is not added.",
            "what attention has gathered would be lost unless the MLP copies it, and gradients would have "
            "to pass through every layer's MLP.",
            "what the output of the MLP is added to.",
        ),
        Mistake(
            "parallel",
            (
                (FIRST, f"before = x\n        {FIRST}"),
                (SECOND, SECOND.replace("layernorm(x)", "layernorm(before)")),
            ),
            "The MLP reads x as it was before attention.",
            "GPT-J and PaLM do this on purpose, to save time. In GPT-2 the MLP works on what attention "
            "has just gathered.",
            "the x that the second norm reads.",
        ),
        Mistake(
            "mlp first",
            ((f"{FIRST}\n        {SECOND}", f"{SECOND}\n        {FIRST}"),),
            "The MLP comes first, then attention.",
            "the parts are the same, but a trained model's weights expect attention first.",
            "the order of the two lines.",
        ),
        Mistake(
            "norms exchanged",
            (
                (FIRST, FIRST.replace("input_layernorm", "post_attention_layernorm")),
                (SECOND, SECOND.replace("post_attention_layernorm", "input_layernorm")),
            ),
            "The two norms are exchanged.",
            "a model trained from scratch gets away with it, since both start alike. With trained weights "
            "each part gets the other's scale.",
            "which norm belongs to which part.",
        ),
        Mistake(
            "one norm for both",
            ((SECOND, SECOND.replace("post_attention_layernorm", "input_layernorm")),),
            "The same norm is used twice, and the second one has no effect.",
            "a parameter that is never used gets no gradient, and attention and MLP must share a scale.",
            "which norm belongs to which part.",
        ),
        Mistake(
            "normed copy added to attention",
            (
                (
                    FIRST,
                    f"x = self.input_layernorm(x)\n        {FIRST.replace('self.input_layernorm(x)', 'x')}",
                ),
            ),
            "Attention's output is added to the normed x, not to x.",
            "the residual stream would be normed in every block: what earlier layers wrote is rescaled, and "
            "gradients no longer flow unchanged.",
            "whether x itself is still at hand after the first norm.",
        ),
        Mistake(
            "normed copy added to the mlp",
            (
                (
                    SECOND,
                    "x = self.post_attention_layernorm(x)\n        "
                    f"{SECOND.replace('self.post_attention_layernorm(x)', 'x')}",
                ),
            ),
            "The MLP's output is added to the normed x, not to x.",
            "the residual stream would be normed in every block: what earlier layers wrote is rescaled, and "
            "gradients no longer flow unchanged.",
            "whether x itself is still at hand after the second norm.",
        ),
        Mistake(
            "first norm forgotten",
            ((FIRST, FIRST.replace("self.input_layernorm(x)", "x")),),
            "Attention reads x itself, not its normed copy.",
            "the residual stream grows from layer to layer, and attention's scores would grow with its "
            "square.",
            "what attention is given.",
        ),
        Mistake(
            "second norm forgotten",
            ((SECOND, SECOND.replace("self.post_attention_layernorm(x)", "x")),),
            "The MLP reads x itself, not its normed copy.",
            "the residual stream grows from layer to layer, and so would the MLP's input.",
            "what the MLP is given.",
        ),
        Mistake(
            "in place",
            ((FIRST, FIRST.replace("x = x + ", "x += ")),),
            "The result is right, but the input itself is changed.",
            "whoever called the block may still need its input, and autograd refuses to differentiate "
            "some values that were changed after they had been used.",
            "operations that assign to x without making a new tensor.",
        ),
        Mistake(
            "cache not passed on",
            ((FIRST, FIRST.replace("mask, cache", "mask, None")),),
            "Without a cache all is right. With one, nothing is stored in it.",
            "attention is what fills the cache. Otherwise new tokens would see only each other.",
            "the arguments that attention gets.",
        ),
        Mistake(
            "dropout forgotten",
            ((FIRST, FIRST.replace("self.dropout", "")), (SECOND, SECOND.replace("self.dropout", ""))),
            "The dropout has no effect.",
            "without it all is right here; a model that is trained with dropout would overfit sooner than "
            "expected.",
            "the two outputs, before they are added.",
        ),
        Mistake(
            "sum dropped",
            (
                (FIRST, "x = self.dropout(x + self.self_attn(self.input_layernorm(x), mask, cache))"),
                (SECOND, "x = self.dropout(x + self.mlp(self.post_attention_layernorm(x)))"),
            ),
            "Dropout is applied to the sum, and so to the residual stream itself.",
            "what is dropped from the stream is lost to all later layers. Only the new output may be "
            "dropped.",
            "what the dropout is applied to.",
        ),
    ),
    rewrites=(
        Rewrite(
            "gelu written out",
            (
                (
                    GELU,
                    "(lambda u: 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))))"
                    "(self.up_proj(x))",
                ),
            ),
        ),
        Rewrite("a GELU module", ((GELU, "nn.GELU(approximate='tanh')(self.up_proj(x))"),)),
        Rewrite(
            "names for each step",
            """
class MLP:
    def forward(self, x):
        hidden = nn.functional.linear(x, self.up_proj.weight, self.up_proj.bias)
        return self.down_proj(nn.functional.gelu(hidden, approximate="tanh"))

class Block:
    def forward(self, x, mask, cache):
        residual = x
        x = self.input_layernorm(x)
        x = self.self_attn(x, mask, cache=cache)
        x = residual + self.dropout(x)
        residual = x
        x = self.post_attention_layernorm(x)
        x = self.mlp(x)
        return residual + self.dropout(x)
""",
        ),
        Rewrite(
            "one return",
            """
class Block:
    def forward(self, x, mask, cache):
        h = self.dropout(self.self_attn(self.input_layernorm(x), mask, cache)) + x
        return self.dropout(self.mlp(self.post_attention_layernorm(h))) + h
""",
        ),
        Rewrite(
            "both parts added at once",
            """
class Block:
    def forward(self, x, mask, cache):
        attended = self.self_attn(self.input_layernorm(x), mask, cache)
        mapped = self.mlp(self.post_attention_layernorm(x))
        return x + self.dropout(attended) + self.dropout(mapped)
""",
            mistake="parallel",
        ),
        Rewrite(
            "the residual taken too late",
            """
class Block:
    def forward(self, x, mask, cache):
        h = self.input_layernorm(x)
        h = h + self.dropout(self.self_attn(h, mask, cache))
        return h + self.dropout(self.mlp(self.post_attention_layernorm(h)))
""",
            mistake="normed copy added to attention",
        ),
    ),
)

# ---- 0.3 attention


def attention_of(m, dropout=0.0):
    sizes = {"vocab_size": 29, "block_size": 12, "n_layer": 1, "n_head": 6, "n_embd": 48}
    config = m.GPTConfig(**sizes, dropout=dropout)
    attention = m.Attention(config, 0).eval()
    randomize(attention)
    return attention, config


def attentions(m):
    """As many keys as queries; dropout that drops everything, when training and when not."""
    attention, _ = attention_of(m)
    x, mask = random(2, 7, 48, seed=1), m.causal_mask(7, 7, "cpu")
    found = {"attention of a layer [batch, position, dimension]": attention(x, mask, None)}
    dropping, _ = attention_of(m, DROPPED)
    found["the same, with a dropout that is off in evaluation"] = dropping(x, mask, None)
    found["the same in training, when every weight is dropped"] = dropping.train()(x, mask, None)
    return found


def attentions_with_a_cache(m):
    """Some tokens at once, then the following ones: more keys than queries."""
    attention, config = attention_of(m)
    x, cache = random(2, 7, 48, seed=1), m.KVCache(config, 2, 7, "cpu", torch.float32)
    parts = []
    for part in x.split((4, 1, 2), dim=1):
        parts.append(attention(part, cache.mask(part.size(1)), cache))
        cache.advance(part.size(1))
    return {"attention with a cache [batch, position, dimension]": torch.cat(parts, 1)}


def heads(m):
    """The function alone: large scores, then 16 bits with a mask in 32, as under autocast."""
    q, k, v = (random(2, 6, 5, 8, seed=i, scale=1.5) for i in (1, 2, 3))
    mask = m.causal_mask(5, 5, "cpu")
    found = {"heads [batch, head, position, dimension]": m.attention(q, k, v, mask, 0.0)}
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    found["dtype of the heads for bfloat16"] = str(m.attention(q, k, v, mask, 0.0).dtype)
    return found


def attention_has_no_leak(m):
    attention, _ = attention_of(m)
    x, mask = random(2, 7, 48, seed=1), m.causal_mask(7, 7, "cpu")
    changed = x.clone()
    changed[:, 4:] += 1
    return properties.close(attention(x, mask, None)[:, :4], attention(changed, mask, None)[:, :4])


def equals_torch_s(m):
    q, k, v = (random(2, 6, 5, 8, seed=i) for i in (1, 2, 3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return properties.close(m.attention(q, k, v, m.causal_mask(5, 5, "cpu"), 0.0), expected)


def cached_attention_is_the_same(m):
    attention, _ = attention_of(m)
    x, mask = random(2, 7, 48, seed=1), m.causal_mask(7, 7, "cpu")
    return properties.close(*attentions_with_a_cache(m).values(), attention(x, mask, None))


SCALED = "(q * q.size(3) ** -0.5)"
SOFTMAX = "F.softmax(scores, dim=-1)"
CUT = ".view(B, T, -1, self.head_dim).transpose(1, 2)"
JOINED = "y.transpose(1, 2).reshape(B, T, -1)"

ATTENTION = Exercise(
    number="0.3",
    title="Attention",
    minutes=40,
    functions=("attention", "Attention.forward"),
    question="Each token asks a question (query) and offers a label (key) and a content (value). How does a "
    "token turn its query and all keys into weights that add up to 1? And what must happen to a vector of 48 "
    "numbers so that 6 heads of 8 do this apart from each other?",
    shapes="attention: q (B, n_head, T, head_dim), k and v (B, n_head, S, head_dim) -> softmax(q kᵀ / "
    "√head_dim + mask) v, with scores (B, n_head, T, S). forward: x (B, T, n_embd) -> q, k, v (B, n_head, "
    "T, head_dim) -> y (B, n_head, T, head_dim) -> (B, T, n_embd).",
    steps="1. Scores: q times k with its last two dimensions exchanged, divided by the root of head_dim, "
    "plus the mask.\n"
    "2. Take the softmax over the keys, and drop some weights with the given probability.\n"
    "3. Convert the weights to v's dtype (the mask made them float32), and average v with them.\n"
    "4. In forward: project x to q, k and v, and cut each into heads: (B, T, n_head, head_dim), then move "
    "the heads before the positions.\n"
    "5. If there is a cache, give it k and v, and go on with what it returns.\n"
    "6. Call attention, with self.dropout in training and 0 otherwise. Move the heads back behind the "
    "positions, join them, and apply o_proj.",
    afterwards="This is the only place in the model where tokens meet. Stages 2, 4, 5 and 7 each change "
    "something in these lines, and nothing else does.",
    probes=(attentions, heads, attentions_with_a_cache),
    properties={
        "no position sees a later one": attention_has_no_leak,
        "the heads are those of torch's attention": equals_torch_s,
        "with a cache the outputs are the same": cached_attention_is_the_same,
    },
    mistakes=(
        Mistake(
            "no scale",
            ((SCALED, "q"),),
            "The scores are not divided by the root of head_dim.",
            "a sum of head_dim products grows with that root. Unscaled, the softmax saturates, and its "
            "gradients vanish in wide heads.",
            "the line that computes the scores.",
        ),
        Mistake(
            "scale without root",
            ((SCALED, "(q / q.size(3))"),),
            "The scores are divided by head_dim, not by its root.",
            "the standard deviation of a sum of head_dim products grows with the root. Divided by more, the "
            "scores are nearly equal, and every token gets nearly the same weight.",
            "the factor that scales the scores.",
        ),
        Mistake(
            "root of n_embd",
            ((SCALED, "(q * (q.size(1) * q.size(3)) ** -0.5)"),),
            "The scores are divided by the root of n_embd.",
            "a head's score is a sum over its own head_dim products. With a larger divisor, weights trained "
            "elsewhere give a flatter softmax.",
            "the width in the factor that scales the scores.",
        ),
        Mistake(
            "mask not added",
            ((" + mask", ""),),
            "Every position sees all keys, also later ones: the mask has no effect.",
            "the next token is among the inputs, so the training loss falls towards 0, and the model has "
            "learned to copy what it will not have when it generates.",
            "the line that computes the scores.",
        ),
        Mistake(
            "mask multiplied",
            ((" + mask  #", "; scores = scores.masked_fill(mask < 0, 0.0)  #"),),
            "The scores of later keys are 0, not −∞.",
            "exp(0) is 1: a score of 0 still gets a weight, so every position sees later ones.",
            "how the mask and the scores come together.",
        ),
        Mistake(
            "mask after softmax",
            ((" + mask", ""), (SOFTMAX, f"{SOFTMAX} * (mask == 0)")),
            "Later keys are removed after the softmax: the weights of a query no longer add up to 1.",
            "early positions get almost nothing, and the sum under the fraction still contains later "
            "scores, so the text leaks.",
            "whether the mask comes before or after the softmax.",
        ),
        Mistake(
            "softmax over queries",
            ((SOFTMAX, "F.softmax(scores, dim=-2)"),),
            "The weights add up to 1 over the queries of each key, not over the keys of each query.",
            "each query should get a mean of the values. This also leaks: the weight of an earlier "
            "position now depends on later ones.",
            "the dimension of the softmax, in scores (B, n_head, T, S).",
        ),
        Mistake(
            "softmax over heads",
            ((SOFTMAX, "F.softmax(scores, dim=1).nan_to_num()"),),
            "The weights add up to 1 over the heads, not over the keys of each query.",
            "each head should get a mean of the values of its own.",
            "the dimension of the softmax, in scores (B, n_head, T, S).",
        ),
        Mistake(
            "keys and queries exchanged",
            ((f"{SCALED} @ k.transpose(2, 3)", "(k * q.size(3) ** -0.5) @ q.transpose(2, 3)"),),
            "Keys ask and queries answer: the scores are those of each key with all queries.",
            "with as many keys as queries the shapes agree, and training works, since both projections "
            "are free. With a cache or with trained weights it breaks.",
            "the order of q and k in the product.",
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
            "heads averaged",
            ((SOFTMAX, "F.softmax(scores.mean(1, keepdim=True).expand_as(scores), dim=-1)"),),
            "All heads have the same weights: their scores are averaged.",
            "several heads exist so that a token can attend to several things at once.",
            "what happens to dimension 1 between the scores and the softmax.",
        ),
        Mistake(
            "one wide head",
            (
                (
                    "scores = (q * q.size(3) ** -0.5) @ k.transpose(2, 3) + mask",
                    "scores = (q.transpose(1, 2).flatten(2) @ k.transpose(1, 2).flatten(2).mT)"
                    "[:, None] * (q.size(1) * q.size(3)) ** -0.5 + mask",
                ),
            ),
            "There is one set of weights for all heads, from the full width of queries and keys.",
            "several heads exist so that a token can attend to several things at once.",
            "whether queries and keys are cut into heads before the product.",
        ),
        Mistake(
            "weights stay in 32 bits",
            (("weights.type_as(v) @ v", "weights @ v"),),
            "In float32 all is right. In bfloat16, the weights are float32 and the values are not.",
            "the mask is float32, and so is everything it is added to. A matrix product needs one dtype.",
            "the last product, and the dtype of both of its factors.",
        ),
        Mistake(
            "dropout forgotten",
            ((f"F.dropout({SOFTMAX}, dropout)", SOFTMAX),),
            "The dropout probability has no effect.",
            "without dropout all is right here, and a model trained with it would overfit sooner than "
            "expected.",
            "the weights, between the softmax and their product with v.",
        ),
        Mistake(
            "dropout in evaluation",
            (("self.dropout if self.training else 0.0", "self.dropout"),),
            "Weights are dropped in evaluation too.",
            "a trained model would give other answers each time, and worse ones. (The functional dropout "
            "does not know whether the module is training.)",
            "the last argument of attention.",
        ),
        Mistake(
            "view without transpose",
            tuple(
                (f"{x} = self.{x}_proj(x){CUT}", f"{x} = self.{x}_proj(x).view(B, -1, T, self.head_dim)")
                for x in "qkv"
            ),
            "The vectors are cut into heads without moving the dimension of heads: a head holds pieces of "
            "several positions.",
            "the shapes agree, and the key of one position contains later tokens: the text leaks.",
            "the lines that cut q, k and v into heads.",
        ),
        Mistake(
            "heads split the other way",
            tuple(
                (
                    f"{x} = self.{x}_proj(x){CUT}",
                    f"{x} = self.{x}_proj(x).view(B, T, self.head_dim, -1).permute(0, 3, 1, 2)",
                )
                for x in "qkv"
            ),
            "A head holds every sixth number, not eight neighbours.",
            "a model trained from scratch does not care which rows form a head. Weights trained elsewhere "
            "have neighbouring rows in a head.",
            "the order of the number of heads and head_dim where the width is split.",
        ),
        Mistake(
            "not transposed back",
            ((JOINED, "y.reshape(B, T, -1)"),),
            "The heads are joined without moving the positions back: an output holds pieces of several "
            "positions.",
            "the shapes agree, and a position's output contains later tokens: the text leaks.",
            "the line that joins the heads.",
        ),
        Mistake(
            "output projection forgotten",
            ((f"self.o_proj({JOINED})", JOINED),),
            "The output projection is not applied.",
            "it is what mixes the heads; without it each head writes to its own slice of the residual "
            "stream.",
            "the last line of forward.",
        ),
        Mistake(
            "cache not used",
            (("if cache is not None:", "if False:"),),
            "Without a cache all is right. With one, neither are keys stored nor earlier ones seen.",
            "then a new token would know nothing of the text before it.",
            "what happens to k and v if there is a cache.",
        ),
    ),
    rewrites=(
        Rewrite(
            "einsum, scores scaled afterwards",
            """
def attention(q, k, v, mask, dropout):
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) / math.sqrt(k.shape[-1])
    weights = torch.nn.functional.dropout((scores + mask).softmax(-1), p=dropout)
    return torch.einsum("bhts,bhsd->bhtd", weights.to(v.dtype), v)
""",
        ),
        Rewrite(
            "torch's attention",
            """
def attention(q, k, v, mask, dropout):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype), dropout_p=dropout)
""",
        ),
        Rewrite(
            "masked_fill with the lowest number",
            ((" + mask  #", "; scores = scores.masked_fill(mask < 0, torch.finfo(scores.dtype).min)  #"),),
        ),
        Rewrite(
            "one product for q, k and v, chunks for heads",
            """
class Attention:
    def forward(self, x, mask, cache):
        layers = (self.q_proj, self.k_proj, self.v_proj)
        qkv = F.linear(x, torch.cat([p.weight for p in layers]), torch.cat([p.bias for p in layers]))
        q, k, v = (torch.stack(t.split(self.head_dim, dim=-1), dim=1) for t in qkv.chunk(3, dim=-1))
        if cache:
            k, v = cache.update(self.layer_idx, k, v)
        y = attention(q, k, v, mask, self.dropout * self.training)
        return self.o_proj(torch.cat(y.unbind(1), dim=-1))
""",
        ),
        Rewrite(
            "a loop over heads",
            """
class Attention:
    def forward(self, x, mask, cache):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).permute(0, 2, 1, 3) for t in (q, k, v))
        if cache is not None:
            k, v = cache.update(self.layer_idx, k, v)
        p = self.dropout if self.training else 0
        y = [attention(q[:, h : h + 1], k[:, h : h + 1], v[:, h : h + 1], mask, p) for h in range(q.shape[1])]
        return self.o_proj(torch.cat(y, dim=1).transpose(1, 2).flatten(2))
""",
        ),
        Rewrite(
            "einsum without scale",
            """
def attention(q, k, v, mask, dropout):
    scores = torch.einsum("bhtd,bhsd->bhts", q, k)
    weights = F.dropout((scores + mask).softmax(-1), dropout)
    return torch.einsum("bhts,bhsd->bhtd", weights.to(v.dtype), v)
""",
            mistake="no scale",
        ),
        Rewrite(
            "torch's attention with another scale",
            """
def attention(q, k, v, mask, dropout):
    return F.scaled_dot_product_attention(q, k, v, mask.to(q.dtype), dropout, scale=1 / q.size(-1))
""",
            mistake="scale without root",
        ),
        Rewrite(
            "torch's attention without a mask",
            """
def attention(q, k, v, mask, dropout):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
""",
            mistake="mask not added",
        ),
    ),
)

# ---- 0.4 the cache


def cache_config(m):
    return m.GPTConfig(vocab_size=29, block_size=20, n_layer=2, n_head=3, n_embd=12)


def caches(m):
    """Two layers, filled in three steps: what a model asks of a cache, and gets from it."""
    cache, found, start = m.KVCache(cache_config(m), 2, 30, "cpu", torch.float64), {}, 0
    for n in (4, 1, 3):
        at = f"of {n} tokens after {start}"
        found[f"positions {at}"] = cache.positions(n)
        found[f"mask {at} [query, key]"] = cache.mask(n)
        for layer in (0, 1):
            k = random(2, 3, n, 4, seed=10 * start + layer).double()
            v = random(2, 3, n, 4, seed=10 * start + layer + 5).double()
            keys, values = cache.update(layer, k, v)
            same = keys.data_ptr() == values.data_ptr()
            found["keys and values"] = "share their memory" if same else "have memory of their own"
            for kind, value in (("keys", keys), ("values", values)):
                name = f"{kind} of layer {layer}, after the update {at} [batch, head, position, dimension]"
                found[name] = value.clone()
        cache.advance(n)
        start += n
        found[f"length after {start} tokens"] = cache.length
    return found


def full_caches(m):
    """8 of 9 places are taken."""
    cache = m.KVCache(cache_config(m), 1, 9, "cpu", torch.float32)
    cache.advance(8)
    found = {"the last token that fits": refused(lambda: cache.positions(1))}
    return found | {"one token too many": refused(lambda: cache.positions(2))}


def sizes_of_caches(m):
    """Bytes for several sizes; the device."""
    config, found = cache_config(m), {}
    for batch_size, max_length, dtype in ((2, 9, torch.float32), (1, 30, torch.bfloat16)):
        cache = m.KVCache(config, batch_size, max_length, "cpu", dtype)
        kind = str(dtype).removeprefix("torch.")
        found[f"bytes for {batch_size} sequences of {max_length} tokens in {kind}"] = cache.nbytes
        found[f"max_length of a cache for {max_length} tokens"] = cache.max_length
    cache = m.KVCache(config, 1, 9, "meta", torch.float32)
    found["device of the positions of a cache on the device meta"] = str(cache.positions(2).device)
    return found


def refused(call) -> str:
    """What a call with impossible sizes does: it should raise a ValueError."""
    try:
        call()
    except ValueError:
        return "refused"
    except Exception as error:
        return f"fails with {type(error).__name__}"
    return "accepted"


CACHE = Exercise(
    number="0.4",
    title="The KV cache",
    minutes=30,
    functions=(
        "KVCache.__init__",
        "KVCache.nbytes",
        "KVCache.positions",
        "KVCache.mask",
        "KVCache.update",
        "KVCache.advance",
    ),
    question="Ten tokens have been read, and an eleventh comes. Which of its three vectors q, k and v "
    "will later tokens need? And while the eleventh passes through 12 layers, when may the cache count it?",
    shapes="keys and values: (n_layer, B, n_head, max_length, head_dim) each, at first all 0. positions: "
    "length to length + n_new − 1. mask: causal, (n_new, length + n_new). update: k and v (B, n_head, "
    "n_new, head_dim) -> those of all tokens so far, (B, n_head, length + n_new, head_dim).",
    steps="1. Make both tensors, and remember max_length; length is 0. Their bytes are those of both.\n"
    "2. positions continues after the tokens counted so far. More than max_length is a ValueError.\n"
    "3. mask is causal_mask with n_new queries, and with all keys, old and new.\n"
    "4. update writes the new keys and values of a layer behind the old ones, and returns all up to "
    "there. It does not count them, since other layers are still to come.\n"
    "5. advance counts.",
    afterwards="With a cache, a new token costs the same work in each matrix, however long the text is; only "
    "attention still reads all of it. The price is memory, and stages 4 and 7 are about making it smaller.",
    probes=(caches, full_caches, sizes_of_caches),
    properties={"with a cache the logits are the same": properties.cache_equals_no_cache},
    mistakes=(
        Mistake(
            "positions from 0",
            (("torch.arange(self.length, self.length + n_new,", "torch.arange(0, n_new,"),),
            "The positions of new tokens begin at 0 again.",
            "each new token would be taken for the first word of the text. Generated text then repeats "
            "itself.",
            "where positions begins to count.",
        ),
        Mistake(
            "one position too far",
            (
                (
                    "torch.arange(self.length, self.length + n_new,",
                    "torch.arange(self.length + 1, self.length + n_new + 1,",
                ),
            ),
            "The positions are one too high.",
            "the first token is at position 0, and it is there in training too.",
            "where positions begins to count.",
        ),
        Mistake(
            "too many accepted",
            (("if self.length + n_new > self.max_length:", "if n_new > self.max_length:"),),
            "More tokens than the cache has room for are accepted.",
            "without this check, the error comes later and elsewhere, in shapes that do not fit.",
            "which number is compared with max_length.",
        ),
        Mistake(
            "last slot unused",
            (("self.length + n_new > self.max_length", "self.length + n_new >= self.max_length"),),
            "The last token that fits is refused.",
            "a cache for max_length tokens has room for exactly so many.",
            "the comparison with max_length.",
        ),
        Mistake(
            "mask among new tokens",
            (("causal_mask(n_new, self.length + n_new,", "causal_mask(n_new, n_new,"),),
            "The mask has a column for each new token only.",
            "the scores have a column for each key, also for the earlier ones, which all new tokens see.",
            "the number of keys that mask counts.",
        ),
        Mistake(
            "mask hides nothing",
            (
                (
                    "causal_mask(n_new, self.length + n_new, self.keys.device)",
                    "torch.zeros((n_new, self.length + n_new), device=self.keys.device)",
                ),
            ),
            "The mask hides nothing.",
            "that is right for a single token, which sees everything. Several at once must not see each "
            "other's future.",
            "the mask of several new tokens.",
        ),
        Mistake(
            "only new keys returned",
            (("return keys, values", "return k, v"),),
            "update returns the new keys and values only.",
            "the new tokens would see each other and nothing before them, although it is stored.",
            "what update returns.",
        ),
        Mistake(
            "whole buffer returned",
            (("return keys, values", "return self.keys[layer_idx], self.values[layer_idx]"),),
            "update returns all slots, also those that are still empty.",
            "an empty slot holds zeros: a key like any other, which gets some weight.",
            "where the returned tensors end.",
        ),
        Mistake(
            "written at the front",
            (
                ("keys[:, :, self.length :] = k", "keys[:, :, : k.size(2)] = k"),
                ("values[:, :, self.length :] = v", "values[:, :, : v.size(2)] = v"),
            ),
            "New keys and values are written at the front, over the earliest ones.",
            "the beginning of the text is lost, and the slots for the new tokens stay empty.",
            "the slots that update writes to.",
        ),
        Mistake(
            "keys stored as values",
            (("values[:, :, self.length :] = v", "values[:, :, self.length :] = k"),),
            "The values that come back are the keys.",
            "a key says what a token can be found by, and a value what it has to say.",
            "the two lines that write.",
        ),
        Mistake(
            "values stored as keys",
            (("keys[:, :, self.length :] = k", "keys[:, :, self.length :] = v"),),
            "The keys that come back are the values.",
            "a key says what a token can be found by, and a value what it has to say.",
            "the two lines that write.",
        ),
        Mistake(
            "exchanged when returned",
            (("return keys, values", "return values, keys"),),
            "Keys and values come back in the other order.",
            "the caller unpacks keys first, then values.",
            "the order of what update returns.",
        ),
        Mistake(
            "one storage for all layers",
            (
                (
                    "self.keys[layer_idx, :, :, :end], self.values[layer_idx, :, :, :end]",
                    "self.keys[0, :, :, :end], self.values[0, :, :, :end]",
                ),
            ),
            "All layers use the storage of the first one.",
            "each layer has its own keys and values. Here, every layer overwrites those of the one "
            "before, and the first layer reads the last one's at the next token.",
            "how the layer is chosen in update.",
        ),
        Mistake(
            "never advances",
            (("self.length += n_new", "pass"),),
            "The length stays 0.",
            "each new token would overwrite the one before, at the same position.",
            "what advance changes.",
        ),
        Mistake(
            "length replaced",
            (("self.length += n_new", "self.length = n_new"),),
            "The length is the number of tokens of the last call.",
            "it must grow: it says where the next token is written, and at which position it stands.",
            "what advance changes.",
        ),
        Mistake(
            "advances per layer",
            (("        return keys, values", "        self.length = end\n        return keys, values"),),
            "The length grows with each layer that stores a token, and again at the end.",
            "the second layer then writes one place too far. The length may grow once per token, after "
            "all layers.",
            "whether update changes the length.",
        ),
        Mistake(
            "advances in update alone",
            (
                ("        return keys, values", "        self.length = end\n        return keys, values"),
                ("self.length += n_new", "pass"),
            ),
            "The length grows with each layer that stores a token, in update.",
            "the second layer then writes one place too far. The length may grow once per token, after "
            "all layers: in advance.",
            "whether update changes the length.",
        ),
        Mistake(
            "bytes of keys alone",
            (("self.keys.nbytes + self.values.nbytes", "self.keys.nbytes"),),
            "The bytes are those of the keys only.",
            "the values take as much again, and whoever plans memory with this number runs out of it.",
            "nbytes.",
        ),
        Mistake(
            "elements instead of bytes",
            (("self.keys.nbytes + self.values.nbytes", "self.keys.numel() + self.values.numel()"),),
            "The number of elements is given, not of bytes.",
            "an element takes 4 bytes in float32, and 2 in 16 bits.",
            "nbytes.",
        ),
        Mistake(
            "as long as the model",
            (("config.n_head, max_length,", "config.n_head, config.block_size,"),),
            "The cache always has room for block_size tokens, not for max_length.",
            "it is made for one task: for a short answer it would take memory for the longest, and a "
            "longer one than block_size would not fit.",
            "the shape of the two tensors.",
        ),
        Mistake(
            "dtype forgotten",
            (
                (
                    "self.keys = torch.zeros(shape, device=device, dtype=dtype)",
                    "self.keys = torch.zeros(shape, device=device)",
                ),
                (
                    "self.values = torch.zeros(shape, device=device, dtype=dtype)",
                    "self.values = torch.zeros(shape, device=device)",
                ),
            ),
            "The cache is float32, whatever dtype is asked for.",
            "a model in 16 bits would need twice the memory, and its keys would come back in a dtype that "
            "its queries do not have.",
            "how the two tensors are made.",
        ),
        Mistake(
            "one tensor for both",
            (("self.values = torch.zeros(shape, device=device, dtype=dtype)", "self.values = self.keys"),),
            "Keys and values share their memory: what is written last overwrites both.",
            "a second name for a tensor is not a second tensor.",
            "how the two tensors are made.",
        ),
    ),
    rewrites=(
        Rewrite(
            "one tensor cut in two",
            """
class KVCache:
    def __init__(self, config, batch_size, max_length, device, dtype):
        size = (2, config.n_layer, batch_size, config.n_head, max_length, config.n_embd // config.n_head)
        self.keys, self.values = torch.zeros(size, device=device, dtype=dtype).unbind()
        self.length, self.max_length = 0, max_length

    @property
    def nbytes(self):
        return 2 * self.keys.numel() * self.keys.element_size()
""",
        ),
        Rewrite(
            "copied and narrowed",
            """
class KVCache:
    def update(self, layer_idx, k, v):
        old, new = self.length, k.shape[2]
        for buffer, fresh in ((self.keys, k), (self.values, v)):
            buffer[layer_idx].narrow(2, old, new).copy_(fresh)
        return tuple(buffer[layer_idx].narrow(2, 0, old + new) for buffer in (self.keys, self.values))
""",
        ),
        Rewrite(
            "concatenated",
            """
class KVCache:
    def __init__(self, config, batch_size, max_length, device, dtype):
        shape = (config.n_layer, batch_size, config.n_head, max_length, config.n_embd // config.n_head)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self.max_length, self.length = max_length, 0

    def positions(self, n_new):
        if self.max_length - self.length < n_new:
            raise ValueError("full")
        return self.length + torch.arange(n_new, device=self.keys.device)

    def update(self, layer_idx, k, v):
        k = torch.cat((self.keys[layer_idx, :, :, : self.length], k), dim=2)
        v = torch.cat((self.values[layer_idx, :, :, : self.length], v), dim=2)
        self.keys[layer_idx, :, :, : k.size(2)] = k
        self.values[layer_idx, :, :, : v.size(2)] = v
        return k, v
""",
        ),
        Rewrite(
            "written to the first slots by copy_",
            """
class KVCache:
    def update(self, layer_idx, k, v):
        new, end = k.shape[2], self.length + k.shape[2]
        self.keys[layer_idx].narrow(2, 0, new).copy_(k)
        self.values[layer_idx].narrow(2, 0, new).copy_(v)
        return self.keys[layer_idx][:, :, :end], self.values[layer_idx][:, :, :end]
""",
            mistake="written at the front",
        ),
        Rewrite(
            "counted by slices",
            """
class KVCache:
    def update(self, layer_idx, k, v):
        start, self.length = self.length, self.length + k.shape[-2]
        self.keys[layer_idx, :, :, start : self.length] = k
        self.values[layer_idx, :, :, start : self.length] = v
        return self.keys[layer_idx, :, :, : self.length], self.values[layer_idx, :, :, : self.length]

    def advance(self, n_new):
        return
""",
            mistake="advances in update alone",
        ),
    ),
)

# ---- 0.5 the model: loss and initial weights


def losses_of(m):
    """Logits and losses with targets to ignore, without targets, and with a cache; what is impossible."""
    model, idx = small_model(m), tokens(2, 11)
    targets = tokens(2, 11, seed=4)
    targets[0, 3:7] = targets[1, 9] = -1
    logits, losses = model(idx, targets)
    found = {"logits [batch, position, token]": logits, "names of the losses": ", ".join(losses)}
    found["loss with 5 targets to ignore"] = losses["next_token"]
    found["names of the losses without targets"] = ", ".join(model(idx)[1]) or "none"
    found["too many tokens"] = refused(lambda: model(tokens(1, 13)))
    cache = model.new_cache(1, 20)
    model(tokens(1, 9), cache=cache)
    found["too many tokens, most of them in the cache"] = refused(lambda: model(tokens(1, 4), cache=cache))
    dropping = small_model(m, dropout=DROPPED).train()
    found["logits in training, when all embeddings are dropped [batch, position, token]"] = dropping(idx)[0]
    return found


def logits_with_a_cache(m):
    logits, cache = in_steps(small_model(m), tokens(2, 11), (4, 1, 1, 5))
    return {"logits with a cache [batch, position, token]": logits, "length of the cache": cache.length}


def initial_weights(m):
    """The shapes of all parameters, whether the head is tied, and how large the initial numbers are."""
    sizes = {"vocab_size": 64, "block_size": 64, "n_layer": 3, "n_head": 2, "n_embd": 64}
    model, found = m.GPT(m.GPTConfig(**sizes)), {}
    for name, weight in model.state_dict(keep_vars=True).items():
        found[f"shape of {name}"] = tuple(weight.shape)
        found[f"standard deviation of {name} at the start, about"] = size_of(weight, n_layer=3)
    same = model.lm_head.weight is model.model.embed_tokens.weight
    found["head and token embedding"] = "one tensor" if same else "two tensors"
    model = m.GPT(m.GPTConfig(**sizes, tie_word_embeddings=False))
    same = model.lm_head.weight is model.model.embed_tokens.weight
    found["head and token embedding, not to be tied"] = "one tensor" if same else "two tensors"
    return found


def size_of(weight, n_layer: int) -> str:
    """The standard deviation, to within the chance of the draw. Of a constant, the constant."""
    if weight.min() == weight.max():
        return f"constant {weight.flatten()[0].item():g}"
    std = weight.std().item()
    for known in (0.02, 0.02 / math.sqrt(2 * n_layer), 0.02 / math.sqrt(n_layer), 1.0):
        if abs(std - known) < 0.08 * known:
            return f"{known:.2g}"
    return f"{std:.1g}"


def starts_undecided(m):
    """The first loss is about that of a guess among all tokens."""
    model = m.GPT(m.GPTConfig(vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=32)).eval()
    loss = model(tokens(4, 16, vocab_size=64), tokens(4, 16, seed=4, vocab_size=64))[1]["next_token"]
    return abs(loss.item() - math.log(64)) < 0.1


def ignored_targets_do_not_count(m):
    """The loss with -1 at some positions is the mean over the others."""
    model, idx, targets = small_model(m), tokens(1, 8), tokens(1, 8, seed=4)
    partly = torch.where(torch.arange(8) < 5, targets, -1)
    return properties.close(
        model(idx[:, :5], targets[:, :5])[1]["next_token"], model(idx, partly)[1]["next_token"]
    )


LOSS = "F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)"
EMBEDDED = "self.model.embed_tokens(idx) + self.model.embed_positions(positions)"
TIED = "self.lm_head.weight = self.model.embed_tokens.weight"
RESIDUAL = "std=0.02 / math.sqrt(2 * self.config.n_layer)"

MODEL = Exercise(
    number="0.5",
    title="The model: loss and initial weights",
    minutes=20,
    functions=("GPT.__init__", "GPT.init_weights", "GPT.forward"),
    question="Which token should the model predict at the last of T positions, and who shifts the text by "
    "one: the model, or whoever prepares the targets? And n_layer blocks each add two vectors to the "
    "residual stream: how does the size of the sum grow with their number?",
    shapes="idx (B, T) -> embeddings of tokens and positions, added (B, T, n_embd) -> blocks -> norm -> "
    "logits (B, T, vocab_size). The loss is the mean of −log softmax(logits)[target] over all targets "
    "that are not −1. Weights at the start: standard deviation 0.02, but 0.02 / √(2 · n_layer) in o_proj "
    "and down_proj; biases 0.",
    steps="1. In __init__, make self.model: embed_tokens, embed_positions, dropout, layers (a list of "
    "blocks) and norm; and lm_head without a bias. To tie them, make the head's weight the same tensor as "
    "the embedding's.\n"
    "2. In init_weights, draw the weights of all linear layers and embeddings, set biases to 0, then draw "
    "o_proj and down_proj again.\n"
    "3. In forward, refuse more tokens than block_size, those in the cache included.\n"
    "4. Positions and mask come from the cache, or are 0 to T − 1 and a causal T × T mask.\n"
    "5. Add both embeddings, apply dropout, call the layers one after the other, and advance the cache "
    "once.\n"
    "6. Apply norm and head. If there are targets, put their cross-entropy into losses as next_token.",
    afterwards="The targets are shifted by whoever prepares them (lab/training/batches.py), so the model "
    "does not have to. The first loss should be near the logarithm of the vocabulary's size: if it is "
    "not, look at the initial weights before anything else.",
    probes=(losses_of, logits_with_a_cache, initial_weights),
    properties={
        "no position sees a later one": properties.no_leak,
        "with a cache the logits are the same": properties.cache_equals_no_cache,
        "the first loss is about that of a guess among all tokens": starts_undecided,
        "targets of −1 do not count": ignored_targets_do_not_count,
    },
    mistakes=(
        Mistake(
            "shifted again",
            (
                (
                    "logits.flatten(0, 1), targets.flatten()",
                    "logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten()",
                ),
            ),
            "The targets are shifted by one position although they already were.",
            "the model would learn to predict the token after the next. Its loss is higher, and the text "
            "that it generates leaves out every other word.",
            "which target belongs to which position.",
        ),
        Mistake(
            "target is the input",
            (("targets.flatten(), ignore_index", "idx.flatten(), ignore_index"),),
            "The targets are the inputs.",
            "to repeat its input is easy: the loss falls quickly to 0, and the model generates the same "
            "token for ever.",
            "what the logits are compared with.",
        ),
        Mistake(
            "ignored targets counted",
            (("targets.flatten(), ignore_index=-1", "targets.flatten().clamp(0)"),),
            "A target of −1 counts as the token 0.",
            "−1 marks positions that must not teach anything, such as the question in a conversation.",
            "what happens to targets of −1.",
        ),
        Mistake(
            "divided by all positions",
            ((LOSS, LOSS.replace("=-1)", '=-1, reduction="sum") / targets.numel()')),),
            "The sum of the losses is divided by the number of all positions, also of the ignored ones.",
            "a text with many ignored positions would seem to have a low loss, and teach less than others.",
            "the number that the sum is divided by.",
        ),
        Mistake(
            "sum",
            ((LOSS, LOSS.replace("=-1)", '=-1, reduction="sum")')),),
            "The losses of all positions are added up, not averaged.",
            "loss and gradients would grow with the batch, and the learning rate would have to shrink "
            "with it.",
            "the reduction of the cross-entropy.",
        ),
        Mistake(
            "softmaxed logits",
            ((LOSS, LOSS.replace("logits.flatten(0, 1)", "logits.flatten(0, 1).softmax(-1)")),),
            "The cross-entropy is given probabilities; it takes a softmax by itself.",
            "of numbers between 0 and 1, the softmax is nearly uniform. The loss cannot fall far, and "
            "training seems to get stuck.",
            "what the cross-entropy is given.",
        ),
        Mistake(
            "final norm forgotten",
            (("self.lm_head(self.model.norm(x))", "self.lm_head(x)"),),
            "The residual stream is not normed before the head.",
            "its size grows with every layer, and so would the logits. The parameters of the last norm would "
            "have no effect.",
            "what lies between the last layer and the head.",
        ),
        Mistake(
            "positions forgotten",
            (
                (
                    "self.model.embed_tokens(idx) + self.model.embed_positions(positions)",
                    "self.model.embed_tokens(idx)",
                ),
            ),
            "The embeddings of positions are not added.",
            "attention does not know an order: apart from the mask, the model could not tell dog bites "
            "man from man bites dog.",
            "what the first layer gets.",
        ),
        Mistake(
            "token embedding scaled",
            (
                (
                    "self.model.embed_tokens(idx) +",
                    "self.model.embed_tokens(idx) * math.sqrt(self.config.n_embd) +",
                ),
            ),
            "The token embeddings are multiplied by the root of n_embd.",
            "the first transformer did so, and Gemma does. GPT-2 does not: its embeddings of positions "
            "would hardly count beside them.",
            "what the first layer gets.",
        ),
        Mistake(
            "positions from 0 with a cache",
            (("cache.positions(T), cache.mask(T)", "torch.arange(T, device=idx.device), cache.mask(T)"),),
            "With a cache, the positions begin at 0 in each call.",
            "each new token would be taken for the first word of the text.",
            "where the positions come from if there is a cache.",
        ),
        Mistake(
            "never advanced",
            (("cache.advance(T)", "pass"),),
            "The cache does not advance.",
            "each call would overwrite what the one before has stored, at the same positions.",
            "what happens to the cache after the layers.",
        ),
        Mistake(
            "advanced per layer",
            (
                (
                    "x = layer(x, mask, cache)\n        if cache is not None:\n            cache.advance(T)",
                    "x = layer(x, mask, cache)\n            if cache is not None:\n                "
                    "cache.advance(T)",
                ),
            ),
            "The cache advances after each layer, not once after all.",
            "the second layer then writes behind places that it has never filled.",
            "whether the call is inside the loop.",
        ),
        Mistake(
            "embeddings not dropped",
            (("x = self.model.dropout(x)", "pass"),),
            "The dropout of the embeddings has no effect.",
            "without it all is right here; a model that is trained with dropout would overfit sooner than "
            "expected.",
            "what happens to the embeddings before the first layer.",
        ),
        Mistake(
            "too long accepted",
            (("if length > self.config.block_size:", "if False:"),),
            "More tokens than there are positions for are not refused with a ValueError.",
            "without a message, an index out of range is all that a user sees; on a GPU, not even where.",
            "what comes before the embeddings.",
        ),
        Mistake(
            "cached tokens not counted",
            (("T if cache is None else cache.length + T", "T"),),
            "The limit ignores the tokens that are in the cache.",
            "a long answer would run out of positions in its middle, with an index out of range.",
            "the number that is compared with block_size.",
        ),
        Mistake(
            "no smaller projections",
            ((RESIDUAL, "std=0.02"),),
            "At the start, o_proj and down_proj have the same standard deviation as all others.",
            "2 · n_layer outputs are added to the residual stream, and the sum grows with the root of their "
            "number. GPT-2 divides by that root, so deep models start as calmly as shallow ones.",
            "the weights of the projections into the residual stream.",
        ),
        Mistake(
            "root of n_layer",
            ((RESIDUAL, "std=0.02 / math.sqrt(self.config.n_layer)"),),
            "The standard deviation of o_proj and down_proj is divided by the root of n_layer, not of "
            "twice that.",
            "each block adds to the residual stream twice: attention and MLP.",
            "how many vectors are added in all.",
        ),
        Mistake(
            "attention's projection alone",
            (('("o_proj.weight", "down_proj.weight")', '"o_proj.weight"'),),
            "Only o_proj starts smaller; down_proj does not.",
            "each block adds to the residual stream twice: attention and MLP.",
            "the names of the weights that are drawn again.",
        ),
        Mistake(
            "torch's weights",
            (("nn.init.normal_(module.weight, std=0.02)", "pass"),),
            "Embeddings and linear layers keep the initial weights of torch.",
            "torch draws embeddings with a standard deviation of 1. The head shares them, so the first "
            "loss is far above that of a guess.",
            "which weights init_weights draws.",
        ),
        Mistake(
            "embeddings left out",
            (("(nn.Linear, nn.Embedding)", "nn.Linear"),),
            "The embeddings of positions keep the initial weights of torch.",
            "these have a standard deviation of 1, fifty times that of the tokens: at first, the model "
            "sees little but positions. (The token embedding is the head's weight, a linear layer's.)",
            "the kinds of modules whose weights are drawn.",
        ),
        Mistake(
            "torch's biases",
            (("nn.init.zeros_(module.bias)", "pass"),),
            "The biases keep the initial values of torch, which are not 0.",
            "random constants would be added everywhere before anything is learned.",
            "the biases of the linear layers.",
        ),
        Mistake(
            "never drawn",
            (("        self.init_weights()", "        pass"),),
            "All weights are those that torch draws: init_weights is not called.",
            "torch draws embeddings with a standard deviation of 1, so the first loss is far above that "
            "of a guess.",
            "the end of __init__.",
        ),
        Mistake(
            "copied, not tied",
            ((TIED, "self.lm_head.weight = nn.Parameter(self.model.embed_tokens.weight.detach().clone())"),),
            "Head and token embedding are two tensors.",
            "a copy is equal at the start, and the first step changes each in its own way. Tied, they are "
            "one parameter that learns from both ends, and a third of a small model is saved.",
            "how the head gets its weight.",
        ),
        Mistake(
            "always tied",
            (("if config.tie_word_embeddings:", "if True:"),),
            "Head and token embedding are one tensor even if they are not to be tied.",
            "larger models have a head of their own, and their files hold both matrices.",
            "what tie_word_embeddings decides.",
        ),
        Mistake(
            "bias in the head",
            (("config.vocab_size, bias=False)", "config.vocab_size)"),),
            "The head has a bias.",
            "GPT-2 has none there, and a file of its weights has no such vector.",
            "how lm_head is made.",
        ),
        Mistake(
            "blocks shared",
            (
                (
                    "nn.ModuleList(Block(config, i) for i in range(config.n_layer))",
                    "nn.ModuleList([Block(config, 0)] * config.n_layer)",
                ),
            ),
            "All layers are one and the same block.",
            "multiplying a list copies references, not modules: the model has the parameters of a single "
            "layer, and one place in the cache.",
            "how the list of blocks is made.",
        ),
        Mistake(
            "layers not numbered",
            (("Block(config, i)", "Block(config, 0)"),),
            "Without a cache all is right. With one, all layers use the storage of the first.",
            "a layer finds its keys and values by its number.",
            "the numbers that the blocks are given.",
        ),
    ),
    rewrites=(
        Rewrite(
            "modules set one by one, log_softmax and gather",
            """
class GPT:
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.model.embed_positions = nn.Embedding(config.block_size, config.n_embd)
        self.model.dropout = nn.Dropout(config.dropout)
        self.model.layers = nn.ModuleList([Block(config, i) for i in range(config.n_layer)])
        self.model.norm = nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.model.embed_tokens.weight = self.lm_head.weight
        self.init_weights()

    def init_weights(self):
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                last = name.split(".")[-2] in ("o_proj", "down_proj")
                weight.data.normal_(0, 0.02 * ((2 * self.config.n_layer) ** -0.5 if last else 1))
            elif name.endswith("bias"):
                weight.data.zero_()

    def forward(self, idx, targets=None, cache=None):
        start, T = (cache.length if cache else 0), idx.shape[1]
        if start + T > self.config.block_size:
            raise ValueError("too long")
        x = self.model.embed_positions(torch.arange(start, start + T)) + self.model.embed_tokens(idx)
        x = self.model.dropout(x)
        mask = causal_mask(T, start + T, idx.device)
        for layer in self.model.layers:
            x = layer(x, mask, cache)
        if cache:
            cache.advance(T)
        logits = self.model.norm(x) @ self.lm_head.weight.T
        if targets is None:
            return logits, {}
        chosen = logits.log_softmax(-1).gather(-1, targets.clamp(0)[..., None])[..., 0]
        return logits, {"next_token": -chosen[targets != -1].mean()}
""",
        ),
        Rewrite(
            "drawn by apply",
            """
class GPT:
    def init_weights(self):
        def draw(module):
            if isinstance(module, nn.Linear):
                torch.nn.init.normal_(module.weight, mean=0.0, std=0.02)
                if module.bias is not None:
                    torch.nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                torch.nn.init.normal_(module.weight, mean=0.0, std=0.02)
        self.apply(draw)
        for layer in self.model.layers:
            for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
                torch.nn.init.normal_(last.weight, std=0.02 * (2 * self.config.n_layer) ** -0.5)
""",
        ),
        Rewrite(
            "sum over the targets that count",
            (
                (
                    LOSS,
                    'F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1, reduction="sum")'
                    " / (targets >= 0).sum()",
                ),
            ),
        ),
        Rewrite(
            "probabilities given to nll_loss after a second log_softmax",
            (
                (
                    LOSS,
                    "F.nll_loss(logits.softmax(-1).log_softmax(-1).view(-1, logits.size(-1)), "
                    "targets.view(-1), ignore_index=-1)",
                ),
            ),
            mistake="softmaxed logits",
        ),
        Rewrite(
            "a mask of the targets, divided by their number",
            (
                (
                    LOSS,
                    "(F.cross_entropy(logits.mT, targets.clamp(0), reduction='none') * (targets >= 0))"
                    ".mean()",
                ),
            ),
            mistake="divided by all positions",
        ),
    ),
)

# ---- the whole file


def whole_model(m):
    """Parameters and logits for several sizes, the cache's dtype, and impossible sizes."""
    found, idx = {}, tokens(2, 11)
    for bias in (True, False):
        model = small_model(m, bias=bias)
        of = "with biases" if bias else "without biases"
        found[f"parameters {of}"] = ", ".join(
            f"{n} {tuple(w.shape)}" for n, w in sorted(model.named_parameters())
        )
        found[f"logits {of} [batch, position, token]"] = model(idx)[0]
    cache = small_model(m).bfloat16().new_cache(3, 7)
    found["bytes of the cache of a model in bfloat16, for 3 sequences of 7 tokens"] = cache.nbytes
    dropping = m.GPT(m.GPTConfig(vocab_size=29, block_size=12, n_layer=1, n_head=6, n_embd=48, dropout=0.25))
    block = dropping.model.layers[0].train()
    for weight in block.parameters():
        weight.data.zero_()
    block.self_attn.o_proj.bias.data.fill_(1)  # attention adds 1 everywhere, and the MLP 0
    added = block(torch.zeros(4, 11, 48), m.causal_mask(11, 11, "cpu"), None)
    found["numbers that a dropout of 0.25 makes of 1"] = added.unique()
    found["dropout of attention, for 0.25"] = dropping.model.layers[0].self_attn.dropout
    for wrong in ({"n_embd": 50}, {"n_layer": 0}, {"vocab_size": 0}, {"dropout": 1.0}, {"dropout": -0.1}):
        sizes = {"vocab_size": 29, "block_size": 12, "n_layer": 1, "n_head": 6, "n_embd": 48} | wrong
        found[f"a config with {', '.join(f'{k} {v}' for k, v in wrong.items())}"] = refused(
            lambda sizes=sizes: m.GPTConfig(**sizes)
        )
    return found


WHOLE = Exercise(
    number="0",
    title="The whole stage",
    minutes=90,
    functions=(),
    question="Which parts does a language model consist of, from the numbers of the tokens to the loss, "
    "and in which order does a token pass through them?",
    shapes="idx (B, T) -> embeddings (B, T, n_embd) -> n_layer blocks -> norm -> logits (B, T, "
    "vocab_size). A block has two norms, attention with q_proj, k_proj, v_proj and o_proj (n_embd, "
    "n_embd), and an MLP with up_proj (4 · n_embd, n_embd) and down_proj (n_embd, 4 · n_embd). All but "
    "the head have biases, unless bias is False.",
    steps="1. Write causal_mask and attention, and check them (exercises 0.1 and 0.3).\n"
    "2. Write the layers from the inside out: MLP, Attention, Block; then KVCache; then GPT.\n"
    "3. Let GPTConfig refuse impossible sizes with a ValueError.\n"
    "4. Pass bias and norm_eps to all layers and norms, and dropout to attention, Block and GPT.",
    afterwards="This file is GPT-2: it loads OpenAI's weights, and gives the logits that they give elsewhere "
    "(tests/test_deploy.py).",
    probes=(whole_model,),
    properties={
        "no position sees a later one": properties.no_leak,
        "with a cache the logits are the same": properties.cache_equals_no_cache,
    },
    mistakes=(
        Mistake(
            "heads do not divide",
            (("if self.n_embd % self.n_head:", "if False:"),),
            "A width that the number of heads does not divide is accepted.",
            "the heads would not come out even: the error appears later and elsewhere.",
            "GPTConfig.__post_init__, and what it refuses.",
        ),
        Mistake(
            "zero accepted",
            (("if getattr(self, name) < 1:", "if getattr(self, name) < 0:"),),
            "Sizes of 0 are accepted.",
            "a model without layers or tokens fails later, with a message about something else.",
            "GPTConfig.__post_init__, and what it refuses.",
        ),
        Mistake(
            "everything dropped",
            (("if not 0 <= self.dropout < 1:", "if not 0 <= self.dropout <= 1:"),),
            "A dropout of 1 is accepted.",
            "it drops everything, and nothing can be learned.",
            "GPTConfig.__post_init__, and what it refuses.",
        ),
        Mistake(
            "dropout unchecked",
            (("if not 0 <= self.dropout < 1:", "if False:"),),
            "Dropouts that are not probabilities are accepted.",
            "the error appears later and elsewhere, or not at all.",
            "GPTConfig.__post_init__, and what it refuses.",
        ),
        Mistake(
            "cache in 32 bits",
            (("weight.device, weight.dtype)", "weight.device, torch.float32)"),),
            "The cache of a model in bfloat16 is larger than its keys and values.",
            "it should have the dtype of the model: half the memory, and what attention expects.",
            "what new_cache passes on.",
        ),
        Mistake(
            "bias of queries",
            (
                (
                    "self.q_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)",
                    "self.q_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)",
                ),
            ),
            "q_proj has no bias.",
            "in GPT-2 all linear layers but the head have one, and a file of its weights holds it.",
            "the four projections in Attention.",
        ),
        Mistake(
            "bias regardless",
            (
                (
                    "self.up_proj = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)",
                    "self.up_proj = nn.Linear(config.n_embd, 4 * config.n_embd)",
                ),
            ),
            "up_proj has a bias even if the config says that there are none.",
            "a linear layer has a bias unless told otherwise.",
            "the two layers of the MLP.",
        ),
        Mistake(
            "mlp of the same width",
            (
                (
                    "nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)",
                    "nn.Linear(config.n_embd, config.n_embd, bias=config.bias)",
                ),
                (
                    "nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)",
                    "nn.Linear(config.n_embd, config.n_embd, bias=config.bias)",
                ),
            ),
            "The MLP is as wide as the residual stream, not four times as wide.",
            "two thirds of a block's parameters are in its MLP. Trained weights do not fit another width.",
            "the two layers of the MLP.",
        ),
        Mistake(
            "eps ignored",
            (
                (
                    "self.input_layernorm = nn.LayerNorm(config.n_embd, eps=config.norm_eps, "
                    "bias=config.bias)",
                    "self.input_layernorm = nn.LayerNorm(config.n_embd, bias=config.bias)",
                ),
            ),
            "The norm before attention ignores norm_eps.",
            "torch's default happens to be GPT-2's, so this shows only with another value.",
            "the norms in Block.",
        ),
        Mistake(
            "one norm in a block",
            (
                (
                    "self.post_attention_layernorm = nn.LayerNorm(config.n_embd, eps=config.norm_eps, "
                    "bias=config.bias)",
                    "self.post_attention_layernorm = self.input_layernorm",
                ),
            ),
            "A block has one norm, used twice.",
            "attention and MLP would have to share a scale, and a file of GPT-2's weights has two norms.",
            "the norms in Block.",
        ),
        Mistake(
            "no dropout in blocks",
            (("self.dropout = nn.Dropout(config.dropout)", "self.dropout = nn.Identity()"),),
            "The outputs of attention and MLP are never dropped: only the embeddings are.",
            "a model that is trained with dropout would overfit sooner than expected.",
            "the modules that Block makes.",
        ),
        Mistake(
            "no dropout in attention",
            (("self.dropout = config.dropout", "self.dropout = 0.0"),),
            "Attention ignores the dropout of the config.",
            "a model that is trained with dropout would overfit sooner than expected.",
            "what Attention stores.",
        ),
    ),
    rewrites=(),
)

# ---- predictions


def uniform_loss() -> float:
    """The cross-entropy of equal logits over 65 characters."""
    return torch.nn.functional.cross_entropy(torch.zeros(1, 65), torch.tensor([7])).item()


def parameters() -> int:
    """Of GPT-2's smallest model, whose vocabulary has 50,257 tokens."""
    from lab import stages
    from lab.training import cost

    module = stages.load("stage0_gpt")
    with torch.device("meta"):
        return cost.parameters(module.GPT(module.GPTConfig(vocab_size=50257)))


def bytes_per_token() -> int:
    """By how much a cache of GPT-2's size grows with one more token, in 16 bits."""
    from lab import stages

    module = stages.load("stage0_gpt")
    sizes = [module.KVCache(module.GPTConfig(), 1, n, "meta", torch.bfloat16).nbytes for n in (10, 11)]
    return sizes[1] - sizes[0]


def matters_later() -> str:
    """Which of a token's three vectors change what attention gives later tokens."""
    from lab import stages

    attention = stages.load("stage0_gpt").attention
    mask = torch.full((3, 3), -torch.inf).triu(1)
    vectors = {name: random(1, 1, 3, 4, seed=i) for i, name in enumerate(("q", "k", "v"))}
    before, used = attention(*vectors.values(), mask, 0.0)[0, 0, 2], []
    for name, vector in vectors.items():
        changed = vectors | {name: vector.clone()}
        changed[name][0, 0, 0] += 1
        if not torch.equal(attention(*changed.values(), mask, 0.0)[0, 0, 2], before):
            used.append(name)
    return " and ".join(used)


QUESTIONS = (
    Question(
        "A model that has learned nothing gives each of 65 characters the same probability. What is its "
        "loss?",
        uniform_loss,
        "−log(1/65) = log 65 = {answer}. A first loss far from that means that the initial weights are "
        "wrong.",
        tolerance=0.02,
    ),
    Question(
        "How many parameters has GPT-2's smallest model: 12 layers of width 768, 50,257 tokens, 1,024 "
        "positions, tied head? (3 % off will do.)",
        parameters,
        "12 layers with 12 · 768² in matrices, and (50,257 + 1,024) · 768 in embeddings; with biases and "
        "norms {answer}.",
        tolerance=0.03,
    ),
    Question(
        "Of a token's vectors q, k and v: which does the attention of later tokens need, so that a cache "
        "must keep it?",
        matters_later,
        "{answer}: the query is used once, by the token itself.",
        choices=("q", "k", "v", "k and v", "q and k and v"),
    ),
    Question(
        "By how many bytes does the cache of this model grow with each token, with 2 bytes a number?",
        bytes_per_token,
        "2 (keys and values) · 12 layers · 768 numbers · 2 bytes = {answer}.",
    ),
)

CHAPTER = Chapter(
    number="0",
    name="stage0",
    title="GPT-2",
    source="stage0_gpt/model.py",
    exercises=(MASK, BLOCK, ATTENTION, CACHE, MODEL),
    questions=QUESTIONS,
    whole=WHOLE,
)
