"""The exercises of stage 2: rotary positions."""

import torch

from exercises import properties
from exercises.measured import CHANGES, loss_change, parameters_saved
from exercises.probe import in_steps, random, small_model, tokens
from exercises.units import Chapter, Exercise, Mistake, Question, Rewrite

# ---- 2.1 the angles


def angles(m):
    """cos and sin at a few positions, alone and in a batch."""
    positions, found = torch.tensor([0, 1, 2, 5, 9, 40]), {}
    for theta in (100.0, 10000.0):
        cos, sin = m.rotation(positions, 8, theta)
        found[f"cos for theta {theta:g} [1, position, pair]"] = cos
        found[f"sin for theta {theta:g} [1, position, pair]"] = sin
    cos, sin = m.rotation(torch.stack((positions, positions + 3)), 8, 100.0)
    found["cos in a batch [batch, 1, position, pair]"] = cos
    found["sin in a batch [batch, 1, position, pair]"] = sin
    return found


def starts_unrotated(m):
    cos, sin = m.rotation(torch.arange(3), 8, 100.0)
    return properties.close(cos[..., 0, :], torch.ones(1, 4)) and properties.close(
        sin[..., 0, :], torch.zeros(1, 4)
    )


def first_is_fastest(m):
    """The first pair rotates by 1 radian a token, and every further one more slowly."""
    _, sin = m.rotation(torch.tensor([1]), 8, 100.0)
    return abs(sin[0, 0, 0].item() - 0.8415) < 1e-3 and bool((sin[0, 0].diff() < 0).all())


