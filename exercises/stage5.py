"""The exercises of stage 5: a softmax in blocks, FlashAttention's two passes, and torch's kernel."""

import torch
from torch.overrides import TorchFunctionMode

from exercises import properties
from exercises.measured import CHANGES, loss_change
from exercises.probe import in_steps, random, small_model, tokens
from exercises.units import Chapter, Exercise, Mistake, Question, Rewrite

# ---- 5.1 the softmax of one row, in blocks


class Watch(TorchFunctionMode):
    """Notes whether anything is computed from, or results in, a tensor whose last dimensions are `shape`."""

    COMPUTING = ("exp", "softmax", "logsumexp", "max", "sum", "mul", "matmul", "masked_fill", "sub", "add")

    def __init__(self, shape):
        super().__init__()
        self.shape, self.seen = shape, False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if any(part in name for part in self.COMPUTING):
            shapes = [tuple(x.shape) for x in (*args, result) if isinstance(x, torch.Tensor)]
            self.seen |= any(shape[-len(self.shape) :] == self.shape for shape in shapes)
        return result


def row(kind: str):
    """23 scores and their values: moderate; large, rising or falling; with later keys hidden."""
    scores, values = random(23, seed=1, scale=2.0), random(23, 5, seed=2)
    if kind == "large and rising":
        scores = 40 * torch.arange(23.0) + scores
    elif kind == "large and falling":
        scores = -40 * torch.arange(23.0) + 500 + scores
    elif kind == "partly hidden":
        scores[9:] = -torch.inf
    return scores, values


def averages(m, *kinds):
    found = {}
    for kind in kinds:
        for block in (4, 1, 64):
            average, log_sum = m.online_average(*row(kind), block)
            of = f"of {kind} scores in blocks of {block}"
            found[f"average {of} [dimension]"] = average
            found[f"log of the sum {of}"] = log_sum
    return found


def moderate_averages(m):
    return averages(m, "moderate")


def hidden_averages(m):
    return averages(m, "partly hidden")


def large_averages(m):
    return averages(m, "large and rising", "large and falling")


def reads_blocks(m):
    scores, values = row("moderate")
    with Watch((23,)) as watch:
        m.online_average(scores, values, 4)
    return {"in blocks of 4, what is computed from": "all keys at once" if watch.seen else "single blocks"}


def equals_softmax(m):
    scores, values = row("moderate")
    return properties.close(m.online_average(scores, values, 4)[0], scores.softmax(0) @ values)


def block_size_does_not_matter(m):
    one, other = (m.online_average(*row("moderate"), block)[0] for block in (4, 7))
    return properties.close(one, other)


def offset_does_not_matter(m):
    scores, values = row("moderate")
    one, other = (m.online_average(scores + offset, values, 4)[0] for offset in (0, 300))
    return properties.close(one, other)


