"""One's own text: a UTF-8 file, or a folder of .txt files."""

from pathlib import Path

from data import files
from data.prepare import Dataset, open_prepared, prepare, sha256_of, tokens_folder
from lab.errors import UserError


def load(path: Path, tokenizer: str) -> Dataset:
    """The dataset of a text file, or of a folder's .txt files, sorted by name and joined by a newline.

    The prepared folder's name holds the text's sha256, so a text that changed is prepared anew.
    """
    path = path.resolve()
    if path.is_dir():
        parts = sorted(path.glob("*.txt"), key=lambda part: part.name)
        if not parts:
            raise UserError(f"the folder {path} has no .txt files\nput UTF-8 texts that end in .txt there")
        name, text = path.name, "\n".join(files.read_text(part) for part in parts)
    else:
        name, text = path.stem, files.read_text(path)
    sha256 = sha256_of(text)
    folder = tokens_folder(f"{name}-{sha256[:8]}", tokenizer)
    if folder.exists():
        return open_prepared(folder, sha256)
    return prepare(name, text, str(path), tokenizer, folder)
