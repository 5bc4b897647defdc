"""Signals that end a command: exceptions, but never in the middle of an import."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from par_runtime.cli import dispatch
from par_runtime.stopping import exit_on_signals, later


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(
    ("sent", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit), (signal.SIGHUP, SystemExit)]
)
def test_a_signal_raises_at_once_and_after_an_import_that_it_met(
    sent: signal.Signals, raised: type[BaseException]
) -> None:
    before = signal.getsignal(sent)
    reached = []

    def at_once() -> None:
        with exit_on_signals():
            os.kill(os.getpid(), sent)
            reached.append("behind the signal")

    def importing() -> None:
        with exit_on_signals(), later():
            with later():
                os.kill(os.getpid(), sent)
                reached.append("in the inner import")
            reached.append("in the outer import")

    with pytest.raises(raised) as caught:
        at_once()
    assert not reached
    with pytest.raises(raised):
        importing()
    assert reached == ["in the inner import", "in the outer import"]
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 128 + sent
    assert signal.getsignal(sent) is before
    with later():  # nothing is left over
        pass


def test_what_is_ignored_stays_so_and_other_threads_set_nothing() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with exit_on_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    seen = []

    def work() -> None:
        with exit_on_signals(), later():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_command_that_is_stopped_while_it_imports_ends(tmp_path: Path) -> None:
    """The module of the verb gets the signal in the middle, and swallows what it meets there, as extensions do."""
    (tmp_path / "swallows.py").write_text(
        "import os, signal\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    for _ in range(1000): pass\n"
        "except BaseException:\n"
        "    pass\n"
        "from par_runtime.cli.labels import main, parser\n"
    )
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from par_runtime.cli import dispatch\n"
        "dispatch.VERBS['labels'] = dispatch.VERBS['labels']._replace(module='swallows')\n"
        "sys.exit(dispatch.main(['labels', 'models/demo']))"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "")


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_an_import_error_that_comes_of_a_signal_is_no_traceback(
    stop: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(verb: str, arguments: list[str]) -> int:
        raise ImportError("initialization failed") from stop

    monkeypatch.setattr(dispatch, "_call", broken)
    assert dispatch.main(["labels", "x"]) == code
    assert ("stopped; nothing was half-written" in capsys.readouterr().err) == (code == 130)
    monkeypatch.setattr(dispatch, "_call", lambda *_: __import__("no_such_module_here"))
    with pytest.raises(ModuleNotFoundError):
        dispatch.main(["labels", "x"])


def test_ctrl_c_while_the_command_itself_is_imported_is_one_line() -> None:
    program = (
        "import sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'par_runtime.cli.common':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stop())\n"
        "sys.argv[1:] = ['--version']\n"
    )
    for entry in ("from par_runtime.cli import main; sys.exit(main())", "import par_runtime.__main__"):
        done = subprocess.run(
            [sys.executable, "-c", program + entry], capture_output=True, text=True, check=False, timeout=60
        )
        assert (done.returncode, done.stdout) == (130, "")
        assert done.stderr == "\nparvis: stopped; nothing was half-written\n"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signals on this system")
@pytest.mark.parametrize("sent", ["SIGHUP", "SIGINT", "SIGTERM"])
def test_a_handler_that_was_set_in_c_stays(sent: str) -> None:
    """As crash reporters, Qt and ROS set them: Python is not told, and takes its own for the one there is."""
    code = """
import faulthandler, os, signal, sys
from par_runtime import Pipeline
from par_runtime.late import importing_others
from par_runtime.stopping import exit_on_signals
sent = getattr(signal, sys.argv[2])
known = signal.getsignal(sent)
faulthandler.register(sent, file=open(os.devnull, "w"), all_threads=False)
def still(what):
    os.kill(os.getpid(), sent)
    for _ in range(1000): pass
    assert signal.getsignal(sent) is known
    print(what, flush=True)
with importing_others(): still("while it imports")
with exit_on_signals(): still("in a command")
pipeline = Pipeline.load(sys.argv[1], "cpu-ort", threads=1)
still("after a load")
pipeline.encode(pipeline.generate(0, seed=1).images)
still("after encoding")
"""
    tiny = Path(__file__).parents[1] / "data" / "tiny"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(tiny), sent]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    said = "while it imports\nin a command\nafter a load\nafter encoding\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