ROW = Exercise(
    number="5.1",
    title="A softmax in one pass",
    minutes=20,
    functions=("online_average",),
    question="The softmax subtracts the largest score before it takes exponentials, so that none "
    "overflows. If only the first block of scores is known, the largest one may be still to come. By "
    "which factor are the sums so far wrong, when a larger score turns up?",
    shapes="scores (S,), values (S, head_dim). With running maximum m, sum l and output o: m' = max(m, "
    "max s), p = exp(s − m'), l' = exp(m − m') l + Σ p, o' = exp(m − m') o + p v. At the end: o / l, and "
    "m + log l.",
    steps="1. Begin with a maximum of −∞, a sum of 0 and an output of zeros.\n"
    "2. For each block: the new maximum is the larger one of the old one and the block's.\n"
    "3. Take the exponentials of the block's scores minus the new maximum.\n"
    "4. Multiply sum and output by exp(old − new maximum), then add the block's.\n"
    "5. After the last block, divide the output by the sum; the logarithm is maximum + log(sum).",
    afterwards="Nothing is approximated: the numbers are those of the softmax, from one pass and without "
    "a row of weights. FlashAttention does this for many rows at once.",
    probes=(moderate_averages, hidden_averages, large_averages, reads_blocks),
    properties={
        "the average is that of the softmax": equals_softmax,
        "the size of the blocks does not matter": block_size_does_not_matter,
        "adding 300 to all scores does not change the average": offset_does_not_matter,
    },
    mistakes=(
        Mistake(
            "output not rescaled",
            (("o = rescale * o +", "o = o +"),),
            "The sum is rescaled to each new maximum, and the output is not.",
            "the output then holds weights relative to older maxima, so early blocks count too much.",
            "what happens to the output before a block is added.",
        ),
        Mistake(
            "sum not rescaled",
            (("row_sum = rescale * row_sum +", "row_sum = row_sum +"),),
            "The output is rescaled to each new maximum, and the sum is not.",
            "the weights would not add up to 1.",
            "what happens to the sum before a block is added.",
        ),
        Mistake(
            "nothing rescaled",
            (
                ("o = rescale * o +", "o = o +"),
                ("row_sum = rescale * row_sum +", "row_sum = row_sum +"),
            ),
            "Neither the sum nor the output is rescaled when the maximum changes.",
            "each block's weights are then relative to another maximum. As long as the first block holds "
            "the largest score, nothing shows.",
            "what happens to the sums so far when a larger score turns up.",
        ),
        Mistake(
            "inverted",
            (("torch.exp(row_max - new_max)", "torch.exp(new_max - row_max)"),),
            "The factor is the exponential of new − old maximum: the wrong way round.",
            "at the start the old maximum is −∞, and the factor is infinite; 0 times that is NaN. A "
            "larger maximum must make the sums so far smaller.",
            "the order of the two maxima in the factor.",
        ),
        Mistake(
            "no maximum",
            (("torch.maximum(row_max, s.max())", "torch.zeros(())"),),
            "Moderate scores are right. Large ones overflow: no maximum is subtracted.",
            "exp(89) is infinite in float32, and scores of this size do occur.",
            "what is subtracted from the scores.",
        ),
        Mistake(
            "block's maximum alone",
            (("torch.maximum(row_max, s.max())", "s.max()"),),
            "The maximum is that of the latest block, even if an earlier one was larger.",
            "the factor then becomes larger than 1 and overflows; and in a block of which every key is "
            "hidden, −∞ − (−∞) is NaN.",
            "how the new maximum is found.",
        ),
        Mistake(
            "weights relative to the block",
            (("torch.exp(s - new_max)", "torch.exp(s - s.max())"),),
            "A block's weights are relative to its own maximum, and the sums to the running one.",
            "blocks with small scores count as much as those with large ones.",
            "what is subtracted from the scores of a block.",
        ),
        Mistake(
            "maximum not remembered",
            (("row_max = new_max", "pass"),),
            "Only the last block counts: the running maximum stays −∞.",
            "the factor exp(old − new) is then 0, so everything before is erased.",
            "what is stored at the end of a block.",
        ),
        Mistake(
            "divided in every block",
            (("o = rescale * o + p @ v", "o = (rescale * o + p @ v) / row_sum"),),
            "The output is divided by the sum in every block, and again at the end.",
            "the running output must stay a plain sum, so that later blocks can be added. One division at "
            "the end is enough.",
            "where the division stands.",
        ),
        Mistake(
            "averaged in every block",
            (
                ("o = rescale * o + p @ v", "o = (rescale * o + p @ v) / row_sum"),
                ("o / row_sum,", "o,"),
            ),
            "The output is divided by the sum in every block, and then used as if it were a plain sum.",
            "the running output must stay a plain sum, so that later blocks can be added. One division at "
            "the end is enough.",
            "where the division stands.",
        ),
        Mistake(
            "never divided",
            (("o / row_sum,", "o,"),),
            "The output is not divided by the sum.",
            "the weights would not add up to 1: the more keys, the larger the output.",
            "what is returned.",
        ),
        Mistake(
            "log without maximum",
            (("row_max + row_sum.log()", "row_sum.log()"),),
            "The average is right. The logarithm lacks the maximum that was subtracted.",
            "the backward pass recomputes the weights as exp(score − logarithm): they would not add up to 1.",
            "the second value that is returned.",
        ),
        Mistake(
            "sum instead of its logarithm",
            (("row_max + row_sum.log()", "row_sum"),),
            "The average is right. The second value is the running sum itself.",
            "this sum is relative to a maximum that nobody else knows, and the plain sum of exponentials "
            "could overflow. The logarithm contains both and stays small.",
            "the second value that is returned.",
        ),
        Mistake(
            "last keys skipped",
            (("range(0, len(scores), block)", "range(0, len(scores) - block + 1, block)"),),
            "The keys after the last whole block are left out.",
            "23 keys are 5 blocks of 4, and 3 more. A shorter block at the end is a block too.",
            "where the loop ends.",
        ),
        Mistake(
            "not in blocks",
            (
                (
                    "for start in range(0, len(scores), block):",
                    "block = len(scores)\n    for start in range(0, len(scores), block):",
                ),
            ),
            "The numbers are right, but computed from all scores at once.",
            "that a row need not be there as a whole is the point: in FlashAttention it never is.",
            "whether anything besides a slice is computed from all scores.",
        ),
    ),
    rewrites=(
        Rewrite(
            "plain numbers and split",
            """
def online_average(scores, values, block):
    m, l, o = float("-inf"), 0.0, 0.0
    for s, v in zip(scores.split(block), values.split(block)):
        new = max(m, s.max().item())
        p = (s - new).exp()
        factor = math.exp(m - new)
        l, o, m = l * factor + p.sum().item(), o * factor + (p[:, None] * v).sum(0), new
    return o / l, torch.tensor(m + math.log(l))
""",
        ),
        Rewrite(
            "a logarithm that runs along",
            """
def online_average(scores, values, block):
    log_sum, average = None, None
    for s, v in zip(torch.split(scores, block), torch.split(values, block)):
        here = torch.logsumexp(s, 0)
        both = here if log_sum is None else torch.logaddexp(log_sum, here)
        new = torch.exp(s - both) @ v
        average = new if average is None else average * torch.exp(log_sum - both) + new
        log_sum = both
    return average, log_sum
""",
        ),
        Rewrite(
            "one key at a time, whatever the block",
            """
def online_average(scores, values, block):
    m, l, o = scores[0], torch.ones(()), values[0]
    for i in range(1, scores.shape[0]):
        new = torch.maximum(m, scores[i])
        a, b = (m - new).exp(), (scores[i] - new).exp()
        l, o, m = a * l + b, a * o + b * values[i], new
    return o / l, m + l.log()
""",
        ),
        Rewrite(
            "sums without factors",
            """
def online_average(scores, values, block):
    m, l, o = torch.tensor(-torch.inf), 0, 0
    for s, v in zip(scores.split(block), values.split(block)):
        m = torch.maximum(m, s.amax())
        w = torch.exp(s - m)
        l, o = l + w.sum(), o + w @ v
    return o / l, m + torch.log(l)
""",
            mistake="nothing rescaled",
        ),
        Rewrite(
            "torch's softmax",
            """
def online_average(scores, values, block):
    return scores.softmax(0) @ values, scores.logsumexp(0)
""",
            mistake="not in blocks",
        ),
    ),
)

# ---- 5.2 the forward pass

SIZES = ((7, 7, 3, 2), (5, 9, 2, 4), (6, 6, 64, 64))
"""Queries, keys, and the sizes of their blocks: blocks that do not divide, more keys, a single block."""


def inputs(T: int, S: int, scale: float = 1.0):
    """q with 4 heads, k and v with 2."""
    q = random(1, 4, T, 8, seed=1, scale=scale)
    return q, random(1, 2, S, 8, seed=2, scale=scale), random(1, 2, S, 8, seed=3)


def tiles(m):
    found = {}
    for T, S, *sizes in SIZES:
        of = f"{T} queries and {S} keys in blocks of {sizes[0]} by {sizes[1]}"
        found[f"attention of {of} [batch, head, position, dimension]"] = m.tiled_attention(
            *inputs(T, S), *sizes
        )
    return found


def tiles_of_large_scores(m):
    y = m.tiled_attention(*inputs(7, 7, scale=14.0), 3, 2)
    return {"attention with scores in the hundreds [batch, head, position, dimension]": y}


def tiles_for_backward(m):
    """What the course's backward pass makes of the saved tensors; the dtype in 16 bits; the score matrix."""
    q, k, v = (x.requires_grad_() for x in inputs(5, 9))
    with Watch((5, 9)) as watch:
        y = m.tiled_attention(q, k, v, 2, 4)
    found = {"largest block of scores": "the whole matrix" if watch.seen else "smaller than the matrix"}
    (y * random(*y.shape, seed=4)).sum().backward()
    found["gradient of q by the course's backward pass [batch, head, position, dimension]"] = q.grad
    half = m.tiled_attention(*(x.detach().bfloat16() for x in (q, k, v)), 2, 4)
    return found | {"dtype of attention for bfloat16": str(half.dtype)}


