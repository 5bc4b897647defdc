"""Users of a server: each asks for one image after another, in a thread of its own, over a connection that it keeps.

A load is closed or open. In a closed one a client asks as soon as it has its image, so there are never more requests
than clients. In an open one requests have times at which they are due, as those of many users who do not know of each
other; what a request waits because all clients wait for earlier ones is a part of its latency.
"""

from __future__ import annotations

import http.client
import json
import math
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from par_runtime.bench.subjects.process import MORE
from par_runtime.errors import RequestError

LONGEST_REASON = 300  #: characters of what a server says in place of an image


@dataclass(frozen=True)
class Asked:
    """A request: the path of its address, and when it is due, in seconds from the start (None: at once)."""

    path: str
    due_s: float | None = None


@dataclass(frozen=True)
class Load:
    """The latency of each request in milliseconds, in the order of the answers, and how long all took, in seconds."""

    latencies_ms: Sequence[float]
    took_s: float


class Client:
    """One user: a connection to a server, which is opened when it is needed and kept from request to request.

    ``timeout_s``: how long the server may be silent.
    """

    def __init__(self, host: str, port: int, timeout_s: float) -> None:
        self._connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
        self._timeout_s = timeout_s
        self._left = False

    def get(self, path: str) -> bytes:
        """What is at ``path``. Raises RequestError for an answer other than 200, OSError and HTTPException."""
        kept = self._connection.sock is not None
        try:
            return self._get(path)
        except ConnectionError:
            # A server closes connections on which nothing came for some seconds, as all do; whoever notices it asks
            # again over another one. What is asked for with GET may be asked for twice.
            self.close()
            if not kept or self._left:
                raise
        except TimeoutError as error:
            raise RequestError(f"GET {path}: no answer within {self._timeout_s:g} s") from error
        return self._get(path)

    def _get(self, path: str) -> bytes:
        if self._connection.sock is None:
            self._connection.connect()
        if self._left:  # before there was a connection to be ended
            raise ConnectionAbortedError("the client has left")
        self._connection.request("GET", path)
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RequestError(f"GET {path}: answered with {answer.status}: {_reason(content)[:LONGEST_REASON]}")
        return content

    def leave(self) -> None:
        """In another thread: end what :meth:`get` waits for; it raises ConnectionError then, or HTTPException."""
        self._left = True
        connection = self._connection.sock
        if connection is not None:
            with suppress(OSError):  # it is closed already
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; the next request opens another one."""
        self._connection.close()


def _reason(content: bytes) -> str:
    """What an answer says in OpenAI's form, else all that it says."""
    with suppress(ValueError, KeyError, TypeError):
        return str(json.loads(content)["error"]["message"])
    return content.decode(errors="replace")


def ask(clients: Sequence[Client], requests: Iterable[Asked], seconds: float = math.inf) -> Load:
    """Let ``clients`` ask for all of ``requests``: whoever is free takes the next one, and waits until it is due.

    The latency of a request that is due counts from then, that of another one from when it is sent. After ``seconds``
    no more are taken, nor those that are due later; one is sent in any case. Raises what the first client that fails
    raises; the others leave then, and here where this is interrupted.
    """
    waiting, lock, stop = iter(requests), threading.Lock(), threading.Event()
    latencies, ends, errors = list[float](), list[float](), list[Exception]()
    began = time.perf_counter()

    def taken(first: bool) -> Asked | None:
        with lock:
            late = not first and time.perf_counter() - began >= seconds
            request = None if late or stop.is_set() else next(waiting, None)
            return None if request is None or (request.due_s or 0.0) > seconds else request

    def work(client: Client, first: bool) -> None:
        try:
            while (request := taken(first)) is not None:
                first = False
                since = time.perf_counter()
                if request.due_s is not None:
                    if stop.wait(max(0.0, began + request.due_s - since)):
                        return
                    since = began + request.due_s
                client.get(request.path)
                ended = time.perf_counter()
                latencies.append(1e3 * (ended - since))
                ends.append(ended)
        except Exception as error:
            errors.append(error)
            leave()

    def leave() -> None:
        stop.set()
        for client in clients:
            client.leave()

    threads = [
        threading.Thread(target=work, args=(client, i == 0), name="parvis-client", daemon=True)
        for i, client in enumerate(clients)
    ]
    begun = []
    try:
        for thread in threads:
            thread.start()
            begun.append(thread)
        for thread in begun:
            thread.join()
    except BaseException as error:
        leave()
        for thread in begun:
            thread.join()
        if isinstance(error, RuntimeError):  # of the start of a thread
            raise RequestError(f"the system starts no more threads; {MORE}") from error
        raise
    if errors:
        raise errors[0]
    return Load(latencies, max(ends) - began)
