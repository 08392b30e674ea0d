"""Tokenizes a text into token files, and opens them.

A prepared folder holds train.bin and val.bin (token ids, nothing else: uint16, or uint32 for a large
vocabulary) and meta.json. It is renamed to its final name once it is complete.
"""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data import cuts, files
from data.shards import Shards
from data.tokenizers import CharTokenizer, GPT2Tokenizer, HuggingFaceTokenizer, from_meta
from lab import formats
from lab.errors import UserError

TRAINING_SHARE = 0.9  # the first 90 % of the characters, as nanoGPT does
SPLITS = ("train", "val")


@dataclass(frozen=True, eq=False)
class Dataset:
    name: str  # "tinyshakespeare", "pycode", …, or from the name of the user's file
    folder: Path  # with the token files and meta.json
    meta: dict
    train: np.memmap | Shards  # (tokens,) uint16 or uint32, read-only
    val: np.memmap | Shards
    tokenizer: CharTokenizer | GPT2Tokenizer | HuggingFaceTokenizer


def tokens_folder(name: str, tokenizer: str | HuggingFaceTokenizer) -> Path:
    """The folder for the token files of a text. Different imported tokenizers have different folders."""
    kind = tokenizer if isinstance(tokenizer, str) else f"{tokenizer.name}-{tokenizer.sha256[:16]}"
    return files.root() / "tokens" / f"{name}-{kind}"


def prepare(
    name: str,
    text: str,
    source: str,
    tokenizer: str | HuggingFaceTokenizer,
    folder: Path,
    training: int | None = None,
) -> Dataset:
    """Splits and tokenizes `text`, writes `folder`, and opens it. `source` says where the text came from.

    training: the number of characters, from the start, to train on. None: TRAINING_SHARE of them. Holds the
    whole text in memory. Raises UserError if it is too short to split, or cannot be tokenized.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        encoder, encode = tokenizer, tokenizer.encode_data
    else:
        encoder = CharTokenizer(text) if tokenizer == "char" else GPT2Tokenizer()
        encode = encoder.encode
    dtype = np.dtype(np.uint16 if encoder.vocab_size <= 2**16 else np.uint32)
    first = int(TRAINING_SHARE * len(text)) if training is None else training
    texts, ids = {"train": text[:first], "val": text[first:]}, {}
    for split, start in zip(SPLITS, (0, first), strict=True):
        try:
            ids[split] = encode(texts[split]).astype(dtype)
        except cuts.Unbroken as error:
            raise UserError(f"{source}: {cuts.Unbroken(start + error.start)}") from None
    if min(map(len, ids.values())) < 2:  # an input and its target
        raise UserError(
            f"{source} has {len(text):,} characters: too few for a training and a validation split\n"
            f"use a longer text"
        )
    meta = {"format": formats.DATA, "name": name, "tokenizer": encoder.name}
    if tokenizer == "char":
        meta["characters"] = encoder.characters
    meta |= {
        "vocab_size": encoder.vocab_size,
        "dtype": dtype.name,
        "tokens": {split: len(ids[split]) for split in SPLITS},
        "bytes": {split: len(texts[split].encode()) for split in SPLITS},  # for bits per byte
        "source": source,
        "sha256": sha256_of(text),
    }
    with files.scratch(folder.parent) as temporary:
        new = temporary / folder.name
        new.mkdir()
        for split in SPLITS:
            ids[split].tofile(new / f"{split}.bin")
        (new / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        try:
            os.rename(new, folder)
        except OSError:
            if not folder.exists():  # it exists if another process has just prepared the same text
                raise
    return open_prepared(folder, meta["sha256"], tokenizer)


def open_prepared(folder: Path, sha256: str, tokenizer: str | HuggingFaceTokenizer) -> Dataset:
    """Opens a prepared folder. Raises UserError if it is damaged or its text has another sha256."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        formats.check(meta, formats.DATA, str(folder / "meta.json"))
        if meta["sha256"] != sha256:
            raise ValueError(f"it was made from another text, with sha256 {meta['sha256'][:8]}…")
        dtype = np.dtype(meta["dtype"])
        for split in SPLITS:
            expected = dtype.itemsize * meta["tokens"][split]
            size = (folder / f"{split}.bin").stat().st_size
            if size != expected:
                raise ValueError(f"{split}.bin has {size:,} bytes, not {expected:,}")
        if isinstance(tokenizer, str):
            tokenizer = from_meta(meta)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder} is damaged ({error})\ndelete that folder and run again") from error
    train, val = (np.memmap(folder / f"{split}.bin", dtype=dtype, mode="r") for split in SPLITS)
    return Dataset(meta["name"], folder, meta, train, val, tokenizer)


def recode(dataset: Dataset, meta: dict, same_text: bool = False) -> Dataset:
    """Converts the dataset to the token ids of a run, described by its `meta`.

    Raises UserError if the run's vocabulary does not cover the text or, with same_text, if the run was
    trained on another text.
    """
    if same_text and any(meta.get(key) != dataset.meta.get(key) for key in ("sha256", "shards")):
        raise UserError(
            f"{dataset.name} is not the text that the run was trained on: its sha256 differs\n"
            "restore that text, or train on this one with --init-from instead of --resume"
        )
    if meta["tokenizer"] != dataset.meta["tokenizer"]:
        raise UserError(
            f"{dataset.name} uses the tokenizer {dataset.meta['tokenizer']!r}, but the run uses "
            f"{meta['tokenizer']!r}: leave out --tokenizer"
        )
    if meta.get("characters") == dataset.meta.get("characters"):
        return dataset
    tokenizer = from_meta(meta)
    ids = tokenizer.encode(dataset.tokenizer.characters)  # the run's id for each of the dataset's ids
    known = {key: meta[key] for key in ("characters", "vocab_size")}
    train, val = ids[dataset.train], ids[dataset.val]
    return replace(dataset, meta=dataset.meta | known, train=train, val=val, tokenizer=tokenizer)


def sha256_of(text: str) -> str:
    """The sha256 of the text encoded as UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()
