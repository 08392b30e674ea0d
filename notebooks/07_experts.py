# %% [markdown]
# # Which expert takes which character
#
# A mixture of experts chooses, for every token, two of eight small MLPs (a ninth is used by all tokens).
# It is tempting to look for meaning in the choice: an expert for vowels, one for names. Here you can
# look, and then ask two awkward questions: would chance look like this, too? And would a model that never
# learned anything?
#
# Goes with the lesson of [stage 6](../stage6_moe/README.md). The first run trains a model (about a minute
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

import data
from lab import stages
from notebooks.helpers import COLORS, DATA, QUICK, pale, show_text, trained

# QUICK is true only in the tests of the course, whose models are hardly trained.
stage6 = stages.load("stage6_moe")
model, tokenizer = trained("6", 600, "--model.n-layer", "2")
untrained = stage6.GPT(model.config).eval()
n_experts, n_layer = model.config.n_routed_experts, model.config.n_layer
length = model.config.block_size
val = torch.tensor(data.load(DATA).val[: 128 * length].tolist()).view(-1, length)  # texts the model never saw


@torch.no_grad()
def choices(model, idx):
    """The experts of each token, best first: (layer, tokens, 2)."""
    found = []
    hooks = [
        router.register_forward_hook(
            lambda router, inputs, result: found.append(
                result[1].gather(1, result[0].argsort(1, descending=True))
            )
        )
        for router in model.routers()
    ]
    model(idx)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


chosen, by_chance = choices(model, val), choices(untrained, val)
assert chosen.shape == (n_layer, val.numel(), 2)
assert (chosen[..., 0] != chosen[..., 1]).all(), "the two experts of a token are different ones"

# %% [markdown]
# ## A text in the colours of its experts
#
# Each character has the colour of its first expert, in each of the two layers. Do equal characters get
# equal colours? Always?

# %%
text = tokenizer.decode(val[3:6].flatten().tolist())
first_choice = chosen[:, 3 * length : 6 * length, 0]
for layer in range(n_layer):
    colors = [pale(COLORS[expert % len(COLORS)], 0.55) for expert in first_choice[layer].tolist()]
    show_text(text, colors, f"layer {layer}")

# %% [markdown]
# ## Is everyone busy?
#
# Nothing is gained if two experts do all the work. Training moved a bias of each expert until the load
# was about even. (On text that it was not balanced on, it may be less even.)

# %%
load = torch.stack([each.flatten().bincount(minlength=n_experts) for each in chosen]) / chosen[0].numel()
figure, axes = plt.subplots(figsize=(8, 2.8))
for layer in range(n_layer):
    axes.bar(
        [e + 0.4 * layer - 0.2 for e in range(n_experts)], load[layer].tolist(), 0.38, label=f"layer {layer}"
    )
axes.axhline(1 / n_experts, color="black", linestyle=":")
axes.set(xlabel="expert", ylabel="share of all choices", title="Load on the validation text (dotted: even)")
axes.set_ylim(0, 1.3 * load.max().item())
axes.legend(ncols=2, loc="upper right")
plt.show()
assert torch.allclose(load.sum(1), torch.ones(n_layer))
assert QUICK or (load.max() < 0.3 and load.min() > 0.02), "no expert idles, none is crowded"

# %% [markdown]
# ## Characters and experts
#
# A row for each of the most frequent characters: to which expert does it go first? One dark field in a
# row means: always to the same one.

# %%
characters = val.flatten()
frequent = characters.bincount(minlength=tokenizer.vocab_size).argsort(descending=True)[:26]
figure, panels = plt.subplots(1, n_layer, figsize=(9, 6), sharey=True)
for layer, panel in enumerate(panels):
    table = torch.stack(
        [chosen[layer, characters == c, 0].bincount(minlength=n_experts) for c in frequent]
    ).float()
    table /= table.sum(1, keepdim=True).clamp_min(1)
    panel.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    panel.set(xlabel="expert", title=f"layer {layer}", xticks=range(n_experts))
labels = [{"\n": "newline", " ": "space"}.get(c, c) for c in tokenizer.decode(frequent.tolist())]
panels[0].set_yticks(range(len(frequent)), labels, family="monospace")
figure.suptitle("Share of a character's occurrences that goes to each expert first")
plt.show()

# %% [markdown]
# ## Two controls
#
# How much does the character tell about the expert? *Mutual information* measures it: 0 bits if nothing,
# 3 bits if the character decided everything among eight equally busy experts. But with finite text, even
# unrelated pairs have some. So:
#
# 1. **shuffle** the characters, 20 times: what chance gives;
# 2. ask a model that was **never trained**, whose router is a random matrix.


# %%
def information(characters, experts):
    """Mutual information of two sequences of whole numbers, in bits."""
    joint = torch.zeros(tokenizer.vocab_size, n_experts)
    joint.index_put_((characters, experts), torch.ones(len(experts)), accumulate=True)
    joint /= joint.sum()
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return (joint * (joint / independent).log2().nan_to_num(0, 0, 0)).sum().item()


torch.manual_seed(0)
rows = {"trained": [], "never trained": [], "shuffled": []}
for layer in range(n_layer):
    rows["trained"].append(information(characters, chosen[layer, :, 0]))
    rows["never trained"].append(information(characters, by_chance[layer, :, 0]))
    shuffled = [
        information(characters[torch.randperm(len(characters))], chosen[layer, :, 0]) for _ in range(20)
    ]
    rows["shuffled"].append(max(shuffled))
figure, axes = plt.subplots(figsize=(8, 3))
for i, (name, values) in enumerate(rows.items()):
    bars = axes.bar(
        [layer + 0.27 * (i - 1) for layer in range(n_layer)], values, 0.25, label=name, color=COLORS[i]
    )
    axes.bar_label(bars, fmt="%.2f", padding=2)
axes.set_xticks(range(n_layer), [f"layer {layer}" for layer in range(n_layer)])
axes.set(
    ylabel="bits", ylim=(0, 3), title="What a character tells about its first expert (largest of 20 shuffles)"
)
axes.legend()
plt.show()
for layer in range(n_layer):
    assert rows["trained"][layer] > 5 * rows["shuffled"][layer], "this is not chance"
    assert rows["never trained"][layer] > 5 * rows["shuffled"][layer], "but an untrained router sorts, too"
assert QUICK or rows["trained"][1] < rows["never trained"][1], "in layer 1, the context has a say"

# %% [markdown]
# The first control is passed: this is not chance. The second should make you careful. A random matrix
# sends equal vectors to equal experts, so it sorts characters, too. *That characters have
# experts proves no learning.* In our run, training even loosened the tie in layer 1 (the last assertion):
# there, the choice now depends on more than the character. What an expert *computes* with what it gets is
# another question.
#
# ## Change a number
#
# - Take `chosen[..., 1]`, the second expert, in "Characters and experts". Is it as predictable as the
#   first?
# - Replace `characters` by the *next* character (`characters.roll(-1)`) in the last cell. Does the expert
#   tell what comes?
#
# ## Two questions
#
# **1.** In which layer would you expect the character to tell more about the expert, and why?
#
# <details><summary>Answer</summary>
#
# In the first: there the stream is little more than the embedding of the character, plus what one
# attention layer has added. Later streams contain more of the context. Whether it is so in your run, the
# bars say.
#
# </details>
#
# **2.** Someone shows a map of experts and topics, without a control. What do you ask for?
#
# <details><summary>Answer</summary>
#
# The same map with shuffled labels, and that of an untrained model. Then: does the loss rise when the
# expert for a topic is replaced by another?
#
# </details>
