"""Where latent attention pays: beside GQA and MQA at equal cache bytes, and at DeepSeek-V3's own widths.

python -m benchmarks.ideas.latents writes results/ideas/latents.json (losses and decoding speed on the laptop
preset) and latents-deepseek.json (one attention layer of DeepSeek-V3, with random weights).
"""

import statistics
import sys
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import ideas
from lab import cli, device, stages
from lab.comparison import report, spread, timing
from lab.training import cost, presets, run_plots

CPU = torch.device("cpu")

# By name: the stage, its run (shared with benchmarks/ideas/drafts.py) and its sizes. As in DeepSeek-V3, the
# rotated part of a head is half as wide as the other one; stage 7a makes both narrower, to equal stage 6's.
WIDE = {"qk_rope_head_dim": 16, "qk_nope_head_dim": 32}
VARIANTS = {
    "GQA, 2 heads": ("6", "latents-gqa", {"n_kv_head": 2}),
    "MLA, latent 112": ("7a", "latents-mla-128", {"kv_lora_rank": 112} | WIDE),
    "MQA": ("6", "latents-mqa", {"n_kv_head": 1}),
    "MLA, latent 48": ("7a", "latents-mla-64", {"kv_lora_rank": 48} | WIDE),
    "stage 7a": ("7a", "stage7a", {}),
}
PAIRS = {"MLA, latent 112": "GQA, 2 heads", "MLA, latent 48": "MQA", "stage 7a": "MQA"}  # of equal bytes
EXPANDED = "stage 7a, expanded"
COLORS = dict(zip([*VARIANTS, EXPANDED], run_plots.RUN_COLORS, strict=False))

