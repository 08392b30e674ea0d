"""Runs to and from the formats of other programs: transformers both ways, llama2.c, and fine-tuning."""

import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from conftest import call
from safetensors.torch import load_file, save_file
from test_data import gpt2_files  # noqa: F401  a fixture: GPT-2's vocabulary, through pip
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    pipeline,
)
from transformers.utils import logging as transformers_logging

import data
import train
from data import files
from data.tokenizers import CharTokenizer, HuggingFaceTokenizer
from deploy import export, import_hf, llama2c, tokenizer_json
from lab import stages
from lab.errors import UserError
from lab.sampling import generation
from lab.storage import checkpoint, edits, runs

transformers_logging.disable_progress_bar()  # it writes to stderr, which the tests read

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
CHARACTERS = "\n !',.:;ABCDEFabcdefghijxyz\té😀"
CONTEXT = 24


@pytest.fixture
def run_export(workshop, monkeypatch):
    """run_export(*flags): calls deploy.export; returns the exit status."""
    return lambda *flags: call(monkeypatch, export, *flags)


@pytest.fixture
def run_import(workshop, monkeypatch):
    """run_import(*flags): calls deploy.import_hf; returns the exit status."""
    return lambda *flags: call(monkeypatch, import_hf, *flags)


@torch.no_grad()
def shake(model):
    """The model with every tensor random and large: nothing at 0 or 1 hides a tensor that is lost."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name or "ln_" in name), std=0.2)
    return model.eval()


def make_run(folder, stage, characters=CHARACTERS, **sizes) -> torch.nn.Module:
    """Writes a run of the stage with random weights, as if trained; returns the model."""
    module = stages.load(stages.find(stage))
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": CONTEXT} | sizes
    model = shake(module.GPT(module.GPTConfig(**{"vocab_size": len(set(characters))} | sizes)))
    folder = Path(folder)
    folder.mkdir(parents=True)
    checkpoint.save(folder, "best", model, {"stage": stages.find(stage), "step": "1"}, None)
    tokenizer = CharTokenizer(characters)
    meta = {"tokenizer": "char", "characters": tokenizer.characters, "vocab_size": tokenizer.vocab_size}
    runs.write_json(folder / "meta.json", meta)
    name = stages.find(stage)
    config = {"stage": name, "code": edits.code_hash(name), "model": vars(model.config)}
    runs.write_json(folder / "config.json", config)
    return model


def save_theirs(model, folder, **options):
    """A folder of theirs: save_pretrained and a tokenizer of characters, as many as its vocabulary has."""
    model.save_pretrained(folder, **options)
    characters = "".join(map(chr, range(256, 256 + model.config.vocab_size)))
    tokenizer_json.of_characters(characters).save(f"{folder}/tokenizer.json")


def llama(kind=LlamaForCausalLM, config=LlamaConfig, **sizes):
    """A tiny random Llama."""
    defaults = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 50, "num_hidden_layers": 2}
    defaults |= {"num_attention_heads": 4, "max_position_embeddings": CONTEXT, "bos_token_id": None}
    return shake(kind(config(**defaults | {"eos_token_id": None} | sizes)))


def mixtral(**sizes):
    """A tiny random Mixtral."""
    defaults = {"num_key_value_heads": 2, "num_local_experts": 4, "sliding_window": None}
    defaults |= {"intermediate_size": 52}  # theirs needs multiples of 16 bytes
    return llama(MixtralForCausalLM, MixtralConfig, **defaults | sizes)


def deepseek(**sizes):
    """A tiny random DeepSeek-V3, its balancing biases not zero."""
    defaults = {"kv_lora_rank": 20, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
    defaults |= {
        "v_head_dim": 12,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
    }
    defaults |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "num_key_value_heads": 4}
    model = llama(DeepseekV3ForCausalLM, DeepseekV3Config, **defaults | sizes)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.3)
    return model


def gpt2(**sizes):
    """A tiny random GPT-2."""
    defaults = {"vocab_size": 61, "n_positions": CONTEXT, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return shake(
        GPT2LMHeadModel(GPT2Config(**defaults | {"bos_token_id": None, "eos_token_id": None} | sizes))
    )


@torch.no_grad()
def assert_same_logits(ours, theirs, length=CONTEXT):
    """Both models give the same logits, and these tell positions and tokens apart."""
    idx = torch.randint(theirs.config.vocab_size, (2, length))
    logits = theirs(idx).logits
    assert logits.std() > 0.3
    torch.testing.assert_close(ours(idx)[0], logits, atol=1e-4, rtol=0)


def assert_same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def explained(capsys, *messages):
    """stderr is an error of one or two lines that says this; nothing is left of what was begun."""
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and len(err.splitlines()) <= 2, err
    for message in messages:
        assert message in err
    assert "Traceback" not in out + err
    assert not list(Path().glob("**/.partial-*")) and not Path("out").exists()


# Theirs to ours, and back

LLAMAS = {
    "stage5_flash": [
        {"num_hidden_layers": 1, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
        {"num_hidden_layers": 3, "hidden_size": 24, "intermediate_size": 77, "rope_theta": 500_000.0},
        {"num_key_value_heads": 1, "num_hidden_layers": 3, "intermediate_size": 129, "rms_norm_eps": 1e-5},
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 500_000.0},
        {"num_key_value_heads": 3, "num_attention_heads": 6, "hidden_size": 36, "rms_norm_eps": 1e-3},
    ],
}
GPT2S = [
    {"n_layer": 1, "n_head": 2},
    {"n_layer": 3, "n_embd": 36, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-6},
    {"n_head": 1, "layer_norm_epsilon": 1e-3, "resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2},
]
THEIRS = [(stage, llama, sizes) for stage, several in LLAMAS.items() for sizes in several]
THEIRS += [("stage0_gpt", gpt2, sizes) for sizes in GPT2S]
MIXTRALS = [
    {"num_hidden_layers": 1, "tie_word_embeddings": True, "router_aux_loss_coef": 0.02},
    {"num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 40, "rope_theta": 500_000.0},
    {"num_key_value_heads": 4, "num_hidden_layers": 3, "num_local_experts": 3, "rms_norm_eps": 1e-3},
]
THEIRS += [("stage6_moe", mixtral, sizes) for sizes in MIXTRALS]
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 8}
YARN |= {"mscale": 1.0, "mscale_all_dim": 0.8, "beta_fast": 32, "beta_slow": 1}
PLAIN_DEEPSEEKS = [
    {"num_hidden_layers": 1, "tie_word_embeddings": True},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}, "first_k_dense_replace": 1},
    {"n_shared_experts": 2, "routed_scaling_factor": 1.5, "v_head_dim": 12, "kv_lora_rank": 24},
]
DEEPSEEKS = [
    {"q_lora_rank": 12, "first_k_dense_replace": 1, "num_hidden_layers": 3, "rms_norm_eps": 1e-3},
    {"n_group": 4, "topk_group": 2, "n_shared_experts": 2, "routed_scaling_factor": 1.5},
    {"rope_parameters": YARN, "q_lora_rank": 10},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}, "n_group": 2, "topk_group": 1},
]
THEIRS += [("stage7_mla_mtp", deepseek, sizes) for sizes in PLAIN_DEEPSEEKS]
THEIRS += [("deepseek_v3", deepseek, sizes) for sizes in DEEPSEEKS]


@pytest.mark.parametrize("stage, make, sizes", THEIRS)
def test_what_is_imported_has_their_logits_and_exports_as_it_was(run_import, run_export, stage, make, sizes):
    theirs = make(**sizes)
    save_theirs(theirs, "theirs")
    assert run_import("theirs", "--out", "runs/imported") == 0
    ours, config = runs.load(Path("runs/imported"), "best", CPU)
    assert config["stage"] == stage
    assert_same_logits(ours, theirs)
    assert run_export("--run", "runs/imported", "--to", "hf", "--out", "back") == 0
    assert_same_tensors(load_file("back/model.safetensors"), load_file("theirs/model.safetensors"))
    back = AutoModelForCausalLM.from_pretrained("back")
    assert type(back) is type(theirs)
    assert_same_logits(ours, back)
    ours_alone = {"rope_theta", "rope_scaling", "n_inner", "head_dim", "scoring_func", "topk_method", NEXT}
    ours_alone |= {"rotary_pct", "rotary_emb_base", "num_experts"}
    for key, value in json.loads(Path("back/config.json").read_text()).items():
        if key not in ours_alone:
            assert json.loads(Path("theirs/config.json").read_text())[key] == value, key


V3 = "deepseek_v3"
MIXTRAL = {"router": "softmax", "n_shared_experts": 0}
NEXT = "num_nextn_predict_layers"  # theirs say 1, but save none
OURS = [
    ("0", {"bias": True, "n_layer": 3}),
    ("0", {"bias": False, "tie_word_embeddings": False, "norm_eps": 1e-3}),
    ("3", {"n_layer": 1, "norm_eps": 1e-6, "tie_word_embeddings": False}),
    ("3", {"n_embd": 40, "intermediate_size": 77, "rope_theta": 500_000.0}),
    ("4", {"n_kv_head": 1, "n_layer": 3, "tie_word_embeddings": False}),
    ("4", {"n_kv_head": 2, "intermediate_size": 51, "norm_eps": 1e-3, "rope_theta": 500_000.0}),
    ("4", {"n_kv_head": 4}),
    ("5", {"n_kv_head": 2}),
    ("6", MIXTRAL),
    ("6", MIXTRAL | {"n_routed_experts": 5, "num_experts_per_tok": 4, "rope_theta": 500_000.0}),
    ("7a", {}),
    ("7a", {"kv_lora_rank": 20, "first_k_dense_replace": 1, "n_shared_experts": 2}),
    ("7", {}),
    ("7", {"kv_lora_rank": 20, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}),
    ("7", {"n_shared_experts": 2, "num_nextn_predict_layers": 2, "v_head_dim": 12}),
    (V3, {}),
    (V3, {"q_lora_rank": 12, "kv_lora_rank": 20, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}),
    (V3, {"n_group": 2, "n_shared_experts": 2, "num_nextn_predict_layers": 2, "v_head_dim": 12}),
    (V3, {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 8.0, "mscale_all_dim": 1.0}}),
]
COUNTERPARTS = {"0": GPT2LMHeadModel, "6": MixtralForCausalLM}
COUNTERPARTS |= dict.fromkeys(("7a", "7", V3), DeepseekV3ForCausalLM)


@pytest.mark.parametrize("stage, sizes", OURS)
def test_what_is_exported_has_our_logits_in_stock_transformers(run_export, stage, sizes):
    ours = make_run("run", stage, **sizes)
    assert run_export("--run", "run", "--to", "hf", "--out", "out") == 0
    theirs, report = AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    further = re.compile(r"model\.layers\.[23]\.")  # multi-token prediction, which is not part of theirs
    unexpected = [
        key for key in report.pop("unexpected_keys") if not (stage in ("7", V3) and further.match(key))
    ]
    assert not unexpected and not any(report.values()), report
    assert type(theirs) is COUNTERPARTS.get(stage, LlamaForCausalLM)
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("q_lora_rank", [None, 12])
def test_halves_and_neighbours_are_told_apart(run_import, q_lora_rank):
    """rope_interleave = false is another function of the same weights."""
    logits = []
    for interleaved in (True, False):
        theirs = deepseek(rope_interleave=interleaved, q_lora_rank=q_lora_rank)
        save_theirs(theirs, f"theirs-{interleaved}")
        assert run_import(f"theirs-{interleaved}", "--out", f"run-{interleaved}") == 0
        ours = runs.load(Path(f"run-{interleaved}"), "best", CPU)[0]
        assert_same_logits(ours, theirs)
        logits.append(ours(torch.arange(20)[None])[0])
    assert (logits[0] - logits[1]).abs().max() > 1e-2


def test_multi_token_prediction_is_that_of_transformers_and_comes_back(run_export, run_import):
    """Its weights are exported as DeepSeek's files have them; a run made of those has them all."""
    from transformers.modeling_layers import MtpModel

    ours = make_run("run", "deepseek_v3", n_layer=2, q_lora_rank=12)
    assert run_export("--run", "run", "--to", "hf", "--out", "out") == 0
    tensors = load_file("out/model.safetensors")
    main = AutoModelForCausalLM.from_pretrained("out").eval()
    theirs = MtpModel(main, 1).eval()
    prefix = "model.layers.2."
    own = {"enorm.weight", "hnorm.weight", "eh_proj.weight"}
    renamed = {}
    for name, tensor in tensors.items():
        rest = name.removeprefix(prefix)
        if rest == name or ".experts." in rest:
            continue
        if rest == "shared_head.norm.weight":
            renamed["layers.0.post_norm.weight"] = tensor
        else:
            renamed[f"layers.0.{'' if rest in own else 'mtp_block.'}{rest}"] = tensor
    experts = ours.model.layers[2].mlp.experts
    renamed["layers.0.mtp_block.mlp.experts.gate_up_proj"] = experts.gate_up_proj.detach()
    renamed["layers.0.mtp_block.mlp.experts.down_proj"] = experts.down_proj.detach()
    missing, unexpected = theirs.load_state_dict(renamed, strict=False)
    assert not unexpected and all("layers" not in name for name in missing)
    text = torch.randint(len(set(CHARACTERS)), (1, 12))
    with torch.no_grad():
        hidden = main.model(text[:, :-1]).last_hidden_state
        positions = torch.arange(1, 12)[None]  # theirs counts from the embedded token
        expected = theirs.forward_layer(0, hidden, positions, None, input_ids=text[:, 1:])
        _, ours_hidden = ours(text[:, :-1], return_hidden=True)
        drafted = ours.draft(ours_hidden, text[:, 1:], ours.new_cache(1, 12, drafting=True))[1]
    torch.testing.assert_close(drafted, expected, atol=1e-4, rtol=0)
    shutil.copy("run/meta.json", "out/meta.json")
    assert run_import("out", "--out", "again") == 0
    again, _ = runs.load(Path("again"), "best", CPU)
    assert_same_tensors(again.state_dict(), ours.state_dict())


