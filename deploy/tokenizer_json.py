"""A run's tokenizer as tokenizer.json, the file of the library `tokenizers`, and back."""

import hashlib
import json
import shutil
from pathlib import Path

from data.tokenizers import GPT2_BYTES, GPT2_FILES, CharTokenizer, gpt2_files, import_tokenizers
from lab.errors import UserError, shown

ANY_CHARACTER = r"[\s\S]"


def write(meta: dict, run: Path, folder: Path, context: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json for the tokenizer of a run's meta.json."""
    if meta["tokenizer"] == "hf":
        shutil.copyfile(run / "tokenizer.json", folder / "tokenizer.json")
    else:
        tokenizer = of_characters(meta["characters"]) if meta["tokenizer"] == "char" else of_gpt2()
        tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,  # true would delete spaces before punctuation
        "model_max_length": context,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def of_characters(characters: str):
    """The tokenizers.Tokenizer with the ids of CharTokenizer; a character without an id is an error."""
    library = import_tokenizers()
    ids = {character: i for i, character in enumerate(CharTokenizer(characters).characters)}
    # WordLevel alone raises an error for an unknown word: its own unk_token must be unknown too.
    tokenizer = library.Tokenizer(library.models.WordLevel(ids, unk_token=""))
    tokenizer.pre_tokenizer = library.pre_tokenizers.Split(library.Regex(ANY_CHARACTER), "isolated")
    tokenizer.decoder = library.decoders.Fuse()  # without spaces between
    return tokenizer


def of_gpt2():
    """The tokenizers.Tokenizer with GPT-2's ids.

    <|endoftext|> is no special token in it: as in sample.py it is text in a prompt, is shown when it is made,
    and ends nothing.
    """
    library = import_tokenizers()
    vocab, encoder = gpt2_files()
    tokenizer = library.Tokenizer(library.models.BPE.from_file(str(encoder), str(vocab)))
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer


def read(folder: Path) -> dict:
    """What meta.json of an imported run says of the tokenizer in a folder: {"tokenizer", …}.

    "char" and "gpt2" are recognised; "hf" is any other.
    """
    path = folder / "tokenizer.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        model = described["model"]
        vocab = model["vocab"]
    except FileNotFoundError:
        raise UserError(
            f"{shown(folder)} has no tokenizer.json; transformers writes one: "
            "AutoTokenizer.from_pretrained(…).save_pretrained(FOLDER)"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{shown(path)} is damaged: {type(error).__name__}: {error}") from None
    if model.get("type") == "WordLevel" and described == json.loads(of_characters("".join(vocab)).to_str()):
        return {"tokenizer": "char", "characters": "".join(vocab)}
    return {"tokenizer": "gpt2" if is_gpt2(described) else "hf"}


def is_gpt2(described: dict) -> bool:
    """Whether a tokenizer.json splits text as GPT-2 does and gives the pieces GPT-2's ids."""
    model, splitter = described["model"], described.get("pre_tokenizer") or {}
    if model.get("type") != "BPE" or described.get("normalizer") or splitter.get("type") != "ByteLevel":
        return False
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    vocab_bpe = "\n".join(["#version: 0.2", *merges, ""])
    pieces = [*GPT2_BYTES, *(pair.replace(" ", "") for pair in merges), "<|endoftext|>"]
    return (
        hashlib.sha256(vocab_bpe.encode()).hexdigest() == GPT2_FILES["vocab.bpe"]
        and model["vocab"] == {piece: i for i, piece in enumerate(pieces)}
        and not splitter["add_prefix_space"]
        and all(token["id"] < len(pieces) for token in described["added_tokens"])
    )
