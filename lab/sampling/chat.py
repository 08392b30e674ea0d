"""A conversation with a model: it streams its answers, and keeps its cache from turn to turn."""

import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from lab.errors import UserError
from lab.interrupt import StopRequest
from lab.sampling import generation
from lab.sampling.ahead import BackgroundStep
from lab.sampling.compiled import CompiledStep

HELP = "type a message; /reset forgets the conversation, Ctrl-C stops an answer, Ctrl-D ends"
SMALLEST_CACHE = 1024  # tokens


@dataclass
class Chat:
    """A model and the messages so far."""

    model: torch.nn.Module
    tokens_of: Callable[[list[dict]], list[int]]
    """The tokens of a conversation, up to where the model's answer begins."""
    stream: Callable[[list[int]], Callable[[int | None], str]]
    """The tokenizer's stream: makes the function that turns tokens after a prompt into text."""
    context: int
    """The most tokens that the model sees."""
    max_new_tokens: int
    """The most tokens of an answer."""
    options: dict
    """The other arguments of generation.generate."""
    system: str | None = None
    """The system message."""
    step: CompiledStep | BackgroundStep | None = None
    messages: list[dict] = field(default_factory=list)
    """{"role": "user" or "assistant", "content": text}, in turns."""
    cache: object = None
    cache_length: int = 0
    cached: list[int] = field(default_factory=list)
    """The tokens that the cache holds."""

    def answer(self, message: str, write: Callable[[str], None], stopped: Callable) -> str | None:
        """Writes an answer piece by piece, until stopped() is true. Returns why it was cut, or None.

        A stopped answer stays in the conversation. After a UserError, the message is not in it.
        """
        self.messages.append({"role": "user", "content": message})
        pieces, made = [], []
        try:
            prompt = self.fitting_prompt()
            room = min(self.max_new_tokens, self.context - len(prompt))
            self.prepare_cache(prompt, room)
            text_of = self.stream(prompt)
            for token in generation.generate(
                self.model,
                prompt,
                room,
                cache=self.cache,
                context=self.context,
                step=self.step,
                **self.options,
            ):
                made.append(token)
                pieces.append(text_of(token))
                write(pieces[-1])
                if stopped():
                    break
            self.cached = [*prompt, *made][: self.cache.length]
            pieces.append(text_of(None))
            write(pieces[-1])
        except KeyboardInterrupt:
            if not stopped():
                raise
            self.cached = []  # a second Ctrl-C, perhaps while the cache was written to
        except UserError:
            self.messages.pop()
            self.cached = []
            raise
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
        if stopped() or len(made) < room:
            return None
        return f"the answer was cut after {room:,} tokens: " + (
            "see --max-new-tokens" if room == self.max_new_tokens else "the context is full"
        )

    def fitting_prompt(self) -> list[int]:
        """The tokens of the conversation. Drops its oldest exchanges until there is room for an answer."""
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        room, kept = min(self.max_new_tokens, self.context // 4), self.messages
        prompt = self.tokens_of([*system, *kept])
        while len(prompt) + room > self.context and len(kept) > 1:
            kept = kept[2:]
            prompt = self.tokens_of([*system, *kept])
        if len(prompt) >= self.context:
            raise UserError(
                f"the message has {len(prompt):,} tokens, with those of the chat template, but the context "
                f"has {self.context:,}\nsend a shorter message"
            )
        n_dropped = (len(self.messages) - len(kept)) // 2
        if n_dropped:
            exchanges = "exchange" if n_dropped == 1 else f"{n_dropped} exchanges"
            reason = f"the conversation exceeds the context of {self.context:,} tokens"
            print(f"forgot the oldest {exchanges}: {reason}", file=sys.stderr)
            self.messages = kept
        return prompt

    def prepare_cache(self, prompt: list[int], n_new: int) -> None:
        """Keeps what the cache has in common with the prompt; makes a longer cache if needed."""
        if self.step:
            self.cache, self.cache_length = self.step.cache, self.context
        if len(prompt) + n_new > self.cache_length:
            doubled = 2 ** (len(prompt) + n_new - 1).bit_length()
            self.cache_length = min(self.context, max(SMALLEST_CACHE, doubled))
            self.cache, self.cached = self.model.new_cache(1, self.cache_length), []
        n_common = common_length(self.cached, prompt[:-1])  # the model must see one token at least
        if n_common < self.cache.length and has_forgotten(self.cache):
            n_common = 0
        self.cache.length = n_common

    def reset(self) -> None:
        """Forgets the messages, except the system message."""
        self.messages = []


def common_length(a: list[int], b: list[int]) -> int:
    """How many tokens at the start of a and b are the same."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(a), len(b)))


def has_forgotten(cache) -> bool:
    """Whether a cache that is a ring has overwritten its oldest tokens, so that it cannot go back."""
    slots = [value.size(3) for value in vars(cache).values() if isinstance(value, torch.Tensor)]
    return cache.length > min(slots)


def hold(chat: Chat, messages: Iterable[str], write: Callable[[str], None], interactive: bool) -> None:
    """Answers each of the messages. If interactive, Ctrl-C stops the answer and not the program."""
    if interactive:
        print(HELP, file=sys.stderr)
    for message in messages:
        if message.strip() == "/reset":
            chat.reset()
            continue
        if not message.strip():
            continue
        try:
            if interactive:
                with StopRequest() as request:
                    note = chat.answer(message, write, lambda: request.signal)
                if request.signal not in (None, signal.SIGINT):
                    sys.exit(128 + request.signal)
            else:
                note = chat.answer(message, write, lambda: False)
        except UserError as error:
            if not interactive or not chat.messages:
                raise
            print(f"error: {error}", file=sys.stderr)
            continue
        write("\n")
        if note:
            print(note, file=sys.stderr)


def typed() -> Iterator[str]:
    """The lines that the user types, until Ctrl-C or Ctrl-D."""
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401  gives input() a history
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeDecodeError:
            print("this line is not UTF-8: it was not sent", file=sys.stderr)
            continue
        yield line
