"""A bundle behind ``parvis serve``: its server runs as in production, and clients ask it for images.

The clients are threads of this process, so what they take of the processors is not the server's. A user who asks over a
network waits for that too; everything else that lies between a request and its image is here.
"""

from __future__ import annotations

import importlib.util
import io
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlencode, urlsplit

from PIL import Image

from par_runtime.bench.subjects.base import Sample
from par_runtime.bench.subjects.clients import Asked, Client, ask
from par_runtime.bench.subjects.pipeline import guidance_scale
from par_runtime.bench.subjects.process import ctrl_c_blocked, environment, killed, no_room, open_bundle
from par_runtime.bundle import Bundle
from par_runtime.dtypes import AUTO, Rounding
from par_runtime.errors import BundleError, RequestError, how_to_install
from par_runtime.images.pillow import quiet, ready
from par_runtime.stopping import later
from par_runtime.system import peak_bytes

NEEDS = ("starlette", "uvicorn", "prometheus_client")  #: of the extra "serve"
NOT_OVER_HTTP = ("starting the server", "a network (the clients share the server's cores)")
PHASE = "http"  #: of the calls of a sample: the latency of each request
MOST_OPEN = 128  #: clients of an open load; more requests than this wait here in place of there
ENDS_S = 30.0  #: how long a server that nobody asks may take to end
CLOSES_S = 1.0  #: the same where it is ended in the middle, by an error or Ctrl-C
LEAST_TIMEOUT_S, MOST_TIMEOUT_S, SILENCE_S = 60.0, 1e6, 30.0
LONGEST_SAID = 1000  #: characters of what a server printed, in an error


def check_servable(bundles: Iterable[Bundle]) -> None:
    """Raise RequestError where no server can be started here, or where a bundle makes no images."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise RequestError(f"--suite http needs {missing[0]}, which is not installed; {how_to_install('cpu,serve')}")
    for bundle in bundles:
        if bundle.image_size is None:
            raise RequestError(
                f"{bundle.path}: this bundle ends at tokens and makes no images, so --suite http has nothing to ask for"
            )


class ServedSubject:
    """The bundle at ``path``, as ``parvis serve`` takes it on ``device``. Raises what ``Pipeline.load`` raises.

    A first process tells what it is, and ends at once. :meth:`start` starts the server, :meth:`stop` ends it; between
    them ``pid`` is its process, and ``max_batch`` how many images it makes at most in one call.
    """

    def __init__(
        self,
        path: str | Path,
        label: str = "parvis",
        *,
        device: str = "cpu",
        threads: int | None = None,
        selftest: bool = True,
        rounding: Rounding = AUTO,
    ) -> None:
        first = open_bundle(path, label, device=device, threads=threads, selftest=False, rounding=rounding)
        first.close()
        self.note = first.note
        self.info = replace(first.info, clock="perf_counter", excluded=NOT_OVER_HTTP)
        self.max_batch = 1
        self._guidance = guidance_scale(Bundle.open(path, "none"))
        self._arguments = [str(path), "--device", device]
        self._arguments += [] if threads is None else ["--threads", str(threads)]
        for name, value in rounding._asdict().items():
            self._arguments += [f"--{name.replace('_', '-')}", value]
        self._arguments += [] if selftest else ["--no-selftest"]
        self._server: ServerProcess | None = None
        self._clients: list[Client] = []
        self._classes, self._seed = 1, 0

    @property
    def pid(self) -> int | None:
        """The server's process, while there is one."""
        return None if self._server is None else self._server.pid

    def start(self, seconds: float) -> bool:
        """Start the server, and check the first image that it gives. ``seconds``: what requests may take at most.

        Raises RequestError, which says what the server printed, BundleError where it is not what the first process was,
        MemoryError. Returns True.
        """
        timeout_s = min(max(LEAST_TIMEOUT_S, seconds), MOST_TIMEOUT_S)
        # A request that waits long is a long latency. With the usual time it would be an error, and end the load.
        self._server = ServerProcess(self.info.label, [*self._arguments, "--timeout", f"{timeout_s:g}"])
        self._timeout_s = timeout_s + SILENCE_S  # the server's own answer is there before
        (client,) = self._several(1)
        try:
            about = json.loads(client.get("/v1/models"))["data"][0]
            self._check(about["bundle"]["hash"], about["backend"])
            self.max_batch, self._classes = about["max_batch"], about["classes"]
            check_picture(client.get(self._path(guided=True)), self.info.image_size)
        except (RequestError, OSError, HTTPException) as error:
            raise self._server.failure(error) from error
        return True

    def _check(self, found: str, backend: str) -> None:
        """Raise BundleError where the server has another bundle than the first process, or computes otherwise."""
        for what, before, after in (
            ("was replaced by another bundle", self.info.hash[:12], found[:12]),
            ("is computed otherwise", f"{self.info.backend} {self.info.version}", backend),
        ):
            if before != after:
                raise BundleError(
                    f"{self._arguments[0]}: {what} while its server was started: at first {before}, then {after}; "
                    "leave it alone, and measure again"
                )

    def run(self, images: int, guided: bool, most_calls: int | None = None) -> Sample:
        """Ask for ``images`` images at once, each as a client of its own; whole, whatever ``most_calls`` says."""
        return self.closed_load(images, images, guided)

    def closed_load(self, clients: int, requests: int, guided: bool, seconds: float = MOST_TIMEOUT_S) -> Sample:
        """A closed load: so many clients, each of which asks again when it has its image, until ``requests`` are sent.

        ``calls_ms`` are the latencies, ``image_ms`` what all of it took. Raises RequestError, MemoryError.
        """
        return self._sample(clients, (Asked(self._path(guided)) for _ in range(requests)), seconds)

    def open_load(self, due: Sequence[float], guided: bool, seconds: float = MOST_TIMEOUT_S) -> Sample:
        """An open load: requests at the times ``due``, in seconds from now. As :meth:`closed_load`."""
        return self._sample(min(len(due), MOST_OPEN), (Asked(self._path(guided), at) for at in due), seconds)

    def _sample(self, clients: int, requests: Iterable[Asked], seconds: float) -> Sample:
        assert self._server is not None
        try:
            load = ask(self._several(clients), requests, seconds)
        except (RequestError, OSError, HTTPException) as error:
            self._hang_up()
            raise self._server.failure(error) from error
        return Sample({PHASE: load.latencies_ms}, 1e3 * load.took_s, peak_bytes(self._server.pid))

    def _several(self, count: int) -> list[Client]:
        """So many clients of the server; the same ones each time."""
        assert self._server is not None
        while len(self._clients) < count:
            self._clients.append(Client(self._server.host, self._server.port, self._timeout_s))
        return self._clients[:count]

    def _path(self, guided: bool) -> str:
        """The address of an image that nobody has asked for yet."""
        self._seed += 1
        asked = {
            "label": self._seed % self._classes,
            "seed": self._seed,
            "guidance": self._guidance if guided else 1.0,
            "guidance_interval": -1,  # as in every other suite: guided to the end
        }
        return f"/v1/images?{urlencode(asked)}"

    def stop(self) -> bool:
        """End the server. Raises RequestError where it does not end as it should. Returns True."""
        assert self._server is not None
        self._hang_up()
        self._server.stop()
        self._server = None
        return True

    def close(self) -> None:
        """End the server, if it runs, whatever it does."""
        self._hang_up()
        if self._server is not None:
            self._server.close()
            self._server = None

    def _hang_up(self) -> None:
        for client in self._clients:
            client.close()
        self._clients.clear()