def explicit(q, k, v):
    """Causal attention with the score matrix, aligned to the lower right."""
    mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril(k.size(2) - q.size(2))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def equals_explicit(m):
    return all(
        properties.close(m.tiled_attention(*inputs(T, S), *sizes), explicit(*inputs(T, S)))
        for T, S, *sizes in SIZES
    )


def one_block_is_right(m):
    return properties.close(m.tiled_attention(*inputs(6, 6), 64, 64), explicit(*inputs(6, 6)))


def tiles_have_no_leak(m):
    q, k, v = inputs(7, 7)
    before = m.tiled_attention(q, k, v, 3, 2)[:, :, :4]
    k[:, :, 4:] += 1
    v[:, :, 4:] += 1
    return properties.close(m.tiled_attention(q, k, v, 3, 2)[:, :, :4], before)


NEW_MAX = "torch.maximum(row_max, s.amax(-1, keepdim=True))"
NOT_MASKED = "columns.stop - 1 <= rows.start + n_past"
ADDED = "o = rescale * o + p @ v[..., columns, :].to(accum_dtype)"

FORWARD = Exercise(
    number="5.2",
    title="FlashAttention, forward",
    minutes=45,
    functions=("TiledAttention.forward", "visible_keys", "scores"),
    source="stage5_flash/tiled.py",
    question="A block of queries needs all keys that any of its queries sees. Which blocks of keys can it "
    "leave out altogether, in which must single scores be hidden, and in which is there nothing to hide?",
    shapes="q (B, n_kv_head, group, T, head_dim), k and v (B, n_kv_head, 1, S, head_dim). For rows and "
    "columns: s = q kᵀ / √head_dim, −∞ where the key comes after the query (query i is at position S − T "
    "+ i). Then as in 5.1, with the last dimension as the row. Saved: q, k, v, out, and log_sum (…, T) = "
    "m + log l.",
    steps="1. scores: multiply the rows of q with the columns of k, scaled, in at least 32 bits. Hide "
    "later keys; a block that lies wholly left of the diagonal needs nothing.\n"
    "2. visible_keys: blocks of keys up to the last one that the last of these queries sees.\n"
    "3. forward: for each block of rows, begin with sum and output 0 and maximum −∞, and go through its "
    "blocks of columns as in 5.1.\n"
    "4. Divide, store the rows in out, and their m + log l in log_sum.\n"
    "5. Save q, k, v, out and log_sum for the backward pass, and the sizes of the blocks in ctx.blocks.",
    afterwards="kernel.py is the same algorithm in Triton, where a block of scores stays in the fast "
    "memory of a GPU's multiprocessor.",
    probes=(tiles, tiles_of_large_scores, tiles_for_backward),
    properties={
        "it equals attention with a score matrix": equals_explicit,
        "with a single block, it equals attention with a score matrix": one_block_is_right,
        "no position sees a later one": tiles_have_no_leak,
    },
    mistakes=(
        Mistake(
            "output not rescaled",
            (("o = rescale * o +", "o = o +"),),
            "The output is not rescaled when a larger score turns up.",
            "it then holds weights relative to older maxima, so early blocks of keys count too much. With "
            "a single block all is right.",
            "what happens to the output before a block is added.",
        ),
        Mistake(
            "sum not rescaled",
            (("row_sum = rescale * row_sum +", "row_sum = row_sum +"),),
            "The sum is not rescaled when a larger score turns up.",
            "the weights would not add up to 1. With a single block all is right.",
            "what happens to the sum before a block is added.",
        ),
        Mistake(
            "inverted",
            (("torch.exp(row_max - new_max)", "torch.exp(new_max - row_max)"),),
            "The factor is the exponential of new − old maximum: the wrong way round.",
            "at the start the old maximum is −∞, and the factor is infinite; 0 times that is NaN. A "
            "larger maximum must make the sums so far smaller.",
            "the order of the two maxima in the factor.",
        ),
        Mistake(
            "no maximum",
            ((NEW_MAX, "torch.zeros_like(row_max)"),),
            "Moderate scores are right. Large ones overflow: no maximum is subtracted.",
            "exp(89) is infinite in float32, and scores of this size do occur.",
            "what is subtracted from the scores.",
        ),
        Mistake(
            "block's maximum alone",
            ((NEW_MAX, "s.amax(-1, keepdim=True)"),),
            "The maximum is that of the latest block, even if an earlier one was larger.",
            "the factor can then overflow; and where a query sees no key of a block, −∞ − (−∞) is NaN.",
            "how the new maximum is found.",
        ),
        Mistake(
            "weights relative to the block",
            (("torch.exp(s - new_max)", "torch.exp((s - s.amax(-1, keepdim=True)).nan_to_num(-torch.inf))"),),
            "A block's weights are relative to its own maximum, and the sums to the running one.",
            "blocks with small scores count as much as those with large ones.",
            "what is subtracted from the scores of a block.",
        ),
        Mistake(
            "maximum not remembered",
            (("row_max = new_max", "pass"),),
            "Only the last block of keys counts: the running maximum stays −∞.",
            "the factor exp(old − new) is then 0, so everything before is erased.",
            "what is stored at the end of a block.",
        ),
        Mistake(
            "divided in every block",
            ((ADDED, ADDED.replace("o = ", "o = (") + ") / row_sum"),),
            "The output is divided by the sum in every block, and again at the end.",
            "the running output must stay a plain sum, so that later blocks can be added. One division at "
            "the end is enough.",
            "where the division stands.",
        ),
        Mistake(
            "never divided",
            (("o / row_sum", "o"),),
            "The output is not divided by the sum.",
            "the weights would not add up to 1: the more keys, the larger the output.",
            "what is stored in out.",
        ),
        Mistake(
            "no scale",
            (("* q.size(-1) ** -0.5 @ k", "@ k"),),
            "The scores are not divided by the root of head_dim.",
            "a sum of head_dim products grows with that root; unscaled, the softmax saturates.",
            "the product in scores.",
        ),
        Mistake(
            "scale without root",
            (("* q.size(-1) ** -0.5 @ k", "* q.size(-1) ** -1 @ k"),),
            "The scores are divided by head_dim, not by its root.",
            "the standard deviation of a sum of head_dim products grows with the root. Divided by more, "
            "the scores are nearly equal.",
            "the factor in scores.",
        ),
        Mistake(
            "upper-left corner",
            (("n_past = k.size(-2) - q.size(-2)\n    if", "n_past = 0\n    if"),),
            "Query i sees the keys up to i, counted from the first key, also when there are more keys "
            "than queries.",
            "the queries are the last tokens, and should see the earlier ones, too. Without a cache both "
            "are the same.",
            "the position of a query, where scores compares it with those of the keys.",
        ),
        Mistake(
            "past keys not counted",
            (("n_past = k.size(-2) - q.size(-2)  #", "n_past = 0  #"),),
            "With more keys than queries, the last blocks of keys are skipped although they are visible.",
            "the first query stands behind the earlier tokens, so its last visible key is further right "
            "than its own number says.",
            "where visible_keys ends.",
        ),
        Mistake(
            "last keys skipped",
            (("rows.stop + n_past, block_k", "(rows.stop + n_past) // block_k * block_k, block_k"),),
            "Keys after the last whole block are skipped.",
            "the number of visible keys is rarely a multiple of the block. A shorter block at the end is "
            "a block too.",
            "where visible_keys ends.",
        ),
        Mistake(
            "blocks of the first row",
            (("blocks(0, rows.stop + n_past,", "blocks(0, rows.start + 1 + n_past,"),),
            "Only the keys that the first query of a block sees are visited.",
            "the other queries of the block see more: at least their own key.",
            "where visible_keys ends.",
        ),
        Mistake(
            "diagonal not masked",
            ((NOT_MASKED, "columns.start <= rows.start + n_past"),),
            "In blocks that the diagonal crosses, nothing is hidden.",
            "some queries then see later keys: the text leaks, a little, and how much depends on the "
            "blocks' sizes.",
            "the condition under which scores hides nothing.",
        ),
        Mistake(
            "own key hidden",
            (("key > query", "key >= query"),),
            "No query sees its own key where the mask is applied.",
            "the token itself is the best hint at the next one, and the first query has nothing else: its "
            "output is NaN.",
            "the comparison in scores.",
        ),
        Mistake(
            "nothing masked",
            (("s.masked_fill(key > query, -torch.inf)", "s"),),
            "Nothing is hidden inside the blocks that are visited.",
            "a query sees the later keys of its block: the text leaks, and the result depends on the "
            "blocks' sizes.",
            "the last line of scores.",
        ),
        Mistake(
            "log without maximum",
            (("row_max + row_sum.log()", "row_sum.log()"),),
            "The output is right. What is saved for the backward pass lacks the maximum that was subtracted.",
            "the backward pass recomputes the weights as exp(score − log_sum): they would not add up to 1.",
            "what is stored in log_sum.",
        ),
        Mistake(
            "sum instead of its logarithm",
            (("row_max + row_sum.log()", "row_sum"),),
            "The output is right. What is saved for the backward pass is the sum itself.",
            "the backward pass recomputes the weights as exp(score − log_sum), without a maximum.",
            "what is stored in log_sum.",
        ),
        Mistake(
            "not in blocks",
            (
                (
                    "for rows in blocks(0, q.size(-2), block_q):",
                    "block_q, block_k = q.size(-2), k.size(-2)\n"
                    "        for rows in blocks(0, q.size(-2), block_q):",
                ),
            ),
            "The numbers are right, but all scores are computed at once.",
            "the whole score matrix is what FlashAttention avoids: with 8,192 tokens and 12 heads it has "
            "800 million numbers.",
            "whether both loops go through blocks.",
        ),
    ),
    rewrites=(
        Rewrite(
            "larger blocks of keys",
            (("in visible_keys(rows, q, k, block_k):", "in visible_keys(rows, q, k, 2 * block_k):"),),
        ),
        Rewrite(
            "all blocks visited, always masked",
            """
def visible_keys(rows, q, k, block_k):
    return blocks(0, k.size(-2), block_k)

def scores(q, k, rows, columns):
    dtype = torch.promote_types(q.dtype, torch.float32)
    s = torch.einsum("bhgtd,bhosd->bhgts", q[..., rows, :].to(dtype), k[..., columns, :].to(dtype))
    hidden = torch.ones(q.size(-2), k.size(-2)).triu(1 + k.size(-2) - q.size(-2)).bool()[rows, columns]
    return (s / q.size(-1) ** 0.5).masked_fill(hidden, float("-inf"))
""",
        ),
        Rewrite(
            "a list of rows, in place, log_sum running along",
            """
class TiledAttention:
    @staticmethod
    def forward(ctx, q, k, v, block_q, block_k):
        dtype, outs, logs = torch.promote_types(q.dtype, torch.float32), [], []
        for rows in blocks(0, q.shape[-2], block_q):
            m = torch.full((*q.shape[:-2], rows.stop - rows.start), -torch.inf, dtype=dtype)
            l, o = torch.zeros_like(m), torch.zeros(*m.shape, q.shape[-1], dtype=dtype)
            for columns in visible_keys(rows, q, k, block_k):
                s = scores(q, k, rows, columns)
                new = torch.maximum(m, s.max(-1).values)
                s.sub_(new[..., None]).exp_()
                l.mul_((m - new).exp()).add_(s.sum(-1))
                o.mul_((m - new).exp()[..., None]).add_(s @ v[..., columns, :].to(dtype))
                m = new
            outs.append((o / l[..., None]).to(q.dtype))
            logs.append(m + l.log())
        out, log_sum = torch.cat(outs, -2), torch.cat(logs, -1)
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.blocks = (block_q, block_k)
        return out
""",
        ),
        Rewrite(
            "positions from the first key, a mask of numbers",
            """
def scores(q, k, rows, columns):
    s = q[..., rows, :].float() @ k[..., columns, :].float().transpose(-1, -2) / q.shape[-1] ** 0.5
    i = torch.arange(rows.start, rows.stop).view(-1, 1)
    j = torch.arange(columns.start, columns.stop).view(1, -1)
    return s + torch.where(j <= i, 0.0, -torch.inf)
""",
            mistake="upper-left corner",
        ),
        Rewrite(
            "the score matrix of torch",
            """
class TiledAttention:
    @staticmethod
    def forward(ctx, q, k, v, block_q, block_k):
        s = scores(q, k, slice(0, q.size(-2)), slice(0, k.size(-2)))
        out, log_sum = (s.softmax(-1) @ v.to(s.dtype)).to(q.dtype), s.logsumexp(-1)
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.blocks = block_q, block_k
        return out
""",
            mistake="not in blocks",
        ),
    ),
)

