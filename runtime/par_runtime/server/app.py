"""The ASGI application: routes, errors, and requests that wait for the images of a Batcher.

One event loop takes all requests. What takes time does not run in it: the Batcher makes images in a thread of its own,
and files are encoded in a few more. ``patience.py`` says how long a request waits for both.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from par_runtime.arguments import given, number
from par_runtime.batcher import Batcher
from par_runtime.bundle import Bundle
from par_runtime.checked import is_text
from par_runtime.errors import BusyError, RequestError
from par_runtime.request import classes
from par_runtime.result import Result
from par_runtime.server.asked import TYPES, Asked, formats, of_json, of_query
from par_runtime.server.metrics import CONTENT_TYPE, Metrics
from par_runtime.server.patience import Patience, Refused, Signal, stopping_now
from par_runtime.system import available_cores

log = logging.getLogger(__name__)

TIMEOUT_S = 60.0
MOST_BODY = 64 * 1024  #: bytes
MOST_NAME = 200
MOST_ENCODERS = 4  #: threads; no more than there are cores
CLIENT_LEFT = 499  #: what proxies call it; nobody reads it
Handler = Callable[[Request], Awaitable[Response]]


def application(batcher: Batcher, *, name: str | None = None, timeout_s: float = TIMEOUT_S) -> Starlette:
    """An ASGI application that makes the images of ``batcher``, which stays the caller's to close.

    ``name``: of the model, in answers (default: the bundle's). ``timeout_s``: how long a request may wait for its
    images; then it is answered with 504, and what was not begun is not made. docs/service.md lists the paths. It can be
    mounted in another application. Raises RequestError.
    """
    if not isinstance(batcher, Batcher):
        raise RequestError(f"batcher: expected a par_runtime.Batcher, not a {type(batcher).__name__}")
    bundle = batcher.pipeline.bundle
    check_makes_images(bundle)
    timeout_s = number("timeout_s", timeout_s, 0.001, 1e6, "0.001 to 1000000 seconds")
    name = bundle.name if name is None else name
    if not is_text(name, MOST_NAME):
        raise RequestError(f"name {given(name)}: expected a text of 1 to {MOST_NAME} printable characters")
    service = _Service(batcher, name, timeout_s)
    app = Starlette(routes=service.routes(), exception_handlers={HTTPException: service.no_route})
    app.router.redirect_slashes = False  # to an address that a proxy in front may not have
    app.state.service = service
    return app


def check_makes_images(bundle: Bundle) -> None:
    """Raise RequestError for a bundle that there is nothing to serve of."""
    if bundle.image_size is None:
        raise RequestError(
            f"{bundle.path}: this bundle ends at tokens and makes no images, so there is nothing to serve"
        )


class _Service:
    """The handlers of all routes, and what they share."""

    def __init__(self, batcher: Batcher, name: str, timeout_s: float) -> None:
        self.batcher, self.pipeline, self.bundle = batcher, batcher.pipeline, batcher.pipeline.bundle
        self.name, self.timeout_s = name, timeout_s
        self.counters = Metrics(batcher)
        self.formats = formats(self.bundle)  # looks for PyAV now, and not in the first request
        self.failing = False  # the last images could not be made
        self.began = int(time.time())
        self.closing = Signal()  # given when no more requests are taken,
        self.stopping = Signal()  # and when there is no time left for those that were
        self.encoders = ThreadPoolExecutor(min(MOST_ENCODERS, available_cores()), "parvis-encoder")
        self.encoding = 0  # files that are asked for and not yet there
        self.every_label = json.dumps({"object": "list", "data": classes(self.bundle)}).encode()
        self.content = files("par_runtime.server").joinpath("page.html").read_text(encoding="utf-8")

    def routes(self) -> list[Route]:
        """Every path, with what answers it."""
        handlers: dict[str, Handler] = {
            "/": self.page,
            "/v1/images": self.image,
            "/v1/models": self.models,
            "/v1/models/{name:path}": self.model,
            "/v1/labels": self.labels,
            "/health": self.health,
            "/metrics": self.metrics,
        }
        named = {path: path.replace("{name:path}", "NAME") for path in handlers}  # for people and metrics
        routes = [Route(path, self.answered(named[path], handlers[path]), methods=["GET"]) for path in handlers]
        for route in routes:
            if route.path == "/v1/images" and route.methods is not None:
                route.methods.discard("HEAD")  # it would make the image
        posted = "/v1/images/generations"
        self.paths = [*named.values(), posted]
        return [*routes, Route(posted, self.answered(posted, self.images), methods=["POST"])]

    def answered(self, path: str, handler: Handler) -> Handler:
        """``handler`` with every error as an answer, and every answer counted."""

        async def answer(request: Request) -> Response:
            try:
                response = await handler(request)
            except RequestError as error:
                response = Refused(400, str(error)).response()
            except Refused as refused:
                response = refused.response()
            except ClientDisconnect:
                response = Response(status_code=CLIENT_LEFT)
            except asyncio.CancelledError:  # nobody waits any more, as where the process ends
                response = stopping_now().response()
            except Exception:  # of a bundle that was damaged, a GPU that failed: its text may name files
                log.exception("a request has failed")
                response = Refused(
                    500, "the server could not make the images; its log says why", "api_error"
                ).response()
            self.counters.count(path, response.status_code)
            return _as_said(response)

        return answer

    async def no_route(self, request: Request, error: Exception) -> Response:
        """404 for a path that is none, 405 for another method."""
        assert isinstance(error, HTTPException)
        self.counters.count("other", error.status_code)
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            message = f"{request.method}: expected {allowed} at this path"
        else:
            message = f"nothing is at this path; expected one of {', '.join(self.paths)}"
        close = {} if request.method in ("GET", "HEAD") else {"Connection": "close"}  # its body is not read
        return _as_said(Refused(error.status_code, message).telling(**dict(error.headers or {}), **close).response())

    # -- images -------------------------------------------------------------------------------------------------------

    async def image(self, request: Request) -> Response:
        """One image, as a file: GET /v1/images?label=micah&seed=7."""
        began = time.perf_counter()
        asked = of_query(self.bundle, request.query_params.multi_items())
        tag = asked.tag((self.bundle.hash, self.pipeline.made_on))
        headers = {
            "ETag": tag,
            "Cache-Control": "no-cache",  # keep it, and ask whether it is still the same
            "Content-Disposition": f'inline; filename="{asked.file_name(self.bundle)}"',
            "X-Parvis-Seed": str(asked.seeds[0]),
        }
        if not asked.again:
            headers |= {"Cache-Control": "no-store"}
            del headers["ETag"]
        elif _has(request, tag):
            return Response(None, 304, headers)
        async with Patience(request, self.timeout_s, self.stopping) as patience:
            (content,) = await self._files(patience, asked)
        self.counters.took(time.perf_counter() - began)
        return Response(content, 200, headers, asked.content_type)

    async def images(self, request: Request) -> Response:
        """Images as OpenAI's clients ask for them: POST /v1/images/generations."""
        began = time.perf_counter()
        async with Patience(request, self.timeout_s, self.closing) as patience:
            text = f"the body did not come within {self.timeout_s:g} s"
            body = await patience.wait_for(_body(request), Refused(408, text).telling(Connection="close"))
        asked = of_json(self.bundle, self.name, body)
        if len(asked.seeds) > self.batcher.max_waiting:
            most = self.batcher.max_waiting
            raise Refused(400, f"n {len(asked.seeds)}: expected 1 to {most}, as many as may wait here")
        async with Patience(request, self.timeout_s, self.stopping) as patience:
            contents = await self._files(patience, asked)
        height, width = (asked.scale * side for side in self.bundle.image_size or (0, 0))
        names = self.bundle.class_names
        label = {"label": asked.label, "name": None if names is None else names[asked.label]}
        encoded = (base64.b64encode(content).decode() for content in contents)
        data = [{"b64_json": each, "seed": seed} | label for each, seed in zip(encoded, asked.seeds, strict=True)]
        answer = {
            "created": int(time.time()),
            "model": self.name,
            "size": f"{width}x{height}",
            "output_format": asked.kind[1:],
            "settings": asdict(asked.settings),
            "data": data,
        }
        self.counters.took(time.perf_counter() - began)
        return JSONResponse(answer)

    async def _files(self, patience: Patience, asked: Asked) -> list[bytes]:
        """The files that were asked for. Raises Refused, ClientDisconnect, and what the pipeline raises.

        What was not begun when the waiting ends is not made: neither images nor files.
        """
        late = Refused(
            504, f"the images were not made within {self.timeout_s:g} s; ask for fewer, or later", "api_error"
        )
        patience.watch()
        try:
            results = await patience.wait_for(self._made(asked), late)
            self.failing = False
        except (Refused, ClientDisconnect):
            raise
        except Exception:
            self.failing = True
            raise
        self.encoding += len(results)
        try:
            return await patience.wait_for(self._encoded(results, asked), late)
        finally:
            self.encoding -= len(results)

    async def _made(self, asked: Asked) -> list[Result]:
        """Images, made in common calls with those of others. Raises Refused, and what the pipeline raises."""
        futures: list[Future[Result]] = []
        try:
            if self.encoding >= self.batcher.max_waiting:
                raise self._busy()
            for seed in asked.seeds:
                futures.append(self.batcher.submit(asked.label, asked.settings, seed=seed))
            return await asyncio.gather(*map(asyncio.wrap_future, futures))
        except BusyError as busy:
            raise self._busy() from busy
        except RequestError as closed:  # the request itself was checked before
            raise stopping_now() from closed
        finally:
            for each in futures:
                each.cancel()

    def _busy(self) -> Refused:
        text = f"{self.batcher.max_waiting} images wait already; try again later"
        return Refused(503, text, "server_busy").telling(Retry_After="1")

    async def _encoded(self, results: list[Result], asked: Asked) -> list[bytes]:
        """Their files, made by threads of our own: those of asyncio's would be shared with the rest of the program."""
        loop = asyncio.get_running_loop()
        jobs = (partial(each.to_bytes, asked.kind, scale=asked.scale, fps=asked.fps) for each in results)
        return await asyncio.gather(*(loop.run_in_executor(self.encoders, job) for job in jobs))

    def close(self) -> None:
        """Encode nothing more. What is being encoded goes on for some seconds at most."""
        self.encoders.shutdown(wait=False, cancel_futures=True)

    # -- what is served -----------------------------------------------------------------------------------------------

    async def page(self, _: Request) -> Response:
        """A page to try it with a browser."""
        return HTMLResponse(self.content)

    async def models(self, _: Request) -> Response:
        """The one model, in a list."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """The model of that name."""
        if request.path_params["name"] != self.name:
            raise Refused(404, f"no model of that name; expected {self.name}")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        bundle, info = self.bundle, self.pipeline.backend.info
        height, width = bundle.image_size or (0, 0)
        return {
            "id": self.name,
            "object": "model",
            "created": self.began,
            "owned_by": "parvis",
            "bundle": {"name": bundle.name, "hash": bundle.hash},
            "backend": info.name,
            "size": f"{width}x{height}",
            "frames": bundle.frames,
            "formats": self.formats,
            "content_types": [TYPES[f".{kind}"] for kind in self.formats],
            "classes": bundle.n_classes,
            "calls": bundle.calls,
            "defaults": asdict(bundle.defaults),
            "max_batch": self.batcher.max_batch,
        }

    async def labels(self, _: Request) -> Response:
        """All classes: index, name, synset."""
        return Response(self.every_label, 200, media_type="application/json")

    # -- for who runs it ----------------------------------------------------------------------------------------------

    async def health(self, _: Request) -> Response:
        """200, or 503 where the last images could not be made: if it stays so, a new process may help."""
        about = {"status": "failing" if self.failing else "ok", "waiting": self.batcher.waiting}
        return JSONResponse(about, 503 if self.failing else 200)

    async def metrics(self, _: Request) -> Response:
        """Counters, as Prometheus reads them."""
        return Response(self.counters.text(), 200, media_type=CONTENT_TYPE)


async def _body(request: Request) -> bytes:
    """The body of a request. Raises Refused where it is too long."""
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > MOST_BODY:
            text = f"the body has more than {MOST_BODY} bytes; a request for images has some hundred"
            raise Refused(413, text).telling(Connection="close")  # or the rest of it would be read
    return bytes(content)


def _has(request: Request, tag: str) -> bool:
    """Whether the client has what is named ``tag`` already."""
    known = ",".join(request.headers.getlist("if-none-match"))
    each = re.fullmatch(r'\s*(\*|(?:W/)?"[^"]*"(?:\s*,\s*(?:W/)?"[^"]*")*)\s*', known)
    return each is not None and (each[1] == "*" or tag in re.findall('"[^"]*"', known))


def _as_said(response: Response) -> Response:
    """``response``, of which no browser may guess another kind than it says."""
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response
