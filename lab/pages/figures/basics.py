"""The ideas of stages 0 to 3: the causal mask, the norms, rotary positions, and the gate."""

import torch

from lab import stages
from lab.pages.figures.svg import Drawing, decimal


def mask() -> Drawing:
    """The causal mask of a whole text, and of its last tokens with a cache."""
    stage = stages.load("stage0_gpt")
    words, n_new = ["The", "cat", "sat", "on", "the", "mat"], 2
    n_key = len(words)
    drawing = Drawing(
        "The causal mask, without and with a cache",
        "Two grids with a row for each query and a column for each key. The first, for a whole text of "
        f"{n_key} tokens, has 0 on and below the diagonal and −∞ above it. The second, for {n_new} new "
        f"tokens and {n_key - n_new} in a cache, equals the last {n_new} rows of the first.",
    )
    cell = 22
    for x, n_query, heading in ((10, n_key, "whole text"), (191, n_new, "with a cache")):
        values = stage.causal_mask(n_query, n_key, "cpu")
        drawing.text(x, 18, heading, 13, bold=True)
        drawing.text(x, 36, f"{n_query} queries × {n_key} keys", 11, "muted")
        for i, row in enumerate(values, n_key - n_query):
            y = 50 + cell * i
            drawing.text(x, y + 10, words[i], 11)
            for j, value in enumerate(row):
                seen = value == 0
                fill, color = ("blue-fill", "blue") if seen else ("faint-fill", "muted")
                left = x + 29 + cell * j
                drawing.box(left, y, cell - 2, cell - 2, fill, color if seen else None, radius=2)
                drawing.text(left + 10, y + 10, "0" if seen else "−∞", 11, color, "middle")
    last = 50 + cell * (n_key - n_new)
    drawing.line((174, last), (174, last + cell * n_new - 2), color="changed", width=3)
    drawing.line((177, last + cell - 1), (187, last + cell - 1), color="changed", width=2, arrow=True)
    drawing.text(220, last - 38, "lower right corner:", 11)
    drawing.text(220, last - 23, "the last token sees all", 11)
    drawing.text(10, 196, "a row: a token that looks (query)", 11, "muted")
    drawing.text(10, 212, "a column: a token that is looked at (key)", 11, "muted")
    drawing.height = 226
    return drawing


def norms() -> Drawing:
    """One vector, scaled and shifted, through both norms."""
    first, second = stages.load("stage0_gpt"), stages.load("stage1_rmsnorm")
    x = torch.tensor([1.0, 2.0, 4.0, 5.0])
    config = {"vocab_size": 1, "n_head": 1, "n_embd": len(x), "norm_eps": 1e-5}
    blocks = [stage.Block(stage.GPTConfig(**config), 0) for stage in (first, second)]
    layer_norm, rms_norm = (block.input_layernorm for block in blocks)
    drawing = Drawing(
        "One vector through LayerNorm and RMSNorm",
        "Bars of x = (1, 2, 4, 5), of 3 x and of x + 10, and of what LayerNorm and RMSNorm make of "
        "them. Both norms give the same for x and 3 x. For x + 10 LayerNorm gives the same again, not "
        "so RMSNorm.",
    )
    columns = (
        ("input", None, 15.0, 14),
        ("LayerNorm", layer_norm, 1.5, 122),
        ("RMSNorm", rms_norm, 1.5, 242),
    )
    for heading, _, _, left in columns:
        drawing.text(left, 18, heading, 12, mono=True, bold=True)
    y = 40
    for heading, row in (
        ("x", x),
        ("3 x: the scale is divided out by both", 3 * x),
        ("x + 10: a shift changes RMSNorm's result", x + 10),
    ):
        drawing.text(14, y, heading, 12, bold=True)
        y += 18
        for _, norm, largest, left in columns:
            values, same = row, True
            if norm is not None:
                with torch.no_grad():
                    values, same = norm(row), torch.allclose(norm(row), norm(x), atol=1e-4)
            color = "muted" if norm is None else "green" if same else "orange"
            zero = left + 40 + (30 if norm is layer_norm else 2)
            for i, value in enumerate(values.tolist()):
                middle = y + 16 * i
                written = decimal(value, 0 if norm is None else 2)
                drawing.text(left + 34, middle, written, 11, "ink", "end", mono=True)
                length = value / largest * (28 if norm is layer_norm else 52)
                drawing.box(zero + min(0, length), middle - 5, abs(length), 10, color, None, radius=1)
            drawing.line((zero, y - 8), (zero, y + 56), width=1)
        y += 82
    drawing.text(14, y - 6, "green: as for x", 11, "green")
    drawing.text(122, y - 6, "orange: not as for x", 11, "orange")
    drawing.height = y + 8
    return drawing