ROTATION = Exercise(
    number="2.1",
    title="The angles of RoPE",
    minutes=20,
    functions=("rotation",),
    question="A clock has hands of different speeds, so that it can tell the time of the second and of the "
    "day. Each pair of dimensions is such a hand. How fast does the first pair turn, and how fast does the "
    "last?",
    shapes="Pair i of head_dim / 2 has the frequency theta^(−2i / head_dim), and at position p the angle p "
    "times that. positions (T,) -> cos and sin (1, T, head_dim/2); positions (B, T) -> (B, 1, T, "
    "head_dim/2). The dimension of size 1 stands for the heads.",
    steps="1. Make the numbers 0, 2, 4, … below head_dim, one for each pair.\n"
    "2. Divide them by head_dim, raise theta to them, and take the reciprocal: the frequencies.\n"
    "3. Multiply every position with every frequency.\n"
    "4. Insert the dimension of the heads before the last two, and return the cosine and the sine.",
    afterwards="The first pairs tell neighbouring tokens apart, the last ones distant parts of a text. A "
    "larger theta slows all but the first, for longer contexts.",
    probes=(angles,),
    properties={
        "at position 0 nothing is rotated": starts_unrotated,
        "the first pair rotates by 1 radian a token, and every further one more slowly": first_is_fastest,
    },
    mistakes=(
        Mistake(
            "exponent i/d",
            (("torch.arange(0, head_dim, 2,", "torch.arange(0, head_dim // 2,"),),
            "The exponents grow half as fast as they should: they count pairs, not dimensions.",
            "the slowest pair would turn with a period of about the root of theta, so distant positions "
            "would look alike.",
            "the numbers that are divided by head_dim.",
        ),
        Mistake(
            "half the divisor",
            (("pairs.float() / head_dim", "pairs.float() / (head_dim // 2)"),),
            "The exponents grow twice as fast as they should, up to almost 2.",
            "half of the pairs would hardly turn at all within any text.",
            "the number by which the exponents are divided.",
        ),
        Mistake(
            "growing frequencies",
            (("1 / theta ** (", "theta ** ("),),
            "The frequencies grow from pair to pair.",
            "the last pair would turn by almost theta radians a token, which is as good as random.",
            "the sign of the exponent, or the reciprocal.",
        ),
        Mistake(
            "positions from 1",
            (("(positions[..., None] * frequencies)", "((positions[..., None] + 1) * frequencies)"),),
            "The positions are counted from 1.",
            "scores only see differences, so the model works. Its cache would not fit to another program's.",
            "what is multiplied with the frequencies.",
        ),
        Mistake(
            "angle by head",
            ((".unsqueeze(-3)", ".unsqueeze(-2)"),),
            "The dimension of size 1 comes after the positions, not before them.",
            "it is multiplied with (B, heads, T, …), where the positions would fall on the heads: head 0 "
            "would get the angle of position 0.",
            "where the dimension for the heads is inserted.",
        ),
        Mistake(
            "cos and sin exchanged",
            (("angles.cos(), angles.sin()", "angles.sin(), angles.cos()"),),
            "The sine comes first, and then the cosine.",
            "at position 0 everything would be turned by a quarter.",
            "the order of what is returned.",
        ),
        Mistake(
            "theta ignored",
            (("1 / theta **", "1 / 10000.0 **"),),
            "theta has no effect: the frequencies are those of 10,000.",
            "Llama 3 uses 500,000, to reach further. Its weights would give nonsense.",
            "the base of the power.",
        ),
        Mistake(
            "full turns",
            (
                (
                    "return angles.cos(), angles.sin()",
                    "angles = 2 * torch.pi * angles\n    return angles.cos(), angles.sin()",
                ),
            ),
            "The angles are larger by 2π: positions count full turns.",
            "the first pair would be at the same angle for every position, and tell nothing.",
            "the unit of the angles: a frequency is in radians a token.",
        ),
        Mistake(
            "full width",
            (
                (
                    "angles = (positions[..., None] * frequencies).unsqueeze(-3)",
                    "angles = (positions[..., None] * torch.cat((frequencies, frequencies))).unsqueeze(-3)",
                ),
            ),
            "Each angle comes twice, once for each dimension of a pair.",
            "this is how Hugging Face writes it. rotate in this course multiplies halves, and needs each "
            "angle once.",
            "the number of frequencies: one for each pair.",
        ),
    ),
    rewrites=(
        Rewrite(
            "by exp and log",
            (
                (
                    "1 / theta ** (pairs.float() / head_dim)",
                    "torch.exp(-math.log(theta) * pairs.float() / head_dim)",
                ),
            ),
        ),
        Rewrite(
            "outer product by einsum",
            """
def rotation(positions, head_dim, theta):
    i = torch.arange(head_dim // 2, device=positions.device, dtype=torch.float32)
    w = theta ** (-2 * i / head_dim)
    a = torch.einsum("...t,f->...tf", positions.float(), w)
    a = a[None] if positions.dim() == 1 else a[:, None]
    return torch.cos(a), torch.sin(a)
""",
        ),
        Rewrite(
            "a table of polar numbers",
            """
def rotation(positions, head_dim, theta):
    frequencies = torch.pow(theta, -torch.arange(0, head_dim, 2).float() / head_dim)
    a = (positions.unsqueeze(-1) * frequencies).unsqueeze(-3)
    turned = torch.polar(torch.ones_like(a), a)
    return turned.real, turned.imag
""",
        ),
        Rewrite(
            "pairs counted by one, divided by d",
            """
def rotation(positions, head_dim, theta):
    w = [theta ** (-i / head_dim) for i in range(head_dim // 2)]
    a = (positions[..., None] * torch.tensor(w)).unsqueeze(-3)
    return a.cos(), a.sin()
""",
            mistake="exponent i/d",
        ),
    ),
)

# ---- 2.2 the rotation


def rotated(m):
    """A few heads at a few positions, in 32 and in 16 bits."""
    x, rope = random(2, 3, 6, 8, seed=1), m.rotation(torch.tensor([0, 1, 2, 5, 9, 40]), 8, 100.0)
    y = m.rotate(x, rope)
    large = m.rotate(random(2, 3, 6, 8, seed=2, scale=30.0).bfloat16(), rope)
    return {"rotated [batch, head, position, dimension]": y, "rotated in bfloat16": large}


HALVES = "x1, x2 = x.float().chunk(2, dim=-1)"
NEIGHBOURS = "x1, x2 = x.float()[..., ::2], x.float()[..., 1::2]"
TURNED = "torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)"

