"""No request is worked on longer than anybody waits: bodies that do not come, files that take long to encode, ends."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from served import Served, serving
from sharing import until

from par_runtime import Batcher, Pipeline, Result
from par_runtime.server import app, application


@pytest.fixture(scope="module")
def pipeline(shared_pipelines: Callable[[str], Pipeline]) -> Pipeline:
    return shared_pipelines("ONNX Runtime")


@pytest.fixture
def batcher(pipeline: Pipeline) -> Iterator[Batcher]:
    with Batcher(pipeline, max_waiting=4) as made:
        yield made


class Slow:
    """Files that are not encoded before :attr:`go`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.go, self.begun = threading.Event(), list[int]()
        encode = Result.to_bytes

        def to_bytes(result: Result, *given: Any, **more: Any) -> bytes:
            self.begun.append(result.seeds[0])
            assert self.go.wait(60)
            return encode(result, *given, **more)

        patch.setattr(Result, "to_bytes", to_bytes)
        patch.setattr(app, "MOST_ENCODERS", 1)


@contextmanager
def slow(patch: pytest.MonkeyPatch) -> Iterator[Slow]:
    made = Slow(patch)
    try:
        yield made
    finally:
        made.go.set()


def test_the_time_of_a_request_covers_its_files(batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> None:
    with slow(monkeypatch) as encoding, serving(application(batcher, timeout_s=0.5)) as served:
        answer = served.post("/v1/images/generations", {"prompt": "0", "n": 3, "seed": 1})
        assert (answer.code, answer.error()) == (504, "the images were not made within 0.5 s; ask for fewer, or later")
        assert batcher.images == 3
        assert served.get("/v1/images?label=nobody").code == 400  # no check stands behind a file
        encoding.go.set()
        assert served.get("/v1/images?label=0&seed=7").code == 200
        assert encoding.begun == [1, 7]  # the other two files of the first request were never begun


def test_files_are_not_encoded_for_a_client_that_has_left(batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> None:
    with slow(monkeypatch) as encoding, serving(application(batcher)) as served:
        head = b"GET /v1/images?label=0&seed=%d HTTP/1.1\r\nHost: x\r\n\r\n"
        with socket.create_connection(("127.0.0.1", served.port)) as stays:
            stays.sendall(head % 1)
            until(lambda: encoding.begun == [1])
            with socket.create_connection(("127.0.0.1", served.port)) as leaves:
                leaves.sendall(head % 2)
                until(lambda: batcher.images == 2)
            until(lambda: b'code="499",path="/v1/images"} 1.0' in served.get("/metrics").body)
            assert served.get("/health").code == 200  # by then the loop has told the threads too
            encoding.go.set()
            with http.client.HTTPResponse(stays) as answer:
                answer.begin()
                assert answer.status == 200
        assert served.get("/v1/images?label=0&seed=3").code == 200
        assert encoding.begun == [1, 3]


def test_files_that_wait_to_be_encoded_are_counted_as_images_that_wait(
    batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    with slow(monkeypatch) as encoding, serving(application(batcher)) as served, ThreadPoolExecutor(4) as pool:
        asked = pool.submit(served.post, "/v1/images/generations", {"prompt": "0", "n": 4})
        until(lambda: len(encoding.begun) == 1)
        assert served.get("/v1/images?label=0").code == 503
        encoding.go.set()
        assert asked.result().code == 200
        assert served.get("/v1/images?label=0").code == 200


def test_a_body_that_does_not_come_is_not_waited_for(batcher: Batcher) -> None:
    with serving(application(batcher, timeout_s=0.3)) as served:
        head = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
        code, text = ended(served, head)
        assert code == 408
        assert b"the body did not come within 0.3 s" in text


def test_a_body_without_an_end_is_not_read(batcher: Batcher) -> None:
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with serving(application(batcher)) as served:
        for path, expected in (("/v1/images/generations", 413), ("/nothing", 404)):
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
            code, _ = ended(served, head + 2 * chunk)
            assert code == expected


def ended(served: Served, content: bytes) -> tuple[int, bytes]:
    """What is answered to ``content`` by a server that closes the connection then."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as client:
        client.sendall(content)
        said = b""
        while True:
            try:
                part = client.recv(65536)
            except ConnectionResetError:  # it had more to read
                part = b""
            if not part:
                return int(said.split()[1]), said
            said += part
