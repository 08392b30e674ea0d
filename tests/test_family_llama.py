"""Llama's relatives in family/: each is that of transformers, both ways, and what it adds to stage 5."""

import functools
import json
import math
from pathlib import Path

import pytest
import test_deploy
import torch
from test_deploy import CPU, edit_config, explained, llama, make_run, run_export, run_import, save_theirs
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lab import stages
from lab.sampling import generation
from lab.sampling.compiled import CompiledStep
from lab.storage import runs

__all__ = ["run_export", "run_import"]  # fixtures

STAGE5, LLAMA3, MISTRAL = (stages.load(name) for name in ("stage5_flash", "llama3", "mistral"))
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


mistral = functools.partial(llama, MistralForCausalLM, MistralConfig, num_key_value_heads=2, sliding_window=8)
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
    ("mistral", mistral, {"tie_word_embeddings": True, "num_hidden_layers": 1}),
    ("mistral", mistral, {"sliding_window": 5, "head_dim": 12, "num_hidden_layers": 3}),
    ("mistral", mistral, {"sliding_window": 2, "num_key_value_heads": 4} | scaled("default", 1e6)),
    ("mistral", mistral, {"sliding_window": 40, "num_attention_heads": 3, "num_key_value_heads": 1}),
    ("mistral", mistral, {"sliding_window": None, "head_dim": 16}),
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
    ("mistral", {}),
    ("mistral", {"sliding_window": 7, "head_dim": 6, "n_kv_head": 1}),
    ("mistral", {"sliding_window": 30, "n_head": 6, "n_kv_head": 3, "head_dim": 8}),
    ("qwen2", {"n_kv_head": 1, "rope_theta": 1e6}),
    ("qwen2", {"n_kv_head": 4, "tie_word_embeddings": False, "norm_eps": 1e-6}),
    ("qwen3", {"n_kv_head": 1, "rope_theta": 1e6}),
    ("qwen3", {"n_kv_head": 3, "n_head": 6, "head_dim": 10, "norm_eps": 1e-3}),
]
CLASSES = {
    "llama3": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@pytest.mark.parametrize("stage, sizes", OURS)
def test_what_is_exported_is_the_same_function_in_stock_transformers(run_export, stage, sizes):
    ours = make_run("run", stage, "".join(map(chr, range(97, 158))), **sizes)
    assert run_export("--run", "run", "--to", "hf", "--out", "out") == 0
    theirs, report = AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    assert type(theirs).__name__ == CLASSES[stage] and not any(report.values()), report
    assert_same_function(ours, theirs)


@pytest.mark.parametrize("stage", ["llama3", "mistral", "qwen2"])
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
        ({"rope_type": "linear"}, "must have factor above 0 for rope_type linear, not None"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling must be None for rope_type default, not"),
        ({"rope_type": "linear", "rope_scaling": {"factor": -2.0}}, "linear, not {'factor': -2.0}"),
        ({"rope_type": "linear", "rope_scaling": {"factor": math.nan}}, "linear, not {'factor': nan}"),
        ({"rope_type": "llama3", "rope_scaling": {"factor": 2.0}}, "must have factor, high_freq_factor"),
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


# mistral


@pytest.mark.parametrize("window", [1, 2, 5, 16, 23, 60, 61])
@pytest.mark.parametrize(
    "parts", [[60], [1] * 60, [59, 1], [7, 1, 20, 2, 30], [3, 57], [16, 16, 28]], ids=str
)
def test_the_ring_equals_no_cache_however_the_text_is_split(window, parts):
    model, idx = make(MISTRAL, sliding_window=window), tokens()
    cache = model.new_cache(2, LONG)
    for _ in range(2):  # the second time there is something in the ring
        cache.length = 0
        made = [model(part, cache=cache)[0] for part in idx.split(parts, dim=1)]
        torch.testing.assert_close(torch.cat(made, dim=1), model(idx)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [1, 4, 10])
def test_a_layer_sees_the_window_and_two_layers_see_further(window):
    idx = tokens(24)
    changed = idx.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 61
    for n_layer in (1, 2):
        model = make(MISTRAL, sliding_window=window, n_layer=n_layer)
        differs = (model(idx)[0] != model(changed)[0]).any(-1).any(0)  # by position
        reach = 1 + n_layer * (window - 1)
        assert differs.nonzero().flatten().tolist() == list(range(5, min(5 + reach, 24)))


def test_the_memory_of_the_ring_is_bounded_by_the_window():
    model = make(MISTRAL, sliding_window=8)
    sizes = [model.new_cache(1, length).nbytes for length in (4, 8, 9, 10_000)]
    assert sizes[0] * 2 == sizes[1] == sizes[2] == sizes[3]
    assert make(MISTRAL).new_cache(1, 100).nbytes == make(STAGE5).new_cache(1, 100).nbytes


@pytest.mark.parametrize("prompt_length", [1, 7, 8, 30])
@pytest.mark.parametrize("compiled", [False, True])
def test_text_beyond_the_window_is_that_of_transformers(prompt_length, compiled, monkeypatch):
    """Also with static shapes; the compiler itself changes the speed alone."""
    monkeypatch.setattr(torch, "compile", lambda **_: lambda function: function)
    theirs = mistral(max_position_embeddings=LONG)
    ours = MISTRAL.GPT(
        MISTRAL.GPTConfig(
            **SIZES | {"block_size": LONG},
            sliding_window=8,
            intermediate_size=50,
            norm_eps=1e-6,
            tie_word_embeddings=False,
        )
    )
    ours.load_state_dict(theirs.state_dict())
    prompt = tokens()[:1, :prompt_length]
    expected = theirs.generate(prompt, max_length=LONG, do_sample=False)[0, prompt_length:].tolist()
    step = CompiledStep(ours) if compiled else None
    made = list(generation.generate(ours, prompt[0].tolist(), LONG - prompt_length, 61, 0.0, step=step))
    assert made == expected and len(set(made)) > 5


def test_text_goes_on_past_the_context_with_a_ring(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda **_: lambda function: function)
    model = make(MISTRAL, sliding_window=5)
    made = [
        list(generation.generate(model, [1, 2, 3], 90, 61, 0.0, step=step))
        for step in (None, CompiledStep(model))
    ]
    window = [1, 2, 3]
    for token in made[0]:
        assert model(torch.tensor([window]))[0][0, -1].argmax() == token
        window = [*window, token]
        window = window[-12:] if len(window) > 24 else window
    assert made[0] == made[1]


@pytest.mark.parametrize("window", [0, -3])
def test_a_window_without_positions_is_refused(window):
    with pytest.raises(ValueError, match=f"sliding_window must be at least 1 or None, not {window}"):
        MISTRAL.GPTConfig(**SIZES, sliding_window=window)


def test_a_missing_window_is_that_of_transformers_and_none_is_none(run_import, capsys):
    save_theirs(mistral(head_dim=16), "theirs")
    edit_config("theirs", sliding_window=None)  # removes the field
    assert run_import("theirs", "--out", "run") == 0
    assert runs.read_config(Path("run"))["model"]["sliding_window"] == 4096
    path = Path("theirs/config.json")
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"sliding_window": None, "eos_token_id": [1, 2]})
    )
    assert run_import("theirs", "--out", "again") == 0
    assert runs.read_config(Path("again"))["model"]["sliding_window"] is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sliding_window": 0}, "sliding_window = 0"),
        ({"sliding_window": "wide"}, 'sliding_window = "wide"'),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "mistral cannot represent that"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"hidden_act": "gelu"}, 'hidden_act = "gelu"'),
        ({"num_key_value_heads": None}, "n_kv_head (8)"),  # the default of transformers
    ],
)
def test_a_mistral_that_cannot_be_represented_is_refused_by_name(run_import, capsys, changes, message):
    save_theirs(mistral(), "theirs")
    edit_config("theirs", **changes)
    assert run_import("theirs", "--out", "out") == 2
    explained(capsys, message)


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
