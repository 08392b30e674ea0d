"""TinyShakespeare: 1,115,394 characters from nine of Shakespeare's plays (Andrej Karpathy, char-rnn)."""

import hashlib
import os
import time
from pathlib import Path

from data import files, openshakespeare
from data.download import download
from data.prepare import Dataset, open_prepared, prepare, tokens_folder
from data.tokenizers import HuggingFaceTokenizer
from lab.errors import UserError

NAME = "tinyshakespeare"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
ASK_AGAIN_AFTER = 24 * 3600  # seconds


def load(tokenizer: str | HuggingFaceTokenizer) -> Dataset:
    """Opens TinyShakespeare. Prepares it if needed, from the file that TINYSHAKESPEARE names or a download.

    If the download fails, returns openshakespeare and says so on stderr. The download is then not retried for
    a day, so that offline starts do not wait for it.
    """
    folder = tokens_folder(NAME, tokenizer)
    if folder.exists():
        return open_prepared(folder, SHA256, tokenizer)
    kept = files.root() / "cache" / f"{NAME}.txt"
    named = os.environ.get("TINYSHAKESPEARE")
    if named:
        source = str(Path(named).expanduser().resolve())
        files.write(kept, _checked(Path(source)))  # keep a copy for use with another tokenizer
    elif not kept.exists():
        source = URL
        failure = _fetch(kept)
        if failure:
            return _stand_in(tokenizer, failure)
    else:
        source = str(kept)
    return prepare(NAME, _checked(kept).decode(), source, tokenizer, folder)


def _checked(path: Path) -> bytes:
    """The file's bytes. Raises UserError if they are not TinyShakespeare."""
    content = files.read(path)
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise UserError(
            f"{path} is not TinyShakespeare: {len(content):,} bytes with sha256 {found[:8]}…, "
            f"not 1,115,394 with {SHA256[:8]}…\nthe correct file is {URL}"
        )
    return content


def _fetch(path: Path) -> str:
    """Downloads TinyShakespeare to `path`. Returns the reason for a failure, or an empty string."""
    failed = path.with_suffix(".unreachable")  # its mtime records the last failure
    if openshakespeare.is_at_hand() and failed.exists():
        age = time.time() - failed.stat().st_mtime
        if 0 <= age < ASK_AGAIN_AFTER:
            return "the download failed within the last 24 hours"
    try:
        download(URL, path, SHA256)
    except UserError as error:
        files.write(failed, b"")
        return str(error)
    return ""


def _stand_in(tokenizer: str | HuggingFaceTokenizer, failure: str) -> Dataset:
    try:
        dataset = openshakespeare.load(tokenizer)
    except UserError as error:
        raise UserError(
            f"cannot download TinyShakespeare or its substitute: {failure}; {error}\n"
            f"download {URL} elsewhere and set TINYSHAKESPEARE to the file's path"
        ) from error
    files.say(
        "cannot download TinyShakespeare: using openshakespeare instead, whose losses are not comparable "
        "(to use TinyShakespeare, set the environment variable TINYSHAKESPEARE to the path of its input.txt)"
    )
    return dataset
