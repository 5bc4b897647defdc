"""Reading pictures leaves out Pillow's warnings, and nothing else: neither those of other threads, nor for ever."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from par_runtime.clips import files
from par_runtime.images.opening import open_image
from par_runtime.images.pillow import quiet


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)).save(path)
    return path


def read(photo: Path) -> None:
    open_image(photo)
    files.is_animation(photo)
    files.recipe_of(photo)


def test_the_filters_are_the_same_after_threads_have_read_pictures(photo: Path) -> None:
    before, listed = warnings.filters, list(warnings.filters)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: read(photo), range(60)))
    finally:
        sys.setswitchinterval(interval)
    assert warnings.filters is before
    assert list(before) == listed
    with pytest.warns(UserWarning, match="can you see me"):
        warnings.warn("can you see me?", UserWarning, stacklevel=1)


def test_of_two_threads_the_one_that_comes_later_leaves_first_or_last() -> None:
    """The first has the filters of the program, the second those of the first: neither may be put back for ever."""
    for first_leaves_first in (True, False):
        listed, inside, go_on = list(warnings.filters), threading.Event(), threading.Event()

        def other(inside: threading.Event = inside, go_on: threading.Event = go_on) -> None:
            with quiet():
                inside.set()
                go_on.wait()

        thread = threading.Thread(target=other)
        with quiet():
            thread.start()
            inside.wait()
            if not first_leaves_first:
                go_on.set()
                thread.join()
            warnings.warn("of this thread, left out", UserWarning, stacklevel=1)
        if first_leaves_first:
            with pytest.raises(UserWarning, match="while another thread reads"):
                warnings.warn("while another thread reads", UserWarning, stacklevel=1)
            go_on.set()
            thread.join()
        assert list(warnings.filters) == listed


def test_filters_that_others_add_meanwhile_stay() -> None:
    listed = list(warnings.filters)
    with warnings.catch_warnings():
        with quiet():
            warnings.filterwarnings("ignore", message="added meanwhile")
            with warnings.catch_warnings():
                warnings.warn("left out", UserWarning, stacklevel=1)
        warnings.warn("added meanwhile", UserWarning, stacklevel=1)
        assert len(warnings.filters) == len(listed) + 1
    with warnings.catch_warnings(), quiet():
        pass
    with quiet(), quiet(), warnings.catch_warnings():
        pass
    assert list(warnings.filters) == listed


@pytest.mark.parametrize("options", [["-W", "error"], []])
def test_a_picture_with_odd_metadata_is_read_where_warnings_are_errors(tmp_path: Path, options: list[str]) -> None:
    path = tmp_path / "odd.tif"
    Image.new("RGB", (8, 8), "red").save(path, tiffinfo={270: "x" * 100})
    data = bytearray(path.read_bytes())
    at = data.find(b"\x0e\x01\x02\0")  # ImageDescription, whose length becomes larger than the file
    data[at + 4 : at + 8] = (10**6).to_bytes(4, "little")
    path.write_bytes(data)
    code = (
        "import sys, warnings; from par_runtime.images.opening import open_image; listed = list(warnings.filters)\n"
        "print(open_image(sys.argv[1]).getpixel((0, 0)), list(warnings.filters) == listed)\n"
        "from PIL import Image; Image.open(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, *options, "-c", code, str(path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "(255, 0, 0) True\n"
    assert "Tag data larger than file" in done.stderr or "Possibly corrupt" in done.stderr  # Pillow does warn of it
    assert "opening.py" not in done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_the_filters_of_the_program() -> None:
    code = """
import os, threading, warnings
from par_runtime.images.pillow import quiet
warnings.simplefilter("ignore", DeprecationWarning)
listed, inside, go_on = list(warnings.filters), threading.Event(), threading.Event()
def other():
    with quiet():
        inside.set(); go_on.wait()
thread = threading.Thread(target=other); thread.start(); inside.wait()
pid = os.fork()
if pid == 0:
    os._exit(0 if list(warnings.filters) == listed else 1)
go_on.set(); thread.join()
with quiet():
    nested = os.fork()
    if nested == 0:
        warnings.simplefilter("error")
        with quiet(): warnings.warn("x")
        os._exit(0)
print([os.waitstatus_to_exitcode(os.waitpid(each, 0)[1]) for each in (pid, nested)])
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr) == ("[0, 0]\n", "")
