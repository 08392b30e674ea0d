# %% [markdown]
# # One token through stage 0, shape by shape
#
# A diagram of a transformer shows boxes. This notebook opens them: we follow **one character** through a
# small trained GPT-2, do every step by hand with the model's own matrices, and look at the numbers on the
# way. At the end they must be the numbers of the model itself, to the last few digits.
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

from lab import stages
from notebooks.helpers import COLORS, QUICK, trained

# QUICK is true only in the tests of the course, whose models are hardly trained.
stage0 = stages.load("stage0_gpt")
model, tokenizer = trained("0", steps=600)
config = model.config
print(f"{config.n_layer} blocks, {config.n_head} heads, {config.n_embd} numbers in the residual stream")

# %% [markdown]
# ## Text to numbers
#
# Change the prompt as you like (at most 64 characters). We follow its **last** character: the model must
# say what comes next.

# %%
prompt = "ROMEO:\nO, she doth teac"
idx = torch.tensor(tokenizer.encode(prompt).tolist())[None]
T = idx.size(1)


def show(name, tensor):
    print(f"{name:24} {tuple(tensor.shape)!s:20} {[round(x, 3) for x in tensor.flatten()[-3:].tolist()]}")


print(f"{'':24} {'shape':20} the last three numbers\n")
show("token numbers", idx)

# %% [markdown]
# ## Into the residual stream
#
# Each token number picks a row of one table, each position a row of another. Their sum is the **residual
# stream**: a row of `n_embd` numbers for each token, which everything that follows only adds to.

# %%
with torch.no_grad():
    positions = torch.arange(T)
    x = model.model.embed_tokens(idx) + model.model.embed_positions(positions)
show("stream (B, T, n_embd)", x)
assert x.shape == (1, T, config.n_embd)

# %% [markdown]
# ## Attention, by hand
#
# The block norms the stream, and three matrices turn each row into a query, a key and a value. `view` and
# `transpose` cut them into heads: nothing is computed, the numbers are only rearranged. Then each query
# meets each key.

# %%
block = model.model.layers[0]
attention, head_dim = block.self_attn, block.self_attn.head_dim
with torch.no_grad():
    normed = block.input_layernorm(x)
    q = attention.q_proj(normed).view(1, T, config.n_head, head_dim).transpose(1, 2)
    k = attention.k_proj(normed).view(1, T, config.n_head, head_dim).transpose(1, 2)
    v = attention.v_proj(normed).view(1, T, config.n_head, head_dim).transpose(1, 2)
    scores = q @ k.transpose(2, 3) / head_dim**0.5 + stage0.causal_mask(T, T, idx.device)
    weights = F.softmax(scores, dim=-1)
    heads = weights @ v
    update = attention.o_proj(heads.transpose(1, 2).reshape(1, T, config.n_embd))
    after_attention = x + update
    after_block = after_attention + block.mlp(block.post_attention_layernorm(after_attention))

for name, tensor in {
    "normed": normed,
    "q (B, head, T, width)": q,
    "scores (B, head, T, S)": scores,
    "weights": weights,
    "heads' outputs": heads,
    "added to the stream": update,
}.items():
    show(name, tensor)

assert torch.allclose(weights.sum(-1), torch.ones(1, config.n_head, T)), "each query's weights sum to 1"
by_model = block(x, stage0.causal_mask(T, T, idx.device), None)
assert torch.allclose(after_block, by_model, atol=1e-5), "the same numbers as the model's own block"

# %% [markdown]
# Where did the last character look? One row of bars per head. A head that puts all of its weight on one
# bar copies; one with a flat row averages.

# %%
figure, panels = plt.subplots(config.n_head, 1, figsize=(9, 1.2 * config.n_head), sharex=True, sharey=True)
for head, panel in enumerate(panels):
    panel.bar(range(T), weights[0, head, -1].tolist(), color=COLORS[head])
    panel.set_ylabel(f"head {head}", rotation=0, ha="right", va="center")
    panel.set(yticks=[0, 0.5, 1], ylim=(0, 1))
panels[-1].set_xticks(range(T), ["↵" if c == "\n" else "·" if c == " " else c for c in prompt])
figure.suptitle(f"Block 0: how much the last character, {prompt[-1]!r}, takes from each character's value")
plt.show()

# %% [markdown]
# ## What the model believes after each block
#
# The head turns a stream into probabilities. Nothing forbids asking it early: norm the stream after block
# 0, 1, 2 … and multiply by the same matrix. (This is known as the *logit lens*.) Read a row from left to
# right: how does the model make up its mind? At the far left, its first guess is nearly always the
# character that it has read, because the head is the matrix that embedded it. Ours was trained for a
# minute only, and does most of its work in block 0.

