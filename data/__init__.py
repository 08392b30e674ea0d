"""Text for training: `load` finds or fetches a text, prepares its token files once, and maps them."""

import sys
from difflib import get_close_matches
from pathlib import Path

from lab import terminal

if sys.argv[0] == "-m":  # python -m data.openwebtext is about to import the rest
    terminal.prepare()

from data import openshakespeare, owntext, tinyshakespeare
from data.prepare import Dataset, recode
from data.shards import Shards
from data.tokenizers import CharTokenizer, GPT2Tokenizer, from_meta
from lab.errors import UserError

__all__ = ["CharTokenizer", "Dataset", "GPT2Tokenizer", "Shards", "from_meta", "load", "recode"]


def load(data: str, tokenizer: str = "char") -> Dataset:
    """The dataset "tinyshakespeare", "openshakespeare" or "openwebtext", or of the file or folder at a path.

    `tokenizer` is "char" or "gpt2". UserError for all that the user can mend. Where TinyShakespeare cannot be
    reached, the dataset returned is openshakespeare, and a line on stderr says so.
    """
    if tokenizer not in ("char", "gpt2"):
        raise UserError(f"there is no tokenizer {tokenizer!r}: choose char or gpt2")
    if data == "tinyshakespeare":
        return tinyshakespeare.load(tokenizer)
    if data == "openshakespeare":
        return openshakespeare.load(tokenizer)
    if data == "openwebtext":
        from data import openwebtext  # here, so that it is not there yet for python -m data.openwebtext

        return openwebtext.load(tokenizer)
    path = Path(data).expanduser()
    if not data or not path.exists():
        close = get_close_matches(data, ("tinyshakespeare", "openshakespeare", "openwebtext"), n=1)
        guess = f"; did you mean {close[0]}?" if close else ""
        raise UserError(
            f"there is no dataset or file {data!r}{guess}\n"
            f"name tinyshakespeare, openshakespeare, openwebtext, or a path: a UTF-8 text, .jsonl or "
            f".parquet file, or a folder of .txt, .jsonl or .parquet files"
        )
    return owntext.load(path, tokenizer)
