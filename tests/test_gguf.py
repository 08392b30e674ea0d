"""Runs to GGUF and back; llama.cpp, the package gguf and transformers read the same from the files.

The tests with llama.cpp need the package xllamacpp, which has wheels for most systems but not for all.
"""

import json
import os
import random
import re
import struct
import subprocess
import sys
import unicodedata
import urllib.request
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from conftest import call
from test_data import gpt2_files  # noqa: F401  a fixture: GPT-2's vocabulary, through pip
from test_deploy import CPU, assert_same_tensors, explained, llama, run_export, run_import
from test_published_configs import PUBLISHED, published, shrunk
from transformers import AutoModelForCausalLM

from data import files
from data.tokenizers import CharTokenizer
from deploy import gguf_tokenizer, import_gguf
from deploy.gguf_file import GGUFFile
from lab import stages
from lab.sampling import generation
from lab.storage import checkpoint, edits, runs

__all__ = ["run_export", "run_import"]  # fixtures

ROOT = Path(__file__).parent.parent
CHARACTERS = "\n !\\abcdefghijklmnopqrstuvwxyzABC.\té中😀"
PROMPT = "the quick\nfox é中!😀 \\ABC"
CONTEXT = 96
BROAD = [
    "Hello  world\n\n\n\tthe quick 12345 6.78e-9 don't I'LL we've",
    "é 中文字 😀👩‍👩‍👧 a\u200bb ß ſ İ ½ Ⅷ ²",
    "   leading and trailing   ",
    "\r\n a\r\nb\n",
    "def f(x):\n    return x**2  # ok",
    "ab" * 30 + " " * 20 + "z",
    "_-_--==>> !!?? 'S 's <|end|> <s>x</s>",
    "\u00a0nbsp\u3000עברית العربية हिन्दी",
]


@pytest.fixture
def run_gguf(workshop, monkeypatch):
    """run_gguf(*flags): calls deploy.import_gguf; returns the exit status."""
    return lambda *flags: call(monkeypatch, import_gguf, *flags)