def rope() -> Drawing:
    """One pair of q and of k, rotated by their positions."""
    stage = stages.load("stage2_rope")
    q, k = torch.tensor([0.9, 0.3]), torch.tensor([0.5, 0.85])
    drawing = Drawing(
        "RoPE: two numbers of a query and of a key, rotated by their positions",
        "Four circles with an arrow for q and one for k: not rotated; q at position 2 and k at 1; q at "
        "5 and k at 4; q at 5 and k at 1. In the second and the third the angle between the arrows is "
        "the same, and so is the score. In the fourth both are different.",
    )
    panels = []
    for positions in ((0, 0), (2, 1), (5, 4), (5, 1)):
        rotated = []
        for vector, position in zip((q, k), positions, strict=True):
            turn = stage.rotation(torch.tensor([position]), 2, 10000.0)  # a pair alone: one radian a token
            rotated.append(stage.rotate(vector.view(1, 1, 1, 2), turn).flatten())
        panels.append((positions, rotated, decimal(rotated[0] @ rotated[1])))
    scores = [score for _, _, score in panels]
    for i, (positions, rotated, score) in enumerate(panels):
        x, y = 92 + 176 * (i % 2), 100 + 200 * (i // 2)
        heading = "not rotated" if i == 0 else f"q at {positions[0]}, k at {positions[1]}"
        drawing.text(x, y - 82, heading, 12, "ink", "middle", bold=True)
        drawing.circle(x, y, 58, fill="page", stroke="faint-fill")
        for vector, letter, color in zip(rotated, "qk", ("blue", "orange"), strict=True):
            end_x, end_y = (vector * 54).tolist()
            drawing.line((x, y), (x + end_x, y - end_y), color=color, width=2.5, arrow=True)
            far = vector / vector.norm() * 66
            drawing.text(x + far[0].item(), y - far[1].item(), letter, 12, color, "middle", bold=True)
        color = "green" if scores.count(score) > 1 else "ink"
        drawing.text(x, y + 86, f"q · k = {score}", 12, color, "middle", mono=True, bold=True)
    drawing.text(14, 410, "This pair turns by 1 radian, about 57°, per position.", 11, "muted")
    drawing.height = 426
    return drawing


def gate() -> Drawing:
    """What a gate makes of a value, beside GELU, which has no gate."""
    gated, plain = stages.load("stage3_swiglu"), stages.load("stage0_gpt")
    drawing = Drawing(
        "silu(g) · u for five gates and five values",
        "A table of silu(g) · u with a row for each gate g from −4 to 4 and a column for each value u "
        "from −2 to 2. With a negative gate all results are near 0; with a positive one the value "
        "passes, enlarged. Below, gelu(u): one result for each u.",
    )
    with torch.no_grad():
        mlp = gated.MLP(gated.GPTConfig(vocab_size=1, n_head=1, n_embd=2, intermediate_size=1))
        for matrix, weight in (
            (mlp.gate_proj, [[1, 0]]),
            (mlp.up_proj, [[0, 1]]),
            (mlp.down_proj, [[1], [0]]),
        ):
            matrix.weight.copy_(torch.tensor(weight))
        without = plain.MLP(plain.GPTConfig(vocab_size=1, n_head=1, n_embd=1, bias=False))
        for matrix in (without.up_proj, without.down_proj):  # one of the four hidden numbers counts
            matrix.weight.zero_()
            matrix.weight[0, 0] = 1

        gates, values = [-4.0, -2.0, 0.0, 2.0, 4.0], [-2.0, -1.0, 0.0, 1.0, 2.0]
        inputs = torch.cartesian_prod(torch.tensor(gates), torch.tensor(values))
        table = mlp(inputs)[:, 0].view(5, 5)
        silu = mlp(torch.tensor([[g, 1.0] for g in gates]))[:, 0]
        gelu = without(torch.tensor(values)[:, None])[:, 0]

    def cells(y, results):
        for j, result in enumerate(results):
            small = abs(result) < 0.5
            fill, color = ("blue-fill", "blue") if result > 0 else ("orange-fill", "orange")
            x = 116 + 47 * j
            drawing.box(x, y, 45, 24, "faint-fill" if small else fill, None, radius=2)
            drawing.text(x + 40, y + 12, decimal(result), 11, "muted" if small else color, "end", mono=True)

    drawing.text(14, 18, "silu(g) · u", 13, mono=True, bold=True)
    for j, value in enumerate(values):
        drawing.text(156 + 47 * j, 40, f"u={decimal(value, 0)}", 11, "ink", "end", mono=True)
    drawing.text(46, 40, "g", 11, "ink", "end", mono=True)
    drawing.text(106, 40, "silu(g)", 11, "ink", "end", mono=True)
    for i, (g, results) in enumerate(zip(gates, table, strict=True)):
        y = 52 + 26 * i
        drawing.text(46, y + 12, decimal(g, 0), 11, "ink", "end", mono=True)
        drawing.text(106, y + 12, decimal(silu[i]), 11, "muted", "end", mono=True)
        cells(y, results)
    drawing.text(14, 206, "gelu(u), without a gate", 13, mono=True, bold=True)
    cells(220, gelu)
    drawing.height = 256
    return drawing
