"""deploy.perplexity: losses on the same windows, paired differences, sizes, the table and its files."""

import json
import math
import shutil
import statistics

import pytest
import torch
from conftest import TINY_RUN, call
from test_quantized_storage import CPU, rounded

import data
import train
from deploy import perplexity
from deploy.quantization import storage
from deploy.quantization.linear import replace
from lab import device as devices
from lab.storage import runs
from lab.training import evaluation


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a text, a tiny run "float" trained on it, and "rtn2", the same in 2 bits."""
    folder = tmp_path_factory.mktemp("perplexity")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA_DIR", str(folder / "data"))
        (folder / "words.txt").write_text("the quick brown fox jumps over the lazy dog, " * 200)
        flags = ["--data", folder / "words.txt", "--stage", 4, "--steps", 5, "--out", folder / "float"]
        assert call(patch, train, *TINY_RUN, *flags) == 0
    model, _ = runs.load(folder / "float", "best", CPU)
    replace(model, rounded(model, 2, 32))
    (folder / "rtn2").mkdir()
    storage.save(folder / "rtn2", folder / "float", model, {"method": "rtn"})
    return folder


@pytest.fixture
def compare(folder, monkeypatch):
    """compare(*flags): runs deploy.perplexity on the runs "float" and "rtn2"; returns the exit status."""
    monkeypatch.setenv("DATA_DIR", str(folder / "data"))
    monkeypatch.chdir(folder)
    return lambda *flags: call(monkeypatch, perplexity, "--device", "cpu", *flags)


def test_losses_are_those_of_evaluation_and_differences_are_paired(compare, folder, tmp_path):
    out = tmp_path / "out"
    flags = ["--runs", "float", "rtn2", "float", "--tokens", 200, "--rounds", 1, "--out", out]
    assert compare(*flags) == 0
    results = json.loads((out / "perplexity.json").read_text())
    dataset = data.load(str(folder / "words.txt"))
    for name, result in zip(["float", "rtn2", "float"], results, strict=True):
        model, _ = runs.load(folder / name, "best", CPU)
        expected = evaluation.next_token_loss(
            model, dataset.val, 200, 4, devices.autocast(CPU, torch.float32), CPU
        )
        assert math.isclose(result["loss"], expected, rel_tol=1e-6)
        assert math.isclose(result["perplexity"], math.exp(expected), rel_tol=1e-6)
        assert math.isclose(result["bits_per_byte"], expected / math.log(2), rel_tol=1e-2)  # a byte a token
        assert len(result["losses"]) == 25 and result["tokens"] == 200
    base, quantized, same = results
    assert same["difference"] == same["standard_error"] == 0
    differences = [a - b for a, b in zip(quantized["losses"], base["losses"], strict=True)]
    assert math.isclose(quantized["difference"], quantized["loss"] - base["loss"], abs_tol=1e-9)
    assert math.isclose(quantized["standard_error"], statistics.stdev(differences) / 5)
    assert quantized["bytes_on_disk"] == (folder / "rtn2" / "last" / "model.safetensors").stat().st_size
    assert base["tokens_per_second"] > 0
    table = (out / "perplexity.md").read_text()
    assert "rtn: 2 bits, groups of 32" in table and f"{quantized['difference']:+.4f} ± " in table
    assert (out / "perplexity.png").read_bytes()[1:4] == b"PNG"


def test_a_models_memory_is_counted_once(folder):
    """A tied head does not count twice; the kernels' copies of codes do count."""
    model, _ = runs.load(folder / "float", "best", CPU, torch.float32)
    assert perplexity.in_memory(model) == 4 * sum(parameter.numel() for parameter in model.parameters())
    model, _ = runs.load(folder / "rtn2", "best", CPU, torch.bfloat16)
    kernels = [module.kernel for module in model.modules() if getattr(module, "kernel", None)]
    in_kernels = sum(each.nbytes for kernel in kernels for each in kernel if torch.is_tensor(each))
    stored = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert in_kernels and perplexity.in_memory(model) == stored + in_kernels


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--runs", "float", "--context", 9], "--context 9 is too long: a model has 8 positions"),
        (["--runs", "float", "--tokens", 3], "no whole window of 8"),
        (["--runs", "nothing"], "nothing is not a run"),
        (["--runs", "float", "--data", "nothing.txt"], "there is no dataset or file"),
        (["--runs", "float", "--rounds", -1], "rounds must be at least 0"),
        (["--runs", "float", "other"], "other has another tokenizer than float"),
        (["--runs", "imported"], "the text it was trained on is not known"),
    ],
)
def test_bad_input_is_explained_and_nothing_is_written(compare, folder, capsys, flags, said):
    for name in ("other", "imported"):
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(folder / "float", folder / name)
    meta = runs.read_meta(folder / "other")
    runs.write_json(folder / "other" / "meta.json", meta | {"characters": "!" + meta["characters"]})
    config = runs.read_config(folder / "imported")
    runs.write_json(folder / "imported" / "config.json", config | {"imported_from": "somewhere"})
    assert compare(*flags, "--out", "bad") == 2
    assert said in capsys.readouterr().err.replace("\n", " ")
    assert not (folder / "bad").exists()
