"""A run's tokenizer as tokenizer.json, the file of the library `tokenizers`, and back."""

import hashlib
import json
import sys
from pathlib import Path

from data.tokenizers import (
    GPT2_BYTES,
    GPT2_FILES,
    CharTokenizer,
    copy_side_files,
    gpt2_files,
    import_tokenizers,
    library_tokenizer,
    read_object,
)
from lab.errors import UserError, shown

ANY_CHARACTER = r"[\s\S]"


def write(meta: dict, run: Path, folder: Path, context: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json for a run: those imported with it, or new ones."""
    copy_side_files(run, folder)
    if not (folder / "tokenizer.json").exists():
        tokenizer = of_characters(meta["characters"]) if meta["tokenizer"] == "char" else of_gpt2()
        tokenizer.save(str(folder / "tokenizer.json"))
    if not (folder / "tokenizer_config.json").exists():
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,  # true would delete spaces before punctuation
            "model_max_length": context,
        }
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def unbind(folder: Path) -> None:
    """Names a class in tokenizer_config.json that goes by tokenizer.json alone, not by the kind of model."""
    config = read_object(folder / "tokenizer_config.json") | {"tokenizer_class": "PreTrainedTokenizerFast"}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


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

    "char" and "gpt2" are those whose ids for any text are exactly ours; "hf" is any other.
    """
    if not (folder / "tokenizer.json").exists():
        raise UserError(
            f"{shown(folder)} has no tokenizer.json; transformers writes one: "
            "AutoTokenizer.from_pretrained(…).save_pretrained(FOLDER)"
        )
    described = json.loads(library_tokenizer(folder).to_str())  # every field, also those left to defaults
    if described["model"]["type"] == "WordLevel":
        characters = "".join(described["model"]["vocab"])
        if described == json.loads(of_characters(characters).to_str()):
            return {"tokenizer": "char", "characters": characters}
    return {"tokenizer": "gpt2" if is_gpt2(described) else "hf"}


def is_gpt2(described: dict) -> bool:
    """Whether a tokenizer.json gives every text GPT-2's ids, and its ids the same text as GPT-2.

    It may know <|endoftext|> as a special token: sample.py then takes it for one in a prompt, train.py takes
    it for text in data, as always.
    """
    model = described["model"]
    splitter, processor, decoder = (  # null where there is none
        described[field] or {} for field in ("pre_tokenizer", "post_processor", "decoder")
    )
    splits_alike = (
        splitter.get("type") == "ByteLevel"
        and splitter["use_regex"]
        and not splitter["add_prefix_space"]
        and processor.get("type") in (None, "ByteLevel")  # neither adds a token
        and decoder.get("type") == "ByteLevel"
        and not any(described[field] for field in ("normalizer", "truncation", "padding"))
        and {token["content"] for token in described["added_tokens"]} <= {"<|endoftext|>"}
    )
    if not splits_alike or model["type"] != "BPE":
        return False
    # unk_token and fuse_unk have no effect: every byte is known
    options = ("dropout", "byte_fallback", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
    if any(model[option] for option in options):
        return False
    merges = [" ".join(pair) for pair in model["merges"]]
    vocab_bpe = "\n".join(["#version: 0.2", *merges, ""])
    pieces = [*GPT2_BYTES, *("".join(pair) for pair in model["merges"]), "<|endoftext|>"]
    if model["vocab"] != {piece: i for i, piece in enumerate(pieces)}:
        return False
    return hashlib.sha256(vocab_bpe.encode()).hexdigest() == GPT2_FILES["vocab.bpe"]


def say_what_is_ignored(folder: Path) -> None:
    """Names on stderr what tokenizer_config.json asks for and tokenizer.json, which decides, does not do."""
    config = read_object(folder / "tokenizer_config.json")
    tokenizer = library_tokenizer(folder)
    added = tokenizer.encode("").tokens  # the special tokens around every text
    for name in ("bos_token", "eos_token"):
        token = config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        asked = config.get(f"add_{name}")
        if isinstance(asked, bool) and content and asked != (content in added):
            print(
                f"tokenizer_config.json has add_{name} = {json.dumps(asked)}, but tokenizer.json adds "
                f"{'no ' if asked else ''}{content}: tokenizer.json decides, as in transformers 5",
                file=sys.stderr,
            )
