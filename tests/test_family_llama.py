"""Llama's relatives in family/: each is that of transformers, both ways, and what it adds to stage 5."""

import functools
import json
from pathlib import Path

import pytest
import test_deploy
import torch
from test_deploy import CPU, edit_config, explained, llama, make_run, run_export, run_import, save_theirs
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lab import stages
from lab.storage import runs

__all__ = ["run_export", "run_import"]  # fixtures

STAGE5, LLAMA3 = stages.load("stage5_flash"), stages.load("llama3")
SIZES = {"vocab_size": 61, "block_size": 24, "n_layer": 2, "n_head": 4, "n_embd": 32}
LONG = 60  # tokens: beyond the context, the original context and the windows of the models here


def make(stage, **sizes):
    """A tiny model with large random weights, so that positions and tokens matter."""
    torch.manual_seed(0)
    return test_deploy.shake(stage.GPT(stage.GPTConfig(**SIZES | sizes)))


def tokens(length=LONG):
    return torch.randint(61, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same_function(ours, theirs):
    """The same logits at LONG positions: at once, and through caches filled by some and by single tokens."""
    idx = tokens()
    logits = theirs(idx).logits
    assert logits.std() > 0.3
    torch.testing.assert_close(ours(idx)[0], logits, atol=1e-4, rtol=0)
    cache, their_cache = ours.new_cache(2, LONG), None
    for part in idx.split([10, 3, 20, *[1] * 20, 7], dim=1):
        answer = theirs(part, past_key_values=their_cache, use_cache=True)
        their_cache = answer.past_key_values
        torch.testing.assert_close(ours(part, cache=cache)[0], answer.logits, atol=1e-4, rtol=0)


def scaled(rope_type, theta=10_000.0, **numbers):
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **numbers}}


qwen2 = functools.partial(llama, Qwen2ForCausalLM, Qwen2Config, num_key_value_heads=2)
qwen3 = functools.partial(llama, Qwen3ForCausalLM, Qwen3Config, num_key_value_heads=2, head_dim=8)
BOUNDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
THEIRS = [
    ("llama3", llama, scaled("llama3", 500_000.0, factor=8.0, **BOUNDS) | {"num_key_value_heads": 2}),
    ("llama3", llama, scaled("llama3", 100.0, factor=32.0, **BOUNDS) | {"head_dim": 24}),
    ("llama3", llama, scaled("linear", factor=2.5) | {"num_hidden_layers": 1}),
    ("llama3", llama, scaled("dynamic", factor=2.0) | {"tie_word_embeddings": True}),
    ("llama3", llama, scaled("dynamic", 500.0, factor=4.0) | {"num_key_value_heads": 1, "head_dim": 4}),
    ("llama3", llama, {"head_dim": 16, "rms_norm_eps": 1e-3}),
    ("qwen2", qwen2, {"tie_word_embeddings": True, "num_hidden_layers": 1}),
    ("qwen2", qwen2, {"num_key_value_heads": 4, "rms_norm_eps": 1e-3} | scaled("default", 1e6)),
    ("qwen2", qwen2, {"num_attention_heads": 6, "hidden_size": 36, "num_key_value_heads": 3}),
    ("qwen3", qwen3, {"tie_word_embeddings": True, "head_dim": 16}),
    (
        "qwen3",
        qwen3,
        {"num_key_value_heads": 1, "head_dim": 6, "rms_norm_eps": 1e-3} | scaled("default", 1e6),
    ),
    ("qwen3", qwen3, {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}),
]


@pytest.mark.parametrize("stage, theirs, sizes", THEIRS)
def test_what_is_imported_is_the_same_function_and_exports_as_it_was(
    run_import, run_export, stage, theirs, sizes
):
    test_deploy.test_what_is_imported_has_their_logits_and_exports_as_it_was(
        run_import, run_export, stage, theirs, sizes
    )
    ours, _ = runs.load(Path("runs/imported"), "best", CPU)
    assert_same_function(ours, AutoModelForCausalLM.from_pretrained("theirs"))
    exported, original = (json.loads(Path(name, "config.json").read_text()) for name in ("back", "theirs"))
    assert exported.get("head_dim") == original.get("head_dim")


