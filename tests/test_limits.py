"""Limits: memory follows what is asked for, extreme numbers, schedules that contradict themselves."""

import functools
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY_MODEL, call
from test_deploy import llama, make_run, save_theirs

import compare
from deploy import export, import_hf
from lab import stages
from lab.comparison import isolated
from lab.errors import UserError
from lab.sampling import generation
from lab.sampling.ahead import BackgroundStep
from lab.sampling.compiled import CompiledStep
from lab.storage import runs

FAR = 10**13  # positions of a model: their cache would fit nowhere


def explained(capsys, *messages):
    """stderr is an error of one or two lines that says this."""
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and len(err.splitlines()) <= 2, err
    for message in messages:
        assert message in err
    assert "Traceback" not in out + err


# Memory


def largest_cache(model, monkeypatch):
    """A list that gets the length of every cache the model makes."""
    lengths, new_cache = [], model.new_cache

    def noted(batch_size, max_length, **options):
        lengths.append(max_length)
        return new_cache(batch_size, max_length, **options)

    monkeypatch.setattr(model, "new_cache", noted)
    return lengths


WAYS = {
    "token by token": generation.generate,
    "drafts": functools.partial(generation.generate_with_drafts, n_drafts=2),
}


@pytest.fixture(params=WAYS)
def generate(request):
    return WAYS[request.param]


def seven(**sizes):
    """A tiny stage 7 whose text depends on what came before."""
    torch.manual_seed(0)
    module = stages.load("stage7_mla_mtp")
    model = module.GPT(module.GPTConfig(**TINY_MODEL | sizes)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(2)
    return model


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("prompt_length, n", [(1, 3), (5, 11), (16, 2), (30, 40)])
def test_the_cache_is_for_the_prompt_and_the_new_tokens_and_the_text_is_the_same(
    generate, temperature, prompt_length, n, monkeypatch
):
    model, prompt = seven(block_size=32), list(range(prompt_length))

    def text(model):
        generator = torch.Generator().manual_seed(1)
        return list(generate(model, prompt, n, 65, temperature=temperature, generator=generator))

    with monkeypatch.context() as patch:
        lengths = largest_cache(model, patch)
        made = text(model)
    assert max(lengths) <= min(32, prompt_length + n + 2)
    with monkeypatch.context() as patch:  # as large as it can be
        patch.setattr(generation, "cache_length", lambda context, prompt, max_new_tokens: context)
        assert text(model) == made


def test_three_tokens_of_a_model_with_any_number_of_positions_need_little_memory(generate):
    near, far = seven(block_size=16), seven(block_size=FAR)
    assert list(generate(far, [1], 9, 65, temperature=0)) == list(generate(near, [1], 9, 65, temperature=0))


def test_a_shorter_context_gives_the_text_of_a_model_with_no_more_positions(generate, monkeypatch):
    short, long = seven(block_size=8), seven(block_size=FAR)
    lengths = largest_cache(long, monkeypatch)
    expected = list(generate(short, [1, 2], 40, 65, temperature=0))
    assert list(generate(long, [1, 2], 40, 65, temperature=0, context=8)) == expected
    assert set(lengths) == {8}


def test_compiled_steps_have_a_cache_of_the_length_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda **_: lambda function: function)
    model = seven(block_size=FAR)
    expected = list(generation.generate(model, [1], 9, 65, temperature=0))
    step = CompiledStep(model, 10)
    assert step.cache.max_length == 10
    assert list(generation.generate(model, [1], 9, 65, temperature=0, step=step)) == expected


