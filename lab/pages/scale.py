"""The tables of docs/scale.md: what planning.py computes and benchmarks/gpt2_preset.py measured."""

from lab import device, stages
from lab.comparison import markdown
from lab.pages import planning

HOW = {"1": "one GPU", "ddp": "DDP", "fsdp 8": "FSDP, 8", "fsdp 64": "FSDP, 64"}


def tables(results: dict) -> dict[str, str]:
    """The generated parts of the page, by marker."""
    every = [
        ([size, stages.label(stages.find(number))], plan)
        for size, by_stage in results["scale"].items()
        for number, plan in by_stage.items()
    ]
    fifth = stages.label("stage5_flash")  # differs from stage 4 only in the memory of a step
    plans = [(name, plan) for name, plan in every if name[1] != fifth]
    parts = {
        "sizes": sizes(plans),
        "state": state(plans),
        "steps": steps(every),
        "assumptions": assumptions(),
        "speed": speed(plans),
        "command": command("8 B", "5", results["scale"]["8 B"]["5"]),
    }
    if "gpt2_preset" in results:
        parts["measured"] = measured(results["gpt2_preset"])
    return parts


def count(number: float) -> str:
    """A number of parameters or FLOPs, in millions or billions."""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.0f} M"


def gigabytes(nbytes: float) -> str:
    """Bytes in GB (10⁹ bytes), as in data sheets of GPUs."""
    if nbytes >= 1e11:
        return f"{nbytes / 1e9:,.0f}"
    return f"{nbytes / 1e9:.1f}" if nbytes >= 1e8 else f"{nbytes / 1e9:.2f}"


def rounded(number: float) -> str:
    """A number rounded to three significant digits."""
    return f"{float(f'{number:.3g}'):,.0f}"


def duration(seconds: float) -> str:
    """Seconds as days, hours or minutes."""
    for unit, length in (("days", 86400), ("hours", 3600)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    minutes = round(seconds / 60)
    return f"{minutes} minute{'' if minutes == 1 else 's'}"


def sizes(plans: list[tuple[list[str], dict]]) -> str:
    """The table of shapes, parameters, FLOPs and caches."""
    rows = []
    for name, plan in plans:
        config, active = plan["config"], plan["active_parameters"]
        heads = f"{config['n_head']}" + (f" ({config['n_kv_head']})" if "n_kv_head" in config else "")
        experts = ""
        if "n_routed_experts" in config:
            experts = "{num_experts_per_tok} of {n_routed_experts} + {n_shared_experts}".format(**config)
        shape = f"{config['n_layer']} × {config['n_embd']}"
        numbers = [count(n) for n in (plan["parameters"], active, plan["flops_per_token"])]
        rows.append(
            [*name, shape, heads, experts, str(config["block_size"]), *numbers, gigabytes(plan["cache"])]
        )
    heads = ["size", "stage", "blocks × width", "heads (of keys)", "experts", "context"]
    heads += ["parameters", "active", "FLOPs per token", "cache at 32 k, GB"]
    return markdown.table(heads, rows)


def state(plans: list[tuple[list[str], dict]]) -> str:
    """The table of the memory that a GPU needs for any batch."""
    rows = []
    for name, plan in plans:
        parts = [gigabytes(nbytes) for nbytes in plan["state"].values()]
        rows.append([*name, *parts, *(gigabytes(plan["fixed"][how]) for how in HOW)])
    header = [
        "size",
        "stage",
        "all",
        "a part of 8",
        "a part of 64",
        *(f"held: {how}" for how in HOW.values()),
    ]
    return markdown.table(header, rows)


def steps(plans: list[tuple[list[str], dict]]) -> str:
    """The table of the memory per sequence, and of how many sequences fit."""
    rows = []
    for name, plan in plans:
        each = [gigabytes(plan["sequence"][way]) for way in ("kept", "recomputed")]
        fits = [" / ".join(str(n or "–") for n in plan["fits"][how]) for how in HOW]
        rows.append([*name, str(plan["config"]["block_size"]), *each, *fits])
    header = ["size", "stage", "context", "GB per sequence", "with checkpointing"]
    return markdown.table([*header, *(f"fit: {how}" for how in HOW.values())], rows)


def assumptions() -> str:
    """The assumptions behind the speeds and the numbers of sequences, as a paragraph."""
    memory, peak = planning.GPU_BYTES / 1e9, device.PEAK_FLOPS["NVIDIA H100 80GB HBM3"] / 1e12
    return (
        f"We assume an H100 with {memory:.0f} GB, of which {planning.USABLE:.0%} are usable: CUDA, NCCL and "
        "fragmentation take the rest.\nThe speeds below assume "
        f"{planning.UTILISATION:.0%} of {peak:.0f} TFLOP/s, its peak in bfloat16 according to the data sheet."
    )


def speed(plans: list[tuple[list[str], dict]]) -> str:
    """The table of tokens/s, and of how long training takes."""
    rows = []
    for name, plan in plans:
        speeds, tokens = plan["tokens_per_second"], 20 * plan["active_parameters"]
        times = [duration(tokens / speeds[n_gpus]) for n_gpus in speeds]
        rows.append([*name, *map(rounded, speeds.values()), count(tokens), *times])
    header = ["size", "stage", *(f"tokens/s on {n}" for n in planning.GPUS), "20 tokens per parameter"]
    return markdown.table([*header, *(f"on {n}" for n in planning.GPUS)], rows)


def command(size: str, number: str, plan: dict) -> str:
    """The command that trains this size on 64 GPUs, with 20 tokens per active parameter.

    Its micro-batch is the largest power of two that fits.
    """
    sizes = planning.SIZES[size][number]
    micro_batch = 1 << plan["fits"]["fsdp 64"][1].bit_length() - 1
    steps = round(20 * plan["active_parameters"] / (64 * micro_batch * sizes["block_size"]))
    flags = [f"--model.{name.replace('_', '-')} {n}" for name, n in sizes.items()]
    lines = [
        "torchrun --nnodes 8 --nproc-per-node 8 --rdzv-id 1 --rdzv-backend c10d --rdzv-endpoint first:29500",
        f"train.py --stage {number} --data openwebtext --out runs/big",
        "--parallel fsdp --activation-checkpointing",
        " ".join(flags[:4]),
        " ".join(flags[4:]),
        f"--batch-size {64 * micro_batch} --micro-batch-size {micro_batch} --steps {steps}",
    ]
    return "```\n" + " \\\n    ".join(lines) + "\n```"


def measured(by_stage: dict) -> str:
    """The table of the short runs with the gpt2 preset on a CPU."""
    rows = []
    for name, run in by_stage["stages"].items():
        sizes = [count(run["parameters"]), count(run["active_parameters"])]
        numbers = [f"{run['tokens_per_second']:,.0f}", gigabytes(run["peak_memory"])]
        losses = [f"{run['first_loss']:.2f}", f"{run['last_loss']:.2f}"]
        rows.append([stages.label(name), *sizes, *numbers, *losses])
    heads = ["stage", "parameters", "active", "tokens/s", "peak memory, GB"]
    heads += ["loss at step 1", f"loss at step {by_stage['steps']}"]
    return markdown.table(heads, rows)
