"""The ideas of deploy/: the blocks of a paged cache, and a quantized group."""

import torch

from deploy.quantization import grid
from deploy.serving.blocks import NULL, Blocks
from lab.pages.figures.svg import Drawing, decimal


def pages() -> Drawing:
    """Two texts that begin alike, their block tables, and the blocks that they share."""
    size, texts = 4, ("First Citizen:", "First Citizen: Speak")
    blocks = Blocks(10, size, copy=lambda source, target: None)
    tables = []
    for text in texts:
        tokens = [ord(character) for character in text]
        table = blocks.fork(blocks.match(tokens))
        blocks.grow(table, len(tokens))
        blocks.computed(table, tokens, len(tokens))
        tables.append(table)
    drawing = Drawing(
        "Block tables of two texts that begin alike",
        f"Two texts in blocks of {size} characters. Their tables point to blocks of one pool. The first "
        "blocks have the same content and are held by both texts; each text has its last blocks to "
        "itself; the other blocks are free.",
    )
    pool_y = 104
    for y, name, text, table, color in (
        (34, "a", texts[0], tables[0], "blue"),
        (190, "b", texts[1], tables[1], "orange"),
    ):
        drawing.text(14, y + 13, name, 13, color, bold=True)
        for i, block in enumerate(table.blocks):
            x = 34 + 64 * i
            part = text[size * i : size * (i + 1)]
            drawing.box(x, y, 60, 26, f"{color}-fill", color)
            drawing.text(x + 30, y + 13, part.replace(" ", "␣"), 12, color, "middle", mono=True)
            target = 16 + 36 * (block - 1) + 17 + (4 if color == "orange" else -4)
            if y < pool_y:
                drawing.line((x + 30, y + 26), (target, pool_y - 2), color=color, arrow=True)
            else:
                drawing.line((x + 30, y), (target, pool_y + 46), color=color, arrow=True)
    drawing.text(14, 18, "a request's text, in blocks of four characters", 11, "muted")
    for block, references in enumerate(blocks.references):
        if block == NULL:  # it is never taken
            continue
        x = 16 + 36 * (block - 1)
        fill, color = ("green-fill", "green") if references > 1 else ("box-fill", "ink")
        fill, color = (fill, color) if references else (None, "muted")
        edge = "green" if references > 1 else "edge"
        drawing.box(x, pool_y, 33, 44, fill, edge, 2 if references > 1 else 1, dashed=not references)
        drawing.text(x + 16.5, pool_y + 14, str(block), 13, color, "middle", mono=True, bold=True)
        drawing.text(x + 16.5, pool_y + 32, f"×{references}" if references else "free", 11, color, "middle")
    drawing.text(14, 236, "In the middle, the pool: the number of each block, and how", 11, "muted")
    drawing.text(14, 251, "many texts hold it. Green blocks are stored once for both.", 11, "muted")
    drawing.height = 264
    return drawing


def group() -> Drawing:
    """Seven weights on a grid of four bits, without and with one large weight among them."""
    bits = 4
    weights = [-0.31, -0.22, -0.13, -0.04, 0.05, 0.19, 0.28]
    drawing = Drawing(
        "A group of seven weights, rounded to 4 bits",
        "Two number lines with the grid of 16 values, the weights above it and the values that replace "
        "them below it, and tables of weights, codes, values and errors. In the second group the last "
        "weight is 1.60 instead of 0.28: the grid is coarser, and the errors of the other weights are "
        "larger.",
    )
    for top, heading, row in (
        (14, "seven weights of like size", weights),
        (190, "the same, with one large weight", [*weights[:-1], 1.6]),
    ):
        w = torch.tensor([row])
        scale, zero = grid.find_grid(w, bits, None)
        codes = grid.to_codes(w, scale, zero, bits, None)
        values = grid.dequantize(grid.Quantized(codes, scale, zero, bits, None))
        errors = values - w
        first = ((torch.tensor([0, 2**bits - 1]) - zero[0]) * scale[0]).tolist()

        def place(value, low=first[0], high=first[1]):
            return 24 + 312 * (value - low) / (high - low)

        drawing.text(14, top + 4, heading, 13, bold=True)
        mean = errors[0, :-1].abs().mean()
        drawing.text(14, top + 24, f"step {decimal(scale, 3)}; mean |error| of the first six:", 11, "muted")
        drawing.text(346, top + 24, decimal(mean, 3), 12, "orange", "end", mono=True, bold=True)
        y = top + 62
        for code in range(2**bits):
            x = place(float((code - zero) * scale))
            drawing.line((x, y - 6), (x, y + 6), width=1)
        drawing.line((24, y), (336, y), width=1)
        for weight, value in zip(w[0].tolist(), values[0].tolist(), strict=True):
            drawing.line((place(weight), y - 14), (place(value), y), color="orange", width=1.5)
            drawing.circle(place(weight), y - 17, 3.5, "blue", None)
            drawing.circle(place(value), y, 3.5, "orange", None)
        for i, (label, numbers, digits, color) in enumerate(
            (("weight", w, 2, "blue"), ("code", codes, 0, "ink"), ("value", values, 2, "orange"),
             ("error", errors, 2, "muted"))
        ):  # fmt: skip
            row_y = y + 28 + 18 * i
            drawing.text(14, row_y, label, 11, color, bold=True)
            for j, number in enumerate(numbers[0]):
                drawing.text(98 + 41 * j, row_y, decimal(number, digits), 11, color, "end", mono=True)
    drawing.height = 352
    return drawing
