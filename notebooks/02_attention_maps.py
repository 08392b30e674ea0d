# %% [markdown]
# # Attention maps
#
# An attention map shows, for each token (a **query**, a row), how much it takes from each earlier one (a
# **key**, a column). Maps are easy to draw and easy to over-read. We draw all 16 of a small trained GPT,
# put numbers on what we believe to see, compare with a model that was never trained, and finally switch
# heads off to find out which of them matter.
#
# Goes with the lesson of [stage 0](../stage0_gpt/README.md). The first run trains a model (about a minute
# on two cores).

# %%
# Finds the course's folder. On Colab: gets it first, and installs what is missing (never torch or numpy).
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = ""  # for Colab: the address of the course's git repository
root = next((each for each in [Path.cwd(), *Path.cwd().parents] if (each / "stage0_gpt").exists()), None)
if "google.colab" in sys.modules:
    root = root or Path("course").resolve()
    if not root.exists():
        address = REPOSITORY or input("The address of the course's git repository: ")
        clone = ["git", "clone", "--quiet", "--depth", "1", address, str(root)]
        done = subprocess.run(clone, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    modules = ("docstring_parser", "jinja2", "rich", "safetensors", "tiktoken", "typeguard", "tyro")
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*install, *missing], check=True)
assert root, "cannot find the course: start Jupyter in its folder"
os.chdir(root)
sys.path.insert(0, str(root))

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import data
from lab import stages
from notebooks.helpers import COLORS, DATA, QUICK, trained

# QUICK is true only in the tests of the course, whose models are hardly trained.
stage0 = stages.load("stage0_gpt")
model, tokenizer = trained("0", steps=600)  # the same model as in the first notebook
untrained = stage0.GPT(model.config).eval()
n_layer, n_head = model.config.n_layer, model.config.n_head


@torch.no_grad()
def attention_maps(model, idx):
    """The attention weights of all heads, from the model's own matrices: (layer, B, head, query, key)."""
    T = idx.size(1)
    mask = stage0.causal_mask(T, T, idx.device)
    x = model.model.embed_tokens(idx) + model.model.embed_positions(torch.arange(T))
    maps = []
    for layer in model.model.layers:
        normed, attention = layer.input_layernorm(x), layer.self_attn
        q, k = (
            projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj)
        )
        maps.append(F.softmax(q @ k.mT / attention.head_dim**0.5 + mask, dim=-1))
        x = layer(x, mask, None)
    return torch.stack(maps)


# %% [markdown]
# ## One head, with its axes
#
# Read a row from left to right: what does this character look at? The white triangle is the future, which
# nobody sees.

# %%
text = "ROMEO:\nO, she doth teach the torches"
layer, head = 0, 3  # look at others, too
idx = torch.tensor(tokenizer.encode(text).tolist())[None]
maps = attention_maps(model, idx)
letters = ["↵" if c == "\n" else "·" if c == " " else c for c in text]
figure, axes = plt.subplots(figsize=(7, 6.4))
picture = maps[layer, 0, head].clone()
picture[picture == 0] = torch.nan
axes.imshow(picture, cmap="viridis", vmin=0, vmax=1)
axes.set_xticks(range(len(letters)), letters, family="monospace", fontsize=8)
axes.set_yticks(range(len(letters)), letters, family="monospace", fontsize=8)
axes.set(xlabel="key: the character that is looked at", ylabel="query: the character that looks")
axes.set_title(f"layer {layer}, head {head}")
figure.colorbar(axes.images[0], ax=axes, label="attention weight", shrink=0.7)
plt.show()

assert torch.allclose(maps.sum(-1), torch.ones(1), atol=1e-5), "the weights of each query sum to 1"
assert maps.triu(1).abs().max() == 0, "no query looks at a later key"

# %% [markdown]
# ## All heads
#
# Look for diagonals (a fixed distance), stripes (a character that everyone looks at) and haze (an
# average).

# %%
figure, grid = plt.subplots(
    n_layer, n_head, figsize=(9, 2.25 * n_layer), squeeze=False, sharex=True, sharey=True
)
for i, row in enumerate(grid):
    for j, axes in enumerate(row):
        picture = maps[i, 0, j].sqrt()  # the root makes small weights visible
        picture[picture == 0] = torch.nan
        axes.imshow(picture, cmap="viridis", vmin=0, vmax=1)
        axes.set_title(f"layer {i}, head {j}", fontsize=9)
figure.supxlabel("key")
figure.supylabel("query")
plt.show()

# %% [markdown]
# ## From impressions to numbers
#
# "This head looks at the previous character." How much of its weight goes there, averaged over 32 texts
# from the validation split? We ask for five kinds of places. The last row of the picture is the control:
# a head that spreads its weight evenly over all it may see. (A place can be of two kinds, and some are of
# none, so a row need not sum to 100 %.) The untrained model should be like it, and the trained one should
# not.