@pytest.mark.parametrize("flags", [[], ["--draft"], ["--compile"]], ids=str)
def test_sample_takes_a_context_and_memory_for_no_more(workshop, run_sample, monkeypatch, capsys, flags):
    monkeypatch.setattr(BackgroundStep, "start", lambda *arguments: None)
    make_run("long", "7", block_size=FAR)
    make_run("short", "7", block_size=8)
    asked = ("--prompt", "abc", "--temperature", "0", *flags)
    assert run_sample("--run", "long", "--max-new-tokens", "3", *asked) == 0
    capsys.readouterr()
    assert run_sample("--run", "short", "--max-new-tokens", "30", *asked) == 0
    expected = capsys.readouterr().out
    assert run_sample("--run", "long", "--max-new-tokens", "30", "--context", "8", *asked) == 0
    assert capsys.readouterr().out == expected


def test_a_context_that_the_model_does_not_have_is_refused(workshop, run_sample, capsys):
    make_run("run", "3")
    for context, message in ((25, "the model has 24 positions"), (0, "context must be at least 1, not 0")):
        assert run_sample("--run", "run", "--prompt", "a", "--context", context) == 2
        explained(capsys, message)


def test_a_prompt_of_which_the_model_sees_a_part_is_named(workshop, run_sample, capsys):
    make_run("run", "3")
    flags = ("--run", "run", "--max-new-tokens", "1", "--prompt")
    assert run_sample(*flags, "a" * 25) == 0
    assert "the prompt has 25 tokens: the model sees the last 24" in capsys.readouterr().err
    assert run_sample(*flags, "a" * 24) == 0
    assert "the model sees" not in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--draft"], ["--compile"]], ids=str)
def test_more_text_than_memory_holds_is_explained(workshop, run_sample, capsys, flags):
    make_run("run", "7", block_size=FAR)
    assert run_sample("--run", "run", "--prompt", "a", "--max-new-tokens", str(FAR), *flags) == 2
    err = capsys.readouterr().err
    assert "error: there is not enough memory for " in err and "Traceback" not in err
    assert err.splitlines()[-1].startswith("try a lower --max-new-tokens")


REMEDIES = {
    "export": (export, ["--run", "run", "--to", "hf", "--out", "out"], "storage.runs.load", "export needs"),
    "import": (import_hf, ["theirs", "--out", "out"], "deploy.import_hf.read_config", "import needs"),
    "compare": (compare, ["--stages", "0"], "comparison.wanted_runs.chosen_stages", "--rounds 0"),
    "throughput": (isolated, ["--stage", "0"], "stages.load", "--batch-size"),
}
ERRORS = [
    MemoryError("Unable to allocate 8.00 GiB for an array"),
    MemoryError(),
    OSError(12, "Cannot allocate memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
    RuntimeError("Storage size calculation overflowed with sizes=[4611686018427387904]"),
    OverflowError("Python int too large to convert to C long"),
]


@pytest.mark.parametrize("error", ERRORS, ids=str)
@pytest.mark.parametrize("driver, flags, where, remedy", REMEDIES.values(), ids=REMEDIES.keys())
def test_too_little_memory_has_the_remedy_of_the_command(
    workshop, monkeypatch, capsys, driver, flags, where, remedy, error
):
    def fail(*_, **__):
        raise error

    make_run("run", "3")
    monkeypatch.setattr(where if where.startswith("deploy") else f"lab.{where}", fail)
    assert call(monkeypatch, driver, *flags) == 2
    explained(capsys, "there is not enough memory", remedy)
    assert not Path("out").exists()


def test_an_error_that_is_not_of_memory_stays_what_it_is(workshop, monkeypatch):
    def fail(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(runs, "newest", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        call(monkeypatch, __import__("sample"))


# Extreme numbers


@pytest.mark.parametrize("temperature", [1e-39, 1e-46, 5e-324])
def test_a_tiny_temperature_is_greedy(generate, temperature):
    model = seven()
    greedy = list(generate(model, [1], 40, 65, temperature=0))
    assert list(generate(model, [1], 40, 65, temperature=temperature)) == greedy
    logits = torch.tensor([0.0, 2.0, 2.0])
    assert generation.next_token_probs(logits, temperature, None, 1.0).tolist() == [0, 1, 0]


@pytest.mark.parametrize("top_p", [1e-46, 5e-324, 1e-30])
def test_a_tiny_top_p_keeps_the_best_token(top_p):
    logits = torch.randn(20)
    best = torch.nn.functional.one_hot(logits.argmax(), 20).float()
    assert torch.equal(generation.next_token_probs(logits, 1.0, None, top_p), best)
    assert torch.equal(generation.next_token_probs(logits, 1.0, 5, top_p), best)


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf]], ids=str)
@pytest.mark.parametrize("temperature", [0, 1e-46, 0.8])
def test_logits_that_are_not_numbers_are_an_error(bad, temperature):
    with pytest.raises(UserError, match="the model's output is not a number"):
        generation.next_token_probs(torch.tensor(bad), temperature, None, 1.0)


