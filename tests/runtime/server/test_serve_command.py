"""``parvis serve`` as a process: it says where it is, ends in order, and refuses what it cannot be run with."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from served import Served
from sharing import TINY

from conftest import child
from par_runtime import Pipeline

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


def test_a_second_ctrl_c_waits_for_nobody() -> None:
    with started("--max-batch", "1", "--max-waiting", "9999") as (process, served):
        ask = threading.Thread(target=_forgotten, args=(served,))
        ask.start()
        while served.get("/health").json()["waiting"] == 0:
            pass
        with socket.create_connection(("127.0.0.1", served.port)) as slow:
            slow.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            process.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):  # it waits for the rest of that request
                process.wait(1)
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
        assert process.returncode == 130
        ask.join(60)


def _forgotten(served: Served) -> None:
    """A request whose answer may never come."""
    connection = served.connect()
    connection.request("GET", "/v1/images?label=0")
    try:
        connection.getresponse().read()
    except OSError:
        pass
    finally:
        connection.close()


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