def make_run(folder, stage, seed=0, **sizes) -> torch.nn.Module:
    """Writes a run of the stage with random weights and a character tokenizer; returns the model.

    Its vocabulary has rows that no character has. Its logits are peaked, so that greedy choices are clear.
    """
    sizes = {"vocab_size": 64, "block_size": CONTEXT, "n_layer": 2, "n_head": 4, "n_embd": 64} | sizes
    sizes = {"tie_word_embeddings": False} | sizes
    module, tokenizer = stages.load(stage), CharTokenizer(CHARACTERS)
    torch.manual_seed(seed)
    model = module.GPT(module.GPTConfig(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 4
            else:
                parameter += 0.1 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer += 0.05 * torch.randn_like(buffer)
    folder = Path(folder)
    folder.mkdir(parents=True)
    checkpoint.save(folder, "last", model, {"stage": stage, "step": "1"})
    meta = {"tokenizer": "char", "characters": tokenizer.characters, "vocab_size": tokenizer.vocab_size}
    runs.write_json(folder / "meta.json", meta)
    config = {"stage": stage, "code": edits.code_hash(stage), "model": vars(model.config)}
    runs.write_json(folder / "config.json", config)
    return model


@torch.no_grad()
def choices(model, tokens: list[int], n: int, vocab_size: int) -> tuple[list[int], list[float], float]:
    """n greedy tokens as sample.py chooses them, their log-probabilities, and the least lead of any."""
    new = list(generation.generate(model, tokens, n, vocab_size, temperature=0))
    logits = model(torch.tensor([tokens + new]))[0][0, len(tokens) - 1 : -1, :vocab_size].log_softmax(-1)
    best = logits.topk(2).values
    return new, logits.gather(1, torch.tensor(new)[:, None]).flatten().tolist(), min(best[:, 0] - best[:, 1])


class LlamaCpp:
    """llama.cpp with a model, on this machine's CPU."""

    def __init__(self, path, context=CONTEXT):
        xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp comes with pip install xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(path), context, 1
        params.warmup, params.cpuparams.n_threads, params.verbosity = False, 1, -1
        params.cache_type_k = params.cache_type_v = 0  # float32
        self.server = xllamacpp.Server(params)

    def choices(self, prompt: str, n: int) -> tuple[list[int], list[float], int]:
        """n greedy tokens, their log-probabilities, and the number of tokens of the prompt."""
        flags = {"temperature": 0, "logprobs": 1, "ignore_eos": True, "cache_prompt": False}
        answer = self.server.handle_completions({"prompt": prompt, "max_tokens": n} | flags)
        tokens = answer["choices"][0]["logprobs"]["content"]
        n_prompt = answer["usage"]["prompt_tokens"]
        return [token["id"] for token in tokens], [token["logprob"] for token in tokens], n_prompt

    def encode(self, text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        request = urllib.request.Request(
            f"{self.server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        return json.load(urllib.request.urlopen(request))["tokens"]


MOE = {"n_routed_experts": 4, "n_shared_experts": 0, "router": "softmax", "num_experts_per_tok": 2}
MLA = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
MLA |= {"n_routed_experts": 4}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32.0, "beta_slow": 1.0}
YARN |= {"mscale": 0.707, "mscale_all_dim": 0.707}
SMALL_27 = {"n_layer": 27, "n_head": 2, "n_embd": 32, "n_routed_experts": 2}  # as many layers as V2-Lite

# Our stage, its sizes, and the stage that the file is read as.
KINDS = {
    "gpt2": ("stage0_gpt", {"tie_word_embeddings": True}, "stage0_gpt"),
    "gpt2 without biases": ("stage0_gpt", {"bias": False}, "stage0_gpt"),
    "llama": ("stage3_swiglu", {"tie_word_embeddings": True}, "stage5_flash"),
    "llama with groups": ("stage4_gqa", {"n_kv_head": 2}, "stage5_flash"),
    "llama from stage 5": ("stage5_flash", {"n_kv_head": 1}, "stage5_flash"),
    "mixtral": ("stage6_moe", MOE | {"n_kv_head": 2, "moe_intermediate_size": 96}, "stage6_moe"),
    "sigmoid and a shared expert": ("stage6_moe", {"n_kv_head": 2}, None),  # as glm4moe, which we do not read
    "softmax and shared experts": (
        "stage6_moe",
        {"router": "softmax", "n_shared_experts": 2, "routed_scaling_factor": 2.0},
        None,
    ),
    "dense layers first": ("stage6_moe", {"first_k_dense_replace": 1, "num_experts_per_tok": 1}, None),
    "wide heads": ("llama3", {"n_kv_head": 2, "head_dim": 32}, "llama3"),
    "llama 3.1": ("llama3", {"rope_type": "llama3", "rope_scaling": LLAMA3}, "llama3"),
    "linear": ("llama3", {"rope_type": "linear", "rope_scaling": {"factor": 2.0}}, "llama3"),
    "mistral": ("mistral", {"sliding_window": CONTEXT, "head_dim": 32}, "llama3"),
    "qwen2": ("qwen2", {"n_kv_head": 2, "tie_word_embeddings": True}, "qwen2"),
    "qwen3": ("qwen3", {"n_kv_head": 2, "head_dim": 32}, "qwen3"),
    "qwen3_moe": ("qwen3_moe", MOE | {"head_dim": 32, "moe_intermediate_size": 96}, "qwen3_moe"),
    "gpt_neox": ("gpt_neox", {}, "gpt_neox"),
    "gpt_neox in sequence": (
        "gpt_neox",
        {"use_parallel_residual": False, "hidden_act": "gelu_fast", "rotary_pct": 0.5},
        "gpt_neox",
    ),
    "deepseek_v2": ("deepseek_v2", MLA | {"first_k_dense_replace": 1, "rope_scaling": YARN}, "deepseek_v2"),
    "deepseek_v2 lite": ("deepseek_v2", SMALL_27, "deepseek_v2"),
    "deepseek_v3": ("deepseek_v3", MLA | {"tie_word_embeddings": True}, "deepseek_v3"),
    "deepseek_v3 with groups": (
        "deepseek_v3",
        MLA | {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 0},
        "deepseek_v3",
    ),
    "latent attention": ("stage7a_mla", SMALL_27, "stage7_mla_mtp"),
}

# Of models whose greedy choices are clear, where it is not 0.
SEEDS = {"gpt2": 4, "gpt2 without biases": 9, "llama from stage 5": 9, "mixtral": 13, "wide heads": 9}
SEEDS |= {"llama 3.1": 4, "linear": 11, "mistral": 9, "qwen3": 14, "qwen3_moe": 3, "gpt_neox": 1}
SEEDS |= {"gpt_neox in sequence": 16, "deepseek_v2 lite": 7, "deepseek_v3 with groups": 3}
SEEDS |= {"sigmoid and a shared expert": 3, "softmax and shared experts": 3, "dense layers first": 4}
SEEDS |= {"latent attention": 3, "llama": 39, "deepseek_v3": 39}


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_continues_a_text_as_sample_does(run_export, kind):
    """60 greedy tokens, each with our log-probability; the characters of the prompt have our ids."""
    stage, sizes, _ = KINDS[kind]
    tokenizer = CharTokenizer(CHARACTERS)
    tokens = tokenizer.encode(PROMPT).tolist()
    model = make_run("run", stage, SEEDS.get(kind, 0), **sizes)
    ours, log_probabilities, lead = choices(model, tokens, 60, tokenizer.vocab_size)
    assert lead > 0.003  # no choice is so close that rounding could decide it
    assert run_export("--run", "run", "--to", "gguf", "--out", "run.gguf") == 0
    program = LlamaCpp("run.gguf")
    theirs, their_log_probabilities, n_prompt = program.choices(PROMPT, 60)
    assert theirs == ours and n_prompt == len(tokens)
    np.testing.assert_allclose(their_log_probabilities, log_probabilities, atol=0.01)
    assert program.encode(CHARACTERS) == tokenizer.encode(CHARACTERS).tolist()


@pytest.mark.parametrize("kind", [kind for kind, (_, _, back) in KINDS.items() if back])
def test_a_run_comes_back_from_gguf(run_export, run_gguf, kind):
    """With the same weights and logits; without what GGUF does not have: padding, dropout, MTP."""
    stage, sizes, back = KINDS[kind]
    model, n = make_run("run", stage, **sizes), len(CHARACTERS)
    assert run_export("--run", "run", "--to", "gguf", "--out", "run.gguf") == 0
    assert run_gguf("run.gguf", "--out", "back") == 0
    found, config = runs.load(Path("back"), "last", CPU)
    assert config["stage"] == back and runs.tokenizer(Path("back")).characters == "".join(sorted(CHARACTERS))
    expected = checkpoint.weights(model)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in expected:
            expected[name] = expected[name][:n]
    actual = {name: tensor for name, tensor in checkpoint.weights(found).items() if name in expected}
    kept = [name for name in expected if not name.startswith(f"model.layers.{model.config.n_layer}.")]
    assert_same_tensors(actual, {name: expected[name] for name in kept})
    idx = torch.randint(n, (2, CONTEXT))
    with torch.no_grad():
        torch.testing.assert_close(found(idx)[0], model(idx)[0][..., :n], atol=5e-6, rtol=0)


NOT_IN_GGUF = {"DeepSeek-V2": "n_group = 8", "DeepSeek-V2-Lite": "26 or 27", "Moonlight-16B-A3B": "26 or 27"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_with_a_published_config_comes_back_from_gguf(run_import, run_export, run_gguf, capsys, name):
    """Shrunk, so that those with 27 layers have 2."""
    published(shrunk(PUBLISHED[name][1]))
    assert run_import("theirs", "--out", "run") == 0
    status = run_export("--run", "run", "--to", "gguf", "--out", "run.gguf")
    if name in NOT_IN_GGUF:
        assert status == 2 and NOT_IN_GGUF[name] in capsys.readouterr().err
        return
    assert run_gguf("run.gguf", "--out", "back") == 0
    ours, back = (runs.load(Path(run), "last", CPU)[0] for run in ("run", "back"))
    idx = torch.randint(back.config.vocab_size, (2, min(ours.config.block_size, back.config.block_size)))
    with torch.no_grad():
        torch.testing.assert_close(back(idx)[0], ours(idx)[0], atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "stage, sizes, message",
    [
        ("stage1_rmsnorm", {}, "RMSNorm together with learned positions"),
        ("stage2_rope", {}, "MLP without a gate"),
        ("stage6_moe", {"n_shared_experts": 0}, "shared experts"),
        ("stage6_moe", MOE | {"num_experts_per_tok": 1}, "of 2 or more"),
        ("qwen3_moe", MOE | {"n_shared_experts": 1}, "transformers"),
        ("stage7a_mla", {}, "q_lora_rank"),
        ("stage7_mla_mtp", {}, "q_lora_rank"),
        ("llama3", {"rope_type": "dynamic", "rope_scaling": {"factor": 2.0}}, "rope_type = dynamic"),
        ("deepseek_v3", MLA | {"rope_scaling": YARN | {"mscale": 1.0}}, "mscale"),
        ("deepseek_v2", MLA | {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}, "n_group = 4"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused_with_the_reason(run_export, capsys, stage, sizes, message):
    make_run("run", stage, **sizes)
    assert run_export("--run", "run", "--to", "gguf", "--out", "out") == 2  # no file of that name is made
    explained(capsys, message if "stage1" in stage or "stage2" in stage else ".gguf")
    assert run_export("--run", "run", "--to", "gguf", "--out", "out.gguf") == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-2 if "\nexport" in error or "\ntrain" in error else -1]
    assert not Path("out.gguf").exists() and not list(Path().glob(".partial-*"))


def test_an_existing_file_is_not_overwritten(run_export, capsys):
    make_run("run", "stage4_gqa")
    Path("run.gguf").write_text("mine")
    assert run_export("--run", "run", "--to", "gguf", "--out", "run.gguf") == 2
    explained(capsys, "run.gguf exists")
    assert Path("run.gguf").read_text() == "mine"


def test_a_full_disk_leaves_no_file(run_export, capsys, monkeypatch):
    def full(*_):
        raise OSError("4096 requested and 0 written")  # as numpy says it

    make_run("run", "stage4_gqa")
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    assert run_export("--run", "run", "--to", "gguf", "--out", "run.gguf") == 2
    explained(capsys, "cannot write run.gguf: 4096 requested and 0 written")
    assert not Path("run.gguf").exists()


def test_a_sliding_window_shorter_than_the_context_is_said(run_export, capsys):
    make_run("run", "mistral", sliding_window=64)
    assert run_export("--run", "run", "--to", "gguf", "--out", "run.gguf") == 0
    assert "64 instead of 96" in capsys.readouterr().err
    assert GGUFFile(Path("run.gguf")).metadata["llama.context_length"] == 64


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0", "q4_0"])
def test_matrices_have_the_type_that_was_asked_for(run_export, run_gguf, outtype):
    """Others stay: vectors, the router, and rows not divisible by 32. The package gguf reads our numbers."""
    sizes = {"intermediate_size": 80, "moe_intermediate_size": 80}
    model = make_run("run", "stage6_moe", **MOE | sizes)
    assert run_export("--run", "run", "--to", "gguf", "--out", "run.gguf", "--outtype", outtype) == 0
    quantized = outtype.startswith("q")
    ends = {
        "norm.weight": "F32",
        "ffn_gate_inp.weight": "F32",
        "ffn_down_exps.weight": "F16" if quantized else outtype.upper(),
        "token_embd.weight": "Q8_0" if quantized else outtype.upper(),
        "attn_q.weight": outtype.upper(),
        "ffn_up_exps.weight": outtype.upper(),
    }
    reader, file = gguf.GGUFReader("run.gguf"), GGUFFile(Path("run.gguf"))
    for tensor in reader.tensors:
        for end, kind in ends.items():
            if tensor.name.endswith(end):
                assert tensor.tensor_type.name == kind, tensor.name
        theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(file.tensor(tensor.name).float().numpy(), theirs)
    assert run_gguf("run.gguf", "--out", "back") == 0
    found, config = runs.load(Path("back"), "last", CPU)
    dtype = {"f16": "float16", "bf16": "bfloat16"}.get(outtype, "float32")
    assert config["weights_dtype"] == dtype and next(found.parameters()).dtype == getattr(torch, dtype)
    error = found.lm_head.weight.float() - model.lm_head.weight[: len(CHARACTERS)]
    assert error.abs().max() < 0.01 * model.lm_head.weight.abs().max()
    if quantized:
        LlamaCpp("run.gguf").choices("a", 5)


def test_numbers_too_large_for_float16_are_refused(run_export, capsys):
    model = make_run("run", "stage4_gqa")
    model.lm_head.weight.data[0, 0] = 1e5
    checkpoint.save(Path("run"), "last", model, {"stage": "stage4_gqa", "step": "1"})
    assert run_export("--run", "run", "--to", "gguf", "--out", "run.gguf", "--outtype", "f16") == 2
    explained(capsys, "output.weight", "bf16")
    assert not Path("run.gguf").exists()


@pytest.mark.parametrize(
    "kind, more",  # transformers 5 ignores the context of GPT-2 and the width of Qwen3's heads
    [("gpt2", {"block_size": 1024}), ("llama with groups", {}), ("qwen2", {}), ("qwen3", {"head_dim": 128})],
)
def test_transformers_reads_our_model_from_gguf(run_export, kind, more):
    pytest.importorskip("accelerate")
    stage, sizes, _ = KINDS[kind]
    model, n = make_run("run", stage, **sizes | more), len(CHARACTERS)
    assert run_export("--run", "run", "--to", "gguf", "--out", "folder/run.gguf") == 0
    theirs = AutoModelForCausalLM.from_pretrained("folder", gguf_file="run.gguf", dtype=torch.float32).eval()
    idx = torch.randint(n, (2, CONTEXT))
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, model(idx)[0][..., :n], atol=2e-4, rtol=0)


# Tokenizers


def trained(pre: str):
    """A small byte-level BPE tokenizer that splits as tokenizer.ggml.pre says, with special tokens."""
    steps, normalizer, ignore_merges = gguf_tokenizer.PRE[pre]
    empty = gguf_tokenizer.bpe({}, [], ignore_merges=ignore_merges)
    empty |= {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "normalizer": normalizer}
    empty["decoder"] = gguf_tokenizer.byte_level(True)
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(empty))
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<|end|>", "<pad>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=special
    )
    text = [(ROOT / name).read_text() for name in ("README.md", "sample.py")] + BROAD * 3
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_tokens(["<think>"])  # an added token that is not special
    return tokenizer


def sentencepiece(prefix: bool):
    """A small tokenizer like Llama 2's: merges ordered by token, and a token for each byte."""
    words = re.findall(r"[A-Za-z]+", (ROOT / "README.md").read_text())[:400]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts = dict.fromkeys("▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.é中'")
    for word in words:
        for end in range(2, 6):
            texts |= dict.fromkeys((word[:end], "▁" + word[:end]))
    vocab = {text: i for i, text in enumerate([*pieces, *texts])}
    scores = [0.0] * len(pieces) + [-float(i) for i in range(len(texts))]
    merges = gguf_tokenizer.merges_by_score({text: vocab[text] for text in texts}, scores)
    made = gguf_tokenizer.bpe(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    made |= {"normalizer": gguf_tokenizer.spaces(prefix), "decoder": gguf_tokenizer.spaces_back(prefix)}
    made["post_processor"] = gguf_tokenizer.around(["<s>"], [], vocab)
    made["added_tokens"] = [
        {"id": i, "content": pieces[i], "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i in range(3)
    ]
    return tokenizers.Tokenizer.from_str(json.dumps(made))


def import_with_tokenizer(run_import, tokenizer, run, **config):
    """A run of a tiny Llama with this tokenizer."""
    folder = Path(f"{run}-hf")
    llama(vocab_size=tokenizer.get_vocab_size() + 3).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert run_import(folder, "--out", run) == 0


def texts() -> list[str]:
    """BROAD, and random texts of characters at which tokenizers differ."""
    draw = random.Random(0)
    alphabet = "aZ09 .,'\n\t é中ß½ Ⅷ_<|>\r#"
    return BROAD + ["".join(draw.choices(alphabet, k=50)) for _ in range(40)]


FIRST_NAMES = {json.dumps(rules): name for name, rules in reversed(gguf_tokenizer.PRE.items())}.values()


@pytest.mark.parametrize("name", [*FIRST_NAMES, "with space", "without space"])
def test_tokenizers_give_the_same_ids_in_llama_cpp_and_when_they_come_back(
    run_import, run_export, run_gguf, name
):
    if name.endswith("space"):
        tokenizer = sentencepiece(name == "with space")
        config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    else:
        tokenizer, config = trained(name), {"bos_token": "<s>", "eos_token": "<|end|>", "pad_token": "<pad>"}
    import_with_tokenizer(run_import, tokenizer, "run", **config)
    assert run_export("--run", "run", "--to", "gguf", "--out", "run.gguf") == 0
    metadata = GGUFFile(Path("run.gguf")).metadata
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"
    assert metadata["tokenizer.ggml.pre"] == (name if " " not in name else "default")
    assert run_gguf("run.gguf", "--out", "back") == 0
    ours, back, program = runs.tokenizer(Path("run")), runs.tokenizer(Path("back")), LlamaCpp("run.gguf", 24)
    for text in texts():
        expected = ours.encode(text).tolist()
        assert back.encode(text).tolist() == expected, text
        assert back.decode(expected) == ours.decode(expected)
        if unicodedata.is_normalized("NFC", text):  # llama.cpp does not normalize a text
            assert program.encode(text) == expected, text
    assert (Path("back") / "chat_template.jinja").read_text() == "{{ messages }}"
    described = json.loads((Path("back") / "tokenizer_config.json").read_text())
    assert {key: described.get(key) for key in config} == config
    assert json.loads((Path("back") / "hf_config.json").read_text())["eos_token_id"] == tokenizer.token_to_id(
        config["eos_token"]
    )


def test_a_run_with_the_tokenizer_of_gpt2_has_its_ids_in_llama_cpp(run_export, run_gguf, gpt2_files):  # noqa: F811
    for name, content in gpt2_files.items():
        files.write(files.root() / "cache" / name, content)
    make_run("run", "stage0_gpt", vocab_size=50304, n_embd=16, n_head=2)
    runs.write_json(Path("run/meta.json"), {"tokenizer": "gpt2", "vocab_size": 50257})
    assert run_export("--run", "run", "--to", "gguf", "--out", "run.gguf") == 0
    assert run_gguf("run.gguf", "--out", "back") == 0
    assert runs.read_meta(Path("back"))["tokenizer"] == "gpt2"
    ours, back, program = runs.tokenizer(Path("run")), runs.tokenizer(Path("back")), LlamaCpp("run.gguf")
    for text in texts():
        expected = ours.encode(text).tolist()
        assert back.encode(text).tolist() == expected and program.encode(text) == expected


LLAMA_BPE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
LLAMA_BPE += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
DEEPSEEK = "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
DEEPSEEK += "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
LATER = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
PUBLISHED_SPLITTERS = {
    "llama-bpe": ([LLAMA_BPE], None, True),
    "qwen2": ([LLAMA_BPE.replace("{1,3}", "")], {"type": "NFC"}, False),
    "deepseek-v3": ([r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", DEEPSEEK], None, False),
}


@pytest.mark.parametrize("name", PUBLISHED_SPLITTERS)
def test_published_tokenizers_are_recognized(name):
    patterns, normalizer, ignore_merges = PUBLISHED_SPLITTERS[name]
    steps = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    described = {"normalizer": normalizer, "model": {"ignore_merges": ignore_merges}}
    described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, LATER]}
    assert gguf_tokenizer.pre_of(described) == name


def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(run_import, run_export, capsys):
    tokenizer = trained("gpt-2")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Punctuation(), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    import_with_tokenizer(run_import, tokenizer, "run", eos_token="<|end|>")
    capsys.readouterr()
    assert run_export("--run", "run", "--to", "gguf", "--out", "run.gguf") == 2
    explained(capsys, "tokenizer.ggml.pre", "Punctuation")


def test_a_merge_order_that_is_not_by_token_is_refused(run_import, run_export, capsys):
    described = json.loads(sentencepiece(True).to_str())
    random.Random(0).shuffle(described["model"]["merges"])
    import_with_tokenizer(run_import, tokenizers.Tokenizer.from_str(json.dumps(described)), "run")
    capsys.readouterr()
    assert run_export("--run", "run", "--to", "gguf", "--out", "run.gguf") == 2
    explained(capsys, "merges")


# Files from elsewhere


def write_gguf(path, metadata: dict, tensors: dict[str, np.ndarray], architecture="llama", kinds=None):
    """A GGUF file; metadata may say anything."""
    writer = gguf.GGUFWriter(path, architecture)
    kind = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, gguf.GGUFValueType[kind[type(value)]])
    for name, array in tensors.items():
        writer.add_tensor(name, array, raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def contents(path) -> tuple[dict, dict[str, np.ndarray]]:
    """The metadata and the tensors of a file that we wrote in float32."""
    file = GGUFFile(Path(path))
    metadata = {key: value for key, value in file.metadata.items() if key != "general.architecture"}
    return metadata, {name: file.tensor(name).numpy() for name in file.tensors}


@pytest.fixture
def tiny(run_export):
    """A GGUF file of a tiny Llama, tiny.gguf; its metadata and tensors."""
    make_run("run", "stage4_gqa", n_layer=1, n_embd=16, n_head=2)
    assert run_export("--run", "run", "--to", "gguf", "--out", "tiny.gguf") == 0
    return contents("tiny.gguf")


REFUSED = [
    (
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
        "llama.rope.scaling.type = 'yarn'",
    ),
    ({"llama.block_count": 2**31}, "llama.block_count"),
    ({"llama.block_count": 2}, "tensors of 1 blocks"),
    ({"llama.attention.head_count": 0}, "llama.attention.head_count = 0"),
    ({"llama.attention.head_count": 3}, "head"),
    ({"llama.attention.head_count": "x"}, "llama.attention.head_count = 'x'"),
    ({"llama.rope.freq_base": float("nan")}, "llama.rope.freq_base = nan"),
    ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "layer_norm_rms_epsilon"),
    ({"llama.rope.dimension_count": 4}, "partial_rotary_factor"),
    ({"llama.expert_count": 8, "llama.expert_used_count": 2}, "ffn_"),
    ({"split.count": 3}, "3 parts"),
    ({"general.type": "mmproj"}, "mmproj"),
    ({"tokenizer.ggml.model": "bert"}, "'bert'"),
    ({"tokenizer.ggml.model": "gpt2"}, "no tokenizer.ggml.pre"),
    ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "mystery"}, "'mystery'"),
    ({"tokenizer.ggml.model": "llama"}, "scores"),
    ({"tokenizer.ggml.tokens": ["a", "b"]}, "token_type"),
    ({"tokenizer.ggml.tokens": ["ab"] * len(CHARACTERS)}, "'ab'"),
    ({"tokenizer.ggml.tokens": "abc"}, "no tokenizer"),
    ({"general.alignment": 3}, "general.alignment"),
]


@pytest.mark.parametrize("change, message", REFUSED)
def test_what_no_stage_can_represent_is_refused_by_name(tiny, run_gguf, capsys, change, message):
    metadata, tensors = tiny
    capsys.readouterr()
    write_gguf("other.gguf", metadata | change, tensors)
    assert run_gguf("other.gguf", "--out", "out") == 2
    explained(capsys, message)


@pytest.mark.parametrize("architecture", ["gemma2", "phi3", "llama4"])
def test_an_unknown_architecture_is_refused(tiny, run_gguf, capsys, architecture):
    capsys.readouterr()
    write_gguf("other.gguf", *tiny, architecture=architecture)
    assert run_gguf("other.gguf", "--out", "out") == 2
    explained(capsys, f"general.architecture = '{architecture}'", "qwen3moe")


def test_tensors_that_do_not_fit_are_refused_by_name(tiny, run_gguf, capsys):
    metadata, tensors = tiny
    some = np.ones(8, dtype=np.float32)
    for change, message in [
        ({"blk.0.attn_q.weight": some}, "q_proj"),
        ({"blk.0.attn_sinks.weight": some}, "attn_sinks"),
        ({"token_embd.weight": np.ones((38, 8), np.float32)}, "embed_tokens"),
        ({"rope_freqs.weight": some[:4] * 3}, "rope_freqs"),
        ({"blk.0.attn_q.bias": some}, "attention_bias"),
        ({"output_norm.weight": np.full(16, np.nan, np.float32)}, "NaN"),
        ({"output_norm.weight": np.ones(16, np.int32)}, "I32"),
    ]:
        capsys.readouterr()
        Path("other.gguf").unlink(missing_ok=True)
        write_gguf("other.gguf", metadata, tensors | change)
        assert run_gguf("other.gguf", "--out", "out") == 2
        explained(capsys, message)
    del tensors["output_norm.weight"]
    write_gguf("missing.gguf", metadata, tensors)
    assert run_gguf("missing.gguf", "--out", "out") == 2
    explained(capsys, "model.norm.weight")


@pytest.mark.parametrize(
    "change, factor",
    [
        ({"llama.rope.scaling.factor": 2.0}, 2.0),  # linear is llama.cpp's default
        ({"llama.rope.scale_linear": 4.0}, 4.0),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0}, None),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 2.0}, None),
    ],
)
def test_scaled_positions_are_read_as_llama_cpp_reads_them(tiny, run_gguf, change, factor):
    metadata, tensors = tiny
    write_gguf("other.gguf", metadata | change, tensors)
    assert run_gguf("other.gguf", "--out", "out") == 0
    scaling = runs.read_config(Path("out"))["model"].get("rope_scaling")
    assert scaling == (factor and {"factor": factor})


