"""Continues several prompts at once and shows how: python -m deploy.serving --trace

After each step it prints what the step computed, the block table of every request, and who holds each block
of the cache. The cache is small on purpose, so that requests share, wait and lose their blocks.
"""

import sys
from pathlib import Path

from lab import terminal

if __name__ == "__main__":
    terminal.prepare()  # first, because importing torch takes seconds

import string
from dataclasses import dataclass, field

from deploy.serving import memory
from deploy.serving.blocks import NULL
from deploy.serving.engine import Engine
from deploy.serving.sampling import SamplingParams
from lab import cli
from lab.errors import shown
from lab.storage import runs

PROMPTS = [
    "First Citizen:\n",
    "First Citizen:\nBefore we",
    "ROMEO:\n",
    "To be, or not to be",
    "First Lord:\n",
]


@dataclass
class Settings:
    """Continues several prompts at once with a small cache, and shows how."""

    run: str | None = None
    """Folder of the run. None: the newest one."""
    prompts: list[str] = field(default_factory=lambda: list(PROMPTS))
    """Texts to continue, at most 26."""
    max_tokens: int = 16
    """Tokens to generate for each."""
    temperature: float = 0.8
    """0: always the most likely token."""
    seed: int = 0
    """Seed of the first text; the others count up from it."""
    n: int = 1
    """Texts for each prompt; they share its blocks."""
    beams: int = 1
    """More than 1: beam search, with that many beams for each prompt, of which n are shown at the end."""
    blocks: int = 16
    """Blocks in the cache."""
    block_size: int = 4
    """Tokens in a block."""
    max_batch: int = 4
    """Texts generated at the same time."""
    token_budget: int = 16
    """The most tokens that a step computes."""
    draft: bool = False
    """Let the MTP block draft tokens that the model then verifies (stage 7)."""
    trace: bool = False
    """Shows each step."""
    picture: str | None = None
    """Draws the use of memory over time into this file, such as memory.png, beside a cache without pages."""

    def __post_init__(self):
        for name in ("blocks", "block_size", "max_batch", "token_budget", "max_tokens", "n", "beams"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.beams > 1 and self.temperature:
            raise ValueError(f"--beams {self.beams} draws nothing: add --temperature 0")
        if not 1 <= len(self.prompts) <= 26:
            raise ValueError(f"there must be 1 to 26 prompts, not {len(self.prompts)}")


def main():
    settings = cli.parse_flags(Settings, sys.argv[1:])
    run = Path(settings.run) if settings.run else runs.newest(None)
    engine = Engine.of_run(
        run,
        block_size=settings.block_size,
        max_batch=settings.max_batch,
        token_budget=settings.token_budget,
        cache_blocks=settings.blocks,
        draft=settings.draft,
    )
    names = dict(zip(string.ascii_lowercase, settings.prompts, strict=False))
    texts: dict[tuple[str, int], str] = {}
    for number, (name, prompt) in enumerate(names.items()):
        params = SamplingParams(
            settings.max_tokens,
            settings.temperature,
            seed=settings.seed + number * settings.n,
            n=settings.n,
            beams=settings.beams,
        )
        engine.add(name, engine.tokenizer.encode(prompt), params)
        texts |= {(name, index): prompt for index in range(settings.n)}
    history = []
    if settings.trace:
        print("After the steps: who holds each block; #: free, but its content can be reused; .: free\n")
    while engine.has_work():
        before = engine.stats()
        outputs = engine.step()
        for output in outputs:
            texts[output.request_id, output.index] += output.text
        history.append(memory.usage(engine))
        if settings.trace:
            print("\n".join(trace(engine, outputs, before)), end="\n\n")
    for (name, index), text in texts.items():
        print(f"--- {label(name, index)}\n{text}")
    stats = engine.stats()
    print(
        f"--- {stats['steps']} steps, {stats['preemptions']} preemptions, "
        f"{stats['prefix_hits']} tokens of prompts were in the cache already"
    )
    if settings.draft:
        print(f"--- {stats['accepted_tokens']} of {stats['drafted_tokens']} drafted tokens were accepted")
    if settings.picture:
        memory.draw(history, settings.block_size, Path(settings.picture))
        print(f"drew {shown(Path(settings.picture))}", file=sys.stderr)


def label(request_id: str, index: int) -> str:
    """a, or a2 for the second of several texts."""
    return request_id if index == 0 else f"{request_id}{index + 1}"


def trace(engine: Engine, outputs: list, before: dict) -> list[str]:
    """Lines that show the step that the engine has just made."""
    stats, blocks = engine.stats(), engine.blocks
    preempted = stats["preemptions"] - before["preemptions"]
    n_used = stats["blocks"] - len(blocks.free)
    lines = [
        f"step {stats['steps']}: {sum(engine.plan.values())} tokens computed, "
        f"{n_used} of {stats['blocks']} blocks held" + (f", {preempted} preempted" if preempted else "")
    ]
    new = {(output.request_id, output.index): output for output in outputs}
    holders: dict[int, list[str]] = {}
    for request_id, request in engine.requests.items():
        for sequence in request.sequences:
            for block in sequence.table.blocks:
                holders.setdefault(block, []).append(label(request_id, sequence.index))
    everyone = {*engine.plan, *engine.scheduler.running, *engine.scheduler.waiting}
    for sequence in sorted(everyone, key=lambda s: s.order):
        output = new.get((sequence.request_id, sequence.index))
        n_new = engine.plan.get(sequence, 0)
        what = f"computes {n_new}" if n_new else "forked" if sequence.table.blocks else "waits"
        if sequence in engine.drafts:
            what += f" with the drafts {engine.tokenizer.decode(engine.drafts[sequence])!r}"
        if output is not None:
            what += f", writes {output.text!r}" if output.text else ", writes nothing yet"
            what += f" and ends ({output.finish_reason})" if output.finish_reason else ""
        elif sequence.params.beams > 1 and sequence.generated and sequence.table.blocks:
            what += f", is {engine.tokenizer.decode(sequence.generated)!r} ({sequence.logprob:.1f})"
        table = " ".join(map(str, sequence.table.blocks))
        lines.append(f"  {label(sequence.request_id, sequence.index):3} [{table}] {what}")
    cells = []
    for block in range(NULL + 1, len(blocks.references)):
        free = "#" if blocks.hashes[block] else "."
        cells.append(f"{block}:{'+'.join(holders[block]) if block in holders else free}")
    return [*lines, "  " + " ".join(cells)]


if __name__ == "__main__":
    cli.run(main)
