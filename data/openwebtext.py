"""OpenWebText: 8 million web pages, 9 billion of GPT-2's tokens (Gokaslan and Cohen 2019).

python -m data.openwebtext tokenizes it into shards of 100 M tokens, 18 GB in all. If interrupted, rerun the
command: it resumes. `train.py --data openwebtext` does the same if it is not prepared yet.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from data import documents, sources
from data.prepare import Dataset, tokens_folder
from data.tokenizers import HuggingFaceTokenizer
from lab.errors import UserError, shown

NAME = "openwebtext"
REPOSITORY = "Skylion007/openwebtext"
EVERY = 2000  # one document of 2000 is held out: 0.05 %, as in nanoGPT


@dataclass
class Settings:
    """Tokenizes OpenWebText with GPT-2's tokenizer into shards. If interrupted, run it again: it resumes."""

    source: str | None = None
    """Folder of parquet or JSONL files with a column "text". None: stream from the Hugging Face hub."""
    workers: int | None = None
    """Number of tokenizing processes. None: one per core."""
    shard_tokens: int = documents.SHARD_TOKENS
    """Tokens per shard."""

    def __post_init__(self):
        for name in ("workers", "shard_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


def load(
    tokenizer: str | HuggingFaceTokenizer = "gpt2",
    source: str | None = None,
    workers: int | None = None,
    shard_tokens: int = documents.SHARD_TOKENS,
) -> Dataset:
    """Opens OpenWebText. If it is not prepared yet, makes it from a folder of its files or from the hub.

    Raises UserError for everything that the user can fix, such as an unreachable hub.
    """
    if tokenizer != "gpt2":
        if isinstance(tokenizer, HuggingFaceTokenizer):
            raise UserError(
                "openwebtext works with GPT-2's tokenizer, not with an imported one: use other --data"
            )
        raise UserError(f"openwebtext works with GPT-2's tokenizer, not {tokenizer}: use --tokenizer gpt2")
    folder = tokens_folder(NAME, tokenizer)
    if folder.exists():
        return documents.open_prepared(folder)
    return documents.prepare(NAME, files_of(source, folder), folder, EVERY, workers, shard_tokens)


def files_of(source: str | None, folder: Path) -> sources.Source:
    """The files to read: those in `source`, or the hub's at the revision that an unfinished `folder` uses."""
    if source:
        return sources.in_folder(Path(source))
    return sources.on_hub(REPOSITORY, begun_revision(folder))


def begun_revision(folder: Path) -> str | None:
    """The hub revision that an unfinished preparation reads. Raises UserError if it reads a folder."""
    state = documents.read_state(documents.unfinished_folder(folder))
    if not state:
        return None
    repository, _, revision = state["plan"]["source"].partition("@")
    if repository != REPOSITORY:
        raise UserError(
            f"openwebtext is not complete yet; resume with: "
            f"python -m data.openwebtext --source {state['plan']['source']}"
        )
    return revision


def main():
    settings = cli.parse_flags(Settings, sys.argv[1:])
    dataset = load("gpt2", settings.source, settings.workers, settings.shard_tokens)
    counts = ", ".join(f"{split} {n:,} tokens" for split, n in dataset.meta["tokens"].items())
    print(f"{NAME}: {counts}, in {shown(dataset.folder)}")


if __name__ == "__main__":
    from lab import cli

    cli.run(main)
