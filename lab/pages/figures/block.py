"""The block of each stage: its residual stream, the shapes in it, and what the stage changed.

The shapes are those of the `laptop` preset, recorded while the stage runs. What is highlighted is decided by
comparing the source with that of the previous stage (changes.py); each box names the parts of the source that
it stands for.
"""

import ast
import functools
from contextlib import ExitStack
from unittest.mock import patch

import torch

from lab import stages
from lab.comparison import diffs
from lab.pages.figures import changes
from lab.pages.figures.svg import Drawing
from lab.training.presets import PRESETS

STREAM = 30  # x of the residual stream
LEFT, RIGHT = 56, 344  # of the boxes beside it
THIRDS = [(56, 90), (155, 90), (254, 90)]  # x and width of q, k and v
GAP = 13  # between two rows, with an arrow

# Parts of a stage's source that compute nothing in the forward pass, and so have no box.
NOT_DRAWN = {"GPTConfig.__post_init__", "GPT.init_weights", "GPT.routers"}

B, T, PAST = 3, 5, 6  # numbers that no width of the model equals


class Block:
    """Draws one stage, from top to bottom."""

    def __init__(self, name: str, before: ast.Module | None, after: ast.Module):
        self.before, self.after = before, after
        self.model, self.shapes = run(stages.load(name))
        self.name = name
        self.labels: list[str] = []
        self.highlighted: list[str] = []  # also labels
        self.parts: list[tuple[tuple[str, ...], bool]] = []  # of each box, and whether it is highlighted
        self.drawing = Drawing("", "")
        self.y = 0.0

    def has(self, part: str) -> bool:
        return bool(changes.find(self.after, part))

    def box(self, x, width, height, label, *sources, shape="", note="", y=None, label_y=None) -> None:
        """A box for these parts of the source: a label, its shape beside or below it, and a note below.

        label_y: how far below the box's upper edge the label is, if not in the middle.
        """
        is_changed = self.before is not None and any(
            changes.changed(self.before, self.after, part) for part in sources
        )
        style = {"fill": "changed-fill", "stroke": "changed", "line": 2.5} if is_changed else {}
        gone = is_changed and not any(self.has(part) for part in sources)
        if gone:
            style = {"fill": None, "stroke": "changed", "line": 2.5, "dashed": True}
        if is_changed:
            self.highlighted.append(f"{label} (gone)" if gone else label)
        self.labels.append(label)
        self.parts.append((sources, is_changed))
        y = self.y if y is None else y
        drawing = self.drawing
        drawing.box(x, y, width, height, **style)
        if width < 150:  # one line below the other
            lines = [line for line in (label, shape, note) if line]
            top = y + height / 2 - 7.5 * (len(lines) - 1)
            for i, line in enumerate(lines):
                first = {"bold": True} if i == 0 else {"color": "muted"}
                drawing.text(x + width / 2, top + 15 * i, line, 11, anchor="middle", mono=True, **first)
            return
        top = y + (label_y or (height / 2 if not note else height / 2 - 8))
        drawing.text(x + 9, top, label, 12, mono=True, bold=True)
        if shape:
            drawing.text(x + width - 9, top, shape, 11, "muted", "end", mono=True)
        if note:
            drawing.text(x + 9, top + 16, note, 11, "muted")

    def arrows(self, *xs, passing=()) -> None:
        """Arrows down from here to the next row, and at `passing` lines that go on beside its boxes."""
        for x in xs:
            self.drawing.line((x, self.y), (x, self.y + GAP), arrow=x not in passing)
        self.y += GAP

    def past(self, x, height) -> None:
        """A line that passes beside the boxes of a row."""
        self.drawing.line((x, self.y), (x, self.y + height))

    def row(self, label, *sources, height=26, **more) -> None:
        """A box as wide as the block, and the end of a row."""
        self.box(LEFT, RIGHT - LEFT, height, label, *sources, **more)
        self.y += height

    def branch(self) -> None:
        """From the stream into the next row."""
        self.drawing.line((STREAM, self.y + 13), (LEFT, self.y + 13), color="blue", width=2, arrow=True)

    def join(self) -> None:
        """From the last row back to the stream, where it is added."""
        y = self.y - 13
        self.drawing.line((LEFT, y), (STREAM + 8, y), color="blue", width=2, arrow=True)
        self.drawing.circle(STREAM, y, 8, fill="page", stroke="blue", line=2)
        self.drawing.line((STREAM - 4, y), (STREAM + 4, y), color="blue", width=2)
        self.drawing.line((STREAM, y - 4), (STREAM, y + 4), color="blue", width=2)

    def shape(self, module: str) -> str:
        return self.shapes[module]

    def biased(self, module: str) -> str:
        """Says if a linear layer has a bias."""
        return " + bias" if self.model.model.get_submodule(module).bias is not None else ""

    # --- The parts of the model ---

    def header(self, before: str | None) -> None:
        self.drawing.text(14, 18, f"Stage {stages.label(self.name)}", 14, bold=True)
        if before:
            self.drawing.box(184, 12, 14, 12, "changed-fill", "changed", 2.5, radius=2)
            self.drawing.text(204, 18, f"changed since stage {stages.number(before)}", 11)
        self.y = 36

    def embeddings(self) -> None:
        """The tokens' embedding, and where positions come in: an embedding or a rotation."""
        self.drawing.text(16, self.y + 4, "idx", 12, mono=True, bold=True)
        self.drawing.text(46, self.y + 4, self.shape("idx"), 11, "muted", mono=True)
        self.y += 18
        x = [16, 128, 247]
        self.box(x[0], 104, 40, "embed_tokens", "GPT.__init__/embed_tokens", shape=self.shape("embed_tokens"))
        table, turns = "GPT.__init__/embed_positions", "rotation"
        if self.has(table) or (self.before and changes.find(self.before, table)):
            shape = self.shapes.get("embed_positions", "gone")
            self.box(x[1], 111, 40, "embed_positions", table, shape=shape)
            if self.has(table):
                self.drawing.text(124, self.y + 20, "+", 13, "blue", "middle", bold=True)
        if self.has(turns):
            sources = [turns, "GPT.forward/rotation", "Block.forward/rope", "Block.forward/mask"]
            self.box(x[2], 97, 40, "rotation", *sources, shape=self.shape("rotation"))
        self.y += 40
        self.stream_top = self.y

    def norm(self, module: str, source: str) -> None:
        """A norm, by its class and its name."""
        kind = type(self.model.model.get_submodule(module)).__name__
        written = [kind] if self.has(kind) else []
        self.row(kind, source, *written, shape=module.rpartition(".")[2])

    def linear(self, module: str, source: str) -> None:
        """A linear layer as a row."""
        label = module.rpartition(".")[2] + self.biased(module)
        self.row(label, source, shape=self.shape(module))

    def dense_attention(self) -> None:
        """q, k and v of whole heads; rotated and repeated in the stages that do."""
        first, (x_q, x_k, x_v) = "layers.0.self_attn.", (x + w / 2 for x, w in THIRDS)
        self.arrows(x_q, x_k, x_v)
        height = 56 if self.biased(f"{first}q_proj") else 40
        for (x, width), part in zip(THIRDS, ("q_proj", "k_proj", "v_proj"), strict=True):
            note = self.biased(first + part).strip()
            source, shape = f"Attention.__init__/{part}", self.shape(first + part)
            self.box(x, width, height, part, source, shape=shape, note=note)
        self.y += height
        self.arrows(x_q, x_k, x_v, passing=(x_v,) if self.has("rotate") else (x_q,))
        if self.has("rotate"):
            self.box(LEFT, 189, 26, "rotate", "rotate", "Attention.forward/rotate", shape="q and k")
            self.past(x_v, 26)
            self.y += 26
            self.arrows(x_q, x_k, x_v, passing=(x_q,))
        self.box(155, 189, 26, "KVCache", "KVCache.__init__", "KVCache.update", shape=self.shape("keys"))
        self.past(x_q, 26)
        self.y += 26
        repeats = self.has("attention/repeat_interleave")
        self.arrows(x_q, x_k, x_v, passing=(x_q,) if repeats else ())
        if repeats:
            source = "attention/repeat_interleave"
            self.box(155, 189, 42, "repeat_interleave", source, note=f"k0 k0 k1 k1: {self.shape('repeated')}")
            self.past(x_q, 42)
            self.y += 42
            self.arrows(x_q, x_k, x_v)

    def attention(self) -> None:
        """The function attention, and in it its mask."""
        note = f"softmax(q kᵀ / √{self.shapes['head_dim']} + mask) v"
        if self.has("explicit_attention"):
            note = "the fastest implementation at hand"
        if self.has("Attention.absorbed_attention"):
            note = "on k and v, or absorbed: on latents"
        sources = ["attention", "explicit_attention"]
        self.box(LEFT, RIGHT - LEFT, 46, "attention", *sources, note=note)
        self.drawing.text(276, self.y + 15, self.shape("attention"), 11, "muted", "end", mono=True)
        sources = ["KVCache.mask", "GPT.forward/causal_mask", "causal_mask"]
        self.box(283, 55, 36, "mask", *sources, shape=self.shape("mask"), y=self.y + 5)
        self.y += 46
        self.arrows(LEFT + 109)
        self.linear("layers.0.self_attn.o_proj", "Attention.__init__/o_proj")
        self.join()

    def dense_mlp(self) -> None:
        """Two matrices with GELU between, or three with a gate."""
        first, middle = "layers.0.mlp.", (LEFT + RIGHT) / 2
        if self.has("MLP.__init__/gate_proj"):
            self.arrows(125, 275)
            for x, part in ((LEFT, "gate_proj"), (206, "up_proj")):
                self.box(x, 138, 40, part, f"MLP.__init__/{part}", shape=self.shape(first + part))
            self.y += 40
            self.arrows(125, 275)
            self.row("silu(gate) · up", "MLP.forward", shape=self.shape(first + "up_proj"))
        else:
            self.arrows(middle)
            self.linear(first + "up_proj", "MLP.__init__/up_proj")
            self.arrows(middle)
            self.row("gelu", "MLP.forward", shape=self.shape(first + "up_proj"))
        self.arrows(middle)
        self.linear(first + "down_proj", "MLP.__init__/down_proj")

    def latent_attention(self) -> None:
        """Keys and values from a latent, and a rotated key for all heads."""
        first, (x_q, x_c, x_r) = "layers.0.self_attn.", (x + w / 2 for x, w in THIRDS)
        config = self.model.config
        self.arrows(x_q, 250)
        shape = self.shape(f"{first}q_proj")
        self.box(56, 90, 40, "q_proj", "Attention.__init__/q_proj", shape=shape)
        shape = self.shape(f"{first}kv_a_proj_with_mqa")
        note = f"{shape}: latent {config.kv_lora_rank}, key {config.qk_rope_head_dim}"
        source = "Attention.__init__/kv_a_proj_with_mqa"
        self.box(155, 189, 40, "kv_a_proj_with_mqa", source, note=note)
        self.y += 40
        self.arrows(x_q, x_c, x_r)
        self.box(56, 90, 40, "rotate", "rotate", "Attention.forward/q_rope", shape="q_rope")
        self.box(155, 90, 40, "RMSNorm", "Attention.__init__/kv_a_layernorm", shape="latent")
        self.box(254, 90, 40, "rotate", "rotate", "Attention.forward/k_rope", shape="k_rope")
        self.y += 40
        self.arrows(x_q, x_c, x_r, passing=(x_q,))
        sources = ["KVCache.__init__", "KVCache.update", "KVCache.nbytes"]
        note = f"{self.shape('latents')} {self.shape('keys')}"
        self.box(155, 189, 42, "KVCache", *sources, note=note)
        self.past(x_q, 42)
        self.y += 42
        self.arrows(x_q, x_c, x_r, passing=(x_q, x_r))
        sources = ["Attention.__init__/kv_b_proj", "Attention.absorbed_attention"]
        sources += ["Attention.absorbing_is_cheaper"]
        shape = self.shape(f"{first}kv_b_proj")
        self.box(155, 110, 40, "kv_b_proj", *sources, shape=shape)
        self.past(x_q, 40)
        self.past(x_r, 40)
        self.y += 40
        self.arrows(x_q, x_c, x_r)

    def experts(self) -> None:
        """A router, the experts that it chooses from, and those that every token uses."""
        config = self.model.config
        n, k = config.n_routed_experts, config.num_experts_per_tok
        self.arrows(140, 295)
        top = self.y
        note = f"the best {k} of {n}: {self.shape('layers.0.mlp.gate')}"
        sources = ["Router", "balance_loss", "sum_over_processes", "GPT.after_step"]
        self.box(LEFT, 180, 42, "Router", *sources, note=note)
        self.y += 42
        self.arrows(140)
        sources = ["Experts", "grouped_experts", "dense_experts", "can_use_grouped_mm"]
        shape = f"{n} × {config.moe_intermediate_size} wide"
        self.box(LEFT, 180, 56, "Experts", *sources, shape=shape, label_y=15)
        for i in range(n):
            chosen = i % (n // k) == 1  # k of them, for example
            fill, stroke, line = ("blue-fill", "blue", 2) if chosen else ("page", "edge", 1)
            self.drawing.box(LEFT + 9 + 20.4 * i, self.y + 27, 17, 20, fill, stroke, line)
        source, shape = "MoE.__init__/shared_experts", self.shape("layers.0.mlp.shared_experts.up_proj")
        self.box(248, 96, self.y + 56 - top, "shared", source, shape=shape, note="all tokens", y=top)
        self.y += 56
        self.arrows(140, 295)
        self.row("Σ weight · expert + shared", "MoE.forward", "Block.__init__/mlp", "MoE.__init__/experts")

    def head(self) -> None:
        """The last norm, the head and the loss."""
        # The softmax router's loss, which the preset does not use.
        balance = "(+ balance)" if self.has("balance_loss") else ""
        kind = type(self.model.model.norm).__name__
        self.box(16, 92, 40, kind, "GPT.__init__/norm", shape="norm")
        self.drawing.line((108, self.y + 20), (124, self.y + 20), arrow=True)
        self.box(124, 100, 40, "lm_head", "GPT.__init__/lm_head", shape=self.shape("lm_head"))
        self.drawing.line((224, self.y + 20), (240, self.y + 20), arrow=True)
        height = 56 if balance else 40
        losses = self.shape("losses")
        self.box(240, 104, height, "loss", "GPT.forward/losses", shape=losses, note=balance)
        self.y += height

    def layer(self) -> None:
        """A block beside its stream, in a frame."""
        self.y += 12
        top = self.y
        start = len(self.drawing.elements)
        self.drawing.text(346, top + 11, f"one of {self.model.config.n_layer} blocks", 11, "muted", "end")
        self.y += 20
        self.branch()
        self.norm("layers.0.input_layernorm", "Block.__init__/input_layernorm")
        if self.has("Attention.__init__/kv_b_proj"):
            self.latent_attention()
        else:
            self.dense_attention()
        self.attention()
        self.y += 18
        self.branch()
        self.norm("layers.0.post_attention_layernorm", "Block.__init__/post_attention_layernorm")
        if self.has("MoE"):
            self.experts()
        else:
            self.dense_mlp()
        self.join()
        self.y += 10
        end = len(self.drawing.elements)
        self.drawing.box(8, top, 346, self.y - top, fill=None, dashed=True)
        self.y += 18
        self.drawing.line((STREAM, self.stream_top), (STREAM, self.y), color="blue", width=4)
        self.drawing.move_back(start, end)  # the frame and the stream lie below the boxes

    def prediction_further(self) -> None:
        """The model's own prediction beside the block that predicts one token further."""
        config, first = self.model.config, f"layers.{self.model.config.n_layer}."
        self.y += 18
        self.drawing.line((STREAM, self.stream_top), (STREAM, self.y), color="blue", width=4)
        note = f"{config.n_layer} blocks as in stage 7a"
        self.box(16, 328, 26, "Block", "Block", shape=note)
        self.y += 26
        self.drawing.line((STREAM, self.y), (STREAM, self.y + 16), color="blue", width=4)
        self.y += 16
        self.box(16, 328, 26, "RMSNorm", "GPT.__init__/norm", shape="norm → hidden")
        self.y += 26
        top = self.y + 14
        self.drawing.line((64, self.y), (64, top + 20), arrow=True)
        self.box(16, 96, 40, "lm_head", "GPT.__init__/lm_head", shape=self.shape("lm_head"), y=top + 20)
        self.drawing.text(132, top + 11, "MTPBlock", 11, "muted", mono=True)
        self.drawing.line((292, self.y), (292, top + 73), arrow=True)
        self.y = top + 20
        self.box(132, 100, 40, "embed_tokens", "GPT.mtp_loss/embedding", shape="next token")
        self.y += 40
        self.arrows(182)
        self.box(132, 100, 26, "enorm", "MTPBlock.__init__/enorm")
        self.box(242, 100, 26, "hnorm", "MTPBlock.__init__/hnorm")
        self.y += 26
        self.arrows(182, 292)
        for label, source, shape in (
            ("eh_proj", "MTPBlock.forward", self.shape(f"{first}eh_proj")),
            ("Block", "GPT.__init__/layers", "one more"),
            ("RMSNorm", "MTPBlock.__init__/shared_head", "shared_head"),
        ):
            self.box(132, 210, 26, label, source, shape=shape)
            self.y += 26
            if label != "RMSNorm":
                self.arrows(237)
        self.drawing.box(122, top, 230, self.y + 8 - top, fill=None, dashed=True)
        self.y += 8
        self.arrows(237)
        self.box(132, 210, 26, "lm_head", "GPT.mtp_loss/lm_head", shape="the same one")
        self.y += 26
        self.arrows(237)
        self.drawing.line((64, top + 60), (64, self.y), arrow=True)
        self.box(16, 328, 26, "loss", "GPT.forward/losses", "GPT.mtp_loss", shape=self.shape("losses"))
        self.y += 40
        sources = ["GPT.draft", "GPT.new_cache", "KVCache.__init__"]
        note = "guesses further tokens, with a cache of its own"
        self.box(16, 328, 42, "draft", *sources, note=note)
        self.y += 42


@functools.cache
def run(stage):
    """Runs a stage in the laptop preset; returns the model, and shapes and other labels by name."""
    sizes = {"vocab_size": 65} | PRESETS["laptop"]["model"]
    model = stage.GPT(stage.GPTConfig(**sizes))
    idx = torch.zeros(B, T, dtype=torch.long)
    weights = {"mtp": getattr(model.config, "mtp_loss_weight", None)}
    losses = model(idx, idx)[1]
    terms = (f"{weights[name]:g} · {name}" if weights.get(name) else name for name in losses)
    shapes = {"idx": written(idx), "losses": " + ".join(terms)}

    def record(name):
        def hook(module, inputs, output):
            shapes[name] = written(output[0] if isinstance(output, tuple) else output)

        return hook

    for name, module in [*model.model.named_modules(), ("lm_head", model.lm_head)]:
        module.register_forward_hook(record(name))
    with torch.no_grad(), ExitStack() as patches:
        model.eval()(idx, idx)
        cache = model.new_cache(B, PAST + T)
        model(torch.zeros(B, PAST, dtype=torch.long), cache=cache)
        attention = patches.enter_context(patch.object(stage, "attention", wraps=stage.attention))
        if hasattr(stage.Attention, "absorbed_attention"):  # show the form that training uses
            patches.enter_context(patch.object(stage.Attention, "absorbing_is_cheaper", return_value=False))
        model(idx, cache=cache)
    q, k, v, mask, _ = attention.call_args.args
    shapes["attention"] = written(torch.empty(*q.shape[:3], v.size(3)))
    shapes["repeated"] = written(torch.empty(B, q.size(1), *k.shape[2:]))
    shapes["mask"] = "None" if mask is None else written(mask)
    shapes["head_dim"] = str(q.size(3))
    shapes |= {name: written(value[0]) for name, value in vars(cache).items() if torch.is_tensor(value)}
    if hasattr(stage, "rotation"):
        width = getattr(model.config, "qk_rope_head_dim", q.size(3))
        shapes["rotation"] = written(stage.rotation(torch.arange(T), width, 1.0)[0])
    return model, shapes


def written(tensor) -> str:
    """A shape, with B, T and S for the batch, the new tokens and all tokens."""
    symbols = {B: "B", T: "T", PAST + T: "S", B * T: "B·T"}
    return f"({', '.join(symbols.get(n, str(n)) for n in tensor.shape)})"


def draw(name: str) -> Drawing:
    """The figure of a stage, compared with the previous one."""
    return compared(name, diffs.origin(name)).drawing


def compared(name: str, before: str | None) -> Block:
    """A stage's block, drawn with highlights where its source differs from another stage's."""
    block = Block(name, changes.parsed(before) if before else None, changes.parsed(name))
    block.header(before)
    block.embeddings()
    if block.has("MTPBlock"):
        block.prediction_further()
    else:
        block.layer()
        block.head()
    block.drawing.height = block.y + 12
    what = "model with its extra block" if block.has("MTPBlock") else "block beside its residual stream"
    block.drawing.title = f"Stage {stages.label(name)}: the {what}, with the shapes in it"
    block.drawing.description = (
        f"The {what}, with the shape of each result. From top to bottom: {', '.join(block.labels)}."
    )
    if before:
        parts = ", ".join(dict.fromkeys(block.highlighted))
        block.drawing.description += f" Changed since stage {stages.number(before)}: {parts}."
    return block
