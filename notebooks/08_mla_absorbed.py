# %% [markdown]
# # Latent attention, absorbed
#
# MLA caches one small latent per token and computes the keys and values of all heads from it. Done
# literally, that means unpacking the whole cache again for every new token. The trick of *absorbing*
# never unpacks it. It is nothing but moving a bracket, (q W)·c instead of q·(W c), and yet it changes
# what decoding costs by an order of magnitude. Here you move it yourself.
#
# Goes with the lesson of [stage 7](../stage7_mla_mtp/README.md#stage-7a-multi-head-latent-attention-mla).
# Nothing is trained.

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

from lab import stages
from notebooks.helpers import COLORS

stage7a = stages.load("stage7a_mla")
torch.manual_seed(0)
config = stage7a.GPTConfig(vocab_size=65, n_layer=1, n_head=8, n_embd=256, block_size=4096)
attention = stage7a.GPT(config).eval().model.layers[0].self_attn
rank, nope, rope_dim, v_dim = (
    config.kv_lora_rank,
    config.qk_nope_head_dim,
    config.qk_rope_head_dim,
    config.v_head_dim,
)
print(f"a latent has {rank} numbers; a head's key {nope} + {rope_dim} rotated ones, its value {v_dim}")

# %% [markdown]
# ## Moving the bracket
#
# One new query `q` (a row per head) meets the latents `c` of 50 earlier tokens. `W_k` turns a latent into
# a head's key.

# %%
S = 50
w = attention.kv_b_proj.weight.detach().view(config.n_head, nope + v_dim, rank)
w_k, w_v = w.split((nope, v_dim), dim=1)  # (head, nope or v_dim, rank)
q = torch.randn(config.n_head, nope)
c = torch.randn(S, rank)

keys = torch.einsum("hdr,sr->hsd", w_k, c)  # unpacked: a key for each head and token
expanded = torch.einsum("hd,hsd->hs", q, keys)
query_for_latents = torch.einsum("hd,hdr->hr", q, w_k)  # absorbed: a longer query, and no keys at all
absorbed = torch.einsum("hr,sr->hs", query_for_latents, c)

print("unpacked: ", "keys", tuple(keys.shape), "=", keys.numel(), "numbers made for this one token")
print("absorbed: ", "query", tuple(query_for_latents.shape), "=", query_for_latents.numel(), "numbers")
assert torch.allclose(expanded, absorbed, atol=1e-4), "the same scores"

figure, panels = plt.subplots(1, 3, figsize=(10, 2.8), width_ratios=[1, 1, 0.8])
for panel, scores, name in ((panels[0], expanded, "q · (W c)"), (panels[1], absorbed, "(q W) · c")):
    panel.imshow(scores, cmap="RdBu_r", aspect="auto", interpolation="nearest")
    panel.set(xlabel="earlier token", ylabel="head", title=f"scores, computed as {name}")
panels[2].bar(["q · (W c)", "(q W) · c"], [keys.numel(), query_for_latents.numel()], color=COLORS[:2])
panels[2].set(title="numbers made on the way")
plt.show()

# %% [markdown]
# Values work the same way in reverse: average the *latents* first, then apply `W_v` once.

# %%
weights = (expanded / nope**0.5).softmax(-1)
values = torch.einsum("hdr,sr->hsd", w_v, c)
literal = torch.einsum("hs,hsd->hd", weights, values)
late = torch.einsum("hr,hdr->hd", weights @ c, w_v)
assert torch.allclose(literal, late, atol=1e-5)

# %% [markdown]
# ## The model does both
#
# Its attention layer chooses. We run it both ways on the same cache, by overruling the choice, and
# compare.


# %%
def decode(absorbs):
    """The layer's output for one new token after 50 cached ones, computed in the way that we want."""
    torch.manual_seed(1)
    x = torch.randn(1, S + 1, config.n_embd)
    cache = stage7a.KVCache(config, 1, S + 1, "cpu", torch.float32)
    attention.absorbing_is_cheaper = lambda T, S: absorbs
    with torch.no_grad():
        for first, last in ((0, S), (S, S + 1)):
            rope = stage7a.rotation(cache.positions(last - first), rope_dim, config.rope_theta)
            y = attention(x[:, first:last], rope, cache.mask(last - first), cache)
            cache.advance(last - first)
    del attention.absorbing_is_cheaper
    return y


assert torch.allclose(decode(True), decode(False), atol=1e-5), "two ways, one result"