def test_damaged_weights_end_sampling_with_an_error(workshop, run_sample, capsys):
    make_run("run", "7")
    path = Path("run/best/model.safetensors")
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, path)
    for flags in ([], ["--draft"], ["--temperature", "0"]):
        assert run_sample("--run", "run", "--prompt", "a", *flags) == 2
        assert "error: the model's output is not a number (nan)" in capsys.readouterr().err


def test_a_draft_that_differs_by_rounding_alone_is_drawn_again_from_the_model():
    p = torch.tensor([0.5, 0.25, 0.25])
    q = torch.tensor([0.5, 0.25, 0.25 + 1e-3])  # p has nowhere more than q
    generator = torch.Generator()
    for seed in itertools.count():  # the first seed that rejects the draft
        if float(torch.rand(1, generator=generator.manual_seed(seed))) * q[2] >= p[2]:
            break
    sampler = generation.Sampler(3, 1.0, None, 1.0, generator.manual_seed(seed))
    made = generation.verified([p, p], [2], [q], sampler)
    assert len(made) == 1 and made[0] in (0, 1, 2)


FLOATS = {
    "train": ["lr", "min-lr", "weight-decay", "grad-clip", "beta1", "beta2", "model.dropout"],
    "model": ["norm-eps", "rope-theta", "routed-scaling-factor", "bias-update-speed", "mtp-loss-weight"],
}


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", [*FLOATS["train"], *(f"model.{name}" for name in FLOATS["model"])])
def test_a_setting_that_is_not_a_finite_number_is_refused_by_name(run_train, workshop, capsys, name, value):
    assert run_train("--stage", "7", f"--{name}={value}") == 2
    explained(capsys, name.split(".")[-1].replace("-", "_"), value)
    assert not (workshop / "runs").exists()


