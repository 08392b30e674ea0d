"""Beam search: of the texts of each length, only the most likely ones are continued.

The likeliest token at each place need not lead to the likeliest text. So a request keeps several texts, its
beams, and goes on with the best of all their continuations: one beam may have two successors, another none.
To the scheduler each beam is a sequence like any other. Successors share the blocks of their past.

The rules are those of transformers' generate(num_beams=…, do_sample=False, early_stopping=False).
"""

from dataclasses import dataclass
from math import inf

import torch

from deploy.serving import sampling
from deploy.serving.blocks import Blocks
from deploy.serving.sampling import Logprob, SamplingParams
from deploy.serving.scheduler import Sequence
from lab.errors import UserError
from lab.sampling.generation import check_finite


@dataclass
class Found:
    """A complete text."""

    score: float
    """Total log-probability / length ** length_penalty, both with the token that ended it."""
    tokens: list[int]
    """Without that token."""
    logprobs: list[Logprob]
    """One entry for each of them, if the request asks for log-probabilities."""
    finish_reason: str


class BeamSearch:
    """The search for the best texts of one request.

    ends: tokens that end a text, besides those of the request; longest: the most tokens of a text.
    """

    def __init__(
        self, params: SamplingParams, ends: frozenset[int], longest: int, vocab_size: int, max_batch: int
    ):
        """Raises UserError if there can never be so many beams."""
        self.params, self.longest = params, longest
        self.ends = ends | frozenset(params.stop_token_ids)
        self.found: list[Found] = []  # the best first, no more than there are beams
        self.is_over = False
        self.logits: dict[int, torch.Tensor] = {}  # (vocab_size,) by beam: what this step has computed so far
        self.logprobs: list[list[Logprob]] = [[] for _ in range(params.beams)]  # of the beams' tokens
        # Even if all beams may end, as many as there are go on.
        self.n_candidates = params.beams * max(2, 1 + len(self.ends))
        if params.beams > max_batch:
            raise UserError(
                f"the request has {params.beams} beams, and a batch has room for {max_batch} texts\n"
                "lower the number of beams, or raise max_batch"
            )
        if self.n_candidates > vocab_size:
            raise UserError(
                f"{params.beams} beams need a vocabulary of {self.n_candidates}, and there are {vocab_size}\n"
                "lower the number of beams"
            )

    def advance(self, beams: list[Sequence], blocks: Blocks) -> list[Found]:
        """Replaces all beams by their best continuations. Returns the n best texts once the search is over.

        All tokens of the beams must be computed, and the logits after them be in self.logits.
        """
        logits = torch.stack([self.logits.pop(beam.index) for beam in beams]).float()  # (beams, vocab_size)
        going = self.choose(beams, logits)
        length = len(beams[0].generated) + 1
        is_full = len(self.found) == len(
            beams
        )  # then only a beam that is better than the worst of them goes on
        if not going or (is_full and self.score(going[0][2], length) <= self.found[-1].score):
            self.is_over = True
            return self.found[: self.params.n]
        self.logprobs = [self.noted(logits, row, token) for row, token, _ in going]
        texts = [[*beams[row].generated, token] for row, token, _ in going]
        tables = [blocks.fork(beams[row].table) for row, _, _ in going]
        for beam, text, table, (_, _, total) in zip(beams, texts, tables, going, strict=True):
            blocks.release(beam.table)  # what no successor shares is free
            beam.generated, beam.table, beam.logprob = text, table, total
        return []

    def choose(self, beams: list[Sequence], logits: torch.Tensor) -> list[tuple[int, int, float]]:
        """The best continuations: the beam's row, its next token and the total log-probability of each.

        If a continuation ends its text, it is noted in self.found and not returned.
        """
        totals = self.token_scores(beams, logits) + torch.tensor([beam.logprob for beam in beams])[:, None]
        length = len(beams[0].generated) + 1
        if length == 1:
            totals[1:] = -inf  # the beams are still the same
        best, places = totals.flatten().topk(self.n_candidates)
        going = []
        for rank, (total, place) in enumerate(zip(best.tolist(), places.tolist(), strict=True)):
            row, token = divmod(place, totals.size(1))
            is_end = token in self.ends
            if not is_end and length < self.longest:
                going.append((row, token, total))
            elif rank < len(beams):
                tokens, logprobs = beams[row].generated, self.logprobs[row]
                if not is_end:
                    tokens, logprobs = [*tokens, token], self.noted(logits, row, token)
                reason = "stop" if is_end else "length"
                self.found.append(Found(self.score(total, length), tokens, logprobs, reason))
        self.found = sorted(self.found, key=lambda found: -found.score)[: len(beams)]
        return going[: len(beams)]

    def token_scores(self, beams: list[Sequence], logits: torch.Tensor) -> torch.Tensor:
        """(beams, vocab_size) log-probabilities, changed by the request's biases and penalties."""
        check_finite(logits.max())
        scores = logits.log_softmax(dim=-1)
        if self.params.changes_logits:
            rows = zip(scores, beams, strict=True)
            scores = torch.stack(
                [sampling.penalized(row, self.params, beam.prompt, beam.generated) for row, beam in rows]
            )
        return scores

    def score(self, total: float, length: int) -> float:
        return total / length**self.params.length_penalty

    def noted(self, logits: torch.Tensor, row: int, token: int) -> list[Logprob]:
        """The log-probabilities of a beam's tokens and a next one, if the request asks for them."""
        if self.params.logprobs is None:
            return []
        return self.logprobs[row] + sampling.logprobs(logits[row : row + 1], [token], self.params.logprobs)