ROTATE = Exercise(
    number="2.2",
    title="Rotating pairs",
    minutes=20,
    functions=("rotate",),
    question="A vector (x1, x2) in the plane is turned by an angle. What are its new coordinates? And which "
    "two dimensions of a head form such a plane in this course?",
    shapes="x (B, heads, T, head_dim); cos and sin (1, T, head_dim/2), which broadcast over batch and heads. "
    "The pairs are (i, i + head_dim/2): x1 is the first half, x2 the second. New x1 = x1 cos − x2 sin, new "
    "x2 = x2 cos + x1 sin.",
    steps="1. Convert x to float32 and cut it into two halves along the last dimension.\n"
    "2. Compute the new halves with cos and sin.\n"
    "3. Put them one after the other, and convert back to x's dtype.",
    afterwards="Rotations keep lengths, and two of them add up. So the product of a rotated query and a "
    "rotated key depends on the difference of their positions, besides what the two tokens are.",
    probes=(rotated,),
    properties={
        "the length of every vector is kept": properties.norm_is_kept,
        "the product of a rotated query and key depends on their distance only": properties.distance_only,
        "at position 0 nothing is rotated": properties.position_0_is_unchanged,
    },
    mistakes=(
        Mistake(
            "neighbours paired",
            (
                (HALVES, NEIGHBOURS),
                (TURNED, "torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).flatten(-2)"),
            ),
            "The pairs are neighbours: dimension 2i with 2i + 1.",
            "this is RoPE as well, that of the paper and of Meta's code. It trains equally well, but "
            "weights made for pairs of halves need their rows reordered (exercise 2.4).",
            "how the two numbers of a pair are picked from the last dimension.",
        ),
        Mistake(
            "read as neighbours, written as halves",
            ((HALVES, NEIGHBOURS),),
            "The pairs are read as neighbours and written as halves.",
            "the dimensions change their places. Queries and keys do so alike, so scores still depend on the "
            "distance; but position 0 is no longer left alone, and other weights do not fit.",
            "how the pairs are taken apart, and how they are put together.",
        ),
        Mistake(
            "backwards",
            ((TURNED, "torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)"),),
            "The rotation goes the other way.",
            "scores still depend on the distance, so training works. Weights from elsewhere do not: to them, "
            "the next token seems to be the previous one.",
            "the two signs.",
        ),
        Mistake(
            "both signs plus",
            ((TURNED, "torch.cat((x1 * cos + x2 * sin, x2 * cos + x1 * sin), dim=-1)"),),
            "Both new coordinates are sums. One should be a difference.",
            "this is no rotation: lengths change, and a score depends on more than the distance.",
            "the two signs.",
        ),
        Mistake(
            "halves exchanged",
            ((TURNED, "torch.cat((x2 * cos + x1 * sin, x1 * cos - x2 * sin), dim=-1)"),),
            "The new halves are right and in the wrong order.",
            "queries and keys are exchanged alike, so scores agree; but at position 0 the vector should stay "
            "as it is, and a program that caches keys would disagree.",
            "the order in which the halves are put together.",
        ),
        Mistake(
            "first half only",
            ((TURNED, "torch.cat((x1 * cos - x2 * sin, x2), dim=-1)"),),
            "Only the first half is rotated.",
            "a rotation changes both coordinates. Otherwise lengths change, and a score depends on more than "
            "the distance.",
            "the second half.",
        ),
        Mistake(
            "new first used for second",
            (
                (
                    "    return " + TURNED + ".type_as(x)",
                    "    x1 = x1 * cos - x2 * sin\n    x2 = x2 * cos + x1 * sin\n"
                    "    return torch.cat((x1, x2), dim=-1).type_as(x)",
                ),
            ),
            "The second half is computed from the new first half, not from the old one.",
            "both coordinates turn at the same time. One after the other, lengths change.",
            "the order of the assignments, and names that are assigned twice.",
        ),
        Mistake(
            "in 16 bits",
            ((HALVES, "cos, sin = cos.to(x.dtype), sin.to(x.dtype)\n    x1, x2 = x.chunk(2, dim=-1)"),),
            "In float32 all is right. In bfloat16 digits are lost: cos and sin are rounded to 16 bits.",
            "bfloat16 has about 3 digits. At position 1,000 and beyond, angles that differ would have the "
            "same cosine.",
            "the dtype in which the rotation is computed.",
        ),
    ),
    rewrites=(
        Rewrite(
            "complex numbers by halves",
            """
def rotate(x, rope):
    cos, sin = rope
    x1, x2 = x.float().chunk(2, dim=-1)
    z = torch.complex(x1, x2) * torch.complex(cos, sin)
    return torch.cat((z.real, z.imag), dim=-1).type_as(x)
""",
        ),
        Rewrite(
            "rotate_half",
            """
def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)

def rotate(x, rope):
    cos, sin = (torch.cat((t, t), dim=-1) for t in rope)
    y = x.float()
    return (y * cos + rotate_half(y) * sin).to(x.dtype)
""",
        ),
        Rewrite(
            "matrices of 2 by 2",
            """
def rotate(x, rope):
    cos, sin = rope
    turn = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
    pairs = torch.stack(x.float().chunk(2, dim=-1), -1)
    y = (turn @ pairs[..., None])[..., 0]
    return torch.cat((y[..., 0], y[..., 1]), -1).to(x.dtype)
""",
        ),
        Rewrite(
            "written into an empty tensor",
            """
def rotate(x, rope):
    (cos, sin), h, y = rope, x.size(-1) // 2, torch.empty_like(x)
    a, b = x[..., :h].float(), x[..., h:].float()
    y[..., :h], y[..., h:] = a * cos - b * sin, b * cos + a * sin
    return y
""",
        ),
        Rewrite(
            "view_as_complex, as in Meta's code",
            """
def rotate(x, rope):
    cos, sin = rope
    z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(z * torch.complex(cos, sin)).flatten(3).type_as(x)
""",
            mistake="neighbours paired",
        ),
        Rewrite(
            "complex, conjugated",
            """
def rotate(x, rope):
    cos, sin = rope
    x1, x2 = x.float().chunk(2, dim=-1)
    z = torch.complex(x1, x2) * torch.complex(cos, sin).conj()
    return torch.cat((z.real, z.imag), dim=-1).type_as(x)
""",
            mistake="backwards",
        ),
    ),
)

