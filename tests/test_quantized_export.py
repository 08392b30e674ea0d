"""Quantized runs for transformers (compressed-tensors) and llama.cpp (GGUF), with our own codes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_deploy import CPU, run_export  # noqa: F401  a fixture
from test_gguf import CHARACTERS, CONTEXT, KINDS, PROMPT, LlamaCpp, choices, make_run, run_gguf  # noqa: F401
from test_quantized_storage import rounded
from transformers import AutoModelForCausalLM

from data.tokenizers import CharTokenizer
from deploy.gguf_file import GGUFFile
from deploy.quantization import storage
from deploy.quantization.linear import QuantizedLinear, replace
from lab.storage import runs


def make_quantized(stage, bits=4, group_size=32, head=False, seed=0, symmetric=False, **sizes):
    """Writes a run "run" and its quantized copy "quantized"; returns the quantized model in float32."""
    model = make_run("run", stage, seed, **sizes)
    replace(model, rounded(model, bits, group_size, head, symmetric=symmetric))
    Path("quantized").mkdir()
    storage.save(Path("quantized"), Path("run"), model, {"method": "rtn"})
    return runs.load(Path("quantized"), "last", CPU)[0]


def logits_of(model, n=12):
    torch.manual_seed(1)
    idx = torch.randint(0, len(CHARACTERS), (2, n))
    with torch.no_grad():
        out = model(idx)
    return (out[0] if isinstance(out, tuple) else out.logits)[..., : len(CHARACTERS)]


def dequantized(model):
    """The weights of quantized layers by name."""
    modules = model.named_modules()
    return {
        f"{name}.weight": module.weight for name, module in modules if isinstance(module, QuantizedLinear)
    }


@pytest.mark.parametrize(
    "stage, bits, group_size, sizes",
    [
        ("stage4_gqa", 4, 32, {"n_kv_head": 2, "intermediate_size": 96}),
        ("stage3_swiglu", 4, 64, {"tie_word_embeddings": True}),  # down_proj has rows of 176
        ("llama3", 8, 32, {"n_kv_head": 2, "head_dim": 32}),
        ("qwen3", 4, None, {"n_kv_head": 2, "head_dim": 32}),
        ("qwen2", 8, None, {"n_kv_head": 2, "tie_word_embeddings": True}),
        ("gpt_neox", 4, 32, {}),
    ],
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_transformers_computes_with_exactly_our_weights(
    run_export,  # noqa: F811
    stage,
    bits,
    group_size,
    sizes,
    symmetric,
):
    pytest.importorskip("compressed_tensors", reason="it comes with pip install compressed-tensors")
    ours = make_quantized(stage, bits, group_size, head=True, symmetric=symmetric, **sizes)
    assert run_export("--run", "quantized", "--to", "hf", "--out", "theirs") == 0
    theirs = AutoModelForCausalLM.from_pretrained("theirs").eval()
    torch.testing.assert_close(logits_of(theirs), logits_of(ours), atol=1e-5, rtol=0)
    config = json.loads(Path("theirs/config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["symmetric"] == (symmetric or bits == 8)
    if stage != "gpt_neox":  # it joins q, k and v
        expected, found = dequantized(ours), dict(theirs.named_parameters())
        assert [
            name for name in expected if name in found and not torch.equal(found[name], expected[name])
        ] == []


@pytest.mark.parametrize(
    "kind, head",
    [(kind, True) for kind, (_, sizes, back) in KINDS.items() if back and sizes.get("n_layer") != 27]
    + [("llama", False), ("llama with groups", False)],
)
def test_a_quantized_run_comes_back_from_gguf(run_export, run_gguf, kind, head):  # noqa: F811
    """As floating-point numbers, equal to ours but for Q4_1's -scale * zero in float16."""
    stage, sizes, _ = KINDS[kind]
    ours = make_quantized(stage, head=head, **sizes)
    assert run_export("--run", "quantized", "--to", "gguf", "--out", "run.gguf") == 0
    assert run_gguf("run.gguf", "--out", "back") == 0
    back, _ = runs.load(Path("back"), "last", CPU)
    ours, back = logits_of(ours), logits_of(back)
    assert (ours - back).abs().max() < 1e-3 * ours.abs().max()


