# %% [markdown]
# # RMSNorm, eps and 16 bits
#
# One line of code, `x / sqrt(mean(x²) + eps)`, and two ways to get it almost right: the eps outside the
# root, and the squares in 16 bits. On ordinary input all of them agree. Here we look where they do not.
#
# Goes with the lesson of [stage 1](../stage1_rmsnorm/README.md). Nothing is trained: it runs in seconds.

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

stage1 = stages.load("stage1_rmsnorm")


def rms(x):
    return x.float().square().mean(-1).sqrt()


# %% [markdown]
# ## What a norm forgets
#
# Slide a token's numbers up by a constant, or stretch them: which output moves? LayerNorm forgets both;
# RMSNorm forgets only the scale.

# %%
torch.manual_seed(0)
x = torch.randn(128)
rms_norm, layer_norm = stage1.RMSNorm(128, eps=1e-5), torch.nn.LayerNorm(128)
changes = {"× 0.1": x * 0.1, "× 3": x * 3, "× 100": x * 100, "+ 1": x + 1, "+ 3": x + 3}
moved = {}
with torch.no_grad():
    for name, norm in (("LayerNorm", layer_norm), ("RMSNorm", rms_norm)):
        moved[name] = [rms(norm(y) - norm(x)).item() for y in changes.values()]
figure, axes = plt.subplots(figsize=(8, 3))
for i, (name, values) in enumerate(moved.items()):
    axes.bar([place + 0.4 * i - 0.2 for place in range(len(values))], values, width=0.38, label=name)
axes.set_xticks(range(len(changes)), list(changes))
axes.set(xlabel="what is done to the input", ylabel="change of the output (RMS)")
axes.legend()
plt.show()
assert max(moved["LayerNorm"]) < 0.01, "LayerNorm notices nothing"
assert max(moved["RMSNorm"][:3]) < 0.01 and min(moved["RMSNorm"][3:]) > 0.3, "RMSNorm notices a shift"

# %% [markdown]
# ## What eps does
#
# The output of a norm should have a size of 1. With eps, it has that only for inputs that are large
# compared with √eps; smaller ones stay small, and zeros stay zeros. Inside the root, an eps of 1e-5 is
# felt below √eps = 0.003; outside, only below 0.00001. A model that was trained with one form and runs
# with the other sees its small tokens at another size.

# %%
eps = 1e-5  # try 1e-2, or 0
sizes = torch.logspace(-6, 1, 100)
inputs = sizes[:, None] * x / rms(x)
with torch.no_grad():
    inside = rms(stage1.RMSNorm(128, eps)(inputs))
outside = rms(inputs / (rms(inputs)[:, None] + eps))
figure, axes = plt.subplots(figsize=(8, 3.4))
axes.plot(sizes, inside, linewidth=2, label="x / √(mean(x²) + eps), the course's")
axes.plot(sizes, outside, linewidth=2, linestyle="--", label="x / (√mean(x²) + eps)")
axes.axvline(eps**0.5, color="#999999", linestyle=":")
axes.text(eps**0.5 * 1.1, 0.05, "√eps", color="#666666")
axes.set(
    xscale="log", xlabel="size of the input (RMS)", ylabel="size of the output (RMS)", title=f"eps = {eps:g}"
)
axes.legend()
plt.show()

at_root = inside[(sizes - eps**0.5).abs().argmin()].item()
print(f"an input of size √eps comes out with size {at_root:.2f}")
assert eps != 1e-5 or abs(at_root - 0.5**0.5) < 0.03, "at √eps, half of the sum under the root is eps"
ordinary = sizes > 30 * max(eps, eps**0.5)
assert torch.allclose(inside[ordinary], outside[ordinary], atol=0.01), "ordinary inputs hardly show it"