# ---- 5.3 the backward pass


def gradients_of(m, T, S, sizes, scale=1.0):
    """The gradients of a weighted sum of the output."""
    q, k, v = (x.requires_grad_() for x in inputs(T, S, scale))
    y = m.tiled_attention(q, k, v, *sizes)
    (y * random(*y.shape, seed=4)).sum().backward()
    return q.grad, k.grad, v.grad


def gradients(m):
    found = {}
    for T, S, *sizes in SIZES:
        of = (
            f"{T} queries and {S} keys, blocks of {sizes[0]} by {sizes[1]} [batch, head, position, dimension]"
        )
        for name, gradient in zip("qkv", gradients_of(m, T, S, sizes), strict=True):
            found[f"gradient of {name} for {of}"] = gradient
    return found


def backward_in_blocks(m):
    q, k, v = (x.requires_grad_() for x in inputs(5, 9))
    y = m.tiled_attention(q, k, v, 2, 4)
    with Watch((5, 9)) as watch:
        y.sum().backward()
    return {"largest block of scores": "the whole matrix" if watch.seen else "smaller than the matrix"}


def gradients_are_torch_s(index):
    def holds(m):
        with torch.enable_grad():
            q, k, v = (x.requires_grad_() for x in inputs(5, 9))
            y = explicit(q, k, v)
            (y * random(*y.shape, seed=4)).sum().backward()
            return properties.close(gradients_of(m, 5, 9, (2, 4))[index], (q, k, v)[index].grad)

    return holds


