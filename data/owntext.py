"""The user's own text: a UTF-8, JSONL or parquet file, or a folder of .txt, .jsonl or .parquet files."""

from pathlib import Path

from data import documents, files, sources
from data.prepare import Dataset, open_prepared, prepare, sha256_of, tokens_folder
from data.tokenizers import HuggingFaceTokenizer
from lab.errors import UserError

IN_MEMORY = 100 * 2**20  # bytes: larger folders of .txt files become shards with the tokenizer gpt2
HELD_OUT = 4 * 2**20  # bytes to hold out for validation, from 40 MiB of files on: enough for --eval-tokens
# How to convert a file that is not text, with the suffixes that the advice is for.
REMEDIES = {
    "unpack it first": ".gz .tgz .bz2 .xz .zst .zip .7z .rar .tar",
    f"save its texts as the column {sources.COLUMN!r} of a .parquet or .jsonl file": (
        ".csv .tsv .xls .xlsx .ods .arrow .feather .orc .avro"
    ),
    f'save it as .jsonl, one object a line: {{"{sources.COLUMN}": "…"}}': ".json .ndjson",
    "save its text as UTF-8 in a .txt file": ".pdf .doc .docx .odt .rtf .epub .mobi .ppt .pptx .ps",
}
REMEDY_OF = {suffix: remedy for remedy, suffixes in REMEDIES.items() for suffix in suffixes.split()}


def load(path: Path, tokenizer: str | HuggingFaceTokenizer) -> Dataset:
    """The dataset of a file, or of the files of one kind in a folder, sorted by path.

    Text files are joined by newlines, and the last tenth is held out. A file is text if it is UTF-8 and its
    suffix is neither .jsonl nor .parquet. JSONL and parquet files, and folders with more than IN_MEMORY bytes
    of .txt files, are collections of documents instead, which become shards (see `at_size`).

    The name of the prepared folder contains a hash, so a changed text is prepared again.
    """
    suffix = path.suffix.lower()  # before resolving links
    path = path.resolve()
    if path.is_dir():
        kind, paths = sources.files_of(path)
    elif suffix in REMEDY_OF:
        raise UserError(f"cannot train on {path}: {suffix} files are not supported\n{REMEDY_OF[suffix]}")
    else:
        kind = suffix if suffix in (".jsonl", ".parquet") else ".txt"
        paths = [path]
    is_large = path.is_dir() and tokenizer == "gpt2" and size_of(paths) > IN_MEMORY
    if kind != ".txt" or is_large:
        return at_size(path, kind, paths, tokenizer)
    name = path.name if path.is_dir() else path.stem
    text = "\n".join(files.read_text(part) for part in paths)
    sha256 = sha256_of(text)
    folder = tokens_folder(f"{name}-{sha256[:8]}", tokenizer)
    if folder.exists():
        return open_prepared(folder, sha256, tokenizer)
    return prepare(name, text, str(path), tokenizer, folder)


def size_of(paths: list[Path]) -> int:
    """The total size of the files in bytes."""
    return sum(path.stat().st_size for path in paths)


def at_size(path: Path, kind: str, paths: list[Path], tokenizer: str | HuggingFaceTokenizer) -> Dataset:
    """The dataset of many documents: rows of .parquet files, lines of .jsonl files, or whole .txt files.

    They are tokenized into shards, with the end-of-text token after each document. About 4 MiB are held out,
    at most one document of 10 and at least one of 2000, drawn as for OpenWebText. Raises UserError if the
    tokenizer is not gpt2: a character vocabulary is known only once the whole text has been read.
    """
    if tokenizer != "gpt2":
        of = f"has {kind} files, which need" if path.is_dir() else f"is a {kind} file, which needs"
        if isinstance(tokenizer, HuggingFaceTokenizer):
            raise UserError(
                f"{path} {of} GPT-2's tokenizer, but the run has one of its own\n"
                "save the texts in .txt files to fine-tune the run on them"
            )
        raise UserError(f"{path} {of} GPT-2's tokenizer: add --tokenizer gpt2")
    source = sources.of_files(path, kind, paths)
    name = path.name if path.is_dir() else path.stem
    folder = tokens_folder(f"{name}-{source.identity[:8]}", tokenizer)
    if folder.exists():
        return documents.open_prepared(folder)
    every = min(2000, max(10, sum(source.sizes) // HELD_OUT))
    return documents.prepare(name, source, folder, every)