# %% [markdown]
# ## Squares in 16 bits
#
# float16 ends at 65,504, so the square of 256 is infinite, and x / ∞ is 0: the token vanishes without an
# error. Small numbers explode instead: the square of 0.0001 rounds to 0, and x / 0 is infinite. bfloat16
# reaches as far as float32, but keeps 8 significant bits. The course's norm squares in float32, in every
# dtype.


# %%
def careless(x, eps=0.0):
    """The same formula in the input's own dtype."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


sizes = torch.logspace(-7, 4.3, 120)
ones = torch.ones(120, 128) * sizes[:, None]
figure, axes = plt.subplots(figsize=(8, 3.4))
outputs = {}
for dtype, color in ((torch.float16, COLORS[1]), (torch.bfloat16, COLORS[0])):
    name = str(dtype).removeprefix("torch.")
    outputs[name] = rms(careless(ones.to(dtype)))
    axes.plot(sizes, outputs[name], color=color, linewidth=2, label=f"squares in {name}")
with torch.no_grad():
    careful = rms(stage1.RMSNorm(128, eps=0.0).half()(ones.half()))
axes.plot(sizes, careful, color="black", linestyle=":", linewidth=2, label="the course's, for float16 input")
axes.set(xscale="log", ylim=(-0.1, 2), xlabel="size of the input", ylabel="size of the output")
axes.set_title("A token whose numbers are all equal: the output should be 1")
axes.legend(loc="upper center", ncols=2)
plt.show()

large, ordinary = torch.full((1, 128), 300.0).half(), torch.full((1, 128), 3.0).half()
assert careless(large).abs().max() == 0, "300² is infinite in float16, so the token becomes 0"
assert torch.allclose(careless(ordinary), torch.ones(1)[0].half(), atol=2e-3), (
    "3² is harmless: a test may miss it"
)
with torch.no_grad():
    assert torch.equal(stage1.RMSNorm(128, 1e-5).half()(large), torch.ones(1, 128).half())

# %% [markdown]
# ## The digits that bfloat16 loses
#
# No overflow here, only noise. Norm 2000 random tokens in bfloat16 and compare with float64: how large
# are the errors?

# %%
tokens = torch.randn(2000, 128).bfloat16()
exact = tokens.double() * torch.rsqrt(tokens.double().square().mean(-1, keepdim=True))
with torch.no_grad():
    careful = stage1.RMSNorm(128, eps=0.0).bfloat16()(tokens)
ways = {"squares in bfloat16": careless(tokens), "squares in float32": careful}
figure, axes = plt.subplots(figsize=(8, 2.8))
errors = {}
for (name, y), color in zip(ways.items(), (COLORS[1], COLORS[0]), strict=True):
    errors[name] = ((y.double() - exact) / exact).abs().flatten()
    axes.hist(errors[name].clamp(max=0.012), bins=60, histtype="step", color=color, linewidth=2, label=name)
axes.set(xlabel="relative error", ylabel="numbers")
axes.legend()
plt.show()
carelessly, carefully = (error.mean().item() for error in errors.values())
print(f"mean relative error: {carelessly:.2%} and {carefully:.2%}")
assert carelessly > 1.3 * carefully and errors["squares in float32"].max() < 2**-7

# %% [markdown]
# ## Change a number
#
# - `eps = 1e-2`: from which size on do the two curves agree?
# - In "Squares in 16 bits", give `careless` an `eps` of 1e-5. Which end of the curve does it repair?
#
# ## Two questions
#
# **1.** An imported model speaks gibberish in float16 and is fine in bfloat16. What do you suspect first?
#
# <details><summary>Answer</summary>
#
# An overflow: somewhere a number exceeds 65,504, such as a square in a norm. bfloat16 has fewer digits
# but the range of float32.
#
# </details>
#
# **2.** A token of zeros goes through RMSNorm. What comes out with eps = 1e-5, and what with eps = 0?
#
# <details><summary>Answer</summary>
#
# Zeros, and NaN: 0 · (1 / √0) = 0 · ∞.
#
# </details>
