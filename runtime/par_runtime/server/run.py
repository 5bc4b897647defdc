"""An application run by uvicorn until a signal ends it, in order: what was taken is answered first."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from par_runtime.checked import shown
from par_runtime.errors import RequestError
from par_runtime.late import importing
from par_runtime.system import explain

log = logging.getLogger(__name__)

WAITING_CONNECTIONS = 1024  #: that the system holds before the server takes them
AT_A_TIME = 32  #: of these; where no descriptors are left, asyncio complains as often
ANSWERS_S = 0.5  #: for the last answers, that there is no time left
TICK_S = 0.2
QUIET_S = 60.0  #: between two equal lines of the log


def bound(host: str, port: int) -> socket.socket:
    """A socket at this place, which takes no connections yet: whoever asks too early is told so at once.

    ``port`` 0 is any that is free. Raises RequestError.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise RequestError(f"--host {shown(host)}: expected the name or address of this machine ({error})") from error
    family, kind, protocol, _, address = found[0]
    out = socket.socket(family, kind, protocol)
    try:
        out.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            out.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        out.bind(address)
    except OSError as error:
        out.close()
        raise taken(host, port, error) from error
    return out


def taken(host: str, port: int, error: OSError) -> RequestError:
    """The error of a place that nobody can listen at."""
    return RequestError(
        f"--host {shown(host)} --port {port}: {error.strerror or error}; give another --port (0: any that is free), "
        "or a --host of this machine (0.0.0.0: every one)"
    )


def url(listening: socket.socket) -> str:
    """The address of a server, for a person."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """A server that says when it takes requests, and ends in time, whatever its clients do."""

    def __init__(self, config: uvicorn.Config, app: Starlette, drain_s: float, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._drain_s, self._ready = app.state.service, drain_s, ready
        self._ignored = [each for each in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(each) is signal.SIG_IGN]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """As uvicorn does, but what the caller ignores (a shell's background job Ctrl-C) stays ignored."""
        if sig not in self._ignored:
            super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn does. Raises RequestError where another process has begun to listen there meanwhile."""
        listening = (sockets or [])[0]
        host, port = listening.getsockname()[:2]
        try:
            await super().startup(sockets)
            listening.listen(WAITING_CONNECTIONS)
        except OSError as error:
            raise taken(host, port, error) from error
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn does, but no longer than the time to drain: then who waits is told so, and soon afterwards every
        connection is cut. A client that does not read would hold up the end for ever.
        """
        self._service.closing.give()  # who has not asked to the end is not waited for
        self._service.batcher.close(wait=False)  # makes what waits at once, without waiting for company
        ending = asyncio.ensure_future(self._end())
        await super().shutdown(sockets)
        ending.cancel()
        if self.server_state.connections:  # a second Ctrl-C
            self._cut()
            await asyncio.sleep(TICK_S)

    async def _end(self) -> None:
        await asyncio.sleep(self._drain_s)
        log.warning("%d requests were not done within %g s", len(self.server_state.tasks), self._drain_s)
        self._service.stopping.give()
        await asyncio.sleep(ANSWERS_S)
        self._cut()

    def _cut(self) -> None:
        self._service.stopping.give()
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()


def serve(app: Starlette, listening: socket.socket, drain_s: float, ready: Callable[[], None]) -> None:
    """Answer requests until SIGINT, SIGTERM or SIGHUP; then take no more, and answer those that were taken.

    ``app``: of :func:`par_runtime.server.application`. ``drain_s``: how long this may take; a second Ctrl-C ends it at
    once. ``ready`` is called when requests are taken. Raises RequestError where another process took the port.
    """
    config = uvicorn.Config(
        app,
        log_config=None,  # the program's own logging
        access_log=logging.getLogger("uvicorn.access").hasHandlers(),
        backlog=AT_A_TIME,
        ws="none",
        server_header=False,
        lifespan="off",
    )
    server = _Server(config, app, drain_s, ready)

    def stop(number: int, frame: FrameType | None) -> None:
        server.handle_exit(number, frame)

    hangup = getattr(signal, "SIGHUP", None)  # uvicorn knows the other two
    ours = hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN
    before = signal.signal(hangup, stop) if ours and hangup is not None else None
    try:
        server.run(sockets=[listening])
    except (KeyboardInterrupt, SystemExit):  # uvicorn raises its signals again when all is answered
        if not server.should_exit or server.force_exit:
            raise
    finally:
        app.state.service.close()
        if ours and hangup is not None:
            signal.signal(hangup, before)


def more_descriptors() -> None:
    """Let the process have as many open files, so connections, as the system lets it."""
    try:
        with importing("resource"):
            import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY and soft < hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ImportError, OSError, ValueError):  # not on this system, or not allowed
        return


class Once(logging.Filter):
    """Lets each message pass once a minute, those of a system without descriptors without their traceback."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether ``record`` is said."""
        now, text = time.monotonic(), record.getMessage().partition("\n")[0]
        if now - self._said.get(text, -QUIET_S) < QUIET_S:
            return False
        self._said[text] = now
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            record.msg, record.args, record.exc_info = "no more connections: %s", (explain(error),), None
        return True
