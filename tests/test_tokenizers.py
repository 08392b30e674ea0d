"""Tokenizers that were imported: ids and text as the libraries have them, and every way a prompt comes in."""

import itertools
import json
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
import tokenizers
from conftest import call
from test_data import gpt2_files  # noqa: F401  a fixture: GPT-2's vocabulary, through pip
from test_deploy import byte_level, llama, make_run, run_export, run_import, words  # noqa: F401  fixtures too
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, MistralConfig

import train
from data import files
from data.tokenizers import SIDE_FILES, CharTokenizer, GPT2Tokenizer, HuggingFaceTokenizer
from deploy import tokenizer_json
from lab.errors import UserError
from lab.sampling import generation
from lab.storage import runs

TEXT = "ab cd é😀"
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}


def token(content, **flags):
    """An added token as tokenizer_config.json has it."""
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False} | flags
    return {"content": content, "special": True} | flags


def sentence_piece(text, replacement="▁"):
    """A tokenizer as Llama 2's: a space before the text, BOS, bytes for what is unknown."""
    special = ["<unk>", "<s>", "</s>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), replacement, *sorted({*text} - {" "})]
    pieces += [f"{replacement}a", f"{replacement}b"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [(replacement, "a"), (replacement, "b")]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    tokenizer.add_special_tokens(special)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(replacement), normalizers.Replace(" ", replacement)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(replacement, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def save(library, folder="theirs", config=LlamaConfig, **side_files):
    """A folder with tokenizer.json, config.json and other files, by their names without .json."""
    Path(folder).mkdir(exist_ok=True)
    library.save(f"{folder}/tokenizer.json")
    config(vocab_size=400, bos_token_id=None, eos_token_id=None).save_pretrained(folder)
    for name, content in side_files.items():
        Path(folder, f"{name}.json").write_text(json.dumps(content))
    return Path(folder)


@pytest.fixture
def import_with(run_import):  # noqa: F811
    """import_with(library, rows, **side_files): a tiny Llama with that tokenizer, imported as runs/it."""

    def make(library, rows=0, **side_files):
        for folder in ("theirs", "runs/it"):
            shutil.rmtree(folder, ignore_errors=True)
        llama(vocab_size=library.get_vocab_size() + rows).save_pretrained("theirs")
        Path("theirs/generation_config.json").unlink()
        library.save("theirs/tokenizer.json")
        for name, content in side_files.items():
            Path("theirs", f"{name}.json").write_text(json.dumps(content))
        return run_import("theirs", "--out", "runs/it")

    return make


# Ids: what the files beside tokenizer.json say.

SIDE = {
    "none": {},
    "with ids": {
        "tokenizer_config": FAST | {"added_tokens_decoder": {"300": token("<x>"), "301": token("<y>")}}
    },
    "ordinary": {
        "tokenizer_config": FAST | {"added_tokens_decoder": {"300": token("<x>", special=False, rstrip=True)}}
    },
    "known ones with other flags": {
        "tokenizer_config": FAST | {"added_tokens_decoder": {"0": token("<|begin|>", lstrip=True)}}
    },
    "added_tokens.json": {"tokenizer_config": FAST, "added_tokens": {"<y>": 301, "<x>": 300}},
    "added_tokens.json alone": {"added_tokens": {"<y>": 301, "<x>": 300}},
    "special_tokens_map.json": {
        "tokenizer_config": FAST,
        "special_tokens_map": {
            "pad_token": "<x>",
            "sep_token": token("<y>", lstrip=True),
            "additional_special_tokens": ["<z>"],
        },
    },
    "a map that does not count": {
        "tokenizer_config": FAST | {"added_tokens_decoder": {}},
        "special_tokens_map": {"pad_token": "<x>"},
    },
    "names": {"tokenizer_config": FAST | {"pad_token": "<x>", "image_token": "<y>", "unk_token": "<z>"}},
    "names in a dict": {
        "tokenizer_config": FAST
        | {"extra_special_tokens": {"image_token": "<y>"}}
        | {"cls_token": {"__type": "AddedToken"} | token("<x>")}
    },
    "a list of names": {"tokenizer_config": FAST | {"additional_special_tokens": ["<y>", "<x>"]}},
    "special tokens as text": {"tokenizer_config": FAST | {"split_special_tokens": True, "pad_token": "<x>"}},
    "a prefix space that has no effect": {"tokenizer_config": FAST | {"add_prefix_space": True}},
}  # fmt: skip


@pytest.mark.parametrize("side", SIDE.values(), ids=SIDE.keys())
def test_added_tokens_have_the_ids_that_transformers_gives_them(workshop, text, side):
    folder = save(byte_level(text), **side)
    ours, theirs = HuggingFaceTokenizer(folder), AutoTokenizer.from_pretrained("theirs")
    assert ours.vocab_size == len(theirs)
    for prompt in (TEXT, "", "<x>ab <y> cd<z>  <|begin|> <x>", "a <|begin|>b"):
        assert ours.encode(prompt).tolist() == theirs(prompt)["input_ids"]


CLASSES = ("PreTrainedTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", None)


@pytest.mark.parametrize("config", [LlamaConfig, GPT2Config, MistralConfig])
@pytest.mark.parametrize("make, bos", [(byte_level, "<|begin|>"), (sentence_piece, "<s>")])
def test_bos_and_eos_are_added_as_transformers_adds_them(workshop, text, make, bos, config):
    library = make(text)
    for name, added in itertools.product(CLASSES, (True, False)):
        # transformers makes a GPT-2 of a SentencePiece vocabulary where it is told so
        if make is sentence_piece and (name == "GPT2Tokenizer" or (name is None and config is GPT2Config)):
            continue
        side = {"bos_token": bos, "eos_token": bos, "unk_token": bos}
        side |= {"add_bos_token": added, "add_eos_token": added}
        side |= {"tokenizer_class": name} if name else {}
        folder = save(library, config=config, tokenizer_config=side)
        theirs = AutoTokenizer.from_pretrained("theirs")
        for prompt in (TEXT, "", f"a{bos}"):
            assert HuggingFaceTokenizer(folder).encode(prompt).tolist() == theirs(prompt)["input_ids"], side


def test_a_bos_that_tokenizer_json_does_not_add_is_reported_at_the_import(import_with, text, capsys):
    for added, where, make in ((True, "no <|begin|>", byte_level), (False, "<s>", sentence_piece)):
        side = FAST | {"bos_token": where.removeprefix("no "), "add_bos_token": added}
        assert import_with(make(text), tokenizer_config=side) == 0
        said = f"add_bos_token = {json.dumps(added)}, but tokenizer.json adds {where}: tokenizer.json wins"
        assert said in capsys.readouterr().err
        assert import_with(make(text), tokenizer_config=side | {"add_bos_token": not added}) == 0
        assert "add_bos_token" not in capsys.readouterr().err


def test_a_token_from_a_side_file_can_be_given_and_made(import_with, run_sample, text, capsys, monkeypatch):
    decoder = {"300": token("<x>"), "301": token("<y>")}
    assert import_with(byte_level(text), 2, tokenizer_config=FAST | {"added_tokens_decoder": decoder}) == 0
    seen = {}

    def generate(model, tokens, n, vocab_size, **options):
        seen.update(tokens=tokens, vocab_size=vocab_size)
        return iter([65, 301, 300])

    monkeypatch.setattr(generation, "generate", generate)
    capsys.readouterr()
    assert run_sample("--run", "runs/it", "--prompt", "b<x>") == 0
    assert seen == {"tokens": [66, 300], "vocab_size": 302}
    assert capsys.readouterr().out == "b<x>a<y><x>\n"


REFUSED = {
    "a gap": ({"tokenizer_config": {"added_tokens_decoder": {"305": token("<x>")}}}, "'<x>' the id 305, but"),
    "another's id": ({"added_tokens": {"<x>": 5}}, "added_tokens.json gives '<x>' the id 5"),
    "more than the model": ({"tokenizer_config": {"pad_token": "<x>"}}, "has 301 tokens, with those added"),
    "a list": ({"tokenizer_config": [1]}, "tokenizer_config.json is damaged"),
    "no content": ({"tokenizer_config": {"added_tokens_decoder": {"300": {}}}}, "are damaged"),
    "ids that are words": ({"tokenizer_config": {"added_tokens_decoder": {"x": token("<x>")}}}, "damaged"),
    "a file for each version": (
        {"tokenizer_config": {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}},
        "only tokenizer.json is supported",
    ),
}


@pytest.mark.parametrize("side, message", REFUSED.values(), ids=REFUSED.keys())
def test_side_files_that_cannot_be_followed_are_refused(import_with, text, capsys, side, message):
    assert import_with(byte_level(text), **side) == 2
    assert message in refusal(capsys)
    assert not Path("runs/it").exists()


def refusal(capsys) -> str:
    """The one or two lines of an error."""
    err = capsys.readouterr().err
    assert err.startswith("error: ") and len(err.splitlines()) <= 2 and "Traceback" not in err
    return err


def test_a_vocabulary_that_splits_text_by_chance_is_refused(import_with, text, capsys):
    library = byte_level(text)
    library.model.dropout = 0.1
    assert import_with(library) == 2
    assert "tokenizer.json has dropout = 0.1" in refusal(capsys)


# What is imported comes back from an export.

ALL_SIDE_FILES = {
    "tokenizer_config.json": FAST
    | {"added_tokens_decoder": {"300": token("<x>")}, "bos_token": "<|begin|>", "pad_token": "<x>"}
    | {"chat_template": "{{ messages }}", "model_max_length": 7, "add_bos_token": False},
    "special_tokens_map.json": {"pad_token": "<x>"},
    "added_tokens.json": {"<x>": 300},
    "generation_config.json": {"do_sample": True, "temperature": 0.5, "eos_token_id": [3, 5]},
}


def import_all(import_with, text):
    """Imports a folder with every side file there is; returns the names of those."""
    side = {name.removesuffix(".json"): content for name, content in ALL_SIDE_FILES.items()}
    # Written before the import: a chat template in a folder has a name of its own.
    assert import_with(byte_level(text), 2, **side) == 0
    Path("theirs/additional_chat_templates").mkdir()
    Path("theirs/additional_chat_templates/tools.jinja").write_text("{{ tools }}")
    for name in SIDE_FILES:
        if not Path("theirs", name).exists() and not name.endswith(".json"):
            Path("theirs", name).write_text(f"{name}\n")
    config = json.loads(Path("theirs/config.json").read_text())
    ids = {"bos_token_id": 0, "eos_token_id": [3, 5], "pad_token_id": 300}
    Path("theirs/config.json").write_text(json.dumps(config | ids))
    shutil.rmtree("runs/it")


def test_every_side_file_comes_back_from_an_export(import_with, run_import, run_export, text):  # noqa: F811
    import_all(import_with, text)
    assert run_import("theirs", "--out", "runs/it") == 0
    assert run_export("--run", "runs/it", "--to", "hf", "--out", "back") == 0
    for path in Path("theirs").rglob("*"):
        if path.is_file() and path.name not in ("model.safetensors", "config.json", "generation_config.json"):
            assert Path("back", path.relative_to("theirs")).read_bytes() == path.read_bytes(), path
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    before, after = (json.loads(Path(f, "config.json").read_text()) for f in ("theirs", "back"))
    assert [after[key] for key in ids] == [before[key] for key in ids] == [0, [3, 5], 300]
    generation = json.loads(Path("back/generation_config.json").read_text())
    assert generation == ALL_SIDE_FILES["generation_config.json"] | {"suppress_tokens": [301]}
    assert not Path("back/hf_config.json").exists()
    theirs, again = AutoTokenizer.from_pretrained("theirs"), AutoTokenizer.from_pretrained("back")
    assert again("<x>" + TEXT)["input_ids"] == theirs("<x>" + TEXT)["input_ids"]
    assert again.get_chat_template(chat_template="tools") == "{{ tools }}"


def test_token_ids_without_a_generation_config_reach_the_export(run_import, run_export, workshop):  # noqa: F811
    theirs = llama(vocab_size=30, eos_token_id=7)
    theirs.save_pretrained("theirs")
    Path("theirs/generation_config.json").unlink()
    config = json.loads(Path("theirs/config.json").read_text())
    del config["bos_token_id"]  # then it is the class's: 1
    Path("theirs/config.json").write_text(json.dumps(config))
    tokenizer_json.of_characters("".join(map(chr, range(256, 286)))).save("theirs/tokenizer.json")
    assert run_import("theirs", "--out", "runs/it") == 0
    assert run_export("--run", "runs/it", "--to", "hf", "--out", "back") == 0
    back = LlamaConfig.from_pretrained("back")
    assert (back.bos_token_id, back.eos_token_id) == (1, 7)
    assert json.loads(Path("back/generation_config.json").read_text())["eos_token_id"] == 7


def test_a_mistral_that_becomes_a_llama_keeps_its_ids(run_import, run_export, text):  # noqa: F811
    # For a Mistral transformers goes by tokenizer.json; a LlamaTokenizer it would make from the vocabulary.
    library = sentence_piece(text)
    library.normalizer = normalizers.Replace(" ", "▁")
    llama(vocab_size=library.get_vocab_size()).save_pretrained("theirs")
    config = json.loads(Path("theirs/config.json").read_text())
    config |= {"model_type": "mistral", "sliding_window": None}
    Path("theirs/config.json").write_text(json.dumps(config))
    library.save("theirs/tokenizer.json")
    Path("theirs/tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "eos_token": "j"}')
    assert run_import("theirs", "--out", "runs/it") == 0
    assert run_export("--run", "runs/it", "--to", "hf", "--out", "back") == 0
    theirs, again = AutoTokenizer.from_pretrained("theirs"), AutoTokenizer.from_pretrained("back")
    assert again("ab")["input_ids"] == theirs("ab")["input_ids"] == library.encode("ab").ids
    assert again.eos_token == "j"


def test_a_fine_tuned_model_keeps_the_side_files(run_import, run_export, workshop, monkeypatch):  # noqa: F811
    llama(vocab_size=len(words()), eos_token_id=3).save_pretrained("theirs")
    tokenizer_json.of_characters(words()).save("theirs/tokenizer.json")
    Path("theirs/tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert run_import("theirs", "--out", "runs/it") == 0
    flags = ("--init-from", "runs/it", "--data", "words.txt", "--steps", "1", "--batch-size", "2")
    assert call(monkeypatch, train, *flags, "--eval-tokens", "50", "--out", "tuned") == 0
    assert run_export("--run", "tuned", "--to", "hf", "--out", "back") == 0
    assert json.loads(Path("back/tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"
    assert json.loads(Path("back/config.json").read_text())["eos_token_id"] == 3


# Which tokenizer.json is exactly one of ours.


def change(*path, to):
    """A function that sets one field of a tokenizer.json."""

    def edit(described):
        for key in path[:-1]:
            described = described[key]
        described[path[-1]] = to

    return edit


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "!", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"!": {"id": "!", "ids": [0], "tokens": ["!"]}},
}
TRUNCATION = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
PADDING = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
PADDING |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
NOT_GPT2 = {
    "a BOS template": change("post_processor", to=TEMPLATE),
    "a template among several": change("post_processor", to={"type": "Sequence", "processors": [TEMPLATE]}),
    "a normalizer": change("normalizer", to={"type": "NFC"}),
    "a prefix space": change("pre_tokenizer", "add_prefix_space", to=True),
    "no splitting": change("pre_tokenizer", "use_regex", to=False),
    "no pre-tokenizer": change("pre_tokenizer", to=None),
    "whole words": change("model", "ignore_merges", to=True),
    "a suffix of words": change("model", "end_of_word_suffix", to="</w>"),
    "bytes for the unknown": change("model", "byte_fallback", to=True),
    "another decoder": change("decoder", to={"type": "Fuse"}),
    "no decoder": change("decoder", to=None),
    "truncation": change("truncation", to=TRUNCATION),
    "padding": change("padding", to=PADDING),
    "an added piece": lambda d: d["added_tokens"].append({"id": 262} | token("Ġthe")),
}


@pytest.fixture(scope="module")
def hub_gpt2(gpt2_files, tmp_path_factory):  # noqa: F811
    """tokenizer.json of GPT-2 as it is on the hub."""
    folder = tmp_path_factory.mktemp("gpt2")
    for name, content in gpt2_files.items():
        (folder / name).write_bytes(content)
    model = models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer.to_str()


def test_only_gpt2s_own_tokenizer_is_taken_for_gpt2s(hub_gpt2, workshop):
    def is_gpt2(edit=lambda described: None):
        described = json.loads(hub_gpt2)
        edit(described)
        return tokenizer_json.is_gpt2(described)

    assert is_gpt2()
    assert is_gpt2(change("added_tokens", to=[]))
    assert is_gpt2(change("post_processor", to=None))
    assert [name for name, edit in NOT_GPT2.items() if is_gpt2(edit)] == []
    Path("theirs").mkdir()
    Path("theirs/tokenizer.json").write_text(hub_gpt2)
    Path("theirs/tokenizer_config.json").write_text('{"model_max_length": 1024, "add_bos_token": true}')
    assert tokenizer_json.read(Path("theirs")) == {"tokenizer": "gpt2"}  # transformers 5 adds none either
    Path("theirs/tokenizer_config.json").write_text('{"pad_token": "<pad>"}')
    assert tokenizer_json.read(Path("theirs")) == {"tokenizer": "hf"}


def test_an_imported_gpt2_knows_its_special_token_in_a_prompt(hub_gpt2, gpt2_files, workshop):  # noqa: F811
    for name, content in gpt2_files.items():
        files.write(files.root() / "cache" / name, content)
    Path("run").mkdir()
    Path("run/tokenizer.json").write_text(hub_gpt2)
    runs.write_json(Path("run/meta.json"), {"tokenizer": "gpt2", "vocab_size": 50257})
    tokenizer = runs.tokenizer(Path("run"))
    text = "ROMEO:\n\n  Ay me! café 😀 "
    assert tokenizer.encode(f"{text}<|endoftext|>").tolist() == [*GPT2Tokenizer().encode(text), 50256]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_only_our_own_characters_are_taken_for_them(workshop):
    library = tokenizer_json.of_characters("abc")
    folder = save(library)
    assert tokenizer_json.read(folder) == {"tokenizer": "char", "characters": "abc"}
    for name, content in (("added_tokens", {"<x>": 3}), ("tokenizer_config", {"pad_token": "<x>"})):
        save(library, **{name: content})
        assert tokenizer_json.read(folder) == {"tokenizer": "hf"}
        Path(folder, f"{name}.json").unlink()
    library.normalizer = normalizers.Lowercase()
    library.save("theirs/tokenizer.json")
    assert tokenizer_json.read(folder) == {"tokenizer": "hf"}


# Text: what the library makes of ids, token by token.


def word_level(*pieces, decoder=None):
    """A tokenizer of these pieces alone."""
    tokenizer = tokenizers.Tokenizer(
        models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="")
    )
    if decoder:
        tokenizer.decoder = decoder
    return tokenizer


def with_gaps():
    """A tokenizer with ids that stand for nothing."""
    decoder = decoders.Metaspace()
    return tokenizers.Tokenizer.from_str(
        json.dumps(
            json.loads(word_level("▁a", decoder=decoder).to_str())
            | {"model": {"type": "WordLevel", "vocab": {"▁a": 0, "▁b": 5, "▁": 7}, "unk_token": ""}}
        )
    )


FALLBACK = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
LIBRARIES = {
    "byte-level": lambda: byte_level("aab € 😀 abab"),
    "sentencepiece": lambda: sentence_piece("aab"),
    "a piece that is no byte": lambda: word_level("a", "●", "Ã", "©", decoder=decoders.ByteLevel()),
    "an underscore for a space": lambda: word_level("_a", "_", "b", decoder=decoders.Metaspace("_")),
    "bytes that are text": lambda: word_level("<0x41>", "a", decoder=decoders.Fuse()),
    "bytes alone": lambda: word_level(*(f"<0x{b:02X}>" for b in b"a\xe2\x82\xac\xff"), "x", decoder=FALLBACK),
    "word pieces": lambda: word_level("a", "##b", "c", "'", "##s", decoder=decoders.WordPiece()),
    "suffixes": lambda: word_level("a</w>", "b", "c</w>", decoder=decoders.BPEDecoder()),
    "no decoder": lambda: word_level("a", "b"),
    "gaps": with_gaps,
    "a space stripped from the front": lambda: word_level(
        " a", " ", "b ", decoder=decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    ),
    "replaced": lambda: word_level("a", "é", "\ufffd", decoder=decoders.Replace("a", "bc")),
}  # fmt: skip


@pytest.mark.parametrize("make", LIBRARIES.values(), ids=LIBRARIES.keys())
def test_the_text_of_a_stream_is_what_the_library_decodes(workshop, make):
    library = make()
    tokenizer = HuggingFaceTokenizer(save(library))
    draw = random.Random(0)
    for length in range(30):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(length)]
        expected = library.decode(ids, skip_special_tokens=False)
        assert tokenizer.decode(ids) == expected
        text_of = tokenizer.stream()
        assert "".join(map(text_of, [*ids, None])) == expected


def test_the_stream_goes_on_from_the_prompt(workshop, text):
    tokenizer = HuggingFaceTokenizer(save(sentence_piece(text)))
    for prompt, following in (("a", " b"), ("a b", "c"), ("a😀", "é"), ("a😀", "b")):
        tokens = tokenizer.encode(prompt).tolist()
        made = tokenizer.encode(prompt + following).tolist()[len(tokens) :]
        text_of = tokenizer.stream(tokens)
        assert "".join(map(text_of, [*made, None])) == following
    # A byte makes those of the prompt's last character invalid; that character was shown all the same.
    text_of = tokenizer.stream(tokenizer.encode("a😀"))
    assert text_of(3 + 0xE2) + text_of(tokenizer.encode("b")[1]) == "\ufffd b"


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_text_is_given_as_soon_as_its_characters_are_whole(workshop, text, make):
    tokenizer = HuggingFaceTokenizer(save(make(text)))
    shown, parts = "ab né € ab", []
    text_of = tokenizer.stream()
    for token_id in tokenizer.encode(shown):
        parts.append(text_of(token_id))
    assert len([part for part in parts if part]) > 6  # not all at the end
    assert not any("\ufffd" in part for part in parts)
    prefix = "<s>" if make is sentence_piece else ""
    assert "".join([*parts, text_of(None)]).replace("<s> ", "<s>") == prefix + shown


# Prompts


@pytest.fixture
def give(run_sample, workshop, monkeypatch, capsys):
    """give(how, content, …): samples with the prompt given in one way; returns status, stdout and stderr."""

    def sample_with(how, content, *flags):
        Path("prompt.txt").write_bytes(content)
        with open("prompt.txt") as redirected:
            reading, writing = os.pipe()
            os.write(writing, content)
            os.close(writing)
            with open(reading) as pipe:
                stdin = {"pipe": pipe, "redirected": redirected}.get(how, sys.stdin)
                monkeypatch.setattr(sys, "stdin", stdin)
                if how == "flag":
                    flags += ("--prompt", os.fsdecode(content))
                elif how == "file":
                    flags += ("--prompt-file", "prompt.txt")
                elif how == "closed":
                    monkeypatch.setattr(sys, "stdin", None)
                capsys.readouterr()
                status = run_sample("--run", "runs/it", "--max-new-tokens", "3", *flags)
        return status, *capsys.readouterr()

    return sample_with


WAYS = ("flag", "file", "pipe", "redirected")


def test_a_prompt_is_read_alike_however_it_is_given(import_with, give, text):
    assert import_with(byte_level(text)) == 0
    out = {give(how, "\ufeffab\r\né".encode())[1] for how in WAYS}
    assert len(out) == 1 and out.pop().startswith("ab\né")
    for how in WAYS:
        status, out, err = give(how, b"ab\xff")
        assert status == 2 and out == ""
        name = {"flag": "the prompt", "file": "prompt.txt"}.get(how, "standard input")
        assert f"error: {name} is not UTF-8: byte 0xff at offset 2\n" in err


def test_an_empty_prompt_starts_a_new_text(import_with, give, text):
    for make in (byte_level, sentence_piece):
        assert import_with(make(text)) == 0
        out = {give(how, b"")[:2] for how in (*WAYS, "closed")}
        assert len(out) == 1 and out.pop()[0] == 0


def test_a_prompt_that_gives_no_token_is_refused(give, workshop):
    library = byte_level("ab")
    library.normalizer = normalizers.Strip()
    for stage, flags in (("3", ()), ("7", ()), ("7", ("--draft",))):
        shutil.rmtree("runs", ignore_errors=True)
        make_run("runs/it", stage, vocab_size=library.get_vocab_size())
        library.save("runs/it/tokenizer.json")
        runs.write_json(Path("runs/it/meta.json"), {"tokenizer": "hf"})
        for how in WAYS:
            status, out, err = give(how, b" \t", *flags)
            assert status == 2 and out == "" and "the prompt ' \\t' gives no tokens" in err
            status, out, err = give(how, b"", *flags)
            assert status == 0


def test_half_of_a_surrogate_pair_becomes_a_replacement_character(workshop, text):
    tokenizer = HuggingFaceTokenizer(save(byte_level(text)))
    assert tokenizer.encode("a\udcff\ud83d").tolist() == tokenizer.encode("a\ufffd\ufffd").tolist()


def test_a_surrogate_that_stands_for_no_byte_is_refused_too(run_sample, import_with, text, capsys):
    assert import_with(byte_level(text)) == 0
    capsys.readouterr()
    assert run_sample("--run", "runs/it", "--prompt", "a\ud83d") == 2
    assert "the prompt is not UTF-8: byte 0xed at offset 1" in refusal(capsys)


@pytest.mark.parametrize("path, reason", [(".", "Is a directory"), ("", "Is a directory"), ("no", "No such")])
def test_a_prompt_file_that_cannot_be_read_is_named(import_with, run_sample, text, capsys, path, reason):
    assert import_with(byte_level(text)) == 0
    capsys.readouterr()
    assert run_sample("--run", "runs/it", "--prompt-file", path) == 2
    name = path or "''"
    assert f"cannot read {name}: {reason}" in refusal(capsys)


def test_what_the_model_has_no_token_for_is_named(workshop, capsys):
    library = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    assert HuggingFaceTokenizer(save(library)).encode("aé bxé").tolist() == [0, 1]
    assert capsys.readouterr().err == "dropped, because the model has no token for it: é x\n"
    library = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token=""))
    with pytest.raises(UserError, match="cannot encode this text"):
        HuggingFaceTokenizer(save(library)).encode("x")
    for make in (byte_level, sentence_piece):
        HuggingFaceTokenizer(save(make("ab"))).encode("aé\n 😀 x")
    assert capsys.readouterr().err == ""


def test_a_new_text_starts_with_bos_or_a_newline_or_the_first_token(workshop, text):
    def start(library):
        return generation.default_prompt(HuggingFaceTokenizer(save(library)))

    library = sentence_piece(text)
    assert start(library) == [1]
    library.post_processor = processors.TemplateProcessing(
        "</s> <s> $A <unk>", special_tokens=[("<unk>", 0), ("<s>", 1), ("</s>", 2)]
    )
    assert start(library) == [2, 1]
    library = byte_level(text)
    assert start(library) == library.encode("\n").ids
    library.normalizer = normalizers.Strip()
    assert start(library) == [0]
    assert start(tokenizers.Tokenizer(models.WordLevel({"x": 0, "a": 1}, unk_token="a"))) == [0]
    assert start(tokenizers.Tokenizer(models.WordLevel({"x": 0}, unk_token=""))) == [0]
    assert generation.default_prompt(CharTokenizer("a\nb")) == [0]
    assert generation.default_prompt(CharTokenizer("\tab\n")) == [1]
    assert generation.default_prompt(CharTokenizer("ab")) == [0]