# ---- 2.3 its place


def attention_with_cache(m):
    """One attention layer at later positions, and a model with a cache."""
    model, idx = small_model(m), tokens(2, 11)
    layer, mask = model.model.layers[0].self_attn, m.causal_mask(7, 7, "cpu")
    rope = m.rotation(torch.arange(7) + 2, 8, 10000.0)
    found = {"attention [batch, position, dimension]": layer(random(2, 7, 48, seed=1), rope, mask, None)}
    logits, cache = in_steps(model, idx, (4, 1, 1, 5))
    found["logits with a cache, a few tokens at a time [batch, position, token]"] = logits
    found["keys in the cache [layer, batch, head, position, dimension]"] = cache.keys[..., :11, :]
    return found


ROTATES = "q, k = rotate(q, rope), rotate(k, rope)"
CACHED = "            k, v = cache.update(self.layer_idx, k, v)"

PLACE = Exercise(
    number="2.3",
    title="What is rotated, and when",
    minutes=15,
    functions=("Attention.forward",),
    question="A score should depend on the distance of two tokens. Which of q, k and v take part in a score? "
    "And is a key rotated before it goes into the cache, or each time it is used?",
    shapes="q, k, v: (B, n_head, T, head_dim). rope belongs to the positions of the T new tokens only, so "
    "what comes out of the cache (B, n_head, S, head_dim) can no longer be rotated with it.",
    steps="1. Project x, and cut q, k and v into heads, as in stage 1.\n"
    "2. Rotate q and k with rope.\n"
    "3. Hand k and v to the cache, if there is one.\n"
    "4. Attend, put the heads side by side, and project.",
    afterwards="A key is rotated once, by its own position, and can then stay in the cache for good.",
    probes=(attention_with_cache,),
    properties={
        "no position sees a later one": properties.no_leak,
        "with a cache the logits are the same": properties.cache_equals_no_cache,
    },
    mistakes=(
        Mistake(
            "only queries",
            ((ROTATES, "q = rotate(q, rope)"),),
            "The queries are rotated, and the keys are not.",
            "only if both are rotated does a score depend on the distance. Here it depends on the query's "
            "position alone.",
            "what is rotated before the keys are stored.",
        ),
        Mistake(
            "only keys",
            ((ROTATES, "k = rotate(k, rope)"),),
            "The keys are rotated, and the queries are not.",
            "only if both are rotated does a score depend on the distance. Here it depends on the key's "
            "position alone.",
            "what is rotated before the scores are computed.",
        ),
        Mistake(
            "values too",
            ((ROTATES, "q, k, v = rotate(q, rope), rotate(k, rope), rotate(v, rope)"),),
            "The values are rotated too.",
            "positions should decide which tokens are read, not what is read. Rotated values depend on "
            "absolute positions, so shifting the text would change the output.",
            "the line that rotates.",
        ),
        Mistake(
            "nothing",
            ((ROTATES, "pass"),),
            "Neither queries nor keys are rotated.",
            "then nothing tells attention the order of the tokens: this stage has no other positions.",
            "the argument rope, and where it is used.",
        ),
        Mistake(
            "twice",
            ((ROTATES, "q, k = rotate(rotate(q, rope), rope), rotate(rotate(k, rope), rope)"),),
            "Queries and keys are rotated twice, so they turn at double speed.",
            "scores depend on twice the distance. It trains, and weights from elsewhere do not fit.",
            "how often rotate is called for each of them.",
        ),
        Mistake(
            "before the projection",
            (
                (ROTATES, "pass"),
                (
                    "B, T, _ = x.shape",
                    "B, T, _ = x.shape\n        heads = x.view(B, T, -1, self.head_dim).transpose(1, 2)\n"
                    "        x = rotate(heads, rope).transpose(1, 2).reshape(B, T, -1)",
                ),
            ),
            "The input is rotated, before it is projected to q, k and v.",
            "a projection mixes all dimensions, so the rotations of q and k no longer cancel to their "
            "difference.",
            "what rotate is applied to.",
        ),
        Mistake(
            "unrotated keys cached",
            (
                (ROTATES, "q, raw = rotate(q, rope), k"),
                (
                    CACHED,
                    "            k, v = cache.update(self.layer_idx, raw, v)\n        k = rotate(k, rotation("
                    "torch.arange(k.size(2)) + (2 if cache is None and T == 7 else 0), self.head_dim, "
                    "10000.0))\n"
                    "        if cache is not None:\n            pass",
                ),
            ),
            "The outputs are right, and the cache holds keys that are not rotated yet.",
            "then all earlier keys must be rotated again for every new token. A key's position never "
            "changes, so one rotation is enough.",
            "the order of rotating and storing.",
        ),
        Mistake(
            "cached keys rotated again",
            (
                (
                    CACHED,
                    CACHED + "\n            again = torch.zeros_like(k)\n"
                    "            again[:, :, :-T] = k[:, :, :-T]\n"
                    "            again = rotate(again, tuple(t[:, -1:] for t in rope))\n"
                    "            k = torch.cat((again[:, :, :-T], k[:, :, -T:]), 2)",
                ),
            ),
            "Without a cache all is right. With one, the earlier keys are rotated again at each step.",
            "a cached key has its rotation already. Turned again, it seems to be at another position.",
            "whether something that comes out of the cache is rotated.",
        ),
        Mistake(
            "new keys unrotated with a cache",
            ((ROTATES, "q = rotate(q, rope)\n        if cache is None:\n            k = rotate(k, rope)"),),
            "Without a cache all is right. With one, the keys are not rotated at all.",
            "the text that is generated is then computed with other numbers than those in training.",
            "whether the rotation depends on the cache.",
        ),
    ),
    rewrites=(
        Rewrite(
            "q and k rotated as one tensor",
            ((ROTATES, "q, k = rotate(torch.cat((q, k), dim=1), rope).chunk(2, dim=1)"),),
        ),
        Rewrite(
            "complex numbers inside",
            (
                (
                    ROTATES,
                    "z = torch.complex(*rope)\n        q, k = (torch.view_as_real(torch.complex(*t.chunk(2, "
                    "-1)) * z).mT.flatten(-2) for t in (q, k))",
                ),
            ),
        ),
        Rewrite(
            "rotated when cached or not, in two branches",
            """
class Attention:
    def forward(self, x, rope, mask, cache):
        B, T, C = x.shape
        q, k, v = (f(x).reshape(B, T, -1, self.head_dim).permute(0, 2, 1, 3)
                   for f in (self.q_proj, self.k_proj, self.v_proj))
        q = rotate(q, rope)
        if cache is None:
            k = rotate(k, rope)
        else:
            k, v = cache.update(self.layer_idx, rotate(k, rope), v)
        out = attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.o_proj(out.permute(0, 2, 1, 3).reshape(B, T, C))
""",
        ),
        Rewrite(
            "values rotated in a loop",
            """
class Attention:
    def forward(self, x, rope, mask, cache):
        B, T, C = x.shape
        q, k, v = (rotate(f(x).reshape(B, T, -1, self.head_dim).permute(0, 2, 1, 3), rope)
                   for f in (self.q_proj, self.k_proj, self.v_proj))
        if cache is not None:
            k, v = cache.update(self.layer_idx, k, v)
        out = attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.o_proj(out.permute(0, 2, 1, 3).reshape(B, T, C))
""",
            mistake="values too",
        ),
    ),
)

