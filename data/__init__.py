"""Training data: `load` finds or downloads a text, tokenizes it once, and memory-maps the token files."""

import sys
from difflib import get_close_matches
from pathlib import Path

from lab import terminal

if sys.argv[0] == "-m":  # run as python -m data.openwebtext: prepare before the slow imports below
    terminal.prepare()

from data import openshakespeare, owntext, pycode, tinyshakespeare
from data.prepare import Dataset, recode
from data.shards import Shards
from data.tokenizers import CharTokenizer, GPT2Tokenizer, HuggingFaceTokenizer, from_meta
from lab.errors import UserError

__all__ = ["CharTokenizer", "Dataset", "GPT2Tokenizer", "Shards", "from_meta", "load", "recode"]

KNOWN = ("tinyshakespeare", "openshakespeare", "pycode", "openwebtext")


def load(data: str, tokenizer: str | HuggingFaceTokenizer = "char") -> Dataset:
    """Opens a dataset, and prepares it first if needed.

    `data` is "tinyshakespeare", "openshakespeare", "pycode", "openwebtext", or the path of a file or folder;
    `tokenizer` is "char", "gpt2" or that of an imported run. If TinyShakespeare cannot be
    downloaded, returns openshakespeare and says so on stderr. Raises UserError for everything that the user
    can fix.
    """
    if isinstance(tokenizer, str) and tokenizer not in ("char", "gpt2"):
        raise UserError(f"unknown tokenizer {tokenizer!r}: choose char or gpt2")
    if data == "tinyshakespeare":
        return tinyshakespeare.load(tokenizer)
    if data == "openshakespeare":
        return openshakespeare.load(tokenizer)
    if data == "pycode":
        return pycode.load(tokenizer)
    if data == "openwebtext":
        from data import openwebtext  # not at the top: python -m data.openwebtext must not import it twice

        return openwebtext.load(tokenizer)
    path = Path(data).expanduser()
    if not data or not path.exists():
        close = get_close_matches(data, KNOWN, n=1)
        guess = f"; did you mean {close[0]}?" if close else ""
        raise UserError(
            f"there is no dataset or file {data!r}{guess}\n"
            f"use {', '.join(KNOWN)}, or the path of a UTF-8 text, .jsonl or "
            f".parquet file, or of a folder of .txt, .jsonl or .parquet files"
        )
    return owntext.load(path, tokenizer)
