"""Measures stage 7: what each of its two ideas does to the loss, decoding in both forms, and drafting.

python -m benchmarks.mla            writes the part "mla" of results/results.json, training what is missing in
                                 runs/mla/; then python -m lab.pages.lessons
It reads the runs of stage 7 that compare.py made, and those of stage 6 with the bias of moe.py.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import train
from benchmarks import moe
from lab import cli, device, stages
from lab.comparison import spread, timing
from lab.pages import lessons
from lab.sampling import generation
from lab.storage import runs
from lab.training import log, presets

CPU = torch.device("cpu")
VARIANTS = {
    "mla-alone": ["--model.num-nextn-predict-layers", "0"],
    "mtp-alone": ["--model.qk-rope-head-dim", "32"],  # stage 6's attention rotates all of a head
}
PROMPTS = ("ROMEO:\n", "JULIET:\n", "What, ", "KING RICHARD III:\nNow is the ", "The ")
DRAFTED = 400  # tokens after each


@dataclass
class Settings:
    """Measures stage 7."""

    seeds: int = 3
    """Runs of each variant."""
    rounds: int = 7
    """Times that each speed is measured, in turn; medians are reported."""
    variant: str | None = None
    """Train this variant alone (mla-alone or mtp-alone) with seed --seed, and measure nothing."""
    seed: int = 0
    """Seed of --variant."""
    drafts_of: str | None = None
    """Measure the drafts of this run of stage 7 alone, and keep the other figures."""


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
    """Where a variant's run is."""
    return runs.RUNS / "mla" / f"{variant}-seed{seed}"


def train_variant(variant: str, seed: int) -> None:
    """Trains stage 7 with one of its ideas alone, laptop preset."""
    if variant == "mtp-alone":
        module, six = stages.load("stage7_mla_mtp"), stages.load("stage6_moe")
        module.Attention = six.Attention  # every block makes its attention of this name
        module.GPTConfig.n_kv_head = 2
    flags = ["--stage", "7", "--preset", "laptop", "--device", "cpu", "--seed", str(seed)]
    sys.argv = ["train.py", *flags, "--out", str(folder_of(variant, seed)), *VARIANTS[variant]]
    train.main() if variant != "mtp-alone" else train_without_sample()


def train_without_sample() -> None:
    """train.py but for its sample: the cache of stage 7 does not fit stage 6's attention."""
    train.report = lambda folder, *_: (folder / "sample.txt").write_text("")
    train.main()


def losses(seeds: int) -> dict:
    """Final validation losses with neither idea, each alone, and both; all with the sigmoid router."""
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
    """Training speed as a multiple of stage 6's, with the block of multi-token prediction and without."""
    dtype = device.choose_dtype("auto", CPU)
    six = moe.training_step("stage6_moe", dtype, router="sigmoid")
    return {
        name: moe.ratio(rounds, moe.training_step("stage7_mla_mtp", dtype, **fields), six)
        for name, fields in {"stage 7": {}, "without MTP": {"num_nextn_predict_layers": 0}}.items()
    }


def decoding(rounds: int) -> dict:
    """Tokens a second of one token at a time behind so long a context: absorbed, expanded, and stage 5."""
    by_context = {}
    for context in (64, 256, 1024, 2048):
        steppers = {
            "stage 5": stepper("stage5_flash", context, None),
            "absorbed": stepper("stage7_mla_mtp", context, True),
            "expanded": stepper("stage7_mla_mtp", context, False),
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
    """Acceptance and speed of drafting with the trained stage 7, by temperature and drafts at a time."""
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
