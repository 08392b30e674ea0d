"""deploy.quantize: the command, its pictures and metrics, interruptions, and bad input."""

import json

import pytest
import torch
from conftest import call

from deploy import quantize
from deploy.quantization.grid import dequantize
from lab.errors import UserError
from lab.storage import checkpoint, runs

CPU = torch.device("cpu")
QUICK = ["--calibration-tokens", 512, "--group-size", "none"]


@pytest.fixture
def run_quantize(workshop, monkeypatch):
    """run_quantize(run, out, *flags): quantizes a run; returns the exit status."""
    return lambda run, out, *flags: call(monkeypatch, quantize, "--run", run, "--out", out, *QUICK, *flags)


@pytest.fixture
def trained(run_train):
    """trained(stage): a run of the stage, trained for two steps."""

    def train(stage="4"):
        assert run_train("--stage", stage, "--steps", 2, "--out", "run") == 0
        return "run"

    return train


def error(capsys):
    return capsys.readouterr().err


@pytest.mark.parametrize("stage, method", [("0", "rtn"), ("4", "gptq"), ("7", "awq")])
def test_a_quantized_run_is_a_run_like_any_other(trained, run_quantize, run_sample, workshop, stage, method):
    trained(stage)
    assert run_quantize("run", "small", "--method", method, "--bits", 4) == 0
    model, config = runs.load(workshop / "small", "best", CPU)
    assert config["quantization"]["method"] == method
    original, _ = runs.load(workshop / "run", "best", CPU)
    idx = torch.randint(10, (4, 8))
    with torch.no_grad():
        exact, ours = original(idx)[0], model(idx)[0]
    assert 0 < (ours - exact).norm() / exact.norm() < 0.2
    assert run_sample("--run", "small", "--prompt", "a b", "--max-new-tokens", 5) == 0
    assert not list(workshop.glob("*.unfinished"))


