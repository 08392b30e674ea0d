# %% [markdown]
# # FlashAttention, tile by tile
#
# Softmax seems to need a whole row of scores: its denominator is a sum over all keys. FlashAttention
# computes it from one small tile at a time and keeps three things per query: a maximum, a sum, and an
# unfinished output. Here you can watch these three change, tile by tile, and break the algorithm to see
# which part does what.
#
# Goes with the lesson of [stage 5](../stage5_flash/README.md). Nothing is trained: it runs in seconds.

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

from notebooks.helpers import COLORS, animate
from stage5_flash import tiled

# %% [markdown]
# ## The long way
#
# 24 queries, 24 keys, one head. First the score matrix as a whole: this is what we want to avoid storing.

# %%
torch.manual_seed(0)
T, head_dim, block_q, block_k = 24, 8, 6, 6  # try blocks of other sizes; they need not divide T
q, k, v = (torch.randn(1, 1, T, head_dim) for _ in range(3))
k[0, 0, 15] *= 4  # one key with large scores, so that a maximum is found late
all_scores = tiled.scores(q, k, slice(0, T), slice(0, T))
wanted = all_scores.softmax(-1) @ v
print(f"{T} × {T} = {T * T} scores; a tile holds {block_q} × {block_k} = {block_q * block_k}")

# %% [markdown]
# ## Tile by tile
#
# The loop of [tiled.py](../stage5_flash/tiled.py), with one more line, which takes notes. `blocks` and
# `visible_keys` are the course's own: the second one leaves out tiles that the causal mask would hide
# completely.


# %%
def walk(q, k, v, rescales=True):
    """Yields, after each tile, its rows and columns, and the running maximum, sum and output of the rows."""
    for rows in tiled.blocks(0, q.size(-2), block_q):
        o = torch.zeros_like(q[..., rows, :])
        row_sum = torch.zeros_like(o[..., :1])
        row_max = torch.full_like(row_sum, -torch.inf)
        for columns in tiled.visible_keys(rows, q, k, block_k):
            s = tiled.scores(q, k, rows, columns)
            new_max = torch.maximum(row_max, s.amax(-1, keepdim=True))
            p = torch.exp(s - new_max)
            rescale = torch.exp(row_max - new_max) if rescales else 1.0
            row_sum = rescale * row_sum + p.sum(-1, keepdim=True)
            o = rescale * o + p @ v[..., columns, :]
            row_max = new_max
            yield rows, columns, row_max, row_sum, o


notes = list(walk(q, k, v))
out, maximum = torch.zeros_like(q), torch.full((T,), torch.nan)
frames = []
for rows, columns, row_max, row_sum, o in notes:
    out[..., rows, :] = o / row_sum
    maximum[rows] = row_max[0, 0, :, 0]
    frames.append((rows, columns, maximum.clone(), (out - wanted)[0, 0].norm(dim=-1).clone()))

assert torch.allclose(out, wanted, atol=1e-5), "the same result as the long way"
assert torch.allclose(out, tiled.tiled_attention(q, k, v, block_q, block_k), atol=1e-6)
for rows, columns, _, row_sum, o in notes:  # more than that: after each tile …
    seen = all_scores[..., rows, : columns.stop].softmax(-1) @ v[..., : columns.stop, :]
    assert torch.allclose(o / row_sum, seen, atol=1e-5), "… it is exact for the keys seen so far"

# %% [markdown]
# Play it. On the left: the tile at work (framed), tiles that are done (coloured by their scores, then
# gone from memory), and tiles that are never computed (hatched). In the middle: each query's running
# maximum. For some queries it jumps when the loop meets key 15. On the right: how far each query's output
# still is from the final one.

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 4.2), width_ratios=[2, 1, 1], sharey=True)
visible = all_scores[0, 0].clone()
limit = visible[visible.isfinite()].abs().max().item()
lowest = min(0.0, *(1.05 * maximum.nan_to_num(0).min().item() for _, _, maximum, _ in frames))


