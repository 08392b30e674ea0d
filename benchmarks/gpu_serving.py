"""The serving section of gpu_check.py: how fast deploy/serving answers requests, with and without graphs."""

import random
import time

import torch

from benchmarks.gpu_run import DECODING_STAGES, Run
from deploy.quantization import linear, rtn
from deploy.serving.engine import Engine
from deploy.serving.graphs import Graphs
from deploy.serving.sampling import SamplingParams
from lab import device, stages

SMOLLM2 = {  # the shape of SmolLM2-135M; the weights are random, because there is no network
    "n_layer": 30,
    "n_head": 9,
    "n_kv_head": 3,
    "n_embd": 576,
    "intermediate_size": 1536,
    "block_size": 2048,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


class Numbers:
    """Stands in for a tokenizer, since the texts do not matter here."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def stream(self, prompt):
        return lambda token: ""


def serving(run: Run) -> None:
    """Measures the stages in the preset's size, and a model of SmolLM2's shape: one request, and many."""
    device.prepare(run.device)
    baby = run.sizes.preset["model"] | {"vocab_size": 65}
    models = {name: (name, baby) for name in DECODING_STAGES}
    shape = SMOLLM2 if not run.smoke else SMOLLM2 | {"n_layer": 1, "vocab_size": 65, "block_size": 64}
    models["SmolLM2's shape"] = models["SmolLM2's shape, 4 bits"] = ("stage5_flash", shape)
    for name, (stage, sizes) in models.items():
        for n_requests in run.sizes.batch_sizes:
            part = f"{name}, {n_requests} at once"
            if part not in run.done:
                with run.attempt(part):
                    measure(run, part, stage, sizes, n_requests)


def measure(run: Run, part: str, stage_name: str, sizes: dict, n_requests: int) -> None:
    """Records output tokens per second, eager and with graphs, and how many texts differ."""
    torch.manual_seed(0)
    stage = stages.load(stage_name)
    fields = stage.GPTConfig.__dataclass_fields__
    config = stage.GPTConfig(**{key: value for key, value in sizes.items() if key in fields})
    model = stage.GPT(config).to(run.device, run.dtype).eval()
    if "4 bits" in part:
        quantize(model)
    draw = random.Random(0)
    quarter = config.block_size // 4
    prompts = [draw.choices(range(config.vocab_size), k=draw.randint(1, quarter)) for _ in range(n_requests)]
    params = SamplingParams(max_tokens=min(quarter, run.sizes.tokens), temperature=0, ignore_eos=True)
    texts, figures = {}, {}
    for way in ("eager", "graph"):
        tokenizer = Numbers(config.vocab_size)
        engine = Engine(model, tokenizer, max_batch=n_requests, prefix_cache=False, token_budget=4096)
        engine.graphs = Graphs(model, engine.pool, repeat if run.smoke else None) if way == "graph" else None
        engine.generate(prompts, params)  # records the graphs
        started = time.perf_counter()
        texts[way] = [answer.token_ids for (answer,) in engine.generate(prompts, params)]
        seconds = time.perf_counter() - started
        figures[way] = {"tokens_per_second": sum(map(len, texts[way])) / seconds, "seconds": seconds}
    figures["graph"]["speed_up"] = figures["eager"]["seconds"] / figures["graph"]["seconds"]
    pairs = zip(texts["eager"], texts["graph"], strict=True)
    run.record(part, **figures, texts_that_differ=sum(a != b for a, b in pairs))


def quantize(model: torch.nn.Module) -> None:
    """Rounds the weights of all linear layers but the head to 4 bits in groups of 64."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    codes = {name: rtn.rtn(layer.weight, 4, 64) for name, layer in layers if name != "lm_head"}
    linear.replace(model, codes)


def repeat(compute):
    """In place of a recorded graph where there is no GPU: computes the step anew, into the same tensor."""
    result = compute()
    return result, lambda: result.copy_(compute())
