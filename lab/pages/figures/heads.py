"""The ideas of attention in stages 4, 5 and 7a: shared heads, tiles, and the latent."""

import torch

from lab import stages
from lab.pages.figures.svg import Drawing, decimal
from stage5_flash import tiled


def wiring() -> Drawing:
    """Which key/value head each query head reads, with the right order and with the wrong one."""
    stage = stages.load("stage4_gqa")
    n_head, n_kv_head = 4, 2
    drawing = Drawing(
        "Query heads and the key/value heads that they read",
        "With repeat_interleave, query heads 0 and 1 read key/value head 0, and heads 2 and 3 read head"
        " 1. With repeat, heads 0 and 2 read head 0, and heads 1 and 3 read head 1.",
    )
    q, k = torch.zeros(1, n_head, 1, 2), torch.zeros(1, n_kv_head, 1, 2)
    v = torch.arange(n_kv_head).view(1, -1, 1, 1).expand_as(k).float()  # each head's value is its number
    right = stage.attention(q, k, v, torch.zeros(1, 1), 0.0)
    k, v = (x.repeat(1, n_head // n_kv_head, 1, 1) for x in (k, v))  # then attention repeats nothing
    wrong = stage.attention(q, k, v, torch.zeros(1, 1), 0.0)
    for x, call, read in ((12, "repeat_interleave", right), (190, "repeat", wrong)):
        is_right = call == "repeat_interleave"
        sign, color = ("right", "green") if is_right else ("wrong", "changed")
        drawing.text(x, 18, call, 11, mono=True, bold=True)
        drawing.text(x + 158, 18, sign, 12, color, "end", bold=True)
        for i in range(n_kv_head):
            fill, stroke = ("blue-fill", "blue") if i == 0 else ("orange-fill", "orange")
            drawing.box(x + 80 * i, 172, 78, 26, fill, stroke)
            drawing.text(x + 80 * i + 39, 185, f"k{i}, v{i}", 12, stroke, "middle", mono=True)
        for h, head in enumerate(read[0, :, 0, 0].int().tolist()):
            left, (fill, stroke) = x + 40 * h, (("blue-fill", "blue"), ("orange-fill", "orange"))[head]
            drawing.line((x + 80 * head + 39, 171), (left + 19, 128), color=stroke, arrow=True)
            drawing.box(left, 100, 38, 26, fill, stroke, dashed=True)
            drawing.text(left + 19, 113, f"k{head}", 12, stroke, "middle", mono=True)
            drawing.line((left + 19, 100), (left + 19, 62), color=stroke, arrow=True)
            drawing.box(left, 34, 38, 26, fill, stroke)
            drawing.text(left + 19, 47, f"q{h}", 12, stroke, "middle", mono=True)
    drawing.text(12, 216, "Above, the query heads; dashed, what the call returns;", 11, "muted")
    drawing.text(12, 231, "below, the heads in the cache.", 11, "muted")
    drawing.height = 246
    return drawing


def running(q, k, v, rows, block: int):
    """The running maximum m, sum l and output o of the last of these rows, after each block of keys.

    It repeats the loop of tiled.py, which keeps its last numbers only; a test compares the two.
    """
    m, total, out = torch.tensor(-torch.inf), torch.tensor(0.0), torch.tensor(0.0)
    for columns in tiled.visible_keys(rows, q, k, block):
        s = tiled.scores(q, k, rows, columns)[0, 0, -1]
        new_m = torch.maximum(m, s.max())
        p, rescale = torch.exp(s - new_m), torch.exp(m - new_m)
        total, out, m = rescale * total + p.sum(), rescale * out + p @ v[0, 0, columns, 0], new_m
        yield columns, s, m, total, out


def tiles_example():
    """q, k and v (1, 1, 6, 1), and the size of a block."""
    # With head_dim 1 and queries of 1, the scores are the keys.
    k, v = torch.tensor([1.0, 0, 2, 1, 3, 0]), torch.tensor([1.0, 2, 3, 4, 5, 6])
    return torch.ones(1, 1, 6, 1), k.view(1, 1, 6, 1), v.view(1, 1, 6, 1), 2


def tiles() -> Drawing:
    """The tiles of the score matrix in their order, and what the last query keeps between them."""
    q, k, v, block = tiles_example()
    n, cell = q.size(2), 24
    drawing = Drawing(
        "Attention by tiles, with a running maximum, sum and output",
        "The score matrix of six queries and six keys in tiles of two by two. Tiles above the diagonal "
        "are skipped. Below, for the last query: its scores in three blocks of keys and, after each "
        "block, the running maximum m, sum l and output o. The last o / l equals the output of ordinary"
        " attention.",
    )
    drawing.text(14, 18, "scores, by tiles", 13, bold=True)
    for rows in tiled.blocks(0, n, block):
        visited = tiled.visible_keys(rows, q, k, block)
        for columns in tiled.blocks(0, n, block):
            x, y = 14 + cell * columns.start, 34 + cell * rows.start
            if columns not in visited:
                drawing.box(x, y, 2 * cell - 3, 2 * cell - 3, None, "edge", dashed=True)
                continue
            last = rows.stop == n
            drawing.box(x, y, 2 * cell - 3, 2 * cell - 3, "blue-fill" if last else "box-fill", "blue")
            if last:
                drawing.text(x + 22, y + 22, str(visited.index(columns) + 1), 13, "blue", "middle", bold=True)
    for i, line in enumerate(("Blue: the last two queries", "go through the keys in", "the order 1, 2, 3.")):
        drawing.text(174, 104 + 15 * i, line, 11)
    for i, line in enumerate(("Dashed: only later keys,", "so the tile is skipped.")):
        drawing.text(174, 48 + 15 * i, line, 11)
    drawing.text(174, 160, "No more than one tile of", 11)
    drawing.text(174, 175, "scores exists at a time.", 11)
    drawing.text(14, 204, "the last query", 13, bold=True)
    for y, name in zip((224, 242, 268, 286, 304), ("scores", "values", "m", "l", "o"), strict=True):
        drawing.text(14, y, name, 12, mono=True, bold=name in "mlo")
    rows = slice(n - block, n)
    for i, (columns, s, m, total, out) in enumerate(running(q, k, v, rows, block)):
        x = 74 + 94 * i
        drawing.box(x, 213, 88, 40, "blue-fill", "blue")
        for j in range(block):
            drawing.text(x + 30 + 42 * j, 224, decimal(s[j], 0), 11, "ink", "end", mono=True)
            value = v[0, 0, columns.start + j, 0]
            drawing.text(x + 30 + 42 * j, 242, decimal(value, 0), 11, "ink", "end", mono=True)
        for y, number, digits in ((268, m, 0), (286, total, 3), (304, out, 3)):
            drawing.text(x + 72, y, decimal(number, digits), 11, "ink", "end", mono=True)
            if i < 2:
                drawing.line((x + 80, y), (x + 104, y), width=1, arrow=True)
    whole = stages.load("stage5_flash").explicit_attention(q, k, v, None, 0.0)[0, 0, -1, 0]
    drawing.text(14, 332, f"o / l = {decimal(out / total, 3)}", 12, "green", mono=True, bold=True)
    drawing.text(136, 332, f"softmax of the whole row: {decimal(whole, 3)}", 11)
    drawing.height = 348
    return drawing


def latent() -> Drawing:
    """Where W_k is applied: to every cached latent, or to the query."""
    stage = stages.load("stage7a_mla")
    config = stage.GPTConfig(vocab_size=65, n_layer=4, n_head=4, n_embd=128)
    rank, nope, rope = config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim
    drawing = Drawing(
        "Latent attention: the matrix moves from the keys to the query",
        "Above, expanded: W_k turns each cached latent c into a key, which is multiplied by the query. "
        "Below, absorbed: the transpose of W_k is applied to the query once, and the cached latents "
        "themselves serve as keys. Beside each latent is a small rotated key r, which W_k does not "
        "touch.",
    )
    columns = [134 + 56 * i for i in range(4)]

    def cached(y):
        for i, x in enumerate(columns):
            drawing.box(x, y, 34, 26, "green-fill", "green", 2)
            drawing.text(x + 17, y + 13, f"c{'₁₂₃₄'[i]}", 12, "green", "middle", mono=True)
            drawing.box(x + 35, y, 16, 26, "purple-fill", "purple", 2)
            drawing.text(x + 43, y + 13, "r", 12, "purple", "middle", mono=True)
        drawing.text(14, y + 13, "in the cache", 11, "muted")

    def matrix(x, y, name):
        drawing.box(x, y, 40, 26, "orange-fill", "orange", 2)
        drawing.text(x + 20, y + 13, name, 12, "orange", "middle", mono=True, bold=True)

    drawing.text(14, 18, "expanded", 13, bold=True)
    drawing.text(346, 18, "training, and reading a prompt", 11, "muted", "end")
    drawing.box(14, 36, 40, 26, "blue-fill", "blue")
    drawing.text(34, 49, "q", 12, "blue", "middle", mono=True)
    drawing.line((54, 49), (132, 49), color="blue", arrow=True)
    drawing.text(93, 38, "q · k", 11, "blue", "middle", mono=True)
    for i, x in enumerate(columns):
        drawing.box(x, 36, 34, 26, "page", "edge", dashed=True)
        drawing.text(x + 17, 49, f"k{'₁₂₃₄'[i]}", 12, "ink", "middle", mono=True)
        drawing.line((x + 17, 78), (x + 17, 63), arrow=True)
        matrix(x - 3, 78, "W_k")
        drawing.line((x + 17, 120), (x + 17, 105), arrow=True)
    drawing.text(14, 91, "once per token", 11, "orange", bold=True)
    cached(120)
    drawing.text(
        14, 166, f"S · {rank} · {nope} multiplications in a head before the first score", 11, "muted"
    )
    drawing.line((14, 184), (346, 184), width=1)
    drawing.text(14, 204, "absorbed", 13, bold=True)
    drawing.text(346, 204, "decoding", 11, "muted", "end")
    drawing.box(14, 222, 40, 26, "blue-fill", "blue")
    drawing.text(34, 235, "q", 12, "blue", "middle", mono=True)
    drawing.line((54, 235), (70, 235), color="blue", arrow=True)
    matrix(71, 222, "W_kᵀ")
    drawing.line((111, 235), (128, 235), color="blue")
    for x in columns:
        drawing.line((x + 17, 235), (x + 17, 263), color="blue", arrow=True)
    drawing.line((128, 235), (columns[-1] + 17, 235), color="blue")
    drawing.text(14, 256, "once", 11, "orange", bold=True)
    drawing.text(346, 226, "(W_kᵀ q) · c", 11, "blue", "end", mono=True)
    cached(264)
    drawing.text(14, 310, f"{rank} · {nope} multiplications, however many tokens there are", 11, "muted")
    heads = config.n_head * (nope + rope + config.v_head_dim)
    drawing.text(14, 330, f"Cached per token: c, {rank} numbers, and r, {rope} numbers.", 11)
    drawing.text(14, 345, f"Keys and values of {config.n_head} heads would be {heads}.", 11)
    drawing.height = 360
    return drawing
