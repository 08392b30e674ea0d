# %% [markdown]
# # Paged blocks, with sharing
#
# A server keeps the caches of many conversations at once. Reserve the longest possible text for each, and
# most of the memory stays empty. The course's server cuts memory into **blocks** instead, as an operating
# system does with pages: a conversation holds a table of blocks, which lie anywhere, and several
# conversations may hold the *same* block.
#
# Here you watch the blocks: who holds what, who shares, what is copied, and what is still there for the
# next reader.
#
# Goes with the lesson on [serving](../deploy/serving/README.md). Nothing is trained: it runs in seconds.

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

from deploy.serving.blocks import Blocks
from deploy.serving.pool import Batch, Pool
from lab import stages
from notebooks.helpers import COLORS, animate, pale

BLOCK_SIZE, N_BLOCKS = 4, 21  # block 0 is never handed out

# %% [markdown]
# ## A day in the life of 20 blocks
#
# `Blocks` is the course's own block manager: it counts references and knows what each full block holds,
# and nothing of tensors. After each event we note which table holds which block. Letters stand for
# tokens.

# %%
copies = []
blocks = Blocks(N_BLOCKS, BLOCK_SIZE, copy=lambda source, target: copies.append((source, target)))
tables, story = {}, []


def note(event):
    held = {name: list(table.blocks) for name, table in tables.items()}
    cached = [block for block in range(N_BLOCKS) if blocks.references[block] == 0 and blocks.hashes[block]]
    story.append((event, held, cached, list(blocks.references)))


def arrive(name, text):
    """A request: reuses the blocks that hold the start of the text, and takes new ones for the rest."""
    tokens = [ord(letter) for letter in text]
    table = blocks.fork(blocks.match(tokens))
    reused = table.length
    blocks.grow(table, len(tokens))
    blocks.computed(table, tokens, len(tokens))
    tables[name] = table
    note(f"{name} arrives: {len(tokens)} tokens, {reused} of them are there already")
    return reused


system = "You are a helpful poet. "  # 24 tokens: six full blocks
reused_by_ann = arrive("Ann", system + "Sonnet")
reused_by_bob = arrive("Bob", system + "Limericks")

tables["Bob 2"] = blocks.fork(tables["Bob"])
note("Bob wants two answers: the second holds the same blocks")
for name, letter in (("Bob", "A"), ("Bob 2", "B")):
    tokens = [ord(c) for c in system + "Limericks" + letter]
    blocks.grow(tables[name], len(tokens))
    blocks.computed(tables[name], tokens, len(tokens))
note(
    "both write one token: the last block is copied first"
    if copies
    else "both write one token, each in a new block"
)

blocks.release(tables.pop("Ann"))
note("Ann leaves: what only she held is free, and full blocks can still be found")
reused_by_cid = arrive("Cid", system + "Sonnet, please")
for name in list(tables):
    blocks.release(tables.pop(name))
note("all leave: full blocks can be found until someone needs the room")

assert reused_by_ann == 0
assert reused_by_bob == 24 // BLOCK_SIZE * BLOCK_SIZE, "Bob reuses the full blocks of the system prompt"
assert len(copies) == 1, "the first of two writers copies the block, the second then has it to itself"
assert reused_by_cid == 30 // BLOCK_SIZE * BLOCK_SIZE, "Cid finds Ann's blocks, although she has left"
assert len(blocks.free) == N_BLOCKS - 1, "nothing is lost"

# %% [markdown]
# Play it. A block has one stripe for each table that holds it, and is grey if it is free but still known.
# Blocks with two or three stripes are stored once.

# %%
people = {"Ann": COLORS[0], "Bob": COLORS[1], "Bob 2": COLORS[4], "Cid": COLORS[2]}
figure, axes = plt.subplots(figsize=(9, 2.9))