def test_copies_of_the_embedding_and_the_head_are_left_out(run_export, run_import, capsys):
    """DeepSeek's files have them with multi-token prediction; others than the model's are refused."""
    ours = make_run("run", "7", tie_word_embeddings=False)
    assert run_export("--run", "run", "--to", "hf", "--out", "theirs") == 0
    copies = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    change_weights(
        "theirs", lambda t: t.update({f"model.layers.2.{name}": t[of].clone() for name, of in copies.items()})
    )
    assert run_import("theirs", "--out", "again") == 0
    assert_same_tensors(runs.load(Path("again"), "best", CPU)[0].state_dict(), ours.state_dict())
    change_weights("theirs", lambda t: t["model.layers.2.shared_head.head.weight"].add_(1))
    assert run_import("theirs", "--out", "out") == 2
    explained(capsys, "model.layers.2.shared_head.head.weight differs")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"norm_topk_prob": False}, "norm_topk_prob = false"),
        ({"scoring_func": "softmax"}, 'scoring_func = "softmax"'),
        ({"attention_bias": True}, "attention_bias = true"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_scaling = {"type": "linear"'),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok = 1"),
        ({"n_group": 3}, "n_group (3)"),
    ],
)
def test_a_deepseek_that_stage_7_cannot_represent_is_refused_by_name(run_import, capsys, changes, message):
    save_theirs(deepseek(), "theirs")
    edit_config("theirs", **changes)
    assert run_import("theirs", "--out", "out") == 2
    explained(capsys, message)