OURS = [
    ("llama3", {}),
    ("llama3", {"head_dim": 6, "rope_type": "linear", "rope_scaling": {"factor": 3.0}, "n_kv_head": 4}),
    ("llama3", {"rope_type": "dynamic", "rope_scaling": {"factor": 3.0}, "n_kv_head": 1}),
    ("llama3", {"rope_type": "llama3", "rope_scaling": {"factor": 4.0, **BOUNDS}, "n_layer": 3}),
    ("qwen2", {"n_kv_head": 1, "rope_theta": 1e6}),
    ("qwen2", {"n_kv_head": 4, "tie_word_embeddings": False, "norm_eps": 1e-6}),
    ("qwen3", {"n_kv_head": 1, "rope_theta": 1e6}),
    ("qwen3", {"n_kv_head": 3, "n_head": 6, "head_dim": 10, "norm_eps": 1e-3}),
]
CLASSES = {"llama3": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@pytest.mark.parametrize("stage, sizes", OURS)
def test_what_is_exported_is_the_same_function_in_stock_transformers(run_export, stage, sizes):
    ours = make_run("run", stage, "".join(map(chr, range(97, 158))), **sizes)
    assert run_export("--run", "run", "--to", "hf", "--out", "out") == 0
    theirs, report = AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    assert type(theirs).__name__ == CLASSES[stage] and not any(report.values()), report
    assert_same_function(ours, theirs)


@pytest.mark.parametrize("stage", ["llama3", "qwen2"])
def test_without_its_additions_a_relative_is_stage_5(stage):
    five, relative = make(STAGE5), make(stages.load(stage))
    without = {
        name: torch.zeros_like(t) for name, t in relative.state_dict().items() if name.endswith("bias")
    }
    relative.load_state_dict(five.state_dict() | without)
    assert torch.equal(relative(tokens())[0], five(tokens())[0])


# llama3


def test_the_fields_of_transformers_4_say_the_same(run_import, capsys):
    """rope_scaling beside rope_theta, under either name of the type, and what transformers 5 assumes."""
    save_theirs(llama(**scaled("llama3", 500_000.0, factor=8.0, **BOUNDS)), "theirs")
    numbers = {"factor": 8.0, **BOUNDS}
    old = {"type": "llama3", "rope_type": "llama3", **numbers}
    edit_config("theirs", rope_parameters=None, rope_theta=500_000, rope_scaling=old)
    assert run_import("theirs", "--out", "run") == 0
    model = runs.read_config(Path("run"))["model"]
    assert (model["rope_type"], model["rope_scaling"]) == ("llama3", numbers)
    assert model["rope_theta"] == 500_000 and capsys.readouterr().err == ""
    del old["original_max_position_embeddings"]
    edit_config("theirs", rope_scaling=old)
    assert run_import("theirs", "--out", "again") == 0
    scaling = runs.read_config(Path("again"))["model"]["rope_scaling"]
    assert scaling["original_max_position_embeddings"] == test_deploy.CONTEXT


def test_an_export_says_how_positions_are_scaled_where_other_programs_look(run_export):
    make_run("run", "llama3", rope_type="llama3", rope_scaling={"factor": 4.0, **BOUNDS})
    assert run_export("--run", "run", "--to", "hf", "--out", "out") == 0
    written = json.loads(Path("out/config.json").read_text())["rope_scaling"]
    assert written == {"rope_type": "llama3", "factor": 4.0, **BOUNDS}


@pytest.mark.parametrize("length, changed", [(24, False), (25, True)])
def test_a_dynamic_base_changes_beyond_the_context_alone(length, changed):
    sizes = {"rope_type": "dynamic", "rope_scaling": {"factor": 2.0}}
    same = torch.equal(make(LLAMA3, **sizes)(tokens(length))[0], make(LLAMA3)(tokens(length))[0])
    assert same is not changed


def test_llama2c_and_llama3_are_no_pair(run_export, capsys):
    make_run("run", "llama3", head_dim=16)
    assert run_export("--run", "run", "--to", "llama2c", "--out", "out") == 2
    explained(capsys, "llama2.c has no counterpart of llama3")


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"head_dim": 7}, "head_dim \\(7\\) must be even"),
        ({"head_dim": 0}, "head_dim \\(0\\)"),
        ({"rope_type": "yarn"}, "one of default, linear, dynamic, llama3, not 'yarn'"),
        ({"rope_type": "linear"}, "linear needs factor in rope_scaling, above 0, not None"),
        ({"rope_scaling": {"factor": 2.0}}, "default needs nothing in rope_scaling"),
        ({"rope_type": "linear", "rope_scaling": {"factor": -2.0}}, "above 0, not {'factor': -2.0}"),
        ({"rope_type": "llama3", "rope_scaling": {"factor": 2.0}}, "needs factor, high_freq_factor, low_"),
        ({"rope_type": "dynamic", "rope_scaling": {"factor": 2.0}, "head_dim": 2}, "at least 4"),
        (
            {"rope_type": "llama3", "rope_scaling": {"factor": 2.0, **BOUNDS, "low_freq_factor": 4.0}},
            "low_freq_factor \\(4.0\\) must be less than high_freq_factor \\(4.0\\)",
        ),
    ],
)
def test_positions_that_cannot_be_scaled_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        LLAMA3.GPTConfig(**SIZES | sizes)


