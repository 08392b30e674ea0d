# %% [markdown]
# # Drafts, accepted and rejected
#
# Stage 7 has an extra block that guesses one token further than the model itself. In training it is a
# second teacher; here it writes **drafts**: it proposes the next tokens, and one pass of the model checks
# them all. What is right stays, and the first wrong one is replaced. The text is the model's own either
# way. Here you see which characters came for free.
#
# Goes with the lesson of [stage 7](../stage7_mla_mtp/README.md). The first run trains a model (a minute
# or more on two cores).

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

from lab.sampling.generation import DraftCounts, Sampler, generate, generate_with_drafts, verified
from notebooks.helpers import COLORS, QUICK, pale, show_text, trained

# QUICK is true only in the tests of the course, whose models are hardly trained.
model, tokenizer = trained("7", 600, "--model.n-layer", "2")
prompt = tokenizer.encode("KING RICHARD:\n").tolist()
length = 50 if QUICK else 320

# %% [markdown]
# ## Who wrote what
#
# Each pass of the model makes at least one token, and keeps the drafts before it that were right. We read
# from the counter how many that were. Green: drafted and accepted. Orange: the model's own, one per pass.


# %%
def write(n_drafts, temperature, seed=0):
    """A text, for each of its tokens whether it was drafted, and how many drafts were made and accepted."""
    counts, tokens, drafted, seen, free = DraftCounts(), [], [], DraftCounts(), 0
    generator = torch.Generator().manual_seed(seed)
    for token in generate_with_drafts(
        model, prompt, length, tokenizer.vocab_size, n_drafts, temperature, generator=generator, counts=counts
    ):
        if counts.drafted != seen.drafted:  # a new pass: its accepted drafts come first
            free = counts.accepted - seen.accepted
            seen = DraftCounts(counts.drafted, counts.accepted)
        tokens.append(token)
        drafted.append(free > 0)
        free -= 1
    return tokens, drafted, counts


n_drafts, temperature = 2, 0.8  # try 1, 4; and 0, 5
tokens, drafted, counts = write(n_drafts, temperature)
colors = [pale(COLORS[2] if each else COLORS[4], 0.6) for each in drafted]
share = sum(drafted) / len(drafted)
show_text(tokenizer.decode(tokens), colors, f"{share:.0%} of the characters were drafted, and accepted")
print(f"{len(tokens)} characters in {drafted.count(False)} passes, with {counts.drafted} drafts")
assert QUICK or 0.1 < share < 0.9

# %% [markdown]
# ## The text is the model's own
#
# At temperature 0 there is no chance involved, so the claim can be tested to the letter: with and without
# drafts, the same text in fewer passes.

# %%
plain = list(generate(model, prompt, length, tokenizer.vocab_size, temperature=0))
for n in (1, 2, 4):
    fast, drafted_fast, _ = write(n, temperature=0)
    assert fast == plain, "drafts change the speed, not the text"
    print(f"{n} drafts at a time: {drafted_fast.count(False)} passes instead of {len(plain)}")
    assert QUICK or drafted_fast.count(False) < 0.9 * len(plain)

# %% [markdown]
# ## Why it is exact at other temperatures, too
#
# A draft x was drawn from the block's distribution q; the model's own is p. Accept it with probability
# min(1, p(x)/q(x)). If it is rejected, draw from what is left, max(0, p − q), scaled to sum to 1. A draft
# is rejected with probability 1 − Σ min(p, q), and that is also the sum of max(0, p − q), so the scaling
# cancels: both ways to arrive at x add up to min(p, q) + max(0, p − q) = p. Below: the real p and q after
# a prompt. The overlap of the two (their common area) is the probability of acceptance. Then 20,000
# drafts go through the course's own `verified`, and we count what comes out.

# %%
with torch.no_grad():
    text = torch.tensor(prompt + tokens[:40])[None]
    logits, hidden = model(text, return_hidden=True)
    cache = model.new_cache(1, text.size(1), drafting=True)
    guess, _ = model.draft(hidden[:, :-1], text[:, 1:], cache)  # position i: the token after text[i + 1]
