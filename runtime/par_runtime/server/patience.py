"""How long a request is worked on: until its time is over, whoever asked has left, or the server stops."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

T = TypeVar("T")


class Refused(Exception):  # noqa: N818, it is an answer
    """What a request is answered with in place of what it asked for."""

    def __init__(self, code: int, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(code, message, kind)
        self.code, self.message, self.kind = code, message, kind
        self.headers: dict[str, str] = {}

    def __str__(self) -> str:
        return self.message

    def telling(self, **headers: str) -> Refused:
        """It, with these headers: ``Retry_After="1"``."""
        self.headers |= {name.replace("_", "-"): value for name, value in headers.items()}
        return self

    def response(self) -> Response:
        """In OpenAI's form, which libraries turn into exceptions."""
        error = {"message": self.message, "type": self.kind, "param": None, "code": None}
        return JSONResponse({"error": error}, self.code, self.headers)


def stopping_now() -> Refused:
    """The answer of a server that has no time left."""
    return Refused(503, "the server is stopping", "server_stopping").telling(Retry_After="1", Connection="close")


class Signal:
    """Something that happens once, and that requests wait for. An event of asyncio would belong to the loop that waited
    for it first; a program's tests have a loop for each request.
    """

    def __init__(self) -> None:
        self._given = False
        self._waiting: set[asyncio.Future[None]] = set()

    def give(self) -> None:
        """It has happened. To be called in the loop of those who wait."""
        self._given = True
        for each in list(self._waiting):
            if not each.done():
                each.set_result(None)

    def future(self) -> asyncio.Future[None]:
        """Done when it has happened."""
        out: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(out)
        out.add_done_callback(self._waiting.discard)
        if self._given:
            out.set_result(None)
        return out


class Patience:
    """Waits for parts of the work of one ``request``, in all for ``seconds``; in ``async with``.

    ``stopping``: given when the server has no time left for it. Once the body of the request is read, :meth:`watch`
    begins to look whether the client is still there.
    """

    def __init__(self, request: Request, seconds: float, stopping: Signal) -> None:
        self._request = request
        self._end = asyncio.get_running_loop().time() + seconds
        self._stopping: asyncio.Future[Any] = stopping.future()
        self._left: asyncio.Future[Any] | None = None

    async def __aenter__(self) -> Patience:
        return self

    async def __aexit__(self, *_: object) -> None:
        for each in (self._stopping, self._left):
            if each is not None:
                each.cancel()

    def watch(self) -> None:
        """From now on a client that leaves ends the waiting. The body must have been read."""
        self._left = asyncio.ensure_future(_left(self._request))

    async def wait_for(self, work: Awaitable[T], late: Refused) -> T:
        """What ``work`` gives, or raises. Raises ``late`` where it takes too long, Refused where the server stops,
        ClientDisconnect; ``work`` is cancelled then.
        """
        task = asyncio.ensure_future(work)
        task.add_done_callback(_seen)
        ends: set[asyncio.Future[Any]] = {task, self._stopping} | (set() if self._left is None else {self._left})
        left_s = max(0.0, self._end - asyncio.get_running_loop().time())
        try:
            await asyncio.wait(ends, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
        finally:
            task.cancel()
        if self._left is not None and self._left.done():
            raise ClientDisconnect
        raise stopping_now() if self._stopping.done() else late


def _seen(task: asyncio.Future[Any]) -> None:
    """Look at what became of work that nobody waits for any more: asyncio complains of errors that were not seen."""
    if not task.cancelled():
        task.exception()


async def _left(request: Request) -> None:
    """Until whoever asked has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
