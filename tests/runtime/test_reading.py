"""Files that the system does not read: the message says what to do about the system, not to copy the file again."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sharing import SMALL, TINY

from par_runtime import Bundle, BundleError, Pipeline, RequestError, loaded
from par_runtime.backends.native.compiled import KernelError, once, open_compiled
from par_runtime.clips import files
from par_runtime.images.opening import open_image
from par_runtime.loaded import LoadedFiles
from par_runtime.reading import REMEDIES, advised, unreadable

SYSTEM = {
    errno.EMFILE: "cannot be read (Too many open files); raise the limit of open files (ulimit -n)",
    errno.EIO: "cannot be read (Input/output error); the disk reports an error: check the disk, and its connection",
    errno.ENOMEM: "cannot be read (Cannot allocate memory); the system is out of memory: free some, or run it where "
    "there is more",
    errno.ESTALE: "cannot be read (Stale file handle); the network's disk has lost it: try again, or mount that disk "
    "again",
    errno.EACCES: "cannot be read (Permission denied); change its permissions, or run it as another user",
}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the texts are those of Linux")


def fails(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str], None]:
    """Have the system refuse to open every file of a name."""
    real = os.open

    def make(number: int, name: str) -> None:
        def opened(path: object, flags: int, mode: int = 0o777, **how: int) -> int:
            if Path(str(path)).name == name:
                raise OSError(number, os.strerror(number), str(path))
            return real(path, flags, mode, **how)  # type: ignore[call-overload, no-any-return]

        monkeypatch.setattr(os, "open", opened)

    return make


@pytest.mark.parametrize("number", SYSTEM)
@pytest.mark.parametrize("name", ["manifest.json", "step.onnx", "weights.data"])
def test_a_file_of_a_bundle(name: str, number: int, refuse: Callable[[int, str], None]) -> None:
    refuse(number, name)
    with pytest.raises(BundleError) as caught:
        Pipeline.load(TINY, "cpu-ort", selftest=False)
    assert str(caught.value) == f"{TINY / name}: {SYSTEM[number]}"


@pytest.mark.parametrize("number", SYSTEM)
def test_the_weights_while_they_are_used(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    files = LoadedFiles(Bundle.open(SMALL))
    wanted = f"{SMALL / 'weights.data'}: {SYSTEM[number]}"

    def fail(*_: object, **__: object) -> None:
        raise fails(number)

    def said(use: Callable[[], object], kind: type[Exception] = BundleError) -> str:
        with pytest.raises(kind) as caught:
            use()
        return str(caught.value)

    monkeypatch.setattr(os, "preadv", fail)
    assert said(lambda: files.read(memoryview(bytearray(8)), 0)) == wanted
    monkeypatch.setattr(loaded.mmap, "mmap", fail)
    if number == errno.ENOMEM:
        assert said(files.weights, MemoryError).endswith("cannot be mapped into memory; see ulimit -v")
    else:
        assert said(files.weights) == wanted
    monkeypatch.setattr(os, "pread", fail)
    files._known = (0, 0)  # as if it was written
    assert said(files.check) == wanted
    files.close()


def test_the_graph_of_a_session_is_not_said_to_be_moved(refuse: Callable[[int, str], None]) -> None:
    files = LoadedFiles(Bundle.open(TINY))
    refuse(errno.EMFILE, "encoder.onnx")
    with pytest.raises(BundleError) as caught:
        files.path("encoder")
    assert str(caught.value) == f"{TINY.resolve() / 'encoder.onnx'}: {SYSTEM[errno.EMFILE]}"
    files.close()


@pytest.mark.parametrize("number", SYSTEM)
def test_pictures_and_clips(number: int, tmp_path: Path, refuse: Callable[[int, str], None]) -> None:
    (tmp_path / "x.gif").write_bytes(b"GIF89a")
    refuse(number, "x.gif")
    with pytest.raises(RequestError) as caught:
        files.read_any(tmp_path / "x.gif", 1)
    assert str(caught.value) == f"{tmp_path / 'x.gif'}: {SYSTEM[number]}"
    with pytest.raises((OSError, RequestError)) as failed:
        open_image(tmp_path / "x.gif")
    assert "truncated" not in str(failed.value)


def test_what_is_wrong_with_the_file_keeps_its_advice() -> None:
    missing = OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    assert advised(unreadable(missing), "copy it") == "cannot be read (No such file or directory); copy it"
    for number in REMEDIES:
        assert advised(unreadable(fails(number)), "copy it") == unreadable(fails(number))


def test_why_a_library_cannot_be_loaded(tmp_path: Path) -> None:
    file = tmp_path / "_step.so"
    file.write_bytes(b"no library" * 100)
    with pytest.raises(KernelError, match=rf"^{file} cannot be loaded \(invalid ELF header\)$"):
        open_compiled(file, lambda _: None, "parvis_", [])
    with pytest.raises(KernelError, match=r"none\.so cannot be loaded \(cannot open shared object file: No such file"):
        open_compiled(tmp_path / "none.so", lambda _: None, "parvis_", [])


def test_what_a_library_lacked_for_a_moment_is_not_kept() -> None:
    calls = []

    def opens(file: Path | None) -> object:
        calls.append(file)
        if len(calls) == 1:
            raise KernelError("too many open files", passing=True)
        if file is None:
            raise KernelError("not built")
        return np

    opened = once(opens)  # type: ignore[arg-type]
    assert str(opened(Path("x"))) == "too many open files"
    assert opened(Path("x")) is opened(Path("x")) is np  # type: ignore[comparison-overlap]
    assert str(opened(None)) == str(opened(None)) == "not built"
    assert len(calls) == 3


TOO_MANY = """
import os, resource, sys
from par_runtime import Bundle
from par_runtime.backends.native.library import library_file, why_not
bundle = Bundle.open(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
held = []
try:
    while True:
        held.append(os.dup(0))
except OSError:
    pass
print(why_not(bundle) if library_file() else "")
for each in held:
    os.close(each)
print(why_not(bundle) if library_file() else None)
"""


def test_kernels_run_once_there_are_descriptors_again() -> None:
    done = subprocess.run([sys.executable, "-c", TOO_MANY, str(SMALL)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    first, later = done.stdout.splitlines()
    assert first == "" or first.endswith(
        " cannot be loaded (cannot open shared object file: Too many open files); raise the limit of open files "
        "(ulimit -n)"
    )
    assert later == "None"
