"""``parvis serve`` as a process: it says where it is, ends in order, and refuses what it cannot be run with."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from served import Served
from sharing import TINY

from conftest import child
from par_runtime import Batcher, Pipeline, RequestError
from par_runtime.server import application
from par_runtime.server.run import bound, serve

SERVE = [sys.executable, "-m", "par_runtime", "serve", str(TINY), "--port", "0", "--threads", "1", "--no-selftest"]


@contextmanager
def started(*more: str) -> Iterator[tuple[subprocess.Popen[str], Served]]:
    """The command with these options too, when it takes requests."""
    with child([*SERVE, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), process.communicate()
        yield process, Served(int(line.split()[0].rpartition(":")[2]))


def test_it_says_where_it_is_and_what_it_serves() -> None:
    with child([*SERVE, "--max-batch", "3"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.split("  ")[1].startswith("(tiny, ")
        assert line.endswith(", in calls of up to 3)\n")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        assert errors == "stopped after 0 images in 0 calls\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_what_was_taken_is_answered_when_it_is_told_to_end(number: signal.Signals) -> None:
    with started("--max-batch", "1", "--access-log") as (process, served):
        answers: list[Any] = []
        body = {"prompt": "0", "n": 12, "seed": 1}
        asking = threading.Thread(target=lambda: answers.append(served.post("/v1/images/generations", body)))
        asking.start()
        while served.get("/health").json()["waiting"] == 0 and not answers:
            pass
        process.send_signal(number)
        asking.join(60)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert len(answers[0].json()["data"]) == 12
        assert "stopped after 12 images in 12 calls" in errors
        assert '"POST /v1/images/generations HTTP/1.1" 200' in errors


def test_who_waits_when_the_time_to_drain_is_over_is_told_so() -> None:
    with started("--max-batch", "1", "--drain", "1", "--max-waiting", "9999") as (process, served):
        body = {"prompt": "0", "n": 32}
        with ThreadPoolExecutor(24) as pool:  # several seconds of images
            asked = [pool.submit(served.post, "/v1/images/generations", body) for _ in range(24)]
            while served.get("/health").json()["waiting"] < 23 * 32:
                pass
            process.send_signal(signal.SIGTERM)
            answers = [each.result() for each in asked]
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    late = [answer for answer in answers if answer.code != 200]
    assert len(late) > 1
    assert {(answer.code, answer.error()) for answer in late} == {(503, "the server is stopping")}
    assert f"{len(late)} requests were not done within 1 s" in errors
    assert errors.count("\n") == 2, errors


def test_a_request_that_has_not_come_to_its_end_does_not_hold_it_up() -> None:
    with started("--drain", "600") as (process, served):
        head = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"
        with socket.create_connection(("127.0.0.1", served.port), timeout=60) as slow:
            slow.sendall(head)
            assert served.get("/health").code == 200  # by then it has begun to read
            process.send_signal(signal.SIGTERM)
            said = b"".join(iter(lambda: slow.recv(65536), b""))
        assert process.wait(60) == 0
    assert said.startswith(b"HTTP/1.1 503 ")
    assert b'"the server is stopping"' in said


@pytest.mark.parametrize(
    ("drain_s", "numbers", "code"), [("1", [signal.SIGTERM], 0), ("600", [signal.SIGINT, signal.SIGINT], 130)]
)
def test_a_client_that_does_not_read_does_not_hold_it_up(
    drain_s: str, numbers: list[signal.Signals], code: int
) -> None:
    with started("--drain", drain_s) as (process, served), socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", served.port))
        client.settimeout(2)
        with suppress(TimeoutError):  # it does not take more before we read
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 20_000)
        for number in [None, *numbers]:  # at first until answers fill what the system holds
            if number is not None:
                process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.7)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == code, errors
    assert "Traceback" not in errors


def test_the_end_does_not_wait_for_company() -> None:
    with started("--max-wait-ms", "600000", "--drain", "60") as (process, served):
        answers: list[Any] = []
        asking = threading.Thread(target=lambda: answers.append(served.get("/v1/images?label=0")))
        asking.start()
        while served.get("/health").json()["waiting"] == 0:
            pass
        process.send_signal(signal.SIGTERM)
        asking.join(30)
        assert process.wait(30) == 0
        assert answers[0].code == 200


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As in the background of a shell, where Ctrl-C is for others."""
    code = (
        "import signal, runpy, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "runpy.run_module('par_runtime', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", code, *SERVE[3:]]
    with child(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        served = Served(int(process.stdout.readline().split()[0].rpartition(":")[2]))
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        assert served.get("/health").code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_connections_beyond_the_limit_of_the_system_do_not_fill_the_log() -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24)); import runpy, sys; "
    code = limit + "runpy.run_module('par_runtime', run_name='__main__', alter_sys=True)"
    with child([sys.executable, "-c", code, *SERVE[3:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().split()[0].rpartition(":")[2])
        with ExitStack() as open_ones:
            for _ in range(40):
                open_ones.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(2.5)  # asyncio tries again every second
        assert Served(port).get("/v1/images?label=0").code == 200
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert errors.count("no more connections: too many open files") == 1
    assert errors.count("\n") < 6, errors


def test_a_port_that_another_one_took_while_the_bundle_was_loaded_is_said() -> None:
    with bound("127.0.0.1", 0) as ours, Pipeline.load(TINY, threads=1, selftest=False) as pipeline:
        port = ours.getsockname()[1]
        with bound("127.0.0.1", port) as theirs, Batcher(pipeline) as batcher:  # Linux lets both, until one listens
            theirs.listen()
            with pytest.raises(RequestError, match=f"--port {port}: .*; give another --port"):
                serve(application(batcher), ours, 1.0, lambda: None)


def test_a_second_ctrl_c_waits_for_nobody() -> None:
    with started("--max-batch", "1", "--drain", "600", "--max-waiting", "9999") as (process, served):
        body = {"prompt": "0", "n": 32}
        with ThreadPoolExecutor(24) as pool:
            asked = [pool.submit(served.post, "/v1/images/generations", body) for _ in range(24)]
            while served.get("/health").json()["waiting"] < 23 * 32:
                pass
            process.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.3)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
            answers = [each.exception() or each.result().code for each in asked]
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert answers.count(200) < 24


def test_an_image_is_that_of_the_command_line(tmp_path: Path) -> None:
    with started("--name", "mine") as (process, served):
        (tmp_path / "a.png").write_bytes(served.get("/v1/images?label=0&seed=7").body)
        assert served.get("/v1/models/mine").code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert run("redo", tmp_path / "a.png", "--bundle", TINY, "--threads", 1) == 0
    with Pipeline.load(TINY, threads=1, selftest=False) as pipeline:
        assert (tmp_path / "a.png").read_bytes() == pipeline.generate(0, seed=7).to_bytes()


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--port", "70000"], "--port 70000: expected 0 to 65535, a whole number"),
        (
            ["--host", "no.such.host.invalid"],
            "--host 'no.such.host.invalid': expected the name or address of this machine",
        ),
        (["--host", "192.0.2.1", "--port", "0"], "--host '192.0.2.1' --port 0: Cannot assign requested address; "),
        (["--max-batch", "0"], "--max-batch 0: expected 1 or more"),
        (["--max-waiting", "0"], "--max-waiting 0: expected 1 or more"),
        (["--max-wait-ms", "-1"], "--max-wait-ms -1.0: expected 0 to 1000000 milliseconds"),
        (["--timeout", "nan"], "--timeout nan: expected 0.001 to 1000000 seconds"),
        (["--drain", "0"], "--drain 0.0: expected 1 to 1000000 seconds"),
        (["--name", ""], "name '': expected a text of 1 to 200 printable characters"),
        (["--max-batch", "100000", "--port", "0"], "max_batch 100000: expected 1 to "),
    ],
)
def test_options_that_fit_nothing_are_refused(
    options: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("serve", TINY, "--no-selftest", "--threads", 1, *options) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("no_waiting")
def test_a_port_that_is_taken_is_said_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run("serve", TINY, "--port", port) == 2
    error = capsys.readouterr().err
    assert f"--host '127.0.0.1' --port {port}: Address already in use; " in error
    assert "give another --port (0: any that is free)" in error
