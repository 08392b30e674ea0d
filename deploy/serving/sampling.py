"""What a request asks for, and how its next token is drawn."""

from dataclasses import dataclass, field
from math import inf

import torch

from lab.errors import UserError
from lab.sampling.generation import is_greedy, next_token_probs

LARGEST = 1e6  # of what is added to a logit
MOST_LENGTH_PENALTY = 10
NOT_FOR_BEAMS = {"temperature": (0, 1), "top_k": (), "top_p": (1,), "min_p": (0,), "stop": ([],)}
"""Fields that beam search cannot obey, with the values that change nothing. None is always one of them."""


@dataclass
class SamplingParams:
    """How to continue a prompt. Raises UserError if a value makes no sense."""

    max_tokens: int = 128
    temperature: float = 1.0
    """0: always the most likely token."""
    top_k: int | None = None
    """Only the k most likely tokens are drawn."""
    top_p: float = 1.0
    """Only the most likely tokens, up to this total probability, are drawn."""
    min_p: float = 0.0
    """Of those, tokens less likely than min_p times the most likely one are not drawn."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that the prompt or the text has, and multiplies negative ones, as
    transformers does. (The idea is from arXiv 1909.05858, which always divides.)"""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the text has."""
    frequency_penalty: float = 0.0
    """Subtracted from them as often as the text has the token."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    seed: int | None = None
    """The same seed gives the same text; text i of n has the seed + i. None: a new one each time."""
    stop: list[str] | str = field(default_factory=list)
    """Strings that end the text, and are not part of it."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Tokens that do."""
    logprobs: int | None = None
    """How many of the most likely tokens to list at every position, with the model's log-probabilities,
    besides the drawn one (0: only that). None: no log-probabilities."""
    n: int = 1
    """How many texts to generate."""
    best_of: int | None = None
    """How many to generate if only the n with the highest mean log-probability are returned."""
    beams: int = 1
    """More than 1: beam search, which keeps that many texts at each length and returns the n best. At least
    n."""
    length_penalty: float = 1.0
    """Beam search ranks texts by their total log-probability / length ** length_penalty. Above 0 favours long
    texts, below 0 short ones."""
    ignore_eos: bool = False
    """Continues after an end-of-text token."""

    def __post_init__(self):
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        checks = {
            "max_tokens": self.max_tokens >= 1,
            "temperature": 0 <= self.temperature < inf,
            "top_k": self.top_k is None or self.top_k >= 1,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": 0.01 <= self.repetition_penalty <= 100,  # logits stay finite
            "presence_penalty": abs(self.presence_penalty) <= LARGEST,
            "frequency_penalty": abs(self.frequency_penalty) <= LARGEST,
            "logit_bias": all(abs(bias) <= LARGEST for bias in self.logit_bias.values()),
            "stop": "" not in self.stop,
            "logprobs": self.logprobs is None or self.logprobs >= 0,
            "n": self.n >= 1,
            "best_of": self.best_of is None or self.best_of >= self.n,
            "beams": self.beams == 1 or self.beams >= self.n,
            "length_penalty": abs(self.length_penalty) <= MOST_LENGTH_PENALTY,
        }
        for name, is_good in checks.items():
            if not is_good:
                raise UserError(f"{name} = {getattr(self, name)!r} is not possible: see SamplingParams")
        if self.beams > 1:
            for name, neutral in (NOT_FOR_BEAMS | {"best_of": ()}).items():
                value = getattr(self, name)
                if value is not None and value not in neutral:
                    raise UserError(f"{name} = {value!r} is not for beam search: leave it out")
        elif self.length_penalty != 1:
            raise UserError(
                f"length_penalty = {self.length_penalty} is for beam search: set beams, or leave it out"
            )

    @property
    def n_texts(self) -> int:
        """How many texts are generated."""
        return max(self.n, self.best_of or 1, self.beams)

    @property
    def changes_logits(self) -> bool:
        penalties = (self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty)
        return bool(self.logit_bias) or any(penalties)


@dataclass
class Logprob:
    """The log-probabilities by the model, before penalties and temperature, of a token and the likeliest."""

    logprob: float
    top: list[tuple[int, float]]
    """Tokens and their log-probabilities, the likeliest first."""


def draw(logits: torch.Tensor, sequences: list) -> list[int]:
    """The next token of each sequence: logits (B, vocab_size) on the CPU -> B tokens.

    All greedy rows are done at once. The others are drawn one by one, each with its own generator, so that a
    seed gives the text that it gives in sample.py.
    """
    plain = [is_greedy(s.params.temperature) and not s.params.changes_logits for s in sequences]
    largest, tokens = (t.tolist() for t in logits.max(dim=-1))
    for i, sequence in enumerate(sequences):
        if plain[i] and abs(largest[i]) < inf:
            continue
        probs = distribution(logits[i], sequence)  # raises UserError if the logits are not finite
        if is_greedy(sequence.params.temperature):
            tokens[i] = int(probs.argmax())
        else:
            tokens[i] = int(torch.multinomial(probs, 1, generator=sequence.generator))
    return tokens


def distribution(logits: torch.Tensor, sequence) -> torch.Tensor:
    """(vocab_size,) logits -> (vocab_size,) probabilities of a sequence's next token."""
    params = sequence.params
    if params.changes_logits:
        logits = penalized(logits.float(), params, sequence.prompt, sequence.generated)
    probs = next_token_probs(logits, params.temperature, params.top_k, params.top_p)
    if params.min_p:
        probs = torch.where(probs >= params.min_p * probs.max(), probs, 0)
        probs /= probs.sum()
    return probs


def penalized(logits: torch.Tensor, params: SamplingParams, prompt: list[int], generated: list[int]):
    """The logits with biases and penalties."""
    logits = logits.clone()
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    seen = torch.tensor(sorted({*prompt, *generated}))
    if params.repetition_penalty != 1:
        found = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(found > 0, found / penalty, found * penalty)
    if generated:
        tokens, counts = torch.tensor(generated).unique(return_counts=True)
        logits[tokens] -= params.presence_penalty + params.frequency_penalty * counts
    return logits


def logprobs(logits: torch.Tensor, tokens: list[int], n_top: int) -> list[Logprob]:
    """Logits (B, vocab_size) and the drawn tokens -> B entries, each with the n_top likeliest tokens."""
    found = logits.float().log_softmax(dim=-1)
    drawn = found.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    top, indices = found.topk(min(n_top, found.size(1)))
    return [
        Logprob(drawn[i], list(zip(ids, values, strict=True)))
        for i, (ids, values) in enumerate(zip(indices.tolist(), top.tolist(), strict=True))
    ]


class Writer:
    """Turns a sequence's tokens into text. It holds back what may yet become part of a stop string."""

    def __init__(self, text_of, stop: list[str]):
        self.text_of, self.stop = text_of, stop  # text_of: tokenizer.stream(prompt)
        self.held = ""
        self.stopped = False

    def add(self, token: int | None) -> str:
        """The text that is certain after this token; None ends the text. `stopped` says if a string did."""
        text = self.held + self.text_of(token)
        found = [text.find(stop) for stop in self.stop if stop in text]
        if found:
            self.held, self.stopped = "", True
            return text[: min(found)]
        n_held = max((overlap(text, stop) for stop in self.stop), default=0) if token is not None else 0
        self.held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def overlap(text: str, stop: str) -> int:
    """The length of the longest start of `stop` that the text ends with."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