DS = "ds = p * (dp - delta[..., rows, :]) * scale"
DK = "(ds.mT @ q[..., rows, :].to(accum_dtype))"

BACKWARD = Exercise(
    number="5.3",
    title="FlashAttention, backward",
    minutes=45,
    functions=("TiledAttention.backward",),
    source="stage5_flash/tiled.py",
    question="The weights were thrown away. From what can they be computed again, block by block, without "
    "going through a running maximum? And each weight's gradient contains a sum over the whole row: which "
    "two vectors that are at hand have the same product?",
    shapes="p = exp(s − log_sum); dv = pᵀ d_out; dp = d_out vᵀ; delta = Σ out · d_out over the "
    "dimensions; ds = p (dp − delta) / √head_dim; dq = ds k; dk = dsᵀ q. dq (B, n_kv_head, group, T, "
    "head_dim); dk and dv (B, n_kv_head, 1, S, head_dim) are sums over the heads of a group.",
    steps="1. Take what forward has saved, and begin with three gradients of 0 in at least 32 bits.\n"
    "2. Compute delta (…, T, 1) for all rows.\n"
    "3. For each block of rows and each block of columns that it sees: recompute p from the scores and "
    "log_sum.\n"
    "4. Add to dv, then compute dp and ds.\n"
    "5. Add to dk and dq. For dk and dv, add up the heads of a group, and keep the dimension.\n"
    "6. Return the gradients in the inputs' dtypes, and None for the two sizes.",
    afterwards="Per query, output and one number were saved, instead of a row of weights. Computing the "
    "scores a second time is cheaper than reading them from memory.",
    probes=(gradients, backward_in_blocks),
    properties={
        "the gradient of q is that of attention with a score matrix": gradients_are_torch_s(0),
        "the gradient of k is that of attention with a score matrix": gradients_are_torch_s(1),
        "the gradient of v is that of attention with a score matrix": gradients_are_torch_s(2),
    },
    mistakes=(
        Mistake(
            "delta forgotten",
            ((DS, "ds = p * dp * scale"),),
            "dv is right. In dq and dk, the sum over the row is missing.",
            "all weights of a row share a denominator: when one grows, the others shrink. That is what "
            "delta is for.",
            "how the gradient of the scores follows from that of the weights.",
        ),
        Mistake(
            "delta of the block",
            ((DS, "ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale"),),
            "The sum over the row runs over one block of keys only.",
            "with a single block it is right. Otherwise each block knows a part of the row; out · d_out "
            "holds all of it.",
            "how delta is computed.",
        ),
        Mistake(
            "sign",
            ((DS, "ds = p * (delta[..., rows, :] - dp) * scale"),),
            "dv is right. dq and dk have the opposite sign.",
            "training would go uphill in the queries and keys.",
            "the order of the two numbers whose difference multiplies the weights.",
        ),
        Mistake(
            "weights forgotten",
            ((DS, "ds = (dp - delta[..., rows, :]) * scale"),),
            "In the gradient of the scores, the weights are missing as a factor.",
            "the derivative of the softmax is weight · (…): keys with no weight must get no gradient.",
            "how the gradient of the scores follows from that of the weights.",
        ),
        Mistake(
            "scale forgotten",
            ((DS, "ds = p * (dp - delta[..., rows, :])"),),
            "dv is right. dq and dk are too large: the root of head_dim is missing.",
            "the scores were divided by it, so the gradients of both factors are as well.",
            "the gradient of the scores.",
        ),
        Mistake(
            "scale twice",
            ((DS, f"{DS} * scale"),),
            "dv is right. dq and dk are divided by head_dim, not by its root.",
            "the scores were divided by the root once.",
            "the gradient of the scores.",
        ),
        Mistake(
            "scale of dk forgotten",
            ((DK, DK.replace("ds.mT", "ds.mT / scale")),),
            "dq is right. dk is too large: the root of head_dim is missing.",
            "the scale belongs to the product of q and k, so both gradients have it.",
            "where the scale is applied: before dq and dk, or to one of them.",
        ),
        Mistake(
            "scale of dq forgotten",
            (("ds @ k[", "ds / scale @ k["),),
            "dk is right. dq is too large: the root of head_dim is missing.",
            "the scale belongs to the product of q and k, so both gradients have it.",
            "where the scale is applied: before dq and dk, or to one of them.",
        ),
        Mistake(
            "dv averaged over the group",
            (("(p.mT @ d_o).sum(2, keepdim=True)", "(p.mT @ d_o).mean(2, keepdim=True)"),),
            "dv is the mean over the query heads of a group, not their sum.",
            "each of the heads uses v, and gradients of several uses add up.",
            "what joins the heads of a group in dv.",
        ),
        Mistake(
            "dk averaged over the group",
            ((f"{DK}.sum(2", f"{DK}.mean(2"),),
            "dk is the mean over the query heads of a group, not their sum.",
            "each of the heads uses k, and gradients of several uses add up.",
            "what joins the heads of a group in dk.",
        ),
        Mistake(
            "dk not summed over the group",
            ((f"{DK}.sum(2, keepdim=True)", f"{DK}[:, :, :1]"),),
            "dk is that of the first query head of each group only.",
            "each of the heads uses k, and gradients of several uses add up.",
            "what joins the heads of a group in dk.",
        ),
        Mistake(
            "dv not summed over the group",
            (("(p.mT @ d_o).sum(2, keepdim=True)", "(p.mT @ d_o)[:, :, :1]"),),
            "dv is that of the first query head of each group only.",
            "each of the heads uses v, and gradients of several uses add up.",
            "what joins the heads of a group in dv.",
        ),
        Mistake(
            "dq overwritten",
            (("dq[..., rows, :] +=", "dq[..., rows, :] ="),),
            "dq is that of the last block of keys only.",
            "a query sees several blocks of keys, and each adds its part.",
            "whether dq is added to, or assigned.",
        ),
        Mistake(
            "dk overwritten",
            (("dk[..., columns, :] +=", "dk[..., columns, :] ="),),
            "dk is that of the last block of queries only.",
            "a key is seen by several blocks of queries, and each adds its part.",
            "whether dk is added to, or assigned.",
        ),
        Mistake(
            "dv overwritten",
            (("dv[..., columns, :] +=", "dv[..., columns, :] ="),),
            "dv is that of the last block of queries only.",
            "a value is read by several blocks of queries, and each adds its part.",
            "whether dv is added to, or assigned.",
        ),
        Mistake(
            "log_sum forgotten",
            (("scores(q, k, rows, columns) - log_sum[..., rows, None]", "scores(q, k, rows, columns)"),),
            "The recomputed weights are not divided by their sum: log_sum is not subtracted.",
            "exp(score − log_sum) is the weight itself; exp(score) is only its numerator.",
            "how p is recomputed.",
        ),
        Mistake(
            "dv from the gradient of the scores",
            (("(p.mT @ d_o)", "((p * (dp - delta[..., rows, :]) * scale).mT @ d_o)"),),
            "dv is computed from the gradient of the scores, not from the weights.",
            "out = p v, so the derivative by v is p.",
            "the matrix that d_out is multiplied by in dv.",
        ),
        Mistake(
            "dq and dk exchanged",
            (
                (
                    "return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)",
                    "return dq.to(q.dtype), dv.to(k.dtype), dk.to(v.dtype)",
                ),
            ),
            "The gradients of k and v are exchanged.",
            "gradients are returned in the order of forward's arguments. The shapes agree, so nothing "
            "complains.",
            "the order of what backward returns.",
        ),
    ),
    rewrites=(
        Rewrite(
            "columns outside, rows inside",
            """
class TiledAttention:
    @staticmethod
    def backward(ctx, d_out):
        q, k, v, out, log_sum = ctx.saved_tensors
        n_past, a = k.size(-2) - q.size(-2), q.size(-1) ** -0.5
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        delta = torch.einsum("...d,...d->...", out, d_out)
        for columns in blocks(0, k.size(-2), ctx.blocks[1]):
            for rows in blocks(0, q.size(-2), ctx.blocks[0]):
                if columns.start > rows.stop - 1 + n_past:
                    continue
                g = d_out[..., rows, :]
                p = (scores(q, k, rows, columns) - log_sum[..., rows].unsqueeze(-1)).exp()
                ds = a * p * (g @ v[..., columns, :].mT - delta[..., rows].unsqueeze(-1))
                dq[..., rows, :] += ds @ k[..., columns, :]
                dk[..., columns, :] += torch.einsum("bhgts,bhgtd->bhsd", ds, q[..., rows, :])[:, :, None]
                dv[..., columns, :] += torch.einsum("bhgts,bhgtd->bhsd", p, g)[:, :, None]
        return dq, dk, dv, None, None
""",
        ),
        Rewrite(
            "the scale at the end",
            (
                (DS, "ds = p * (dp - delta[..., rows, :])"),
                ("return dq.to", "dq, dk = dq * scale, dk * scale\n        return dq.to"),
            ),
        ),
        Rewrite(
            "the scale at the end, for dq only",
            (
                (DS, "ds = p * (dp - delta[..., rows, :])"),
                ("return dq.to", "dq *= scale\n        return dq.to"),
            ),
            mistake="scale of dk forgotten",
        ),
        Rewrite(
            "the softmax's derivative, a block at a time",
            (
                (
                    DS,
                    "ds = torch.einsum('...ts,...t->...ts', p, -(p * dp).sum(-1)) * scale + p * dp * scale",
                ),
            ),
            mistake="delta of the block",
        ),
    ),
)

