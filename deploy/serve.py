"""Serves a run over HTTP as OpenAI's API does: python -m deploy.serve --run runs/X

The server listens on this machine only, unless --host says otherwise. Open its address in a browser for a
chat page, or use it with the official openai client or curl: see docs/serving.md. Ctrl-C or SIGTERM stops it:
it takes no new requests, and ends when the open ones are finished, after --grace seconds at the latest.
"""

import sys
from pathlib import Path

from lab import terminal

if __name__ == "__main__":
    terminal.prepare()  # first, because importing torch takes seconds

import ipaddress
import os
import re
import socket
from dataclasses import dataclass
from typing import Literal

from data.chat_template import ChatTemplate
from lab import cli, device, optional
from lab.errors import UserError, shown
from lab.storage import runs

KEY_VARIABLE = "SERVE_API_KEY"


@dataclass
class Settings:
    """Serves a run over HTTP as OpenAI's API does."""

    run: str | None = None
    """Folder of the run. None: the newest one."""
    checkpoint: Literal["best", "last"] = "best"
    """best (lowest validation loss) or last."""
    name: str | None = None
    """The model's name in the API. None: that of the run's folder."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 lets other machines connect: use it with --api-key."""
    port: int = 8000
    """Port to listen on; 0: any free one."""
    api_key: str | None = None
    """Clients must send this key. The environment variable SERVE_API_KEY does the same, and other users of
    this machine cannot see it."""
    max_requests: int = 64
    """Open requests, those that wait included; further ones get status 429."""
    max_texts: int = 16
    """Texts of one request: its prompts times n."""
    max_body: int = 2**20
    """Bytes of a request's body."""
    context: int | None = None
    """The most tokens of a prompt and its answer. None: as in training."""
    cache_memory: float | None = None
    """Memory for the cache of keys and values, in MB. None: a quarter of what is free, or less if that is
    enough."""
    cache_dtype: Literal["auto", "int8"] = "auto"
    """Number format of the cache; with int8 about twice as many tokens fit as with bfloat16. auto: that of
    the weights."""
    swap_memory: float = 0
    """Memory of the CPU for the blocks of requests that wait because the cache is full, in MB. 0: none, these
    requests are computed again."""
    block_size: int = 16
    """Tokens in a block of the cache."""
    max_batch: int = 16
    """Texts generated at the same time."""
    token_budget: int = 512
    """The most tokens that the engine computes in a step. More make prompts faster, but others wait
    longer for their next token."""
    prefix_cache: bool = True
    """Keep blocks of finished requests for those that begin with the same tokens."""
    draft: bool = False
    """Let the MTP block draft tokens that the model then verifies (stage 7). The texts stay the same."""
    draft_tokens: int = 2
    """Tokens to draft at a time."""
    grace: float = 10
    """When stopped, seconds that open requests have to finish."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights; auto: as the run stores them, if the device is fast with it."""
    device: str = "auto"
    """cuda, mps or cpu; auto: the first of these that is available."""

    def __post_init__(self):
        counts = ("max_requests", "max_texts", "max_body", "block_size", "max_batch", "token_budget")
        for name in (*counts, "draft_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.draft_tokens != Settings.draft_tokens and not self.draft:
            raise ValueError("--draft-tokens is for --draft; leave it out, or add --draft")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port must be from 0 to 65535, not {self.port}")
        if not 0 <= self.grace < 1e6:
            raise ValueError(f"grace must be 0 or more seconds, not {self.grace}")
        if self.context is not None and self.context < 2:
            raise ValueError(f"context must be at least 2, not {self.context}")
        if not 0 <= self.swap_memory < 1e9:
            raise ValueError(f"swap_memory must be 0 MB or more, not {self.swap_memory}")
        if self.cache_memory is not None and not 0 < self.cache_memory < 1e9:
            raise ValueError(f"cache_memory must be above 0 MB, not {self.cache_memory}")
        if self.api_key is None:
            self.api_key = os.environ.get(KEY_VARIABLE)
        if self.api_key is not None and not re.fullmatch("[!-~]+", self.api_key):
            raise ValueError("the API key must be printable ASCII characters without spaces, at least one")


@device.memory_errors("try a lower --cache-memory, or --dtype bfloat16")
def main():
    settings = cli.parse_flags(Settings, sys.argv[1:])
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        optional.load(package, extra="serve", needed_for="the server")
    with listen(settings.host, settings.port) as listening:  # first: loading the model takes longer to fail
        serve(settings, listening)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises UserError if that is not possible."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        # create_server appends the address to the reason.
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]
        raise UserError(
            f"cannot listen on {host}, port {port}: {reason}\nuse another --port (0: any free one) or --host"
        ) from None


def serve(settings: Settings, listening: socket.socket) -> None:
    """Loads the model and serves it until a signal stops the server."""
    import uvicorn

    from deploy.serving.server import Limits, make_app
    from deploy.serving.stopping import Server

    served = load(settings)
    local = is_loopback(listening.getsockname()[0])
    if not local and not settings.api_key:
        print(f"warning: whoever reaches {settings.host} can use the server: see --api-key", file=sys.stderr)
    limits = Limits(settings.max_requests, settings.max_texts, settings.max_body)
    app = make_app(served, limits, settings.api_key, only_local=local)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        # After --grace, open requests are ended with an error. This is for connections that do not end then.
        timeout_graceful_shutdown=settings.grace + 5,
    )
    address = url(listening)
    print(f"serving {served.name} at {address} (chat page) and {address}/v1 (OpenAI's API)", file=sys.stderr)
    Server(config, app.state.worker, settings.grace).run(sockets=[listening])


def load(settings: Settings):
    """The model, and what belongs to it."""
    from deploy.serving.engine import Engine
    from deploy.serving.server import Served

    folder = Path(settings.run) if settings.run else runs.newest(None)
    config = runs.read_config(folder)
    runs.warn_of_edits(folder, config)
    longest = runs.model_config(folder, config).block_size
    if settings.context is not None and settings.context > longest:
        raise UserError(f"--context {settings.context} is too long: the model has {longest} positions")
    try:
        template = ChatTemplate(folder)
    except UserError as error:
        template = error  # for those who ask for a chat
    print(f"{config['stage']} from {shown(folder)}", file=sys.stderr)
    engine = Engine.of_run(
        folder,
        settings.checkpoint,
        settings.device,
        settings.dtype,
        cache_memory=settings.cache_memory,
        block_size=settings.block_size,
        max_batch=settings.max_batch,
        token_budget=settings.token_budget,
        prefix_cache=settings.prefix_cache,
        swap_memory=settings.swap_memory,
        draft=settings.draft,
        draft_tokens=settings.draft_tokens,
        int8_cache=settings.cache_dtype == "int8",
    )
    context = settings.context or longest
    room = (engine.pool.n_blocks - 1) * engine.pool.block_size + 1  # the last token is never in the cache
    if room < context:
        print(f"the cache has room for {room:,} tokens, so this is the longest context", file=sys.stderr)
    name = settings.name or folder.resolve().name
    created = int((folder / "config.json").stat().st_mtime)
    return Served(name, engine, template, min(room, context), created)


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def url(listening: socket.socket) -> str:
    """The address to open in a browser."""
    host, port = listening.getsockname()[:2]
    if ipaddress.ip_address(host.partition("%")[0]).is_unspecified:
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


if __name__ == "__main__":
    cli.run(main)
