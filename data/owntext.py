"""One's own text: a UTF-8 file, or a folder of .txt, .jsonl or .parquet files."""

from pathlib import Path

from data import documents, files, sources
from data.prepare import Dataset, open_prepared, prepare, sha256_of, tokens_folder
from lab.errors import UserError

IN_MEMORY = 100 * 2**20  # bytes of .txt files with the tokenizer gpt2, above which they become shards
HELD_OUT = 4 * 2**20  # bytes of files for each part held out: enough for --eval-tokens, from 40 MiB on


def load(path: Path, tokenizer: str) -> Dataset:
    """The dataset of a text file, or of the .txt files in a folder, sorted by path and joined by a newline.

    The last tenth is held out. Parquet and JSONL files, and .txt files beyond IN_MEMORY bytes, are
    documents instead: with GPT-2's tokens and in shards, the end-of-text token after each (see `at_size`).

    The prepared folder's name holds a sha256, so a text that changed is prepared anew.
    """
    path = path.resolve()
    if path.is_dir():
        if is_large(path, tokenizer):
            return at_size(path, tokenizer)
        parts = sources.files_of(path)[".txt"]
        name, text = path.name, "\n".join(files.read_text(part) for part in parts)
    else:
        name, text = path.stem, files.read_text(path)
    sha256 = sha256_of(text)
    folder = tokens_folder(f"{name}-{sha256[:8]}", tokenizer)
    if folder.exists():
        return open_prepared(folder, sha256)
    return prepare(name, text, str(path), tokenizer, folder)


def is_large(path: Path, tokenizer: str) -> bool:
    """Whether a folder is tokenized document by document, not held in memory."""
    by_kind = sources.files_of(path)
    if list(by_kind) != [".txt"]:
        return True  # also where it has none, or of several kinds: `sources.in_folder` says so
    texts = by_kind[".txt"]
    return tokenizer == "gpt2" and sum(text.stat().st_size for text in texts) > IN_MEMORY


def at_size(path: Path, tokenizer: str) -> Dataset:
    """The dataset of a folder of documents: the rows of .parquet or lines of .jsonl, or each .txt file.

    About 4 MiB are held out, at most one document of 10 and at least one of 2000, drawn as for OpenWebText.
    UserError if the tokenizer is not gpt2: the characters of a text are known at its end.
    """
    source = sources.in_folder(path)
    if tokenizer != "gpt2":
        raise UserError(f"{path} has {source.kind} files, which need GPT-2's tokens: add --tokenizer gpt2")
    folder = tokens_folder(f"{path.name}-{source.identity[:8]}", tokenizer)
    if folder.exists():
        return documents.open_prepared(folder)
    every = min(2000, max(10, sum(source.sizes) // HELD_OUT))
    return documents.prepare(path.name, source, folder, every)