def draw(i):
    event, held, cached, references = story[i]
    axes.clear()
    for block in range(1, N_BLOCKS):
        x, y = (block - 1) % 10, -((block - 1) // 10)
        holders = [name for name in held if block in held[name]]
        assert len(holders) == references[block]
        for j, name in enumerate(holders):
            height = 0.8 / len(holders)
            axes.add_patch(plt.Rectangle((x, y + j * height), 0.8, height, color=pale(people[name], 0.75)))
        face = "#dddddd" if block in cached and not holders else "none"
        axes.add_patch(plt.Rectangle((x, y), 0.8, 0.8, facecolor=face, edgecolor="#555555"))
        axes.text(x + 0.4, y + 0.4, block, ha="center", va="center")
    for j, (name, color) in enumerate(people.items()):
        if name in held:
            axes.text(0.2 + 2.2 * j, -1.45, f"{name}: {len(held[name])} blocks", color=color, weight="bold")
    axes.set(xlim=(-0.1, 10), ylim=(-1.6, 0.9))
    axes.set_title(f"{i + 1}. {event}", loc="left")
    axes.axis("off")


animate(figure, draw, len(story), milliseconds=2000)

# %% [markdown]
# ## What sharing saves
#
# Count at each moment: blocks that are really in use, blocks that the tables name (without sharing, each
# would exist on its own), and what it would take to reserve 40 tokens for everyone.

# %%
in_use = [len({block for each in held.values() for block in each}) for _, held, *_ in story]
named = [sum(map(len, held.values())) for _, held, *_ in story]
reserved = [len(held) * blocks.count(40) for _, held, *_ in story]
figure, axes = plt.subplots(figsize=(8, 3.2))
steps = range(1, len(story) + 1)
for values, label, marker in (
    (reserved, "40 tokens reserved for each", "^"),
    (named, "blocks without sharing", "s"),
    (in_use, "blocks with sharing", "o"),
):
    axes.plot(steps, values, marker=marker, label=label)
axes.set(xlabel="event", ylabel="blocks", xticks=list(steps), ylim=(0, None))
axes.legend()
plt.show()
assert all(a <= b <= c for a, b, c in zip(in_use, named, reserved, strict=True))
print("saved by sharing, at most:", max(b - a for a, b in zip(in_use, named, strict=True)), "blocks")

# %% [markdown]
# ## Does the model notice?
#
# No. `Batch` stands in for the model's cache and gathers the keys and values from wherever they lie. We
# scatter two conversations over a pool on purpose, let them share the blocks of their common start, and
# compare with the model's ordinary cache.

# %%
torch.manual_seed(0)
stage4 = stages.load("stage4_gqa")
sizes = {"vocab_size": 65, "block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 32}
model = stage4.GPT(stage4.GPTConfig(**sizes)).eval()
pool = Pool(model, N_BLOCKS, block_size=4)
start = torch.randint(65, (1, 8))
ends = [torch.randint(65, (1, 5)), torch.randint(65, (1, 5))]
shared, first, second = [13, 2], [7, 19], [5, 11]  # numbers of blocks, in no order
with torch.no_grad():
    model(start, cache=Batch(pool, [shared], [0], 8))  # computed once
    both = Batch(pool, [shared + first, shared + second], [8, 8], 5)
    paged, _ = model(torch.cat(ends), cache=both)
    for row, end in enumerate(ends):
        cache = model.new_cache(1, 13)
        model(start, cache=cache)
        alone, _ = model(end, cache=cache)
        assert torch.allclose(paged[row], alone[0], atol=1e-5), "the same logits as with a cache of its own"

keys = pool.tensors[0][0, :, 0]  # layer 0, key head 0: (blocks, slots, width)
figure, axes = plt.subplots(figsize=(9, 2.6))
axes.imshow(keys.abs().mean(-1).T, cmap="Blues", aspect="auto", interpolation="nearest")
axes.set(xlabel="block", ylabel="slot", xticks=range(N_BLOCKS), yticks=range(4))
axes.set_title("The pool: size of the keys. 13 and 2 are shared, 19 and 11 hold one token each")
plt.show()
assert (keys.abs().sum((1, 2)) > 0).nonzero().flatten().tolist() == sorted(shared + first + second)

# %% [markdown]
# ## Change a number
#
# - `BLOCK_SIZE = 8`: how many tokens do Bob and Cid reuse now? And with 5? What would speak against
#   blocks of one token?
# - How much would Bob reuse if his system prompt differed in the first letter? And in the last one?
#
# ## Two questions
#
# **1.** Why can only *full* blocks be found again by their hash?
#
# <details><summary>Answer</summary>
#
# A full block never changes. One that is half full will be written to by its owner; whoever had found it
# would then hold keys of someone else's tokens. (A fork may share it, since the first to write copies
# it.)
#
# </details>
#
# **2.** The hash of a block covers the block before it. What would go wrong if it covered its own tokens
# alone?
#
# <details><summary>Answer</summary>
#
# Keys and values depend on all tokens before, not only on those of the block. "the sun" after two
# different beginnings has two different sets of keys, but the hash would be the same.
#
# </details>
