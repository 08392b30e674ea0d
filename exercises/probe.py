"""Loads code and runs an exercise's probes on it, with the same inputs and weights each time.

The helpers below make inputs on which mistakes matter. In a model with its initial weights, attention is
nearly uniform and the norms' weights are 1, so many a mistake would change nothing.
"""

import ast
import sys
import threading
import traceback
import types
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from exercises.cut import OURS

TOLERANCE = 2e-5
"""The largest deviation that passes, relative to the largest number of a tensor."""
SECONDS = 20
"""After how long code is stopped."""


@dataclass
class Raised:
    """An exception, and where in the learner's file it happened."""

    type: str
    message: str
    line: int | None
    """The last line of the learner's file that was running; None if none of it was."""
    function: str
    values: dict[str, str]
    """The tensors' shapes and the numbers that the function had at that point."""
    ours: str
    """The function of the course that failed, if the learner's function had returned already or called it."""

    def same(self, other: "Raised") -> bool:
        """Whether it is the same exception as a known mistake's, with tensors of these shapes at hand."""
        shapes = {text for text in other.values.values() if text.startswith("(")}
        alike = (self.type, self.message) == (other.type, other.message)
        return alike and shapes <= set(self.values.values())


@dataclass
class Outcome:
    """What the probes computed, by name, and which of them raised an exception."""

    values: dict
    raised: dict[str, Raised]


class TooSlow(Exception):
    """The code ran for more than SECONDS."""


def load(code: str | ast.Module, file: str = "") -> types.ModuleType:
    """A module from source text or a syntax tree. Tracebacks name `file`, or one that does not exist."""
    module = types.ModuleType(f"exercise.{Path(file).stem or 'reference'}")
    module.__file__ = file or "<reference>"
    sys.modules[module.__name__] = module  # dataclasses look their own module up
    try:
        exec(compile(code, module.__file__, "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    return module


def run(probes: tuple[Callable, ...], module: types.ModuleType) -> Outcome:
    """Runs all probes on a module; an exception ends one probe only. TooSlow ends them all."""
    outcome = Outcome({}, {})
    for probe in probes:
        torch.manual_seed(0)
        try:
            outcome.values |= {name: plain(value) for name, value in probe(module).items()}
        except (KeyboardInterrupt, TooSlow):
            raise
        except BaseException as error:  # SystemExit, too
            outcome.raised[probe.__name__] = describe(error, module.__file__)
    return outcome


def plain(value):
    """A tensor without its history, so that it can be kept and compared."""
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


@contextmanager
def time_limit():
    """Raises TooSlow in the block after SECONDS, at the next line of Python. Works on any platform."""
    expired = threading.Event()

    def stop():
        expired.set()
        import _thread

        _thread.interrupt_main()

    timer = threading.Timer(SECONDS, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    except KeyboardInterrupt as error:
        if expired.is_set():
            raise TooSlow from error
        raise
    finally:
        timer.cancel()


def describe(error: BaseException, file: str) -> Raised:
    """What there is to tell about an exception raised while `file` was running."""
    frames = list(traceback.walk_tb(error.__traceback__))
    known = [(frame, line) for frame, line in frames if frame.f_code.co_filename == file]
    theirs = [(frame, line) for frame, line in known if line < OURS]
    last = known[-1] if known else None
    ours = last[0].f_code.co_name if last and last[1] >= OURS else ""
    message = str(error).split("\n")[0]
    if not theirs:
        return Raised(type(error).__name__, message, None, "", {}, ours)
    frame, line = theirs[-1]
    values = {name: shown(value) for name, value in frame.f_locals.items()}
    values = {name: text for name, text in values.items() if text and not name.startswith("_")}
    return Raised(type(error).__name__, message, line, frame.f_code.co_name, values, ours)


def shown(value) -> str:
    """A value in a few characters: the shape of a tensor, or a number; empty for anything else."""
    if isinstance(value, torch.Tensor):
        kind = "" if value.dtype == torch.float32 else f" {str(value.dtype).removeprefix('torch.')}"
        return f"{tuple(value.shape)}{kind}"
    if isinstance(value, bool | int | float) or value is None:
        return repr(value)
    if isinstance(value, tuple | list) and value and all(isinstance(v, torch.Tensor) for v in value):
        return " and ".join(map(shown, value))
    return ""


def deviation(got, expected) -> float:
    """How far a value is off, relative to the largest number expected; inf if it is of another kind.

    In 16 bits the mean counts, since a right answer may be rounded differently here and there.
    """
    if not isinstance(expected, torch.Tensor):
        if isinstance(expected, float) and isinstance(got, float | int):
            return abs(got - expected) / (abs(expected) + 1e-9)
        return 0.0 if type(got) is type(expected) and got == expected else torch.inf
    if not isinstance(got, torch.Tensor) or got.shape != expected.shape or got.dtype != expected.dtype:
        return torch.inf
    rounds = expected.dtype in (torch.float16, torch.bfloat16)
    x, y = got.double(), expected.double()
    special = ~x.isfinite() | ~y.isfinite()
    if not torch.equal(x[special].nan_to_num(0.5), y[special].nan_to_num(0.5)):
        return torch.inf
    x, y = x[~special], y[~special]
    if not y.numel():
        return 0.0
    distance, size = (x - y).abs(), y.abs()
    if rounds:
        return (distance.mean() / (size.mean() + 1e-9)).item()
    return (distance.max() / (size.max() + 1e-9)).item()


def distance(got: Outcome, expected: Outcome, names=None) -> float:
    """The largest deviation between two outcomes; inf if their names, shapes or exceptions differ.

    names: only these values count, and no exceptions.
    """
    if names is None:
        names = expected.values.keys()
        same_raised = got.raised.keys() == expected.raised.keys() and all(
            raised.same(expected.raised[name]) for name, raised in got.raised.items()
        )
        if got.values.keys() != names or not same_raised:
            return torch.inf
    if not names <= expected.values.keys():
        return torch.inf
    return max((deviation(got.values[name], expected.values[name]) for name in names), default=0.0)


def random(*shape: int, seed: int = 0, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
    """Normally distributed numbers, the same for a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale + mean


def tokens(*shape: int, seed: int = 3, vocab_size: int = 29) -> torch.Tensor:
    """Tokens (B, T), the same for a seed."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def small_model(module: types.ModuleType, **sizes):
    """A model with 2 layers, 6 heads of width 8 and, in evaluation mode, weights on which mistakes matter."""
    sizes = {
        "vocab_size": 29,
        "block_size": 12,
        "n_layer": 2,
        "n_head": 6,
        "n_embd": 48,
        "norm_eps": 0.1,
    } | sizes
    model = module.GPT(module.GPTConfig(**sizes)).eval()
    randomize(model)
    return model


def randomize(module: torch.nn.Module) -> None:
    """Replaces all weights and biases with random ones that do not depend on the order of definition."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in sorted(module.named_parameters()):
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
            if weight.dim() == 1 and name.endswith("weight"):  # a norm's
                weight += 1


@torch.no_grad()
def in_steps(model, idx: torch.Tensor, sizes: tuple[int, ...]) -> tuple[torch.Tensor, object]:
    """Logits of idx (B, T), computed with a cache, so many tokens at a time; and the cache."""
    cache = model.new_cache(len(idx), idx.size(1) + 1)
    return torch.cat([model(part, cache=cache)[0] for part in idx.split(sizes, dim=1)], dim=1), cache
