"""Measures stage 7: the effect of each of its two ideas on the loss, decoding in both forms, and drafting.

python -m benchmarks.mla trains the missing runs in runs/mla/ and writes the section "mla" of
results/results.json; afterwards run python -m lab.pages.lessons. It also reads compare.py's runs of stage 7,
and the runs of stage 6 with the bias that benchmarks/moe.py trains.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import train
from benchmarks import moe
from lab import cli, device, stages
from lab.comparison import spread
from lab.pages import lessons
from lab.sampling import generation
from lab.storage import runs
from lab.training import log, presets

CPU = torch.device("cpu")
VARIANTS = {
    "mla-alone": ["--model.num-nextn-predict-layers", "0"],
    "mtp-alone": ["--model.qk-rope-head-dim", "32"],  # stage 6's attention rotates all dimensions of a head
}
PROMPTS = ("ROMEO:\n", "JULIET:\n", "What, ", "KING RICHARD III:\nNow is the ", "The ")
DRAFTED = 400  # tokens to generate after each prompt


@dataclass
class Settings:
    """Measures stage 7."""

    seeds: int = 3
    """Number of runs of each variant."""
    rounds: int = 7
    """Number of interleaved measurements of each speed; medians are reported."""
    variant: str | None = None
    """Only train this variant (mla-alone or mtp-alone) with seed --seed, and measure nothing."""
    seed: int = 0
    """Seed of --variant."""
    drafts_of: str | None = None
    """Only measure drafting with this run of stage 7, and keep the other figures."""


def main():
    settings = cli.parse_flags(Settings, sys.argv[1:])
    if settings.variant:
        train_variant(settings.variant, settings.seed)
        return
    device.prepare(CPU)
    if settings.drafts_of:
        results = lessons.read_results()
        results["mla"]["drafts"] = drafts(Path(settings.drafts_of), settings.rounds)
        runs.write_json(lessons.RESULTS, results)
        print(json.dumps(results["mla"]["drafts"], indent=2))
        return
    for variant in VARIANTS:
        for seed in range(settings.seeds):
            if not (folder_of(variant, seed) / "sample.txt").exists():
                command = [sys.executable, __file__, "--variant", variant, "--seed", str(seed)]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    trained = runs.RUNS / "compare" / "laptop" / "stage7_mla_mtp-tinyshakespeare-seed0"
    results = lessons.read_results()
    results["mla"] = {
        "losses": losses(settings.seeds),
        "training": training(settings.rounds),
        "decoding": decoding(settings.rounds),
        "drafts": drafts(trained, settings.rounds),
        "rounds": settings.rounds,
        "machine": runs.machine(CPU),
    }
    runs.write_json(lessons.RESULTS, results)
    print(json.dumps(results["mla"], indent=2))


def folder_of(variant: str, seed: int) -> Path:
    """The folder of a variant's run."""
    return runs.RUNS / "mla" / f"{variant}-seed{seed}"


def train_variant(variant: str, seed: int) -> None:
    """Trains stage 7 with only one of its ideas, on the laptop preset."""
    if variant == "mtp-alone":
        module, six = stages.load("stage7_mla_mtp"), stages.load("stage6_moe")
        module.Attention = six.Attention  # every block looks its attention up by this name
        module.GPTConfig.n_kv_head = 2
    flags = ["--stage", "7", "--preset", "laptop", "--device", "cpu", "--seed", str(seed)]
    sys.argv = ["train.py", *flags, "--out", str(folder_of(variant, seed)), *VARIANTS[variant]]
    train.main() if variant != "mtp-alone" else train_without_sample()


def train_without_sample() -> None:
    """Runs train.py without the final sample, because stage 7's cache does not fit stage 6's attention."""
    train.report = lambda folder, *_: (folder / "sample.txt").write_text("")
    train.main()


def losses(seeds: int) -> dict:
    """Final validation losses with neither idea, each alone, and both, always with the sigmoid router."""
    folders = {
        "stage 6 with the bias": [runs.RUNS / "moe" / f"bias-seed{seed}" for seed in range(seeds)],
        "with MLA alone": [folder_of("mla-alone", seed) for seed in range(seeds)],
        "with MTP alone": [folder_of("mtp-alone", seed) for seed in range(seeds)],
        "stage 7: both": [
            runs.RUNS / "compare" / "laptop" / f"stage7_mla_mtp-tinyshakespeare-seed{seed}"
            for seed in range(seeds)
        ],
    }
    finals = {}
    for name, several in folders.items():
        histories = [log.read_metrics(folder / "metrics.jsonl") for folder in several]
        done = [metrics[-1]["val_loss"] for metrics in histories if metrics and "val_loss" in metrics[-1]]
        if done:
            finals[name] = spread.summary(done)
    return finals


def training(rounds: int) -> dict:
    """Training speed relative to stage 6's, with and without multi-token prediction."""
    dtype = device.choose_dtype("auto", CPU)
    six = moe.training_step("stage6_moe", dtype, router="sigmoid")
    return {
        name: moe.ratio(rounds, moe.training_step("stage7_mla_mtp", dtype, **fields), six)
        for name, fields in {"stage 7": {}, "without MTP": {"num_nextn_predict_layers": 0}}.items()
    }


def decoding(rounds: int) -> dict:
    """Tokens per second of decoding, by context length: absorbed, expanded, and stage 5."""
    by_context = {}
    for context in (64, 256, 1024, 2048):
        steppers = {
            "stage 5": stepper("stage5_flash", context, None),
            "absorbed": stepper("stage7_mla_mtp", context, True),
            "expanded": stepper("stage7_mla_mtp", context, False),
        }
        speeds = {name: [] for name in steppers}
        for step in steppers.values():
            step()
        for _ in range(rounds):
            for name, step in steppers.items():
                started = time.perf_counter()
                step()
                speeds[name].append(20 / (time.perf_counter() - started))
        by_context[context] = {name: statistics.median(values) for name, values in speeds.items()}
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

            seconds = [], []
            for _ in range(rounds):
                for function, clock in zip((plain, drafted), seconds, strict=True):
                    started = time.perf_counter()
                    function()
                    clock.append(time.perf_counter() - started)
            tokens = DRAFTED * len(prompts)
            rows.append(
                {
                    "temperature": temperature,
                    "drafts": n_drafts,
                    "accepted": counts.accepted / counts.drafted,
                    "plain_tokens_per_second": tokens / statistics.median(seconds[0]),
                    "drafted_tokens_per_second": tokens / statistics.median(seconds[1]),
                    "speed_up": statistics.median(a / b for a, b in zip(*seconds, strict=True)),
                }
            )
    return rows


if __name__ == "__main__":
    cli.run(main)