# https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/config.json
DEEPSEEK_V3 = {
    "n_embd": 7168,
    "n_head": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
GQA_8 = {"n_embd": 7168, "n_head": 128, "n_kv_head": 8, "head_dim": 128}
FORMS = ("MLA, absorbed", "MLA, expanded", "GQA, 8 heads")
TOKENS = 20  # decoded per measurement


@dataclass
class Settings:
    """Measures latent attention at equal cache bytes and at DeepSeek-V3's widths.

    On one core, training takes about 50 minutes, and measuring 3.
    """

    seeds: int = 3
    """Number of runs of each variant."""
    rounds: int = 9
    """Number of interleaved measurements of each speed; medians are reported."""
    contexts: tuple[int, ...] = (256, 1024, 2048, 4096, 8192)
    """Numbers of tokens in the cache."""
    only_deepseek: bool = False
    """Only measure DeepSeek-V3's layer, which needs 4 GiB of memory and no training."""


def main():
    settings = cli.parse_benchmark_flags(Settings, sys.argv[1:])
    device.prepare(CPU)
    deepseek(settings)
    if not settings.only_deepseek:
        equal_bytes(settings)


def equal_bytes(settings: Settings) -> None:
    """Writes the losses and decoding speeds of the variants."""
    losses = {name: final_losses(*variant, settings.seeds) for name, variant in VARIANTS.items()}
    speeds = decoding(settings.contexts, settings.rounds)
    measured = {}
    for name, (stage, _, sizes) in VARIANTS.items():
        model = make_model(stage, sizes, presets.PRESETS["laptop"]["model"]["block_size"])
        measured[name] = {
            "cache_bytes_per_token": model.new_cache(1, 1).nbytes,
            "active_parameters": cost.active_parameters(model),
            "flops_per_token": cost.flops_per_token(model),
            "val_loss": spread.summary(losses[name]),
            "tokens_per_second": speeds[name],
        }
    for name, other in PAIRS.items():
        measured[name]["differs_from"] = {other: spread.means_differ(losses[name], losses[other])}
    heads = ["", "cache bytes per token", "active parameters", "FLOPs per token", "validation loss"]
    heads += [f"tokens/s at {context:,}" for context in settings.contexts]
    rows = [
        [
            name,
            f"{one['cache_bytes_per_token']:,}",
            f"{one['active_parameters'] / 1e6:.2f} M",
            f"{one['flops_per_token'] / 1e6:.2f} M",
            report.with_std(one["val_loss"], 3),
            *(f"{speed:,.0f}" for speed in one["tokens_per_second"].values()),
        ]
        for name, one in measured.items()
    ]
    rows.append([EXPANDED, "", "", "", "", *(f"{speed:,.0f}" for speed in speeds[EXPANDED].values())])
    alt = "Left: validation loss against cache bytes per token of GQA, MQA and MLA. Right: their decoding "
    alt += "tokens/s against the context."
    ideas.write(
        "latents",
        {"variants": measured, "expanded": speeds[EXPANDED], "rounds": settings.rounds},
        heads,
        rows,
        partial(draw_equal_bytes, measured, speeds),
        alt,
    )


def final_losses(stage: str, run: str, sizes: dict, seeds: int) -> list[float]:
    """The validation loss at the end of a variant's runs of the laptop preset, by seed."""
    flags = ["--stage", stage]
    for field, value in sizes.items():
        flags += [f"--model.{field.replace('_', '-')}", str(value)]
    histories = [ideas.trained(f"{run}-seed{seed}", [*flags, "--seed", str(seed)]) for seed in range(seeds)]
    return [metrics[-1]["val_loss"] for _, metrics in histories]


def make_model(stage: str, sizes: dict, context: int) -> torch.nn.Module:
    """A newly initialized model of the laptop preset with these sizes, for this context."""
    module = stages.load(stages.find(stage))
    preset = presets.PRESETS["laptop"]["model"] | {"block_size": context}
    return module.GPT(module.GPTConfig(vocab_size=65, **preset | sizes)).eval()


def decoding(contexts: tuple[int, ...], rounds: int) -> dict[str, dict[int, float]]:
    """Tokens per second of decoding, by variant and context; the weights are random."""
    by_name = {name: {} for name in [*VARIANTS, EXPANDED]}
    for context in contexts:
        steppers = {name: stepper(stage, sizes, context) for name, (stage, _, sizes) in VARIANTS.items()}
        stage, _, sizes = VARIANTS["stage 7a"]
        steppers[EXPANDED] = stepper(stage, sizes, context, absorbs=False)
        seconds = timing.in_turn(steppers, rounds, CPU, warm_ups=1)
        for name, times in seconds.items():
            by_name[name][context] = TOKENS / statistics.median(times)
    return by_name


def stepper(stage: str, sizes: dict, context: int, absorbs: bool = True):
    """A function that decodes some tokens, each with a cache of `context` tokens; returns the last logits."""
    model = make_model(stage, sizes, context + 1)
    for layer in model.model.layers:
        force_form(layer.self_attn, absorbs)
    cache = filled(model.new_cache(1, context + 1), context)

    @torch.inference_mode()
    def step():
        for _ in range(TOKENS):
            logits, _ = model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
            cache.length = context
        return logits

    return step


def force_form(attention: torch.nn.Module, absorbs: bool) -> None:
    """Makes latent attention absorb its matrices, or expand its latents, whatever is cheaper."""
    attention.absorbing_is_cheaper = lambda T, S: absorbs


def filled(cache, length: int):
    """The cache with random numbers in the place of `length` tokens; returns it."""
    for value in vars(cache).values():
        if isinstance(value, torch.Tensor):
            value.normal_()
    cache.length = length
    return cache


def deepseek(settings: Settings) -> None:
    """Writes the speed and the cache of one attention layer of DeepSeek-V3."""
    longest = max(settings.contexts)
    forms = layer_steps(longest)
    milliseconds = {name: {} for name in FORMS}
    with torch.inference_mode():
        for context in settings.contexts:
            steps = {name: partial(step, context) for name, (step, _, _) in forms.items()}
            for name, times in timing.in_turn(steps, settings.rounds, CPU, warm_ups=1).items():
                milliseconds[name][context] = 1000 * statistics.median(times)
    measured = {}
    for name, (_, attention, cache) in forms.items():
        measured[name] = {
            "weight_bytes": sum(parameter.nbytes for parameter in attention.parameters()),
            "cache_bytes_per_token": cache.nbytes // cache.max_length,
            "bytes_moved": bytes_moved(name, attention, cache, longest),
            "milliseconds": milliseconds[name],
        }
    # With as many key and value heads as query heads, which are as wide as GQA's. Counted, not measured.
    per_token = measured["GQA, 8 heads"]["cache_bytes_per_token"] // GQA_8["n_kv_head"] * GQA_8["n_head"]
    heads = ["attention of one layer", "weights, MB", "cache bytes per token", f"cache at {longest:,}, MiB"]
    heads += [f"bytes moved at {longest:,}, MB"]
    heads += [f"ms at {context:,}" for context in settings.contexts]
    rows = [
        [
            name,
            f"{one['weight_bytes'] / 1e6:,.0f}",
            f"{one['cache_bytes_per_token']:,}",
            f"{one['cache_bytes_per_token'] * longest / 2**20:,.0f}",
            f"{one['bytes_moved'] / 1e6:,.0f}",
            *(f"{time:,.0f}" for time in one["milliseconds"].values()),
        ]
        for name, one in measured.items()
    ]
    rows.append(["MHA, 128 heads", None, f"{per_token:,}", f"{per_token * longest / 2**20:,.0f}", None])
    rows[-1] += [None] * len(settings.contexts)
    alt = "Left: milliseconds to decode a token through one layer, against the context. Right: the cache of "
    alt += "one layer against the context, for MHA, GQA and MLA."
    ideas.write(
        "latents-deepseek",
        {"forms": measured, "mha_cache_bytes_per_token": per_token, "rounds": settings.rounds},
        heads,
        rows,
        partial(draw_deepseek, measured, per_token),
        alt,
    )


def layer_steps(longest: int) -> dict:
    """By form: a function of the context that decodes one token through the layer, the layer and its cache.

    Both forms of MLA have the same weights. GQA's layer has as many query heads. All are in bfloat16.
    """
    v3, qwen3 = stages.load("deepseek_v3"), stages.load("qwen3")
    config = v3.GPTConfig(vocab_size=1, n_layer=1, block_size=longest + 1, **DEEPSEEK_V3)
    gqa_config = qwen3.GPTConfig(vocab_size=1, n_layer=1, block_size=longest + 1, **GQA_8)
    latent, grouped = random_layer(v3.Attention, config), random_layer(qwen3.Attention, gqa_config)
    latents = filled(v3.KVCache(config, 1, 1, longest + 1, CPU, torch.bfloat16), 0)
    keys = filled(qwen3.KVCache(gqa_config, 1, longest + 1, CPU, torch.bfloat16), 0)
    x = torch.randn(1, 1, config.n_embd, dtype=torch.bfloat16)

    def decode(absorbs, context):
        force_form(latent, absorbs)
        latents.length = context
        rope = v3.rotation(latents.positions(1), config)
        return latent(x, rope, latents.mask(1), latents)

    def decode_grouped(context):
        keys.length = context
        rope = qwen3.rotation(keys.positions(1), gqa_config.head_dim, gqa_config.rope_theta)
        return grouped(x, rope, keys.mask(1), keys)

    steps = [partial(decode, True), partial(decode, False), decode_grouped]
    stored = [(latent, latents), (latent, latents), (grouped, keys)]
    return {name: (step, *both) for name, step, both in zip(FORMS, steps, stored, strict=True)}


def random_layer(kind: type, config) -> torch.nn.Module:
    """A layer of this class in bfloat16, with random weights; never in float32, to save memory."""
    with torch.device("meta"):
        layer = kind(config, 0).bfloat16().eval()
    layer.to_empty(device=CPU)
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.02) if parameter.dim() == 2 else parameter.data.fill_(1)
    return layer