@pytest.mark.parametrize("name", ["temperature", "top-p"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_way_to_choose_that_is_not_a_finite_number_is_refused_by_name(run_sample, capsys, name, value):
    assert run_sample("--prompt", "a", f"--{name}={value}") == 2
    explained(capsys, name.replace("-", "_"), value)


# Schedules


def settings_of(folder):
    return json.loads(Path(folder, "config.json").read_text())["settings"]


CONTRADICTIONS = [
    (["--min-lr", "0.01"], "--min-lr 0.01 is above --lr 0.001"),
    (
        ["--lr", "1e-5", "--min-lr", "1e-4"],
        "--min-lr 0.0001 is above --lr 1e-05",
    ),  # also where it is the default
    (["--warmup-steps", "3000"], "--warmup-steps 3000 is more than --steps 2000"),
    (["--steps", "50", "--warmup-steps", "100"], "--warmup-steps 100 is more than --steps 50"),
]


@pytest.mark.parametrize("flags, message", CONTRADICTIONS, ids=str)
def test_a_schedule_that_contradicts_itself_is_refused(run_train, workshop, capsys, flags, message):
    assert run_train("--stage", "0", *flags) == 2
    explained(capsys, message)
    assert not (workshop / "runs").exists()


def test_what_a_preset_says_follows_what_the_user_says(run_train, workshop):
    assert run_train("--stage", "0", "--steps", "20", "--lr", "1e-5", "--out", "run") == 0
    made = settings_of("run")
    assert (made["warmup_steps"], made["min_lr"]) == (2, pytest.approx(1e-6))
    assert run_train("--stage", "0", "--steps", "1", "--lr", "2e-4", "--out", "other") == 0
    made = settings_of("other")
    assert (made["warmup_steps"], made["min_lr"]) == (0, 1e-4)


def test_a_run_of_older_code_goes_on_with_its_schedule_whatever_it_is(run_train, workshop, capsys):
    assert run_train("--stage", "0", "--steps", "2", "--out", "run") == 0
    config = json.loads(Path("run/config.json").read_text())
    config["settings"] |= {"warmup_steps": 100, "steps": 4}
    Path("run/config.json").write_text(json.dumps(config))
    assert run_train("--resume", "--out", "run") == 0
    capsys.readouterr()
    assert run_train("--resume", "--out", "run", "--steps", "6") == 2
    explained(capsys, "--warmup-steps 100 is more than --steps 6")


# What stands in the way


class Wandb:
    """Raises its own kind of error, as the real one does, at login or when a run begins."""

    class errors:
        class Error(Exception):
            pass

    def __init__(self, fails):
        self.fails = fails

    def login(self):
        if self.fails == "login":
            raise self.errors.Error("No API key configured. Use `wandb login` to log in.\nMore of it.")

    def init(self, **_):
        raise self.errors.Error("Timed out while retrying\nConsider …")


@pytest.mark.parametrize("fails, message", [("login", "No API key configured"), ("init", "Timed out")])
def test_wandb_without_a_login_is_explained_and_leaves_no_run(
    run_train, workshop, monkeypatch, capsys, fails, message
):
    monkeypatch.setitem(sys.modules, "wandb", Wandb(fails))
    assert run_train("--stage", "0", "--steps", "1", "--wandb") == 2
    explained(capsys, message, "`wandb login`, or set WANDB_MODE=offline")
    assert not list((workshop / "runs").glob("*"))


def test_help_shows_no_default_for_the_stage_that_has_none(run_train, capsys):
    for flags in ([], ["--stage", "4"]):
        assert run_train(*flags, "--help") == 0
        _, after = capsys.readouterr().out.split("--stage STR")
        said = after[: after.index("--data STR")]
        assert "(required)" in said and "default" not in said and "stage0_gpt" not in said


def files_under(folder):
    return sorted((path, path.stat().st_mtime_ns) for path in Path(folder).rglob("*"))


@pytest.mark.parametrize("to", ["hf", "llama2c", "import"])
def test_nothing_is_written_over_a_run_a_file_or_a_folder_with_files_and_nobody_is_told_to_delete_one(
    workshop, monkeypatch, capsys, to
):
    make_run("run", "3", norm_eps=1e-5)
    if to == "import":
        save_theirs(llama(), "theirs")
    (workshop / "mine").mkdir()
    (workshop / "mine" / "notes.txt").write_text("mine")
    (workshop / "train.py").write_text("code")
    source, driver, flags = "run", export, ["--run", "run", "--to", to]
    if to == "import":
        source, driver, flags = "theirs", import_hf, ["theirs"]
    before = files_under(".")
    for out, reason in (
        (source, "is the input folder"),
        (f"mine/../{source}", "is the input folder"),
        (f"{source}/new", f"is inside the input folder, {source}"),
        (f"{source}/best/a/b", f"is inside the input folder, {source}"),
        ("train.py", "train.py is a file, not a folder"),
        ("mine", "mine exists and is not empty"),
    ):
        assert call(monkeypatch, driver, *flags, "--out", out) == 2
        err = capsys.readouterr().err
        assert reason in err and "name another folder with --out" in err and "delete" not in err
        assert "Traceback" not in err and len(err.splitlines()) <= 2
    assert files_under(".") == before
