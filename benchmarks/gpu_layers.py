"""Sections of gpu_check.py: attention, the mixture of experts, and decoding."""

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu_run import (
    DECODING_STAGES,
    Memory,
    Run,
    check,
    differences,
    in_turn,
    milliseconds,
    seconds_of,
)
from lab import device, stages
from lab.attention import sdpa
from lab.sampling import generation
from lab.sampling.compiled import CompiledStep

# 3: attention


def attention(run: Run) -> None:
    """Times each implementation of attention, forward and backward. Each context length is a part."""
    sizes = run.sizes.attention
    for context in run.parts(str(context) for context in sizes["contexts"]):
        with run.attempt(context):
            attention_at(run, int(context), sizes, context)


def attention_at(run: Run, context: int, sizes: dict, part: str) -> None:
    batch = max(1, sizes["batch_tokens"] // context)
    shape = {"batch_size": batch, **{key: sizes[key] for key in ("n_head", "n_kv_head", "head_dim")}}
    torch.manual_seed(0)
    q, d_out = torch.randn(
        2, batch, sizes["n_head"], context, sizes["head_dim"], device=run.device, dtype=run.dtype
    )
    k, v = torch.randn(
        2, batch, sizes["n_kv_head"], context, sizes["head_dim"], device=run.device, dtype=run.dtype
    )
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    exact = attention_reference(*inputs, d_out)
    figures, ways = {}, {}
    for name, way in attention_ways(run, sizes, context).items():
        if isinstance(way, str):
            figures[name] = {"skipped": way}
            continue
        if run.broke(name):
            figures[name] = {"skipped": "it crashed at another context length"}
            continue
        with run.attempt(f"{part} {name}"):
            torch.autograd.grad(way(*inputs), inputs, d_out)  # lets Triton autotune
            with Memory(run.device) as memory:
                out = way(*inputs)
                gradients = torch.autograd.grad(out, inputs, d_out)
            group = sizes["n_head"] // sizes["n_kv_head"]
            dq, dk, dv = gradients
            found = {"out": out[0, :group], "dq": dq[0, :group], "dk": dk[0, 0], "dv": dv[0, 0]}
            found = differences({key: tensor.detach() for key, tensor in found.items()}, exact)
            figures[name] = {"peak_memory": memory.bytes, "differences": found}
            del out, gradients, dq, dk, dv
            ways[name] = way
            run.record(part, **shape, **figures)
            check(found, run.dtype)
    flops = 2 * batch * sizes["n_head"] * context**2 * sizes["head_dim"]  # forward, halved by the causal mask
    seconds = {name: ([], []) for name in ways}
    for number in range(sizes["repeats"] + 2):
        for name, way in ways.items():
            out = []
            timed = partial(seconds_of, times=1, target_device=run.device, queued=True)
            forward = timed(lambda way=way, out=out: out.append(way(*inputs)))
            backward = timed(lambda out=out: torch.autograd.grad(out[0], inputs, d_out))
            if number >= 2:
                seconds[name][0].extend(forward)
                seconds[name][1].extend(backward)
        for name, (forward, backward) in seconds.items():
            if forward:
                both = statistics.median(forward) + statistics.median(backward)
                figures[name] |= {"forward": milliseconds(forward), "backward": milliseconds(backward)}
                figures[name] |= {"flops_per_second": 3.5 * flops / both}
        if number >= 2:
            run.record(part, **shape, **figures)


def attention_ways(run: Run, sizes: dict, context: int) -> dict[str, Callable | str]:
    """By name: a function of q, k and v, or the reason why it is not available."""
    stage = stages.load("stage5_flash")

    def in_training(function):
        def attend(q, k, v):
            with device.autocast(run.device, run.dtype):  # as in training, where the mask is in float32
                return function(q, k, v, None, 0.0)

        return attend

    batch = max(1, sizes["batch_tokens"] // context)
    needed = 24 * batch * sizes["n_head"] * context**2  # bytes: scores, attention weights and their gradients
    free = torch.cuda.mem_get_info()[0] if run.device.type == "cuda" else 2**30
    ways = {"explicit": in_training(stage.explicit_attention), "sdpa": in_training(sdpa)}
    if needed > 0.8 * free:
        ways["explicit"] = f"it may need {needed / 2**30:.0f} GiB, but only {free / 2**30:.0f} GiB are free"
    try:
        from stage5_flash.kernel import INTERPRETED, triton_attention

        on_cuda = run.device.type == "cuda"
        ways["triton"] = (
            triton_attention if on_cuda or INTERPRETED else "on a CPU it needs TRITON_INTERPRET=1"
        )
    except ImportError as error:
        ways["triton"] = str(error)
    if stage.flash_attn_func is None:
        ways["flash_attn"] = "flash_attn is not installed"
    elif run.device.type != "cuda" or run.dtype == torch.float32:
        ways["flash_attn"] = "it needs CUDA and a 16-bit dtype"
    else:
        ways["flash_attn"] = in_training(stage.attention)  # which chooses it
    return ways


def attention_reference(q, k, v, d_out) -> dict[str, torch.Tensor]:
    """Attention and its gradients in float64, for the first key/value head of the first sequence."""
    group, context = q.size(1) // k.size(1), q.size(2)
    later = torch.ones(context, context, dtype=torch.bool, device=q.device).triu(1)
    k, v = (x[0, 0].detach().double().requires_grad_() for x in (k, v))
    exact = {"out": [], "dq": [], "dk": 0.0, "dv": 0.0}
    for head in range(group):  # one at a time, because the scores for 16,384 tokens take 2 GiB
        one = q[0, head].detach().double().requires_grad_()
        out = (one @ k.mT * q.size(-1) ** -0.5).masked_fill(later, -torch.inf).softmax(-1) @ v
        dq, dk, dv = torch.autograd.grad(out, (one, k, v), d_out[0, head].double())
        exact["out"].append(out.detach())
        exact["dq"].append(dq)
        exact["dk"] += dk
        exact["dv"] += dv
    return exact | {"out": torch.stack(exact["out"]), "dq": torch.stack(exact["dq"])}


# 4: the mixture of experts


def mixture(run: Run) -> None:
    """Times stage 6's experts, forward and backward, with F.grouped_mm and with two alternatives."""
    sizes = run.sizes.mixture
    cases = {
        f"{n} experts, {k} a token, width {w}": (n, k, w)
        for w in sizes["widths"]
        for n, k in sizes["experts"]
    }
    for part in run.parts(cases):
        with run.attempt(part):
            mixture_of(run, part, *cases[part], sizes)


def mixture_of(run: Run, part: str, n_experts: int, per_token: int, n_embd: int, sizes: dict) -> None:
    from benchmarks.moe import loop_over_experts

    stage = stages.load("stage6_moe")
    fields = {"n_embd": n_embd, "n_head": 2, "n_routed_experts": n_experts, "num_experts_per_tok": per_token}
    torch.manual_seed(0)
    moe = stage.MoE(stage.GPTConfig(n_shared_experts=0, **fields)).eval()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.02 if parameter.dim() == 3 else 1.0)
    moe = moe.to(run.device, run.dtype)
    x, gradient = torch.randn(2, 1, sizes["tokens"], n_embd, device=run.device, dtype=run.dtype)
    x.requires_grad_()
    leaves = [x, *moe.experts.parameters()]
    exact_moe = copy.deepcopy(moe).float()
    exact_x = x.detach().float().requires_grad_()
    torch.set_float32_matmul_precision("highest")
    exact = with_gradients(
        loop_over_experts(exact_moe), exact_x, [exact_x, *exact_moe.experts.parameters()], gradient
    )
    width = moe.experts.down_proj.size(2)
    ways = {
        "grouped_mm": moe,
        "loop": loop_over_experts(moe),
        "every expert for every token": batched(stage, moe),
    }
    figures = {
        "expert_width": width,
        "grouped_mm_is_used": stage.can_use_grouped_mm(x, moe.experts.down_proj.mT),
    }
    steps = {}
    for name, way in ways.items():
        if run.broke(name):
            continue
        with run.attempt(f"{part}: {name}"):
            with Memory(run.device) as memory:
                found = with_gradients(way, x, leaves, gradient)
            found = differences(found, exact)
            figures[name] = {"peak_memory": memory.bytes, "differences": found}
            steps[name] = partial(lambda way: torch.autograd.grad(way(x), leaves, gradient), way)
            run.record(part, **figures)
            check(found, run.dtype)
    in_turn(steps, 2, run.device)
    seconds = in_turn(steps, sizes["repeats"], run.device, queued=True)
    for name, times in seconds.items():
        figures[name] |= milliseconds(times)
        figures[name]["tokens_per_second"] = sizes["tokens"] / statistics.median(times)
    run.record(part, **figures)


def with_gradients(way, x, leaves, gradient) -> dict[str, torch.Tensor]:
    """The output for x, and the gradients with respect to x and the experts' weights."""
    out = way(x)
    gradients = torch.autograd.grad(out, leaves, gradient.to(out.dtype))
    return dict(zip(("out", "dx", "d_gate_up", "d_down"), (out.detach(), *gradients), strict=True))


def batched(stage, moe):
    """Stage 6's fallback, which it uses where grouped_mm is not available."""

    def forward(x):
        real = stage.can_use_grouped_mm
        stage.can_use_grouped_mm = lambda x, weight: False
        try:
            return moe(x)
        finally:
            stage.can_use_grouped_mm = real

    return forward


# 5: decoding


class Sequences(torch.nn.Module):
    """Makes a model for one sequence decode a batch: it adds a different offset to the token in each row.

    With it, lab.sampling.compiled.CompiledStep, which is written for one sequence, can measure a batch.
    """

    def __init__(self, model: torch.nn.Module, batch_size: int):
        super().__init__()
        self.model, self.config = model, model.config
        self.register_buffer("offsets", torch.arange(batch_size).unsqueeze(1), persistent=False)

    def new_cache(self, batch_size: int, *lengths):
        return self.model.new_cache(len(self.offsets), *lengths)

    def forward(self, idx, cache):
        return self.model((idx + self.offsets) % self.config.vocab_size, cache=cache)


def decoder(run: Run, name: str, batch_size: int) -> torch.nn.Module:
    """An untrained model of a stage, as in sample.py, that decodes batch_size sequences."""
    torch.manual_seed(0)
    stage = stages.load(name)
    model = stage.GPT(stage.GPTConfig(**run.sizes.preset["model"] | {"vocab_size": 65}))
    return Sequences(model, batch_size).to(run.device).eval()


@torch.inference_mode()
def decoding_seconds(run: Run, step: Callable, cache, tokens: int) -> list[float]:
    """Seconds per token of greedy decoding from the middle of the context on, after a warm-up."""
    context, idx = run.sizes.preset["model"]["block_size"], torch.zeros(1, 1, dtype=torch.int64)
    state = {"idx": idx.to(run.device)}
    cache.length = context // 2

    def one():
        if cache.length == context:
            cache.length = context // 2
        state["idx"] = step(state["idx"])[:1, -1:].argmax(-1)

    seconds_of(one, max(2, tokens // 10), run.device)
    return seconds_of(one, tokens, run.device)


def decoding(run: Run) -> None:
    """Measures decoding, eager and with CUDA graphs (as in sample.py --compile), and MLA in both forms."""
    device.prepare(run.device)
    sizes = run.sizes.mla
    for part in run.parts(f"MLA, batch {batch}" for batch in sizes["batch_sizes"]):
        with run.attempt(part):
            mla(run, part, sizes["context"], int(part.split()[-1]))
    cases = {
        f"{name}, batch {batch}": (name, batch) for batch in run.sizes.batch_sizes for name in DECODING_STAGES
    }
    for kind in ("eager", "graph"):
        for part in cases:
            if f"{part}, {kind}" not in run.done:
                with run.attempt(f"{part}, {kind}"):
                    decode(run, part, *cases[part], kind)


def decode(run: Run, part: str, name: str, batch_size: int, kind: str) -> None:
    """Records a stage's decoding speed: eager alone, or eager and compiled, interleaved."""
    model = decoder(run, name, batch_size)
    with torch.inference_mode():
        cache = model.new_cache(1, model.config.block_size)

    def eager_step(idx):
        return model(idx, cache=cache)[0]

    def rate(seconds):
        return batch_size / statistics.median(seconds)

    figures = {"cache_bytes": cache.nbytes}
    tokens = run.sizes.tokens
    if kind == "eager":
        seconds = decoding_seconds(run, eager_step, cache, tokens)
        run.record(part, **figures, eager={"tokens_per_second": rate(seconds)} | milliseconds(seconds))
        if batch_size == 1:
            run.record(part, sampling={"tokens_per_second": sampled(run, model.model, None)})
        return
    torch._dynamo.reset()
    step = CompiledStep(model)
    seconds = {"eager": [], "graph": []}
    for _ in range(3):
        seconds["graph"] += decoding_seconds(run, step, step.cache, tokens)
        seconds["eager"] += decoding_seconds(run, eager_step, cache, max(2, tokens // 3))
    graph = {"tokens_per_second": rate(seconds["graph"]), "compile_seconds": step.seconds}
    speed_up = statistics.median(seconds["eager"]) / statistics.median(seconds["graph"])
    run.record(part, graph=graph | milliseconds(seconds["graph"]) | {"speed_up": speed_up})
    if batch_size == 1:
        rates = sampled(run, model, step)
        run.record(part, sampling_with_graph={"tokens_per_second": rates})


def sampled(run: Run, model: torch.nn.Module, step: CompiledStep | None) -> float:
    """Tokens per second of sampling one text as sample.py does, including the sampling on the CPU."""

    def tokens(number):
        options = {"top_k": 200, "generator": torch.Generator().manual_seed(0), "step": step}
        return sum(1 for _ in generation.generate(model, [0], number, 65, **options))

    tokens(3)
    started = time.perf_counter()
    return tokens(2 * run.sizes.tokens) / (time.perf_counter() - started)


def mla(run: Run, part: str, context: int, batch_size: int) -> None:
    """Measures stage 7a's decoding after a long context, with absorbed and with expanded keys and values."""
    stage = stages.load("stage7a_mla")
    sizes = run.sizes.preset["model"] | {"vocab_size": 65, "block_size": context + 1}
    model = stage.GPT(stage.GPTConfig(**sizes)).to(run.device).eval()
    form = {"absorbed": True}
    for module in model.modules():
        if isinstance(module, stage.Attention):
            module.absorbing_is_cheaper = lambda T, S: form["absorbed"]
    idx = torch.zeros(batch_size, 1, dtype=torch.int64, device=run.device)
    with torch.inference_mode():
        cache = model.new_cache(batch_size, context + 1)
        cache.keys.normal_()
        cache.latents.normal_()

        def step(absorbed):
            form["absorbed"], cache.length = absorbed, context
            return model(idx, cache=cache)[0]

        calls = {"absorbed": partial(step, True), "expanded": partial(step, False)}
        found = differences({"logits": calls["absorbed"]()}, {"logits": calls["expanded"]()})
        in_turn(calls, 2, run.device)
        seconds = in_turn(calls, max(2, run.sizes.tokens // 3), run.device)
        figures = {
            name: milliseconds(times) | {"tokens_per_second": batch_size / statistics.median(times)}
            for name, times in seconds.items()
        }
        for name, call in calls.items():
            with Memory(run.device) as memory:
                call()
            figures[name]["peak_memory"] = memory.bytes
    run.record(part, context=context, **figures, differences=found, cache_bytes=cache.nbytes)
    check(found, torch.bfloat16)  # the tolerance for bfloat16, because TF32 is on, as in sample.py
