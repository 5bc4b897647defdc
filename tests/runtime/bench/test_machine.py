"""The machine of a row, and the flags for other processes, clocks and debug builds."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import child
from par_runtime import __version__
from par_runtime.bench import gpu, machine
from par_runtime.bench.machine import Counters, Watch, commit, counters, describe, disturbances


def at(all_s: float, busy_s: float, ours_s: float, **more: object) -> Counters:
    return Counters(
        all_s, busy_s, more.get("steal", 0.0), ours_s, more.get("throttles", 0), more.get("mhz"), more.get("load")
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("after", "flags"),
    [
        (at(110, 59, 29), []),  # 9 s of work, all ours
        (at(110, 53, 22), []),
        (at(110, 58, 21, load=3.2), ["busy: other processes took 70 % of the CPU time, load average 3.2"]),
        (at(110, 50, 20, steal=1.0), ["busy: the hypervisor gave 10 % of the CPU time to others"]),
        (at(110, 50, 20, throttles=3), ["throttled: the CPU lowered its clock 3 times for heat"]),
        (at(110, 50, 20, mhz=1500.0), ["throttled: the CPU's clock fell from 3000 to 1500 MHz"]),
        (at(110, 50, 20, mhz=2900.0), []),
        (at(100.1, 50.02, 20, mhz=3000.0), []),  # two ticks of the clock in a short time prove nothing
        (at(100.1, 50.03, 20, mhz=3000.0), ["busy: other processes took 30 % of the CPU time"]),
        (at(100.1, 50, 20, steal=0.02), []),
    ],
)
def test_what_happened_between_two_readings(after: Counters, flags: list[str]) -> None:
    before = at(100, 50, 20, mhz=3000.0)
    if after == at(110, 53, 22):
        after = at(110, 53, 23)
    assert disturbances(before, after) == flags
    assert disturbances(None, after) == disturbances(before, None) == []


def test_another_busy_process_is_noticed() -> None:
    """A busy process counts as another's unless it is named as our child."""
    if counters() is None:
        pytest.skip("this system does not report it")
    burn = "import sys, time\nwhile time.process_time() < 0.5: pass\nprint('busy enough', flush=True)\nsys.stdin.read()"
    for ours in (False, True):
        with child([sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            before = counters((process.pid,) if ours else ())
            assert process.stdout is not None
            assert process.stdout.readline() == "busy enough\n"
            after = counters((process.pid,) if ours else ())
        assert before is not None
        assert after is not None
        took = after.ours_s - before.ours_s
        assert took > 0.3 if ours else took < 0.3
        assert after.busy_s - before.busy_s > 0.3


def test_this_machine_is_described() -> None:
    here = describe()
    assert here.cpu
    assert here.cores >= 1
    assert here.memory_bytes is None or here.memory_bytes > 2**28
    assert here.gpu == ""


def test_the_commit_is_of_the_checkout_that_holds_the_package() -> None:
    assert commit()
    top = Path(machine.__file__).parents[3]
    if (top / ".git").exists():
        head = subprocess.run(
            ["git", "-C", str(top), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
        assert commit().startswith(head)


def test_a_watch_flags_development_mode() -> None:
    code = "from par_runtime.bench.machine import debug_reasons; print(debug_reasons())"
    printed = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert "Python's development mode" in printed
    assert not any(flag.startswith("debug") for flag in Watch().flags())


SMI = """#!/bin/sh
case "$*" in
*name,driver*) echo "NVIDIA A100-SXM4-80GB, 580.1, 1410, 1593" ;;
*clocks_event_reasons.active*) echo "0x0000000000000024" ;;
esac
"""


def test_clocks_and_throttling_come_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(SMI)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert gpu._smi(0, "name,driver_version,clocks.sm,clocks.mem") == ["NVIDIA A100-SXM4-80GB", "580.1", "1410", "1593"]
    assert gpu.why_slower(0) == [
        "its power limit held the GPU's clock down",
        "heat held the GPU's clock down (software limit)",
    ]
    tool.write_text("#!/bin/sh\nexit 3\n")
    assert gpu.why_slower(0) == []


COUNTING = """#!/bin/sh
case "$*" in
*clocks_event_reasons_counters*) cat "$(dirname "$0")/counts" ;;
*) echo "0x0000000000000024" ;;
esac
"""


def test_a_clock_that_was_held_down_meanwhile_is_seen_when_it_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reasons of this moment are those of an idle GPU, so what counts is the time that the driver has counted."""
    tool, counts = tmp_path / "nvidia-smi", tmp_path / "counts"
    tool.write_text(COUNTING)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    here = gpu.Gpu(0, "x", "y", None, None, None)
    counts.write_text("7000000, 0, 0, [N/A]\n")
    watch = Watch((), here)
    watch._began -= 10.0
    counts.write_text("12000000, 100, 0, [N/A]\n")
    assert [flag for flag in watch.flags() if flag.startswith("throttled: its")] == [
        "throttled: its power limit held the GPU's clock down, 50 % of the time"
    ]
    assert not any("heat held" in flag for flag in watch.flags())
    counts.write_text("[N/A], [N/A], [N/A], [N/A]\n")  # a driver that does not count
    assert any("heat held" in flag for flag in Watch((), here).flags())


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit: a package, and two bundles."""
    monkeypatch.setenv("PARVIS_COMMIT", "1234567")  # says nothing where there is a repository
    top = tmp_path / "checkout"
    for name in (
        "package/__init__.py",
        "package/rows.py",
        "models/a/weights.data",
        "models/b/c/d.onnx",
        "models/recipe/x.py",
        "docs/x.md",
    ):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(f"{name}\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@y", *command], cwd=top, check=True)
    return top


def removed(top: Path, *names: str) -> None:
    for name in names:
        shutil.rmtree(top / name) if (top / name).is_dir() else (top / name).unlink()


@pytest.mark.parametrize(
    ("change", "dirty"),
    [
        (lambda top: None, False),
        (lambda top: removed(top, "models/b"), False),
        (lambda top: removed(top, "models/a", "models/b"), False),
        (lambda top: subprocess.run(["git", "rm", "-q", "-r", "models/b"], cwd=top, check=True), False),
        (lambda top: (top / "package/rows.py").touch(), False),
        (lambda top: removed(top, "package/rows.py"), True),
        (lambda top: removed(top, "models/b", "docs/x.md"), True),
        (lambda top: removed(top, "models/recipe"), True),  # code
        (lambda top: (top / "models/a/weights.data").write_text("other"), True),
        (lambda top: (top / "package/rows.py").write_text("other"), True),
        (lambda top: (removed(top, "models/b"), (top / "package/rows.py").write_text("other")), True),
        (lambda top: (top / "models/b").rename(top / "package/b"), False),
        (lambda top: subprocess.run(["git", "mv", "models/b", "package/b"], cwd=top, check=True), True),
        (lambda top: (removed(top, "models/a"), (top / "models/a").write_text("a file")), False),
    ],
    ids=[
        "nothing", "no bundle", "no bundles", "removed", "touched", "no code", "no page", "no recipe", "bundle",
        "code", "both",
        "moved, not added", "moved", "a file in its place, not added",
    ],
)  # fmt: skip
def test_a_bundle_that_was_not_copied_is_no_change_of_the_checkout(
    checkout: Path, change: Callable[[Path], object], dirty: bool
) -> None:
    head = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True
    ).stdout.strip()
    change(checkout)
    assert machine.commit_of(checkout / "package") == head + "-dirty" * dirty


def test_a_repository_that_does_not_hold_the_package_says_nothing(checkout: Path) -> None:
    other = checkout / "lib" / "package"
    other.mkdir(parents=True)
    (other / "__init__.py").touch()
    with pytest.raises(subprocess.SubprocessError):
        machine.commit_of(other)


def test_a_copy_without_its_repository_is_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no git
    for told, shown in (("1a2b3c4d5e6f-dirty", "1a2b3c4d5e6f-dirty"), ("a b", f"parvis {__version__}")):
        monkeypatch.setenv("PARVIS_COMMIT", told)
        machine.commit.cache_clear()
        assert machine.commit() == shown
    machine.commit.cache_clear()