def bytes_moved(form: str, attention: torch.nn.Module, cache, context: int) -> int:
    """The bytes that decoding a token moves at least: weights, cache, and MLA's expanded keys and values.

    The weights and the cache are read once. Expanded keys and values are written and read once.
    """
    read = sum(parameter.nbytes for parameter in attention.parameters())
    read += cache.nbytes // cache.max_length * context
    if form != "MLA, expanded":
        return read
    config, number = attention.config, cache.keys.element_size()
    width = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    return read + 2 * context * config.n_head * width * number


def draw_equal_bytes(measured: dict, speeds: dict):
    """Validation loss against cache bytes, and decoding speed against the context."""
    figure, (loss, speed) = run_plots.new_figure(10, 4.2, columns=2)
    for i, (name, one) in enumerate(measured.items()):
        summary = one["val_loss"]
        loss.errorbar(
            one["cache_bytes_per_token"] * 1.05 ** (i - 2),  # side by side
            summary["mean"],
            summary["std"],
            color=COLORS[name],
            marker=marker(name),
            markersize=7,
            capsize=3,
            linestyle="none",
        )
    for name, by_context in speeds.items():
        style = {"color": COLORS[name], "marker": marker(name), "markersize": 5, "label": name}
        speed.plot(by_context.keys(), by_context.values(), **style)
    sizes = sorted({one["cache_bytes_per_token"] for one in measured.values()})
    loss.set_xscale("log", base=2)
    loss.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.5)
    loss.set_xticks(sizes, [f"{size:,}" for size in sizes])
    loss.set_xlabel("cache bytes per token")
    loss.set_ylabel("validation loss (nats per token)")
    contexts_on(speed, list(next(iter(speeds.values()))))
    speed.set_ylim(bottom=0)
    speed.set_ylabel("decoding tokens/s")
    loss.grid(alpha=0.3)
    figure.legend(*speed.get_legend_handles_labels(), loc="outside lower center", fontsize=9, ncols=6)
    return figure


