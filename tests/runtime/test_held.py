"""A file that stays open, where the program closes descriptors that it did not open, as what becomes a daemon does."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sharing import ON_A_CPU, params

from par_runtime import checked
from par_runtime.held import HeldFile

pytestmark = pytest.mark.skipif(not hasattr(os, "pread"), reason="no such descriptors on this system")


def numbers() -> set[int]:
    """Descriptors that are open."""
    found = set()
    for descriptor in range(256):
        try:
            os.fstat(descriptor)
        except OSError:
            continue
        found.add(descriptor)
    return found


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    before = numbers()
    yield path
    gc.collect()
    assert numbers() == before


def test_it_stays_open_whatever_happens_to_its_name(file: Path) -> None:
    held = HeldFile(file)
    file.unlink()
    status = held.status()
    assert status is not None
    assert status.st_size == 7
    assert os.pread(held.descriptor, 7, 0) == b"content"
    held.close()
    held.close()
    assert held.status() is None


def test_the_end_of_the_object_closes_it(file: Path) -> None:
    HeldFile(file)  # the fixture looks


def test_another_file_at_its_number_is_left_alone(file: Path) -> None:
    held = HeldFile(file)
    taken = held.descriptor
    os.close(taken)
    assert held.status() is None
    held.close()
    assert held.status() is None

    held = HeldFile(file)
    os.close(held.descriptor)
    with file.with_name("other").open("w") as other:
        assert other.fileno() == taken
        assert held.status() is None
        held.close()
        del held
        gc.collect()
        other.write("mine")
        other.flush()


def test_the_same_file_at_its_number_is_of_who_opened_it_last(file: Path) -> None:
    first = HeldFile(file)
    os.close(first.descriptor)
    second = HeldFile(file)
    assert second.descriptor == first.descriptor
    assert first.status() is None
    first.close()
    assert second.status() is not None
    second.close()


@pytest.mark.parametrize("opens", [HeldFile, checked.open_regular])
def test_what_interrupts_opening_leaves_nothing_open(
    opens: object, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = checked._why_not, []

    def interrupted(mode: int) -> str | None:
        calls.append(mode)
        if len(calls) == 2:  # the file is open
            raise KeyboardInterrupt
        return real(mode)

    monkeypatch.setattr(checked, "_why_not", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opens(file)  # type: ignore[operator]


DAEMON = """
import os, sys
from kinds import KINDS
from par_runtime import BundleError
path, load = KINDS[sys.argv[1]]
for what in ("decode", "encode", "close", "del"):
    pipeline = load(path)
    made = pipeline.generate([0], seed=1)
    again = load(path)
    again.generate([0], seed=1, decode=False)
    os.closerange(3, 256)
    mine = [open(os.devnull, "w") for _ in range(20)]
    try:
        if what in ("decode", "encode"):
            getattr(again, what)(made.tokens if what == "decode" else made.images)
    except BundleError as error:
        print(error)
    if what == "close":
        pipeline.close()
        again.close()
    del pipeline, again
    for each in mine:
        each.write("mine")
        each.close()
after = load(path)
assert after.generate([0], seed=1) == made
"""


@pytest.mark.parametrize("kind", params(*ON_A_CPU))
def test_a_program_that_becomes_a_daemon_keeps_its_own_files(kind: str) -> None:
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent), *sys.path])}
    command = [sys.executable, "-c", DAEMON, kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.endswith(
            ": the program closed the descriptor of weights.data (os.closerange, becoming a daemon); load the bundle "
            "after that"
        )
