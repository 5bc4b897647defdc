"""Reading what may be anything: each fault is one short message, and nothing waits."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from par_runtime.checked import load_json, open_regular, read_regular, shown, why_not_regular
from par_runtime.errors import BundleError, RequestError


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("otter", "'otter'"),
        ("\x1b[31mred\x07", r"'\x1b[31mred\x07'"),
        ("a\u202eb\ud800", r"'a\u202eb\ud800'"),
        (12, "12"),
        (True, "True"),
        (None, "None"),
        (1.5, "1.5"),
        (10**40, "an integer of about 41 digits"),
        ([1, "a", (2,)], "[1, 'a', (2)]"),
        ({"a": [1]}, "{'a': [1]}"),
        ([[[["deep"]]]], "[[[[...]]]]"),
    ],
)
def test_shown(value: object, text: str) -> None:
    assert shown(value) == text


def test_an_integer_that_python_does_not_print_is_shown() -> None:
    assert shown(-(10**5000)) == "an integer of about 5001 digits"


def test_shown_is_short_whatever_it_shows() -> None:
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    for value in ("x" * 10**7, ["x" * 10**6] * 1000, {"k" * 10**6: 1}, nested, list(range(10**6)), 10**90):
        assert len(shown(value)) <= 80
        assert len(shown(value, 20)) <= 20
    assert shown("x" * 100, 10) == "'xxxxxx..."
    while nested:  # freed from the outside in, without recursion
        nested = nested.pop()  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 10**6, "nested more than 32 levels"),
        ("[" * 40 + "]" * 40, "nested more than 32 levels"),
        ('{"a":' * 40 + "1" + "}" * 40, "nested more than 32 levels"),
        ("1" * 10**5, "an integer of 100000 digits; expected at most 100"),
        ("[Infinity]", "number Infinity; expected a finite one"),
        ("[-Infinity]", "number -Infinity; expected a finite one"),
        ("NaN", "number NaN; expected a finite one"),
        ("1e999", "number 1e999; expected a finite one"),
        ("1." + "0" * 10**6, "expected a finite one"),
        ('"\\ud800"', "not UTF-8"),
        ('{"\\udfff": 1}', "not UTF-8"),
        (b"\xff\xfe", "not UTF-8"),
        ('{"a": 1, "b": 2, "a": 1}', "not valid JSON (an object has the name 'a' twice; give it once)"),
        ('[{"a": {"b": [{"c": 1, "\\u0063": 2}]}}]', "an object has the name 'c' twice; give it once"),
        ('{"\x7f": 1, "\\u007f": 2}', r"the name '\x7f' twice"),
        ('{"' + "k" * 10**6 + '": 1, "' + "k" * 10**6 + '": 2}', "kkk... twice; give it once"),
        ("{" + '"a": 1, ' * 10**6 + '"a": 1}', "an object has the name 'a' twice"),
        ("{" + ", ".join(f'"{i}": 1' for i in [*range(10**5), 10**5 - 1]) + "}", "has the name '99999' twice"),
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ('"' + "x" * 10**7, "Unterminated string"),
    ],
    ids=range(21),
)
def test_json_that_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        load_json(text, "the entry", RequestError)
    assert message in str(caught.value)
    assert str(caught.value).startswith("the entry: ")
    assert len(str(caught.value)) < 200


def test_json_that_is_read() -> None:
    assert load_json(b'{"a": [1, 2.5, null, true, "\xc3\xa4"]}', "x", RequestError) == {"a": [1, 2.5, None, True, "ä"]}
    assert load_json("[" * 32 + "]" * 32, "x", RequestError) != []
    assert load_json('{"a": {"a": [{"a": 1}, {"a": 2}]}}', "x", RequestError) == {"a": {"a": [{"a": 1}, {"a": 2}]}}
    assert load_json("9" * 100, "x", RequestError) == 10**100 - 1


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "gone").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.open(tmp_path, os.O_RDONLY)
        try:  # through the descriptor, because the name of a socket has at most 107 bytes
            server.bind(f"/proc/self/fd/{folder}/socket")
        finally:
            os.close(folder)
        for path, message in [
            (tmp_path / "pipe", "is a pipe, not a file"),
            (tmp_path / "link", "is a pipe, not a file"),
            (tmp_path / "socket", "is a socket, not a file"),
            (tmp_path, "is a folder, not a file"),
            (Path("/dev/zero"), "is a device, not a file"),
            (tmp_path / "none", "missing"),
            (tmp_path / "gone", "missing"),
            (tmp_path / "loop", "cannot be read"),
            (tmp_path / "file" / "below", "cannot be read"),
            (tmp_path / ("x" * 5000), "cannot be read"),
            (Path("a\0b"), "cannot be read"),
        ]:
            with pytest.raises(BundleError, match=message):
                read_regular(path, 100, BundleError)
            assert message in str(why_not_regular(path))
            with pytest.raises((OSError, ValueError)):
                open_regular(path)
    assert read_regular(tmp_path / "file", 7, BundleError) == b"content"
    with pytest.raises(BundleError, match="file: 7 bytes; expected at most 6"):
        read_regular(tmp_path / "file", 6, BundleError)
    with (tmp_path / "sparse").open("wb") as sparse:
        sparse.truncate(2**40)
    with pytest.raises(BundleError, match="1099511627776 bytes; expected at most 100"):
        read_regular(tmp_path / "sparse", 100, BundleError)


def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_waiting: None
) -> None:
    """Between the look at the name and the opening, and as a folder, or a device, might."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    real, before = os.stat, len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "stat", lambda path, **how: real(tmp_path / "file"))
    for path, what in ((tmp_path / "pipe", "a pipe"), (tmp_path, "a folder"), (Path("/dev/null"), "a device")):
        with pytest.raises(OSError, match=f"is {what}, not a file"):
            open_regular(path)
        with pytest.raises(BundleError, match=rf"cannot be read \(is {what}, not a file\)"):
            read_regular(path, 100, BundleError)
    assert len(os.listdir("/proc/self/fd")) == before
