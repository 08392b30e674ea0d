# %% [markdown]
# # RoPE's arrows and distances
#
# Rotary positions turn pairs of numbers like the hands of clocks. The lesson has four still pictures of
# one clock; here the clocks run. You will see why only the **difference** of two positions counts, build
# a head that looks exactly five tokens back, and watch positions break in 16 bits.
#
# Goes with the lesson of [stage 2](../stage2_rope/README.md). Nothing is trained: it runs in seconds.

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
from notebooks.helpers import COLORS, animate

stage2 = stages.load("stage2_rope")


def at(vector, positions, theta=10000.0):
    """The vector (head_dim,), rotated by the course's code to each of the positions: (len, head_dim)."""
    rope = stage2.rotation(torch.as_tensor(positions), len(vector), theta)
    return stage2.rotate(vector.expand(1, 1, len(positions), -1), rope)[0, 0]


# %% [markdown]
# ## One pair: two arrows
#
# A query and a key of two numbers each. The key stands `behind` tokens before the query, and both walk
# through the text together. Play it: the arrows turn, **the angle between them does not**, and neither
# does the score.

# %%
behind = 3
q, k = torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.7])
walk = range(behind, behind + 13)
qs, ks = at(q, list(walk)), at(k, [m - behind for m in walk])
pair_scores = (qs * ks).sum(-1)

figure, axes = plt.subplots(figsize=(4.2, 4.4))


def draw(i):
    axes.clear()
    axes.add_patch(plt.Circle((0, 0), 1, fill=False, color="#cccccc"))
    for vector, color, name in ((qs[i], COLORS[0], "q"), (ks[i], COLORS[1], "k")):
        x, y = vector.tolist()
        axes.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": color, "lw": 2.5})
        axes.text(1.15 * x, 1.15 * y, name, color=color, ha="center", va="center", weight="bold")
    axes.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal")
    axes.set_title(f"q at {walk[i]}, k at {walk[i] - behind}: score {pair_scores[i]:.3f}")
    axes.axis("off")


animate(figure, draw, len(walk), milliseconds=400)
assert (pair_scores - pair_scores[0]).abs().max() < 1e-5, "only the distance counts"
assert torch.allclose(qs.norm(dim=-1), q.norm()), "turning changes no length"

# %% [markdown]
# ## Sixteen pairs: clocks of different speeds
#
# A head of width 32 has 16 such clocks. The first completes a turn in 2π ≈ 6.3 tokens, the last hardly
# moves. Each row shows one pair, each column a distance; red means that equal arrows still agree, blue
# that they point in opposite directions.

# %%
head_dim, theta = 32, 10000.0  # try theta = 100, or 1_000_000
distances = torch.arange(129)
cos, _ = stage2.rotation(distances, head_dim, theta)
figure, axes = plt.subplots(figsize=(9, 3.4))
image = axes.imshow(cos[0].T, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
axes.set(
    xlabel="distance between query and key (tokens)",
    ylabel="pair",
    title="cos of the angle that a distance adds",
)
figure.colorbar(image, ax=axes)
plt.show()

periods = 2 * torch.pi * theta ** (torch.arange(0, head_dim, 2) / head_dim)
print("tokens for a full turn, by pair:", [round(period) for period in periods.tolist()])
assert abs(periods[0] - 6.283) < 0.001 and periods[-1] < 2 * torch.pi * theta

# %% [markdown]
# ## Does attention fade with distance?
#
# You may have read that RoPE makes scores decay with distance. Take a query and a key with the same
# numbers: the score is highest at distance 0, and lower further away. But queries and keys need not be
# equal. Build the key from the query by turning it *forward* by five positions: standing five tokens
# behind, it lines up with the query, so the head looks five tokens back. Draw keys at random, and there
# is no trend: the picture shows one, and the last assertion asks a thousand.

# %%
torch.manual_seed(1)
q = torch.randn(head_dim)
far = 64
cases = {
    "key = query": q,
    "key = query, turned forward by 5": at(q, [5])[0],
    "a random key": torch.randn(head_dim),
}
figure, axes = plt.subplots(figsize=(9, 3.6))
scores = {}
for name, key in cases.items():
    scores[name] = (at(q, [far] * (far + 1)) * at(key, [far - d for d in range(far + 1)])).sum(-1)
    axes.plot(scores[name], marker="o", markersize=3, label=name)
axes.axvline(5, color="#999999", linestyle=":")
axes.set(
    xlabel="distance (tokens)", ylabel="score q · k", title="Training, not RoPE, decides how far a head looks"
)
axes.legend()
plt.show()

first, fifth, random = scores.values()
assert first.argmax() == 0 and fifth.argmax() == 5
assert random.argmax() != 0, "for this key, some tokens further away score higher than the nearest"
many = at(q, list(range(far + 1))) @ torch.randn(head_dim, 1000)  # (distances, keys)
sizes = many.abs().mean(1)
assert sizes.max() < 1.25 * sizes.min(), "for a thousand keys, no distance stands out"

# %% [markdown]
# ## Positions in 16 bits
#
# bfloat16 has 8 significant bits: it cannot tell position 256 from 257. If the angles are computed in it,
# far tokens stand in the wrong place. The course's `rotation` computes them in float32, whatever the
# model's precision. Here is the error that it avoids, for the fastest pair.

# %%
places = torch.arange(1024)
rounded = places.bfloat16().float()
error = (places - rounded).abs()
figure, axes = plt.subplots(figsize=(9, 2.8))
axes.plot(places, error, ".", color=COLORS[1], markersize=2)
axes.set(xlabel="position", ylabel="error (tokens)", title="How far bfloat16 misplaces a token")
plt.show()

assert rounded[256] == rounded[257] and error[:257].max() == 0
cos, _ = stage2.rotation(places, 2, theta)
wrong = rounded.cos()
print(f"largest error of the cosine: {(cos[0, :, 0] - wrong).abs().max():.2f}")
assert (cos[0, :, 0] - wrong).abs().max() > 0.5 and cos.dtype == torch.float32

# %% [markdown]
# ## Change a number
#
# - `behind = 6`: one turn of this pair takes 6.28 tokens. What does the score look like, beside that of
#   `behind = 0`?
# - `theta = 100`, in "Sixteen pairs". Which rows change? Long-context models raise theta: why?
#
# ## Two questions
#
# **1.** What would happen to the first animation if the values were rotated as well?
#
# <details><summary>Answer</summary>
#
# The scores would stay, but what is passed on would not: a token's value would arrive turned by its
# absolute position, so the same character would say something else at position 7 than at 8. Values are
# not compared with anything, so nothing turns them back.
#
# </details>
#
# **2.** Keys are cached *after* they were rotated. Why is that allowed, although later queries stand at
# other positions?
#
# <details><summary>Answer</summary>
#
# A key is rotated by its own position only, and that never changes. The query brings its position along.
# Their scalar product then contains the difference.
#
# </details>