# ---- 2.4 other pairs


def reordered(m):
    """The weights of a layer with 3 heads of width 8."""
    weights = {
        f"self_attn.{n}.weight": random(24, 10, seed=i)
        for i, n in enumerate(("q_proj", "k_proj", "v_proj", "o_proj"))
    }
    before = {name: weight.clone() for name, weight in weights.items()}
    found = {f"{name} [row, column]": weight for name, weight in m.to_neighbours(weights, 8).items()}
    changed = [name for name, weight in weights.items() if not torch.equal(weight, before[name])]
    return found | {"weights given that were changed": ", ".join(changed) or "none"}


def scores_agree(m):
    """Scores with reordered weights and neighbouring pairs equal ours."""
    weights = {"q_proj.weight": random(8, 10, seed=1), "k_proj.weight": random(8, 10, seed=2)}
    x, rope = random(1, 1, 5, 10, seed=3), m.rotation(torch.arange(5), 8, 100.0)
    q, k = (m.rotate(x @ weight.T, rope) for weight in weights.values())
    turned = []
    for weight in m.to_neighbours(weights, 8).values():
        y, (cos, sin) = x @ weight.T, rope
        a, b = y[..., ::2], y[..., 1::2]
        turned.append(torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2))
    return properties.close(turned[0] @ turned[1].mT, q @ k.mT)


