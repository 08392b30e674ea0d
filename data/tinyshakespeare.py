"""TinyShakespeare: 1,115,394 characters from nine of Shakespeare's plays (Andrej Karpathy, char-rnn)."""

import hashlib
import os
import time
from pathlib import Path

from data import files, openshakespeare
from data.download import download
from data.prepare import Dataset, open_prepared, prepare, tokens_folder
from lab.errors import UserError

NAME = "tinyshakespeare"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
ASK_AGAIN_AFTER = 24 * 3600  # seconds


def load(tokenizer: str) -> Dataset:
    """TinyShakespeare: what is prepared, else the file that TINYSHAKESPEARE names, else the public copy.

    Where none can be reached it is openshakespeare, and a line on stderr says so. The public copy is then
    asked for again after a day, so that a start without network does not wait for it.
    """
    folder = tokens_folder(NAME, tokenizer)
    if folder.exists():
        return open_prepared(folder, SHA256)
    kept = files.root() / "cache" / f"{NAME}.txt"
    named = os.environ.get("TINYSHAKESPEARE")
    if named:
        source = str(Path(named).expanduser().resolve())
        files.write(kept, _checked(Path(source)))  # kept, so that another tokenizer finds it too
    elif not kept.exists():
        source = URL
        failure = _fetch(kept)
        if failure:
            return _stand_in(tokenizer, failure)
    else:
        source = str(kept)
    return prepare(NAME, _checked(kept).decode(), source, tokenizer, folder)


def _checked(path: Path) -> bytes:
    """The file's bytes. UserError if they are not TinyShakespeare's."""
    content = files.read(path)
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise UserError(
            f"{path} is not TinyShakespeare: {len(content):,} bytes with sha256 {found[:8]}…, "
            f"not 1,115,394 with {SHA256[:8]}…\nthe right file is {URL}"
        )
    return content


def _fetch(path: Path) -> str:
    """Fetches the public copy into `path`. Returns why that failed, or an empty string."""
    failed = path.with_suffix(".unreachable")  # its time stamp tells when
    if openshakespeare.is_at_hand() and failed.exists():
        age = time.time() - failed.stat().st_mtime
        if 0 <= age < ASK_AGAIN_AFTER:
            return "not reached within the last 24 hours"
    try:
        download(URL, path, SHA256)
    except UserError as error:
        files.write(failed, b"")
        return str(error)
    return ""


def _stand_in(tokenizer: str, failure: str) -> Dataset:
    try:
        dataset = openshakespeare.load(tokenizer)
    except UserError as error:
        raise UserError(
            f"neither TinyShakespeare nor its stand-in can be had: {failure}; {error}\n"
            f"download {URL} elsewhere and set TINYSHAKESPEARE to the file's path"
        ) from error
    files.say(
        "TinyShakespeare cannot be reached: this is openshakespeare, whose losses do not compare with "
        "TinyShakespeare's (to have the real one, set TINYSHAKESPEARE to the path of its input.txt)"
    )
    return dataset