# %%
streams = [x]
with torch.no_grad():
    for layer in model.model.layers:
        streams.append(layer(streams[-1], stage0.causal_mask(T, T, idx.device), None))
    beliefs = torch.stack(
        [F.softmax(model.lm_head(model.model.norm(stream[0, -1])), dim=-1) for stream in streams]
    )
    logits, _ = model(idx)
assert torch.allclose(beliefs[-1], F.softmax(logits[0, -1], dim=-1), atol=1e-5), "the last one is the model's"

itself = idx[0, -1:]
best = torch.cat((beliefs[-1].topk(8).indices, itself)).unique(sorted=False)
best = best[beliefs[-1, best].argsort(descending=True)]
names = [repr(tokenizer.decode([token])) for token in best.tolist()]
figure, axes = plt.subplots(figsize=(8, 3.6))
image = axes.imshow(beliefs[:, best].T, cmap="Blues", vmin=0, vmax=1, aspect="auto")
axes.set_xticks(range(len(streams)), ["embedded", *(f"block {i}" for i in range(config.n_layer))])
axes.set_yticks(range(len(best)), names, family="monospace")
for row in range(len(best)):
    for column in range(len(streams)):
        p = beliefs[column, best[row]].item()
        axes.text(column, row, f"{p:.0%}", ha="center", va="center", color="white" if p > 0.6 else "black")
axes.set(xlabel="read after", ylabel="next character", title=f"After {prompt[-10:]!r} comes …")
axes.spines[:].set_visible(False)
plt.show()
assert QUICK or beliefs[0].argmax() == itself, "before the first block, each character predicts itself"

# %% [markdown]
# ## How loud is each voice?
#
# Every block adds two vectors to the stream. Their lengths, beside that of the stream they are added to,
# say how much each of them changes it. In our model, one voice drowns all others: the first MLP writes a
# vector many times as long as the embedding it has read.

# %%
lengths = []
with torch.no_grad():
    for layer, stream in zip(model.model.layers, streams, strict=False):
        mask = stage0.causal_mask(T, T, idx.device)
        from_attention = layer.self_attn(layer.input_layernorm(stream), mask, None)
        from_mlp = layer.mlp(layer.post_attention_layernorm(stream + from_attention))
        lengths.append([each[0, -1].norm().item() for each in (stream, from_attention, from_mlp)])
        assert torch.allclose(stream + from_attention + from_mlp, layer(stream, mask, None), atol=1e-5)

figure, axes = plt.subplots(figsize=(7, 3.2))
for i, name in enumerate(("the stream before", "attention adds", "the MLP adds")):
    places = [layer + 0.27 * (i - 1) for layer in range(config.n_layer)]
    axes.bar(places, [row[i] for row in lengths], width=0.25, label=name, color=["#999999", *COLORS][i])
axes.set_xticks(range(config.n_layer), [f"block {i}" for i in range(config.n_layer)])
axes.set(ylabel="length of the vector", title="The last token's stream, and what is added to it")
axes.set_ylim(0, 1.25 * max(map(max, lengths)))
axes.legend(ncols=3, loc="upper center")
plt.show()
assert QUICK or lengths[0][2] > 3 * lengths[0][0], "the first MLP writes more than the embedding holds"

# %% [markdown]
# ## No token sees a later one
#
# The claim behind the whole design, tested here on your prompt: change the last character, and no earlier
# logit changes, not even in its last bit.

# %%
changed = idx.clone()
changed[0, -1] = (changed[0, -1] + 1) % tokenizer.vocab_size
with torch.no_grad():
    other, _ = model(changed)
assert torch.equal(other[:, :-1], logits[:, :-1]), "earlier positions are untouched"
assert not torch.equal(other[:, -1], logits[:, -1]), "the last one is not"

uniform, chosen = 1 / tokenizer.vocab_size, beliefs[-1].max().item()
print(f"a guess: {uniform:.1%}; the model's first choice: {chosen:.0%}")
assert QUICK or chosen > 2 * uniform, "a trained model knows more than nothing"

# %% [markdown]
# ## Change a number
#
# - Set `prompt` to the same text without its last letter, then without two. How does its
#   first choice change?
# - In "Attention, by hand", leave out `/ head_dim**0.5`. Which assertion fails first?
#
# ## Two questions
#
# **1.** Which is the first step in which one token's numbers depend on another token?
#
# <details><summary>Answer</summary>
#
# `q @ k.transpose(2, 3)`: there a query meets the keys of other tokens. `weights @ v` then mixes their
# values in. Norms, projections and the MLP treat each row by itself: without attention, a GPT would
# predict from the last character alone.
#
# </details>
#
# **2.** The stream keeps its shape, (1, T, 128), from the first block to the last. Why is that useful?
#
# <details><summary>Answer</summary>
#
# Each block can add to it without a matrix in between, so gradients reach the first block directly. It is
# also why we could read the stream after any block with the same head.
#
# </details>