# %%
val = data.load(DATA).val
length = model.config.block_size
texts = torch.stack([torch.tensor(val[i * length : (i + 1) * length].tolist()) for i in range(32)])
positions = torch.arange(length)
behind = positions[:, None] - positions[None, :]  # (query, key)
same = (texts[:, :, None] == texts[:, None, :]) & (behind > 0)
places = {
    "itself": (behind == 0).expand_as(same),
    "1 back": (behind == 1).expand_as(same),
    "2 back": (behind == 2).expand_as(same),
    "3 to 8 back": ((behind >= 3) & (behind <= 8)).expand_as(same),
    "same character,\nearlier": same,
}


def shares(maps):
    """The weight that goes to each kind of place, by head: (heads, places). Early queries do not count."""
    return torch.stack(
        [(maps * place[:, None])[..., 16:, :].sum(-1).mean((1, 3)).flatten() for place in places.values()],
        dim=1,
    )


by_trained, by_untrained = shares(attention_maps(model, texts)), shares(attention_maps(untrained, texts))
even = (behind >= 0).float() / (positions[:, None] + 1.0)
by_even = shares(even.expand(1, len(texts), 1, -1, -1))

table = torch.cat((by_trained, by_even))
names = [f"layer {i}, head {j}" for i in range(n_layer) for j in range(n_head)] + ["evenly spread"]
figure, axes = plt.subplots(figsize=(7, 0.3 * len(names) + 1))
axes.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
for i in range(len(table)):
    for j in range(len(places)):
        axes.text(
            j,
            i,
            f"{table[i, j]:.0%}",
            ha="center",
            va="center",
            color="white" if table[i, j] > 0.5 else "black",
        )
axes.set_xticks(range(len(places)), list(places))
axes.set_yticks(range(len(names)), names)
axes.axhline(len(names) - 1.5, color="black")
axes.set_title("Share of a query's attention, by where it goes")
plt.show()

assert (by_untrained - by_even).abs().max() < 0.03, "untrained heads spread their weight evenly"
assert QUICK or by_trained[:, 1].max() > 5 * by_even[0, 1], "some trained head looks one back"

# %% [markdown]
# ## Which heads matter?
#
# A striking map need not be an important one. So switch off one head at a time (zero its columns in
# `o_proj`) and measure the validation loss on the same 32 texts.

# %%
inputs, targets = texts[:, :-1], texts[:, 1:]


@torch.no_grad()
def loss_without(layer=None, head=None):
    """The loss, with a head switched off (None: with all heads)."""
    if layer is None:
        return model(inputs, targets)[1]["next_token"].item()
    attention = model.model.layers[layer].self_attn
    columns = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
    kept = attention.o_proj.weight[:, columns].clone()
    attention.o_proj.weight[:, columns] = 0
    loss = loss_without()
    attention.o_proj.weight[:, columns] = kept
    return loss


whole = loss_without()
damage = torch.tensor([[loss_without(i, j) - whole for j in range(n_head)] for i in range(n_layer)])
figure, axes = plt.subplots(figsize=(8, 3))
for j in range(n_head):
    axes.bar(
        [i + 0.2 * (j - (n_head - 1) / 2) for i in range(n_layer)],
        damage[:, j].tolist(),
        0.18,
        color=COLORS[j],
        label=f"head {j}",
    )
axes.legend(ncols=n_head)
axes.axhline(0, color="black", linewidth=0.8)
axes.set_xticks(range(n_layer), [f"layer {i}" for i in range(n_layer)])
axes.set(ylabel="loss added (nats)", title=f"Without one head (with all of them, the loss is {whole:.2f})")
plt.show()

assert loss_without() == whole, "all heads are back"
order = damage.flatten().argsort(descending=True).tolist()
print("most missed:", names[order[0]], "· least missed:", names[order[-1]])
assert QUICK or (damage.max() > 0.02 and damage.max() > 5 * damage.flatten().median()), (
    "few heads matter much"
)

# %% [markdown]
# In our run, the head that looks one back matters most by far. The most striking maps do not: heads with
# bright stripes, which all queries look at, can be switched off at almost no cost.
#
# ## Change a number
#
# - Choose `layer, head` by the last picture: look at the map of the least missed head, then at that of
#   the second most missed one.
# - `text = "abababababababab"`. Does a head look at the letter two back, or does each only look one back?
#
# ## Two questions
#
# **1.** A head puts 90 % of its weight on the first character of the text, whatever that is. Does it find
# it important?
#
# <details><summary>Answer</summary>
#
# Not necessarily. The weights must sum to 1, so a head that has nothing to say needs a place to put them.
# If the value there is small, almost nothing is added to the stream. Switching the head off tells.
#
# </details>
#
# **2.** Switching off one head hardly raises the loss. May we conclude that what it does is useless?
#
# <details><summary>Answer</summary>
#
# No: another head may do the same. Switched off one at a time, each of the two looks useless; together
# they may not be.
#
# </details>