@pytest.mark.parametrize(
    "bits, symmetric, kind, group_size",
    [(4, False, "Q4_1", 64), (4, True, "Q4_0", 128), (8, True, "Q8_0", 32)],
)
def test_gguf_has_the_bytes_of_our_grid(run_export, capsys, bits, symmetric, kind, group_size):  # noqa: F811
    """A group of 64 or 128 is several blocks with the same scale. Without a zero, the numbers are equal."""
    sizes = {"n_embd": 128, "intermediate_size": 256}
    ours = make_quantized("stage3_swiglu", bits, group_size, symmetric=symmetric, **sizes)
    assert run_export("--run", "quantized", "--to", "gguf", "--out", "run.gguf") == 0
    assert f"as {kind.lower()}" in capsys.readouterr().out
    file = GGUFFile(Path("run.gguf"))
    for theirs, name in (("ffn_down", "mlp.down_proj"), ("attn_v", "self_attn.v_proj")):
        assert file.tensors[f"blk.1.{theirs}.weight"].kind == kind
        weight = ours.get_submodule(f"model.layers.1.{name}").weight
        found = file.tensor(f"blk.1.{theirs}.weight")
        if kind == "Q4_1":
            torch.testing.assert_close(found, weight, atol=2e-3 * weight.abs().max().item(), rtol=0)
        else:
            assert torch.equal(found, weight)


@pytest.mark.parametrize("bits, symmetric, kind", [(4, False, "Q4_1"), (4, True, "Q4_0"), (8, True, "Q8_0")])
def test_transformers_reads_our_logits_from_gguf(run_export, bits, symmetric, kind):  # noqa: F811
    """It dequantizes the file and multiplies in float32, which llama.cpp does not.

    The numbers of Q4_0 and Q8_0 are ours. Q4_1 rounds -scale * zero to float16: 1e-3 of the largest logit.
    """
    pytest.importorskip("accelerate")
    sizes = {"n_kv_head": 2, "intermediate_size": 192}
    ours = make_quantized("stage4_gqa", bits, 64, head=True, seed=3, symmetric=symmetric, **sizes)
    assert run_export("--run", "quantized", "--to", "gguf", "--out", "run.gguf") == 0
    assert GGUFFile(Path("run.gguf")).tensors["blk.0.ffn_down.weight"].kind == kind
    theirs = AutoModelForCausalLM.from_pretrained(".", gguf_file="run.gguf", dtype=torch.float32).eval()
    expected = logits_of(ours)
    tolerance = 1e-3 * expected.abs().max().item() if kind == "Q4_1" else 1e-4
    torch.testing.assert_close(logits_of(theirs), expected, atol=tolerance, rtol=0)


def test_rows_that_blocks_do_not_divide_are_written_as_numbers(run_export, capsys):  # noqa: F811
    make_quantized("stage3_swiglu")  # intermediate_size 176 = 5.5 · 32
    assert run_export("--run", "quantized", "--to", "gguf", "--out", "run.gguf") == 0
    file = GGUFFile(Path("run.gguf"))
    assert file.tensors["blk.0.ffn_down.weight"].kind == "F32"
    assert file.tensors["blk.0.ffn_up.weight"].kind == "Q4_1"
    assert "written as f32, because no blocks of 32" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["llama with groups", "mixtral"])
def test_llama_cpp_computes_with_our_codes(run_export, kind):  # noqa: F811
    """It rounds each product's inputs to 8 bits, which moves log-probabilities by a few hundredths."""
    stage, sizes, _ = KINDS[kind]
    ours = make_quantized(stage, head=True, seed=3, **sizes | {"intermediate_size": 192})
    tokenizer = CharTokenizer(CHARACTERS)
    tokens = tokenizer.encode(PROMPT).tolist()
    expected, log_probabilities, _ = choices(ours, tokens, 8, tokenizer.vocab_size)
    assert run_export("--run", "quantized", "--to", "gguf", "--out", "run.gguf") == 0
    theirs, their_log_probabilities, _ = LlamaCpp("run.gguf").choices(PROMPT, 8)
    assert theirs == expected
    np.testing.assert_allclose(their_log_probabilities, log_probabilities, atol=0.1)


@pytest.mark.parametrize(
    "stage, bits, flags, said",
    [
        ("stage4_gqa", 3, ["--to", "hf"], "has 3 bits, which compressed-tensors cannot hold"),
        ("stage4_gqa", 2, ["--to", "gguf"], "has 2 bits, which GGUF cannot hold"),
        ("stage4_gqa", 4, ["--to", "gguf", "--outtype", "q8_0"], "leave --outtype out"),
        ("stage3_swiglu", 4, ["--to", "llama2c"], "cannot be exported to llama2.c"),
        ("stage0_gpt", 4, ["--to", "hf"], "cannot be exported to transformers: its GPT-2"),
        ("qwen3_moe", 4, ["--to", "hf"], "transformers stacks experts"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(run_export, capsys, stage, bits, flags, said):  # noqa: F811
    sizes = {"router": "softmax", "n_shared_experts": 0} if stage == "qwen3_moe" else {}
    make_quantized(stage, bits, **sizes)
    out = "out.gguf" if "gguf" in flags else "out"
    assert run_export("--run", "quantized", *flags, "--out", out) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") <= 3
    assert not Path(out).exists()
