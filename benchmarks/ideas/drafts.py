"""Where multi-token prediction pays: drafting by model size and by text, and the loss at equal FLOPs.

python -m benchmarks.ideas.drafts writes results/ideas/drafts.json (how many drafts are accepted and how much
faster decoding gets, with and without compiling) and drafts-loss.json (stages 7 and 7a at equal FLOPs).
"""

import statistics
import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch

import data
from benchmarks import ideas
from lab import cli, device, stages
from lab.comparison import report, spread, timing
from lab.sampling import generation
from lab.storage import runs
from lab.training import cost, presets, run_plots

CPU = torch.device("cpu")
PROMPTS = 5  # windows of the validation split, evenly spaced
PROMPT_TOKENS = 32
TEMPERATURES = (0.0, 0.8)
N_DRAFTS = (1, 2, 3)

# By name: its text, its run and the flags that differ from stage 7's on the laptop preset.
MODELS = {
    "n_embd 64": ("tinyshakespeare", "drafts-64", ["--model.n-embd", "64", "--model.n-head", "2"]),
    "n_embd 128": ("tinyshakespeare", "stage7", []),
    "n_embd 256": ("tinyshakespeare", "drafts-256", ["--model.n-embd", "256", "--model.n-head", "8"]),
    "n_embd 128, Python code": ("pycode", "drafts-pycode", ["--data", "pycode", "--eval-tokens", "100000"]),
}


@dataclass
class Settings:
    """Measures drafting by model size and by text, and the loss with and without MTP at equal FLOPs.

    On one core, training takes about 1½ hours, compiling and measuring about 20 minutes.
    """

    only: Literal["drafts", "loss"] | None = None
    """Only measure drafting, or only the loss. None: both."""
    models: tuple[str, ...] = tuple(MODELS)
    """The models to draft with."""
    seeds: int = 3
    """Number of runs of each model, and of those with and without MTP."""
    rounds: int = 3
    """Number of interleaved measurements of each run's speeds; the medians of a run count."""
    tokens: int = 100
    """Number of tokens to generate after each of 5 prompts."""

    def __post_init__(self):
        unknown = [name for name in self.models if name not in MODELS]
        if unknown:
            raise ValueError(f"models must be of {', '.join(MODELS)}; not {', '.join(unknown)}")


def main():
    settings = cli.parse_benchmark_flags(Settings, sys.argv[1:])
    device.prepare(CPU)
    if settings.only != "drafts":
        equal_flops(settings.seeds)
    if settings.only != "loss":
        drafting(settings)


def equal_flops(seeds: int) -> None:
    """Writes the losses of stage 7, and of stage 7a after equally many steps and equally many FLOPs."""
    steps, flops = presets.PRESETS["laptop"]["steps"], {}
    for name in ("stage7a_mla", "stage7_mla_mtp"):
        stage = stages.load(name)
        sizes = presets.PRESETS["laptop"]["model"]
        flops[name] = cost.flops_per_token(stage.GPT(stage.GPTConfig(vocab_size=65, **sizes)))
    longer = round(steps * flops["stage7_mla_mtp"] / flops["stage7a_mla"])
    ways = {
        "with MTP": ("stage7_mla_mtp", "stage7", ["--stage", "7"], steps),
        "without, equal steps": ("stage7a_mla", "stage7a", ["--stage", "7a"], steps),
        "without, equal FLOPs": (
            "stage7a_mla",
            "drafts-7a-longer",
            ["--stage", "7a", "--steps", str(longer)],
            longer,
        ),
    }
    measured, curves = {}, {}
    for name, (stage, run, flags, n_steps) in ways.items():
        histories = [
            ideas.trained(f"{run}-seed{seed}", [*flags, "--seed", str(seed)])[1] for seed in range(seeds)
        ]
        measured[name] = {
            "steps": n_steps,
            "flops": histories[0][-1]["tokens"] * flops[stage],
            "val_loss": spread.summary([metrics[-1]["val_loss"] for metrics in histories]),
            "seconds": statistics.median(metrics[-1]["seconds"] for metrics in histories),
        }
        curves[name] = mean_curve(histories, flops[stage])
    with_mtp = measured["with MTP"]["val_loss"]["values"]
    for one in measured.values():
        one["differs_from_mtp"] = spread.means_differ(one["val_loss"]["values"], with_mtp)
    heads = ["", "steps", "training FLOPs (10¹²)", "validation loss"]
    rows = [
        [name, f"{one['steps']:,}", f"{one['flops'] / 1e12:.2f}", report.with_std(one["val_loss"], 3)]
        for name, one in measured.items()
    ]
    alt = "Validation loss against training FLOPs, with multi-token prediction and without it."
    ideas.write("drafts-loss", {"ways": measured}, heads, rows, partial(draw_loss, curves), alt)


