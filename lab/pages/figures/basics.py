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
        "Bars of x = (1, 2, 4, 5), of 3 x and of x + 10, and of what LayerNorm and RMSNorm make of them. "
        "Both norms give the same for x and 3 x. For x + 10 LayerNorm gives the same again, not so RMSNorm.",
    )
    columns = (
        ("x", None, 15.0, 14),
        ("LayerNorm(x)", layer_norm, 1.5, 122),
        ("RMSNorm(x)", rms_norm, 1.5, 242),
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
