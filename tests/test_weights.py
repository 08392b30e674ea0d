"""Imported weights: the tied matrix under either name, parts and their index, numbers that are none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from test_deploy import (  # noqa: F401  run_import is a fixture
    CONTEXT,
    CPU,
    YARN,
    assert_same_logits,
    assert_same_tensors,
    change_weights,
    deepseek,
    explained,
    gpt2,
    llama,
    make_run,
    mixtral,
    run_import,
    save_theirs,
)

from deploy import deepseek as deepseek_files
from lab import stages
from lab.storage import checkpoint, runs
from lab.storage.tensors import DTYPES, WithoutMemory, write


def imported():
    """The model of the run that the tests import."""
    return runs.load(Path("run"), "best", CPU)[0]


@pytest.mark.parametrize("make", [llama, gpt2, mixtral, deepseek])
def test_a_tied_matrix_may_be_saved_as_the_head_alone(run_import, make):  # noqa: F811
    theirs = make(tie_word_embeddings=True)
    save_theirs(theirs, "theirs")
    save_model(theirs, "theirs/model.safetensors")
    saved = load_file("theirs/model.safetensors")
    assert "lm_head.weight" in saved and not any("wte" in name or "embed_tokens" in name for name in saved)
    assert run_import("theirs", "--out", "run") == 0
    assert_same_logits(imported(), theirs)


def test_the_copies_of_deepseeks_extra_blocks_are_compared_with_a_matrix_of_either_name():
    matrix = torch.randn(3, 2)
    names = ["lm_head.weight", "model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"]
    assert deepseek_files.full_names(dict.fromkeys(names, matrix)) == {"lm_head.weight": matrix}


@pytest.fixture
def parts(workshop):
    """A Llama in several parts; returns the model, its parts' paths, and change(weight_map)."""
    theirs = llama()
    save_theirs(theirs, "theirs", max_shard_size="20KB")
    index = Path("theirs/model.safetensors.index.json")

    def change(edit):
        content = json.loads(index.read_text())
        content["weight_map"] = edit(content["weight_map"])
        index.write_text(json.dumps(content))

    return theirs, sorted(Path("theirs").glob("*.safetensors")), change


def test_each_tensor_comes_from_the_part_that_the_index_names(run_import, parts, capsys):  # noqa: F811
    theirs, paths, _ = parts
    held = {path: load_file(path) for path in paths}
    first, last = (next(iter(held[path])) for path in (paths[0], paths[-1]))
    assert first != last
    for path, name in ((paths[0], last), (paths[-1], first)):  # an older copy in a part before, and after
        other = next(tensors[name] for tensors in held.values() if name in tensors)
        held[path] |= {name: other + 1, "of.another.model": torch.ones(3)}
    for path, tensors in held.items():
        save_file(tensors, path, {"format": "pt"})
    assert run_import("theirs", "--out", "run") == 0
    assert_same_logits(imported(), theirs)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("ignored tensors not listed in model.safetensors.index.json: ")
    assert f"{last} in {paths[0].name}" in said and f"of.another.model in {paths[-1].name}" in said


NORM = "model.norm.weight"
BAD_MAPS = {
    "a tensor that its part lacks": (
        lambda files: files | {NORM: files["model.embed_tokens.weight"]},
        f"holds {NORM}, but it does not",
    ),
    "an absolute path": (lambda files: files | {NORM: "/etc/passwd"}, "outside of its folder, /etc/passwd"),
    "a folder above": (lambda files: files | {NORM: "a/../../x"}, "outside of its folder, a/../../x"),
    "a folder above, on Windows": (lambda files: files | {NORM: "..\\x"}, "outside of its folder, ..\\x"),
    "a missing part": (lambda files: files | {NORM: "gone"}, "theirs has no file 'gone'"),
    "no name": (lambda files: files | {NORM: ""}, "theirs has no file ''"),
    "a number": (lambda files: files | {NORM: 3}, "it has no weight_map from tensors to files"),
    "a list": (list, "it has no weight_map from tensors to files"),
    "too few tensors": (
        lambda files: {name: file for name, file in files.items() if name != NORM},
        f"{NORM} is missing",
    ),
}


@pytest.mark.parametrize("edit, message", BAD_MAPS.values(), ids=BAD_MAPS.keys())
def test_an_index_that_is_wrong_is_explained(run_import, parts, capsys, edit, message):  # noqa: F811
    parts[2](edit)
    assert run_import("theirs", "--out", "out") == 2
    err = capsys.readouterr().err
    said = [line for line in err.splitlines() if not line.startswith("ignored ")]
    assert said[0].startswith("error: ") and len(said) <= 2
    assert message in err and not Path("out").exists()


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_that_is_not_a_finite_number_is_refused_by_name(run_import, capsys, number, dtype):  # noqa: F811
    save_theirs(llama().to(dtype), "theirs")
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights("theirs", lambda tensors: tensors[name][3, 2].fill_(float(number)))
    assert run_import("theirs", "--out", "out") == 2
    explained(capsys, f"theirs: {name} contains NaN or infinity")


