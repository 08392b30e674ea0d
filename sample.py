"""Continues a prompt with a trained run: python sample.py --stage 0 --prompt "ROMEO:"

The prompt may also come from a pipe (echo "ROMEO:" | python sample.py --stage 0) or from --prompt-file.
The text is written to stdout as it is generated, everything else to stderr. It ends at an end-of-text token,
if the model has any, or after --max-new-tokens.

python sample.py --run RUN --chat holds a conversation with an imported model whose tokenizer has a chat
template. Each line is a message, also from a pipe.
"""

from lab import terminal

if __name__ == "__main__":
    terminal.prepare()  # first, since importing torch takes seconds

import functools
import math
import os
import stat
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from data import chat_template, files
from data.tokenizers import end_tokens
from lab import cli
from lab import device as devices
from lab.errors import UserError, shown
from lab.sampling import chat, generation, int8_cache, packed
from lab.sampling.ahead import BackgroundStep
from lab.sampling.compiled import CompiledStep
from lab.storage import edits, runs

COMPILED_CONTEXT = (
    2048  # for a chat: a compiled step attends to all of its cache, however few tokens it holds
)


@dataclass
class Settings:
    """Continues a prompt with a trained run."""

    stage: str | None = None
    """Sample from the newest run of this stage: its number or name. None: the newest of all."""
    run: str | None = None
    """Folder of the run, instead of the newest one of --stage."""
    checkpoint: Literal["best", "last"] = "best"
    """best (lowest validation loss) or last."""
    prompt: str | None = None
    """Text to continue. None: the piped input; if there is none, a new text."""
    prompt_file: str | None = None
    """File with the text to continue."""
    max_new_tokens: int = 500
    """Tokens to generate per sample."""
    context: int | None = None
    """The most tokens that the model sees; fewer than in training save memory. None: as in training."""
    num_samples: int = 1
    """Number of samples."""
    temperature: float = 0.8
    """Higher values give more surprising text; 0 always picks the most likely token."""
    top_k: int | None = 200
    """Sample from the k most likely tokens only. None: all."""
    top_p: float = 1.0
    """Sample from the fewest most likely tokens whose probabilities sum to top_p."""
    draft: bool = False
    """Let the MTP block draft tokens that the model then verifies (stage 7)."""
    draft_tokens: int = 2
    """Tokens to draft at a time."""
    compile: bool = False
    """Compile the decoding step. On a CPU this happens while the text is generated, which then becomes
    faster, and later starts reuse the compiled code. Not with --draft, nor for a quantized run."""
    compile_first: bool = False
    """As --compile, but the text waits until the step is compiled."""
    ignore_eos: bool = False
    """Go on after an end-of-text token, and print it."""
    chat: bool = False
    """Talk with the model in the terminal: needs a tokenizer with a chat template."""
    system: str | None = None
    """System message of the chat."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights; auto: as the run stores them, if the device is fast with it."""
    cache_dtype: Literal["auto", "int8"] = "auto"
    """Number format of the cache; int8 takes half of the memory of bfloat16. auto: that of the weights."""
    seed: int = 1337
    """Seed of the random choices: the same seed gives the same text."""
    device: str = "auto"
    """cuda, mps or cpu; auto: the first of these that is available."""

    def __post_init__(self):
        for name in ("max_new_tokens", "num_samples", "draft_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.context is not None and self.context < 1:
            raise ValueError(f"context must be at least 1, not {self.context}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more and finite, not {self.temperature}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to below 2**63, not {self.seed}")
        self.compile = self.compile or self.compile_first
        if self.compile and self.draft:
            raise ValueError("--compile and --draft do not go together; leave one of them out")
        if self.compile and self.cache_dtype == "int8":
            raise ValueError("--compile and --cache-dtype int8 do not go together; leave one of them out")
        for name in ("draft", "prompt", "prompt_file"):
            if self.chat and getattr(self, name) not in (None, False):
                raise ValueError(
                    f"--chat and --{name.replace('_', '-')} do not go together; leave one of them out"
                )
        if self.chat and self.num_samples > 1:
            raise ValueError("--chat has one answer to each message; leave --num-samples out")
        if self.system is not None and not self.chat:
            raise ValueError("--system is for --chat; leave it out, or add --chat")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")


@devices.memory_errors("try a lower --max-new-tokens, a shorter prompt, or a lower --context")
def main():
    settings = cli.parse_flags(Settings, sys.argv[1:])
    device = devices.choose(settings.device)
    devices.prepare(device)
    folder = Path(settings.run) if settings.run else runs.newest(settings.stage)
    runs.check_stage(folder, settings.stage)
    runs.warn_of_edits(folder, runs.read_config(folder))  # before an error, if the weights no longer fit
    config, meta = runs.read_config(folder), runs.read_meta(folder)
    if settings.compile and "quantization" in config:
        raise UserError(f"{shown(folder)} is quantized, and --compile cannot compile that: leave it out")
    tokenizer = runs.tokenizer(folder)
    template = chat_template.ChatTemplate(folder) if settings.chat else None
    stored = runs.weights_dtype(folder, config)
    dtype = devices.sampling_dtype(settings.dtype, stored, device)
    model, config = runs.load(folder, settings.checkpoint, device, dtype)
    packed.pack(model)
    if settings.cache_dtype == "int8":
        int8_cache.use(model)
    if settings.draft and not getattr(model.config, "num_nextn_predict_layers", 0):
        raise UserError(
            f"--draft needs a block of multi-token prediction; {shown(folder)} ({config['stage']}) has none\n"
            "train a model that has one: python train.py --stage 7"
        )
    context = settings.context or model.config.block_size
    if context > model.config.block_size:
        raise UserError(f"--context {context} is too long: the model has {model.config.block_size} positions")
    options = {
        "vocab_size": tokenizer.vocab_size,
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "generator": torch.Generator().manual_seed(settings.seed),
        "stop": frozenset() if settings.ignore_eos else end_tokens(folder, meta, tokenizer),
    }
    if settings.chat:
        say_what_is_loaded(settings, folder, config, stored, dtype)
        converse(settings, config["stage"], model, tokenizer, template, context, options)
    else:
        prompt = read_prompt(settings)
        tokens = tokenizer.encode(prompt).tolist() if prompt else generation.default_prompt(tokenizer)
        if not tokens:
            raise UserError(
                f"the prompt {prompt!r} gives no tokens: the model's tokenizer drops all of it\n"
                "use another prompt, or none to start a new text"
            )
        say_what_is_loaded(settings, folder, config, stored, dtype)
        continue_text(settings, config["stage"], model, tokenizer, prompt, tokens, context, options)


def say_what_is_loaded(
    settings: Settings, folder: Path, config: dict, stored: torch.dtype, dtype: torch.dtype
) -> None:
    """Names the run on stderr, and the dtype if --dtype auto chose another one than the run's own."""
    print(f"{config['stage']} from {shown(folder)}", file=sys.stderr)
    if settings.dtype == "auto" and dtype != stored:
        stored, dtype = (str(each).removeprefix("torch.") for each in (stored, dtype))
        print(
            f"{stored} is slow on this device: the weights are converted to {dtype} (see --dtype)",
            file=sys.stderr,
        )


def compiled(
    settings: Settings, stage: str, model: torch.nn.Module, length: int
) -> CompiledStep | BackgroundStep:
    """The decoding step for up to `length` tokens. On a CPU it is compiled while it is used."""
    if next(model.parameters()).device.type == "cpu":
        niceness = 0 if settings.compile_first else 19
        step = BackgroundStep(model, stage, edits.code_hash(stage), length, niceness)
        if settings.compile_first and step.process:
            print("compiling the model ...", file=sys.stderr)
            step.wait()
        return step
    print("compiling the model ...", file=sys.stderr)
    step = CompiledStep(model, length)
    print(f"compiled in {step.seconds:.0f} s", file=sys.stderr)
    return step


def end_compiling(step: CompiledStep | BackgroundStep | None) -> None:
    """Ends compiling in the background, if it is not done yet, and says on stderr what came of it."""
    if not isinstance(step, BackgroundStep):
        return
    if step.process:
        step.stop()
        print("not compiled: the text ended first (--compile-first waits for the compiler)", file=sys.stderr)
    elif step.problem:
        print(f"not compiled: {step.problem}", file=sys.stderr)
    elif step.seconds:
        print(f"compiled in {step.seconds:.0f} s", file=sys.stderr)


def continue_text(
    settings: Settings,
    stage: str,
    model: torch.nn.Module,
    tokenizer,
    prompt: str,
    tokens: list,
    context: int,
    options: dict,
) -> None:
    """Prints the samples. prompt is the text, tokens are its tokens, options those of generation.generate."""
    if len(tokens) > context:
        print(f"the prompt has {len(tokens):,} tokens: the model sees the last {context:,}", file=sys.stderr)
    counts, step = generation.DraftCounts(), None
    if settings.draft:
        generate = functools.partial(
            generation.generate_with_drafts, n_drafts=settings.draft_tokens, counts=counts
        )
    elif settings.compile:
        length = generation.cache_length(context, tokens, settings.max_new_tokens)
        length = min(context, max(256, 2 ** (length - 1).bit_length()))  # few lengths: each is compiled anew
        step = compiled(settings, stage, model, length)
        generate = functools.partial(generation.generate, step=step)
    else:
        generate = generation.generate
    n_tokens, seconds = 0, 0.0
    for number in range(settings.num_samples):
        if number:
            print("\n---------------")
        write(prompt)
        text_of = tokenizer.stream(tokens)
        started = time.perf_counter()
        for token in generate(model, tokens, settings.max_new_tokens, context=context, **options):
            write(text_of(token))
            n_tokens += 1
        seconds += time.perf_counter() - started
        write(text_of(None))
    print()
    speed = f"{n_tokens} tokens in {seconds:.1f} s: {n_tokens / seconds:,.0f} tokens/s"
    if counts.drafted:
        speed += f"; {counts.accepted / counts.drafted:.0%} of {counts.drafted} drafts accepted"
    print(speed, file=sys.stderr)
    end_compiling(step)


def converse(
    settings: Settings, stage: str, model: torch.nn.Module, tokenizer, template, context: int, options: dict
) -> None:
    """Holds a conversation: with the terminal, or with the lines of a pipe."""
    if settings.compile and settings.context is None and context > COMPILED_CONTEXT:
        context = COMPILED_CONTEXT
        print(f"--compile: the conversation has room for {context:,} tokens (see --context)", file=sys.stderr)
    talk = chat.Chat(
        model,
        lambda messages: chat_template.encode(tokenizer, template.render(messages)).tolist(),
        tokenizer.stream,
        context,
        settings.max_new_tokens,
        options,
        settings.system,
        compiled(settings, stage, model, context) if settings.compile else None,
    )
    interactive = sys.stdin is not None and sys.stdin.isatty()
    if interactive:
        messages = chat.typed()
    else:
        lines = [] if sys.stdin is None else sys.stdin.buffer
        messages = (files.decoded(line, "standard input").rstrip("\n") for line in lines)
    chat.hold(talk, messages, write, interactive)
    end_compiling(talk.step)


def read_prompt(settings: Settings) -> str:
    """The prompt from --prompt, --prompt-file or a pipe; empty if there is none."""
    if settings.prompt is not None and settings.prompt_file is not None:
        raise UserError("give --prompt or --prompt-file, not both")
    if settings.prompt is not None:
        try:
            # Python decodes bytes that are not UTF-8 to surrogates; this restores those bytes.
            content = settings.prompt.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:  # other surrogates
            content = settings.prompt.encode("utf-8", "surrogatepass")
        return files.decoded(content, "the prompt")
    source = "standard input"
    if settings.prompt_file is not None:
        source = settings.prompt_file or "''"  # '' shows that the name is empty
    try:
        if settings.prompt_file is not None:
            return files.decoded(Path(settings.prompt_file).expanduser().read_bytes(), source)
        if sys.stdin is None:  # closed
            return ""
        mode = os.fstat(sys.stdin.fileno()).st_mode
        if stat.S_ISFIFO(mode) or stat.S_ISREG(mode):
            return files.decoded(sys.stdin.buffer.read(), source)
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror or error}") from None
    return ""


def write(text: str) -> None:
    """Writes text and shows it at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    cli.run(main)