class ServerProcess:
    """``parvis serve`` with these ``arguments``, in a process of its own, ``pid``; it answers at ``host`` and ``port``.

    Raises RequestError, which says what the server printed, MemoryError.
    """

    host: str
    port: int

    def __init__(self, label: str, arguments: Sequence[str]) -> None:
        self._label, self._path = label, arguments[0]
        command = [sys.executable, "-m", "par_runtime.bench.subjects.leash", "serve"]
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115, a pipe that nobody reads would fill
        try:
            with later(), ctrl_c_blocked():  # it is ended by this process
                self._process = subprocess.Popen(
                    [*command, *arguments, "--host", "127.0.0.1", "--port", "0"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._printed,
                    text=True,
                    encoding="utf-8",
                    env=environment(),
                )
            self.pid = self._process.pid
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
            if not line:
                raise self._ended("did not start")
            address = urlsplit(line.partition("  ")[0])
            self.host, self.port = str(address.hostname), int(address.port or 0)
        except BaseException as error:
            self.close()
            if (why := no_room(error)) is not None:
                raise why from error
            raise

    def failure(self, error: Exception) -> Exception:
        """The error of a load that ``error`` ended, with what the server says to it."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0.0 if isinstance(error, RequestError) else CLOSES_S)
            return self._ended("ended by itself")
        said = self._said()
        return RequestError(f"{self._path}: {error}{f' (it printed: {said})' if said else ''}")

    def stop(self) -> None:
        """End the server as production does. Raises RequestError where it does not end by itself, with exit code 0."""
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(ENDS_S)
        except subprocess.TimeoutExpired as error:
            raise RequestError(f"{self._path}: its server did not end within {ENDS_S:g} s of SIGTERM") from error
        if code:
            raise self._ended("did not end as it should")
        self.close()

    def close(self) -> None:
        """End the server, whatever it does: at first by SIGTERM, then by SIGKILL."""
        if hasattr(self, "_process"):
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            try:
                self._process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(CLOSES_S)
            finally:
                self._process.kill()
                self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
        self._printed.close()

    def _ended(self, how: str) -> Exception:
        """The error of a server that has ended, or is about to."""
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return killed(f"'parvis serve {self._path}' ({self._label})")
        said = self._said()
        return RequestError(f"{self._path}: its server {how} (exit code {code}), and printed {said or 'nothing'}")

    def _said(self) -> str:
        """What the server has printed to standard error, in one line; of what is too long, the end.

        Of a server that is to be ended: it writes where this leaves off to read.
        """
        self._printed.seek(0)
        lines = self._printed.read().decode(errors="replace").splitlines()
        said = "; ".join(line.strip().removeprefix("parvis: error: ") for line in lines if line.strip())
        return said if len(said) <= LONGEST_SAID else f"... {said[-LONGEST_SAID:]}"


def check_picture(content: bytes, size: tuple[int, int] | None) -> None:
    """Raise RequestError where an answer is no picture or clip that can be read to its end, of ``size`` (H, W)."""
    ready()
    try:
        with quiet(), Image.open(io.BytesIO(content)) as image:
            image.seek(getattr(image, "n_frames", 1) - 1)
            image.load()
            found = image.size[::-1]
    except Exception as error:  # readers of broken files raise nearly anything
        raise RequestError(f"the first answer, of {len(content)} bytes, is no image that can be read") from error
    if found != size:
        wanted = "no size" if size is None else f"{size[1]}x{size[0]}"
        raise RequestError(f"the first image has {found[1]}x{found[0]} pixels; expected {wanted}, as the bundle has")