def test_experts_as_transformers_5_stacks_them_are_read_too(run_import):
    theirs = mixtral()
    save_theirs(theirs, "theirs")
    save_file({name: t.contiguous() for name, t in theirs.state_dict().items()}, "theirs/model.safetensors")
    assert run_import("theirs", "--out", "run") == 0
    assert_same_logits(runs.load(Path("run"), "best", CPU)[0], theirs)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({}, "router = sigmoid"),
        ({"router": "softmax"}, "n_shared_experts = 1"),
        (MIXTRAL | {"first_k_dense_replace": 1}, "first_k_dense_replace = 1"),
        (MIXTRAL | {"num_experts_per_tok": 1}, "num_experts_per_tok = 1"),
    ],
)
def test_a_mixture_that_is_no_mixtral_is_not_exported_as_one(run_export, capsys, sizes, message):
    make_run("run", "6", **sizes)
    assert run_export("--run", "run", "--to", "hf", "--out", "out") == 2
    explained(capsys, message)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
        ({"sliding_window": 8}, "sliding_window = 8"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok = 1"),
        ({"num_local_experts": 5}, "experts.4.w1.weight is missing"),
        ({"num_local_experts": 3}, "an unexpected tensor, model.layers.0.block_sparse_moe.experts.3."),
    ],
)
def test_a_mixtral_that_stage_6_cannot_represent_is_refused_by_name(run_import, capsys, changes, message):
    save_theirs(mixtral(), "theirs")
    edit_config("theirs", **changes)
    assert run_import("theirs", "--out", "out") == 2
    explained(capsys, message)


def test_mistral_without_its_window_is_imported(run_import):
    theirs = llama(MistralForCausalLM, MistralConfig, num_key_value_heads=2, sliding_window=None)
    save_theirs(theirs, "theirs")
    assert run_import("theirs", "--out", "run") == 0
    assert_same_logits(runs.load(Path("run"), "best", CPU)[0], theirs)


def edit_config(folder, **changes):
    """Sets fields of config.json; None removes one."""
    path = Path(folder, "config.json")
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_the_config_of_transformers_4_is_read_too(run_import):
    theirs = llama(rope_theta=500_000.0, num_key_value_heads=2)
    save_theirs(theirs, "theirs")
    edit_config("theirs", rope_parameters=None, rope_theta=500_000.0, rope_scaling={}, torch_dtype="float32")
    assert run_import("theirs", "--out", "run") == 0
    assert_same_logits(runs.load(Path("run"), "best", CPU)[0], theirs)


def test_the_exported_config_says_rope_theta_where_transformers_4_looks(run_export):
    make_run("run", "3", rope_theta=123.0)
    assert run_export("--run", "run", "--to", "hf", "--out", "out") == 0
    assert json.loads(Path("out/config.json").read_text())["rope_theta"] == 123.0


