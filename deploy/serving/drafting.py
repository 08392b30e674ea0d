"""Drafts in the batch: the MTP block guesses the next tokens of each text; the model verifies them (stage 7).

The model computes the drafts behind the last token of a row, in the same pass. It then draws a token from its
own logits, as always. If that is the drafted one, the logits after it are known too, and the next token can
be drawn at once. So a draft decides how many tokens a pass gives, and never which.

A sampled token is drawn with the request's own generator, and the draft with a copy of it. Both then use the
same random numbers, so similar distributions mostly give the same token (arXiv 2408.07978). sample.py
accepts and rejects drafts by their probabilities instead; its text follows the same distribution, but depends
on the drafts. Here the number of drafts depends on the other requests, and a text must not.

The block's own keys and latents are one more layer of the pool. It computes an entry from the model's hidden
state of one token and from the *next* token. The entry has the slot of that next token, so what a block of
the cache stores depends on no token behind the block, and prefixes can be shared as before. The first token
has no entry. To continue after a block, the hidden state of its last token is needed: the pool has room for
one hidden state in each block, that of the newest token in it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from deploy.serving import sampling
from deploy.serving.blocks import NULL, Blocks
from deploy.serving.pool import Batch, Pool
from deploy.serving.scheduler import Sequence
from lab.errors import UserError
from lab.sampling.generation import is_greedy


def check_can_draft(model: torch.nn.Module, n_drafts: int) -> None:
    """Raises UserError if the model cannot draft that many tokens."""
    if n_drafts < 1:
        raise UserError(f"draft_tokens must be at least 1, not {n_drafts}")
    if not getattr(model.config, "num_nextn_predict_layers", 0):
        raise UserError(
            "--draft needs a block of multi-token prediction, and this model has none: use a run of stage 7, "
            "or leave it out"
        )


class DraftCache:
    """The MTP block's layer of a Batch. Its entry for a token has the token's slot, and the position before.

    The first token has no entry: what is computed in slot 0 comes from no hidden state, so it is hidden.
    """

    def __init__(self, batch: Batch, layer: int):
        self.batch, self.layer = batch, layer

    def positions(self, n_new: int) -> torch.Tensor:
        """(B, n_new)"""
        return self.batch.positions(n_new) - 1

    def mask(self, n_new: int) -> torch.Tensor:
        """(B or 1, 1, n_new, n_keys)"""
        positions = self.batch.positions(n_new)
        mask = self.batch.mask(n_new)
        if mask is None:  # causal, and all rows are at their start
            positions, dtype = positions[:1], self.batch.pool.dtype
            mask = torch.full((1, 1, n_new, n_new), -torch.inf, dtype=dtype, device=positions.device).triu(1)
        mask = mask.clone()
        mask[..., 0].masked_fill_(positions[:, None] > 0, -torch.inf)  # slot 0 sees itself: no row is empty
        return mask

    def update(self, layer_idx: int, *new: torch.Tensor) -> list[torch.Tensor]:
        return self.batch.update(self.layer + layer_idx, *new)

    def advance(self, n_new: int) -> None:
        """Nothing: the tables count the tokens."""


class Drafter:
    """Drafts up to n_drafts tokens of a text at a time, and keeps what the model says about them."""

    def __init__(self, model: torch.nn.Module, pool: Pool, blocks: Blocks, vocab_size: int, n_drafts: int):
        self.model, self.pool, self.blocks = model, pool, blocks
        self.vocab_size, self.n_drafts = vocab_size, n_drafts
        self.layer = pool.tensors[0].size(0) - 1
        self.n_drafted = self.n_accepted = 0
        # Of the drafts of this step: the model's logits after each (n, vocab_size), hidden states (n, n_embd)
        self.after: dict[Sequence, tuple[torch.Tensor, torch.Tensor]] = {}

    def n_useful(self, sequence: Sequence) -> int:
        """How many drafts could become part of a text that is being decoded.

        None before its first token, because the texts of n share what is computed until then, and none for
        beams, whose next tokens are not drawn.
        """
        params = sequence.params
        if not sequence.generated or params.beams > 1:
            return 0
        longest = self.model.config.block_size
        n_left = min(params.max_tokens - len(sequence.generated), longest - sequence.n_tokens)
        return min(self.n_drafts, n_left - 1)  # the last one is drawn after the last draft

    def draft(self, plan: dict[Sequence, int]) -> dict[Sequence, list[int]]:
        """The drafts of a step: as many as the plan has room for behind the tokens of each sequence."""
        rows = [sequence for sequence, n_new in plan.items() if n_new > sequence.n_left]
        shadows = {sequence: shadow(sequence) for sequence in rows}
        drafts: dict[Sequence, list[int]] = {sequence: [] for sequence in rows}
        hidden = self.hidden_before(rows, [s.table.length for s in rows])
        n = 0
        while rows:
            starts = [s.table.length + n for s in rows]
            batch = Batch(self.pool, [s.table.blocks for s in rows], starts, 1)
            idx = torch.tensor([[shadows[s].generated[-1]] for s in rows], device=hidden.device)
            logits, hidden = self.model.draft(hidden[:, None], idx, DraftCache(batch, self.layer))
            tokens = sampling.draw(logits[:, -1, : self.vocab_size].cpu(), [shadows[s] for s in rows])
            for sequence, token in zip(rows, tokens, strict=True):
                shadows[sequence].generated.append(token)
                drafts[sequence].append(token)
            n += 1
            go_on = [i for i, s in enumerate(rows) if plan[s] > s.n_left + n]
            rows, hidden = [rows[i] for i in go_on], hidden[go_on, -1]
        self.n_drafted += sum(map(len, drafts.values()))
        self.after = {}
        return drafts

    def forward(
        self, sequences: list[Sequence], new: list[list[int]], drafts: dict[Sequence, list[int]]
    ) -> torch.Tensor:
        """Logits (B, vocab_size) after the new tokens of each sequence; keeps those after its drafts.

        All have equally many new tokens and drafts. The MTP block then computes the same tokens in the same
        slots, from the model's hidden states; those from which it drafted were in part its own.
        """
        n_drafts = len(drafts.get(sequences[0], ()))
        starts = [s.table.length for s in sequences]
        batch = Batch(self.pool, [s.table.blocks for s in sequences], starts, len(new[0]) + n_drafts)
        idx = [tokens + drafts.get(s, []) for s, tokens in zip(sequences, new, strict=True)]
        idx = torch.tensor(idx, device=self.pool.hidden.device)
        with last_logits(self.model, 1 + n_drafts):
            logits, hidden = self.model(idx, cache=batch, return_hidden=True)
        before = self.hidden_before(sequences, starts)
        earlier = torch.cat((before[:, None], hidden[:, :-1]), dim=1)  # (B, T, n_embd)
        with no_logits(self.model):
            self.model.draft(earlier, idx, DraftCache(batch, self.layer))
        self.keep(sequences, starts, hidden[:, : len(new[0])])
        logits = logits[:, :, : self.vocab_size]
        if n_drafts:
            after = logits[:, 1:].cpu()
            self.after |= zip(sequences, zip(after, hidden[:, -n_drafts:], strict=True), strict=True)
        return logits[:, 0]

    def hidden_before(self, sequences: list[Sequence], starts: list[int]) -> torch.Tensor:
        """The hidden states (B, n_embd) of the tokens before `starts`, up to which the cache is filled."""
        size = self.pool.block_size
        held = [
            s.table.blocks[(start - 1) // size] if start else NULL
            for s, start in zip(sequences, starts, strict=True)
        ]
        return self.pool.hidden[0, held]

    def keep(self, sequences: list[Sequence], starts: list[int], hidden: torch.Tensor) -> None:
        """Stores, in each block, the hidden state of the newest of these tokens: (B, T, n_embd)."""
        size, n_new = self.pool.block_size, hidden.size(1)
        places = [
            (sequence.table.blocks[(start + i) // size], row, i)
            for row, (sequence, start) in enumerate(zip(sequences, starts, strict=True))
            for i in range(n_new)
            if (start + i + 1) % size == 0 or i == n_new - 1
        ]
        held, rows, columns = zip(*places, strict=True)
        self.pool.hidden[0, list(held)] = hidden[list(rows), list(columns)]

    def accept(self, sequences: list[Sequence], i: int) -> torch.Tensor:
        """Logits (B, vocab_size) after draft i of each sequence, which is part of its text now."""
        logits, hidden = zip(*(self.after[s] for s in sequences), strict=True)
        self.keep(sequences, [s.table.length for s in sequences], torch.stack([h[i : i + 1] for h in hidden]))
        for sequence in sequences:
            self.blocks.computed(sequence.table, sequence.tokens, sequence.table.length + 1)
        self.n_accepted += len(sequences)
        return torch.stack([each[i] for each in logits])

    def forget(self, sequences: list[Sequence]) -> None:
        """Drops what drafts took that are not part of the texts."""
        for sequence in sequences:
            self.blocks.trim(sequence.table)


def shadow(sequence: Sequence) -> Sequence:
    """A copy to add drafts to. It draws as the sequence will, and takes no random numbers from it."""
    generator = None
    if not is_greedy(sequence.params.temperature):
        generator = torch.Generator()
        generator.set_state(sequence.generator.get_state())
    return replace(sequence, generated=list(sequence.generated), generator=generator)


@contextmanager
def last_logits(model: torch.nn.Module, n: int) -> Iterator[None]:
    """The model computes logits for the last n positions only. For a prompt, more cost more than a layer."""

    def keep_last(module, inputs):
        return (inputs[0][:, inputs[0].size(1) - n :],)

    hook = model.lm_head.register_forward_pre_hook(keep_last)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def no_logits(model: torch.nn.Module) -> Iterator[None]:
    """The model has no head."""
    head, model.lm_head = model.lm_head, torch.nn.Identity()
    try:
        yield
    finally:
        model.lm_head = head