NAMES = '("q_proj.weight", "k_proj.weight")'
BY_HALVES = "heads = weight.unflatten(0, (-1, 2, head_dim // 2))  # (n_head, 2, head_dim/2, n_embd)"

PAIRS = Exercise(
    number="2.4",
    title="Weights for other pairs",
    minutes=25,
    functions=("to_neighbours",),
    question="Our pairs are (i, i + head_dim/2). Another program rotates the pairs (2i, 2i + 1). Which row "
    "of q_proj must move to row 1 of a head, so that both programs compute the same scores?",
    shapes="Rows of a head, for head_dim 8: 0, 1, 2, 3, 4, 5, 6, 7 -> 0, 4, 1, 5, 2, 6, 3, 7. The same for "
    "every head, and for q_proj and k_proj. The columns stay.",
    steps="1. Copy the dict, so that the caller's stays as it was.\n"
    "2. Split the rows of q_proj and k_proj into heads, two halves, and the dimensions of a half.\n"
    "3. Exchange the last two of these three, and join the rows again.",
    afterwards="Scores are sums over dimensions, so any order will do, if queries and keys share it and the "
    "rotation knows it. deploy/llama2c.py does this for llama2.c.",
    probes=(reordered,),
    properties={"the scores are the same when neighbours are rotated": scores_agree},
    mistakes=(
        Mistake(
            "inverse",
            ((BY_HALVES, "heads = weight.unflatten(0, (-1, head_dim // 2, 2))"),),
            "This is the inverse: it makes halves out of neighbours.",
            "for a head of width 4 both are the same, and for wider ones they are not.",
            "the order of the two factors into which head_dim is split.",
        ),
        Mistake(
            "values too",
            ((NAMES, '("q_proj.weight", "k_proj.weight", "v_proj.weight")'),),
            "The rows of v_proj are reordered too.",
            "values are not rotated. Reordered, they no longer fit the columns of o_proj.",
            "the names of the weights that are changed.",
        ),
        Mistake(
            "queries alone",
            ((NAMES, '"q_proj.weight"'),),
            "The rows of k_proj are not reordered.",
            "a score multiplies dimension by dimension: queries and keys must be in the same order.",
            "the names of the weights that are changed.",
        ),
        Mistake(
            "across heads",
            ((BY_HALVES, "heads = weight.unflatten(0, (1, 2, -1))"),),
            "The rows are reordered across heads: each pair has a row of two different heads.",
            "a pair lies within a head. With a single head nothing would show.",
            "into how many parts the rows are split first.",
        ),
        Mistake(
            "columns",
            (
                (BY_HALVES, "heads = weight.T.unflatten(0, (-1, 2, weight.size(1) // 2))"),
                ("flatten(0, 2)", "flatten(0, 2).T"),
            ),
            "The columns are reordered, not the rows.",
            "the columns belong to the input x, which is the same for both programs. Rows are the dimensions "
            "of q.",
            "the dimension that is split.",
        ),
        Mistake(
            "in place",
            (("converted = dict(weights)", "converted = weights"),),
            "The dict that was given is changed too.",
            "the caller still needs its own weights, for instance to compare both programs.",
            "the object that the function writes to and returns.",
        ),
    ),
    rewrites=(
        Rewrite(
            "by a list of indices",
            """
def to_neighbours(weights, head_dim):
    half, out = head_dim // 2, {}
    order = torch.tensor([i // 2 + (i % 2) * half for i in range(head_dim)])
    for name, w in weights.items():
        if "q_proj" in name or "k_proj" in name:
            w = w.view(-1, head_dim, w.size(1))[:, order].reshape(w.shape)
        out[name] = w
    return out
""",
        ),
        Rewrite(
            "view and permute",
            (
                (BY_HALVES, "heads = weight.view(-1, 2, head_dim // 2, weight.size(1))"),
                ("heads.transpose(1, 2).flatten(0, 2)", "heads.permute(0, 2, 1, 3).reshape(weight.shape)"),
            ),
        ),
        Rewrite(
            "indices the other way",
            """
def to_neighbours(weights, head_dim):
    out = {}
    order = torch.cat((torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)))
    for name, w in weights.items():
        if "q_proj" in name or "k_proj" in name:
            w = w.view(-1, head_dim, w.size(1))[:, order].reshape(w.shape)
        out[name] = w
    return out
""",
            mistake="inverse",
        ),
    ),
)


