"""Clients of a server: who asks when, what counts as latency, and what a failure or Ctrl-C ends."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from par_runtime.bench.subjects import clients as module
from par_runtime.bench.subjects.clients import Asked, Client, ask
from par_runtime.errors import RequestError


@dataclass
class Scripted(Client):
    """A client that asks nobody: ``does`` is called with the path."""

    does: Callable[[str], object]
    gone: threading.Event = field(default_factory=threading.Event)

    def get(self, path: str) -> bytes:
        self.does(path)
        return b""

    def leave(self) -> None:
        self.gone.set()


def several(count: int, does: Callable[[str], object]) -> list[Client]:
    return [Scripted(does) for _ in range(count)]


def test_all_clients_ask_at_once_and_every_request_once() -> None:
    """Each request waits until as many are under way as there are clients, which ends if there are fewer."""
    together, asked = threading.Barrier(3, timeout=30), list[str]()

    def does(path: str) -> None:
        asked.append(path)
        together.wait()

    load = ask(several(3, does), [Asked(str(i)) for i in range(12)])
    assert sorted(asked, key=int) == [str(i) for i in range(12)]
    assert len(load.latencies_ms) == 12
    assert 0 < max(load.latencies_ms) <= 1e3 * load.took_s


def test_what_a_request_waits_for_a_client_is_latency_too() -> None:
    """Three are due at once, and one client asks for one after the other."""
    load = ask(several(1, lambda _: time.sleep(0.05)), [Asked("x", 0.0), Asked("y", 0.0), Asked("z", 0.01)])
    for latency, least in zip(load.latencies_ms, (50, 100, 140), strict=True):
        assert latency >= least - 1
    load = ask(several(1, lambda _: time.sleep(0.05)), [Asked("x"), Asked("y")])
    assert sum(load.latencies_ms) <= 1e3 * load.took_s  # of a closed load it is not


def test_no_request_is_sent_before_it_is_due() -> None:
    began, sent = time.perf_counter(), dict[str, float]()
    due = {"a": 0.0, "b": 0.08, "c": 0.16}
    ask(
        several(3, lambda path: sent.update({path: time.perf_counter() - began})),
        [Asked(p, at) for p, at in due.items()],
    )
    assert all(sent[path] >= at for path, at in due.items())


@pytest.mark.parametrize("due", [None, 0.0])
def test_after_its_time_a_load_sends_no_more_but_the_first(due: float | None) -> None:
    load = ask(several(2, lambda _: None), [Asked("x", due) for _ in range(1000)], seconds=0.0)
    assert len(load.latencies_ms) == 1


def test_requests_that_are_due_later_than_its_time_are_not_waited_for() -> None:
    load = ask(several(2, lambda _: None), [Asked("a", 0.0), Asked("b", 1e6), Asked("c", 1e6)], seconds=3600)
    assert len(load.latencies_ms) == 1


def test_one_client_that_fails_ends_the_others() -> None:
    """They wait for answers, or until a request is due."""
    all_clients: list[Scripted] = []

    def does(path: str) -> None:
        if path == "bad":
            raise RequestError("answered with 500")
        assert all_clients[0].gone.wait(30)
        raise ConnectionResetError

    all_clients += [Scripted(does) for _ in range(3)]
    with pytest.raises(RequestError, match="answered with 500"):
        ask(all_clients, [Asked("good"), Asked("bad"), Asked("later", 1e6)])
    assert all(client.gone.is_set() for client in all_clients)


def test_ctrl_c_ends_all_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    under_way, ended = threading.Barrier(3, timeout=30), list[str]()
    all_clients: list[Scripted] = []

    def does(path: str) -> None:
        under_way.wait()
        assert all_clients[0].gone.wait(30)
        ended.append(path)
        raise ConnectionResetError

    real = threading.Thread.join

    def join(self: threading.Thread, timeout: float | None = None) -> None:
        monkeypatch.setattr(threading.Thread, "join", real)
        under_way.wait()
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", join)
    all_clients += [Scripted(does) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt):
        ask(all_clients, [Asked("a"), Asked("b"), Asked("c"), Asked("d")])
    assert sorted(ended) == ["a", "b"]
    assert not any(thread.name == "parvis-client" for thread in threading.enumerate())


def test_a_system_without_room_for_a_thread_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    real, started = threading.Thread.start, list[threading.Thread]()

    def start(self: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(self)
        real(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RequestError, match=r"^the system starts no more threads; raise its limit \(ulimit -u\)"):
        ask(several(2, lambda _: None), [Asked("x", 1e6), Asked("y", 1e6)])
    assert not started[0].is_alive()


# -- connections ------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """A path is answered by what the test says."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.connections.append(self.client_address[1])  # type: ignore[attr-defined]
        code, body = self.server.answers(self.path)  # type: ignore[attr-defined]
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        # As servers do with a connection on which nothing comes, without a word to the client.
        self.close_connection = self.path == "/last"

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """``connections``: the client's port, of each request."""

    daemon_threads = False
    answers: Callable[[str], tuple[int, bytes]]
    connections: list[int]


