"""Tokenizes with several processes, and returns the results in order.

The workers are plain subprocesses that read blocks from a pipe. They import neither torch nor the driver's
module. If the driver is killed, the pipe closes and the workers exit.
"""

import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from data import files
from data.tokenizers import GPT2Tokenizer
from lab.errors import UserError

BLOCKS_AHEAD = 2  # blocks to queue per process, so that none waits
COMMAND = [sys.executable, "-c", "from data.workers import serve; serve()"]


class Workers:
    """A pool of n processes that run GPT-2's tokenizer."""

    def __init__(self, n: int):
        GPT2Tokenizer()  # download its files once, and report errors here
        # In their own session the workers do not receive Ctrl-C; the driver stops them.
        options = {"cwd": Path(__file__).parents[1], "start_new_session": True}
        options["env"] = os.environ | {"DATA_DIR": str(files.root().resolve())}
        self.stderrs = [tempfile.TemporaryFile() for _ in range(n)]  # noqa: SIM115
        self.processes = [
            subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, **options)
            for stderr in self.stderrs
        ]
        self.idle = queue.SimpleQueue()
        for process in self.processes:
            self.idle.put(process)
        self.threads = ThreadPoolExecutor(
            n
        )  # each thread sends a block to a process and waits for the result

    def map(self, blocks: Iterable) -> Iterator[tuple]:
        """Yields each block with the result of `encode` for its parts, by split, in order.

        Reads a few blocks ahead. If tokenizing fails, raises UserError with the worker's reason.
        """
        waiting = deque()
        for block in blocks:
            waiting.append((block, self.threads.submit(self._encode, block.parts)))
            if len(waiting) > BLOCKS_AHEAD * len(self.processes):
                block, future = waiting.popleft()
                yield block, future.result()
        for block, future in waiting:
            yield block, future.result()

    def _encode(self, parts: dict) -> dict:
        process = self.idle.get()
        try:
            pickle.dump(parts, process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            found = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise self._ended(process) from None
        finally:
            self.idle.put(process)
        if isinstance(found, UserError):
            raise found
        return found

    def _ended(self, process: subprocess.Popen) -> UserError:
        """The error for a process that has exited."""
        status = process.wait()
        stderr = self.stderrs[self.processes.index(process)]
        stderr.seek(0)
        lines = stderr.read().decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        if status == -signal.SIGKILL or "memory allocation" in said:  # what Rust prints before it aborts
            return too_little_memory(f"exited with status {status}")
        if not said:
            said = signal.strsignal(-status) if status < 0 else "no message"
        return UserError(
            f"a tokenizing process exited with status {status}: {said}\n"
            f"fix that and rerun the command: it resumes"
        )

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        self.threads.shutdown(cancel_futures=True)
        for process in self.processes:
            process.wait()
            with suppress(OSError):  # closing flushes, and the process is gone
                process.stdin.close()
            process.stdout.close()
        for stderr in self.stderrs:
            stderr.close()


def too_little_memory(what: str) -> UserError:
    return UserError(
        f"a tokenizing process {what}; it may have run out of memory\n"
        f"rerun the command, perhaps with fewer --workers: it resumes"
    )


@contextmanager
def started(n: int) -> Iterator[Workers]:
    """Starts n processes, and stops them afterwards."""
    workers = Workers(n)
    try:
        yield workers
    finally:
        workers.stop()


def serve() -> None:
    """Runs in a worker: reads parts from stdin and writes their tokens to stdout, until the driver exits."""
    tokenizer = None
    try:
        while True:
            parts = pickle.load(sys.stdin.buffer)
            try:
                tokenizer = tokenizer or GPT2Tokenizer()
                found = {split: encode(tokenizer, texts) for split, texts in parts.items()}
            except UserError as error:
                found = UserError(str(error))  # a subclass may not survive pickling
            except MemoryError:
                found = too_little_memory("failed")
            except Exception as error:
                found = UserError(f"a tokenizing process failed: {reason(error)}")
            pickle.dump(found, sys.stdout.buffer, protocol=pickle.HIGHEST_PROTOCOL)
            sys.stdout.buffer.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # skip the complaint about output that cannot be flushed


def encode(tokenizer: GPT2Tokenizer, texts: list[tuple[str, bool]]) -> tuple[np.ndarray, int]:
    """The concatenated uint16 tokens of several texts, and the number of UTF-8 bytes in the texts.

    An end-of-text token follows each text that ends its document.
    """
    end = np.array([tokenizer.end_of_text], dtype=np.uint16)
    tokens, n_bytes = [np.empty(0, np.uint16)], 0  # so that there is something to concatenate
    for text, ends in texts:
        try:
            tokens.append(tokenizer.encode(text))
        except (UserError, MemoryError):
            raise
        except BaseException as error:  # a panic in Rust is not an Exception
            raise UserError(
                f"cannot tokenize the text that begins with {text[:40]!r}: {reason(error)}\n"
                f"running again will not help: remove that text"
            ) from error
        if ends:
            tokens.append(end)
        n_bytes += len(text.encode())
    return np.concatenate(tokens), n_bytes


def reason(error: BaseException) -> str:
    """The error's type and message in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