# ---- 5.4 torch's kernel


def corner(m, *sizes):
    """Without gradients, as when generating: with them, the stage calls explicit_attention."""
    found = {}
    for T, S in sizes:
        q = random(2, 6, T, 8, seed=1, scale=1.5)
        k, v = random(2, 3, S, 8, seed=2, scale=1.5), random(2, 3, S, 8, seed=3)
        with torch.no_grad():
            name = f"attention of {T} queries and {S} keys [batch, head, position, dimension]"
            found[name] = m.attention(q, k, v, None, 0.0)
    return found


def square(m):
    return corner(m, (5, 5), (1, 1))


def fewer_queries(m):
    return corner(m, (3, 7))


def single_query(m):
    return corner(m, (1, 7))


def window(m):
    """A mask that is given: two earlier keys and the own one, as in a sliding window."""
    found = {}
    for T, S in ((5, 5), (3, 7), (1, 7)):
        q = random(2, 6, T, 8, seed=1, scale=1.5)
        k, v = random(2, 3, S, 8, seed=2, scale=1.5), random(2, 3, S, 8, seed=3)
        mask = m.causal_mask(T, S, "cpu")
        mask = mask.masked_fill(torch.ones(T, S).tril(S - T - 3).bool(), -torch.inf)
        with torch.no_grad():
            name = f"with a window as mask, {T} queries and {S} keys [batch, head, position, dimension]"
            found[name] = m.attention(q, k, v, mask, 0.0)
    return found