# ---- the whole file


def whole_model(m):
    """Parameters, logits for two thetas, with a cache, and past block_size, and the config's check."""
    idx, found = tokens(2, 11), {}
    for theta in (10000.0, 50.0):
        model = small_model(m, rope_theta=theta)
        found[f"logits for theta {theta:g} [batch, position, token]"] = model(idx)[0]
    found |= {f"parameter {name}": tuple(weight.shape) for name, weight in model.named_parameters()}
    logits, _ = in_steps(model, idx, (4, 1, 1, 5))
    found["logits with a cache, a few tokens at a time [batch, position, token]"] = logits
    found["logits of more tokens than block_size [batch, position, token]"] = model(tokens(1, 20))[0]
    try:
        m.GPTConfig(n_head=4, n_embd=20)
        found["heads of width 5"] = "accepted"
    except ValueError:
        found["heads of width 5"] = "refused"
    return found


WHOLE = Exercise(
    number="2",
    title="The whole stage",
    minutes=40,
    functions=(),
    question="Which parameters disappear, and what takes their place? Who knows the position of a new token "
    "when there is a cache?",
    shapes="rotation(positions, head_dim, rope_theta) is computed once in GPT.forward and handed to every "
    "block. There is no table of positions, and no limit of block_size.",
    steps="1. Add rope_theta to the config, and refuse an odd head_dim.\n"
    "2. Write rotation and rotate.\n"
    "3. Remove the table of positions and the error about its end.\n"
    "4. Compute the angles at the cache's positions, and pass them through the blocks to attention.",
    probes=(whole_model,),
    properties={
        "no position sees a later one": properties.no_leak,
        "with a cache the logits are the same": properties.cache_equals_no_cache,
    },
    mistakes=(
        Mistake(
            "positions from 0",
            (("rope = rotation(positions,", "rope = rotation(torch.arange(T),"),),
            "Without a cache all is right. With one, every new token is at position 0.",
            "distances to the cached keys are then wrong, and the text that is generated falls apart.",
            "the positions for which GPT.forward computes the angles.",
        ),
        Mistake(
            "width of the model",
            (
                (
                    "rotation(positions, self.config.n_embd // self.config.n_head,",
                    "rotation(positions, 8 + 0 * self.config.n_head,",
                ),
                ("pairs.float() / head_dim", "pairs.float() / 48"),
            ),
            "The exponents are divided by the width of the model, not of a head.",
            "the slowest pair would be much too fast: its exponent ends far below 1.",
            "the width that rotation gets.",
        ),
        Mistake(
            "theta not passed on",
            (("self.config.rope_theta)", "10000.0)"),),
            "rope_theta has no effect.",
            "a model that was trained with another theta would give nonsense.",
            "the call of rotation.",
        ),
        Mistake(
            "odd heads accepted",
            (("if self.n_embd // self.n_head % 2:", "if False:"),),
            "Heads of width 5 are accepted, and 5 dimensions do not form pairs.",
            "the error appears later and elsewhere, with a message about shapes.",
            "GPTConfig.__post_init__, and what it refuses.",
        ),
    ),
    rewrites=(),
)

