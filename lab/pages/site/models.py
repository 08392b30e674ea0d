"""Trained models for the page that computes with them: 8-bit weights in a script, and a recorded example."""

import base64
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import torch

from lab import stages
from lab.errors import UserError
from lab.storage import checkpoint, edits, runs

DATA = "tinyshakespeare"
STAGES = ("stage4_gqa", "stage6_moe", "stage7_mla_mtp")
# Half as wide as the laptop preset, so that three models fit into the page, with a rate that suits this.
SIZES = {"n_layer": 4, "n_head": 4, "n_embd": 64, "block_size": 64}
RATES = {"lr": 3e-3, "min_lr": 3e-4}
EXAMPLE = "stage6_moe"  # of which an example is recorded
PROMPT = "ROMEO:\n"
RECORDED = 48  # characters of the recorded example


def trained(steps: int) -> dict[str, tuple]:
    """The models and their tokenizers, by stage; trained if they are missing or their code has changed."""
    folders = {name: runs.RUNS / "site" / f"{name}-{edits.code_hash(name)}-{steps}" for name in STAGES}
    waiting = [name for name in STAGES if not finished(folders[name], steps)]
    if waiting:
        print(f"training {' and '.join(waiting)} for {steps} steps", flush=True)
    with ThreadPoolExecutor(2) as pool:  # the last stage takes longest, so it starts first
        statuses = pool.map(lambda name: train(name, steps, folders[name]), reversed(waiting))
        if any(list(statuses)):
            raise UserError("a model of the page was not trained (see above): --steps 0 builds without them")
    return {name: loaded(folder) for name, folder in folders.items()}


def finished(folder: Path, steps: int) -> bool:
    return checkpoint.exists(folder) and checkpoint.step(folder) == steps


def loaded(folder: Path) -> tuple:
    """Model and tokenizer of a run. The weights are no view of the file: they can be rounded in place."""
    config = runs.read_config(folder)
    model = stages.load(config["stage"]).GPT(runs.model_config(folder, config))
    runs.load_weights(folder, "best", model)
    return model.eval(), runs.tokenizer(folder)


def train(name: str, steps: int, folder: Path) -> int:
    """Trains one of the models from the beginning, with one thread; returns the exit status."""
    shutil.rmtree(folder, ignore_errors=True)
    flags = RATES | {f"model.{size}": value for size, value in SIZES.items()}
    flags |= {"stage": name, "preset": "laptop", "device": "cpu", "steps": steps, "eval_every": steps}
    flags |= {"data": DATA, "out": folder}
    written = [text for key, value in flags.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "train.py", *written]
    return subprocess.run(command, cwd=stages.ROOT, stdout=subprocess.DEVNULL, env=alone).returncode


def in_8_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes of a tensor (…, columns), and the scale of each row: weight ≈ codes · scales."""
    scales = weight.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return (weight / scales).round().to(torch.int8), scales


def text_of(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.contiguous().numpy().tobytes()).decode()


@torch.no_grad()
def exported(model: torch.nn.Module, characters: str) -> dict:
    """What the page's script needs of a model. The model itself gets the rounded weights that it stands for.

    Matrices have 8 bits a weight, vectors 32. The blocks of multi-token prediction, which only help in
    training and drafting, are left out.
    """
    tensors, extra = {}, f"model.layers.{model.config.n_layer}."
    for name, weight in checkpoint.weights(model).items():
        if name.startswith(extra):
            continue
        if weight.dim() == 1:
            tensors[name] = {"shape": list(weight.shape), "floats": text_of(weight.float())}
        else:
            codes, scales = in_8_bits(weight.float())
            weight.copy_(codes * scales)  # a view of the model's own memory
            tensors[name] = {"shape": list(weight.shape), "codes": text_of(codes), "scales": text_of(scales)}
    return {"config": vars(model.config), "characters": characters, "tensors": tensors}


def write(static: Path, models: dict) -> None:
    """Writes the weights of the models, one script each, and the recorded example."""
    for name, (model, tokenizer) in models.items():
        content = exported(model, tokenizer.characters)
        (static / f"{name}.js").write_text(script(name, content), encoding="utf-8")
        if name == EXAMPLE:
            example = script("recorded", recorded(stages.load(name), model, tokenizer))
            (static / "recorded.js").write_text(example, encoding="utf-8")


def script(key: str, content: dict) -> str:
    """A JavaScript file that hands its content to the page: a file that a page may load from a disk, too."""
    return f"(window.DATA ??= {{}})[{json.dumps(key)}] = {json.dumps(content)};\n"


@torch.no_grad()
def recorded(stage, model: torch.nn.Module, tokenizer) -> dict:
    """A text that a model continues greedily, as the page's script makes it: the characters, and for each
    {"attention": [layer][head] -> shares of the keys so far, "experts": [layer] -> [[expert, weight]]}.
    """
    idx = torch.tensor(tokenizer.encode(PROMPT).astype("int64"))[None]
    while idx.size(1) < RECORDED:
        idx = torch.cat((idx, model(idx)[0][:, -1:].argmax(-1)), dim=1)
    attention, experts = [], []  # by layer: (head, query, key); (position, choice, 2)

    def record(q, k, v, mask, dropout):
        keys = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
        scores = q @ keys.mT * q.size(3) ** -0.5 + stage.causal_mask(q.size(2), k.size(2), q.device)
        attention.append(scores.softmax(-1)[0].double().round(decimals=2).tolist())
        return original(q, k, v, mask, dropout)

    def choose(module, inputs, output):
        weights, indices = (numbers.tolist() for numbers in output)
        experts.append([list(zip(*row, strict=True)) for row in zip(indices, weights, strict=True)])

    original = stage.attention
    hooks = [router.register_forward_hook(choose) for router in model.routers()]
    with patch.object(stage, "attention", record):
        model(idx)
    for hook in hooks:
        hook.remove()
    steps = [
        {
            "attention": [[head[t][: t + 1] for head in layer] for layer in attention],
            "experts": [layer[t] for layer in experts],
        }
        for t in range(idx.size(1))
    ]
    return {"characters": list(tokenizer.decode(idx[0].tolist())), "steps": steps}