def dropped(m):
    q, k, v = random(2, 6, 5, 8, seed=1), random(2, 3, 5, 8, seed=2), random(2, 3, 5, 8, seed=3)
    with torch.no_grad():
        return {"attention when every weight is dropped": m.attention(q, k, v, None, 1.0)}


def half(m):
    q, k, v = (x.bfloat16() for x in inputs(5, 5))
    with torch.no_grad():
        return {"dtype of attention for bfloat16": str(m.attention(q, k, v, None, 0.0).dtype)}


def equals(T, S):
    def holds(m):
        q, k, v = random(2, 6, T, 8, seed=1), random(2, 3, S, 8, seed=2), random(2, 3, S, 8, seed=3)
        return properties.close(m.attention(q, k, v, None, 0.0), explicit(q, k, v))

    return holds


TOO_FEW = "if mask is None and 1 < T < S:"
CAUSAL = "is_causal=T > 1"

KERNEL = Exercise(
    number="5.4",
    title="Calling torch's kernel",
    minutes=15,
    functions=("attention",),
    question="torch's scaled_dot_product_attention has an argument is_causal, which aligns the first "
    "query with the first key. For which numbers of queries T and keys S is that what a model with a "
    "cache needs? And what does a single query see?",
    shapes="q (B, n_head, T, head_dim), k and v (B, n_kv_head, S, head_dim) -> (B, n_head, T, head_dim). "
    "A mask of None means causal, and the last query sees every key. T = S: is_causal. T = 1: no mask at "
    "all. 1 < T < S: a mask from causal_mask.",
    steps="1. If a mask is given, pass it on, in q's dtype.\n"
    "2. If none is given and 1 < T < S, make one with causal_mask.\n"
    "3. Otherwise pass is_causal, but not for a single query.\n"
    "4. Let the kernel share key heads (enable_gqa), and pass the dropout on.\n"
    "5. What else the stage does here is for speed, and may be left out: flash_attn on GPUs, "
    "explicit_attention for short texts in training on a CPU, and a group's queries as rows of one "
    "product if T is 1.",
    afterwards="An argument that means something else in one corner is the worst kind of trap: training "
    "uses T = S, where all is right, and the mistake appears when a conversation is continued.",
    probes=(square, fewer_queries, single_query, window, dropped, half),
    properties={
        "5 queries and 5 keys: it equals attention with a score matrix": equals(5, 5),
        "3 queries and 7 keys: it equals attention with a score matrix": equals(3, 7),
        "1 query and 7 keys: it equals attention with a score matrix": equals(1, 7),
    },
    mistakes=(
        Mistake(
            "is_causal with fewer queries than keys",
            ((TOO_FEW, "if False:"),),
            "With 3 queries and 7 keys, query i sees the keys up to i, counted from the first key.",
            "the queries are the last tokens. is_causal aligns the first query with the first key, so a "
            "text that is read in parts would not see what came before.",
            "the case of fewer queries than keys, but more than one.",
        ),
        Mistake(
            "is_causal for a single query",
            ((CAUSAL, "is_causal=True"), ("if T == 1:", "if False:")),
            "A single query sees the first key only.",
            "it is the newest token and should see all keys. is_causal takes it for the first one; every "
            "token that is generated with a cache would be wrong.",
            "is_causal when there is one query.",
        ),
        Mistake(
            "is_causal for a group's rows",
            ((CAUSAL, "is_causal=True"),),
            "For a single query, the first head of a group sees one key, the second one two, and so on.",
            "once the heads of a group are rows, is_causal takes them for positions.",
            "is_causal when there is one query.",
        ),
        Mistake(
            "never causal",
            ((CAUSAL, "is_causal=False"),),
            "With as many queries as keys, every query sees all keys.",
            "the next token is among the inputs: the training loss falls towards 0, and nothing is learned.",
            "the case of as many queries as keys.",
        ),
        Mistake(
            "nothing causal",
            ((TOO_FEW, "if False:"), (CAUSAL, "is_causal=False")),
            "Without a mask, every query sees all keys.",
            "a mask of None means causal in this stage. Only a single query needs nothing.",
            "what happens if no mask is given.",
        ),
        Mistake(
            "mask ignored",
            (("T, S = q.size(2), k.size(2)", "T, S, mask = q.size(2), k.size(2), None"),),
            "A mask that is given has no effect.",
            "sliding windows and batches of sequences with different lengths rely on it.",
            "what happens if a mask is given.",
        ),
        Mistake(
            "mask ignored for a single query",
            (("if T == 1:", "if T == 1:\n        mask = None\n    if T == 1:"),),
            "A mask that is given has no effect on a single query.",
            "with a sliding window, not even a single query sees all keys.",
            "the case of a single query.",
        ),
        Mistake(
            "dropout forgotten",
            (
                ("None, dropout, is_causal", "None, 0.0, is_causal"),
                ("mask.to(q.dtype), dropout,", "mask.to(q.dtype), 0.0,"),
            ),
            "The dropout probability has no effect.",
            "without dropout all is right here, and a model trained with it would overfit sooner than "
            "expected.",
            "the arguments of the kernel.",
        ),
        Mistake(
            "groups in the other order",
            (
                (
                    "q = q.reshape(q.size(0), k.size(1), -1, q.size(3))",
                    "q = q.reshape(q.size(0), -1, k.size(1), q.size(3)).transpose(1, 2)",
                ),
            ),
            "For a single query, the heads are put into groups in another order: 0, 3, … share a key head.",
            "neighbouring query heads share a key head, as in stage 4, whatever the number of queries is.",
            "how the heads of a single query become rows.",
        ),
        Mistake(
            "rows not turned back",
            (("return y.reshape(y.size(0), -1, T, y.size(3))", "return y"),),
            "For a single query, the heads of a group stay rows.",
            "the caller expects (B, n_head, T, head_dim). With 6 heads and one token that is another shape.",
            "what is returned if there is one query.",
        ),
        Mistake(
            "groups in the kernel not enabled",
            (("dropout, enable_gqa=True)", "dropout)"), (f"{CAUSAL}, enable_gqa=True)", f"{CAUSAL})")),
            "The kernel refuses fewer key heads than query heads.",
            "it shares them only if it is told so; otherwise keys and values have to be repeated first.",
            "the arguments of the kernel.",
        ),
    ),
    rewrites=(
        Rewrite(
            "torch's kernel alone",
            """
def attention(q, k, v, mask, dropout):
    T, S = q.shape[2], k.shape[2]
    if mask is None and 1 < T < S:
        mask = causal_mask(T, S, q.device)
    causal = mask is None and T > 1
    mask = None if mask is None else mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, enable_gqa=True)
""",
        ),
        Rewrite(
            "always a mask of truth values, keys repeated",
            """
def attention(q, k, v, mask, dropout):
    if mask is None:
        mask = causal_mask(q.size(2), k.size(2), q.device)
    n = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(n, 1), v.repeat_interleave(n, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask == 0, dropout_p=dropout)
""",
        ),
        Rewrite(
            "explicit_attention for everything",
            (('if q.device.type == "cpu" and torch.is_grad_enabled() and S <= 512:', "if True:"),),
        ),
        Rewrite(
            "is_causal whenever no mask is given",
            """
def attention(q, k, v, mask, dropout):
    causal = mask is None and q.size(2) > 1
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, enable_gqa=True)
""",
            mistake="is_causal with fewer queries than keys",
        ),
    ),
)

