"""What is said about sizes: the gpt2 preset, FLOPs, and the figures of docs/scale.md."""

import json
import re
import shlex

import pytest
import torch

from lab import attention, parallel, stages
from lab.pages import lessons, planning
from lab.training import cost, presets, settings

NAMES = stages.course()


def bare(number, **sizes):
    """A model of the stage without memory."""
    stage = stages.load(NAMES[number])
    with torch.device("meta"):
        return stage.GPT(stage.GPTConfig(**sizes))


def test_stage_0_at_the_gpt2_preset_is_gpt2_with_a_padded_vocabulary():
    """GPT-2 small has 124,439,808 parameters with its 50257 tokens, biases and tied head included."""
    model = bare(0, **presets.PRESETS["gpt2"]["model"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.config.vocab_size, model.config.bias) == (50304, True)
    assert cost.parameters(model) == 124_439_808 + (50304 - 50257) * 768


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "explicit"])
def test_flops_are_those_of_the_formula_whatever_computes_attention(kernel, monkeypatch):
    """Also beyond 512 tokens, where a CPU computes SDPA in a kernel that FlopCounterMode does not know."""
    sizes = {"vocab_size": 65, "block_size": 1024, "n_layer": 1, "n_head": 2, "n_embd": 32}
    stage4, stage5 = (stages.load(NAMES[number]) for number in (4, 5))
    written_out = cost.flops_per_token(stage4.GPT(stage4.GPTConfig(**sizes)))
    model = stage5.GPT(stage5.GPTConfig(**sizes))
    monkeypatch.setattr(stage5, "attention", stage5.attention)  # restores it
    attention.use(kernel, stage5, model.config, torch.device("cpu"))
    assert cost.flops_per_token(model) == written_out
    scores = 2 * 2 * 3 * 1024 * 32  # two products, forward and twice that backward, by tokens and width
    matrices = [p for p in model.parameters() if p.dim() == 2]  # the tied one as the head alone
    assert written_out == scores + 6 * sum(p.numel() for p in matrices)


# Planning


@pytest.mark.parametrize("number", ["0", "4", "6", "7"])
def test_the_plan_of_the_gpt2_preset_is_that_of_the_code(number):
    """If this fails: python -m benchmarks.scale, then python -m lab.pages.lessons."""
    made = planning.plan(number, planning.SIZES["124 M"][number])
    assert json.loads(json.dumps(made)) == lessons.read_results()["scale"]["124 M"][number]


@pytest.mark.parametrize("size", planning.SIZES)
def test_plans_of_all_sizes_have_the_parameters_and_the_state_of_the_code(size):
    for number, sizes in planning.SIZES[size].items():
        made, model = lessons.read_results()["scale"][size][number], planning.bare(number, sizes)
        assert (made["parameters"], made["active_parameters"]) == (
            cost.parameters(model),
            cost.active_parameters(model),
        )
        assert made["state"]["1"] == 16 * made["parameters"]  # four numbers in float32
        assert made["state"]["8"] == planning.state_bytes(model, 8) >= made["state"]["1"] / 8
        assert made["flops_per_token"] > 6 * made["active_parameters"]
        if size != "8 B" or number == "7":  # the others would take long
            assert made["flops_per_token"] == cost.flops_per_token(model)


@pytest.mark.parametrize("size, target", [("124 M", 124e6), ("1 B", 1e9), ("8 B", 8e9)])
def test_sizes_are_as_large_as_their_names_say(size, target):
    for number, sizes in planning.SIZES[size].items():
        active = cost.active_parameters(planning.bare(number, sizes))
        assert active == pytest.approx(target, rel=0.07), number


@pytest.mark.parametrize("recomputing", [False, True])
def test_the_memory_of_a_step_without_memory_is_that_of_a_real_step(stage, recomputing, monkeypatch):
    """Beside autocast's on a CPU, which casts as on CUDA but for the experts."""
    name = next(name for name in stages.names() if stages.load(name) is stage)
    sizes = {"vocab_size": 97, "block_size": 128, "n_layer": 3, "n_head": 4, "n_embd": 64}
    if hasattr(stage, "explicit_attention"):
        monkeypatch.setattr(stage, "attention", stage.explicit_attention)
    real, without = stage.GPT(stage.GPTConfig(**sizes)), planning.bare(name, sizes)
    cost.group_experts(real)
    if recomputing:
        parallel.recompute_blocks(real)
        parallel.recompute_blocks(without)
    expected = planning.peak_bytes(real, 2, torch.autocast("cpu", dtype=torch.bfloat16))
    assert planning.peak_bytes(without, 2, planning.CudaAutocast()) == pytest.approx(expected, rel=0.01)


def test_memory_counts_what_is_alive_at_once_and_no_view():
    with planning.LiveMemory() as memory:
        first = torch.empty(1000, device="meta")
        view = first.view(10, 100)
        view.add_(1)
        del first, view
        second = torch.empty(600, device="meta")
    assert (memory.now, memory.peak) == (second.nbytes, 4000)


def test_what_a_part_holds_follows_the_first_dimension():
    """8 experts on 64 GPUs: one on each of 8; a matrix of 65 rows: two rows at most."""
    model = torch.nn.Module()
    model.experts, model.matrix = (
        torch.nn.Parameter(torch.zeros(8, 3, 5)),
        torch.nn.Parameter(torch.zeros(65, 7)),
    )
    assert planning.state_bytes(model, 64) == 16 * (3 * 5 + 2 * 7)


def test_the_advice_of_the_page_follows_from_its_figures():
    plans = lessons.read_results()["scale"]
    assert all(plan["fits"]["ddp"][0] for plan in plans["124 M"].values())  # one GPU is enough
    for size, number in [("1 B", "6"), ("1 B", "7"), *(("8 B", number) for number in plans["8 B"])]:
        assert plans[size][number]["fits"]["1"] == [0, 0]  # FSDP is not
    for number in ("6", "7"):  # more than 8 GPUs
        assert plans["8 B"][number]["fits"]["fsdp 8"] == [0, 0] < plans["8 B"][number]["fits"]["fsdp 64"]
    for by_stage in plans.values():
        assert by_stage["5"]["sequence"]["kept"] < 0.7 * by_stage["4"]["sequence"]["kept"]
        assert all(plan["sequence"]["recomputed"] < plan["sequence"]["kept"] for plan in by_stage.values())
        but_for_steps = by_stage["5"].keys() - {"sequence", "fits", "fixed"}
        assert all(by_stage["4"][key] == by_stage["5"][key] for key in but_for_steps)


def test_the_command_of_the_page_is_one(monkeypatch):
    page = (stages.ROOT / "docs" / "scale.md").read_text()
    (flags,) = re.findall(r"torchrun [^`]*train\.py ([^`]*)```", page)
    made = settings.parse([*shlex.split(flags.replace("\\\n", " ")), "--device", "cpu"])
    assert made.model == type(made.model)(**planning.SIZES["8 B"]["5"])
    monkeypatch.setattr(parallel, "WORLD_SIZE", 64)
    assert parallel.micro_batch(made.batch_size, made.micro_batch_size) > 1