@contextmanager
def serving(answers: Callable[[str], tuple[int, bytes]], timeout_s: float = 30.0) -> Iterator[tuple[Server, Client]]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.answers, server.connections = answers, []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        client = Client("127.0.0.1", server.server_address[1], timeout_s)
        try:
            yield server, client
        finally:
            client.close()
            server.shutdown()
            thread.join()


def test_a_connection_is_kept_and_opened_again_where_the_server_has_closed_it() -> None:
    with serving(lambda path: (200, path.encode())) as (server, client):
        assert [client.get(path) for path in ("/a", "/b", "/last", "/c", "/d")] == [
            b"/a",
            b"/b",
            b"/last",
            b"/c",
            b"/d",
        ]
        ports = server.connections
        assert len(set(ports[:3])) == len(set(ports[3:])) == 1
        assert ports[2] != ports[3]


def test_a_server_that_is_gone_is_an_error_and_not_asked_for_ever() -> None:
    with serving(lambda path: (200, b"")) as (_, client):
        client.get("/last")
    with pytest.raises(ConnectionRefusedError):
        client.get("/")


@pytest.mark.parametrize(
    ("code", "body", "said"),
    [
        (
            503,
            b'{"error": {"message": "256 images wait already; try again later"}}',
            "256 images wait already; try again",
        ),
        (404, b"<p>nothing\nhere</p>", r"<p>nothing\\nhere</p>"),
        (500, b"\xff" + b"x" * 10**4, "\ufffd" + "x" * (module.LONGEST_REASON - 1) + "$"),
    ],
)
def test_an_answer_that_is_no_image_is_one_line_of_bounded_length(code: int, body: bytes, said: str) -> None:
    with (
        serving(lambda path: (code, body)) as (_, client),
        pytest.raises(RequestError, match=rf"^GET /v1/images\?label=0: answered with {code}: {said}"),
    ):
        client.get("/v1/images?label=0")


def test_silence_is_an_error() -> None:
    go_on = threading.Event()

    def answers(_: str) -> tuple[int, bytes]:
        assert go_on.wait(30)
        return 200, b""

    with serving(answers, timeout_s=0.05) as (_, client):
        try:
            with pytest.raises(RequestError, match=r"^GET /: no answer within 0\.05 s$"):
                client.get("/")
        finally:
            go_on.set()


def test_a_client_that_leaves_waits_no_longer() -> None:
    asked, go_on, errors = threading.Event(), threading.Event(), list[Exception]()

    def answers(_: str) -> tuple[int, bytes]:
        asked.set()
        assert go_on.wait(30)
        return 200, b""

    def work(client: Client) -> None:
        try:
            client.get("/")
        except Exception as error:
            errors.append(error)

    with serving(answers) as (_, client):
        try:
            thread = threading.Thread(target=work, args=(client,))
            thread.start()
            assert asked.wait(30)
            client.leave()
            thread.join(20)
            assert not thread.is_alive()
            (error,) = errors
            assert isinstance(error, ConnectionError)
        finally:
            go_on.set()


def test_a_client_that_has_left_asks_no_more() -> None:
    with serving(lambda path: (200, b"")) as (server, client):
        client.leave()
        with pytest.raises(ConnectionAbortedError):
            client.get("/")
        assert server.connections == []


def test_a_load_over_connections() -> None:
    with serving(lambda path: (200, b"x")) as (server, client):
        others = [Client("127.0.0.1", server.server_address[1], 30.0) for _ in range(2)]
        load = ask([client, *others], [Asked("/") for _ in range(9)], math.inf)
        assert len(load.latencies_ms) == len(server.connections) == 9
        for other in others:
            other.close()