def test_files_that_are_no_gguf_are_refused(tiny, run_gguf, capsys):
    whole = Path("tiny.gguf").read_bytes()
    version = struct.pack("<I", 3)
    capsys.readouterr()
    for content, message in [
        (b"", "not a GGUF file"),
        (b"GG", "not a GGUF file"),
        (b"PK\3\4" + whole, "not a GGUF file"),
        (b"GGUF", "damaged"),
        (b"GGUF" + version[::-1] + whole[8:], "big-endian"),
        (b"GGUF" + struct.pack("<I", 1) + whole[8:], "version 1"),
        (whole[:8] + struct.pack("<QQ", 2**63, 1) + whole[24:], "other.gguf"),
        (whole[:8] + struct.pack("<QQ", 1, 2**63) + whole[24:], "damaged"),
        (whole[:24] + struct.pack("<Q", 2**63) + whole[32:], "damaged"),
        (whole[:-100], "beyond its end"),
        (whole[:1000], "damaged"),
    ]:
        Path("other.gguf").write_bytes(content)
        assert run_gguf("other.gguf", "--out", "out") == 2
        explained(capsys, message)
    for path, message in (("nothing.gguf", "No such file"), ("run", "directory")):
        assert run_gguf(path, "--out", "out") == 2
        explained(capsys, message)


