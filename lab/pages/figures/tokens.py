"""The ideas of stages 6 and 7 that follow tokens: routing to experts, and predicting two tokens ahead."""

from unittest.mock import patch

import torch

from lab import stages
from lab.pages.figures.svg import Drawing, decimal

COLORS = ("blue", "orange", "green", "purple")  # of experts


def routing() -> Drawing:
    """Tokens choose experts; their choices are sorted, computed by groups, and put back."""
    stage = stages.load("stage6_moe")
    # With the identity as the router's matrix, the tokens are their own logits.
    tokens = torch.tensor([[1.5, -1, 0.5, -2], [-1, 2, -0.5, 1], [0.8, -2, 1, 0], [-2, 1.2, 0.3, 0.1]])
    n, n_experts = tokens.shape
    config = stage.GPTConfig(
        vocab_size=1, n_head=1, n_embd=n_experts, n_routed_experts=n_experts, num_experts_per_tok=2
    )
    router = stage.Router(config).eval()
    with torch.no_grad():
        router.weight.copy_(torch.eye(n_experts))
        weights, indices = router(tokens)
    experts, order = indices.flatten().sort(stable=True)  # as in grouped_experts
    k = indices.size(1)
    drawing = Drawing(
        "From tokens to experts: routing, sorting, one grouped product",
        f"Left, {n} tokens, each with the {k} experts that the router chose and their weights. Lines "
        f"lead from the {n * k} choices to the same choices sorted by expert. Right, each expert's "
        "matrices multiply the rows of its group.",
    )
    for x, heading in ((14, "choices"), (180, "sorted"), (272, "grouped")):
        drawing.text(x, 18, heading, 12, bold=True)
    row = 26
    for choice in range(n * k):
        token, expert = choice // k, int(indices.flatten()[choice])
        y = 34 + row * choice + 8 * token
        if choice % k == 0:
            drawing.text(14, y + row - 2, f"t{token}", 12, mono=True, bold=True)
        color = COLORS[expert]
        place = order.tolist().index(choice)
        target = 34 + row * place + 8 * sum(experts[: place + 1].diff().ne(0)).item() if place else 34
        drawing.line((133, y + 11), (177, target + 11), color=color, arrow=True)
        drawing.box(38, y, 94, 22, f"{color}-fill", color)
        drawing.text(46, y + 11, f"e{expert}", 11, color, mono=True, bold=True)
        drawing.text(124, y + 11, f"× {decimal(weights.flatten()[choice])}", 11, color, "end", mono=True)
        drawing.box(180, target, 60, 22, f"{color}-fill", color)
        drawing.text(210, target + 11, f"t{token}", 11, color, "middle", mono=True, bold=True)
    start = 34
    for expert, count in enumerate(torch.bincount(experts, minlength=n_experts).tolist()):
        color, height = COLORS[expert], row * count - 4
        drawing.line((242, start + height / 2), (270, start + height / 2), color=color, arrow=True)
        drawing.box(272, start, 76, height, f"{color}-fill", color, 2)
        drawing.text(310, start + height / 2, f"expert {expert}", 11, color, "middle", bold=True)
        start += row * count + 8
    y = 34 + row * n * k + 8 * n + 8
    drawing.text(14, y, "Then the rows go back to their tokens, are multiplied", 11)
    drawing.text(14, y + 15, "by their weights, and are added up.", 11)
    drawing.height = y + 30
    return drawing


def prediction() -> Drawing:
    """What the model and the extra block read and predict at each position."""
    stage = stages.load("stage7_mla_mtp")
    words = ["to", "be", "or", "not", "to", "be"]
    n = len(words) - 1
    config = stage.GPTConfig(vocab_size=n + 1, n_layer=1, n_head=1, n_embd=8)
    model = stage.GPT(config).eval()
    idx = torch.arange(n)[None]  # token i is number i, so that what the model is given can be read off
    read, predicted = [], []

    def losses(logits, targets, **options):
        predicted.append(targets.tolist())
        return cross_entropy(logits, targets, **options)

    cross_entropy = stage.F.cross_entropy
    model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, _: read.append(inputs[0][0].tolist())
    )
    with torch.no_grad(), patch.object(stage.F, "cross_entropy", losses):
        model(idx, idx + 1)
    rows = (
        ("model reads", read[0], "blue", 40),
        ("and predicts", predicted[0], "blue", 86),
        ("block reads", read[1], "purple", 153),
        ("and predicts", predicted[1], "purple", 199),
    )
    drawing = Drawing(
        "What the model and the block of multi-token prediction see and predict",
        "Five positions of the text “to be or not to be”. At each, the model reads one token and "
        "predicts the next. The extra block gets the model's hidden state and the next token, and "
        "predicts the one after. The last position has no such token.",
    )
    for i in range(n):
        drawing.text(124 + 52 * i, 18, f"i = {i}" if i == 0 else str(i), 11, "muted", "middle", mono=True)
    for label, numbers, color, y in rows:
        drawing.text(10, y + 12, label, 11, color, bold=True)
        is_predicted = label == "and predicts"
        for i, number in enumerate(numbers):
            x = 101 + 52 * i
            if number < 0:
                drawing.text(x + 23, y + 12, "–", 12, "muted", "middle")
                continue
            drawing.box(x, y, 46, 24, f"{color}-fill", color, dashed=is_predicted)
            drawing.text(x + 23, y + 12, words[number], 12, color, "middle", bold=i == 1)
            if is_predicted:
                drawing.line((x + 23, y - 22), (x + 23, y - 1), color=color, arrow=True)
    drawing.text(10, 132, "hidden states", 11, "blue", bold=True)
    for i in range(n):
        drawing.text(124 + 52 * i, 130, f"h{'₀₁₂₃₄'[i]}", 12, "blue", "middle", mono=True)
        drawing.line((124 + 52 * i, 138), (124 + 52 * i, 152), color="blue", arrow=True)
    drawing.text(10, 243, "Dashed boxes are targets; a last position without one", 11, "muted")
    drawing.text(10, 258, "is left out of the loss.", 11, "muted")
    drawing.height = 272
    return drawing