def mean_curve(histories: list[list[dict]], flops_per_token: float) -> tuple[list[float], list[float]]:
    """Training FLOPs and the mean validation loss over the runs, at each evaluation."""
    evaluated = [[record for record in metrics if "val_loss" in record] for metrics in histories]
    flops = [record["tokens"] * flops_per_token for record in evaluated[0]]
    return flops, np.mean([[record["val_loss"] for record in one] for one in evaluated], axis=0).tolist()


def drafting(settings: Settings) -> None:
    """Writes how many drafts are accepted, and the speeds, by model and temperature."""
    measured = {}
    for name in settings.models:
        of_seeds = [measure_run(name, seed, settings) for seed in range(settings.seeds)]
        measured[name] = {
            "text": MODELS[name][0],
            "parameters": of_seeds[0]["parameters"],
            "val_loss": spread.summary([one["val_loss"] for one in of_seeds]),
            "by_temperature": {
                temperature: over_seeds([one["by_temperature"][temperature] for one in of_seeds])
                for temperature in TEMPERATURES
            },
        }
    heads = ["", "parameters", "temperature", "drafts accepted", "one draft, seed by seed", "speed-up"]
    heads += ["compiled", "tokens/s without drafts", "compiled"]
    rows = []
    for name, one in measured.items():
        for temperature, speeds in one["by_temperature"].items():
            by_number = speeds["drafts"].values()
            rows.append(
                [
                    name,
                    f"{one['parameters'] / 1e6:.2f} M",
                    f"{temperature:g}",
                    " / ".join(f"{row['accepted']['mean']:.0%}" for row in by_number),
                    ", ".join(f"{share:.0%}" for share in speeds["drafts"][1]["accepted"]["values"]),
                    " / ".join(f"{row['speed_up']['mean']:.2f}×" for row in by_number),
                    " / ".join(f"{row['compiled_speed_up']['mean']:.2f}×" for row in by_number),
                    f"{speeds['tokens_per_second']['mean']:,.0f}",
                    f"{speeds['compiled_tokens_per_second']['mean']:,.0f}",
                ]
            )
    alt = "Left: the share of drafts that is accepted, by the number of drafts at a time, for each model. "
    alt += "Right: the speed-up by drafts, with and without compiling."
    ideas.write(
        "drafts",
        {"models": measured, "rounds": settings.rounds},
        heads,
        rows,
        partial(draw_drafts, measured),
        alt,
    )