def test_weights_in_parts_are_imported(run_import):
    theirs = llama()
    save_theirs(theirs, "theirs", max_shard_size="20KB")
    assert len(list(Path("theirs").glob("*.safetensors"))) > 2
    assert run_import("theirs", "--out", "run") == 0
    assert_same_logits(runs.load(Path("run"), "best", CPU)[0], theirs)
    sorted(Path("theirs").glob("*.safetensors"))[1].unlink()
    assert run_import("theirs", "--out", "out") == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_weights_stay_as_they_are_through_import_and_export(run_import, run_export, dtype):
    save_theirs(llama().to(dtype), "theirs")
    assert run_import("theirs", "--out", "run") == 0
    assert run_export("--run", "run", "--to", "hf", "--out", "back") == 0
    expected = load_file("theirs/model.safetensors")
    assert {tensor.dtype for tensor in expected.values()} == {dtype}
    name = str(dtype).removeprefix("torch.")
    assert json.loads(Path("run/config.json").read_text())["weights_dtype"] == name
    assert json.loads(Path("back/config.json").read_text())["dtype"] == name
    for folder in ("run/last", "back"):
        assert_same_tensors(load_file(f"{folder}/model.safetensors"), expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_are_imported_and_exported_in_the_dtype_asked_for(run_import, run_export, dtype):
    save_theirs(llama().to(torch.bfloat16), "theirs")
    expected = load_file("theirs/model.safetensors")
    expected = {name: tensor.to(getattr(torch, dtype)) for name, tensor in expected.items()}
    assert run_import("theirs", "--out", "direct", "--dtype", dtype) == 0
    assert_same_tensors(load_file("direct/last/model.safetensors"), expected)
    assert run_import("theirs", "--out", "run") == 0
    assert run_export("--run", "run", "--to", "hf", "--out", "back", "--dtype", dtype) == 0
    assert_same_tensors(load_file("back/model.safetensors"), expected)
    assert json.loads(Path("back/config.json").read_text())["dtype"] == dtype


def test_a_number_that_float16_cannot_hold_is_refused_with_its_tensor(run_import, run_export, capsys):
    theirs = llama()
    save_theirs(theirs, "theirs")
    change_weights("theirs", lambda tensors: tensors["model.norm.weight"][3].fill_(70_000))
    assert run_import("theirs", "--out", "run") == 0
    for command, flags in ((run_import, ["theirs"]), (run_export, ["--run", "run", "--to", "hf"])):
        capsys.readouterr()
        assert command(*flags, "--out", "out", "--dtype", "float16") == 2
        explained(capsys, "model.norm.weight has numbers up to 7e+04, which float16 cannot hold", "bfloat16")


def test_the_few_weights_in_another_dtype_are_converted_and_named(run_import, capsys):
    """Except the bias that balances experts, which float32 holds on both sides."""
    theirs = deepseek().to(torch.bfloat16)
    save_theirs(theirs, "theirs")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"

    def change(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1e-6
        tensors[bias] = tensors[bias].float() + 1e-6

    change_weights("theirs", change)
    assert run_import("theirs", "--out", "run") == 0
    err = capsys.readouterr().err
    assert "converted to bfloat16, as most weights are: model.norm.weight\n" in err and "bias" not in err
    ours = load_file("run/last/model.safetensors")
    assert ours["model.norm.weight"].dtype == torch.bfloat16
    assert torch.equal(ours[bias], load_file("theirs/model.safetensors")[bias])
    model = runs.load(Path("run"), "best", CPU, torch.float16)[0]
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}


def change_weights(folder, change):
    """Rewrites model.safetensors after change(tensors)."""
    path = Path(folder, "model.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_gpt2_as_openai_published_it_is_imported(run_import, capsys):
    """Without the prefix transformer., and with the causal masks."""
    theirs = gpt2()
    save_theirs(theirs, "theirs")

    def as_published(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for i in range(2):
            tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, CONTEXT, CONTEXT).tril()

    change_weights("theirs", as_published)
    assert run_import("theirs", "--out", "run") == 0
    assert "not weights: transformer.h.0.attn.bias, transformer.h.1.attn.bias" in capsys.readouterr().err
    assert_same_logits(runs.load(Path("run"), "best", CPU)[0], theirs)


def test_saved_frequencies_and_a_tied_head_saved_twice_are_left_out(run_import, capsys):
    theirs = llama(tie_word_embeddings=True)
    save_theirs(theirs, "theirs")

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change_weights("theirs", add)
    assert run_import("theirs", "--out", "run") == 0
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" in capsys.readouterr().err
    assert_same_logits(runs.load(Path("run"), "best", CPU)[0], theirs)


def test_a_field_that_nothing_here_knows_is_named(run_import, capsys):
    save_theirs(llama(), "theirs")
    edit_config("theirs", secret_sauce=0.5, unset=False)
    assert run_import("theirs", "--out", "run") == 0
    assert capsys.readouterr().err == "ignored unknown fields in config.json: secret_sauce = 0.5\n"


@pytest.mark.parametrize("make", [llama, gpt2, mixtral, deepseek])
def test_a_config_as_transformers_writes_it_has_no_unknown_field(run_import, capsys, make):
    save_theirs(make(), "theirs")
    assert run_import("theirs", "--out", "run") == 0
    assert capsys.readouterr().err == ""


# What cannot be imported is refused by name

REFUSED_LLAMAS = {
    "scaled positions": ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}},
                         'rope_parameters = {"rope_type": "longrope"'),
    "scaled positions of old": ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling ="),
    "half of llama 3.1's positions": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, '"llama3"'),
    "a factor of 0": ({"rope_scaling": {"type": "linear", "factor": 0}}, "linear, not {'factor': 0.0}"),
    "word for a factor": ({"rope_scaling": {"type": "linear", "factor": "2"}}, 'factor = "2"'),
    "list for a type": ({"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, "rope_scaling ="),
    "list for positions": ({"rope_scaling": [2.0]}, "rope_scaling = [2.0]"),
    "partly rotated": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "partly rotated in 5": ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "0.5"),
    "attention bias": ({"attention_bias": True}, "attention_bias = true"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias = true"),
    "activation": ({"hidden_act": "gelu"}, 'hidden_act = "gelu"'),
    "sliding window": ({"sliding_window": 4096}, "sliding_window = 4096"),
    "windowed layers": ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    "wide heads": ({"head_dim": 16}, "k_proj.weight is (32, 32), but config.json requires (64, 32)"),
    "no width": ({"head_dim": 0}, "head_dim = 0"),
    "attention dropout": ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    "another model": ({"model_type": "gemma2"}, "model_type 'gemma2'"),
    "odd heads": ({"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 1}, "must be even"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "n_kv_head (3)"),
    "word for a number": ({"num_hidden_layers": "two"}, 'num_hidden_layers = "two"'),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
    "nothing for a number": ({"hidden_size": None}, "config.json has no hidden_size"),
    "word for a float": ({"rms_norm_eps": "small"}, 'rms_norm_eps = "small"'),
    "word for a flag": ({"tie_word_embeddings": "no"}, 'tie_word_embeddings = "no"'),
    "more layers than tensors": ({"num_hidden_layers": 3}, "layers.2.input_layernorm.weight is missing"),
    "fewer layers than tensors": ({"num_hidden_layers": 1}, "an unexpected tensor, model.layers.1."),
    "other widths": ({"intermediate_size": 51}, "model.layers.0.mlp.down_proj.weight is (32, 50)"),
    "another head's kind": ({"tie_word_embeddings": True}, "lm_head.weight differs"),
    "more tokens than the model": ({"vocab_size": 60}, "tokenizer.json has 61 tokens"),
}  # fmt: skip
REFUSED_GPT2S = {
    "activation": ({"activation_function": "gelu"}, 'activation_function = "gelu"'),
    "wide mlp": ({"n_inner": 100}, "n_inner = 100"),
    "scores by layer": ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = true"),
    "unscaled scores": ({"scale_attn_weights": False}, "scale_attn_weights = false"),
    "upcast scores": ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn = true"),
    "cross-attention": ({"add_cross_attention": True}, "add_cross_attention = true"),
    "several dropouts": ({"attn_pdrop": 0.3}, "attn_pdrop = 0.3"),
    "longer positions": ({"n_positions": 99}, "transformer.wpe.weight is (24, 32)"),
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Two folders of theirs to copy and spoil."""
    folder = tmp_path_factory.mktemp("theirs")
    for name, make in (("llama", llama), ("gpt2", gpt2)):
        save_theirs(make(), folder / name)
    return folder


@pytest.fixture
def spoilt(saved, workshop):
    """spoilt(kind): a fresh copy of "llama" or "gpt2" as the folder theirs."""
    return lambda kind: shutil.copytree(saved / kind, "theirs")


@pytest.mark.parametrize("changes, message", REFUSED_LLAMAS.values(), ids=REFUSED_LLAMAS.keys())
def test_a_llama_that_no_stage_can_represent_is_refused_by_name(spoilt, run_import, capsys, changes, message):
    spoilt("llama")
    edit_config("theirs", **changes)
    assert run_import("theirs", "--out", "out") == 2
    explained(capsys, message)


@pytest.mark.parametrize("changes, message", REFUSED_GPT2S.values(), ids=REFUSED_GPT2S.keys())
def test_a_gpt2_that_stage_0_cannot_represent_is_refused_by_name(
    spoilt, run_import, capsys, changes, message
):
    spoilt("gpt2")
    edit_config("theirs", **changes)
    assert run_import("theirs", "--out", "out") == 2
    explained(capsys, message)


def unpack(name, folder="theirs"):
    Path(folder, name).write_bytes(Path(folder, name).read_bytes()[:-100])


def pickle_only():
    torch.save(load_file("theirs/model.safetensors"), "theirs/pytorch_model.bin")
    Path("theirs/model.safetensors").unlink()


SPOILT = {
    "no folder": (lambda: shutil.rmtree("theirs"), "cannot read theirs/config.json: No such file"),
    "no config": (lambda: Path("theirs/config.json").unlink(), "cannot read theirs/config.json"),
    "damaged config": (lambda: unpack("config.json"), "theirs/config.json is damaged"),
    "a list for a config": (lambda: Path("theirs/config.json").write_text("[1]"), "model_type None"),
    "no weights": (lambda: Path("theirs/model.safetensors").unlink(), "theirs has no model.safetensors"),
    "damaged weights": (lambda: unpack("model.safetensors"), "model.safetensors is damaged or incomplete"),
    "pickled weights": (pickle_only, "pytorch_model.bin is a pickle"),
    "no tokenizer": (lambda: Path("theirs/tokenizer.json").unlink(), "theirs has no tokenizer.json"),
    "damaged tokenizer": (lambda: unpack("tokenizer.json"), "theirs/tokenizer.json is damaged"),
    "damaged index": (
        lambda: Path("theirs/model.safetensors").rename("theirs/model.safetensors.index.json"),
        "model.safetensors.index.json is damaged",
    ),
    "missing tensor": (
        lambda: change_weights("theirs", lambda tensors: tensors.pop("model.norm.weight")),
        "theirs: model.norm.weight is missing, but config.json requires (32,)",
    ),
    "unexpected tensor": (
        lambda: change_weights(
            "theirs", lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})
        ),
        "an unexpected tensor, model.layers.0.self_attn.q_proj.bias of shape (32,)",
    ),
    "eight bits": (
        lambda: change_weights(
            "theirs", lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})
        ),
        "model.norm.weight has dtype int8",
    ),
}


@pytest.mark.parametrize("spoil, message", SPOILT.values(), ids=SPOILT.keys())
def test_a_spoilt_folder_is_explained(spoilt, run_import, capsys, spoil, message):
    spoilt("llama")
    spoil()
    assert run_import("theirs", "--out", "out") == 2
    explained(capsys, message)


@pytest.mark.parametrize("stage", ["1", "2"])
def test_stages_without_counterpart_are_refused_with_those_that_have_one(run_export, capsys, stage):
    make_run("run", stage)
    assert run_export("--run", "run", "--to", "hf", "--out", "out") == 2
    explained(
        capsys,
        stages.find(stage),
        "stage 0 (GPT2LMHeadModel), 3, 4, 5 (LlamaForCausalLM), 6 (MixtralForCausalLM), 7a, 7 or",
    )


def test_an_occupied_folder_is_not_touched(run_export, run_import, spoilt, capsys):
    spoilt("llama")
    make_run("run", "3")
    before = sorted((path, path.stat().st_mtime_ns) for path in Path("run").rglob("*"))
    for to in ("hf", "llama2c"):
        assert run_export("--run", "run", "--to", to, "--out", "run") == 2
        explained(capsys, "run is the input folder")
    assert run_import("theirs", "--out", "run") == 2
    explained(capsys, "run exists and is not empty")
    assert sorted((path, path.stat().st_mtime_ns) for path in Path("run").rglob("*")) == before
    Path("empty").mkdir()
    assert run_export("--run", "run", "--to", "hf", "--out", "empty") == 0
    assert Path("empty/config.json").exists()


def test_the_extra_is_named_where_tokenizers_is_not_installed(
    run_export, run_import, spoilt, monkeypatch, capsys
):
    spoilt("llama")
    make_run("run", "3")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert run_export("--run", "run", "--to", "hf", "--out", "out") == 2
    explained(capsys, "pip install -e '.[deploy]'")
    assert run_import("theirs", "--out", "out") == 2
    explained(capsys, "pip install -e '.[deploy]'")
    assert run_export("--run", "run", "--to", "llama2c", "--out", "c") == 0  # needs no such package


@pytest.mark.parametrize("module", ["deploy.export", "deploy.import_hf"])
def test_what_a_command_lacks_is_said_with_the_command_for_help(module):
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) <= 2
    assert done.stderr.startswith("error: Missing") and f"See python -m {module} --help" in done.stderr


# Text


PROMPTS = ["a", " B,\n\n  c: ", "é😀\t!"]


@pytest.mark.parametrize("stage", ["0", "3", "4"])
def test_the_pipeline_continues_greedily_with_the_text_of_sample(run_export, run_sample, capsys, stage):
    # More logits than characters, one of them the most likely after everything.
    model = make_run("run", stage, vocab_size=len(CHARACTERS) + 3, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[-2] = 5 * model.lm_head.weight[:-3].abs().amax(0)
    checkpoint.save(Path("run"), "best", model, {"step": "1"}, None)
    assert run_export("--run", "run", "--to", "hf", "--out", "out") == 0
    generate = pipeline("text-generation", "out", device="cpu")
    made = ""
    for prompt in PROMPTS:
        capsys.readouterr()
        n = CONTEXT - len(prompt)
        assert (
            run_sample("--run", "run", "--temperature", "0", "--max-new-tokens", n, "--prompt", prompt) == 0
        )
        text = capsys.readouterr().out.removesuffix("\n")
        assert generate(prompt)[0]["generated_text"] == text and len(text) == CONTEXT
        made += text[len(prompt) :]
    assert len(set(made)) > 5


def test_the_exported_character_tokenizer_is_ours_and_knows_no_other_character(run_export):
    make_run("run", "3")
    assert run_export("--run", "run", "--to", "hf", "--out", "out") == 0
    ours, theirs = CharTokenizer(CHARACTERS), AutoTokenizer.from_pretrained("out")
    for text in ("", " ", "  a  ,. '", "\n\n\t \n", "é😀é", CHARACTERS):
        assert theirs(text)["input_ids"] == ours.encode(text).tolist()
        assert theirs.decode(ours.encode(text)) == text
    with pytest.raises(Exception, match="Missing"):
        theirs("aZ")


def test_the_exported_gpt2_tokenizer_is_ours(run_export, gpt2_files, monkeypatch, tmp_path):  # noqa: F811
    for name, content in gpt2_files.items():
        files.write(files.root() / "cache" / name, content)
    make_run("run", "3", vocab_size=50304, n_embd=8, n_head=2, n_layer=1)
    runs.write_json(Path("run/meta.json"), {"tokenizer": "gpt2", "vocab_size": 50257})
    assert run_export("--run", "run", "--to", "hf", "--out", "out") == 0
    ours, theirs = data.GPT2Tokenizer(), AutoTokenizer.from_pretrained("out")
    for text in ("ROMEO:\n  Ay me!\n\n\tcafé 😀 it's 1597   ", " a", "", "one <|endoftext|> two , ."):
        assert theirs(text)["input_ids"] == ours.encode(text).tolist()
        assert theirs.decode(ours.encode(text)) == text
    assert tokenizer_json.read(Path("out")) == {"tokenizer": "gpt2"}
    generation = json.loads(Path("out/generation_config.json").read_text())
    assert generation["suppress_tokens"] == list(range(50257, 50304))
    # The same pieces split in another way, or with one piece more, are not GPT-2's.
    path = Path("out/tokenizer.json")
    described = json.loads(path.read_text())
    described["pre_tokenizer"]["add_prefix_space"] = True
    path.write_text(json.dumps(described))
    assert tokenizer_json.read(Path("out")) == {"tokenizer": "hf"}


def test_our_characters_come_back_from_an_export(run_export, run_import, run_sample, capsys):
    make_run("run", "4")
    assert run_export("--run", "run", "--to", "hf", "--out", "out") == 0
    assert run_import("out", "--out", "runs/back") == 0
    texts = []
    for folder in ("run", "runs/back"):
        capsys.readouterr()
        assert run_sample("--run", folder, "--prompt", "a b", "--max-new-tokens", "40") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert runs.newest("5") == runs.RUNS / "back"


def byte_level(text):
    """A tokenizer like Llama 3's."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|begin|>"], show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def sentence_piece(text):
    """A tokenizer like Llama 2's."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = described["added_tokens"][:3]  # the bytes are ordinary tokens
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(described))
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_another_tokenizer_goes_with_the_run(run_import, run_sample, run_export, text, capsys, make):
    library = make(text)
    theirs = llama(vocab_size=library.get_vocab_size())
    theirs.save_pretrained("theirs")
    library.save("theirs/tokenizer.json")
    assert run_import("theirs", "--out", "run") == 0
    tokenizer = runs.tokenizer(Path("run"))
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    prompt = f"{text[:50]} né 😀\n"
    assert tokenizer.encode(prompt).tolist() == library.encode(prompt).ids
    ids = library.encode(prompt, add_special_tokens=False).ids
    assert len(ids) < len(prompt.encode())
    assert tokenizer.decode(ids) == prompt
    capsys.readouterr()
    assert run_sample("--run", "run", "--prompt", "ab", "--temperature", "0", "--max-new-tokens", "8") == 0
    tokens = torch.tensor([library.encode("ab").ids])
    made = theirs.generate(tokens, max_new_tokens=8, do_sample=False)[0, tokens.size(1) :].tolist()
    assert capsys.readouterr().out == f"ab{tokenizer.decode(made)}\n"
    assert run_export("--run", "run", "--to", "hf", "--out", "back") == 0
    assert Path("back/tokenizer.json").read_bytes() == Path("theirs/tokenizer.json").read_bytes()


# llama2.c


def read_model_bin(path):
    """The sizes and the tensors of a version-0 file, as memory_map_weights in run.c finds them."""
    content = Path(path).read_bytes()
    dim, hidden, n_layer, n_head, n_kv, vocab, seq_len = struct.unpack_from("<7i", content)
    numbers = torch.from_numpy(np.frombuffer(content, "<f4", offset=28).copy())
    assert vocab < 0  # the head is not shared
    kv_dim, head_dim = dim * n_kv // n_head, dim // n_head
    shapes = {
        "embedding": (-vocab, dim), "att_norm": (n_layer, dim), "wq": (n_layer, dim, dim),
        "wk": (n_layer, kv_dim, dim), "wv": (n_layer, kv_dim, dim), "wo": (n_layer, dim, dim),
        "ffn_norm": (n_layer, dim), "w1": (n_layer, hidden, dim), "w2": (n_layer, dim, hidden),
        "w3": (n_layer, hidden, dim), "norm": (dim,), "cos": (seq_len, head_dim // 2),
        "sin": (seq_len, head_dim // 2), "head": (-vocab, dim),
    }  # fmt: skip
    tensors, start = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        tensors[name] = numbers[start : start + size].view(shape)
        start += size
    assert start == len(numbers)
    return {"n_head": n_head, "n_kv": n_kv, "seq_len": seq_len}, tensors


def read_tokenizer_bin(path, vocab_size):
    """The pieces of a tokenizer.bin, as build_tokenizer in run.c reads them."""
    content = Path(path).read_bytes()
    longest, start, pieces = *struct.unpack_from("<i", content), 4, []
    for _ in range(vocab_size):
        score, length = struct.unpack_from("<fi", content, start)
        assert score > -1e10 and 1 <= length <= longest
        pieces.append(content[start + 8 : start + 8 + length])
        start += 8 + length
    assert start == len(content)
    return pieces


def run_c_encode(pieces, text):
    """encode() of run.c, with BOS. No two pieces together are a third, so that nothing is merged."""
    ids = {piece: i for i, piece in enumerate(pieces)}  # of equal pieces any may be found; here the last
    assert not any(a + b in ids for a, b in itertools.product(ids, ids))
    tokens = [1]
    if text:
        tokens.append(ids[b" "])
    for character in text:
        piece = character.encode()
        tokens += [ids[piece]] if piece in ids else [byte + 3 for byte in piece]
    assert max(tokens) < len(pieces)  # run.c does not check it
    return tokens


def run_c_decode(pieces, previous, token):
    """decode() of run.c."""
    piece = pieces[token]
    return piece[1:] if previous == 1 and piece.startswith(b" ") else piece


def run_c_forward(config, w, tokens):
    """forward() of run.c for all tokens: rotary pairs are neighbours. (T, vocab_size) logits."""
    n_head, n_kv = config["n_head"], config["n_kv"]
    x = w["embedding"][tokens]  # (T, dim)
    T, head_dim = len(tokens), x.size(1) // n_head
    angles = torch.arange(T)[:, None] * 10_000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # (T, 1, head_dim/2)
    torch.testing.assert_close(w["cos"][:T], angles.cos(), atol=1e-5, rtol=0)

    def norm(x, weight):
        return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def rotate(x):
        pairs = torch.view_as_complex(x.reshape(T, -1, head_dim // 2, 2))
        return torch.view_as_real(pairs * turn).reshape(T, -1, head_dim)

    for layer in range(len(w["wq"])):
        h = norm(x, w["att_norm"][layer])
        q, k = rotate(h @ w["wq"][layer].T), rotate(h @ w["wk"][layer].T)  # (T, heads, head_dim)
        v = (h @ w["wv"][layer].T).view(T, n_kv, head_dim)
        for head in range(n_head):
            shared = head // (n_head // n_kv)
            scores = q[:, head] @ k[:, shared].T / head_dim**0.5
            weights = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)
            columns = slice(head * head_dim, (head + 1) * head_dim)
            x = x + weights @ v[:, shared] @ w["wo"][layer][:, columns].T
        h = norm(x, w["ffn_norm"][layer])
        gate = h @ w["w1"][layer].T
        x = x + (gate * gate.sigmoid() * (h @ w["w3"][layer].T)) @ w["w2"][layer].T
    return norm(x, w["norm"]) @ w["head"].T


def run_c(folder, prompt):
    """What `run model.bin -z tokenizer.bin -t 0 -n 0 -i prompt` prints, by the functions above."""
    config, w = read_model_bin(f"{folder}/model.bin")
    pieces = read_tokenizer_bin(f"{folder}/tokenizer.bin", len(w["embedding"]))
    tokens = run_c_encode(pieces, prompt)
    n_prompt = len(tokens)
    text = b""
    for position in range(config["seq_len"]):
        if position >= n_prompt - 1:
            tokens.append(run_c_forward(config, w, tokens)[-1].argmax().item())
        if tokens[position + 1] == 1:
            break
        text += run_c_decode(pieces, tokens[position], tokens[position + 1])
    return text.decode()


LLAMA2C = [
    ("3", {"n_layer": 3}),
    ("3", {"tie_word_embeddings": False, "n_embd": 24, "intermediate_size": 51}),
    ("4", {"n_kv_head": 1}),
    ("4", {"n_kv_head": 2, "tie_word_embeddings": False, "vocab_size": len(CHARACTERS) + 3}),
    ("4", {"n_kv_head": 4, "n_layer": 1}),
]
CHARACTERS_SORTED = CharTokenizer(CHARACTERS).characters
LLAMA2C_PROMPTS = ["", "a", " B,\n\n  c: ", "é😀\t!", "\n"]


def before_prompt(prompt, characters=CHARACTERS):
    """What the model sees before a prompt: the newline that BOS stands for, and a space if there is a prompt.

    Where a character is not known, its place is taken as llama2c.before_prompt says.
    """
    start = "\n" if "\n" in characters else min(characters)
    space = " " if " " in characters else start
    return start + space if prompt else start


@pytest.mark.parametrize("stage, sizes", LLAMA2C)
def test_llama2c_computes_our_logits_from_its_file(run_export, stage, sizes):
    ours = make_run("run", stage, **sizes)
    assert run_export("--run", "run", "--to", "llama2c", "--out", "out") == 0
    config, w = read_model_bin("out/model.bin")
    assert w["norm"].shape == ours.model.norm.weight.shape  # the model at its own width
    pieces = read_tokenizer_bin("out/tokenizer.bin", len(w["embedding"]))
    tokenizer = CharTokenizer(CHARACTERS)
    of_ours = torch.tensor([CHARACTERS_SORTED.index(piece.decode()) for piece in pieces if piece != b"<s>"])
    characters = torch.arange(len(pieces)) != 1
    for prompt in LLAMA2C_PROMPTS:
        idx = torch.from_numpy(tokenizer.encode(before_prompt(prompt) + prompt).astype(np.int64))[None]
        with torch.no_grad():
            expected = ours(idx)[0][0, :, : tokenizer.vocab_size]
            logits = run_c_forward(config, w, run_c_encode(pieces, prompt))
        torch.testing.assert_close(logits[:, characters], expected[:, of_ours], atol=1e-4, rtol=0)
        # BOS, which ends the text, is never the most likely, and as likely as the average token at most.
        assert (logits[:, 1] < logits[:, characters].amax(1)).all()
        probs = logits.softmax(-1)
        assert (probs[:, 1] <= 1 / len(pieces)).all()
        # Otherwise sampling follows the model's own distribution.
        sampled = torch.zeros_like(expected).index_add(1, of_ours, probs[:, characters])
        wanted = expected.softmax(-1) * (1 - probs[:, 1:2])
        torch.testing.assert_close(sampled, wanted, atol=1e-4, rtol=0)


def sample_greedily(folder, prompt):
    """What sample.py --temperature 0 writes from the text that run.c starts from, as far as run.c prints it.

    That is what comes after the newline, without a space that is first.
    """
    model, _ = runs.load(Path(folder), "best", CPU)
    tokenizer = runs.tokenizer(Path(folder))
    start = before_prompt(prompt, tokenizer.characters)
    tokens = tokenizer.encode(start + prompt).tolist()
    n = model.config.block_size + 1 - len(tokens)
    made = tokenizer.decode(list(generation.generate(model, tokens, n, tokenizer.vocab_size, 0)))
    return prompt + made if prompt else made.removeprefix(" ")


@pytest.mark.parametrize("stage, sizes", LLAMA2C)
def test_llama2c_writes_the_text_of_sample(run_export, stage, sizes):
    make_run("run", stage, **sizes)
    assert run_export("--run", "run", "--to", "llama2c", "--out", "out") == 0
    for prompt in LLAMA2C_PROMPTS:
        assert run_c("out", prompt) == sample_greedily("run", prompt)


@pytest.mark.parametrize("characters", ["abc", "a", "ab\n", "a bc", "".join(map(chr, range(0x4E00, 0x4F10)))])
def test_llama2c_takes_any_characters_and_survives_unknown_ones(run_export, capsys, characters):
    """With and without a newline or a space, from 1 character to more than bytes have values."""
    make_run("run", "3", characters=characters)
    assert run_export("--run", "run", "--to", "llama2c", "--out", "out") == 0
    before = before_prompt("…", characters)
    assert f"puts {before!r} before every prompt" in capsys.readouterr().out
    prompt = characters.strip()[:2]
    assert run_c("out", prompt) == sample_greedily("run", prompt)
    assert run_c("out", "") == sample_greedily("run", "")
    assert len(run_c("out", "é")) > 2  # ends well


@pytest.fixture(scope="session")
def llama2c_run(tmp_path_factory):
    """The program `run`, compiled from the checkout of karpathy/llama2.c that LLAMA2C names."""
    if "LLAMA2C" not in os.environ:
        pytest.skip("LLAMA2C names no checkout of karpathy/llama2.c")
    program = tmp_path_factory.mktemp("llama2c") / "run"
    source = Path(os.environ["LLAMA2C"], "run.c")
    subprocess.run(["gcc", "-O2", "-o", program, source, "-lm"], check=True, capture_output=True)
    return program


@pytest.mark.parametrize("stage, sizes", LLAMA2C)
def test_the_c_program_writes_the_text_of_sample(llama2c_run, run_export, stage, sizes):
    make_run("run", stage, **sizes)
    assert run_export("--run", "run", "--to", "llama2c", "--out", "out") == 0
    for prompt in LLAMA2C_PROMPTS:
        command = [llama2c_run, "out/model.bin", "-z", "out/tokenizer.bin", "-t", "0", "-n", "0"]
        command += ["-i", prompt] if prompt else []
        done = subprocess.run(command, check=True, capture_output=True)
        assert done.stdout.decode() == sample_greedily("run", prompt) + "\n"


@pytest.mark.parametrize(
    "stage, sizes, message",
    [
        ("0", {}, "llama2.c has no counterpart of stage0_gpt"),
        ("2", {}, "llama2.c has no counterpart of stage2_rope"),
        ("3", {"rope_theta": 500_000.0}, "the run has rope_theta 500000.0"),
        ("4", {"norm_eps": 1e-6}, "the run has norm_eps 1e-06"),
    ],
)
def test_what_llama2c_does_not_compute_is_refused_by_name(run_export, capsys, stage, sizes, message):
    make_run("run", stage, **sizes)
    assert run_export("--run", "run", "--to", "llama2c", "--out", "out") == 2
    explained(capsys, message)


def test_a_model_too_large_for_the_counters_of_llama2c_is_refused(tmp_path):
    sizes = {"n_layer": 100, "n_head": 8, "n_embd": 8192, "block_size": 8192}
    sizes |= {"rope_theta": 10_000.0, "norm_eps": 1e-5}
    with pytest.raises(UserError, match="width of k is 6,710,886,400"):
        llama2c.write(tmp_path, "stage3_swiglu", {}, sizes, {"tokenizer": "char", "characters": "ab"})
    assert not list(tmp_path.iterdir())


def test_llama2c_takes_runs_of_characters_alone(run_export, capsys):
    make_run("run", "3")
    runs.write_json(Path("run/meta.json"), {"tokenizer": "gpt2", "vocab_size": 50257})
    assert run_export("--run", "run", "--to", "llama2c", "--out", "out") == 2
    explained(capsys, "tokenizer 'gpt2'", "--tokenizer char")


# Fine-tuning

# With a learning rate of 0, what is saved is what was started from.
FROZEN = ["--lr", "0", "--min-lr", "0", "--steps", "1", "--batch-size", "2", "--eval-tokens", "50"]


@pytest.fixture
def fine_tune(workshop, monkeypatch):
    """fine_tune(*flags): trains on words.txt without sizes of its own; returns the exit status."""
    return lambda *flags: call(monkeypatch, train, "--data", "words.txt", *flags)


def words():
    """The characters of words.txt."""
    return "".join(sorted(set(Path("words.txt").read_text())))


def test_a_model_of_16_bit_weights_is_trained_in_float32(run_import, fine_tune):
    llama(vocab_size=len(words())).to(torch.bfloat16).save_pretrained("theirs")
    tokenizer_json.of_characters(words()).save("theirs/tokenizer.json")
    assert run_import("theirs", "--out", "runs/imported") == 0
    assert fine_tune("--init-from", "runs/imported", "--out", "same", *FROZEN) == 0
    expected = load_file("runs/imported/last/model.safetensors")
    expected = {name: tensor.float() for name, tensor in expected.items()}
    assert_same_tensors(load_file("same/last/model.safetensors"), expected)


@pytest.mark.parametrize("make, stage", [(gpt2, "stage0_gpt"), (llama, "stage5_flash")])
def test_an_imported_model_can_be_fine_tuned_and_sampled(
    run_import, fine_tune, run_sample, make, stage, capsys
):
    theirs = make(vocab_size=len(words()))
    theirs.save_pretrained("theirs")
    tokenizer_json.of_characters(words()).save("theirs/tokenizer.json")
    assert run_import("theirs", "--out", "runs/imported") == 0
    assert fine_tune("--init-from", "runs/imported", "--out", "same", *FROZEN) == 0
    same = runs.load(Path("same"), "best", CPU)[0]
    assert_same_tensors(checkpoint.weights(same), load_file("runs/imported/last/model.safetensors"))
    assert_same_logits(same, theirs)
    assert fine_tune("--init-from", "runs/imported", "--steps", "20", "--lr", "1e-3", "--out", "tuned") == 0
    config = runs.read_config(Path("tuned"))
    assert config["stage"] == stage and config["settings"]["init_from"] == "runs/imported"
    history = [json.loads(line)["loss"] for line in Path("tuned/metrics.jsonl").read_text().splitlines()]
    assert history[-1] < history[0]
    shutil.rmtree("runs/imported")
    assert fine_tune("--resume", "--out", "tuned", "--steps", "21") == 0
    assert run_sample("--run", "tuned", "--prompt", "a", "--max-new-tokens", "5") == 0


def test_fine_tuning_keeps_the_characters_of_the_run_for_a_text_with_fewer(fine_tune, workshop):
    make_run("run", "4", words())
    few = "jab fad\n" * 40
    Path("few.txt").write_text(few)
    assert fine_tune("--init-from", "run", "--data", "few.txt", "--out", "tuned", *FROZEN) == 0
    assert runs.tokenizer(Path("tuned")).characters == words()
    dataset = data.recode(data.load("few.txt"), runs.read_meta(Path("run")))
    assert dataset.tokenizer.decode(dataset.train) + dataset.tokenizer.decode(dataset.val) == few
    assert fine_tune("--resume", "--out", "tuned", "--data", "few.txt", "--steps", "2") == 0


def test_fine_tuning_names_a_character_that_the_run_does_not_know(fine_tune, capsys):
    make_run("run", "4", words())
    Path("other.txt").write_text("jab Zad\n" * 40)
    capsys.readouterr()
    assert fine_tune("--init-from", "run", "--data", "other.txt", "--out", "out") == 2
    explained(capsys, "the character 'Z' (U+005A) is not in the model's vocabulary")


def test_data_in_other_tokens_than_the_run_is_refused(workshop):
    dataset = data.load("words.txt")
    with pytest.raises(UserError, match="words uses the tokenizer 'char', but the run uses 'gpt2'"):
        data.recode(dataset, {"tokenizer": "gpt2", "vocab_size": 50257})


def test_the_sizes_of_the_run_are_the_defaults_and_the_context_may_change(fine_tune, capsys):
    make_run("run", "4", words(), n_kv_head=1)
    longer = ["--model.block-size", "13"]
    assert fine_tune("--init-from", "run", "--out", "longer", *FROZEN, *longer) == 0
    expected = runs.read_config(Path("run"))["model"] | {"block_size": 13}
    assert runs.read_config(Path("longer"))["model"] == expected
    capsys.readouterr()
    assert fine_tune("--init-from", "run", "--out", "out", "--model.n-layer", "3") == 2
    explained(capsys, "does not fit this model: model.layers.2")


def test_a_table_of_positions_does_not_change_its_length(fine_tune, capsys):
    make_run("run", "0", words())
    capsys.readouterr()
    assert fine_tune("--init-from", "run", "--out", "out", "--model.block-size", "13") == 2
    place = "model.embed_positions.weight is (24, 32) in the file and (13, 32) in the model"
    explained(capsys, f"does not fit this model: {place}")


def test_another_stage_starts_from_weights_that_fit_it_alone(fine_tune, capsys):
    make_run("run", "3", words())
    capsys.readouterr()
    assert fine_tune("--init-from", "run", "--stage", "4", "--out", "out") == 2
    explained(capsys, "(stage3_swiglu) does not fit this model: model.layers.0.self_attn.k_proj.weight")
    mha = ["--model.n-kv-head", "4"]
    assert fine_tune("--init-from", "run", "--stage", "4", "--out", "gqa", *FROZEN, *mha) == 0


def test_what_cannot_be_started_from_is_explained(run_import, fine_tune, spoilt, capsys):
    assert fine_tune("--init-from", "nowhere", "--out", "out") == 2
    explained(capsys, "nowhere is not a run: there is no such folder")
    spoilt("llama")
    assert run_import("theirs", "--out", "runs/imported") == 0
    capsys.readouterr()
    assert fine_tune("--resume", "--out", "runs/imported") == 2
    explained(capsys, "runs/imported was imported", "--init-from runs/imported")
    assert fine_tune("--resume", "--init-from", "runs/imported") == 2
    explained(capsys, "leave out --init-from")
