"""How the server stops: SIGTERM or Ctrl-C lets open requests finish, a second one ends them."""

import asyncio
import sys

import uvicorn

from deploy.serving.worker import Worker


class Server(uvicorn.Server):
    """uvicorn's server, which takes no new connection once it stops, and waits for the open ones.

    It ends open requests with an error after `grace` seconds. The process then exits with status 0.
    """

    def __init__(self, config: uvicorn.Config, worker: Worker, grace: float):
        super().__init__(config)
        self.worker, self.grace = worker, grace

    def handle_exit(self, number, frame) -> None:
        if self.should_exit:  # the second signal
            self.grace = 0
            self.loop.call_soon_threadsafe(self.worker.end_all)
        self.should_exit = self.worker.stopping = True

    async def startup(self, sockets=None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)

    async def shutdown(self, sockets=None) -> None:
        self.worker.stopping = True
        if self.worker.open and self.grace:
            print(
                f"stopping: open requests ({len(self.worker.open)}) have {self.grace:g} seconds to finish; "
                "Ctrl-C or SIGTERM again ends them at once",
                file=sys.stderr,
            )
        timer = self.loop.call_later(self.grace, self.worker.end_all)
        await super().shutdown(sockets)
        timer.cancel()