def test_a_long_array_of_a_type_without_size_is_no_trap(tiny, run_gguf, capsys):
    """The reader of the package gguf fills the memory with such a file."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a"
    capsys.readouterr()
    for kind in range(14):
        Path("other.gguf").write_bytes(head + struct.pack("<IIQ", 9, kind, 2**40))
        assert run_gguf("other.gguf", "--out", "out") == 2
        explained(capsys, "damaged")


WRONG = [None, "x", -1, 0, 7, 2**40, True, float("nan"), [1, 2]]
WRONG_TEXTS = ["", [], ["a"], [0.5] * 38, [-1] * 38, ["\\"] * 38, ["\\xff"] * 38]


@pytest.mark.parametrize("kind", ["llama 3.1", "qwen3_moe", "gpt2", "gpt_neox", "deepseek_v3 with groups"])
def test_any_wrong_value_in_the_metadata_ends_in_an_error_or_a_run(
    run_export, run_gguf, capsys, monkeypatch, kind
):
    """Values of another type, negative, huge or not finite; each key in turn, or missing."""
    make_run("run", KINDS[kind][0], **KINDS[kind][1] | {"n_layer": 1})
    assert run_export("--run", "run", "--to", "gguf", "--out", "run.gguf") == 0
    path = Path("run.gguf")
    file = GGUFFile(path)
    monkeypatch.setattr(import_gguf, "GGUFFile", lambda path: file)
    good = dict(file.metadata)
    for key in (
        good if kind == "gpt2" else [key for key in good if key.startswith(good["general.architecture"])]
    ):
        for number, value in enumerate(WRONG + WRONG_TEXTS if key.startswith("tokenizer") else WRONG):
            file.metadata = {name: good[name] for name in good if name != key}
            if value is not None:
                file.metadata[key] = value
            out = Path(f"out-{key}-{number}")
            capsys.readouterr()
            status = run_gguf(path, "--out", out)
            text, error = capsys.readouterr()
            assert status in (0, 2) and out.exists() == (status == 0), (key, value, error)
            assert "Traceback" not in text + error, (key, value, error)
            assert status == 0 or len(error[error.index("error: ") :].splitlines()) <= 2, (key, value, error)


def test_any_damaged_byte_ends_in_an_error_or_a_run(tiny, run_gguf, capsys):
    whole, draw = Path("tiny.gguf").read_bytes(), random.Random(0)
    header = whole.index(b"blk.0") + 800
    for number in range(150):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 1, 4))):
            damaged[draw.randrange(header)] = draw.choice((0, 1, 255, draw.randrange(256)))
        Path("other.gguf").write_bytes(damaged)
        capsys.readouterr()
        out = Path(f"out{number}")
        status = run_gguf("other.gguf", "--out", out)
        out_text, error = capsys.readouterr()
        assert status in (0, 2) and out.exists() == (status == 0), error
        assert "Traceback" not in out_text + error
        assert status == 0 or len(error[error.index("error: ") :].splitlines()) <= 2, error


QUANTIZED = [kind for kind in gguf.GGMLQuantizationType if kind in gguf.quants._type_traits]


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_all_quantized_types_are_read_as_the_package_gguf_reads_them(tiny, kind):
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows = np.random.default_rng(0).integers(0, 100, (3, 4, 2 * n_bytes), dtype=np.uint8)
    write_gguf("other.gguf", {}, {"x.weight": rows}, kinds={"x.weight": kind})
    file, [theirs] = GGUFFile(Path("other.gguf")), gguf.GGUFReader("other.gguf").tensors
    expected = gguf.quants.dequantize(theirs.data, kind)
    assert expected.shape == (3, 4, 2 * block)
    assert np.array_equal(file.tensor("x.weight").float().numpy(), expected, equal_nan=True)
    assert np.array_equal(file.tensor("x.weight", 1).float().numpy(), expected[1], equal_nan=True)


def test_a_head_that_is_a_copy_of_the_embedding_is_tied(tiny, run_gguf):
    metadata, tensors = tiny
    write_gguf("other.gguf", metadata, tensors | {"output.weight": tensors["token_embd.weight"]})
    assert run_gguf("other.gguf", "--out", "out") == 0
    assert runs.read_config(Path("out"))["model"]["tie_word_embeddings"] is True


def test_other_layouts_of_deepseek_are_read(run_export, run_gguf):
    """Older files have kv_b in one piece and the sizes of the heads as they are without absorption."""
    model = make_run("run", "deepseek_v3", **MLA | {"num_nextn_predict_layers": 0})
    assert run_export("--run", "run", "--to", "gguf", "--out", "run.gguf") == 0
    metadata, tensors = contents("run.gguf")
    for i in range(2):
        parts = [tensors.pop(f"blk.{i}.attn_{part}_b.weight") for part in "kv"]
        joined = np.concatenate((parts[0].swapaxes(1, 2), parts[1]), 1)
        tensors[f"blk.{i}.attn_kv_b.weight"] = joined.reshape(-1, joined.shape[-1])
    for part in ("key", "value"):
        metadata[f"deepseek2.attention.{part}_length"] = metadata.pop(
            f"deepseek2.attention.{part}_length_mla"
        )
    metadata["deepseek2.attention.head_count_kv"] = 4
    write_gguf("old.gguf", metadata, tensors, "deepseek2")
    assert run_gguf("old.gguf", "--out", "out") == 0
    found, _ = runs.load(Path("out"), "last", CPU)
    idx = torch.randint(len(CHARACTERS), (1, 20))
    assert torch.equal(found(idx)[0], model(idx)[0][..., : len(CHARACTERS)])


def test_llama_3_1_is_recognized_without_its_numbers(run_export, run_gguf):
    """llama.cpp's converter writes only the tensor."""
    scaling = LLAMA3 | {"original_max_position_embeddings": 8192.0}
    make_run("run", "llama3", rope_type="llama3", rope_scaling=scaling, rope_theta=500_000.0, head_dim=64)
    assert run_export("--run", "run", "--to", "gguf", "--out", "run.gguf") == 0
    metadata, tensors = contents("run.gguf")
    metadata = {key: value for key, value in metadata.items() if "rope.scaling" not in key}
    write_gguf("other.gguf", metadata, tensors)
    assert run_gguf("other.gguf", "--out", "out") == 0
    model = runs.read_config(Path("out"))["model"]
    assert model["rope_type"] == "llama3" and model["rope_scaling"] == scaling


def test_importing_needs_the_weights_in_memory_once(run_export):
    """At most 1.3 times their size in float32, beside Python and the packages."""
    sizes = {"vocab_size": 64, "n_embd": 1024, "n_head": 8, "intermediate_size": 4096}
    for name, more in (("small", {"n_layer": 1}), ("large", sizes)):
        make_run(name, "stage4_gqa", **more)
        assert run_export("--run", name, "--to", "gguf", "--out", f"{name}.gguf", "--outtype", "q8_0") == 0
    script = """
import re, sys
from deploy import import_gguf
def peak(name):
    sys.argv = ["import_gguf", f"{name}.gguf", "--out", f"{name}-back"]
    import_gguf.main()
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak("small")
print(peak("large") - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not say how much memory a process needed")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    n_bytes = 4 * sum(
        tensor.numel() for tensor in checkpoint.weights(runs.load(Path("large"), "last", CPU)[0]).values()
    )
    assert n_bytes > 100e6 and int(done.stdout.split()[-1]) < 1.3 * n_bytes
