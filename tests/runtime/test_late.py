"""Imports inside functions: a fork in another thread waits for their end, and warm calls touch no signal."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

import par_runtime
from par_runtime.late import importing

ROOM = Path(par_runtime.__file__).parent
DATA = Path(__file__).parents[1] / "data"
#: A command is a process of its own, in which nobody forks.
COMMANDS = ("cli", "bench")


def run(code: str, *arguments: str) -> str:
    """What a program prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- every import inside a function -----------------------------------------------------------------------------------


def late_imports(node: ast.AST, named: frozenset[str] = frozenset()) -> Iterator[tuple[int, str, frozenset[str]]]:
    """Line, module and what the ``with importing(...)`` around it names, of all imports below ``node``."""
    for child in ast.iter_child_nodes(node):
        inside = named
        if isinstance(child, ast.With):
            calls = [item.context_expr for item in child.items if isinstance(item.context_expr, ast.Call)]
            guards = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "importing"]
            inside = named | {ast.unparse(each) for call in guards for each in call.args}
        if isinstance(child, ast.Import):
            yield from ((child.lineno, repr(name.name), inside) for name in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0
            submodules = [f"{child.module}.{name.name}" for name in child.names]
            known = [name for name in submodules if f"'{name}'" in inside]
            yield from ((child.lineno, repr(name), inside) for name in known or [child.module])
        elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith(("import_module", "__import__")):
            yield child.lineno, ast.unparse(child.args[0]), inside
        yield from late_imports(child, inside)


def test_no_import_inside_a_function_is_open_to_forks() -> None:
    found, unguarded = 0, []
    for path in sorted(ROOM.rglob("*.py")):
        if path.relative_to(ROOM).parts[0] in COMMANDS:
            continue
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                for line, module, named in late_imports(function):
                    found += 1
                    if module not in named:
                        unguarded.append(f"{path.relative_to(ROOM)}:{line} imports {module} outside of importing(it)")
    assert unguarded == []
    assert found > 20


def test_the_test_above_sees_an_unguarded_import() -> None:
    code = (
        "def f():\n    import a\n    with importing('b'):\n        import b, c\n        from d import e\n"
        "    with needing('x'), importing('d.e'):\n        from d import e\n    import_module(n)\n"
    )
    found = [(module, module in named) for _, module, named in late_imports(ast.parse(code))]
    assert found == [("'a'", False), ("'b'", True), ("'c'", False), ("'d'", False), ("'d.e'", True), ("n", False)]
    assert resolve_name("par_runtime", None) == "par_runtime"


# -- what is really imported ------------------------------------------------------------------------------------------

WATCH = """
import sys, threading, os
import numpy
import par_runtime
from par_runtime import forks, late
seen = []
class Watch:
    def find_spec(self, name, path=None, target=None):
        if threading.get_ident() not in forks._inside:
            seen.append(name)
        return None
sys.meta_path.insert(0, Watch())
"""


@pytest.mark.parametrize("device", ["cpu", "cpu-ort"])
@pytest.mark.parametrize("kind", ["tiny", "tiny_video"])
def test_nothing_is_imported_where_a_fork_would_not_wait(
    kind: str, device: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Neither by ourselves nor by the packages that we call, from the first load to the last file."""
    code = """
from par_runtime import Pipeline, RequestError
folder, device, out = sys.argv[1:]
pipeline = Pipeline.load(folder, device, threads=1)
result = pipeline.generate([0, 1])
pipeline.generate(0, seed=1, guidance=2, top_k=3, top_p=0.5, temperature=0.7, preview_every=5, on_preview=lambda *_: 0)
clips = pipeline.bundle.video
for kind in (".gif", ".webp", ".apng", ".mp4") if clips else (".png",):
    result.to_bytes(kind)
    result.save(out + "/x" + kind)
    pipeline.encode(out + "/x" + kind)
result.pil()
result._repr_png_()
pipeline.encode(result.images)
pipeline.score(result.tokens, [0, 1])
if not clips:
    from PIL import Image
    for kind in ("bmp", "jpg", "tif", "webp", "ppm"):
        result.pil()[0].resize((70, 50)).save(out + "/y." + kind)
        pipeline.encode(out + "/y." + kind)
        pipeline.keep_mask(change="left", photo=out + "/y." + kind)
for bad in (lambda: pipeline.generate(99), lambda: Pipeline.load(folder, "cuda"), lambda: Pipeline.load("no-such")):
    try:
        bad()
    except Exception as error:
        str(error)
pipeline.close()
print(sorted(set(seen)))
"""
    assert run(WATCH + code, str(request.getfixturevalue(kind)), device, str(tmp_path)) == "[]\n"


FORK = """
import os, sys, threading, time
import par_runtime
import_of, folder, photo = sys.argv[1:]
begun = threading.Event()
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == import_of and threading.current_thread() is not threading.main_thread():
            begun.set()
            time.sleep(0.3)  # the lock of the module is held meanwhile
        return None
sys.meta_path.insert(0, Slow())
def first():
    global pipeline
    pipeline = par_runtime.Pipeline.load(folder, "cpu", threads=1, selftest=False)
    pipeline.encode(photo)
thread = threading.Thread(target=first)
thread.start()
assert begun.wait(30)
pid = os.fork()
if pid == 0:
    import signal
    signal.alarm(30)  # ends it where it hangs
    pipeline = par_runtime.Pipeline.load(folder, "cpu", threads=1, selftest=False)
    pipeline.encode(photo)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
thread.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("module", ["par_runtime.result", "PIL.PngImagePlugin", "onnxruntime", "PIL.TiffImagePlugin"])
def test_a_fork_waits_for_the_first_import_of_another_thread(module: str) -> None:
    photo = str(ROOM.parents[1] / "docs" / "demo.png")
    assert run(FORK, module, str(DATA / "tiny"), photo) == "0\n"


# -- signals ----------------------------------------------------------------------------------------------------------


def test_what_is_imported_already_touches_no_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*_: object) -> None:
        raise AssertionError("a handler was set")

    monkeypatch.setattr(signal, "signal", touched)
    with importing("os", "par_runtime.late"):
        pass
    with pytest.raises(AssertionError, match="a handler was set"), importing("os", "no_such_module"):
        pass


def test_warm_calls_touch_no_signal() -> None:
    code = """
import signal, sys
from par_runtime import Pipeline
def used():
    pipeline = Pipeline.load(sys.argv[1], sys.argv[2], threads=1)
    result = pipeline.generate([0, 1], seed=1)
    pipeline.encode(result.images); pipeline.decode(result.tokens); result.to_bytes()
used()
def touched(*_): raise AssertionError("a handler was set")
signal.signal = touched
used()
print("none")
"""
    for device in ("cpu", "cpu-ort"):
        assert run(code, str(DATA / "tiny"), device) == "none\n"
