"""Measures stages 7a and 7: the time of a training step, decoding in both forms, and drafting.

python -m benchmarks.mla writes the part "mla" of results/results.json; then `python -m lab.pages.lessons`
writes the tables into the lesson. For drafting it needs the run of stage 7 that compare.py makes.
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import moe
from lab import cli, device, stages
from lab.comparison import timing
from lab.pages import lessons
from lab.sampling import generation
from lab.storage import runs
from lab.training import presets

CPU = torch.device("cpu")
PROMPTS = ("ROMEO:\n", "JULIET:\n", "What, ", "KING RICHARD III:\nNow is the ", "The ")
DRAFTED = 400  # tokens to generate after each prompt


@dataclass
class Settings:
    """Measures stages 7a and 7."""

    rounds: int = 7
    """Number of interleaved measurements of each speed; medians are reported."""
    drafts_of: str | None = None
    """Only measure drafting with this run of stage 7, and keep the other figures."""


def main():
    settings = cli.parse_flags(Settings, sys.argv[1:])
    device.prepare(CPU)
    if settings.drafts_of:
        results = lessons.read_results()
        results["mla"]["drafts"] = drafts(Path(settings.drafts_of), settings.rounds)
        runs.write_json(lessons.RESULTS, results)
        print(json.dumps(results["mla"]["drafts"], indent=2))
        return
    trained = runs.RUNS / "compare" / "laptop" / "stage7_mla_mtp-tinyshakespeare-seed0"
    results = lessons.read_results()
    results["mla"] = {
        "training": training(settings.rounds),
        "decoding": decoding(settings.rounds),
        "drafts": drafts(trained, settings.rounds),
        "rounds": settings.rounds,
        "machine": runs.machine(CPU),
    }
    runs.write_json(lessons.RESULTS, results)
    print(json.dumps(results["mla"], indent=2))


def training(rounds: int) -> dict:
    """Training speed as a multiple of stage 6's."""
    dtype = device.choose_dtype("auto", CPU)
    six = moe.training_step("stage6_moe", dtype)
    return {
        f"stage {stages.number(name)}": moe.ratio(rounds, moe.training_step(name, dtype), six)
        for name in ("stage7a_mla", "stage7_mla_mtp")
    }


def decoding(rounds: int) -> dict:
    """Tokens per second of decoding, by context length: absorbed, expanded, and stage 5."""
    by_context = {}
    for context in (64, 256, 1024, 2048):
        steppers = {
            "stage 5": stepper("stage5_flash", context, None),
            "absorbed": stepper("stage7a_mla", context, True),
            "expanded": stepper("stage7a_mla", context, False),
        }
        seconds = timing.in_turn(steppers, rounds, CPU, warm_ups=1)
        by_context[context] = {name: 20 / statistics.median(of) for name, of in seconds.items()}
    return by_context


def stepper(name: str, context: int, absorbs: bool | None):
    """A function that decodes 20 tokens with a cache of `context` tokens."""
    stage = stages.load(name)
    sizes = presets.PRESETS["laptop"]["model"] | {"block_size": context + 1}
    model = stage.GPT(stage.GPTConfig(vocab_size=65, **sizes)).eval()
    for module in model.modules():
        if absorbs is not None and isinstance(module, stage.Attention):
            module.absorbing_is_cheaper = lambda T, S: absorbs and T == 1
    cache = model.new_cache(1, context + 1)
    with torch.inference_mode():
        model(torch.randint(65, (1, context)), cache=cache)

    @torch.inference_mode()
    def step():
        for _ in range(20):
            model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
            cache.length = context

    return step


def drafts(trained: Path, rounds: int) -> list[dict]:
    """Acceptance rate and speed of drafting with a trained stage 7, by temperature and number of drafts."""
    model, _ = runs.load(trained, "best", CPU)
    tokenizer = runs.tokenizer(trained)
    vocab_size = tokenizer.vocab_size
    prompts = [tokenizer.encode(prompt).tolist() for prompt in PROMPTS]
    rows = []
    for temperature in (0.0, 0.8):
        options = {"temperature": temperature}

        def plain(options=options):
            generator = torch.Generator().manual_seed(0)
            for prompt in prompts:
                list(generation.generate(model, prompt, DRAFTED, vocab_size, generator=generator, **options))

        for n_drafts in (1, 2, 3):
            counts = generation.DraftCounts()

            def drafted(n_drafts=n_drafts, counts=counts, options=options):
                generator = torch.Generator().manual_seed(0)
                options = options | {"generator": generator, "counts": counts}
                for prompt in prompts:
                    list(
                        generation.generate_with_drafts(
                            model, prompt, DRAFTED, vocab_size, n_drafts, **options
                        )
                    )

            seconds = timing.in_turn({"plain": plain, "drafted": drafted}, rounds, CPU)
            tokens = DRAFTED * len(prompts)
            rows.append(
                {
                    "temperature": temperature,
                    "drafts": n_drafts,
                    "accepted": counts.accepted / counts.drafted,
                    "plain_tokens_per_second": tokens / statistics.median(seconds["plain"]),
                    "drafted_tokens_per_second": tokens / statistics.median(seconds["drafted"]),
                    "speed_up": timing.median_ratio(seconds["plain"], seconds["drafted"]),
                }
            )
    return rows


if __name__ == "__main__":
    cli.run(main)