# qwen2


def test_qwen2_as_published_has_a_window_that_is_switched_off(run_import, capsys):
    save_theirs(qwen2(), "theirs")
    edit_config("theirs", rope_parameters=None, layer_types=None, rope_theta=500.0, eos_token_id=[1, 2])
    edit_config("theirs", sliding_window=8, max_window_layers=0, use_sliding_window=False, use_mrope=False)
    assert run_import("theirs", "--out", "run") == 0
    assert capsys.readouterr().err == ""
    assert_same_function(
        runs.load(Path("run"), "best", CPU)[0], AutoModelForCausalLM.from_pretrained("theirs")
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_sliding_window": True, "sliding_window": 8, "layer_types": None}, "use_sliding_window = true"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            'qwen2 cannot represent that, only rope_type "def',
        ),
        ({"head_dim": 16}, "head_dim = 16"),
        ({"use_mrope": True}, "use_mrope = true"),
        ({"num_key_value_heads": None}, "n_kv_head (32)"),  # the default of transformers
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    ],
)
def test_a_qwen2_that_cannot_be_represented_is_refused_by_name(run_import, capsys, changes, message):
    save_theirs(qwen2(), "theirs")
    edit_config("theirs", **changes)
    assert run_import("theirs", "--out", "out") == 2
    explained(capsys, message)


def test_biases_that_the_files_lack_are_named(run_import, capsys):
    save_theirs(qwen2(), "theirs")
    test_deploy.change_weights("theirs", lambda t: t.pop("model.layers.0.self_attn.q_proj.bias"))
    assert run_import("theirs", "--out", "out") == 2
    explained(capsys, "model.layers.0.self_attn.q_proj.bias is missing")


# qwen3


def test_qwen3_as_published_is_read_without_a_word(run_import, capsys):
    save_theirs(qwen3(), "theirs")
    edit_config("theirs", rope_parameters=None, layer_types=None, rope_theta=500, eos_token_id=[1, 2])
    edit_config("theirs", sliding_window=8, max_window_layers=0, use_sliding_window=False)
    assert run_import("theirs", "--out", "run") == 0
    assert capsys.readouterr().err == ""
    ours, _ = runs.load(Path("run"), "best", CPU)
    assert_same_function(ours, AutoModelForCausalLM.from_pretrained("theirs"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_sliding_window": True}, "use_sliding_window = true"),
        ({"attention_bias": True}, "attention_bias = true"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "qwen3 cannot represent that"),
        ({"head_dim": None}, "k_norm.weight is (8,), but config.json requires (128,)"),  # theirs by default
        ({"head_dim": 7}, "head_dim (7) must be even"),
    ],
)
def test_a_qwen3_that_cannot_be_represented_is_refused_by_name(run_import, capsys, changes, message):
    save_theirs(qwen3(), "theirs")
    edit_config("theirs", **changes)
    assert run_import("theirs", "--out", "out") == 2
    explained(capsys, message)


def test_queries_and_keys_have_the_same_length_whatever_the_weights(monkeypatch):
    """So scores are bounded: each head is scaled to a root mean square of 1, and rotation keeps lengths."""
    qwen3 = stages.load("qwen3")
    model = qwen3.GPT(qwen3.GPTConfig(**SIZES, head_dim=10))
    seen = []
    monkeypatch.setattr(qwen3, "attention", lambda q, k, v, *rest: (seen.extend((q, k)), q)[1])
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            parameter.data.mul_(100)
    model(tokens(9))
    for x in seen:
        torch.testing.assert_close(x.square().mean(-1), torch.ones(x.shape[:3]), atol=1e-3, rtol=0)


def test_under_autocast_queries_keys_and_values_have_one_dtype(monkeypatch):
    """A norm returns float32, which would rule out kernels for 16 bits."""
    qwen3 = stages.load("qwen3")
    model, seen = qwen3.GPT(qwen3.GPTConfig(**SIZES)), []
    monkeypatch.setattr(qwen3, "attention", lambda q, k, v, *rest: (seen.extend((q, k, v)), q)[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(tokens(9))
    assert {x.dtype for x in seen} == {torch.bfloat16}
