# %% [markdown]
# # The cache, growing
#
# Generating a token needs the keys and values of all tokens before it. They are kept in a cache, and in
# long conversations the cache, not the weights, fills the memory. Two stages of the course make it
# smaller: watch one fill up, then weigh multi-head, grouped-query and latent attention at the size of
# real models, **without owning their memory**.
#
# Goes with the lessons of [stage 4](../stage4_gqa/README.md) and [stage 7](../stage7_mla_mtp/README.md).
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
from itertools import pairwise

import matplotlib.pyplot as plt
import torch

from lab import stages
from notebooks.helpers import COLORS, animate

mha, gqa, mla = (stages.load(name) for name in ("stage3_swiglu", "stage4_gqa", "stage7a_mla"))

# %% [markdown]
# ## Watch it fill
#
# A small model reads 8 tokens at once and then one at a time. Each row of the picture is a slot of the
# cache, each column a number of a key in the first layer; heads lie side by side. Filled rows never
# change again.

# %%
torch.manual_seed(0)
sizes = {"vocab_size": 65, "block_size": 24, "n_layer": 2, "n_head": 4, "n_embd": 64}
model = gqa.GPT(gqa.GPTConfig(**sizes)).eval()
tokens = torch.randint(65, (1, 24))
cache, pictures = model.new_cache(batch_size=1, max_length=24), []
with torch.no_grad():
    steps = [tokens[:, :8], *tokens[:, 8:].split(1, dim=1)]
    logits = []
    for new in steps:
        logits.append(model(new, cache=cache)[0])
        pictures.append(cache.keys[0, 0].transpose(0, 1).flatten(1).clone())  # (slots, heads · width)
    whole, _ = model(tokens)
assert torch.allclose(torch.cat(logits, dim=1), whole, atol=1e-5), "with a cache, the logits are the same"
for before, after in pairwise(pictures):
    filled = before.any(dim=1)
    assert torch.equal(before[filled], after[filled]), "what is in the cache never changes"

figure, axes = plt.subplots(figsize=(6, 4))
limit = pictures[-1].abs().max().item()


def draw(i):
    axes.clear()
    axes.imshow(pictures[i], cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.axvline(pictures[i].size(1) / 2 - 0.5, color="black", linewidth=1)
    axes.set(xlabel="key head 0 | key head 1", ylabel="slot", xticks=[])
    axes.set_title(f"after {8 + i} tokens")


animate(figure, draw, len(pictures), milliseconds=300)

# %% [markdown]
# ## What a token costs
#
# The course's models, in the shape of an 8-billion-parameter Llama: 32 layers, 32 heads, width 4096. On
# PyTorch's *meta* device a tensor has a shape and no memory, so we can read `cache.nbytes` at any size.
# MLA's latent is that of DeepSeek-V3: 512 numbers, and 64 for the rotated key.

# %%
rank = 512  # try 1536
big = {"vocab_size": 128, "n_layer": 32, "n_head": 32, "n_embd": 4096, "block_size": 131072}
ways = {
    "MHA: 32 key/value heads": (mha, {}),
    "GQA: 8": (gqa, {"n_kv_head": 8}),
    "MQA: 1": (gqa, {"n_kv_head": 1}),
    f"MLA: a latent of {rank} + 64": (
        mla,
        {"kv_lora_rank": rank, "qk_rope_head_dim": 64, "n_routed_experts": 2},
    ),
}
per_token = {}
for name, (stage, more) in ways.items():
    with torch.device("meta"):
        large = stage.GPT(stage.GPTConfig(**big, **more)).to(torch.bfloat16)
    per_token[name] = large.new_cache(batch_size=1, max_length=1000).nbytes / 1000
    print(f"{name:28} {per_token[name] / 1024:6.0f} KiB a token")

layers, bytes_per_number, width = 32, 2, 4096 // 32
expected = [layers * bytes_per_number * n for n in (2 * 32 * width, 2 * 8 * width, 2 * 1 * width, rank + 64)]
assert list(per_token.values()) == expected, "as by hand: layers · bytes · numbers a layer"

# %% [markdown]
# ## Against the length of the text
#
# The weights of such a model take 16 GB in 16 bits, once. Its cache grows with every token of every
# conversation. After how many tokens does it outweigh the model?

# %%
lengths = torch.logspace(3, 7, 100, base=10)
figure, axes = plt.subplots(figsize=(9, 4.2))
for (name, each), color in zip(per_token.items(), COLORS, strict=False):
    axes.plot(lengths, lengths * each / 1e9, color=color, linewidth=2, label=name)
axes.axhline(16, color="black", linestyle=":")
axes.text(1.1e3, 18, "the weights: 16 GB", fontsize=9)
axes.set(
    xscale="log",
    yscale="log",
    xlabel="tokens in the cache, of all conversations together",
    ylabel="cache (GB)",
)
axes.set_title("The cache of an 8 B model")
axes.grid(alpha=0.3)
axes.legend()
plt.show()
crossing = {name: 16e9 / each for name, each in per_token.items()}
for name, n in crossing.items():
    print(f"{name:28} outweighs the weights from {n:10,.0f} tokens on")
assert crossing["MHA: 32 key/value heads"] < 32_000 < 100_000 < crossing["GQA: 8"]

# %% [markdown]
# ## How many users fit?
#
# A GPU with 80 GB, 16 of them taken by the weights, and users, each with a conversation of `context`
# tokens.

# %%
context = 8192
room = 80e9 - 16e9
users = {name: int(room // (each * context)) for name, each in per_token.items()}
figure, axes = plt.subplots(figsize=(9, 2.6))
bars = axes.barh(list(users), list(users.values()), color=COLORS[: len(users)])
axes.bar_label(bars, padding=4)
axes.invert_yaxis()
axes.set(xlabel="conversations", title=f"Conversations of {context:,} tokens on one GPU of 80 GB")
plt.show()
few, several, most, latent = users.values()
assert few < several < most
assert rank > 1024 or several < latent < most, "MLA: keys and values for every head, more users than with GQA"

# %% [markdown]
# ## Change a number
#
# - `rank = 1536`. At which rank does MLA's cache become as large as that of GQA with 8 heads?
# - `context = 131072`. Who can still be served?
#
# ## Two questions
#
# **1.** GQA with 8 heads needs only a quarter of the cache. Does attention need only a quarter of the
# arithmetic, too?
#
# <details><summary>Answer</summary>
#
# No. All 32 query heads still meet all keys; only the projections to keys and values become cheaper. What
# is saved is memory, and the time to read it: in decoding, that is what counts.
#
# </details>
#
# **2.** Why does the cache of MLA not depend on the number of heads?
#
# <details><summary>Answer</summary>
#
# It stores one latent and one rotated key per token and layer. The keys and values of all heads are
# computed from the latent, by matrices that are part of the weights.
#
# </details>