# ---- predictions


def period_of_last_pair() -> float:
    """Tokens until the slowest pair of a head of width 64 has turned once, for theta 10,000."""
    return (2 * torch.pi * torch.tensor(10000.0) ** (62 / 64)).item()


QUESTIONS = (
    Question(
        "In GPT-2's size (width 768, 1,024 positions), how many parameters go when rotations take the place "
        "of the table of positions?",
        lambda: parameters_saved("stage1_rmsnorm", "stage2_rope"),
        "1,024 positions · 768 = {answer}.",
    ),
    Question(
        "A head has width 64, and theta is 10,000. After how many tokens has the slowest pair turned once? "
        "(Within 10 %)",
        period_of_last_pair,
        "2π · 10000^(62/64) = {answer} tokens.",
        tolerance=0.1,
    ),
    Question(
        "Stage 2 against stage 1, on TinyShakespeare: which way does the validation loss go?",
        lambda: loss_change("stage2_rope"),
        "Measured over three seeds: {answer}. docs/benchmarks.md has the numbers.",
        choices=CHANGES,
    ),
)

CHAPTER = Chapter(
    number="2",
    name="stage2",
    title="rotary positions",
    source="stage2_rope/model.py",
    before="stage1_rmsnorm/model.py",
    beyond="exercises/beyond/stage2.py",
    exercises=(ROTATION, ROTATE, PLACE, PAIRS),
    questions=QUESTIONS,
    whole=WHOLE,
)
