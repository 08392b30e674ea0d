"""OpenWebText: 8 million web pages, 9 billion of GPT-2's tokens (Gokaslan and Cohen 2019).

python -m data.openwebtext prepares it: 18 GB in shards of 100 M tokens. Killed, it goes on where it was.
`train.py --data openwebtext` does the same where it is not prepared yet.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from data import documents, sources
from data.prepare import Dataset, tokens_folder
from lab.errors import UserError, shown

NAME = "openwebtext"
REPOSITORY = "Skylion007/openwebtext"
EVERY = 2000  # one of so many documents is held out: 0.05 %, as in nanoGPT


@dataclass
class Settings:
    """Tokenizes OpenWebText with GPT-2's merges into shards; killed, it goes on where it was."""

    source: str | None = None
    """Folder of its parquet files, or of JSONL files with a "text". None: streamed from the hub."""
    workers: int | None = None
    """Processes that tokenize. None: one a core."""
    shard_tokens: int = documents.SHARD_TOKENS
    """Tokens in a shard."""

    def __post_init__(self):
        for name in ("workers", "shard_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


def load(
    tokenizer: str = "gpt2",
    source: str | None = None,
    workers: int | None = None,
    shard_tokens: int = documents.SHARD_TOKENS,
) -> Dataset:
    """OpenWebText: what is prepared, else made from a folder of its files or from the hub.

    UserError for what the user can mend, such as a hub that cannot be reached.
    """
    if tokenizer != "gpt2":
        raise UserError(f"openwebtext is in GPT-2's tokens, not {tokenizer}: use --tokenizer gpt2")
    folder = tokens_folder(NAME, tokenizer)
    if folder.exists():
        return documents.open_prepared(folder)
    return documents.prepare(NAME, files_of(source, folder), folder, EVERY, workers, shard_tokens)


def files_of(source: str | None, folder: Path) -> sources.Source:
    """The files to read: the source's, else the hub's, at the revision that `folder` was begun with."""
    if source:
        return sources.in_folder(Path(source))
    return sources.on_hub(REPOSITORY, begun_revision(folder))


def begun_revision(folder: Path) -> str | None:
    """The revision on the hub that an unfinished preparation reads. UserError if it reads a folder."""
    state = documents.read_state(documents.unfinished_folder(folder))
    if not state:
        return None
    repository, _, revision = state["plan"]["source"].partition("@")
    if repository != REPOSITORY:
        raise UserError(
            f"openwebtext is not complete yet; go on with: "
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