def draw(i):
    for axes in (left, middle, right):
        axes.clear()
    picture = torch.full((T, T), torch.nan)
    for rows, columns, *_ in frames[: i + 1]:
        picture[rows, columns] = visible[rows, columns]
    picture[picture.isinf()] = torch.nan
    left.imshow(picture, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    computed = {(rows.start, columns.start) for rows, columns, *_ in frames}
    for rows in tiled.blocks(0, T, block_q):
        for columns in tiled.blocks(0, T, block_k):
            size = columns.stop - columns.start, rows.stop - rows.start
            corner = columns.start - 0.5, rows.start - 0.5
            hatch = None if (rows.start, columns.start) in computed else "///"
            left.add_patch(plt.Rectangle(corner, *size, fill=False, edgecolor="#bbbbbb", hatch=hatch))
    rows, columns, maximum, error = frames[i]
    corner = columns.start - 0.5, rows.start - 0.5
    size = columns.stop - columns.start, rows.stop - rows.start
    left.add_patch(plt.Rectangle(corner, *size, fill=False, edgecolor="black", linewidth=2.5))
    left.set(xlabel="key", ylabel="query", title=f"tile {i + 1} of {len(frames)}")
    middle.barh(range(T), maximum.nan_to_num(0).tolist(), color=COLORS[1])
    middle.set(xlabel="running maximum", xlim=(lowest, limit * 1.05))
    right.barh(range(T), error.tolist(), color=COLORS[2])
    right.set(xlabel="distance from the final output", xlim=(0, wanted.norm(dim=-1).max().item() * 1.05))


animate(figure, draw, len(frames), milliseconds=700)

# %% [markdown]
# ## What is saved
#
# Not arithmetic, except for the hidden tiles, but memory: at no moment does more than one tile of scores
# exist. The picture counts the numbers that attention keeps, for one head of width 64 and tiles of 64 ×
# 64.

# %%
n_tiles = len(tiled.blocks(0, T, block_q)) * len(tiled.blocks(0, T, block_k))
print(f"{len(notes)} of {n_tiles} tiles were computed")
corners = [(first_q, first_k) for first_q in range(0, T, block_q) for first_k in range(0, T, block_k)]
last_queries = [min(first_q + block_q, T) - 1 for first_q, _ in corners]
needed = sum(first_k <= last for (_, first_k), last in zip(corners, last_queries, strict=True))
assert len(notes) == needed, "those, and only those, in which some query sees some key"
assert max(rows.stop - rows.start for rows, *_ in notes) <= block_q

lengths = [2**i for i in range(8, 18)]
long_way = [n * n for n in lengths]
by_tiles = [64 * 64 + n * (64 + 1) for n in lengths]  # a tile, the output, and a log-sum per query
figure, axes = plt.subplots(figsize=(8, 3.4))
axes.plot(lengths, long_way, marker="o", label="all scores")
axes.plot(lengths, by_tiles, marker="s", label="a tile, the output and a sum per query")
axes.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="numbers kept")
axes.set_xticks(lengths, [f"{n:,}" for n in lengths], rotation=30)
axes.grid(alpha=0.3)
axes.legend()
plt.show()
assert long_way[-1] / by_tiles[-1] > 1000, "at 131,072 tokens: more than a thousand times less"

# %% [markdown]
# ## Break it
#
# Whenever a larger maximum turns up, the sums so far still refer to the old one, and `rescale` converts
# them. Leave it out, and only those queries come out right whose largest score is in their first tile.

# %%
broken = torch.zeros_like(q)
for rows, _, _, row_sum, o in walk(q, k, v, rescales=False):
    broken[..., rows, :] = o / row_sum
error = (broken - wanted)[0, 0].norm(dim=-1)
first_tile = all_scores[0, 0].argmax(-1) < block_k
figure, axes = plt.subplots(figsize=(8, 2.8))
axes.bar(range(T), error.tolist(), color=COLORS[1])
axes.set(xlabel="query", ylabel="error of the output", title="Without rescaling")
plt.show()
assert error[first_tile].max() < 1e-5 < 1e-3 < error[~first_tile].min()

# %% [markdown]
# ## Change a number
#
# - `block_q, block_k = 5, 7`: nothing divides 24 any more. Do the assertions hold?
# - Multiply `q` by 100 and leave out the maximum (`new_max = torch.zeros_like(row_max)`). What does `exp`
#   return?
#
# ## Two questions
#
# **1.** Is FlashAttention an approximation?
#
# <details><summary>Answer</summary>
#
# No. After every tile the result is exactly the attention over the keys seen so far; after the last one,
# over all of them. Only the order of additions differs, and with it the last digits.
#
# </details>
#
# **2.** A result is divided by the sum once, at the end. Why not after every tile?
#
# <details><summary>Answer</summary>
#
# It would have to be multiplied by the old sum again before the next tile is added. Dividing once saves
# work; that is one of FlashAttention-2's changes.
#
# </details>