def measure_run(name: str, seed: int, settings: Settings) -> dict:
    """What decoding() returns for one model trained with this seed, by temperature, and the model's loss."""
    text, run, flags = MODELS[name]
    folder, metrics = ideas.trained(f"{run}-seed{seed}", ["--stage", "7", *flags, "--seed", str(seed)])
    model, _ = runs.load(folder, "best", CPU)
    validation = data.load(text).val
    prompts = [
        validation[i * (len(validation) // PROMPTS) :][:PROMPT_TOKENS].tolist() for i in range(PROMPTS)
    ]
    decoders = {"eager": model, "compiled": CompiledPasses(model, max(N_DRAFTS) + 1)}
    by_temperature = {
        temperature: decoding(decoders, prompts, temperature, settings) for temperature in TEMPERATURES
    }
    speed_up = by_temperature[TEMPERATURES[-1]]["drafts"][1]["speed_up"]
    print(f"{name}, seed {seed}: one draft decodes {speed_up:.2f} times as fast", flush=True)
    return {
        "parameters": cost.parameters(model),
        "val_loss": metrics[-1]["val_loss"],
        "by_temperature": by_temperature,
    }


def over_seeds(made: list[dict]) -> dict:
    """The same values as decoding() returns, each a summary over runs that differ in their seed."""
    if isinstance(made[0], dict):
        return {key: over_seeds([one[key] for one in made]) for key in made[0]}
    return spread.summary(made)


def decoding(decoders: dict, prompts: list[list[int]], temperature: float, settings: Settings) -> dict:
    """Tokens per second with and without drafts, eager and compiled, and the share of accepted drafts."""
    counts = {n_drafts: generation.DraftCounts() for n_drafts in N_DRAFTS}
    calls = {}
    for way, decoder in decoders.items():
        calls[way, 0] = partial(decode, decoder, prompts, temperature, settings.tokens, 0, None)
        for n_drafts in N_DRAFTS:
            calls[way, n_drafts] = partial(
                decode, decoder, prompts, temperature, settings.tokens, n_drafts, counts[n_drafts]
            )
    seconds = timing.in_turn(calls, settings.rounds, CPU, warm_ups=1)
    tokens = settings.tokens * len(prompts)
    made = {"tokens_per_second": tokens / statistics.median(seconds["eager", 0])}
    made["compiled_tokens_per_second"] = tokens / statistics.median(seconds["compiled", 0])
    made["drafts"] = {
        n_drafts: {
            "accepted": counts[n_drafts].accepted / counts[n_drafts].drafted,
            "speed_up": timing.median_ratio(seconds["eager", 0], seconds["eager", n_drafts]),
            "compiled_speed_up": timing.median_ratio(seconds["compiled", 0], seconds["compiled", n_drafts]),
        }
        for n_drafts in N_DRAFTS
    }
    return made


def decode(
    model,
    prompts: list[list[int]],
    temperature: float,
    tokens: int,
    n_drafts: int,
    counts: generation.DraftCounts | None,
) -> list[list[int]]:
    """The tokens after each prompt, with the same random numbers each time. n_drafts 0: without drafts."""
    options = {"temperature": temperature, "generator": torch.Generator().manual_seed(0)}
    function = generation.generate
    if n_drafts:
        function = generation.generate_with_drafts
        options |= {"n_drafts": n_drafts, "counts": counts}
    vocab_size = model.config.vocab_size
    return [list(function(model, prompt, tokens, vocab_size, **options)) for prompt in prompts]


class SeveralTokens:
    """What decoding needs of stage 7's KVCache, with shapes that do not depend on its length.

    It is lab/sampling/compiled.py's StaticCache for several new tokens at a time. It shares the tensors of a
    plain cache of one sequence. The position of the first new token is a tensor, so it is not a constant in
    compiled code.
    """

    def __init__(self, cache):
        # One tensor per layer, because compiled code copies a whole tensor to store a part of it.
        self.layers = list(zip(cache.keys.unbind(), cache.latents.unbind(), strict=True))
        self.slots = torch.arange(cache.max_length)
        self.position = torch.zeros(1, dtype=torch.int64)

    def positions(self, n_new):
        """The positions of the new tokens: (n_new,) int64."""
        return self.position + self.slots[:n_new]

    def mask(self, n_new):
        """Additive mask of the new tokens over all slots: (n_new, slots)."""
        return torch.where(self.slots <= self.positions(n_new).unsqueeze(1), 0.0, -torch.inf)

    def update(self, layer_idx, *new):
        """Stores the new tokens' tensors (B, heads, n_new, width); returns all (B, heads, slots, width)."""
        for stored, value in zip(self.layers[layer_idx], new, strict=True):
            stored.index_copy_(2, self.positions(value.size(2)), value.type_as(stored))
        return self.layers[layer_idx]

    def advance(self, n_new):
        """Does nothing: CompiledPasses sets the position."""


class CompiledPasses:
    """Stands in for a model of stage 7 when decoding: its passes over few tokens are compiled.

    torch.compile makes a graph for each number of tokens, 1 to `most`, when it first occurs. A pass over
    more tokens, which reads a prompt, is not compiled. The caches are made once, because compiled code holds
    their addresses.
    """

    def __init__(self, model: torch.nn.Module, most: int):
        torch._dynamo.reset()  # the graphs of the model before count towards a limit
        torch._dynamo.config.recompile_limit = 64  # its default of 8 leaves some numbers of tokens uncompiled
        self.model, self.config, self.most = model, model.config, most
        length = model.config.block_size + most  # a pass over drafts may end beyond the context
        with torch.inference_mode():  # as in generation: code is compiled for one autograd mode
            self.caches = {drafting: model.new_cache(1, length, drafting) for drafting in (False, True)}
            static, static_drafts = (SeveralTokens(cache) for cache in self.caches.values())

        @torch.compile(dynamic=False, options=device.step_options(CPU))
        def forward(idx):
            return model(idx, cache=static, return_hidden=True)

        @torch.compile(dynamic=False, options=device.step_options(CPU))
        def draft(hidden, idx):
            return model.draft(hidden, idx, static_drafts)

        self.static, self.static_drafts = static, static_drafts
        self.compiled_forward, self.compiled_draft = forward, draft

    def parameters(self):
        return self.model.parameters()

    def new_cache(self, batch_size, max_length, drafting=False):
        """The cache that the compiled code uses, emptied."""
        self.caches[drafting].length = 0
        return self.caches[drafting]

    def __call__(self, idx, cache, return_hidden=False):
        if idx.size(1) > self.most:
            return self.model(idx, cache=cache, return_hidden=return_hidden)
        self.static.position.fill_(cache.length)
        cache.length += idx.size(1)
        return self.compiled_forward(idx)

    def draft(self, hidden, idx, cache):
        if idx.size(1) > self.most:
            return self.model.draft(hidden, idx, cache)
        self.static_drafts.position.fill_(cache.length)
        cache.length += idx.size(1)
        return self.compiled_draft(hidden.contiguous(), idx)


def draw_loss(curves: dict[str, tuple[list[float], list[float]]]):
    """Validation loss against training FLOPs."""
    figure, axes = run_plots.new_figure(7, 4.3)
    for (name, (flops, losses)), color in zip(curves.items(), run_plots.RUN_COLORS, strict=False):
        axes.plot([f / 1e12 for f in flops], losses, color=color, marker="o", markersize=4, label=name)
    axes.set_xlabel("training FLOPs (10¹²)")
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_drafts(measured: dict):
    """Acceptance and speed-up at the highest temperature, by the number of drafts; bars from seed to seed."""
    figure, (accepted, speed_up) = run_plots.new_figure(10, 4.2, columns=2)

    def line(panel, rows: dict, quantity: str, scale: float = 1, **look):
        means = [scale * row[quantity]["mean"] for row in rows.values()]
        lows = [scale * min(row[quantity]["values"]) for row in rows.values()]
        highs = [scale * max(row[quantity]["values"]) for row in rows.values()]
        bars = [np.subtract(means, lows), np.subtract(highs, means)]
        panel.errorbar(rows.keys(), means, yerr=bars, capsize=2, marker="o", **look)

    for (name, one), color in zip(measured.items(), run_plots.RUN_COLORS, strict=False):
        rows = one["by_temperature"][TEMPERATURES[-1]]["drafts"]
        line(accepted, rows, "accepted", scale=100, color=color, label=name)
        line(speed_up, rows, "speed_up", color=color)
        line(speed_up, rows, "compiled_speed_up", color=color, linestyle="--")
    for label, dash in (("not compiled", "-"), ("compiled", "--")):
        speed_up.plot([], [], color="#888888", linestyle=dash, label=label)
    speed_up.axhline(1, color="#888888", linewidth=1, linestyle=":")
    for panel in (accepted, speed_up):
        panel.set_xticks(N_DRAFTS)
        panel.set_xlabel("drafts at a time")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=9)
    accepted.set_ylim(0, 100)
    accepted.set_ylabel("drafts accepted (%)")
    speed_up.set_ylabel("speed-up by drafts")
    return figure


if __name__ == "__main__":
    cli.run(main)
