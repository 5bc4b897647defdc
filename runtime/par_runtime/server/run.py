"""An application run by uvicorn until a signal ends it, in order: what was taken is answered first."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from par_runtime.checked import shown
from par_runtime.errors import RequestError

WAITING_CONNECTIONS = 1024  #: that the system holds before the server takes them


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
        raise RequestError(
            f"--host {shown(host)} --port {port}: {error.strerror or error}; give another --port (0: any that is "
            "free), or a --host of this machine (0.0.0.0: every one)"
        ) from error
    return out


def url(listening: socket.socket) -> str:
    """The address of a server, for a person."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """A server that says when it takes requests, and ends in order by then."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn does."""
        await super().startup(sockets)
        self._ready()


def serve(app: Starlette, listening: socket.socket, drain_s: float, ready: Callable[[], None]) -> None:
    """Answer requests until SIGINT, SIGTERM or SIGHUP; then take no more, and answer those that were taken.

    ``drain_s``: how long this may take; a second Ctrl-C ends it at once. ``ready`` is called when requests are taken.
    """
    config = uvicorn.Config(
        app,
        log_config=None,  # the program's own logging
        access_log=logging.getLogger("uvicorn.access").hasHandlers(),
        backlog=WAITING_CONNECTIONS,
        timeout_graceful_shutdown=max(1, round(drain_s)),
        server_header=False,
        lifespan="off",
    )
    server = _Server(config, ready)

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
        if ours and hangup is not None:
            signal.signal(hangup, before)