p = (logits[0, 1:] / 0.8).softmax(-1)
q = (guess[0] / 0.8).softmax(-1)
overlaps = torch.minimum(p, q).sum(-1)
place = overlaps[5:].argsort()[len(overlaps[5:]) // 2].item() + 5  # a typical one
p, q = p[place], q[place]
overlap = torch.minimum(p, q)
left = (p - q).clamp_min(0)
arrives = overlap + (1 - overlap.sum()) * left / left.sum().clamp_min(1e-9)
assert torch.allclose(arrives, p, atol=1e-5), "accepted or replaced: together exactly p"
generator = torch.Generator().manual_seed(0)
sampler = Sampler(tokenizer.vocab_size, temperature=1.0, top_k=None, top_p=1.0, generator=generator)
drafts = torch.multinomial(q, 20_000, replacement=True, generator=generator)
kept_or_drawn = torch.tensor([verified([p, p], [draft], [q], sampler)[0] for draft in drafts.tolist()])
for name, drawn in (("the drafts", drafts), ("what comes out", kept_or_drawn)):
    frequencies = drawn.bincount(minlength=len(p)) / len(drawn)
    print(f"{name}: at most {(frequencies - p).abs().max():.3f} from p")
assert (frequencies - p).abs().max() < 0.015, "what comes out is distributed as p"

best = torch.maximum(p, q).topk(min(14, tokenizer.vocab_size)).indices
names = [{"\n": "↵", " ": "·"}.get(c, c) for c in tokenizer.decode(best.tolist())]
figure, axes = plt.subplots(figsize=(8, 3.2))
spots = torch.arange(len(best))
axes.bar((spots - 0.2).tolist(), p[best].tolist(), 0.38, color=COLORS[4], label="p: the model")
axes.bar((spots + 0.2).tolist(), q[best].tolist(), 0.38, color=COLORS[2], label="q: the drafting block")
axes.set_xticks(spots.tolist(), names, family="monospace")
before = tokenizer.decode(text[0, max(0, place - 10) : place + 2].tolist())
axes.set(ylabel="probability", title=f"After {before!r}: accepted with probability {overlap.sum():.0%}")
axes.legend()
plt.show()

# %% [markdown]
# ## How many drafts at a time?
#
# Each further draft needs all before it to be right, and the block continues from its own guesses, which
# it was not trained for. So more drafts help less and less. A pass costs more with more drafts, too; the
# bars only count passes.

# %%
tries = (1, 2, 3, 4) if not QUICK else (1, 2)
per_pass, accepted = [], []
for n in tries:
    made, by_draft, n_counts = write(n, temperature, seed=1)
    per_pass.append(len(made) / by_draft.count(False))
    accepted.append(n_counts.accepted / n_counts.drafted)
figure, (left_axes, right_axes) = plt.subplots(1, 2, figsize=(9, 2.8))
left_axes.bar(tries, per_pass, color=COLORS[0])
left_axes.set(xlabel="drafts at a time", ylabel="characters per pass", xticks=tries)
left_axes.axhline(1, color="black", linestyle=":")
right_axes.bar(tries, accepted, color=COLORS[2])
right_axes.set(xlabel="drafts at a time", ylabel="share of drafts accepted", xticks=tries, ylim=(0, 1))
plt.show()
assert all(1 <= each <= n + 1 for n, each in zip(tries, per_pass, strict=True))
assert QUICK or (per_pass[0] > 1.2 and accepted[-1] < accepted[0])

# %% [markdown]
# ## Change a number
#
# - `temperature = 0`, 0.8, then 5: the share of accepted drafts falls and then rises again. Why? (At 0
#   only the first choices must agree; at 5 both distributions are nearly uniform.)
# - Another prompt, such as `"ROMEO:\n"`. Where in a word are drafts accepted, and where not?
#
# ## Two questions
#
# **1.** The drafting block is not as good as the model. Why is the text no worse?
#
# <details><summary>Answer</summary>
#
# Every draft is checked against the model's own distribution, and replaced by a draw from it where
# needed. A bad block costs speed only.
#
# </details>
#
# **2.** One pass over three tokens (a certain one and two drafts) does three times the arithmetic. Why
# can it be about as fast as a pass over one?
#
# <details><summary>Answer</summary>
#
# In a large model, decoding one token waits for the weights to be read from memory. They are read once,
# for however many tokens the pass has. (At this notebook's size, overhead dominates: measure before you
# believe.)
#
# </details>