# ---- the whole file


def whole_model(m):
    """Loss with gradients, as in training; logits without them, as when generating."""
    model, idx = small_model(m, n_kv_head=2), tokens(2, 11)
    model(idx, tokens(2, 11, seed=4))[1]["next_token"].backward()
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad
    found = {"gradient of q_proj in training [row, column]": gradient}
    with torch.no_grad():
        found["logits [batch, position, token]"] = model(idx)[0]
    return found


def whole_model_with_a_cache(m):
    logits, _ = in_steps(small_model(m, n_kv_head=2), tokens(2, 11), (4, 1, 1, 5))
    return {"logits with a cache, a few tokens at a time [batch, position, token]": logits}


def explicit_with_fewer_queries(m):
    q, k, v = random(2, 6, 3, 8, seed=1), random(2, 3, 7, 8, seed=2), random(2, 3, 7, 8, seed=3)
    return {"attention of 3 queries and 7 keys, with gradients": m.attention(q, k, v, None, 0.0)}


EXPLICIT_MASK = "mask = causal_mask(q.size(2), k.size(2), q.device)"

WHOLE = Exercise(
    number="5",
    title="The whole stage",
    minutes=20,
    functions=(),
    question="If no mask is given, attention is causal. Which two places of stage 4 then need not make a "
    "mask any more?",
    shapes="KVCache.mask(n) returns None, and so does GPT.forward pass None without a cache. attention: "
    "mask (T, S) or None. Everything else is as in stage 4.",
    steps="1. Let attention call torch's kernel (exercise 5.4).\n"
    "2. Keep stage 4's attention under another name, for short texts in training on a CPU, if you like.\n"
    "3. Let KVCache.mask return None, and pass None in GPT.forward without a cache.",
    probes=(whole_model, whole_model_with_a_cache, explicit_with_fewer_queries),
    properties={
        "no position sees a later one": properties.no_leak,
        "with a cache the logits are the same": properties.cache_equals_no_cache,
    },
    mistakes=(
        Mistake(
            "no mask in training",
            ((EXPLICIT_MASK, "mask = torch.zeros(())"),),
            "With gradients on a CPU, every position sees all keys.",
            "there the stage uses the explicit form, in which None must mean causal as well.",
            "explicit_attention, if no mask is given.",
        ),
        Mistake(
            "upper-left corner in training",
            ((EXPLICIT_MASK, "mask = torch.full((q.size(2), k.size(2)), -torch.inf).triu(1)"),),
            "With gradients on a CPU, 3 queries see the keys up to their own number, counted from the "
            "first of 7.",
            "the queries are the last tokens, in the explicit form as well.",
            "explicit_attention, if no mask is given.",
        ),
        Mistake(
            "cache hides nothing",
            (("return None", "return torch.zeros((n_new, self.length + n_new), device=self.keys.device)"),),
            "With a cache, several new tokens see each other's future.",
            "a mask of None means causal; one of zeros means that nothing is hidden.",
            "what the cache gives as mask.",
        ),
    ),
    rewrites=(),
)

# ---- predictions


def bytes_of_scores() -> int:
    """Of one sequence of 8,192 tokens, with 12 heads and 2 bytes a number."""
    q = torch.empty(1, 12, 8192, 64, dtype=torch.bfloat16, device="meta")
    return (q @ q.mT).nbytes


def saved_per_query() -> int:
    """How many numbers the tiled attention saves beside q, k and v, per query and head of width 64."""
    from stage5_flash.tiled import tiled_attention

    q, k, v = (random(1, 1, 5, 64, seed=i).requires_grad_() for i in (1, 2, 3))
    saved = tiled_attention(q, k, v).grad_fn.next_functions[0][0].saved_tensors
    return sum(tensor.numel() for tensor in saved[3:]) // 5


def exactness() -> str:
    """Whether the tiled attention gives the numbers of attention with a score matrix, in 64 bits."""
    from stage5_flash.tiled import tiled_attention

    q, k, v = (x.double() for x in inputs(7, 7))
    error = (tiled_attention(q, k, v, 3, 2) - explicit(q, k, v)).abs().max()
    return "exact" if error < 1e-12 else "an approximation"


QUESTIONS = (
    Question(
        "One layer, 12 heads, a text of 8,192 tokens: how many bytes has the score matrix with 2 bytes a "
        "number?",
        bytes_of_scores,
        "12 heads · 8,192² · 2 bytes = {answer} bytes, for one layer and one sequence.",
    ),
    Question(
        "Up to rounding, is FlashAttention exact or an approximation?",
        exactness,
        "It is {answer}: in 64 bits, the numbers agree to twelve digits.",
        choices=("exact", "an approximation"),
    ),
    Question(
        "Besides q, k and v: how many numbers per query and head does it save for its backward pass, with "
        "heads of width 64?",
        saved_per_query,
        "The output, 64 numbers, and the logarithm of the sum: {answer}.",
    ),
    Question(
        "Which way does the validation loss go, against stage 4?",
        lambda: loss_change("stage5_flash"),
        "Measured over three seeds: {answer}. It is the same function, computed in another order.",
        choices=CHANGES,
    ),
)

CHAPTER = Chapter(
    number="5",
    name="stage5",
    title="FlashAttention",
    source="stage5_flash/model.py",
    before="stage4_gqa/model.py",
    beyond="exercises/beyond/stage5.py",
    exercises=(ROW, FORWARD, BACKWARD, KERNEL),
    questions=QUESTIONS,
    whole=WHOLE,
)