def test_the_errors_are_in_the_metrics_and_a_picture(trained, run_quantize, workshop, capsys):
    trained("6")
    assert run_quantize("run", "small", "--bits", 3) == 0
    lines = (workshop / "small/quantization.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["layer"] for record in records] == [0, 1]
    for record in records:
        assert 0 < record["error"] < 0.2 and record["seconds"] > 0
        assert {"self_attn.q_proj", "mlp.experts.down_proj"} <= record["errors"].keys()
    assert (workshop / "small/quantization.png").stat().st_size > 1000
    assert "MB became" in capsys.readouterr().out


def test_an_interrupted_quantization_goes_on_and_gives_the_same(
    trained, run_quantize, workshop, monkeypatch, capsys
):
    trained("7")
    flags = ["--method", "awq", "--bits", 3]
    assert run_quantize("run", "whole", *flags) == 0
    real, done = quantize.quantize_layer, []

    def interrupted(*args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(real(*args))
        return done[-1]

    monkeypatch.setattr(quantize, "quantize_layer", interrupted)
    assert run_quantize("run", "parts", *flags) == 130
    assert "2 of 3 layers are kept in parts.unfinished: rerun the command" in error(capsys)
    assert not (workshop / "parts").exists()
    assert run_quantize("run", "parts", "--method", "awq", "--bits", 2) == 2  # it would mix two grids
    assert "layers of another quantization: bits 3, not 2" in error(capsys)

    made = []
    monkeypatch.setattr(quantize, "quantize_layer", lambda *args: made.append(args[-1]) or real(*args))
    assert run_quantize("run", "parts", *flags) == 0
    assert made == [2]  # only the layer that was missing
    records = [json.loads(line) for line in (workshop / "parts/quantization.jsonl").read_text().splitlines()]
    assert [record["layer"] for record in records] == [0, 1, 2] and "seconds" in records[0]
    whole, parts = (runs.load(workshop / name, "best", CPU)[0].state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not (workshop / "parts.unfinished").exists()


def test_an_int8_head_has_a_scale_for_each_token(trained, run_quantize, workshop):
    """A tied head stays tied: the embedding looks tokens up in the same codes."""
    trained()
    assert run_quantize("run", "small", "--head", "int8") == 0
    before, after = (runs.load(workshop / name, "best", CPU)[0] for name in ("run", "small"))
    q = after.lm_head.quantized()
    assert q.bits == 8 and q.scale.size(1) == 1
    assert (dequantize(q) - before.lm_head.weight).abs().max() < q.scale.max()
    idx = torch.arange(5)
    assert torch.equal(after.model.embed_tokens(idx), dequantize(q)[:5])


def spoil(run):
    """Puts a NaN into a weight of the run's best checkpoint."""
    model, _ = runs.load(run, "best", CPU)
    model = model.float()
    model.model.layers[0].mlp.up_proj.weight.data = torch.full_like(
        model.model.layers[0].mlp.up_proj.weight, torch.nan
    )
    checkpoint.save(run, "best", model, checkpoint.metadata(run / "best"))


def test_bad_input_is_one_clear_line_and_leaves_nothing(trained, run_quantize, workshop, capsys):
    trained()
    before = set(workshop.iterdir())
    for flags, message in [
        (["--group-size", "128"], "--group-size 128 is larger than any row"),
        (["--data", "nowhere.txt"], "there is no dataset or file 'nowhere.txt'"),
        (["--calibration-tokens", 0], "--calibration-tokens must be at least 1, not 0"),
        (["--bits", 5], "invalid choice"),
        (["--method", "rtn", "--no-act-order"], "--no-act-order is for --method gptq"),
        (["--no-clip"], "--no-clip is for --method awq"),
        (["--out", "run/inside"], "is inside the input folder"),
        (["--out", "words.txt"], "is a file, not a folder"),
    ]:
        capsys.readouterr()
        assert run_quantize("run", "small", *flags) == 2
        lines = error(capsys).splitlines()
        assert message in lines[0] and len(lines) <= 2
        assert set(workshop.iterdir()) == before
    assert run_quantize("nothing", "small") == 2
    assert "nothing is not a run" in error(capsys)


def test_a_run_is_quantized_only_once(trained, run_quantize, capsys):
    trained()
    assert run_quantize("run", "small", "--method", "rtn") == 0
    assert run_quantize("small", "smaller") == 2
    assert "small is quantized: it cannot be quantized again" in error(capsys)
    assert run_quantize("run", "small") == 2
    assert "small exists and is not empty" in error(capsys)


def test_weights_that_are_not_finite_are_refused_by_name(trained, run_quantize, workshop, capsys):
    trained()
    spoil(workshop / "run")
    assert run_quantize("run", "small") == 2
    assert "model.layers.0.mlp.up_proj.weight has NaN or infinite numbers" in error(capsys)
    assert not (workshop / "small").exists() and not list(workshop.glob("*.unfinished"))


def test_rows_shorter_than_a_group_share_one_scale_and_are_named(trained, run_quantize, workshop, capsys):
    trained()
    assert run_quantize("run", "small", "--group-size", "32") == 0
    assert "rows shorter than a group of 32 share one scale: self_attn.q_proj (16)" in error(capsys)
    model, _ = runs.load(workshop / "small", "best", CPU)
    assert model.model.layers[0].self_attn.q_proj.quantized().scale.shape == (16, 1)


def test_two_processes_never_write_the_same_layers(trained, run_quantize, workshop, capsys):
    trained()
    (workshop / "small.unfinished").mkdir()
    from lab.storage import locks

    with locks.held(workshop / "small.unfinished/.lock"):
        assert run_quantize("run", "small") == 2
    assert "is writing small.unfinished" in error(capsys)


def test_an_imported_run_needs_a_text(workshop, trained):
    trained()
    run = workshop / "run"
    runs.write_json(run / "config.json", runs.read_config(run) | {"imported_from": "somewhere"})
    settings = quantize.Settings(run="run", out="small", group_size="none")
    with pytest.raises(UserError, match="name a text to calibrate with: --data"):
        quantize.quantize(settings)


def test_16_bit_weights_stay_in_16_bits(workshop, make_small_run, run_quantize):
    """The parts that are not quantized keep their number format."""
    run = make_small_run(torch.bfloat16)
    assert run_quantize(run, "small", "--method", "awq", "--data", "words.txt") == 0
    model, config = runs.load(workshop / "small", "best", CPU)
    assert config["weights_dtype"] == "bfloat16"
    assert model.model.layers[0].input_layernorm.weight.dtype == torch.bfloat16


@pytest.fixture
def make_small_run(workshop, trained):
    """make_small_run(dtype): a trained run whose weights are stored in this format."""

    def make(dtype):
        run = workshop / trained()
        model, config = runs.load(run, "best", CPU, dtype)
        for name in ("best", "last"):
            checkpoint.save(run, name, model, checkpoint.metadata(run / name))
        runs.write_json(run / "config.json", config | {"weights_dtype": str(dtype).removeprefix("torch.")})
        return "run"

    return make
