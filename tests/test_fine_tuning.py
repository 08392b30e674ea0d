"""Fine-tuning an imported model with the tokenizer that it came with."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from conftest import call
from safetensors.torch import load_file
from test_deploy import (  # noqa: F401  most are fixtures
    byte_level,
    explained,
    fine_tune,
    llama,
    run_export,
    run_import,
)
from test_training import stop_at
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import train
from data.tokenizers import HuggingFaceTokenizer
from lab.errors import UserError
from lab.storage import runs

CPU = torch.device("cpu")
SPECIAL = ("<|im_start|>", "<|im_end|>")
QUICK = ("--batch-size", "2", "--eval-tokens", "200")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def make_theirs(text, folder="theirs", positions=24, **sizes):
    """A folder with a tiny Llama, a tiny BPE tokenizer with special tokens, and a chat template."""
    tokenizer = byte_level(text)
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in SPECIAL])
    sizes = {"tie_word_embeddings": True, "num_key_value_heads": 2} | sizes
    model = llama(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=positions, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 0.3  # smaller logits than those of other tests: it is to learn
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(f"{folder}/tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    Path(folder, "tokenizer_config.json").write_text(json.dumps(config))
    Path(folder, "chat_template.jinja").write_text(TEMPLATE)


@pytest.fixture
def imported(run_import, text):  # noqa: F811
    """A run imported from such a folder."""
    make_theirs(text)
    assert run_import("theirs", "--out", "runs/it") == 0
    return Path("runs/it")


def losses(folder):
    """The validation losses of a run."""
    records = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [record["val_loss"] for record in records if "val_loss" in record]


def tokens_folders():
    return sorted(path.name for path in Path("data/tokens").iterdir())


def test_fine_tuning_lowers_the_loss_and_the_result_samples_and_exports(
    imported,
    run_sample,
    run_export,  # noqa: F811
    monkeypatch,
    capsys,
):
    flags = ("--data", "words.txt", "--init-from", "runs/it", "--steps", "40", "--lr", "1e-2", *QUICK)
    assert call(monkeypatch, train, *flags, "--out", "tuned") == 0
    said = capsys.readouterr().out
    before = float(said.partition("validation loss before fine-tuning: ")[2].split()[0])
    assert losses("tuned")[-1] < before - 1
    shutil.rmtree("runs/it")
    assert run_sample("--run", "tuned", "--prompt", "ab", "--max-new-tokens", "5") == 0
    assert run_export("--run", "tuned", "--to", "hf", "--out", "back") == 0
    assert Path("back/chat_template.jinja").read_text() == TEMPLATE
    tokenizer = AutoTokenizer.from_pretrained("back")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], return_dict=False)
    assert chat[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    theirs = AutoModelForCausalLM.from_pretrained("back", dtype=torch.float32)
    ours = runs.load(Path("tuned"), "best", CPU)[0]
    idx = torch.tensor([chat[:8]])
    with torch.no_grad():
        torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-4, rtol=0)


def test_a_resumed_fine_tuning_equals_one_never_stopped(imported, fine_tune, monkeypatch):  # noqa: F811
    flags = ("--init-from", "runs/it", *QUICK, "--eval-every", "2", "--steps", "4", "--lr", "1e-3")
    assert fine_tune(*flags, "--out", "whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert fine_tune(*flags, "--out", "stopped") > 128
    shutil.rmtree("runs/it")
    assert fine_tune("--resume", "--out", "stopped") == 0
    whole, stopped = (load_file(f"{run}/last/model.safetensors") for run in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert losses("stopped") == losses("whole")


def test_the_text_is_tokenized_with_the_tokenizer_of_the_model(imported, workshop, text):
    tokenizer = runs.tokenizer(imported)
    dataset = data.load("words.txt", tokenizer)
    expected = tokenizer.encode(text[:18_000])
    assert np.array_equal(dataset.train, expected) and dataset.train.dtype == np.uint16
    assert tokenizer.decode(dataset.train) + tokenizer.decode(dataset.val) == text
    assert dataset.meta["tokenizer"] == "hf" and dataset.meta["vocab_size"] == tokenizer.vocab_size
    again = data.load("words.txt", tokenizer)
    assert np.array_equal(again.val, dataset.val) and len(tokens_folders()) == 1


def test_different_tokenizers_never_share_token_files(imported, workshop, text):
    make_theirs(text[:2000], "others")
    first, other = runs.tokenizer(imported), HuggingFaceTokenizer(Path("others"))
    assert first.sha256 != other.sha256
    for tokenizer in (first, other):
        dataset = data.load("words.txt", tokenizer)
        assert np.array_equal(dataset.val, tokenizer.encode(text[18_000:]))
    assert len(tokens_folders()) == 2
    # An added token changes the ids of a text too, and is in a file of its own.
    shutil.copytree("others", "added")
    config = {"added_tokens_decoder": {"302": {"content": "ab", "special": False}}}
    Path("added/tokenizer_config.json").write_text(json.dumps(config))
    assert HuggingFaceTokenizer(Path("added")).sha256 not in (first.sha256, other.sha256)


def test_a_special_token_in_the_text_is_ordinary_text(imported, workshop, text):
    spoken = text[:9000] + "<|im_start|>user\nab<|im_end|>\n" * 20 + text[9000:] + "<|im_end|>"
    Path("spoken.txt").write_text(spoken)
    tokenizer = runs.tokenizer(imported)
    dataset = data.load("spoken.txt", tokenizer)
    ids = {*np.unique(dataset.train), *np.unique(dataset.val)}
    special = {tokenizer.encode(token)[0] for token in SPECIAL}  # in a prompt they stay special tokens
    assert len(special) == 2 and not ids & special
    assert tokenizer.decode(dataset.train) + tokenizer.decode(dataset.val) == spoken


def test_no_token_is_added_around_the_text(imported, workshop, text):
    library = byte_level(text)
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    library.save("runs/it/tokenizer.json")
    tokenizer = runs.tokenizer(imported)
    assert tokenizer.encode("ab")[0] == 0
    dataset = data.load("words.txt", tokenizer)
    assert 0 not in dataset.train and 0 not in dataset.val


def test_a_vocabulary_beyond_uint16_gets_wider_token_files(workshop, text):
    library = byte_level(text)
    library.add_tokens([f"<{i}>" for i in range(2**16)] + ["zz"])
    Path("large").mkdir()
    library.save("large/tokenizer.json")
    tokenizer = HuggingFaceTokenizer(Path("large"))
    Path("z.txt").write_text(text + "zz" * 20 + text[:2000])
    dataset = data.load("z.txt", tokenizer)
    assert tokenizer.decode(dataset.train) + tokenizer.decode(dataset.val) == Path("z.txt").read_text()
    assert max(dataset.val.max(), dataset.train.max()) >= 2**16
    Path(dataset.folder, "val.bin").write_bytes(b"1234")
    with pytest.raises(UserError, match="damaged"):
        data.load("z.txt", tokenizer)


def test_training_sees_short_windows_and_the_model_keeps_its_positions(
    run_import,  # noqa: F811
    fine_tune,  # noqa: F811
    text,
    capsys,
    monkeypatch,
):
    make_theirs(text, positions=8192)
    assert run_import("theirs", "--out", "runs/it") == 0
    seen = []
    batch = train.batches.train_batch
    monkeypatch.setattr(train.batches, "train_batch", lambda *given: seen.append(batch(*given)) or seen[-1])
    capsys.readouterr()
    assert fine_tune("--init-from", "runs/it", "--steps", "1", *QUICK, "--out", "tuned") == 0
    assert seen[0][0].shape == (2, 256)
    expected = "fine-tuning with --context 256 (the model has 8,192 positions), --batch-size 2 and --lr 2e-05"
    assert expected in capsys.readouterr().out
    assert runs.read_config(Path("tuned"))["model"]["block_size"] == 8192
    flags = ("--init-from", "runs/it", "--steps", "1", *QUICK, "--context")
    assert fine_tune(*flags, "40", "--out", "shorter") == 0
    assert seen[1][0].shape == (2, 40)
    assert fine_tune(*flags, "8193", "--out", "longer") == 2
    explained(capsys, "--context 8193 is too long: the model has 8192 positions")
    assert fine_tune(*flags, "8000", "--out", "longer") == 2
    explained(capsys, "--context 8000 is too long for words")


def test_a_preset_that_is_named_and_a_model_trained_here_keep_their_schedule(imported, fine_tune):  # noqa: F811
    flags = ("--init-from", "runs/it", "--steps", "1", *QUICK)
    assert fine_tune(*flags, "--preset", "laptop", "--out", "named") == 0
    named = runs.read_config(Path("named"))["settings"]
    assert (named["lr"], named["context"]) == (1e-3, None)
    assert fine_tune("--init-from", "named", "--steps", "1", *QUICK, "--out", "again") == 0
    assert runs.read_config(Path("again"))["settings"]["lr"] == 2e-5  # it is still a pretrained model
    assert fine_tune("--stage", "4", "--steps", "1", *QUICK, "--out", "ours", "--model.n-layer", "1") == 0
    assert fine_tune("--init-from", "ours", "--steps", "1", *QUICK, "--out", "tuned") == 0
    assert runs.read_config(Path("tuned"))["settings"]["lr"] == 1e-3


def test_what_does_not_go_with_an_imported_tokenizer_is_explained(
    imported,
    fine_tune,  # noqa: F811
    capsys,
    monkeypatch,
):
    capsys.readouterr()
    start = ("--init-from", "runs/it", "--out", "out")
    assert fine_tune(*start, "--tokenizer", "char") == 2
    explained(capsys, "words uses the tokenizer 'char', but the run uses 'hf': leave out --tokenizer")
    assert fine_tune("--stage", "4", "--tokenizer", "hf", "--out", "out") == 2
    explained(capsys, "--tokenizer hf is the tokenizer of an imported run", "--init-from")
    Path("texts.jsonl").write_text('{"text": "ab"}\n')
    assert fine_tune(*start, "--data", "texts.jsonl") == 2
    explained(capsys, "needs GPT-2's tokenizer, but the run has one of its own", ".txt files")
    assert fine_tune(*start, "--data", "openwebtext") == 2
    explained(capsys, "openwebtext works with GPT-2's tokenizer, not with an imported one")
    monkeypatch.setattr(data.tokenizers, "LONGEST_DATA", 1000)
    assert fine_tune(*start) == 2
    explained(capsys, "the text has 18,000 characters", "at most 1,000\nuse a part of the text")
    assert not Path("out").exists()