def draw_deepseek(measured: dict, mha_bytes: int):
    """Milliseconds per token, and the cache of a layer, against the context."""
    figure, (time, size) = run_plots.new_figure(10, 4.2, columns=2)
    for name, color in zip(measured, run_plots.RUN_COLORS, strict=False):
        by_context = measured[name]["milliseconds"]
        time.plot(by_context.keys(), by_context.values(), color=color, marker=marker(name), label=name)
    contexts = list(by_context)
    caches = {"MHA, 128 heads": mha_bytes}
    caches |= {name: measured[name]["cache_bytes_per_token"] for name in ("GQA, 8 heads", "MLA, absorbed")}
    colors = ("#888888", run_plots.RUN_COLORS[2], run_plots.RUN_COLORS[0])
    for (name, per_token), color in zip(caches.items(), colors, strict=True):
        label = name.removesuffix(", absorbed")
        values = [per_token * context / 2**20 for context in contexts]
        size.plot(contexts, values, color=color, marker=marker(name), label=label)
    for panel in (time, size):
        contexts_on(panel, contexts)
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:,g}")
        panel.legend(fontsize=9)
    time.set_ylabel("milliseconds per token")
    size.set_ylabel("cache of one layer (MiB)")
    return figure


def contexts_on(panel, contexts: list[int]) -> None:
    """Gives the panel a horizontal axis of contexts."""
    panel.set_xscale("log", base=2)
    panel.set_xticks(contexts, [f"{context:,}" for context in contexts])
    panel.set_xlabel("context (tokens)")
    panel.grid(alpha=0.3)


def marker(name: str) -> str:
    """Squares for shared keys and values, circles for latents."""
    return "s" if name.startswith(("GQA", "MQA", "MHA")) else "o"


if __name__ == "__main__":
    cli.run(main)