# %% [markdown]
# ## When does it pay?
#
# Absorbing makes each query longer (`rank` instead of `nope` numbers), so it is not free: with many new
# queries at once, as in a prompt, unpacking wins. The map shows multiplications of the absorbed way,
# divided by those of the other. Where it is blue, the model's own `absorbing_is_cheaper` says yes.


# %%
def multiplications(T, S):
    """Of T queries against S latents, per head: unpacked, and absorbed."""
    unpacked = S * rank * (nope + v_dim) + T * S * (nope + rope_dim + v_dim)
    absorbed = T * rank * (nope + v_dim) + T * S * (rank + rope_dim + rank)
    return unpacked, absorbed


new, seen = [2**i for i in range(12)], [2**i for i in range(12)]
ratio = torch.full((len(new), len(seen)), torch.nan)
for i, T in enumerate(new):
    for j, total in enumerate(seen):
        if total >= T:
            unpacked, absorbed_way = multiplications(T, total)
            ratio[i, j] = absorbed_way / unpacked
            assert attention.absorbing_is_cheaper(T, total) == (absorbed_way < unpacked)

figure, axes = plt.subplots(figsize=(7, 4.6))
limit = ratio.nan_to_num(1).log10().abs().max().item()
image = axes.imshow(ratio.log10(), cmap="RdBu_r", vmin=-limit, vmax=limit, origin="lower")
for i in range(len(new)):
    for j in range(len(seen)):
        if not ratio[i, j].isnan():
            axes.text(
                j,
                i,
                f"{ratio[i, j]:.2g}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if ratio[i, j] < 0.12 else "black",
            )
axes.set_xticks(range(len(seen)), seen, rotation=45)
axes.set_yticks(range(len(new)), new)
axes.set(xlabel="tokens in the cache, the new ones included", ylabel="new tokens at once")
axes.set_title("Multiplications: absorbed / unpacked (blue: absorbing is cheaper)")
plt.show()

unpacked, absorbed_way = multiplications(1, 2048)
print(f"one token after 2,047: {unpacked / absorbed_way:.0f} times fewer multiplications")
assert unpacked > 10 * absorbed_way and not attention.absorbing_is_cheaper(2048, 2048)

# %% [markdown]
# ## Why positions must stay outside
#
# Rotary positions rotate each token's key by a different angle. If the unpacked keys were rotated, the
# bracket could not be moved: between q and W_k c there would be a rotation that depends on the distance,
# so *each distance would need a matrix of its own*. Below: how much that matrix differs from the one at
# distance 0. This is why MLA rotates a separate, shared part of `rope_dim` numbers, and caches it.

# %%
matrix = w_k[0]  # (nope, rank)
distances = list(range(33))
cos_sin = stage7a.rotation(torch.tensor(distances), nope, config.rope_theta)
turned = stage7a.rotate(
    matrix.T[None, :, None].expand(1, -1, len(distances), -1), cos_sin
)  # (1, rank, distances, nope)
needed = turned[0].permute(
    1, 2, 0
)  # for each distance, the matrix (nope, rank) that would have to be absorbed
difference = [((each - matrix).norm() / matrix.norm()).item() for each in needed]
figure, axes = plt.subplots(figsize=(8, 2.8))
axes.bar(distances, difference, color=COLORS[3])
axes.set(
    xlabel="distance between query and key", ylabel="relative difference", title="One matrix is not enough"
)
plt.show()
assert difference[0] < 1e-6 and min(difference[1:]) > 0.2

# %% [markdown]
# ## Change a number
#
# - Add `kv_lora_rank=32` to the config: where does the border between blue and red move?
# - `n_head=32, n_embd=1024, kv_lora_rank=96`. What changes in "Moving the bracket", and what stays in the
#   map?
#
# ## Two questions
#
# **1.** In training, the model never absorbs. Why not?
#
# <details><summary>Answer</summary>
#
# All tokens of a sequence are new: T = S. The keys are needed by T queries each, so unpacking them once
# pays, and the absorbed queries would be longer. On the map, that is the diagonal.
#
# </details>
#
# **2.** In decoding, what matters more than multiplications: the bytes read. How many numbers does a
# token read from the cache with absorbing, and how many keys and values would MHA read?
#
# <details><summary>Answer</summary>
#
# rank + rope_dim numbers per earlier token, for all heads together: here 96 + 16 = 112. MHA reads 2 · 8 ·
# 32 = 512. MLA behaves like attention with one very wide key/value head.
#
# </details>