def test_an_infinity_in_a_saved_mask_does_no_harm(run_import):  # noqa: F811
    theirs = gpt2()
    save_theirs(theirs, "theirs")
    mask = {"transformer.h.0.attn.masked_bias": torch.tensor(-torch.inf)}
    change_weights("theirs", lambda tensors: tensors.update(mask))
    assert run_import("theirs", "--out", "run") == 0
    assert_same_logits(imported(), theirs)


# What was right already


@pytest.mark.parametrize("groups", [{}, {"n_group": 4, "topk_group": 2}], ids=["no groups", "groups"])
def test_routing_with_strongly_negative_biases_is_that_of_transformers(run_import, groups):  # noqa: F811
    theirs = deepseek(**groups)
    for name, buffer in theirs.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.sub_(10)
    save_theirs(theirs, "theirs")
    assert run_import("theirs", "--out", "run") == 0
    assert_same_logits(imported(), theirs)


PLAIN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 8}
VARIANTS = {
    "as DeepSeek": YARN,
    "plain": PLAIN,
    "a large factor": PLAIN | {"factor": 40.0},
    "a factor of 1": PLAIN | {"factor": 1.0},
    "mscale alone": PLAIN | {"mscale": 0.7},
    "mscale_all_dim alone": PLAIN | {"mscale_all_dim": 0.7},
    "equal mscales": PLAIN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "other turns": PLAIN | {"beta_fast": 8, "beta_slow": 2},
    "one bound": PLAIN | {"beta_fast": 1, "beta_slow": 1},
    "another base": PLAIN | {"rope_theta": 500_000.0},
}


@pytest.mark.parametrize("rope", VARIANTS.values(), ids=VARIANTS.keys())
def test_each_variant_of_yarn_has_the_logits_of_transformers(run_import, rope):  # noqa: F811
    theirs = deepseek(rope_parameters=rope, num_hidden_layers=1, qk_rope_head_dim=8)
    save_theirs(theirs, "theirs")
    assert run_import("theirs", "--out", "run") == 0
    assert_same_logits(imported(), theirs, CONTEXT)


@pytest.mark.parametrize("sizes", [{}, {"n_embd": 36, "n_head": 3}])
def test_results_do_not_depend_on_where_a_file_holds_the_weights(workshop, sizes):
    """Bit for bit: torch computes differently with tensors at odd addresses, as older files have them."""
    model = make_run("run", "6", **sizes)
    idx = torch.randint(model.config.vocab_size, (1, CONTEXT))
    with torch.inference_mode():
        expected = model(idx)[0]
        weights = checkpoint.weights(model)
        for padding in range(0, 64, 8):
            save_file(weights, "run/best/model.safetensors", {"padding": " " * padding})
            assert torch.equal(imported()(idx)[0], expected)


def test_a_file_written_tensor_by_tensor_is_read_by_the_library(tmp_path):
    torch.manual_seed(0)
    numbers = 100 * torch.randn(3, 5, 7)
    written = {str(dtype): numbers.to(dtype) for dtype in DTYPES}
    written |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "turned": numbers.transpose(0, 2)}
    write(tmp_path / "file", written, {"step": "7"}, {"turned": torch.bfloat16})
    read = load_file(tmp_path / "file")
    assert_same_tensors(read, written | {"turned": written["turned"].bfloat16()})
    assert read["turned"].dtype == torch.bfloat16
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"step": "7"}


def test_only_parameters_are_made_without_memory():
    class Variant(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 4)
            self.table = torch.arange(5).float()
            self.register_buffer("mask", torch.ones(2, 2).tril())

    with WithoutMemory():
        model = Variant()
    assert model.linear.weight.is_meta and model.linear.bias.is_meta
    assert model.table.tolist() == [0, 1, 2, 3, 4] and model.mask.tolist() == [[1, 0], [1, 1]]


def test_a_variant_that_fills_a_buffer_made_with_empty_can_be_loaded(workshop, monkeypatch):
    model = make_run("run", "3")
    stage = stages.load("stage3_swiglu")

    class Variant(stage.GPT):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("scale", torch.empty(1).fill_(3), persistent=False)

        def forward(self, idx):
            return self.scale * super().forward(idx)[0], {}

    monkeypatch.setattr(stage, "GPT", Variant)
    idx = torch.randint(model.config.vocab_size, (1, CONTEXT))
    assert torch.equal(imported()(idx)[0], 3 * model(idx)[0])


MEASURE = """
import re, sys
from deploy import import_hf
import sample

def peak(main, *flags):
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    sys.argv = ["", *flags]
    main()
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024

for name in ("small", "large"):
    imported = peak(import_hf.main, name, "--out", "run-" + name)
    sampled = peak(sample.main, "--run", "run-" + name, "--max-new-tokens", "3", "--prompt", chr(256))
    print("measured", imported, sampled)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory with /proc")
def test_importing_and_sampling_need_the_weights_in_memory_once(workshop):
    """Stage 0's tensors are transposed and divided on the way, so they cannot just be copied."""
    save_theirs(gpt2(), "small")
    save_theirs(gpt2(n_embd=512, n_layer=5, vocab_size=200), "large")
    size = Path("large/model.safetensors").stat().st_size
    assert size > 60e6
    root = {"PYTHONPATH": str(stages.ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], env=os.environ | root, capture_output=True, text=True, check=True
    )
    measured = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("measured")]
    for small, large in zip(*measured, strict=True):
        assert int(large) - int(small) < 1.3 * size
