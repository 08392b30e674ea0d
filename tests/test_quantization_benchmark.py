"""benchmarks/quantization.py: what its figures mean."""

import json
import math

import pytest
import torch

from benchmarks import quantization
from deploy.quantization import linear
from deploy.quantization.rtn import rtn
from lab import stages

SIZES = {"vocab_size": 65, "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 32}


def windows_of(n=3):
    idx = torch.randint(0, 65, (n, 16))
    return [(one, one.roll(-1)) for one in idx]


def test_the_divergence_is_that_of_the_predictions():
    """0 from itself; from a model that predicts all tokens alike, log(vocabulary) - entropy."""
    stage = stages.load("stage4_gqa")
    model = stage.GPT(stage.GPTConfig(**SIZES)).eval()
    windows = windows_of()
    assert quantization.divergences(model, model, windows) == [0, 0, 0]
    uniform = stage.GPT(stage.GPTConfig(**SIZES)).eval()
    torch.nn.init.zeros_(uniform.lm_head.weight)
    for found, (idx, _) in zip(quantization.divergences(uniform, model, windows), windows, strict=True):
        entropy = torch.distributions.Categorical(logits=model(idx[None])[0]).entropy().mean().item()
        assert found == pytest.approx(math.log(65) - entropy, abs=1e-5)


def test_fewer_bits_diverge_more():
    stage, found = stages.load("stage4_gqa"), []
    for bits in (8, 4, 2):
        torch.manual_seed(0)
        model, itself = (stage.GPT(stage.GPTConfig(**SIZES)).eval() for _ in range(2))
        model.load_state_dict(itself.state_dict())
        linear.replace(
            model,
            {
                f"model.layers.{name}": rtn(module.weight.data, bits, 32 if bits < 8 else None)
                for name, module in model.model.layers.named_modules()
                if isinstance(module, torch.nn.Linear)
            },
        )
        found.append(sum(quantization.divergences(model, itself, windows_of())))
    assert 0 < found[0] < found[1] < found[2]


def row(run, value, **more):
    return {"run": run, "stage": "stage4_gqa", "imported": False, "tokens": 64, "loss": 1.5} | more | value


def test_the_error_of_several_runs_is_that_between_them():
    """The windows of one run agree on a change that is the run's own luck."""
    values = [{"difference": d, "standard_error": 0.0001} for d in (0.001, 0.003)]
    one, both = values[:1], values
    assert quantization.change(one, "difference", "standard_error") == "+0.0010 ± 0.0001"
    assert quantization.change(both, "difference", "standard_error") == "+0.0020 ± 0.0010"
    assert quantization.change([], "difference", "standard_error") == ""


def test_the_tables_have_every_method_and_the_memory_beyond_that_of_the_program():
    rows = [row("runs/A", {"method": "not quantized", "bits": None})]
    figures = {"difference": 0.01, "standard_error": 0.001, "divergence": 0.002, "divergence_error": 0.0001}
    rows += [row("runs/A", figures, method=name, bits=4) for name in quantization.VARIANTS]
    speed = {"program": "4 bits", "tokens_per_second": 66.0, "ratio": 1.9}
    speed |= {"peak_memory": 600_000_000, "memory_before": 400_000_000}
    other = {"program": "llama.cpp", "tokens_per_second": 150.0, "ratio": 4.0}
    text = quantization.tables(rows, [speed, other])
    for name in quantization.VARIANTS:
        assert f"| {name} | +0.0100 ± 0.0010 |" in text and f"| {name} | 0.0020 ± 0.0001 |" in text
    assert "| 4 bits | 66.0 | 1.90 | 200 MB | 600 MB |" in text
    assert "| llama.cpp | 150.0 | 4.00 | | |" in text


def test_the_lesson_shows_the_published_results():
    published = stages.ROOT / "results"
    text = (published / "quantization.md").read_text()
    assert f"<!-- quantization -->\n{text}" in quantization.LESSON.read_text()
    measured = json.loads((published / "quantization.json").read_text())
    of_stages = [row for row in measured["rows"] if not row["imported"]]
    assert text.startswith(quantization.tables(of_stages, []).strip())
    assert text.endswith(quantization.tables([], measured["speeds"]))
