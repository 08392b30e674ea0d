"""The engine in a thread of its own, and how requests on the server's event loop talk with it.

Calls go into the thread through a queue, between two steps of the engine. Outputs come back with
loop.call_soon_threadsafe. So a client that reads slowly never holds up the engine, and the engine's steps
never hold up the event loop.
"""

import asyncio
import queue
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from deploy.serving.engine import Engine, Output
from deploy.serving.metrics import Metrics
from deploy.serving.sampling import SamplingParams
from lab.errors import UserError


class EngineFailed(Exception):
    """The engine could not finish a request, through no fault of the request."""


class Stopping(Exception):
    """The server stops: it takes no new request, and ends those that last too long."""


class Full(Exception):
    """As many requests are open as the server allows."""


@dataclass
class Open:
    """A request that the engine works on."""

    n: int
    """How many texts it returns."""
    started: float
    outputs: asyncio.Queue = field(default_factory=asyncio.Queue)
    """Outputs of the engine; an exception ends them."""
    n_finished: int = 0
    last_token: dict[int, float] = field(default_factory=dict)
    """When the last token of each text came."""


class Worker:
    """Owns the engine. All methods are for the event loop's thread, except where they say otherwise."""

    def __init__(self, engine: Engine, metrics: Metrics, max_requests: int):
        self.engine, self.metrics, self.max_requests = engine, metrics, max_requests
        self.open: dict[str, Open] = {}
        self.failed = self.stopping = False
        self._calls: queue.SimpleQueue[Callable | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts the thread. Outputs go to this loop."""
        self._loop = loop
        self._thread.start()

    async def stop(self) -> None:
        """Ends all requests and the thread."""
        self.end_all()
        self._calls.put(None)
        await asyncio.to_thread(self._thread.join)

    def check_room(self, n: int) -> None:
        """Raises Full, Stopping or EngineFailed if n more requests cannot be taken now."""
        if self.stopping:
            raise Stopping("the server is stopping")
        if self.failed:
            raise EngineFailed("the engine has failed: restart the server")
        if len(self.open) + n > self.max_requests:
            raise Full(f"{len(self.open)} requests are open and the server allows {self.max_requests}")

    async def add(self, request_id: str, prompt: list[int], params: SamplingParams, n: int) -> Open:
        """Gives the engine a request. Raises UserError if it can never fit, and what check_room raises."""
        self.check_room(1)
        request = self.open[request_id] = Open(n, time.monotonic())
        try:
            await self.call(lambda: self.engine.add(request_id, prompt, params))
        except BaseException:
            self.abort(request_id)
            raise
        self.metrics.prompt_tokens.inc(len(prompt))
        return request

    async def outputs(self, request: Open) -> AsyncIterator[Output]:
        """The outputs of a request, until it is finished. Raises Stopping or EngineFailed."""
        n_finished = 0
        while n_finished < request.n:
            output = await request.outputs.get()
            if isinstance(output, Exception):
                raise output
            yield output
            n_finished += output.finish_reason is not None

    def abort(self, request_id: str) -> None:
        """Forgets a request and frees its blocks within a step. Nothing happens if it is finished."""
        if self.open.pop(request_id, None):
            self.metrics.finished.labels("abort").inc()
            self._calls.put(lambda: self.engine.abort(request_id))

    def end_all(self) -> None:
        """Ends all open requests with an error that says why."""
        self._fail(list(self.open), Stopping("the server is stopping: the answer was cut"))

    async def call(self, function: Callable):
        """What function() returns or raises, called in the engine's thread between two steps."""
        future = self._loop.create_future()

        def settle(result, error):
            if not future.done():  # else the waiting task was cancelled
                future.set_exception(error) if error else future.set_result(result)

        def run():
            try:
                result, error = function(), None
            except Exception as raised:
                result, error = None, raised
            self._loop.call_soon_threadsafe(settle, result, error)

        if self.failed:
            raise EngineFailed("the engine has failed: restart the server")
        self._calls.put(run)
        return await future

    def _run(self) -> None:  # the engine's thread
        while True:
            try:
                call = self._calls.get(block=not self.engine.has_work())
            except queue.Empty:
                if not self._step():
                    return
                continue
            if call is None:
                return
            call()
            self.metrics.stats = self.engine.stats()

    def _step(self) -> bool:  # the engine's thread
        """One step of the engine. Returns whether the engine can go on after an error."""
        try:
            outputs = self.engine.step()
            self.metrics.stats = self.engine.stats()
            self._loop.call_soon_threadsafe(self._deliver, outputs)
            return True
        except Exception as error:
            if isinstance(error, UserError):  # such as logits that are not numbers
                print(f"error: {error}", file=sys.stderr)
            else:
                traceback.print_exc()
            known = isinstance(error, UserError)
            reason = "; ".join(str(error).splitlines()) if known else "an error in the engine: see its log"
            # Which request caused it is not known, so all of them end.
            try:
                for request_id in list(self.open):
                    self.engine.abort(request_id)
                can_go_on = not self.engine.has_work()
            except Exception:
                traceback.print_exc()
                can_go_on = False
            self._loop.call_soon_threadsafe(self._engine_failed, EngineFailed(reason), can_go_on)
            return can_go_on

    def _engine_failed(self, error: EngineFailed, can_go_on: bool) -> None:
        self.failed = not can_go_on
        self._fail(list(self.open), error)
        while not can_go_on and not self._calls.empty():  # the thread has ended: answer those who wait
            call = self._calls.get()
            if call:
                call()

    def _fail(self, request_ids: list[str], error: Exception) -> None:
        for request_id in request_ids:
            self.open[request_id].outputs.put_nowait(error)
            self.abort(request_id)

    def _deliver(self, outputs: list[Output]) -> None:
        now = time.monotonic()
        for output in outputs:
            request = self.open.get(output.request_id)
            if request is None:
                continue  # it was aborted during the step
            if output.token_ids:
                self.metrics.observe_tokens(request, output.index, len(output.token_ids), now)
            request.outputs.put_nowait(output)
            if output.finish_reason is not None:
                self.metrics.finished.labels(output.finish_reason).inc()
                request.n_finished += 1
                if request.n_finished == request.n:
                    self.metrics.duration.observe(now - request.started)
                    del self.open[output.request_id]
