"""Tokenizes on several processes, in order.

The processes are plain subprocesses that read blocks from a pipe. They load neither torch nor the driver's
module, and when the driver is killed, the pipe ends and they end too.
"""

import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from data import files
from data.tokenizers import GPT2Tokenizer
from lab.errors import UserError

BLOCKS_AHEAD = 2  # read for each process, so that none waits
COMMAND = [sys.executable, "-c", "from data.workers import serve; serve()"]


class Workers:
    """n processes with GPT-2's tokenizer."""

    def __init__(self, n: int):
        GPT2Tokenizer()  # its files are fetched here, once, and what goes wrong is said here
        # In a session of their own Ctrl-C does not reach them: the driver ends them.
        options = {"cwd": Path(__file__).parents[1], "start_new_session": True}
        options["env"] = os.environ | {"DATA_DIR": str(files.root().resolve())}
        self.processes = [
            subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)
            for _ in range(n)
        ]
        self.idle = queue.SimpleQueue()
        for process in self.processes:
            self.idle.put(process)
        self.threads = ThreadPoolExecutor(n)  # each hands a block to a process and waits for it

    def map(self, blocks: Iterable) -> Iterator[tuple]:
        """Each block with what `encode` makes of its parts, by split; in order, a few blocks ahead."""
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
            return pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise UserError(
                f"a tokenizing process ended, with status {process.wait()}; was there too little memory?\n"
                f"run again, perhaps with fewer --workers: it goes on where it was"
            ) from None
        finally:
            self.idle.put(process)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        self.threads.shutdown(cancel_futures=True)
        for process in self.processes:
            process.wait()
            with suppress(OSError):  # what was left to say to it
                process.stdin.close()
            process.stdout.close()


@contextmanager
def started(n: int) -> Iterator[Workers]:
    """n processes that are gone afterwards."""
    workers = Workers(n)
    try:
        yield workers
    finally:
        workers.stop()


def serve() -> None:
    """What a process does: parts from stdin, their tokens to stdout, until the driver has gone."""
    tokenizer = GPT2Tokenizer()
    try:
        while True:
            parts = pickle.load(sys.stdin.buffer)
            found = {split: encode(tokenizer, texts) for split, texts in parts.items()}
            pickle.dump(found, sys.stdout.buffer, protocol=pickle.HIGHEST_PROTOCOL)
            sys.stdout.buffer.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # without a word about what could not be flushed


def encode(tokenizer: GPT2Tokenizer, texts: list[tuple[str, bool]]) -> tuple[np.ndarray, int]:
    """The uint16 tokens of texts, one after the other, and the texts' bytes in UTF-8.

    The end-of-text token follows each text that ends its document.
    """
    end = np.array([tokenizer.end_of_text], dtype=np.uint16)
    tokens, n_bytes = [end[:0]], 0
    for text, ends in texts:
        tokens.append(tokenizer.encode(text))
        if ends:
            tokens.append(end)
        n_bytes += len(text.encode())
    return np.concatenate(tokens), n_bytes
