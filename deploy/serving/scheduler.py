"""Decides which tokens the model computes in a step, and who waits.

Sequences are ordered by arrival, always: everything that runs is older than everything that waits. If blocks
run out, the newest gives its own back and computes them again later, so the oldest always finishes.
"""

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from deploy.serving.blocks import Blocks, Saved, Swap, Table
from deploy.serving.sampling import SamplingParams, Writer


@dataclass(eq=False)
class Sequence:
    """One text that is being generated."""

    request_id: str
    index: int  # of the request's n
    order: tuple[int, int]  # by arrival
    params: SamplingParams
    prompt: list[int]
    writer: Writer
    generator: torch.Generator | None
    generated: list[int] = field(default_factory=list)
    table: Table = field(default_factory=Table)
    saved: Saved | None = None  # if it is preempted and its blocks are in other memory
    is_forked: bool = False  # whether the request's other texts have been made from this one
    logprob: float = 0.0  # total, of the generated tokens

    @property
    def n_tokens(self) -> int:
        return len(self.prompt) + len(self.generated)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.generated

    @property
    def n_left(self) -> int:
        """How many tokens must be computed before the next one is known. 1: it is being decoded."""
        return self.n_tokens - self.table.length


class Scheduler:
    """n_drafts: how many drafts would be of use to a sequence that is being decoded; None: there are none."""

    def __init__(
        self,
        blocks: Blocks,
        max_batch: int,
        token_budget: int,
        swap: Swap | None = None,
        n_drafts: Callable[[Sequence], int] | None = None,
    ):
        self.swap, self.n_drafts = swap, n_drafts
        self.blocks, self.max_batch = blocks, max_batch
        self.token_budget = max(token_budget, max_batch)  # so that all that run can get a token
        self.running: list[Sequence] = []  # both lists in order of arrival
        self.waiting: list[Sequence] = []
        self.n_preempted = self.n_swapped = 0
        self.n_hits = 0  # tokens that the prefix cache had

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> dict[Sequence, int]:
        """The sequences of the next step, each with how many tokens to compute; they have room."""
        plan: dict[Sequence, int] = {}
        decodes = [s for s in self.running if s.n_left == 1]
        prefills = [s for s in self.running if s.n_left > 1]
        drafts = {s: self.n_drafts(s) for s in decodes} if self.n_drafts else {}
        budget = self.token_budget - sum(drafts.values())
        for sequence in decodes + prefills:
            n_new = min(sequence.n_left, budget - sum(plan.values()))
            was_preempted = sequence not in self.running  # by an older one, in this loop
            if n_new > 0 and not was_preempted and self.make_room(sequence, n_new):
                plan[sequence] = n_new
        while self.waiting:
            n_new = budget - sum(plan.values())
            if n_new <= 0 or not self.has_rows(self.waiting[0]) or not self.admit(self.waiting[0]):
                break
            sequence = self.waiting.pop(0)
            self.running.append(sequence)
            plan[sequence] = min(sequence.n_left, n_new)
            self.blocks.grow(sequence.table, sequence.table.length + plan[sequence])
        for sequence, n in drafts.items():
            if sequence in plan:
                plan[sequence] += self.make_room_for_drafts(sequence, n)
        return plan

    def has_rows(self, sequence: Sequence) -> bool:
        """Whether the batch has rows for a sequence, and for the forks to come of all that run."""
        rows = sum(1 if s.is_forked else s.params.n_texts for s in (*self.running, sequence))
        return rows <= self.max_batch or not self.running

    def admit(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence the blocks that are computed already, if the others would fit now too."""
        found = self.blocks.match(sequence.tokens)
        if self.blocks.needed_for(found, sequence.n_tokens) > len(self.blocks.free):
            return False
        sequence.table = self.blocks.fork(found)
        self.n_hits += found.length
        saved, sequence.saved = sequence.saved, None
        if saved and saved.length > found.length:
            self.blocks.grow(sequence.table, saved.length)
            self.swap.get(saved, sequence.table, len(found.blocks))
            self.blocks.computed(sequence.table, sequence.tokens, saved.length)
        elif saved:
            self.swap.drop(saved)
        return True

    def make_room(self, sequence: Sequence, n_new: int) -> bool:
        """Blocks for n_new tokens, taken from newer sequences if need be. False: it is itself the newest.

        The newer ones are not in the step's plan yet: decodes come oldest first, and a prompt computed in
        part uses up the budget, so nobody is admitted behind it.
        """
        length = sequence.table.length + n_new
        while self.blocks.needed(sequence.table, length) > len(self.blocks.free):
            newest = self.running[-1]
            self.preempt(newest)
            if newest is sequence:
                return False
        self.blocks.grow(sequence.table, length)
        return True

    def make_room_for_drafts(self, sequence: Sequence, n: int) -> int:
        """Blocks for up to n drafts behind the next token, of those that are free. Returns for how many.

        Nobody loses blocks to a guess, and those that hold none of its tokens are given back after the step.
        """
        length = sequence.table.length + 1
        while n and self.blocks.needed(sequence.table, length + n) > len(self.blocks.free):
            n -= 1
        self.blocks.grow(sequence.table, length + n)
        return n

    def preempt(self, sequence: Sequence) -> None:
        """Takes the blocks of the newest running sequence. Its text stays, so it goes on where it was.

        Their content goes into other memory if there is room, else it is computed again later.
        """
        if self.swap:
            sequence.saved = self.swap.put(sequence.table)
            self.n_swapped += sequence.saved is not None
        self.running.remove(sequence)
        self.waiting.insert(0, sequence)
        self.blocks.release(sequence.table)
        self.n_preempted += 1

    def fork(self, sequence: Sequence, make: Callable[[int], Sequence]) -> list[Sequence]:
        """The other texts of a request, once its prompt is computed. They share the prompt's blocks."""
        forks = [make(i) for i in range(1, sequence.params.n_texts)]
        for fork in forks:
            fork.table = self.blocks.fork(sequence.table)
            insort(self.running, fork, key=lambda s: s.order)
        return forks

    def limit(self) -> None:
        """Puts back the newest if forks have made the batch too large."""
        while len(self.running) > self.max_batch:
            self.preempt(self.running[-1])

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence, whatever state it is in."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self.blocks.release(sequence.table)
        if sequence.saved:
            self.swap.drop(sequence.saved)
